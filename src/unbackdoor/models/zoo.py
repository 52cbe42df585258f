"""Networks defined here, so that the field's standard victims need no other package.

Each factory takes ``num_classes``, ``in_channels`` and, where the network depends on it, ``image_size``; all map float
images (N, C, H, W) to logits (N, num_classes). Key names follow the definitions that are common in the field, so that
checkpoints made with those load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.errors import ConfigError
from unbackdoor.models.airbench import airbench


class PreActBlock(nn.Module):
    """Pre-activation basic block: BN, ReLU, conv, BN, ReLU, conv (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip: Tensor = self.shortcut(active) if hasattr(self, "shortcut") else x
        out: Tensor = skip + self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out


class PreActResNet(nn.Module):
    """Pre-activation residual network for small images, four stages from ``width`` to ``8 · width`` channels."""

    def __init__(self, blocks: tuple[int, ...], num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        channels = width
        for stage, count in enumerate(blocks):
            outside = width * 2**stage
            layers = []
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(PreActBlock(channels, outside, stride))
                channels = outside
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        # The field's checkpoints end without a last BatchNorm: pool and classify what the last block adds up.
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        out: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def preact_resnet18(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Module:
    """PreAct-ResNet18, 11 M parameters at width 64, 0.7 M at width 16."""
    return PreActResNet((2, 2, 2, 2), num_classes, in_channels, width)


def vgg19_bn(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Module:
    """VGG19 with BatchNorm, pooled to one pixel and followed by a single linear layer (the small-image form)."""
    plan = (1, 1, "M", 2, 2, "M", 4, 4, 4, 4, "M", 8, 8, 8, 8, "M", 8, 8, 8, 8)
    return _vgg(plan, num_classes, in_channels, width)


def vgg11_bn(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Module:
    """VGG11 with BatchNorm in the same small-image form."""
    return _vgg((1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8), num_classes, in_channels, width)


class VGG(nn.Module):
    """Convolutions in ``features``, one linear layer in ``classifier``."""

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return out


def _vgg(plan: tuple[int | str, ...], num_classes: int, in_channels: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = in_channels
    for item in plan:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            outside = item * width
            layers += [nn.Conv2d(channels, outside, 3, 1, 1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
            channels = outside
    return VGG(nn.Sequential(*layers), channels, num_classes)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer perceptron with GELU."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.self_attention(normed, normed, normed, need_weights=False)[0]
        mixed: Tensor = self.mlp(self.ln_2(x))
        return x + mixed


class VisionTransformer(nn.Module):
    """ViT with a class token and learned positions (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        depth: int,
        heads: int,
        dim: int,
        mlp_dim: int,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ConfigError(f"image_size must be a multiple of the patch ({patch}), not {image_size}")
        self.conv_proj = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, (image_size // patch) ** 2 + 1, dim).normal_(std=0.02))
        self.layers = nn.Sequential(*(EncoderBlock(dim, heads, mlp_dim) for _ in range(depth)))
        self.ln = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1) + self.pos_embedding
        out: Tensor = self.head(self.ln(self.layers(tokens))[:, 0])
        return out


def vit_b_16(num_classes: int = 1000, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """ViT-B/16, 86 M parameters."""
    return VisionTransformer(
        image_size=image_size,
        patch=16,
        depth=12,
        heads=12,
        dim=768,
        mlp_dim=3072,
        num_classes=num_classes,
        in_channels=in_channels,
    )


def vit_tiny(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 32, patch: int = 4, dim: int = 128, depth: int = 6
) -> nn.Module:
    """A ViT small enough to train on a laptop: 1.2 M parameters as it stands."""
    return VisionTransformer(
        image_size=image_size,
        patch=patch,
        depth=depth,
        heads=max(1, dim // 32),
        dim=dim,
        mlp_dim=4 * dim,
        num_classes=num_classes,
        in_channels=in_channels,
    )


class ConvNet(nn.Module):
    """Four convolutions in two stages and two linear layers, without any normalisation."""

    def __init__(self, num_classes: int, in_channels: int, width: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x))
        return out


def cnn(num_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: int = 32) -> nn.Module:
    """A plain 4-conv network (0.47 M parameters at 28 pixels), the usual one for MNIST."""
    return ConvNet(num_classes, in_channels, width, image_size)


#: name -> factory. ``cnn`` and the transformers depend on the image's size; the others do not.
ZOO: dict[str, Callable[..., nn.Module]] = {
    "airbench": airbench,
    "cnn": cnn,
    "preact_resnet18": preact_resnet18,
    "vgg11_bn": vgg11_bn,
    "vgg19_bn": vgg19_bn,
    "vit_b_16": vit_b_16,
    "vit_tiny": vit_tiny,
}
