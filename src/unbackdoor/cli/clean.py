"""``unbackdoor clean``: a suspicious checkpoint and clean images in, a cleaned checkpoint and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor import specs
from unbackdoor.cli import options as o
from unbackdoor.cli.outputs import refuse, staged
from unbackdoor.cli.subject import Asked, Subject, is_text_model, known_attack, load_subject, model_file
from unbackdoor.cli.terminal import Terminal, add, percent, table
from unbackdoor.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from unbackdoor.api import Cleaned
    from unbackdoor.evaluation.assessment import Rate
    from unbackdoor.report import Report

DESTROYED = 3

#: What lies in the folder beside the weights under their own name.
_SAFETENSORS, _RECORD, _PAGE = "model.safetensors", "report.json", "report.html"

#: What a text classifier's folder holds besides.
_CONFIG, _CARD = "config.json", "README.md"


def clean(
    model: o.Model,
    samples: o.SourceOption = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Labelled images to measure on. By default those that --per-class leaves, else a share of --samples.",
            rich_help_panel="The samples",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="The defense, such as 'seam(preset=plain)'; see 'list defenses'. By default the one that suits this "
            "network, found by trials on a copy.",
        ),
    ] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the results go. By default MODEL-cleaned in this folder."),
    ] = None,
    arch: o.Arch = None,
    normalize: o.Normalize = None,
    num_classes: o.NumClasses = None,
    image_size: o.ImageSize = None,
    trust_pickle: o.TrustPickle = False,
    classes: o.Classes = None,
    on_corrupt: o.Corrupt = o.OnCorrupt.ERROR,
    data_root: o.DataRoot = None,
    download: o.Download = False,
    per_class: o.PerClass = None,
    held_out: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="The share of --samples that is set aside to measure on, where there is no test set.",
            rich_help_panel="The samples",
        ),
    ] = 0.2,
    canaries: Annotated[
        bool,
        typer.Option(
            "--canaries",
            help="Plant known backdoors in a copy, remove them too and report what is left: evidence that needs no "
            "trigger. Takes more than twice as long.",
        ),
    ] = False,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Look for evidence of a backdoor before and after, without any trigger; see 'audit'. Images alone.",
        ),
    ] = False,
    text_column: o.TextColumn = None,
    label_column: o.LabelColumn = None,
    max_length: o.MaxLength = None,
    trigger: o.Trigger = None,
    seed: o.Seed = 0,
    device: o.DeviceOption = o.Device.AUTO,
    threads: o.Threads = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
) -> None:
    """Remove a possible backdoor from a network and report what was measured.

    Writes the cleaned weights in the form and with the key names they came in, beside model.safetensors, report.json
    and report.html; a text classifier as a folder that transformers loads, with a model card. Of a destroyed network
    only the report is written, and the exit code is 3.
    """
    from unbackdoor import api

    terminal = Terminal(quiet=quiet)
    asked = Asked(
        model=model,
        samples=samples,
        test=test,
        arch=arch,
        normalize=normalize,
        num_classes=num_classes,
        image_size=image_size,
        classes=classes,
        on_corrupt=on_corrupt,
        data_root=data_root,
        download=download,
        per_class=per_class,
        trigger=trigger,
        trust_pickle=trust_pickle,
        seed=seed,
        device=device,
        threads=threads,
        text_column=text_column,
        label_column=label_column,
        max_length=max_length,
    )
    # Everything that can be wrong is looked at before the minutes of work.
    asked.check_samples()
    file = model_file(model)
    folder = out or Path(f"{_file_stem(model)}-cleaned")
    if file.name in (_RECORD, _PAGE):
        raise ConfigError(f"{file.name} is the name of a part of the report; rename the checkpoint")
    if is_text_model(model):
        refuse(folder, [_CONFIG, _CARD, _SAFETENSORS, _RECORD, _PAGE], force=force, given=file / _SAFETENSORS)
    else:
        refuse(folder, [file.name, _SAFETENSORS, _RECORD, _PAGE], force=force, given=file)
    if audit and is_text_model(model):
        raise ConfigError("--audit looks for triggers in images, and this is a network of texts")
    defense = specs.build("defense", method)
    known_attack(asked)
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out must lie between 0 and 1, not {held_out}")
    with terminal.working("reading the network and the samples"):
        subject = load_subject(asked, strict=True)
    terminal.notes(subject.notes)
    for warning in subject.warnings:
        terminal.warn(warning)

    with terminal.progress():
        cleaned = api.clean(
            subject.classifier,
            subject.samples,
            defense,
            seed=seed,
            test=subject.test,
            attack=subject.attack,
            triggered=subject.triggered,
            held_out=held_out,
            canaries=canaries,
            audit=audit,
            description=subject.description,
            notes=(*subject.notes, *subject.warnings),
        )
    problem = _write(cleaned, subject, folder)
    _tell(terminal, cleaned.report, folder)
    if problem is not None:
        raise problem
    if cleaned.destroyed:
        raise typer.Exit(DESTROYED)


def _write(cleaned: Cleaned, subject: Subject, folder: Path) -> CheckpointError | None:
    """Write all that is to be written; what could not be put back into the form of the original is returned."""
    from unbackdoor.models.checkpoints import write_like
    from unbackdoor.models.feature_inputs import FeatureClassifier
    from unbackdoor.models.inputs import Classifier

    checkpoint, problem = subject.checkpoint, None
    names = (_SAFETENSORS, _CONFIG, _CARD) if checkpoint is None else (checkpoint.path.name, _SAFETENSORS)
    with staged(folder, stale=names) as made:
        cleaned.save(made)
        if checkpoint is not None and not cleaned.destroyed:
            assert isinstance(cleaned.model, Classifier | FeatureClassifier)
            try:
                write_like(checkpoint, cleaned.model.network.state_dict(), made / checkpoint.path.name, force=True)
            except CheckpointError as error:  # the work of minutes is not thrown away for it
                problem = CheckpointError(f"{error}. The cleaned weights are in {folder / _SAFETENSORS} alone")
    return problem


def _tell(terminal: Terminal, report: Report, folder: Path) -> None:
    from unbackdoor.report import wording

    figures = table("", "before", "after", "95% interval after", right=("before", "after", "95% interval after"))
    rates: list[tuple[str, Rate | None, Rate | None]] = [
        ("accuracy", report.before.accuracy, report.after.accuracy),
        ("attack success", report.before.asr, report.after.asr),
        ("robust accuracy", report.before.ra, report.after.ra),
    ]
    for name, before, after in rates:
        if before is not None and after is not None:
            add(figures, name, percent(before.value), percent(after.value), interval(after))
    bad = report.verdict in ("destroyed", "backdoor_remains")
    good = report.verdict == "cleaned" and not any(flag.serious for flag in report.flags)
    terminal.say()
    terminal.say(wording.headline(report), "bold red" if bad else "bold green" if good else "bold yellow")
    terminal.say(wording.caveat(report))
    terminal.show(figures)
    known = report.attack
    if known is not None:
        nist = "undefined" if known.nist_fidelity is None else percent(known.nist_fidelity)
        ours = "undefined" if known.fidelity is None else percent(known.fidelity)
        terminal.say(f"Fidelity: {ours} (SEAM's), {nist} (NIST's).")
    terminal.say(f"{wording.measured_on(report)} Method: {report.method.spec}, {report.cost.seconds:.0f} s.")
    foretold = wording.foretold(report)
    if foretold is not None:
        terminal.say(foretold)
    audited = wording.audited(report)
    if audited is not None:
        terminal.say(audited)
    for flag in report.flags:
        if flag.name != "destroyed":
            terminal.warn(f"{flag.name.replace('_', ' ')}: {flag.message}")
    terminal.say()
    if report.samples.kind == "text":
        places = {folder / _CARD: "model card", folder / _SAFETENSORS: "weights"}
    else:
        places = {folder / Path(report.model.path or _SAFETENSORS).name: "weights"}
        places.setdefault(folder / _SAFETENSORS, "safetensors")
    places[folder / _PAGE] = "report"
    for path, what in places.items():
        if path.is_file():  # there are no weights of a destroyed network
            terminal.say(f"{what:<13}{path}")


def _file_stem(model: Path) -> str:
    """What the results' folder is named after; of transformers:OWNER/NAME the NAME."""
    return model.name.rpartition(":")[2] if is_text_model(model) else model.resolve().stem


def interval(rate: Rate) -> str:
    """95.1% to 97.2%"""
    return f"{percent(rate.interval.low)} to {percent(rate.interval.high)}"
