// Backward: the weights are computed again from the saved log-sum-exp, a column of queries at a time. With p the
// weights, s the logits and g the gradient of the output:
//
//     dv[p + t] += p_t g        dp_t = g.v[p + t]        ds_t = p_t (dp_t - sum over u of p_u dp_u)
//     dq = scale * sum over t of ds_t (k[p + t] + row + col)        dk[p + t] += scale * ds_t q
//
// The gradients of keys and values are summed in lanes while queries walk down, next to the keys and values. Rows of
// keys that more than one segment of queries sees are summed afterwards, segment by segment. The cut into segments
// depends on the sizes alone, so the sums have one order whatever the number of threads.
#include "instances.h"
#include "parallel.h"

namespace sasa {
namespace SASA_ISA {
namespace {

// Segments of query rows, and what they share.
struct Cut {
  int64_t count, rows;  // segments; rows of queries in each
  int32_t* seen_by;     // [row of keys]: number of segments that see it
  int32_t* place;       // [segment][row of keys]: among the rows the segment shares with others; -1 for none
  int64_t most_shared;  // rows that a segment shares, at most

  // `tables` holds (segments + 1) times axis.size numbers.
  Cut(const sasa_axis& axis, int64_t segment_rows, int32_t* tables)
      : count(ceil_div(axis.outputs, segment_rows)),
        rows(segment_rows),
        seen_by(tables),
        place(tables + axis.size),
        most_shared(0) {
    for (int64_t i = 0; i < axis.size; ++i) seen_by[i] = 0;
    for (int64_t i = 0; i < axis.size * count; ++i) place[i] = -1;
    for (int64_t y = 0; y < axis.outputs; ++y) {
      const Range taps = taps_inside(axis, y);
      for (int64_t t = taps.first; t < taps.last; ++t) {
        const int64_t key = y * axis.stride - axis.before + t * axis.dilation;
        int32_t& mark = place[y / rows * axis.size + key];
        if (mark < 0) ++seen_by[key];
        mark = 0;
      }
    }
    for (int64_t segment = 0; segment < count; ++segment) {
      int32_t places = 0;
      for (int64_t y = 0; y < axis.size; ++y) {
        int32_t& mark = place[segment * axis.size + y];
        if (mark == 0) mark = seen_by[y] > 1 ? places++ : -1;
      }
      most_shared = greater(most_shared, places);
    }
  }
};

template <class S, int P>
struct Backward {
  using G = Group<S, P>;
  using T = typename G::T;
  using W = typename G::W;
  using V = typename G::V;

  const Call<S, P>& call;
  const sasa_problem& p;
  const sasa_gradients& grads;
  const Cut& cut;
  V* shared = nullptr;             // [group][segment][place]: rows of key gradients, then of value gradients
  V* partial = nullptr;            // [group][segment][tap][channel]: embedding gradients, rows' taps first
  int64_t keys_size, values_size;  // vectors a row

  Backward(const Call<S, P>& c, const sasa_gradients& g, const Cut& segments)
      : call(c),
        p(c.problem),
        grads(g),
        cut(segments),
        keys_size(p.cols.size * p.channels),
        values_size(p.cols.size * p.value_channels) {}

  int64_t embedding_taps() const { return p.rows.kernel + p.cols.kernel; }

  struct Scratch {
    G group;
    Ring<V> grad_keys, grad_values;
    V *queries, *outputs, *lse;  // [query][column][channel]; outputs: the gradient
    V* grad_queries;
    V* grad_logits;          // [query][tap]
    V *row_sums, *col_sums;  // [query][kh], [query][kw] of grad_logits

    Scratch(const Backward& b, int64_t first_plane, Workspace& w) : group(b.call, b.p.cols.size, first_plane, w) {
      const sasa_problem& p = b.p;
      const int64_t span = group.keys.span;
      grad_keys = {w.take<V>(span * b.keys_size), span, b.keys_size};
      grad_values = {w.take<V>(span * b.values_size), span, b.values_size};
      queries = w.take<V>(kQueries * kColumns * p.channels);
      outputs = w.take<V>(kQueries * kColumns * p.value_channels);
      lse = w.take<V>(kQueries * kColumns);
      grad_queries = w.take<V>(kQueries * kColumns * p.channels);
      grad_logits = w.take<V>(kQueries * b.call.taps);
      row_sums = w.take<V>(kQueries * p.rows.kernel);
      col_sums = w.take<V>(kQueries * p.cols.kernel);
    }
  };

