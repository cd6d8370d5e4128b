// How the rows of a matrix are dealt out to threads, and the memory of each.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace pet {
namespace {

// How the rows of a sweep are dealt out: to parts that run beside each other, each in blocks that
// stay in the caches. A function of the rows alone, so that sums do not depend on the threads.
struct Rows {
  int64_t rows, parts, block;

  // `sums`: what each part has to add up besides, in numbers.
  static Rows of(int64_t rows, int64_t sums) {
    if (sums > 1024) {  // of a matrix: adding up blocks and parts costs, too
      const bool whole = sums > 16384;
      const int64_t most = std::max(std::min<int64_t>(rows / 32, 2),
                                    std::min<int64_t>(rows / (whole ? 256 : 64), whole ? 8 : 16));
      return {rows, std::max<int64_t>(most, 1), (whole ? 16 : 8) * kTileRows};
    }
    const int64_t block = (rows <= 512 ? 2 : 4) * kTileRows;
    int64_t most = (rows + block - 1) / block;
    if (sums > 0) most = std::min<int64_t>(most, 16);
    return {rows, std::max<int64_t>(most, 1), block};
  }

  // body(part, first, last) for every block of every part.
  template <typename F>
  void for_each(F&& body) const {
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t stop = border(part + 1);
        for (int64_t i = border(part); i < stop; i += block)
          body(part, i, std::min(stop, i + block));
      }
    });
  }

 private:
  // Where a part begins: at a whole tile of rows, so that none but the last is cut up.
  int64_t border(int64_t part) const {
    return std::min(rows, (rows * part / parts + kTileRows - 1) / kTileRows * kTileRows);
  }
};

// So few rows that they are dealt out by columns.
constexpr int64_t kFewRows = 16;

// body(first, last) for pieces of the columns, whole panels each.
template <typename T, typename F>
void for_each_panel(int64_t columns, F&& body) {
  constexpr int64_t wide = 2 * Simd<T>::width;
  at::parallel_for(0, (columns + wide - 1) / wide, 2, [&](int64_t begin, int64_t end) {
    body(begin * wide, std::min(columns, end * wide));
  });
}

// Memory of this thread for a task's blocks.
template <typename T>
T* thread_buffer(int64_t size) {
  static thread_local std::vector<T> buffer;
  if (int64_t(buffer.size()) < size + 16) buffer.resize(size + 16);
  T* start = buffer.data();
  while (reinterpret_cast<uintptr_t>(start) % kVectorBytes != 0) ++start;
  return start;
}

}  // namespace
}  // namespace pet
