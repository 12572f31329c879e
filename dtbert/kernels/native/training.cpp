// Steps of training on a CPU beside its products and attention: GELU, and the sum with a residual of which LayerNorm is
// taken, some of its values dropped; each with its gradient.
//
// A unit of work is some rows. What is dropped is drawn again for the gradient. What is summed over all rows is summed
// unit by unit first, so that it does not depend on the number of threads.

#include "activations.h"
#include "dropout.h"

namespace dtbert {
namespace {

constexpr int64_t kRows = 64;
// Values of an elementwise step that a unit takes.
constexpr int64_t kValues = 1 << 14;

// work(place) for every kTile values; a multiple of kTile there are.
template <typename Do>
void each_tile(int64_t count, const Do& work) {
  at::parallel_for(0, (count + kValues - 1) / kValues, 1, [&](int64_t from, int64_t to) {
    const int64_t end = std::min(count, to * kValues);
    for (int64_t i = from * kValues; i < end; i += kTile) work(i);
  });
}

Tensor gelu(const Tensor& x) {
  Tensor out = at::empty(x.sizes(), x.options());
  by_states(x, [&](auto zero) {
    using T = decltype(zero);
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    each_tile(x.numel(), [&](int64_t i) { store(to + i, activate<kGelu, T>(load(from + i))); });
  });
  return out;
}

Tensor gelu_gradient(const Tensor& gradient, const Tensor& x) {
  Tensor out = at::empty(x.sizes(), x.options());
  by_states(x, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.const_data_ptr<T>(), *of = gradient.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    each_tile(x.numel(), [&](int64_t i) { store(to + i, load(of + i) * gelu_slope<T>(load(from + i))); });
  });
  return out;
}

// work(first row, rows, draws, unit) for each unit.
template <typename Do>
void each_unit(int64_t rows, const Dropout& dropout, const Do& work) {
  at::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      Draws draws(dropout.seed, unit);
      work(unit * kRows, std::min(kRows, rows - unit * kRows), draws, unit);
    }
  });
}

template <typename T>
struct Norm {
  const T *weight, *bias;
  int64_t size;
  float eps;
};

// LayerNorm of x, some of it dropped, and the residual; for the gradient without weight and bias, and the inverse of each
// row's deviation.
template <typename T>
void dropped_norm(const T* x, const T* residual, const Norm<T>& norm, int64_t rows, const Dropout& dropout, T* out, T* normed,
                  float* inverses) {
  const int64_t size = norm.size;
  each_unit(rows, dropout, [&](int64_t first, int64_t count, Draws& draws, int64_t) {
    std::vector<float> sums(size);
    for (int64_t row = first; row < first + count; ++row) {
      Vector total{}, squares{};
      for (int64_t c = 0; c < size; c += kTile) {
        Vector part = load(x + row * size + c) * dropout.scale;
        if (dropout.below != 0) part = zero_where(draws.dropped(dropout.below), part);
        part += load(residual + row * size + c);
        store(sums.data() + c, part);
        total += part;
      }
      const float mean = sum_of(total) / static_cast<float>(size);
      for (int64_t c = 0; c < size; c += kTile) {
        const Vector part = load(sums.data() + c) - mean;
        squares += part * part;
      }
      const float inverse = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(size) + norm.eps);
      for (int64_t c = 0; c < size; c += kTile) {
        const Vector part = (load(sums.data() + c) - mean) * inverse;
        store(normed + row * size + c, part);
        store(out + row * size + c, part * load(norm.weight + c) + load(norm.bias + c));
      }
      inverses[row] = inverse;
    }
  });
}

