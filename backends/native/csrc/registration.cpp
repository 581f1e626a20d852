// The operators that Python calls, `torch.ops.attnrewrite_native`. They are raw: no gradients, no fakes.
#include "operators.h"

#include <torch/csrc/stable/library.h>

#define LOCAL_OPERANDS \
  "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? extra_key, Tensor? extra_value, Tensor? extra_bias, " \
  "Tensor? place_bias, Tensor? post"
#define CONV_GLU "Tensor gate, Tensor weight, Tensor? bias, Tensor? value, str activation, str pre_activation"
#define LOCAL_GEOMETRY "int[] kernel_size, int[] dilation, bool slides, float scale"

STABLE_TORCH_LIBRARY(attnrewrite_native, library) {
  library.def("instruction_set() -> str");
  library.def("exponential(Tensor source) -> Tensor");
  library.def("local_attention(" LOCAL_OPERANDS ", " LOCAL_GEOMETRY ") -> (Tensor, Tensor)");
  library.def("local_attention_backward(Tensor grad_output, Tensor grad_lse, " LOCAL_OPERANDS ", " LOCAL_GEOMETRY
              ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("conv_glu(" CONV_GLU ") -> Tensor");
  library.def("conv_glu_backward(Tensor grad_output, bool[] wanted, " CONV_GLU
              ") -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(attnrewrite_native, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&attnrewrite::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(attnrewrite_native, CPU, library) {
  library.impl("exponential", TORCH_BOX(&attnrewrite::exponential));
  library.impl("local_attention", TORCH_BOX(&attnrewrite::local_attention));
  library.impl("local_attention_backward", TORCH_BOX(&attnrewrite::local_attention_backward));
  library.impl("conv_glu", TORCH_BOX(&attnrewrite::conv_glu));
  library.impl("conv_glu_backward", TORCH_BOX(&attnrewrite::conv_glu_backward));
}
