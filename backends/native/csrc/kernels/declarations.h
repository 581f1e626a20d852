// Every kernel, in the namespace of the instruction set that it is being compiled for.
//
// Kernels include nothing of the standard library but C headers, and define everything in this namespace or without
// linkage: an inline function compiled for AVX-512 here must not be the one that the linker keeps for everybody.
#pragma once

#include "conv_glu.h"
#include "local_attention.h"

#include <cstdint>

#define STRING_OF(name) #name
#define NAME_OF(name) STRING_OF(name)

namespace attnrewrite::ISA {

void exponential(const float* source, float* target, int64_t count);
// Pieces of work from `begin` to `end`.
void local_forward(const LocalProblem& problem, const LocalResults& results, int64_t begin, int64_t end);
void local_backward(const LocalProblem& problem, const LocalGradients& gradients, int64_t begin, int64_t end);
void conv_glu_forward(const ConvGluProblem& problem, void* output, int64_t begin, int64_t end);
void conv_glu_backward(const ConvGluProblem& problem, const ConvGluGradients& gradients, int64_t begin, int64_t end);

}  // namespace attnrewrite::ISA
