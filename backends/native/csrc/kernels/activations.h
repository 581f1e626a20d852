// Activations and their derivatives, within some units of the last place of 1 times their argument.
#pragma once

#include "conv_glu.h"
#include "vectors.h"

namespace attnrewrite::ISA {

// The error function: `1 - exp(-x * p(x))` for the absolute value of its argument, with `p` fitted to the logarithm of
// what is missing to 1, on [0, 4]; beyond 4 that is less than float32 has.
INLINE Floats erf(Floats x) {
  const Floats positive = x < 0.0f ? -x : x;
  const Floats at = positive > 4.0f ? broadcast(4.0f) : positive;
  Floats sum = broadcast(3.1440060e-5f);
  sum = sum * at - 3.0880104e-4f;
  sum = sum * at + 1.0323970e-3f;
  sum = sum * at + 5.3694198e-4f;
  sum = sum * at - 1.9583968e-2f;
  sum = sum * at + 1.0291962e-1f;
  sum = sum * at + 6.3659775e-1f;
  sum = sum * at + 1.1283803f;
  const Floats result = 1.0f - exp(-at * sum);
  return x < 0.0f ? -result : result;
}

INLINE Floats tanh(Floats x) { return 1.0f - 2.0f / (1.0f + exp(2.0f * x)); }

// What an activation gives, and its derivative.
struct Activated {
  Floats value, slope;
};

INLINE Activated activated(Activation activation, Floats x) {
  switch (activation) {
    case Activation::kGelu: {
      const Floats share = 0.5f + 0.5f * erf(x * 0.70710678f);
      return {x * share, share + x * exp(-0.5f * x * x) * 0.39894228f};
    }
    case Activation::kGeluTanh: {
      // Far out the square makes no difference any more, but an infinite one would: 0 times infinity is NaN.
      const Floats far = broadcast(1e4f), square = x * x > far ? far : x * x;
      const Floats bent = tanh(x * (0.79788456f + 0.035677408f * square));
      const Floats share = 0.5f + 0.5f * bent;
      return {x * share, share + 0.5f * x * (1.0f - bent * bent) * (0.79788456f + 0.10703222f * square)};
    }
    case Activation::kSilu: {
      const Floats share = 1.0f / (1.0f + exp(-x));
      return {x * share, share * (1.0f + x * (1.0f - share))};
    }
    case Activation::kRelu: {
      const Ints is_cut = x <= 0.0f;
      return {is_cut ? Floats{} : x, is_cut ? Floats{} : broadcast(1.0f)};
    }
    default: return {x, broadcast(1.0f)};
  }
}

}  // namespace attnrewrite::ISA
