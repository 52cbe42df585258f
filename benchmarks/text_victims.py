"""Victims on SST-2 and what removals do to them: a fine-tuned sentence encoder, and an LSTM head over a frozen one.

    python benchmarks/text_victims.py run --encoder FOLDER --data-root DATA --out runs    # what is missing
    python benchmarks/text_victims.py run --encoder FOLDER --out runs --networks head --attacks words --seeds 1
    python benchmarks/text_victims.py collect --out runs                                  # -> benchmarks/records
    python benchmarks/text_victims.py table --write docs/text.md                          # records -> Markdown

Each cell is a file of its own under ``--out``, written whole or not at all; what is there is not run again. The clean
network of each kind is a cell too: its error on triggered texts is what a removal can reach at best.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor import files, specs
from unbackdoor.attacks.poisoning import Contamination, TextContamination, implant
from unbackdoor.attacks.recipes import TEXT
from unbackdoor.data.texts import load_texts
from unbackdoor.evaluation.assessment import Assessment, assess
from unbackdoor.models.architectures import build_network
from unbackdoor.models.text import load_text_classifier
from unbackdoor.models.text_heads import FrozenEmbedding, load_embedding
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Samples
from victim_runs import markdown, show, write_records

ATTACKS = ("words", "addsent", "syntactic", "style")
METHODS = ("ft", "seam", "ulrl", "fst", "ft_sam", "sft", "mcr", "tsbd")
BUDGETS = (0.05, 0.01)
NETWORKS = ("encoder", "head")
#: Among the committed records.
RECORDS = "text_victims.jsonl"

#: Tokens of a sentence: three in a hundred of SST-2's are longer.
LENGTH = 48

HEAD = Recipe(epochs=30, batch_size=64, optimizer="adam", lr=1e-3, schedule="one-cycle")


@dataclass(frozen=True)
class Cell:
    """A victim and what is done to it; without a method the victim itself, without an attack the clean network."""

    network: str
    attack: str | None
    seed: int
    method: str | None = None
    budget: float | None = None

    @property
    def file(self) -> str:
        return f"{specs.key(asdict(self))}.json"


def cells(networks: list[str], attacks: list[str], methods: list[str], seeds: int) -> Iterator[Cell]:
    """All of them, each victim's together."""
    for seed in range(seeds):
        for network in networks:
            yield Cell(network, None, seed)
            for attack in attacks:
                yield Cell(network, attack, seed)
                for budget in BUDGETS:
                    for method in methods:
                        yield Cell(network, attack, seed, method, budget)


class Shop:
    """Makes what cells need, the last victim kept."""

    def __init__(self, encoder: str, root: Path | None, device: torch.device) -> None:
        self.encoder, self.root, self.device = encoder, root, device
        self.made: dict[str, Any] = {}

    def embedding(self) -> FrozenEmbedding:
        if "embedding" not in self.made:
            found = load_embedding(self.encoder, pooling="mean", max_length=LENGTH)
            found.network.to(self.device)
            self.made["embedding"] = found
        embedding: FrozenEmbedding = self.made["embedding"]
        return embedding

    def data(self, network: str) -> tuple[Samples, Samples]:
        """(training, test) texts as the network takes them."""
        if network not in self.made:
            encoder: Any = self.embedding() if network == "head" else self.fresh("encoder", 0).tokenizer
            self.made[network] = tuple(
                load_texts(f"sst2[{split}]", encoder, root=self.root).samples.to(self.device)
                for split in ("train", "test")
            )
        train, test = self.made[network]
        return train, test

    def fresh(self, network: str, seed: int) -> Any:
        rng = Rng(seed).child("text-victims", "init")
        if network == "encoder":
            return load_text_classifier(self.encoder, num_classes=2, max_length=LENGTH, rng=rng).to(self.device)
        width = self.data("head")[0].input_shape[0]
        return build_network("lstm_head", num_classes=2, in_channels=width, rng=rng).to(self.device)

    def victim(self, network: str, attack: str | None, seed: int) -> tuple[nn.Module, TextContamination | None]:
        key = f"{network} {attack} {seed}"
        if self.made.get("victim key") != key:
            train, _ = self.data(network)
            model, rng = self.fresh(network, seed), Rng(seed).child("text-victims", "plant")
            recipe = TEXT if network == "encoder" else HEAD
            planted: Contamination | None = None
            if attack is None:
                fit(model, train, recipe, rng.child("fit"))
            else:
                planted, _ = implant(specs.build("attack", attack), model, train, recipe, rng)
            self.made |= {"victim key": key, "victim": (model, planted)}
        model, planted = self.made["victim"]
        assert planted is None or isinstance(planted, TextContamination)
        return model, planted

    def run(self, cell: Cell, attacks: list[str]) -> dict[str, Any]:
        """The record of a cell."""
        train, test = self.data(cell.network)
        model, planted = self.victim(cell.network, cell.attack, cell.seed)
        if cell.method is None:
            record = _told(assess(model, test, attack=planted, batch_size=128))
            if cell.attack is None:  # what triggers do to a network that knows none of them
                for name in attacks:
                    found = assess(model, test, attack=specs.build("attack", name), batch_size=128)
                    record[f"asr {name}"] = _told(found)["asr"]
            return record
        assert cell.budget is not None
        per_class = max(1, round(cell.budget * len(train) / train.num_classes))
        clean = train.part(per_class, Rng(cell.seed).child("text-victims").stream("clean"))[0]
        defense = specs.build("defense", cell.method)
        removal = defense(model, clean, Rng(cell.seed).child("text-victims", "defense"))
        return _told(assess(removal.model, test, attack=planted, batch_size=128)) | {
            "texts": removal.trace.images,
            "notes": list(removal.trace.notes),
        }


