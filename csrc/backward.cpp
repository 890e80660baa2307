// Backward: the weights are recomputed from the saved log-sum-exp, a column of queries at a time. With p the weights, s
// the logits and g the gradient of the output:
//
//     dv[p + t] += p_t g        dp_t = g.v[p + t]        ds_t = p_t (dp_t - sum over u of p_u dp_u)
//     dq = scale * sum over t of ds_t (k[p + t] + row + col)        dk[p + t] += scale * ds_t q        dtable_t += ds_t
// The gradients of keys and values are summed in rings like those of the keys and values, while queries move down. Rows
// of keys that several segments of queries see are summed afterwards, segment by segment. The cut into segments depends
// only on the sizes, so the order of the sums does not depend on the number of threads.
#include "cut.h"
#include "instances.h"
#include "parallel.h"

namespace sasa {
namespace SASA_ISA {
namespace {

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
  V* partial = nullptr;            // [group][segment]: gradients of row, col and table, [offset][channel covered]
  int64_t keys_size, values_size;  // vectors per row
  int64_t row_size, col_size;      // vectors of an embedding's gradient
  int64_t table_size, parts;       // of the table's; of all three

  Backward(const Call<S, P>& c, const sasa_gradients& g, const Cut& segments)
      : call(c),
        p(c.problem),
        grads(g),
        cut(segments),
        keys_size(p.cols.size * p.channels),
        values_size(p.cols.size * p.value_channels),
        row_size(offsets(p.rows) * c.row_channels),
        col_size(offsets(p.cols) * c.col_channels),
        table_size(offsets(p.rows) * c.table_columns),
        parts(row_size + col_size + table_size) {}

  struct Scratch {
    G group;
    Ring<V> grad_keys, grad_values;
    V *queries, *outputs, *lse;  // [query][column][channel]; outputs: the gradient
    V* grad_queries;
    V* grad_logits;          // [query][tap]
    V *row_sums, *col_sums;  // [query][kh], [query][kw] of grad_logits
    V *share, *joint;        // of a pooled output: each query's share of its gradient; gradients of the joint weights

