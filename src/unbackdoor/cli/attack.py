"""``unbackdoor attack``: make a test victim, so that a removal can be judged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor import specs
from unbackdoor.cli import options as o
from unbackdoor.cli.clean import interval
from unbackdoor.cli.gallery import Gallery, draw_gallery
from unbackdoor.cli.subject import device_of_choice
from unbackdoor.cli.terminal import Terminal, percent
from unbackdoor.cli.text_attack import TextJob
from unbackdoor.errors import ConfigError, DataError

if TYPE_CHECKING:
    from unbackdoor.attacks.poisoning import Contamination
    from unbackdoor.attacks.victims import VictimCard
    from unbackdoor.evaluation.assessment import Assessment
    from unbackdoor.types import Samples

_TRAINING, _GALLERY = "The training", "The gallery"


def attack(
    spec: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ATTACKSPEC]",
            help="Such as 'badnets(rate=0.1, target=0)'; see 'list attacks'. One to plant, any number to draw.",
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="SRC",
            help="A data set, such as digits or sst2 (see 'list datasets'), or training images or texts as for clean "
            "--samples.",
        ),
    ] = "digits",
    clean: Annotated[
        bool, typer.Option("--clean", help="Train a clean network instead, to see what a removal costs.")
    ] = False,
    test: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Test images. By default the test split of a data set that has one."),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="The network. By default what is usual for the data; for texts transformers:FOLDER."
        ),
    ] = None,
    data_root: o.DataRoot = None,
    download: o.Download = False,
    image_size: o.ImageSize = None,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    max_length: o.MaxLength = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", min=1, rich_help_panel=_TRAINING)] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, rich_help_panel=_TRAINING)] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="sgd|adam|adamw", rich_help_panel=_TRAINING)] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="X", help="Peak learning rate.", rich_help_panel=_TRAINING)
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X", rich_help_panel=_TRAINING)] = None,
    augment: Annotated[str | None, typer.Option(metavar="none|crop|crop-flip", rich_help_panel=_TRAINING)] = None,
    plain_epochs: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Last epochs without augmentation.", rich_help_panel=_TRAINING),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The victim's folder. By default DATA-ATTACK in this folder.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what attacks train for themselves (surrogates, encoders) here."),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG",
            help="Plant nothing, and draw what the triggers of these attacks do, or of all: clean, triggered, and the "
            "change enlarged. What is learned is learned briefly.",
            rich_help_panel=_GALLERY,
        ),
    ] = None,
    victim: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="With --gallery: draw the trigger that this victim learned. May be given more than once.",
            rich_help_panel=_GALLERY,
        ),
    ] = None,
    seed: o.Seed = 0,
    device: o.DeviceOption = o.Device.AUTO,
    threads: o.Threads = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
) -> None:
    """Plant a backdoor in a network of your own, as a test victim, or draw what triggers look like.

    Writes a folder that 'clean', 'evaluate' and 'inspect' take as MODEL; they then know its network and its trigger.
    With --gallery, a picture instead.
    """
    stated = {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "augment": augment,
        "plain_epochs": plain_epochs,
    }
    terminal, named = Terminal(quiet=quiet), spec or []
    if gallery is not None:
        _refuse_with_gallery({**stated, "clean": clean or None, "test": test, "arch": arch, "out": out})
        asked = Gallery(
            out=gallery,
            attacks=named,
            victims=victim or [],
            data=data,
            data_root=data_root,
            download=download,
            image_size=image_size,
            cache=cache,
            seed=seed,
            device=device,
            threads=threads,
            force=force,
        )
        draw_gallery(asked, terminal)
        return
    if victim:
        raise typer.BadParameter("--victim names a trigger to draw: give --gallery too")
    if len(named) + clean != 1:
        raise typer.BadParameter("give an attack, such as 'badnets(rate=0.1)', or --clean: one of the two")
    from unbackdoor.attacks.recipes import TEXT, adjusted, usual
    from unbackdoor.attacks.victims import refuse_folder, save_victim
    from unbackdoor.attacks.workshop import Workshop
    from unbackdoor.bench.victims import train_victim
    from unbackdoor.data.texts import is_text_source

    planted: Contamination | None = None if clean else specs.build("attack", named[0])
    folder = out or Path(f"{_file_name(data)}-{_file_name('clean' if clean else named[0])}")
    refuse_folder(folder, force=force)
    if is_text_source(data):
        job = TextJob(
            arch=arch,
            attack=planted,
            data=data,
            test=test,
            root=data_root,
            text_column=text_column,
            label_column=label_column,
            max_length=max_length,
            recipe=adjusted(TEXT, stated),
            seed=seed,
            device=device_of_choice(device, threads),
        )
        _plant_text(job, folder, terminal, force=force)
        return
    suits = usual(data, arch)
    recipe = adjusted(suits.recipe, stated)
    chosen = device_of_choice(device, threads)
    with terminal.working("reading the samples"):
        train, judged, notes = _samples(data, test, data_root, image_size, download=download)
    terminal.notes(notes)
    with terminal.progress():
        model, card, found, learned = train_victim(
            arch=suits.arch,
            attack=planted,
            dataset=data,
            train=train.to(chosen),
            test=judged,
            recipe=recipe,
            seed=seed,
            workshop=Workshop(cache),
        )
    save_victim(folder, model, card, trigger=learned, force=force)
    _tell(terminal, card, found, folder)


def _plant_text(job: TextJob, folder: Path, terminal: Terminal, *, force: bool) -> None:
    from unbackdoor.attacks.victims import save_victim

    with terminal.progress():
        model, card, found, planted, notes = job.run()
    terminal.notes(notes)
    save_victim(folder, model, card, trigger=planted.state if planted else {}, force=force)
    _tell(terminal, card, found, folder)


def _refuse_with_gallery(stated: dict[str, Any]) -> None:
    names = [f"--{name.replace('_', '-')}" for name, value in stated.items() if value is not None]
    if names:
        raise typer.BadParameter(f"--gallery plants nothing, so that {', '.join(names)} would have no effect")


def _file_name(text: str) -> str:
    """``badnets(rate=0.1)`` to ``badnets-rate-0.1``."""
    return re.sub(r"[^\w.]+", "-", Path(text).name if "(" not in text else text).strip("-.")


def _samples(
    data: str, test: str | None, root: Path | None, image_size: int | None, *, download: bool
) -> tuple[Samples, Samples, tuple[str, ...]]:
    """(training set, test set, notes)."""
    import torch

    from unbackdoor.data.loading import load_samples
    from unbackdoor.data.named import DATASETS

    splits = data.lower() in DATASETS or data.lower().endswith(".npz")
    if test is None and not splits:
        raise ConfigError(f"{data} has no test split: name test images with --test")
    train = load_samples(data, root=root, split="train", image_size=image_size, download=download)
    judged = load_samples(
        test or data,
        root=root,
        split="test",
        download=download,
        image_size=train.samples.image_shape[1:],
        channels=train.samples.image_shape[0] if train.samples.image_shape[0] in (1, 3) else None,
        num_classes=train.samples.num_classes,
        classes=train.samples.class_names or None,
    )
    if test is None and torch.equal(train.samples.inputs, judged.samples.inputs):
        raise ConfigError(f"{data} has no test split of its own: name test images with --test")
    if train.samples.image_shape[1] != train.samples.image_shape[2]:
        shape = train.samples.image_shape
        raise DataError(f"images have to be square, and these are {shape[1]}×{shape[2]}; give --image-size")
    return train.samples, judged.samples, (*train.notes, *(f"test set: {note}" for note in judged.notes))


def _tell(terminal: Terminal, card: VictimCard, found: Assessment, folder: Path) -> None:
    from unbackdoor.evaluation import checks

    terminal.say(f"{card.attack or 'clean'} on {card.dataset}: {card.arch}, trained in {card.seconds:.0f} s", "bold")
    terminal.say(f"accuracy        {percent(found.accuracy.value):>6}  ({interval(found.accuracy)})")
    if found.asr is not None:
        terminal.say(f"attack success  {percent(found.asr.value):>6}  ({interval(found.asr)})")
    terminal.say(f"victim          {folder}")
    at_chance = checks.accuracy_at_chance(found)
    if at_chance is not None:
        terminal.warn(f"the network learned nothing: {at_chance.message}; train longer or at another --lr")
    if found.asr is not None and found.asr.value < checks.ATTACK_TOOK:
        terminal.warn(
            f"THE ATTACK DID NOT TAKE: it succeeds on {percent(found.asr.value)} of the triggered samples, and a "
            f"working backdoor has at least {checks.ATTACK_TOOK:.0%}. No removal can be judged with this victim; "
            "raise the attack's rate or --epochs"
        )
