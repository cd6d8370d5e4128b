// The operator pet_finetune::static_network.

#include "network_passes.h"
#include "operator.h"

namespace pet {
namespace {

struct Given {
  Tensor vectors, distances, logarithms, factors;
  Tensor species, centers, neighbors, reverse;
  Tensor condition, gradient;
};

template <typename T>
void run(const Given& given, const Tensor& starts, const Tensor& weights, const Tensor& code,
         const Tensor& numbers, const Tensor& shapes, const variable_list& results) {
  std::vector<Instruction> list;
  for (int64_t i = 0; i < code.size(0); ++i)
    list.emplace_back(code.const_data_ptr<int64_t>() + i * Instruction::kFields,
                      numbers.const_data_ptr<double>()[i]);
  const Graph<T> graph{given.species.size(0),
                       given.centers.size(0),
                       data<int64_t>(given.species),
                       data<int64_t>(given.centers),
                       data<int64_t>(given.neighbors),
                       data<int64_t>(given.reverse),
                       data<int64_t>(starts),
                       data<T>(given.vectors),
                       data<T>(given.distances),
                       data<T>(given.logarithms),
                       data<T>(given.factors),
                       data<T>(given.condition),
                       data<T>(given.gradient)};
  const Result<T> result{out<T>(results[0]), out<T>(results[1]), out<T>(results[2]),
                         out<T>(results[3]), out<T>(results[4])};
  Network<T> network(std::move(list), shapes.const_data_ptr<int64_t>(), shapes.size(0),
                     data<T>(weights), graph, result);
  const Tensor memory = at::empty({network.size()}, weights.options());
  network.bind(out<T>(memory));
  // One region for everything: within one that is under way already, one thread.
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(threads)
  network.run({omp_get_thread_num(), omp_get_num_threads()});
}

// The first edge of each atom and, last, the number of edges.
Tensor starts_of(const Tensor& centers, int64_t atoms) {
  Tensor starts = at::zeros({atoms + 1}, centers.options());
  auto* first = starts.mutable_data_ptr<int64_t>();
  const auto* own = centers.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < centers.size(0); ++e) {
    TORCH_CHECK(own[e] >= 0 && own[e] < atoms && (e == 0 || own[e - 1] <= own[e]),
                "static_network: centers are sorted indices of atoms");
    ++first[own[e] + 1];
  }
  for (int64_t a = 0; a < atoms; ++a) first[a + 1] += first[a];
  return starts;
}

void check(const Given& given, const Tensor& weights, const Tensor& code, const Tensor& numbers,
           const Tensor& shapes, int64_t species) {
  const int64_t atoms = given.species.size(0), edges = given.centers.size(0);
  const char* name = "static_network";
  check_like(given.vectors, weights, {edges, 3}, name);
  for (const Tensor& t : {given.distances, given.logarithms, given.factors})
    check_like(t, weights, {edges}, name);
  check_like(given.gradient, weights, {atoms}, name);
  for (const Tensor& t : {given.centers, given.neighbors, given.reverse})
    check_like(t, given.centers, {edges}, name);
  TORCH_CHECK(given.species.dim() == 1 && given.species.scalar_type() == at::kLong &&
              given.centers.scalar_type() == at::kLong, name, ": indices are int64");
  const auto within = [&](const Tensor& t, int64_t end) {
    const auto* own = t.const_data_ptr<int64_t>();
    return std::all_of(own, own + t.numel(), [&](int64_t i) { return i >= 0 && i < end; });
  };
  TORCH_CHECK(within(given.neighbors, atoms) && within(given.reverse, edges), name,
              ": an index is beyond the atoms or edges");
  TORCH_CHECK(within(given.species, species), name, ": a species is beyond those known");
  TORCH_CHECK(code.is_contiguous() && code.dim() == 2 && code.size(1) == Instruction::kFields &&
              numbers.numel() == code.size(0) && shapes.is_contiguous() && shapes.dim() == 2 &&
              weights.is_contiguous(), name, ": these are no instructions");
}

// The outputs of each atom, and the gradients of their sum, weighted by `gradient`, by vectors,
// distances, logarithms and factors. No autograd: what could be differentiated comes back.
variable_list static_network(const variable_list& edges, const variable_list& indices,
                             const std::optional<Tensor>& condition, const Tensor& gradient,
                             const Tensor& weights, const variable_list& list,
                             int64_t species) {
  TORCH_CHECK(edges.size() == 4 && indices.size() == 4 && list.size() == 3, "static_network");
  const auto plain = [](const Tensor& t) { return t.detach().contiguous(); };
  const Given given{plain(edges[0]),   plain(edges[1]),   plain(edges[2]),   plain(edges[3]),
                    plain(indices[0]), plain(indices[1]), plain(indices[2]), plain(indices[3]),
                    condition.has_value() ? plain(*condition) : Tensor(), plain(gradient)};
  check(given, weights, list[0], list[1], list[2], species);
  const Tensor starts = starts_of(given.centers, given.species.size(0));
  variable_list results{at::zeros_like(given.gradient)};
  for (size_t k = 0; k < 4; ++k) results.push_back(at::zeros_like(plain(edges[k])));
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "static_network", [&] {
    run<scalar_t>(given, starts, weights, list[0], list[1], list[2], results);
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.def("static_network(Tensor[] edges, Tensor[] indices, Tensor? condition, Tensor gradient,"
        " Tensor weights, Tensor[] list, int species) -> Tensor[]", &static_network);
}

}  // namespace pet
