"""The attention operators as ``torch.library`` custom ops, and the rules that say which key a query sees.

Importing this package registers ``torch.ops.attnrewrite.local_attention`` and
``torch.ops.attnrewrite.grouped_attention``.
"""

from .grouped_attention import grouped_attention
from .local_attention import local_attention

__all__ = ["grouped_attention", "local_attention"]
