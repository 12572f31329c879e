// Products of packed tokens and a weight on a CPU, each finished where it lies in cache: bias and activation, or bias,
// residual and LayerNorm.
//
// Weights are float32 or bfloat16, and lie in panels of kColumns outputs, each with 1 or 2 neighbours along the summed
// dimension side by side, as the instructions of their kind take them.

#include "common.h"

namespace dtbert {
namespace {

constexpr int64_t kRows = 64, kColumns = 64;

// In the order of `ACTIVATIONS` in __init__.py.
enum Activation : int64_t { kIdentity, kGelu, kGeluTanh, kRelu, kSilu };

template <typename T>
constexpr int64_t kNeighbours = 4 / sizeof(T);

// exp(-x) for x >= 0.
inline Vector decay(Vector x) { return exp2_of(x * -1.44269502f); }

inline Vector size_of(Vector x) { return larger(x, -x); }

// (1 + erf(x / sqrt(2))) / 2 by Abramowitz and Stegun 7.1.26, to 1e-7.
inline Vector normal_cdf(Vector x) {
  const Vector z = size_of(x) * 0.707106769f, t = 1.0f / (1.0f + 0.3275911f * z);
  Vector tail = 1.061405429f * t - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail *= 0.5f * t * decay(z * z);
  return x < 0 ? tail : 1.0f - tail;
}

inline Vector sigmoid(Vector x) {
  const Vector small = decay(size_of(x)), inverse = 1.0f / (1.0f + small);
  return x < 0 ? small * inverse : inverse;
}

template <Activation activation>
inline Vector activate(Vector x) {
  if constexpr (activation == kGelu) return x * normal_cdf(x);
  if constexpr (activation == kGeluTanh) return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  if constexpr (activation == kRelu) return larger(x, Vector{});
  if constexpr (activation == kSilu) return x * sigmoid(x);
  return x;
}

template <typename T>
struct Weight {
  const T* panels;
  const T* bias;  // [outputs]
  int64_t inputs, outputs;
  Activation activation;

  int64_t panel_count() const { return (outputs + kColumns - 1) / kColumns; }
};

// Some rows of x as a product takes them, and room for its results.
template <typename T>
struct Scratch {
  std::vector<T> copied;
  std::vector<float> results;
  const T* rows;
  int64_t stride;

  Scratch(int64_t inputs, int64_t columns) : copied(kRows * inputs), results(kRows * columns) {}

