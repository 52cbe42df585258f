"""The objective that brings the skill back after forgetting: true labels and the given network's outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.training import Step
from unbackdoor.types import PADDING, trimmed

#: Of the outputs that are compared with the given network's.
TEMPERATURE = 2.0


class Recovery:
    """The recovery's objective: CE on true labels + weight · T² · KL(given network ‖ model), on the same clean batch.

    With ``mix`` the batch is :func:`blended` first.
    """

    def __init__(self, teacher: nn.Module, weight: float, mix: bool, generator: torch.Generator) -> None:
        self.teacher, self.weight, self.mix, self.generator = teacher, weight, mix, generator

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        x, labels = blended(x, y, self.generator) if self.mix else (x, MixedLabels.pure(y))
        logits = model(x)
        entropy = labels.entropy(logits.float())
        if not self.weight:
            return Step(entropy, logits, {"cross_entropy": entropy})
        gap = divergence(logits.float(), softened(self.teacher, x))
        return Step(entropy + self.weight * gap, logits, {"cross_entropy": entropy, "distillation": gap})


class MixedLabels(NamedTuple):
    """What blended samples are: ``share`` (n,) in [0, 1] of class ``first`` (n,), the rest of class ``second`` (n,)."""

    first: Tensor
    second: Tensor
    share: Tensor

    @classmethod
    def pure(cls, y: Tensor) -> MixedLabels:
        return cls(y, y, torch.ones(len(y), device=y.device))

    def entropy(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of float logits (n, classes)."""
        each = F.cross_entropy(logits, self.first, reduction="none")
        others = F.cross_entropy(logits, self.second, reduction="none")
        return (self.share * each + (1 - self.share) * others).mean()


def blended(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, MixedLabels]:
    """The batch blended with itself in another order, by a uniform weight a sample: images and features linearly
    (mixup), texts by :func:`joined`.
    """
    order = torch.randperm(len(x), generator=generator).to(x.device)
    share = torch.rand(len(x), generator=generator).to(x.device)
    if x.dtype == torch.int64:
        x, share = joined(x, x[order], share)
    else:
        # lerp keeps the memory format, and with it the speed
        x = torch.lerp(x[order], x, share.view(-1, *[1] * (x.ndim - 1)).to(x.dtype))
    return x, MixedLabels(y, y[order], share)


def softened(teacher: nn.Module, x: Tensor) -> Tensor:
    """Logarithms of the teacher's probabilities (n, classes) at temperature 2, without gradient."""
    with torch.no_grad():
        return F.log_softmax(teacher(x).float() / TEMPERATURE, 1)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """T² · KL(wanted ‖ model) of float logits (n, classes) from what :func:`softened` gives, mean over the batch."""
    said = F.log_softmax(logits / TEMPERATURE, 1)
    return F.kl_div(said, wanted, log_target=True, reduction="batchmean") * TEMPERATURE**2


def joined(first: Tensor, second: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The beginning of each first text with the end of the second: about ``share`` (n,) of the one, the rest of the
    other.

    Words and not embeddings are mixed: that works with every network of token ids, both networks of a distillation see
    the very same input, and what stands at both ends (a classification token, an end mark) stays where it belongs.

    Args:
        first, second: token ids (n, L), padding at the end.
        share: in [0, 1].

    Returns:
        The texts (n, l), and the share of tokens (n,) float32 that are the first text's.
    """
    lengths = [(ids != PADDING).sum(1) for ids in (first, second)]
    kept = (share * lengths[0]).round().long().clamp(min=1)
    added = ((1 - share) * lengths[1]).round().long().clamp(min=1)
    place = torch.arange(2 * first.shape[1], device=first.device).expand(len(first), -1)
    from_first = first.gather(1, place.clamp(max=first.shape[1] - 1))
    behind = (place - kept[:, None] + (lengths[1] - added)[:, None]).clamp(0, second.shape[1] - 1)
    made = torch.where(place < kept[:, None], from_first, second.gather(1, behind))
    made = torch.where(place < (kept + added)[:, None], made, PADDING)
    return trimmed(made), kept / (kept + added)
