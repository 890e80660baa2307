// Attention inside blocks, forward and backward: see blocks.h.
#include "blocks.h"

namespace sasa {
namespace SASA_ISA {
namespace {

// Calls run(Count<channels>).
template <class F>
int for_channels(const sasa_blocks& p, F run) {
  switch (p.channels) {
    case 1:
      return run(Count<1>{});
    case 2:
      return run(Count<2>{});
    case 3:
      return run(Count<3>{});
    case 4:
      return run(Count<4>{});
    default:
      return SASA_BAD_ARGUMENT;
  }
}

SASA_INLINE float sum_of_lanes(V v) {
  float sum = 0;
  for (int lane = 0; lane < P; ++lane) sum += v[lane];
  return sum;
}

// --- forward ---

// Moments of the blocks' means and variances, weighted by their pixels: sum of means, of their squares, of variances.
constexpr int kMoments = 3;
using Wide = Vector<double, P>;

template <int C>
struct Forward {
  const sasa_blocks& p;
  const sasa_block_results& results;
  Grid grid;
  double* moments;  // [task][moment][output]

  struct Memory {
    Blocks<C> blocks;
    V* x;
    Wide::V* moments;  // [output][moment]

    Memory(const sasa_blocks& p, Workspace& w)
        : blocks(p, w),
          x(w.take<V>(p.block * p.block, int64_t(C))),
          moments(w.take<Wide::V>(p.outputs, int64_t(kMoments))) {}
  };

  static void task(void* context, int64_t index, char* memory) {
    const Forward& self = *static_cast<const Forward*>(context);
    const sasa_blocks& p = self.p;
    Workspace workspace{memory};
    Memory m(p, workspace);
    for (int64_t i = 0; i < p.outputs * kMoments; ++i) m.moments[i] = Wide::V{};
    const int64_t first = index * self.grid.together, last = lesser(first + self.grid.together, self.grid.groups);
    for (int64_t g = first; g < last; ++g) {
      const Group group(p, self.grid, g, nullptr);
      m.blocks.load(group, m.x);
      for (int64_t head = 0; head < p.heads; ++head) {
        m.blocks.attend(group, head, m.x);
        self.pool(group, head, m);
      }
    }
    double* to = self.moments + index * kMoments * p.outputs;
    for (int64_t o = 0; o < p.outputs; ++o)
      for (int k = 0; k < kMoments; ++k) {
        double sum = 0;
        for (int lane = 0; lane < P; ++lane) sum += m.moments[o * kMoments + k][lane];
        to[k * p.outputs + o] = sum;
      }
  }

  // The extreme and the moments of a head's outputs.
  SASA_NOINLINE void pool(const Group& group, int64_t head, Memory& m) const {
    const int64_t width = m.blocks.width, n = group.pixels;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t output = head * width + c;
      const V sign = W::all(p.sign[output]);
      const V* y = m.blocks.outs + c;
      V most = y[0] * sign, mean = y[0];
      for (int64_t i = 1; i < n; ++i) {
        most = W::max(most, y[i * width] * sign);
        mean += y[i * width];
      }
      mean *= 1.0f / float(n);
      V squares{};
      for (int64_t i = 0; i < n; ++i) {
        const V difference = y[i * width] - mean;
        squares += difference * difference;
      }
      // The maximum of two numbers may lose a NaN; the mean does not.
      const V extreme = (p.sign[output] == 0 ? y[0] : most * sign) + mean * 0.0f;
      for (int lane = 0; lane < group.count; ++lane) results.extreme[group.output[lane] + output] = extreme[lane];
      const Wide::V weight = __builtin_convertvector(group.mask, Wide::V) * double(n);
      const Wide::V means = __builtin_convertvector(mean, Wide::V) * weight;
      Wide::V* moments = m.moments + output * kMoments;
      moments[0] += means;
      moments[1] += means * __builtin_convertvector(mean, Wide::V);
      moments[2] += __builtin_convertvector(squares * group.mask, Wide::V);
    }
  }

