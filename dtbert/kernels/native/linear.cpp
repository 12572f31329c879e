// Products of packed tokens and a weight on a CPU, each finished where it lies in cache: bias and activation, or bias,
// residual and LayerNorm.
//
// Weights are float32, bfloat16, or int8 with a scale per output. For int8 weights a token's values are rounded to 8 bit by a
// scale of its own, and products are summed in int32. Weights lie in panels of kColumns outputs, each with 1, 2 or 4
// neighbours along the summed dimension side by side, as the instructions of their kind take them.

#include "common.h"

namespace dtbert {
namespace {

constexpr int64_t kRows = 64, kColumns = 64;
// Values at a token's zero: 8 bit without a sign are what instructions before AMX take.
constexpr int32_t kZero = 128;

// In the order of `ACTIVATIONS` in __init__.py.
enum Activation : int64_t { kIdentity, kGelu, kGeluTanh, kRelu, kSilu };

template <typename W>
constexpr int64_t kNeighbours = 4 / sizeof(W);

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

template <typename T, typename W>
struct Weight {
  const W* panels;
  const float* scale;   // [outputs], of int8
  const int32_t* sums;  // [outputs], of int8: kZero times the sum of its values
  const T* bias;        // [outputs]
  int64_t inputs, outputs;
  Activation activation;

  int64_t panel_count() const { return (outputs + kColumns - 1) / kColumns; }
};

typedef uint8_t Bytes __attribute__((vector_size(kTile), aligned(1)));

// Some rows of x as a product takes them, and room for its results.
template <typename T, typename W>
struct Scratch {
  using A = std::conditional_t<std::is_same_v<W, int8_t>, uint8_t, T>;
  std::vector<A> copied;
  std::vector<float> results;
  float scale[kRows];
  const A* rows;
  int64_t stride;

  Scratch(int64_t inputs, int64_t columns) : copied(kRows * inputs), results(kRows * columns) {}

  // Takes `count` rows, as many as `padded` of which are computed.
  void take(const T* x, int64_t x_stride, int64_t count, int64_t padded, int64_t inputs) {
    rows = copied.data();
    stride = inputs;
    if constexpr (std::is_same_v<W, int8_t>) {
      for (int64_t row = 0; row < count; ++row) scale[row] = quantize(x + row * x_stride, inputs, copied.data() + row * inputs);
    } else if (count == padded) {
      rows = x;
      stride = x_stride;
    } else {
      for (int64_t row = 0; row < count; ++row) std::copy_n(x + row * x_stride, inputs, copied.data() + row * inputs);
    }
  }

