"""``InputFormat``: in which scale, statistics, channel order and layout a network takes its images, and its text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from unbackdoor.errors import ConfigError
from unbackdoor.specs import suggestion

Order = Literal["rgb", "bgr"]
Layout = Literal["chw", "hwc", "flat-chw", "flat-hwc"]

#: Words after a colon: what each sets.
_SUFFIXES: dict[str, dict[str, str]] = {
    **{order: {"channel_order": order} for order in get_args(Order)},
    **{layout: {"layout": layout} for layout in get_args(Layout)},
    "flat": {"layout": "flat-chw"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFormat:
    """What a network is fed for an image in [0, 1]: ``(image · scale − mean) / std``, then reordered and laid out.

    Attributes:
        scale: 1, or 255 for networks that take 0..255 (mean and std are then in those units).
        mean, std: one value, or one for each channel; always for red, green, blue in that order, also where the
            network takes BGR.
        channel_order: "rgb" or "bgr"; grey images are the same in both.
        layout: "chw" (N, C, H, W), "hwc" (N, H, W, C), or flattened to (N, C·H·W) from either.

    Raises:
        ConfigError: a value that is none of these, or a std that is not positive.
    """

    scale: int = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channel_order: Order = "rgb"
    layout: Layout = "chw"

    def __post_init__(self) -> None:
        if self.scale not in (1, 255):
            raise ConfigError(f"scale must be 1 or 255, not {self.scale!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not values or not all(math.isfinite(v) for v in values):
                raise ConfigError(f"{name} must be one finite number, or one for each channel, not {values!r}")
        if len({len(self.mean), len(self.std)} - {1}) > 1:
            raise ConfigError(f"mean has {len(self.mean)} values and std {len(self.std)}; give as many of each, or one")
        if min(self.std) <= 0:
            raise ConfigError(f"std must be > 0, not {min(self.std)}")
        if self.channel_order not in get_args(Order):
            raise ConfigError(f"channel_order must be one of {', '.join(get_args(Order))}, not {self.channel_order!r}")
        if self.layout not in get_args(Layout):
            raise ConfigError(f"layout must be one of {', '.join(get_args(Layout))}, not {self.layout!r}")

    @classmethod
    def parse(cls, text: str) -> InputFormat:
        """Read ``"imagenet"``, ``"0-255:bgr"``, ``"mean=0.5,0.5,0.5;std=0.25;scale=255:flat-hwc"`` and the like.

        First a name of :data:`PRESETS`, or fields; then any of ``:rgb :bgr :chw :hwc :flat :flat-chw :flat-hwc``
        (``:flat`` is ``:flat-chw``).

        Raises:
            ConfigError: anything else; the message says what there is.
        """
        head, *suffixes = (part.strip().lower() for part in text.split(":"))
        base = _fields(head, text) if "=" in head else PRESETS.get(head)
        if base is None:
            raise ConfigError(
                f"unknown input format {head!r}{suggestion(head, list(PRESETS))}, or mean=...;std=...;scale=255"
            )
        changes: dict[str, str] = {}
        for suffix in suffixes:
            if suffix not in _SUFFIXES:
                raise ConfigError(f"{text!r}: unknown {suffix!r}{suggestion(suffix, list(_SUFFIXES))}")
            change = _SUFFIXES[suffix]
            if changes.keys() & change.keys():
                raise ConfigError(f"{text!r}: {next(iter(change)).replace('_', ' ')} is given twice")
            changes |= change
        return replace(
            base,
            channel_order=cast(Order, changes.get("channel_order", base.channel_order)),
            layout=cast(Layout, changes.get("layout", base.layout)),
        )

    def __str__(self) -> str:
        """The shortest text that :meth:`parse` reads back to an equal format."""
        plain = replace(self, channel_order="rgb", layout="chw")
        text = next((name for name, preset in PRESETS.items() if preset == plain), "")
        if not text:
            text = f"mean={_numbers(self.mean)};std={_numbers(self.std)}" + (";scale=255" if self.scale == 255 else "")
        if self.channel_order == "bgr":
            text += ":bgr"
        return text if self.layout == "chw" else f"{text}:{self.layout}"

    @property
    def channels(self) -> int | None:
        """How many channels the statistics are for; None where a single value serves any number."""
        count = max(len(self.mean), len(self.std))
        return None if count == 1 else count

    def gain_and_offset(self) -> tuple[Tensor, Tensor]:
        """float32 (C, 1, 1) or (1, 1, 1) each: a network is fed ``image · gain + offset``."""
        count = self.channels or 1
        means = self.mean if len(self.mean) == count else self.mean * count
        stds = self.std if len(self.std) == count else self.std * count
        gain = torch.tensor([self.scale / s for s in stds]).reshape(count, 1, 1)
        return gain, torch.tensor([-m / s for m, s in zip(means, stds, strict=True)]).reshape(count, 1, 1)

    def arrange(self, x: Tensor) -> Tensor:
        """Normalised RGB or grey (N, C, H, W) in the channel order and layout of the network."""
        if self.channel_order == "bgr" and x.shape[1] == 3:
            x = x.flip(1)
        if self.layout.endswith("hwc"):
            x = x.permute(0, 2, 3, 1)
        return x.flatten(1) if self.layout.startswith("flat") else x


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(repr(float(v)) for v in values)


def _fields(head: str, text: str) -> InputFormat:
    found: dict[str, tuple[float, ...]] = {}
    for part in head.split(";"):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in ("mean", "std", "scale") or name in found:
            raise ConfigError(f"{text!r}: {part.strip()!r} should be mean=, std= or scale=, each once, joined by ;")
        try:
            found[name] = tuple(float(v) for v in value.split(","))
        except ValueError:
            raise ConfigError(f"{text!r}: {value.strip()!r} should be a number, or numbers joined by commas") from None
    scale = found.get("scale", (1.0,))
    if scale not in ((1.0,), (255.0,)):
        raise ConfigError(f"{text!r}: scale must be 1 or 255")
    return InputFormat(scale=int(scale[0]), mean=found.get("mean", (0.0,)), std=found.get("std", (1.0,)))


#: name -> format, the simplest first. The statistics are those that the field computes from each training set.
PRESETS: dict[str, InputFormat] = {
    "0-1": InputFormat(),
    "pm1": InputFormat(mean=(0.5,), std=(0.5,)),
    "0-255": InputFormat(scale=255),
    "imagenet": InputFormat(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "cifar10": InputFormat(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": InputFormat(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "gtsrb": InputFormat(mean=(0.3403, 0.3121, 0.3214), std=(0.2724, 0.2608, 0.2669)),
    "mnist": InputFormat(mean=(0.1307,), std=(0.3081,)),
    "fashion-mnist": InputFormat(mean=(0.2860,), std=(0.3530,)),
    "caffe": InputFormat(scale=255, mean=(123.68, 116.779, 103.939)),
}
