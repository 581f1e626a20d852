// See operators.h.
#include "kernels.h"
#include "operators.h"
#include "tensors.h"

namespace attnrewrite {

std::string instruction_set() { return kernels().instruction_set; }

Tensor exponential(const Tensor& source) {
  check_dtype("source", source, ScalarType::Float);
  STD_TORCH_CHECK(source.is_contiguous(), "source: must be contiguous");
  const Tensor target = new_floats(source, to_vector(source.sizes()));
  const float* from = source.const_data_ptr<float>();
  float* to = target.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, source.numel(), 4096, [=](int64_t begin, int64_t end) {
    kernels().exponential(from + begin, to + begin, end - begin);
  });
  return target;
}

}  // namespace attnrewrite
