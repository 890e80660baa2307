/* Local self-attention on the CPU: the C interface of the library.
 *
 *     logit_t = scale * q[p].(k[p + t] + row[dy] + col[dx]) + table[dy, dx]    for every tap t = (dy, dx) around p
 *     y[p]    = sum over t of softmax_t(logit) * v[p + t]
 *
 * No PyTorch headers: the library takes addresses and strides, so one build works with any PyTorch. Functions are safe
 * to call from several threads at once; no global state changes after sasa_set_parallel. Nothing is thrown.
 *
 * Sizes of any value are safe: SASA_BAD_ARGUMENT unless counts are from 1 to 2^31 - 1 and fit each other, and a tensor
 * has at most 2^47 elements. Workspace memory grows with the image and the number of taps, not with stride or dilation;
 * SASA_OUT_OF_MEMORY if there is not enough. Addresses and strides of tensors are trusted.
 */
#ifndef SASA_LOCAL_ATTENTION_H
#define SASA_LOCAL_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SASA_EXPORT __attribute__((visibility("default")))

/* Incremented with every change of this interface; sasa_interface_version() returns the library's. */
#define SASA_INTERFACE_VERSION 7

enum sasa_dtype { SASA_FLOAT32 = 0, SASA_FLOAT64 = 1, SASA_BFLOAT16 = 2, SASA_FLOAT16 = 3 };
enum sasa_border { SASA_ZERO = 0, SASA_MASK = 1, SASA_VALID = 2, SASA_SHIFT = 3 };
enum sasa_status { SASA_OK = 0, SASA_OUT_OF_MEMORY = 1, SASA_BAD_ARGUMENT = 2, SASA_UNSUPPORTED = 3 };

/* A tensor (batch, heads, channels, height, width); strides in elements, any sign or order. */
typedef struct {
  void* data;
  int64_t stride[5];
} sasa_tensor;

/* An embedding (heads, channels, taps) that covers some channels of each head, from `first` on: the others have no
 * position. With SASA_SHIFT it has 2 * taps - 1 entries, one for each offset from the query, the smallest first. data
 * is NULL where there is no embedding; nothing else is read then. */
typedef struct {
  void* data;
  int64_t first, channels;
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
  int64_t shifted;  /* whether windows that reach out of the image are moved inside, by a multiple of the dilation; if
                     * and only if the border is SASA_SHIFT */
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
  int32_t threads;    /* at most so many, at least 1; the results do not depend on it */
  int32_t capability; /* instruction set, an index below sasa_capability_count() */
  double scale;
  int64_t batch, heads, channels, value_channels;
  sasa_axis rows, cols;
  sasa_tensor query, key, value;     /* not read if there is a projection */
  const sasa_projection* projection; /* or NULL; requires sasa_can_project() */
  sasa_embedding row, col;
  sasa_embedding table; /* added to the logits; its channels are its columns: as many as col has taps, from 0 on */
  void* lse;
  int64_t pool; /* 1; or 2: an output is the mean of 2 x 2 windows, fewer at the edge; requires sasa_can_pool() */
} sasa_problem;

/* Whether a problem of this dtype and capability can be projected: its heads must fill vectors, and value_channels must
 * equal channels. Nothing else is read. */
SASA_EXPORT int sasa_can_project(const sasa_problem* problem);

/* Whether projecting again in a backward is faster than reading saved queries, keys and values: for heads in
 * multiples of 8, in float32. Reads what sasa_can_project() reads. */
SASA_EXPORT int sasa_prefers_projected(const sasa_problem* problem);

/* Whether the outputs of these rows and cols can be pooled by 2: neighbouring windows must be a whole number of taps
 * apart, at most as many as they have. Nothing else is read. */
SASA_EXPORT int sasa_can_pool(const sasa_problem* problem);

/* Writes output (batch, heads, value_channels, rows.outputs / pool, cols.outputs / pool), rounded up, and
 * problem->lse. */
SASA_EXPORT int sasa_forward(const sasa_problem* problem, const sasa_tensor* output);

/* Gradients, each of the shape of its tensor. That of the query must hold zeros where no window is centred. */
typedef struct {
  sasa_tensor output; /* read */
  sasa_tensor query, key, value;
  sasa_embedding row, col, table; /* of the same channels as the problem's; data is NULL where none is wanted */
} sasa_gradients;

/* Recomputes the weights from problem->lse and writes the gradients. */
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

/* SASA_UNSUPPORTED, with nothing written, if `inputs` is not a whole number of vectors or grad_input is not aligned to
 * them. */
SASA_EXPORT int sasa_linear_gradients(const sasa_linear* problem);

/* Instruction sets in this build that this processor supports, slowest first; "default" runs on every processor. */
SASA_EXPORT int32_t sasa_capability_count(void);
SASA_EXPORT const char* sasa_capability_name(int32_t index);

/* Sets the address of GOMP_parallel in the caller's OpenMP runtime. Without it, each call starts its own threads. */
typedef void (*sasa_parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
SASA_EXPORT void sasa_set_parallel(sasa_parallel parallel);

/* Requests huge pages for memory that was just allocated and not yet touched: the first touch of each page is a fault,
 * and for large results the faults take as long as the computation. Does nothing for small memory. */
SASA_EXPORT void sasa_use_huge_pages(void* memory, size_t bytes);

SASA_EXPORT int32_t sasa_interface_version(void);

/* Size in bytes of a structure, for callers that declare the structures themselves: 0 sasa_tensor, 1 sasa_embedding,
 * 2 sasa_axis, 3 sasa_projection, 4 sasa_problem, 5 sasa_gradients, 6 sasa_linear; of block_attention.h,
 * 7 sasa_blocks, 8 sasa_block_results, 9 sasa_block_gradients; -1 for any other index. */
SASA_EXPORT int64_t sasa_structure_size(int32_t index);

#ifdef __cplusplus
}
#endif

#endif
