// Torch operators over the kernels: pet_finetune::attention, norm, gate and lora_linear.
//
// Each is a function whose backward is again a function with a backward, because training on
// forces differentiates twice. A third derivative is an error, never a wrong number.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "attention.h"
#include "low_rank.h"
#include "projection.h"
#include "rowwise.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

void refuse_third_derivative(const char* name) {
  TORCH_CHECK(!at::GradMode::is_enabled(), name,
              ": the fused kernels differentiate twice. For a third derivative set "
              "PET_FINETUNE_KERNELS=off, which computes with plain torch operations.");
}

template <typename T>
const T* data(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

template <typename T>
T* out(const Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<T>() : nullptr;
}

// Stands for an argument that is not there: an undefined tensor cannot be an input of a Function,
// and leaving one out would shift the indices of needs_input_grad.
Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }

// Addresses are computed from these, so a wrong one must stop here.
void check_rows(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.device().is_cpu(), name, ": expected rows [n, d] on the CPU, got ",
              x.sizes(), " on ", x.device());
}

void check_like(const Tensor& t, const Tensor& x, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == x.scalar_type() && t.device().is_cpu(),
              name, ": expected ", sizes, " of ", x.scalar_type(), ", got ", t.sizes(), " of ",
              t.scalar_type());
}

// ---- attention ------------------------------------------------------------------------------

pet::Tokens tokens_of(const Tensor& qkv, const Tensor& starts, int64_t heads) {
  const int64_t width = qkv.size(1) / 3;
  return {starts.const_data_ptr<int64_t>(), starts.numel() - 1, int(heads), int(width / heads)};
}

template <typename T>
struct Scratch {
  pet::Workspace<T> space;
  std::vector<T> line;
};

