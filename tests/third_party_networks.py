"""The networks of three public checkpoints, as owners define them: ``--arch tests/third_party_networks.py:Class``.

The files themselves are not part of the project; the documentation says where they come from and how they are used.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class IBAUNet(nn.Module):
    """The CIFAR-10 network of github.com/YiZeng623/I-BAU: RGB in [0, 1], 32 pixels."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
                channels = width
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out


class BadNetsMNIST(nn.Module):
    """The MNIST network of github.com/verazuo/badnets-pytorch: grey in [−1, 1], 28 pixels; it ends in a softmax."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(512, 512), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(512, num_classes), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(self.conv2(self.conv1(x)).flatten(1)))
        return out


class _Block(nn.Module):
    """Two 3×3 convolutions; where the shape changes, the shortcut takes every second pixel and pads with zeros."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.padding = stride, (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        step = self.stride
        skip = F.pad(x[:, :, ::step, ::step], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + skip)


class ResNet20(nn.Module):
    """ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10: RGB with ImageNet's mean and deviation, 32 pixels."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(inside: int, outside: int, stride: int) -> nn.Sequential:
        return nn.Sequential(_Block(inside, outside, stride), _Block(outside, outside, 1), _Block(outside, outside, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))
        return out
