"""What the benchmarks that plant victims and clean them share: victims and cells as files, and rows of a table.

Every victim is a folder and every cell a file that appears whole, so that a run that was stopped goes on where it was.
Clean samples come from the first half of the test set (the reserve); every figure of a cell is measured on the second
half, which no method sees.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from unbackdoor import specs
from unbackdoor.attacks.poisoning import implant
from unbackdoor.attacks.recipes import usual
from unbackdoor.attacks.victims import (
    VictimCard,
    attack_fields,
    is_victim,
    load_attack,
    load_victim,
    read_card,
    recipe_fields,
    save_victim,
)
from unbackdoor.attacks.workshop import Workshop
from unbackdoor.data.named import dataset_info, load_dataset
from unbackdoor.errors import UnbackdoorError
from unbackdoor.evaluation.assessment import assess
from unbackdoor.evaluation.checks import ATTACK_TOOK, least_accuracy
from unbackdoor.evaluation.metrics import der, mean_interval
from unbackdoor.files import write
from unbackdoor.models.architectures import build_network
from unbackdoor.rng import Rng
from unbackdoor.training import fit
from unbackdoor.types import Attack, Removal, Samples

T = TypeVar("T")

#: The data sets; networks and recipes are the usual ones for test victims.
SETTINGS = {name: usual(name) for name in ("mnist", "cifar10")}

#: Victims of seed 0 were looked at while SEAM's default was developed; those judged here are others.
VICTIM_SEED = 1


def halves(test: Samples) -> tuple[Samples, Samples]:
    """(reserve, evaluation): the first and the second half of the test set."""
    middle = len(test) // 2
    return test.select(torch.arange(middle)), test.select(torch.arange(middle, len(test)))


def victim_name(setting: str, attack: str | None) -> str:
    return f"{setting}-{re.sub(r'[(,] ?', '-', attack or 'clean').replace(')', '').replace('=', '')}"


def victim_folder(out: Path, setting: str, attack: str | None) -> Path:
    return out / "victims" / victim_name(setting, attack)


def plant_missing(setting: str, attack_text: str | None, root: str | None, out: Path) -> None:
    """Plant a victim, where ``out`` does not have it yet; surrogates are kept in ``out`` too."""
    folder = victim_folder(out, setting, attack_text)
    if is_victim(folder):
        return
    train, test = (load_dataset(setting, split, root) for split in ("train", "test"))
    usually, rng = SETTINGS[setting], Rng(VICTIM_SEED).child("victim", folder.name)
    channels, size, _ = train.image_shape
    model = build_network(
        usually.arch, num_classes=train.num_classes, in_channels=channels, image_size=size, rng=rng.child("init")
    )
    began = time.perf_counter()
    if attack_text is None:
        attack = None
        fit(model, train, usually.recipe, rng.child("fit"), name=folder.name)
    else:
        stated = specs.build("attack", attack_text)
        attack, _ = implant(stated, model, train, usually.recipe, rng, Workshop(out / "workshop"))
    seconds = time.perf_counter() - began
    found = assess(model, test, attack=attack)
    card = VictimCard(
        arch=usually.arch,
        **{**attack_fields(attack), "attack": attack_text},
        dataset=setting,
        num_classes=train.num_classes,
        image_shape=train.image_shape,
        class_names=train.class_names,
        recipe=recipe_fields(usually.recipe),
        seed=VICTIM_SEED,
        accuracy=found.accuracy.value,
        asr=found.asr.value if found.asr else None,
        seconds=seconds,
    )
    save_victim(folder, model, card, trigger=attack.state if attack else None)
    shown = "" if card.asr is None else f"  ASR {card.asr:.2%}"
    print(f"{folder.name}: ACC {card.accuracy:.2%}{shown}  {seconds:.0f} s", flush=True)


def part(items: list[T], which: str) -> Iterator[T]:
    index, count = (int(n) for n in which.split("/"))
    return iter(items[index::count])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One removal: a victim, a method, a budget of clean samples (share of the training set) and a seed."""

    setting: str
    attack: str | None
    method: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        return f"{victim_name(self.setting, self.attack)}-{specs.key(dataclasses.asdict(self))}"


def methods(setting: str) -> tuple[str, ...]:
    """What is compared, with the augmentation that suits the data."""
    augment = dataset_info(setting).augmentation
    return (
        f"seam(augment={augment})",
        f"ulrl(preset=authors-v1, augment={augment})",
        f"ft(epochs=20, augment={augment})",
        f"ulrl(augment={augment})",
    )


def run_cell(cell: Cell, model: nn.Module, attack: Attack | None, test: Samples, train_size: int) -> dict[str, Any]:
    """Clean and measure; a failure is a record too."""
    return remove(cell, model, attack, test, train_size)[0]


