// What a static network is written down as, and what it runs on; see network.h.
#pragma once

#include <cstdint>

namespace pet {

// Of an instruction, in the order of `Instruction`; listing.py writes the same.
enum class Op : int64_t { project, attend, take, embed, look_up, condition, norm, read };
enum class Part : int64_t { atoms, edges, all };

// Rows of a buffer. As one number 3 * buffer + part, or -1 for none.
struct Value {
  int64_t buffer = -1;
  Part part = Part::all;

  static Value of(int64_t code) {
    return code < 0 ? Value{} : Value{code / 3, Part(code % 3)};
  }
  bool there() const { return buffer >= 0; }
  bool has(Part which) const { return part == Part::all || part == which; }
};

struct Instruction {
  static constexpr int64_t kFields = 12;
  Op op;
  Value in, out, residual;
  int64_t in_width, out_width;  // of attend: the second is the number of heads
  int64_t kind;                 // prologue; of take: 1 for the rows of the reversed edges
  int64_t weight, transposed;   // where in the weights; of take, embed, look_up: the latter is the
                                // first column of `out` that is written
  int64_t bias, norm_weight, norm_bias;  // of take: the first is 1 to add to what is there
  double number;                         // eps, or a factor

  Instruction(const int64_t* f, double number)
      : op(Op(f[0])), in(Value::of(f[1])), out(Value::of(f[2])), residual(Value::of(f[3])),
        in_width(f[4]), out_width(f[5]), kind(f[6]), weight(f[7]), transposed(f[8]), bias(f[9]),
        norm_weight(f[10]), norm_bias(f[11]), number(number) {}

  // The product that comes after this one, forward and backward: its place in the list, behind
  // the end of the list for its backward pass, -1 for none.
  int64_t next[2] = {-1, -1};
  // Of the backward pass: whether a gradient is added to what is there, for atoms and edges.
  bool back = false;
  bool in_adds[2] = {false, false}, residual_adds[2] = {false, false};
};

// One structure or several, and what is known of them.
template <typename T>
struct Graph {
  int64_t num_atoms, num_edges;
  const int64_t *species, *centers, *neighbors, *reverse, *starts;
  const T *vectors, *distances, *logarithms, *factors;
  const T* condition;  // [n_atoms, width], or null
  const T* weights;    // [n_atoms], of the outputs whose weighted sum is differentiated
};

// What comes out: an output of each atom, and the gradients of their weighted sum.
template <typename T>
struct Result {
  T *outputs, *vectors, *distances, *logarithms, *factors;
};

}  // namespace pet
