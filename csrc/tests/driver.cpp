// Runs the library by itself, to be built with sanitizers: a grid of sizes, windows, borders, memory formats, dtypes
// and instruction sets, every tensor an allocation of exactly its size, the results against the equation as plain
// loops.
//
//     driver [threads [step]]        every step-th case; exit status 0 if everything agrees
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../local_attention.h"

namespace {

// How a tensor lies in memory. Columns: neither pixels of a row nor channels are next to each other. Repeated: one
// number.
enum Format { kContiguous, kChannelsLast, kColumns, kRepeated };

struct Case {
  int64_t batch, heads, channels, value_channels, height, width, kernel[2], stride[2], dilation[2];
  int border;
  bool embeddings;
  Format format;
  int64_t in_channels;  // of the input of a layer that projects it to queries, keys and values; 0 for none
  int64_t pool;
};

sasa_axis axis(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int border) {
  if (border == SASA_VALID)
    return {size, (size - (kernel - 1) * dilation - 1) / stride + 1, kernel, stride, dilation, 0};
  return {size, (size - 1) / stride + 1, kernel, stride, dilation, (kernel - 1) / 2 * dilation};
}

float to_float(uint16_t bits, int dtype) {
  if (dtype == SASA_BFLOAT16) {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double x = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  return float(bits & 0x8000 ? -x : x);
}

// A number of the dtype, close to x.
uint16_t from_float(float x, int dtype) {
  if (dtype == SASA_BFLOAT16) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return uint16_t(u >> 16);
  }
  const int sign = x < 0 ? 0x8000 : 0;
  int exponent;
  const double fraction = frexp(fabs(x), &exponent);  // in [0.5, 1)
  if (x == 0 || exponent < -13) return uint16_t(sign);
  return uint16_t(sign | (exponent + 14) << 10 | (int(fraction * 2048) & 1023));
}

// A tensor in an allocation of exactly its size.
struct Buffer {
  int dtype;
  std::vector<int64_t> shape, stride;
  int64_t numel = 1;
  std::unique_ptr<char[]> data;

  Buffer(int type, std::vector<int64_t> sizes, Format format) : dtype(type), shape(std::move(sizes)) {
    stride.assign(shape.size(), 0);
    std::vector<size_t> order;  // from the innermost dimension
    if (format == kContiguous)
      for (size_t i = shape.size(); i-- > 0;) order.push_back(i);
    if (format == kChannelsLast) order = {2, 1, 4, 3, 0};
    if (format == kColumns) order = {3, 4, 0, 2, 1};
    for (const size_t i : order) {
      stride[i] = numel;
      numel *= shape[i];
    }
    data.reset(new char[size_t(numel) * item()]);
    spoil();
  }
  void spoil() { memset(data.get(), 0xff, size_t(numel) * item()); }  // NaN
  size_t item() const { return dtype == SASA_FLOAT64 ? 8 : dtype == SASA_FLOAT32 ? 4 : 2; }
  double get(int64_t i) const {
    if (dtype == SASA_FLOAT64) return reinterpret_cast<const double*>(data.get())[i];
    if (dtype == SASA_FLOAT32) return reinterpret_cast<const float*>(data.get())[i];
    return to_float(reinterpret_cast<const uint16_t*>(data.get())[i], dtype);
  }
  void set(int64_t i, double x) {
    if (dtype == SASA_FLOAT64)
      reinterpret_cast<double*>(data.get())[i] = x;
    else if (dtype == SASA_FLOAT32)
      reinterpret_cast<float*>(data.get())[i] = float(x);
    else
      reinterpret_cast<uint16_t*>(data.get())[i] = from_float(float(x), dtype);
  }
  template <class... I>
  int64_t at(I... index) const {
    const int64_t indices[] = {index...};
    int64_t offset = 0;
    for (size_t i = 0; i < sizeof...(I); ++i) offset += indices[i] * stride[i];
    return offset;
  }
  void randomise(std::mt19937& random) {
    for (int64_t i = 0; i < numel; ++i) set(i, double(random() % 2001) / 1000 - 1);
  }
  void zero() { memset(data.get(), 0, size_t(numel) * item()); }
  sasa_tensor tensor() const {
    sasa_tensor t{data.get(), {}};
    std::copy(stride.begin(), stride.end(), t.stride);
    return t;
  }
  sasa_embedding embedding(bool present) const {
    sasa_embedding e{present ? data.get() : nullptr, {}};
    std::copy(stride.begin(), stride.end(), e.stride);
    return e;
  }
};

// Everything a call needs, and its results.
struct Call {
  sasa_problem problem{};
  sasa_projection projection{};
  Buffer input, weight, bias, query, key, value, row, col, lse, output, grad_output, grad_query, grad_key, grad_value,
      grad_row, grad_col;

