"""``unbackdoor audit``: is there evidence of a backdoor in a network, without its trigger?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.cli import options as o
from unbackdoor.cli.outputs import refuse, staged
from unbackdoor.cli.subject import Asked, is_text_model, load_subject, model_file
from unbackdoor.cli.terminal import Terminal, add, table
from unbackdoor.errors import UnsupportedModel

if TYPE_CHECKING:
    from unbackdoor.report.audit_record import AuditReport

_RECORD, _PAGE = "audit.json", "audit.html"


def audit(
    model: o.Model,
    samples: o.SourceOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the results go. By default MODEL-audit in this folder."),
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
    seed: o.Seed = 0,
    device: o.DeviceOption = o.Device.AUTO,
    threads: o.Threads = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
) -> None:
    """Look for evidence of a backdoor in a network of images, without any trigger.

    Says whether a class stands out more than in networks without a backdoor, which one, and what its trigger may look
    like. No evidence is no proof of a clean network. Writes audit.json and audit.html; the network is left as it is.
    The exit code is 0 whether there is evidence or not.
    """
    from unbackdoor import auditing
    from unbackdoor.report.audit_html import render_audit

    terminal = Terminal(quiet=quiet)
    asked = Asked(
        model=model,
        samples=samples,
        arch=arch,
        normalize=normalize,
        num_classes=num_classes,
        image_size=image_size,
        classes=classes,
        on_corrupt=on_corrupt,
        data_root=data_root,
        download=download,
        per_class=per_class,
        trust_pickle=trust_pickle,
        seed=seed,
        device=device,
        threads=threads,
    )
    if is_text_model(model):
        raise UnsupportedModel(f"{model} is a network of texts: an audit looks for triggers in images alone")
    asked.check_samples()
    folder = out or Path(f"{model.resolve().stem}-audit")
    refuse(folder, [_RECORD, _PAGE], force=force, given=model_file(model))
    with terminal.working("reading the network and the samples"):
        subject = load_subject(asked, strict=True)
    terminal.notes(subject.notes)
    for warning in subject.warnings:
        terminal.warn(warning)
    # What a victim's folder or a TrojAI model tells of its trigger goes no further than this.
    with terminal.progress():
        report = auditing.audit(
            subject.classifier,
            subject.samples,
            seed=seed,
            description=subject.description,
            notes=(*subject.notes, *subject.warnings),
        )
    with staged(folder) as made:
        report.save(made / _RECORD)
        (made / _PAGE).write_text(render_audit(report), encoding="utf-8")
    _tell(terminal, report, folder)


def _tell(terminal: Terminal, report: AuditReport, folder: Path) -> None:
    from unbackdoor.analysis.audit.evidence import KINDS
    from unbackdoor.report import audit_wording as wording

    found, calibration = report.found, report.calibration
    suspect = report.class_name(found.suspect)
    weighed = [kind for kind in calibration.weights if kind in found.figures]
    heads = ("score", *(KINDS[kind].title.lower() for kind in weighed))
    classes = table("class", *heads, right=heads)
    ranked = sorted(range(len(found.scores)), key=lambda c: -found.scores[c])
    for c in ranked[:5]:
        figures = (found.figures[kind][c] for kind in weighed)
        add(classes, report.class_name(c), f"{found.scores[c]:.2f}", *(f"{value:+.2f}" for value in figures))
    terminal.say()
    terminal.say(wording.headline(found, suspect), "bold red" if found.found else "bold yellow")
    terminal.say(wording.summary(found, calibration, suspect))
    terminal.say(wording.performance(calibration))
    terminal.show(classes)
    unlike = wording.unlike(found.unlike, calibration)
    if unlike is not None:
        terminal.warn(unlike)
    for note in found.notes:
        terminal.warn(note)
    terminal.say(f"report       {folder / _PAGE}")
