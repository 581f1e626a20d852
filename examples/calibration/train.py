"""Train the two small networks on the digits and store them; six to ten minutes each on one core.

python examples/calibration/train.py [vit] [swin]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from digits import CHECKPOINTS, SIDES, digits, network, placed, test_images
from safetensors.torch import save_file
from torch.nn import functional as F

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=CHECKPOINTS)
    arguments = parser.parse_args()
    for name in arguments.networks:
        started = time.perf_counter()
        model = train(name, arguments.epochs, arguments.seed)
        images, labels = test_images(name)
        with torch.no_grad():
            accuracy = (model(images).argmax(-1) == labels).float().mean()
        state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
        save_file(state, arguments.folder / f"digits_{name}.safetensors")
        print(f"{name}: {accuracy:.1%} of the test images right, {time.perf_counter() - started:.0f} s", flush=True)


def train(name: str, epochs: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = network(name)
    images, labels = digits(train=True)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(epochs):
        inputs = placed(images, SIDES[name], seed=seed * 1000 + epoch)
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    main()
