// The operators, as torch calls them: each checks its operands, makes its results and runs a kernel on torch's threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace attnrewrite {

using torch::stable::Tensor;

// "avx512", "avx2" or "baseline": what the kernels run on.
std::string instruction_set();

// e to the power of every element of a contiguous float32 tensor.
Tensor exponential(const Tensor& source);

}  // namespace attnrewrite
