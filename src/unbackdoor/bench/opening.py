"""Loading a given model with the samples that it is cleaned by and judged on. Nothing that its files hold is run."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import nn

from unbackdoor.attacks.victims import WEIGHTS, VictimCard, attack_fields, is_victim, load_attack, read_card
from unbackdoor.bench import records
from unbackdoor.bench.given import kind_of
from unbackdoor.bench.jobs import GivenModel
from unbackdoor.bench.site import Site, halves
from unbackdoor.data.loading import load_samples
from unbackdoor.data.texts import is_text_source, load_texts
from unbackdoor.data.trojai import load_held_back, load_trojai, stated_truth
from unbackdoor.data.trojai_layouts import layout_of, read_config
from unbackdoor.errors import CheckpointError, DataError, UnbackdoorError
from unbackdoor.evaluation.assessment import HELD_OUT
from unbackdoor.models.architectures import load_network, read_sizes, resolve_spec
from unbackdoor.models.checkpoints import read_checkpoint
from unbackdoor.models.inputs import choose_format, count_outputs, network_channels
from unbackdoor.models.text import load_text_classifier
from unbackdoor.rng import Rng
from unbackdoor.types import Attack, Samples, Triggered


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A given network in its wrapper, on the CPU, and samples in the shape that it takes.

    Attributes:
        reserve: where clean samples come from.
        judged: what every figure is measured on.
        attack: the known trigger.
        triggered: in place of it, samples that carry one.
        about: what a record says of it.
        notes: what was assumed or converted.
    """

    model: nn.Module
    reserve: Samples
    judged: Samples
    attack: Attack | None
    triggered: Triggered | None
    about: records.Subject
    notes: tuple[str, ...]


def name_given(given: GivenModel) -> records.Subject:
    """What a record says of a model as far as it is known without its network, were it a damaged one."""
    path = Path(given.path)
    told: dict[str, object] = {"dataset": given.data}
    if kind_of(path) == "trojai":
        told = {"dataset": "TrojAI"}
        with suppress(UnbackdoorError, OSError):
            told["dataset"] = f"TrojAI, {layout_of(path, read_config(path))[0].told}"
        with suppress(UnbackdoorError, OSError):
            told["poisoned"] = stated_truth(path)
    blank = records.Subject(key=given.key, name=given.name, planted=False, arch=given.arch)
    return blank.model_copy(update=told)


def load_given(site: Site, given: GivenModel) -> LoadedModel:
    """Read a model, and the samples that are stated or that it brings.

    Raises:
        UnbackdoorError: it cannot be read, does not fit the samples, or there are too few of them.
    """
    kind = kind_of(Path(given.path))
    if kind == "trojai":
        return _load_trojai(given)
    if given.data is None:
        raise DataError(f"{given.name} brings no samples of its own; name labelled ones with --data")
    return _load_texts(site, given, given.data) if kind == "text" else _load_images(site, given, given.data)


def _load_trojai(given: GivenModel) -> LoadedModel:
    """The folder's examples are the clean samples; it is judged on what its maker holds back, or else on some of them.

    Poisoned examples and the ground truth reach the evaluation alone.
    """
    found = load_trojai(given.path, arch=given.arch, normalize=given.normalize, min_per_class=1)
    held = load_held_back(found)
    if held is not None:
        reserve, (judged, triggered) = found.clean, held
        told = f"judged on {len(judged)} fresh samples that are held back"
    else:
        # The share that `clean` sets aside. A half, as of other samples, would be missed where there are so few.
        rest, aside = found.clean.split(HELD_OUT, Rng(0).stream("bench", "halves"))
        if aside is None:
            raise DataError(
                f"{given.path} holds one example a class: nothing can be set aside to judge on; 2 of a class are needed"
            )
        reserve, judged, triggered = rest, aside, found.truth.triggered
        told = f"judged on {len(judged)} of its own examples, set aside"
    known = {"arch": type(found.model.network).__name__, "num_classes": found.clean.num_classes}
    return LoadedModel(
        model=found.model,
        reserve=reserve,
        judged=judged,
        attack=None,
        triggered=triggered,
        about=name_given(given).model_copy(update={**known, "poisoned": found.truth.poisoned}),
        notes=(*found.notes, told),
    )


