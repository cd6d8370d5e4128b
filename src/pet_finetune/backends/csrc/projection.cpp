// The operators pet_finetune::projection, with its derivatives, and pack.

#include "layer.h"
#include "sweep.h"
#include "weight_gradient.h"

namespace pet {
namespace {

Tensor part_sums(bool needed, const Rows& rows, int64_t width, const Tensor& like) {
  if (!needed || width == 0) return Tensor();
  return at::zeros({rows.parts, width}, like.options());
}

// Both forms, [2, out * in].
Tensor packed_both(const Tensor& weight_, bool rounds) {
  const Tensor weight = weight_.detach().contiguous();
  const auto type = rounds ? at::kBFloat16 : weight.scalar_type();
  Tensor packed = at::empty({2, weight.numel()}, weight.options().dtype(type));
  auto* to = static_cast<char*>(packed.mutable_data_ptr());
  pack_side(weight, Side::forward, rounds, to);
  pack_side(weight, Side::backward, rounds, to + weight.numel() * packed.element_size());
  return packed;
}

Tensor pack(const Tensor& weight) { return packed_both(weight, false); }

Tensor pack_bfloat16(const Tensor& weight) {
  TORCH_CHECK(Bfloat16::available, "pack_bfloat16: this processor does not multiply bfloat16");
  TORCH_CHECK(weight.scalar_type() == at::kFloat, "pack_bfloat16: the weight is in float32");
  return packed_both(weight, true);
}

bool multiplies_bfloat16() { return Bfloat16::available; }

// As results of an operator, which are all there.
variable_list there(variable_list tensors, const Tensor& like) {
  for (Tensor& t : tensors)
    if (!t.defined()) t = none(like);
  return tensors;
}

// Which parameters a sweep forms the gradients of.
struct Wanted {
  bool dense, low_rank, norms;

  // How many numbers each part of a sweep adds up.
  int64_t numbers(const Layer& layer, int64_t in, int64_t out_width) const {
    return (low_rank ? layer.a.size(0) * (in + out_width) : 0) +
           (norms ? layer.norm_weight.numel() : 0);
  }
};

// The gradients that a sweep over the rows adds up, one row of sums a part; that of the whole
// weight is of another kind (see WeightGradient).
struct Sums {
  Tensor weight, a, bt, norm_weight, norm_bias;
  int64_t numbers;  // each part's

  Sums(const Layer& layer, const Tensor& x, int64_t out_width, const Wanted& wanted)
      : numbers(wanted.numbers(layer, layer.in(x), out_width)) {
    const int64_t in = layer.in(x), rank = layer.a.size(0);
    const Rows rows = Rows::of(wanted.dense ? std::min(kChunk, x.size(0)) : x.size(0), numbers);
    if (wanted.dense)
      weight = x.size(0) > 0 ? at::empty({out_width, in}, x.options())
                             : at::zeros({out_width, in}, x.options());
    a = part_sums(wanted.low_rank, rows, rank * in, x);
    bt = part_sums(wanted.low_rank, rows, rank * out_width, x);
    norm_weight = part_sums(wanted.norms, rows, layer.norm_weight.numel(), x);
    norm_bias = part_sums(wanted.norms, rows, layer.norm_bias.numel(), x);
  }

  // The sum over the parts as a matrix of so many rows.
  static Tensor matrix(const Tensor& sums, int64_t rows) {
    const Tensor all = total(sums);
    return all.defined() ? all.view({rows, -1}) : all;
  }
  static Tensor total(const Tensor& sums) {
    if (!sums.defined()) return Tensor();
    return sums.size(0) == 1 ? sums.select(0, 0) : sums.sum(0);
  }

  // What weight, a and b receive.
  variable_list of_weight(const Layer& layer, int64_t out_width) const {
    const Tensor to_b = matrix(bt, layer.a.size(0));
    return {weight, matrix(a, layer.a.size(0)), to_b.defined() ? to_b.t() : to_b};
  }

