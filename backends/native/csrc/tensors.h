// Tensors of torch as operands: what is checked of them, and how results are made.
#pragma once

#include "local_attention.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace attnrewrite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<int64_t> to_vector(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": has another dtype than the operator takes");
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(to_vector(tensor.sizes()) == shape, name, ": has a shape that does not fit the other operands");
}

// The elements of a checked tensor, without strides.
inline Operand untyped(const Tensor& tensor) {
  Operand operand;
  operand.data = tensor.const_data_ptr();
  operand.is_bfloat16 = tensor.scalar_type() == ScalarType::BFloat16;
  return operand;
}

// A contiguous float32 tensor on the CPU.
inline Tensor new_floats(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

}  // namespace attnrewrite