  static void task(void* context, int64_t task, char* memory) {
    const Backward& b = *static_cast<const Backward*>(context);
    Workspace workspace{memory};
    Scratch scratch(b, task / b.cut.count * P, workspace);
    b.run(scratch, task / b.cut.count, task % b.cut.count);
  }

  void run(Scratch& scratch, int64_t index, int64_t segment) const {
    G& group = scratch.group;
    const Planes<P> of_output = group.planes_of(grads.output), of_query = group.planes_of(grads.query);
    V* embeddings = partial + (index * cut.count + segment) * embedding_taps() * p.channels;
    for (int64_t i = 0; i < embedding_taps() * p.channels; ++i) embeddings[i] = V{};
    group.start(0, p.cols.outputs);
    group.first_col = 0;
    group.cols = p.cols.size;
    const int64_t y0 = segment * cut.rows, y1 = lesser(y0 + cut.rows, p.rows.outputs);
    in_blocks(y0, y1, call.together, [&](int64_t y, int queries) {
      const Block block(p.rows, y, queries, group.block_rows);
      group.hold(
          block, [&](int64_t row) { let_go(scratch, index, segment, row); },
          [&](int64_t row) {
            V *dk = scratch.grad_keys.row(row), *dv = scratch.grad_values.row(row);
            for (int64_t i = 0; i < keys_size; ++i) dk[i] = V{};
            for (int64_t i = 0; i < values_size; ++i) dv[i] = V{};
          });
      for (int64_t x = 0; x < p.cols.outputs; x += kColumns) {
        const int64_t count = lesser(kColumns, p.cols.outputs - x);
        group.pack_queries(scratch.queries, y, queries, x, count);
        for (int r = 0; r < queries; ++r) {
          pack<W, S>(scratch.outputs + r * kColumns * p.value_channels, G::row_of(grads.output, y + r, x), of_output,
                     {count, p.value_channels, grads.output.stride[4], grads.output.stride[2]}, T(1));
          pack<W, T>(scratch.lse + r * kColumns, static_cast<const T*>(p.lse) + (y + r) * p.cols.outputs + x,
                     group.of_lse, {count, 1, 1, 1}, T(1));
        }
        for (int64_t i = 0; i < count; ++i) {
          group.prefetch_below(block, x + i, p.cols.outputs);
          group.prefetch_queries(block, x + i + kColumns, 0, p.cols.outputs);
          column(scratch, block, x + i, i, embeddings);
        }
        for (int r = 0; r < queries; ++r) {
          S* to = static_cast<S*>(grads.query.data) +
                  ((y + r) * p.rows.stride + centre(p.rows)) * grads.query.stride[3] +
                  (x * p.cols.stride + centre(p.cols)) * grads.query.stride[4];
          unpack<W, S>(to, scratch.grad_queries + r * kColumns * p.channels, of_query,
                       {count, p.channels, grads.query.stride[4] * p.cols.stride, grads.query.stride[2]}, T(p.scale));
        }
      }
    });
    for (int64_t i = 0; i < group.keys.span; ++i)
      if (group.held[i] >= 0) let_go(scratch, index, segment, group.held[i]);
  }

  // No later query of the segment sees row y.
  void let_go(Scratch& scratch, int64_t index, int64_t segment, int64_t y) const {
    const V *dk = scratch.grad_keys.row(y), *dv = scratch.grad_values.row(y);
    if (cut.seen_by[y] == 1) {
      write_row(index, y, dk, dv);
      return;
    }
    V* to = shared_row(index, segment, y);
    for (int64_t i = 0; i < keys_size; ++i) to[i] = dk[i];
    for (int64_t i = 0; i < values_size; ++i) to[keys_size + i] = dv[i];
  }

  V* shared_row(int64_t index, int64_t segment, int64_t y) const {
    const int64_t place = cut.place[segment * p.rows.size + y];
    return shared + ((index * cut.count + segment) * cut.most_shared + place) * (keys_size + values_size);
  }

  void write_row(int64_t index, int64_t y, const V* dk, const V* dv) const {
    const auto write = [&](const sasa_tensor& x, const V* from, int64_t channels) {
      const Planes<P> planes(x.stride, p.heads, call.planes, index * P);
      unpack<W, S>(static_cast<S*>(x.data) + y * x.stride[3], from, planes,
                   {p.cols.size, channels, x.stride[4], x.stride[2]}, T(1));
    };
    write(grads.key, dk, p.channels);
    write(grads.value, dv, p.value_channels);
  }

