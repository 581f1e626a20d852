// A problem of local attention, as kernels take it. Maps have three axes here; missing ones come first, of size 1.
#pragma once

#include <cstdint>

namespace attnrewrite {

// A tensor of any layout: float32, or bfloat16. Strides are in elements; an axis that it lacks has stride 0.
struct Operand {
  const void* data = nullptr;  // null: absent
  bool is_bfloat16 = false;
  int64_t batch_stride = 0;
  int64_t axis_strides[3] = {};
  int64_t head_stride = 0;
  int64_t channel_stride = 0;
};

struct LocalProblem {
  int64_t batch, heads, channels, value_channels;
  int64_t extras;  // keys that every query sees
  int64_t grid[3], kernel[3], dilation[3];
  bool slides;  // at borders windows slide inward; else their places off the map are absent
  float scale;
  Operand query, key, value;          // by token and channel
  Operand extra_key, extra_value;     // the last axis counts the extra keys
  Operand extra_bias;                 // by token; the channels are the extra keys
  Operand place_bias, post;           // by token; the channels are the places of the window
  const float* bias;                  // contiguous: a table of `bias_entries` a head; null: absent
  int64_t bias_sizes[3];
  int64_t band;                       // rows of the first axis that are one piece of work
};

// Contiguous results: output of the query's dtype, `[B, *grid, heads, value_channels]`; log-sum-exp in float32.
struct LocalResults {
  void* output;
  float* lse;
};

struct LocalGradients {
  Operand output;    // given, by token and channel
  Operand lse;       // given, by token; float32
  float *query, *key, *value, *post;  // wanted: contiguous, heads last; post may be null
  float *bias, *extra_key, *extra_value;  // wanted: one partial sum for every piece of work; may be null
  float *extra_bias, *place_bias;  // wanted: `[B, heads, *grid, extras or places]`; may be null
};

// Kernels are compiled with other flags than the rest, so that functions of both must not exist as symbols.
#define SHARED static inline __attribute__((always_inline))

SHARED int64_t ceil_div(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

SHARED int64_t product(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

SHARED int64_t bands_of(const LocalProblem& problem) {
  return ceil_div(ceil_div(problem.grid[0], problem.dilation[0]), problem.band);
}

// Pieces of work: one image, one head, one dilation group, one band of rows.
SHARED int64_t pieces_of(const LocalProblem& problem) {
  return problem.batch * problem.heads * product(problem.dilation) * bands_of(problem);
}

}  // namespace attnrewrite