  int run() {
    Workspace size{nullptr};
    Memory(p, size);
    moments = reinterpret_cast<double*>(allocate(size_t(grid.tasks() * kMoments * p.outputs) * sizeof(double)));
    if (moments == nullptr) return SASA_OUT_OF_MEMORY;
    const int status = run_parallel(p.threads, grid.tasks(), size.used, task, this);
    const double pixels = double(p.batch) * double(p.height) * double(p.width);
    for (int64_t o = 0; status == SASA_OK && o < p.outputs; ++o) {
      double sum[kMoments] = {};
      for (int64_t i = 0; i < grid.tasks(); ++i)
        for (int k = 0; k < kMoments; ++k) sum[k] += moments[(i * kMoments + k) * p.outputs + o];
      const double mean = sum[0] / pixels, variance = (sum[1] + sum[2]) / pixels - mean * mean;
      results.mean[o] = float(mean);
      results.variance[o] = float(variance < 0 ? 0 : variance);
    }
    release(reinterpret_cast<char*>(moments));
    return status;
  }
};

// --- backward ---

constexpr float kLn2 = 0x1.62e430p-1f;

// kImage: whether the gradient of the image is wanted, which a network's first layer has no use for.
template <int C, bool kImage>
struct Backward {
  const sasa_blocks& p;
  const sasa_block_gradients& gradients;
  Grid grid;
  float* sums;  // [task]: the gradients of form, then of values

  int64_t of_form() const { return p.heads * C * C; }
  int64_t parameters() const { return of_form() + p.block * p.block * p.outputs * C; }

  struct Memory {
    Blocks<C> blocks;
    int64_t pixels;
    V *x, *grad_x;       // [group][pixel][C]; the latter unused unless kImage
    V* grad_values;      // of a head, [place][channel][C]
    V grad_form[C * C];  // of a head
    V *delta, *dots;     // [pixel]; [2][pixel]

    Memory(const sasa_blocks& p, const Grid& grid, Workspace& w) : blocks(p, w), pixels(p.block * p.block) {
      x = w.take<V>(grid.together, pixels, int64_t(C));
      grad_x = w.take<V>(grid.together, pixels, int64_t(C));
      grad_values = w.take<V>(pixels, blocks.width, int64_t(C));
      delta = w.take<V>(pixels);
      dots = w.take<V>(int64_t(2), pixels);
    }
  };

  static void task(void* context, int64_t index, char* memory) {
    const Backward& self = *static_cast<const Backward*>(context);
    const sasa_blocks& p = self.p;
    Workspace workspace{memory};
    Memory m(p, self.grid, workspace);
    const int64_t first = index * self.grid.together, last = lesser(first + self.grid.together, self.grid.groups);
    const int64_t image = m.pixels * C;  // vectors of a group
    for (int64_t g = first; g < last; ++g) m.blocks.load(Group(p, self.grid, g, nullptr), m.x + (g - first) * image);
    for (int64_t i = 0; kImage && i < (last - first) * image; ++i) m.grad_x[i] = V{};
    float* to = self.sums + index * self.parameters();
    for (int64_t head = 0; head < p.heads; ++head) {
      for (V& sum : m.grad_form) sum = V{};
      for (int64_t i = 0; i < image * m.blocks.width; ++i) m.grad_values[i] = V{};
      for (int64_t g = first; g < last; ++g) {
        const Group group(p, self.grid, g, nullptr);
        self.head_of_group(group, head, m, m.x + (g - first) * image, m.grad_x + (g - first) * image);
      }
      for (int i = 0; i < C * C; ++i) to[head * C * C + i] = sum_of_lanes(m.grad_form[i]);
      for (int64_t place = 0; place < m.pixels; ++place)
        for (int64_t i = 0; i < m.blocks.width * C; ++i)
          to[self.of_form() + (place * p.outputs + head * m.blocks.width) * C + i] =
              sum_of_lanes(m.grad_values[place * m.blocks.width * C + i]);
    }
    for (int64_t g = first; kImage && g < last; ++g)
      self.store(Group(p, self.grid, g, self.gradients.stride), m.grad_x + (g - first) * image);
  }

