// The three products that local attention is made of, between the channels of up to 3 neighbouring queries and the
// taps of one row of keys:
//
//     dots:    w[query][tap] = sum over channels of q[query][channel] * k[tap][channel]      logits; also g.v
//     weigh:   y[query][channel] = sum over taps of w[query][tap] * v[tap][channel]          output; also dq
//     spread:  v[tap][channel] += sum over queries of w[query][tap] * q[query][channel]      dk and dv
// Vertically adjacent queries share rows of keys, so that each loaded vector of keys serves up to 3 of them: there are
// then fewer loads than multiplications. The order of all sums is fixed, whatever the blocking.
#pragma once

#include "simd.h"

namespace sasa {
namespace SASA_ISA {

constexpr int kQueries = 3;                          // vertically adjacent queries, computed together
constexpr int kTaps = kRegisters == 32 ? 8 : 4;      // taps whose sums stay in registers: kQueries * kTaps + 4 of them
constexpr int kChannels = kRegisters == 32 ? 8 : 4;  // channels likewise

// One row of keys as a column of queries sees it. Strides are in vectors.
template <class V>
struct KeyRow {
  const V* keys;
  const V* values;
  int first, last;           // the queries whose windows contain this row: first <= query < last
  V* weights;                // of query `first` and the first tap inside the image; the taps are contiguous
  const V* pairs = nullptr;  // the keys, two channels a vector, where they are multiplied in pairs
};

template <class Add, class V, int Q, int N>
SASA_NOINLINE void dots_of(const V* q, int64_t q_stride, const V* k, int64_t k_stride, int64_t channels, V* w,
                           int64_t w_stride) {
  V sum[Q][N] = {};
  for (int64_t c = 0; c < channels; ++c) {
    V query[Q];
    SASA_UNROLL
    for (int r = 0; r < Q; ++r) query[r] = q[r * q_stride + c];
    SASA_UNROLL
    for (int t = 0; t < N; ++t) {
      V key = k[t * k_stride + c];
      SASA_IN_REGISTER(key);
      SASA_UNROLL
      for (int r = 0; r < Q; ++r) sum[r][t] = Add::add(sum[r][t], query[r], key);
    }
  }
  SASA_UNROLL
  for (int r = 0; r < Q; ++r) SASA_UNROLL
  for (int t = 0; t < N; ++t) w[r * w_stride + t] = sum[r][t];
}

template <class V, int Q, int N>
SASA_NOINLINE void spread_of(const V* q, int64_t q_stride, V* k, int64_t k_stride, int64_t channels, const V* w,
                             int64_t w_stride) {
  V weight[Q][N];
  SASA_UNROLL
  for (int r = 0; r < Q; ++r) SASA_UNROLL
  for (int t = 0; t < N; ++t) weight[r][t] = w[r * w_stride + t];
  for (int64_t c = 0; c < channels; ++c) {
    V query[Q];
    SASA_UNROLL
    for (int r = 0; r < Q; ++r) query[r] = q[r * q_stride + c];
    SASA_UNROLL
    for (int t = 0; t < N; ++t) {
      V sum = k[t * k_stride + c];
      SASA_UNROLL
      for (int r = 0; r < Q; ++r) sum = weight[r][t] * query[r] + sum;
      k[t * k_stride + c] = sum;
    }
  }
}

// Calls function<queries, taps>() for run-time numbers, taps <= kTaps.
template <class V>
using Product = void (*)(const V*, int64_t, const V*, int64_t, int64_t, V*, int64_t);
template <class V>
using Spread = void (*)(const V*, int64_t, V*, int64_t, int64_t, const V*, int64_t);

template <class Add, class V, int... N>
SASA_INLINE Product<V> dots_for(int queries, int taps, std::integer_sequence<int, N...>) {
  static constexpr Product<V> table[kQueries][kTaps] = {
      {dots_of<Add, V, 1, N + 1>...}, {dots_of<Add, V, 2, N + 1>...}, {dots_of<Add, V, 3, N + 1>...}};
  return table[queries - 1][taps - 1];
}

template <class V, int... N>
SASA_INLINE Spread<V> spread_for(int queries, int taps, std::integer_sequence<int, N...>) {
  static constexpr Spread<V> table[kQueries][kTaps] = {
      {spread_of<V, 1, N + 1>...}, {spread_of<V, 2, N + 1>...}, {spread_of<V, 3, N + 1>...}};
  return table[queries - 1][taps - 1];
}

// Cuts `taps` into parts of at most kTaps, as equal as possible, and calls part(start, count).
template <class F>
SASA_INLINE void in_parts(int taps, F part) {
  for (int start = 0; start < taps;) {
    const int parts = int(ceil_div(taps - start, kTaps));
    const int count = int(ceil_div(taps - start, parts));
    part(start, count);
    start += count;
  }
}

template <class V, class Add = MultiplyAdd>
SASA_INLINE void dots(const V* q, int64_t q_stride, int queries, const V* k, int64_t k_stride, int taps,
                      int64_t channels, V* w, int64_t w_stride) {
  in_parts(taps, [&](int start, int count) {
    dots_for<Add, V>(queries, count, std::make_integer_sequence<int, kTaps>{})(q, q_stride, k + start * k_stride,
                                                                               k_stride, channels, w + start, w_stride);
  });
}

template <class V>
SASA_INLINE void spread(const V* q, int64_t q_stride, int queries, V* k, int64_t k_stride, int taps, int64_t channels,
                        const V* w, int64_t w_stride) {
  in_parts(taps, [&](int start, int count) {
    spread_for<V>(queries, count, std::make_integer_sequence<int, kTaps>{})(q, q_stride, k + start * k_stride, k_stride,
                                                                            channels, w + start, w_stride);
  });
}

// The part of `weigh` for the queries First <= r < Last and N channels, one row of keys.
template <class V, int First, int Last, int N>
SASA_INLINE void weigh_row(V (&sum)[kQueries][N], const V* v, int64_t v_stride, int taps, const V* w,
                           int64_t w_stride) {
  for (int t = 0; t < taps; ++t) {
    V weight[Last - First];
    SASA_UNROLL
    for (int r = 0; r < Last - First; ++r) weight[r] = w[r * w_stride + t];
    SASA_UNROLL
    for (int c = 0; c < N; ++c) {
      V value = v[t * v_stride + c];
      SASA_IN_REGISTER(value);
      SASA_UNROLL
      for (int r = First; r < Last; ++r) sum[r][c] = weight[r - First] * value + sum[r][c];
    }
  }
}

template <class V, int N>
SASA_NOINLINE void weigh_of(const KeyRow<V>* rows, int count, const V* KeyRow<V>::* source, int64_t channel,
                            int64_t v_stride, int taps, int64_t w_stride, V* y, int64_t y_stride, int queries) {
  V sum[kQueries][N] = {};
  for (int i = 0; i < count; ++i) {
    const KeyRow<V>& row = rows[i];
    const V* v = row.*source + channel;
    switch (row.first * 4 + row.last) {
      case 1:
        weigh_row<V, 0, 1>(sum, v, v_stride, taps, row.weights, w_stride);
        break;
      case 2:
        weigh_row<V, 0, 2>(sum, v, v_stride, taps, row.weights, w_stride);
        break;
      case 3:
        weigh_row<V, 0, 3>(sum, v, v_stride, taps, row.weights, w_stride);
        break;
      case 6:
        weigh_row<V, 1, 2>(sum, v, v_stride, taps, row.weights, w_stride);
        break;
      case 7:
        weigh_row<V, 1, 3>(sum, v, v_stride, taps, row.weights, w_stride);
        break;
      default:
        weigh_row<V, 2, 3>(sum, v, v_stride, taps, row.weights, w_stride);
        break;
    }
  }
  SASA_UNROLL
  for (int r = 0; r < kQueries; ++r)
    if (r < queries) {
      SASA_UNROLL
      for (int c = 0; c < N; ++c) y[r * y_stride + channel + c] = sum[r][c];
    }
}

// The same for one query, which sees all rows of keys; with enough channels to hide the latency of an addition.
template <class V, int N>
SASA_NOINLINE void weigh_one_of(const KeyRow<V>* rows, int count, const V* KeyRow<V>::* source, int64_t channel,
                                int64_t v_stride, int taps, V* y) {
  V sum[N] = {};
  for (int i = 0; i < count; ++i) {
    const V* v = rows[i].*source + channel;
    const V* w = rows[i].weights;
    for (int t = 0; t < taps; ++t) {
      const V weight = w[t];
      SASA_UNROLL
      for (int c = 0; c < N; ++c) sum[c] = weight * v[t * v_stride + c] + sum[c];
    }
  }
  SASA_UNROLL
  for (int c = 0; c < N; ++c) y[channel + c] = sum[c];
}

template <class V>
SASA_INLINE void weigh_one(const KeyRow<V>* rows, int count, const V* KeyRow<V>::* source, int64_t v_stride, int taps,
                           int64_t channels, V* y) {
  int64_t c = 0;
  for (; c + 2 * kChannels <= channels; c += 2 * kChannels)
    weigh_one_of<V, 2 * kChannels>(rows, count, source, c, v_stride, taps, y);
  for (; c + 4 <= channels; c += 4) weigh_one_of<V, 4>(rows, count, source, c, v_stride, taps, y);
  for (; c < channels; ++c) weigh_one_of<V, 1>(rows, count, source, c, v_stride, taps, y);
}

// y[query] = sum over the rows of keys and their taps; `source` says whether to weigh the keys or the values.
template <class V>
SASA_INLINE void weigh(const KeyRow<V>* rows, int count, const V* KeyRow<V>::* source, int64_t v_stride, int taps,
                       int64_t w_stride, int64_t channels, V* y, int64_t y_stride, int queries) {
  int64_t c = 0;
  for (; c + kChannels <= channels; c += kChannels)
    weigh_of<V, kChannels>(rows, count, source, c, v_stride, taps, w_stride, y, y_stride, queries);
  for (; c + 4 <= channels; c += 4)
    weigh_of<V, 4>(rows, count, source, c, v_stride, taps, w_stride, y, y_stride, queries);
  for (; c < channels; ++c) weigh_of<V, 1>(rows, count, source, c, v_stride, taps, w_stride, y, y_stride, queries);
}

}  // namespace SASA_ISA
}  // namespace sasa
