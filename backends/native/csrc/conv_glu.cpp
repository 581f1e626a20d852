// See operators.h. Operands are checked here, all before any of their memory is touched.
#include "conv_glu.h"

#include "kernels.h"
#include "operators.h"
#include "tensors.h"

#include <algorithm>

namespace attnrewrite {

namespace {

using Sizes = std::vector<int64_t>;

Activation activation_of(const char* name, const std::string& activation) {
  static const std::pair<const char*, Activation> known[] = {
      {"identity", Activation::kIdentity}, {"gelu", Activation::kGelu}, {"gelu_tanh", Activation::kGeluTanh},
      {"silu", Activation::kSilu},         {"relu", Activation::kRelu},
  };
  for (const auto& [spelled, which] : known) {
    if (activation == spelled) return which;
  }
  STD_TORCH_CHECK(false, name, ": the kernels have no such activation");
}

ChannelsLast channels_last(const char* name, const Tensor& tensor, const Sizes& shape, ScalarType dtype) {
  check_dtype(name, tensor, dtype);
  check_shape(name, tensor, shape);
  const Sizes strides = to_vector(tensor.strides());
  STD_TORCH_CHECK(shape[3] < 2 || strides[3] == 1 || tensor.numel() == 0, name, ": its channels must be neighbors in memory");
  return {tensor.const_data_ptr(), strides[0], strides[1], strides[2]};
}

const float* floats(const char* name, const Tensor& tensor, const Sizes& shape) {
  check_dtype(name, tensor, ScalarType::Float);
  check_shape(name, tensor, shape);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
  return tensor.const_data_ptr<float>();
}

ConvGluProblem conv_glu_problem(const Tensor& gate, const Tensor& weight, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& value, const std::string& activation,
                                const std::string& pre_activation) {
  STD_TORCH_CHECK(gate.dim() == 4, "gate: must be [B, H, W, channels]");
  const ScalarType dtype = gate.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "gate: must be float32 or bfloat16");
  const Sizes shape = to_vector(gate.sizes());
  STD_TORCH_CHECK(weight.dim() == 3, "weight: must be [side, side, channels]");
  const int64_t side = weight.size(0);
  STD_TORCH_CHECK(side == 3 || side == 5, "weight: filters must be 3 x 3 or 5 x 5");
  ConvGluProblem problem{};
  problem.batch = shape[0], problem.height = shape[1], problem.width = shape[2], problem.channels = shape[3];
  problem.side = side, problem.is_bfloat16 = dtype == ScalarType::BFloat16;
  problem.activation = activation_of("activation", activation);
  problem.pre_activation = activation_of("pre_activation", pre_activation);
  problem.gate = channels_last("gate", gate, shape, dtype);
  problem.weight = floats("weight", weight, {side, side, shape[3]});
  if (bias) problem.bias = floats("bias", *bias, {shape[3]});
  if (value) problem.value = channels_last("value", *value, shape, dtype);
  return problem;
}

// The sum over images of `[B, *sizes]`, in their order.
Tensor sum_of_images(const Tensor& parts, const Sizes& sizes) {
  const Tensor sum = new_floats(parts, sizes);
  float* target = sum.mutable_data_ptr<float>();
  const int64_t count = sum.numel(), images = count == 0 ? 0 : parts.numel() / count;
  std::fill(target, target + count, 0.0f);
  const float* source = parts.const_data_ptr<float>();
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t at = 0; at < count; ++at) target[at] += *source++;
  }
  return sum;
}

}  // namespace

Tensor conv_glu(const Tensor& gate, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& value, const std::string& activation, const std::string& pre_activation) {
  const ConvGluProblem problem = conv_glu_problem(gate, weight, bias, value, activation, pre_activation);
  const Tensor output = torch::stable::new_empty(gate, to_vector(gate.sizes()));
  void* target = output.mutable_data_ptr();
  torch::stable::parallel_for(0, pieces_of(problem), 1, [&](int64_t begin, int64_t end) {
    kernels().conv_glu_forward(problem, target, begin, end);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_glu_backward(
    const Tensor& grad_output, const std::vector<bool>& wanted, const Tensor& gate, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& value, const std::string& activation,
    const std::string& pre_activation) {
  const ConvGluProblem problem = conv_glu_problem(gate, weight, bias, value, activation, pre_activation);
  STD_TORCH_CHECK(wanted.size() == 4, "wanted: must say so of every operand");
  const Sizes shape = to_vector(gate.sizes()), filters = {problem.side, problem.side, problem.channels};
  const Sizes none = {0}, parts = {problem.batch, problem.side, problem.side, problem.channels};
  ConvGluGradients gradients{};
  gradients.output = channels_last("grad_output", grad_output, shape, gate.scalar_type());
  const Tensor grad_gate = new_floats(gate, wanted[0] ? shape : none);
  const Tensor grad_weight = new_floats(gate, wanted[1] ? parts : none);
  const Tensor grad_bias = new_floats(gate, wanted[2] && bias ? Sizes{problem.batch, problem.channels} : none);
  const Tensor grad_value = new_floats(gate, wanted[3] && value ? shape : none);
  const auto target = [](const Tensor& tensor, bool is_wanted) {
    return is_wanted ? tensor.mutable_data_ptr<float>() : nullptr;
  };
  gradients.gate = target(grad_gate, wanted[0]), gradients.weight = target(grad_weight, wanted[1]);
  gradients.bias = target(grad_bias, wanted[2] && bias), gradients.value = target(grad_value, wanted[3] && value);
  torch::stable::parallel_for(0, pieces_of(problem), 1, [&](int64_t begin, int64_t end) {
    kernels().conv_glu_backward(problem, gradients, begin, end);
  });
  return {grad_gate, wanted[1] ? sum_of_images(grad_weight, filters) : grad_weight,
          wanted[2] && bias ? sum_of_images(grad_bias, {problem.channels}) : grad_bias, grad_value};
}

}  // namespace attnrewrite
