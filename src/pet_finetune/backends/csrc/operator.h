// What the operators share: argument checks, and what is kept for the derivatives.
//
// An operator, its derivative and the derivative of that are operators of torch's dispatcher each:
// numbers in, numbers out, for the CPU here and without numbers (shapes only) in ../fake.py, so that
// a traced or compiled graph can contain all of them. What autograd has to know is an
// autograd::Function beside them, whose forward and backward call the operators. Training on forces
// differentiates twice; a third derivative is an error, never a wrong number.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
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

// Stands for a tensor that is not there: an undefined one cannot be an input of a Function or go in
// and out of operators, and leaving one out would shift the indices of needs_input_grad.
inline Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }
inline bool absent(const Tensor& t) { return t.sym_numel() == 0; }
inline std::optional<Tensor> if_there(const Tensor& t) {
  return absent(t) ? std::nullopt : std::optional<Tensor>(t);
}
inline Tensor given(const std::optional<Tensor>& t, const Tensor& like) {
  return t.has_value() ? *t : none(like);
}
// A gradient that was asked for; an undefined tensor stands for one that was not.
inline Tensor if_wanted(bool wanted, const Tensor& t) { return wanted ? t : Tensor(); }

// Whether autograd has to record what is done with these tensors.
template <typename... Ts>
bool recorded(const Ts&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

// Calls an operator of the dispatcher below autograd: the kernel for the CPU, or whoever traces.
template <typename R, typename... Args>
struct Operator {
  c10::TypedOperatorHandle<R(Args...)> handle;

  R operator()(Args... args) const {
    at::AutoDispatchBelowADInplaceOrView below;
    return handle.call(std::forward<Args>(args)...);
  }
};
template <typename R, typename... Args>
Operator<R, Args...> operator_of(R (*)(Args...), const char* name) {
  return {c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<R(Args...)>()};
}
// The operator whose kernel is the function of that name in the namespace cpu; found once.
#define PET_OPERATOR(name)                                                             \
  ([]() -> const auto& {                                                               \
    static const auto found = ::pet::operator_of(&cpu::name, "pet_finetune::" #name);  \
    return found;                                                                      \
  }())

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
  const bool traced = t.key_set().has(c10::DispatchKey::Python);
  return traced || t.numel() < 65536 ? t : at::empty({1}, t.options()).expand(t.sizes());
}

// The row of sums that belongs to a part of the work; null where nothing is to be summed.
template <typename T>
T* part_row(const Tensor& sums, int64_t part) {
  return sums.defined() ? sums.mutable_data_ptr<T>() + part * sums.size(1) : nullptr;
}

}  // namespace pet
