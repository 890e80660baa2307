// Shared by forward and backward: a group of planes with its keys and values in lanes, and the logits of a column of
// queries.
#pragma once

#include "call.h"

namespace sasa {
namespace SASA_ISA {

constexpr int64_t kColumns = 16;          // queries packed and unpacked together along a row
constexpr int64_t kPixelsTogether = 256;  // pixels projected together at most, except in longer rows

// A group of P planes on one thread.
template <class S, int P>
struct Group {
  using T = typename Compute<S>::T;
  using W = Vector<T, P>;
  using V = typename W::V;
  using X = typename Weights<S, P>::X;
  static constexpr bool kPairs = is_multiplied_in_pairs<S>;  // q.k, two channels at a time

  const Call<S, P>& call;
  const sasa_problem& p;
  int64_t first_plane;
  Planes<P> of_query, of_key, of_value, of_lse;
  int64_t first_col = 0, cols = 0;  // columns of the image in the rings
  Ring<V> keys, values;
  V* key_pairs;                // the ring of keys, [place][pixel][pair of channels], if they are multiplied in pairs
  V* query_pairs;              // [query][column][pair of channels], likewise
  const V* queries = nullptr;  // that query_pairs were made from, [query][column][channel]
  int64_t* held;               // the row of the image in each place of the rings; -1 for none
  KeyRowIndex* block_rows;
  KeyRow<V>* key_rows;
  V *row_table, *col_table;  // the embeddings in lanes: [offset][channel covered]
  V* table;                  // [row][column]
  V* logits;                 // [query][tap]
  V *row_terms, *col_terms;  // q.row [query][row offset] and q.col [query][column offset]
  KeyRow<V>* joint_rows;     // like key_rows, for everything that the queries of one pooled output see
  V* joint;                  // their weights: [row of keys][tap]
  int64_t joint_taps;        // taps across
  Range stored;              // columns of taps that are stored among the logits
  bool whole[kQueries];      // whether all taps of the column's queries are inside the image
  int64_t most_pixels;
  Pixels<X, T> pixels;  // to be projected together
  X* input;             // a row of the layer's input, [pixel][copied_inputs], if it is copied

  // `most_cols`: columns of the image that the rings have room for.
  Group(const Call<S, P>& c, int64_t most_cols, int64_t first, Workspace& w)
      : call(c),
        p(c.problem),
        first_plane(first),
        of_query(planes_of(p.query)),
        of_key(planes_of(p.key)),
        of_value(planes_of(p.value)),
        of_lse(c.lse_stride, p.heads, c.planes, first),
        most_pixels(p.projection == nullptr ? 0 : greater(kPixelsTogether, greater(most_cols, kQueries * kColumns))),
        pixels(most_pixels, w) {
    const int64_t span = pixels_under(p.rows, call.together);
    keys = {w.take<V>(span, most_cols, p.channels), span, most_cols * p.channels};
    values = {w.take<V>(span, most_cols, p.value_channels), span, most_cols * p.value_channels};
    key_pairs = w.take<V>(span, most_cols, kPairs ? pairs() : 0);
    query_pairs = w.take<V>(kQueries * kColumns, kPairs ? pairs() : 0);
    held = w.take<int64_t>(span);
    block_rows = w.take<KeyRowIndex>(span);
    key_rows = w.take<KeyRow<V>>(span);
    row_table = w.take<V>(offsets(p.rows), call.row_channels);
    col_table = w.take<V>(offsets(p.cols), call.col_channels);
    table = w.take<V>(offsets(p.rows), call.table_columns);
    logits = w.take<V>(kQueries, call.taps);
    row_terms = w.take<V>(kQueries, offsets(p.rows));
    col_terms = w.take<V>(kQueries, offsets(p.cols));
    const bool pooled = p.pool > 1, projected = p.projection != nullptr;
    joint_rows = w.take<KeyRow<V>>(pooled ? span : 0);
    joint = take_joint(w);
    input = w.take<X>(projected && is_copied() ? greater(most_cols, kColumns) : 0, projected ? copied_inputs() : 0);
  }

  // Maximum number of weights of taps that the queries of a pooled output see together: only those inside the image
  // count.
  V* take_joint(Workspace& w) const {
    const auto along = [&](const sasa_axis& axis) {
      return p.pool > 1 ? lesser(axis.size, axis.kernel + (p.pool - 1) * (axis.stride / axis.dilation)) : 0;
    };
    return w.take<V>(along(p.rows), along(p.cols));
  }

