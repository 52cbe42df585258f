"""What changed in the weights, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor.errors import DataError


@dataclass(frozen=True, slots=True)
class WeightChange:
    """One floating tensor of a state dict, before W₀ and after W₁.

    Attributes:
        name: its key.
        shape: of the tensor.
        buffer: True for what training does not learn by gradients, such as BatchNorm's running statistics.
        relative: ‖W₁ − W₀‖₂ / ‖W₀‖₂; 0 where nothing changed, None where W₀ is zero or something is not finite.
        cosine: of the angle between W₀ and W₁, in [−1, 1]; None where one of them is zero or not finite.
    """

    name: str
    shape: tuple[int, ...]
    buffer: bool
    relative: float | None
    cosine: float | None


@torch.no_grad()
def weight_changes(before: nn.Module, after: nn.Module) -> tuple[WeightChange, ...]:
    """The change of every floating tensor, in the network's own order. Computed in float64 on the CPU.

    Raises:
        DataError: a tensor is missing on one side or has another shape.
    """
    old, new = _floating(before), _floating(after)
    if old.keys() != new.keys():
        raise DataError(f"the two networks hold different tensors: {sorted(old.keys() ^ new.keys())}")
    learned = {name for name, _ in before.named_parameters(remove_duplicate=False)}
    return tuple(_change(name, old[name], new[name], name not in learned) for name in old)


def _floating(model: nn.Module) -> Mapping[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor) and v.is_floating_point()}


def _change(name: str, old: Tensor, new: Tensor, buffer: bool) -> WeightChange:
    if old.shape != new.shape:
        raise DataError(f"{name} was {tuple(old.shape)} and became {tuple(new.shape)}: only equal shapes compare")
    a, b = old.detach().cpu().double().flatten(), new.detach().cpu().double().flatten()
    moved, length, other = (float(v.norm()) for v in (b - a, a, b))
    relative = 0.0 if moved == 0 else moved / length if length else None
    cosine = float(a @ b) / (length * other) if length and other else None
    return WeightChange(
        name=name,
        shape=tuple(old.shape),
        buffer=buffer,
        relative=relative if relative is None or math.isfinite(relative) else None,
        cosine=max(-1.0, min(1.0, cosine)) if cosine is not None and math.isfinite(cosine) else None,
    )
