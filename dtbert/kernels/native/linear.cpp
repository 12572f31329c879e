// Products of packed tokens and a weight on a CPU, each finished where it lies in cache: bias and activation, or bias,
// residual and LayerNorm.
//
// Weights are of the kind of the tokens' states, float32 or bfloat16, or int8 with a scale per output. For these a token's
// values are rounded to 8 bit by a step and a zero of its own, and products are summed in int32. Weights lie in panels of
// kColumns outputs, in neighbours as the instructions of their kind take them.

#include "activations.h"

#include <numeric>

namespace dtbert {
namespace {

// With registers of eight a panel is what they sum at a time: from one with more columns it would be taken in pieces that
// share few sets of the nearest cache.
constexpr int64_t kRows = kTile == 8 ? 128 : 64, kColumns = kTile == 8 ? 16 : 64;
// Blocks for each thread, from which on one that has a block less does not matter.
constexpr int64_t kManyBlocks = 8;

// Of a panel with what stands behind it.
template <typename W>
int64_t panel_bytes(int64_t inputs) {
  return kColumns * (inputs * sizeof(W) + (std::is_same_v<W, int8_t> ? sizeof(float) + sizeof(int32_t) : 0));
}

// T is the kind of the states, W that of the weight.
template <typename T, typename W>
struct Weight {
  const W* panels;
  const T* bias;  // [outputs]
  int64_t inputs, outputs;
  Activation activation;

  int64_t panel_count() const { return (outputs + kColumns - 1) / kColumns; }
  const W* panel(int64_t index) const { return panels + index * panel_bytes<W>(inputs) / sizeof(W); }
};

// Behind an int8 panel: the scale of each of its outputs, and the sum of its values.
struct Columns {
  float scale[kColumns];
  int32_t sum[kColumns];
};

typedef uint8_t Bytes __attribute__((vector_size(kTile), aligned(1)));

// Some rows of x as a product takes them, and room for its results.
template <typename T, typename W>
struct Scratch {
  using A = std::conditional_t<std::is_same_v<W, int8_t>, uint8_t, T>;
  using C = std::conditional_t<std::is_same_v<W, int8_t>, int32_t, float>;
  A* copied;
  C* results;
  float step[kRows];   // between two neighbouring values of a row in 8 bit
  int32_t zero[kRows];
  const A* rows;
  int64_t stride;

  Scratch(int64_t inputs, int64_t columns)
      : copied(kept_room<A, 0>(kRows * inputs)), results(kept_room<C, 1>(kRows * columns)) {}

  // Takes `count` rows, from `start` on or those that are `chosen` there; as many as `padded` are computed.
  void take(const T* x, int64_t x_stride, const int64_t* chosen, int64_t start, int64_t count, int64_t padded, int64_t inputs) {
    const auto from = [&](int64_t row) { return x + (chosen == nullptr ? start + row : chosen[start + row]) * x_stride; };
    rows = copied;
    stride = inputs;
    if constexpr (std::is_same_v<W, int8_t>) {
      for (int64_t row = 0; row < count; ++row) quantize(from(row), inputs, row);
    } else if (count == padded && chosen == nullptr) {
      rows = from(0);
      stride = x_stride;
    } else {
      for (int64_t row = 0; row < count; ++row) std::copy_n(from(row), inputs, copied + row * inputs);
    }
  }

  // As `dtbert.kernels.int8.quantize_tokens`.
  void quantize(const T* x, int64_t inputs, int64_t row) {
    Vector least{}, most{}, nothing{};  // NaN where a value is not finite, and then the step is NaN
    for (int64_t i = 0; i < inputs; i += kTile) {
      const Vector part = load(x + i);
      most = larger(most, part);
      least = smaller(least, part);
      nothing += part * 0.0f;
    }
    const float low = largest_of(-least), range = largest_of(most) + low + sum_of(nothing), levels = 255.0f / range;
    const float inverse = levels < std::numeric_limits<float>::infinity() ? levels : 0.0f;
    zero[row] = inverse > 0 ? static_cast<int32_t>(std::nearbyint(low * inverse)) : 0;
    step[row] = range / 255.0f;
    uint8_t* to = copied + row * inputs;
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Integers offset = Integers{} + (zero[row] - std::bit_cast<int32_t>(kMagic));
    for (int64_t i = 0; i < inputs; i += kTile) {
      const Integers whole = (Integers)(load(x + i) * inverse + kMagic) + offset;
      // Both ends of the range may have been rounded up.
      *reinterpret_cast<Bytes*>(to + i) = __builtin_convertvector(whole > 255 ? Integers{} + 255 : whole, Bytes);
    }
  }
};

// results [rows, kColumns], `stride` apart, = rows x a panel.
template <typename T, typename W>
void multiply_panel(const Weight<T, W>& weight, int64_t panel, int64_t rows, Scratch<T, W>& s,
                    typename Scratch<T, W>::C* results, int64_t stride) {
  const W* next = weight.panel(std::min(panel + 1, weight.panel_count() - 1));
  multiply(rows, kColumns, weight.inputs, s.rows, s.stride, weight.panel(panel), kColumns, results, stride, next);
}

// Makes results of a product, kTile of a row from `output` on, what they stand for, and adds the bias.
template <typename T, typename W>
struct Finish {
  Vector bias, scale;
  Integers sum;

