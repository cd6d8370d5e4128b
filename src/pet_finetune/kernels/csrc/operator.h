// What the operators share: argument checks, and what is kept for the derivatives.
//
// Each operator is a function whose backward is again a function with a backward, because training
// on forces differentiates twice. A third derivative is an error, never a wrong number.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace pet {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

inline void refuse_third_derivative(const char* name) {
  TORCH_CHECK(!at::GradMode::is_enabled(), name,
              ": the fused kernels differentiate twice. For a third derivative set "
              "PET_FINETUNE_KERNELS=off, which computes with plain torch operations.");
}

template <typename T>
const T* data(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

template <typename T>
T* out(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

// Stands for an argument that is not there: an undefined tensor cannot be an input of a Function,
// and leaving one out would shift the indices of needs_input_grad.
inline Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }

// Addresses are computed from these, so a wrong one must stop here.
inline void check_rows(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.device().is_cpu(), name, ": expected rows [n, d] on the CPU, got ",
              x.sizes(), " on ", x.device());
}

inline void check_like(const Tensor& t, const Tensor& x, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == x.scalar_type() && t.device().is_cpu(),
              name, ": expected ", sizes, " of ", x.scalar_type(), ", got ", t.sizes(), " of ",
              t.scalar_type());
}

// The sizes of a tensor without its memory, to be kept where no number of it will be read; a small
// one as it is, because making another takes longer than it saves.
inline Tensor shape_of(const Tensor& t) {
  return t.numel() < 65536 ? t : at::empty({1}, t.options()).expand(t.sizes());
}

// The row of sums that belongs to a part of the work; null where nothing is to be summed.
template <typename T>
T* part_row(const Tensor& sums, int64_t part) {
  return sums.defined() ? sums.mutable_data_ptr<T>() + part * sums.size(1) : nullptr;
}

}  // namespace pet
