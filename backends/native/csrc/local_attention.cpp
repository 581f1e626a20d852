// See operators.h. Operands are checked here, all before any of their memory is touched.
#include "local_attention.h"

#include "kernels.h"
#include "operators.h"
#include "tensors.h"

#include <algorithm>

namespace attnrewrite {

namespace {

constexpr int64_t kWidestWindow = 13;

using Sizes = std::vector<int64_t>;

// Kernels walk along the last axis, and share loads along the first: of two axes these are the ones.
int64_t kernel_axis(int64_t axis, int64_t rank) { return rank == 3 ? axis : rank == 2 ? 2 * axis : 2; }

// `[B, *grid, heads, channels]`
Operand map_operand(const Tensor& tensor, int64_t rank) {
  const Sizes strides = to_vector(tensor.strides());
  Operand operand = untyped(tensor);
  operand.batch_stride = strides[0];
  for (int64_t axis = 0; axis < rank; ++axis) operand.axis_strides[kernel_axis(axis, rank)] = strides[1 + axis];
  operand.head_stride = strides[1 + rank];
  operand.channel_stride = strides[2 + rank];
  return operand;
}

// `[B, extras, heads, channels]`
Operand extra_operand(const Tensor& tensor) { return map_operand(tensor, 1); }

// `[heads, *grid, channels]`
Operand head_operand(const Tensor& tensor, int64_t rank) {
  const Sizes strides = to_vector(tensor.strides());
  Operand operand = untyped(tensor);
  operand.head_stride = strides[0];
  for (int64_t axis = 0; axis < rank; ++axis) operand.axis_strides[kernel_axis(axis, rank)] = strides[1 + axis];
  operand.channel_stride = strides[1 + rank];
  return operand;
}

Sizes with(Sizes sizes, std::initializer_list<int64_t> more) {
  sizes.insert(sizes.end(), more);
  return sizes;
}

struct LocalOperands {
  const Tensor &query, &key, &value;
  const std::optional<Tensor>&bias, &extra_key, &extra_value, &extra_bias, &place_bias, &post;
};

struct LocalGeometry {
  const Sizes &kernel_size, &dilation;
  bool slides;
  double scale;
};

struct Shape {
  int64_t rank, batch, heads, channels, value_channels, extras;
  Sizes grid, tokens;  // tokens: `[B, *grid, heads]`
};

Shape shape_of(const LocalOperands& given) {
  const Sizes query = to_vector(given.query.sizes()), value = to_vector(given.value.sizes());
  const int64_t rank = static_cast<int64_t>(query.size()) - 3;
  STD_TORCH_CHECK(rank >= 1 && rank <= 3, "query: must be [B, *grid, heads, channels] with a grid of 1 to 3 axes");
  STD_TORCH_CHECK(value.size() == query.size(), "value: must have as many axes as query");
  STD_TORCH_CHECK(given.extra_key.has_value() == given.extra_value.has_value(), "extra_key, extra_value: give both");
  if (given.extra_key) STD_TORCH_CHECK(given.extra_key->dim() == 4, "extra_key: must have four axes");
  Shape shape{rank, query[0], query[rank + 1], query[rank + 2], value[rank + 2], 0, {}, {}};
  shape.extras = given.extra_key ? given.extra_key->size(1) : 0;
  shape.grid.assign(query.begin() + 1, query.begin() + 1 + rank);
  shape.tokens.assign(query.begin(), query.end() - 1);
  return shape;
}

void check_operands(const LocalOperands& given, const Shape& shape, const Sizes& bias_sizes, int64_t places) {
  const ScalarType dtype = given.query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "query: must be float32 or bfloat16");
  const auto check = [&](const char* name, const std::optional<Tensor>& tensor, const Sizes& sizes) {
    if (!tensor) return;
    check_dtype(name, *tensor, dtype);
    check_shape(name, *tensor, sizes);
  };
  check("query", given.query, with(shape.tokens, {shape.channels}));
  check("key", given.key, with(shape.tokens, {shape.channels}));
  check("value", given.value, with(shape.tokens, {shape.value_channels}));
  check("extra_key", given.extra_key, {shape.batch, shape.extras, shape.heads, shape.channels});
  check("extra_value", given.extra_value, {shape.batch, shape.extras, shape.heads, shape.value_channels});
  Sizes by_head = {shape.heads};
  by_head.insert(by_head.end(), shape.grid.begin(), shape.grid.end());
  check("extra_bias", given.extra_bias, with(by_head, {shape.extras}));
  check("place_bias", given.place_bias, with(by_head, {places}));
  check("post", given.post, with(shape.tokens, {places}));
  if (given.bias) {
    Sizes table = {shape.heads};
    table.insert(table.end(), bias_sizes.begin(), bias_sizes.end());
    check_dtype("bias", *given.bias, ScalarType::Float);
    check_shape("bias", *given.bias, table);
    STD_TORCH_CHECK(given.bias->is_contiguous(), "bias: must be contiguous");
  }
}

void check_window(const LocalGeometry& window, const Shape& shape) {
  const size_t rank = shape.rank;
  STD_TORCH_CHECK(window.kernel_size.size() == rank && window.dilation.size() == rank,
                  "kernel_size, dilation: must have one entry an axis");
  for (size_t axis = 0; axis < rank; ++axis) {
    const int64_t kernel = window.kernel_size[axis], dilation = window.dilation[axis];
    STD_TORCH_CHECK(kernel % 2 == 1 && kernel >= 1 && kernel <= kWidestWindow,
                    "kernel_size: must be odd, from 1 to 13");
    STD_TORCH_CHECK(dilation >= 1, "dilation: must be at least 1");
    STD_TORCH_CHECK(!window.slides || kernel <= shape.grid[axis] / dilation, "kernel_size: the window exceeds the map");
  }
}

LocalProblem local_problem(const LocalOperands& given, const LocalGeometry& window) {
  const Shape shape = shape_of(given);
  check_window(window, shape);
  LocalProblem problem{};
  problem.batch = shape.batch, problem.heads = shape.heads, problem.extras = shape.extras;
  problem.channels = shape.channels, problem.value_channels = shape.value_channels;
  problem.slides = window.slides, problem.scale = static_cast<float>(window.scale);
  for (int64_t axis = 0; axis < 3; ++axis) {
    problem.grid[axis] = problem.kernel[axis] = problem.dilation[axis] = problem.bias_sizes[axis] = 1;
  }
  Sizes bias_sizes;
  for (int64_t own = 0; own < shape.rank; ++own) {
    const int64_t axis = kernel_axis(own, shape.rank), kernel = window.kernel_size[own];
    problem.grid[axis] = shape.grid[own], problem.kernel[axis] = kernel, problem.dilation[axis] = window.dilation[own];
    problem.bias_sizes[axis] = window.slides ? 2 * kernel - 1 : kernel;
    bias_sizes.push_back(problem.bias_sizes[axis]);
  }
  check_operands(given, shape, bias_sizes, product(problem.kernel));
  problem.query = map_operand(given.query, shape.rank);
  problem.key = map_operand(given.key, shape.rank);
  problem.value = map_operand(given.value, shape.rank);
  if (given.extra_key) problem.extra_key = extra_operand(*given.extra_key);
  if (given.extra_value) problem.extra_value = extra_operand(*given.extra_value);
  if (given.extra_bias) problem.extra_bias = head_operand(*given.extra_bias, shape.rank);
  if (given.place_bias) problem.place_bias = head_operand(*given.place_bias, shape.rank);
  if (given.post) problem.post = map_operand(*given.post, shape.rank);
  if (given.bias) problem.bias = given.bias->const_data_ptr<float>();
  return problem;
}

// Results do not hang on the bands: enough of them to keep all threads busy, or few, as each packs the rows around it.
int64_t forward_band(const LocalProblem& problem) {
  const int64_t rows = ceil_div(problem.grid[0], problem.dilation[0]);
  const int64_t maps = std::max<int64_t>(problem.batch * problem.heads * product(problem.dilation), 1);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = threads == 1 ? 1 : ceil_div(4 * threads, maps);
  return std::max<int64_t>({ceil_div(rows, bands), std::min(rows, 2 * problem.kernel[0]), 1});
}

}  // namespace

