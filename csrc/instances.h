// Which instance of the kernels computes a problem: the storage type and the number of lanes.
#pragma once

#include "attention.h"

namespace sasa {
namespace SASA_ISA {

template <int N>
using Lanes = std::integral_constant<int, N>;

// Half-wide vectors where fewer lanes would lie idle: they do more than half of the work of wide ones.
template <class S, class F>
int for_lanes(const sasa_problem& p, F f) {
  constexpr int P = kVectorBytes / int(sizeof(typename Compute<S>::T));
  if constexpr (kVectorBytes > 16) {
    const int64_t planes = p.batch * p.heads;
    if (10 * ceil_div(planes, P) > 6 * ceil_div(planes, P / 2)) return f(S{}, Lanes<P / 2>{});
  }
  return f(S{}, Lanes<P>{});
}

template <class F>
int for_instance(const sasa_problem& p, F f) {
  switch (p.dtype) {
    case SASA_FLOAT32: return for_lanes<float>(p, f);
    case SASA_FLOAT64: return for_lanes<double>(p, f);
    case SASA_BFLOAT16: return for_lanes<BFloat16>(p, f);
    case SASA_FLOAT16: return for_lanes<Float16>(p, f);
    default: return SASA_BAD_ARGUMENT;
  }
}

}  // namespace SASA_ISA
}  // namespace sasa