// Runs body(atom, scratch) for every atom, the atoms dealt out in order.
template <typename T, typename F>
void for_each_atom(const pet::Tokens& tokens, F&& body) {
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
    const pet::Tokens tokens = tokens_of(qkv, starts, heads);
    AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention_backward", [&] {
      for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& s) {
        pet::attention_backward<scalar_t>(tokens, atom, scalar_t(scale), data<scalar_t>(qkv),
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
    const pet::Tokens tokens = tokens_of(qkv, starts, ctx->saved_data["heads"].toInt());
    AT_DISPATCH_FLOATING_TYPES(qkv.scalar_type(), "attention_double_backward", [&] {
      for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& s) {
        pet::attention_double_backward<scalar_t>(
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
    const Tensor &x = qkv, &m = bias, &s = starts;
    const pet::Tokens tokens = tokens_of(x, s, heads);
    Tensor y = at::empty({x.size(0), tokens.width()}, x.options());
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "attention", [&] {
      for_each_atom<scalar_t>(tokens, [&](int64_t atom, Scratch<scalar_t>& scratch) {
        pet::attention_forward<scalar_t>(tokens, atom, scalar_t(scale), data<scalar_t>(x),
                                         data<scalar_t>(m), out<scalar_t>(y), scratch.space);
      });
    });
    ctx->save_for_backward({x, m, s});
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
  TORCH_CHECK(starts.dim() == 1 && atoms >= 0 && starts.scalar_type() == at::kLong &&
                  starts[0].item<int64_t>() == 0 && starts[-1].item<int64_t>() == edges,
              "attention: starts runs from 0 to the number of edges");
  return Attention::apply(qkv.contiguous(), bias.contiguous(), starts.contiguous(), heads, scale);
}

// ---- norms and gates: rows on their own -----------------------------------------------------

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

template <typename T>
T* part_row(const Tensor& sums, int64_t part) {
  return sums.defined() ? sums.mutable_data_ptr<T>() + part * sums.size(1) : nullptr;
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
      const auto kernel = centered ? pet::norm_backward<scalar_t, true>
                                   : pet::norm_backward<scalar_t, false>;
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
      const auto kernel = centered ? pet::norm_double_backward<scalar_t, true>
                                   : pet::norm_double_backward<scalar_t, false>;
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
      const auto kernel = centered ? pet::norm_forward<scalar_t, true>
                                   : pet::norm_forward<scalar_t, false>;
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
      const auto kernel = centered ? pet::norm_backward<scalar_t, true>
                                   : pet::norm_backward<scalar_t, false>;
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
      const auto kernel = silu ? pet::gate_backward<scalar_t, true>
                               : pet::gate_backward<scalar_t, false>;
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
      const auto kernel = silu ? pet::gate_double_backward<scalar_t, true>
                               : pet::gate_double_backward<scalar_t, false>;
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
      const auto kernel = silu ? pet::gate_forward<scalar_t, true>
                               : pet::gate_forward<scalar_t, false>;
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

// ---- linear layers behind a norm or a gate --------------------------------------------------

constexpr int64_t kNone = int64_t(pet::Prologue::none);

// How the rows of a sweep are dealt out: to parts that run beside each other, each in blocks that
// stay in the caches. A function of the rows alone, so that sums do not depend on the threads.
struct Rows {
  int64_t rows, parts, block;

  // `sums`: what each part has to add up besides, in numbers.
  static Rows of(int64_t rows, int64_t sums) {
    const int64_t block = rows <= 512 ? 16 : 32;
    int64_t most = (rows + block - 1) / block;
    if (sums > 16384) {  // the gradient of a whole weight: adding up the parts costs, too
      most = std::max(std::min<int64_t>(rows / 32, 2), std::min<int64_t>(rows / 256, 8));
    } else if (sums > 0) {
      most = std::min<int64_t>(most, 16);
    }
    return {rows, std::max<int64_t>(most, 1), block};
  }

  // body(part, first, last) for every block of every part.
  template <typename F>
  void for_each(F&& body) const {
    const int64_t blocks = (rows + block - 1) / block;
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; ++i)
          body(part, i * block, std::min(rows, (i + 1) * block));
    });
  }
};

// So few rows that they are dealt out by columns.
constexpr int64_t kFewRows = 16;

// body(first, last) for pieces of the columns, whole panels each.
template <typename T, typename F>
void for_each_panel(int64_t columns, F&& body) {
  constexpr int64_t wide = 2 * pet::Simd<T>::width;
  at::parallel_for(0, (columns + wide - 1) / wide, 2, [&](int64_t begin, int64_t end) {
    body(begin * wide, std::min(columns, end * wide));
  });
}

Tensor part_sums(bool needed, const Rows& rows, int64_t width, const Tensor& like) {
  if (!needed || width == 0) return Tensor();
  return at::zeros({rows.parts, width}, like.options());
}

// Memory of this thread for a task's blocks.
template <typename T>
T* thread_buffer(int which, int64_t size) {
  static thread_local std::vector<T> buffers[3];
  std::vector<T>& buffer = buffers[which];
  if (int64_t(buffer.size()) < size + 16) buffer.resize(size + 16);
  T* start = buffer.data();
  while (reinterpret_cast<uintptr_t>(start) % pet::kVectorBytes != 0) ++start;
  return start;
}

// The weight [out, in] in panels for products with its transpose, then for products with itself.
Tensor pack(const Tensor& weight_) {
  const Tensor weight = weight_.detach().contiguous();
  const int64_t out_width = weight.size(0), in = weight.size(1);
  Tensor packed = at::empty({2, out_width * in}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "pack", [&] {
    const scalar_t* w = data<scalar_t>(weight);
    pet::Panels<scalar_t>::pack(in, out_width, out<scalar_t>(packed),
                                [&](int64_t k, int64_t n) { return w[n * in + k]; });
    pet::Panels<scalar_t>::pack(out_width, in, out<scalar_t>(packed) + out_width * in,
                                [&](int64_t k, int64_t n) { return w[k * in + n]; });
  });
  return packed;
}

// What does not change from row to row. Tensors that are not there are empty.
struct Layer {
  Tensor packed, bias, norm_weight, norm_bias, a, b;
  int64_t prologue;
  double eps, scaling;

  static Layer of(const variable_list& saved, size_t first, AutogradContext* ctx) {
    return {saved[first],     saved[first + 1], saved[first + 2], saved[first + 3],
            saved[first + 4], saved[first + 5], ctx->saved_data["prologue"].toInt(),
            ctx->saved_data["eps"].toDouble(),  ctx->saved_data["scaling"].toDouble()};
  }

  void keep(AutogradContext* ctx, variable_list others) const {
    for (const Tensor& t : {packed, bias, norm_weight, norm_bias, a, b}) others.push_back(t);
    ctx->save_for_backward(others);
    ctx->saved_data["prologue"] = prologue;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["scaling"] = scaling;
  }

  int64_t in(const Tensor& x) const {
    return prologue == int64_t(pet::Prologue::swiglu) ? x.size(1) / 2 : x.size(1);
  }

  template <typename T>
  pet::Projection<T> projection(const Tensor& x) const {
    const int64_t width = in(x), out_width = packed.size(1) / width;
    const auto pointer = [](const Tensor& t) {
      return t.numel() > 0 ? t.const_data_ptr<T>() : nullptr;
    };
    return {pet::Prologue(prologue), x.size(1),     width,         out_width,
            T(eps),                  pointer(norm_weight), pointer(norm_bias), pointer(bias),
            pointer(packed),         pointer(packed) + width * out_width};
  }

  template <typename T>
  pet::LowRank<T> low_rank(const pet::Projection<T>& p) const {
    return pet::LowRank<T>(p.in, p.out, a.size(0), data<T>(a), data<T>(b), T(scaling));
  }
};

// Which parameters a sweep forms the gradients of.
struct Wanted {
  bool dense, low_rank, norms;

  int64_t numbers(const Layer& layer, int64_t in, int64_t out_width) const {
    return (dense ? in * out_width : 0) + (low_rank ? layer.a.size(0) * (in + out_width) : 0) +
           (norms ? layer.norm_weight.numel() : 0);
  }
};

// The gradients that a sweep over the rows adds up, one row of sums a part.
struct Sums {
  Tensor weight, a, bt, norm_weight, norm_bias;

  Sums(const Layer& layer, const Tensor& x, int64_t out_width, const Wanted& wanted,
       const Rows& rows) {
    const int64_t in = layer.in(x), rank = layer.a.size(0);
    weight = part_sums(wanted.dense, rows, in * out_width, x);
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
    return {matrix(weight, out_width), matrix(a, layer.a.size(0)),
            to_b.defined() ? to_b.t() : to_b};
  }
};

struct ProjectionBackward : Function<ProjectionBackward> {
  // weight, a and b are inputs for their gradients alone; `packed` holds the numbers.
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x,
                        const Tensor& weight, const Tensor& a, const Tensor& b,
                        const Tensor& norm_weight, const Layer& layer, bool twice) {
    const Tensor gy = grad.contiguous();
    const int64_t rows = x.size(0);
    const bool few = rows <= kFewRows;
    Tensor gx = at::empty_like(x);
    Tensor gp = twice || few ? at::empty({rows, layer.in(x)}, x.options()) : none(x);
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection_backward", [&] {
      const auto p = layer.projection<scalar_t>(x);
      if (few)
        for_each_panel<scalar_t>(p.in, [&](int64_t first, int64_t last) {
          p.multiply_back(rows, data<scalar_t>(gy), out<scalar_t>(gp), first, last);
        });
      Rows::of(rows, 0).for_each([&](int64_t, int64_t first, int64_t last) {
        scalar_t* block = twice || few ? out<scalar_t>(gp) + first * p.in
                                       : thread_buffer<scalar_t>(0, (last - first) * p.in);
        if (!few) p.multiply_back(last - first, data<scalar_t>(gy) + first * p.out, block, 0, p.in);
        p.apply_backward(last - first, data<scalar_t>(x) + first * p.width, block,
                         out<scalar_t>(gx) + first * p.width, nullptr, nullptr);
      });
    });
    layer.keep(ctx, {gy, x, gp});
    return gx;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    refuse_third_derivative("projection");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &gy = saved[0], &x = saved[1], &gp = saved[2];
    const Layer layer = Layer::of(saved, 3, ctx);
    const Tensor c = cotangents[0].contiguous();
    const Wanted wanted{ctx->needs_input_grad(2),
                        ctx->needs_input_grad(3) || ctx->needs_input_grad(4),
                        ctx->needs_input_grad(5)};
    const Rows sweep = Rows::of(x.size(0), wanted.numbers(layer, layer.in(x), gy.size(1)));
    const Sums sums(layer, x, gy.size(1), wanted, sweep);
    const bool to_x_wanted = layer.prologue != kNone;
    Tensor to_gy = at::empty_like(gy), to_x = to_x_wanted ? at::empty_like(x) : Tensor();
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection_double_backward", [&] {
      const auto p = layer.projection<scalar_t>(x);
      const auto update = layer.low_rank<scalar_t>(p);
      sweep.for_each([&](int64_t part, int64_t first, int64_t last) {
        const int64_t rows = last - first;
        const scalar_t* g = data<scalar_t>(gy) + first * p.out;
        scalar_t* t = thread_buffer<scalar_t>(0, rows * p.in);
        p.apply_double(rows, data<scalar_t>(x) + first * p.width,
                       data<scalar_t>(gp) + first * p.in, data<scalar_t>(c) + first * p.width, t,
                       to_x_wanted ? out<scalar_t>(to_x) + first * p.width : nullptr,
                       part_row<scalar_t>(sums.norm_weight, part));
        p.multiply_tangent(rows, t, out<scalar_t>(to_gy) + first * p.out, 0, p.out);
        if (wanted.dense)
          p.add_weight_gradient(rows, g, t, part_row<scalar_t>(sums.weight, part));
        if (wanted.low_rank)
          update.add(rows, g, t, part_row<scalar_t>(sums.a, part),
                     part_row<scalar_t>(sums.bt, part));
      });
    });
    variable_list result(8);
    result[0] = to_gy;
    result[1] = to_x;
    const variable_list of_weight = sums.of_weight(layer, gy.size(1));
    std::copy(of_weight.begin(), of_weight.end(), result.begin() + 2);
    result[5] = Sums::total(sums.norm_weight);
    return result;
  }
};

