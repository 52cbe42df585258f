"""What the names and shapes of weights say about the network that they belong to. No tensor and no code is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from unbackdoor.errors import UnbackdoorError
from unbackdoor.models.zoo import ZOO

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Guess:
    """A likely architecture.

    ``spec`` is what ``--arch`` takes, or "" where only the family is known. ``confident`` means that a network of that
    spec has exactly these names and shapes.
    """

    spec: str
    confident: bool
    why: str


def guess_architecture(shapes: Shapes) -> Guess | None:
    """The zoo's network that has exactly these names and shapes, else the family that the names point to."""
    for name in ZOO:
        arguments = zoo_arguments(name, shapes)
        if arguments is not None and _fits(name, arguments, shapes):
            listed = ", ".join(f"{k}={v}" for k, v in arguments.items() if k not in _READ_ANYWAY)
            return Guess(f"{name}({listed})" if listed else name, True, "all names and shapes are the same")
    for family in (_torchvision_resnet, _small_resnet, _vgg, _vision_transformer, _by_prefix):
        guess = family(shapes)
        if guess is not None:
            return guess
    return None


#: Not part of a spec: they are read from the weights each time.
_READ_ANYWAY = ("num_classes", "in_channels", "image_size")


def count_classes(shapes: Shapes) -> int | None:
    """Rows of the last matrix, which is the classifier's; else the length of the last bias."""
    for name, shape in reversed(list(shapes.items())):
        if len(shape) == 2 and name.endswith("weight"):
            return shape[0]
    for name, shape in reversed(list(shapes.items())):
        if len(shape) == 1 and name.endswith("bias"):
            return shape[0]
    return None


def count_channels(shapes: Shapes) -> int | None:
    """Columns of the first convolution's weight."""
    return next((shape[1] for shape in shapes.values() if len(shape) == 4), None)


def read_image_size(shapes: Shapes) -> int | None:
    """Pixels a side, from a vision transformer's position embedding and patch; None for networks without one."""
    patch = next((shape for shape in shapes.values() if len(shape) == 4), None)
    position = next(
        (s for n, s in shapes.items() if re.search(r"pos(ition)?_?emb", n) and len(s) == 3 and s[0] == 1), None
    )
    if patch is None or position is None:
        return None
    for extra in (1, 0, 2):  # class token, none, class and distillation token
        side = math.isqrt(max(0, position[1] - extra))
        if side > 0 and side * side == position[1] - extra:
            return side * patch[2]
    return None


def zoo_arguments(name: str, shapes: Shapes) -> dict[str, int] | None:
    """The arguments with which the zoo's factory ``name`` makes a network of these shapes, or None if it cannot."""
    classes, channels = count_classes(shapes), count_channels(shapes)
    if classes is None or channels is None:
        return None
    reader = _ZOO_READERS.get(name)
    own = reader(shapes) if reader else {}
    return None if own is None else {"num_classes": classes, "in_channels": channels, **own}


