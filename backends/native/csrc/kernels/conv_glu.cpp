// The convolutional gate, forward and backward. A vector holds neighboring channels; a piece of work is the map of one
// image for a few of them, copied first with zeros around it: then no filter asks where the map ends.
#include "activations.h"
#include "buffer.h"
#include "declarations.h"
#include "packing.h"

namespace attnrewrite::ISA {

namespace {

INLINE int64_t lesser(int64_t one, int64_t other) { return one < other ? one : other; }

// A vector of channels at one place; `count` of them exist.
template <typename T, bool kWhole>
INLINE Floats load_channels(const T* source, int64_t count) {
  if (kWhole) return load_any(source);
  T some[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = source[lane];
  return load_any(some);
}

template <typename T, bool kWhole>
INLINE void store_channels(T* target, int64_t count, Floats values) {
  if (kWhole) return store_any(target, values);
  T some[kLanes];
  store_any(some, values);
  for (int64_t lane = 0; lane < count; ++lane) target[lane] = some[lane];
}

// A map of a few channels of one image.
template <typename T>
struct Plane {
  T* data;
  int64_t row_stride, column_stride;

  T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// A vector for every place of a map, with zeros around it as far as a filter reaches.
template <int kSide>
class Padded {
 public:
  Padded(int64_t height, int64_t width)
      : row_stride((width + kSide - 1) * kLanes), memory_((height + kSide - 1) * row_stride) {
    std::memset(memory_.data, 0, sizeof(float) * (height + kSide - 1) * row_stride);
  }

  float* at(int64_t row, int64_t column) const { return filtered(row + kSide / 2, column + kSide / 2); }

  // The first place that the filter around a place of the map covers.
  float* filtered(int64_t row, int64_t column) const { return memory_.data + row * row_stride + column * kLanes; }

  const int64_t row_stride;

 private:
  const Buffer memory_;
};

constexpr int kTogether = 4;  // places of a row: their sums do not wait for each other, and they share loads

// The sums over the filters around `kColumns` neighboring places of a row.
template <int kSide, int kColumns>
INLINE void filter(const Padded<kSide>& map, int64_t row, int64_t column, const Floats (&weight)[kSide * kSide],
                   Floats (&sums)[kColumns]) {
  const float* source = map.filtered(row, column);
#pragma GCC unroll 5
  for (int down = 0; down < kSide; ++down, source += map.row_stride) {
#pragma GCC unroll 8
    for (int at = 0; at < kColumns + kSide - 1; ++at) {
      const Floats loaded = load(source + at * kLanes);
#pragma GCC unroll 4
      for (int each = 0; each < kColumns; ++each) {
        if (at >= each && at - each < kSide) sums[each] += weight[down * kSide + at - each] * loaded;
      }
    }
  }
}

// One image and the channels from `first` on, at most a vector of them.
template <typename T, int kSide, bool kWhole>
class Gate {
 public:
  Gate(const ConvGluProblem& problem, int64_t image, int64_t first)
      : problem_(problem),
        image_(image),
        first_(first),
        count_(lesser(kLanes, problem.channels - first)),
        gate_(plane(problem.gate)),
        value_(plane(problem.value)),
        padded_(problem.height, problem.width) {
    bias_ = problem.bias == nullptr ? Floats{} : load_channels<float, kWhole>(problem.bias + first, count_);
    for (int at = 0; at < kSide * kSide; ++at) {
      weight_[at] = load_channels<float, kWhole>(problem.weight + at * problem.channels + first, count_);
    }
    const bool is_plain = problem.pre_activation == Activation::kIdentity;
    for (int64_t row = 0; row < problem.height; ++row) {
      for (int64_t column = 0; column < problem.width; ++column) {
        const Floats loaded = load_channels<T, kWhole>(gate_.at(row, column), count_);
        store(padded_.at(row, column), is_plain ? loaded : activated(problem.pre_activation, loaded).value);
      }
    }
  }

  void forward(void* output) const {
    const Plane<T> target = contiguous(static_cast<T*>(output));
    for_each_sum(padded_, weight_, [&](int64_t row, int64_t column, Floats sum) {
      Floats result = activated(problem_.activation, sum + bias_).value;
      if (value_.data != nullptr) result *= load_channels<T, kWhole>(value_.at(row, column), count_);
      store_channels<T, kWhole>(target.at(row, column), count_, result);
    });
  }

  void backward(const ConvGluGradients& gradients) const {
    // Gradients of what the convolution gives.
    const Padded<kSide> inner(problem_.height, problem_.width);
    const Plane<const T> arriving = plane(gradients.output);
    for_each_sum(padded_, weight_, [&](int64_t row, int64_t column, Floats sum) {
      const Activated made = activated(problem_.activation, sum + bias_);
      Floats gradient = load_channels<T, kWhole>(arriving.at(row, column), count_);
      if (value_.data != nullptr) {
        if (gradients.value != nullptr) {
          float* target = contiguous(gradients.value).at(row, column);
          store_channels<float, kWhole>(target, count_, gradient * made.value);
        }
        gradient *= load_channels<T, kWhole>(value_.at(row, column), count_);
      }
      store(inner.at(row, column), gradient * made.slope);
    });
    if (gradients.weight != nullptr) to_weight(inner, gradients.weight);
    if (gradients.bias != nullptr) to_bias(inner, gradients.bias);
    if (gradients.gate != nullptr) to_gate(inner, gradients.gate);
  }

 private:
  Plane<const T> plane(const ChannelsLast& map) const {
    const T* data = static_cast<const T*>(map.data);
    return {data == nullptr ? nullptr : data + image_ * map.batch_stride + first_, map.row_stride, map.column_stride};
  }

  template <typename U>
  Plane<U> contiguous(U* data) const {
    const int64_t row_stride = problem_.width * problem_.channels;
    return {data + image_ * problem_.height * row_stride + first_, row_stride, problem_.channels};
  }

  // Hands over every place of the map with the sum of the filter around it.
  template <typename Body>
  void for_each_sum(const Padded<kSide>& map, const Floats (&weight)[kSide * kSide], const Body& body) const {
    for (int64_t row = 0; row < problem_.height; ++row) {
      int64_t column = 0;
      for (; column + kTogether <= problem_.width; column += kTogether) {
        Floats sums[kTogether] = {};
        filter<kSide>(map, row, column, weight, sums);
        for (int each = 0; each < kTogether; ++each) body(row, column + each, sums[each]);
      }
      for (; column < problem_.width; ++column) {
        Floats sums[1] = {};
        filter<kSide>(map, row, column, weight, sums);
        body(row, column, sums[0]);
      }
    }
  }

  void to_weight(const Padded<kSide>& inner, float* target) const {
    Floats sums[kSide * kSide] = {};
    for (int64_t row = 0; row < problem_.height; ++row) {
      for (int64_t column = 0; column < problem_.width; ++column) {
        const Floats gradient = load(inner.at(row, column));
        const float* source = padded_.filtered(row, column);
#pragma GCC unroll 25
        for (int at = 0; at < kSide * kSide; ++at) {
          sums[at] += gradient * load(source + at / kSide * padded_.row_stride + at % kSide * kLanes);
        }
      }
    }
    target += image_ * kSide * kSide * problem_.channels + first_;
    for (int at = 0; at < kSide * kSide; ++at) {
      store_channels<float, kWhole>(target + at * problem_.channels, count_, sums[at]);
    }
  }

  void to_bias(const Padded<kSide>& inner, float* target) const {
    Floats sum = {};
    for (int64_t row = 0; row < problem_.height; ++row) {
      for (int64_t column = 0; column < problem_.width; ++column) sum += load(inner.at(row, column));
    }
    store_channels<float, kWhole>(target + image_ * problem_.channels + first_, count_, sum);
  }

  void to_gate(const Padded<kSide>& inner, float* target) const {
    Floats mirrored[kSide * kSide];
    for (int at = 0; at < kSide * kSide; ++at) mirrored[at] = weight_[kSide * kSide - 1 - at];
    const Plane<float> map = contiguous(target);
    for_each_sum(inner, mirrored, [&](int64_t row, int64_t column, Floats gradient) {
      if (problem_.pre_activation != Activation::kIdentity) {
        const Floats loaded = load_channels<T, kWhole>(gate_.at(row, column), count_);
        const Activated made = activated(problem_.pre_activation, loaded);
        gradient = gradient * made.slope;
      }
      store_channels<float, kWhole>(map.at(row, column), count_, gradient);
    });
  }

  const ConvGluProblem& problem_;
  const int64_t image_, first_, count_;
  const Plane<const T> gate_, value_;
  const Padded<kSide> padded_;  // what is convolved
  Floats bias_, weight_[kSide * kSide];
};

// Runs `kernel` on a `Gate` for every vector of channels of the pieces from `begin` to `end`.
template <typename T, int kSide, typename Kernel>
void for_each_gate(const ConvGluProblem& problem, int64_t begin, int64_t end, const Kernel& kernel) {
  const int64_t blocks = ceil_div(problem.channels, kChannelsAtATime);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t start = piece % blocks * kChannelsAtATime;
    for (int64_t first = start; first < lesser(problem.channels, start + kChannelsAtATime); first += kLanes) {
      if (first + kLanes <= problem.channels) {
        kernel(Gate<T, kSide, true>(problem, piece / blocks, first));
      } else {
        kernel(Gate<T, kSide, false>(problem, piece / blocks, first));
      }
    }
  }
}

template <typename Kernel>
void dispatch(const ConvGluProblem& problem, int64_t begin, int64_t end, const Kernel& kernel) {
  if (problem.is_bfloat16) {
    if (problem.side == 3) return for_each_gate<uint16_t, 3>(problem, begin, end, kernel);
    return for_each_gate<uint16_t, 5>(problem, begin, end, kernel);
  }
  if (problem.side == 3) return for_each_gate<float, 3>(problem, begin, end, kernel);
  return for_each_gate<float, 5>(problem, begin, end, kernel);
}

}  // namespace

void conv_glu_forward(const ConvGluProblem& problem, void* output, int64_t begin, int64_t end) {
  dispatch(problem, begin, end, [=](const auto& gate) { gate.forward(output); });
}

void conv_glu_backward(const ConvGluProblem& problem, const ConvGluGradients& gradients, int64_t begin, int64_t end) {
  dispatch(problem, begin, end, [&](const auto& gate) { gate.backward(gradients); });
}

}  // namespace attnrewrite::ISA