  Call(const Case& c, int dtype, const sasa_axis& rows, const sasa_axis& cols)
      : input(dtype, {c.batch, 1, c.in_channels, c.height, c.width}, c.format),
        weight(dtype, {3 * c.heads * c.channels, c.in_channels}, kContiguous),
        bias(dtype, {3 * c.heads * c.channels}, kContiguous),
        query(c.in_channels > 0 ? SASA_FLOAT64 : dtype, {c.batch, c.heads, c.channels, c.height, c.width}, c.format),
        key(query.dtype, query.shape, c.format),
        value(query.dtype, {c.batch, c.heads, c.value_channels, c.height, c.width}, c.format),
        row(dtype, {c.heads, c.channels, rows.kernel}, kContiguous),
        col(dtype, {c.heads, c.channels, cols.kernel}, kContiguous),
        lse(dtype == SASA_FLOAT64 ? SASA_FLOAT64 : SASA_FLOAT32, {c.batch, c.heads, rows.outputs, cols.outputs},
            kContiguous),
        output(dtype,
               {c.batch, c.heads, c.value_channels, (rows.outputs + c.pool - 1) / c.pool,
                (cols.outputs + c.pool - 1) / c.pool},
               c.format),
        grad_output(dtype, output.shape, c.format == kColumns && c.embeddings ? kRepeated : c.format),
        grad_query(dtype, query.shape, c.format),
        grad_key(dtype, key.shape, c.format),
        grad_value(dtype, value.shape, c.format),
        grad_row(dtype, row.shape, kContiguous),
        grad_col(dtype, col.shape, kContiguous) {
    std::mt19937 random(7);
    for (Buffer* b : {&input, &weight, &bias, &query, &key, &value, &row, &col, &grad_output}) b->randomise(random);
    problem.dtype = dtype;
    problem.border = c.border;
    problem.scale = 0.75;
    problem.batch = c.batch;
    problem.heads = c.heads;
    problem.channels = c.channels;
    problem.value_channels = c.value_channels;
    problem.rows = rows;
    problem.cols = cols;
    if (c.in_channels > 0) {
      project();
      projection = {input.tensor(), c.in_channels, weight.data.get(), {c.in_channels, 1}, bias.data.get()};
      problem.projection = &projection;
    } else {
      problem.query = query.tensor();
      problem.key = key.tensor();
      problem.value = value.tensor();
    }
    problem.row = row.embedding(c.embeddings);
    problem.col = col.embedding(c.embeddings);
    problem.lse = lse.data.get();
    problem.pool = c.pool;
  }

  // Queries, keys and values that are right for the input.
  void project() {
    Buffer* const results[] = {&query, &key, &value};
    for (int64_t j = 0; j < 3; ++j)
      for (int64_t b = 0; b < problem.batch; ++b)
        for (int64_t row = 0; row < problem.heads * problem.channels; ++row)
          for (int64_t y = 0; y < problem.rows.size; ++y)
            for (int64_t x = 0; x < problem.cols.size; ++x) {
              const int64_t i = j * problem.heads * problem.channels + row;
              double sum = bias.get(i);
              for (int64_t c = 0; c < weight.shape[1]; ++c)
                sum += weight.get(weight.at(i, c)) * input.get(input.at(b, int64_t(0), c, y, x));
              results[j]->set(query.at(b, row / problem.channels, row % problem.channels, y, x), sum);
            }
  }