  Finish(const Weight<T, W>& weight, int64_t output) : bias(load(weight.bias + output)) {
    if constexpr (std::is_same_v<W, int8_t>) {
      const W* panel = weight.panel(output / kColumns);
      const Columns& of = *reinterpret_cast<const Columns*>(panel + weight.inputs * kColumns);
      scale = load(of.scale + output % kColumns);
      sum = load(of.sum + output % kColumns);
    }
  }

  Vector operator()(const Scratch<T, W>& s, int64_t row, const typename Scratch<T, W>::C* results) const {
    if constexpr (std::is_same_v<W, int8_t>) {
      const Integers whole = load(results) - s.zero[row] * sum;
      return __builtin_convertvector(whole, Vector) * (scale * s.step[row]) + bias;
    } else {
      return load(results) + bias;
    }
  }
};

// Some rows of a matrix, all or those that are chosen.
template <typename T>
struct Rows {
  T* values;
  int64_t stride, count;
  const int64_t* chosen = nullptr;

  T* operator[](int64_t row) const { return values + (chosen == nullptr ? row : chosen[row]) * stride; }
};

template <typename T, typename W, Activation activation>
void store_panel(const Weight<T, W>& weight, int64_t panel, int64_t start, int64_t count, const Scratch<T, W>& s,
                 const Rows<T>& to) {
  const int64_t first = panel * kColumns, columns = std::min(kColumns, weight.outputs - first);
  for (int64_t c = 0; c < columns; c += kTile) {
    const Finish<T, W> finish(weight, first + c);
    for (int64_t row = 0; row < count; ++row)
      store(to[start + row] + first + c, activate<activation, T>(finish(s, row, s.results + row * kColumns + c)));
  }
}

template <typename T, typename W>
void store_panel(const Weight<T, W>& weight, int64_t panel, int64_t start, int64_t count, const Scratch<T, W>& s,
                 const Rows<T>& to) {
  switch (weight.activation) {
    case kGelu: return store_panel<T, W, kGelu>(weight, panel, start, count, s, to);
    case kGeluTanh: return store_panel<T, W, kGeluTanh>(weight, panel, start, count, s, to);
    case kRelu: return store_panel<T, W, kRelu>(weight, panel, start, count, s, to);
    case kSilu: return store_panel<T, W, kSilu>(weight, panel, start, count, s, to);
    case kIdentity: return store_panel<T, W, kIdentity>(weight, panel, start, count, s, to);
  }
}

// The chosen rows of x are those of `to`.
template <typename T, typename W>
void linear(const Weight<T, W>& weight, const T* x, int64_t x_stride, const Rows<T>& to) {
  const int64_t tokens = to.count;
  const int64_t blocks = (tokens + kRows - 1) / kRows, panels = weight.panel_count();
  // Few blocks, of which the threads would not all have as many: each takes some of the outputs.
  const int64_t threads = at::get_num_threads(), even = threads / std::gcd(blocks, threads);
  const int64_t parts = blocks < kManyBlocks * threads ? std::min(even, panels) : 1;
  const int64_t part = (panels + parts - 1) / parts;
  share(blocks * parts, [&] { return Scratch<T, W>(weight.inputs, kColumns); }, [&](int64_t unit, Scratch<T, W>& s) {
    const int64_t start = unit / parts * kRows, count = std::min(kRows, tokens - start), rows = padded<W>(count);
    s.take(x, x_stride, to.chosen, start, count, rows, weight.inputs);
    const int64_t first = unit % parts * part;
    for (int64_t panel = first; panel < std::min(panels, first + part); ++panel) {
      multiply_panel(weight, panel, rows, s, s.results, kColumns);
      store_panel(weight, panel, start, count, s, to);
    }
  });
}

template <typename T>
struct Norm {
  const T *residual, *weight, *bias;
  const int64_t* rows;  // of the residual, or null
  int64_t stride;       // of the residual
  float eps;
};

template <typename T, typename W>
void add_norm(const Weight<T, W>& weight, const Norm<T>& norm, const T* x, int64_t tokens, int64_t x_stride, T* to) {
  const int64_t panels = weight.panel_count(), outputs = weight.outputs, stride = panels * kColumns;
  // As many blocks for each thread.
  const int64_t blocks = std::max<int64_t>(1, round_up((tokens + kRows - 1) / kRows, at::get_num_threads()));
  const int64_t block = std::max(kTile, round_up((tokens + blocks - 1) / blocks, kTile));
  share((tokens + block - 1) / block, [&] { return Scratch<T, W>(weight.inputs, stride); }, [&](int64_t unit, Scratch<T, W>& s) {
    const int64_t start = unit * block, count = std::min(block, tokens - start), rows = padded<W>(count);
    s.take(x, x_stride, nullptr, start, count, rows, weight.inputs);
    for (int64_t panel = 0; panel < panels; ++panel)
      multiply_panel(weight, panel, rows, s, s.results + panel * kColumns, stride);
    for (int64_t row = 0; row < count; ++row) {
      const auto* results = s.results + row * stride;
      float* sums = reinterpret_cast<float*>(s.results + row * stride);
      const T* residual = norm.residual + (norm.rows == nullptr ? start + row : norm.rows[start + row]) * norm.stride;
      Vector total{}, squares{};
      for (int64_t c = 0; c < outputs; c += kTile) {
        const Vector sum = Finish<T, W>(weight, c)(s, row, results + c) + load(residual + c);
        store(sums + c, sum);
        total += sum;
      }
      const float mean = sum_of(total) / static_cast<float>(outputs);
      for (int64_t c = 0; c < outputs; c += kTile) {
        const Vector part = load(sums + c) - mean;
        squares += part * part;
      }
      const float inverse = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(outputs) + norm.eps);
      T* out = to + (start + row) * outputs;
      for (int64_t c = 0; c < outputs; c += kTile)
        store(out + c, (load(sums + c) - mean) * inverse * load(norm.weight + c) + load(norm.bias + c));
    }
  });
}

// Where a value of a panel lies in it.
template <typename W>
int64_t place(int64_t column, int64_t input) {
  constexpr int64_t n = kNeighbours<W>;
  return (input / n * kColumns + column) * n + input % n;
}

template <typename W>
void pack(const W* weight, const float* scale, int64_t outputs, int64_t inputs, W* to) {
  for (int64_t first = 0; first < outputs; first += kColumns, to += panel_bytes<W>(inputs) / sizeof(W)) {
    Columns of{};
    for (int64_t c = 0; c < kColumns; ++c) {
      const bool real = first + c < outputs;
      for (int64_t i = 0; i < inputs; ++i) {
        const W value = real ? weight[(first + c) * inputs + i] : static_cast<W>(0);
        to[place<W>(c, i)] = value;
        if constexpr (std::is_same_v<W, int8_t>) of.sum[c] += value;
      }
      if (real && scale != nullptr) of.scale[c] = scale[first + c];
    }
    if constexpr (std::is_same_v<W, int8_t>) std::memcpy(to + inputs * kColumns, &of, sizeof of);
  }
}

template <typename W>
void unpack(const W* panels, int64_t outputs, int64_t inputs, W* to) {
  for (int64_t o = 0; o < outputs; ++o) {
    const W* panel = panels + o / kColumns * (panel_bytes<W>(inputs) / sizeof(W));
    for (int64_t i = 0; i < inputs; ++i) to[o * inputs + i] = panel[place<W>(o % kColumns, i)];
  }
}

// work(T) for a kind.
template <typename Do>
void by_kind(at::ScalarType kind, const Do& work) {
  if (kind == at::kFloat) return work(float{});
  if (kind == at::kBFloat16) return work(BFloat16{});
  TORCH_CHECK_TYPE(kind == at::kChar, "the compiled steps take weights in float32, bfloat16 or int8, not in ", kind);
  work(int8_t{});
}

// [outputs, inputs] to panels; `scale`, float32 [outputs], is of int8.
Tensor to_panels(const Tensor& weight, const std::optional<Tensor>& scale) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), panels = round_up(outputs, kColumns) / kColumns;
  Tensor to;
  by_kind(weight.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    to = at::empty({panels * panel_bytes<W>(inputs) / static_cast<int64_t>(sizeof(W))}, weight.options());
    const float* scales = scale.has_value() ? scale->const_data_ptr<float>() : nullptr;
    pack(weight.const_data_ptr<W>(), scales, outputs, inputs, to.mutable_data_ptr<W>());
  });
  return to;
}

