// Every kernel, in the namespace of the instruction set that it is being compiled for.
//
// Kernels include nothing of the standard library but C headers, and define everything in this namespace or without
// linkage: an inline function compiled for AVX-512 here must not be the one that the linker keeps for everybody.
#pragma once

#include <cstdint>

#define STRING_OF(name) #name
#define NAME_OF(name) STRING_OF(name)

namespace attnrewrite::ISA {

void exponential(const float* source, float* target, int64_t count);

}  // namespace attnrewrite::ISA
