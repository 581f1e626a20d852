"""Wrapping for parallel training after a conversion; wrapped and compiled models are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from model_queries import run, weights_of
from small_models import difference, images, logits, small_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import attnrewrite
from attnrewrite import AttnRewriteError


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train_two_steps(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        logits(model.train()(batch)).square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("timm_vit", "neighborhood"),
        ("timm_swin", "neighborhood"),
        ("torchvision_vit", "identity"),
        ("torchvision_swin", "identity"),
        ("transformers_swin", "identity"),
    ],
)
def test_convert_then_distributed_data_parallel(pairs, process_group, name, to):
    pair = pairs(name, to)
    _, alone = pair.copies()
    _, wrapped = pair.copies()
    train_two_steps(alone, pair.batch)
    train_two_steps(DistributedDataParallel(wrapped), pair.batch)
    assert difference(run(alone, pair.batch), run(pair.converted, pair.batch)) > 1e-6
    assert difference(run(wrapped, pair.batch), run(alone, pair.batch)) < 1e-9


def test_convert_then_fully_shard(pairs, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    pair = pairs("timm_swin", "neighborhood")
    _, alone = pair.copies()
    _, sharded = pair.copies()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train_two_steps(alone, pair.batch)
    train_two_steps(sharded, pair.batch)
    assert difference(run(sharded, pair.batch), run(alone, pair.batch)) < 1e-9


def assert_refused_as_wrapped(model):
    with pytest.raises(AttnRewriteError, match=r"(?s)model: .*convert.*then wrap"):
        attnrewrite.convert(model, "identity", images("timm_vit", 1))


def test_a_distributed_model_is_refused(process_group):
    assert_refused_as_wrapped(DistributedDataParallel(small_model("timm_vit")))


def test_a_compiled_model_is_refused():
    assert_refused_as_wrapped(torch.compile(small_model("timm_vit"), backend="aot_eager"))


def test_a_data_parallel_model_is_refused():
    assert_refused_as_wrapped(nn.DataParallel(small_model("timm_vit")))


def test_a_sharded_model_is_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_model("timm_vit")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert_refused_as_wrapped(model)


def test_a_compiled_child_is_converted_as_what_was_compiled():
    donor = small_model("timm_vit")
    donor.blocks[0].attn = torch.compile(donor.blocks[0].attn, backend="eager")
    expected = run(donor, images("timm_vit"))
    converted = attnrewrite.convert(donor, "identity", images("timm_vit", 1))
    attentions = [site for site in attnrewrite.report(converted).sites if site.kind == "attention"]
    assert [(site.name, site.status) for site in attentions] == [
        ("blocks.0.attn", "converted"), ("blocks.1.attn", "converted"),
    ]  # fmt: skip
    assert difference(run(converted, images("timm_vit")), expected) < 1e-12
    assert list(weights_of(converted)) == list(donor.state_dict())