// Of x and of the residual; `of_norm` [units, 2, size] are those of weight and bias.
template <typename T>
void dropped_norm_gradient(const T* gradient, const T* normed, const float* inverses, const Norm<T>& norm, int64_t rows,
                           const Dropout& dropout, T* of_x, T* of_residual, float* of_norm) {
  const int64_t size = norm.size;
  each_unit(rows, dropout, [&](int64_t first, int64_t count, Draws& draws, int64_t unit) {
    float *of_weight = of_norm + unit * 2 * size, *of_bias = of_weight + size;
    std::fill_n(of_weight, 2 * size, 0.0f);
    for (int64_t row = first; row < first + count; ++row) {
      const T *of = gradient + row * size, *from = normed + row * size;
      Vector total{}, along{};
      for (int64_t c = 0; c < size; c += kTile) {
        const Vector one = load(of + c), part = load(from + c), weighted = one * load(norm.weight + c);
        total += weighted;
        along += weighted * part;
        store(of_weight + c, load(of_weight + c) + one * part);
        store(of_bias + c, load(of_bias + c) + one);
      }
      const float mean = sum_of(total) / static_cast<float>(size), slope = sum_of(along) / static_cast<float>(size);
      for (int64_t c = 0; c < size; c += kTile) {
        const Vector weighted = load(of + c) * load(norm.weight + c);
        const Vector found = (weighted - mean - load(from + c) * slope) * inverses[row];
        store(of_residual + row * size + c, found);
        const Vector scaled = found * dropout.scale;
        store(of_x + row * size + c, dropout.below == 0 ? scaled : zero_where(draws.dropped(dropout.below), scaled));
      }
    }
  });
}

template <typename T>
Norm<T> norm_of(const Tensor& weight, const Tensor& bias, double eps) {
  return {weight.const_data_ptr<T>(), bias.const_data_ptr<T>(), weight.size(0), static_cast<float>(eps)};
}

// Out and normed [T, H], and the inverses [T].
std::tuple<Tensor, Tensor, Tensor> dropped_norm_op(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                                                   double eps, double dropped, int64_t seed) {
  Tensor out = at::empty(x.sizes(), x.options()), normed = at::empty(x.sizes(), x.options()), inverses = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  by_states(x, [&](auto zero) {
    using T = decltype(zero);
    dropped_norm(x.const_data_ptr<T>(), residual.const_data_ptr<T>(), norm_of<T>(weight, bias, eps), x.size(0),
                 Dropout(dropped, seed), out.mutable_data_ptr<T>(), normed.mutable_data_ptr<T>(),
                 inverses.mutable_data_ptr<float>());
  });
  return {out, normed, inverses};
}

// The gradients of x and the residual [T, H], and of weight and bias in parts, float32 [units, 2, H].
std::tuple<Tensor, Tensor, Tensor> dropped_norm_gradient_op(const Tensor& gradient, const Tensor& normed, const Tensor& inverses,
                                                            const Tensor& weight, double dropped, int64_t seed) {
  const int64_t rows = normed.size(0), units = (rows + kRows - 1) / kRows;
  Tensor of_x = at::empty(normed.sizes(), normed.options()), of_residual = at::empty(normed.sizes(), normed.options());
  Tensor of_norm = at::empty({units, 2, normed.size(1)}, inverses.options());
  by_states(normed, [&](auto zero) {
    using T = decltype(zero);
    dropped_norm_gradient(gradient.const_data_ptr<T>(), normed.const_data_ptr<T>(), inverses.const_data_ptr<float>(),
                          norm_of<T>(weight, weight, 0), rows, Dropout(dropped, seed), of_x.mutable_data_ptr<T>(),
                          of_residual.mutable_data_ptr<T>(), of_norm.mutable_data_ptr<float>());
  });
  return {of_x, of_residual, of_norm};
}

}  // namespace
}  // namespace dtbert

TORCH_LIBRARY_FRAGMENT(dtbert_native, library) {
  library.def("gelu(Tensor x) -> Tensor");
  library.def("gelu_gradient(Tensor gradient, Tensor x) -> Tensor");
  library.def("dropped_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float dropped, int seed) "
              "-> (Tensor, Tensor, Tensor)");
  library.def("dropped_norm_gradient(Tensor gradient, Tensor normed, Tensor inverses, Tensor weight, float dropped, int seed) "
              "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dtbert_native, CPU, library) {
  library.impl("gelu", dtbert::gelu);
  library.impl("gelu_gradient", dtbert::gelu_gradient);
  library.impl("dropped_norm", dtbert::dropped_norm_op);
  library.impl("dropped_norm_gradient", dtbert::dropped_norm_gradient_op);
}
