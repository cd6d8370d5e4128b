// The operator pet_finetune::two_layers: two linear layers, each behind a norm or a gate, of which
// the input alone is kept. For prediction: it is differentiated once, and by x alone.

#include <string>

#include "compact.h"

namespace pet {
namespace {

struct TwoLayers : Function<TwoLayers> {
  // rest: what is added to the result; x itself, too, where `onto_x`.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& rest,
                        const FixedLayer& first, const FixedLayer& second, int64_t middle,
                        bool onto_x) {
    const int64_t rows = x.size(0), out_width = second.out_width(middle);
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
    variable_list saved{x};
    first.keep(ctx, saved, "first_");
    second.keep(ctx, saved, "second_");
    ctx->save_for_backward(saved);
    ctx->saved_data["middle"] = middle;
    ctx->saved_data["onto_x"] = onto_x;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative("two_layers");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const FixedLayer first = FixedLayer::kept(ctx, saved, 1, "first_");
    const FixedLayer second = FixedLayer::kept(ctx, saved, 5, "second_");
    variable_list result(6);
    if (ctx->needs_input_grad(0))
      result[0] = to_x(x, grads[0].contiguous(), first, second, ctx->saved_data["middle"].toInt(),
                       ctx->saved_data["onto_x"].toBool());
    if (ctx->needs_input_grad(1)) result[1] = grads[0];
    return result;
  }

 private:
  // What the first layer makes of some rows, in `space`, which then begins behind it.
  template <typename T>
  static const T* hidden(const Projection<T>& one, int64_t count, const T* x, T*& space) {
    T* p = take(space, count * one.in);
    T* h = take(space, count * one.out);
    one.apply(count, x, p);
    one.multiply(count, p, nullptr, h, 0, one.out);
    return h;
  }

  static Tensor to_x(const Tensor& x, const Tensor& gy, const FixedLayer& first,
                     const FixedLayer& second, int64_t middle, bool onto_x) {
    Tensor gx = at::empty_like(x);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "two_layers_backward", [&] {
      const auto one = first.projection<scalar_t>(x.size(1));
      const auto two = second.projection<scalar_t>(middle);
      Rows::of(x.size(0), 0).for_each([&](int64_t, int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        scalar_t* space =
            thread_buffer<scalar_t>(count * (2 * one.in + 2 * one.out + two.in));
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
};

Tensor two_layers(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                  const std::string& prologue, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, double eps, const Tensor& second_packed,
                  const std::optional<Tensor>& second_bias, const std::string& activation,
                  const std::optional<Tensor>& residual) {
  const char* name = "two_layers";
  check_rows(x, name);
  const int64_t in = x.size(1);
  const auto first = FixedLayer::of(packed, bias, prologue, norm_weight, norm_bias, eps);
  const auto second =
      FixedLayer::of(second_packed, second_bias, activation, std::nullopt, std::nullopt, 0.0);
  TORCH_CHECK(first.prologue != int64_t(Prologue::swiglu), name, ": a gate is for the second");
  first.check(x, in, name);
  const bool gated = second.prologue == int64_t(Prologue::swiglu);
  const int64_t middle = first.out_width(in) / (gated ? 2 : 1);
  second.check(x, middle, name);
  const int64_t out_width = second.out_width(middle);
  const bool onto_x = residual.has_value() && residual->is_same(x) && out_width == in;
  Tensor rest = none(x);
  if (residual.has_value() && !onto_x) {
    check_like(*residual, x, {x.size(0), out_width}, "two_layers, residual");
    rest = residual->contiguous();
  }
  return TwoLayers::apply(x.contiguous(), rest, first, second, middle, onto_x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("two_layers(Tensor x, Tensor packed, Tensor? bias, str prologue, Tensor? norm_weight,"
        " Tensor? norm_bias, float eps, Tensor second_packed, Tensor? second_bias, str activation,"
        " Tensor? residual) -> Tensor", &two_layers);
}

}  // namespace pet
