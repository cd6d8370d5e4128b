// The layer of a projection as its operators keep it, and its weight in the form of the products.
#pragma once

#include "low_rank.h"
#include "operator.h"
#include "projection.h"

namespace pet {
namespace {

constexpr int64_t kNone = int64_t(Prologue::none);

// Which products a packed weight [out, in] is for: y = p W^T, or gp = gy W.
enum class Side { forward, backward };

// One form of a weight in panels; in bfloat16, pairs of rows of the panels lie side by side.
void pack_side(const Tensor& weight, Side side, bool rounds, void* to) {
  const int64_t out_width = weight.size(0), in = weight.size(1);
  const bool forward = side == Side::forward;
  if (rounds) {
    const float* w = data<float>(weight);
    auto* pairs = static_cast<Bfloat16::Pair*>(to);
    const auto half = [&](int64_t o, int64_t i) { return Bfloat16::rounded(w[o * in + i]); };
    if (forward)
      Panels<Bfloat16::Pair>::pack<true>(in / 2, out_width, pairs, [&](int64_t k, int64_t n) {
        return half(n, 2 * k) | half(n, 2 * k + 1) << 16;
      });
    else
      Panels<Bfloat16::Pair>::pack<false>(out_width / 2, in, pairs, [&](int64_t k, int64_t n) {
        return half(2 * k, n) | half(2 * k + 1, n) << 16;
      });
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "pack", [&] {
    const scalar_t* w = data<scalar_t>(weight);
    auto* panels = static_cast<scalar_t*>(to);
    if (forward)
      Panels<scalar_t>::template pack<true>(
          in, out_width, panels, [&](int64_t k, int64_t n) { return w[n * in + k]; });
    else
      Panels<scalar_t>::template pack<false>(
          out_width, in, panels, [&](int64_t k, int64_t n) { return w[k * in + n]; });
  });
}

// What does not change from row to row. Tensors that are not there are empty; `packed` is where the
// weight is to be packed when it is needed and forgotten after, because it will change.
struct Layer {
  Tensor weight, packed, bias, norm_weight, norm_bias, a, b;
  int64_t prologue;
  double eps, scaling;
  bool rounds;

  static Layer of(const Tensor& weight, const std::optional<Tensor>& packed,
                  const std::optional<Tensor>& bias, int64_t prologue,
                  const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                  double eps, const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                  double scaling, bool rounds) {
    const Tensor empty = none(weight);
    const auto own = [&](const std::optional<Tensor>& t) { return t.has_value() ? *t : empty; };
    const auto whole = [&](const std::optional<Tensor>& t) {
      return t.has_value() ? t->contiguous() : empty;
    };
    const bool rounded = packed.has_value() ? packed->scalar_type() == at::kBFloat16 : rounds;
    return {weight,   own(packed), own(bias), own(norm_weight), own(norm_bias), whole(a),
            whole(b), checked_prologue(prologue), eps, scaling, rounded};
  }

  // As the operators of the derivatives are told of it.
  static Layer of(at::TensorList tensors, int64_t prologue, double eps, double scaling,
                  bool rounds) {
    TORCH_CHECK(tensors.size() == 7, "projection: a layer is told of in seven tensors");
    return {tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6],
            prologue,   eps,        scaling,    rounds};
  }
  variable_list tensors() const { return {weight, packed, bias, norm_weight, norm_bias, a, b}; }

  static Layer kept(const variable_list& saved, size_t first, AutogradContext* ctx) {
    return of(at::TensorList(saved).slice(first, 7), ctx->saved_data["prologue"].toInt(),
              ctx->saved_data["eps"].toDouble(), ctx->saved_data["scaling"].toDouble(),
              ctx->saved_data["rounds"].toBool());
  }

  void keep(AutogradContext* ctx, variable_list others) const {
    for (const Tensor& t : tensors()) others.push_back(t);
    ctx->save_for_backward(others);
    ctx->saved_data["prologue"] = prologue;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["rounds"] = rounds;
  }

  bool has_norm_bias() const { return prologue == int64_t(Prologue::layer_norm); }
  int64_t in(const Tensor& x) const {
    return prologue == int64_t(Prologue::swiglu) ? x.size(1) / 2 : x.size(1);
  }
  int64_t out() const { return weight.size(0); }

  // The weight's panels for products of one side.
  Tensor panels(Side side) const {
    if (packed.numel() > 0) return packed.select(0, side == Side::forward ? 0 : 1);
    const Tensor numbers = weight.detach().contiguous();
    const auto type = rounds ? at::kBFloat16 : numbers.scalar_type();
    Tensor made = at::empty({numbers.numel()}, numbers.options().dtype(type));
    pack_side(numbers, side, rounds, made.mutable_data_ptr());
    return made;
  }

  // With the panels of the side that is needed, which have to outlive what is returned.
  template <typename T>
  Projection<T> projection(const Tensor& x, Side side, const Tensor& panels) const {
    const auto pointer = [](const Tensor& t) {
      return t.numel() > 0 ? t.const_data_ptr<T>() : nullptr;
    };
    Projection<T> made{Prologue(prologue), x.size(1),          in(x),         out(),   T(eps),
                       pointer(norm_weight), pointer(norm_bias), pointer(bias), nullptr, nullptr};
    const bool forward = side == Side::forward;
    if (rounds) {
      const auto* rounded = static_cast<const Bfloat16::Pair*>(panels.const_data_ptr());
      (forward ? made.forward_bfloat16 : made.backward_bfloat16) = rounded;
    } else {
      (forward ? made.forward_panels : made.backward_panels) = pointer(panels);
    }
    return made;
  }

  template <typename T>
  LowRank<T> low_rank(const Projection<T>& p) const {
    return LowRank<T>(p.in, p.out, a.size(0), data<T>(a), data<T>(b), T(scaling));
  }
};

}  // namespace
}  // namespace pet
