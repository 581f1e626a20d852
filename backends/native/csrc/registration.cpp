// The operators that Python calls, `torch.ops.attnrewrite_native`. They are raw: no gradients, no fakes.
#include "operators.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(attnrewrite_native, library) {
  library.def("instruction_set() -> str");
  library.def("exponential(Tensor source) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(attnrewrite_native, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&attnrewrite::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(attnrewrite_native, CPU, library) {
  library.impl("exponential", TORCH_BOX(&attnrewrite::exponential));
}
