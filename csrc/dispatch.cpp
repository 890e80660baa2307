// The C interface: rejects sizes that would be out of bounds or overflow, and selects the instruction set.
#include <algorithm>

#include "block_attention.h"
#include "local_attention.h"

#if !defined(__x86_64__) || SASA_CAPABILITIES == 1
#define SASA_ISAS(X) X(baseline, "default")
#elif SASA_CAPABILITIES == 2
#define SASA_ISAS(X) X(baseline, "default") X(avx2, "avx2")
#else
#define SASA_ISAS(X) X(baseline, "default") X(avx2, "avx2") X(avx512, "avx512")
#endif

namespace sasa {

#define SASA_DECLARE(isa, name)                                               \
  namespace isa {                                                             \
  int forward(const sasa_problem& problem, const sasa_tensor& output);        \
  int backward(const sasa_problem& problem, const sasa_gradients& gradients); \
  int linear_gradients(const sasa_linear& problem);                           \
  int blocks_forward(const sasa_blocks& p, const sasa_block_results& r);      \
  int blocks_backward(const sasa_blocks& p, const sasa_block_gradients& g);   \
  }
SASA_ISAS(SASA_DECLARE)

// avx512, but for bfloat16 tensors.
#if defined(__x86_64__) && SASA_CAPABILITIES >= 4
#define SASA_HAS_BF16 1
namespace avx512_bf16 {
int forward(const sasa_problem& problem, const sasa_tensor& output);
int backward(const sasa_problem& problem, const sasa_gradients& gradients);
}  // namespace avx512_bf16
#else
#define SASA_HAS_BF16 0
#endif

namespace {

struct Capability {
  const char* name;
  int (*forward)(const sasa_problem&, const sasa_tensor&);
  int (*backward)(const sasa_problem&, const sasa_gradients&);
  int (*linear_gradients)(const sasa_linear&);
  int (*blocks_forward)(const sasa_blocks&, const sasa_block_results&);
  int (*blocks_backward)(const sasa_blocks&, const sasa_block_gradients&);
};

#define SASA_ENTRY(isa, name) \
  {name, isa::forward, isa::backward, isa::linear_gradients, isa::blocks_forward, isa::blocks_backward},
constexpr Capability capabilities[] = {
    SASA_ISAS(SASA_ENTRY)
#if SASA_HAS_BF16
        {"avx512_bf16",
         [](const sasa_problem& p, const sasa_tensor& output) {
           return (p.dtype == SASA_BFLOAT16 ? avx512_bf16::forward : avx512::forward)(p, output);
         },
         [](const sasa_problem& p, const sasa_gradients& gradients) {
           return (p.dtype == SASA_BFLOAT16 ? avx512_bf16::backward : avx512::backward)(p, gradients);
         },
         avx512::linear_gradients, avx512::blocks_forward, avx512::blocks_backward}
#endif
};

int32_t count_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 1;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return 2;
#if SASA_HAS_BF16
  if (__builtin_cpu_supports("avx512bf16")) return 4;
#endif
  return 3;
#else
  return 1;
#endif
}

// Bounds within which the kernels' own arithmetic cannot overflow: products of two counts and small sums of them fit in
// 64 bits, and so do the bytes of a tensor in lanes. No machine has enough memory for tensors beyond them.
constexpr int64_t kMostCount = INT32_MAX;
constexpr int64_t kMostElements = int64_t(1) << 47;

template <class... N>
bool are_counts(N... counts) {
  return (... && (counts >= 1 && counts <= kMostCount));
}

// Whether a tensor of these sizes, none of them negative, has few enough elements.
template <class... N>
bool is_tensor(N... sizes) {
  int64_t elements = 1;
  return (... && !__builtin_mul_overflow(elements, sizes, &elements)) && elements <= kMostElements;
}

// The kernels require each window's centre to be inside the image; other taps may be outside, unless windows are moved.
bool axis_is_sound(const sasa_axis& axis, int border) {
  if (!are_counts(axis.size, axis.outputs, axis.kernel, axis.stride, axis.dilation)) return false;
  const int64_t reach = (axis.kernel - 1) / 2 * axis.dilation;
  if ((axis.shifted != 0) != (border == SASA_SHIFT)) return false;
  if (axis.shifted && (axis.before != reach || axis.kernel * axis.dilation > axis.size)) return false;
  return axis.before >= 0 && axis.before <= reach &&
         (axis.outputs - 1) * axis.stride + (reach - axis.before) < axis.size;
}

bool embedding_is_sound(const sasa_embedding& embedding, int64_t channels) {
  return embedding.data == nullptr ||
         (embedding.first >= 0 && embedding.channels >= 1 && embedding.channels <= channels &&
          embedding.first <= channels - embedding.channels);
}

// The channels of a table are its columns.
bool table_is_sound(const sasa_embedding& table, const sasa_axis& cols) {
  const int64_t columns = cols.shifted ? 2 * cols.kernel - 1 : cols.kernel;
  return table.data == nullptr || (table.first == 0 && table.channels == columns);
}

bool gradient_is_sound(const sasa_embedding& gradient, const sasa_embedding& embedding) {
  return gradient.data == nullptr ||
         (embedding.data != nullptr && gradient.first == embedding.first && gradient.channels == embedding.channels);
}

bool inputs_are_sound(const sasa_problem& p) {
  const auto is_image = [&](int64_t heads, int64_t channels) {
    return is_tensor(p.batch, heads, channels, p.rows.size, p.cols.size);
  };
  if (!is_image(p.heads, p.channels) || !is_image(p.heads, p.value_channels)) return false;
  if (p.projection == nullptr) return p.query.data && p.key.data && p.value.data;
  const sasa_projection& projection = *p.projection;
  return sasa_can_project(&p) && projection.input.data && projection.weight && are_counts(projection.in_channels) &&
         is_image(1, projection.in_channels) && is_tensor(int64_t(3), p.heads, p.channels, projection.in_channels);
}

bool has_capability(int32_t index) { return index >= 0 && index < sasa_capability_count(); }

bool is_sound(const sasa_problem* p) {
  return p != nullptr && p->dtype >= SASA_FLOAT32 && p->dtype <= SASA_FLOAT16 && p->border >= SASA_ZERO &&
         p->border <= SASA_SHIFT && p->threads >= 1 && has_capability(p->capability) &&
         are_counts(p->batch, p->heads, p->channels, p->value_channels) && axis_is_sound(p->rows, p->border) &&
         axis_is_sound(p->cols, p->border) && inputs_are_sound(*p) && embedding_is_sound(p->row, p->channels) &&
         embedding_is_sound(p->col, p->channels) && table_is_sound(p->table, p->cols) &&
         (p->pool == 1 || (p->pool == 2 && sasa_can_pool(p))) && p->lse;
}

bool is_sound(const sasa_linear* p) {
  return p != nullptr && p->threads >= 1 && has_capability(p->capability) && p->pixels >= 0 && p->outputs >= 1 &&
         p->inputs >= 1 && is_tensor(p->pixels, p->outputs) && is_tensor(p->pixels, p->inputs) &&
         is_tensor(p->outputs, p->inputs) && p->weight && p->grad_weight &&
         (p->pixels == 0 || (p->grad && p->input && p->grad_input));
}

bool is_sound(const sasa_blocks* p) {
  return p != nullptr && p->threads >= 1 && has_capability(p->capability) &&
         are_counts(p->batch, p->channels, p->height, p->width, p->outputs, p->heads, p->block) &&
         p->channels <= SASA_MOST_BLOCK_CHANNELS && p->block <= SASA_LARGEST_BLOCK && p->outputs % p->heads == 0 &&
         is_tensor(p->batch, p->height, p->width, p->outputs > p->channels ? p->outputs : p->channels) && p->input &&
         p->form && p->values && p->sign;
}

// Number of threads for that many multiply-adds: starting one takes as long as about ten thousand of them.
int32_t threads_for(double work, int32_t most) {
  constexpr double kPerThread = 1 << 17;
  return work >= kPerThread * most ? most : 1 + int32_t(work / kPerThread);
}

sasa_problem with_threads(const sasa_problem& p) {
  const double queries = double(p.batch) * double(p.heads) * double(p.rows.outputs) * double(p.cols.outputs);
  double work = queries * double(p.rows.kernel) * double(p.cols.kernel) * double(p.channels + p.value_channels);
  if (p.projection != nullptr) work += queries * 3 * double(p.channels) * double(p.projection->in_channels);
  sasa_problem problem = p;
  problem.threads = threads_for(work, p.threads);
  return problem;
}

// Logits over the image's channels, weights' exponentials and values over the outputs', for each pair of pixels.
sasa_blocks with_threads(const sasa_blocks& p) {
  const double pairs = double(p.batch) * double(p.height) * double(p.width) * double(p.block * p.block);
  sasa_blocks problem = p;
  problem.threads = threads_for(pairs * double(p.heads * (p.channels + 12) + p.outputs), p.threads);
  return problem;
}

}  // namespace
}  // namespace sasa