  int run(int threads, int capability) {
    for (Buffer* b : {&output, &lse, &grad_key, &grad_value, &grad_row, &grad_col}) b->spoil();
    grad_query.zero();
    problem.threads = threads;
    problem.capability = capability;
    const sasa_tensor out = output.tensor();
    const int status = sasa_forward(&problem, &out);
    if (status != SASA_OK) return status;
    const bool embeddings = problem.row.data != nullptr;
    const sasa_gradients gradients = {
        grad_output.tensor(),           grad_query.tensor(),           grad_key.tensor(), grad_value.tensor(),
        grad_row.embedding(embeddings), grad_col.embedding(embeddings)};
    return sasa_backward(&problem, &gradients);
  }
};

// The equation and its derivatives, tap by tap, in float64. Gradients in the order query, key, value, row, col.
std::vector<std::vector<double>> expected(const Call& c, bool embeddings) {
  const sasa_problem& p = c.problem;
  const Buffer* tensors[] = {&c.query, &c.key, &c.value, &c.row, &c.col};
  std::vector<std::vector<double>> result = {std::vector<double>(size_t(c.output.numel))};
  for (const Buffer* b : tensors) result.emplace_back(size_t(b->numel));
  auto &out = result[0], &dq = result[1], &dk = result[2], &dv = result[3], &dr = result[4], &dc = result[5];
  const int64_t taps = p.rows.kernel * p.cols.kernel;
  const int64_t centre_y = (p.rows.kernel - 1) / 2 * p.rows.dilation - p.rows.before;
  const int64_t centre_x = (p.cols.kernel - 1) / 2 * p.cols.dilation - p.cols.before;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t n = 0; n < p.heads; ++n)
      for (int64_t y = 0; y < p.rows.outputs; ++y)
        for (int64_t x = 0; x < p.cols.outputs; ++x) {
          const int64_t qy = y * p.rows.stride + centre_y, qx = x * p.cols.stride + centre_x;
          const int64_t pooled_y = y / p.pool, pooled_x = x / p.pool;
          const double share = 1.0 / double(std::min(p.pool, p.rows.outputs - pooled_y * p.pool) *
                                            std::min(p.pool, p.cols.outputs - pooled_x * p.pool));
          std::vector<double> w(size_t(taps), -INFINITY), dp(size_t(taps), 0.0);
          double largest = -INFINITY, sum = 0, mean = 0;
          const auto pixel = [&](int64_t t, int64_t& ky, int64_t& kx) {
            ky = y * p.rows.stride - p.rows.before + t / p.cols.kernel * p.rows.dilation;
            kx = x * p.cols.stride - p.cols.before + t % p.cols.kernel * p.cols.dilation;
            return ky >= 0 && kx >= 0 && ky < p.rows.size && kx < p.cols.size;
          };
          int64_t ky, kx;
          for (int64_t t = 0; t < taps; ++t) {
            const bool inside = pixel(t, ky, kx);
            if (!inside && p.border == SASA_MASK) continue;
            double logit = 0;
            for (int64_t d = 0; d < p.channels; ++d) {
              double k = inside ? c.key.get(c.key.at(b, n, d, ky, kx)) : 0;
              if (embeddings)
                k += c.row.get(c.row.at(n, d, t / p.cols.kernel)) + c.col.get(c.col.at(n, d, t % p.cols.kernel));
              logit += p.scale * c.query.get(c.query.at(b, n, d, qy, qx)) * k;
            }
            w[size_t(t)] = logit;
            largest = std::max(largest, logit);
          }
          for (double& v : w) sum += v = exp(v - largest);
          for (int64_t t = 0; t < taps; ++t) {
            const double weight = w[size_t(t)] /= sum;
            if (!pixel(t, ky, kx)) continue;
            for (int64_t e = 0; e < p.value_channels; ++e) {
              const double g = share * c.grad_output.get(c.grad_output.at(b, n, e, pooled_y, pooled_x));
              const int64_t v = c.value.at(b, n, e, ky, kx);
              out[size_t(c.output.at(b, n, e, pooled_y, pooled_x))] += share * weight * c.value.get(v);
              dv[size_t(v)] += weight * g;
              dp[size_t(t)] += g * c.value.get(v);
            }
            mean += weight * dp[size_t(t)];
          }
          for (int64_t t = 0; t < taps; ++t) {
            const double ds = w[size_t(t)] * (dp[size_t(t)] - mean) * p.scale;
            const bool inside = pixel(t, ky, kx);
            for (int64_t d = 0; d < p.channels; ++d) {
              const int64_t q = c.query.at(b, n, d, qy, qx), r = c.row.at(n, d, t / p.cols.kernel),
                            l = c.col.at(n, d, t % p.cols.kernel);
              double k = 0;
              if (inside) {
                k = c.key.get(c.key.at(b, n, d, ky, kx));
                dk[size_t(c.key.at(b, n, d, ky, kx))] += ds * c.query.get(q);
              }
              if (embeddings) {
                k += c.row.get(r) + c.col.get(l);
                dr[size_t(r)] += ds * c.query.get(q);
                dc[size_t(l)] += ds * c.query.get(q);
              }
              dq[size_t(q)] += ds * k;
            }
          }
        }
  return result;
}

