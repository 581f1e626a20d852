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

INLINE void add_vectors(float* target, const float* source, int64_t count) {
  for (int64_t at = 0; at < count * kLanes; at += kLanes) store(target + at, load(target + at) + load(source + at));
}

INLINE Floats broadcast(float value) { return Floats{} + value; }

INLINE Ints lane_numbers() {
  static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints result;
  std::memcpy(&result, numbers, sizeof(result));
  return result;
}

// Keeps a value that is used twice in its register: compilers load it again each time, which is what costs here.
INLINE Floats held(Floats values) {
#if defined(ISA_AVX512)
  asm("" : "+v"(values));
#elif defined(ISA_AVX2)
  asm("" : "+x"(values));
#endif
  return values;
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

// The same of two sources: lanes from kLanes on are the second's.
INLINE Floats permute_two(Floats first, Floats second, Ints from) {
#if defined(__clang__)
  Floats result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = from[lane] < kLanes ? first[from[lane]] : second[from[lane] - kLanes];
  }
  return result;
#else
  return __builtin_shuffle(first, second, from);
#endif
}

INLINE float sum_of_lanes(Floats values) {
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += values[lane];
  return result;
}

INLINE bool any(Ints condition) {
  int32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result |= condition[lane];
  return result != 0;
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

// e to the power of every lane, within 2 units in the last place; below -87.33 it is 0, and above 88.37 infinity. The
// nearest power of two is taken out; for the rest a polynomial, whose coefficients are Taylor's.
INLINE Floats exp(Floats x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.37f;
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
  sum *= bits_as_floats((floats_as_bits(shifted) << 23) + 0x3f800000);  // of a NaN this is some number, and NaN stays
  sum = choose(x < kLowest, broadcast(0.0f), sum);
  return choose(x > kHighest, broadcast(kInfinity), sum);
}

// Natural logarithm of what is no subnormal number: the exponent apart, for the rest the series of the area tangent.
INLINE Floats log(Floats x) {
  const Ints bits = floats_as_bits(x);
  // The exponent of a number that is below the root of 2 times a power of two, and at least the root of 1/2 of it.
  const Ints power = (bits - 0x3f3504f3) >> 23;
  const Floats rest = bits_as_floats(bits - (power << 23));
  const Floats ratio = (rest - 1.0f) / (rest + 1.0f), square = ratio * ratio;
  Floats sum = broadcast(2.0f / 9);
  sum = sum * square + 2.0f / 7;
  sum = sum * square + 2.0f / 5;
  sum = sum * square + 2.0f / 3;
  sum = sum * square + 2.0f;
  sum = sum * ratio + __builtin_convertvector(power, Floats) * 0.693147181f;
  sum = choose(x == 0.0f, broadcast(-kInfinity), sum);
  return choose((x > 0.0f) & (x < kInfinity), sum, choose(x == 0.0f, sum, x + x));
}

}  // namespace attnrewrite::ISA
