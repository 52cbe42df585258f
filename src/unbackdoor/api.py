"""From a model and a few clean samples to a cleaned model and a report.

cleaned = clean(model, samples)
print(cleaned.report.verdict)
cleaned.save("out")
"""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from unbackdoor import __version__, files, specs
from unbackdoor.analysis.audit.evidence import check_auditable
from unbackdoor.automatic import Auto
from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation import checks, metrics
from unbackdoor.evaluation.assessment import HELD_OUT, Assessment, assess
from unbackdoor.evaluation.canaries import CanaryTest, Planting, try_canaries
from unbackdoor.evaluation.checks import Flag
from unbackdoor.evaluation.verdict import judge
from unbackdoor.evaluation.weights import weight_changes
from unbackdoor.inference import device_of, predict
from unbackdoor.models.feature_inputs import FeatureClassifier
from unbackdoor.models.inputs import Classifier
from unbackdoor.models.text import TextClassifier, save_text_classifier
from unbackdoor.report import render
from unbackdoor.report.audited import before_and_after
from unbackdoor.report.examples import examples
from unbackdoor.report.model_card import model_card
from unbackdoor.report.record import (
    Cost,
    GivenSamples,
    KnownAttack,
    LoadedModel,
    Measured,
    Method,
    Report,
    Versions,
    jsonable,
)
from unbackdoor.report.text_examples import text_examples
from unbackdoor.rng import Rng
from unbackdoor.types import Attack, Defense, Removal, Samples, TextAttack, Trace, Triggered

WEIGHTS, RECORD, PAGE = "model.safetensors", "report.json", "report.html"

