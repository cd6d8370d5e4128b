// Products of bfloat16 pairs on a processor's tile unit (Intel AMX), with sums in float32.
//
// One instruction multiplies 16 x 32 by 32 x 16 numbers, eight times what AVX512_BF16 does in the
// same time. Linux lends the tiles' memory to a process that asks; where it refuses, or the compiler
// does not know the instructions, `usable` is false.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define PET_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pet {

struct Tiles {
  typedef uint32_t Pair;
  static constexpr int64_t kRows = 16;   // of a tile: rows of a and c
  static constexpr int64_t kPairs = 16;  // along the direction that is summed over
  static constexpr int64_t kColumns = 16;

#ifdef PET_TILES
  static bool usable() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return granted;
  }

  // c (+)= a b as Bfloat16::product has it, with the rows of a in one piece each.
  template <bool Add>
  static void product(int64_t rows, int64_t first, int64_t last, int64_t pairs, const Pair* a,
                      int64_t lda, const Pair* b, int64_t ldb, bool panel, float* c, int64_t ldc) {
    constexpr int64_t wide = 2 * kColumns;
    const int64_t whole = pairs / kPairs * kPairs, bulk = rows / (2 * kRows) * 2 * kRows;
    const auto run = [&](int64_t from, int64_t to, int64_t k, int64_t depth, bool add) {
      if (from == to || depth == 0) return;
      const Shape shape(std::min(kRows, to - from), std::min(kRows, to - from - kRows), depth);
      for (int64_t n = first; n < last; n += wide) {
        const bool both = last - n >= wide;
        const int64_t stride = !panel ? ldb : both ? wide : kColumns;
        const Pair* own = (panel ? b + n * pairs : b + n) + k * stride;
        for (int64_t r = from; r < to; r += 2 * kRows)
          block(to - r > kRows, both, add, whole_steps(depth), a + r * lda + k, lda, own, stride,
                c + r * ldc + n, ldc);
      }
    };
    fence();
    run(0, bulk, 0, whole, Add);
    run(bulk, rows, 0, whole, Add);
    run(0, bulk, whole, pairs - whole, Add || whole > 0);
    run(bulk, rows, whole, pairs - whole, Add || whole > 0);
    _tile_release();
    fence();
  }

 private:
  // The sizes of the eight tiles: sums 0 to 3, a 4 and 5, b 6 and 7. Other libraries set their own,
  // so they are set whenever tiles are used.
  struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    Shape(int64_t upper, int64_t lower, int64_t depth) {
      const int64_t pairs = std::min(kPairs, depth);
      for (int t = 0; t < 8; ++t) bytes[t] = kColumns * sizeof(float);
      bytes[4] = bytes[5] = uint16_t(pairs * sizeof(Pair));
      rows[0] = rows[1] = rows[4] = uint8_t(upper);
      rows[2] = rows[3] = rows[5] = uint8_t(std::max<int64_t>(lower, 1));
      rows[6] = rows[7] = uint8_t(pairs);
      fence();
      _tile_loadconfig(this);
    }
  };

  static int64_t whole_steps(int64_t depth) { return (depth + kPairs - 1) / kPairs; }

  // The compiler is not told what the instructions read.
  static void fence() { asm volatile("" ::: "memory"); }

  static void block(bool two_rows, bool two_columns, bool add, int64_t steps, const Pair* a,
                    int64_t lda, const Pair* b, int64_t ldb, float* c, int64_t ldc) {
    if (two_rows && two_columns) return add ? tile<2, 2, true>(steps, a, lda, b, ldb, c, ldc)
                                            : tile<2, 2, false>(steps, a, lda, b, ldb, c, ldc);
    if (two_rows) return add ? tile<2, 1, true>(steps, a, lda, b, ldb, c, ldc)
                             : tile<2, 1, false>(steps, a, lda, b, ldb, c, ldc);
    if (two_columns) return add ? tile<1, 2, true>(steps, a, lda, b, ldb, c, ldc)
                                : tile<1, 2, false>(steps, a, lda, b, ldb, c, ldc);
    return add ? tile<1, 1, true>(steps, a, lda, b, ldb, c, ldc)
               : tile<1, 1, false>(steps, a, lda, b, ldb, c, ldc);
  }

  template <int R, int N, bool Add>
  static void tile(int64_t steps, const Pair* a, int64_t lda, const Pair* b, int64_t ldb, float* c,
                   int64_t ldc) {
    const int64_t row = ldc * int64_t(sizeof(float));
    const int64_t a_row = lda * int64_t(sizeof(Pair)), b_row = ldb * int64_t(sizeof(Pair));
    float* below = c + kRows * ldc;
    if constexpr (Add) {
      _tile_loadd(0, c, row);
      if constexpr (N == 2) _tile_loadd(1, c + kColumns, row);
      if constexpr (R == 2) _tile_loadd(2, below, row);
      if constexpr (R == 2 && N == 2) _tile_loadd(3, below + kColumns, row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; ++k, a += kPairs, b += kPairs * ldb) {
      _tile_loadd(6, b, b_row);
      _tile_loadd(4, a, a_row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (R == 2) {
        _tile_loadd(5, a + kRows * lda, a_row);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (N == 2) {
        _tile_loadd(7, b + kColumns, b_row);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    if constexpr (N == 2) _tile_stored(1, c + kColumns, row);
    if constexpr (R == 2) _tile_stored(2, below, row);
    if constexpr (R == 2 && N == 2) _tile_stored(3, below + kColumns, row);
  }
#else
  static bool usable() { return false; }
  template <bool Add>
  static void product(int64_t, int64_t, int64_t, int64_t, const Pair*, int64_t, const Pair*, int64_t,
                      bool, float*, int64_t) {}
#endif
};

}  // namespace pet
