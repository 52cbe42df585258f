"""Forward passes over many samples: the same logits however they are batched, and nothing left behind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from factories import Snapshot, convolutional, samples
from unbackdoor.inference import autocast, device_of, evaluating, measure, predict, uses_bf16

CPU = torch.device("cpu")


def mixed() -> nn.Module:
    """A network in train mode, with one module in eval mode and one frozen weight."""
    model = convolutional(dropout=0.5)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    return model


@given(size=st.integers(1, 50))
def test_logits_do_not_depend_on_the_batch_size(size: int) -> None:
    model, data = convolutional(dropout=0.5), samples(23)
    model.eval()
    with torch.no_grad():
        expected = model(data.inputs.float() / 255)
    logits = predict(model, data, batch_size=size)
    assert logits.shape == (23, 4)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.allclose(logits, expected, atol=1e-5)


def test_predicting_leaves_modes_weights_and_statistics_alone() -> None:
    model = mixed()
    before, state = Snapshot(model), torch.get_rng_state()
    first, second = predict(model, samples()), predict(model, samples())
    measure(model, samples())
    assert before.differences() == []
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("fits", "sizes"), [(23, [23]), (12, [23, 12, 11]), (5, [23, 12, 6, *[3] * 7, 2])])
def test_a_batch_that_the_memory_does_not_hold_is_halved(fits: int, sizes: list[int]) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = convolutional()

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            if len(x) > fits:
                raise torch.OutOfMemoryError("out of memory")
            out: Tensor = self.inner(x)
            return out

    seen: list[int] = []
    model, data = Small(), samples(23)
    logits = predict(model, data, batch_size=23)
    assert torch.allclose(logits, predict(model.inner, data), atol=1e-6)
    assert seen == sizes


def test_an_image_that_the_memory_does_not_hold_is_an_error() -> None:
    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        predict(convolutional(), samples(), transform=full)


def test_modes_come_back_after_an_error() -> None:
    model = mixed()
    before = Snapshot(model)

    def fail(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, samples(), transform=fail)
    assert before.differences() == []


def test_evaluating_sets_every_module() -> None:
    model = mixed()
    with evaluating(model) as nothing:
        assert nothing is None
        assert not any(m.training for m in model.modules())
    assert model.training
    assert not model[1].training


def test_the_transform_sees_float_images_and_changes_what_is_predicted() -> None:
    model, data = convolutional(), samples(10)

    def darken(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() <= 1
        return x * 0

    dark = predict(model, data, transform=darken, batch_size=3)
    assert torch.allclose(dark, dark[:1].expand(10, 4), atol=1e-6)
    assert not torch.allclose(dark, predict(model, data))


def test_measure_against_the_definitions() -> None:
    model, data = convolutional(), samples(23)
    result = measure(model, data, batch_size=5, precision="fp32")
    logits = predict(model, data).double()
    loss = -sum(float(row.softmax(0)[label].log()) for row, label in zip(logits, data.labels, strict=True)) / 23
    hits = sum(int(row.argmax()) == int(label) for row, label in zip(logits, data.labels, strict=True))
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.accuracy == pytest.approx(hits / 23)
    assert math.isfinite(measure(model, data, precision="bf16").loss)


def test_precision() -> None:
    assert uses_bf16("bf16", CPU)
    assert not uses_bf16("fp32", CPU)
    for precision, wanted in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(precision, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == wanted
    assert predict(convolutional(), samples(), precision="bf16").dtype == torch.float32


def test_automatic_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert uses_bf16("auto", CPU) is able
    for capability, able in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert uses_bf16("auto", torch.device("cuda")) is able
    assert not uses_bf16("auto", torch.device("mps"))


def test_the_device_is_that_of_the_first_tensor() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    only_a_buffer = nn.Module()
    only_a_buffer.register_buffer("b", torch.zeros(1, device="meta"))
    assert device_of(only_a_buffer) == torch.device("meta")
    assert device_of(nn.Flatten()) == CPU