#: What ``description`` may tell about the model.
DESCRIPTION = ("name", "architecture", "path", "sha256", "input_format")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What :func:`clean` returns: the new model (eval mode, on the given model's device), the report, the removal."""

    model: nn.Module
    report: Report
    removal: Removal

    @property
    def destroyed(self) -> bool:
        """Whether the removal broke the network, so that it must not be used."""
        return self.report.verdict == "destroyed"

    def save(self, folder: Path | str, force: bool = False) -> tuple[Path, ...]:
        """Write ``report.json``, ``report.html`` and, unless the model was destroyed, ``model.safetensors``.

        The weights of a :class:`~unbackdoor.models.inputs.Classifier` carry the names of the network in it. A
        :class:`~unbackdoor.models.text.TextClassifier` is written as transformers reads it, tokenizer and model card
        (``README.md``) included.

        Each file appears whole or not at all, the weights first. With ``force``, weights that an earlier run left there
        do not stay beside the report of a destroyed model.

        Returns:
            the paths written.

        Raises:
            OutputExists: one of the files is there and ``force`` is not given; then nothing is written.
        """
        folder = Path(folder)
        files.refuse_existing([folder / name for name in (WEIGHTS, RECORD, PAGE)], force=force)
        page = render(self.report)
        written = []
        if self.destroyed:
            (folder / WEIGHTS).unlink(missing_ok=True)
        elif isinstance(self.model, TextClassifier):
            written += _save_text(self.model, model_card(self.report), folder, force=force)
        else:
            written.append(files.write(folder / WEIGHTS, weights_bytes(self.model), force=force))
        written.append(self.report.save(folder / RECORD, force=force))
        written.append(files.write(folder / PAGE, page.encode(), force=force))
        return tuple(written)


def clean(
    model: nn.Module,
    samples: Samples,
    method: str | Defense = "auto",
    *,
    seed: int = 0,
    test: Samples | None = None,
    attack: Attack | None = None,
    triggered: Triggered | None = None,
    held_out: float = HELD_OUT,
    canaries: bool | Sequence[str] = False,
    audit: bool = False,
    description: Mapping[str, str | None] | None = None,
    notes: Sequence[str] = (),
) -> Cleaned:
    """Remove a possible backdoor from a copy of ``model`` and report what was measured.

    The defense sees the model, clean samples and a random generator; never ``test``, ``attack`` or ``triggered``.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, num_classes), or token ids, as a
            :class:`~unbackdoor.models.text.TextClassifier` does, or feature vectors. It is not changed.
        samples: clean, with true labels.
        method: a spec such as ``"seam(preset=toolbox)"``, or a defense. By default the one that suits this network, by
            trials on a copy that carries known backdoors.
        seed: decides every random choice.
        test: labelled samples to measure on. Without them, a share of each class of ``samples`` is set aside for the
            report alone; where there are too few for it, the given samples themselves are measured on, and a flag says
            that this is optimistic.
        attack: a known trigger, to measure the attack's success before and after.
        triggered: samples that carry a trigger already, for the same, where the trigger itself is not at hand.
        held_out: that share, in (0, 1).
        canaries: plant known backdoors into a copy, remove them in the same way and report what is left of each: the
            usual kinds, or these attack specs. Takes as long as the removal again, and the planting. What ``auto``
            chose is tested, and not the choosing.
        audit: look for evidence of a backdoor before and after, without any trigger; images alone.
        description: what the report shall say of the model: "name", "architecture", "path", "sha256", "input_format".
        notes: what the report shall say was assumed or converted in loading the model and the samples.

    Raises:
        ConfigError: a wrong spec, share, seed, or description key.
        DataError: samples that do not fit the model, the test set or the attack.
        UnsupportedModel, TrainingDiverged: from the defense.
    """
    defense = _defense(method)
    loaded = loaded_model(model, description or {})
    if test is not None and test.num_classes != samples.num_classes:
        raise DataError(f"test has {test.num_classes} classes and samples has {samples.num_classes}: they must agree")
    _check_triggered(samples, attack, triggered)
    if audit:
        check_auditable(model, samples)
    rng = Rng(seed)
    shown, judged, source = _divide(samples, test, held_out, rng)
    before = assess(model, judged, attack=attack, triggered=triggered)

    # The defense works on a copy of its own: even a careless one cannot change what the caller holds.
    removal, cost = _measured(defense, copy.deepcopy(model), shown, rng.child("defense"))

    after = assess(removal.model, judged, attack=attack, triggered=triggered)
    foretold = _canaries(model, shown, judged, _chosen(defense, removal.trace), rng, canaries) if canaries else None
    audited = before_and_after(model, removal.model, shown, rng.child("audit")) if audit else None
    flags = _flags(model, removal.model, samples, judged, before, after, source)
    changes = weight_changes(_owners(model), _owners(removal.model))
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=judge(before, after, flags, changes),
        model=loaded,
        samples=GivenSamples(
            count=len(samples),
            per_class=tuple(samples.counts().tolist()),
            class_names=samples.class_names,
            kind=samples.kind,
            image_shape=samples.input_shape,
            defense_count=len(shown),
        ),
        measured=Measured(source=source, count=len(judged), per_class=tuple(judged.counts().tolist())),
        method=Method(spec=specs.text_of(defense, "defense"), fields=_fields(defense, "defense"), seed=seed),
        before=before,
        after=after,
        trace=_in_owners_names(removal),
        weights=changes,
        cost=cost,
        versions=versions(),
        flags=flags,
        attack=_known_attack(model, removal.model, judged, attack or triggered, before, after),
        canaries=foretold,
        audit=audited,
        notes=tuple(notes),
    )
    return Cleaned(removal.model, report, removal)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a model does on labelled samples, and the reasons to distrust the figures."""

    found: Assessment
    flags: tuple[Flag, ...]


def evaluate(
    model: nn.Module, samples: Samples, *, attack: Attack | None = None, triggered: Triggered | None = None
) -> Evaluation:
    """Measure a model, which is left as it is, and raise the flags that concern the measuring.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, num_classes).
        samples: with true labels.
        attack: a known trigger, to measure the attack's success.
        triggered: samples that carry a trigger already, for the same.

    Raises:
        DataError: samples that do not fit the model or the attack.
        ConfigError: the attack wants a class that does not exist.
    """
    _check_triggered(samples, attack, triggered)
    found = assess(model, samples, attack=attack, triggered=triggered)
    raised = (
        checks.non_finite_weights(model),
        checks.accuracy_at_chance(found),
        _unsteady(model, samples),
        checks.held_out_too_small(found.accuracy),
        checks.missing_classes(samples),
    )
    return Evaluation(found, tuple(flag for flag in raised if flag is not None))


def versions() -> Versions:
    """What this process runs on."""
    return Versions(unbackdoor=__version__, torch=str(torch.__version__), python=platform.python_version())


def weights_bytes(model: nn.Module) -> bytes:
    """The state dict as safetensors, on the CPU, in its owner's names. Tensors that share memory are written each.

    Equal weights give equal bytes.
    """
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _owners(model).state_dict().items()}
    # One entry alone: of several, the library writes the order at random.
    return save(state, metadata={"format": "pt"})


def _save_text(model: TextClassifier, card: str, folder: Path, *, force: bool) -> list[Path]:
    """The network as transformers reads it: written aside, then moved into ``folder`` file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as made:
        new = save_text_classifier(model, Path(made), card)
        files.refuse_existing([folder / path.name for path in new], force=force)
        return [path.replace(folder / path.name) for path in new]


