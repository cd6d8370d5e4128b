// The gradients of a low-rank update W + s B A of a weight, for W, B, A: [out, in], [out, r], [r, in].
//
// From what the output receives, g [n, out], and the input x [n, in], row by row of both:
//     dA = s (g B)^T x        dB^T = s (x A^T)^T g
// The dense product g^T x, n * out * in multiplications, is never formed; this takes
// 2 n r (out + in), and reads g and x once.
#pragma once

#include <vector>

#include "product.h"

namespace pet {

template <typename T>
struct LowRank {
  int64_t in, out, rank;
  int64_t padded;     // the rank, padded to whole vectors
  std::vector<T> at;  // s A^T [in, padded]
  std::vector<T> b;   // s B [out, padded]

  LowRank(int64_t in, int64_t out, int64_t rank, const T* a, const T* b_, T s)
      : in(in), out(out), rank(rank) {
    constexpr int W = Simd<T>::width;
    padded = (rank + W - 1) / W * W;
    at.assign(in * padded, T(0));
    b.assign(out * padded, T(0));
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t i = 0; i < in; ++i) at[i * padded + r] = s * a[r * in + i];
    for (int64_t o = 0; o < out; ++o)
      for (int64_t r = 0; r < rank; ++r) b[o * padded + r] = s * b_[o * rank + r];
  }

  // Adds the share of `rows` rows to da [rank, in] and dbt [rank, out]; in and out are multiples
  // of the vector width.
  void add(int64_t rows, const T* g, const T* x, T* da, T* dbt) const {
    static thread_local std::vector<T> thin;
    thin.resize(rows * padded);
    product<T>(rows, padded, out, g, out, 1, b.data(), padded, thin.data(), padded);
    product<T, true>(rank, in, rows, thin.data(), 1, padded, x, in, da, in);
    product<T>(rows, padded, in, x, in, 1, at.data(), padded, thin.data(), padded);
    product<T, true>(rank, out, rows, thin.data(), 1, padded, g, out, dbt, out);
  }
};

}  // namespace pet