  int64_t pairs() const { return ceil_div(p.channels, 2); }

  void pair_channels(V* to, const V* from, int64_t pixels) const {
    for (int64_t i = 0; i < pixels; ++i, from += p.channels)
      for (int64_t c = 0; c < p.channels; c += 2) *to++ = pair<V>(from[c], c + 1 < p.channels ? from[c + 1] : V{});
  }

  V* pairs_of(const V* key) const { return key_pairs + (key - keys.rows) / p.channels * pairs(); }

  Planes<P> planes_of(const sasa_tensor& x) const { return {x.stride, p.heads, call.planes, first_plane}; }

  // Starts on the windows x0 <= x < x1, with no rows held.
  void start(int64_t x0, int64_t x1) {
    const auto pack_each = [&](V* to, const sasa_embedding& from, int64_t entries) {
      if (from.data != nullptr) pack_embedding<W, S>(to, from, entries, p.heads, call.planes, first_plane);
    };
    pack_each(row_table, p.row, offsets(p.rows));
    pack_each(col_table, p.col, offsets(p.cols));
    pack_each(table, p.table, offsets(p.rows));
    for (int64_t i = 0; i < keys.span; ++i) held[i] = -1;
    const int64_t reach = (p.cols.kernel - 1) * p.cols.dilation + 1;
    first_col = lesser(p.cols.size, greater(0, window_start(p.cols, x0)));
    int64_t end = window_start(p.cols, x1 - 1) + reach;
    for (int64_t x = x0; p.cols.shifted && x < x1; ++x) {
      first_col = lesser(first_col, window_start(p.cols, x));
      end = greater(end, window_start(p.cols, x) + reach);
    }
    cols = greater(0, lesser(p.cols.size, end) - first_col);
  }

  static const S* row_of(const sasa_tensor& x, int64_t y, int64_t col) {
    return static_cast<const S*>(x.data) + y * x.stride[3] + col * x.stride[4];
  }

  Row row_like(const sasa_tensor& x, int64_t channels) const { return {cols, channels, x.stride[4], x.stride[2]}; }

  // Loads the rows of keys and values under the block into the rings. Calls let_go(row) before a row is replaced and
  // take_up(row) after a new one is loaded.
  template <class F, class H>
  void hold(const Block& block, F let_go, H take_up) {
    for (int i = 0; i < block.count; ++i) {
      const int64_t y = block.rows[i].y;
      block.rows[i].place = y % keys.span;
      int64_t& place = held[block.rows[i].place];
      if (place == y) continue;
      if (place >= 0) let_go(place);
      place = y;
      if (call.weights != nullptr) {
        if (pixels.count + cols > most_pixels) project_keys();
        add_pixels(y, first_col, cols, 1, keys.row(y));
        if (is_copied()) project_keys();
      } else {
        pack<W, S>(keys.row(y), row_of(p.key, y, first_col), of_key, row_like(p.key, p.channels), T(1));
        pack<W, S>(values.row(y), row_of(p.value, y, first_col), of_value, row_like(p.value, p.value_channels), T(1));
        if constexpr (kPairs) pair_channels(pairs_of(keys.row(y)), keys.row(y), cols);
      }
      take_up(y);
    }
    if (call.weights != nullptr) project_keys();
  }

  // Projects the keys and values of the added pixels; a pixel's place is that of its keys.
  void project_keys() {
    const int64_t group = first_plane % p.heads / P;
    call.weights->project(pixels, group, 1, 0);
    call.weights->project(pixels, group, 2, values.rows - keys.rows);
    if constexpr (kPairs)
      for (int64_t i = 0; i < pixels.count; ++i) {
        const V* key = reinterpret_cast<const V*>(pixels.y[i]);
        pair_channels(pairs_of(key), key, 1);
      }
    pixels.count = 0;
  }

  // Whether the layer's input is copied before it is projected: to widen it, because its channels are not adjacent, or
  // to complete the last pair of them with a zero.
  bool is_copied() const {
    const bool is_odd = is_multiplied_in_pairs<S> && p.projection->in_channels % 2 != 0;
    return !std::is_same_v<S, X> || p.projection->input.stride[2] != 1 || is_odd;
  }

  int64_t copied_inputs() const {
    const int64_t inputs = p.projection->in_channels;
    return is_multiplied_in_pairs<S> ? inputs + inputs % 2 : inputs;
  }

