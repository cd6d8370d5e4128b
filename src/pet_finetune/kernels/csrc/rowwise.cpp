// The operators pet_finetune::layer_norm, rms_norm, swiglu and silu.

#include "operator.h"
#include "rowwise.h"

namespace pet {
namespace {

constexpr int64_t kRowsPerPart = 128;

// Runs body(first, last) over parts of the rows; the parts do not depend on the threads.
template <typename F>
void for_each_part(int64_t rows, F&& body) {
  const int64_t parts = (rows + kRowsPerPart - 1) / kRowsPerPart;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      body(part, part * kRowsPerPart, std::min(rows, (part + 1) * kRowsPerPart));
  });
}

// What each part adds to the gradient of a row of parameters; their sum is the gradient.
Tensor partial_sums(bool needed, int64_t rows, int64_t width, const Tensor& like) {
  if (!needed) return Tensor();
  return at::zeros({(rows + kRowsPerPart - 1) / kRowsPerPart, width}, like.options());
}

// The gradients of weight and bias by torch operations: for graphs that differentiate these.
variable_list norm_parameter_gradients(const Tensor& grad, const Tensor& x, double eps,
                                       bool centered) {
  const Tensor shifted = centered ? x - x.mean(-1, true) : x;
  const Tensor normal = shifted * (shifted.square().mean(-1, true) + eps).rsqrt();
  return {(grad * normal).sum(0), grad.sum(0)};
}

struct NormBackward : Function<NormBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x,
                        const Tensor& weight, double eps, bool centered) {
    const Tensor g = grad.contiguous();
    Tensor dx = at::empty_like(x);
    const int64_t width = x.size(1);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_backward", [&] {
      const auto kernel = centered ? norm_backward<scalar_t, true>
                                   : norm_backward<scalar_t, false>;
      for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
        for (int64_t i = first * width; i < last * width; i += width)
          kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(g) + i,
                 scalar_t(eps), out<scalar_t>(dx) + i, nullptr, nullptr);
      });
    });
    ctx->save_for_backward({g, x, weight});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["centered"] = centered;
    return dx;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("norm");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1], &weight = saved[2];
    const Tensor c = cotangents[0].contiguous();
    const bool centered = ctx->saved_data["centered"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    const int64_t width = x.size(1);
    Tensor to_grad = at::empty_like(x), to_x = at::empty_like(x);
    Tensor sums = partial_sums(ctx->needs_input_grad(2), x.size(0), width, x);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_double_backward", [&] {
      const auto kernel = centered ? norm_double_backward<scalar_t, true>
                                   : norm_double_backward<scalar_t, false>;
      for_each_part(x.size(0), [&](int64_t part, int64_t first, int64_t last) {
        for (int64_t i = first * width; i < last * width; i += width)
          kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(g) + i,
                 data<scalar_t>(c) + i, scalar_t(eps), out<scalar_t>(to_grad) + i,
                 out<scalar_t>(to_x) + i, part_row<scalar_t>(sums, part));
      });
    });
    return {to_grad, to_x, sums.defined() ? sums.sum(0) : Tensor(), Tensor(), Tensor()};
  }
};

