// Attention inside blocks against plain loops in double, in allocations of exactly the sizes of the tensors.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../block_attention.h"
#include "../local_attention.h"

namespace {

using Numbers = std::vector<double>;

struct Case {
  int64_t batch, channels, height, width, outputs, heads, block;
  bool channels_last;
};

struct Tensors {
  const Case c;
  std::mt19937 random{5};
  int64_t rows = (c.height + c.block - 1) / c.block, cols = (c.width + c.block - 1) / c.block;
  int64_t pixels = c.batch * c.height * c.width, depth = c.outputs / c.heads;
  std::vector<float> x, form, values, sign, grad, slope, offset;

  explicit Tensors(const Case& given) : c(given) {
    x = numbers(pixels * c.channels);
    form = numbers(c.heads * c.channels * c.channels);
    values = numbers(c.block * c.block * c.outputs * c.channels);
    grad = numbers(c.batch * rows * cols * c.outputs);
    slope = numbers(c.outputs);
    offset = numbers(c.outputs);
    for (int64_t o = 0; o < c.outputs; ++o) sign.push_back(float(o % 3 - 1));
  }

  std::vector<float> numbers(int64_t count) {
    std::vector<float> y(static_cast<size_t>(count));
    for (float& v : y) v = float(random() % 2001) / 1000 - 1;
    return y;
  }