  static X as_input(S x) {
    if constexpr (std::is_same_v<S, X>)
      return x;
    else
      return widen(x);
  }

  // Adds `count` pixels of row y of the layer's input, `step` columns apart, for projection to [pixel][channel].
  void add_pixels(int64_t y, int64_t col, int64_t count, int64_t step, V* to) {
    const sasa_tensor& x = p.projection->input;
    const S* from = row_of(x, y, col) + first_plane / p.heads * x.stride[0];
    const int64_t inputs = p.projection->in_channels, pixel = step * x.stride[4], channel = x.stride[2];
    const int64_t copied = copied_inputs();
    if (is_copied() && channel == 1)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < inputs; ++c) input[i * copied + c] = as_input(from[i * pixel + c]);
    else if (is_copied())
      for (int64_t c = 0; c < inputs; ++c)
        for (int64_t i = 0; i < count; ++i) input[i * copied + c] = as_input(from[i * pixel + c * channel]);
    if (is_copied() && copied > inputs)
      for (int64_t i = 0; i < count; ++i) input[i * copied + inputs] = X{};
    for (int64_t i = 0; i < count; ++i) {
      T* place = reinterpret_cast<T*>(to + i * p.channels);
      if constexpr (std::is_same_v<S, X>)
        pixels.add(is_copied() ? input + i * copied : from + i * pixel, place);
      else
        pixels.add(input + i * copied, place);
    }
  }

  // Prefetches a share, i of n, of the rows of keys and values that the next block will load.
  void prefetch_below(const Block& block, int64_t i, int64_t n) const {
    if (block.count == 0 || call.weights != nullptr) return;
    const int64_t x0 = cols * i / n, count = cols * (i + 1) / n - x0;
    const int64_t last = block.rows[block.count - 1].y;
    for (int64_t y = last + 1; y <= lesser(last + block.queries * p.rows.stride, p.rows.size - 1); ++y) {
      prefetch<W, S>(row_of(p.key, y, first_col), of_key, row_like(p.key, p.channels), x0, count);
      prefetch<W, S>(row_of(p.value, y, first_col), of_value, row_like(p.value, p.value_channels), x0, count);
    }
  }

  // Prefetches the block's queries in column x or, past the last column, those of the block below.
  void prefetch_queries(const Block& block, int64_t x, int64_t x0, int64_t x1) const {
    if (call.weights != nullptr) return;
    int64_t y = block.y;
    if (x >= x1) {
      x += x0 - x1;
      y += block.queries;
    }
    for (int r = 0; r < block.queries && x < x1 && y + r < p.rows.outputs; ++r)
      prefetch<W, S>(row_of(p.query, (y + r) * p.rows.stride + centre(p.rows), x * p.cols.stride + centre(p.cols)),
                     of_query, {1, p.channels, p.query.stride[4], p.query.stride[2]}, 0, 1);
  }

  // Packs `count` queries of each of `rows` rows, from row y and column x on, times the scale. In `to`, rows are
  // kColumns queries apart.
  void pack_queries(V* to, int64_t y, int rows, int64_t x, int64_t count) {
    const int64_t row_size = kColumns * p.channels, group = first_plane % p.heads / P;
    for (int r = 0; r < rows; ++r) {
      const int64_t pixel_y = (y + r) * p.rows.stride + centre(p.rows), pixel_x = x * p.cols.stride + centre(p.cols);
      if (call.weights == nullptr) {
        pack<W, S>(to + r * row_size, row_of(p.query, pixel_y, pixel_x), of_query,
                   {count, p.channels, p.query.stride[4] * p.cols.stride, p.query.stride[2]}, T(p.scale));
        continue;
      }
      add_pixels(pixel_y, pixel_x, count, p.cols.stride, to + r * row_size);
      if (!is_copied() && r + 1 < rows) continue;
      call.weights->project(pixels, group, 0, 0);
      pixels.count = 0;
    }
    if (call.weights != nullptr && p.scale != 1)
      for (int r = 0; r < rows; ++r)
        for (int64_t i = 0; i < count * p.channels; ++i) to[r * row_size + i] *= T(p.scale);
    queries = to;
    if constexpr (kPairs)
      for (int r = 0; r < rows; ++r) pair_channels(query_pairs + r * kColumns * pairs(), to + r * row_size, count);
  }

