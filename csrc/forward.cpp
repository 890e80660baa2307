// Forward: logits, softmax and weighted sum of a column of queries at a time; nothing of size taps x pixels exists.
#include "instances.h"
#include "parallel.h"

namespace sasa {
namespace SASA_ISA {
namespace {

template <class S, int P>
struct Forward {
  using G = Group<S, P>;
  using T = typename G::T;
  using W = typename G::W;
  using V = typename G::V;

  const Call<S, P>& call;
  const sasa_problem& p;
  const sasa_tensor& output;
  // How the work is cut: segments of rows and strips of columns. Any cut gives bitwise identical results: a query's
  // sums do not depend on what is computed alongside.
  int64_t segments, segment_rows, strips, strip_cols;

  Forward(const Call<S, P>& c, const sasa_tensor& o) : call(c), p(c.problem), output(o) {
    // Enough tasks that no thread waits long for the last one; but rows of keys at the cuts are packed twice.
    const int64_t rows = p.rows.outputs;
    const int64_t wanted = p.threads <= 1 ? 1 : call.weights != nullptr ? p.threads : 4 * int64_t(p.threads);
    segments = lesser(ceil_div(wanted, call.groups), greater(1, rows / 12));
    if (segments * call.groups < p.threads) segments = lesser(ceil_div(p.threads, call.groups), rows);
    segment_rows = ceil_div(ceil_div(rows, segments), p.pool) * p.pool;
    segments = ceil_div(rows, segment_rows);
    // Strips limit the memory of the rings to about this many bytes per thread.
    constexpr int64_t kBytes = 8 << 20;
    const int64_t column = pixels_under(p.rows, call.together) * (p.channels + p.value_channels) * int64_t(sizeof(V));
    const int64_t columns = greater(4 * lesser(p.cols.kernel * p.cols.dilation, p.cols.size), kBytes / column);
    strips = ceil_div(p.cols.outputs * p.cols.stride, greater(64, columns));
    strip_cols = ceil_div(ceil_div(p.cols.outputs, strips), p.pool) * p.pool;
    strips = ceil_div(p.cols.outputs, strip_cols);
  }

  struct Scratch {
    G group;
    V *queries, *outputs, *lse;  // [query][column][channel]

    Scratch(const Forward& f, int64_t first_plane, Workspace& w)
        : group(f.call, pixels_under(f.p.cols, f.strip_cols), first_plane, w) {
      queries = w.take<V>(kQueries * kColumns, f.p.channels);
      outputs = w.take<V>(kQueries * kColumns, f.p.value_channels);
      lse = w.take<V>(kQueries * kColumns);
    }
  };

  static void task(void* context, int64_t task, char* memory) {
    const Forward& f = *static_cast<const Forward*>(context);
    const int64_t strip = task % f.strips, segment = task / f.strips % f.segments;
    Workspace workspace{memory};
    Scratch scratch(f, task / f.strips / f.segments * P, workspace);
    f.run(scratch, segment * f.segment_rows, lesser((segment + 1) * f.segment_rows, f.p.rows.outputs),
          strip * f.strip_cols, lesser((strip + 1) * f.strip_cols, f.p.cols.outputs));
  }

  void run(Scratch& scratch, int64_t y0, int64_t y1, int64_t x0, int64_t x1) const {
    G& group = scratch.group;
    const Planes<P> of_output = group.planes_of(output);
    group.start(x0, x1);
    in_blocks(p.rows, y0, y1, call.together, [&](int64_t y, int queries) {
      const Block block(p.rows, y, queries, group.block_rows);
      group.hold(block, [](int64_t) {}, [](int64_t) {});
      for (int64_t x = x0; x < x1; x += kColumns) {
        const int64_t count = lesser(kColumns, x1 - x);
        group.pack_queries(scratch.queries, y, queries, x, count);
        for (int64_t i = 0; i < count; ++i) {
          group.prefetch_below(block, x - x0 + i, x1 - x0);
          group.prefetch_queries(block, x + i + kColumns, x0, x1);
          if (p.pool == 1)
            column(scratch, block, x + i, i);
          else if (i % p.pool == 0)
            pooled(scratch, block, x + i, i, lesser(p.pool, count - i));
        }
        for (int r = 0; r < queries; ++r) {
          if (r % p.pool == 0)
            unpack<W, S>(
                static_cast<S*>(output.data) + (y + r) / p.pool * output.stride[3] + x / p.pool * output.stride[4],
                scratch.outputs + r * kColumns * p.value_channels, of_output,
                {ceil_div(count, p.pool), p.value_channels, output.stride[4], output.stride[2]}, T(1));
          unpack<W, T>(static_cast<T*>(p.lse) + (y + r) * p.cols.outputs + x, scratch.lse + r * kColumns, group.of_lse,
                       {count, 1, 1, 1}, T(1));
        }
      }
    });
  }

  // Weights, up to a factor `factor`, of the block's queries in column x, which is column i of the scratch.
  Range weights(Scratch& scratch, const Block& block, int64_t x, int64_t i, V* factor) const {
    G& group = scratch.group;
    V largest[kQueries];
    const Range inside = group.point_at(block, x, group.logits);
    group.all_logits(block, inside, x, scratch.queries + i * p.channels, kColumns * p.channels, largest);
    for (int r = 0; r < block.queries; ++r) {
      const V sum = group.exponentials(block, r, largest[r]);
      factor[r] = 1 / sum;
      scratch.lse[r * kColumns + i] = largest[r] + log_of_sum<W>(sum);
    }
    return inside;
  }

  void column(Scratch& scratch, const Block& block, int64_t x, int64_t i) const {
    G& group = scratch.group;
    const int64_t E = p.value_channels;
    V factor[kQueries];
    const Range inside = weights(scratch, block, x, i, factor);
    V* out = scratch.outputs + i * E;
    weigh<V>(group.key_rows, block.count, &KeyRow<V>::values, p.cols.dilation * E, int(inside.last - inside.first),
             group.weights_stride(block), E, out, kColumns * E, block.queries);
    for (int r = 0; r < block.queries; ++r)
      for (int64_t c = 0; c < E; ++c) out[r * kColumns * E + c] *= factor[r];
  }

  // The mean of the block's queries in `columns` columns: their windows share most keys, so their weights are added
  // before they are multiplied by the values.
  void pooled(Scratch& scratch, const Block& block, int64_t x, int64_t i, int64_t columns) const {
    G& group = scratch.group;
    const int64_t E = p.value_channels;
    V factor[kQueries];
    group.point_jointly(block, x, columns);
    for (int64_t column = 0; column < columns; ++column) {
      const Range inside = weights(scratch, block, x + column, i + column, factor);
      for (int r = 0; r < block.queries; ++r) factor[r] /= T(block.queries * columns);
      group.join(block, x, column, inside, factor);
    }
    weigh_one<V>(group.joint_rows, block.count, &KeyRow<V>::values, p.cols.dilation * E, int(group.joint_taps), E,
                 scratch.outputs + i / p.pool * E);
  }
};

}  // namespace

int forward(const sasa_problem& problem, const sasa_tensor& output) {
  return for_instance(problem, [&](auto storage, auto lanes) {
    using S = decltype(storage);
    constexpr int P = decltype(lanes)::value;
    return with_weights<S, P>(problem, [&](const Call<S, P>& call) {
      Forward<S, P> f(call, output);
      Workspace size{nullptr};
      typename Forward<S, P>::Scratch(f, 0, size);
      return run_parallel(problem.threads, call.groups * f.segments * f.strips, size.used, Forward<S, P>::task, &f);
    });
  });
}

}  // namespace SASA_ISA
}  // namespace sasa
