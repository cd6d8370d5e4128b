// The operator pet_finetune::grouped_projection: a projection whose weight is another one for each
// of several groups of rows. For prediction: it is differentiated once, and by x alone.

#include "operator.h"
#include "projection.h"
#include "sweep.h"

namespace pet {
namespace {

// Rows of `members` groups: `leading` rows of each in turn, then what is left of each in turn.
struct Groups {
  int64_t members, leading, rows;

  // body(member, first, last) for the pieces of some rows that lie in one group each.
  template <typename F>
  void split(int64_t first, int64_t last, F&& body) const {
    const int64_t head = members * leading, rest = (rows - head) / members;
    while (first < last) {
      const bool in_head = first < head;
      const int64_t origin = in_head ? 0 : head, size = in_head ? leading : rest;
      const int64_t member = (first - origin) / size;
      const int64_t stop = std::min(last, origin + (member + 1) * size);
      body(member, first, stop);
      first = stop;
    }
  }
};

struct GroupedLayer {
  Tensor packed, bias, norm_weight, norm_bias;
  int64_t prologue, leading;
  double eps;

  static GroupedLayer of(const Tensor& packed, const std::optional<Tensor>& bias, int64_t leading,
                         int64_t prologue, const std::optional<Tensor>& norm_weight,
                         const std::optional<Tensor>& norm_bias, double eps) {
    return {packed,  given(bias, packed), given(norm_weight, packed), given(norm_bias, packed),
            checked_prologue(prologue), leading, eps};
  }
  variable_list tensors() const { return {packed, bias, norm_weight, norm_bias}; }

  int64_t members() const { return packed.size(0); }
  int64_t in(const Tensor& x) const {
    return prologue == int64_t(Prologue::swiglu) ? x.size(1) / 2 : x.size(1);
  }
  int64_t out_width(const Tensor& x) const { return packed.size(2) / in(x); }
  Groups groups(const Tensor& x) const { return {members(), leading, x.size(0)}; }

