import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a model library: tests never download

import pytest
import torch

from attnrewrite.torchvision_compat import ensure_torchvision

ensure_torchvision()

pytest_plugins = ["converted_models"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
