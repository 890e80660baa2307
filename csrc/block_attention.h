/* Attention inside the blocks of an image, its extreme in each block, and its mean and variance: the C interface.
 *
 *     logit_pj = x_p^T F x_j          for the pixels p and j of a block; F = W_Q^T W_K, one matrix a head
 *     y_p      = sum over j of softmax_j(logit_pj) V_j x_j          V_j: one matrix for each place in a block
 *
 * Blocks that the lower or right edge cuts are smaller. The notes of local_attention.h on safety hold here too.
 */
#ifndef SASA_BLOCK_ATTENTION_H
#define SASA_BLOCK_ATTENTION_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SASA_MOST_BLOCK_CHANNELS 4 /* channels of the image that there are kernels for */
#define SASA_LARGEST_BLOCK 8       /* pixels along a block */

/* Float32. What follows holds for all pointers: contiguous in the order given, unless strides say otherwise. */
typedef struct {
  int32_t threads, capability;
  int64_t batch, channels, height, width; /* of the image */
  int64_t outputs, heads, block;          /* outputs: a multiple of heads */
  const float* input;                     /* (batch, channels, height, width) */
  int64_t stride[4];                      /* of the input, in elements */
  const float* form;                      /* F: (heads, channels, channels) */
  const float* values;                    /* V: (block * block, outputs, channels) */
  const float* sign;                      /* (outputs) */
  const float* mean;                      /* (outputs), which a backward reads */
} sasa_blocks;

/* Results: extreme (batch, rows, cols, outputs), rows = height / block and cols = width / block rounded up: the largest
 * y of each block where the sign is positive, the smallest where it is negative, that of the first pixel where it is 0.
 * mean and variance (outputs): of all pixels, the variance divided by their number. */
typedef struct {
  float *extreme, *mean, *variance;
} sasa_block_results;

/* The gradient of y is grad at each block's extreme, plus offset + slope * (y - mean) at every pixel. */
typedef struct {
  const float* grad;           /* (batch, rows, cols, outputs) */
  const float *slope, *offset; /* (outputs) */
  float* input;                /* written, strides in elements; or NULL */
  int64_t stride[4];
  float *form, *values; /* written */
} sasa_block_gradients;

__attribute__((visibility("default"))) int sasa_blocks_forward(const sasa_blocks* problem,
                                                               const sasa_block_results* results);
__attribute__((visibility("default"))) int sasa_blocks_backward(const sasa_blocks* problem,
                                                                const sasa_block_gradients* gradients);

#ifdef __cplusplus
}
#endif

#endif
