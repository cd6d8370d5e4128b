// A static network and its derivative as one run through a list of instructions.
//
// For a few hundred rows the operators' own work is a few microseconds each, less than what torch
// and Python need to get to the next one. So a network that does not train is written down once,
// as instructions on buffers, and each evaluation is one parallel region: forward through the list,
// then backward through it by hand. Between the instructions there is a barrier and nothing else.
//
// A buffer has a row for each atom, each edge, or both (centre tokens first). Products are dealt out
// by columns, because rows are few: every thread reads its share of the weights alone. Each number
// is computed by one thread in one order, so results do not depend on how many threads there are.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "few_rows.h"
#include "instructions.h"
#include "projection.h"

namespace pet {

struct Team {
  int thread, threads;

  void wait() const {
#pragma omp barrier
  }
};

template <typename T>
class Network {
  static constexpr int W = Simd<T>::width;
  static constexpr int64_t kPiece = 8 * FewRows<T>::kMost;  // rows that stay in the first cache
  struct Buffer {
    Part rows;
    int64_t width;
    bool differentiable = false;
    T *data = nullptr, *grad = nullptr;
  };
  struct View {
    int64_t rows, width, split;  // rows from `split` on are edges
    T *data, *grad;
  };

 public:
  // shapes: [buffers, 2], Part and width.
  Network(std::vector<Instruction> list, const int64_t* shapes, int64_t count, const T* weights,
          const Graph<T>& graph, const Result<T>& result)
      : list(std::move(list)), weights(weights), graph(graph), result(result) {
    for (int64_t b = 0; b < count; ++b)
      buffers.push_back({Part(shapes[2 * b]), shapes[2 * b + 1]});
    plan();
  }

  // How many numbers `bind` needs.
  int64_t size() const {
    int64_t total = W + scratch_size + heads * line();
    for (const Buffer& b : buffers) total += 2 * row_count(b.rows) * b.width;
    return total;
  }

  void bind(T* memory) {
    while (reinterpret_cast<uintptr_t>(memory) % kVectorBytes != 0) ++memory;
    const auto take = [&](int64_t numbers) {
      T* start = memory;
      memory += numbers;
      return start;
    };
    for (Buffer& b : buffers) {
      b.data = take(row_count(b.rows) * b.width);
      b.grad = take(row_count(b.rows) * b.width);
    }
    scratch = take(scratch_size);
    lines = take(heads * line());
  }

  // By every thread of a team.
  void run(const Team& team) const {
    for (const Instruction& i : list) {
      forward(i, team);
      team.wait();
    }
    for (const Value& v : unused) {
      const View rows = view(v);
      share(team, rows, [&](int64_t first, int64_t last) {
        std::fill(rows.grad + first * rows.width, rows.grad + last * rows.width, T(0));
      });
    }
    team.wait();
    for (auto i = list.rbegin(); i != list.rend(); ++i) {
      if (!i->back) continue;
      backward(*i, team);
      team.wait();
    }
  }

 private:
  int64_t row_count(Part part) const {
    return (part == Part::edges ? 0 : graph.num_atoms) + (part == Part::atoms ? 0 : graph.num_edges);
  }
  // Sums by token of one head, for every atom in whole vectors, and room for one more.
  int64_t line() const {
    return (graph.num_atoms + graph.num_edges + graph.num_atoms * W + W) / W * W;
  }

  View view(const Value& v) const {
    const Buffer& b = buffers[v.buffer];
    const bool behind = b.rows == Part::all && v.part == Part::edges;
    const int64_t offset = behind ? graph.num_atoms * b.width : 0;
    const int64_t rows = b.rows == Part::all ? row_count(v.part) : row_count(b.rows);
    const bool edges = b.rows == Part::edges || behind;
    return {rows, b.width, edges ? 0 : graph.num_atoms, b.data + offset, b.grad + offset};
  }

  View atoms() const { return {graph.num_atoms, 0, graph.num_atoms, nullptr, nullptr}; }

