// Vectors by the compiler's own vector types (GCC and Clang), so that one source serves AVX-512, AVX2
// and others: where registers are narrower than a vector the compiler splits it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace pet {

#ifdef __AVX512F__
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;  // with two vectors of columns: 16 sums of 32 registers
#else
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 12 sums of 16 registers
#endif
constexpr int kWidths = 64;  // bytes; the widths of projections are multiples of it on any machine

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / sizeof(float);
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntVec __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / sizeof(double);
};

template <typename T>
using Vec = typename Simd<T>::Vec;

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Bfloat16 added (or compared) until one lane is left.
template <typename T, typename F>
inline T reduce(Vec<T> v, F&& combine) {
  T lanes[Simd<T>::width];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int half = Simd<T>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

#ifdef __AVX512F__
// The same sums in the same order, without a detour through memory.
template <typename T>
inline T sum(Vec<T> v) {
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
}

template <typename T>
inline T largest(Vec<T> v) {
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_max_ps((__m512)v);
  else
    return _mm512_reduce_max_pd((__m512d)v);
}
#else
template <typename T>
inline T sum(Vec<T> v) {
  return reduce<T>(v, [](T a, T b) { return a + b; });
}

template <typename T>
inline T largest(Vec<T> v) {
  return reduce<T>(v, [](T a, T b) { return a > b ? a : b; });
}
#endif

// exp(x) = 2^k exp(r) with |r| <= ln(2)/2 and a polynomial for exp(r); within 2 ulp in float32.
// Coefficients: Cephes, expf.c (S. L. Moshier). Below -87 it is 0 and above 88 it saturates.
inline Vec<float> exponential(Vec<float> x) {
  typedef Simd<float>::IntVec Int;
  const Vec<float> zero_below = broadcast(-87.0f);
  Vec<float> clamped = x > zero_below ? x : zero_below;
  clamped = clamped < broadcast(88.0f) ? clamped : broadcast(88.0f);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> shifted = clamped * 1.44269504088896341f + magic;
  const Vec<float> k = shifted - magic;
  Vec<float> r = clamped - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = bits << 23;  // the integer sits in the low bits of `shifted`; the magic's own fall off
  Int value;
  std::memcpy(&value, &p, sizeof value);
  value = value + bits;
  std::memcpy(&p, &value, sizeof p);
  return x > zero_below ? p : Vec<float>{};
}

// Double precision is for checks, not for speed: the library's own function, lane by lane.
inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exponential(-x));
}

}  // namespace pet
