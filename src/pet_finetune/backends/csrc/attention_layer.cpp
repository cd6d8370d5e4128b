// The operator pet_finetune::attention_layer: the projection to queries, keys and values, attention
// and the projection of what it gives, of which the tokens alone are kept. For prediction: it is
// differentiated once, by tokens and key biases alone.
//
// All of it belongs to single neighbourhoods, so a few atoms at a time go through it in the caches.

#include "attention.h"
#include "fixed_layer.h"

namespace pet {
namespace {

// Enough rows for the products to run well.
constexpr int64_t kRowsOfGroup = 64;

// Some atoms with their edges: rows of the flat tokens, and the same rows on their own.
struct Group {
  int64_t first, atoms;       // atoms
  int64_t first_edge, edges;
  int64_t num_atoms;          // of the whole

  int64_t rows() const { return atoms + edges; }
  int64_t edge_row() const { return num_atoms + first_edge; }

  // body(rows, where they are in the whole, where on their own) for centres, then edges.
  template <typename F>
  void pieces(F&& body) const {
    body(atoms, first, int64_t(0));
    if (edges > 0) body(edges, edge_row(), atoms);
  }
  template <typename T>
  void gather(const T* from, int64_t width, T* to) const {
    pieces([&](int64_t count, int64_t there, int64_t here) {
      std::memcpy(to + here * width, from + there * width, count * width * sizeof(T));
    });
  }
  template <typename T>
  void scatter(const T* from, int64_t width, T* to) const {
    pieces([&](int64_t count, int64_t there, int64_t here) {
      std::memcpy(to + there * width, from + here * width, count * width * sizeof(T));
    });
  }
};

// The atoms in groups: a function of the neighbourhoods alone.
std::vector<Group> groups_of(const int64_t* starts, int64_t num_atoms) {
  std::vector<Group> groups;
  for (int64_t first = 0, atom = 0; atom < num_atoms; ++atom) {
    const int64_t edges = starts[atom + 1] - starts[first], atoms = atom + 1 - first;
    if (edges + atoms < kRowsOfGroup && atom + 1 < num_atoms) continue;
    groups.push_back({first, atoms, starts[first], edges, num_atoms});
    first = atom + 1;
  }
  return groups;
}

template <typename T>
struct Scratch {
  Workspace<T> space;
  std::vector<T> line;
  std::vector<int64_t> starts;  // of a group on its own

