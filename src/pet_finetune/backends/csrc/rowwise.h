// Norms and gated activations, row by row, with their first and second derivatives.
#pragma once

#include "simd.h"

namespace pet {

// Whole vectors of a row, then its rest through the same code in a padded vector.
template <typename T, typename F>
inline void for_each_vector(int64_t width, F&& body) {
  constexpr int W = Simd<T>::width;
  int64_t j = 0;
  for (; j + W <= width; j += W) body(j, W);
  if (j < width) body(j, int(width - j));
}

template <typename T>
inline Vec<T> load_some(const T* p, int count) {
  if (count == Simd<T>::width) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}

template <typename T>
inline void store_some(T* p, Vec<T> v, int count) {
  std::memcpy(p, &v, count * sizeof(T));
}

// ---- norms: y = weight * n + bias, n = r (x - mean), r = (mean(x^2) + eps)^(-1/2) ------------
// LayerNorm subtracts the mean of x first (Centered); RMSNorm does not, and has no bias.
//
//   backward         u = weight * dy,  m = mean(u n),  dx = r (u - mean(u) - n m)
//   double backward  for a cotangent c of dx, with a = sum(c n), b = sum(c u), c and u centred:
//                    to dy: weight r (c - n a / d)
//                    to x:  r^2 / d (n (3 a m - b) - d m c - a u)
//   weight and bias of a row receive from dy: dy * n and dy, and from c: dy r (c - n a / d).

template <typename T>
struct RowStatistics {
  T mean;
  T r;
};

template <typename T, bool Centered>
inline RowStatistics<T> row_statistics(int64_t d, const T* x, T eps) {
  Vec<T> total{};
  T mean = 0;
  if (Centered) {
    for_each_vector<T>(d, [&](int64_t j, int n) { total += load_some(x + j, n); });
    mean = sum<T>(total) / T(d);
  }
  Vec<T> squares{};
  for_each_vector<T>(d, [&](int64_t j, int n) {
    Vec<T> v = load_some(x + j, n) - mean;
    if (Centered && n < Simd<T>::width)
      for (int i = n; i < Simd<T>::width; ++i) v[i] = 0;
    squares += v * v;
  });
  return {mean, T(1) / std::sqrt(sum<T>(squares) / T(d) + eps)};
}

template <typename T, bool Centered>
void norm_forward(int64_t d, const T* x, const T* weight, const T* bias, T eps, T* y) {
  const RowStatistics<T> stats = row_statistics<T, Centered>(d, x, eps);
  const T mean = stats.mean, r = stats.r;
  for_each_vector<T>(d, [&](int64_t j, int n) {
    Vec<T> v = (load_some(x + j, n) - mean) * r * load_some(weight + j, n);
    if (Centered) v += load_some(bias + j, n);
    store_some(y + j, v, n);
  });
}

// dx; where dweight is given, this row is added to dweight and dbias.
template <typename T, bool Centered>
void norm_backward(int64_t d, const T* x, const T* weight, const T* dy, T eps, T* dx, T* dweight,
                   T* dbias) {
  const RowStatistics<T> stats = row_statistics<T, Centered>(d, x, eps);
  const T mean = stats.mean, r = stats.r;
  Vec<T> sum_u{}, sum_un{};
  for_each_vector<T>(d, [&](int64_t j, int n) {
    const Vec<T> u = load_some(weight + j, n) * load_some(dy + j, n);
    sum_u += u;
    sum_un += u * ((load_some(x + j, n) - mean) * r);
  });
  const T m = sum<T>(sum_un) / T(d);
  const T mean_u = Centered ? sum<T>(sum_u) / T(d) : T(0);
  for_each_vector<T>(d, [&](int64_t j, int n) {
    const Vec<T> g = load_some(dy + j, n);
    const Vec<T> normal = (load_some(x + j, n) - mean) * r;
    if (dx != nullptr)
      store_some(dx + j, r * (load_some(weight + j, n) * g - mean_u - normal * m), n);
    if (dweight != nullptr) store_some(dweight + j, load_some(dweight + j, n) + g * normal, n);
    if (dbias != nullptr) store_some(dbias + j, load_some(dbias + j, n) + g, n);
  });
}

template <typename T, bool Centered>
void norm_double_backward(int64_t d, const T* x, const T* weight, const T* dy, const T* c, T eps,
                          T* to_dy, T* to_x, T* dweight) {
  const RowStatistics<T> stats = row_statistics<T, Centered>(d, x, eps);
  const T mean = stats.mean, r = stats.r;
  Vec<T> s_u{}, s_c{}, s_un{}, s_cn{}, s_cu{};
  for_each_vector<T>(d, [&](int64_t j, int n) {
    const Vec<T> u = load_some(weight + j, n) * load_some(dy + j, n);
    const Vec<T> v = load_some(c + j, n);
    const Vec<T> normal = (load_some(x + j, n) - mean) * r;
    s_u += u;
    s_c += v;
    s_un += u * normal;
    s_cn += v * normal;
    s_cu += v * u;
  });
  const T mean_u = Centered ? sum<T>(s_u) / T(d) : T(0);
  const T mean_c = Centered ? sum<T>(s_c) / T(d) : T(0);
  const T m = sum<T>(s_un) / T(d), a = sum<T>(s_cn);
  const T b = sum<T>(s_cu) - T(d) * mean_c * mean_u;
  const T factor = r * r / T(d);
  for_each_vector<T>(d, [&](int64_t j, int n) {
    const Vec<T> g = load_some(dy + j, n), w = load_some(weight + j, n);
    const Vec<T> u = w * g - mean_u, v = load_some(c + j, n) - mean_c;
    const Vec<T> normal = (load_some(x + j, n) - mean) * r;
    const Vec<T> turned = r * (v - normal * (a / T(d)));
    store_some(to_dy + j, w * turned, n);
    store_some(to_x + j, factor * (normal * (T(3) * a * m - b) - (T(d) * m) * v - a * u), n);
    if (dweight != nullptr) store_some(dweight + j, load_some(dweight + j, n) + g * turned, n);
  });
}

// ---- gates: y = v sigmoid(g), with v the first half of a row and g its second ---------------
// SiLU is the same with v = g, one row of width d; then both halves' derivatives add up.

template <typename T, bool Silu>
void gate_forward(int64_t d, const T* x, T* y) {
  for_each_vector<T>(d, [&](int64_t j, int n) {
    const Vec<T> v = load_some(x + j, n);
    const Vec<T> g = Silu ? v : load_some(x + d + j, n);
    store_some(y + j, v * sigmoid<T>(g), n);
  });
}

template <typename T, bool Silu>
void gate_backward(int64_t d, const T* x, const T* dy, T* dx) {
  for_each_vector<T>(d, [&](int64_t j, int n) {
    const Vec<T> v = load_some(x + j, n), s = sigmoid<T>(Silu ? v : load_some(x + d + j, n));
    const Vec<T> grad = load_some(dy + j, n);
    const Vec<T> to_gate = grad * v * s * (T(1) - s);
    if (Silu) {
      store_some(dx + j, grad * s + to_gate, n);
    } else {
      store_some(dx + j, grad * s, n);
      store_some(dx + d + j, to_gate, n);
    }
  });
}

// c: cotangent of dx.
template <typename T, bool Silu>
void gate_double_backward(int64_t d, const T* x, const T* dy, const T* c, T* to_dy, T* to_x) {
  for_each_vector<T>(d, [&](int64_t j, int n) {
    const Vec<T> v = load_some(x + j, n), s = sigmoid<T>(Silu ? v : load_some(x + d + j, n));
    const Vec<T> grad = load_some(dy + j, n), cv = load_some(c + j, n);
    const Vec<T> cg = Silu ? cv : load_some(c + d + j, n);
    const Vec<T> first = s * (T(1) - s), second = first * (T(1) - T(2) * s);
    store_some(to_dy + j, cv * s + cg * v * first, n);
    const Vec<T> to_value = cg * grad * first;
    const Vec<T> to_gate = grad * (cv * first + cg * v * second);
    if (Silu) {
      store_some(to_x + j, to_value + to_gate, n);
    } else {
      store_some(to_x + j, to_value, n);
      store_some(to_x + d + j, to_gate, n);
    }
  });
}

}  // namespace pet