def _owners(model: nn.Module) -> nn.Module:
    """The network that its owner knows: without our wrapper for its input format."""
    return model.network if isinstance(model, Classifier | FeatureClassifier | TextClassifier) else model


def _in_owners_names(removal: Removal) -> Trace:
    """The trace with layers named as in the owner's network."""
    if not isinstance(removal.model, Classifier | FeatureClassifier | TextClassifier):
        return removal.trace
    scores, heads = (
        tuple(dataclasses.replace(s, layer=s.layer.removeprefix("network.")) for s in found)
        for found in (removal.trace.scores, removal.trace.heads)
    )
    return dataclasses.replace(removal.trace, scores=scores, heads=heads)


def _check_triggered(samples: Samples, attack: Attack | None, triggered: Triggered | None) -> None:
    if triggered is None:
        return
    if attack is not None:
        raise ConfigError("attack and triggered both say what to measure the attack by: give one of them")
    theirs = triggered.samples
    if (theirs.kind, theirs.num_classes) != (samples.kind, samples.num_classes):
        raise DataError(
            f"triggered holds {theirs.kind} samples of {theirs.num_classes} classes and samples {samples.kind} ones of "
            f"{samples.num_classes}: they must agree"
        )


def _defense(method: object) -> Defense:
    if isinstance(method, str):
        made: Defense = specs.build("defense", method)
        return made
    if isinstance(method, type) or not dataclasses.is_dataclass(method) or not callable(method):
        raise ConfigError(f"method must be a spec or a defense (a dataclass that can be called), not {method!r}")
    return cast("Defense", method)


def loaded_model(model: nn.Module, description: Mapping[str, str | None]) -> LoadedModel:
    """What a report says of the network that came in; ``description`` as in :func:`clean`.

    Raises:
        ConfigError: a key that is none of :data:`DESCRIPTION`.
    """
    for key in description:
        if key not in DESCRIPTION:
            raise ConfigError(f"description has no {key!r}{specs.suggestion(key, list(DESCRIPTION))}")
    told = {key: value for key, value in description.items() if value is not None}
    if isinstance(model, TextClassifier):
        told.setdefault("input_format", f"texts, {model.tokenizer.max_length} tokens at most")
    architecture = told.pop("architecture", type(_owners(model)).__name__)
    name = told.pop("name", architecture)
    parameters = sum(p.numel() for p in model.parameters())
    return LoadedModel(name=name, architecture=architecture, parameters=parameters, **told)


def _divide(
    samples: Samples, test: Samples | None, share: float, rng: Rng
) -> tuple[Samples, Samples, Literal["test", "held_out", "given"]]:
    """(for the defense, for the report, where the latter come from)."""
    if not 0 < share < 1:
        raise ConfigError(f"held_out must lie between 0 and 1, not {share}")
    if test is not None:
        return samples, test, "test"
    rest, aside = samples.split(share, rng.stream("report", "held-out"))
    # With a sample or two a class, one held out of each would take half of what the defense has.
    if aside is None or len(aside) > 2 * share * len(samples):
        return samples, samples, "given"
    return rest, aside, "held_out"