std::tuple<Tensor, Tensor> local_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& extra_key, const std::optional<Tensor>& extra_value,
    const std::optional<Tensor>& extra_bias, const std::optional<Tensor>& place_bias, const std::optional<Tensor>& post,
    const Sizes& kernel_size, const Sizes& dilation, bool slides, double scale) {
  LocalProblem problem = local_problem({query, key, value, bias, extra_key, extra_value, extra_bias, place_bias, post},
                                       {kernel_size, dilation, slides, scale});
  problem.band = forward_band(problem);
  Sizes tokens = to_vector(query.sizes());
  tokens.pop_back();
  const Tensor lse = new_floats(query, tokens);
  const Tensor output = torch::stable::new_empty(query, with(tokens, {problem.value_channels}));
  const LocalResults results = {output.mutable_data_ptr(), lse.mutable_data_ptr<float>()};
  torch::stable::parallel_for(0, pieces_of(problem), 1, [&](int64_t begin, int64_t end) {
    kernels().local_forward(problem, results, begin, end);
  });
  return {output, lse};
}

namespace {

// Sums of `parts` partial sums, `[outer, parts, inner]` to `[outer, inner]`, always in this order.
void sum_parts(const float* source, int64_t outer, int64_t parts, int64_t inner, float* target) {
  for (int64_t each = 0; each < outer; ++each, target += inner) {
    std::fill(target, target + inner, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t at = 0; at < inner; ++at) target[at] += *source++;
    }
  }
}

