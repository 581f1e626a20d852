// Vectors of floats as wide as the registers that a kernel is compiled for, in the vector extensions of GCC and Clang.
#pragma once

#include <cstdint>
#include <cstring>

namespace attnrewrite::ISA {

#if defined(ISA_AVX512)
constexpr int kLanes = 16;
#elif defined(ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#define INLINE static inline __attribute__((always_inline))

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(float))));

// Loads and stores have no alignment to keep.
INLINE Floats load(const float* source) {
  Floats result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

INLINE void store(float* target, Floats values) { std::memcpy(target, &values, sizeof(values)); }

// The first `count` lanes; the others are 0. Nothing behind them is read.
INLINE Floats load_first(const float* source, int64_t count) {
  Floats result = {};
  for (int64_t lane = 0; lane < count; ++lane) result[lane] = source[lane];
  return result;
}

INLINE void store_first(float* target, int64_t count, Floats values) {
  for (int64_t lane = 0; lane < count; ++lane) target[lane] = values[lane];
}

INLINE Floats broadcast(float value) { return Floats{} + value; }

INLINE Ints lane_numbers() {
  Ints result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = lane;
  return result;
}

// Of every lane the source's lane that `from` names.
INLINE Floats permute(Floats source, Ints from) {
#if defined(__clang__)
  Floats result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = source[from[lane]];
  return result;
#else
  return __builtin_shuffle(source, from);
#endif
}

// All bits where `condition` holds, to choose between values without arithmetic: 0 times NaN is NaN.
INLINE Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

// A NaN among `values` is passed over, and stays what it is among `kept`.
INLINE Floats larger(Floats kept, Floats values) { return values > kept ? values : kept; }

INLINE Floats bits_as_floats(Ints bits) {
  Floats result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

INLINE Ints floats_as_bits(Floats values) {
  Ints result;
  std::memcpy(&result, &values, sizeof(result));
  return result;
}

constexpr float kInfinity = __builtin_inff();

// e to the power of every lane, within 2 units in the last place. What would be smaller than the smallest normal
// number is 0. The power of two nearest is taken out; for the rest a polynomial, whose coefficients are Taylor's.
INLINE Floats exp(Floats x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.72283f;
  // 1.5 * 2^23: a sum with it has no room for a fraction, so it is rounded, and its low bits are the integer.
  constexpr float kRounder = 12582912.0f;
  const Floats shifted = x * 1.44269504f + kRounder;
  const Floats power = shifted - kRounder;
  const Floats rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
  Floats sum = broadcast(1.0f / 5040);
  sum = sum * rest + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  // 2^128 is no float: the exponent goes in halves.
  const Ints whole = floats_as_bits(shifted) - floats_as_bits(broadcast(kRounder));
  const Ints half = whole >> 1;
  sum = sum * bits_as_floats((half + 127) << 23) * bits_as_floats((whole - half + 127) << 23);
  sum = choose(x < kLowest, broadcast(0.0f), sum);
  sum = choose(x > kHighest, broadcast(kInfinity), sum);
  return choose(x == x, sum, x);
}

}  // namespace attnrewrite::ISA
