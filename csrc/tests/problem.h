// Problems for the driver: every tensor an allocation of exactly its size, and the results by the equation as plain
// loops.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "../local_attention.h"

// How a tensor is laid out. Columns: neither the pixels of a row nor the channels are adjacent. Repeated: one number.
enum Format { kContiguous, kChannelsLast, kColumns, kRepeated };

// Channels that the embeddings cover. Halves: the first by row, the others by col. Parts: they overlap, or leave
// channels at either end without a position.
enum Embeddings { kNone, kFull, kHalves, kRowOnly, kColOnly, kParts };

struct Channels {
  int64_t first, count;
};

struct Case {
  int64_t batch, heads, channels, value_channels, height, width, kernel[2], stride[2], dilation[2];
  int border;
  Embeddings embeddings;
  Format format;
  int64_t in_channels;  // of the input of a layer that projects it to queries, keys and values; 0 for none
  int64_t pool;
  double scale = 0.75;
  bool table = false;

  int64_t offsets(int axis) const { return border == SASA_SHIFT ? 2 * kernel[axis] - 1 : kernel[axis]; }
  Channels row() const {
    switch (embeddings) {
      case kFull:
        return {0, channels};
      case kHalves:
      case kRowOnly:
        return {0, channels / 2};
      case kParts:
        return {1, channels - 1};
      default:
        return {0, 0};
    }
  }
  Channels col() const {
    switch (embeddings) {
      case kFull:
        return {0, channels};
      case kHalves:
      case kColOnly:
        return {channels / 2, channels - channels / 2};
      case kParts:
        return {channels / 3, channels / 2};
      default:
        return {0, 0};
    }
  }
};

inline sasa_axis axis(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int border) {
  if (border == SASA_VALID)
    return {size, (size - (kernel - 1) * dilation - 1) / stride + 1, kernel, stride, dilation, 0, 0};
  return {size, (size - 1) / stride + 1, kernel, stride, dilation, (kernel - 1) / 2 * dilation, border == SASA_SHIFT};
}

// Pixel under the first tap of a window: moved step by step until all taps are inside, if it is to be.
inline int64_t first_pixel(const sasa_axis& axis, int64_t output) {
  int64_t start = output * axis.stride - axis.before;
  while (axis.shifted && start < 0) start += axis.dilation;
  while (axis.shifted && start + (axis.kernel - 1) * axis.dilation >= axis.size) start -= axis.dilation;
  return start;
}

inline float to_float(uint16_t bits, int dtype) {
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
inline uint16_t from_float(float x, int dtype) {
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
  sasa_embedding embedding(int64_t first) const {
    sasa_embedding e{numel > 0 ? data.get() : nullptr, first, shape[1], {}};
    std::copy(stride.begin(), stride.end(), e.stride);
    return e;
  }
};

// Everything a call needs, and its results.
struct Call {
  sasa_problem problem{};
  sasa_projection projection{};
  Buffer input, weight, bias, query, key, value, row, col, table, lse, output, grad_output, grad_query, grad_key,
      grad_value, grad_row, grad_col, grad_table;

  Call(const Case& c, int dtype)
      : Call(c, dtype, axis(c.height, c.kernel[0], c.stride[0], c.dilation[0], c.border),
             axis(c.width, c.kernel[1], c.stride[1], c.dilation[1], c.border)) {}

  Call(const Case& c, int dtype, const sasa_axis& rows, const sasa_axis& cols)
      : input(dtype, {c.batch, 1, c.in_channels, c.height, c.width}, c.format),
        weight(dtype, {3 * c.heads * c.channels, c.in_channels}, kContiguous),
        bias(dtype, {3 * c.heads * c.channels}, kContiguous),
        query(c.in_channels > 0 ? SASA_FLOAT64 : dtype, {c.batch, c.heads, c.channels, c.height, c.width}, c.format),
        key(query.dtype, query.shape, c.format),
        value(query.dtype, {c.batch, c.heads, c.value_channels, c.height, c.width}, c.format),
        row(dtype, {c.heads, c.row().count, c.offsets(0)}, kContiguous),
        col(dtype, {c.heads, c.col().count, c.offsets(1)}, kContiguous),
        table(dtype, {c.table ? c.heads : 0, c.offsets(1), c.offsets(0)}, kContiguous),
        lse(dtype == SASA_FLOAT64 ? SASA_FLOAT64 : SASA_FLOAT32, {c.batch, c.heads, rows.outputs, cols.outputs},
            kContiguous),
        output(dtype,
               {c.batch, c.heads, c.value_channels, (rows.outputs + c.pool - 1) / c.pool,
                (cols.outputs + c.pool - 1) / c.pool},
               c.format),
        grad_output(dtype, output.shape, c.format == kColumns && c.embeddings != kNone ? kRepeated : c.format),
        grad_query(dtype, query.shape, c.format),
        grad_key(dtype, key.shape, c.format),
        grad_value(dtype, value.shape, c.format),
        grad_row(dtype, row.shape, kContiguous),
        grad_col(dtype, col.shape, kContiguous),
        grad_table(dtype, table.shape, kContiguous) {
    std::mt19937 random(7);
    for (Buffer* b : {&input, &weight, &bias, &query, &key, &value, &row, &col, &grad_output, &table})
      b->randomise(random);
    problem.dtype = dtype;
    problem.border = c.border;
    problem.threads = 1;
    problem.scale = c.scale;
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
    problem.row = row.embedding(c.row().first);
    problem.col = col.embedding(c.col().first);
    problem.table = table.embedding(0);
    problem.lse = lse.data.get();
    problem.pool = c.pool;
  }

  // Sets the queries, keys and values that belong to the input.
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
    for (Buffer* b : {&output, &lse, &grad_key, &grad_value, &grad_row, &grad_col, &grad_table}) b->spoil();
    grad_query.zero();
    problem.threads = threads;
    problem.capability = capability;
    const int status = forward();
    return status == SASA_OK ? backward() : status;
  }

  int forward() const {
    const sasa_tensor out = output.tensor();
    return sasa_forward(&problem, &out);
  }

  sasa_gradients gradients() const {
    return {grad_output.tensor(),
            grad_query.tensor(),
            grad_key.tensor(),
            grad_value.tensor(),
            grad_row.embedding(problem.row.first),
            grad_col.embedding(problem.col.first),
            grad_table.embedding(0)};
  }

  int backward() const {
    const sasa_gradients results = gradients();
    return sasa_backward(&problem, &results);
  }
};

