"""The networks of three public checkpoints, written from their description, for the tests of input formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def data_root() -> Path:
    """The folder of the real data; skips the test where it is not there."""
    root = os.environ.get("UNBACKDOOR_DATA")
    if not root:
        pytest.skip("UNBACKDOOR_DATA is not set")
    return Path(root)


class EluNet(nn.Module):
    """Six convolutions with BN and ELU, on CIFAR-10 in [0, 1]; backdoored."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
                inside = width
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out


class SoftmaxNet(nn.Module):
    """Two convolutions and two linear layers that end in a softmax, on MNIST in ±1; backdoored."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(512, 512), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(512, 10), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(self.conv2(self.conv1(x)).flatten(1)))
        return out


class Block(nn.Module):
    """Basic block whose shortcut takes every second pixel and pads the channels with zeros."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.padding = stride, (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + skip)


class ResNet20(nn.Module):
    """CIFAR ResNet-20 with parameter-free shortcuts, on ImageNet's mean and std; clean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def owners_network(name: str) -> nn.Module:
    """One of "ibau", "verazuo", "akamaster", with its weights; skips the test where the file is not there."""
    network, file = {
        "ibau": (EluNet, "ibau_cifar10_badnets.pth"),
        "verazuo": (SoftmaxNet, "verazuo_mnist_badnets.pth"),
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
