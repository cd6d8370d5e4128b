// The operators pet_finetune::permute, which turns edges around, and weigh_edges: the edges within
// one cutoff, with their weights.
//
// The latter is what nn/neighborhood.py and nn/neighborhood.py compute in some twenty operations, and the
// derivatives of the weights by the distance beside them, so that nothing has to be recorded.

#include <cmath>

#include "operator.h"

namespace pet {
namespace {

struct Cutoff {
  double radius, width;
  bool cosine;
};

// The factor of an edge at a distance, and its derivative; the formulas of nn/neighborhood.py.
template <typename T>
std::pair<T, T> factor_at(const Cutoff& cutoff, T distance) {
  const T pi = T(M_PI), width = T(cutoff.width);
  const T x = (distance - T(cutoff.radius - cutoff.width)) / width;
  if (cutoff.cosine) {
    const T inside = std::min(std::max(x, T(0)), T(1));
    const T slope = x < 0 || x > 1 ? T(0) : T(-0.5) * pi * std::sin(pi * inside);
    return {T(0.5) * (T(1) + std::cos(pi * inside)), slope / width};
  }
  const T least = T(1e-6), most = T(1.0 - 1e-6);
  const T cotangent = T(1) / std::tan(pi * std::min(std::max(x, least), most));
  const T height = std::tanh(cotangent);
  const T steep = (T(1) - height * height) * (T(1) + cotangent * cotangent);
  const T slope = x < least || x > most ? T(0) : T(-0.5) * pi * steep;
  return {T(0.5) * (T(1) + height), slope / width};
}

// Of the edges kept: vectors; distances, logarithms, factors and the derivatives of these two, as
// rows of one array; centers, neighbors, reverse; and which they are (empty: all of them).
template <typename T>
variable_list weigh(const Tensor& vectors, const Tensor& centers, const Tensor& neighbors,
                    const Tensor& reverse, const Cutoff& cutoff, double smallest, double tiny) {
  const int64_t count = vectors.size(0);
  const T* v = data<T>(vectors);
  const auto* opposite = data<int64_t>(reverse);
  std::vector<int64_t> kept, place(count, -1);
  std::vector<T> distances;
  for (int64_t e = 0; e < count; ++e) {
    const T square = v[3 * e] * v[3 * e] + v[3 * e + 1] * v[3 * e + 1] + v[3 * e + 2] * v[3 * e + 2];
    if (std::sqrt(square) + T(tiny) > T(cutoff.radius)) continue;
    place[e] = kept.size();
    kept.push_back(e);
    distances.push_back(std::sqrt(square + T(tiny)));
  }
  const int64_t rest = kept.size();
  Tensor numbers = at::empty({5, rest}, vectors.options());
  T* to = out<T>(numbers);
  for (int64_t k = 0; k < rest; ++k) {
    const auto [factor, slope] = factor_at<T>(cutoff, distances[k]);
    const bool counts = factor >= T(smallest);
    to[k] = distances[k];
    to[rest + k] = std::log(counts ? factor : T(smallest));
    to[2 * rest + k] = factor;
    to[3 * rest + k] = counts ? slope / factor : T(0);
    to[4 * rest + k] = slope;
  }
  const Tensor which = at::empty({rest == count ? 0 : rest}, reverse.options());
  if (rest == count) return {vectors, numbers, centers, neighbors, reverse, which};
  std::copy(kept.begin(), kept.end(), which.mutable_data_ptr<int64_t>());
  Tensor turned = at::empty({rest}, reverse.options());
  for (int64_t k = 0; k < rest; ++k) {
    const int64_t other = place[opposite[kept[k]]];
    TORCH_CHECK(other >= 0, "weigh_edges: an edge is longer than its reverse");
    turned.mutable_data_ptr<int64_t>()[k] = other;
  }
  return {vectors.index_select(0, which), numbers, centers.index_select(0, which),
          neighbors.index_select(0, which), turned, which};
}

variable_list weigh_edges(const Tensor& vectors, const Tensor& centers, const Tensor& neighbors,
                          const Tensor& reverse, double radius, double width, bool cosine,
                          double smallest, double tiny) {
  const int64_t count = vectors.size(0);
  check_like(vectors, vectors, {count, 3}, "weigh_edges, vectors");
  for (const Tensor& t : {centers, neighbors, reverse})
    check_like(t, reverse, {count}, "weigh_edges, indices");
  TORCH_CHECK(reverse.scalar_type() == at::kLong, "weigh_edges: indices are int64");
  const Tensor opposite = reverse.contiguous();
  const auto* own = opposite.const_data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(own, own + count, [&](int64_t i) { return i >= 0 && i < count; }),
              "weigh_edges: a reverse edge is beyond the edges");
  const Cutoff cutoff{radius, width, cosine};
  variable_list result;
  AT_DISPATCH_FLOATING_TYPES(vectors.scalar_type(), "weigh_edges", [&] {
    result = weigh<scalar_t>(vectors.detach().contiguous(), centers, neighbors, opposite, cutoff,
                             smallest, tiny);
  });
  return result;
}

namespace cpu {

Tensor permute(const Tensor& rows, const Tensor& index, const Tensor& inverse) {
  return rows.index_select(0, index);
}

}  // namespace cpu

// The gradient of a gather to which each row goes once is a gather, too.
struct Permute : Function<Permute> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& index,
                        const Tensor& inverse) {
    ctx->save_for_backward({index, inverse});
    return PET_OPERATOR(permute)(rows, index, inverse);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {Permute::apply(grads[0], saved[1], saved[0]), Tensor(), Tensor()};
  }
};

Tensor permute_recorded(const Tensor& rows, const Tensor& index, const Tensor& inverse) {
  return recorded(rows) ? Permute::apply(rows, index, inverse)
                        : PET_OPERATOR(permute)(rows, index, inverse);
}

}  // namespace

TORCH_LIBRARY_IMPL(pet_finetune, CompositeExplicitAutograd, m) {
  m.impl("permute", &cpu::permute);
}

TORCH_LIBRARY_IMPL(pet_finetune, Autograd, m) { m.impl("permute", &permute_recorded); }

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("permute(Tensor rows, Tensor index, Tensor inverse) -> Tensor");
  m.def("weigh_edges(Tensor vectors, Tensor centers, Tensor neighbors, Tensor reverse,"
        " float radius, float width, bool cosine, float smallest, float tiny) -> Tensor[]",
        &weigh_edges);
}

}  // namespace pet