  void strides(int64_t (&to)[4]) const {
    const int64_t image = c.height * c.width;
    const int64_t last[] = {image * c.channels, 1, c.width * c.channels, c.channels};
    const int64_t first[] = {image * c.channels, image, c.width, 1};
    std::copy_n(c.channels_last ? last : first, 4, to);
  }
};

// Extreme, mean, variance; gradients of x, form and values.
struct Results {
  Numbers of[6];
};

Results expected(const Tensors& t) {
  const Case& c = t.c;
  Results r;
  Numbers &extreme = r.of[0], &mean = r.of[1], &variance = r.of[2];
  const size_t sizes[] = {t.grad.size(), t.sign.size(), t.sign.size(), t.x.size(), t.form.size(), t.values.size()};
  for (int i = 0; i < 6; ++i) r.of[i].assign(sizes[i], 0);
  Numbers squares(t.sign.size(), 0);
  int64_t stride[4];
  t.strides(stride);
  // Twice: the gradients need the mean.
  for (const bool gradients : {false, true}) {
    for (int64_t block = 0; block < c.batch * t.rows * t.cols; ++block) {
      const int64_t col = block % t.cols * c.block, row = block / t.cols % t.rows * c.block;
      const int64_t image = block / t.cols / t.rows;
      const int64_t height = std::min(c.block, c.height - row), width = std::min(c.block, c.width - col);
      const int64_t n = height * width;
      const auto at = [&](int64_t j, int64_t d) {
        return size_t(image * stride[0] + d * stride[1] + (row + j / width) * stride[2] +
                      (col + j % width) * stride[3]);
      };
      const auto matrix = [&](int64_t j, int64_t o, int64_t d) {
        return size_t(((j / width * c.block + j % width) * c.outputs + o) * c.channels + d);
      };
      for (int64_t h = 0; h < c.heads; ++h) {
        const auto form = [&](int64_t d, int64_t e) { return size_t((h * c.channels + d) * c.channels + e); };
        Numbers w(size_t(n * n)), v(size_t(n * t.depth)), y(v.size(), 0), grad(v.size());
        for (int64_t j = 0; j < n; ++j)
          for (int64_t k = 0; k < t.depth; ++k)
            for (int64_t d = 0; d < c.channels; ++d)
              v[size_t(j * t.depth + k)] += double(t.values[matrix(j, h * t.depth + k, d)]) * t.x[at(j, d)];
        for (int64_t i = 0; i < n; ++i) {
          double sum = 0;
          for (int64_t j = 0; j < n; ++j) {
            double logit = 0;
            for (int64_t d = 0; d < c.channels; ++d)
              for (int64_t e = 0; e < c.channels; ++e)
                logit += double(t.x[at(i, d)]) * t.form[form(d, e)] * t.x[at(j, e)];
            sum += w[size_t(i * n + j)] = exp(logit);
          }
          for (int64_t j = 0; j < n; ++j) {
            w[size_t(i * n + j)] /= sum;
            for (int64_t k = 0; k < t.depth; ++k)
              y[size_t(i * t.depth + k)] += w[size_t(i * n + j)] * v[size_t(j * t.depth + k)];
          }
        }
        for (int64_t k = 0; k < t.depth; ++k) {
          const size_t o = size_t(h * t.depth + k), out = size_t(block * c.outputs) + o;
          int64_t best = 0;
          for (int64_t i = 1; i < n; ++i)
            if (t.sign[o] * y[size_t(i * t.depth + k)] > t.sign[o] * y[size_t(best * t.depth + k)]) best = i;
          extreme[out] = y[size_t(best * t.depth + k)];
          for (int64_t i = 0; i < n; ++i) {
            const double z = y[size_t(i * t.depth + k)];
            if (!gradients) {
              mean[o] += z / double(t.pixels);
              squares[o] += z * z / double(t.pixels);
            }
            grad[size_t(i * t.depth + k)] = (i == best ? t.grad[out] : 0) + t.offset[o] + t.slope[o] * (z - mean[o]);
          }
        }
        if (!gradients) continue;
        for (int64_t i = 0; i < n; ++i) {
          Numbers dots(size_t(n), 0);
          double delta = 0;
          for (int64_t j = 0; j < n; ++j) {
            for (int64_t k = 0; k < t.depth; ++k) {
              const double g = grad[size_t(i * t.depth + k)];
              dots[size_t(j)] += g * v[size_t(j * t.depth + k)];
              for (int64_t d = 0; d < c.channels; ++d) {
                const size_t m = matrix(j, h * t.depth + k, d);
                r.of[5][m] += w[size_t(i * n + j)] * g * t.x[at(j, d)];
                r.of[3][at(j, d)] += w[size_t(i * n + j)] * g * t.values[m];
              }
            }
            delta += w[size_t(i * n + j)] * dots[size_t(j)];
          }
          for (int64_t j = 0; j < n; ++j) {
            const double g = w[size_t(i * n + j)] * (dots[size_t(j)] - delta);
            for (int64_t d = 0; d < c.channels; ++d)
              for (int64_t e = 0; e < c.channels; ++e) {
                r.of[4][form(d, e)] += g * t.x[at(i, d)] * t.x[at(j, e)];
                r.of[3][at(i, d)] += g * t.form[form(d, e)] * t.x[at(j, e)];
                r.of[3][at(j, e)] += g * t.form[form(d, e)] * t.x[at(i, d)];
              }
          }
        }
      }
    }
  }
  for (size_t o = 0; o < mean.size(); ++o) variance[o] = squares[o] - mean[o] * mean[o];
  return r;
}

bool agrees(const Tensors& t, const Results& want, int threads, int capability) {
  const Case& c = t.c;
  std::vector<float> got[6];
  for (int i = 0; i < 6; ++i) got[i].assign(want.of[i].size(), NAN);
  std::vector<float> mean(want.of[1].begin(), want.of[1].end());
  sasa_blocks problem = {threads, capability,    c.batch,         c.channels,    c.height,
                         c.width, c.outputs,     c.heads,         c.block,       t.x.data(),
                         {},      t.form.data(), t.values.data(), t.sign.data(), mean.data()};
  t.strides(problem.stride);
  const sasa_block_results results = {got[0].data(), got[1].data(), got[2].data()};
  sasa_block_gradients gradients = {t.grad.data(), t.slope.data(), t.offset.data(), got[3].data(), {},
                                    got[4].data(), got[5].data()};
  t.strides(gradients.stride);
  bool right =
      sasa_blocks_forward(&problem, &results) == SASA_OK && sasa_blocks_backward(&problem, &gradients) == SASA_OK;
  for (int i = 0; i < 6; ++i) {
    double largest = 0.1;
    for (const double x : want.of[i]) largest = std::max(largest, fabs(x));
    for (size_t k = 0; k < want.of[i].size(); ++k) right = right && fabs(got[i][k] - want.of[i][k]) < 1e-4 * largest;
  }
  gradients.input = nullptr;
  right = right && sasa_blocks_backward(&problem, &gradients) == SASA_OK;
  if (!right)
    fprintf(stderr, "%s: blocks of %d in %dx%dx%d: wrong\n", sasa_capability_name(capability), int(c.block),
            int(c.channels), int(c.height), int(c.width));
  return right;
}

// Sizes that must be rejected.
int accepted() {
  const Tensors t({1, 3, 5, 5, 4, 2, 4, false});
  const sasa_blocks good = {
      1, 0, 1, 3, 5, 5, 4, 2, 4, t.x.data(), {}, t.form.data(), t.values.data(), t.sign.data(), t.slope.data()};
  std::vector<float> numbers(100);
  const sasa_block_results results = {numbers.data(), numbers.data(), numbers.data()};
  const sasa_block_gradients gradients = {t.grad.data(),  t.slope.data(), t.offset.data(), nullptr, {},
                                          numbers.data(), numbers.data()};
  int failures = 0;
  const auto reject = [&](int64_t sasa_blocks::* field, std::initializer_list<int64_t> values) {
    for (const int64_t value : values) {
      sasa_blocks bad = good;
      bad.*field = value;
      failures += sasa_blocks_forward(&bad, &results) != SASA_BAD_ARGUMENT;
      failures += sasa_blocks_backward(&bad, &gradients) != SASA_BAD_ARGUMENT;
    }
  };
  for (const auto field : {&sasa_blocks::batch, &sasa_blocks::height, &sasa_blocks::width, &sasa_blocks::outputs})
    reject(field, {INT64_MIN, -1, 0, int64_t(1) << 31, INT64_MAX});
  reject(&sasa_blocks::channels, {-1, 0, SASA_MOST_BLOCK_CHANNELS + 1, INT64_MAX});
  reject(&sasa_blocks::block, {-1, 0, SASA_LARGEST_BLOCK + 1, INT64_MAX});
  reject(&sasa_blocks::heads, {-1, 0, 3, INT64_MAX});
  failures += sasa_blocks_forward(nullptr, &results) != SASA_BAD_ARGUMENT;
  failures += sasa_blocks_forward(&good, nullptr) != SASA_BAD_ARGUMENT;
  failures += sasa_blocks_backward(&good, nullptr) != SASA_BAD_ARGUMENT;
  if (failures > 0) fprintf(stderr, "blocks: %d bad arguments accepted\n", failures);
  return failures;
}

}  // namespace

int block_failures(int threads) {
  const Case cases[] = {
      {1, 1, 1, 1, 1, 1, 4, false}, {2, 3, 8, 8, 8, 2, 4, true},     {3, 3, 13, 18, 12, 2, 4, false},
      {1, 2, 3, 2, 3, 3, 4, false}, {2, 4, 5, 9, 10, 2, 3, true},    {1, 3, 9, 17, 4, 1, 8, false},
      {5, 3, 4, 3, 6, 2, 1, true},  {4, 1, 33, 35, 16, 2, 4, false},
  };
  int failures = accepted();
  for (const Case& c : cases) {
    const Tensors t(c);
    const Results want = expected(t);
    for (int capability = 0; capability < sasa_capability_count(); ++capability)
      failures += !agrees(t, want, threads, capability);
  }
  return failures;
}