// Which sums there are hangs on the shape alone, so that results do not hang on the number of threads.
int64_t backward_band(const LocalProblem& problem) {
  constexpr int64_t kPieces = 4;
  const int64_t maps = std::max<int64_t>(problem.batch * problem.heads * product(problem.dilation), 1);
  const int64_t rows = ceil_div(problem.grid[0], problem.dilation[0]);
  return std::max<int64_t>({ceil_div(rows, ceil_div(kPieces, maps)), std::min(rows, 2 * problem.kernel[0]), 1});
}

// Gradients of what all queries share: partial sums of every piece of work, and where their sums go.
struct SharedGradients {
  Tensor bias, extra_key, extra_value, extra_bias, place_bias;
  std::vector<float> bias_parts, extra_key_parts, extra_value_parts, extra_bias_parts, place_bias_parts;

  SharedGradients(const LocalOperands& given, const LocalProblem& problem, LocalGradients& wanted) {
    const int64_t pieces = pieces_of(problem);
    const auto make = [&](const std::optional<Tensor>& operand, std::vector<float>& parts, int64_t count, float*& to) {
      if (operand) parts.resize(count);
      if (operand) to = parts.data();
      return new_floats(given.query, operand ? to_vector(operand->sizes()) : Sizes{0});
    };
    bias = make(given.bias, bias_parts, pieces * product(problem.bias_sizes), wanted.bias);
    extra_key = make(given.extra_key, extra_key_parts, pieces * problem.extras * problem.channels, wanted.extra_key);
    extra_value = make(given.extra_value, extra_value_parts, pieces * problem.extras * problem.value_channels,
                       wanted.extra_value);
    const int64_t tokens = problem.batch * problem.heads * product(problem.grid);
    extra_bias = make(given.extra_bias, extra_bias_parts, tokens * problem.extras, wanted.extra_bias);
    place_bias = make(given.place_bias, place_bias_parts, tokens * product(problem.kernel), wanted.place_bias);
  }

  void sum(const LocalProblem& problem) const {
    const int64_t maps = problem.batch * problem.heads, pieces = maps == 0 ? 0 : pieces_of(problem) / maps;
    if (bias.numel() > 0) sum_images(problem, pieces * product(problem.bias_sizes));
    sum_extras(problem, extra_key_parts, pieces, problem.channels, extra_key);
    sum_extras(problem, extra_value_parts, pieces, problem.value_channels, extra_value);
    sum_parts(extra_bias_parts.data(), 1, problem.batch, extra_bias.numel(), extra_bias.mutable_data_ptr<float>());
    sum_parts(place_bias_parts.data(), 1, problem.batch, place_bias.numel(), place_bias.mutable_data_ptr<float>());
  }

