// Between tensors and lanes.
// The kernels compute P planes, images of one head, at once: each lane of a vector is a separate plane. A pixel's
// channels are then adjacent vectors, a neighbour's are a fixed distance away, every load is aligned, and no image
// size, window, stride or dilation leaves lanes idle. The price is one transposition of everything read and written,
// done here P x P numbers at a time, along whichever dimension is contiguous in memory.
#pragma once

#include "local_attention.h"
#include "storage.h"

namespace sasa {
namespace SASA_ISA {

// Where each plane of a group begins in a tensor, in elements.
template <int P>
struct Planes {
  int64_t offset[P];
  int count;  // lanes past it repeat the first plane: they are read, but never written

  // Planes from `first` on, numbered batch by batch and head by head.
  Planes(const int64_t* stride, int64_t heads, int64_t planes, int64_t first) {
    count = int(lesser(P, planes - first));
    for (int lane = 0; lane < P; ++lane) {
      const int64_t plane = first + (lane < count ? lane : 0);
      offset[lane] = plane / heads * stride[0] + plane % heads * stride[1];
    }
  }
};

// A row of pixels: `pixels` x `channels` vectors in lanes, and its strides in memory, in elements.
struct Row {
  int64_t pixels, channels, pixel_stride, channel_stride;
};

// The two dimensions of a row in memory order: the inner one is contiguous.
struct Order {
  int64_t inner, outer;              // sizes
  int64_t inner_lanes, outer_lanes;  // strides in vectors
  int64_t outer_memory;              // stride in elements
};

// Whether one of the dimensions is contiguous in memory, and their order if so.
SASA_INLINE bool in_order(const Row& row, Order& order) {
  if (row.channel_stride == 1 && (row.channels > 1 || row.pixel_stride != 1))
    order = {row.channels, row.pixels, 1, row.channels, row.pixel_stride};
  else if (row.pixel_stride == 1)
    order = {row.pixels, row.channels, row.channels, 1, row.channel_stride};
  else
    return false;
  return true;
}

// `count` numbers of each lane become as many vectors.
template <class W, bool All, class S>
SASA_INLINE void pack_block(typename W::V* to, int64_t stride, const S* from, const Planes<W::P>& planes, int count,
                            typename W::T factor) {
  typename W::V v[W::P];
  SASA_UNROLL
  for (int lane = 0; lane < W::P; ++lane) v[lane] = load<W>(from + planes.offset[lane], All ? W::P : count);
  transpose<W>(v);
  if constexpr (All) {
    SASA_UNROLL
    for (int i = 0; i < W::P; ++i) to[i * stride] = v[i] * factor;
  } else {
    for (int i = 0; i < count; ++i) to[i * stride] = v[i] * factor;
  }
}

template <class W, bool All, class S>
SASA_INLINE void unpack_block(S* to, const typename W::V* from, int64_t stride, const Planes<W::P>& planes, int count,
                              typename W::T factor) {
  typename W::V v[W::P] = {};
  if constexpr (All) {
    SASA_UNROLL
    for (int i = 0; i < W::P; ++i) v[i] = from[i * stride] * factor;
  } else {
    for (int i = 0; i < count; ++i) v[i] = from[i * stride] * factor;
  }
  transpose<W>(v);
  SASA_UNROLL
  for (int lane = 0; lane < W::P; ++lane)
    if (lane < planes.count) store<W>(to + planes.offset[lane], v[lane], All ? W::P : count);
}

// Two blocks of P / 2 numbers a lane, which fill one transposition together.
template <class W, class S>
SASA_INLINE void pack_two(typename W::V* to, int64_t inner_to, int64_t outer_to, const S* from, int64_t outer_from,
                          const Planes<W::P>& planes, typename W::T factor) {
  using Half = Vector<typename W::T, W::P / 2>;
  typename W::V v[W::P];
  SASA_UNROLL
  for (int lane = 0; lane < W::P; ++lane)
    v[lane] =
        join<W>(load_all<Half>(from + planes.offset[lane]), load_all<Half>(from + planes.offset[lane] + outer_from));
  transpose<W>(v);
  SASA_UNROLL
  for (int i = 0; i < W::P / 2; ++i) {
    to[i * inner_to] = v[i] * factor;
    to[outer_to + i * inner_to] = v[W::P / 2 + i] * factor;
  }
}

template <class W, class S>
SASA_INLINE void unpack_two(S* to, int64_t outer_to, const typename W::V* from, int64_t inner_from, int64_t outer_from,
                            const Planes<W::P>& planes, typename W::T factor) {
  using Half = Vector<typename W::T, W::P / 2>;
  typename W::V v[W::P];
  SASA_UNROLL
  for (int i = 0; i < W::P / 2; ++i) {
    v[i] = from[i * inner_from] * factor;
    v[W::P / 2 + i] = from[outer_from + i * inner_from] * factor;
  }
  transpose<W>(v);
  SASA_UNROLL
  for (int lane = 0; lane < W::P; ++lane)
    if (lane < planes.count) {
      typename Half::V halves[2];
      memcpy(halves, &v[lane], sizeof(halves));
      store<Half>(to + planes.offset[lane], halves[0], W::P / 2);
      store<Half>(to + planes.offset[lane] + outer_to, halves[1], W::P / 2);
    }
}

// Prefetches `count` pixels from `first` on, to be packed later: hardware prefetchers cannot follow P planes at once.
// Addresses past the tensor are harmless.
template <class W, class S>
SASA_INLINE void prefetch(const S* from, const Planes<W::P>& planes, const Row& row, int64_t first, int64_t count) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(S));
  Order order;
  if (!in_order(row, order)) return;
  const bool along_channels = order.inner_lanes == 1;
  const S* start = from + first * row.pixel_stride;
  const int64_t inner = along_channels ? row.channels : count, outer = along_channels ? count : row.channels;
  for (int lane = 0; lane < planes.count; ++lane)
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; i += kLine)
        __builtin_prefetch(start + planes.offset[lane] + o * order.outer_memory + i, 0, 3);
}

