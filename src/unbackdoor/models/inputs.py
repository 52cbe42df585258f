"""How a network takes its images and gives its answer, and finding that out from a few clean samples.

The rest of the package knows one kind of model: images (N, C, H, W) in [0, 1] in, logits (N, classes) out.
:class:`Classifier` makes one of any network, :func:`choose_format` says how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.errors import ConfigError, DataError, UnsupportedModel
from unbackdoor.inference import device_of, evaluating
from unbackdoor.models.formats import PRESETS, InputFormat, Layout, Order
from unbackdoor.rng import Rng
from unbackdoor.types import Samples

__all__ = [
    "PRESETS",
    "Choice",
    "Classifier",
    "Fitting",
    "InputFormat",
    "Output",
    "choose_format",
    "count_outputs",
    "detect_output",
    "final_softmax",
    "first_tensor",
    "fitting_formats",
    "network_channels",
]

Output = Literal["logits", "probabilities", "log-probabilities"]

#: Keys under which networks of the field return their logits.
_OUTPUT_KEYS = ("logits", "out", "output", "outputs", "prediction", "y")

#: Clean samples that formats are tried on: all of the formats first, then those that may still be the best.
PROBE_SAMPLES = (40, 200)

#: An accuracy is above chance where guessing would reach it with less than this probability. Of an alternative to what
#: was stated, which is the best of dozens, more is asked.
CHANCE_LEVEL, ALTERNATIVE_LEVEL = 0.01, 0.001

#: A stated format that does worse than this is compared with the others, and a much better one is named in a note.
LOW_ACCURACY = 0.8


class Classifier(nn.Module):
    """A network with its input format and its kind of output around it: images in [0, 1] to logits.

    ``network`` is the owner's module itself, so ``classifier.network.state_dict()`` has the owner's keys; the wrapper
    adds no key of its own.

    A network that ends in a softmax gives logits again, so that it is trained through the log of its softmax and not
    through a second one. Where that softmax is a module (``softmax`` names it), its input is what is returned: exact,
    where the log of a probability that was rounded to 0 or 1 has lost both value and gradient. A hook reads it and
    lives for one call only, so copies, pickles and state dicts know nothing of it. Without such a module the logits are
    ``log(max(p, tiny))``, in float32.

    Grey images are repeated to three channels for a network that takes three.

    Args:
        network: the owner's network.
        format: how it takes its images.
        output: what it returns.
        softmax: qualified name of the module whose input are the logits, as :func:`final_softmax` finds it.
        channels: channels that the network takes; by default what its first convolution says.
    """

    gain: Tensor
    offset: Tensor

    def __init__(
        self,
        network: nn.Module,
        format: InputFormat | None = None,
        output: Output = "logits",
        *,
        softmax: str | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if output not in get_args(Output):
            raise ConfigError(f"output must be one of {', '.join(get_args(Output))}, not {output!r}")
        if softmax is not None:
            network.get_submodule(softmax)
        self.network = network
        self.format = InputFormat() if format is None else format
        self.output: Output = output
        self.softmax = softmax
        self.channels = channels or self.format.channels or network_channels(network)
        gain, offset = self.format.gain_and_offset()
        device = device_of(network)
        # Not persistent: the keys of a saved model stay the owner's.
        self.register_buffer("gain", gain.to(device), persistent=False)
        self.register_buffer("offset", offset.to(device), persistent=False)
        self._plain = bool((gain == 1).all() and (offset == 0).all())
        # Not train(): that would also set modules within the network that its owner has in another mode.
        self.training = network.training

    def extra_repr(self) -> str:
        return f"format={self.format}, output={self.output}" + (f", softmax={self.softmax}" if self.softmax else "")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), floating, in [0, 1], to logits (N, classes)."""
        x = self.prepare(x)
        if self.softmax is not None:
            return self._before_softmax(x)
        out = first_tensor(self.network(x))
        return _log(out) if self.output == "probabilities" else out

    def prepare(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to what the network itself is fed."""
        if self.channels is not None and x.shape[1] != self.channels:
            if x.shape[1] != 1:
                raise DataError(
                    f"the network takes {self.channels} channels and the images have {x.shape[1]}; "
                    f"load them with channels={self.channels}"
                )
            x = x.repeat(1, self.channels, 1, 1)
        return self.format.arrange(x if self._plain else torch.addcmul(self.offset, x, self.gain))

    def _before_softmax(self, x: Tensor) -> Tensor:
        assert self.softmax is not None
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[:] = [args[0] if args else kwargs["input"]]

        hook = self.network.get_submodule(self.softmax).register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.network(x)
        finally:
            hook.remove()
        if not caught:
            raise UnsupportedModel(f"the network's forward no longer passes through {self.softmax!r}")
        return caught[0]


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp_min(torch.finfo(torch.float32).tiny).log()


def first_tensor(output: Any) -> Tensor:
    """The main output (N, classes) of a network that may return more than a tensor.

    Taken are a ``logits`` attribute (Hugging Face's outputs, Inception and GoogLeNet in train mode), a key such as
    "logits" or "out", or the first tensor of a tuple: auxiliary outputs come after the main one. Trailing axes of
    length 1 are dropped.

    Raises:
        UnsupportedModel: no tensor, or no row of class scores per image.
    """
    found = output
    if not isinstance(found, Tensor):
        attribute = getattr(found, "logits", None)
        if isinstance(attribute, Tensor):
            found = attribute
        elif isinstance(found, Mapping):
            found = _entry(found)
        elif isinstance(found, Sequence):
            found = next((item for item in found if isinstance(item, Tensor)), None)
    if not isinstance(found, Tensor):
        raise UnsupportedModel(f"the network returns {type(output).__name__} without a tensor of class scores")
    while found.ndim > 2 and found.shape[-1] == 1:
        found = found.squeeze(-1)
    if found.ndim != 2 or found.shape[1] < 2:
        raise UnsupportedModel(f"the network returns shape {tuple(found.shape)}; (N, classes) is needed, two at least")
    return found


def _entry(output: Mapping[Any, Any]) -> Any:
    for key in _OUTPUT_KEYS:
        if isinstance(output.get(key), Tensor):
            return output[key]
    tensors = [value for value in output.values() if isinstance(value, Tensor)]
    if len(tensors) > 1:
        raise UnsupportedModel(f"the network returns several tensors, {', '.join(map(str, output))}; none named logits")
    return tensors[0] if tensors else None


def network_channels(network: nn.Module) -> int | None:
    """Channels (1 or 3) that the network takes, from its first convolution; None where that does not tell."""
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    # Another number tells that the first convolution by registration is not the first that runs.
    return first.in_channels if first is not None and first.in_channels in (1, 3) else None


@torch.no_grad()
def count_outputs(network: nn.Module, samples: Samples) -> int | None:
    """How many class scores the network gives an image; None where it runs on such images in no layout."""
    device = device_of(network)
    images = samples.images(slice(0, 2)).to(device)
    for layout in get_args(Layout):
        with evaluating(network), suppress(Exception):  # the owner's network may raise anything
            return int(Classifier(network, InputFormat(layout=layout))(images).shape[1])
    return None


@torch.no_grad()
def detect_output(network: nn.Module, images: Tensor) -> Output:
    """What kind of output a network gives for a batch in its own input format.

    Rows that are nowhere negative and sum to 1 are probabilities; rows that are nowhere positive and whose exponentials
    sum to 1 are log-probabilities; anything else is logits.
    """
    with evaluating(network):
        return _kind(first_tensor(network(images)))


def _kind(out: Tensor) -> Output:
    out = out.float()
    one = torch.ones(len(out), device=out.device)
    if bool((out >= 0).all()) and torch.allclose(out.sum(1), one, atol=1e-2):
        return "probabilities"
    if bool((out <= 0).all()) and torch.allclose(out.exp().sum(1), one, atol=1e-2):
        return "log-probabilities"
    return "logits"


@torch.no_grad()
def final_softmax(network: nn.Module, images: Tensor) -> str | None:
    """Qualified name of the nn.Softmax or nn.LogSoftmax whose output is the network's, or None.

    Found by running ``images`` (in the network's own input format) in eval mode and comparing what each such module
    gave with what the network returned.
    """
    last: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, module in network.named_modules():
        if name and isinstance(module, nn.Softmax | nn.LogSoftmax):

            def keep(_: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
                if args:
                    last[name] = (args[0], out)

            hooks.append(module.register_forward_hook(keep))
    try:
        with evaluating(network):
            result = first_tensor(network(images))
    finally:
        for hook in hooks:
            hook.remove()
    for name, (before, after) in last.items():
        # The softmax of a transformer's attention, or one over another axis, fails one of these.
        if before.ndim == 2 and after.shape == result.shape and torch.equal(after, result):
            over_classes = F.softmax if isinstance(network.get_submodule(name), nn.Softmax) else F.log_softmax
            if torch.allclose(over_classes(before, 1), after, atol=1e-5):
                return name
    return None


class Fitting(NamedTuple):
    """A format that was tried: accuracy in [0, 1] and mean cross-entropy (nats) on that many clean samples."""

    format: InputFormat
    output: Output
    accuracy: float
    loss: float
    samples: int

    def __str__(self) -> str:
        return f"{self.format} {self.accuracy:.0%}"


@dataclass(frozen=True, slots=True)
class Choice:
    """A network's format, kind of output and final softmax, the accuracy measured with them, and notes."""

    format: InputFormat
    output: Output
    softmax: str | None
    accuracy: float
    notes: tuple[str, ...] = ()

    def classifier(self, network: nn.Module) -> Classifier:
        """The network wrapped accordingly; the network itself is not changed."""
        return Classifier(network, self.format, self.output, softmax=self.softmax)


def fitting_formats(network: nn.Module, samples: Samples, *, batch_size: int = 100) -> list[Fitting]:
    """Try the usual formats on at most 200 clean samples, the classes in balance, in eval mode.

    Tried are all :data:`PRESETS`, RGB and BGR, in each layout that the network runs with at all. All are tried on the
    first 40; those that may be the best (within three standard errors, 0.5/√n each) also on the rest. What cannot be
    run is left out.

    Returns:
        The best first: by accuracy, then by cross-entropy, then the simplest (in the order of PRESETS, within each RGB
        before BGR, within each "chw" first). Those that were tried on fewer samples come last.

    Raises:
        DataError: the network runs with none of them, or has fewer outputs than the samples have classes.
    """
    probe = _balanced(samples, PROBE_SAMPLES[-1])
    candidates = _usual_formats(network, probe)
    dropped: list[Fitting] = []
    tried: list[Fitting] = []
    for size in PROBE_SAMPLES:
        part = probe.select(torch.arange(min(size, len(probe))))
        attempts = (_attempt(network, part, candidate, batch_size) for candidate in candidates)
        # Sorting is stable: what is equally good stays in the order of simplicity.
        tried = sorted((a for a in attempts if a is not None), key=lambda f: (-f.accuracy, round(f.loss, 6)))
        if len(part) == len(probe):
            break
        margin = tried[0].accuracy - 3 * 0.5 / len(part) ** 0.5
        kept = {f.format for f in tried if f.accuracy >= margin}
        dropped = [f for f in tried if f.format not in kept]
        candidates = [c for c in candidates if c in kept]
    return tried + dropped


def _balanced(samples: Samples, limit: int) -> Samples:
    """A fixed choice of at most ``limit`` samples, so ordered that any first few are of as many classes as can be."""
    labels = samples.labels.cpu()
    order = torch.randperm(len(labels), generator=Rng(0).stream("inputs", "probe"))
    rank = torch.empty(len(labels), dtype=torch.int64)
    for label in range(samples.num_classes):
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    return samples.select(order[rank[order].argsort(stable=True)][:limit])


def _usual_formats(network: nn.Module, probe: Samples) -> list[InputFormat]:
    """What to try, the simplest first."""
    few = probe.select(torch.arange(min(2, len(probe))))
    layouts = [n for n in get_args(Layout) if _attempt(network, few, InputFormat(layout=n), 2) is not None]
    if not layouts:
        raise DataError(
            f"the network runs with images of shape {probe.image_shape} in no layout ({', '.join(get_args(Layout))}); "
            f"give the size and the channels that it takes{_own_words(network, few)}"
        )
    wanted = network_channels(network) or probe.image_shape[0]
    usual = []
    for preset in PRESETS.values():
        if preset.channels not in (None, wanted):
            continue  # statistics of colours for a grey network
        for order in get_args(Order)[: 2 if probe.image_shape[0] == 3 else 1]:
            usual += [replace(preset, channel_order=order, layout=layout) for layout in layouts]
    return usual


def _own_words(network: nn.Module, probe: Samples) -> str:
    try:
        _measured(network, probe, InputFormat(), 2)
    except Exception as error:  # the owner's network may raise anything
        return f" (with chw it says {type(error).__name__}: {error})"
    return ""


def _attempt(network: nn.Module, probe: Samples, tried: InputFormat, batch_size: int) -> Fitting | None:
    """None where the network cannot run so."""
    try:
        return _measured(network, probe, tried, batch_size)
    except DataError:
        raise
    except Exception:  # the owner's network may raise anything on a layout that it does not know
        return None


@torch.no_grad()
def _measured(network: nn.Module, probe: Samples, tried: InputFormat, batch_size: int = 100) -> Fitting:
    wrapped = Classifier(network, tried)
    device = device_of(network)
    with evaluating(network):
        raw = torch.cat([wrapped(x.to(device)).float() for x, _ in probe.batches(batch_size)])
    if len(raw) != len(probe):
        raise UnsupportedModel(f"the network returns {len(raw)} rows for {len(probe)} images")
    if raw.shape[1] < probe.num_classes:
        raise DataError(f"the network has {raw.shape[1]} outputs and the samples {probe.num_classes} classes")
    labels = probe.labels.to(device)
    output = _kind(raw)
    logits = _log(raw) if output == "probabilities" else raw
    hits = int(((logits.argmax(1) == labels) & logits.isfinite().all(1)).sum())
    loss = F.cross_entropy(logits, labels).nan_to_num(nan=torch.inf)
    return Fitting(tried, output, hits / len(probe), float(loss), len(probe))


def choose_format(
    network: nn.Module, samples: Samples, asked: str | InputFormat = "auto", *, strict: bool = True
) -> Choice:
    """Settle how a network takes its images, by what was asked and what its accuracy on clean samples says.

    A stated format is used; where it does no better than guessing and another one does, that is an error which names
    the other; where it does poorly and another one much better, a note does. "auto" takes the best of
    :func:`fitting_formats`; of those within one standard error of the best, the simplest.

    Args:
        samples: clean samples of the size and channels that the network takes.
        asked: "auto", an :class:`InputFormat`, or its text.
        strict: False turns the errors about accuracy into notes: for networks that are known to be broken.

    Raises:
        DataError: the accuracy is near chance with the stated format, or with all of them; the network cannot be run.
        ConfigError: the text is no format.
    """
    if isinstance(asked, str) and asked.strip().lower() == "auto":
        return _choose_best(network, samples, strict)
    stated = InputFormat.parse(asked) if isinstance(asked, str) else asked
    probe = _balanced(samples, PROBE_SAMPLES[-1])
    try:
        found = _measured(network, probe, stated)
    except UnsupportedModel:
        raise
    except Exception as error:  # the owner's network may raise anything
        raise DataError(
            f"the network cannot be run on images of shape {samples.image_shape} in the input format {stated} "
            f"({type(error).__name__}: {error})"
        ) from error
    notes: list[str] = []
    if found.accuracy < LOW_ACCURACY or _near_chance(found, probe, CHANCE_LEVEL):
        notes = _compared(network, probe, found, strict)
    return _choice(network, probe, found, notes)


def _compared(network: nn.Module, probe: Samples, found: Fitting, strict: bool) -> list[str]:
    """Notes on a stated format that does poorly, or an error where it cannot be right."""
    fittings = fitting_formats(network, probe)
    best = _preferred(fittings, network, probe)[0]
    told = (
        f"with the input format {found.format} the network's accuracy on {found.samples} clean samples is "
        f"{found.accuracy:.0%}"
    )
    # Two standard errors of a difference of two proportions.
    better = best.accuracy - found.accuracy > 2 * (0.5 / found.samples) ** 0.5
    if not _near_chance(found, probe, CHANCE_LEVEL):
        return [f"{told}; --normalize {best.format} reaches {best.accuracy:.0%}"] if better else []
    if not _can_tell(probe):
        return [f"{told}; too few samples to tell whether the format is right"]
    if better and not _near_chance(best, probe, ALTERNATIVE_LEVEL):
        problem = f"{told}, near chance; --normalize {best.format} reaches {best.accuracy:.0%}"
    else:
        problem = f"{told}, near chance, and no usual format does better{_best_of(fittings)}"
    if strict:
        raise DataError(problem)
    return [problem]


def _choose_best(network: nn.Module, samples: Samples, strict: bool) -> Choice:
    probe = _balanced(samples, PROBE_SAMPLES[-1])
    fittings = fitting_formats(network, probe)
    chosen, *others = _preferred(fittings, network, probe)
    told = f"accuracy of {chosen.accuracy:.0%} on {chosen.samples} clean samples"
    notes = [f"input format {chosen.format}, found by its {told}"]
    if _near_chance(chosen, probe, CHANCE_LEVEL):
        problem = (
            f"no usual input format brings the network above chance on {chosen.samples} clean samples"
            f"{_best_of(fittings)}; state its own with --normalize, or check that labels and classes are the network's"
        )
        if strict and _can_tell(probe):
            raise DataError(problem)
        notes = [problem if _can_tell(probe) else f"{notes[0]}; too few samples to tell whether it is right"]
    others = [f for f in others if f.loss != chosen.loss]  # an equal loss: the same thing in other words
    if others:
        notes.append(f"as good within the error of so few samples: {', '.join(map(str, others[:3]))}")
    return _choice(network, probe, chosen, notes)


def _preferred(fittings: list[Fitting], network: nn.Module, probe: Samples) -> list[Fitting]:
    """Those within one standard error of the best accuracy: the simplest first, the others by accuracy."""
    best = fittings[0]
    error = (best.accuracy * (1 - best.accuracy) / best.samples) ** 0.5
    near = [f for f in fittings if f.samples == best.samples and f.accuracy >= best.accuracy - error]
    simplicity = {f: i for i, f in enumerate(_usual_formats(network, probe))}
    chosen = min(near, key=lambda f: simplicity[f.format])
    return [chosen, *(f for f in near if f is not chosen)]


def _best_of(fittings: list[Fitting]) -> str:
    return f" (best tried: {', '.join(map(str, fittings[:3]))})"


def _guess(probe: Samples) -> float:
    """The best accuracy that a constant answer or a blind guess has on the probe."""
    return max(1 / probe.num_classes, float(probe.counts().max()) / len(probe))


def _near_chance(found: Fitting, probe: Samples, level: float) -> bool:
    """Whether guessing would do as well with a probability above ``level`` (exact binomial, one-sided).

    Half-way from guessing to perfect never counts as near: with a handful of samples the test alone would refuse that.
    """
    from scipy.stats import binom

    guess = _guess(probe)
    hits = round(found.accuracy * found.samples)
    return bool(binom.sf(hits - 1, found.samples, guess) > level) and found.accuracy < (1 + guess) / 2


def _can_tell(probe: Samples) -> bool:
    """Whether there are enough samples that at least a perfect score could not be guessed."""
    return _guess(probe) ** len(probe) <= CHANCE_LEVEL


def _choice(network: nn.Module, probe: Samples, found: Fitting, notes: list[str]) -> Choice:
    softmax = None
    if found.output != "logits":
        images = probe.images(slice(0, 8)).to(device_of(network))
        softmax = final_softmax(network, Classifier(network, found.format).prepare(images))
        taken = (
            f"the input of its {softmax} is" if softmax else "their log is" if found.output[0] == "p" else "they are"
        )
        notes = [*notes, f"the network returns {found.output}; {taken} taken as logits"]
    if probe.image_shape[0] == 1 and network_channels(network) == 3:
        notes = [*notes, "grey images are repeated to the network's 3 channels"]
    return Choice(found.format, found.output, softmax, found.accuracy, tuple(notes))