  // The block's queries in column x, at place i of the scratch.
  void column(Scratch& scratch, const Block& block, int64_t x, int64_t i, V* embeddings) const {
    G& group = scratch.group;
    const int64_t D = p.channels, E = p.value_channels, taps = call.taps;
    const V *q = scratch.queries + i * D, *g = scratch.outputs + i * E;
    const int64_t q_stride = kColumns * D, g_stride = kColumns * E;
    V* const weights = group.logits;
    V* const ds = scratch.grad_logits;
    V largest[kQueries];
    const Range inside = group.point_at(block, x, weights);
    const int taps_across = int(inside.last - inside.first);
    group.all_logits(block, inside, q, q_stride, largest);
    for (int r = 0; r < block.queries; ++r) {
      exp_all<W>(weights + r * taps, taps, scratch.lse[r * kColumns + i]);
      if (group.whole[r]) continue;
      V outside{};  // the product of the gradient with the zeros outside: NaN where the gradient is not finite
      for (int64_t c = 0; c < E; ++c) outside += g[r * g_stride + c] * 0;
      for (int64_t t = 0; t < taps; ++t) ds[r * taps + t] = outside;
    }
    group.products(block, inside, g, g_stride, &KeyRow<V>::values, E, ds - weights);
    for (int r = 0; r < block.queries; ++r) {
      const V* weight = weights + r * taps;
      V* d = ds + r * taps;
      V means[4] = {};  // apart, so that one sum need not wait for the one before
      int64_t t = 0;
      for (; t + 4 <= taps; t += 4)
        for (int j = 0; j < 4; ++j) means[j] += weight[t + j] * d[t + j];
      for (; t < taps; ++t) means[0] += weight[t] * d[t];
      const V mean = (means[0] + means[1]) + (means[2] + means[3]);
      for (t = 0; t < taps; ++t) d[t] = weight[t] * (d[t] - mean);
      sum_rows_and_cols(d, scratch.row_sums + r * p.rows.kernel, scratch.col_sums + r * p.cols.kernel);
    }
    for (int j = 0; j < block.count; ++j) {
      KeyRow<V>& row = group.key_rows[j];
      V* dk = scratch.grad_keys.rows + (row.keys - group.keys.rows);
      V* dv = scratch.grad_values.rows + (row.values - group.values.rows);
      const int queries = row.last - row.first;
      spread<V>(g + row.first * g_stride, g_stride, queries, dv, p.cols.dilation * E, taps_across, E, row.weights,
                group.weights_stride(block));
      row.weights += ds - weights;
      spread<V>(q + row.first * q_stride, q_stride, queries, dk, p.cols.dilation * D, taps_across, D, row.weights,
                group.weights_stride(block));
    }
    V* dq = scratch.grad_queries + i * D;
    weigh<V>(group.key_rows, block.count, &KeyRow<V>::keys, p.cols.dilation * D, taps_across,
             group.weights_stride(block), D, dq, q_stride, block.queries);
    embedding_gradients(group.row_table, call.row_channels, p.rows.kernel, scratch.row_sums, q, dq, q_stride,
                        block.queries, p.row.data == nullptr ? nullptr : embeddings);
    embedding_gradients(group.col_table, call.col_channels, p.cols.kernel, scratch.col_sums, q, dq, q_stride,
                        block.queries, p.col.data == nullptr ? nullptr : embeddings + p.rows.kernel * D);
  }

  void sum_rows_and_cols(const V* d, V* rows, V* cols) const {
    for (int64_t dx = 0; dx < p.cols.kernel; ++dx) cols[dx] = V{};
    for (int64_t dy = 0; dy < p.rows.kernel; ++dy) {
      V sum{};
      for (int64_t dx = 0; dx < p.cols.kernel; ++dx) {
        sum += d[dy * p.cols.kernel + dx];
        cols[dx] += d[dy * p.cols.kernel + dx];
      }
      rows[dy] = sum;
    }
  }

  // One embedding's part of dq, and the embedding's own gradient.
  void embedding_gradients(const V* table, Range used, int64_t taps, const V* sums, const V* q, V* dq, int64_t q_stride,
                           int queries, V* gradient) const {
    if (gradient == nullptr) return;
    for (int r = 0; r < queries; ++r)
      for (int64_t c = used.first; c < used.last; ++c) {
        V sum = dq[r * q_stride + c];
        for (int64_t t = 0; t < taps; ++t) sum += sums[r * taps + t] * table[t * p.channels + c];
        dq[r * q_stride + c] = sum;
      }
    spread<V>(q, q_stride, queries, gradient, p.channels, int(taps), p.channels, sums, taps);
  }

