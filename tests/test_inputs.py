"""How a network takes its images: the format's text, the wrapper, final softmaxes, and finding the format."""

from __future__ import annotations

import copy
import itertools
import re
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import factories
from owners_networks import data_root, owners_network
from unbackdoor.data.loading import load_samples
from unbackdoor.errors import ConfigError, DataError, UnsupportedModel
from unbackdoor.inference import predict
from unbackdoor.models.inputs import (
    PRESETS,
    Classifier,
    InputFormat,
    choose_format,
    count_outputs,
    detect_output,
    final_softmax,
    first_tensor,
    fitting_formats,
)
from unbackdoor.types import Samples

FINITE = st.floats(-300, 300)
POSITIVE = st.floats(1e-3, 300)


@st.composite
def formats(draw: st.DrawFn) -> InputFormat:
    order = draw(st.sampled_from(("rgb", "bgr")))
    layout = draw(st.sampled_from(("chw", "hwc", "flat-chw", "flat-hwc")))
    base = draw(st.sampled_from([*PRESETS.values(), None]))
    if base is None:
        channels = draw(st.sampled_from((1, 3)))
        means = draw(st.lists(FINITE, min_size=channels, max_size=channels))
        stds = draw(
            st.lists(POSITIVE, min_size=1, max_size=1) | st.lists(POSITIVE, min_size=channels, max_size=channels)
        )
        base = InputFormat(scale=draw(st.sampled_from((1, 255))), mean=tuple(means), std=tuple(stds))
    return InputFormat(scale=base.scale, mean=base.mean, std=base.std, channel_order=order, layout=layout)


@given(formats())
def test_text_round_trip(given_format: InputFormat) -> None:
    assert InputFormat.parse(str(given_format)) == given_format


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("0-1", {}),
        ("0-255:bgr", {"scale": 255, "channel_order": "bgr"}),
        (" PM1:flat ", {"mean": (0.5,), "std": (0.5,), "layout": "flat-chw"}),
        ("mean=0.5,0.4,0.3;std=.25", {"mean": (0.5, 0.4, 0.3), "std": (0.25,)}),
        ("scale=255; mean=127.5:hwc:rgb", {"scale": 255, "mean": (127.5,), "layout": "hwc"}),
    ],
)
def test_parsing(text: str, fields: dict[str, Any]) -> None:
    assert InputFormat.parse(text) == InputFormat(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "did you mean 'imagenet'"),
        ("0-1:brg", "unknown 'brg'; did you mean 'rgb'"),
        ("0-1:bgr:rgb", "channel order is given twice"),
        ("mean=a", "'a' should be a number"),
        ("mean=1;mean=2", "each once"),
        ("scale=128", "scale must be 1 or 255"),
        ("mean=1,2;std=1,2,3", "mean has 2 values and std 3"),
        ("std=0", "std must be > 0, not 0.0"),
        ("mean=nan", "finite"),
        ("", "unknown input format ''"),
    ],
)
def test_parsing_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        InputFormat.parse(text)


class Echo(nn.Module):
    """Gives back what it was fed, flattened: shows exactly what a network gets."""

    def __init__(self) -> None:
        super().__init__()
        self.fed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.fed = x
        return x.reshape(len(x), -1)


@settings(deadline=None)
@given(formats(), st.sampled_from((1, 3)))
def test_a_network_is_fed_what_its_owner_fed_it(given_format: InputFormat, channels: int) -> None:
    """Against the owner's way, written per sample and per pixel with whole pixels 0..255."""
    pixels = torch.randint(0, 256, (2, channels, 4, 5), generator=torch.Generator().manual_seed(1))
    echo = Echo()
    Classifier(echo, given_format)(pixels / 255)
    repeated = pixels.expand(-1, given_format.channels or channels, -1, -1).double()
    count = repeated.shape[1]
    want = torch.empty_like(repeated)
    for c in range(count):
        mean = given_format.mean[c % len(given_format.mean)]
        std = given_format.std[c % len(given_format.std)]
        want[:, c] = (repeated[:, c] / 255 * given_format.scale - mean) / std
    if given_format.channel_order == "bgr" and count == 3:
        want = want[:, [2, 1, 0]]
    if "hwc" in given_format.layout:
        want = torch.stack([image.permute(1, 2, 0) for image in want])
    if "flat" in given_format.layout:
        want = want.reshape(2, -1)
    assert echo.fed is not None
    assert echo.fed.shape == want.shape
    limit = (
        float(want.abs().max()) * 1e-5
        + float((torch.tensor(given_format.mean) / min(given_format.std)).abs().max()) * 1e-6
    )
    torch.testing.assert_close(echo.fed.double(), want, atol=limit, rtol=1e-5)


