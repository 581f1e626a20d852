"""Private kernels are called with what they take for granted, and through one function alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from attention_cases import assert_same
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attnrewrite.errors import BackendError
from attnrewrite.numerics.private_kernels import private_kernel

ROOT = Path(__file__).resolve().parents[2]
DOOR = "attnrewrite/numerics/private_kernels.py"
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
SHAPE = (2, 3, 5, 4)  # tiles, heads, rows, channels

AS_THEY_ARE = {
    "contiguous": lambda: torch.randn(SHAPE),
    "heads last": lambda: torch.randn(2, 5, 3, 4).transpose(1, 2),
    "packed": lambda: torch.randn(2, 5, 3, 3, 4)[:, :, 1].transpose(1, 2),
    "one head for all": lambda: torch.randn(2, 1, 5, 4).expand(SHAPE),
    "rows apart, odd offset": lambda: torch.randn(2, 3, 5, 7)[..., 3:],
    "one row of any stride": lambda: torch.randn(1).as_strided((2, 3, 1, 1), (0, 0, 0, 7)),
}
COPIED = {
    "channels first": lambda: torch.randn(2, 3, 4, 5).mT,
    "packed behind the channels": lambda: torch.randn(*SHAPE, 3)[..., 1],
    "one row for all": lambda: torch.randn(2, 3, 1, 4).expand(SHAPE),
    "one number for a row": lambda: torch.randn(2, 3, 5, 1).expand(SHAPE),
    "overlapping rows": lambda: torch.randn(2, 3, 9).unfold(-1, 4, 1)[:, :, :5],
}


class Called(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def attend(operand, mask=None):
    return private_kernel(FORWARD, operand, operand, operand, 0.0, False, attn_mask=mask, scale=0.5)[0]


@pytest.mark.parametrize("layout", AS_THEY_ARE.values(), ids=AS_THEY_ARE)
def test_layouts_that_fit_are_not_copied(layout):
    operand = layout()
    with Called() as called:
        output = attend(operand)
    assert called.names == [FORWARD]
    assert_same([output], [attend(operand.clone())], 1e-6)


@pytest.mark.parametrize("layout", COPIED.values(), ids=COPIED)
def test_other_layouts_are_copied(layout):
    operand = layout()
    with Called() as called:
        output = attend(operand)
    assert called.names == ["clone"] * 3 + [FORWARD]
    expected = scaled_dot_product_attention(*[operand.contiguous()] * 3, scale=0.5)
    assert_same([output], [expected], 1e-6)  # of float32


@pytest.mark.parametrize("mask", [torch.randn(5, 5).mT, torch.randn(5, 10)[:, ::2], torch.randn(5).expand(5, 5)])
def test_masks_are_operands_too(mask):
    operand = torch.randn(SHAPE)
    expected = scaled_dot_product_attention(operand, operand, operand, mask.contiguous(), scale=0.5)
    assert_same([attend(operand, mask)], [expected], 1e-6)  # of float32


@pytest.mark.parametrize("axis", range(4))
def test_empty_tensors_are_refused_before_the_kernel_divides_by_their_sizes(axis):
    shape = [0 if place == axis else size for place, size in enumerate(SHAPE)]
    with pytest.raises(BackendError, match=rf"aten::{FORWARD} takes no empty tensor, got one of shape \("):
        attend(torch.randn(shape))


def test_shapes_without_memory_are_neither_copied_nor_refused():
    operand = torch.empty(2, 3, 4, 0, device="meta").mT
    with Called() as called:
        private_kernel("_scaled_dot_product_efficient_attention", *[operand] * 3, None, True)
    assert called.names == ["_scaled_dot_product_efficient_attention"]


def private_lookups(source):
    """What a source looks up in torch by a private name (``torch.ops.aten._x``), or in ``torch.ops`` by a computed
    one."""
    nodes, meaning = list(ast.walk(ast.parse(source))), {}
    for node in nodes:
        if isinstance(node, ast.Import):
            named = {name.asname or "torch": name.name if name.asname else "torch" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            named = {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names if not node.level}
        else:
            continue
        meaning |= {name: path for name, path in named.items() if path.split(".")[0] == "torch"}

    def path(node):
        match node:
            case ast.Name(name):
                return meaning.get(name)
            case ast.Attribute(base, name) | ast.Call(ast.Name("getattr"), [base, ast.Constant(name), *_]):
                return f"{path(base)}.{name}" if path(base) else None
            case ast.Call(ast.Name("getattr"), [base, _, *_]) if (path(base) or "").startswith("torch.ops"):
                return path(base).removesuffix("._computed") + "._computed"
        return None

    for node in sorted((node for node in nodes if isinstance(node, ast.Assign)), key=lambda node: node.lineno):
        if path(node.value):
            meaning |= {name.id: path(node.value) for name in node.targets if isinstance(name, ast.Name)}
    found = {*filter(None, map(path, nodes)), *meaning.values()}
    return {each for each in found if each.rpartition(".")[2].startswith("_") and not each.endswith("__")}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops.aten._x(1)",
        "import torch.nn.functional\ntorch._x(1)",
        "import torch as t\nkernel = t.ops.aten._x.default",
        "import torch\naten = torch.ops.aten\ndef f(x):\n    kernels = aten\n    return kernels._x(x)",
        "from torch import ops\nops.aten._x(1)",
        "from torch.nn.functional import _x as public",
        "import torch\ngetattr(torch.ops.aten, '_x')(1)",
        "import torch\ngetattr(torch.ops.aten, 'x' + name, None)(1)",
    ],
)
def test_no_spelling_hides_a_private_kernel(source):
    assert private_lookups(source)


def test_what_is_no_kernel_may_have_a_private_name():
    assert not private_lookups(
        "import torch\nfrom torch._ops import OpOverload\nfrom .x import _y\n"
        "self._softmax(torch.__version__)\n_softmax('aten::_softmax')\ntensor._version\ngetattr(torch.ops.aten, 'x')"
    )


def test_private_kernels_are_called_through_one_function_alone():
    sources = [path for folder in ("attnrewrite", "backends", "patterns") for path in (ROOT / folder).rglob("*.py")]
    lookups = {str(path.relative_to(ROOT)): private_lookups(path.read_text()) for path in sources}
    assert {file: found for file, found in lookups.items() if found} == {
        DOOR: {"torch.ops.aten._computed"},
        "attnrewrite/capture/autocast_regions.py": {  # what a trace is told of such regions, and by which mode
            "torch.amp.autocast_mode._enter_autocast",
            "torch.amp.autocast_mode._exit_autocast",
            "torch.overrides._get_current_function_mode_stack",
        },
        "attnrewrite/capture/in_place.py": {"torch.ops.aten._computed"},  # the public operator beside one in place
        "attnrewrite/operators/operator.py": {  # its own operators, and whether a transform or a mode looks at calls
            "torch.ops._computed",
            "torch.utils._python_dispatch._get_current_dispatch_mode",
            "torch._C",
            "torch._C._functorch",
        },
        "backends/plain.py": {"torch._C", "torch._C._SetExcludeDispatchKeyGuard"},  # autograd inside an operator
        "attnrewrite/ir/image_map.py": {"torch._C", "torch._C._current_graph_task_id"},  # whether a backward pass runs
    }
