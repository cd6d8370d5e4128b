// Attention of the tokens of one atom among themselves, with its first and second derivatives.
//
// One head of one neighbourhood of T tokens and head width d, scale s, key bias m:
//
//   forward   S = s Q K^T + 1 m^T    P = softmax_rows(S)    O = P V
//   backward  D = dO V^T    r_i = sum_j P_ij D_ij    G = P * (D - r 1^T)
//             dQ = s G K    dK = s G^T Q    dV = P^T dO    dm = G^T 1
//   and for cotangents aQ, aK, aV, am of those four, with dO, Q, K, V, m as inputs:
//             W = s (aQ K^T + Q aK^T) + 1 am^T    U = dO aV^T    w_i = sum_j P_ij W_ij
//             H = P * (W - w 1^T)                                        (what D receives)
//             X = W * (D - r 1^T) - (w 1^T) * D + U                      (what P receives)
//             Z = P * (X - rowsum(P * X) 1^T)                            (what S receives)
//             to dO: P aV + H V             to V: H^T dO
//             to Q:  s (G aK + Z K)         to K: s (G^T aQ + Z^T Q)     to m: Z^T 1
//
// P is computed anew each time: nothing of size T x T is ever kept. All blocks of one head fit
// the first-level cache up to some 50 tokens.
#pragma once

#include <limits>
#include <vector>

#include "product.h"

namespace pet {

// Where the tokens are: row i holds the centre of atom i, the rows from num_atoms on its edges,
// those of atom i from starts[i] to starts[i + 1].
struct Tokens {
  const int64_t* starts;
  int64_t num_atoms;
  int heads;
  int head_width;

  int64_t count(int64_t atom) const { return 1 + starts[atom + 1] - starts[atom]; }
  int64_t row(int64_t atom, int64_t token) const {
    return token == 0 ? atom : num_atoms + starts[atom] + token - 1;
  }
  int64_t width() const { return int64_t(heads) * head_width; }
};

// The blocks of one neighbourhood's head: [T, d] matrices as rows padded to vectors ("tall"),
// their transposes [d, T] ("flat"), and [T, T] squares, in one allocation a thread keeps.
template <typename T>
class Workspace {
 public:
  void resize(int64_t tokens, int head_width) {
    constexpr int W = Simd<T>::width;
    n = tokens;
    d = head_width;
    np = (tokens + W - 1) / W * W;
    dp = (head_width + W - 1) / W * W;
    const size_t need = size_t(kTall * n * dp + kFlat * d * np + kSquares * n * np + kLines * np);
    if (memory.size() < need + W) memory.resize(need + W);
    next = memory.data();
    while (reinterpret_cast<uintptr_t>(next) % kVectorBytes != 0) ++next;
  }
  T* tall() { return take(n * dp); }
  T* flat() { return take(d * np); }
  T* square() { return take(n * np); }
  T* line() { return take(np); }

  int64_t n = 0, np = 0, dp = 0;
  int d = 0;

 private:
  static constexpr int kTall = 12, kFlat = 5, kSquares = 5, kLines = 4;
  T* take(int64_t size) {
    T* start = next;
    next += size;
    return start;
  }
  std::vector<T> memory;
  T* next = nullptr;
};

template <typename T>
class Head {
  static constexpr int W = Simd<T>::width;

 public:
  Head(const Tokens& tokens, int64_t atom, int head, Workspace<T>& space)
      : tokens(tokens), atom(atom), head(head), w(space) {}

  // Rows of `source` (row length `stride`, this head's columns from `offset`) as a tall matrix.
  T* read(const T* source, int64_t stride, int64_t offset, T factor = T(1)) {
    T* out = w.tall();
    for (int64_t t = 0; t < w.n; ++t) {
      const T* from = source + tokens.row(atom, t) * stride + offset + head * w.d;
      T* to = out + t * w.dp;
      for (int c = 0; c + W <= w.d; c += W) store(to + c, load(from + c) * factor);
      for (int c = w.d / W * W; c < w.dp; ++c) to[c] = c < w.d ? factor * from[c] : T(0);
    }
    return out;
  }