  void store(const Group& group, const V* grad_x) const {
    const int64_t* stride = gradients.stride;
    for (int64_t j = 0; j < group.pixels; ++j)
      for (int c = 0; c < C; ++c) {
        float* to = gradients.input + j / group.width * stride[2] + j % group.width * stride[3] + c * stride[1];
        for (int lane = 0; lane < group.count; ++lane) to[group.gradient[lane]] = grad_x[j * C + c][lane];
      }
  }

  void head_of_group(const Group& group, int64_t head, Memory& m, const V* x, V* grad_x) const {
    m.blocks.attend(group, head, x);
    gradients_of_outputs(group, head, m);
    V form[C * C];
    for (int i = 0; i < C * C; ++i) form[i] = W::all(p.form[head * C * C + i]);
    in_steps<2>(group.pixels,
                [&](int64_t pixel, auto together) { through_weights<together>(group, m, x, form, pixel, grad_x); });
    in_steps<2>(group.pixels,
                [&](int64_t pixel, auto together) { through_values<together>(group, head, m, x, pixel, grad_x); });
  }

  // Outputs become their gradients; delta is the sum over channels of both.
  SASA_NOINLINE void gradients_of_outputs(const Group& group, int64_t head, Memory& m) const {
    const int64_t width = m.blocks.width, n = group.pixels;
    for (int64_t i = 0; i < n; ++i) m.delta[i] = V{};
    for (int64_t c = 0; c < width; ++c) {
      const int64_t output = head * width + c;
      const V sign = W::all(p.sign[output]), mean = W::all(p.mean[output]);
      const V slope = gradients.slope[output] * group.mask, offset = gradients.offset[output] * group.mask;
      V* y = m.blocks.outs + c;
      V most = y[0] * sign, left;  // the gradient not yet assigned to a pixel
      for (int64_t i = 1; i < n; ++i) most = W::max(most, y[i * width] * sign);
      for (int lane = 0; lane < P; ++lane) left[lane] = gradients.grad[group.output[lane] + output];
      left *= group.mask;
      for (int64_t i = 0; i < n; ++i) {
        const V out = y[i * width];
        const auto found = out * sign == most;
        const V grad = slope * (out - mean) + offset + (found ? left : V{});
        left = found ? V{} : left;
        m.delta[i] += grad * out;
        y[i * width] = grad;
      }
    }
  }

  // From the weights of T pixels to queries and keys.
  template <int T>
  SASA_NOINLINE void through_weights(const Group& group, Memory& m, const V* x, const V (&form)[C * C], int64_t pixel,
                                     V* grad_x) const {
    const int64_t width = m.blocks.width, n = group.pixels;
    in_steps<4>(width, [&](int64_t first, auto channels) {
      constexpr int K = channels;
      V grad[T][K];
      SASA_UNROLL
      for (int t = 0; t < T; ++t) {
        SASA_UNROLL
        for (int k = 0; k < K; ++k) {
          grad[t][k] = m.blocks.outs[(pixel + t) * width + first + k];
          SASA_IN_REGISTER(grad[t][k]);
        }
      }
      for (int64_t j = 0; j < n; ++j) {
        SASA_UNROLL
        for (int t = 0; t < T; ++t) {
          V sum = first == 0 ? V{} : m.dots[t * n + j];
          SASA_UNROLL
          for (int k = 0; k < K; ++k) sum += grad[t][k] * m.blocks.values[j * width + first + k];
          m.dots[t * n + j] = sum;
        }
      }
    });
    V query[T][C], grad_query[T][C] = {};
    for (int t = 0; t < T; ++t)
      for (int d = 0; d < C; ++d) query[t][d] = m.blocks.queries[(pixel + t) * C + d] * kLn2;
    for (int64_t j = 0; j < n; ++j) {
      V key[C];
      if constexpr (kImage) {
        SASA_UNROLL
        for (int d = 0; d < C; ++d) key[d] = grad_x[j * C + d];
      }
      SASA_UNROLL
      for (int t = 0; t < T; ++t) {
        const V grad = (m.dots[t * n + j] - m.delta[pixel + t]) * m.blocks.weights[(pixel + t) * n + j];
        SASA_UNROLL
        for (int d = 0; d < C; ++d) {
          grad_query[t][d] += grad * x[j * C + d];
          if constexpr (kImage) key[d] += grad * query[t][d];
        }
      }
      if constexpr (kImage) {
        SASA_UNROLL
        for (int d = 0; d < C; ++d) grad_x[j * C + d] = key[d];
      }
    }
    for (int t = 0; t < T; ++t)
      for (int e = 0; e < C; ++e)
        for (int d = 0; d < C; ++d) {
          m.grad_form[e * C + d] += x[(pixel + t) * C + e] * grad_query[t][d];
          if constexpr (kImage) grad_x[(pixel + t) * C + e] += form[e * C + d] * grad_query[t][d];
        }
  }

