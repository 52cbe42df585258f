"""``Recipe`` and :func:`fit`: the one training loop of the whole package.

Four hooks are enough for everything here: ``batch`` (poison, mislabel), ``objective`` (ascent, distillation,
regularisers), ``after_step`` (clamp masks), ``until`` (stop rules).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import progress
from unbackdoor.augmentation import Augmentation, augment
from unbackdoor.errors import ConfigError, DataError, TrainingDiverged
from unbackdoor.inference import Precision, autocast, device_of
from unbackdoor.rng import Rng, isolated
from unbackdoor.types import Epoch, Samples, as_float

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "epoch-cosine", "multistep", "one-cycle"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the data, at most (the ``until`` hook may stop earlier).
        batch_size: images a step. A last batch of one image joins the batch before it, since BatchNorm cannot
            normalise one value.
        optimizer: "sgd", "adam" or "adamw", fused.
        lr: peak learning rate.
        momentum: SGD's.
        nesterov: SGD's.
        betas: Adam's.
        weight_decay: L2 for sgd and adam (as torch has it), decoupled for adamw.
        schedule: "constant"; "cosine" to zero, a step at a time; "epoch-cosine", the same moved once an epoch (torch's
            CosineAnnealingLR with T_max=epochs); "multistep", ×0.1 at each of ``milestones`` (epochs); "one-cycle",
            linear warm-up over the first fifth, then linear to zero.
        clip_norm: largest global gradient norm, or None.
        label_smoothing: of the default objective.
        augment: "none", "crop" or "crop-flip", on the whole batch.
        precision: "auto" is bfloat16 autocast where the hardware has it; weights stay float32.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    milestones: tuple[int, ...] = ()
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    augment: Augmentation = "none"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        def require(right: bool, name: str, need: str) -> None:
            if not right:
                raise ConfigError(f"{name} must be {need}, not {getattr(self, name)!r}")

        require(self.epochs >= 1, "epochs", "at least 1")
        require(self.batch_size >= 1, "batch_size", "at least 1")
        require(0 < self.lr < math.inf, "lr", "a finite number > 0")
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", "at least 0")
        require(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "None or > 0")
        for name, choices in (("optimizer", Optimizer), ("schedule", Schedule), ("augment", Augmentation)):
            require(getattr(self, name) in get_args(choices), name, f"one of {', '.join(get_args(choices))}")
        require(self.precision in get_args(Precision), "precision", f"one of {', '.join(get_args(Precision))}")


class Step(NamedTuple):
    """What an objective returns: the scalar to minimise, the logits it saw, and named parts of the loss to log."""

    loss: Tensor
    logits: Tensor
    terms: Mapping[str, Tensor] = {}


#: (model in train mode, images in [0, 1], labels) -> Step
Objective = Callable[[nn.Module, Tensor, Tensor], Step]
#: (images uint8 or in [0, 1], labels, generator) -> the batch to train on, before augmentation
BatchHook = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CrossEntropy:
    """The default objective."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        logits = model(x)
        return Step(F.cross_entropy(logits.float(), y, label_smoothing=self.label_smoothing), logits)


@dataclass
class EndOfEpoch:
    """Handed to ``until``: the epoch so far, and a place (``measured``) for what the hook measures."""

    index: int
    loss: float
    accuracy: float
    measured: dict[str, float] = field(default_factory=dict)


#: (model, end of epoch) -> whether to stop
Until = Callable[[nn.Module, EndOfEpoch], bool]