extern "C" {

int32_t sasa_interface_version(void) { return SASA_INTERFACE_VERSION; }

int64_t sasa_structure_size(int32_t index) {
  constexpr int64_t sizes[] = {sizeof(sasa_tensor),         sizeof(sasa_embedding), sizeof(sasa_axis),
                               sizeof(sasa_projection),     sizeof(sasa_problem),   sizeof(sasa_gradients),
                               sizeof(sasa_linear),         sizeof(sasa_blocks),    sizeof(sasa_block_results),
                               sizeof(sasa_block_gradients)};
  return index >= 0 && index < int32_t(sizeof(sizes) / sizeof(sizes[0])) ? sizes[index] : -1;
}

int32_t sasa_capability_count(void) {
  constexpr int32_t built = sizeof(sasa::capabilities) / sizeof(sasa::capabilities[0]);
  static const int32_t count = std::min(sasa::count_supported(), built);
  return count;
}

const char* sasa_capability_name(int32_t index) {
  return index >= 0 && index < sasa_capability_count() ? sasa::capabilities[index].name : nullptr;
}

int sasa_can_project(const sasa_problem* problem) {
  if (problem == nullptr || !sasa::has_capability(problem->capability) || problem->dtype < SASA_FLOAT32 ||
      problem->dtype > SASA_FLOAT16)
    return 0;
  // The narrowest vectors hold 4 numbers of 4 bytes; those of AVX-512, 8.
  const int lanes = problem->capability >= 2 ? 8 : 4;
  return sasa::are_counts(problem->heads, problem->channels) && problem->channels == problem->value_channels &&
         problem->heads % (problem->dtype == SASA_FLOAT64 ? lanes / 2 : lanes) == 0;
}

int sasa_prefers_projected(const sasa_problem* problem) {
  return sasa_can_project(problem) && problem->heads % 8 == 0 &&
         (problem->dtype == SASA_FLOAT32 || (problem->dtype == SASA_BFLOAT16 && problem->capability >= 3));
}

int sasa_can_pool(const sasa_problem* problem) {
  const auto fits = [](const sasa_axis& axis) {
    return sasa::are_counts(axis.kernel, axis.stride, axis.dilation) && axis.stride % axis.dilation == 0 &&
           axis.stride / axis.dilation <= axis.kernel;
  };
  return problem != nullptr && fits(problem->rows) && fits(problem->cols);
}

int sasa_forward(const sasa_problem* problem, const sasa_tensor* output) {
  if (!sasa::is_sound(problem) || output == nullptr || output->data == nullptr) return SASA_BAD_ARGUMENT;
  return sasa::capabilities[problem->capability].forward(sasa::with_threads(*problem), *output);
}

int sasa_backward(const sasa_problem* problem, const sasa_gradients* gradients) {
  if (!sasa::is_sound(problem) || gradients == nullptr || !gradients->output.data || !gradients->query.data ||
      !gradients->key.data || !gradients->value.data || !sasa::gradient_is_sound(gradients->row, problem->row) ||
      !sasa::gradient_is_sound(gradients->col, problem->col) ||
      !sasa::gradient_is_sound(gradients->table, problem->table))
    return SASA_BAD_ARGUMENT;
  return sasa::capabilities[problem->capability].backward(sasa::with_threads(*problem), *gradients);
}

int sasa_linear_gradients(const sasa_linear* p) {
  if (!sasa::is_sound(p)) return SASA_BAD_ARGUMENT;
  sasa_linear problem = *p;
  problem.threads = sasa::threads_for(double(p->pixels) * double(p->outputs) * double(p->inputs), p->threads);
  return sasa::capabilities[p->capability].linear_gradients(problem);
}

int sasa_blocks_forward(const sasa_blocks* problem, const sasa_block_results* results) {
  if (!sasa::is_sound(problem) || results == nullptr || !results->extreme || !results->mean || !results->variance)
    return SASA_BAD_ARGUMENT;
  return sasa::capabilities[problem->capability].blocks_forward(sasa::with_threads(*problem), *results);
}

int sasa_blocks_backward(const sasa_blocks* problem, const sasa_block_gradients* gradients) {
  if (!sasa::is_sound(problem) || !problem->mean || gradients == nullptr || !gradients->grad || !gradients->slope ||
      !gradients->offset || !gradients->form || !gradients->values)
    return SASA_BAD_ARGUMENT;
  return sasa::capabilities[problem->capability].blocks_backward(sasa::with_threads(*problem), *gradients);
}

}  // extern "C"