def test_flattening_does_not_depend_on_memory_format() -> None:
    x = torch.rand(2, 3, 4, 5)
    for layout in ("flat-chw", "flat-hwc"):
        wrapped = Classifier(nn.Identity(), InputFormat(layout=layout))
        assert torch.equal(wrapped(x), wrapped(x.contiguous(memory_format=torch.channels_last)))


class Tail(nn.Module):
    """A linear network with any tail; a softmax inside as well, as attention has it."""

    def __init__(self, tail: nn.Module, inner: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(12, 4)
        self.attention = nn.Softmax(dim=-1)
        self.tail = tail
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.inner:
            x = x * self.attention(x)
        out: Tensor = self.tail(self.body(x))
        return out


class FunctionalSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, 1)


IMAGES = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def seeded(tail: nn.Module, inner: bool = True) -> Tail:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tail(tail, inner)


@pytest.mark.parametrize(
    ("tail", "kind", "module"),
    [
        (nn.Identity(), "logits", None),
        (nn.Softmax(dim=1), "probabilities", "tail"),
        (nn.Softmax(dim=-1), "probabilities", "tail"),
        (nn.LogSoftmax(dim=1), "log-probabilities", "tail"),
        (nn.Sequential(nn.ReLU(), nn.Softmax(dim=1), nn.Dropout()), "probabilities", "tail.1"),
        (FunctionalSoftmax(), "probabilities", None),
        (nn.Softmax(dim=0), "logits", None),
        (nn.ReLU(), "logits", None),
    ],
)
def test_kind_of_output_and_final_softmax(tail: nn.Module, kind: str, module: str | None) -> None:
    network = seeded(tail)
    network.train()
    assert detect_output(network, IMAGES) == kind
    assert final_softmax(network, IMAGES) == module
    assert network.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_logits_before_a_softmax_are_exact_where_its_log_has_lost_them() -> None:
    network = seeded(nn.Softmax(dim=1), inner=False)
    with torch.no_grad():
        network.body.weight.mul_(1000)
    exact = Classifier(network, output="probabilities", softmax="tail")
    rounded = Classifier(network, output="probabilities")
    want = network.body(IMAGES.flatten(1))
    assert torch.equal(exact(IMAGES), want)
    lost = rounded(IMAGES)
    assert lost.isfinite().all()
    assert (F.log_softmax(want, 1) < -110).any()
    assert lost.min() > -88
    for wrapped, dead in ((exact, False), (rounded, True)):
        network.zero_grad()
        wrong = want.argmin(1)  # the labels that a forgetting step asks for
        F.cross_entropy(wrapped(IMAGES), wrong).backward()
        gradient = network.body.bias.grad
        assert gradient is not None
        # Where the probability was clamped, the gradient does not push the wanted class at all.
        pushed = gradient[wrong.unique()].min() < -1e-3
        assert bool(pushed) is not dead


@pytest.mark.parametrize("tail", [nn.Softmax(dim=1), nn.LogSoftmax(dim=1), FunctionalSoftmax()])
@pytest.mark.parametrize("named", [True, False])
def test_the_softmax_of_the_logits_is_the_network_s_own_answer(tail: nn.Module, named: bool) -> None:
    network = seeded(tail)
    kind = detect_output(network, IMAGES)
    softmax = final_softmax(network, IMAGES) if named else None
    out = network(IMAGES)
    want = out.exp() if kind == "log-probabilities" else out
    torch.testing.assert_close(Classifier(network, output=kind, softmax=softmax)(IMAGES).softmax(1), want)