// The equation and its derivatives, tap by tap, in float64. Gradients in the order query, key, value, row, col, table.
inline std::vector<std::vector<double>> expected(const Call& c) {
  const sasa_problem& p = c.problem;
  const Buffer* tensors[] = {&c.query, &c.key, &c.value, &c.row, &c.col, &c.table};
  std::vector<std::vector<double>> result = {std::vector<double>(size_t(c.output.numel))};
  for (const Buffer* b : tensors) result.emplace_back(size_t(b->numel));
  auto &out = result[0], &dq = result[1], &dk = result[2], &dv = result[3], &dr = result[4], &dc = result[5],
       &dt = result[6];
  const int64_t taps = p.rows.kernel * p.cols.kernel, row_first = p.row.first, col_first = p.col.first;
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
            ky = first_pixel(p.rows, y) + t / p.cols.kernel * p.rows.dilation;
            kx = first_pixel(p.cols, x) + t % p.cols.kernel * p.cols.dilation;
            return ky >= 0 && kx >= 0 && ky < p.rows.size && kx < p.cols.size;
          };
          // Entries of the embeddings: by tap, or by offset.
          const auto entry_y = [&](int64_t t) {
            if (!p.rows.shifted) return t / p.cols.kernel;
            return (first_pixel(p.rows, y) - qy) / p.rows.dilation + t / p.cols.kernel + p.rows.kernel - 1;
          };
          const auto entry_x = [&](int64_t t) {
            if (!p.cols.shifted) return t % p.cols.kernel;
            return (first_pixel(p.cols, x) - qx) / p.cols.dilation + t % p.cols.kernel + p.cols.kernel - 1;
          };
          int64_t ky, kx;
          for (int64_t t = 0; t < taps; ++t) {
            const bool inside = pixel(t, ky, kx);
            if (!inside && p.border == SASA_MASK) continue;
            const auto q = [&](int64_t d) { return c.query.get(c.query.at(b, n, d, qy, qx)); };
            double logit = 0;
            for (int64_t d = 0; inside && d < p.channels; ++d) logit += q(d) * c.key.get(c.key.at(b, n, d, ky, kx));
            for (int64_t d = 0; d < c.row.shape[1]; ++d)
              logit += q(row_first + d) * c.row.get(c.row.at(n, d, entry_y(t)));
            for (int64_t d = 0; d < c.col.shape[1]; ++d)
              logit += q(col_first + d) * c.col.get(c.col.at(n, d, entry_x(t)));
            logit *= p.scale;
            if (c.table.numel > 0) logit += c.table.get(c.table.at(n, entry_x(t), entry_y(t)));
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
            const double change = w[size_t(t)] * (dp[size_t(t)] - mean), ds = change * p.scale;
            if (c.table.numel > 0) dt[size_t(c.table.at(n, entry_x(t), entry_y(t)))] += change;
            const bool inside = pixel(t, ky, kx);
            const auto add = [&](int64_t d, const Buffer& k, std::vector<double>& dk, int64_t at) {
              const int64_t q = c.query.at(b, n, d, qy, qx);
              dk[size_t(at)] += ds * c.query.get(q);
              dq[size_t(q)] += ds * k.get(at);
            };
            for (int64_t d = 0; inside && d < p.channels; ++d) add(d, c.key, dk, c.key.at(b, n, d, ky, kx));
            for (int64_t d = 0; d < c.row.shape[1]; ++d) add(row_first + d, c.row, dr, c.row.at(n, d, entry_y(t)));
            for (int64_t d = 0; d < c.col.shape[1]; ++d) add(col_first + d, c.col, dc, c.col.at(n, d, entry_x(t)));
          }
        }
  return result;
}