Tensor from_panels(const Tensor& panels, int64_t outputs, int64_t inputs) {
  Tensor weight = at::empty({outputs, inputs}, panels.options());
  by_kind(panels.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    unpack(panels.const_data_ptr<W>(), outputs, inputs, weight.mutable_data_ptr<W>());
  });
  return weight;
}

// work(x's values, the weight) for their kinds.
template <typename Do>
void with_weight(const Tensor& x, const Tensor& panels, const Tensor& bias, int64_t activation, const Do& work) {
  by_states(x, [&](auto zero) {
    using T = decltype(zero);
    const auto act = static_cast<Activation>(activation);
    if (panels.scalar_type() == at::kChar) {
      TORCH_CHECK(kHasInt8, "this processor has no instructions for products in int8");
      work(x.const_data_ptr<T>(),
           Weight<T, int8_t>{panels.const_data_ptr<int8_t>(), bias.const_data_ptr<T>(), x.size(1), bias.size(0), act});
    } else {
      work(x.const_data_ptr<T>(),
           Weight<T, T>{panels.const_data_ptr<T>(), bias.const_data_ptr<T>(), x.size(1), bias.size(0), act});
    }
  });
}

template <typename T, typename W>
void run_linear(const T* x, const Weight<T, W>& weight, const Tensor& rows, Tensor& out) {
  linear(weight, x, rows.stride(0), Rows<T>{out.mutable_data_ptr<T>(), out.size(1), rows.size(0)});
}

