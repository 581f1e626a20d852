"""Neighborhood attention as a function of tensors, and the layers of NAT and DiNAT."""

from __future__ import annotations

from golden import Golden, Subject
from torch import nn

from attnrewrite.functional import neighborhood_attention

OPERANDS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "rpb": "bias",
    "add_k": "additional_keys",
    "add_v": "additional_values",
}


def build(golden: Golden, backend: str | None = None) -> Subject:
    def function(inputs):
        operands = {OPERANDS[name]: tensor for name, tensor in inputs.items()}
        output, lse = neighborhood_attention(**operands, **golden.call, backend=backend, return_lse=True)
        return {"output": output, "extra/lse": lse}

    if golden.family == "na":
        return Subject(nn.Module(), function)
    raise LookupError(f"no counterpart for {golden.official_class}")