  // From the values of T pixels to their matrices and to the image.
  template <int T>
  SASA_NOINLINE void through_values(const Group& group, int64_t head, Memory& m, const V* x, int64_t pixel,
                                    V* grad_x) const {
    const int64_t width = m.blocks.width, n = group.pixels;
    in_steps<4>(width, [&](int64_t first, auto channels) {
      constexpr int K = channels;
      V grad[T][K] = {};
      for (int64_t i = 0; i < n; ++i) {
        SASA_UNROLL
        for (int k = 0; k < K; ++k) {
          SASA_UNROLL
          for (int t = 0; t < T; ++t)
            grad[t][k] += m.blocks.weights[i * n + pixel + t] * m.blocks.outs[i * width + first + k];
        }
      }
      for (int t = 0; t < T; ++t) {
        const int64_t place = m.blocks.place(group, pixel + t);
        const float* matrix = p.values + (place * p.outputs + head * width + first) * C;
        V* grad_matrix = m.grad_values + (place * width + first) * C;
        SASA_UNROLL
        for (int k = 0; k < K; ++k) {
          SASA_UNROLL
          for (int d = 0; d < C; ++d) {
            grad_matrix[k * C + d] += grad[t][k] * x[(pixel + t) * C + d];
            if constexpr (kImage) grad_x[(pixel + t) * C + d] += grad[t][k] * W::all(matrix[k * C + d]);
          }
        }
      }
    });
  }

  int run() {
    Workspace size{nullptr};
    Memory(p, grid, size);
    sums = reinterpret_cast<float*>(allocate(size_t(grid.tasks() * parameters()) * sizeof(float)));
    if (sums == nullptr) return SASA_OUT_OF_MEMORY;
    const int status = run_parallel(p.threads, grid.tasks(), size.used, task, this);
    for (int64_t i = 0; status == SASA_OK && i < parameters(); ++i) {
      double sum = 0;
      for (int64_t t = 0; t < grid.tasks(); ++t) sum += double(sums[t * parameters() + i]);
      (i < of_form() ? gradients.form[i] : gradients.values[i - of_form()]) = float(sum);
    }
    release(reinterpret_cast<char*>(sums));
    return status;
  }
};

}  // namespace

int blocks_forward(const sasa_blocks& p, const sasa_block_results& results) {
  return for_channels(p, [&](auto channels) { return Forward<channels>{p, results, Grid(p), nullptr}.run(); });
}

int blocks_backward(const sasa_blocks& p, const sasa_block_gradients& gradients) {
  return for_channels(p, [&](auto channels) {
    if (gradients.input == nullptr) return Backward<channels, false>{p, gradients, Grid(p), nullptr}.run();
    return Backward<channels, true>{p, gradients, Grid(p), nullptr}.run();
  });
}

}  // namespace SASA_ISA
}  // namespace sasa
