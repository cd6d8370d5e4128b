// Products of small matrices that stay in registers and the first-level caches.
#pragma once

#include "simd.h"

namespace pet {

// C[r][:] (+)= sum_k A(r, k) B[k][:] for R rows and N vectors of columns, A at a[r * rs + k * ks].
template <typename T, int R, int N, bool Add>
inline void tile(int64_t depth, const T* a, int64_t rs, int64_t ks, const T* b, int64_t ldb, T* c,
                 int64_t ldc) {
  constexpr int W = Simd<T>::width;
  Vec<T> acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = Add ? load(c + r * ldc + n * W) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[N];
    for (int n = 0; n < N; ++n) row[n] = load(b + k * ldb + n * W);
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast(a[r * rs + k * ks]);
      for (int n = 0; n < N; ++n) acc[r][n] += x * row[n];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(c + r * ldc + n * W, acc[r][n]);
}

template <typename T, int N, bool Add>
inline void column_block(int64_t rows, int64_t depth, const T* a, int64_t rs, int64_t ks,
                         const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int R = kTileRows;
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<T, R, N, Add>(depth, a + r * rs, rs, ks, b, ldb, c + r * ldc, ldc);
  for (; r + 4 <= rows; r += 4) tile<T, 4, N, Add>(depth, a + r * rs, rs, ks, b, ldb, c + r * ldc, ldc);
  for (; r + 2 <= rows; r += 2) tile<T, 2, N, Add>(depth, a + r * rs, rs, ks, b, ldb, c + r * ldc, ldc);
  for (; r < rows; ++r) tile<T, 1, N, Add>(depth, a + r * rs, rs, ks, b, ldb, c + r * ldc, ldc);
}

// C (+)= A B with `columns` a multiple of the vector width.
template <typename T, bool Add = false>
inline void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t rs,
                    int64_t ks, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int W = Simd<T>::width;
  int64_t n = 0;
  for (; n + 2 * W <= columns; n += 2 * W)
    column_block<T, 2, Add>(rows, depth, a, rs, ks, b + n, ldb, c + n, ldc);
  for (; n < columns; n += W)
    column_block<T, 1, Add>(rows, depth, a, rs, ks, b + n, ldb, c + n, ldc);
}

}  // namespace pet
