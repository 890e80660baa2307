// Queries, keys and values projected from a layer's input directly into lanes: q, k, v = W x + b are never stored.
// The lanes of a vector are heads of one image, so that an input value, the same for all heads, is multiplied by a
// vector of weights. Weights are packed once per call, as [query, key, value][block of channels][input channel]
// [channel of block]. Where lanes are half a register, two channels fill it. Where the processor multiplies pairs of
// bfloat16 numbers, two input channels are packed into one vector.
#pragma once

#include "parallel.h"
#include "window.h"

namespace sasa {
namespace SASA_ISA {

constexpr int kBlock = kRegisters == 32 ? 4 : 2;  // registers of channels computed together
constexpr int kPixels = 6;                        // likewise for pixels: kBlock * kPixels sums stay in registers

// An input in all lanes, or two neighbouring ones in the halves of each.
template <class W, class X>
SASA_INLINE typename W::V spread_input(const X* x, int64_t step) {
  if constexpr (is_multiplied_in_pairs<X>) {
    typename W::Unsigned pair;
    memcpy(&pair, x + 2 * step, sizeof(pair));
    return bits_as<typename W::V>(typename W::U{} + pair);
  } else
    return W::all(x[step]);
}

// y[pixel] = bias + the sum over steps of the products of x[pixel] and w, C vectors each. A step is one input, or two.
// No alignment is required.
template <class W, int N, int C, class X, class T = typename W::T>
SASA_NOINLINE void project_of(const X* const* x, int64_t steps, const T* w, const T* bias, T* const* y,
                              int64_t y_offset) {
  using V = typename W::V;
  using Add = std::conditional_t<is_multiplied_in_pairs<X>, MultiplyAddPairs, MultiplyAdd>;
  const X* from[N];
  V sum[N][C];
  SASA_UNROLL
  for (int p = 0; p < N; ++p) {
    from[p] = x[p];
    SASA_UNROLL
    for (int c = 0; c < C; ++c) sum[p][c] = loose<W>(bias + c * W::P);
  }
  for (int64_t i = 0; i < steps; ++i) {
    V weight[C];
    SASA_UNROLL
    for (int c = 0; c < C; ++c) {
      weight[c] = loose<W>(w + (i * C + c) * W::P);
      SASA_IN_REGISTER(weight[c]);
    }
    SASA_UNROLL
    for (int p = 0; p < N; ++p) {
      V input = spread_input<W>(from[p], i);
      SASA_IN_REGISTER(input);
      SASA_UNROLL
      for (int c = 0; c < C; ++c) sum[p][c] = Add::add(sum[p][c], input, weight[c]);
    }
  }
  SASA_UNROLL
  for (int p = 0; p < N; ++p) SASA_UNROLL
  for (int c = 0; c < C; ++c) loose<W>(y[p] + y_offset + c * W::P) = sum[p][c];
}

template <class X, class T>
using Project = void (*)(const X* const*, int64_t, const T*, const T*, T* const*, int64_t);

template <class W, int C, class X, int... N>
SASA_INLINE Project<X, typename W::T> project_for(int64_t pixels, std::integer_sequence<int, N...>) {
  static constexpr Project<X, typename W::T> table[] = {project_of<W, N + 1, C, X>...};
  return table[pixels - 1];
}

// Pixels to be projected together: the addresses of each one's inputs and results.
template <class X, class T>
struct Pixels {
  const X** x;
  T** y;
  int64_t count = 0;

  Pixels(int64_t most, Workspace& w) : x(w.take<const X*>(most)), y(w.take<T*>(most)) {}

  void add(const X* from, T* to) {
    x[count] = from;
    y[count++] = to;
  }
};

// Computes C vectors of results of each pixel. The weights are loaded from the L2 cache once for every kPixels pixels;
// the arithmetic hides that.
template <class W, int C, class X, class T = typename W::T>
void project_pixels(const Pixels<X, T>& pixels, int64_t steps, const T* w, const T* bias, int64_t y_offset) {
  for (int64_t start = 0; start < pixels.count;) {
    const int64_t n = ceil_div(pixels.count - start, ceil_div(pixels.count - start, kPixels));
    project_for<W, C, X>(n, std::make_integer_sequence<int, kPixels>{})(pixels.x + start, steps, w, bias,
                                                                        pixels.y + start, y_offset);
    start += n;
  }
}

// The layer's weights in lanes, for all groups of heads.
template <class S, int P>
struct Weights {
  using T = typename Compute<S>::T;
  using W = Vector<T, P>;
  using V = typename W::V;
  static constexpr int kWide = kVectorBytes / int(sizeof(V));     // channels that fill a register
  using X = std::conditional_t<is_multiplied_in_pairs<S>, S, T>;  // of the inputs, as they are multiplied