struct Norm : Function<Norm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& bias, double eps, bool centered) {
    Tensor y = at::empty_like(x);
    const int64_t width = x.size(1);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm", [&] {
      const auto kernel = centered ? norm_forward<scalar_t, true>
                                   : norm_forward<scalar_t, false>;
      for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
        for (int64_t i = first * width; i < last * width; i += width)
          kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(bias),
                 scalar_t(eps), out<scalar_t>(y) + i);
      });
    });
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["centered"] = centered;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool centered = ctx->saved_data["centered"].toBool();
    Tensor dx, dweight, dbias;
    if (ctx->needs_input_grad(0)) dx = NormBackward::apply(grads[0], x, weight, eps, centered);
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(2)) {
      const variable_list parameters = at::GradMode::is_enabled()
                                           ? norm_parameter_gradients(grads[0], x, eps, centered)
                                           : summed(grads[0].contiguous(), x, weight, eps, centered);
      dweight = parameters[0];
      if (ctx->needs_input_grad(2)) dbias = parameters[1];
    }
    return {dx, dweight, dbias, Tensor(), Tensor()};
  }

 private:
  static variable_list summed(const Tensor& g, const Tensor& x, const Tensor& weight, double eps,
                              bool centered) {
    const int64_t width = x.size(1);
    Tensor of_weight = partial_sums(true, x.size(0), width, x);
    Tensor of_bias = partial_sums(centered, x.size(0), width, x);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_parameters", [&] {
      const auto kernel = centered ? norm_backward<scalar_t, true>
                                   : norm_backward<scalar_t, false>;
      for_each_part(x.size(0), [&](int64_t part, int64_t first, int64_t last) {
        for (int64_t i = first * width; i < last * width; i += width)
          kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(g) + i,
                 scalar_t(eps), nullptr, part_row<scalar_t>(of_weight, part),
                 part_row<scalar_t>(of_bias, part));
      });
    });
    return {of_weight.sum(0), centered ? of_bias.sum(0) : Tensor()};
  }
};

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  check_rows(x, "layer_norm");
  check_like(weight, x, {x.size(1)}, "layer_norm, weight");
  check_like(bias, x, {x.size(1)}, "layer_norm, bias");
  return Norm::apply(x.contiguous(), weight, bias, eps, true);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_rows(x, "rms_norm");
  check_like(weight, x, {x.size(1)}, "rms_norm, weight");
  return Norm::apply(x.contiguous(), weight, none(x), eps, false);
}

struct GateBackward : Function<GateBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x, bool silu) {
    const Tensor g = grad.contiguous();
    Tensor dx = at::empty_like(x);
    const int64_t width = g.size(1), full = x.size(1);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gate_backward", [&] {
      const auto kernel = silu ? gate_backward<scalar_t, true>
                               : gate_backward<scalar_t, false>;
      for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          kernel(width, data<scalar_t>(x) + i * full, data<scalar_t>(g) + i * width,
                 out<scalar_t>(dx) + i * full);
      });
    });
    ctx->save_for_backward({g, x});
    ctx->saved_data["silu"] = silu;
    return dx;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("gate");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &g = saved[0], &x = saved[1];
    const Tensor c = cotangents[0].contiguous();
    const bool silu = ctx->saved_data["silu"].toBool();
    Tensor to_grad = at::empty_like(g), to_x = at::empty_like(x);
    const int64_t width = g.size(1), full = x.size(1);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gate_double_backward", [&] {
      const auto kernel = silu ? gate_double_backward<scalar_t, true>
                               : gate_double_backward<scalar_t, false>;
      for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          kernel(width, data<scalar_t>(x) + i * full, data<scalar_t>(g) + i * width,
                 data<scalar_t>(c) + i * full, out<scalar_t>(to_grad) + i * width,
                 out<scalar_t>(to_x) + i * full);
      });
    });
    return {to_grad, to_x, Tensor()};
  }
};

struct Gate : Function<Gate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, bool silu) {
    const int64_t full = x.size(1), width = silu ? full : full / 2;
    Tensor y = at::empty({x.size(0), width}, x.options());
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gate", [&] {
      const auto kernel = silu ? gate_forward<scalar_t, true>
                               : gate_forward<scalar_t, false>;
      for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          kernel(width, data<scalar_t>(x) + i * full, out<scalar_t>(y) + i * width);
      });
    });
    ctx->save_for_backward({x});
    ctx->saved_data["silu"] = silu;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const bool silu = ctx->saved_data["silu"].toBool();
    return {GateBackward::apply(grads[0], ctx->get_saved_variables()[0], silu), Tensor()};
  }
};

Tensor swiglu(const Tensor& x) {
  check_rows(x, "swiglu");
  TORCH_CHECK(x.size(1) % 2 == 0, "swiglu: an odd number of columns, ", x.size(1));
  return Gate::apply(x.contiguous(), false);
}

Tensor silu(const Tensor& x) {
  check_rows(x, "silu");
  return Gate::apply(x.contiguous(), true);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", &layer_norm);
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm);
  m.def("swiglu(Tensor x) -> Tensor", &swiglu);
  m.def("silu(Tensor x) -> Tensor", &silu);
}

}  // namespace pet
