// From operands of any layout to tiles and rows with the channel outside and the token inside, and back.
#pragma once

#include "local_attention.h"
#include "vectors.h"

namespace attnrewrite::ISA {

constexpr int64_t kCacheLine = 64;  // bytes

using Shorts = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

INLINE float to_float(float value) { return value; }

INLINE float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

INLINE Floats load_any(const float* source) { return load(source); }

INLINE Floats load_any(const uint16_t* source) {
  Shorts bits;
  std::memcpy(&bits, source, sizeof(bits));
  return bits_as_floats(__builtin_convertvector(bits, Ints) << 16);
}

INLINE void store_any(float* target, Floats values) { store(target, values); }

// To the nearest bfloat16, ties to even; a NaN keeps its upper bits and stays one.
INLINE void store_any(uint16_t* target, Floats values) {
  const Ints bits = floats_as_bits(values);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Ints kept = values == values ? rounded : (bits | 0x400000);
  const Shorts halves = __builtin_convertvector((kept >> 16) & 0xffff, Shorts);
  std::memcpy(target, &halves, sizeof(halves));
}

// One exchange of a transposition: blocks of `kStep` lanes above the diagonal with those below. `first` and `second` are
// rows `kStep` apart; of each lane the masks say which lane of both it becomes.
template <int kStep>
INLINE void exchange(Floats& first, Floats& second) {
  Ints low, high;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = (lane & kStep) ? lane - kStep + kLanes : lane;
    high[lane] = (lane & kStep) ? lane + kLanes : lane + kStep;
  }
  const Floats one = first, two = second;
  first = permute_two(one, two, low);
  second = permute_two(one, two, high);
}

// A square of lanes, transposed in place by exchanging ever larger blocks off the diagonal.
template <int kStep = 1>
INLINE void transpose(Floats (&block)[kLanes]) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    if ((row & kStep) == 0) exchange<kStep>(block[row], block[row + kStep]);
  }
  if constexpr (2 * kStep < kLanes) transpose<2 * kStep>(block);
}

// A square of tokens and channels, of which the first `tokens` tokens exist; the others are 0.
template <typename T>
INLINE void pack_square(const T* source, int64_t token_stride, int64_t tokens, float factor, float* target,
                        int64_t target_stride) {
  Floats block[kLanes];
#pragma GCC unroll 16
  for (int token = 0; token < kLanes; ++token) {
    block[token] = token < tokens ? load_any(source) * factor : Floats{};
    source += token_stride;
  }
  transpose(block);
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    store(target, block[row]);
    target += target_stride;
  }
}

// Tokens `token_stride` apart in memory to `target[channel * target_stride + token]`, times `factor`. Behind the last
// token as many zeros may be written as fill a vector.
template <typename T>
static void pack(const T* source, int64_t token_stride, int64_t channel_stride, int64_t tokens, int64_t channels,
                 float factor, float* target, int64_t target_stride) {
  const int64_t in_squares = channel_stride == 1 ? channels / kLanes * kLanes : 0;
  for (int64_t token = 0; token < tokens; token += kLanes) {
    for (int64_t channel = 0; channel < in_squares; channel += kLanes) {
      const T* from = source + token * token_stride + channel;
      float* to = target + channel * target_stride + token;
      if (tokens - token >= kLanes) {
        pack_square(from, token_stride, kLanes, factor, to, target_stride);
      } else {
        pack_square(from, token_stride, tokens - token, factor, to, target_stride);
      }
    }
  }
  for (int64_t channel = in_squares; channel < channels; ++channel) {
    const T* from = source + channel * channel_stride;
    float* to = target + channel * target_stride;
    int64_t token = 0;
    if (token_stride == 1) {
      for (; token + kLanes <= tokens; token += kLanes) store(to + token, load_any(from + token) * factor);
    }
    for (; token < tokens; ++token) to[token] = to_float(from[token * token_stride]) * factor;
  }
}

// A run of tokens of an operand, from the element at `offset`.
INLINE void pack(const Operand& operand, int64_t offset, int64_t token_stride, int64_t tokens, int64_t channels,
                 float factor, float* target, int64_t target_stride) {
  if (operand.is_bfloat16) {
    pack(static_cast<const uint16_t*>(operand.data) + offset, token_stride, operand.channel_stride, tokens, channels,
         factor, target, target_stride);
  } else {
    pack(static_cast<const float*>(operand.data) + offset, token_stride, operand.channel_stride, tokens, channels,
         factor, target, target_stride);
  }
}

INLINE float element(const Operand& operand, int64_t offset) {
  return operand.is_bfloat16 ? to_float(static_cast<const uint16_t*>(operand.data)[offset])
                             : static_cast<const float*>(operand.data)[offset];
}

// Asks for the memory of tokens that are packed next: their distance is none that processors foresee.
INLINE void prefetch(const Operand& operand, int64_t offset, int64_t token_stride, int64_t tokens, int64_t channels) {
  if (operand.channel_stride != 1) return;
  const int64_t size = operand.is_bfloat16 ? 2 : 4;
  const char* first = static_cast<const char*>(operand.data) + offset * size;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t byte = 0; byte < channels * size; byte += 128) {
      __builtin_prefetch(first + token * token_stride * size + byte);  // processors fetch lines in pairs
    }
  }
}

// A tile `[channels, kLanes]` to tokens `token_stride` apart whose channels are neighbors in memory.
template <typename T>
static void unpack(const float* tile, int64_t tokens, int64_t channels, T* target, int64_t token_stride) {
  int64_t channel = 0;
  for (; channel + kLanes <= channels; channel += kLanes) {
    Floats block[kLanes];
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) block[row] = load(tile + (channel + row) * kLanes);
    transpose(block);
    T* to = target + channel;
#pragma GCC unroll 16
    for (int token = 0; token < kLanes; ++token) {
      if (token < tokens) store_any(to, block[token]);
      to += token_stride;
    }
  }
  for (; channel < channels; ++channel) {
    T one[kLanes];
    store_any(one, load(tile + channel * kLanes));
    for (int64_t token = 0; token < tokens; ++token) target[token * token_stride + channel] = one[token];
  }
}

}  // namespace attnrewrite::ISA
