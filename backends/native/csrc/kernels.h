// What there is to call: every kernel once, in the variant that this processor runs fastest.
//
// To add a kernel: declare it in kernels/declarations.h, define it in a file of kernels/, enter it in
// kernels/table.cpp and here, then call it from a file of this folder and name that in registration.cpp.
#pragma once

#include "conv_glu.h"
#include "local_attention.h"

#include <cstdint>

namespace attnrewrite {

struct Kernels {
  const char* instruction_set;
  int lanes;
  void (*exponential)(const float* source, float* target, int64_t count);
  void (*local_forward)(const LocalProblem& problem, const LocalResults& results, int64_t begin, int64_t end);
  void (*local_backward)(const LocalProblem& problem, const LocalGradients& gradients, int64_t begin, int64_t end);
  void (*conv_glu_forward)(const ConvGluProblem& problem, void* output, int64_t begin, int64_t end);
  void (*conv_glu_backward)(const ConvGluProblem& problem, const ConvGluGradients& gradients, int64_t begin,
                            int64_t end);
};

// Chosen at the first call: the best that the processor has, or what ATTNREWRITE_INSTRUCTION_SET names.
const Kernels& kernels();

}  // namespace attnrewrite