  // Points key_rows at the keys and values under column x and at their places in `weights`; returns the columns of taps
  // inside the image.
  Range point_at(const Block& block, int64_t x, V* weights) {
    const Range inside = taps_inside(p.cols, x);
    stored = is_masked() ? inside : Range{0, p.cols.kernel};
    const int64_t pixel = window_start(p.cols, x) + inside.first * p.cols.dilation - first_col;
    for (int i = 0; i < block.count; ++i) {
      const KeyRowIndex& row = block.rows[i];
      key_rows[i] = {keys.rows + row.place * keys.row_size + pixel * p.channels,
                     values.rows + row.place * values.row_size + pixel * p.value_channels, row.first, row.last,
                     weights + row.first * call.taps + row.tap * pitch() + inside.first - stored.first};
      if constexpr (kPairs) key_rows[i].pairs = pairs_of(key_rows[i].keys);
    }
    return inside;
  }

  // Points joint_rows at the keys that the queries in `columns` columns from x on see together, and zeroes their
  // weights.
  void point_jointly(const Block& block, int64_t x, int64_t columns) {
    const Range first = taps_inside(p.cols, x), last = taps_inside(p.cols, x + columns - 1);
    joint_taps = last.last + joint_steps(x, columns - 1) - first.first;
    point_at(block, x, joint);
    for (int i = 0; i < block.count; ++i)
      joint_rows[i] = {key_rows[i].keys, key_rows[i].values, 0, 1, joint + i * joint_taps};
    for (int64_t t = 0; t < block.count * joint_taps; ++t) joint[t] = V{};
  }

  // Taps between the windows of column x and of the `column`-th after it.
  int64_t joint_steps(int64_t x, int64_t column) const {
    return (window_start(p.cols, x + column) - window_start(p.cols, x)) / p.cols.dilation;
  }

  // Calls each(query, its weights of a row of keys, their places in the joint weights) for every such row of the
  // queries in column number `column` of point_jointly(x)'s; requires point_at(x + column).
  template <class F>
  void each_jointly(const Block& block, int64_t x, int64_t column, F each) const {
    const int64_t start = joint_steps(x, column) + taps_inside(p.cols, x + column).first - taps_inside(p.cols, x).first;
    for (int i = 0; i < block.count; ++i)
      for (int r = key_rows[i].first; r < key_rows[i].last; ++r)
        each(r, key_rows[i].weights + (r - key_rows[i].first) * weights_stride(block), i * joint_taps + start);
  }

  // Adds the weights of a column's queries, times `factor`, to the joint ones.
  void join(const Block& block, int64_t x, int64_t column, Range inside, const V* factor) {
    each_jointly(block, x, column, [&](int r, const V* weights, int64_t place) {
      for (int64_t t = 0; t < inside.last - inside.first; ++t) joint[place + t] += weights[t] * factor[r];
    });
  }

  // Between the weights of queries r and r + 1 for one row of keys: the row is `step` taps higher for the second.
  int64_t weights_stride(const Block& block) const { return call.taps - block.step * pitch(); }

  // x.k of the taps inside the image, where k are the keys or the values of key_rows; to their weights, moved by
  // `offset` vectors.
  template <class Add = MultiplyAdd>
  void products(const Block& block, Range inside, const V* x, int64_t x_stride, const V* KeyRow<V>::* source,
                int64_t channels, int64_t offset) {
    for (int i = 0; i < block.count; ++i) {
      const KeyRow<V>& row = key_rows[i];
      dots<V, Add>(x + row.first * x_stride, x_stride, row.last - row.first, row.*source, p.cols.dilation * channels,
                   int(inside.last - inside.first), channels, row.weights + offset, weights_stride(block));
    }
  }

  // Taps outside the image take part in the softmax as zeros, unless they are masked: then only those inside are
  // stored, so that a row of taps is `pitch` wide. The taps that take part are contiguous.
  bool is_masked() const { return p.border == SASA_MASK; }
  int64_t pitch() const { return stored.last - stored.first; }
  Range rows_taking(const Block& block, int r) const { return is_masked() ? block.inside[r] : Range{0, p.rows.kernel}; }
  Range taps_taking(const Block& block, int r) const {
    const Range rows = rows_taking(block, r);
    return {rows.first * pitch(), rows.last * pitch()};
  }