bool fits_pool(int64_t kernel, int64_t stride, int64_t dilation) {
  return stride % dilation == 0 && stride / dilation <= kernel;
}

std::vector<Case> grid() {
  std::vector<Case> cases;
  const int64_t sizes[][2] = {{1, 1}, {3, 2}, {7, 7}, {9, 21}};
  const int64_t kernels[][2] = {{1, 1}, {3, 3}, {7, 7}, {2, 4}, {5, 9}};
  const int64_t steps[][4] = {{1, 1, 1, 1}, {2, 2, 1, 1}, {1, 1, 2, 3}, {3, 2, 2, 2}};  // stride, dilation
  const int64_t channels[][4] = {{1, 2, 3, 5}, {2, 8, 8, 8}, {3, 6, 16, 20}};           // batch, heads, D, Dv
  int i = 0;
  for (const auto& size : sizes)
    for (const auto& kernel : kernels)
      for (const auto& step : steps)
        for (const int border : {SASA_ZERO, SASA_MASK, SASA_VALID}) {
          const auto& c = channels[i++ % 3];
          if (border == SASA_VALID && ((kernel[0] - 1) * step[2] >= size[0] || (kernel[1] - 1) * step[3] >= size[1]))
            continue;
          const Format format = i % 5 == 0 ? kColumns : i % 2 == 0 ? kChannelsLast : kContiguous;
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
                           i % 4 != 0,
                           format,
                           c[1] == 8 && i / 3 % 2 == 0 ? 5 : 0,
                           1});
          if (fits_pool(kernel[0], step[0], step[2]) && fits_pool(kernel[1], step[1], step[3])) {
            cases.push_back(Case(cases.back()));
            cases.back().pool = 2;
          }
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
  Call call(c, dtype, axis(c.height, c.kernel[0], c.stride[0], c.dilation[0], c.border),
            axis(c.width, c.kernel[1], c.stride[1], c.dilation[1], c.border));
  const auto want = expected(call, c.embeddings);
  const Buffer* got[] = {&call.output,     &call.grad_query, &call.grad_key,
                         &call.grad_value, &call.grad_row,   &call.grad_col};
  const double tolerances[] = {1e-4, 1e-11, 2e-2, 2e-3};
  int failures = 0;
  for (int capability = first; capability < sasa_capability_count(); ++capability) {
    const int status = call.run(threads, capability);
    bool agrees = true;
    for (size_t i = 0; agrees && i < (c.embeddings ? 6 : 4); ++i) {
      const double error = error_of(*got[i], want[i]);
      agrees = status == SASA_OK && error < tolerances[dtype];
      if (agrees) continue;
      fprintf(
          stderr,
          "%s, dtype %d, %dx%d image, %dx%d window, border %d, format %d, projected %d, pool %d, result %d: status %d, "
          "error %g\n",
          sasa_capability_name(capability), dtype, int(c.height), int(c.width), int(c.kernel[0]), int(c.kernel[1]),
          c.border, c.format, c.in_channels > 0, int(c.pool), int(i), status, error);
    }
    failures += !agrees;
  }
  return failures;
}

// Gradients of a projection, in allocations of exactly their sizes but for the alignment of what vectors are written
// to.
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
