// The operator pet_finetune::attention.

#include "attention.h"
#include "operator.h"

namespace pet {
namespace {

Tokens tokens_of(const Tensor& qkv, const Tensor& starts, int64_t heads) {
  const int64_t width = qkv.size(1) / 3;
  return {starts.const_data_ptr<int64_t>(), starts.numel() - 1, int(heads), int(width / heads)};
}

template <typename T>
struct Scratch {
  Workspace<T> space;
  std::vector<T> line;
};

// Runs body(atom, scratch) for every atom, the atoms dealt out in order.
template <typename T, typename F>
void for_each_atom(const Tokens& tokens, F&& body) {
  at::parallel_for(0, tokens.num_atoms, 2, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<T> scratch;
    for (int64_t atom = begin; atom < end; ++atom) body(atom, scratch);
  });
}

struct AttentionBackward : Function<AttentionBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& qkv,
                               const Tensor& bias, const Tensor& starts, int64_t heads,
                               double scale) {
    const Tensor g = grad.contiguous();
    Tensor grad_qkv = at::empty_like(qkv), grad_bias = at::empty_like(bias);
    const Tokens tokens = tokens_of(qkv, starts, heads);
    AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention_backward", [&] {
      for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& s) {
        attention_backward<scalar_t>(tokens, atom, scalar_t(scale), data<scalar_t>(qkv),
                                          data<scalar_t>(bias), data<scalar_t>(g),
                                          out<scalar_t>(grad_qkv), out<scalar_t>(grad_bias),
                                          s.space, s.line);
      });
    });
    ctx->save_for_backward({g, qkv, bias, starts});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["scale"] = scale;
    ctx->set_materialize_grads(false);
    return {grad_qkv, grad_bias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("attention");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &qkv = saved[1], &bias = saved[2], &starts = saved[3];
    const Tensor a_qkv =
        cotangents[0].defined() ? cotangents[0].contiguous() : at::zeros_like(qkv);
    const Tensor a_bias = cotangents[1].defined() ? cotangents[1].contiguous() : Tensor();
    const double scale = ctx->saved_data["scale"].toDouble();
    Tensor to_grad = at::empty_like(grad), to_qkv = at::empty_like(qkv);
    Tensor to_bias = at::empty_like(bias);
    const Tokens tokens = tokens_of(qkv, starts, ctx->saved_data["heads"].toInt());
    AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention_double_backward", [&] {
      for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& s) {
        attention_double_backward<scalar_t>(
            tokens, atom, scalar_t(scale), data<scalar_t>(qkv), data<scalar_t>(bias),
            data<scalar_t>(grad), data<scalar_t>(a_qkv), data<scalar_t>(a_bias),
            out<scalar_t>(to_grad), out<scalar_t>(to_qkv), out<scalar_t>(to_bias), s.space,
            s.line);
      });
    });
    return {to_grad, to_qkv, to_bias, Tensor(), Tensor(), Tensor()};
  }
};

struct Attention : Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& bias,
                        const Tensor& starts, int64_t heads, double scale) {
    const Tokens tokens = tokens_of(qkv, starts, heads);
    Tensor y = at::empty({qkv.size(0), tokens.width()}, qkv.options());
    AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention", [&] {
      for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& scratch) {
        attention_forward<scalar_t>(tokens, atom, scalar_t(scale), data<scalar_t>(qkv),
                                    data<scalar_t>(bias), out<scalar_t>(y), scratch.space);
      });
    });
    ctx->save_for_backward({qkv, bias, starts});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["scale"] = scale;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const variable_list result =
        AttentionBackward::apply(grads[0], saved[0], saved[1], saved[2],
                                 ctx->saved_data["heads"].toInt(),
                                 ctx->saved_data["scale"].toDouble());
    return {result[0], result[1], Tensor(), Tensor(), Tensor()};
  }
};

Tensor attention(const Tensor& qkv, const Tensor& bias, const Tensor& starts, int64_t heads,
                 double scale) {
  check_rows(qkv, "attention");
  const int64_t atoms = starts.numel() - 1, edges = qkv.size(0) - atoms;
  TORCH_CHECK(qkv.size(1) % (3 * heads) == 0, "attention: ", qkv.size(1), " columns for queries, "
              "keys and values of ", heads, " heads");
  check_like(bias, qkv, {edges}, "attention, key_bias");
  const char* run = "attention: starts runs from 0 to the number of edges";
  TORCH_CHECK(starts.dim() == 1 && atoms >= 0 && starts.scalar_type() == at::kLong &&
              starts.device().is_cpu(), run);
  const Tensor first_edges = starts.contiguous();
  const int64_t* first = first_edges.const_data_ptr<int64_t>();
  TORCH_CHECK(first[0] == 0 && first[atoms] == edges, run);
  return Attention::apply(qkv.contiguous(), bias.contiguous(), first_edges, heads, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("attention(Tensor qkv, Tensor bias, Tensor starts, int heads, float scale) -> Tensor",
        &attention);
}

}  // namespace pet