    Scratch(const Backward& b, int64_t first_plane, Workspace& w) : group(b.call, b.p.cols.size, first_plane, w) {
      const sasa_problem& p = b.p;
      const int64_t span = group.keys.span;
      grad_keys = {w.take<V>(span, b.keys_size), span, b.keys_size};
      grad_values = {w.take<V>(span, b.values_size), span, b.values_size};
      queries = w.take<V>(kQueries * kColumns, p.channels);
      outputs = w.take<V>(kQueries * kColumns, p.value_channels);
      lse = w.take<V>(kQueries * kColumns);
      grad_queries = w.take<V>(kQueries * kColumns, p.channels);
      grad_logits = w.take<V>(kQueries, b.call.taps);
      row_sums = w.take<V>(kQueries, p.rows.kernel);
      col_sums = w.take<V>(kQueries, p.cols.kernel);
      share = w.take<V>(p.value_channels);
      joint = group.take_joint(w);
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
    V* embeddings = partial + (index * cut.count + segment) * parts;
    for (int64_t i = 0; i < parts; ++i) embeddings[i] = V{};
    group.start(0, p.cols.outputs);
    group.first_col = 0;
    group.cols = p.cols.size;
    const int64_t y0 = segment * cut.rows, y1 = lesser(y0 + cut.rows, p.rows.outputs);
    in_blocks(p.rows, y0, y1, call.together, [&](int64_t y, int queries) {
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
          if (r % p.pool == 0)
            pack<W, S>(scratch.outputs + r * kColumns * p.value_channels,
                       G::row_of(grads.output, (y + r) / p.pool, x / p.pool), of_output,
                       {ceil_div(count, p.pool), p.value_channels, grads.output.stride[4], grads.output.stride[2]},
                       T(1));
          pack<W, T>(scratch.lse + r * kColumns, static_cast<const T*>(p.lse) + (y + r) * p.cols.outputs + x,
                     group.of_lse, {count, 1, 1, 1}, T(1));
        }
        for (int64_t i = 0; i < count; ++i) {
          group.prefetch_below(block, x + i, p.cols.outputs);
          group.prefetch_queries(block, x + i + kColumns, 0, p.cols.outputs);
          if (p.pool == 1)
            column(scratch, block, x + i, i, embeddings);
          else if (i % p.pool == 0)
            pooled(scratch, block, x + i, i, lesser(p.pool, count - i), embeddings);
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

  // The weights of the block's queries in column x, which is column i of the scratch.
  Range weights(Scratch& scratch, const Block& block, int64_t x, int64_t i) const {
    G& group = scratch.group;
    V largest[kQueries];
    const Range inside = group.point_at(block, x, group.logits);
    group.all_logits(block, inside, x, scratch.queries + i * p.channels, kColumns * p.channels, largest);
    for (int r = 0; r < block.queries; ++r) group.exponentials(block, r, scratch.lse[r * kColumns + i]);
    return inside;
  }

  // Sets the gradient of query r's weights outside the image: the output's gradient times the zeros there, NaN if it is
  // not finite.
  void outside(Scratch& scratch, int r, const V* g) const {
    if (scratch.group.whole[r] || scratch.group.is_masked()) return;
    V product{};
    for (int64_t c = 0; c < p.value_channels; ++c) product += g[c] * 0;
    for (int64_t t = 0; t < call.taps; ++t) scratch.grad_logits[r * call.taps + t] = product;
  }

  // The block's queries in column x, which is column i of the scratch.
  void column(Scratch& scratch, const Block& block, int64_t x, int64_t i, V* embeddings) const {
    G& group = scratch.group;
    const int64_t E = p.value_channels, g_stride = kColumns * E;
    const V* g = scratch.outputs + i * E;
    const Range inside = weights(scratch, block, x, i);
    for (int r = 0; r < block.queries; ++r) outside(scratch, r, g + r * g_stride);
    group.products(block, inside, g, g_stride, &KeyRow<V>::values, E, scratch.grad_logits - group.logits);
    for (int j = 0; j < block.count; ++j) {
      const KeyRow<V>& row = group.key_rows[j];
      spread<V>(g + row.first * g_stride, g_stride, row.last - row.first, value_gradients(scratch, row),
                p.cols.dilation * E, int(inside.last - inside.first), E, row.weights, group.weights_stride(block));
    }
    logits_backward(scratch, block, inside, x, i, embeddings);
  }

  // The block's queries in `columns` columns, whose mean is one output: they share its gradient, so its products with
  // the values, and the values' gradients, are computed once for all of them.
  void pooled(Scratch& scratch, const Block& block, int64_t x, int64_t i, int64_t columns, V* embeddings) const {
    G& group = scratch.group;
    const int64_t E = p.value_channels, stride = p.cols.dilation * E;
    V* g = scratch.share;
    for (int64_t c = 0; c < E; ++c) g[c] = scratch.outputs[i / p.pool * E + c] / T(block.queries * columns);
    const V ones[kQueries] = {V{} + 1, V{} + 1, V{} + 1};
    group.point_jointly(block, x, columns);
    const int64_t taps = group.joint_taps;
    for (int j = 0; j < block.count; ++j)
      dots<V>(g, 0, 1, group.joint_rows[j].values, stride, int(taps), E, scratch.joint + j * taps, 0);
    for (int64_t column = 0; column < columns; ++column) {
      const Range inside = weights(scratch, block, x + column, i + column);
      for (int r = 0; r < block.queries; ++r) outside(scratch, r, g);
      group.each_jointly(block, x, column, [&](int, const V* weight, int64_t place) {
        V* gradient = scratch.grad_logits + (weight - group.logits);
        for (int64_t t = 0; t < inside.last - inside.first; ++t) gradient[t] = scratch.joint[place + t];
      });
      group.join(block, x, column, inside, ones);
      logits_backward(scratch, block, inside, x + column, i + column, embeddings);
    }
    for (int j = 0; j < block.count; ++j)
      spread<V>(g, 0, 1, value_gradients(scratch, group.joint_rows[j]), stride, int(taps), E,
                group.joint_rows[j].weights, 0);
  }

  // Where the gradients of a row's values are.
  static V* value_gradients(const Scratch& scratch, const KeyRow<V>& row) {
    return scratch.grad_values.rows + (row.values - scratch.group.values.rows);
  }

  // From the gradients of the weights of a column's queries to those of the queries, the keys and the embeddings.
  void logits_backward(Scratch& scratch, const Block& block, Range inside, int64_t x, int64_t i, V* embeddings) const {
    G& group = scratch.group;
    const int64_t D = p.channels, taps = call.taps, q_stride = kColumns * D;
    const int taps_across = int(inside.last - inside.first);
    const V* q = scratch.queries + i * D;
    V* const weights = group.logits;
    V* const ds = scratch.grad_logits;
    for (int r = 0; r < block.queries; ++r) {
      const V* weight = weights + r * taps;
      V* d = ds + r * taps;
      const Range dys = group.rows_taking(block, r), dxs = group.stored, all = group.taps_taking(block, r);
      V means[4] = {};  // four chains, to hide the latency
      int64_t t = all.first;
      for (; t + 4 <= all.last; t += 4)
        for (int j = 0; j < 4; ++j) means[j] += weight[t + j] * d[t + j];
      for (; t < all.last; ++t) means[0] += weight[t] * d[t];
      const V mean = (means[0] + means[1]) + (means[2] + means[3]);
      V *rows = scratch.row_sums + r * p.rows.kernel, *cols = scratch.col_sums + r * p.cols.kernel;
      const V none = mean * 0;  // of masked taps, whose weight is 0: NaN where the mean is not finite
      const bool all_rows = dys.last - dys.first == p.rows.kernel, all_cols = group.pitch() == p.cols.kernel;
      for (int64_t dx = 0; dx < p.cols.kernel; ++dx)
        cols[dx] = all_rows && dxs.first <= dx && dx < dxs.last ? V{} : none;
      for (int64_t dy = 0; dy < p.rows.kernel; ++dy) rows[dy] = none;
      for (int64_t dy = dys.first; dy < dys.last; ++dy) {
        V sum = all_cols ? V{} : none;
        for (int64_t dx = dxs.first; dx < dxs.last; ++dx) {
          const int64_t tap = dy * group.pitch() + dx - dxs.first;
          const V change = weight[tap] * (d[tap] - mean);
          d[tap] = change;
          sum += change;
          cols[dx] += change;
        }
        rows[dy] = sum;
      }
    }
    if (table_size > 0) table_gradients(group, block, x, ds, embeddings + row_size + col_size);
    for (int j = 0; j < block.count; ++j) {
      KeyRow<V>& row = group.key_rows[j];
      V* dk = scratch.grad_keys.rows + (row.keys - group.keys.rows);
      row.weights += ds - weights;
      spread<V>(q + row.first * q_stride, q_stride, row.last - row.first, dk, p.cols.dilation * D, taps_across, D,
                row.weights, group.weights_stride(block));
    }
    V* dq = scratch.grad_queries + i * D;
    weigh<V>(group.key_rows, block.count, &KeyRow<V>::keys, p.cols.dilation * D, taps_across,
             group.weights_stride(block), D, dq, q_stride, block.queries);
    // If windows are moved, each query's rows begin at their own offset, their columns all at the same.
    const auto embedding = [&](const sasa_embedding& covers, int64_t channels, const V* entries, int64_t kernel,
                               int64_t offset, int r, int queries, const V* sums, V* gradient) {
      if (channels > 0)
        embedding_gradients(entries + offset * channels, channels, kernel, sums + r * kernel,
                            q + r * q_stride + covers.first, dq + r * q_stride + covers.first, q_stride, queries,
                            gradient + offset * channels);
    };
    const int together = p.rows.shifted ? 1 : block.queries;
    for (int r = 0; r < block.queries; r += together)
      embedding(p.row, call.row_channels, group.row_table, p.rows.kernel, first_offset(p.rows, block.y + r), r,
                together, scratch.row_sums, embeddings);
    embedding(p.col, call.col_channels, group.col_table, p.cols.kernel, first_offset(p.cols, x), 0, block.queries,
              scratch.col_sums, embeddings + row_size);
  }

  // Adds the gradients of the logits of column x to the table's.
  static void table_gradients(const G& group, const Block& block, int64_t x, const V* ds, V* gradient) {
    for (int r = 0; r < block.queries; ++r) {
      V* to = group.table_rows(gradient, block, r, x);
      const Range rows = group.rows_taking(block, r);
      for (int64_t dy = rows.first; dy < rows.last; ++dy)
        for (int64_t dx = 0; dx < group.pitch(); ++dx)
          to[dy * group.call.table_columns + dx] += ds[r * group.call.taps + dy * group.pitch() + dx];
    }
  }

  // One embedding's part of dq, and the embedding's own gradient, both over the channels that it covers.
  static void embedding_gradients(const V* table, int64_t channels, int64_t taps, const V* sums, const V* q, V* dq,
                                  int64_t q_stride, int queries, V* gradient) {
    for (int r = 0; r < queries; ++r)
      for (int64_t c = 0; c < channels; ++c) {
        V sum = dq[r * q_stride + c];
        for (int64_t t = 0; t < taps; ++t) sum += sums[r * taps + t] * table[t * channels + c];
        dq[r * q_stride + c] = sum;
      }
    spread<V>(q, q_stride, queries, gradient, channels, int(taps), channels, sums, taps);
  }

  // Row of keys y, unless exactly one segment saw it: the sum over all segments that did.
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

  // One offset and channel of an embedding's gradient, for all heads: the sum over groups, segments and lanes, in that
  // order.
  static void embedding_task(void* context, int64_t task, char* memory) {
    const Backward& b = *static_cast<const Backward*>(context);
    const sasa_problem& p = b.p;
    const bool is_row = task < b.row_size, is_table = task >= b.row_size + b.col_size;
    const sasa_embedding& to = is_row ? b.grads.row : is_table ? b.grads.table : b.grads.col;
    if (to.data == nullptr) return;
    const int64_t before = is_row ? 0 : is_table ? b.row_size + b.col_size : b.row_size;
    const int64_t place = task - before;  // [offset][channel covered]
    double* sums = reinterpret_cast<double*>(memory);
    for (int64_t n = 0; n < p.heads; ++n) sums[n] = 0;
    for (int64_t index = 0; index < b.call.groups; ++index)
      for (int64_t segment = 0; segment < b.cut.count; ++segment) {
        const V part = b.partial[(index * b.cut.count + segment) * b.parts + task];
        for (int64_t lane = 0; lane < lesser(P, b.call.planes - index * P); ++lane)
          sums[(index * P + lane) % p.heads] += part[lane];
      }
    for (int64_t n = 0; n < p.heads; ++n)
      narrow(T(sums[n]),
             static_cast<S*>(
                 to.data)[n * to.stride[0] + place % to.channels * to.stride[1] + place / to.channels * to.stride[2]]);
  }

  // Memory shared by the tasks of a phase and read by the next.
  void take_shared(Workspace& w) {
    shared = w.take<V>(call.groups, cut.count, cut.most_shared, keys_size + values_size);
    partial = w.take<V>(call.groups, cut.count, parts);
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
    if (status == SASA_OK && (grads.row.data || grads.col.data || grads.table.data))
      status = run_parallel(p.threads, parts, size_t(p.heads) * sizeof(double), embedding_task, this);
    return status;
  }
};

}  // namespace

int backward(const sasa_problem& problem, const sasa_gradients& gradients) {
  return for_instance(problem, [&](auto storage, auto lanes) {
    using S = decltype(storage);
    constexpr int P = decltype(lanes)::value;
    // Enough segments for many threads, but with enough rows each that most rows of keys are not shared.
    const int64_t groups = ceil_div(problem.batch * problem.heads, P);
    const sasa_axis& rows = problem.rows;
    const int64_t wanted = lesser(ceil_div(16, groups), greater(1, rows.outputs / 4));
    const int64_t segment_rows = ceil_div(ceil_div(rows.outputs, wanted), problem.pool) * problem.pool;
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