def _fits(name: str, arguments: Mapping[str, int], shapes: Shapes) -> bool:
    try:
        with torch.device("meta"):
            network = ZOO[name](**arguments)
    except (UnbackdoorError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
        return False
    wanted = {n: tuple(t.shape) for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    return wanted == {n: s for n, s in shapes.items() if not n.endswith("num_batches_tracked")}


def _width(shapes: Shapes) -> dict[str, int] | None:
    first = next((s for s in shapes.values() if len(s) == 4), None)
    return {"width": first[0]} if first else None


def _cnn(shapes: Shapes) -> dict[str, int] | None:
    width, flat = _width(shapes), shapes.get("classifier.1.weight")
    if width is None or flat is None or len(flat) != 2:
        return None
    return {**width, "image_size": 4 * math.isqrt(flat[1] // (2 * width["width"]))}


def _vit(shapes: Shapes) -> dict[str, int] | None:
    size = read_image_size(shapes)
    return {"image_size": size} if size else None


def _vit_tiny(shapes: Shapes) -> dict[str, int] | None:
    size, patches = _vit(shapes), shapes.get("conv_proj.weight")
    if size is None or patches is None:
        return None
    return {**size, "patch": patches[2], "dim": patches[0], "depth": _count(shapes, r"layers\.(\d+)\.")}


def _airbench(shapes: Shapes) -> dict[str, int] | None:
    first = shapes.get("groups.0.conv1.weight")
    return {"width": first[0]} if first else None


_ZOO_READERS: dict[str, Callable[[Shapes], dict[str, int] | None]] = {
    "airbench": _airbench,
    "cnn": _cnn,
    "preact_resnet18": _width,
    "vgg11_bn": _width,
    "vgg19_bn": _width,
    "vit_b_16": _vit,
    "vit_tiny": _vit_tiny,
}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different values the group in ``pattern`` takes at the beginning of names."""
    return len({m.group(1) for n in shapes if (m := re.match(pattern, n))})


_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def _stages(shapes: Shapes) -> tuple[int, ...]:
    return tuple(n for stage in range(1, 5) if (n := _count(shapes, rf"layer{stage}\.(\d+)\.")))


def _torchvision_resnet(shapes: Shapes) -> Guess | None:
    stem = shapes.get("conv1.weight", ())
    if len(stem) != 4 or stem[2] != 7 or "fc.weight" not in shapes:
        return None
    name = _RESNETS.get(("layer1.0.conv3.weight" in shapes, _stages(shapes)))
    if name is None:
        return None
    return Guess(f"torchvision:{name}", False, "names of torchvision's residual networks, with a 7×7 stem")


def _small_resnet(shapes: Shapes) -> Guess | None:
    stem, stages = shapes.get("conv1.weight", ()), _stages(shapes)
    if len(stem) != 4 or not stages or "layer1.0.conv1.weight" not in shapes:
        return None
    bottleneck = "layer1.0.conv3.weight" in shapes
    depth = 2 + (3 if bottleneck else 2) * sum(stages)
    size = f"{stem[2]}×{stem[3]} stem of {stem[0]} channels, blocks {stages}"
    return Guess("", False, f"ResNet-{depth} for small images ({size}); give its definition as file.py:Class")


def _vgg(shapes: Shapes) -> Guess | None:
    convolutions = [s for n, s in shapes.items() if re.match(r"features\.\d+\.weight", n) and len(s) == 4]
    name = {8: "vgg11", 10: "vgg13", 13: "vgg16", 16: "vgg19"}.get(len(convolutions))
    if name is None or convolutions[0][2] != 3:
        return None
    normed = "_bn" if any(n.endswith("running_mean") for n in shapes) else ""
    if shapes.get("classifier.0.weight", ())[1:] == (25088,):
        return Guess(f"torchvision:{name}{normed}", False, "names and classifier of torchvision's VGG")
    return Guess("", False, f"{name.upper()}{normed} for small images; give its definition as file.py:Class")


def _vision_transformer(shapes: Shapes) -> Guess | None:
    size = read_image_size(shapes)
    if "encoder.layers.encoder_layer_0.ln_1.weight" in shapes and "conv_proj.weight" in shapes:
        dim, _, patch, _ = shapes["conv_proj.weight"]
        letter = {768: "b", 1024: "l", 1280: "h"}.get(dim)
        if letter is None:
            return None
        return Guess(f"torchvision:vit_{letter}_{patch}", False, f"a ViT of torchvision for {size} pixels")
    if "patch_embed.proj.weight" in shapes and "blocks.0.attn.qkv.weight" in shapes and size is not None:
        dim, _, patch, _ = shapes["patch_embed.proj.weight"]
        word = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(dim)
        kind = "deit" if "dist_token" in shapes else "vit"
        nominal = 384 if size == 384 else 224
        if word is None:
            return None
        return Guess(f"timm:{kind}_{word}_patch{patch}_{nominal}", False, f"a ViT of timm for {size} pixels")
    return None


_FAMILIES = (
    ("features.denseblock1.", "torchvision:densenet121", "a DenseNet of torchvision"),
    ("features.0.0.weight", "", "a MobileNet, EfficientNet or ConvNeXt of torchvision"),
    ("conv_stem.weight", "", "a MobileNet or EfficientNet of timm"),
    ("features.0.weight", "", "a plain stack of convolutions in `features`"),
)


def _by_prefix(shapes: Shapes) -> Guess | None:
    for start, spec, why in _FAMILIES:
        if any(name.startswith(start) for name in shapes):
            return Guess(spec, False, why if spec else f"{why}; give its definition with --arch")
    return None
