"""What the blind audit says of networks whose truth is known: its calibration, and a test on networks not used for it.

    python benchmarks/audit_calibration.py victims  --data-root DATA --out runs   # train what is missing
    python benchmarks/audit_calibration.py evidence --data-root DATA --out runs   # gather what is missing
    python benchmarks/audit_calibration.py collect  --out runs                    # -> benchmarks/records
    python benchmarks/audit_calibration.py fit                                    # records -> the package's calibration
    python benchmarks/audit_calibration.py table --write docs/evidence.md         # records -> Markdown

Which networks calibrate and which are held out is written down in :func:`planned`, before anything is looked at. The
audit sees twenty clean samples of each class from the first half of the test set, and nothing else. ``--part I/N``
shares the work between single-threaded processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from audit_fit import METHODS, calibrate
from audit_tables import tables
from unbackdoor import specs
from unbackdoor.analysis.audit import calibration
from unbackdoor.analysis.audit.evidence import KINDS, PER_CLASS, gather
from unbackdoor.attacks.poisoning import implant
from unbackdoor.attacks.recipes import usual
from unbackdoor.data.named import load_dataset
from unbackdoor.evaluation.assessment import assess
from unbackdoor.files import write
from unbackdoor.models.architectures import build_network
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Samples
from victim_runs import halves, part, read_records, show, write_records

Role = Literal["calibration", "held-out"]

#: Training images that are used, of data sets that have more than that.
TRAINED_ON = 6000
RECIPES = {
    "digits": usual("digits").recipe,
    "mnist14": Recipe(epochs=6, batch_size=64, optimizer="adam", lr=3e-3, schedule="one-cycle"),
}

#: Calibration: patches and blends, of different places, rates and targets.
DIGITS = (
    "badnets(size=2, target=0)",
    "blended(target=1)",
    "badnets(size=2, target=3, rate=0.05)",
    "blended(target=4, alpha=0.3, rate=0.05)",
    "badnets(size=2, target=7, corner=top-left)",
    "blended(target=6, alpha=0.15)",
    "badnets(size=2, target=5, rate=0.03)",
    "blended(target=8)",
    "badnets(size=2, target=9, margin=1)",
    "blended(target=3, rate=0.05)",
    "badnets(size=2, target=2, corner=bottom-left)",
    "blended(target=5, picture_seed=7)",
)
MNIST = (
    "badnets(size=2, target=1)",
    "blended(target=2)",
    "badnets(size=3, target=6, rate=0.05)",
    "blended(target=7, rate=0.05)",
    "badnets(size=2, target=4, corner=top-right)",
    "blended(target=9, alpha=0.3)",
    "badnets(size=3, target=8, pattern=grid)",
    "blended(target=0)",
)
#: Held out: attacks that the calibration has not seen, and seen ones with other settings, seeds, targets and networks.
OTHER_DIGITS = (
    "tact",
    "wanet(s=2, rate=0.2, cross_ratio=0)",
    "blind",
    "bpp(squeeze_num=2, dithering=true)",
    "badnets(size=2, labels=all-to-all)",
    "badnets(size=3, pattern=grid, target=1, corner=top-right)",
    "blended(alpha=0.25, target=9, picture_seed=3)",
    "tact(source=7, target=2)",
    "wanet(s=2, rate=0.2, cross_ratio=0, target=4)",
    "blind(target=8)",
    "bpp(squeeze_num=2, dithering=true, target=6)",
)
OTHER_MNIST = (
    "wanet(s=2, rate=0.2, cross_ratio=0, target=5)",
    "bpp(squeeze_num=2, dithering=true, target=3)",
    "tact(source=1, target=6)",
    "badnets(size=3, target=5, pattern=pixels)",
    "blended(target=4, picture_seed=3)",
)
OTHER_NETWORK = ("badnets(size=2, target=4)", "blended(target=7)", "badnets(size=2, target=6, rate=0.05)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A network of the study; ``attack`` None is a clean one."""

    role: Role
    setting: str
    arch: str
    attack: str | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}-{'clean' if self.attack is None else specs.parse(self.attack)[0]}-{self.key}"

    @property
    def key(self) -> str:
        return specs.key(dataclasses.asdict(self))


def planned() -> list[Planned]:
    """All networks: clean ones and victims, calibration and held-out, in turn, so that a part of them is a fair one."""
    small, other = "cnn(width=16)", "preact_resnet18(width=4)"
    groups: tuple[tuple[Role, str, str, tuple[str | None, ...], int], ...] = (
        ("calibration", "digits", small, (None,) * 16, 0),
        ("calibration", "digits", small, DIGITS, 20),
        ("calibration", "mnist14", "cnn(width=8)", (None,) * 8, 0),
        ("calibration", "mnist14", "cnn(width=8)", MNIST, 20),
        ("held-out", "digits", small, (None,) * 8, 50),
        ("held-out", "digits", small, OTHER_DIGITS, 70),
        ("held-out", "mnist14", "cnn(width=8)", (None,) * 6, 50),
        ("held-out", "mnist14", "cnn(width=8)", OTHER_MNIST, 70),
        ("held-out", "digits", other, (None,) * 4, 50),
        ("held-out", "digits", other, OTHER_NETWORK, 70),
    )
    placed = []
    for order, (role, setting, arch, attacks, first) in enumerate(groups):
        for i, attack in enumerate(attacks):
            plan = Planned(role=role, setting=setting, arch=arch, attack=attack, seed=first + i)
            placed.append(((i + 0.5) / len(attacks), order, plan))
    return [plan for *_, plan in sorted(placed, key=lambda entry: entry[:2])]