  template <typename T>
  std::vector<Projection<T>> projections(const Tensor& x) const {
    const auto pointer = [](const Tensor& t) {
      return t.numel() > 0 ? t.const_data_ptr<T>() : nullptr;
    };
    const int64_t width = in(x), columns = out_width(x);
    std::vector<Projection<T>> result;
    for (int64_t m = 0; m < members(); ++m) {
      const T* panels = pointer(packed) + m * 2 * width * columns;
      const T* own_bias = bias.numel() > 0 ? pointer(bias) + m * columns : nullptr;
      result.push_back({Prologue(prologue), x.size(1), width, columns, T(eps),
                        pointer(norm_weight), pointer(norm_bias), own_bias, panels,
                        panels + width * columns});
    }
    return result;
  }
};

void check_grouped(const Tensor& x, const GroupedLayer& layer, const Tensor& residual) {
  check_rows(x, "grouped_projection");
  TORCH_CHECK(layer.packed.dim() == 3 && layer.members() > 0,
              "grouped_projection: expected packed weights [members, 2, out * in], got ",
              layer.packed.sizes());
  const int64_t in = layer.in(x), out_width = layer.out_width(x);
  const int64_t lanes = kWidths / x.element_size();
  TORCH_CHECK(in > 0 && in % lanes == 0 && out_width % lanes == 0,
              "grouped_projection: widths are multiples of ", lanes, ", got ", in, " and ",
              out_width);
  check_like(layer.packed, x, {layer.members(), 2, in * out_width}, "grouped_projection, packed");
  const int64_t rest = x.size(0) - layer.members() * layer.leading;
  TORCH_CHECK(layer.leading >= 0 && rest >= 0 && rest % layer.members() == 0,
              "grouped_projection: ", x.size(0), " rows are not those of ", layer.members(),
              " members with ", layer.leading, " leading rows each");
  if (layer.bias.numel() > 0)
    check_like(layer.bias, x, {layer.members(), out_width}, "grouped_projection, bias");
  const auto kind = Prologue(layer.prologue);
  if (kind == Prologue::rms_norm || kind == Prologue::layer_norm)
    check_like(layer.norm_weight, x, {in}, "grouped_projection, norm_weight");
  if (kind == Prologue::layer_norm)
    check_like(layer.norm_bias, x, {in}, "grouped_projection, norm_bias");
  if (residual.numel() > 0)
    check_like(residual, x, {x.size(0), out_width}, "grouped_projection, residual");
}

namespace cpu {

Tensor grouped_projection(const Tensor& x_, const Tensor& packed, const std::optional<Tensor>& bias,
                          int64_t leading, int64_t prologue,
                          const std::optional<Tensor>& norm_weight,
                          const std::optional<Tensor>& norm_bias, double eps,
                          const std::optional<Tensor>& residual) {
  const auto layer =
      GroupedLayer::of(packed, bias, leading, prologue, norm_weight, norm_bias, eps);
  check_grouped(x_, layer, given(residual, x_));
  const Tensor x = x_.contiguous(), rest = given(residual, x).contiguous();
  Tensor y = at::empty({x.size(0), layer.out_width(x)}, x.options());
  const Groups groups = layer.groups(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "grouped_projection", [&] {
    const auto members = layer.projections<scalar_t>(x);
    const scalar_t* extra = rest.numel() > 0 ? data<scalar_t>(rest) : nullptr;
    Rows::of(x.size(0), 0).for_each([&](int64_t, int64_t begin, int64_t end) {
      groups.split(begin, end, [&](int64_t member, int64_t first, int64_t last) {
        const auto& p = members[member];
        const scalar_t* own = data<scalar_t>(x) + first * p.width;
        if (p.prologue != Prologue::none) {
          scalar_t* block = thread_buffer<scalar_t>((last - first) * p.in);
          p.apply(last - first, own, block);
          own = block;
        }
        p.multiply(last - first, own, extra == nullptr ? nullptr : extra + first * p.out,
                   out<scalar_t>(y) + first * p.out, 0, p.out);
      });
    });
  });
  return y;
}

// The gradient of x, whose numbers are read where there is a prologue.
Tensor grouped_projection_backward(const Tensor& grad, const Tensor& x, at::TensorList tensors,
                                   int64_t leading, int64_t prologue, double eps) {
  TORCH_CHECK(tensors.size() == 4, "grouped_projection: a layer is told of in four tensors");
  const GroupedLayer layer{tensors[0], tensors[1], tensors[2], tensors[3], prologue, leading, eps};
  const Tensor gy = grad.contiguous();
  Tensor gx = at::empty(x.sizes(), gy.options());
  const Groups groups = layer.groups(x);
  AT_DISPATCH_FLOATING_TYPES(gy.scalar_type(), "grouped_projection_backward", [&] {
    const auto members = layer.projections<scalar_t>(x);
    Rows::of(x.size(0), 0).for_each([&](int64_t, int64_t begin, int64_t end) {
      groups.split(begin, end, [&](int64_t member, int64_t first, int64_t last) {
        const auto& p = members[member];
        const scalar_t* g = data<scalar_t>(gy) + first * p.out;
        scalar_t* to = out<scalar_t>(gx) + first * p.width;
        if (p.prologue == Prologue::none) {
          p.multiply_back(last - first, g, to, 0, p.in);
          return;
        }
        scalar_t* block = thread_buffer<scalar_t>((last - first) * p.in);
        p.multiply_back(last - first, g, block, 0, p.in);
        p.apply_backward(last - first, data<scalar_t>(x) + first * p.width, block, to, nullptr,
                         nullptr);
      });
    });
  });
  return gx;
}

}  // namespace cpu

struct GroupedProject : Function<GroupedProject> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& rest,
                        const GroupedLayer& layer) {
    const bool none = layer.prologue == int64_t(Prologue::none);
    ctx->save_for_backward({none ? shape_of(x) : x, layer.packed, layer.bias, layer.norm_weight,
                            layer.norm_bias});
    ctx->saved_data["prologue"] = layer.prologue;
    ctx->saved_data["leading"] = layer.leading;
    ctx->saved_data["eps"] = layer.eps;
    return PET_OPERATOR(grouped_projection)(x, layer.packed, if_there(layer.bias), layer.leading,
                                            layer.prologue, if_there(layer.norm_weight),
                                            if_there(layer.norm_bias), layer.eps, if_there(rest));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "grouped_projection: the fused kernels differentiate a committee once. For a "
                "second derivative set PET_FINETUNE_KERNELS=off, which computes with plain torch "
                "operations.");
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(3);
    if (ctx->needs_input_grad(0))
      result[0] = PET_OPERATOR(grouped_projection_backward)(
          grads[0], saved[0], at::TensorList(saved).slice(1, 4),
          ctx->saved_data["leading"].toInt(), ctx->saved_data["prologue"].toInt(),
          ctx->saved_data["eps"].toDouble());
    if (ctx->needs_input_grad(1)) result[1] = grads[0];
    return result;
  }
};

Tensor grouped_projection_recorded(const Tensor& x, const Tensor& packed,
                                   const std::optional<Tensor>& bias, int64_t leading,
                                   int64_t prologue, const std::optional<Tensor>& norm_weight,
                                   const std::optional<Tensor>& norm_bias, double eps,
                                   const std::optional<Tensor>& residual) {
  const Tensor rest = given(residual, x);
  if (!recorded(x, rest))
    return PET_OPERATOR(grouped_projection)(x, packed, bias, leading, prologue, norm_weight,
                                            norm_bias, eps, residual);
  return GroupedProject::apply(
      x.contiguous(), rest.contiguous(),
      GroupedLayer::of(packed, bias, leading, prologue, norm_weight, norm_bias, eps));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("grouped_projection(Tensor x, Tensor packed, Tensor? bias, int leading, int prologue,"
        " Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? residual) -> Tensor");
  m.def("grouped_projection_backward(Tensor grad, Tensor x, Tensor[] layer, int leading,"
        " int prologue, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(pet_finetune, CPU, m) {
  m.impl("grouped_projection", &cpu::grouped_projection);
  m.impl("grouped_projection_backward", &cpu::grouped_projection_backward);
}

TORCH_LIBRARY_IMPL(pet_finetune, Autograd, m) {
  m.impl("grouped_projection", &grouped_projection_recorded);
}

}  // namespace pet