  // Row of keys y that not exactly one segment saw: the sum over those that did.
  static void sum_task(void* context, int64_t task, char* memory) {
    const Backward& b = *static_cast<const Backward*>(context);
    const int64_t index = task / b.p.rows.size, y = task % b.p.rows.size, size = b.keys_size + b.values_size;
    if (b.cut.seen_by[y] == 1) return;
    V* sum = reinterpret_cast<V*>(memory);
    for (int64_t i = 0; i < size; ++i) sum[i] = V{};
    for (int64_t segment = 0; segment < b.cut.count; ++segment) {
      if (b.cut.place[segment * b.p.rows.size + y] < 0) continue;
      const V* part = b.shared_row(index, segment, y);
      for (int64_t i = 0; i < size; ++i) sum[i] += part[i];
    }
    b.write_row(index, y, sum, sum + b.keys_size);
  }

  // One tap and channel of an embedding's gradient, all heads: the sum over groups, segments and lanes, in this order.
  static void embedding_task(void* context, int64_t task, char* memory) {
    const Backward& b = *static_cast<const Backward*>(context);
    const sasa_problem& p = b.p;
    const int64_t tap = task / p.channels, channel = task % p.channels, parts = b.embedding_taps() * p.channels;
    const bool is_row = tap < p.rows.kernel;
    const sasa_embedding& to = is_row ? b.grads.row : b.grads.col;
    if (to.data == nullptr) return;
    double* sums = reinterpret_cast<double*>(memory);
    for (int64_t n = 0; n < p.heads; ++n) sums[n] = 0;
    for (int64_t index = 0; index < b.call.groups; ++index)
      for (int64_t segment = 0; segment < b.cut.count; ++segment) {
        const V part = b.partial[(index * b.cut.count + segment) * parts + task];
        for (int64_t lane = 0; lane < lesser(P, b.call.planes - index * P); ++lane)
          sums[(index * P + lane) % p.heads] += part[lane];
      }
    for (int64_t n = 0; n < p.heads; ++n)
      narrow(T(sums[n]), static_cast<S*>(to.data)[n * to.stride[0] + channel * to.stride[1] +
                                                  (is_row ? tap : tap - p.rows.kernel) * to.stride[2]]);
  }

  // Memory shared by the tasks of a phase and read by the next.
  void take_shared(Workspace& w) {
    shared = w.take<V>(call.groups * cut.count * cut.most_shared * (keys_size + values_size));
    partial = w.take<V>(call.groups * cut.count * embedding_taps() * p.channels);
  }

  int run_all() {
    Workspace needed{nullptr};
    take_shared(needed);
    char* memory = allocate(needed.used);
    if (memory == nullptr) return SASA_OUT_OF_MEMORY;
    Workspace shared_memory{memory};
    take_shared(shared_memory);
    const int status = run_phases();
    release(memory);
    return status;
  }

  int run_phases() {
    Workspace size{nullptr};
    Scratch(*this, 0, size);
    int status = run_parallel(p.threads, call.groups * cut.count, size.used, task, this);
    bool all_seen_once = true;
    for (int64_t y = 0; y < p.rows.size; ++y) all_seen_once = all_seen_once && cut.seen_by[y] == 1;
    if (status == SASA_OK && !all_seen_once)
      status = run_parallel(p.threads, call.groups * p.rows.size, size_t(keys_size + values_size) * sizeof(V), sum_task,
                            this);
    if (status == SASA_OK && (grads.row.data != nullptr || grads.col.data != nullptr))
      status = run_parallel(p.threads, embedding_taps() * p.channels, size_t(p.heads) * sizeof(double), embedding_task,
                            this);
    return status;
  }
};

}  // namespace

int backward(const sasa_problem& problem, const sasa_gradients& gradients) {
  return for_instance(problem, [&](auto storage, auto lanes) {
    using S = decltype(storage);
    constexpr int P = decltype(lanes)::value;
    // Segments enough for many threads, but not so low that most rows of keys are shared.
    const int64_t groups = ceil_div(problem.batch * problem.heads, P);
    const sasa_axis& rows = problem.rows;
    const int64_t segment_rows = ceil_div(rows.outputs, lesser(ceil_div(16, groups), greater(1, rows.outputs / 4)));
    const int64_t segments = ceil_div(rows.outputs, segment_rows);
    char* tables = allocate(size_t(rows.size) * size_t(segments + 1) * sizeof(int32_t));
    if (tables == nullptr) return int(SASA_OUT_OF_MEMORY);
    const Cut cut(rows, segment_rows, reinterpret_cast<int32_t*>(tables));
    const int status = with_weights<S, P>(
        problem, [&](const Call<S, P>& call) { return Backward<S, P>(call, gradients, cut).run_all(); });
    release(tables);
    return status;
  });
}

}  // namespace SASA_ISA
}  // namespace sasa
