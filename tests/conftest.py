import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a model library: tests never download

import pytest
import torch
from hypothesis import settings

from attnrewrite.torchvision_compat import ensure_torchvision

ensure_torchvision()

pytest_plugins = ["converted_models"]

# The same cases every time, so that a change is judged by itself; `make test-all` draws others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
