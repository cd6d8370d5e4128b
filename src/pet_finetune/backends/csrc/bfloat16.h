// Products of float32 matrices rounded to bfloat16, with sums in float32.
//
// AVX512_BF16 multiplies two pairs and adds both to a float in one instruction, twice the numbers of
// a fused multiply-add; a tile unit (see Tiles) multiplies many more. Both factors come as pairs along
// the direction that is summed over, each pair in 32 bits. Without these instructions there is nothing
// to be gained, and `available` says so.
#pragma once

#include <cstdint>

#include "simd.h"
#include "tiles.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace pet {

struct Bfloat16 {
  typedef uint32_t Pair;
  static constexpr int W = Simd<float>::width;
#ifdef __AVX512BF16__
  static constexpr bool available = true;

  // A bfloat16: the upper half of a float, rounded to nearest even.
  static uint32_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }

  // Neighbours in a row as pairs; `numbers` is a multiple of the vector width.
  static void pair_columns(int64_t numbers, const float* from, Pair* to) {
    for (int64_t i = 0; i < numbers; i += W) {
      const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
      std::memcpy(to + i / 2, &half, sizeof half);
    }
  }

  // Neighbours in a column as pairs, [rows, width] in rows of `ld` to [(rows + 1) / 2, width]; an odd
  // last row is paired with zeros.
  static void pair_rows(int64_t rows, int64_t width, const float* from, int64_t ld, Pair* to) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < width; j += W, to += W) {
        const __m512i low = upper(from + i * ld + j);
        const __m512i high =
            i + 1 < rows ? upper(from + (i + 1) * ld + j) : _mm512_setzero_si512();
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
  }

  // What pair_rows makes, the other way round: each column's pairs beside each other, [width, stride].
  // `width` is a multiple of the vector width, `from` has rows of `ld`; zeros up to `stride`, a
  // multiple of 16.
  static void pair_columns_of(int64_t rows, int64_t width, const float* from, int64_t ld, Pair* to,
                              int64_t stride) {
    for (int64_t k = 0; k < stride; k += W)
      for (int64_t j = 0; j < width; j += W) {
        __m512i pairs[W];
        for (int64_t i = 0; i < W; ++i) {
          const int64_t row = 2 * (k + i);
          const float* at = from + row * ld + j;
          const __m512i low = row < rows ? upper(at) : _mm512_setzero_si512();
          const __m512i high = row + 1 < rows ? upper(at + ld) : _mm512_setzero_si512();
          pairs[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
        transpose(pairs);
        for (int64_t i = 0; i < W; ++i) _mm512_storeu_si512(to + (j + i) * stride + k, pairs[i]);
      }
  }

  // c (+)= a b for R rows and N vectors of columns; a at a[r * rs + k * ks], pairs both.
  template <int R, int N, bool Add>
  static void tile(int64_t pairs, const Pair* a, int64_t rs, int64_t ks, const Pair* b, int64_t ldb,
                   float* c, int64_t ldc) {
    __m512 acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] = Add ? _mm512_loadu_ps(c + r * ldc + n * W) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
      __m512i row[N];
      for (int n = 0; n < N; ++n) row[n] = _mm512_loadu_si512(b + k * ldb + n * W);
      for (int r = 0; r < R; ++r) {
        const __m512i x = _mm512_set1_epi32(int(a[r * rs + k * ks]));
        for (int n = 0; n < N; ++n)
          acc[r][n] = _mm512_dpbf16_ps(acc[r][n], (__m512bh)x, (__m512bh)row[n]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + r * ldc + n * W, acc[r][n]);
  }

 private:
  static __m512i upper(const float* from) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
    __m256i bits;
    std::memcpy(&bits, &half, sizeof bits);
    return _mm512_cvtepu16_epi32(bits);
  }

  // 16 x 16: pairs of rows are interleaved, then pairs of pairs, then quarters of registers.
  static void transpose(__m512i* m) {
    __m512i a[W], b[W];
    for (int i = 0; i < W; i += 2) {
      a[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
      a[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < W; i += 4)
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
        b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
      }
    for (int i = 0; i < 4; ++i) {  // b[4 q + i]: column i of each quarter, of rows 4 q to 4 q + 3
      const __m512i even01 = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
      const __m512i odd01 = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
      const __m512i even23 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
      const __m512i odd23 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
      m[i] = _mm512_shuffle_i32x4(even01, even23, 0x88);
      m[8 + i] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
      m[4 + i] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
      m[12 + i] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
  }
#else
  static constexpr bool available = false;
  static uint32_t rounded(float) { return 0; }
  static void pair_columns(int64_t, const float*, Pair*) {}
  static void pair_rows(int64_t, int64_t, const float*, int64_t, Pair*) {}
  static void pair_columns_of(int64_t, int64_t, const float*, int64_t, Pair*, int64_t) {}
  template <int R, int N, bool Add>
  static void tile(int64_t, const Pair*, int64_t, int64_t, const Pair*, int64_t, float*, int64_t) {}
#endif

 public:
  template <int N, bool Add>
  static void column_block(int64_t rows, int64_t pairs, const Pair* a, int64_t rs, int64_t ks,
                           const Pair* b, int64_t ldb, float* c, int64_t ldc) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) tile<8, N, Add>(pairs, a + r * rs, rs, ks, b, ldb, c + r * ldc, ldc);
    for (; r + 2 <= rows; r += 2) tile<2, N, Add>(pairs, a + r * rs, rs, ks, b, ldb, c + r * ldc, ldc);
    for (; r < rows; ++r) tile<1, N, Add>(pairs, a + r * rs, rs, ks, b, ldb, c + r * ldc, ldc);
  }

  // c (+)= a b: rows of a with the elements at a[r * rs + k * ks]; b in rows of `ldb`, or, with
  // `panel`, in panels of two vectors of columns as `Panels` has them.
  template <bool Add>
  static void product(int64_t rows, int64_t first, int64_t last, int64_t pairs, const Pair* a,
                      int64_t rs, int64_t ks, const Pair* b, int64_t ldb, bool panel, float* c,
                      int64_t ldc) {
    if (ks == 1 && Tiles::usable())
      return Tiles::product<Add>(rows, first, last, pairs, a, rs, b, ldb, panel, c, ldc);
    for (int64_t n = first; n < last; n += 2 * W) {
      const bool whole = last - n >= 2 * W;
      const Pair* own = panel ? b + n * pairs : b + n;
      const int64_t stride = !panel ? ldb : whole ? 2 * W : W;
      if (whole)
        column_block<2, Add>(rows, pairs, a, rs, ks, own, stride, c + n, ldc);
      else
        column_block<1, Add>(rows, pairs, a, rs, ks, own, stride, c + n, ldc);
    }
  }
};

}  // namespace pet