def test_copies_and_state_dicts_know_nothing_of_the_wrapper() -> None:
    network = seeded(nn.Softmax(dim=1))
    keys = list(network.state_dict())
    wrapped = Classifier(network, PRESETS["imagenet"], "probabilities", softmax="tail")
    twin = copy.deepcopy(wrapped)
    assert torch.equal(twin(IMAGES), wrapped(IMAGES))
    with torch.no_grad():
        twin.network.get_parameter("body.bias").add_(1)
    torch.testing.assert_close(twin(IMAGES), wrapped(IMAGES) + 1)
    assert list(wrapped.network.state_dict()) == keys
    assert wrapped.network is network
    assert list(wrapped.state_dict()) == [f"network.{k}" for k in keys]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrapped.modules())


def test_a_failing_network_leaves_no_hook() -> None:
    wrapped = Classifier(seeded(nn.Softmax(dim=1)), softmax="tail", output="probabilities")
    with pytest.raises(RuntimeError):
        wrapped(torch.rand(2, 3, 9, 9))
    assert not any(m._forward_pre_hooks for m in wrapped.modules())


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="output must be one of"):
        Classifier(nn.Identity(), output="sigmoid")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        Classifier(nn.Identity(), softmax="nowhere")
    with pytest.raises(DataError, match="takes 1 channels and the images have 3"):
        Classifier(nn.Conv2d(1, 4, 2))(IMAGES)


Main = namedtuple("Main", ["logits", "aux_logits"])


class Held(OrderedDict):  # type: ignore[type-arg]
    """As Hugging Face's outputs: a mapping that also has attributes."""

    @property
    def logits(self) -> Tensor:
        return self["scores"]


SCORES = torch.rand(2, 4)