  // Returns the step between neighbouring values.
  static float quantize(const T* x, int64_t inputs, uint8_t* to) {
    Vector most{};
    for (int64_t i = 0; i < inputs; i += kTile) {
      const Vector part = load(x + i);
      most = larger(most, larger(part, -part));
    }
    const float largest = largest_of(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < inputs; i += kTile) {
      const Integers whole = (Integers)(load(x + i) * inverse + (12582912.0f + kZero)) - std::bit_cast<int32_t>(12582912.0f);
      *reinterpret_cast<Bytes*>(to + i) = __builtin_convertvector(whole, Bytes);
    }
    return largest / 127.0f;
  }
};

// results [padded, kColumns], `stride` apart, = rows x a panel.
template <typename T, typename W>
void multiply_panel(const Weight<T, W>& weight, int64_t panel, int64_t padded, Scratch<T, W>& s, float* results, int64_t stride) {
  const W* b = weight.panels + panel * weight.inputs * kColumns;
  if constexpr (std::is_same_v<W, float>)
    multiply(padded, kColumns, weight.inputs, s.rows, s.stride, b, kColumns, results, stride);
  else if constexpr (std::is_same_v<W, BFloat16>)
    at::native::cpublas::brgemm(padded, kColumns, weight.inputs, s.stride, kColumns, stride, false, s.rows, b, results, true);
  else
    at::native::cpublas::brgemm(padded, kColumns, weight.inputs, s.stride, kColumns, stride, false, s.rows,
                                b, reinterpret_cast<int32_t*>(results), true);
}

// The product's values and their bias.
template <typename T, typename W>
inline Vector finished(const Weight<T, W>& weight, const float* results, int64_t output, float row_scale) {
  const Vector bias = load(weight.bias + output);
  if constexpr (std::is_same_v<W, int8_t>) {
    const Integers whole = *reinterpret_cast<const Integers*>(results) - *reinterpret_cast<const Integers*>(weight.sums + output);
    return __builtin_convertvector(whole, Vector) * (load(weight.scale + output) * row_scale) + bias;
  }
  return load(results) + bias;
}

template <typename T, typename W, Activation activation>
void store_panel(const Weight<T, W>& weight, int64_t panel, int64_t count, const Scratch<T, W>& s, T* to) {
  const int64_t first = panel * kColumns, columns = std::min(kColumns, weight.outputs - first);
  for (int64_t row = 0; row < count; ++row) {
    const float* results = s.results.data() + row * kColumns;
    T* out = to + row * weight.outputs + first;
    for (int64_t c = 0; c < columns; c += kTile)
      store(out + c, activate<activation>(finished(weight, results + c, first + c, s.scale[row])));
  }
}

template <typename T, typename W>
void store_panel(const Weight<T, W>& weight, int64_t panel, int64_t count, const Scratch<T, W>& s, T* to) {
  switch (weight.activation) {
    case kGelu: return store_panel<T, W, kGelu>(weight, panel, count, s, to);
    case kGeluTanh: return store_panel<T, W, kGeluTanh>(weight, panel, count, s, to);
    case kRelu: return store_panel<T, W, kRelu>(weight, panel, count, s, to);
    case kSilu: return store_panel<T, W, kSilu>(weight, panel, count, s, to);
    case kIdentity: return store_panel<T, W, kIdentity>(weight, panel, count, s, to);
  }
}

template <typename T, typename W>
void linear(const Weight<T, W>& weight, const T* x, int64_t tokens, int64_t x_stride, T* to) {
  const int64_t blocks = (tokens + kRows - 1) / kRows, panels = weight.panel_count();
  // Few tokens for many threads: each takes some of the outputs.
  const int64_t parts = std::clamp<int64_t>(2 * at::get_num_threads() / std::max<int64_t>(1, blocks), 1, panels);
  const int64_t part = (panels + parts - 1) / parts;
  share(blocks * parts, [&] { return Scratch<T, W>(weight.inputs, kColumns); }, [&](int64_t unit, Scratch<T, W>& s) {
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

template <typename T, typename W>
void add_norm(const Weight<T, W>& weight, const Norm<T>& norm, const T* x, int64_t tokens, int64_t x_stride, T* to) {
  const int64_t panels = weight.panel_count(), outputs = weight.outputs, stride = panels * kColumns;
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::clamp(round_up((tokens + threads - 1) / threads, kTile), kTile, kRows);
  share((tokens + block - 1) / block, [&] { return Scratch<T, W>(weight.inputs, stride); }, [&](int64_t unit, Scratch<T, W>& s) {
    const int64_t start = unit * block, count = std::min(block, tokens - start), padded = round_up(count, kTile);
    s.take(x + start * x_stride, x_stride, count, padded, weight.inputs);
    for (int64_t panel = 0; panel < panels; ++panel)
      multiply_panel(weight, panel, padded, s, s.results.data() + panel * kColumns, stride);
    for (int64_t row = 0; row < count; ++row) {
      float* sums = s.results.data() + row * stride;
      const T* residual = norm.residual + (norm.rows == nullptr ? start + row : norm.rows[start + row]) * norm.stride;
      Vector total{}, squares{};
      for (int64_t c = 0; c < outputs; c += kTile) {
        const Vector sum = finished(weight, sums + c, c, s.scale[row]) + load(residual + c);
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

template <typename W>
void pack(const W* weight, int64_t outputs, int64_t inputs, W* to) {
  constexpr int64_t neighbours = kNeighbours<W>;
  for (int64_t first = 0; first < outputs; first += kColumns, to += inputs * kColumns)
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t c = 0; c < kColumns; ++c)
        to[(i / neighbours * kColumns + c) * neighbours + i % neighbours] =
            first + c < outputs ? weight[(first + c) * inputs + i] : static_cast<W>(0);
}

template <typename W>
void unpack(const W* panels, int64_t outputs, int64_t inputs, W* to) {
  constexpr int64_t neighbours = kNeighbours<W>;
  for (int64_t o = 0; o < outputs; ++o) {
    const W* panel = panels + o / kColumns * inputs * kColumns;
    for (int64_t i = 0; i < inputs; ++i)
      to[o * inputs + i] = panel[(i / neighbours * kColumns + o % kColumns) * neighbours + i % neighbours];
  }
}

template <typename Do>
void by_kind(at::ScalarType kind, const Do& work) {
  if (kind == at::kFloat) work(float{});
  else if (kind == at::kBFloat16) work(BFloat16{});
  else work(int8_t{});
}

// [outputs, inputs] to panels.
Tensor to_panels(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  Tensor panels = at::empty({round_up(outputs, kColumns) * inputs}, weight.options());
  by_kind(weight.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    pack(weight.const_data_ptr<W>(), outputs, inputs, panels.mutable_data_ptr<W>());
  });
  return panels;
}

Tensor from_panels(const Tensor& panels, int64_t outputs, int64_t inputs) {
  Tensor weight = at::empty({outputs, inputs}, panels.options());
  by_kind(panels.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    unpack(panels.const_data_ptr<W>(), outputs, inputs, weight.mutable_data_ptr<W>());
  });
  return weight;
}

template <typename T, typename W>
Weight<T, W> weight_of(const Tensor& panels, const Tensor& bias, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& sums, int64_t inputs, int64_t activation) {
  Weight<T, W> weight{};
  weight.panels = panels.const_data_ptr<W>();
  weight.bias = bias.const_data_ptr<T>();
  weight.scale = scale.has_value() ? scale->const_data_ptr<float>() : nullptr;
  weight.sums = sums.has_value() ? sums->const_data_ptr<int32_t>() : nullptr;
  weight.inputs = inputs;
  weight.outputs = bias.size(0);
  weight.activation = static_cast<Activation>(activation);
  return weight;
}

// work(T, W) for the kinds of x and of a weight.
template <typename Do>
void by_kinds(const Tensor& x, const Tensor& panels, const Do& work) {
  const bool bytes = panels.scalar_type() == at::kChar;
  if (x.scalar_type() == at::kBFloat16) bytes ? work(BFloat16{}, int8_t{}) : work(BFloat16{}, BFloat16{});
  else bytes ? work(float{}, int8_t{}) : work(float{}, float{});
}

Tensor linear_op(const Tensor& x, const Tensor& panels, const Tensor& bias, int64_t activation,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& sums) {
  Tensor out = at::empty({x.size(0), bias.size(0)}, x.options());
  by_kinds(x, panels, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    linear(weight_of<T, W>(panels, bias, scale, sums, x.size(1), activation), x.const_data_ptr<T>(), x.size(0), x.stride(0),
           out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor add_norm_op(const Tensor& x, const Tensor& panels, const Tensor& bias, const Tensor& residual, const Tensor& norm_weight,
                   const Tensor& norm_bias, double eps, const std::optional<Tensor>& rows,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& sums) {
  Tensor out = at::empty({x.size(0), bias.size(0)}, x.options());
  by_kinds(x, panels, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    Norm<T> norm{residual.const_data_ptr<T>(), norm_weight.const_data_ptr<T>(), norm_bias.const_data_ptr<T>(),
                 rows.has_value() ? rows->const_data_ptr<int64_t>() : nullptr, residual.stride(0), static_cast<float>(eps)};
    add_norm(weight_of<T, W>(panels, bias, scale, sums, x.size(1), kIdentity), norm, x.const_data_ptr<T>(), x.size(0),
             x.stride(0), out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace dtbert

TORCH_LIBRARY_FRAGMENT(dtbert_native, library) {
  library.def("to_panels(Tensor weight) -> Tensor");
  library.def("from_panels(Tensor panels, int outputs, int inputs) -> Tensor");
  library.def("linear(Tensor x, Tensor panels, Tensor bias, int activation, Tensor? scale, Tensor? sums) -> Tensor");
  library.def("add_norm(Tensor x, Tensor panels, Tensor bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, "
              "float eps, Tensor? rows, Tensor? scale, Tensor? sums) -> Tensor");
}

TORCH_LIBRARY_IMPL(dtbert_native, CPU, library) {
  library.impl("to_panels", dtbert::to_panels);
  library.impl("from_panels", dtbert::from_panels);
  library.impl("linear", dtbert::linear_op);
  library.impl("add_norm", dtbert::add_norm_op);
}
