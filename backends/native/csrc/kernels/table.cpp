// The kernels of one instruction set.
#include "declarations.h"
#include "kernels.h"
#include "vectors.h"

namespace attnrewrite::ISA {

extern const Kernels table;
const Kernels table = {NAME_OF(ISA), kLanes, exponential, local_forward, local_backward, conv_glu_forward,
                       conv_glu_backward};

}  // namespace attnrewrite::ISA
