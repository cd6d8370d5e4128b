// A linear layer behind a norm or a gate, y = P(x) W^T + b, with its first and second derivatives.
//
//   forward          p = P(x)            y = p W^T + b
//   backward         gp = gy W           gx = P'(x)^T gp
//   double backward  for a cotangent c of gx:  t = P'(x) c,
//                    to gy: t W^T        to x: the derivative of c . P'(x)^T gp by x
//
// The rows are taken a few at a time, so that p, gp and t stay in the caches. The weight is packed
// into panels once (see Panels), which lets a register tile run at the processor's speed.
#pragma once

#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "product.h"
#include "rowwise.h"
#include "sweep.h"

namespace pet {

enum class Prologue : int64_t { none = 0, rms_norm = 1, layer_norm = 2, silu = 3, swiglu = 4 };

inline int64_t checked_prologue(int64_t prologue) {
  TORCH_CHECK(prologue >= 0 && prologue <= int64_t(Prologue::swiglu), prologue, " is no prologue");
  return prologue;
}

// Panels of two vectors of columns (the last may be one), each [K, columns] in one piece.
template <typename T>
struct Panels {
  static constexpr int W = kVectorBytes / int(sizeof(T));
  int64_t depth, columns;  // columns: a multiple of the vector width

  // Deep: elements that follow each other along the depth lie side by side in memory, and are
  // taken as squares, which the compiler transposes in registers.
  template <bool Deep, typename Element>
  static void pack(int64_t depth, int64_t columns, T* to, Element&& element) {
    constexpr int S = Deep ? 4 : 1;  // divides all widths
    for (int64_t n = 0; n < columns; n += 2 * W) {
      const int64_t wide = std::min<int64_t>(2 * W, columns - n);
      for (int64_t k = 0; k < depth; k += S, to += S * wide)
        for (int64_t j = 0; j < wide; j += S) {
          T square[S][S];
          for (int c = 0; c < S; ++c)
            for (int r = 0; r < S; ++r) square[c][r] = element(k + r, n + j + c);
          for (int r = 0; r < S; ++r)
            for (int c = 0; c < S; ++c) to[r * wide + j + c] = square[c][r];
        }
    }
  }

  // c (+)= a times the packed matrix, for `rows` rows and the columns from `first` to `last`
  // (multiples of a panel, or the end).
  template <bool Add>
  static void multiply(int64_t rows, int64_t depth, int64_t first, int64_t last, const T* a,
                       int64_t lda, const T* packed, T* c, int64_t ldc) {
    for (int64_t n = first; n < last; n += 2 * W) {
      const T* panel = packed + n * depth;
      if (last - n >= 2 * W)
        column_block<T, 2, Add>(rows, depth, a, lda, 1, panel, 2 * W, c + n, ldc);
      else
        column_block<T, 1, Add>(rows, depth, a, lda, 1, panel, W, c + n, ldc);
    }
  }
};

template <typename T>
struct Projection {
  Prologue prologue;
  int64_t width;     // of x
  int64_t in, out;   // of the weight: [out, in]
  T eps;
  const T* norm_weight;
  const T* norm_bias;
  const T* bias;     // [out], or null
  const T* forward_panels;   // null where the products are in bfloat16
  const T* backward_panels;
  const Bfloat16::Pair* forward_bfloat16 = nullptr;
  const Bfloat16::Pair* backward_bfloat16 = nullptr;

  bool is_norm() const {
    return prologue == Prologue::rms_norm || prologue == Prologue::layer_norm;
  }

  void apply(int64_t rows, const T* x, T* p) const {
    for (int64_t i = 0; i < rows; ++i, x += width, p += in) switch (prologue) {
        case Prologue::none: std::memcpy(p, x, in * sizeof(T)); break;
        case Prologue::rms_norm: norm_forward<T, false>(in, x, norm_weight, nullptr, eps, p); break;
        case Prologue::layer_norm: norm_forward<T, true>(in, x, norm_weight, norm_bias, eps, p); break;
        case Prologue::silu: gate_forward<T, true>(in, x, p); break;
        case Prologue::swiglu: gate_forward<T, false>(in, x, p); break;
      }
  }