def _load_texts(site: Site, given: GivenModel, data: str) -> LoadedModel:
    path = Path(given.path)
    card = read_card(path) if is_victim(path) else None
    if not is_text_source(data):
        raise DataError(f"{given.name} is a classifier of texts, and {data} holds none; a table of texts is needed")
    model = load_text_classifier(path, max_length=card.image_shape[0] if card else None)
    loaded = load_texts(
        data, model.tokenizer, root=site.data_root, num_classes=model.num_classes, known_names=model.class_names
    )
    reserve, judged = halves(loaded.samples)
    attack = load_attack(path) if card else None
    known = {"arch": type(model.network).__name__, "num_classes": model.num_classes}
    return LoadedModel(
        model=model,
        reserve=reserve,
        judged=judged,
        attack=attack,
        triggered=None,
        about=name_given(given).model_copy(update={**known, **_known(attack, card)}),
        notes=loaded.notes,
    )


def _load_images(site: Site, given: GivenModel, data: str) -> LoadedModel:
    path = Path(given.path)
    card = read_card(path) if is_victim(path) else None
    if card is not None and card.kind != "image":
        raise DataError(f"{given.name} is the victim of an attack on texts, and its folder lacks the tokenizer")
    if is_text_source(data):
        raise DataError(f"{given.name} is a network of images, and {data} holds texts; labelled images are needed")
    attack = load_attack(path) if card else None
    checkpoint = read_checkpoint(path / WEIGHTS if card else path)
    arch = given.arch or (card.plain_arch() if card else None)
    sizes = read_sizes(checkpoint, arch)
    side = card.image_shape[1] if card else sizes["image_size"]
    network = load_network(checkpoint, arch, image_size=side)
    channels = card.image_shape[0] if card else network_channels(network)
    samples, notes = _samples(site, data, side, channels, None)
    outputs = count_outputs(network, samples)
    if outputs is not None and outputs < samples.num_classes:
        raise DataError(
            f"the network tells {outputs} classes apart, and {data} has {samples.num_classes}: the samples must "
            "be of the classes that it knows"
        )
    if outputs is not None and outputs != samples.num_classes:
        samples, notes = _samples(site, data, side, channels, outputs)
    reserve, judged = halves(samples)
    # A network that answers at chance is recorded as one, by a flag.
    choice = choose_format(network, reserve, given.normalize or ("0-1" if card else "auto"), strict=False)
    known = {"arch": resolve_spec(checkpoint, arch) or type(network).__name__, "num_classes": samples.num_classes}
    return LoadedModel(
        model=choice.classifier(network),
        reserve=reserve,
        judged=judged,
        attack=attack,
        triggered=None,
        about=name_given(given).model_copy(update={**known, **_known(attack, card)}),
        notes=(*notes, *choice.notes),
    )


def _known(attack: Attack | None, card: VictimCard | None) -> dict[str, object]:
    """What a victim's card tells."""
    if card is None:
        return {}
    if attack is None:
        return {"accuracy": card.accuracy, "poisoned": False}
    told = attack_fields(attack)  # type: ignore[arg-type]
    fields = json.loads(json.dumps(told["settings"]))
    return {
        "attack": told["attack"],
        "fields": fields,
        "rate": fields.get("rate"),
        "target": fields.get("target"),
        "accuracy": card.accuracy,
        "asr": card.asr,
        "poisoned": True,
    }


@lru_cache(maxsize=2)
def _samples(
    site: Site, data: str, side: int | None, channels: int | None, num_classes: int | None
) -> tuple[Samples, tuple[str, ...]]:
    """The samples in a network's shape, and notes; models of one kind share them."""
    try:
        loaded = load_samples(
            data, root=site.data_root, split="test", image_size=side, channels=channels, num_classes=num_classes
        )
    except OSError as error:
        raise CheckpointError(f"{data} cannot be read: {error}") from None
    return loaded.samples, loaded.notes