def _measured(defense: Defense, model: nn.Module, clean_samples: Samples, rng: Rng) -> tuple[Removal, Cost]:
    device = device_of(model)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    removal = defense(model, clean_samples, rng)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    removal.model.eval()
    cost = Cost(
        seconds=seconds,
        images=removal.trace.images,
        peak_memory_mib=torch.cuda.max_memory_allocated(device) / 2**20 if cuda else process_memory_mib(),
        memory_of="device" if cuda else "process",
        device=str(device),
        threads=torch.get_num_threads(),
    )
    return removal, cost


def process_memory_mib() -> float | None:
    """The most memory that this process has held so far, in MiB; None where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _chosen(defense: Defense, trace: Trace) -> Defense:
    """What ran: of ``auto`` the method that it took."""
    return defense.defenses()[str(trace.values["method"])] if isinstance(defense, Auto) else defense


def _canaries(
    model: nn.Module, shown: Samples, judged: Samples, defense: Defense, rng: Rng, kinds: bool | Sequence[str]
) -> CanaryTest:
    """The crops that the defense trains on suit the planting too, where it has such a setting."""
    planting = Planting(augment=getattr(defense, "augment", "none"))
    named = None if isinstance(kinds, bool) else kinds
    return try_canaries(model, shown, judged, defense, rng, kinds=named, planting=planting)


def _flags(
    given: nn.Module,
    made: nn.Module,
    samples: Samples,
    judged: Samples,
    before: Assessment,
    after: Assessment,
    source: Literal["test", "held_out", "given"],
) -> tuple[Flag, ...]:
    broken = checks.destroyed(before, after, made)
    found = [
        broken,
        checks.non_finite_weights(given),
        checks.accuracy_at_chance(before),
        _unsteady(given, judged) or _unsteady(made, judged),
        checks.attack_did_not_take(before.asr) if before.asr else None,
        checks.measured_on_given_samples(len(samples)) if source == "given" else None,
        checks.held_out_too_small(after.accuracy),
        None if broken else checks.accuracy_fell(before, after),
        checks.clean_set_smaller_than_classes(samples),
        checks.missing_classes(samples),
    ]
    return tuple(flag for flag in found if flag is not None)


def _unsteady(model: nn.Module, judged: Samples) -> Flag | None:
    """Two passes over the first few hundred samples."""
    few = judged.select(torch.arange(min(len(judged), 256)))
    return checks.outputs_differ_between_evaluations(predict(model, few), predict(model, few))


def _known_attack(
    given: nn.Module,
    made: nn.Module,
    judged: Samples,
    attack: Attack | Triggered | None,
    before: Assessment,
    after: Assessment,
) -> KnownAttack | None:
    if attack is None:
        return None
    assert before.asr is not None
    assert after.asr is not None
    rates = before.accuracy.value, before.asr.value, after.accuracy.value, after.asr.value
    fidelity = metrics.fidelity(rates[0], rates[2], rates[3])
    nist = metrics.nist_fidelity(rates[0], rates[2], rates[1], rates[3])
    known = KnownAttack(
        spec="",
        fields={},
        der=metrics.der(*rates),
        fidelity=None if math.isnan(fidelity) else fidelity,
        fidelity_gap=metrics.fidelity_gap(rates[2], rates[3]),
        nist_fidelity=None if math.isnan(nist) else nist,
        residual_gain=1.0,
    )
    if isinstance(attack, Triggered):  # no clean twin is known that could be shown beside
        return known.model_copy(update={"spec": attack.name})
    words = text_examples(given, made, judged, attack) if isinstance(attack, TextAttack) else ()
    pictures, gain = examples(given, made, judged, attack) if judged.kind == "image" else ((), 1.0)
    told = {"spec": specs.text_of(attack, "attack"), "fields": _fields(attack, "attack")}
    return known.model_copy(update={**told, "examples": pictures, "texts": words, "residual_gain": gain})


def _fields(thing: Any, kind: specs.Kind) -> dict[str, Any]:
    return {key: jsonable(value) for key, value in specs.resolved(thing, kind).items()}