  // Which values depend on the geometry; which gradient is the first to arrive at a value.
  void plan() {
    for (Instruction& i : list) {
      Buffer& to = buffers[i.out.there() ? i.out.buffer : i.in.buffer];
      const auto depends = [&](const Value& v) {
        return v.there() && buffers[v.buffer].differentiable;
      };
      to.differentiable |= i.op == Op::embed || depends(i.in) || depends(i.residual);
      if (i.op == Op::project && i.kind != int64_t(Prologue::none))
        scratch_size = std::max(scratch_size, view(i.in).rows * i.in_width);
      if (i.op == Op::norm || i.op == Op::project)
        scratch_size = std::max(scratch_size, view(i.in).rows * buffers[i.in.buffer].width);
      if (i.op == Op::attend) heads = std::max(heads, i.out_width);
    }
    look_ahead();
    std::vector<std::array<bool, 2>> written(buffers.size(), {false, false});
    const auto arrive = [&](const Value& v, bool* adds) {
      for (const Part part : {Part::atoms, Part::edges})
        if (touches(v, part)) {
          adds[int(part)] = written[v.buffer][int(part)];
          written[v.buffer][int(part)] = true;
        }
    };
    for (auto i = list.rbegin(); i != list.rend(); ++i) {
      const Value& out = i->op == Op::read ? i->in : i->out;
      if (!buffers[out.buffer].differentiable) continue;
      i->back = true;
      if (i->op != Op::read)
        for (const Part part : {Part::atoms, Part::edges})
          if (touches(out, part) && !written[out.buffer][int(part)]) {
            unused.push_back({out.buffer, part});
            written[out.buffer][int(part)] = true;
          }
      if (i->residual.there()) arrive(i->residual, i->residual_adds);
      if (i->in.there() && buffers[i->in.buffer].differentiable) arrive(i->in, i->in_adds);
    }
  }

  // Which product comes next, forward and then backward.
  void look_ahead() {
    const int64_t count = list.size();
    int64_t next = -1;
    const auto note = [&](int64_t i, bool back) {
      if (list[i].op != Op::project) return;
      list[i].next[back] = next;
      next = back ? count + i : i;
    };
    for (int64_t i = 0; i < count; ++i) note(i, true);
    for (int64_t i = count - 1; i >= 0; --i) note(i, false);
  }

  bool touches(const Value& v, Part part) const {
    const Part rows = buffers[v.buffer].rows;
    return rows == Part::all ? v.has(part) : rows == part;
  }

  Projection<T> layer(const Instruction& i, int64_t width) const {
    const auto at = [&](int64_t offset) { return offset < 0 ? nullptr : weights + offset; };
    return {Prologue(i.kind), width,        i.in_width,   i.out_width,      T(i.number),
            at(i.norm_weight), at(i.norm_bias), at(i.bias), at(i.weight), at(i.transposed)};
  }

  // body(first, last) for this thread's rows of the atoms and of the edges. They are the same in
  // every instruction, so what a thread reads is mostly what it has written itself.
  template <typename F>
  void share(const Team& team, const View& v, F&& body) const {
    const auto part = [&](int64_t from, int64_t count) {
      const int64_t first = count * team.thread / team.threads;
      const int64_t last = count * (team.thread + 1) / team.threads;
      if (first < last) body(from + first, from + last);
    };
    part(0, v.split);
    part(v.split, v.rows - v.split);
  }
  // Whether a product is dealt out by rows too; with fewer by columns, so that each thread reads
  // its part of the weights only.
  bool by_rows(const Team& team, const View& v) const {
    return v.rows - v.split >= 16 * team.threads;
  }

  struct Matrix {
    const T *weights, *bias;
    int64_t depth, columns, panels;
    bool by_rows;

    // The first panel that a thread reads.
    const T* start(const Team& team) const {
      return weights + (by_rows ? 0 : panels * team.thread / team.threads) * 2 * W * depth;
    }
  };
  Matrix matrix(const Team& team, const Instruction& i, bool back) const {
    const int64_t columns = back ? i.in_width : i.out_width;
    return {weights + (back ? i.transposed : i.weight),
            back || i.bias < 0 ? nullptr : weights + i.bias,
            back ? i.out_width : i.in_width,
            columns,
            (columns + 2 * W - 1) / (2 * W),
            by_rows(team, view(i.in))};
  }

