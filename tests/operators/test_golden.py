"""Parity with the official operators, from stored results (float64, see the metadata of each file)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attention_cases import deviation
from safetensors import safe_open

from attnrewrite.functional import neighborhood_attention

FOLDER = Path(__file__).parents[1] / "golden" / "neighborhood"
CASES = sorted(path.stem for path in FOLDER.glob("na[123]d_*.safetensors"))
OPERANDS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "rpb": "bias",
    "add_k": "additional_keys",
    "add_v": "additional_values",
}


def load(case, dtype):
    with safe_open(FOLDER / f"{case}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).to(torch.float64) for name in file.keys()}  # noqa: SIM118
        call = json.loads(file.metadata()["call"])
    operands = {name: tensors[name].to(dtype).requires_grad_() for name in OPERANDS if name in tensors}
    return tensors, operands, call


def test_all_stored_cases_are_found():
    assert len(CASES) == 17


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("dtype", "output_tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("case", CASES)
def test_golden(case, dtype, output_tolerance, gradient_tolerance, backend):
    tensors, operands, call = load(case, dtype)
    arguments = {OPERANDS[name]: tensor for name, tensor in operands.items()}
    output, lse = neighborhood_attention(**arguments, **call, backend=backend, return_lse=True)
    assert output.dtype == dtype
    assert deviation(output, tensors["output"]) <= output_tolerance
    assert deviation(lse, tensors["extra/lse"]) <= output_tolerance
    (output * tensors["g"].to(dtype)).sum().backward()
    for name, operand in operands.items():
        assert deviation(operand.grad, tensors[f"grad/{name}"]) <= gradient_tolerance, name
