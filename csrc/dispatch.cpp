// The C interface: checks what would be out of bounds, and picks the instruction set.
#include "local_attention.h"

#if defined(__x86_64__)
#define SASA_ISAS(X) X(baseline, "default") X(avx2, "avx2") X(avx512, "avx512")
#else
#define SASA_ISAS(X) X(baseline, "default")
#endif

namespace sasa {

#define SASA_DECLARE(isa, name)                                               \
  namespace isa {                                                             \
  int forward(const sasa_problem& problem, const sasa_tensor& output);        \
  int backward(const sasa_problem& problem, const sasa_gradients& gradients); \
  int linear_gradients(const sasa_linear& problem);                           \
  }
SASA_ISAS(SASA_DECLARE)

namespace {

struct Capability {
  const char* name;
  int (*forward)(const sasa_problem&, const sasa_tensor&);
  int (*backward)(const sasa_problem&, const sasa_gradients&);
  int (*linear_gradients)(const sasa_linear&);
};

#define SASA_ENTRY(isa, name) {name, isa::forward, isa::backward, isa::linear_gradients},
constexpr Capability capabilities[] = {SASA_ISAS(SASA_ENTRY)};

int count_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 1;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return 2;
  return 3;
#else
  return 1;
#endif
}

bool axis_is_sound(const sasa_axis& axis) {
  return axis.size >= 1 && axis.outputs >= 1 && axis.kernel >= 1 && axis.stride >= 1 && axis.dilation >= 1 &&
         axis.before >= 0 && axis.before <= (axis.kernel - 1) / 2 * axis.dilation &&
         (axis.outputs - 1) * axis.stride + (axis.kernel - 1) / 2 * axis.dilation - axis.before < axis.size;
}

bool is_sound(const sasa_problem* p) {
  return p != nullptr && p->batch >= 1 && p->heads >= 1 && p->channels >= 1 && p->value_channels >= 1 &&
         p->capability >= 0 && p->capability < sasa_capability_count() && axis_is_sound(p->rows) &&
         axis_is_sound(p->cols) && (p->pool == 1 || (p->pool == 2 && sasa_can_pool(p))) &&
         (p->projection || (p->query.data && p->key.data && p->value.data)) && p->lse;
}

}  // namespace
}  // namespace sasa

extern "C" {

int32_t sasa_interface_version(void) { return SASA_INTERFACE_VERSION; }

int32_t sasa_capability_count(void) {
  static const int32_t count = sasa::count_supported();
  return count;
}

const char* sasa_capability_name(int32_t index) {
  return index >= 0 && index < sasa_capability_count() ? sasa::capabilities[index].name : nullptr;
}

int sasa_can_project(const sasa_problem* problem) {
  // The narrowest vectors of each instruction set hold 4, 4 and 8 numbers of 4 bytes.
  const int lanes = problem->capability == 2 ? 8 : 4;
  return problem->channels == problem->value_channels &&
         problem->heads % (problem->dtype == SASA_FLOAT64 ? lanes / 2 : lanes) == 0;
}

int sasa_can_pool(const sasa_problem* problem) {
  const auto fits = [](const sasa_axis& axis) {
    return axis.stride % axis.dilation == 0 && axis.stride / axis.dilation <= axis.kernel;
  };
  return fits(problem->rows) && fits(problem->cols);
}

int sasa_forward(const sasa_problem* problem, const sasa_tensor* output) {
  if (!sasa::is_sound(problem) || output == nullptr || output->data == nullptr) return SASA_BAD_ARGUMENT;
  return sasa::capabilities[problem->capability].forward(*problem, *output);
}

int sasa_backward(const sasa_problem* problem, const sasa_gradients* gradients) {
  if (!sasa::is_sound(problem) || gradients == nullptr || !gradients->output.data || !gradients->query.data ||
      !gradients->key.data || !gradients->value.data)
    return SASA_BAD_ARGUMENT;
  return sasa::capabilities[problem->capability].backward(*problem, *gradients);
}

int sasa_linear_gradients(const sasa_linear* p) {
  if (p == nullptr || p->pixels < 0 || p->outputs < 1 || p->inputs < 1 || p->capability < 0 ||
      p->capability >= sasa_capability_count())
    return SASA_BAD_ARGUMENT;
  return sasa::capabilities[p->capability].linear_gradients(*p);
}

}  // extern "C"
