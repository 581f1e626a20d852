// The operators, as torch calls them: each checks its operands, makes its results and runs a kernel on torch's threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace attnrewrite {

using torch::stable::Tensor;

// "avx512", "avx2" or "baseline": what the kernels run on.
std::string instruction_set();

// e to the power of every element of a contiguous float32 tensor.
Tensor exponential(const Tensor& source);

// Local attention on maps `[B, *grid, heads, channels]` of any layout, float32 or bfloat16.
//
// A query sees `kernel_size` keys along each axis, `dilation` apart, around it. With `slides` the window slides inward
// at borders; `bias`, `[heads, 2 * kernel_size - 1 an axis]`, is indexed by key minus query in steps. Without, places
// off the map are absent; `bias`, `[heads, *kernel_size]`, is indexed by place. It is float32 and contiguous. Every
// query sees `extra_key`, `[B, extras, heads, channels]`, too, with `extra_bias`, `[heads, *grid, extras]`.
// `place_bias`, `[heads, *grid, places]`, adds to the logits of each query's own window, and `post`, `[B, *grid, heads,
// places]`, to the weights of the window after the softmax.
//
// Results, contiguous: output `[B, *grid, heads, value channels]`, log-sum-exp of all logits in float32.
std::tuple<Tensor, Tensor> local_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& extra_key, const std::optional<Tensor>& extra_value,
    const std::optional<Tensor>& extra_bias, const std::optional<Tensor>& place_bias, const std::optional<Tensor>& post,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& dilation, bool slides, double scale);

using Tensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of the nine tensors in order, contiguous and in float32; an absent one has an empty gradient.
Tensors local_attention_backward(
    const Tensor& grad_output, const Tensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& extra_key, const std::optional<Tensor>& extra_value,
    const std::optional<Tensor>& extra_bias, const std::optional<Tensor>& place_bias, const std::optional<Tensor>& post,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& dilation, bool slides, double scale);

// The convolutional gate, `activation(DWConv(pre_activation(gate)) + bias) * value`, of maps `[B, H, W, channels]` whose
// channels are neighbors in memory, float32 or bfloat16. `weight` is `[side, side, channels]` with a side of 3 or 5, in
// float32 and contiguous like `bias`. Activations: identity, gelu, gelu_tanh, silu, relu.
Tensor conv_glu(const Tensor& gate, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& value, const std::string& activation, const std::string& pre_activation);

// Gradients of the four tensors in order, in float32; one that is absent, or not `wanted`, is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_glu_backward(
    const Tensor& grad_output, const std::vector<bool>& wanted, const Tensor& gate, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& value, const std::string& activation,
    const std::string& pre_activation);

}  // namespace attnrewrite
