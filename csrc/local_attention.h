/* Local self-attention on the CPU: the C interface of the library.
 *
 *     logit_t = scale * q[p].(k[p + t] + row[dy] + col[dx])        for every tap t = (dy, dx) of the window around p
 *     y[p]    = sum over t of softmax_t(logit) * v[p + t]
 *
 * No PyTorch headers: the library takes addresses and strides, so one build serves every PyTorch. Functions are safe to
 * call from several threads at once; no global state changes after sasa_set_parallel. Nothing is thrown.
 */
#ifndef SASA_LOCAL_ATTENTION_H
#define SASA_LOCAL_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SASA_EXPORT __attribute__((visibility("default")))

/* Raised with every change of the structures below; sasa_interface_version() returns the library's. */
#define SASA_INTERFACE_VERSION 4

enum sasa_dtype { SASA_FLOAT32 = 0, SASA_FLOAT64 = 1, SASA_BFLOAT16 = 2, SASA_FLOAT16 = 3 };
enum sasa_border { SASA_ZERO = 0, SASA_MASK = 1, SASA_VALID = 2 };
enum sasa_status { SASA_OK = 0, SASA_OUT_OF_MEMORY = 1, SASA_BAD_ARGUMENT = 2, SASA_UNSUPPORTED = 3 };

/* A tensor (batch, heads, channels, height, width); strides in elements, any sign or order. */
typedef struct {
  void* data;
  int64_t stride[5];
} sasa_tensor;

/* An embedding (heads, channels, taps); data is NULL where there is none. */
typedef struct {
  void* data;
  int64_t stride[3];
} sasa_embedding;

/* One axis of the window: rows or columns. */
typedef struct {
  int64_t size;     /* pixels of the image */
  int64_t outputs;  /* windows */
  int64_t kernel;   /* taps */
  int64_t stride;   /* pixels between windows */
  int64_t dilation; /* pixels between taps */
  int64_t before;   /* pixels by which the first window reaches out of the image */
} sasa_axis;

/* A layer's projections: queries, keys and values are the input times the weight plus the bias, per pixel. */
typedef struct {
  sasa_tensor input; /* (batch, 1, in_channels, height, width) */
  int64_t in_channels;
  const void* weight; /* (3 * heads * channels, in_channels): queries, keys, values; strides in elements */
  int64_t weight_stride[2];
  const void* bias; /* (3 * heads * channels) contiguous, or NULL */
} sasa_projection;

/* Sizes and inputs of a call. The log-sum-exp is contiguous (batch, heads, rows.outputs, cols.outputs), float32, or
 * float64 for float64 inputs: forward writes it, backward reads it. */
typedef struct {
  int32_t dtype;      /* sasa_dtype, of all tensors */
  int32_t border;     /* sasa_border */
  int32_t threads;    /* at most so many; the results do not depend on it */
  int32_t capability; /* instruction set, an index below sasa_capability_count() */
  double scale;
  int64_t batch, heads, channels, value_channels;
  sasa_axis rows, cols;
  sasa_tensor query, key, value;     /* not read if there is a projection */
  const sasa_projection* projection; /* or NULL; for heads of which sasa_can_project() */
  sasa_embedding row, col;
  void* lse;
  int64_t pool; /* 1; or 2: the output is the mean of 2 x 2 windows, of those there are; see sasa_can_pool() */
} sasa_problem;

/* Whether so many heads, with value_channels equal to channels, can be projected: they must fill vectors. */
SASA_EXPORT int sasa_can_project(const sasa_problem* problem);

/* Whether the outputs of these rows and cols can be pooled by 2: windows next to each other must be a whole number of
 * taps apart, and not more than they are long. */
SASA_EXPORT int sasa_can_pool(const sasa_problem* problem);

/* Writes output (batch, heads, value_channels, rows.outputs / pool, cols.outputs / pool), rounded up, and
 * problem->lse. */
SASA_EXPORT int sasa_forward(const sasa_problem* problem, const sasa_tensor* output);

/* Gradients, of the shapes of what they belong to. grad_query must hold zeros where no window is centred. */
typedef struct {
  sasa_tensor output; /* read */
  sasa_tensor query, key, value;
  sasa_embedding row, col; /* data is NULL where the problem has none */
} sasa_gradients;

/* Recomputes the weights from problem->lse and writes all gradients. */
SASA_EXPORT int sasa_backward(const sasa_problem* problem, const sasa_gradients* gradients);

/* y = x W^T + b over pixels, float32, all matrices contiguous: the gradient of y gives grad_input = grad W, and
 * grad_weight += grad^T x, grad_bias += the sum of grad. */
typedef struct {
  int32_t threads, capability;
  int64_t pixels, outputs, inputs;
  const float* grad;   /* (pixels, outputs) */
  const float* input;  /* (pixels, inputs) */
  const float* weight; /* (outputs, inputs) */
  float* grad_input;   /* (pixels, inputs) */
  float* grad_weight;  /* (outputs, inputs), added to */
  float* grad_bias;    /* (outputs), added to; or NULL */
} sasa_linear;

/* SASA_UNSUPPORTED, with nothing written, if the inputs don't fill vectors or grad_input is not aligned to them. */
SASA_EXPORT int sasa_linear_gradients(const sasa_linear* problem);

/* Instruction sets in this build that this processor has, slowest first; "default" needs nothing. */
SASA_EXPORT int32_t sasa_capability_count(void);
SASA_EXPORT const char* sasa_capability_name(int32_t index);

/* Uses the caller's OpenMP runtime: the address of its GOMP_parallel. Without it, threads are started for each call. */
typedef void (*sasa_parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
SASA_EXPORT void sasa_set_parallel(sasa_parallel parallel);

/* Asks the system for huge pages under memory that was just allocated and not yet touched: each page touched for the
 * first time costs a fault, which for large results takes as long as computing them. Small memory is left alone. */
SASA_EXPORT void sasa_use_huge_pages(void* memory, size_t bytes);

SASA_EXPORT int32_t sasa_interface_version(void);

#ifdef __cplusplus
}
#endif

#endif
