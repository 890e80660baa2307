// Queries, keys and values projected from a layer's input straight into lanes: q, k, v = W x + b never exist in memory.
//
// The lanes of a vector are heads of one image, so that a number of the input, the same for all of them, meets a vector
// of weights. Weights are packed once a call, [query, key, value][channels in blocks][input channel][channel of block].
#pragma once

#include "parallel.h"
#include "window.h"

namespace sasa {
namespace SASA_ISA {

constexpr int kBlock = kRegisters == 32 ? 4 : 2;  // channels computed together
constexpr int kPixels = 6;                        // pixels likewise: kBlock * kPixels sums stay in registers

template <class W, int N, int C, class T = typename W::T, class V = typename W::V>
SASA_NOINLINE void project_of(const T* x, int64_t x_stride, const V* w, int64_t inputs, const V* bias, V* y,
                              int64_t y_stride) {
  V sum[N][C];
  SASA_UNROLL
  for (int p = 0; p < N; ++p) SASA_UNROLL
  for (int c = 0; c < C; ++c) sum[p][c] = bias[c];
  for (int64_t i = 0; i < inputs; ++i) {
    V weight[C];
    SASA_UNROLL
    for (int c = 0; c < C; ++c) {
      weight[c] = w[i * C + c];
      SASA_IN_REGISTER(weight[c]);
    }
    SASA_UNROLL
    for (int p = 0; p < N; ++p) {
      V input = W::all(x[p * x_stride + i]);
      SASA_IN_REGISTER(input);
      SASA_UNROLL
      for (int c = 0; c < C; ++c) sum[p][c] = input * weight[c] + sum[p][c];
    }
  }
  SASA_UNROLL
  for (int p = 0; p < N; ++p) SASA_UNROLL
  for (int c = 0; c < C; ++c) y[p * y_stride + c] = sum[p][c];
}

template <class W>
using Project = void (*)(const typename W::T*, int64_t, const typename W::V*, int64_t, const typename W::V*,
                         typename W::V*, int64_t);

template <class W, int C, int... N>
SASA_INLINE Project<W> project_for(int pixels, std::integer_sequence<int, N...>) {
  static constexpr Project<W> table[] = {project_of<W, N + 1, C>...};
  return table[pixels - 1];
}

// The layer's weights in lanes, for all groups of heads.
template <class S, int P>
struct Weights {
  using T = typename Compute<S>::T;
  using W = Vector<T, P>;
  using V = typename W::V;

  const sasa_problem& p;
  const sasa_projection& projection;
  V *weights, *biases;  // [group of heads][3][...]

  int64_t inputs() const { return projection.in_channels; }
  int64_t size() const { return 3 * p.channels * inputs(); }  // vectors a group of heads

  Weights(const sasa_problem& problem, Workspace& w)
      : p(problem),
        projection(*problem.projection),
        weights(w.take<V>(problem.heads / P * size())),
        biases(w.take<V>(problem.heads / P * 3 * problem.channels)) {}

  // One group of heads, of the queries (0), keys (1) or values (2).
  static void task(void* context, int64_t task, char*) {
    const Weights& self = *static_cast<const Weights*>(context);
    const sasa_problem& p = self.p;
    const sasa_projection& projection = self.projection;
    const int64_t first_head = task / 3 * P, which = task % 3;
    const int64_t row = which * p.heads * p.channels;  // of the weight, for head 0
    const int64_t by_head[2] = {0, p.channels * projection.weight_stride[0]};
    const Planes<P> heads(by_head, p.heads, p.heads, first_head);
    const S* weight = static_cast<const S*>(projection.weight);
    V* to = self.weights + task * p.channels * self.inputs();
    for (int64_t c = 0; c < p.channels; c += kBlock) {
      const int64_t count = lesser(kBlock, p.channels - c);
      pack<W, S>(to + c * self.inputs(), weight + (row + c) * projection.weight_stride[0], heads,
                 {self.inputs(), count, projection.weight_stride[1], projection.weight_stride[0]}, T(1));
    }
    V* bias = self.biases + task * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      bias[c] = V{};
      if (projection.bias != nullptr)
        for (int lane = 0; lane < P; ++lane)
          bias[c][lane] = widen(static_cast<const S*>(projection.bias)[row + (first_head + lane) * p.channels + c]);
    }
  }

  // Pixels of the input, a row of `inputs` numbers each, to the projection `which` of a group of heads:
  // [pixel][channel].
  void project(V* to, const T* x, int64_t x_stride, int64_t pixels, int64_t group, int64_t which,
               int64_t channel) const {
    const V* w = weights + group * size() + (which * p.channels + channel) * inputs();
    const V* bias = biases + (group * 3 + which) * p.channels + channel;
    const int64_t count = lesser(kBlock, p.channels - channel);
    for (int64_t start = 0; start < pixels;) {
      const int64_t blocks = ceil_div(pixels - start, kPixels);
      const int n = int(ceil_div(pixels - start, blocks));
      constexpr auto sizes = std::make_integer_sequence<int, kPixels>{};
      const auto run = count == kBlock ? project_for<W, kBlock>(n, sizes)
                       : count == 1    ? project_for<W, 1>(n, sizes)
                       : count == 2    ? project_for<W, 2>(n, sizes)
                                       : project_for<W, 3>(n, sizes);
      run(x + start * x_stride, x_stride, w, inputs(), bias, to + start * p.channels + channel, p.channels);
      start += n;
    }
  }
};

}  // namespace SASA_ISA
}  // namespace sasa
