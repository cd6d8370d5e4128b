// What each instruction of a network does, forward and backward; see network.h.
#pragma once

#include "network.h"

namespace pet {

template <typename T>
void Network<T>::forward(const Instruction& i, const Team& team) const {
  switch (i.op) {
    case Op::project: return forward_project(i, team);
    case Op::read: return forward_read(i, team);
    case Op::attend: {
      const Tokens all = tokens(i);
      const View in = view(i.in), out = view(i.out);
      neighborhoods(team, i.out_width, [&](int64_t atom, int head, Workspace<T>& space) {
        attention_head_forward<T>(all, atom, head, T(i.number), in.data, graph.logarithms, out.data,
                                  space);
      });
      return;
    }
    default: return forward_rows(i, team);
  }
}

template <typename T>
void Network<T>::forward_project(const Instruction& i, const Team& team) const {
  const View x = view(i.in), y = view(i.out);
  const Projection<T> p = layer(i, x.width);
  const T* made = x.data;
  if (p.prologue != Prologue::none) {
    share(team, x, [&](int64_t first, int64_t last) {
      p.apply(last - first, x.data + first * x.width, scratch + first * p.in);
    });
    team.wait();
    made = scratch;
  }
  const T* rest = i.residual.there() ? view(i.residual).data : nullptr;
  multiply(team, i, false, x, made, rest, y.data);
}

// Instructions that make each row by itself.
template <typename T>
void Network<T>::forward_rows(const Instruction& i, const Team& team) const {
  const View y = view(i.out), x = i.in.there() ? view(i.in) : y;
  const T* matrix = i.weight < 0 ? nullptr : weights + i.weight;
  share(team, y, [&](int64_t begin, int64_t end) {
    if (i.op == Op::norm) {
      const Projection<T> p = layer(i, x.width);
      p.apply(end - begin, x.data + begin * x.width, y.data + begin * y.width);
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      T* to = y.data + row * y.width + i.transposed;
      const auto each = [&](auto&& number) {
        for (int64_t j = 0; j < i.in_width; j += W) store(to + j, number(j));
      };
      if (i.op == Op::take) {
        const T* from = x.data + (i.kind == 1 ? graph.reverse[row] : row) * x.width;
        const T factor = T(i.number);
        if (i.bias == 1)
          each([&](int64_t j) { return load(to + j) + factor * load(from + j); });
        else
          each([&](int64_t j) { return factor * load(from + j); });
      } else if (i.op == Op::embed) {
        const T *v = graph.vectors + 3 * row, *bias = weights + i.bias;
        const T distance = graph.distances[row];
        const int64_t n = i.in_width;
        each([&](int64_t j) {
          return load(bias + j) + v[0] * load(matrix + j) + v[1] * load(matrix + n + j) +
                 v[2] * load(matrix + 2 * n + j) + distance * load(matrix + 3 * n + j);
        });
      } else if (i.op == Op::look_up) {
        const T* from = matrix + *index(y, row) * i.in_width;
        each([&](int64_t j) { return load(from + j); });
      } else {
        const T *from = x.data + row * x.width, *more = graph.condition + row * x.width;
        each([&](int64_t j) { return load(from + j) + load(more + j); });
      }
    }
  });
}

template <typename T>
T dot(int64_t width, const T* a, const T* b) {
  Vec<T> total{};
  for (int64_t j = 0; j < width; j += Simd<T>::width) total += load(a + j) * load(b + j);
  return sum<T>(total);
}

template <typename T>
void Network<T>::forward_read(const Instruction& i, const Team& team) const {
  const View x = view(i.in);
  const Projection<T> p = layer(i, x.width);
  const T* row = weights + i.weight;
  const T bias = weights[i.bias];
  share(team, atoms(), [&](int64_t begin, int64_t end) {
    T* made = thread_buffer<T>(p.in);
    const auto value = [&](int64_t r) {
      p.apply(1, x.data + r * x.width, made);
      return dot<T>(p.in, made, row) + bias;
    };
    for (int64_t atom = begin; atom < end; ++atom) {
      if (x.split > 0) {
        result.outputs[atom] += value(atom);
        continue;
      }
      for (int64_t e = graph.starts[atom]; e < graph.starts[atom + 1]; ++e)
        result.outputs[atom] += graph.factors[e] * value(e);
    }
  });
}

template <typename T>
void Network<T>::backward(const Instruction& i, const Team& team) const {
  switch (i.op) {
    case Op::project: return backward_project(i, team);
    case Op::read: return backward_read(i, team);
    case Op::attend: return backward_attend(i, team);
    default: return backward_rows(i, team);
  }
}

template <typename T>
void Network<T>::backward_project(const Instruction& i, const Team& team) const {
  const View x = view(i.in), y = view(i.out);
  const Projection<T> p = layer(i, x.width);
  if (i.residual.there()) {
    const View rest = view(i.residual);
    share(team, y, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        arrive(rest, i.residual_adds, row, y.grad + row * y.width);
    });
  }
  if (!buffers[i.in.buffer].differentiable) return;
  const bool straight = p.prologue == Prologue::none && !i.in_adds[0] && !i.in_adds[1];
  T* gp = straight ? x.grad : scratch;
  multiply(team, i, true, y, y.grad, nullptr, gp);
  if (straight) return;
  team.wait();
  share(team, x, [&](int64_t first, int64_t last) {
    T* own = thread_buffer<T>(x.width);
    for (int64_t row = first; row < last; ++row) {
      p.apply_backward(1, x.data + row * x.width, gp + row * p.in, own, nullptr, nullptr);
      arrive(x, i.in_adds, row, own);
    }
  });
}

