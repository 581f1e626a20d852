// The exponential that all softmaxes here use, alone, so that its accuracy can be tested.
#include "declarations.h"
#include "vectors.h"

namespace attnrewrite::ISA {

void exponential(const float* source, float* target, int64_t count) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) store(target + at, exp(load(source + at)));
  if (at < count) store_first(target + at, count - at, exp(load_first(source + at, count - at)));
}

}  // namespace attnrewrite::ISA