  Tokens tokens(const Group& group, const int64_t* all, int64_t heads, int64_t width) {
    starts.resize(group.atoms + 1);
    for (int64_t i = 0; i <= group.atoms; ++i)
      starts[i] = all[group.first + i] - group.first_edge;
    return {starts.data(), group.atoms, int(heads), int(width / heads)};
  }
};

template <typename T, typename F>
void for_each_group(const std::vector<Group>& groups, F&& body) {
  at::parallel_for(0, int64_t(groups.size()), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<T> scratch;
    for (int64_t i = begin; i < end; ++i) body(groups[i], scratch);
  });
}

namespace cpu {

// Queries, keys and values of a group, in `space`, which then begins behind them.
template <typename T>
const T* inputs(const Projection<T>& one, const Group& group, const T* x, T*& space) {
  T* p = take(space, group.rows() * one.in);
  T* qkv = take(space, group.rows() * one.out);
  group.pieces([&](int64_t count, int64_t there, int64_t here) {
    one.apply(count, x + there * one.width, p + here * one.in);
  });
  one.multiply(group.rows(), p, nullptr, qkv, 0, one.out);
  return qkv;
}

Tensor attention_layer(const Tensor& x_, const Tensor& bias_, const Tensor& starts_, int64_t heads,
                       double scale, const Tensor& packed, const std::optional<Tensor>& in_bias,
                       int64_t prologue, const std::optional<Tensor>& norm_weight,
                       const std::optional<Tensor>& norm_bias, double eps,
                       const Tensor& out_packed, const std::optional<Tensor>& out_bias) {
  const char* name = "attention_layer";
  check_rows(x_, name);
  const int64_t atoms = starts_.numel() - 1, edges = x_.size(0) - atoms, width = x_.size(1);
  const auto first = FixedLayer::of(packed, in_bias, prologue, norm_weight, norm_bias, eps);
  const auto second = FixedLayer::of(out_packed, out_bias, int64_t(Prologue::none), std::nullopt,
                                     std::nullopt, 0.0);
  first.check(x_, width, name);
  second.check(x_, width, name);
  TORCH_CHECK(heads > 0 && width % heads == 0 && first.out_width(width) == 3 * width &&
              second.out_width(width) == width, name, ": ", width, " columns and ", heads,
              " heads do not go with the layers");
  check_like(bias_, x_, {edges}, "attention_layer, key_bias");
  const char* run = "attention_layer: starts runs from 0 to the number of edges";
  TORCH_CHECK(starts_.dim() == 1 && atoms >= 0 && starts_.scalar_type() == at::kLong &&
              starts_.device().is_cpu(), run);
  const Tensor x = x_.contiguous(), bias = bias_.contiguous(), starts = starts_.contiguous();
  const int64_t* all = starts.const_data_ptr<int64_t>();
  TORCH_CHECK(all[0] == 0 && all[atoms] == edges, run);
  Tensor y = at::empty_like(x);
  const auto groups = groups_of(all, atoms);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "attention_layer", [&] {
    const auto one = first.projection<scalar_t>(width);
    const auto two = second.projection<scalar_t>(width);
    for_each_group<scalar_t>(groups, [&](const Group& group, Scratch<scalar_t>& s) {
      const int64_t rows = group.rows();
      scalar_t* space = thread_buffer<scalar_t>(rows * (one.in + one.out + two.in + two.out));
      const scalar_t* qkv = inputs(one, group, data<scalar_t>(x), space);
      scalar_t* mixed = take(space, rows * two.in);
      scalar_t* made = take(space, rows * two.out);
      const Tokens tokens = s.tokens(group, all, heads, two.in);
      const scalar_t* own_bias = data<scalar_t>(bias) + group.first_edge;
      for (int64_t atom = 0; atom < group.atoms; ++atom)
        attention_forward<scalar_t>(tokens, atom, scalar_t(scale), qkv, own_bias, mixed, s.space);
      two.multiply(rows, mixed, nullptr, made, 0, two.out);
      group.scatter(made, two.out, out<scalar_t>(y));
    });
  });
  return y;
}

// The gradients of x and bias; these and starts are contiguous, as the forward pass kept them.
std::tuple<Tensor, Tensor> attention_layer_backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& bias, const Tensor& starts,
                                                    int64_t heads, double scale,
                                                    at::TensorList tensors, int64_t prologue,
                                                    double eps, at::TensorList out_tensors) {
  const auto first = FixedLayer::of(tensors, prologue, eps);
  const auto second = FixedLayer::of(out_tensors, int64_t(Prologue::none), 0.0);
  const Tensor gy = grad.contiguous();
  Tensor gx = at::empty_like(x), gbias = at::empty_like(bias);
  const int64_t* all = starts.const_data_ptr<int64_t>();
  const auto groups = groups_of(all, starts.numel() - 1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "attention_layer_backward", [&] {
    const auto one = first.projection<scalar_t>(x.size(1));
    const auto two = second.projection<scalar_t>(x.size(1));
    for_each_group<scalar_t>(groups, [&](const Group& group, Scratch<scalar_t>& s) {
      const int64_t rows = group.rows();
      scalar_t* space =
          thread_buffer<scalar_t>(rows * (2 * one.in + 2 * one.out + two.in + two.out));
      const scalar_t* qkv = inputs(one, group, data<scalar_t>(x), space);
      scalar_t* g = take(space, rows * two.out);
      scalar_t* to_mixed = take(space, rows * two.in);
      scalar_t* to_qkv = take(space, rows * one.out);
      scalar_t* to_p = take(space, rows * one.in);
      group.gather(data<scalar_t>(gy), two.out, g);
      two.multiply_back(rows, g, to_mixed, 0, two.in);
      const Tokens tokens = s.tokens(group, all, heads, two.in);
      for (int64_t atom = 0; atom < group.atoms; ++atom)
        attention_backward<scalar_t>(tokens, atom, scalar_t(scale), qkv,
                                     data<scalar_t>(bias) + group.first_edge, to_mixed, to_qkv,
                                     out<scalar_t>(gbias) + group.first_edge, s.space, s.line);
      one.multiply_back(rows, to_qkv, to_p, 0, one.in);
      group.pieces([&](int64_t count, int64_t there, int64_t here) {
        one.apply_backward(count, data<scalar_t>(x) + there * one.width, to_p + here * one.in,
                           out<scalar_t>(gx) + there * one.width, nullptr, nullptr);
      });
    });
  });
  return {gx, gbias};
}

}  // namespace cpu