@pytest.mark.parametrize(
    "output",
    [
        SCORES,
        (SCORES, torch.rand(2, 9)),
        [None, SCORES],
        {"features": torch.rand(2, 9), "logits": SCORES},
        {"out": SCORES, "aux": torch.rand(2, 4)},
        {"anything": SCORES},
        Main(SCORES, torch.rand(2, 4)),
        Held(hidden=torch.rand(2, 9), scores=SCORES),
        SCORES[:, :, None, None],
    ],
)
def test_the_main_output_is_found(output: Any) -> None:
    assert torch.equal(first_tensor(output), SCORES)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "NoneType without a tensor"),
        ({"a": SCORES, "b": SCORES}, "several tensors, a, b"),
        (SCORES[:, 0], "shape (2,)"),
        (SCORES[:, :1], "shape (2, 1)"),
        (torch.rand(2, 4, 3, 3), "shape (2, 4, 3, 3)"),
    ],
)
def test_outputs_without_class_scores(output: Any, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        first_tensor(output)


def test_auxiliary_outputs_in_train_mode() -> None:
    class Auxiliary(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x.flatten(1))
            return Main(out, out * 0) if self.training else out

    wrapped = Classifier(Auxiliary(12, 4))
    assert torch.equal(wrapped.train()(IMAGES), wrapped.eval()(IMAGES))


# --- finding the format ---------------------------------------------------------------------------------------------


class Nearest(nn.Module):
    """Right by construction for exactly one format: classifies by the nearest of the prototypes as it is fed them."""

    def __init__(self, prototypes: Tensor, fed: InputFormat, conv: bool = False) -> None:
        super().__init__()
        if conv:
            self.stem = nn.Conv2d(3, 1, 1)
        self.layout = fed.layout
        with torch.no_grad():
            self.register_buffer("centres", Classifier(nn.Identity(), fed).prepare(prototypes))

    def forward(self, x: Tensor) -> Tensor:
        centres = self.get_buffer("centres")
        if x.shape[1:] != centres.shape[1:]:
            raise RuntimeError(f"{tuple(x.shape)} does not fit")
        return -torch.cdist(x.flatten(1), centres.flatten(1)).square()


def clustered(channels: int, per_class: int, classes: int = 6) -> tuple[Samples, Tensor]:
    """Classes that differ in brightness and pattern, so that a wrong scale, order or layout confuses them."""
    g = torch.Generator().manual_seed(3)
    pattern = torch.rand(classes, channels, 5, 4, generator=g)
    level = torch.linspace(0.2, 0.6, classes)[:, None, None, None]
    prototypes = level + 0.4 * (pattern - 0.5)
    labels = torch.arange(classes).repeat(per_class)
    noise = 0.02 * torch.randn(len(labels), channels, 5, 4, generator=g)
    return Samples((prototypes[labels] + noise).clamp(0, 1), labels, classes), prototypes


@pytest.mark.parametrize(
    "text",
    ["0-1", "0-255", "pm1:flat-hwc", "imagenet", "0-1:hwc", "cifar10:flat-chw", "mnist", "caffe", "gtsrb:hwc"],
)
def test_auto_finds_the_format_of_a_colour_network(text: str) -> None:
    samples, prototypes = clustered(3, 40)
    fed = InputFormat.parse(text)
    choice = choose_format(Nearest(prototypes, fed), samples)
    assert choice.accuracy > 0.95
    found = choice.format
    assert (found.scale, found.layout, found.channel_order) == (fed.scale, fed.layout, "rgb")
    assert choice.notes[0].startswith(f"input format {found}")
    # Statistics that are nearly the same cannot be told apart; any others would show in the accuracy.
    best = max(f.accuracy for f in fitting_formats(Nearest(prototypes, fed), samples))
    assert choice.accuracy >= best - 0.03


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_auto_finds_the_channel_order(order: str) -> None:
    """Six classes that are the six ways to give three levels to three channels: the wrong order confuses four."""
    levels = torch.tensor(list(itertools.permutations((0.2, 0.4, 0.6))))
    prototypes = levels[:, :, None, None].expand(-1, -1, 4, 4)
    labels = torch.arange(6).repeat(10)
    fed = InputFormat.parse(f"0-1:{order}")
    choice = choose_format(Nearest(prototypes, fed), Samples(prototypes[labels], labels, 6))
    assert (str(choice.format), choice.accuracy) == (str(fed), 1)


def test_the_stated_format_is_used_or_refused_with_the_one_that_fits() -> None:
    samples, prototypes = clustered(3, 40)
    network = Nearest(prototypes, PRESETS["0-255"])
    good = choose_format(network, samples, "0-255")
    assert (str(good.format), good.notes) == ("0-255", ())
    with pytest.raises(DataError, match=r"0-1 .* 1[67]%, near chance; --normalize 0-255 reaches (9.|100)%"):
        choose_format(network, samples, "0-1")
    choice = choose_format(network, samples, "0-1", strict=False)
    assert str(choice.format) == "0-1"
    assert "--normalize 0-255 reaches" in choice.notes[0]


def test_a_format_that_does_poorly_but_not_at_chance_is_kept_and_told() -> None:
    samples, prototypes = clustered(3, 40)
    network = Nearest(prototypes, PRESETS["0-1"])
    shifted = InputFormat(mean=(0.17,))
    choice = choose_format(network, samples, shifted)
    assert choice.format == shifted
    assert 0.3 < choice.accuracy < 0.8
    assert "--normalize 0-1 reaches" in choice.notes[0]


def test_a_format_that_cannot_be_run() -> None:
    samples, prototypes = clustered(3, 4)
    with pytest.raises(DataError, match=r"cannot be run .* input format 0-1:hwc \(RuntimeError"):
        choose_format(Nearest(prototypes, PRESETS["0-1"]), samples, "0-1:hwc")
    wrong = Samples(torch.rand(4, 3, 9, 9), torch.arange(4) % 2, 6)
    with pytest.raises(DataError, match=r"\(3, 9, 9\) in no layout .*chw it says RuntimeError"):
        choose_format(Nearest(prototypes, PRESETS["0-1"]), wrong)


def test_a_network_that_knows_nothing() -> None:
    samples, _ = clustered(3, 40)
    guessing = nn.Sequential(nn.Flatten(), nn.Linear(60, 6))
    with torch.no_grad():
        guessing[1].weight.zero_()
        guessing[1].bias.zero_()  # the first class, whatever the image
    with pytest.raises(DataError, match=r"no usual input format .*best tried: 0-1 16%"):
        choose_format(guessing, samples)
    with pytest.raises(DataError, match=r"near chance, and no usual format does better"):
        choose_format(guessing, samples, "pm1")
    assert "no usual input format" in choose_format(guessing, samples, strict=False).notes[0]
    with pytest.raises(DataError, match="6 classes"):
        choose_format(nn.Sequential(nn.Flatten(), nn.Linear(60, 5)), samples)


def test_too_few_samples_to_tell_are_no_error() -> None:
    samples, prototypes = clustered(3, 1, classes=2)
    network = Nearest(prototypes.flip(0), PRESETS["0-1"])  # always wrong
    for asked in ("0-1", "auto"):
        assert any("too few samples to tell" in n for n in choose_format(network, samples, asked).notes)


def test_constant_answers_on_unbalanced_samples_are_chance() -> None:
    """80 % of one class: answering it always is 80 % right, and knows nothing."""
    labels = (torch.arange(100) < 20).long()
    samples = Samples(torch.rand(100, 1, 4, 4), labels, 2)
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.tensor([1.0, 0.0]))
    with pytest.raises(DataError, match="near chance"):
        choose_format(constant, samples, InputFormat(mean=(0.0,)))


