"""Inoculation: random triggers of which the network learns to take no notice."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from torch import Tensor, nn

from factories import convolutional, same, samples, weights
from tuning_scenes import RESIDUAL, scene
from unbackdoor.defenses.inoculation import Inoculation, Unmoved, triggers_for
from unbackdoor.defenses.random_triggers import ImageKind, RandomFeatures, RandomImageTriggers, RandomWords
from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit
from unbackdoor.types import PADDING, Samples

KINDS = get_args(ImageKind)


def images(count: int = 16, channels: int = 3, height: int = 20, width: int = 32) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 20, 32), (1, 8, 8), (2, 5, 3)])
def test_every_kind_stamps_every_image_within_the_range(
    kind: ImageKind, channels: int, height: int, width: int
) -> None:
    x = images(16, channels, height, width)
    kept = x.clone()
    stamped = RandomImageTriggers((kind,), generator())(x)
    assert stamped.shape == x.shape
    assert stamped.dtype == x.dtype
    assert float(stamped.min()) >= 0
    assert float(stamped.max()) <= 1
    assert torch.equal(x, kept)
    changed = (stamped != x).flatten(1).any(1)
    assert changed.sum() >= 14  # a small patch may happen to show what was there
    assert torch.equal(stamped, RandomImageTriggers((kind,), generator())(x))
    assert not torch.equal(stamped, RandomImageTriggers((kind,), generator(1))(x))


def test_a_patch_is_one_small_rectangle() -> None:
    x = images(64)
    changed = (RandomImageTriggers(("patch",), generator())(x) != x).any(1)
    for image in changed:
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        assert 1 <= int(rows[-1] - rows[0]) + 1 <= 4  # a fifth of 20
        assert 1 <= int(columns[-1] - columns[0]) + 1 <= 6
        inside = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.float().mean() > 0.5


def test_a_blend_keeps_at_least_seventy_percent_of_the_image() -> None:
    x = images()
    change = RandomImageTriggers(("blend",), generator())(x) - x
    assert float(change.abs().max()) <= 0.3 + 1e-6
    assert (change.abs().flatten(1).amax(1) >= 0.01).sum() >= 12  # another image of the batch may be the same one


def test_a_wave_is_one_sinusoid_in_every_channel() -> None:
    """On a grey image nothing is cut off: each channel's spectrum has one peak and its mirror image."""
    x = torch.full((12, 3, 64, 64), 0.5)
    change = (RandomImageTriggers(("wave",), generator())(x) - x).numpy()
    assert np.abs(change).max() <= 0.15 + 1e-6
    rows, columns = np.mgrid[:64, :64]
    for wave in change:
        loudest = wave[np.abs(wave).max((1, 2)).argmax()]
        power = np.abs(np.fft.fft2(loudest, (512, 512))) ** 2
        u, v = np.unravel_index(power[:, :257].argmax(), (512, 257))
        angle = 2 * np.pi * (u * rows + v * columns) / 512
        basis = np.stack([np.sin(angle).ravel(), np.cos(angle).ravel()], 1)
        _, residual, *_ = np.linalg.lstsq(basis, loudest.ravel(), rcond=None)
        assert residual.sum() <= 0.1 * (loudest**2).sum()
        # The channels differ by a factor alone.
        assert np.linalg.matrix_rank(wave.reshape(3, -1), tol=1e-3) == 1


def test_a_warp_moves_pixels_and_makes_no_new_ones() -> None:
    flat = torch.full((4, 3, 16, 16), 0.3)
    assert torch.allclose(RandomImageTriggers(("warp",), generator())(flat), flat)
    ramp = torch.linspace(0, 1, 64).expand(8, 1, 64, 64)  # a pixel to the side is 1/63 more
    moved = (RandomImageTriggers(("warp",), generator())(ramp) - ramp).abs().mean((1, 2, 3)) * 63
    assert (moved >= 0.05).all()  # the mean over both directions is a quarter to 4 pixels
    assert moved.max() >= 0.75
    assert (moved <= 8).all()


def test_a_tint_is_a_line_in_every_channel() -> None:
    x = 0.4 + 0.1 * images()
    tinted = RandomImageTriggers(("tint",), generator())(x)
    for before, after in zip(x.flatten(0, 1).flatten(1), tinted.flatten(0, 1).flatten(1), strict=True):
        gain, offset = np.polyfit(before.numpy(), after.numpy(), 1)
        assert 0.7 <= gain <= 1.3
        assert -0.1 <= offset <= 0.1
        assert np.allclose(gain * before + offset, after, atol=1e-4)


