"""Three public checkpoints in their owners' networks, for the tests that need real data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from third_party_networks import BadNetsMNIST, IBAUNet, ResNet20


def data_root() -> Path:
    """The folder of the real data; skips the test where it is not there."""
    root = os.environ.get("UNBACKDOOR_DATA")
    if not root:
        pytest.skip("UNBACKDOOR_DATA is not set")
    return Path(root)


def owners_network(name: str) -> nn.Module:
    """One of "ibau", "verazuo", "akamaster", with its weights; skips the test where the file is not there."""
    network, file = {
        "ibau": (IBAUNet, "ibau_cifar10_badnets.pth"),
        "verazuo": (BadNetsMNIST, "verazuo_mnist_badnets.pth"),
        "akamaster": (ResNet20, "akamaster_cifar10_resnet20_clean.th"),
    }[name]
    path = data_root() / "third_party" / file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    state = content.get("state_dict", content.get("net", content))
    model = network()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()
