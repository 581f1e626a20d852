// Which variant of the kernels runs on this processor.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

namespace attnrewrite {

#ifdef HAS_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef HAS_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
namespace baseline {
extern const Kernels table;
}

namespace {

struct Variant {
  const Kernels* table;
  bool runs_here;
};

const Kernels& choose() {
  const Variant variants[] = {
#ifdef HAS_AVX512
      {&avx512::table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("fma")},
#endif
#ifdef HAS_AVX2
      {&avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&baseline::table, true},
  };
  const char* wanted = std::getenv("ATTNREWRITE_INSTRUCTION_SET");
  for (const Variant& variant : variants) {
    const bool asked = wanted == nullptr || std::strcmp(wanted, variant.table->instruction_set) == 0;
    if (asked && variant.runs_here) return *variant.table;
  }
  return *std::rbegin(variants)->table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace attnrewrite
