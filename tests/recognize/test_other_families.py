"""Vision transformers beside the main ones: position in the product, shared biases, packed calls, random masks."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from repetition import thinned
from small_models import assert_same_gradients, difference, gradients, logits
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

import attnrewrite

SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
SMALL_CONFIG = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
    "image_size": 64, "patch_size": 16, "num_labels": 5,
}  # fmt: skip


class Blocks(nn.Module):
    """Patches, two residual blocks around an attention of one's own, mean, logits."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 24, 16, 16), nn.Linear(24, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.blocks = nn.ModuleList(attention() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean(1))


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention`` called with its defaults, which also ask for the attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x)
        return mixed


class MultiQuery(nn.Module):
    """One head of keys and values for all heads of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key_value, self.out = nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (3, 8)).transpose(1, 2)
        key, value = self.key_value(x).unsqueeze(1).chunk(2, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SoftmaxByHand(nn.Module):
    """Exponentials over their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.packed(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        weights = torch.exp(query @ key.transpose(-2, -1) / 8**0.5)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class TalkingHeads(nn.Module):
    """Scores and weights are mixed among the heads (CaiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.packed(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        scores = self.before((query @ key.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Averaged(nn.Module):
    """The mean of what an encoder gives."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        return self.encoder(image).last_hidden_state.mean(1)


def convolutional_projections() -> nn.Module:
    """CvT: query, key and value each from a depthwise convolution of their own, keys and values at half the sides."""
    sizes = {"patch_sizes": 7, "patch_stride": 8, "patch_padding": 3, "embed_dim": 24, "depth": 2, "num_heads": 3}
    fixed = {"cls_token": True, "mlp_ratio": 2.0, "drop_rate": 0.0, "attention_drop_rate": 0.0, "drop_path_rate": 0.0}
    config = transformers.CvtConfig(**{name: [value] for name, value in {**sizes, **fixed}.items()}, num_labels=5)
    return transformers.CvtForImageClassification(config)


def transformers_model(kind: str, **options: object) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SMALL_CONFIG | options)
    if kind in ("CLIPVision", "ViTMAE"):
        return Averaged(getattr(transformers, f"{kind}Model")(config))
    return getattr(transformers, f"{kind}ForImageClassification")(config)


FAMILIES = {
    "rotary, odd and even interleaved": lambda: timm.create_model("eva02_tiny_patch14_224", patch_size=16, **SMALL),
    "bias from coordinates, with dropout": lambda: timm.create_model("vit_relpos_small_patch16_224", **SMALL),
    "bias shared by all blocks": lambda: timm.create_model("vit_srelpos_small_patch16_224", **SMALL),
    "bias with a constant added": lambda: transformers_model("Beit", use_relative_position_bias=True),
    "image cast before the stem": lambda: transformers_model("Dinov2"),
    "class token spread from a vector": lambda: transformers_model("CLIPVision"),
    "random masking": lambda: transformers_model("ViTMAE", mask_ratio=0.5),
    "weights asked for": lambda: Blocks(TorchAttention),
    "one head of keys": lambda: Blocks(MultiQuery),
    "softmax by hand": lambda: Blocks(SoftmaxByHand),
    "keys and values of their own maps": convolutional_projections,
}


@pytest.fixture(scope="module", params=thinned(FAMILIES, 2))
def family(request):
    """Donor and identity conversion in float64, from one image."""
    torch.manual_seed(0)
    donor = FAMILIES[request.param]().eval()
    for parameter in donor.parameters():
        nn.init.normal_(parameter, 0.1, 0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[1] ** 0.5)
    donor.double()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    return donor, attnrewrite.convert(donor, "identity", image, fidelity="exact", progress=False)


def output(model: nn.Module, batch: Tensor) -> Tensor:
    torch.manual_seed(1)
    return logits(model(batch))


def test_every_site_is_rebuilt(family):
    rows = attnrewrite.report(family[1]).sites
    assert [(row.name, row.why) for row in rows if row.status != "converted"] == []
    assert [row.kind for row in rows].count("attention") == 2


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_function_is_kept_at_any_batch(family, batch):
    donor, converted = family
    images = torch.randn(batch, 3, 64, 64, dtype=torch.float64)
    assert difference(output(converted, images), output(donor, images)) < 1e-12


def test_gradients_are_kept(family):
    donor, converted = family
    batch = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found = []
    for model in (converted, donor):
        torch.manual_seed(1)
        found.append(gradients(model, batch))
    assert_same_gradients(*found)


def test_a_table_in_a_module_of_its_own_stays_and_mlps_of_other_blocks_are_no_projections():
    """GCViT: windows with a bias module, and queries that come from a feature extractor over all blocks before."""
    torch.manual_seed(0)
    donor = GlobalContextVit(
        img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_ratio=(16, 8), num_classes=5
    ).eval().double()  # fmt: skip
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    converted = attnrewrite.convert(donor, "identity", images, progress=False)
    kinds = [row.kind for row in attnrewrite.report(converted).converted]
    assert (kinds.count("attention"), kinds.count("mlp")) == (3, 4)  # the queries of one come to windows
    assert difference(converted(images), donor(images)) < 1e-12
    assert_same_gradients(gradients(converted, images), gradients(donor, images))


def test_attention_that_cannot_be_read_is_named():
    refused = attnrewrite.plan(Blocks(TalkingHeads).eval(), "identity", torch.randn(1, 3, 64, 64)).refused
    assert [site.name for site in refused if site.kind == "attention"] == ["blocks.0", "blocks.1"]
    assert {site.reason for site in refused} == {
        "an operation changes the attention weights between the softmax and their product with the values; "
        "only dropout is allowed there"
    }


@pytest.mark.parametrize(
    "name", ["rotary, odd and even interleaved", "bias from coordinates, with dropout", "one head of keys"]
)
def test_a_kernel_over_the_whole_map_is_exact(name):
    donor = FAMILIES[name]().eval()
    images = torch.randn(2, 3, 64, 64)
    converted = attnrewrite.convert(donor, "neighborhood", images, kernel_size=4, fidelity="exact", progress=False)
    assert {row.exactness for row in attnrewrite.report(converted).converted} == {"EXACT"}
    assert difference(logits(converted(images)), logits(donor(images))) < 2e-5