  // gx from gp; adds to the gradients of the norm's weight and bias where they are given.
  void apply_backward(int64_t rows, const T* x, const T* gp, T* gx, T* dweight, T* dbias) const {
    for (int64_t i = 0; i < rows; ++i, x += width, gp += in, gx += width) switch (prologue) {
        case Prologue::none: std::memcpy(gx, gp, in * sizeof(T)); break;
        case Prologue::rms_norm:
          norm_backward<T, false>(in, x, norm_weight, gp, eps, gx, dweight, dbias);
          break;
        case Prologue::layer_norm:
          norm_backward<T, true>(in, x, norm_weight, gp, eps, gx, dweight, dbias);
          break;
        case Prologue::silu: gate_backward<T, true>(in, x, gp, gx); break;
        case Prologue::swiglu: gate_backward<T, false>(in, x, gp, gx); break;
      }
  }

  // t and what x receives, from c and gp; adds to the gradient of the norm's weight.
  void apply_double(int64_t rows, const T* x, const T* gp, const T* c, T* t, T* to_x,
                    T* dweight) const {
    for (int64_t i = 0; i < rows; ++i, x += width, gp += in, c += width, t += in, to_x += width)
      switch (prologue) {
        case Prologue::none: std::memcpy(t, c, in * sizeof(T)); break;
        case Prologue::rms_norm:
          norm_double_backward<T, false>(in, x, norm_weight, gp, c, eps, t, to_x, dweight);
          break;
        case Prologue::layer_norm:
          norm_double_backward<T, true>(in, x, norm_weight, gp, c, eps, t, to_x, dweight);
          break;
        case Prologue::silu: gate_double_backward<T, true>(in, x, gp, c, t, to_x); break;
        case Prologue::swiglu: gate_double_backward<T, false>(in, x, gp, c, t, to_x); break;
      }
  }

  // Rows of y, the columns from `first` to `last`, from rows of p; with the residual if given.
  void multiply(int64_t rows, const T* p, const T* residual, T* y, int64_t first,
                int64_t last) const {
    constexpr int W = Simd<T>::width;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = first; j < last; j += W) {
        Vec<T> v = bias != nullptr ? load(bias + j) : Vec<T>{};
        if (residual != nullptr) v += load(residual + i * out + j);
        store(y + i * out + j, v);
      }
    panels<true>(rows, in, first, last, p, forward_panels, forward_bfloat16, y, out);
  }

  // The columns of gp from `first` to `last`, from gy.
  void multiply_back(int64_t rows, const T* gy, T* gp, int64_t first, int64_t last) const {
    panels<false>(rows, out, first, last, gy, backward_panels, backward_bfloat16, gp, in);
  }

  // The same of y = t W^T, without bias.
  void multiply_tangent(int64_t rows, const T* t, T* y, int64_t first, int64_t last) const {
    panels<false>(rows, in, first, last, t, forward_panels, forward_bfloat16, y, out);
  }

 private:
  // c (+)= a times a packed matrix of this depth, in whichever of the two forms it is there.
  template <bool Add>
  static void panels(int64_t rows, int64_t depth, int64_t first, int64_t last, const T* a,
                     const T* packed, const Bfloat16::Pair* rounded, T* c, int64_t ldc) {
    if constexpr (std::is_same_v<T, float>)
      if (rounded != nullptr) {
        Bfloat16::Pair* pairs = thread_buffer<Bfloat16::Pair>(rows * depth / 2);
        Bfloat16::pair_columns(rows * depth, a, pairs);
        Bfloat16::product<Add>(rows, first, last, depth / 2, pairs, depth / 2, 1, rounded, 0, true, c,
                             ldc);
        return;
      }
    Panels<T>::template multiply<Add>(rows, depth, first, last, a, depth, packed, c, ldc);
  }
};

}  // namespace pet
