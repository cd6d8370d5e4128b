// Layers that do not train, within operators that keep nothing but their inputs.
//
// A prediction takes the derivative of the energy once, by the geometry alone. What lies between
// the layers of such an operator is computed again for it, a few rows at a time in the caches, which
// costs about what writing it to memory and reading it back does.
#pragma once

#include <string>

#include "operator.h"
#include "projection.h"
#include "sweep.h"

namespace pet {

// A linear layer behind a norm or a gate. Tensors that are not there are empty.
struct FixedLayer {
  Tensor packed, bias, norm_weight, norm_bias;
  int64_t prologue;
  double eps;

  static FixedLayer of(const Tensor& packed, const std::optional<Tensor>& bias, int64_t prologue,
                       const std::optional<Tensor>& norm_weight,
                       const std::optional<Tensor>& norm_bias, double eps) {
    const auto own = [&](const std::optional<Tensor>& t) { return given(t, packed).detach(); };
    return {packed.detach(),  own(bias), own(norm_weight), own(norm_bias),
            checked_prologue(prologue), eps};
  }

  // As the operators of the derivatives are told of it.
  static FixedLayer of(at::TensorList tensors, int64_t prologue, double eps) {
    TORCH_CHECK(tensors.size() == 4, "a fixed layer is told of in four tensors");
    return {tensors[0], tensors[1], tensors[2], tensors[3], prologue, eps};
  }
  variable_list tensors() const { return {packed, bias, norm_weight, norm_bias}; }

  int64_t out_width(int64_t in) const { return packed.size(1) / in; }

  // For rows from which the prologue makes `in` numbers.
  template <typename T>
  Projection<T> projection(int64_t in) const {
    const auto pointer = [](const Tensor& t) {
      return t.numel() > 0 ? t.const_data_ptr<T>() : nullptr;
    };
    const int64_t width = prologue == int64_t(Prologue::swiglu) ? 2 * in : in;
    const int64_t columns = out_width(in);
    const T* panels = pointer(packed);
    return {Prologue(prologue),   width, in, columns, T(eps), pointer(norm_weight),
            pointer(norm_bias), pointer(bias), panels, panels + in * columns};
  }

  void check(const Tensor& x, int64_t in, const char* name) const {
    const int64_t lanes = kWidths / x.element_size();
    TORCH_CHECK(packed.dim() == 2 && packed.size(0) == 2 && packed.scalar_type() == x.scalar_type(),
                name, ": expected a packed weight of ", x.scalar_type());
    TORCH_CHECK(in > 0 && packed.size(1) % in == 0 && in % lanes == 0 && out_width(in) % lanes == 0,
                name, ": widths are multiples of ", lanes, ", got ", in);
    const auto vector = [&](const Tensor& t, int64_t size, bool needed) {
      if (needed || t.numel() > 0) check_like(t, x, {size}, name);
    };
    const auto kind = Prologue(prologue);
    vector(bias, out_width(in), false);
    vector(norm_weight, in, kind == Prologue::rms_norm || kind == Prologue::layer_norm);
    vector(norm_bias, in, kind == Prologue::layer_norm);
  }

  // To what is kept and from it: four tensors and two numbers under `name`.
  void keep(AutogradContext* ctx, variable_list& saved, const std::string& name) const {
    for (const Tensor& t : tensors()) saved.push_back(t);
    ctx->saved_data[name + "prologue"] = prologue;
    ctx->saved_data[name + "eps"] = eps;
  }
  static FixedLayer kept(AutogradContext* ctx, const variable_list& saved, size_t first,
                         const std::string& name) {
    return of(at::TensorList(saved).slice(first, 4), ctx->saved_data[name + "prologue"].toInt(),
              ctx->saved_data[name + "eps"].toDouble());
  }
};

// The next `numbers` of a buffer.
template <typename T>
T* take(T*& from, int64_t numbers) {
  T* start = from;
  from += numbers;
  return start;
}

inline void refuse_second_derivative(const char* name) {
  TORCH_CHECK(!at::GradMode::is_enabled(), name,
              ": what keeps its inputs alone is differentiated once. Promise that of nothing but "
              "predictions.");
}

}  // namespace pet
