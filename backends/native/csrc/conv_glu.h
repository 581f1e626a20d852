// A problem of the convolutional gate, as kernels take it: depthwise, channels last, zero padded.
#pragma once

#include "local_attention.h"

namespace attnrewrite {

enum class Activation { kIdentity, kGelu, kGeluTanh, kSilu, kRelu };

// A map `[B, H, W, channels]` whose channels are neighbors in memory; float32, or bfloat16.
struct ChannelsLast {
  const void* data = nullptr;  // null: absent
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0;
};

struct ConvGluProblem {
  int64_t batch, height, width, channels;
  int64_t side;  // of a filter: 3 or 5
  bool is_bfloat16;
  Activation activation, pre_activation;
  ChannelsLast gate, value;
  const float *weight, *bias;  // contiguous: `[side * side, channels]`, `[channels]` (null: absent)
};

// Wanted, contiguous: maps `[B, H, W, channels]`, and sums of every image, `[B, side * side, channels]` and `[B,
// channels]`; null where they are not.
struct ConvGluGradients {
  ChannelsLast output;  // given
  float *gate, *value, *weight, *bias;
};

// Channels that are one piece of work, with one image: a multiple of every vector, and the lines that are fetched
// together.
constexpr int64_t kChannelsAtATime = 32;

SHARED int64_t pieces_of(const ConvGluProblem& problem) {
  return problem.batch * ceil_div(problem.channels, kChannelsAtATime);
}

}  // namespace attnrewrite