struct AttentionLayer : Function<AttentionLayer> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& bias,
                        const Tensor& starts, int64_t heads, double scale, const FixedLayer& first,
                        const FixedLayer& second) {
    variable_list saved{x, bias, starts};
    first.keep(ctx, saved, "first_");
    second.keep(ctx, saved, "second_");
    ctx->save_for_backward(saved);
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["scale"] = scale;
    return PET_OPERATOR(attention_layer)(x, bias, starts, heads, scale, first.packed,
                                         if_there(first.bias), first.prologue,
                                         if_there(first.norm_weight), if_there(first.norm_bias),
                                         first.eps, second.packed, if_there(second.bias));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative("attention_layer");
    const variable_list saved = ctx->get_saved_variables();
    const FixedLayer first = FixedLayer::kept(ctx, saved, 3, "first_");
    const FixedLayer second = FixedLayer::kept(ctx, saved, 7, "second_");
    const auto [gx, gbias] = PET_OPERATOR(attention_layer_backward)(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["heads"].toInt(),
        ctx->saved_data["scale"].toDouble(), first.tensors(), first.prologue, first.eps,
        second.tensors());
    return {gx, gbias, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor attention_layer_recorded(const Tensor& x, const Tensor& bias, const Tensor& starts,
                                int64_t heads, double scale, const Tensor& packed,
                                const std::optional<Tensor>& in_bias, int64_t prologue,
                                const std::optional<Tensor>& norm_weight,
                                const std::optional<Tensor>& norm_bias, double eps,
                                const Tensor& out_packed, const std::optional<Tensor>& out_bias) {
  if (!recorded(x, bias))
    return PET_OPERATOR(attention_layer)(x, bias, starts, heads, scale, packed, in_bias, prologue,
                                         norm_weight, norm_bias, eps, out_packed, out_bias);
  const auto first = FixedLayer::of(packed, in_bias, prologue, norm_weight, norm_bias, eps);
  const auto second = FixedLayer::of(out_packed, out_bias, int64_t(Prologue::none), std::nullopt,
                                     std::nullopt, 0.0);
  return AttentionLayer::apply(x.contiguous(), bias.contiguous(), starts.contiguous(), heads, scale,
                               first, second);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("attention_layer(Tensor x, Tensor key_bias, Tensor starts, int heads, float scale,"
        " Tensor packed, Tensor? bias, int prologue, Tensor? norm_weight, Tensor? norm_bias,"
        " float eps, Tensor out_packed, Tensor? out_bias) -> Tensor");
  m.def("attention_layer_backward(Tensor grad, Tensor x, Tensor key_bias, Tensor starts, int heads,"
        " float scale, Tensor[] layer, int prologue, float eps, Tensor[] out_layer)"
        " -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pet_finetune, CPU, m) {
  m.impl("attention_layer", &cpu::attention_layer);
  m.impl("attention_layer_backward", &cpu::attention_layer_backward);
}

TORCH_LIBRARY_IMPL(pet_finetune, Autograd, m) {
  m.impl("attention_layer", &attention_layer_recorded);
}

}  // namespace pet