template <typename T>
void Network<T>::backward_attend(const Instruction& i, const Team& team) const {
  const Tokens all = tokens(i);
  const View in = view(i.in), out = view(i.out);
  neighborhoods(team, i.out_width, [&](int64_t atom, int head, Workspace<T>& space) {
    T* own = sums(atom, head);
    std::fill(own, own + all.count(atom) + W, T(0));
    attention_head_backward<T>(all, atom, head, T(i.number), in.data, graph.logarithms, out.grad,
                               in.grad, own, space);
  });
  team.wait();
  share(team, atoms(), [&](int64_t begin, int64_t end) {
    for (int64_t atom = begin; atom < end; ++atom)
      for (int64_t e = graph.starts[atom]; e < graph.starts[atom + 1]; ++e)
        for (int64_t head = 0; head < i.out_width; ++head)
          result.logarithms[e] += sums(atom, head)[1 + e - graph.starts[atom]];
  });
}

template <typename T>
void Network<T>::backward_rows(const Instruction& i, const Team& team) const {
  if (i.op == Op::look_up) return;
  const View y = view(i.out), x = i.in.there() ? view(i.in) : y;
  if (i.in.there() && !buffers[i.in.buffer].differentiable) return;
  share(team, y, [&](int64_t begin, int64_t end) {
    const Projection<T> p = layer(i, x.width);
    T* own = thread_buffer<T>(x.width);
    for (int64_t row = begin; row < end; ++row) {
      const T* g = y.grad + row * y.width + i.transposed;
      if (i.op == Op::take) {
        // The reversed edges of the reversed edges are the edges themselves.
        const int64_t from = i.kind == 1 ? graph.reverse[row] : row;
        arrive(x, i.in_adds, row, y.grad + from * y.width + i.transposed, T(i.number));
      } else if (i.op == Op::norm) {
        p.apply_backward(1, x.data + row * x.width, y.grad + row * y.width, own, nullptr, nullptr);
        arrive(x, i.in_adds, row, own);
      } else if (i.op == Op::condition) {
        arrive(x, i.in_adds, row, g);
      } else {
        const T* matrix = weights + i.weight;
        for (int64_t c = 0; c < 3; ++c)
          result.vectors[3 * row + c] += dot<T>(i.in_width, g, matrix + c * i.in_width);
        result.distances[row] += dot<T>(i.in_width, g, matrix + 3 * i.in_width);
      }
    }
  });
}

template <typename T>
void Network<T>::backward_read(const Instruction& i, const Team& team) const {
  const View x = view(i.in);
  const Projection<T> p = layer(i, x.width);
  const T* matrix = weights + i.weight;
  share(team, x, [&](int64_t begin, int64_t end) {
    T* made = thread_buffer<T>(p.in + x.width);
    T* own = made + p.in;
    for (int64_t row = begin; row < end; ++row) {
      T g = graph.weights[x.split > 0 ? row : graph.centers[row]];
      if (x.split == 0) {
        p.apply(1, x.data + row * x.width, made);
        result.factors[row] += g * (dot<T>(p.in, made, matrix) + weights[i.bias]);
        g *= graph.factors[row];
      }
      for (int64_t j = 0; j < p.in; j += W) store(made + j, g * load(matrix + j));
      p.apply_backward(1, x.data + row * x.width, made, own, nullptr, nullptr);
      arrive(x, i.in_adds, row, own);
    }
  });
}

}  // namespace pet
