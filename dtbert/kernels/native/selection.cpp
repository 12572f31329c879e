// Which tokens of each sequence a layer keeps: those of highest significance, in text order.

#include "common.h"

namespace dtbert {
namespace {

// Of a token's significance and place, the less the earlier it is chosen: by the higher significance, NaN before all, then
// by the lower place.
uint64_t key_of(float significance, uint32_t place) {
  constexpr uint32_t kSign = 0x80000000;
  const uint32_t bits = std::bit_cast<uint32_t>(significance + 0.0f);  // one zero, of which there are two
  const uint32_t order = std::isnan(significance) ? ~0u : bits & kSign ? ~bits : bits | kSign;
  return static_cast<uint64_t>(~order) << 32 | place;
}

// The rows of `count` of the tokens from `begin` to `end`.
void choose(const float* significance, int64_t begin, int64_t end, int64_t count, std::vector<uint64_t>& keys, int64_t* rows) {
  if (count == 0) return;
  keys.resize(end - begin);
  for (int64_t token = begin; token < end; ++token) keys[token - begin] = key_of(significance[token], token - begin);
  std::nth_element(keys.begin(), keys.begin() + (count - 1), keys.end());
  const uint64_t last = keys[count - 1];
  for (int64_t token = begin; token < end; ++token)
    if (key_of(significance[token], token - begin) <= last) *rows++ = token;
}

// int64 [K], ascending, of a significance float32 [T].
Tensor select(const Tensor& significance, const Tensor& cu_seqlens, const Tensor& cu_kept, int64_t kept) {
  Tensor rows = at::empty({kept}, cu_seqlens.options().dtype(at::kLong));
  const float* values = significance.const_data_ptr<float>();
  const int32_t *begins = cu_seqlens.const_data_ptr<int32_t>(), *to = cu_kept.const_data_ptr<int32_t>();
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  at::parallel_for(0, cu_seqlens.size(0) - 1, 4, [&](int64_t from, int64_t until) {
    std::vector<uint64_t> keys;
    for (int64_t one = from; one < until; ++one)
      choose(values, begins[one], begins[one + 1], to[one + 1] - to[one], keys, out + to[one]);
  });
  return rows;
}

}  // namespace
}  // namespace dtbert

TORCH_LIBRARY_FRAGMENT(dtbert_native, library) {
  library.def("select(Tensor significance, Tensor cu_seqlens, Tensor cu_kept, int kept) -> Tensor");
}

TORCH_LIBRARY_IMPL(dtbert_native, CPU, library) { library.impl("select", dtbert::select); }
