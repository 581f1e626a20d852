"""Windows whose queries and keys are normalized after the projection: any spelling is lifted, certified, rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnrewrite
from attnrewrite.certify import certify, collect_values
from attnrewrite.certify.certificate import wanted_nodes
from attnrewrite.ir.sites import AttentionSite, Window
from attnrewrite.planning.stages import lifted

HEADS, DIM, SIDE = 4, 8, 8
Norm = Callable[[Tensor], Tensor]


class Windows(nn.Module):
    """Attention inside windows of ``size`` of a map, its queries and keys through ``norm``, its scores ``scaled``."""

    def __init__(self, query_norm: Norm, key_norm: Norm | None = None, scale: tuple[int, ...] = (HEADS, 1, 1)) -> None:
        super().__init__()
        self.size, width = 2, HEADS * DIM
        self.embed, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = query_norm, key_norm or query_norm
        self.scale = nn.Parameter(torch.ones(scale))
        self.table = nn.Parameter(torch.randn(HEADS, self.size**2, self.size**2))
        with torch.no_grad():
            self.scale.add_(torch.rand(scale) if len(set(scale)) > 1 and scale[-1] == 1 else 0.0)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.embed(image).permute(0, 2, 3, 1))
        batch, height, width, channels = x.shape
        rows, columns = height // self.size, width // self.size
        blocks = x.view(batch, rows, self.size, columns, self.size, channels).transpose(2, 3)
        blocks = blocks.reshape(-1, self.size**2, channels)
        query, key, value = self.qkv(blocks).view(*blocks.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        scores = self.query_norm(query) @ self.key_norm(key).transpose(-2, -1) * self.scale
        mixed = (scores + self.table).softmax(-1) @ value
        out = self.proj(mixed.transpose(1, 2).flatten(2))
        out = out.view(batch, rows, columns, self.size, self.size, channels).transpose(2, 3)
        return x + out.reshape(batch, height, width, channels)


class Gemma(nn.Module):
    """RMS norm by hand, its weight an offset from one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


SPELLINGS: dict[str, tuple[Callable[[], Norm], tuple[str, str, float]]] = {
    "normalize": (lambda: lambda x: F.normalize(x, dim=-1), ("l2", "clamp", 1e-12)),
    "its norm": (lambda: lambda x: x / x.norm(dim=-1, keepdim=True), ("l2", "clamp", 0.0)),
    "squares": (lambda: lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6), ("l2", "root", 1e-6)),
    "length": (lambda: lambda x: x / ((x**2).sum(-1, keepdim=True).sqrt() + 1e-5), ("l2", "added", 1e-5)),
    "least": (lambda: lambda x: x * (x * x).sum(-1, keepdim=True).clamp(min=1e-8).rsqrt(), ("l2", "clamp", 1e-4)),
    "rms norm": (lambda: nn.RMSNorm(DIM, eps=1e-6), ("rms", "root", 1e-6)),
    "rms norm by hand": (Gemma, ("rms", "root", 1e-6)),
    "layer norm": (lambda: nn.LayerNorm(DIM, eps=1e-6), ("layer", "root", 1e-6)),
}


QUICK = ("normalize", "length", "rms norm by hand", "layer norm")


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 2 * SIDE, 2 * SIDE, dtype=torch.float64)