def test_kinds_are_drawn_alike() -> None:
    """A tint changes every pixel, a patch few: the count tells which an image got."""
    x = images(400, 3, 16, 16)
    changed = (RandomImageTriggers(("patch", "tint"), generator())(x) != x).float().mean((1, 2, 3))
    assert 150 <= int((changed > 0.5).sum()) <= 250


@hypothesis_given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_words_are_put_into_texts(lengths: list[int], seed: int) -> None:
    """Old tokens are all there in their order, the first one first, and one to three new ones stand side by side."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PADDING)
    for row, length in enumerate(lengths):
        ids[row, :length] = 1000 + torch.arange(length)
    made = RandomWords(50, generator(seed))(ids)
    for row, length in enumerate(lengths):
        text = [t for t in made[row].tolist() if t != PADDING]
        assert made[row, : len(text)].tolist() == text
        assert [t for t in text if t >= 1000] == list(range(1000, 1000 + length))
        new = [i for i, t in enumerate(text) if t < 1000]
        assert 1 <= len(new) <= 3
        assert new == list(range(new[0], new[0] + len(new)))
        assert new[0] >= 1
        assert all(0 <= text[i] < 50 for i in new)


def test_features_are_overwritten_within_their_range() -> None:
    x = torch.randn(50, 40, generator=generator())
    low, high = x.amin(0), x.amax(0)
    made = RandomFeatures(low, high, generator())(x)
    assert ((made != x).sum(1) == 4).all()
    assert (made >= low).all()
    assert (made <= high).all()


def test_the_loss_is_that_of_both_copies() -> None:
    """Against numpy: labels and the teacher's outputs, on the batch and on its triggered copy, in eval mode."""
    given, student = convolutional(dropout=0.5).eval(), convolutional(dropout=0.5, seed=1)
    x, y = torch.rand(6, 3, 16, 16, generator=generator()), torch.arange(6) % 4
    stamped = (x + 0.1).clamp(0, 1)
    settings = Inoculation(mix=False, labels=0.9, distill=0.7, triggered=0.3)
    student.train()
    step = Unmoved(settings, given, lambda _: stamped, generator())(student, x, y)
    assert student.training

    def logs(model: nn.Module, batch: Tensor, temperature: float) -> Any:
        z = model.eval()(batch).detach().double().numpy() / temperature
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    wanted, parts = logs(given, x, 2), []
    for batch in (x, stamped):
        entropy = -logs(student, batch, 1)[np.arange(6), y.numpy()].mean()
        gap = (np.exp(wanted) * (wanted - logs(student, batch, 2))).sum(1).mean() * 4
        parts.append(0.9 * entropy + 0.7 * gap)
    assert step.loss.item() == pytest.approx(parts[0] + 0.3 * parts[1], rel=1e-4)
    assert step.terms["clean"].item() == pytest.approx(parts[0], rel=1e-4)
    assert step.terms["triggered"].item() == pytest.approx(parts[1], rel=1e-4)


def test_sharpened_triggers_keep_what_misleads() -> None:
    """Of a linear network the gradient is known: only changes along it stay, doubled."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]))
    x = torch.full((1, 1, 2, 2), 0.5)
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    stamped = x + torch.tensor([0.1, 0.1, -0.2, -0.2]).view(1, 1, 2, 2)
    settings = Inoculation(mix=False, sharpen=True)
    Unmoved(settings, copy.deepcopy(network).eval(), lambda _: stamped, generator())(network, x, torch.tensor([0]))
    # The trigger leaves the first logit where it was: 0.1 - 0.1 - 0.2 + 0.2. The gap's gradient is zero there.
    assert torch.equal(seen[-1][1], x[0])
    seen.clear()
    stamped = x + torch.tensor([0.2, 0.1, -0.1, -0.2]).view(1, 1, 2, 2)
    Unmoved(settings, copy.deepcopy(network).eval(), lambda _: stamped, generator())(network, x, torch.tensor([0]))
    # It is 0.2 up now: what pushes it further up stays, which is the first and the last.
    assert torch.allclose(seen[-1][1].flatten(), torch.tensor([0.9, 0.5, 0.5, 0.1]))


class Held(nn.Module):
    """Its weight ``idle`` gets a gradient of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.idle = convolutional(), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + 0 * self.idle.sum()


def test_weights_that_no_gradient_holds_shrink_as_stated() -> None:
    cleaned = Inoculation(lrs=(1e-3,), images=400, shrink=0.5)(Held(), samples(40, size=16), Rng(0)).model
    assert cleaned.get_parameter("idle").detach().numpy() == pytest.approx(np.exp(-0.5), rel=0.03)