struct Projection : Function<Projection> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& bias, const Tensor& norm_weight, const Tensor& norm_bias,
                        const Tensor& a, const Tensor& b, const Tensor& rest,
                        const Layer& layer) {
    const int64_t rows = x.size(0), out_width = layer.packed.size(1) / layer.in(x);
    Tensor y = at::empty({rows, out_width}, x.options());
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection", [&] {
      const auto p = layer.projection<scalar_t>(x);
      const scalar_t* extra = rest.numel() > 0 ? data<scalar_t>(rest) : nullptr;
      const auto made = [&](int64_t first, int64_t count) {
        const scalar_t* own = data<scalar_t>(x) + first * p.width;
        if (layer.prologue == kNone) return own;
        scalar_t* block = thread_buffer<scalar_t>(0, count * p.in);
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
    layer.keep(ctx, {x, weight});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &g = grads[0];
    const Layer layer = Layer::of(saved, 2, ctx);
    variable_list result(9);
    if (ctx->needs_input_grad(7)) result[7] = g;
    if (needs_parameters(ctx)) {
      TORCH_CHECK(!at::GradMode::is_enabled(),
                  "projection: the fused kernels do not differentiate gradients of parameters. "
                  "Set PET_FINETUNE_KERNELS=off, which computes with plain torch operations.");
      with_parameters(ctx, layer, x, g.contiguous(), result);
    } else if (ctx->needs_input_grad(0)) {
      result[0] = ProjectionBackward::apply(g, x, weight, layer.a, layer.b, layer.norm_weight,
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

  // The last backward of a training step: x and all parameters in one sweep over the rows.
  static void with_parameters(AutogradContext* ctx, const Layer& layer, const Tensor& x,
                              const Tensor& gy, variable_list& result) {
    const Wanted wanted{ctx->needs_input_grad(1),
                        ctx->needs_input_grad(5) || ctx->needs_input_grad(6),
                        ctx->needs_input_grad(3) || ctx->needs_input_grad(4)};
    const bool to_x = ctx->needs_input_grad(0) || wanted.norms;
    const Rows sweep = Rows::of(x.size(0), wanted.numbers(layer, layer.in(x), gy.size(1)));
    const Sums sums(layer, x, gy.size(1), wanted, sweep);
    Tensor gx = to_x ? at::empty_like(x) : Tensor();
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "projection_parameters", [&] {
      const auto p = layer.projection<scalar_t>(x);
      const auto update = layer.low_rank<scalar_t>(p);
      sweep.for_each([&](int64_t part, int64_t first, int64_t last) {
        const int64_t rows = last - first;
        const scalar_t* own = data<scalar_t>(x) + first * p.width;
        const scalar_t* g = data<scalar_t>(gy) + first * p.out;
        scalar_t* block = thread_buffer<scalar_t>(0, rows * p.in);
        if (to_x) {
          p.multiply_back(rows, g, block, 0, p.in);
          p.apply_backward(rows, own, block, out<scalar_t>(gx) + first * p.width,
                           part_row<scalar_t>(sums.norm_weight, part),
                           part_row<scalar_t>(sums.norm_bias, part));
        }
        if (!wanted.dense && !wanted.low_rank) return;
        p.apply(rows, own, block);
        if (wanted.dense)
          p.add_weight_gradient(rows, g, block, part_row<scalar_t>(sums.weight, part));
        if (wanted.low_rank)
          update.add(rows, g, block, part_row<scalar_t>(sums.a, part),
                     part_row<scalar_t>(sums.bt, part));
      });
    });
    if (ctx->needs_input_grad(0)) result[0] = gx;
    const variable_list of_weight = sums.of_weight(layer, gy.size(1));
    result[1] = of_weight[0];
    result[5] = of_weight[1];
    result[6] = of_weight[2];
    if (ctx->needs_input_grad(2)) result[2] = gy.sum(0);
    result[3] = Sums::total(sums.norm_weight);
    result[4] = Sums::total(sums.norm_bias);
  }
};

void check_projection(const Tensor& x, const Tensor& weight, const Layer& layer,
                      const Tensor& residual) {
  check_rows(x, "projection");
  TORCH_CHECK(weight.dim() == 2, "projection: the weight is a matrix");
  const int64_t in = weight.size(1), out_width = weight.size(0);
  const int64_t lanes = pet::kVectorBytes / x.element_size();
  TORCH_CHECK(in % lanes == 0 && out_width % lanes == 0, "projection: widths are multiples of ",
              lanes, ", got ", weight.sizes());
  TORCH_CHECK(layer.in(x) == in, "projection: x has ", x.size(1), " columns for ", in, " inputs");
  check_like(layer.packed, x, {2, in * out_width}, "projection, packed");
  const auto vector = [&](const Tensor& t, int64_t size, const char* name) {
    if (t.numel() > 0) check_like(t, x, {size}, name);
  };
  vector(layer.bias, out_width, "projection, bias");
  vector(layer.norm_weight, in, "projection, norm_weight");
  vector(layer.norm_bias, in, "projection, norm_bias");
  const auto kind = pet::Prologue(layer.prologue);
  if (kind == pet::Prologue::rms_norm || kind == pet::Prologue::layer_norm)
    check_like(layer.norm_weight, x, {in}, "projection, norm_weight");
  if (kind == pet::Prologue::layer_norm)
    check_like(layer.norm_bias, x, {in}, "projection, norm_bias");
  if (layer.a.numel() > 0) {
    check_like(layer.a, x, {layer.a.size(0), in}, "projection, a");
    check_like(layer.b, x, {out_width, layer.a.size(0)}, "projection, b");
  }
  if (residual.numel() > 0) check_like(residual, x, {x.size(0), out_width}, "projection, residual");
}

Tensor projection(const Tensor& x, const Tensor& weight, const Tensor& packed,
                  const std::optional<Tensor>& bias, const std::string& prologue,
                  const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                  double eps, const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                  double scaling, const std::optional<Tensor>& residual) {
  static const std::unordered_map<std::string, pet::Prologue> kinds = {
      {"none", pet::Prologue::none},
      {"rms_norm", pet::Prologue::rms_norm},
      {"layer_norm", pet::Prologue::layer_norm},
      {"silu", pet::Prologue::silu},
      {"swiglu", pet::Prologue::swiglu}};
  const Tensor empty = none(x);
  const auto given = [&](const std::optional<Tensor>& t) { return t.has_value() ? *t : empty; };
  const Tensor a_ = a.has_value() ? a->contiguous() : at::empty({0, 0}, x.options());
  const Tensor b_ = b.has_value() ? b->contiguous() : at::empty({0, 0}, x.options());
  const Layer layer{packed,  given(bias), given(norm_weight), given(norm_bias), a_,
                    b_,      int64_t(kinds.at(prologue)), eps, scaling};
  check_projection(x, weight, layer, given(residual));
  return Projection::apply(x.contiguous(), weight, layer.bias, layer.norm_weight,
                           layer.norm_bias, a_, b_, given(residual).contiguous(), layer);
}

}  // namespace

TORCH_LIBRARY(pet_finetune, m) {
  m.def("attention(Tensor qkv, Tensor bias, Tensor starts, int heads, float scale) -> Tensor",
        &attention);
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", &layer_norm);
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm);
  m.def("swiglu(Tensor x) -> Tensor", &swiglu);
  m.def("silu(Tensor x) -> Tensor", &silu);
  m.def("pack(Tensor weight) -> Tensor", &pack);
  m.def("projection(Tensor x, Tensor weight, Tensor packed, Tensor? bias, str prologue,"
        " Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? a, Tensor? b, float scaling,"
        " Tensor? residual) -> Tensor", &projection);
}
