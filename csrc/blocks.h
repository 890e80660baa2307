// Attention inside blocks, shared by forward and backward. A lane is a block: its pixels, their values and weights are
// vectors, only the image's few channels are transposed, and any block size fills the lanes.
#pragma once

#include "block_attention.h"
#include "local_attention.h"
#include "parallel.h"
#include "window.h"

namespace sasa {
namespace SASA_ISA {

using W = Vector<float, kVectorBytes / 4>;
using V = W::V;
constexpr int P = W::P;

template <int N>
using Count = std::integral_constant<int, N>;

// Calls f(first, Count<number>) for all numbers below n, Most at a time, then one at a time.
template <int Most, class F>
SASA_INLINE void in_steps(int64_t n, F f) {
  int64_t i = 0;
  for (; i + Most <= n; i += Most) f(i, Count<Most>{});
  if constexpr (Most > 1)
    for (; i < n; ++i) f(i, Count<1>{});
}

// 2^x for x <= 0, within 2 units in the last place; 0 where the result is below the normal numbers; NaN stays NaN.
SASA_INLINE V exp2_of_negative(V x) {
  // Minimax polynomial on [-1/2, 1/2], relative error 1.1e-7.
  constexpr float kExp2[] = {1.0f, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
  x = W::max(W::all(-127.0f), x);
  const V shifted = x + Constants<float>::kRound;
  const V y = polynomial(x - (shifted - Constants<float>::kRound), kExp2);
  return y * bits_as<V>(bits_as<W::U>(shifted) << Constants<float>::kMantissa);  // as in exp_of_negative
}

// Blocks of equal size: all complete ones, or those cut by an edge of the images.
struct Region {
  int64_t row, col, rows, cols;  // in blocks
  int64_t height, width;         // of a block, in pixels
  int64_t groups;
};

// All blocks in groups of P. The groups of a task depend only on the sizes.
struct Grid {
  Region regions[4];
  int count = 0;
  int64_t rows, cols, groups = 0, together;

  explicit Grid(const sasa_blocks& p) : rows(ceil_div(p.height, p.block)), cols(ceil_div(p.width, p.block)) {
    const int64_t down = p.height / p.block, across = p.width / p.block;
    add(p, 0, 0, down, across, p.block, p.block);
    add(p, 0, across, down, cols - across, p.block, p.width % p.block);
    add(p, down, 0, rows - down, across, p.height % p.block, p.block);
    add(p, down, across, rows - down, cols - across, p.height % p.block, p.width % p.block);
    together = greater(kLeastTogether, ceil_div(groups, kMostTasks));
  }

  int64_t tasks() const { return ceil_div(groups, together); }

 private:
  static constexpr int64_t kMostTasks = 128, kLeastTogether = 4;

  void add(const sasa_blocks& p, int64_t row, int64_t col, int64_t down, int64_t across, int64_t height,
           int64_t width) {
    if (down == 0 || across == 0) return;
    const int64_t size = ceil_div(p.batch * down * across, P);
    regions[count++] = {row, col, down, across, height, width, size};
    groups += size;
  }
};

// Some blocks of one size, one per lane. Lanes past `count` repeat the last block.
struct Group {
  int64_t height, width, pixels;
  int count;
  int64_t input[P], gradient[P], output[P];  // where each block begins, in elements
  V mask;                                    // 0 for lanes that repeat

  Group(const sasa_blocks& p, const Grid& grid, int64_t index, const int64_t* gradient_stride) {
    const Region* region = grid.regions;
    while (index >= region->groups) index -= (region++)->groups;
    const int64_t blocks = p.batch * region->rows * region->cols;
    height = region->height;
    width = region->width;
    pixels = height * width;
    count = int(lesser(P, blocks - index * P));
    for (int lane = 0; lane < P; ++lane) {
      mask[lane] = lane < count ? 1.0f : 0.0f;
      const int64_t block = index * P + lesser(lane, count - 1), line = block / region->cols;
      const int64_t image = line / region->rows;
      const int64_t row = region->row + line % region->rows, col = region->col + block % region->cols;
      const auto start = [&](const int64_t* stride) {
        return image * stride[0] + row * p.block * stride[2] + col * p.block * stride[3];
      };
      input[lane] = start(p.stride);
      gradient[lane] = gradient_stride == nullptr ? 0 : start(gradient_stride);
      output[lane] = ((image * grid.rows + row) * grid.cols + col) * p.outputs;
    }
  }
};

// A group on one thread, one head at a time; C channels of the image.
template <int C>
struct Blocks {
  const sasa_blocks& p;
  const int64_t width;         // channels of a head
  V *values, *weights, *outs;  // [pixel][channel], [pixel][pixel], [pixel][channel]
  V* queries;                  // [pixel][C]: x F log2(e)
  V taint;                     // NaN in blocks that hold NaN or infinity

  Blocks(const sasa_blocks& problem, Workspace& w) : p(problem), width(p.outputs / p.heads) {
    const int64_t pixels = p.block * p.block;
    values = w.take<V>(pixels, width);
    weights = w.take<V>(pixels, pixels);
    outs = w.take<V>(pixels, width);
    queries = w.take<V>(pixels, int64_t(C));
  }

  int64_t place(const Group& group, int64_t pixel) const { return pixel / group.width * p.block + pixel % group.width; }

  // Pixels of the image in lanes: x [pixel][C].
  void load(const Group& group, V* x) {
    for (int64_t j = 0; j < group.pixels; ++j)
      for (int c = 0; c < C; ++c) {
        const float* from = p.input + j / group.width * p.stride[2] + j % group.width * p.stride[3] + c * p.stride[1];
        for (int lane = 0; lane < P; ++lane) x[j * C + c][lane] = from[group.input[lane]];
      }
  }

  // Outputs of a head, and its values, weights and queries.
  SASA_NOINLINE void attend(const Group& group, int64_t head, const V* x) {
    taint = V{};
    for (int64_t i = 0; i < group.pixels * C; ++i) taint += x[i] * 0.0f;
    for (int64_t j = 0; j < group.pixels; ++j) {
      const float* matrix = p.values + (place(group, j) * p.outputs + head * width) * C;
      for (int64_t c = 0; c < width; ++c) {
        V sum = x[j * C] * W::all(matrix[c * C]);
        SASA_UNROLL
        for (int d = 1; d < C; ++d) sum += x[j * C + d] * W::all(matrix[c * C + d]);
        values[j * width + c] = sum;
      }
    }
    V form[C * C];
    for (int i = 0; i < C * C; ++i) form[i] = W::all(p.form[head * C * C + i] * Constants<float>::kLog2e);
    in_steps<2>(group.pixels, [&](int64_t pixel, auto together) { attend_some<together>(group, x, form, pixel); });
  }

 private:
  // Softmax and weighted sum of T pixels.
  template <int T>
  SASA_INLINE void attend_some(const Group& group, const V* x, const V (&form)[C * C], int64_t pixel) {
    const int64_t n = group.pixels;
    V* w[T];
    V q[T][C], most[T], sum[T] = {};
    SASA_UNROLL
    for (int t = 0; t < T; ++t) {
      w[t] = weights + (pixel + t) * n;
      most[t] = W::all(-__builtin_inff());
      SASA_UNROLL
      for (int d = 0; d < C; ++d) {
        q[t][d] = x[(pixel + t) * C] * form[d];
        for (int e = 1; e < C; ++e) q[t][d] += x[(pixel + t) * C + e] * form[e * C + d];
        queries[(pixel + t) * C + d] = q[t][d];
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      SASA_UNROLL
      for (int t = 0; t < T; ++t) {
        V logit = q[t][0] * x[j * C];
        SASA_UNROLL
        for (int d = 1; d < C; ++d) logit += q[t][d] * x[j * C + d];
        most[t] = W::max(logit, most[t]);
        w[t][j] = logit;
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      SASA_UNROLL
      for (int t = 0; t < T; ++t) {
        w[t][j] = exp2_of_negative(w[t][j] - most[t]);
        sum[t] += w[t][j];
      }
    }
    SASA_UNROLL
    for (int t = 0; t < T; ++t) sum[t] = 1.0f / sum[t] + taint;
    for (int64_t j = 0; j < n; ++j) {
      SASA_UNROLL
      for (int t = 0; t < T; ++t) w[t][j] *= sum[t];
    }
    in_steps<4>(width, [&](int64_t first, auto channels) {
      constexpr int K = channels;
      V y[T][K] = {};
      for (int64_t j = 0; j < n; ++j) {
        SASA_UNROLL
        for (int k = 0; k < K; ++k) {
          SASA_UNROLL
          for (int t = 0; t < T; ++t) y[t][k] += w[t][j] * values[j * width + first + k];
        }
      }
      SASA_UNROLL
      for (int t = 0; t < T; ++t) {
        SASA_UNROLL
        for (int k = 0; k < K; ++k) outs[(pixel + t) * width + first + k] = y[t][k];
      }
    });
  }
};

}  // namespace SASA_ISA
}  // namespace sasa
