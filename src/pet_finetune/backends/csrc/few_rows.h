// Products of few rows with packed weights, which then come from memory rather than from a cache.
//
// With a hundred rows or fewer each weight is read for a few dozen multiplications only, and reading
// it takes as long as these. So the rows are cut into tiles as tall as the registers allow, all
// about the same, and the first tile of a panel asks for the panel that comes next.
#pragma once

#include <algorithm>
#include <utility>

#include "product.h"

namespace pet {

template <typename T>
struct FewRows {
  static constexpr int W = Simd<T>::width;
#ifdef __AVX512F__
  static constexpr int kMost = 12;  // with two vectors of columns: 24 sums of 32 registers
#else
  static constexpr int kMost = 6;
#endif

  struct Panel {
    const T* weights;  // [depth, one or two vectors]
    const T* next;     // what will be read after it, or null
    const T* bias;     // or null
  };

  // c = a B + bias + rest for a panel B of whole (two vectors) or half width; a is [rows, depth],
  // rest (or null) and c have rows of `ldc`.
  static void multiply(int64_t rows, int64_t depth, const T* a, const Panel& panel, bool whole,
                       const T* rest, T* c, int64_t ldc) {
    const int64_t tiles = (rows + kMost - 1) / kMost;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      const Panel own{panel.weights, tile == 0 ? panel.next : nullptr, panel.bias};
      const T* more = rest == nullptr ? nullptr : rest + first * ldc;
      const auto step = whole ? pick<2>(count) : pick<1>(count);
      step(depth, a + first * depth, own, more, c + first * ldc, ldc);
    }
  }

 private:
  typedef void (*Step)(int64_t, const T*, const Panel&, const T*, T*, int64_t);

  template <int N, int... R>
  static Step pick(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr Step steps[] = {tile<R + 1, N>...};
    return steps[rows - 1];
  }
  template <int N>
  static Step pick(int64_t rows) {
    return pick<N>(rows, std::make_integer_sequence<int, kMost>());
  }

  template <int R, int N>
  static void tile(int64_t depth, const T* a, const Panel& panel, const T* rest, T* c,
                   int64_t ldc) {
    Vec<T> acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) {
        acc[r][n] = panel.bias == nullptr ? Vec<T>{} : load(panel.bias + n * W);
        if (rest != nullptr) acc[r][n] += load(rest + r * ldc + n * W);
      }
    if (panel.next != nullptr)
      sum_up<R, N, true>(depth, a, panel, acc);
    else
      sum_up<R, N, false>(depth, a, panel, acc);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) store(c + r * ldc + n * W, acc[r][n]);
  }

  template <int R, int N, bool Ahead>
  static inline void sum_up(int64_t depth, const T* a, const Panel& panel, Vec<T> (&acc)[R][N]) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* b = panel.weights + k * N * W;
      Vec<T> row[N];
      for (int n = 0; n < N; ++n) {
        row[n] = load(b + n * W);
        if (Ahead) __builtin_prefetch(panel.next + (k * N + n) * W, 0, 2);
      }
      for (int r = 0; r < R; ++r) {
        const Vec<T> x = broadcast(a[r * depth + k]);
        for (int n = 0; n < N; ++n) acc[r][n] += x * row[n];
      }
    }
  }
};

}  // namespace pet