  T* transpose(const T* tall) {
    T* out = w.flat();
    for (int c = 0; c < w.d; ++c) {
      for (int64_t t = 0; t < w.n; ++t) out[c * w.np + t] = tall[t * w.dp + c];
      for (int64_t t = w.n; t < w.np; ++t) out[c * w.np + t] = 0;
    }
    return out;
  }

  void write(const T* tall, T* target, int64_t stride, int64_t offset) {
    for (int64_t t = 0; t < w.n; ++t) {
      T* to = target + tokens.row(atom, t) * stride + offset + head * w.d;
      const T* from = tall + t * w.dp;
      for (int c = 0; c + W <= w.d; c += W) store(to + c, load(from + c));
      for (int c = w.d / W * W; c < w.d; ++c) to[c] = from[c];
    }
  }

  // left [n, d] times right^T, given as its transpose [d, n].
  template <bool Add = false>
  void outer(const T* left, const T* right_flat, T* square) {
    product<T, Add>(w.n, w.np, w.d, left, w.dp, 1, right_flat, w.np, square, w.np);
  }
  // square [n, n] times tall [n, d].
  template <bool Add = false>
  void mix(const T* square, const T* tall, T* out) {
    product<T, Add>(w.n, w.dp, w.n, square, w.np, 1, tall, w.dp, out, w.dp);
  }
  // square^T times tall.
  template <bool Add = false>
  void mix_back(const T* square, const T* tall, T* out) {
    product<T, Add>(w.n, w.dp, w.n, square, 1, w.np, tall, w.dp, out, w.dp);
  }

  // P, rows summing to 1. Columns beyond the tokens get bias minus infinity, hence weight 0.
  T* probabilities(const T* queries_scaled, const T* keys_flat, const T* bias) {
    T* p = w.square();
    outer(queries_scaled, keys_flat, p);
    for (int64_t i = 0; i < w.n; ++i) {
      T* row = p + i * w.np;
      Vec<T> most = broadcast(-std::numeric_limits<T>::infinity());
      for (int64_t j = 0; j < w.np; j += W) {
        const Vec<T> s = load(row + j) + load(bias + j);
        store(row + j, s);
        most = maximum<T>(most, s);
      }
      const T top = largest<T>(most);
      Vec<T> total{};
      for (int64_t j = 0; j < w.np; j += W) {
        const Vec<T> e = exponential(load(row + j) - top);
        store(row + j, e);
        total += e;
      }
      const T inverse = T(1) / sum<T>(total);
      for (int64_t j = 0; j < w.np; j += W) store(row + j, load(row + j) * inverse);
    }
    return p;
  }

  // The key biases of this neighbourhood: 0 for the centre, minus infinity for no token.
  T* read_bias(const T* edge_bias) {
    T* out = w.line();
    out[0] = 0;
    const T* own = edge_bias + tokens.starts[atom];
    for (int64_t t = 1; t < w.n; ++t) out[t] = own[t - 1];
    for (int64_t t = w.n; t < w.np; ++t) out[t] = -std::numeric_limits<T>::infinity();
    return out;
  }

  // Adds the column sums of a square to a line.
  void add_columns(const T* square, T* line) {
    for (int64_t i = 0; i < w.n; ++i)
      for (int64_t j = 0; j < w.np; j += W)
        store(line + j, load(line + j) + load(square + i * w.np + j));
  }

