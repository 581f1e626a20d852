"""The operators: each one a file with its problem (operands and geometry), what it means, costs and checks.

Importing this package registers all of them under ``torch.ops.attnrewrite``.
"""

from .axial_attention import AXIAL_ATTENTION, AxialProblem
from .biased_attention import BIASED_ATTENTION, BiasedProblem
from .conv_glu import CONV_GLU, ConvGluProblem
from .grouped_attention import GROUPED_ATTENTION, GroupedProblem
from .local_attention import LOCAL_ATTENTION, LocalProblem
from .operator import Operator
from .problem import Problem
from .soft_split import SOFT_SPLIT, SoftSplitProblem

__all__ = [
    "AXIAL_ATTENTION",
    "BIASED_ATTENTION",
    "CONV_GLU",
    "GROUPED_ATTENTION",
    "LOCAL_ATTENTION",
    "SOFT_SPLIT",
    "AxialProblem",
    "BiasedProblem",
    "ConvGluProblem",
    "GroupedProblem",
    "LocalProblem",
    "Operator",
    "Problem",
    "SoftSplitProblem",
]
