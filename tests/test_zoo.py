"""The zoo: shapes, parameter counts known from outside, key names that the field's checkpoints use, and seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from factories import same, weights
from unbackdoor.errors import ConfigError
from unbackdoor.models import zoo
from unbackdoor.rng import Rng, isolated


def small_vit_b(num_classes: int, in_channels: int) -> nn.Module:
    """What ``vit_b_16`` builds, in little."""
    return zoo.VisionTransformer(
        image_size=32,
        patch=16,
        depth=1,
        heads=2,
        dim=16,
        mlp_dim=32,
        num_classes=num_classes,
        in_channels=in_channels,
    )


#: name -> (factory of something small, channels, pixels)
SMALL: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "airbench": (partial(zoo.airbench, width=8), 3, 32),
    "cnn": (partial(zoo.cnn, width=4), 1, 28),
    "preact_resnet18": (partial(zoo.preact_resnet18, width=4), 3, 32),
    "vgg11_bn": (partial(zoo.vgg11_bn, width=4), 3, 32),
    "vgg19_bn": (partial(zoo.vgg19_bn, width=4), 3, 32),
    "vit_tiny": (partial(zoo.vit_tiny, dim=32, depth=2), 3, 32),
    "vit_b_16": (small_vit_b, 3, 32),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_name_of_the_zoo_is_tested() -> None:
    assert set(SMALL) == set(zoo.ZOO)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("classes", "channels"), [(10, None), (2, 1), (43, 3)])
def test_images_become_logits_and_every_weight_learns(name: str, classes: int, channels: int | None) -> None:
    build, usual, size = SMALL[name]
    with isolated(Rng(0)):
        model = build(num_classes=classes, in_channels=channels or usual)
        x = torch.rand(4, channels or usual, size, size)
    logits = model.train()(x)
    assert logits.shape == (4, classes)
    F.cross_entropy(logits, torch.arange(4) % classes).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


@pytest.mark.parametrize("name", SMALL)
def test_eval_mode_is_a_function_of_each_image_alone(name: str) -> None:
    build, channels, size = SMALL[name]
    with isolated(Rng(0)):
        model = build(num_classes=5, in_channels=channels)
        x = torch.rand(3, channels, size, size)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # one batch sets the statistics: with the first ones the signal dies away
        model.train()(torch.rand(32, channels, size, size))
    model.eval()
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-7)


@pytest.mark.parametrize("name", SMALL)
def test_the_first_weights_come_from_the_seed(name: str) -> None:
    build, channels, _ = SMALL[name]

    def made(seed: int) -> dict[str, torch.Tensor]:
        with isolated(Rng(seed)):
            return weights(build(num_classes=3, in_channels=channels))

    assert same(made(0), made(0))
    assert not same(made(0), made(1))


def test_preact_resnet18_is_the_fields() -> None:
    model = zoo.preact_resnet18()
    # 11,171,146 is what the common CIFAR definition of this network counts.
    assert count(model) == 11_171_146
    keys = set(model.state_dict())
    assert {"conv1.weight", "layer1.0.bn1.running_mean", "layer2.0.shortcut.0.weight", "linear.bias"} <= keys
    assert "layer1.0.shortcut.0.weight" not in keys
    assert model.get_submodule("layer4.1.conv2").weight.shape == (512, 512, 3, 3)
    narrow = count(zoo.preact_resnet18(width=16))
    assert 0.65e6 < narrow < 0.75e6


def test_a_preact_block_against_its_formula() -> None:
    with isolated(Rng(0)):
        block = zoo.PreActBlock(4, 6, 2).eval()
        x = torch.randn(2, 4, 8, 8)
        for norm in (block.bn1, block.bn2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def normalised(norm: nn.BatchNorm2d, value: torch.Tensor) -> torch.Tensor:
        shift, scale = norm.running_mean[:, None, None], (norm.running_var + norm.eps).sqrt()[:, None, None]
        return ((value - shift) / scale * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)

    with torch.no_grad():
        active = normalised(block.bn1, x)
        inside = normalised(block.bn2, F.conv2d(active, block.conv1.weight, stride=2, padding=1))
        expected = F.conv2d(inside, block.conv2.weight, padding=1) + F.conv2d(
            active, block.shortcut[0].weight, stride=2
        )
        assert torch.allclose(block(x), expected, atol=1e-5)


def test_the_feature_part_of_vgg_is_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    for ours, theirs in ((zoo.vgg19_bn, "vgg19_bn"), (zoo.vgg11_bn, "vgg11_bn")):
        with torch.device("meta"):
            mine = ours().state_dict()
            reference = torchvision.models.get_model(theirs, weights=None).state_dict()
        features = {k: v.shape for k, v in reference.items() if k.startswith("features.")}
        assert {k: v.shape for k, v in mine.items() if k.startswith("features.")} == features


def test_vit_b_16_has_torchvisions_size() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        assert count(zoo.vit_b_16()) == count(torchvision.models.vit_b_16(weights=None)) == 86_567_656


def test_the_small_ones_are_as_small_as_their_docstrings_say() -> None:
    assert round(count(zoo.cnn()) / 1e6, 2) == 0.47
    assert round(count(zoo.vit_tiny()) / 1e6, 1) == 1.2


@pytest.mark.parametrize(("size", "inputs"), [(28, 64 * 49), (32, 64 * 64), (30, 64 * 49)])
def test_cnn_fits_its_image_size(size: int, inputs: int) -> None:
    model = zoo.cnn(image_size=size)
    assert model.get_submodule("classifier.1").in_features == inputs
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 10)


def test_cnn_has_no_normalisation() -> None:
    assert not any("Norm" in type(m).__name__ for m in zoo.cnn().modules())


def test_an_image_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_size must be a multiple of the patch \(4\), not 30"):
        zoo.vit_tiny(image_size=30)