def remove(
    cell: Cell,
    model: nn.Module,
    attack: Attack | None,
    test: Samples,
    train_size: int,
    spoil: Callable[[Samples], Samples] = lambda clean: clean,
) -> tuple[dict[str, Any], Removal | None, Samples]:
    """(the record, the removal, the clean samples); no removal where it failed, which the record then tells.

    Args:
        spoil: what is done to the clean samples before the defense gets them.
    """
    reserve, judged = halves(test)
    per_class = round(cell.budget * train_size / test.num_classes)
    clean = reserve.draw(per_class, Rng(cell.seed).stream("clean", cell.setting, str(cell.budget)))
    record: dict[str, Any] = {**dataclasses.asdict(cell), "clean_samples": len(clean)}
    memory, began = PeakMemory(), time.perf_counter()
    try:
        removal: Removal = specs.build("defense", cell.method)(model, spoil(clean), Rng(cell.seed).child("defense"))
    except UnbackdoorError as error:
        return {**record, "error": f"{type(error).__name__}: {error}"}, None, clean
    seconds, peak = time.perf_counter() - began, memory.mib()
    before, after = (assess(m, judged, attack=attack) for m in (model, removal.model))
    record |= {
        "acc_before": before.accuracy.value,
        "acc_after": after.accuracy.value,
        "asr_before": before.asr.value if before.asr else None,
        "asr_after": after.asr.value if after.asr else None,
        "ra_before": before.ra.value if before.ra else None,
        "ra_after": after.ra.value if after.ra else None,
        "seconds": round(seconds, 2),
        "images": removal.trace.images,
        "peak_memory_mib": peak,
        "threads": torch.get_num_threads(),
        "values": removal.trace.values,
        "notes": list(removal.trace.notes),
    }
    return record, removal, clean


class PeakMemory:
    """The most memory that this process holds from now on: Linux tells it; elsewhere it is the most since its start."""

    STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        with suppress(OSError):
            self.FORGET.write_text("5")  # the peak becomes what is held now

    def mib(self) -> int:
        with suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB$", self.STATUS.read_text(), re.MULTILINE)
            if found:
                return round(int(found[1]) / 1024)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def took(asr: float) -> bool:
    """Below 80 % an attack has not taken, and says nothing about a defense."""
    return asr >= ATTACK_TOOK


def works(card: VictimCard, out: Path) -> bool:
    """Whether the attack left a network that knows its task, by the benchmark's rule."""
    clean = victim_folder(out, card.dataset, None)
    return card.accuracy >= least_accuracy(card.num_classes, read_card(clean).accuracy if is_victim(clean) else None)


def run_cells(
    planned: Iterable[Cell], out: Path, root: str | None, run: Callable[..., dict[str, Any]], where: str = "cells"
) -> None:
    """Run what is missing of the cells whose victim is there and took, as files in ``out/where``.

    Args:
        run: as :func:`run_cell`.
    """
    (out / where).mkdir(parents=True, exist_ok=True)
    loaded: dict[str, tuple[Samples, int]] = {}
    for cell in planned:
        path, folder = out / where / f"{cell.name}.json", victim_folder(out, cell.setting, cell.attack)
        if path.exists() or not is_victim(folder):
            continue
        if cell.setting not in loaded:
            test, train = (load_dataset(cell.setting, split, root) for split in ("test", "train"))
            loaded[cell.setting] = test, len(train)
        model, card = load_victim(folder)
        if card.asr is not None and not took(card.asr):
            print(f"{folder.name}: the attack did not take (ASR {card.asr:.1%}), no method is judged on it", flush=True)
            continue
        if card.attack is not None and not works(card, out):
            print(
                f"{folder.name}: the network does not work ({card.accuracy:.1%}), no method is judged on it", flush=True
            )
            continue
        record = run(cell, model, load_attack(folder), *loaded[cell.setting])
        write(path, (json.dumps(record, indent=1) + "\n").encode(), force=True)
        shown = ("acc_before", "acc_after", "asr_before", "asr_after", "seconds", "error")
        print(
            cell.name, cell.method, cell.budget, {k: record[k] for k in shown if record.get(k) is not None}, flush=True
        )


def write_records(path: Path, items: Iterable[Any]) -> None:
    """A JSON-lines file, sorted."""
    lines = sorted(json.dumps(item) for item in items)
    write(path, "".join(f"{line}\n" for line in lines).encode(), force=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(tables: Mapping[str, str], page: Path | None) -> None:
    """Print tables, or put each between its marks in a page: ``<!-- table: NAME -->`` and ``<!-- end: NAME -->``.

    Raises:
        SystemExit: the page has no such marks.
    """
    if page is None:
        print("\n\n".join(tables.values()))
        return
    text = page.read_text(encoding="utf-8")
    for name, made in tables.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page} has no place for the table {name}: {begin} and {end} are not both there")
        text = f"{before}{begin}\n\n{made}\n\n{end}{after}"
    write(page, text.encode(), force=True)


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


BEFORE_AND_AFTER = ("ACC before", "ACC after", "ASR before", "ASR after", "RA after", "DER")
HEADS = ("victim", "clean", "method", "seeds", *BEFORE_AND_AFTER, "s")


def table_row(attack: str | None, budget: float, method: str, rows: list[dict[str, Any]]) -> list[str]:
    """The cells of one line: means over seeds, with a 95 % interval from three seeds on."""
    done = [r for r in rows if "error" not in r]
    head = [attack or "clean network", f"{budget:.0%}", f"`{method}`", str(len(done))]
    if not done:
        return [*head, f"failed: {rows[0]['error']}", *[""] * (len(HEADS) - 5)]

    def shown(name: str) -> str:
        values = [100 * r[name] for r in done if r[name] is not None]
        if not values:
            return "–"
        mean = statistics.fmean(values)
        if len(values) < 3 or name.endswith("before"):
            return f"{mean:.1f}"
        interval = mean_interval([v / 100 for v in values])
        return f"{mean:.1f} ± {50 * (interval.high - interval.low):.1f}"

    scores = [
        der(r["acc_before"], r["asr_before"], r["acc_after"], r["asr_after"])
        for r in done
        if r["asr_before"] is not None
    ]
    final = f"{100 * statistics.fmean(scores):.1f}" if scores else "–"
    seconds = statistics.fmean(r["seconds"] for r in done)
    names = ("acc_before", "acc_after", "asr_before", "asr_after", "ra_after")
    return [*head, *map(shown, names), final, f"{seconds:.0f}"]
