// Which instance of the kernels computes a problem: the storage type and the number of lanes.
#pragma once

#include "attention.h"

namespace sasa {
namespace SASA_ISA {

template <int N>
using Lanes = std::integral_constant<int, N>;

// Half-wide vectors if they leave fewer lanes idle: they have more than half the throughput of wide ones. With
// projected queries, keys and values, the heads of one image must fill the vectors; half-wide ones let threads share
// the heads of few images, whereas sharing rows would make them project many keys twice.
template <class S>
constexpr int kLanes = kVectorBytes / int(sizeof(typename Compute<S>::T));

template <class S>
int lanes_for(const sasa_problem& p) {
  constexpr int P = kLanes<S>;
  if (kVectorBytes == 16) return P;
  const int64_t planes = p.batch * p.heads;
  if (p.projection != nullptr) {
    const int64_t shares = ceil_div(p.threads, ceil_div(planes, P)), rows = ceil_div(p.rows.outputs, shares);
    const int64_t seen = lesser(p.rows.size, pixels_under(p.rows, rows));
    return p.heads % P != 0 || (shares > 1 && 3 * seen * shares > 4 * p.rows.size) ? P / 2 : P;
  }
  return 10 * ceil_div(planes, P) > 6 * ceil_div(planes, P / 2) ? P / 2 : P;
}

template <class S, class F>
int for_lanes(const sasa_problem& p, F f) {
  if constexpr (kVectorBytes > 16)
    if (lanes_for<S>(p) < kLanes<S>) return f(S{}, Lanes<kLanes<S> / 2>{});
  return f(S{}, Lanes<kLanes<S>>{});
}

template <class F>
int for_instance(const sasa_problem& p, F f) {
  switch (p.dtype) {
    case SASA_BFLOAT16:
      return for_lanes<BFloat16>(p, f);
#if !defined(__AVX512BF16__)  // the others are computed as by avx512
    case SASA_FLOAT32:
      return for_lanes<float>(p, f);
    case SASA_FLOAT64:
      return for_lanes<double>(p, f);
    case SASA_FLOAT16:
      return for_lanes<Float16>(p, f);
#endif
    default:
      return SASA_BAD_ARGUMENT;
  }
}

// Calls run(call), with the layer's weights in lanes if there is a projection.
template <class S, int P, class F>
int with_weights(const sasa_problem& problem, F run) {
  Call<S, P> call(problem);
  if (problem.projection == nullptr) return run(call);
  Workspace needed{nullptr};
  Weights<S, P>(problem, needed);
  char* memory = allocate(needed.used);
  if (memory == nullptr) return SASA_OUT_OF_MEMORY;
  Workspace workspace{memory};
  Weights<S, P> weights(problem, workspace);
  int status = run_parallel(problem.threads, weights.tasks(), 0, Weights<S, P>::task, &weights);
  call.weights = &weights;
  if (status == SASA_OK) status = run(call);
  release(memory);
  return status;
}

}  // namespace SASA_ISA
}  // namespace sasa