@cache
def data(setting: str, root: str | None) -> tuple[Samples, Samples]:
    """(training images, test images); of mnist14 a share of the training images, at half of MNIST's resolution."""
    if setting == "digits":
        return load_dataset("digits", "train"), load_dataset("digits", "test")
    train, test = (load_dataset("mnist", split, root) for split in ("train", "test"))
    chosen = torch.randperm(len(train), generator=Rng(0).stream("audit", "share"))[:TRAINED_ON]
    return halved(train.select(chosen)), halved(test)


def halved(samples: Samples) -> Samples:
    """Two by two pixels become one, their mean."""
    pooled = F.avg_pool2d(samples.inputs.float(), 2).round().to(torch.uint8)
    return dataclasses.replace(samples, inputs=pooled)


def network(plan: Planned, like: Samples, rng: Rng) -> nn.Module:
    channels, size, _ = like.image_shape
    return build_network(plan.arch, num_classes=like.num_classes, in_channels=channels, image_size=size, rng=rng)


def victims(arguments: argparse.Namespace) -> None:
    """Each network's weights and what is known of it."""
    folder = Path(arguments.out) / "audit-victims"
    folder.mkdir(parents=True, exist_ok=True)
    for plan in part(planned(), arguments.part):
        weights, card = folder / f"{plan.name}.pt", folder / f"{plan.name}.json"
        if card.exists():
            continue
        train, test = data(plan.setting, arguments.data_root)
        rng = Rng(plan.seed).child("audit-calibration", plan.name)
        model, attack, began = network(plan, train, rng.child("init")), None, time.process_time()
        if plan.attack is None:
            fit(model, train, RECIPES[plan.setting], rng.child("fit"))
        else:
            attack, _ = implant(specs.build("attack", plan.attack), model, train, RECIPES[plan.setting], rng)
        seconds = time.process_time() - began
        found = assess(model, test, attack=attack)
        torch.save(model.state_dict(), weights)
        known = {
            **dataclasses.asdict(plan),
            "target": None if attack is None else getattr(attack, "target", None),
            "acc": found.accuracy.value,
            "asr": found.asr.value if found.asr else None,
            "train_seconds": round(seconds, 2),
        }
        write(card, (json.dumps(known, indent=1) + "\n").encode())
        shown = "" if known["asr"] is None else f"  ASR {known['asr']:.1%}"
        print(f"{plan.name} {plan.attack or ''}: ACC {known['acc']:.1%}{shown}  {seconds:.1f} s", flush=True)


def evidence(arguments: argparse.Namespace) -> None:
    """What the audit gathers about each network that is there."""
    folder = Path(arguments.out) / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    for plan in part(planned(), arguments.part):
        trained, path = Path(arguments.out) / "audit-victims", folder / f"{plan.name}.json"
        if path.exists() or not (trained / f"{plan.name}.json").exists():
            continue
        train, test = data(plan.setting, arguments.data_root)
        model = network(plan, train, Rng(0)).eval()
        model.load_state_dict(torch.load(trained / f"{plan.name}.pt", weights_only=True))
        rng = Rng(plan.seed).child("audit-calibration", plan.name)
        clean = halves(test)[0].draw(PER_CLASS, rng.stream("clean"))
        began = time.process_time()
        found = gather(model, clean, rng.child("audit"))
        record = {
            **json.loads((trained / f"{plan.name}.json").read_text()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_shape": list(clean.image_shape),
            "classes": clean.num_classes,
            "samples": found.samples,
            "measures": {kind: [float(f"{v:.5g}") for v in values] for kind, values in found.measures.items()},
            "works": [trigger.works for trigger in found.triggers],
            "notes": list(found.notes),
            "seconds": round(time.process_time() - began, 2),
        }
        write(path, (json.dumps(record, indent=1) + "\n").encode())
        print(f"{plan.name} {plan.attack or ''}: {record['seconds']} s", flush=True)


def collect(arguments: argparse.Namespace) -> None:
    """The networks as a JSON-lines file, which is what is committed."""
    write_records(Path(arguments.records) / "audit.jsonl", _found(Path(arguments.out)))


def _found(out: Path) -> Iterator[dict[str, Any]]:
    for plan in planned():
        path = out / "audit" / f"{plan.name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            measures = {kind: values for kind, values in record["measures"].items() if kind in KINDS}
            yield {**record, "measures": measures}


def fit_calibration(arguments: argparse.Namespace) -> None:
    """The package's calibration."""
    made, areas = calibrate(read_records(Path(arguments.records) / "audit.jsonl"))
    write(calibration.file(), made.to_json().encode(), force=True)
    print("; ".join(f"{name}: AUROC {areas[name]:.3f} within the calibration" for name in METHODS))
    print(f"{made.method}, threshold {made.threshold:.3g}: {made.held_out}")


def table(arguments: argparse.Namespace) -> None:
    show(tables(Path(arguments.records)), arguments.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"victims": victims, "evidence": evidence, "collect": collect, "fit": fit_calibration, "table": table}
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--data-root", default=os.environ.get("UNBACKDOOR_DATA"))
    parser.add_argument("--out", default="runs")
    parser.add_argument("--records", default=str(Path(__file__).parent / "records"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a page, instead of printing")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th item, starting with the I-th")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stages[arguments.stage](arguments)


if __name__ == "__main__":
    main()
