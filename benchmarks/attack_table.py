"""Every attack planted on the whole of CIFAR-10 with the usual network and recipe, and whether it took.

    python benchmarks/attack_table.py victims --data-root DATA --out runs                # plant what is missing
    python benchmarks/attack_table.py victims --data-root DATA --out runs --only wanet   # of one attack
    python benchmarks/attack_table.py collect --data-root DATA --out runs                # -> benchmarks/records
    python benchmarks/attack_table.py table --write docs/attacks.md                      # records -> Markdown

Victims are those of ``real_runs.py``: what that has planted is not planted again. ``--part I/N`` takes every N-th
attack, so that N single-threaded processes share the work. Accuracy and ASR are of the whole test set.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from unbackdoor import specs
from unbackdoor.attacks.poisoning import Trainer, poison
from unbackdoor.attacks.victims import is_victim, load_attack, load_victim, read_card
from unbackdoor.data.named import load_dataset
from unbackdoor.errors import ConfigError, TrainingDiverged
from unbackdoor.evaluation.assessment import assess
from unbackdoor.evaluation.checks import least_accuracy
from unbackdoor.files import write
from unbackdoor.inference import predict
from unbackdoor.rng import Rng
from victim_runs import markdown, part, plant_missing, read_records, show, took, victim_folder, write_records

SETTING = "cifar10"

#: What an attack has to cost in accuracy for its clean answers to be looked into.
GONE = 0.1

#: None is the clean network. Each registered attack at its defaults; where those are known not to take, a setting that
#: does beside them.
ATTACKS: tuple[str | None, ...] = (
    None,
    "badnets(rate=0.1, target=0)",
    "blended(rate=0.1, target=3)",
    "wanet",
    "input_aware",
    "ftrojan",
    "ctrl",
    "bpp",
    "lira",
    "lira(eps=0.05)",
    "sig(rate=0.05)",
    "low_frequency",
    "ssba",
    "refool",
    "label_consistent",
    "trojannn",
    "tact",
    "adaptive_blend",
    "adaptive_patch",
    "narcissus",
    "blind",
    "imc",
    "sleeper_agent",
    "entangled",
    "uniform_row",
    "ewc",
    "latent",
    "parameter_stealth",
)

#: Why an attack did not take, or what its figures do not say: as found.
REMARKS: dict[str, str] = {
    "lira": "changes of at most 2.55 levels of 255 are not told apart well enough after 12 epochs; five times the "
    "change, in the next row, is",
    "sleeper_agent": "why is open: what was crafted is not kept to be looked at. It has not taken on any small network "
    "here; the paper's are full-width",
    "ewc": "the planting was held up on the way: its seconds are no measure",
    "latent": "the planting was held up on the way: its seconds are no measure",
    "parameter_stealth": "why is open: its weights may not move by more than 30 % from a clean twin's",
    "narcissus": "the amplified trigger misleads the clean network as well: it is less a backdoor than an adversarial "
    "pattern",
    "refool": "the planting stood still on the way: its seconds are no measure",
    "wanet": "the planting stood still for hours on the way: its seconds are no measure",
}


def victims(arguments: argparse.Namespace) -> None:
    wanted = [a for a in ATTACKS if not arguments.only or (a is not None and specs.parse(a)[0] in arguments.only)]
    for attack in part(wanted, arguments.part):
        try:
            plant_missing(SETTING, attack, arguments.data_root, Path(arguments.out))
        except TrainingDiverged as error:  # a row of the table too
            record = json.dumps({"attack": attack, "error": str(error)})
            write(failure(Path(arguments.out), attack), record.encode(), force=True)
            print(f"{attack}: {error}", flush=True)


def failure(out: Path, attack: str | None) -> Path:
    """Where it is kept why an attack could not be planted."""
    folder = victim_folder(out, SETTING, attack)
    return folder.with_name(f"{folder.name}.failed.json")


def collect(arguments: argparse.Namespace) -> None:
    """The cards as a JSON-lines file, which is what is committed.

    With what each trigger does to the clean network, which knows nothing of it, and of an attack that did not take,
    what was fitted of it.
    """
    out, found = Path(arguments.out), []
    for attack in ATTACKS:
        folder, failed = victim_folder(out, SETTING, attack), failure(out, attack)
        if is_victim(folder):
            card = json.loads((folder / "victim.json").read_text())
            found.append({**card, **looked_into(out, attack, card, arguments.data_root)})
        elif failed.is_file():
            found.append(json.loads(failed.read_text()))
    write_records(Path(arguments.records) / "attack_table.jsonl", found)


def looked_into(out: Path, attack: str | None, card: dict[str, Any], root: str | None) -> dict[str, float | None]:
    """What :func:`collect` adds to a card; kept in a file beside the victim, until that is planted anew."""
    folder, clean = victim_folder(out, SETTING, attack), victim_folder(out, SETTING, None)
    kept = folder.with_name(f"{folder.name}.looks.json")
    planted = [card["seconds"], read_card(clean).seconds if is_victim(clean) else None]
    if kept.is_file() and (known := json.loads(kept.read_text()))["planted"] == planted:
        return dict(known["looks"])
    looks: dict[str, float | None] = {}
    if attack is not None and is_victim(clean) and read_card(clean).accuracy - card["accuracy"] > GONE:
        looks["astray"] = astray(folder, root)
    if card["asr"] is not None and not took(card["asr"]):
        looks["fitted"] = fitted(folder, root)
    if attack is not None and is_victim(clean):
        misled = assess(load_victim(clean)[0], load_dataset(SETTING, "test", root), attack=load_attack(folder)).asr
        looks["on_clean"] = misled.value if misled is not None else None
    write(kept, json.dumps({"planted": planted, "looks": looks}).encode(), force=True)
    return looks


def astray(folder: Path, root: str | None) -> float | None:
    """The share of the test images of other classes that go where the attacker wants without any trigger."""
    (model, card), attack = load_victim(folder), load_attack(folder)
    test = load_dataset(SETTING, "test", root)
    if attack is None:
        return None
    wanted = attack.relabel(test.labels, card.num_classes)
    foreign = wanted != test.labels
    return float((predict(model, test).argmax(1).cpu() == wanted)[foreign].double().mean())


def fitted(folder: Path, root: str | None) -> float | None:
    """The share of its own poisoned training images, of other classes than the target's, that a victim sends there.

    None where the attack poisons as it trains, or does not keep what it crafted. An attack that fits them and fails on
    the test set's does not generalise; one that does not even fit them was trained too briefly, or poisoned too few.
    """
    model, card = load_victim(folder)
    attack, train = load_attack(folder), load_dataset(SETTING, "train", root)
    if attack is None or isinstance(attack, Trainer):
        return None
    rng = Rng(card.seed).child("victim", folder.name)
    try:
        poisoned = poison(train, attack, rng)
    except ConfigError:
        return None
    chosen = attack.plan(train.labels, train.num_classes, rng)
    chosen = chosen[poisoned.labels[chosen] != train.labels[chosen]]
    if not len(chosen):
        return None
    seen = poisoned.select(chosen)
    return float((predict(model, seen).argmax(1).cpu() == seen.labels).double().mean())


HEADS = ("attack", "poisoned", "ACC", "lost", "ASR", "ASR on the clean network", "planted in s", "")


def tables(records: Path) -> dict[str, str]:
    cards = {card["attack"]: card for card in read_records(records / "attack_table.jsonl")}
    clean = cards[None]["accuracy"] if None in cards else None
    return {"attacks": markdown(HEADS, (table_row(cards[a], clean) for a in ATTACKS if a in cards))}


def table_row(card: dict[str, Any], clean: float | None) -> list[str]:
    """The cells of one line; ``clean`` is the clean network's accuracy."""
    if "error" in card:
        return [f"`{card['attack']}`", *["–"] * 6, f"**could not be planted**: {card['error']}"]
    attack, settings, asr = card["attack"], card.get("settings", {}), card["asr"]  # the oldest cards have none
    lost = "–" if clean is None or attack is None else f"{100 * (clean - card['accuracy']):.1f}"
    rate = "–" if attack is None else f"{100 * settings.get('rate', specs.build('attack', attack).rate):g} %"
    remarks = [] if asr is None or took(asr) else ["**did not take**"]
    if attack is not None and card["accuracy"] < least_accuracy(card["num_classes"], clean):
        remarks = ["**broke the network**"]
    if card.get("fitted") is not None:
        remarks.append(f"of its own poisoned training images {card['fitted']:.0%} go where the attacker wants")
    if card.get("astray") is not None:
        remarks.append(
            f"without a trigger {card['astray']:.0%} of the other classes' images go where the attacker wants"
        )
    if attack in REMARKS:
        remarks.append(REMARKS[attack])
    return [
        "clean network" if attack is None else f"`{attack}`",
        rate,
        f"{100 * card['accuracy']:.1f}",
        lost,
        "–" if asr is None else f"{100 * asr:.1f}",
        "–" if card.get("on_clean") is None else f"{100 * card['on_clean']:.1f}",
        f"{card['seconds']:.0f}",
        ": ".join(remarks),
    ]


def table(arguments: argparse.Namespace) -> None:
    show(tables(Path(arguments.records)), arguments.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"victims": victims, "collect": collect, "table": table}
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--data-root", default=os.environ.get("UNBACKDOOR_DATA"))
    parser.add_argument("--out", default="runs")
    parser.add_argument("--records", default=str(Path(__file__).parent / "records"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, instead of printing")
    parser.add_argument("--only", nargs="+", default=[], metavar="ATTACK", help="attacks by name; all without")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th attack, starting with the I-th")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stages[arguments.stage](arguments)


if __name__ == "__main__":
    main()