  // body(part, first, last, block) for all rows, a few at a time, with memory for as many rows of
  // p, which it leaves there: the weight's gradient is summed up from them and from gy.
  template <typename T, typename F>
  void sweep(const Projection<T>& p, bool rounds, const Tensor& gy, F&& body) const {
    const int64_t rows = gy.size(0);
    WeightGradient<T> gradient(p.in, p.out, rounds, out<T>(weight));
    const int64_t chunk = weight.defined() ? kChunk : std::max<int64_t>(rows, 1);
    for (int64_t start = 0; start < rows; start += chunk) {
      const int64_t count = std::min(chunk, rows - start);
      gradient.begin(count);
      Rows::of(count, numbers).for_each([&](int64_t part, int64_t first, int64_t last) {
        T* block = gradient.place(first, last - first);
        body(part, start + first, start + last, block);
        gradient.keep(first, last - first, block);
      });
      gradient.add(count, data<T>(gy) + start * p.out, start > 0);
    }
  }
};

void check_projection(const Tensor& x, const Layer& layer, const Tensor& residual) {
  const Tensor& weight = layer.weight;
  check_rows(x, "projection");
  TORCH_CHECK(weight.dim() == 2, "projection: the weight is a matrix");
  const int64_t in = weight.size(1), out_width = weight.size(0);
  const int64_t lanes = kWidths / x.element_size();
  TORCH_CHECK(in % lanes == 0 && out_width % lanes == 0, "projection: widths are multiples of ",
              lanes, ", got ", weight.sizes());
  TORCH_CHECK(layer.in(x) == in, "projection: x has ", x.size(1), " columns for ", in, " inputs");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "projection: expected a weight of ",
              x.scalar_type(), ", got ", weight.scalar_type());
  TORCH_CHECK(!layer.rounds || (Bfloat16::available && x.scalar_type() == at::kFloat),
              "projection: bfloat16 is for float32 and processors that multiply them");
  if (layer.packed.numel() > 0)
    check_like(layer.packed, layer.rounds ? layer.packed : x, {2, in * out_width},
               "projection, packed");
  const auto vector = [&](const Tensor& t, int64_t size, const char* name) {
    if (t.numel() > 0) check_like(t, x, {size}, name);
  };
  vector(layer.bias, out_width, "projection, bias");
  vector(layer.norm_weight, in, "projection, norm_weight");
  vector(layer.norm_bias, in, "projection, norm_bias");
  const auto kind = Prologue(layer.prologue);
  if (kind == Prologue::rms_norm || kind == Prologue::layer_norm)
    check_like(layer.norm_weight, x, {in}, "projection, norm_weight");
  if (kind == Prologue::layer_norm)
    check_like(layer.norm_bias, x, {in}, "projection, norm_bias");
  if (layer.a.numel() > 0) {
    check_like(layer.a, x, {layer.a.size(0), in}, "projection, a");
    check_like(layer.b, x, {out_width, layer.a.size(0)}, "projection, b");
  }
  if (residual.numel() > 0) check_like(residual, x, {x.size(0), out_width}, "projection, residual");
}

namespace cpu {

Tensor projection(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& packed,
                  const std::optional<Tensor>& bias, int64_t prologue,
                  const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                  double eps, const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                  double scaling, const std::optional<Tensor>& residual, bool rounds) {
  const Tensor x = x_.contiguous(), rest = given(residual, x).contiguous();
  const Layer layer = Layer::of(weight, packed, bias, prologue, norm_weight, norm_bias, eps, a, b,
                                scaling, rounds);
  check_projection(x, layer, rest);
  const int64_t rows = x.size(0);
  Tensor y = at::empty({rows, layer.out()}, x.options());
  const Tensor panels = layer.panels(Side::forward);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection", [&] {
    const auto p = layer.projection<scalar_t>(x, Side::forward, panels);
    const scalar_t* extra = rest.numel() > 0 ? data<scalar_t>(rest) : nullptr;
    const auto made = [&](int64_t first, int64_t count) {
      const scalar_t* own = data<scalar_t>(x) + first * p.width;
      if (layer.prologue == kNone) return own;
      scalar_t* block = thread_buffer<scalar_t>(count * p.in);
      p.apply(count, own, block);
      return static_cast<const scalar_t*>(block);
    };
    if (rows <= kFewRows) {
      const scalar_t* block = made(0, rows);
      for_each_panel<scalar_t>(p.out, [&](int64_t first, int64_t last) {
        p.multiply(rows, block, extra, out<scalar_t>(y), first, last);
      });
      return;
    }
    Rows::of(rows, 0).for_each([&](int64_t, int64_t first, int64_t last) {
      p.multiply(last - first, made(first, last - first),
                 extra == nullptr ? nullptr : extra + first * p.out,
                 out<scalar_t>(y) + first * p.out, 0, p.out);
    });
  });
  return y;
}