  // Logits of the queries of column x, and each query's maximum; requires point_at.
  void all_logits(const Block& block, Range inside, int64_t x, const V* q, int64_t q_stride, V* largest) {
    const V lowest = W::all(-T(__builtin_inf()));
    for (int r = 0; r < block.queries; ++r) {
      const Range rows = block.inside[r];
      whole[r] = rows.last - rows.first == p.rows.kernel && inside.last - inside.first == p.cols.kernel;
      if (!whole[r] && !is_masked())
        for (int64_t t = 0; t < call.taps; ++t) logits[r * call.taps + t] = V{};
    }
    if constexpr (kPairs)
      products<MultiplyAddPairs>(block, inside, query_pairs + (q - queries) / p.channels * pairs(), kColumns * pairs(),
                                 &KeyRow<V>::pairs, pairs(), 0);
    else
      products(block, inside, q, q_stride, &KeyRow<V>::keys, p.channels, 0);
    if (p.table.data != nullptr) add_table(block, x);
    if (p.row.data == nullptr && p.col.data == nullptr) {
      for (int r = 0; r < block.queries; ++r) {
        V most[4] = {lowest, lowest, lowest, lowest};  // four chains, to hide the latency
        const Range taps = taps_taking(block, r);
        const V* logit = logits + r * call.taps;
        for (int64_t t = taps.first; t < taps.last; ++t) most[t % 4] = W::max(logit[t], most[t % 4]);
        largest[r] = W::max(W::max(most[0], most[1]), W::max(most[2], most[3]));
      }
      return;
    }
    position_terms(block, x, q, q_stride);
    for (int r = 0; r < block.queries; ++r) {
      const Range rows = rows_taking(block, r);
      const V* by_row = row_terms + r * offsets(p.rows) + first_offset(p.rows, block.y + r);
      V most = lowest;
      for (int64_t dy = rows.first; dy < rows.last; ++dy) {
        const V row_term = by_row[dy];
        const V* col_term = col_terms + r * offsets(p.cols) + stored.first;
        V* logit = logits + r * call.taps + dy * pitch();
        for (int64_t dx = 0; dx < pitch(); ++dx) {
          logit[dx] += row_term + col_term[dx];
          most = W::max(logit[dx], most);
        }
      }
      largest[r] = most;
    }
  }

  // Replaces the logits of query r's taps that take part by exp(logit - shift); returns their sum.
  V exponentials(const Block& block, int r, V shift) {
    const Range taps = taps_taking(block, r);
    return exp_all<W, sizeof(S) == 2>(logits + r * call.taps + taps.first, taps.last - taps.first, shift);
  }

  // The rows of the table that query r of the block sees: [row of taps][column], at the first stored column of taps.
  V* table_rows(V* of, const Block& block, int r, int64_t x) const {
    return of + first_offset(p.rows, block.y + r) * call.table_columns + first_offset(p.cols, x) + stored.first;
  }

  // Adds the table to the logits of the taps that take part.
  void add_table(const Block& block, int64_t x) {
    for (int r = 0; r < block.queries; ++r) {
      const V* entries = table_rows(table, block, r, x);
      const Range rows = rows_taking(block, r);
      for (int64_t dy = rows.first; dy < rows.last; ++dy)
        for (int64_t dx = 0; dx < pitch(); ++dx)
          logits[r * call.taps + dy * pitch() + dx] += entries[dy * call.table_columns + dx];
    }
  }

  // The queries' products with the embeddings, over the channels that these cover: for rows at each query's offset, for
  // columns at that of the window's first tap, which is the same for all queries.
  void position_terms(const Block& block, int64_t x, const V* q, int64_t q_stride) {
    const auto terms = [&](const V* entries, const sasa_embedding& embedding, int64_t channels, int64_t taps, V* to,
                           int64_t to_stride) {
      const int64_t first = channels > 0 ? embedding.first : 0;
      dots<V>(q + first, q_stride, block.queries, entries, channels, int(taps), channels, to, to_stride);
    };
    // Offsets never grow from query to query.
    const int64_t first = first_offset(p.rows, block.y + block.queries - 1);
    const int64_t last = first_offset(p.rows, block.y) + p.rows.kernel;
    terms(row_table + first * call.row_channels, p.row, call.row_channels, last - first, row_terms + first,
          offsets(p.rows));
    terms(col_table + first_offset(p.cols, x) * call.col_channels, p.col, call.col_channels, p.cols.kernel, col_terms,
          offsets(p.cols));
  }
};

}  // namespace SASA_ISA
}  // namespace sasa