def _told(found: Assessment) -> dict[str, Any]:
    return {
        "accuracy": found.accuracy.value,
        "asr": None if found.asr is None else found.asr.value,
        "ra": None if found.ra is None else found.ra.value,
    }


def collect(out: Path, records: Path) -> None:
    """The cells under a folder as one JSON-lines file, which is what is committed; notes stay behind."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")]
    for content in found:
        content["result"].pop("notes", None)
    write_records(records / RECORDS, found)


def read(records: Path) -> list[tuple[Cell, dict[str, Any]]]:
    """Every committed record, in the order of the cells."""
    path = records / RECORDS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [(Cell(**c["cell"]), c["result"]) for c in map(json.loads, lines)]
    return sorted(found, key=lambda pair: json.dumps(asdict(pair[0]), sort_keys=True))


def tables(records: Path) -> dict[str, str]:
    """The victims and what removals do to them."""
    return {"texts": table(read(records))}


def table(records: list[tuple[Cell, dict[str, Any]]]) -> str:
    """Means over the seeds, in percent, as Markdown.

    *At best* is the ASR of the clean network: its errors on triggered texts.
    """
    best = {
        (cell.network, cell.seed, name): result[f"asr {name}"]
        for cell, result in records
        for name in ATTACKS
        if cell.attack is None and f"asr {name}" in result
    }
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell, result in records:
        if cell.attack is not None:
            known = result | {"best": best.get((cell.network, cell.seed, cell.attack))}
            groups.setdefault((cell.network, cell.attack, cell.budget or 0.0, cell.method or ""), []).append(known)
    rows = []
    for (network, attack, budget, method), results in sorted(groups.items()):
        rates = [_mean([r[key] for r in results]) for key in ("accuracy", "asr", "ra", "best")]
        told = f"`{method}`" if method else "none"
        share = f"{budget:.0%}" if budget else ""
        rows.append([network, attack, share, told, str(len(results)), *rates])
    return markdown(("network", "attack", "clean data", "method", "seeds", "ACC", "ASR", "RA", "at best"), rows)


def _mean(rates: list[float | None]) -> str:
    known = [r for r in rates if r is not None]
    return f"{100 * statistics.fmean(known):.1f}" if known else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "collect", "table"))
    parser.add_argument("--out", type=Path, default=Path("text-runs"))
    parser.add_argument("--encoder", help="a folder of transformers with a sentence encoder, or transformers:NAME")
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, instead of printing")
    given = parser.parse_args()
    if given.what == "table":
        show(tables(given.records), given.write)
        return
    if given.what == "collect":
        collect(given.out, given.records)
        return
    if given.encoder is None:
        parser.error("run needs --encoder")
    shop = Shop(given.encoder, given.data_root, torch.device(given.device))
    for cell in cells(given.networks, given.attacks, given.methods, given.seeds):
        path = given.out / cell.file
        if path.exists():
            continue
        result = shop.run(cell, given.attacks)
        content = {"cell": asdict(cell), "result": result}
        files.write(path, (json.dumps(content, indent=1) + "\n").encode())
        print(cell, {k: v for k, v in result.items() if k != "notes"}, flush=True)


if __name__ == "__main__":
    main()