  const Tokens& tokens;
  int64_t atom;
  int head;
  Workspace<T>& w;
};

template <typename T>
void attention_head_forward(const Tokens& tokens, int64_t atom, int h, T scale, const T* qkv,
                            const T* bias, T* out, Workspace<T>& space) {
  const int64_t d = tokens.width();
  space.resize(tokens.count(atom), tokens.head_width);
  Head<T> head(tokens, atom, h, space);
  const T* q = head.read(qkv, 3 * d, 0, scale);
  const T* k = head.transpose(head.read(qkv, 3 * d, d));
  const T* v = head.read(qkv, 3 * d, 2 * d);
  const T* p = head.probabilities(q, k, head.read_bias(bias));
  T* o = space.tall();
  head.mix(p, v, o);
  head.write(o, out, d, 0);
}

template <typename T>
void attention_forward(const Tokens& tokens, int64_t atom, T scale, const T* qkv, const T* bias,
                       T* out, Workspace<T>& space) {
  for (int h = 0; h < tokens.heads; ++h)
    attention_head_forward(tokens, atom, h, scale, qkv, bias, out, space);
}

// Row by row: r = sum(P * D) and G = P * (D - r), in place of D.
template <typename T>
inline void softmax_backward(int64_t n, int64_t np, const T* p, T* square) {
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; ++i) {
    const T* weights = p + i * np;
    T* row = square + i * np;
    Vec<T> dot{};
    for (int64_t j = 0; j < np; j += W) dot += load(weights + j) * load(row + j);
    const T r = sum<T>(dot);
    for (int64_t j = 0; j < np; j += W) store(row + j, load(weights + j) * (load(row + j) - r));
  }
}

// Adds what the biases receive to `bias_sum`, by token, whole vectors of them.
template <typename T>
void attention_head_backward(const Tokens& tokens, int64_t atom, int h, T scale, const T* qkv,
                             const T* bias, const T* grad, T* grad_qkv, T* bias_sum,
                             Workspace<T>& space) {
  const int64_t d = tokens.width();
  space.resize(tokens.count(atom), tokens.head_width);
  Head<T> head(tokens, atom, h, space);
  const T* q = head.read(qkv, 3 * d, 0, scale);
  const T* k = head.read(qkv, 3 * d, d, scale);
  const T* kt = head.transpose(head.read(qkv, 3 * d, d));
  const T* vt = head.transpose(head.read(qkv, 3 * d, 2 * d));
  const T* go = head.read(grad, d, 0);
  const T* p = head.probabilities(q, kt, head.read_bias(bias));
  T* g = space.square();
  head.outer(go, vt, g);
  softmax_backward(space.n, space.np, p, g);
  T* out = space.tall();
  head.mix(g, k, out);
  head.write(out, grad_qkv, 3 * d, 0);
  head.mix_back(g, q, out);
  head.write(out, grad_qkv, 3 * d, d);
  head.mix_back(p, go, out);
  head.write(out, grad_qkv, 3 * d, 2 * d);
  head.add_columns(g, bias_sum);
}

template <typename T>
void attention_backward(const Tokens& tokens, int64_t atom, T scale, const T* qkv, const T* bias,
                        const T* grad, T* grad_qkv, T* grad_bias, Workspace<T>& space,
                        std::vector<T>& bias_sum) {
  const int64_t count = tokens.count(atom);
  bias_sum.assign(count + Simd<T>::width, T(0));
  for (int h = 0; h < tokens.heads; ++h)
    attention_head_backward(tokens, atom, h, scale, qkv, bias, grad, grad_qkv, bias_sum.data(),
                            space);
  for (int64_t t = 1; t < count; ++t) grad_bias[tokens.starts[atom] + t - 1] = bias_sum[t];
}

