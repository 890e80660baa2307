// Runs the library by itself, to be built with sanitizers: a grid of sizes, windows, borders, embeddings, memory
// formats, dtypes and instruction sets, compared with the equation as plain loops; and arguments to be rejected.
//
//     driver [threads [step]]        every step-th case of the grid; exit status 0 if everything agrees
#include <stdio.h>
#include <stdlib.h>

#include <thread>

#include "problem.h"

int argument_failures();          // arguments.cpp
int block_failures(int threads);  // blocks.cpp

// Allocations fail as they do without sanitizers, and soon: no problem here needs much memory.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1:max_allocation_size_mb=64"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1:max_allocation_size_mb=64"; }

namespace {

bool fits_pool(int64_t kernel, int64_t stride, int64_t dilation) {
  return stride % dilation == 0 && stride / dilation <= kernel;
}

std::vector<Case> grid() {
  std::vector<Case> cases;
  const int64_t sizes[][2] = {{1, 1}, {3, 2}, {7, 7}, {9, 21}};
  const int64_t kernels[][2] = {{1, 1}, {3, 3}, {7, 7}, {2, 4}, {5, 9}};
  const int64_t steps[][4] = {{1, 1, 1, 1}, {2, 2, 1, 1}, {1, 1, 2, 3}, {3, 2, 2, 2}};  // stride, dilation
  const int64_t channels[][4] = {{1, 2, 3, 5}, {2, 8, 8, 8}, {3, 6, 16, 20}};           // batch, heads, D, Dv
  const Embeddings covers[] = {kNone, kHalves, kFull, kRowOnly, kNone, kColOnly, kParts};
  int i = 0;
  for (const auto& size : sizes)
    for (const auto& kernel : kernels)
      for (const auto& step : steps)
        for (const int border : {SASA_ZERO, SASA_MASK, SASA_VALID, SASA_SHIFT}) {
          const auto& c = channels[i % 3];  // every border meets every one of them
          ++i;
          if (border == SASA_SHIFT && (kernel[0] * step[2] > size[0] || kernel[1] * step[3] > size[1])) continue;
          if (border == SASA_VALID && ((kernel[0] - 1) * step[2] >= size[0] || (kernel[1] - 1) * step[3] >= size[1]))
            continue;
          const Format format = i % 5 == 0 ? kColumns : i % 3 == 0 ? kChannelsLast : kContiguous;
          cases.push_back({c[0],
                           c[1],
                           c[2],
                           c[3],
                           size[0],
                           size[1],
                           {kernel[0], kernel[1]},
                           {step[0], step[1]},
                           {step[2], step[3]},
                           border,
                           covers[i % 7],
                           format,
                           c[1] == 8 && i / 4 % 2 == 0 ? 5 : 0,
                           1});
          cases.back().table = i / 4 % 3 == 0;
          if (fits_pool(kernel[0], step[0], step[2]) && fits_pool(kernel[1], step[1], step[3])) {
            cases.push_back(Case(cases.back()));
            cases.back().pool = 2;
          }
        }
  return cases;
}

// Logits that differ by hundreds and thousands: weights below the smallest numbers.
std::vector<Case> large_logits() {
  std::vector<Case> cases;
  for (const int border : {SASA_ZERO, SASA_MASK})
    for (const Embeddings embeddings : {kNone, kHalves})
      for (const double scale : {40.0, 150.0, 600.0, 2500.0})
        cases.push_back({2, 6, 16, 8, 7, 9, {5, 5}, {1, 1}, {1, 1}, border, embeddings, kContiguous, 0, 1, scale});
  return cases;
}

// Windows and steps far beyond the image. The sanitizers limit a single allocation, so that workspaces which grow with
// them fail.
std::vector<Case> far_beyond() {
  std::vector<Case> cases;
  const int64_t far = int64_t(1) << 24, farthest = int64_t(1) << 30;
  for (const int border : {SASA_ZERO, SASA_MASK})
    for (const int64_t in_channels : {0, 5}) {
      const auto add = [&](int64_t kernel, int64_t stride, int64_t dilation, int64_t pool) {
        cases.push_back({2,
                         8,
                         6,
                         6,
                         4,
                         4,
                         {kernel, kernel},
                         {stride, stride},
                         {dilation, dilation},
                         border,
                         kHalves,
                         kChannelsLast,
                         in_channels,
                         pool});
      };
      add(7, 1, far, 1);
      add(7, far, 1, 1);
      add(7, far, far, 2);
      add(2, farthest, farthest, 1);
      add(63, 1, 1, 2);
      add(63, 3, farthest, 1);
    }
  return cases;
}

// Largest error of a result, relative to the largest number expected; or to 0.1, the order of the parts of sums that
// cancel.
double error_of(const Buffer& got, const std::vector<double>& want) {
  double error = 0, scale = 0.1;
  for (const double x : want) scale = std::max(scale, fabs(x));
  for (int64_t i = 0; i < got.numel; ++i) {
    const double difference = fabs(got.get(i) - want[size_t(i)]);
    if (!(difference <= error)) error = difference;  // NaN too
  }
  return error / scale;
}

// Number of instruction sets, from `first` on, with a wrong result.
int failures_of(const Case& c, int dtype, int threads, int first) {
  Call call(c, dtype);
  const auto want = expected(call);
  const Buffer* got[] = {&call.output,   &call.grad_query, &call.grad_key,  &call.grad_value,
                         &call.grad_row, &call.grad_col,   &call.grad_table};
  const double tolerances[] = {1e-4, 1e-11, 2e-2, 2e-3};                     // of logits of order 1
  const double tolerance = tolerances[dtype] * std::max(1.0, c.scale / 20);  // the error of exp grows with the logit
  int failures = 0;
  for (int capability = first; capability < sasa_capability_count(); ++capability) {
    const int status = call.run(threads, capability);
    bool agrees = true;
    for (size_t i = 0; agrees && i < 7; ++i) {
      const double error = error_of(*got[i], want[i]);
      agrees = status == SASA_OK && error < tolerance;
      if (agrees) continue;
      fprintf(stderr,
              "%s, dtype %d, %dx%d image, %dx%d window, border %d, embeddings %d, format %d, projected %d, pool %d, "
              "scale %g, table %d, result %d: status %d, error %g\n",
              sasa_capability_name(capability), dtype, int(c.height), int(c.width), int(c.kernel[0]), int(c.kernel[1]),
              c.border, c.embeddings, c.format, c.in_channels > 0, int(c.pool), c.scale, int(c.table), int(i), status,
              error);
    }
    failures += !agrees;
  }
  return failures;
}

// Gradients of a projection, in allocations of exactly their sizes; grad_input is aligned for vectors.
int linear_failures(int64_t pixels, int64_t outputs, int64_t inputs, int threads) {
  std::mt19937 random(3);
  const auto numbers = [&](int64_t count) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float& v : x) v = float(random() % 2001) / 1000 - 1;
    return x;
  };
  const std::vector<float> grad = numbers(pixels * outputs), x = numbers(pixels * inputs),
                           w = numbers(outputs * inputs);
  int failures = 0;
  for (int capability = 0; capability < sasa_capability_count(); ++capability) {
    std::vector<float> grad_w(w.size(), 1), grad_b(static_cast<size_t>(outputs), 1);
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, x.size() * sizeof(float)) != 0) return 1;
    float* grad_x = static_cast<float*>(memory);
    const sasa_linear problem = {threads,  capability, pixels, outputs,       inputs,       grad.data(),
                                 x.data(), w.data(),   grad_x, grad_w.data(), grad_b.data()};
    bool right = sasa_linear_gradients(&problem) == SASA_OK;
    const auto expect = [&](double got, double want) { right = right && fabs(got - want) < 1e-3; };
    for (int64_t p = 0; right && p < pixels; ++p)
      for (int64_t i = 0; i < inputs; ++i) {
        double sum = 0;
        for (int64_t o = 0; o < outputs; ++o) sum += double(grad[size_t(p * outputs + o)]) * w[size_t(o * inputs + i)];
        expect(grad_x[p * inputs + i], sum);
      }
    for (int64_t o = 0; right && o < outputs; ++o) {
      double bias = 1;
      for (int64_t p = 0; p < pixels; ++p) bias += grad[size_t(p * outputs + o)];
      expect(grad_b[size_t(o)], bias);
      for (int64_t i = 0; i < inputs; ++i) {
        double sum = 1;
        for (int64_t p = 0; p < pixels; ++p) sum += double(grad[size_t(p * outputs + o)]) * x[size_t(p * inputs + i)];
        expect(grad_w[size_t(o * inputs + i)], sum);
      }
    }
    free(memory);
    if (!right) fprintf(stderr, "linear %d, %d, %d: wrong\n", int(pixels), int(outputs), int(inputs));
    failures += !right;
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 2;
  const size_t step = argc > 2 ? size_t(atoi(argv[2])) : 1;
  const int capabilities = sasa_capability_count();
  const std::vector<Case> cases = grid();
  int failures = 0, problems = 0;
  for (size_t i = 0; i < cases.size(); i += step)
    for (const int dtype : {SASA_FLOAT32, SASA_FLOAT64, SASA_BFLOAT16, SASA_FLOAT16}) {
      failures += failures_of(cases[i], dtype, threads, 0);
      ++problems;
    }
  for (const Case& c : large_logits())
    for (const int dtype : {SASA_FLOAT32, SASA_FLOAT64}) {
      failures += failures_of(c, dtype, threads, 0);
      ++problems;
    }
  for (const Case& c : far_beyond()) {
    failures += failures_of(c, SASA_FLOAT32, threads, 0);
    ++problems;
  }
  failures += argument_failures() + block_failures(threads);
  // Two callers at once.
  int wrong[2] = {0, 0};
  const auto caller = [&](size_t index) {
    for (size_t i = index; i < cases.size(); i += 7 * step)
      wrong[index] += failures_of(cases[i], SASA_FLOAT32, threads, capabilities - 1);
  };
  std::thread second(caller, 1);
  caller(0);
  second.join();
  failures += wrong[0] + wrong[1];
  failures +=
      linear_failures(300, 97, 48, threads) + linear_failures(7, 12, 80, threads) + linear_failures(1, 1, 16, 1);
  printf("%d problems on %d instruction sets: %d failures\n", problems, capabilities, failures);
  return failures == 0 ? 0 : 1;
}
