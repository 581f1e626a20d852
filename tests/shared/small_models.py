"""Small configurations of the vision transformers of three libraries, without any dropout."""

from __future__ import annotations

import timm
import torch
import torchvision
import transformers
from torch import nn


def timm_vit(fused=True, **options):
    options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5} | options
    model = timm.create_model("vit_tiny_patch16_224", **options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def timm_swin(**options):
    options = {"img_size": 56, "window_size": 7, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32} | options
    return timm.create_model("swin_tiny_patch4_window7_224", **{"num_classes": 5, "drop_path_rate": 0.0} | options)


def timm_pvt(**options):
    return timm.create_model("pvt_v2_b0", **{"depths": (1, 1, 1, 1), "num_classes": 5, "drop_path_rate": 0.0} | options)


def torchvision_vit(**options):
    options = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48} | options
    model = torchvision.models.VisionTransformer(**{"mlp_dim": 96, "num_classes": 5} | options)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zero at first, which would hide everything before it
    return model


def torchvision_swin(**options):
    options = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [7, 7]} | options
    return torchvision.models.SwinTransformer([4, 4], **{"num_classes": 5, "stochastic_depth_prob": 0.0} | options)


def transformers_vit(implementation="sdpa", **options):
    options = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64} | options
    config = transformers.ViTConfig(
        **{"patch_size": 16, "intermediate_size": 96, "num_labels": 5, "attn_implementation": implementation} | options
    )
    return transformers.ViTForImageClassification(config)


def transformers_swin(**options):
    options = {
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "image_size": 56,
        "drop_path_rate": 0.0,
    } | options
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(**{"window_size": 7, "num_labels": 5} | options)
    )


BUILDERS = {
    "timm_vit": timm_vit,
    "timm_vit_unfused": lambda **options: timm_vit(fused=False, **options),
    "timm_swin": timm_swin,
    "torchvision_vit": torchvision_vit,
    "torchvision_swin": torchvision_swin,
    "transformers_vit": transformers_vit,
    "transformers_vit_eager": lambda **options: transformers_vit("eager", **options),
    "transformers_swin": transformers_swin,
}
SIDE = {name: 56 if "swin" in name else 64 for name in BUILDERS}
DTYPE = dict.fromkeys(BUILDERS, torch.float64) | {"transformers_vit_eager": torch.float32}  # its softmax is in float32
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def small_model(name, **options):
    """The model called ``name`` in eval mode, with weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    model = BUILDERS[name](**options).to(DTYPE[name]).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model


def images(name, batch=2, dtype=None, size=None):
    size = size or (SIDE[name], SIDE[name])
    return torch.randn(batch, 3, *size, dtype=dtype or DTYPE[name], generator=torch.Generator().manual_seed(1))


def logits(output):
    return getattr(output, "logits", output)


def difference(actual, expected):
    """The largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


def gradients(model, batch, train=False):
    """The gradient of every parameter by name (None if it has none), for a loss that weighs the logits unevenly."""
    model.train(train)
    model.zero_grad()
    output = logits(model(batch))
    (output * torch.arange(1, output.shape[1] + 1)).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.zero_grad()
    model.eval()
    return found


def assert_same_gradients(actual, expected):
    """To 1e-9 in float64, relative to the largest gradient of the parameter (or a millionth of the largest of all)."""
    assert list(actual) == list(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            tolerance = 1e-9 if gradient.dtype == torch.float64 else 1e-4
            scale = max(float(gradient.abs().max()), 1e-6 * largest)
            if gradient.dtype == torch.float32:
                scale = max(scale, 1e-2 * largest)
            assert float((actual[name] - gradient).abs().max()) <= tolerance * scale, name
