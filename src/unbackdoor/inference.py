"""Running a network forward over many samples: logits, loss and accuracy, in eval mode and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.types import Samples, laid_out

Precision = Literal["auto", "fp32", "bf16"]


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether ``precision`` means bfloat16 on ``device``: "auto" does where the hardware multiplies in it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where :func:`uses_bf16` says so, else nothing."""
    if uses_bf16(precision, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; each module's own mode comes back after it."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU where it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@torch.no_grad()
def predict(
    model: nn.Module,
    samples: Samples,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 500,
    precision: Precision = "fp32",
) -> Tensor:
    """Logits (N, classes), float32, on the model's device.

    Args:
        transform: applied to each batch first, of images in [0, 1] (see :meth:`Samples.images`); a trigger, say.
        batch_size: at most; where the device's memory does not hold so many, half of it, and so on down to one.
        precision: "fp32" by default, so that a reported figure does not depend on the hardware's bf16.
    """
    device = device_of(model)
    with evaluating(model), autocast(precision, device):
        while True:
            try:
                return torch.cat([model(laid_out(x)).float() for x in _batches(samples, transform, batch_size, device)])
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            # Not before the error is gone, which holds on to what was computed.
            batch_size = (batch_size + 1) // 2
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _batches(
    samples: Samples, transform: Callable[[Tensor], Tensor] | None, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    for x, _ in samples.batches(batch_size):
        x = x.to(device)
        yield x if transform is None else transform(x)


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a model fits labelled samples: mean cross-entropy (nats) and accuracy in [0, 1]."""

    loss: float
    accuracy: float


def measure(model: nn.Module, samples: Samples, *, batch_size: int = 500, precision: Precision = "auto") -> Fit:
    """Loss and accuracy on samples with true labels; one host sync."""
    logits = predict(model, samples, batch_size=batch_size, precision=precision)
    labels = samples.labels.to(logits.device)
    both = torch.stack([F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()])
    loss, accuracy = both.tolist()
    return Fit(loss, accuracy)
