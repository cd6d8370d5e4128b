// The operators pet_finetune::norm (of a layer, centered, or by the root mean square) and gate (SiLU
// or SwiGLU), with their derivatives.

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

namespace cpu {

Tensor norm(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            bool centered) {
  check_rows(x_, "norm");
  check_like(weight, x_, {x_.size(1)}, "norm, weight");
  TORCH_CHECK(bias.has_value() == centered, "norm: a bias goes with a layer's norm alone");
  if (centered) check_like(*bias, x_, {x_.size(1)}, "norm, bias");
  const Tensor x = x_.contiguous(), shift = bias.has_value() ? *bias : Tensor();
  Tensor y = at::empty_like(x);
  const int64_t width = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm", [&] {
    const auto kernel = centered ? pet::norm_forward<scalar_t, true> : pet::norm_forward<scalar_t, false>;
    for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first * width; i < last * width; i += width)
        kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(shift),
               scalar_t(eps), out<scalar_t>(y) + i);
    });
  });
  return y;
}

Tensor norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps,
                     bool centered) {
  const Tensor g = grad.contiguous();
  Tensor dx = at::empty_like(x);
  const int64_t width = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_backward", [&] {
    const auto kernel = centered ? pet::norm_backward<scalar_t, true> : pet::norm_backward<scalar_t, false>;
    for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first * width; i < last * width; i += width)
        kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(g) + i,
               scalar_t(eps), out<scalar_t>(dx) + i, nullptr, nullptr);
    });
  });
  return dx;
}

// The gradients of weight and bias; of no bias, an empty one.
std::tuple<Tensor, Tensor> norm_parameters(const Tensor& grad, const Tensor& x,
                                           const Tensor& weight, double eps, bool centered) {
  const Tensor g = grad.contiguous();
  const int64_t width = x.size(1);
  Tensor of_weight = partial_sums(true, x.size(0), width, x);
  Tensor of_bias = partial_sums(centered, x.size(0), width, x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_parameters", [&] {
    const auto kernel = centered ? pet::norm_backward<scalar_t, true> : pet::norm_backward<scalar_t, false>;
    for_each_part(x.size(0), [&](int64_t part, int64_t first, int64_t last) {
      for (int64_t i = first * width; i < last * width; i += width)
        kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(g) + i,
               scalar_t(eps), nullptr, part_row<scalar_t>(of_weight, part),
               part_row<scalar_t>(of_bias, part));
    });
  });
  return {of_weight.sum(0), centered ? of_bias.sum(0) : none(x)};
}

// The gradients of grad, x and, where `trains`, the weight, for a cotangent of norm_backward.
std::tuple<Tensor, Tensor, Tensor> norm_double_backward(const Tensor& cotangent,
                                                        const Tensor& grad, const Tensor& x,
                                                        const Tensor& weight, double eps,
                                                        bool centered, bool trains) {
  const Tensor c = cotangent.contiguous(), g = grad.contiguous();
  const int64_t width = x.size(1);
  Tensor to_grad = at::empty_like(x), to_x = at::empty_like(x);
  Tensor sums = partial_sums(trains, x.size(0), width, x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_double_backward", [&] {
    const auto kernel =
        centered ? pet::norm_double_backward<scalar_t, true> : pet::norm_double_backward<scalar_t, false>;
    for_each_part(x.size(0), [&](int64_t part, int64_t first, int64_t last) {
      for (int64_t i = first * width; i < last * width; i += width)
        kernel(width, data<scalar_t>(x) + i, data<scalar_t>(weight), data<scalar_t>(g) + i,
               data<scalar_t>(c) + i, scalar_t(eps), out<scalar_t>(to_grad) + i,
               out<scalar_t>(to_x) + i, part_row<scalar_t>(sums, part));
    });
  });
  return {to_grad, to_x, trains ? sums.sum(0) : none(x)};
}

}  // namespace cpu

// The gradients of weight and bias by torch operations: for graphs that differentiate these.
std::tuple<Tensor, Tensor> differentiable_norm_parameters(const Tensor& grad, const Tensor& x,
                                                          double eps, bool centered) {
  const Tensor shifted = centered ? x - x.mean(-1, true) : x;
  const Tensor normal = shifted * (shifted.square().mean(-1, true) + eps).rsqrt();
  return {(grad * normal).sum(0), grad.sum(0)};
}

struct NormBackward : Function<NormBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x,
                        const Tensor& weight, double eps, bool centered) {
    ctx->save_for_backward({grad, x, weight});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["centered"] = centered;
    return PET_OPERATOR(norm_backward)(grad, x, weight, eps, centered);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("norm");
    const variable_list saved = ctx->get_saved_variables();
    const bool trains = ctx->needs_input_grad(2);
    const auto [to_grad, to_x, to_weight] = PET_OPERATOR(norm_double_backward)(
        cotangents[0], saved[0], saved[1], saved[2], ctx->saved_data["eps"].toDouble(),
        ctx->saved_data["centered"].toBool(), trains);
    return {to_grad, to_x, if_wanted(trains, to_weight), Tensor(), Tensor()};
  }
};

