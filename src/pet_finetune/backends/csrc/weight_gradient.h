// The gradient of a whole weight, dW = g^T p for g [n, out] and p [n, in].
//
// The rows come in chunks. A chunk's p is kept, and when all of it is there, threads share the rows of
// dW among them: no thread sums up a matrix of its own, which would have to be cleared, read and
// added again, and the sums do not depend on the number of threads.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <type_traits>

#include "bfloat16.h"
#include "product.h"
#include "sweep.h"

namespace pet {
namespace {

constexpr int64_t kChunk = 1024;  // rows; a multiple of every tile's and every pair's

template <typename T>
class WeightGradient {
  static constexpr int64_t kSlice = 4 * kTileRows;  // rows of dW that a thread takes at a time
  static constexpr int64_t kDepth = 256;   // rows of p whose share of a slice stays in the caches

 public:
  // `gradient` [out, in] is null where none is wanted; then p is kept nowhere.
  WeightGradient(int64_t in, int64_t out, bool rounds, T* gradient)
      : in_(in), out_(out), rounds_(rounds), gradient_(gradient) {}

  // Makes room for a chunk of so many rows.
  void begin(int64_t rows) {
    if (gradient_ == nullptr || kept_.defined()) return;
    const int64_t bytes = rounds_ ? (rows + 1) / 2 * in_ * int64_t(sizeof(Bfloat16::Pair))
                                  : rows * in_ * int64_t(sizeof(T));
    kept_ = at::empty({bytes}, at::kByte);
  }

  // Where p of these rows of the chunk is to be written; `first` is even.
  T* place(int64_t first, int64_t rows) {
    if (gradient_ == nullptr || rounds_) return thread_buffer<T>(rows * in_);
    return static_cast<T*>(kept_.mutable_data_ptr()) + first * in_;
  }

  // p of these rows is written.
  void keep(int64_t first, int64_t rows, const T* p) {
    if constexpr (std::is_same_v<T, float>)
      if (gradient_ != nullptr && rounds_) Bfloat16::pair_rows(rows, in_, p, in_, pairs() + first / 2 * in_);
  }

  // The chunk is complete: what it adds to the gradient, or begins it with.
  void add(int64_t rows, const T* g, bool to_earlier) {
    if (gradient_ == nullptr) return;
    at::parallel_for(0, (out_ + kSlice - 1) / kSlice, 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kSlice; first < std::min(out_, end * kSlice); first += kSlice)
        for (int64_t k = 0; k < rows; k += kDepth)
          add_slice(first, std::min(kSlice, out_ - first), k, std::min(kDepth, rows - k), g,
                    to_earlier || k > 0);
    });
  }

 private:
  void add_slice(int64_t first, int64_t count, int64_t k, int64_t depth, const T* g, bool add) {
    T* to = gradient_ + first * in_;
    const T* left = g + k * out_ + first;
    if constexpr (std::is_same_v<T, float>)
      if (rounds_) {
        const Bfloat16::Pair* right = pairs() + k / 2 * in_;
        return add ? multiply_bfloat16<true>(count, depth, left, right, to)
                   : multiply_bfloat16<false>(count, depth, left, right, to);
      }
    const T* right = static_cast<const T*>(kept_.const_data_ptr()) + k * in_;
    if (add)
      product<T, true>(count, in_, depth, left, 1, out_, right, in_, to, in_);
    else
      product<T, false>(count, in_, depth, left, 1, out_, right, in_, to, in_);
  }

  template <bool Add>
  void multiply_bfloat16(int64_t count, int64_t depth, const float* g, const Bfloat16::Pair* right,
                       float* to) const {
    const int64_t pairs = (depth + 1) / 2, stride = (pairs + 15) / 16 * 16;
    Bfloat16::Pair* left = thread_buffer<Bfloat16::Pair>(stride * count);
    if (Tiles::usable()) {
      Bfloat16::pair_columns_of(depth, count, g, out_, left, stride);
      Bfloat16::product<Add>(count, 0, in_, pairs, left, stride, 1, right, in_, false, to, in_);
    } else {
      Bfloat16::pair_rows(depth, count, g, out_, left);
      Bfloat16::product<Add>(count, 0, in_, pairs, left, 1, count, right, in_, false, to, in_);
    }
  }

  Bfloat16::Pair* pairs() const { return static_cast<Bfloat16::Pair*>(kept_.mutable_data_ptr()); }

  int64_t in_, out_;
  bool rounds_;
  T* gradient_;
  at::Tensor kept_;
};

}  // namespace
}  // namespace pet