// The gradient of x; and before the prologue's, where it will be differentiated or is there anyway.
std::tuple<Tensor, Tensor> projection_backward(const Tensor& grad, const Tensor& x,
                                               at::TensorList tensors, int64_t prologue, double eps,
                                               double scaling, bool rounds, bool twice) {
  const Layer layer = Layer::of(tensors, prologue, eps, scaling, rounds);
  const Tensor gy = grad.contiguous();
  const int64_t rows = x.size(0);
  const bool few = rows <= kFewRows;
  Tensor gx = at::empty(x.sizes(), x.options());
  Tensor gp = twice || few ? at::empty({rows, layer.in(x)}, x.options()) : none(x);
  const Tensor panels = layer.panels(Side::backward);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection_backward", [&] {
    const auto p = layer.projection<scalar_t>(x, Side::backward, panels);
    if (few)
      for_each_panel<scalar_t>(p.in, [&](int64_t first, int64_t last) {
        p.multiply_back(rows, data<scalar_t>(gy), out<scalar_t>(gp), first, last);
      });
    Rows::of(rows, 0).for_each([&](int64_t, int64_t first, int64_t last) {
      scalar_t* block = twice || few ? out<scalar_t>(gp) + first * p.in
                                     : thread_buffer<scalar_t>((last - first) * p.in);
      if (!few) p.multiply_back(last - first, data<scalar_t>(gy) + first * p.out, block, 0, p.in);
      p.apply_backward(last - first, data<scalar_t>(x) + first * p.width, block,
                       out<scalar_t>(gx) + first * p.width, nullptr, nullptr);
    });
  });
  return {gx, twice ? gp : none(x)};
}

// The gradients of grad, x, weight, a, b and norm_weight for a cotangent of that of x; empty where
// not wanted.
variable_list projection_double_backward(const Tensor& cotangent, const Tensor& gy,
                                         const Tensor& x, const Tensor& gp, at::TensorList tensors,
                                         int64_t prologue, double eps, double scaling, bool rounds,
                                         bool dense, bool low_rank, bool norms) {
  const Layer layer = Layer::of(tensors, prologue, eps, scaling, rounds);
  const Tensor c = cotangent.contiguous();
  const Wanted wanted{dense, low_rank, norms};
  const Sums sums(layer, x, gy.size(1), wanted);
  const bool to_x_wanted = layer.prologue != kNone;
  Tensor to_gy = at::empty(gy.sizes(), gy.options());
  Tensor to_x = to_x_wanted ? at::empty_like(x) : none(x);
  const Tensor panels = layer.panels(Side::forward);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection_double_backward", [&] {
    const auto p = layer.projection<scalar_t>(x, Side::forward, panels);
    const auto update = layer.low_rank<scalar_t>(p);
    sums.sweep(p, layer.rounds, gy, [&](int64_t part, int64_t first, int64_t last, scalar_t* t) {
      const int64_t rows = last - first;
      const scalar_t* g = data<scalar_t>(gy) + first * p.out;
      p.apply_double(rows, data<scalar_t>(x) + first * p.width,
                     data<scalar_t>(gp) + first * p.in, data<scalar_t>(c) + first * p.width, t,
                     to_x_wanted ? out<scalar_t>(to_x) + first * p.width : nullptr,
                     part_row<scalar_t>(sums.norm_weight, part));
      p.multiply_tangent(rows, t, out<scalar_t>(to_gy) + first * p.out, 0, p.out);
      if (wanted.low_rank)
        update.add(rows, g, t, part_row<scalar_t>(sums.a, part),
                   part_row<scalar_t>(sums.bt, part));
    });
  });
  const variable_list of_weight = sums.of_weight(layer, gy.size(1));
  return there({to_gy, to_x, of_weight[0], of_weight[1], of_weight[2],
                Sums::total(sums.norm_weight)}, x);
}

