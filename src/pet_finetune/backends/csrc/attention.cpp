// The operator pet_finetune::attention, with its derivatives.

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

namespace cpu {

Tensor attention(const Tensor& qkv_, const Tensor& bias_, const Tensor& starts_, int64_t heads,
                 double scale) {
  check_rows(qkv_, "attention");
  const int64_t atoms = starts_.numel() - 1, edges = qkv_.size(0) - atoms;
  TORCH_CHECK(qkv_.size(1) % (3 * heads) == 0, "attention: ", qkv_.size(1),
              " columns for queries, keys and values of ", heads, " heads");
  check_like(bias_, qkv_, {edges}, "attention, key_bias");
  const char* run = "attention: starts runs from 0 to the number of edges";
  TORCH_CHECK(starts_.dim() == 1 && atoms >= 0 && starts_.scalar_type() == at::kLong &&
              starts_.device().is_cpu(), run);
  const Tensor qkv = qkv_.contiguous(), bias = bias_.contiguous(), starts = starts_.contiguous();
  const int64_t* first = starts.const_data_ptr<int64_t>();
  TORCH_CHECK(first[0] == 0 && first[atoms] == edges, run);
  const Tokens tokens = tokens_of(qkv, starts, heads);
  Tensor y = at::empty({qkv.size(0), tokens.width()}, qkv.options());
  AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention", [&] {
    for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& scratch) {
      attention_forward<scalar_t>(tokens, atom, scalar_t(scale), data<scalar_t>(qkv),
                                  data<scalar_t>(bias), out<scalar_t>(y), scratch.space);
    });
  });
  return y;
}

// The gradients of qkv and bias; these and starts are contiguous, as the forward pass kept them.
std::tuple<Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& qkv,
                                              const Tensor& bias, const Tensor& starts,
                                              int64_t heads, double scale) {
  const Tensor g = grad.contiguous();
  Tensor grad_qkv = at::empty_like(qkv), grad_bias = at::empty_like(bias);
  const Tokens tokens = tokens_of(qkv, starts, heads);
  AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention_backward", [&] {
    for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& s) {
      pet::attention_backward<scalar_t>(tokens, atom, scalar_t(scale), data<scalar_t>(qkv),
                                        data<scalar_t>(bias), data<scalar_t>(g),
                                        out<scalar_t>(grad_qkv), out<scalar_t>(grad_bias), s.space,
                                        s.line);
    });
  });
  return {grad_qkv, grad_bias};
}

// The gradients of grad, qkv and bias, for cotangents of what attention_backward returns.
std::tuple<Tensor, Tensor, Tensor> attention_double_backward(
    const std::optional<Tensor>& to_qkv_, const std::optional<Tensor>& to_bias_,
    const Tensor& grad_, const Tensor& qkv, const Tensor& bias, const Tensor& starts,
    int64_t heads, double scale) {
  const Tensor a_qkv = to_qkv_.has_value() ? to_qkv_->contiguous() : at::zeros_like(qkv);
  const Tensor a_bias = to_bias_.has_value() ? to_bias_->contiguous() : Tensor();
  const Tensor grad = grad_.contiguous();
  Tensor to_grad = at::empty_like(grad), to_qkv = at::empty_like(qkv);
  Tensor to_bias = at::empty_like(bias);
  const Tokens tokens = tokens_of(qkv, starts, heads);
  AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention_double_backward", [&] {
    for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& s) {
      pet::attention_double_backward<scalar_t>(
          tokens, atom, scalar_t(scale), data<scalar_t>(qkv), data<scalar_t>(bias),
          data<scalar_t>(grad), data<scalar_t>(a_qkv), data<scalar_t>(a_bias),
          out<scalar_t>(to_grad), out<scalar_t>(to_qkv), out<scalar_t>(to_bias), s.space, s.line);
    });
  });
  return {to_grad, to_qkv, to_bias};
}

}  // namespace cpu

struct AttentionBackward : Function<AttentionBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& qkv,
                               const Tensor& bias, const Tensor& starts, int64_t heads,
                               double scale) {
    ctx->save_for_backward({grad, qkv, bias, starts});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["scale"] = scale;
    ctx->set_materialize_grads(false);
    const auto [to_qkv, to_bias] =
        PET_OPERATOR(attention_backward)(grad, qkv, bias, starts, heads, scale);
    return {to_qkv, to_bias};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("attention");
    const variable_list saved = ctx->get_saved_variables();
    const auto defined = [](const Tensor& t) {
      return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
    };
    const auto [to_grad, to_qkv, to_bias] = PET_OPERATOR(attention_double_backward)(
        defined(cotangents[0]), defined(cotangents[1]), saved[0], saved[1], saved[2], saved[3],
        ctx->saved_data["heads"].toInt(), ctx->saved_data["scale"].toDouble());
    return {to_grad, to_qkv, to_bias, Tensor(), Tensor(), Tensor()};
  }
};

struct Attention : Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& bias,
                        const Tensor& starts, int64_t heads, double scale) {
    ctx->save_for_backward({qkv, bias, starts});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["scale"] = scale;
    return PET_OPERATOR(attention)(qkv, bias, starts, heads, scale);
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

Tensor attention_recorded(const Tensor& qkv, const Tensor& bias, const Tensor& starts,
                          int64_t heads, double scale) {
  if (!recorded(qkv, bias)) return PET_OPERATOR(attention)(qkv, bias, starts, heads, scale);
  return Attention::apply(qkv.contiguous(), bias.contiguous(), starts.contiguous(), heads, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("attention(Tensor qkv, Tensor bias, Tensor starts, int heads, float scale) -> Tensor");
  m.def("attention_backward(Tensor grad, Tensor qkv, Tensor bias, Tensor starts, int heads,"
        " float scale) -> (Tensor, Tensor)");
  m.def("attention_double_backward(Tensor? to_qkv, Tensor? to_bias, Tensor grad, Tensor qkv,"
        " Tensor bias, Tensor starts, int heads, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pet_finetune, CPU, m) {
  m.impl("attention", &cpu::attention);
  m.impl("attention_backward", &cpu::attention_backward);
  m.impl("attention_double_backward", &cpu::attention_double_backward);
}

TORCH_LIBRARY_IMPL(pet_finetune, Autograd, m) { m.impl("attention", &attention_recorded); }

}  // namespace pet