  // Takes `count` rows, as many as `padded` of which are computed.
  void take(const T* x, int64_t x_stride, int64_t count, int64_t padded, int64_t inputs) {
    rows = count == padded ? x : copied.data();
    stride = count == padded ? x_stride : inputs;
    if (count == padded) return;
    for (int64_t row = 0; row < count; ++row) std::copy_n(x + row * x_stride, inputs, copied.data() + row * inputs);
  }
};

// results [padded, kColumns], `stride` apart, = rows x a panel.
template <typename T>
void multiply_panel(const Weight<T>& weight, int64_t panel, int64_t padded, Scratch<T>& s, float* results, int64_t stride) {
  const T* b = weight.panels + panel * weight.inputs * kColumns;
  if constexpr (std::is_same_v<T, float>)
    multiply(padded, kColumns, weight.inputs, s.rows, s.stride, b, kColumns, results, stride);
  else
    at::native::cpublas::brgemm(padded, kColumns, weight.inputs, s.stride, kColumns, stride, false, s.rows, b, results, true);
}

template <typename T, Activation activation>
void store_panel(const Weight<T>& weight, int64_t panel, int64_t count, const Scratch<T>& s, T* to) {
  const int64_t first = panel * kColumns, columns = std::min(kColumns, weight.outputs - first);
  for (int64_t row = 0; row < count; ++row) {
    const float* results = s.results.data() + row * kColumns;
    T* out = to + row * weight.outputs + first;
    for (int64_t c = 0; c < columns; c += kTile)
      store(out + c, activate<activation>(load(results + c) + load(weight.bias + first + c)));
  }
}

template <typename T>
void store_panel(const Weight<T>& weight, int64_t panel, int64_t count, const Scratch<T>& s, T* to) {
  switch (weight.activation) {
    case kGelu: return store_panel<T, kGelu>(weight, panel, count, s, to);
    case kGeluTanh: return store_panel<T, kGeluTanh>(weight, panel, count, s, to);
    case kRelu: return store_panel<T, kRelu>(weight, panel, count, s, to);
    case kSilu: return store_panel<T, kSilu>(weight, panel, count, s, to);
    case kIdentity: return store_panel<T, kIdentity>(weight, panel, count, s, to);
  }
}

template <typename T>
void linear(const Weight<T>& weight, const T* x, int64_t tokens, int64_t x_stride, T* to) {
  const int64_t blocks = (tokens + kRows - 1) / kRows, panels = weight.panel_count();
  // Few tokens for many threads: each takes some of the outputs.
  const int64_t parts = std::clamp<int64_t>(2 * at::get_num_threads() / std::max<int64_t>(1, blocks), 1, panels);
  const int64_t part = (panels + parts - 1) / parts;
  share(blocks * parts, [&] { return Scratch<T>(weight.inputs, kColumns); }, [&](int64_t unit, Scratch<T>& s) {
    const int64_t start = unit / parts * kRows, count = std::min(kRows, tokens - start), padded = round_up(count, kTile);
    s.take(x + start * x_stride, x_stride, count, padded, weight.inputs);
    const int64_t first = unit % parts * part;
    for (int64_t panel = first; panel < std::min(panels, first + part); ++panel) {
      multiply_panel(weight, panel, padded, s, s.results.data(), kColumns);
      store_panel(weight, panel, count, s, to + start * weight.outputs);
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

template <typename T>
void add_norm(const Weight<T>& weight, const Norm<T>& norm, const T* x, int64_t tokens, int64_t x_stride, T* to) {
  const int64_t panels = weight.panel_count(), outputs = weight.outputs, stride = panels * kColumns;
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::clamp(round_up((tokens + threads - 1) / threads, kTile), kTile, kRows);
  share((tokens + block - 1) / block, [&] { return Scratch<T>(weight.inputs, stride); }, [&](int64_t unit, Scratch<T>& s) {
    const int64_t start = unit * block, count = std::min(block, tokens - start), padded = round_up(count, kTile);
    s.take(x + start * x_stride, x_stride, count, padded, weight.inputs);
    for (int64_t panel = 0; panel < panels; ++panel)
      multiply_panel(weight, panel, padded, s, s.results.data() + panel * kColumns, stride);
    for (int64_t row = 0; row < count; ++row) {
      float* sums = s.results.data() + row * stride;
      const T* residual = norm.residual + (norm.rows == nullptr ? start + row : norm.rows[start + row]) * norm.stride;
      Vector total{}, squares{};
      for (int64_t c = 0; c < outputs; c += kTile) {
        const Vector sum = load(sums + c) + load(weight.bias + c) + load(residual + c);
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

template <typename T>
void pack(const T* weight, int64_t outputs, int64_t inputs, T* to) {
  constexpr int64_t neighbours = kNeighbours<T>;
  for (int64_t first = 0; first < outputs; first += kColumns, to += inputs * kColumns)
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t c = 0; c < kColumns; ++c)
        to[(i / neighbours * kColumns + c) * neighbours + i % neighbours] =
            first + c < outputs ? weight[(first + c) * inputs + i] : static_cast<T>(0);
}

template <typename T>
void unpack(const T* panels, int64_t outputs, int64_t inputs, T* to) {
  constexpr int64_t neighbours = kNeighbours<T>;
  for (int64_t o = 0; o < outputs; ++o) {
    const T* panel = panels + o / kColumns * inputs * kColumns;
    for (int64_t i = 0; i < inputs; ++i)
      to[o * inputs + i] = panel[(i / neighbours * kColumns + o % kColumns) * neighbours + i % neighbours];
  }
}

// work(T) for the kind of a tensor.
template <typename Do>
void by_kind(const Tensor& tensor, const Do& work) {
  if (tensor.scalar_type() == at::kBFloat16) work(BFloat16{});
  else work(float{});
}

// [outputs, inputs] to panels.
Tensor to_panels(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  Tensor panels = at::empty({round_up(outputs, kColumns) * inputs}, weight.options());
  by_kind(weight, [&](auto zero) {
    using T = decltype(zero);
    pack(weight.const_data_ptr<T>(), outputs, inputs, panels.mutable_data_ptr<T>());
  });
  return panels;
}

Tensor from_panels(const Tensor& panels, int64_t outputs, int64_t inputs) {
  Tensor weight = at::empty({outputs, inputs}, panels.options());
  by_kind(panels, [&](auto zero) {
    using T = decltype(zero);
    unpack(panels.const_data_ptr<T>(), outputs, inputs, weight.mutable_data_ptr<T>());
  });
  return weight;
}

template <typename T>
Weight<T> weight_of(const Tensor& panels, const Tensor& bias, int64_t inputs, int64_t activation) {
  return {panels.const_data_ptr<T>(), bias.const_data_ptr<T>(), inputs, bias.size(0), static_cast<Activation>(activation)};
}

Tensor linear_op(const Tensor& x, const Tensor& panels, const Tensor& bias, int64_t activation) {
  Tensor out = at::empty({x.size(0), bias.size(0)}, x.options());
  by_kind(x, [&](auto zero) {
    using T = decltype(zero);
    linear(weight_of<T>(panels, bias, x.size(1), activation), x.const_data_ptr<T>(), x.size(0), x.stride(0),
           out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor add_norm_op(const Tensor& x, const Tensor& panels, const Tensor& bias, const Tensor& residual, const Tensor& norm_weight,
                   const Tensor& norm_bias, double eps, const std::optional<Tensor>& rows) {
  Tensor out = at::empty({x.size(0), bias.size(0)}, x.options());
  by_kind(x, [&](auto zero) {
    using T = decltype(zero);
    Norm<T> norm{residual.const_data_ptr<T>(), norm_weight.const_data_ptr<T>(), norm_bias.const_data_ptr<T>(),
                 rows.has_value() ? rows->const_data_ptr<int64_t>() : nullptr, residual.stride(0), static_cast<float>(eps)};
    add_norm(weight_of<T>(panels, bias, x.size(1), kIdentity), norm, x.const_data_ptr<T>(), x.size(0), x.stride(0),
             out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace dtbert

TORCH_LIBRARY_FRAGMENT(dtbert_native, library) {
  library.def("to_panels(Tensor weight) -> Tensor");
  library.def("from_panels(Tensor panels, int outputs, int inputs) -> Tensor");
  library.def("linear(Tensor x, Tensor panels, Tensor bias, int activation) -> Tensor");
  library.def("add_norm(Tensor x, Tensor panels, Tensor bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, "
              "float eps, Tensor? rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(dtbert_native, CPU, library) {
  library.impl("to_panels", dtbert::to_panels);
  library.impl("from_panels", dtbert::from_panels);
  library.impl("linear", dtbert::linear_op);
  library.impl("add_norm", dtbert::add_norm_op);
}