// The last backward of a training step: the gradients of x, weight, a, b, norm_weight and norm_bias
// in one sweep over the rows; empty where not wanted.
variable_list projection_parameters(const Tensor& grad, const Tensor& x, at::TensorList tensors,
                                    int64_t prologue, double eps, double scaling, bool rounds,
                                    bool of_x, bool dense, bool low_rank, bool norms) {
  const Layer layer = Layer::of(tensors, prologue, eps, scaling, rounds);
  const Tensor gy = grad.contiguous();
  const Wanted wanted{dense, low_rank, norms};
  const bool to_x = of_x || norms;
  const Sums sums(layer, x, gy.size(1), wanted);
  Tensor gx = to_x ? at::empty(x.sizes(), x.options()) : none(x);
  const Tensor panels = to_x ? layer.panels(Side::backward) : none(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection_parameters", [&] {
    const auto p = layer.projection<scalar_t>(x, Side::backward, panels);
    const auto update = layer.low_rank<scalar_t>(p);
    const auto body = [&](int64_t part, int64_t first, int64_t last, scalar_t* block) {
      const int64_t rows = last - first;
      const scalar_t* own = data<scalar_t>(x) + first * p.width;
      const scalar_t* g = data<scalar_t>(gy) + first * p.out;
      if (to_x) {
        p.multiply_back(rows, g, block, 0, p.in);
        p.apply_backward(rows, own, block, out<scalar_t>(gx) + first * p.width,
                         part_row<scalar_t>(sums.norm_weight, part),
                         part_row<scalar_t>(sums.norm_bias, part));
      }
      if (!wanted.dense && !wanted.low_rank) return;
      p.apply(rows, own, block);
      if (wanted.low_rank)
        update.add(rows, g, block, part_row<scalar_t>(sums.a, part),
                   part_row<scalar_t>(sums.bt, part));
    };
    sums.sweep(p, layer.rounds, gy, body);
  });
  const variable_list of_weight = sums.of_weight(layer, gy.size(1));
  return there({gx, of_weight[0], of_weight[1], of_weight[2], Sums::total(sums.norm_weight),
                Sums::total(sums.norm_bias)}, x);
}

}  // namespace cpu

struct ProjectBackward : Function<ProjectBackward> {
  // weight, a and b are inputs for their gradients alone; the layer holds the numbers.
  static Tensor forward(AutogradContext* ctx, const Tensor& gy, const Tensor& x,
                        const Tensor& weight, const Tensor& a, const Tensor& b,
                        const Tensor& norm_weight, const Layer& layer, bool twice) {
    const auto [gx, gp] = PET_OPERATOR(projection_backward)(
        gy, x, layer.tensors(), layer.prologue, layer.eps, layer.scaling, layer.rounds, twice);
    const bool trains = weight.requires_grad() || a.requires_grad() || b.requires_grad();
    layer.keep(ctx, {trains ? gy : shape_of(gy), x, layer.prologue == kNone ? shape_of(gp) : gp});
    return gx;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("projection");
    const variable_list saved = ctx->get_saved_variables();
    const Layer layer = Layer::kept(saved, 3, ctx);
    const bool dense = ctx->needs_input_grad(2), norms = ctx->needs_input_grad(5);
    const bool low_rank = ctx->needs_input_grad(3) || ctx->needs_input_grad(4);
    const variable_list found = PET_OPERATOR(projection_double_backward)(
        cotangents[0], saved[0], saved[1], saved[2], layer.tensors(), layer.prologue, layer.eps,
        layer.scaling, layer.rounds, dense, low_rank, norms);
    return {found[0],
            if_wanted(layer.prologue != kNone, found[1]),
            if_wanted(dense, found[2]),
            if_wanted(low_rank, found[3]),
            if_wanted(low_rank, found[4]),
            if_wanted(norms, found[5]),
            Tensor(),
            Tensor()};
  }
};