  const sasa_problem& p;
  const sasa_projection& projection;
  V *weights, *biases;  // [group of heads][3][...]

  int64_t inputs() const { return projection.in_channels; }
  int64_t steps() const { return is_multiplied_in_pairs<S> ? ceil_div(inputs(), 2) : inputs(); }
  int64_t size() const { return 3 * p.channels * inputs(); }  // vectors per group of heads

  Weights(const sasa_problem& problem, Workspace& w)
      : p(problem),
        projection(*problem.projection),
        weights(w.take<V>(problem.heads / P, size())),
        biases(w.take<V>(problem.heads / P * 3, problem.channels)) {}

  // Channels of the block of packed weights that starts at `channel`: whole registers, except in the last block.
  int64_t block_of(int64_t channel) const {
    const int64_t left = p.channels - channel;
    return left >= kBlock * kWide ? kBlock * kWide : left > kWide ? left / kWide * kWide : left;
  }

  int64_t tasks() const { return p.heads / P * 3 * ceil_div(p.channels, kBlock * kWide); }

  // Packs some channels of one group of heads, of the queries (0), keys (1) or values (2).
  static void task(void* context, int64_t task, char*) {
    const Weights& self = *static_cast<const Weights*>(context);
    const sasa_problem& p = self.p;
    const sasa_projection& projection = self.projection;
    const int64_t parts = ceil_div(p.channels, kBlock * kWide), part = task / parts;
    const int64_t first_channel = task % parts * kBlock * kWide;
    const int64_t last_channel = lesser(p.channels, first_channel + kBlock * kWide);
    const int64_t first_head = part / 3 * P, which = part % 3;
    const int64_t row = which * p.heads * p.channels;  // of the weight, for head 0
    const int64_t by_head[2] = {0, p.channels * projection.weight_stride[0]};
    const Planes<P> heads(by_head, p.heads, p.heads, first_head);
    const S* weight = static_cast<const S*>(projection.weight);
    V* to = self.weights + part * p.channels * self.inputs();
    for (int64_t c = first_channel; c < last_channel; c += self.block_of(c)) {
      const int64_t block = self.block_of(c);
      pack<W, S>(to + c * self.inputs(), weight + (row + c) * projection.weight_stride[0], heads,
                 {self.inputs(), block, projection.weight_stride[1], projection.weight_stride[0]}, T(1));
      if constexpr (is_multiplied_in_pairs<S>) pair(to + c * self.inputs(), self.inputs(), block);
    }
    V* bias = self.biases + part * p.channels;
    for (int64_t c = first_channel; c < last_channel; ++c) {
      bias[c] = V{};
      if (projection.bias != nullptr)
        for (int lane = 0; lane < P; ++lane)
          bias[c][lane] = widen(static_cast<const S*>(projection.bias)[row + (first_head + lane) * p.channels + c]);
    }
  }

  // Makes one vector of the weights of two inputs, in place: those of the first in the low halves of the lanes.
  static void pair(V* weights, int64_t inputs, int64_t block) {
    using U = typename W::U;
    for (int64_t i = 0; i < inputs; i += 2)
      for (int64_t c = 0; c < block; ++c) {
        const U low = bits_as<U>(weights[i * block + c]) >> 16;
        const U high = i + 1 < inputs ? bits_as<U>(weights[(i + 1) * block + c]) : U{};
        weights[i / 2 * block + c] = bits_as<V>(low | high);
      }
  }

  // Computes projection `which` of the pixels for a group of heads, [channel], `offset` vectors past their places.
  void project(const Pixels<X, T>& pixels, int64_t group, int64_t which, int64_t offset) const {
    const int64_t first = (group * 3 + which) * p.channels;
    for (int64_t c = 0; c < p.channels; c += block_of(c)) {
      const T* w = reinterpret_cast<const T*>(weights + (first + c) * inputs());
      const T* bias = reinterpret_cast<const T*>(biases + first + c);
      const int64_t count = block_of(c), to = (offset + c) * P;
      const auto run = [&](auto wide, int64_t registers) {
        using Wide = decltype(wide);
        const auto pass = registers == kBlock ? project_pixels<Wide, kBlock, X>
                          : registers == 1    ? project_pixels<Wide, 1, X>
                          : registers == 2    ? project_pixels<Wide, 2, X>
                                              : project_pixels<Wide, 3, X>;
        pass(pixels, steps(), w, bias, to);
      };
      if (count % kWide == 0)
        run(Vector<T, P * kWide>{}, count / kWide);
      else
        run(W{}, count);
    }
  }
};

}  // namespace SASA_ISA
}  // namespace sasa