def test_batch_statistics_stay_unless_train_mode() -> None:
    given, clean = convolutional(), samples(40, size=16)
    still, live = (Inoculation(images=80, train_mode=mode)(given, clean, Rng(0)).model for mode in (False, True))

    def statistics(model: nn.Module) -> dict[str, Tensor]:
        return {k: v for k, v in weights(model).items() if "running" in k}

    assert statistics(given)
    assert same(statistics(still), statistics(given))
    assert not same(statistics(live), statistics(given))


def learned() -> tuple[nn.Module, Samples]:
    """A network that knows its task."""
    model, clean = convolutional(), samples(80, size=16)
    fit(model, clean, Recipe(epochs=30, batch_size=20, optimizer="adam", lr=3e-3), Rng(0))
    return model, clean


def test_the_harshest_learning_rate_that_keeps_the_skill_is_taken() -> None:
    """Trials on the samples that are not held out; the training on all of them, from the given network."""
    model, clean = learned()
    settings: dict[str, Any] = {"images": 400, "max_loss": 0.3, "step_cap": None}
    searched = Inoculation(**settings, lrs=(1e-4, 2e-4, 30.0))(model, clean, Rng(0))
    assert searched.trace.values["learning rate"] == 2e-4
    assert [p.name for p in searched.trace.phases] == ["inoculate"]
    assert searched.trace.phases[0].epochs[0].images == 80
    alone = Inoculation(**settings, lrs=(2e-4,))(model, clean, Rng(0))
    assert same(weights(alone.model), weights(searched.model))
    # Three trials of three epochs over 64 samples, five epochs over 80, each sample twice.
    assert searched.trace.images == 2 * (3 * 3 * 64 + 5 * 80)
    assert alone.trace.images == 2 * 5 * 80
    assert set(alone.trace.phases[0].epochs[0].terms) == {"clean", "triggered"}


def test_a_learning_rate_that_breaks_the_network_is_lowered() -> None:
    model, clean = learned()
    found = Inoculation(lrs=(0.5, 1.0), images=400, step_cap=None)(model, clean, Rng(0)).trace
    assert 0 < float(found.values["learning rate"]) < 0.5
    assert found.notes[0] == "learning rate 0.5 broke the network: a quarter of it was tried"
    hopeless = Inoculation(lrs=(1e6, 2e6), images=400, step_cap=None)(model, clean, Rng(0))
    assert hopeless.trace.notes[-1] == "every learning rate broke the network: it is returned as it was given"
    assert same(weights(hopeless.model), weights(model))


def test_with_one_sample_a_class_the_gentlest_is_taken() -> None:
    trace = Inoculation(images=40)(convolutional(), samples(4, size=16), Rng(0)).trace
    assert trace.values["held-out samples"] == 0
    assert trace.values["learning rate"] == 5e-4
    assert "no class has two samples" in trace.notes[0]


def test_texts_need_a_vocabulary() -> None:
    texts = Samples(torch.ones(4, 3, dtype=torch.int64), torch.arange(4) % 2, 2)
    with pytest.raises(UnsupportedModel, match="Linear has no table of embeddings"):
        triggers_for(nn.Linear(3, 2), texts, KINDS, generator())
    assert Inoculation().suited(texts).lrs == Inoculation.TEXTS["lrs"]
    assert Inoculation(lrs=(1e-3,)).suited(texts) == Inoculation(lrs=(1e-3,))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"images": 0}, "images"),
        ({"shrink": -1.0}, "shrink"),
        ({"triggered": float("nan")}, "triggered"),
        ({"distill": float("inf")}, "distill"),
        ({"kinds": ()}, "kinds"),
        ({"kinds": ("patch", "sticker")}, "sticker"),
        ({"lrs": ()}, "lrs"),
        ({"lrs": (2e-3, 1e-3)}, "smallest first"),
        ({"held_out": 1.0}, "held_out"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Inoculation(**settings)


def test_it_removes_a_backdoor_that_fine_tuning_leaves() -> None:
    """And by its triggers: without them most of a blend's success stays."""
    digits = scene("blended(rate=0.1)", arch=RESIDUAL)
    before, asr = digits.rates()
    assert asr >= 0.95
    accuracy, asr = digits.rates(digits.removal("inoculation"))
    assert asr <= 0.1
    assert accuracy >= before - 0.04
    assert digits.rates(digits.removal("inoculation(triggered=0)"))[1] >= 0.3
    assert digits.rates(digits.removal("ft(epochs=60)"))[1] >= 0.9
