// Gradients of a projection y = W x + b w.r.t. its input, weight and bias, float32. The same products as in
// projection.h: numbers of one matrix times vectors of the other, with the sums in registers. Tuned for the sizes of a
// layer: hundreds of channels, many pixels.
#include "projection.h"

namespace sasa {
namespace SASA_ISA {
namespace {

constexpr int kOutputs = 6;           // outputs whose weight gradients are summed together
constexpr int64_t kPixelsRead = 256;  // pixels summed for some outputs before the next outputs

using W = Vector<float, kVectorBytes / 4>;
using V = W::V;
constexpr int64_t kInputs = kBlock * W::P;  // inputs computed together
constexpr int64_t kTask = 8 * kOutputs;     // outputs per task; a whole number of cache lines

struct Linear {
  const sasa_linear& p;
  V* weight;  // [inputs in blocks of kInputs][output][vector of block]

  int64_t blocks() const { return ceil_div(p.inputs, kInputs); }
  int64_t vectors(int64_t block) const { return lesser(kBlock, p.inputs / W::P - block * kBlock); }
  static constexpr int64_t kChunk = 96;  // pixels per task

  static void pack_task(void* context, int64_t block, char*) {
    const Linear& self = *static_cast<const Linear*>(context);
    const int64_t n = self.vectors(block);
    V* to = self.weight + block * kBlock * self.p.outputs;
    for (int64_t o = 0; o < self.p.outputs; ++o)
      memcpy(to + o * n, self.p.weight + o * self.p.inputs + block * kInputs, size_t(n) * sizeof(V));
  }

  template <int C>
  void input_gradient(const Pixels<float, float>& pixels, int64_t block) const {
    const float zeros[C * W::P] = {};
    const V* w = weight + block * kBlock * p.outputs;
    project_pixels<W, C, float>(pixels, p.outputs, reinterpret_cast<const float*>(w), zeros, block * kInputs);
  }

  static void input_task(void* context, int64_t task, char* memory) {
    const Linear& self = *static_cast<const Linear*>(context);
    const sasa_linear& p = self.p;
    Workspace workspace{memory};
    Pixels<float, float> pixels(kChunk, workspace);
    for (int64_t i = task * kChunk; i < lesser((task + 1) * kChunk, p.pixels); ++i)
      pixels.add(p.grad + i * p.outputs, p.grad_input + i * p.inputs);
    for (int64_t block = 0; block < self.blocks(); ++block) switch (self.vectors(block)) {
        case 1:
          self.input_gradient<1>(pixels, block);
          break;
        case 2:
          self.input_gradient<2>(pixels, block);
          break;
        case 3:
          self.input_gradient<3>(pixels, block);
          break;
        default:
          self.input_gradient<kBlock>(pixels, block);
      }
  }

  // Adds the weight gradients of O outputs and C vectors of inputs over some pixels.
  template <int O, int C>
  static SASA_NOINLINE void add_weights(const float* grad, int64_t outputs, const float* input, int64_t inputs,
                                        int64_t pixels, float* to) {
    V sum[O][C] = {};
    for (int64_t i = 0; i < pixels; ++i) {
      V x[C];
      SASA_UNROLL
      for (int c = 0; c < C; ++c) {
        memcpy(&x[c], input + i * inputs + c * W::P, sizeof(V));
        SASA_IN_REGISTER(x[c]);
      }
      SASA_UNROLL
      for (int o = 0; o < O; ++o) {
        V g = W::all(grad[i * outputs + o]);
        SASA_IN_REGISTER(g);
        SASA_UNROLL
        for (int c = 0; c < C; ++c) sum[o][c] = g * x[c] + sum[o][c];
      }
    }
    for (int o = 0; o < O; ++o)
      for (int c = 0; c < C; ++c) {
        V total;
        memcpy(&total, to + o * inputs + c * W::P, sizeof(V));
        total += sum[o][c];
        memcpy(to + o * inputs + c * W::P, &total, sizeof(V));
      }
  }

  template <int C>
  void weight_gradient(int64_t first, int64_t last, int64_t from, int64_t count, int64_t input) const {
    int64_t o = first;
    for (; o + kOutputs <= last; o += kOutputs)
      add_weights<kOutputs, C>(p.grad + from * p.outputs + o, p.outputs, p.input + from * p.inputs + input, p.inputs,
                               count, p.grad_weight + o * p.inputs + input);
    for (; o < last; ++o)
      add_weights<1, C>(p.grad + from * p.outputs + o, p.outputs, p.input + from * p.inputs + input, p.inputs, count,
                        p.grad_weight + o * p.inputs + input);
  }

  // Weight gradients of some outputs over all pixels, in order.
  static void weight_task(void* context, int64_t task, char*) {
    const Linear& self = *static_cast<const Linear*>(context);
    const sasa_linear& p = self.p;
    const int64_t first = task * kTask, last = lesser(first + kTask, p.outputs);
    for (int64_t from = 0; from < p.pixels; from += kPixelsRead) {
      const int64_t count = lesser(kPixelsRead, p.pixels - from);
      for (int64_t block = 0; block < self.blocks(); ++block) switch (self.vectors(block)) {
          case 1:
            self.weight_gradient<1>(first, last, from, count, block * kInputs);
            break;
          case 2:
            self.weight_gradient<2>(first, last, from, count, block * kInputs);
            break;
          case 3:
            self.weight_gradient<3>(first, last, from, count, block * kInputs);
            break;
          default:
            self.weight_gradient<kBlock>(first, last, from, count, block * kInputs);
        }
      if (p.grad_bias == nullptr) continue;
      float sum[kTask] = {};
      for (int64_t i = from; i < from + count; ++i)
        for (int64_t o = first; o < last; ++o) sum[o - first] += p.grad[i * p.outputs + o];
      for (int64_t o = first; o < last; ++o) p.grad_bias[o] += sum[o - first];
    }
  }

  int run() {
    weight = reinterpret_cast<V*>(allocate(size_t(p.outputs * p.inputs) * sizeof(float)));
    if (weight == nullptr) return SASA_OUT_OF_MEMORY;
    int status = run_parallel(p.threads, blocks(), 0, pack_task, this);
    Workspace size{nullptr};
    Pixels<float, float>(kChunk, size);
    if (status == SASA_OK) status = run_parallel(p.threads, ceil_div(p.pixels, kChunk), size.used, input_task, this);
    if (status == SASA_OK) status = run_parallel(p.threads, ceil_div(p.outputs, kTask), 0, weight_task, this);
    release(reinterpret_cast<char*>(weight));
    return status;
  }
};

}  // namespace

int linear_gradients(const sasa_linear& problem) {
  const bool aligned = (reinterpret_cast<uintptr_t>(problem.grad_input) % sizeof(V)) == 0;
  if (problem.inputs % W::P != 0 || !aligned) return SASA_UNSUPPORTED;
  return Linear{problem, nullptr}.run();
}

}  // namespace SASA_ISA
}  // namespace sasa
