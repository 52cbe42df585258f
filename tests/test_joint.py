"""What attackers who train share: exact shares of batches, a partner that comes to rest, and generators that reload."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from factories import same, samples, weights
from unbackdoor.attacks.joint import (
    Augmenter,
    Partner,
    Picker,
    UNet,
    check_width,
    packed,
    replaced,
    steps_of,
    usual_width,
)
from unbackdoor.attacks.poisoning import Manipulation
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit


class Nothing(Manipulation):
    """Changes nothing and trains nothing."""

    def trigger(self, x: Tensor, /) -> Tensor:
        return x

    def train(self, *_: Any) -> Any:
        return self, []


KINDS: Any = ("all-to-one", "all-to-all")


@given(
    rate=st.floats(0.001, 0.3),
    ratio=st.sampled_from([0.0, 0.5, 2.0]),
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 40),
    target=st.integers(0, 3),
)
def test_over_the_batches_the_share_is_the_rate(rate: float, ratio: float, kind: Any, size: int, target: int) -> None:
    pick = Picker(Nothing(rate=rate, labels=kind, target=target), 4, bystanders=ratio)
    labels = torch.randint(0, 4, (50 * size,), generator=torch.Generator().manual_seed(size))
    attacked = bystanders = 0
    for y in labels.split(size):
        picked = pick(y)
        attacked, bystanders = attacked + len(picked.attacked), bystanders + len(picked.bystanders)
        chosen = torch.cat([picked.attacked, picked.bystanders]).tolist()
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= set(range(size))
        if kind == "all-to-all":
            assert torch.equal(picked.wanted, (y[picked.attacked] + 1) % 4)
        else:
            assert (picked.wanted == target).all()
            needed = max(0, len(picked.attacked) - int((y != target).sum()))
            assert int((y[picked.attacked] == target).sum()) == needed
    assert attacked == round(rate * len(labels))
    # Where a batch is full, a bystander is left out; none is ever added.
    assert bystanders <= round(rate * ratio * len(labels))
    if size > 5:
        assert bystanders == round(rate * ratio * len(labels))


def test_more_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rate 0.4 with 2.0 bystanders .* a rate up to 0.333 is possible"):
        Picker(Nothing(rate=0.4), 4, bystanders=2.0)
    with pytest.raises(ConfigError, match=r"target 4 is no class"):
        Picker(Nothing(target=4), 4)


def test_replacing_copies_and_lets_gradients_through_to_what_is_new() -> None:
    x, new = torch.zeros(4, 2), torch.ones(2, 2, requires_grad=True)
    made = replaced(x, (torch.tensor([3, 1]), new * torch.tensor([[2.0], [5.0]])))
    assert made.tolist() == [[0, 0], [5, 5], [0, 0], [2, 2]]
    assert (x == 0).all()
    made.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == [[2, 2], [5, 5]]


def test_steps_are_counted_as_the_loop_takes_them() -> None:
    data, recipe = samples(21), Recipe(epochs=3, batch_size=5)
    taken: list[int] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    fit(model, data, recipe, Rng(0), after_step=lambda _: taken.append(1))
    assert len(taken) == steps_of(data, recipe) == 12  # the lone last image joins the batch before it


def test_a_partner_slows_down_along_a_cosine_and_then_rests() -> None:
    x = torch.tensor([10.0], requires_grad=True)
    partner = Partner([x], lr=0.5, steps=4)
    moves = []
    for _ in range(6):
        before = x.item()
        (x * 3).sum().backward()
        partner.step()
        assert x.grad is None
        moves.append(before - x.item())
    # Adam's step under a constant gradient is its learning rate.
    expected = [0.5 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)] + [0, 0]
    assert moves == pytest.approx(expected, abs=1e-5)
    assert partner.done
    assert partner.progress == 1


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (28, 28)])
def test_a_network_is_kept_in_the_state_and_treats_each_image_alone(size: tuple[int, int]) -> None:
    network = UNet.new(samples(4), 2, 8, Rng(0))
    attack = Nothing().with_state(packed(mine=network, other=UNet.new(samples(4, channels=1), 1, 4, Rng(1))))
    before = torch.get_rng_state()
    again = UNet.kept(attack, "mine", torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    assert same(weights(network), weights(again))
    assert not any(p.requires_grad for p in again.parameters())
    x = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    made = again(x)
    assert made.shape == (5, 2, *size)
    assert torch.allclose(made, torch.cat([again(part) for part in x.split(2)]), atol=1e-6)
    assert torch.allclose(made, network(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(again(x), made)


def test_a_network_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="has not learned it"):
        UNet.kept(Nothing(), "mine", torch.device("cpu"))


def test_fresh_weights_belong_to_their_seed() -> None:
    made = [UNet.new(samples(4), 1, None, Rng(seed)) for seed in (0, 0, 1)]
    assert same(weights(made[0]), weights(made[1]))
    assert not same(weights(made[0]), weights(made[2]))


def test_widths_follow_the_images() -> None:
    assert [usual_width(size) for size in (8, 28, 32, 48, 64, 128, 224)] == [8, 8, 8, 12, 16, 32, 32]
    for width in (0, 2, 6, -4):
        with pytest.raises(ConfigError, match=f"width must be None or a multiple of 4, not {width}"):
            check_width(width)
    check_width(None)
    check_width(4)


def test_the_augmenter_takes_over_from_the_recipe() -> None:
    """Images are shifted in as many steps as the recipe would shift them, and then shown as they are."""
    train = samples(40, size=16, channels=1)
    recipe = Recipe(epochs=3, batch_size=10, augment="crop", plain_epochs=1)
    shown = Augmenter(train, recipe, torch.Generator().manual_seed(0))
    x = train.images(slice(None)).requires_grad_()
    changed = [not torch.equal(shown(x), x) for _ in range(steps_of(train, recipe))]
    assert changed == [True] * 8 + [False] * 4
    assert shown.bare == dataclasses.replace(recipe, augment="none")


def test_gradients_pass_through_the_augmenter() -> None:
    train = samples(10, size=16, channels=1)
    shown = Augmenter(train, Recipe(epochs=1, batch_size=10, augment="crop-flip"), torch.Generator().manual_seed(0))
    x = train.images(slice(None)).requires_grad_()
    shown(x).sum().backward()
    # Each pixel counts once, or not at all where the crop has cut it off.
    assert x.grad is not None
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