// Row by row, from P, D (becomes G), W (becomes H) and U (becomes Z); see the top of the file.
template <typename T>
inline void softmax_double_backward(int64_t n, int64_t np, const T* p, T* d, T* w, T* u) {
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; ++i) {
    const T* weights = p + i * np;
    T *dr = d + i * np, *wr = w + i * np, *ur = u + i * np;
    Vec<T> dot_d{}, dot_w{};
    for (int64_t j = 0; j < np; j += W) {
      dot_d += load(weights + j) * load(dr + j);
      dot_w += load(weights + j) * load(wr + j);
    }
    const T r = sum<T>(dot_d), mean_w = sum<T>(dot_w);
    Vec<T> dot_x{};
    for (int64_t j = 0; j < np; j += W) {
      const Vec<T> pj = load(weights + j), dj = load(dr + j), wj = load(wr + j);
      const Vec<T> x = wj * (dj - r) - mean_w * dj + load(ur + j);
      store(ur + j, x);
      dot_x += pj * x;
      store(dr + j, pj * (dj - r));
      store(wr + j, pj * (wj - mean_w));
    }
    const T mean_x = sum<T>(dot_x);
    for (int64_t j = 0; j < np; j += W)
      store(ur + j, load(weights + j) * (load(ur + j) - mean_x));
  }
}

// grad: dO. a_qkv: [aQ, aK, aV]. a_bias: am, or null. Writes what dO, qkv and bias receive.
template <typename T>
void attention_double_backward(const Tokens& tokens, int64_t atom, T scale, const T* qkv,
                               const T* bias, const T* grad, const T* a_qkv, const T* a_bias,
                               T* to_grad, T* to_qkv, T* to_bias, Workspace<T>& space,
                               std::vector<T>& bias_sum) {
  const int64_t d = tokens.width();
  const int64_t count = tokens.count(atom);
  bias_sum.assign(count + Simd<T>::width, T(0));
  for (int h = 0; h < tokens.heads; ++h) {
    space.resize(count, tokens.head_width);
    Head<T> head(tokens, atom, h, space);
    // The scale sits in q, k, aq and ak where they are multiplied from; the flat ones are bare.
    const T* q = head.read(qkv, 3 * d, 0, scale);
    T* k = head.read(qkv, 3 * d, d);
    const T* v = head.read(qkv, 3 * d, 2 * d);
    const T* aq = head.read(a_qkv, 3 * d, 0, scale);
    T* ak = head.read(a_qkv, 3 * d, d);
    const T* av = head.read(a_qkv, 3 * d, 2 * d);
    const T* go = head.read(grad, d, 0);
    const T* kt = head.transpose(k);
    const T* akt = head.transpose(ak);
    const T* p = head.probabilities(q, kt, head.read_bias(bias));
    T* dd = space.square();
    T* ww = space.square();
    T* uu = space.square();
    head.outer(go, head.transpose(v), dd);
    head.outer(go, head.transpose(av), uu);
    head.outer(aq, kt, ww);
    head.template outer<true>(q, akt, ww);
    if (a_bias != nullptr) {
      const T* own = a_bias + tokens.starts[atom];
      for (int64_t i = 0; i < space.n; ++i)
        for (int64_t j = 1; j < space.n; ++j) ww[i * space.np + j] += own[j - 1];
    }
    softmax_double_backward(space.n, space.np, p, dd, ww, uu);
    for (int64_t x = 0; x < space.n * space.dp; ++x) {
      k[x] *= scale;
      ak[x] *= scale;
    }
    T* out = space.tall();
    head.mix(p, av, out);
    head.template mix<true>(ww, v, out);
    head.write(out, to_grad, d, 0);
    head.mix_back(ww, go, out);
    head.write(out, to_qkv, 3 * d, 2 * d);
    head.mix(dd, ak, out);
    head.template mix<true>(uu, k, out);
    head.write(out, to_qkv, 3 * d, 0);
    head.mix_back(dd, aq, out);
    head.template mix_back<true>(uu, q, out);
    head.write(out, to_qkv, 3 * d, d);
    head.add_columns(uu, bias_sum.data());
  }
  for (int64_t t = 1; t < count; ++t) to_bias[tokens.starts[atom] + t - 1] = bias_sum[t];
}

}  // namespace pet