def test_grey_images_into_a_colour_network_are_repeated_and_that_is_said() -> None:
    samples, prototypes = clustered(1, 20)
    network = Nearest(prototypes.repeat(1, 3, 1, 1), PRESETS["imagenet"], conv=True)
    choice = choose_format(network, samples, "imagenet")
    assert choice.accuracy > 0.95
    assert "grey images are repeated to the network's 3 channels" in choice.notes
    assert choice.classifier(network)(samples.images(slice(0, 2))).shape == (2, 6)


def test_a_softmax_network_is_wrapped_to_logits() -> None:
    samples, prototypes = clustered(3, 20)
    body = Nearest(prototypes, PRESETS["pm1"])
    choice = choose_format(nn.Sequential(body, nn.Softmax(dim=1)), samples)
    assert (choice.output, choice.softmax) == ("probabilities", "1")
    assert any("the input of its 1 is taken as logits" in n for n in choice.notes)
    functional = choose_format(nn.Sequential(body, FunctionalSoftmax()), samples)
    assert (functional.output, functional.softmax) == ("probabilities", None)


def test_modes_are_left_as_they_were_and_the_probe_is_deterministic() -> None:
    samples, prototypes = clustered(3, 60)
    network = nn.Sequential(Nearest(prototypes, PRESETS["0-1"]), nn.BatchNorm1d(6)).train()
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    first, second = fitting_formats(network, samples), fitting_formats(network, samples)
    assert first == second
    assert [m.training for m in network] == [True, False]
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "data", "right", "output", "published"),
    [
        ("ibau", "cifar10", "0-1", "logits", 0.845),
        ("verazuo", "mnist", "pm1", "probabilities", 0.981),
        ("akamaster", "cifar10", "imagenet", "logits", 0.917),
    ],
)
def test_public_checkpoints(name: str, data: str, right: str, output: str, published: float) -> None:
    network = owners_network(name)
    if not (data_root() / f"{data}.npz").exists():
        pytest.skip(f"no {data}.npz under the data root")
    samples = load_samples(data, split="test").samples
    keys = list(network.state_dict())
    choice = choose_format(network, samples, "auto")
    assert (str(choice.format), choice.output) == (right, output)
    model = choice.classifier(network)
    assert list(model.network.state_dict()) == keys
    part = samples.select(torch.arange(500))
    accuracy = float((predict(model, part).argmax(1) == part.labels).float().mean())
    # Three standard errors of so many images.
    assert abs(accuracy - published) < 3 * (published * (1 - published) / 500) ** 0.5
    if name == "akamaster":
        return  # the search once more would only take time
    with pytest.raises(DataError, match=f"near chance; --normalize {right} reaches"):
        choose_format(network, samples, "0-255")


class _Flat(nn.Linear):
    """Takes (N, C·H·W) only."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        return super().forward(x)


def test_outputs_are_counted_in_any_layout_and_the_mode_stays() -> None:
    data = factories.samples(channels=1, size=8)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(), nn.Flatten(), nn.Linear(72, 11)).train()
    assert count_outputs(network, data) == 11
    assert network.training
    assert count_outputs(_Flat(64, 7), data) == 7
    assert count_outputs(_Flat(65, 7), data) is None
