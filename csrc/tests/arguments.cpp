// Arguments that must be rejected rather than crash, overflow or be computed with.
#include <stdint.h>
#include <stdio.h>

#include "../block_attention.h"
#include "problem.h"

#define SASA_ISA driver
#include "../window.h"

namespace {

int failures = 0;

void expect(int64_t got, int64_t want, const char* what, int64_t value) {
  if (got == want) return;
  fprintf(stderr, "%s = %lld: %lld instead of %lld\n", what, static_cast<long long>(value), static_cast<long long>(got),
          static_cast<long long>(want));
  ++failures;
}

void expect_bad(const Call& call, const char* what, int64_t value) {
  expect(call.forward(), SASA_BAD_ARGUMENT, what, value);
  expect(call.backward(), SASA_BAD_ARGUMENT, what, value);
}

template <class Int>
struct Field {
  const char* name;
  Int* field;
  Int least;  // the least valid value
};

// Calls check(name, value) with each of the bad values in each field.
template <class Int, class F>
void spoil(std::vector<Field<Int>> fields, std::vector<Int> values, F check) {
  for (const auto& [name, field, least] : fields) {
    const Int good = *field;
    for (const Int value : values) {
      if (value == least) continue;
      *field = value;
      check(name, value);
    }
    *field = good;
  }
}

const int64_t two_to_31 = int64_t(1) << 31;

std::vector<int64_t> bad_counts() {
  return {INT64_MIN,        INT64_MIN + 1,          -two_to_31,       -1,       0, two_to_31, 2 * two_to_31 + 1,
          int64_t(1) << 60, (int64_t(1) << 60) + 1, int64_t(1) << 62, INT64_MAX};
}

Case case_of(int64_t in_channels) {
  return {2, 8, 6, 6, 5, 7, {3, 5}, {1, 1}, {1, 1}, SASA_ZERO, kHalves, kContiguous, in_channels, 1};
}

void sizes(Call& call) {
  sasa_problem& p = call.problem;
  std::vector<Field<int64_t>> fields = {
      {"batch", &p.batch, 1},
      {"heads", &p.heads, 1},
      {"channels", &p.channels, 1},
      {"value_channels", &p.value_channels, 1},
      {"pool", &p.pool, 1},
      {"row.first", &p.row.first, 0},
      {"row.channels", &p.row.channels, 1},
      {"col.first", &p.col.first, 0},
      {"col.channels", &p.col.channels, 1},
  };
  for (sasa_axis* axis : {&p.rows, &p.cols}) {
    fields.push_back({"size", &axis->size, 1});
    fields.push_back({"outputs", &axis->outputs, 1});
    fields.push_back({"kernel", &axis->kernel, 1});
    fields.push_back({"stride", &axis->stride, 1});
    fields.push_back({"dilation", &axis->dilation, 1});
    fields.push_back({"before", &axis->before, 0});
  }
  if (p.projection != nullptr) fields.push_back({"in_channels", &call.projection.in_channels, 1});
  spoil<int64_t>(fields, bad_counts(), [&](const char* name, int64_t value) { expect_bad(call, name, value); });
  spoil<int32_t>({{"dtype", &p.dtype, 0}}, {INT32_MIN, -1, 4, INT32_MAX},
                 [&](const char* name, int32_t value) { expect_bad(call, name, value); });
  spoil<int32_t>({{"border", &p.border, 0}}, {INT32_MIN, -1, 3, INT32_MAX},
                 [&](const char* name, int32_t value) { expect_bad(call, name, value); });
  spoil<int32_t>({{"threads", &p.threads, 1}}, {INT32_MIN, -1, 0},
                 [&](const char* name, int32_t value) { expect_bad(call, name, value); });
  spoil<int32_t>({{"capability", &p.capability, 0}}, {INT32_MIN, -1, sasa_capability_count(), INT32_MAX},
                 [&](const char* name, int32_t value) { expect_bad(call, name, value); });
}

// Each field is a count, but the products are too large.
void products() {
  Call call(case_of(0), SASA_FLOAT32);
  sasa_problem& p = call.problem;
  const sasa_problem good = p;
  const int64_t most = two_to_31 - 1;
  p.batch = p.heads = most;
  expect_bad(call, "batch and heads", most);
  p = good;
  p.heads = p.channels = most;
  expect_bad(call, "heads and channels", most);
  p = good;
  p.batch = p.value_channels = most;
  expect_bad(call, "batch and value_channels", most);
  p = good;
  p.rows.size = p.cols.size = most;
  expect_bad(call, "sizes", most);
  p = good;
  p.rows.kernel = p.rows.dilation = most;
  expect_bad(call, "kernel and dilation", most);
  p = good;
  p.cols.outputs = p.cols.stride = most;
  expect_bad(call, "outputs and stride", most);
  p = good;
  p.row.data = p.col.data = nullptr;
  expect(call.backward(), SASA_BAD_ARGUMENT, "gradients of no embedding", 0);
  // So many taps that the bytes of their logits do not fit in 64 bits.
  for (sasa_axis* axis : {&p.rows, &p.cols}) {
    axis->kernel = int64_t(1) << 30;
    axis->before = (axis->kernel - 1) / 2;
  }
  expect(call.forward(), SASA_OUT_OF_MEMORY, "kernels", p.rows.kernel);
  sasa_gradients gradients = call.gradients();
  gradients.row.data = gradients.col.data = nullptr;
  expect(sasa_backward(&p, &gradients), SASA_OUT_OF_MEMORY, "kernels", p.rows.kernel);

  Call projected(case_of(5), SASA_FLOAT32);
  projected.problem.heads = 6;
  expect_bad(projected, "heads to be projected", 6);
  projected.problem.heads = 8;
  projected.problem.value_channels = 7;
  expect_bad(projected, "value_channels to be projected", 7);
}

// Windows that are moved inside the image, and tables.
void shifted() {
  Case c = case_of(0);
  c.border = SASA_SHIFT;
  c.table = true;
  Call call(c, SASA_FLOAT32);
  sasa_problem& p = call.problem;
  expect(call.run(1, 0), SASA_OK, "a good problem that is shifted", 0);
  spoil<int32_t>({{"border of shifted axes", &p.border, SASA_SHIFT}}, {SASA_ZERO, SASA_MASK, SASA_VALID},
                 [&](const char* name, int32_t value) { expect_bad(call, name, value); });
  const auto check = [&](const char* name, int64_t value) { expect_bad(call, name, value); };
  for (sasa_axis* axis : {&p.rows, &p.cols}) {
    spoil<int64_t>({{"shifted", &axis->shifted, 1}}, {0}, check);
    spoil<int64_t>({{"size of a shifted axis", &axis->size, axis->size},
                    {"before of a shifted axis", &axis->before, axis->before}},
                   {0, axis->kernel - 1}, check);
  }
  spoil<int64_t>({{"table.first", &p.table.first, 0}, {"table.channels", &p.table.channels, p.table.channels}},
                 {-1, 1, INT64_MAX}, check);
  sasa_gradients g = call.gradients();
  g.table.channels = 1;
  expect(sasa_backward(&p, &g), SASA_BAD_ARGUMENT, "gradient table.channels", 1);
}

void gradients() {
  Call call(case_of(0), SASA_FLOAT32);
  sasa_gradients g = call.gradients();
  const auto check = [&](const char* name, int64_t value) {
    expect(sasa_backward(&call.problem, &g), SASA_BAD_ARGUMENT, name, value);
  };
  spoil<int64_t>({{"gradient row.channels", &g.row.channels, g.row.channels},
                  {"gradient col.channels", &g.col.channels, g.col.channels},
                  {"gradient row.first", &g.row.first, g.row.first},
                  {"gradient col.first", &g.col.first, g.col.first}},
                 {INT64_MIN, -1, 0, 1, 2, 6, INT64_MAX}, check);
}

void capabilities() {
  expect(sasa_can_pool(nullptr), 0, "can_pool(NULL)", 0);
  expect(sasa_can_project(nullptr), 0, "can_project(NULL)", 0);
  Call call(case_of(0), SASA_FLOAT32);
  sasa_problem& p = call.problem;
  expect(sasa_can_pool(&p), 1, "can_pool of a good problem", 1);
  expect(sasa_can_project(&p), 1, "can_project of a good problem", 1);
  const auto cannot_pool = [&](const char* name, int64_t value) { expect(sasa_can_pool(&p), 0, name, value); };
  const auto cannot_project = [&](const char* name, int64_t value) { expect(sasa_can_project(&p), 0, name, value); };
  for (sasa_axis* axis : {&p.rows, &p.cols})
    spoil<int64_t>({{"can_pool kernel", &axis->kernel, 1},
                    {"can_pool stride", &axis->stride, 1},
                    {"can_pool dilation", &axis->dilation, 1}},
                   bad_counts(), cannot_pool);
  spoil<int64_t>({{"can_project heads", &p.heads, 1}, {"can_project channels", &p.channels, 1}}, bad_counts(),
                 cannot_project);
  spoil<int32_t>({{"can_project dtype", &p.dtype, 0}}, {INT32_MIN, -1, 4, INT32_MAX}, cannot_project);
  spoil<int32_t>({{"can_project capability", &p.capability, 0}}, {INT32_MIN, -1, sasa_capability_count(), INT32_MAX},
                 cannot_project);
}

void linear() {
  alignas(64) float x[16] = {};
  sasa_linear p = {1, 0, 1, 1, 16, x, x, x, x, x, nullptr};
  const auto check = [&](const char* name, int64_t value) {
    expect(sasa_linear_gradients(&p), SASA_BAD_ARGUMENT, name, value);
  };
  spoil<int64_t>({{"linear pixels", &p.pixels, 0}, {"linear outputs", &p.outputs, 1}, {"linear inputs", &p.inputs, 1}},
                 {INT64_MIN, -1, int64_t(1) << 60, (int64_t(1) << 60) + 1, INT64_MAX}, check);
  spoil<int32_t>({{"linear capability", &p.capability, 0}}, {INT32_MIN, -1, sasa_capability_count(), INT32_MAX}, check);
  spoil<int32_t>({{"linear threads", &p.threads, 1}}, {INT32_MIN, -1, 0}, check);
  p.pixels = p.outputs = p.inputs = two_to_31;
  check("linear sizes", two_to_31);
  expect(sasa_linear_gradients(nullptr), SASA_BAD_ARGUMENT, "linear NULL", 0);
}

// Sizes that do not fit in size_t must not wrap: a workspace would be too small.
void workspaces() {
  using sasa::driver::Workspace;
  const auto used = [](auto take) {
    Workspace w{nullptr};
    take(w);
    w.take<char>(1);
    return int64_t(w.used);
  };
  const int64_t large = int64_t(1) << 31;
  expect(used([&](Workspace& w) { w.take<double>(3, 5); }), 192, "workspace of small parts", 15);
  expect(used([&](Workspace& w) { w.take<double>(large, large); }), int64_t(SIZE_MAX), "workspace", large);
  expect(used([&](Workspace& w) { w.take<char>(SIZE_MAX - 5); }), int64_t(SIZE_MAX), "workspace", -5);
  expect(used([&](Workspace& w) {
           w.take<char>(SIZE_MAX / 2);
           w.take<char>(SIZE_MAX / 2);
           w.take<char>(0);
         }),
         int64_t(SIZE_MAX), "workspace of two halves", 2);
}

void structures() {
  const size_t sizes[] = {sizeof(sasa_tensor),         sizeof(sasa_embedding), sizeof(sasa_axis),
                          sizeof(sasa_projection),     sizeof(sasa_problem),   sizeof(sasa_gradients),
                          sizeof(sasa_linear),         sizeof(sasa_blocks),    sizeof(sasa_block_results),
                          sizeof(sasa_block_gradients)};
  for (int32_t i = 0; i < 10; ++i) expect(sasa_structure_size(i), int64_t(sizes[i]), "structure", i);
  for (const int32_t i : {INT32_MIN, -1, 10, INT32_MAX}) expect(sasa_structure_size(i), -1, "structure", i);
}

}  // namespace

// Number of arguments that were not answered as required.
int argument_failures() {
  for (const int64_t in_channels : {0, 5}) {
    Call call(case_of(in_channels), SASA_FLOAT32);
    expect(call.run(INT32_MAX, 0), SASA_OK, "threads", INT32_MAX);
    sizes(call);
    expect(call.run(1, 0), SASA_OK, "a good problem", 0);
  }
  products();
  gradients();
  shifted();
  capabilities();
  linear();
  workspaces();
  structures();
  return failures;
}
