"""Real images without a download: scikit-learn's handwritten digits on a larger canvas, and two networks for them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from attnrewrite.torchvision_compat import ensure_torchvision

ensure_torchvision()

from timm.models.swin_transformer import SwinTransformer  # noqa: E402 - after what makes it importable
from timm.models.vision_transformer import VisionTransformer  # noqa: E402 - after what makes it importable

TEST_IMAGES = 500
SIDES = {"vit": 40, "swin": 56}
CHECKPOINTS = Path(__file__).parent


def digits(train: bool) -> tuple[Tensor, Tensor]:
    """The 8 x 8 digits ``[images, 1, 8, 8]`` in [0, 1] with their labels; one fixed split, 1297 and 500 images."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    chosen = order[TEST_IMAGES:] if train else order[:TEST_IMAGES]
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return images[chosen], torch.from_numpy(data.target)[chosen]


def placed(images: Tensor, side: int, seed: int) -> Tensor:
    """Every digit at a random size (75 to 100 % of the canvas), place and angle (up to 10 degrees), normalized."""
    generator = torch.Generator().manual_seed(seed)
    size, angle, right, down = torch.rand(4, len(images), generator=generator)
    size = 0.75 + 0.25 * size
    angle = math.radians(10) * (2 * angle - 1)
    shift = torch.stack([2 * right - 1, 2 * down - 1], dim=1) * (1 - size)[:, None]
    turn = (
        torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2) / size[:, None, None]
    )
    theta = torch.cat([turn, -turn @ shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [len(images), 1, side, side], align_corners=False)
    return (F.grid_sample(images, grid, align_corners=False) - 0.15) / 0.3


def test_images(name: str) -> tuple[Tensor, Tensor]:
    """The 500 test images as network ``name`` takes them, with their labels."""
    images, labels = digits(train=False)
    return placed(images, SIDES[name], seed=10_000), labels


def calibration_images(name: str, count: int = 256) -> Tensor:
    """Unlabeled images of the training split."""
    return placed(digits(train=True)[0][:count], SIDES[name], seed=20_000)


def network(name: str) -> nn.Module:
    """``vit``: 10 x 10 map and class token, 4 blocks of 64 channels. ``swin``: maps of 14 and 7, windows of 7."""
    if name == "vit":
        return VisionTransformer(
            img_size=SIDES[name],
            patch_size=4,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=4,
            num_heads=4,
            mlp_ratio=2,
        )
    return SwinTransformer(
        img_size=SIDES[name], patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depths=(4, 2), num_heads=(3, 6),
        window_size=7, mlp_ratio=2, drop_path_rate=0.1,
    )  # fmt: skip


def trained(name: str) -> nn.Module:
    """The network with the committed weights, which were stored in float16, in float32 and eval mode."""
    model = network(name)
    model.load_state_dict(
        {key: value.float() for key, value in load_file(CHECKPOINTS / f"digits_{name}.safetensors").items()}
    )
    return model.eval()