Tensor linear_op(const Tensor& x, const Tensor& panels, const Tensor& bias, int64_t activation) {
  Tensor out = at::empty({x.size(0), bias.size(0)}, x.options());
  with_weight(x, panels, bias, activation, [&](const auto* values, const auto& weight) { run_linear(values, weight, x, out); });
  return out;
}

// Outputs `first` to `end` alone, whole panels, of all rows of x or the chosen ones, into their places in `out`.
template <typename T, typename W>
void run_part(const T* x, Weight<T, W> weight, int64_t first, int64_t end, const Tensor& all, const std::optional<Tensor>& rows,
              Tensor& out) {
  weight.panels = weight.panel(first / kColumns);
  weight.bias += first;
  weight.outputs = end - first;
  Rows<T> to{out.mutable_data_ptr<T>() + first, out.size(1), all.size(0)};
  if (rows.has_value()) to.count = rows->size(0), to.chosen = rows->const_data_ptr<int64_t>();
  linear(weight, x, all.stride(0), to);
}

void part_op(const Tensor& x, const Tensor& panels, const Tensor& bias, int64_t first, int64_t end,
             const std::optional<Tensor>& rows, Tensor& out) {
  TORCH_CHECK(first % kColumns == 0 && end % kColumns == 0, "outputs ", first, " to ", end, " are no whole panels");
  with_weight(x, panels, bias, kIdentity, [&](const auto* values, const auto& weight) {
    run_part(values, weight, first, end, x, rows, out);
  });
}

template <typename T, typename W>
void run_add_norm(const T* x, const Weight<T, W>& weight, const Tensor& rows, const Tensor& residual, const Tensor& norm_weight,
                  const Tensor& norm_bias, double eps, const int64_t* chosen, Tensor& out) {
  Norm<T> norm{residual.const_data_ptr<T>(), norm_weight.const_data_ptr<T>(), norm_bias.const_data_ptr<T>(), chosen,
               residual.stride(0), static_cast<float>(eps)};
  add_norm(weight, norm, x, rows.size(0), rows.stride(0), out.mutable_data_ptr<T>());
}

Tensor add_norm_op(const Tensor& x, const Tensor& panels, const Tensor& bias, const Tensor& residual, const Tensor& norm_weight,
                   const Tensor& norm_bias, double eps, const std::optional<Tensor>& rows) {
  Tensor out = at::empty({x.size(0), bias.size(0)}, x.options());
  const int64_t* chosen = rows.has_value() ? rows->const_data_ptr<int64_t>() : nullptr;
  with_weight(x, panels, bias, kIdentity, [&](const auto* values, const auto& weight) {
    run_add_norm(values, weight, x, residual, norm_weight, norm_bias, eps, chosen, out);
  });
  return out;
}

}  // namespace
}  // namespace dtbert

TORCH_LIBRARY_FRAGMENT(dtbert_native, library) {
  library.def("to_panels(Tensor weight, Tensor? scale) -> Tensor");
  library.def("from_panels(Tensor panels, int outputs, int inputs) -> Tensor");
  library.def("linear(Tensor x, Tensor panels, Tensor bias, int activation) -> Tensor");
  library.def("linear_part(Tensor x, Tensor panels, Tensor bias, int first, int end, Tensor? rows, Tensor(a!) out) -> ()");
  library.def("add_norm(Tensor x, Tensor panels, Tensor bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, "
              "float eps, Tensor? rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(dtbert_native, CPU, library) {
  library.impl("to_panels", dtbert::to_panels);
  library.impl("from_panels", dtbert::from_panels);
  library.impl("linear", dtbert::linear_op);
  library.impl("linear_part", dtbert::part_op);
  library.impl("add_norm", dtbert::add_norm_op);
}