 private:
  // Parts of the bias are `[batch, heads, pieces, entries]`.
  void sum_images(const LocalProblem& problem, int64_t of_head) const {
    const int64_t entries = product(problem.bias_sizes);
    float* target = bias.mutable_data_ptr<float>();
    std::fill(target, target + problem.heads * entries, 0.0f);
    const float* source = bias_parts.data();
    for (int64_t image = 0; image < problem.batch; ++image) {
      for (int64_t head = 0; head < problem.heads; ++head) {
        for (int64_t at = 0; at < of_head; ++at) target[head * entries + at % entries] += *source++;
      }
    }
  }

  // From `[batch, heads, pieces, extras, channels]` to `[batch, extras, heads, channels]`.
  static void sum_extras(const LocalProblem& problem, const std::vector<float>& parts, int64_t pieces, int64_t channels,
                         const Tensor& target) {
    if (parts.empty()) return;
    const int64_t inner = problem.extras * channels;
    std::vector<float> sums(problem.batch * problem.heads * inner);
    sum_parts(parts.data(), problem.batch * problem.heads, pieces, inner, sums.data());
    float* to = target.mutable_data_ptr<float>();
    for (int64_t image = 0; image < problem.batch; ++image) {
      for (int64_t extra = 0; extra < problem.extras; ++extra) {
        for (int64_t head = 0; head < problem.heads; ++head, to += channels) {
          const float* from = sums.data() + ((image * problem.heads + head) * problem.extras + extra) * channels;
          std::copy(from, from + channels, to);
        }
      }
    }
  }
};

}  // namespace

Tensors local_attention_backward(
    const Tensor& grad_output, const Tensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& extra_key, const std::optional<Tensor>& extra_value,
    const std::optional<Tensor>& extra_bias, const std::optional<Tensor>& place_bias, const std::optional<Tensor>& post,
    const Sizes& kernel_size, const Sizes& dilation, bool slides, double scale) {
  const LocalOperands given{query, key, value, bias, extra_key, extra_value, extra_bias, place_bias, post};
  LocalProblem problem = local_problem(given, {kernel_size, dilation, slides, scale});
  problem.band = backward_band(problem);
  const int64_t rank = query.dim() - 3;
  Sizes tokens = to_vector(query.sizes());
  tokens.pop_back();
  check_dtype("grad_output", grad_output, query.scalar_type());
  check_shape("grad_output", grad_output, with(tokens, {problem.value_channels}));
  check_dtype("grad_lse", grad_lse, ScalarType::Float);
  check_shape("grad_lse", grad_lse, tokens);
  LocalGradients wanted{};
  wanted.output = map_operand(grad_output, rank);
  wanted.lse = map_operand(torch::stable::unsqueeze(grad_lse, -1), rank);
  const Tensor grad_query = new_floats(query, to_vector(query.sizes()));
  const Tensor grad_key = new_floats(query, to_vector(key.sizes()));
  const Tensor grad_value = new_floats(query, to_vector(value.sizes()));
  const Tensor grad_post = new_floats(query, post ? to_vector(post->sizes()) : Sizes{0});
  wanted.query = grad_query.mutable_data_ptr<float>(), wanted.key = grad_key.mutable_data_ptr<float>();
  wanted.value = grad_value.mutable_data_ptr<float>();
  wanted.post = post ? grad_post.mutable_data_ptr<float>() : nullptr;
  SharedGradients shared(given, problem, wanted);
  torch::stable::parallel_for(0, pieces_of(problem), 1, [&](int64_t begin, int64_t end) {
    kernels().local_backward(problem, wanted, begin, end);
  });
  shared.sum(problem);
  return {grad_query,         grad_key,          grad_value,        shared.bias, shared.extra_key,
          shared.extra_value, shared.extra_bias, shared.place_bias, grad_post};
}

}  // namespace attnrewrite