struct Norm : Function<Norm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& bias, double eps, bool centered) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["centered"] = centered;
    const auto shift = centered ? std::optional<Tensor>(bias) : std::nullopt;
    return PET_OPERATOR(norm)(x, weight, shift, eps, centered);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool centered = ctx->saved_data["centered"].toBool();
    Tensor dx, dweight, dbias;
    if (ctx->needs_input_grad(0)) dx = NormBackward::apply(grads[0], x, weight, eps, centered);
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(2)) {
      std::tie(dweight, dbias) =
          at::GradMode::is_enabled()
              ? differentiable_norm_parameters(grads[0], x, eps, centered)
              : PET_OPERATOR(norm_parameters)(grads[0], x, weight, eps, centered);
      dbias = if_wanted(ctx->needs_input_grad(2), dbias);
    }
    return {dx, dweight, dbias, Tensor(), Tensor()};
  }
};

Tensor norm_recorded(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     double eps, bool centered) {
  const Tensor shift = given(bias, x);
  if (!recorded(x, weight, shift)) return PET_OPERATOR(norm)(x, weight, bias, eps, centered);
  return Norm::apply(x.contiguous(), weight, shift, eps, centered);
}

namespace cpu {

Tensor gate(const Tensor& x_, bool silu) {
  check_rows(x_, "gate");
  TORCH_CHECK(silu || x_.size(1) % 2 == 0, "gate: an odd number of columns, ", x_.size(1));
  const Tensor x = x_.contiguous();
  const int64_t full = x.size(1), width = silu ? full : full / 2;
  Tensor y = at::empty({x.size(0), width}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gate", [&] {
    const auto kernel = silu ? pet::gate_forward<scalar_t, true> : pet::gate_forward<scalar_t, false>;
    for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        kernel(width, data<scalar_t>(x) + i * full, out<scalar_t>(y) + i * width);
    });
  });
  return y;
}

Tensor gate_backward(const Tensor& grad, const Tensor& x, bool silu) {
  const Tensor g = grad.contiguous();
  Tensor dx = at::empty_like(x);
  const int64_t width = g.size(1), full = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gate_backward", [&] {
    const auto kernel = silu ? pet::gate_backward<scalar_t, true> : pet::gate_backward<scalar_t, false>;
    for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        kernel(width, data<scalar_t>(x) + i * full, data<scalar_t>(g) + i * width,
               out<scalar_t>(dx) + i * full);
    });
  });
  return dx;
}

std::tuple<Tensor, Tensor> gate_double_backward(const Tensor& cotangent, const Tensor& grad,
                                                const Tensor& x, bool silu) {
  const Tensor c = cotangent.contiguous(), g = grad.contiguous();
  Tensor to_grad = at::empty_like(g), to_x = at::empty_like(x);
  const int64_t width = g.size(1), full = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gate_double_backward", [&] {
    const auto kernel =
        silu ? pet::gate_double_backward<scalar_t, true> : pet::gate_double_backward<scalar_t, false>;
    for_each_part(x.size(0), [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        kernel(width, data<scalar_t>(x) + i * full, data<scalar_t>(g) + i * width,
               data<scalar_t>(c) + i * full, out<scalar_t>(to_grad) + i * width,
               out<scalar_t>(to_x) + i * full);
    });
  });
  return {to_grad, to_x};
}

}  // namespace cpu

struct GateBackward : Function<GateBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x, bool silu) {
    ctx->save_for_backward({grad, x});
    ctx->saved_data["silu"] = silu;
    return PET_OPERATOR(gate_backward)(grad, x, silu);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("gate");
    const variable_list saved = ctx->get_saved_variables();
    const auto [to_grad, to_x] = PET_OPERATOR(gate_double_backward)(
        cotangents[0], saved[0], saved[1], ctx->saved_data["silu"].toBool());
    return {to_grad, to_x, Tensor()};
  }
};

struct Gate : Function<Gate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, bool silu) {
    ctx->save_for_backward({x});
    ctx->saved_data["silu"] = silu;
    return PET_OPERATOR(gate)(x, silu);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const bool silu = ctx->saved_data["silu"].toBool();
    return {GateBackward::apply(grads[0], ctx->get_saved_variables()[0], silu), Tensor()};
  }
};

Tensor gate_recorded(const Tensor& x, bool silu) {
  return recorded(x) ? Gate::apply(x.contiguous(), silu) : PET_OPERATOR(gate)(x, silu);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centered) -> Tensor");
  m.def("norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool centered) -> Tensor");
  m.def("norm_parameters(Tensor grad, Tensor x, Tensor weight, float eps, bool centered)"
        " -> (Tensor, Tensor)");
  m.def("norm_double_backward(Tensor cotangent, Tensor grad, Tensor x, Tensor weight, float eps,"
        " bool centered, bool trains) -> (Tensor, Tensor, Tensor)");
  m.def("gate(Tensor x, bool silu) -> Tensor");
  m.def("gate_backward(Tensor grad, Tensor x, bool silu) -> Tensor");
  m.def("gate_double_backward(Tensor cotangent, Tensor grad, Tensor x, bool silu)"
        " -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pet_finetune, CPU, m) {
  m.impl("norm", &cpu::norm);
  m.impl("norm_backward", &cpu::norm_backward);
  m.impl("norm_parameters", &cpu::norm_parameters);
  m.impl("norm_double_backward", &cpu::norm_double_backward);
  m.impl("gate", &cpu::gate);
  m.impl("gate_backward", &cpu::gate_backward);
  m.impl("gate_double_backward", &cpu::gate_double_backward);
}

TORCH_LIBRARY_IMPL(pet_finetune, Autograd, m) {
  m.impl("norm", &norm_recorded);
  m.impl("gate", &gate_recorded);
}

}  // namespace pet