// to[pixel * channels + channel] = from[...] of every lane, times `factor`.
template <class W, class S>
SASA_NOINLINE void pack(typename W::V* to, const S* from, const Planes<W::P>& planes, const Row& row,
                        typename W::T factor) {
  constexpr int P = W::P;
  Order order;
  if (row.pixel_stride == 0 && row.channel_stride == 0) {  // one number for all, as in the gradient of a sum
    typename W::V v{};
    for (int lane = 0; lane < P; ++lane) v[lane] = widen(from[planes.offset[lane]]);
    for (int64_t i = 0; i < row.pixels * row.channels; ++i) to[i] = v * factor;
    return;
  }
  if (!in_order(row, order)) {
    for (int64_t x = 0; x < row.pixels; ++x)
      for (int64_t c = 0; c < row.channels; ++c) {
        const S* source = from + x * row.pixel_stride + c * row.channel_stride;
        typename W::V v{};
        for (int lane = 0; lane < P; ++lane) v[lane] = widen(source[planes.offset[lane]]);
        to[x * row.channels + c] = v * factor;
      }
    return;
  }
  for (int64_t start = 0; start < order.inner; start += P) {
    const int count = int(lesser(P, order.inner - start));
    typename W::V* target = to + start * order.inner_lanes;
    const S* source = from + start;
    int64_t first = 0;
    if constexpr (P >= 8)
      if (count == P / 2)
        for (; first + 2 <= order.outer; first += 2)
          pack_two<W>(target + first * order.outer_lanes, order.inner_lanes, order.outer_lanes,
                      source + first * order.outer_memory, order.outer_memory, planes, factor);
    if (count == P)
      for (int64_t o = 0; o < order.outer; ++o)
        pack_block<W, true>(target + o * order.outer_lanes, order.inner_lanes, source + o * order.outer_memory, planes,
                            P, factor);
    else
      for (int64_t o = first; o < order.outer; ++o)
        pack_block<W, false>(target + o * order.outer_lanes, order.inner_lanes, source + o * order.outer_memory, planes,
                             count, factor);
  }
}

// The reverse.
template <class W, class S>
SASA_NOINLINE void unpack(S* to, const typename W::V* from, const Planes<W::P>& planes, const Row& row,
                          typename W::T factor) {
  constexpr int P = W::P;
  Order order;
  if (!in_order(row, order)) {
    for (int64_t x = 0; x < row.pixels; ++x)
      for (int64_t c = 0; c < row.channels; ++c) {
        S* target = to + x * row.pixel_stride + c * row.channel_stride;
        const typename W::V v = from[x * row.channels + c] * factor;
        for (int lane = 0; lane < planes.count; ++lane) narrow(v[lane], target[planes.offset[lane]]);
      }
    return;
  }
  for (int64_t start = 0; start < order.inner; start += P) {
    const int count = int(lesser(P, order.inner - start));
    const typename W::V* source = from + start * order.inner_lanes;
    S* target = to + start;
    int64_t first = 0;
    if constexpr (P >= 8)
      if (count == P / 2)
        for (; first + 2 <= order.outer; first += 2)
          unpack_two<W>(target + first * order.outer_memory, order.outer_memory, source + first * order.outer_lanes,
                        order.inner_lanes, order.outer_lanes, planes, factor);
    if (count == P)
      for (int64_t o = 0; o < order.outer; ++o)
        unpack_block<W, true>(target + o * order.outer_memory, source + o * order.outer_lanes, order.inner_lanes,
                              planes, P, factor);
    else
      for (int64_t o = first; o < order.outer; ++o)
        unpack_block<W, false>(target + o * order.outer_memory, source + o * order.outer_lanes, order.inner_lanes,
                               planes, count, factor);
  }
}

// An embedding in lanes, [tap][channel covered]: each lane takes the head of its plane.
template <class W, class S>
void pack_embedding(typename W::V* to, const sasa_embedding& embedding, int64_t taps, int64_t heads, int64_t planes,
                    int64_t first) {
  for (int lane = 0; lane < W::P; ++lane) {
    const int64_t head = (first + (first + lane < planes ? lane : 0)) % heads;
    const S* from = static_cast<const S*>(embedding.data) + head * embedding.stride[0];
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < embedding.channels; ++c)
        to[t * embedding.channels + c][lane] = widen(from[c * embedding.stride[1] + t * embedding.stride[2]]);
  }
}

}  // namespace SASA_ISA
}  // namespace sasa