def fit(
    model: nn.Module,
    data: Samples,
    recipe: Recipe,
    rng: Rng,
    *,
    objective: Objective | None = None,
    batch: BatchHook | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    until: Until | None = None,
    parameters: list[nn.Parameter] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    name: str = "train",
) -> list[Epoch]:
    """Train ``model`` in place and return what each epoch did. The model is left in eval mode.

    The same seed gives the same weights on CPU, bit for bit (same machine, same thread count).

    Args:
        model: maps images in [0, 1] to logits (N, classes).
        data: moved to the model's device once, in channels_last memory.
        rng: gives the order, the augmentation, the ``batch`` hook's draws and the state that dropout sees.
        objective: what to minimise; cross-entropy by default.
        batch: changes each batch before augmentation; gets a CPU generator of its own.
        after_step: called after each optimiser step.
        until: called at each epoch's end; True stops.
        parameters: what to train; by default every floating parameter, whether it asked for gradients or not.
        optimizer: used instead of the recipe's where given; the recipe's lr and schedule still drive it.
        name: shown with the progress.

    Raises:
        TrainingDiverged: the epoch's loss is not finite.
        DataError: a batch of one image meets BatchNorm.
    """
    device = device_of(model)
    data = data.to(device)
    inputs, labels = data.inputs.contiguous(memory_format=torch.channels_last), data.labels
    trained = parameters if parameters is not None else [p for p in model.parameters() if p.is_floating_point()]
    asked = [p.requires_grad for p in trained]
    for p in trained:
        p.requires_grad_(True)
    objective = objective or CrossEntropy(recipe.label_smoothing)
    optimizer = optimizer or make_optimizer(trained, recipe)
    starts = batch_starts(len(data), recipe.batch_size)
    steps = len(starts) - 1
    order_of, draws, crops = rng.stream("order"), rng.stream("batch"), rng.stream("augment")
    epochs: list[Epoch] = []
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with isolated(rng, device), progress.task(name, recipe.epochs) as task:
            for index in range(recipe.epochs):
                began = time.perf_counter()
                model.train()
                totals: dict[str, Tensor] = {}
                order = torch.randperm(len(data), generator=order_of).to(device)
                for step in range(steps):
                    lr = recipe.lr * lr_factor(recipe, index, step, steps)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    chosen = order[starts[step] : starts[step + 1]]
                    x, y = inputs[chosen], labels[chosen]
                    if batch is not None:
                        x, y = batch(x, y, draws)
                    x = as_float(augment(x, recipe.augment, crops)).contiguous(memory_format=torch.channels_last)
                    with autocast(recipe.precision, device):
                        try:
                            done = objective(model, x, y)
                        except ValueError as error:
                            raise _explained(error, len(x)) from error
                    optimizer.zero_grad(set_to_none=True)
                    done.loss.backward()  # type: ignore[no-untyped-call]
                    if recipe.clip_norm is not None:
                        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
                    optimizer.step()
                    if after_step is not None:
                        after_step(model)
                    _add(totals, done, y, len(x))
                # The one host sync of the epoch.
                sums = torch.stack(list(totals.values())).tolist()
                means = {key: value / len(data) for key, value in zip(totals, sums, strict=True)}
                loss, accuracy = means.pop("loss"), means.pop("accuracy")
                end = EndOfEpoch(index, loss, accuracy)
                if not math.isfinite(loss):
                    raise TrainingDiverged(
                        f"{name}: the loss became {loss} in epoch {index + 1} at learning rate {lr:g}; "
                        "a smaller learning rate would be right"
                    )
                stop = until is not None and until(model, end)
                seconds = time.perf_counter() - began
                epochs.append(Epoch(index, loss, accuracy, lr, len(data), seconds, means, end.measured))
                task.advance(f"loss {loss:.3f}  accuracy {accuracy:.1%}")
                if stop:
                    break
    finally:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        model.eval()
        optimizer.zero_grad(set_to_none=True)
        for p, wanted in zip(trained, asked, strict=True):
            p.requires_grad_(wanted)
    return epochs


def _add(totals: dict[str, Tensor], done: Step, y: Tensor, count: int) -> None:
    """Sum on the device; nothing is read back before the epoch's end."""
    with torch.no_grad():
        parts = {"loss": done.loss, **done.terms}
        for key, value in parts.items():
            value = value.detach().double() * count
            totals[key] = totals[key] + value if key in totals else value
        right = (done.logits.argmax(1) == y).sum().double()
        totals["accuracy"] = totals["accuracy"] + right if "accuracy" in totals else right


def _explained(error: ValueError, count: int) -> Exception:
    if "more than 1 value per channel" in str(error):
        return DataError(f"BatchNorm cannot train on a batch of {count} image: give at least two samples")
    return error


def make_optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser, fused."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    adam = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return adam(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)


def lr_factor(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by at this step (0-based) of ``steps`` in this epoch (0-based)."""
    total = recipe.epochs * steps
    now = epoch * steps + step
    match recipe.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return (1 + math.cos(math.pi * now / total)) / 2
        case "epoch-cosine":
            return (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
        case "multistep":
            return float(0.1 ** sum(epoch >= m for m in recipe.milestones))
        case "one-cycle":
            warm = max(1.0, 0.2 * total)
            return (now + 1) / warm if now + 1 <= warm else max(0.0, (total - now) / (total - warm + 1))


def batch_starts(count: int, batch_size: int) -> list[int]:
    """Where the batches start, and ``count`` last. A lone last sample joins the batch before it."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and batch_size > 1 and count - starts[-1] == 1:
        starts.pop()
    return [*starts, count]
