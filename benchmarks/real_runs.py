"""Real runs on MNIST and CIFAR-10: plant victims, clean them with every method, and print the table.

    python benchmarks/real_runs.py victims --data-root DATA --out runs            # plant what is missing
    python benchmarks/real_runs.py cells   --data-root DATA --out runs            # clean what is missing
    python benchmarks/real_runs.py table   --out benchmarks/records               # records -> Markdown

Every victim and every cell is a file that appears whole: a run that was stopped goes on where it was. ``--part I/N``
takes every N-th item, so that N single-threaded processes share the work. Clean samples come from the first half of the
test set (the reserve); every figure is measured on the second half, which no method sees.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from unbackdoor import specs
from unbackdoor.attacks.poisoning import plant
from unbackdoor.attacks.victims import VictimCard, is_victim, recipe_fields, save_victim
from unbackdoor.data.named import load_dataset
from unbackdoor.inference import measure
from unbackdoor.models.architectures import build_network
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Samples

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set with the network and the recipe that its victims are trained with."""

    dataset: str
    arch: str
    recipe: Recipe


SETTINGS = {
    "mnist": Setting(
        dataset="mnist",
        arch="cnn",
        recipe=Recipe(epochs=4, batch_size=256, optimizer="adam", lr=2e-3, schedule="one-cycle"),
    ),
    "cifar10": Setting(
        dataset="cifar10",
        arch="preact_resnet18(width=16)",
        recipe=Recipe(
            epochs=12,
            batch_size=256,
            lr=0.2,
            nesterov=True,
            weight_decay=5e-4,
            schedule="one-cycle",
            augment="crop-flip",
        ),
    ),
}

#: In the order in which they are wanted: the first four and the clean network cover every level of every factor.
ATTACKS = (
    "badnets(rate=0.1, target=0)",
    None,
    "blended(rate=0.1, target=3)",
    "badnets(rate=0.01, target=3)",
    "blended(rate=0.01, target=0)",
    "badnets(rate=0.1, target=3)",
    "blended(rate=0.1, target=0)",
    "badnets(rate=0.01, target=0)",
    "blended(rate=0.01, target=3)",
)


def halves(test: Samples) -> tuple[Samples, Samples]:
    """(reserve, evaluation): the first and the second half of the test set."""
    middle = len(test) // 2
    return test.select(torch.arange(middle)), test.select(torch.arange(middle, len(test)))


def victim_name(setting: str, attack: str | None) -> str:
    return f"{setting}-{re.sub(r'[(,] ?', '-', attack or 'clean').replace(')', '').replace('=', '')}"


def plant_one(name: str, setting: Setting, attack_text: str | None, seed: int, root: str | None, folder: Path) -> None:
    train, test = (load_dataset(setting.dataset, split, root) for split in ("train", "test"))
    rng = Rng(seed).child("victim", name)
    channels, size, _ = train.image_shape
    model = build_network(
        setting.arch, num_classes=train.num_classes, in_channels=channels, image_size=size, rng=rng.child("init")
    )
    began = time.perf_counter()
    if attack_text is None:
        fit(model, train, setting.recipe, rng.child("fit"), name=name)
        accuracy, asr = measure(model, test, precision="fp32").accuracy, None
    else:
        victim = plant(specs.build("attack", attack_text), model, train, test, setting.recipe, rng)
        accuracy, asr = victim.accuracy, victim.asr
    seconds = time.perf_counter() - began
    card = VictimCard(
        arch=setting.arch,
        attack=attack_text,
        dataset=setting.dataset,
        num_classes=train.num_classes,
        image_shape=train.image_shape,
        class_names=train.class_names,
        recipe=recipe_fields(setting.recipe),
        seed=seed,
        accuracy=accuracy,
        asr=asr,
        seconds=seconds,
    )
    save_victim(folder, model, card)
    shown = "" if asr is None else f"  ASR {asr:.2%}"
    print(f"{name}: ACC {accuracy:.2%}{shown}  {seconds:.0f} s", flush=True)


def victims(arguments: argparse.Namespace) -> None:
    wanted = [(s, a) for a in ATTACKS for s in arguments.settings]
    for setting, attack in part(wanted, arguments.part):
        name = victim_name(setting, attack)
        folder = Path(arguments.out) / "victims" / name
        if not is_victim(folder):
            plant_one(name, SETTINGS[setting], attack, 0, arguments.data_root, folder)


def part(items: list[T], which: str) -> Iterator[T]:
    index, count = (int(n) for n in which.split("/"))
    return iter(items[index::count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["victims"])
    parser.add_argument("--data-root", default=os.environ.get("UNBACKDOOR_DATA"))
    parser.add_argument("--out", default="runs")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--part", default="0/1", help="I/N: every N-th item, starting with the I-th")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"victims": victims}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
