// The operator pet_finetune::two_layers: two linear layers, each behind a norm or a gate, of which
// the input alone is kept. For prediction: it is differentiated once, and by x alone.

#include "fixed_layer.h"

namespace pet {
namespace {
namespace cpu {

// How wide the rows between the layers are, after the second one's gate.
int64_t width_between(const Tensor& x, const FixedLayer& first, const FixedLayer& second) {
  const bool gated = second.prologue == int64_t(Prologue::swiglu);
  return first.out_width(x.size(1)) / (gated ? 2 : 1);
}

// What the first layer makes of some rows, in `space`, which then begins behind it.
template <typename T>
const T* hidden(const Projection<T>& one, int64_t count, const T* x, T*& space) {
  T* p = take(space, count * one.in);
  T* h = take(space, count * one.out);
  one.apply(count, x, p);
  one.multiply(count, p, nullptr, h, 0, one.out);
  return h;
}

Tensor two_layers(const Tensor& x_, const Tensor& packed, const std::optional<Tensor>& bias,
                  int64_t prologue, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, double eps, const Tensor& second_packed,
                  const std::optional<Tensor>& second_bias, int64_t activation,
                  const std::optional<Tensor>& residual, bool onto_x) {
  const char* name = "two_layers";
  check_rows(x_, name);
  const Tensor x = x_.contiguous();
  const auto first = FixedLayer::of(packed, bias, prologue, norm_weight, norm_bias, eps);
  const auto second =
      FixedLayer::of(second_packed, second_bias, activation, std::nullopt, std::nullopt, 0.0);
  TORCH_CHECK(first.prologue != int64_t(Prologue::swiglu), name, ": a gate is for the second");
  first.check(x, x.size(1), name);
  const int64_t middle = width_between(x, first, second);
  second.check(x, middle, name);
  const int64_t rows = x.size(0), out_width = second.out_width(middle);
  TORCH_CHECK(!onto_x || out_width == x.size(1), name, ": x does not go with the result's columns");
  if (residual.has_value()) check_like(*residual, x, {rows, out_width}, "two_layers, residual");
  const Tensor rest = given(residual, x).contiguous();
  Tensor y = at::empty({rows, out_width}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "two_layers", [&] {
    const auto one = first.projection<scalar_t>(x.size(1));
    const auto two = second.projection<scalar_t>(middle);
    const scalar_t* extra = onto_x               ? data<scalar_t>(x)
                            : rest.numel() > 0 ? data<scalar_t>(rest)
                                               : nullptr;
    Rows::of(rows, 0).for_each([&](int64_t, int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      scalar_t* space = thread_buffer<scalar_t>(count * (one.in + one.out + two.in));
      const scalar_t* h = hidden(one, count, data<scalar_t>(x) + begin * one.width, space);
      scalar_t* q = take(space, count * two.in);
      two.apply(count, h, q);
      two.multiply(count, q, extra == nullptr ? nullptr : extra + begin * out_width,
                   out<scalar_t>(y) + begin * out_width, 0, out_width);
    });
  });
  return y;
}

// The gradient of x.
Tensor two_layers_backward(const Tensor& grad, const Tensor& x, at::TensorList tensors,
                           int64_t prologue, double eps, at::TensorList second_tensors,
                           int64_t activation, bool onto_x) {
  const auto first = FixedLayer::of(tensors, prologue, eps);
  const auto second = FixedLayer::of(second_tensors, activation, 0.0);
  const int64_t middle = width_between(x, first, second);
  const Tensor gy = grad.contiguous();
  Tensor gx = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "two_layers_backward", [&] {
    const auto one = first.projection<scalar_t>(x.size(1));
    const auto two = second.projection<scalar_t>(middle);
    Rows::of(x.size(0), 0).for_each([&](int64_t, int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      scalar_t* space = thread_buffer<scalar_t>(count * (2 * one.in + 2 * one.out + two.in));
      const scalar_t* own = data<scalar_t>(x) + begin * one.width;
      const scalar_t* g = data<scalar_t>(gy) + begin * two.out;
      scalar_t* to = out<scalar_t>(gx) + begin * one.width;
      const scalar_t* h = hidden(one, count, own, space);
      scalar_t* gq = take(space, count * two.in);
      scalar_t* gh = take(space, count * one.out);
      scalar_t* gp = take(space, count * one.in);
      two.multiply_back(count, g, gq, 0, two.in);
      two.apply_backward(count, h, gq, gh, nullptr, nullptr);
      one.multiply_back(count, gh, gp, 0, one.in);
      one.apply_backward(count, own, gp, to, nullptr, nullptr);
      if (onto_x)
        for (int64_t i = 0; i < count * one.width; i += Simd<scalar_t>::width)
          store(to + i, load(to + i) + load(g + i));
    });
  });
  return gx;
}

}  // namespace cpu

struct TwoLayers : Function<TwoLayers> {
  // rest: what is added to the result; x itself, too, where `onto_x`.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& rest,
                        const FixedLayer& first, const FixedLayer& second, bool onto_x) {
    variable_list saved{x};
    first.keep(ctx, saved, "first_");
    second.keep(ctx, saved, "second_");
    ctx->save_for_backward(saved);
    ctx->saved_data["onto_x"] = onto_x;
    return PET_OPERATOR(two_layers)(x, first.packed, if_there(first.bias), first.prologue,
                                    if_there(first.norm_weight), if_there(first.norm_bias),
                                    first.eps, second.packed, if_there(second.bias),
                                    second.prologue, if_there(rest), onto_x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative("two_layers");
    const variable_list saved = ctx->get_saved_variables();
    const FixedLayer first = FixedLayer::kept(ctx, saved, 1, "first_");
    const FixedLayer second = FixedLayer::kept(ctx, saved, 5, "second_");
    variable_list result(5);
    if (ctx->needs_input_grad(0))
      result[0] = PET_OPERATOR(two_layers_backward)(
          grads[0], saved[0], first.tensors(), first.prologue, first.eps, second.tensors(),
          second.prologue, ctx->saved_data["onto_x"].toBool());
    if (ctx->needs_input_grad(1)) result[1] = grads[0];
    return result;
  }
};

Tensor two_layers_recorded(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                           int64_t prologue, const std::optional<Tensor>& norm_weight,
                           const std::optional<Tensor>& norm_bias, double eps,
                           const Tensor& second_packed, const std::optional<Tensor>& second_bias,
                           int64_t activation, const std::optional<Tensor>& residual,
                           bool onto_x) {
  const Tensor rest = given(residual, x);
  if (!recorded(x, rest))
    return PET_OPERATOR(two_layers)(x, packed, bias, prologue, norm_weight, norm_bias, eps,
                                    second_packed, second_bias, activation, residual, onto_x);
  const auto first = FixedLayer::of(packed, bias, prologue, norm_weight, norm_bias, eps);
  const auto second =
      FixedLayer::of(second_packed, second_bias, activation, std::nullopt, std::nullopt, 0.0);
  return TwoLayers::apply(x.contiguous(), rest.contiguous(), first, second, onto_x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("two_layers(Tensor x, Tensor packed, Tensor? bias, int prologue, Tensor? norm_weight,"
        " Tensor? norm_bias, float eps, Tensor second_packed, Tensor? second_bias, int activation,"
        " Tensor? residual, bool onto_x) -> Tensor");
  m.def("two_layers_backward(Tensor grad, Tensor x, Tensor[] layer, int prologue, float eps,"
        " Tensor[] second, int activation, bool onto_x) -> Tensor");
}

TORCH_LIBRARY_IMPL(pet_finetune, CPU, m) {
  m.impl("two_layers", &cpu::two_layers);
  m.impl("two_layers_backward", &cpu::two_layers_backward);
}

TORCH_LIBRARY_IMPL(pet_finetune, Autograd, m) { m.impl("two_layers", &two_layers_recorded); }

}  // namespace pet