  // This thread's share of a product, c = a B + bias + rest; a is [rows, depth] for the rows of v.
  void multiply(const Team& team, const Instruction& i, bool back, const View& v, const T* a,
                const T* rest, T* c) const {
    const Matrix m = matrix(team, i, back);
    const auto& after = i.next[back];
    const T* later = after < 0 ? nullptr
                               : matrix(team, list[after % size_t(list.size())],
                                        after >= int64_t(list.size())).start(team);
    const auto step = [&](int64_t first, int64_t last, int64_t panel, const T* next) {
      const int64_t left = panel * 2 * W, at = first * m.columns + left;
      FewRows<T>::multiply(last - first, m.depth, a + first * m.depth,
                           {m.weights + left * m.depth, next,
                            m.bias == nullptr ? nullptr : m.bias + left},
                           m.columns - left >= 2 * W, rest == nullptr ? nullptr : rest + at, c + at,
                           m.columns);
    };
    const auto next_of = [&](int64_t panel, int64_t end) {
      return panel + 1 < end ? m.weights + (panel + 1) * 2 * W * m.depth : later;
    };
    if (m.by_rows) {
      const int64_t pieces = (v.rows / team.threads + kPiece - 1) / kPiece;
      for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t panel = 0; panel < m.panels; ++panel) {
          const T* next = piece == 0 ? next_of(panel, m.panels) : nullptr;
          share(team, v, [&](int64_t first, int64_t last) {
            const int64_t count = last - first, from = first + count * piece / pieces;
            step(from, first + count * (piece + 1) / pieces, panel, next);
            next = nullptr;
          });
        }
      return;
    }
    // By columns, and by pieces of the rows where there are too few panels for all threads.
    int64_t pieces = m.panels % team.threads == 0 ? 1 : (4 * team.threads + m.panels - 1) / m.panels;
    pieces = std::min(pieces, (v.rows + FewRows<T>::kMost - 1) / FewRows<T>::kMost);
    const int64_t units = m.panels * pieces, end = units * (team.thread + 1) / team.threads;
    for (int64_t unit = units * team.thread / team.threads; unit < end; ++unit) {
      const int64_t panel = unit / pieces, piece = unit % pieces;
      step(v.rows * piece / pieces, v.rows * (piece + 1) / pieces, panel,
           piece == 0 ? next_of(panel, (end + pieces - 1) / pieces) : nullptr);
    }
  }

  // What an atom's heads and its keys' sums are kept in.
  Tokens tokens(const Instruction& i) const {
    return {graph.starts, graph.num_atoms, int(i.out_width),
            int(view(i.in).width / 3 / i.out_width)};
  }
  template <typename F>
  void neighborhoods(const Team& team, int64_t heads, F&& body) const {
    static thread_local Workspace<T> space;
    const int64_t units = graph.num_atoms * heads;
    const int64_t end = units * (team.thread + 1) / team.threads;
    for (int64_t unit = units * team.thread / team.threads; unit < end; ++unit)
      body(unit / heads, int(unit % heads), space);
  }
  T* sums(int64_t atom, int64_t head) const {
    return lines + head * line() + graph.starts[atom] + atom + atom * W;
  }

  const int64_t* index(const View& rows, int64_t row) const {
    return graph.species + (rows.split > 0 ? row : graph.neighbors[row]);
  }

  void forward(const Instruction& i, const Team& team) const;
  void forward_project(const Instruction& i, const Team& team) const;
  void forward_rows(const Instruction& i, const Team& team) const;
  void forward_read(const Instruction& i, const Team& team) const;
  void backward(const Instruction& i, const Team& team) const;
  void backward_project(const Instruction& i, const Team& team) const;
  void backward_attend(const Instruction& i, const Team& team) const;
  void backward_rows(const Instruction& i, const Team& team) const;
  void backward_read(const Instruction& i, const Team& team) const;

  // Rows of a gradient: put there, or added to what is.
  void arrive(const View& to, const bool* adds, int64_t row, const T* from, T factor = T(1)) const {
    T* own = to.grad + row * to.width;
    const bool add = adds[row < to.split ? 0 : 1];
    for (int64_t j = 0; j < to.width; j += W)
      store(own + j, add ? load(own + j) + factor * load(from + j) : factor * load(from + j));
  }

  std::vector<Instruction> list;
  std::vector<Buffer> buffers;
  std::vector<Value> unused;  // whose gradient nobody writes
  int64_t scratch_size = 0, heads = 0;
  T *scratch = nullptr, *lines = nullptr;
  const T* weights;
  Graph<T> graph;
  Result<T> result;
};

}  // namespace pet