def only_site(model: nn.Module) -> AttentionSite:
    plan = attnrewrite.plan(model, to="identity", example_inputs=image())
    site = next(planned.site for planned in plan.sites if planned.site.kind == "attention")
    assert isinstance(site, AttentionSite)
    return site


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SPELLINGS]
)
def test_every_spelling_is_lifted_and_kept(name: str) -> None:
    make, (kind, place, eps) = SPELLINGS[name]
    donor = Windows(make(), make()).double().eval()
    for parameter in (p for part in (donor.query_norm, donor.key_norm) if isinstance(part, nn.Module)
                      for p in part.parameters()):  # fmt: skip
        nn.init.normal_(parameter, 0.5)
    site = only_site(donor)
    assert isinstance(site.keys, Window)
    assert site.qk == kind
    for norm in (site.query_norm, site.key_norm):
        assert norm is not None
        assert (norm.kind, norm.place) == (kind, place)
        assert norm.eps == pytest.approx(eps)
    assert f"qk {kind} scale learned" in site.describe()
    converted = attnrewrite.convert(donor, to="neighborhood", example_inputs=image())
    batch = image(3)
    expected, actual = donor(batch), converted(batch)
    assert float((actual - expected).detach().abs().max()) < 1e-12
    wanted = torch.autograd.grad(expected.square().sum(), list(donor.parameters()))
    found = torch.autograd.grad(actual.square().sum(), list(converted.parameters()))
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in donor.named_parameters()]
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_queries_and_keys_may_differ() -> None:
    assert only_site(Windows(nn.LayerNorm(DIM), nn.RMSNorm(DIM, eps=1e-6)).double()).qk == "layer/rms"
    site = only_site(Windows(lambda x: F.normalize(x, dim=-1), lambda x: x).double())
    assert (site.qk, site.key_norm) == ("l2/none", None)


REFUSED: dict[str, tuple[Norm, tuple[int, ...], str]] = {
    "over tokens": (lambda x: F.normalize(x, dim=-2), (HEADS, 1, 1), "between projection and product"),
    "over heads": (lambda x: F.normalize(x, dim=1), (HEADS, 1, 1), "between projection and product"),
    "mixed channels": (lambda x: x + x.roll(1, -1), (HEADS, 1, 1), "between projection and product"),
    "another norm": (lambda x: F.normalize(x, p=1.0, dim=-1), (HEADS, 1, 1), "between projection"),
    "a scale of every key": (lambda x: F.normalize(x, dim=-1), (1, 1, 4), "more than one number per head"),
    "a scale of every query": (lambda x: F.normalize(x, dim=-1), (1, 4, 1), "more than one number per head"),
    "a scale of every window": (lambda x: F.normalize(x, dim=-1), (16, 1, 1, 1), "more than one number per head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_norm_of_a_head_vector_is_refused(name: str) -> None:
    norm, scale, reason = REFUSED[name]
    plan = attnrewrite.plan(Windows(norm, scale=scale).double(), to="identity", example_inputs=image())
    assert [site.kind for site in plan.refused] == ["attention"]
    assert reason in plan.refused[0].reason


FAULTS: dict[str, Callable[[AttentionSite], AttentionSite]] = {
    "a larger eps": lambda s: replace(s, query_norm=replace(s.query_norm, eps=1e-6)),
    "no eps": lambda s: replace(s, key_norm=replace(s.key_norm, eps=0.0)),
    "eps under the root": lambda s: replace(s, key_norm=replace(s.key_norm, place="root")),
    "another norm": lambda s: replace(s, query_norm=replace(s.query_norm, kind="rms")),
    "no norm of the queries": lambda s: replace(s, query_norm=None),
    "no norm of the keys": lambda s: replace(s, key_norm=None),
    "no learned scale": lambda s: replace(s, learned_scales=()),
    "no bias": lambda s: replace(s, bias=None),
}  # type: ignore[type-var]  # classes and functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_faults_are_not_certified(dtype: torch.dtype) -> None:
    model = Windows(lambda x: F.normalize(x, dim=-1)).to(dtype).eval()
    plan = lifted(model, image().to(dtype))
    flow = plan.flow
    site = next(planned.site for planned in plan.sites if isinstance(planned.site, AttentionSite))
    values = collect_values(flow, wanted_nodes([site]))
    with torch.no_grad():
        assert certify(site, flow, values).passed
        passed = [name for name, fault in FAULTS.items() if certify(fault(site), flow, values).passed]
    assert passed == []


def test_a_dropped_weight_is_not_certified() -> None:
    plan = lifted(Windows(nn.LayerNorm(DIM)).double().eval(), image())
    flow = plan.flow
    site = next(planned.site for planned in plan.sites if isinstance(planned.site, AttentionSite))
    assert site.query_norm is not None
    values = collect_values(flow, wanted_nodes([site]))
    for norm in (replace(site.query_norm, weight=site.query_norm.bias, bias=site.query_norm.weight),):
        with torch.no_grad():
            assert not certify(replace(site, query_norm=norm), flow, values).passed