struct Project : Function<Project> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias,
                        const Tensor& a, const Tensor& b, const Tensor& rest,
                        const Layer& layer) {
    const bool trains = weight.requires_grad() || a.requires_grad() || b.requires_grad();
    layer.keep(ctx, {trains || layer.prologue != kNone ? x : shape_of(x)});
    return PET_OPERATOR(projection)(
        x, weight, if_there(layer.packed), if_there(bias), layer.prologue,
        if_there(norm_weight), if_there(norm_bias), layer.eps, if_there(a), if_there(b),
        layer.scaling, if_there(rest), layer.rounds);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &g = grads[0];
    const Layer layer = Layer::kept(saved, 1, ctx);
    variable_list result(9);
    if (ctx->needs_input_grad(7)) result[7] = g;
    if (needs_parameters(ctx)) {
      TORCH_CHECK(!at::GradMode::is_enabled(),
                  "projection: the fused kernels do not differentiate gradients of parameters. "
                  "Set PET_FINETUNE_KERNELS=off, which computes with plain torch operations.");
      with_parameters(ctx, layer, x, g, result);
    } else if (ctx->needs_input_grad(0)) {
      result[0] = ProjectBackward::apply(g, x, layer.weight, layer.a, layer.b, layer.norm_weight,
                                         layer, at::GradMode::is_enabled());
    }
    return result;
  }

 private:
  static bool needs_parameters(AutogradContext* ctx) {
    for (size_t i = 1; i < 7; ++i)
      if (ctx->needs_input_grad(i)) return true;
    return false;
  }

  static void with_parameters(AutogradContext* ctx, const Layer& layer, const Tensor& x,
                              const Tensor& gy, variable_list& result) {
    const bool of_x = ctx->needs_input_grad(0), dense = ctx->needs_input_grad(1);
    const bool low_rank = ctx->needs_input_grad(5) || ctx->needs_input_grad(6);
    const bool norms = ctx->needs_input_grad(3) || ctx->needs_input_grad(4);
    const variable_list found = PET_OPERATOR(projection_parameters)(
        gy, x, layer.tensors(), layer.prologue, layer.eps, layer.scaling, layer.rounds, of_x,
        dense, low_rank, norms);
    result[0] = if_wanted(of_x, found[0]);
    result[1] = if_wanted(dense, found[1]);
    if (ctx->needs_input_grad(2)) result[2] = gy.sum(0);
    result[3] = if_wanted(norms, found[4]);
    result[4] = if_wanted(norms && layer.has_norm_bias(), found[5]);
    result[5] = if_wanted(low_rank, found[2]);
    result[6] = if_wanted(low_rank, found[3]);
  }
};

Tensor projection_recorded(const Tensor& x, const Tensor& weight,
                           const std::optional<Tensor>& packed, const std::optional<Tensor>& bias,
                           int64_t prologue, const std::optional<Tensor>& norm_weight,
                           const std::optional<Tensor>& norm_bias, double eps,
                           const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                           double scaling, const std::optional<Tensor>& residual, bool rounds) {
  const Layer layer = Layer::of(weight, packed, bias, prologue, norm_weight, norm_bias, eps, a, b,
                                scaling, rounds);
  const Tensor rest = given(residual, x);
  if (!recorded(x, weight, layer.bias, layer.norm_weight, layer.norm_bias, layer.a, layer.b, rest))
    return PET_OPERATOR(projection)(x, weight, packed, bias, prologue, norm_weight, norm_bias, eps,
                                    a, b, scaling, residual, rounds);
  return Project::apply(x.contiguous(), weight, layer.bias, layer.norm_weight, layer.norm_bias,
                        layer.a, layer.b, rest.contiguous(), layer);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("pack(Tensor weight) -> Tensor");
  m.def("pack_bfloat16(Tensor weight) -> Tensor");
  m.def("multiplies_bfloat16() -> bool", &multiplies_bfloat16);
  m.def("projection(Tensor x, Tensor weight, Tensor? packed, Tensor? bias, int prologue,"
        " Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? a, Tensor? b, float scaling,"
        " Tensor? residual, bool rounds) -> Tensor");
  m.def("projection_backward(Tensor grad, Tensor x, Tensor[] layer, int prologue, float eps,"
        " float scaling, bool rounds, bool twice) -> (Tensor, Tensor)");
  m.def("projection_double_backward(Tensor cotangent, Tensor grad, Tensor x, Tensor inner,"
        " Tensor[] layer, int prologue, float eps, float scaling, bool rounds, bool dense,"
        " bool low_rank, bool norms) -> Tensor[]");
  m.def("projection_parameters(Tensor grad, Tensor x, Tensor[] layer, int prologue, float eps,"
        " float scaling, bool rounds, bool of_x, bool dense, bool low_rank, bool norms)"
        " -> Tensor[]");
}

TORCH_LIBRARY_IMPL(pet_finetune, CPU, m) {
  m.impl("pack", &pack);
  m.impl("pack_bfloat16", &pack_bfloat16);
  m.impl("projection", &cpu::projection);
  m.impl("projection_backward", &cpu::projection_backward);
  m.impl("projection_double_backward", &cpu::projection_double_backward);
  m.impl("projection_parameters", &cpu::projection_parameters);
}

TORCH_LIBRARY_IMPL(pet_finetune, Autograd, m) { m.impl("projection", &projection_recorded); }

}  // namespace pet
