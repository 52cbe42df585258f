"""TrojAI-like folders by the hundred: made, cleaned by their own few examples, and a table of fidelities.

    python benchmarks/trojai_sweep.py make --out runs/trojai --images 200 --texts 100 --vectors 20 \\
        --encoder FOLDER --data-root DATA                     # what is missing; an encoder of transformers, SST-2
    python benchmarks/trojai_sweep.py clean --out runs/trojai # what is missing -> runs/trojai/results
    python benchmarks/trojai_sweep.py table --out runs/trojai # the records -> Markdown
    python benchmarks/trojai_sweep.py collect --out runs/trojai --write benchmarks/records/trojai.jsonl

Each kind's number is shared out among its layouts; every second model is clean. ``clean`` is what ``unbackdoor bench
--models runs/trojai --out runs/trojai/results`` does: each model is cleaned by its folder alone and judged on fresh
samples that lie apart, or, in folders of others, on examples that are set aside; the record says which. A folder that
cannot be cleaned leaves a record with the reason, and the sweep goes on. What was done is not done again, and several
of these may work on one folder at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch

from unbackdoor import files
from unbackdoor.attacks.trojai.generate import Generation, generate
from unbackdoor.attacks.trojai.pictures import NETWORKS, PictureMaking
from unbackdoor.attacks.trojai.sentences import SentenceMaking
from unbackdoor.bench.executors import in_process, processes
from unbackdoor.bench.exports import lines_bytes
from unbackdoor.bench.given import graph_of_models, models_in
from unbackdoor.bench.reading import gather
from unbackdoor.bench.records import CellRecord, Result
from unbackdoor.bench.site import Site
from unbackdoor.bench.sweep import Summary, sweep
from unbackdoor.data.trojai_layouts import LAYOUTS
from unbackdoor.evaluation.checks import ATTACK_TOOK
from victim_runs import markdown

METHODS = ("seam(preset=authors-trojai-image)", "ft")
IMAGES = ("round1", "round2", "round3", "round4", "round11", "mitigation")
TEXTS = ("round5", "round6")
#: Below the sweep's folder.
RESULTS = "results"


def clean(out: Path, methods: Sequence[str], *, workers: int = 1, seed: int = 0, retry_failed: bool = False) -> Summary:
    """Clean every model below ``out`` by every method, as far as there is no record."""
    graph = graph_of_models(models_in(out, None), methods, None, [seed], ATTACK_TOOK)
    site = Site(store=str((out / RESULTS).resolve()), device="cpu", threads=1)
    return sweep(graph, site, in_process if workers == 1 else processes(workers), retry_failed=retry_failed)


def read(out: Path) -> list[CellRecord]:
    """The records of a sweep's folder, or of a file of lines."""
    return list(gather([out if out.is_file() else out / RESULTS]).records)


def without_places(record: CellRecord, out: Path) -> CellRecord:
    """The record as it is committed: reasons name models, and not where they lay."""
    if record.reason is None:
        return record
    reason = record.reason
    for place in (str(out.resolve()), str(out)):
        reason = reason.replace(f"{place}/", "")
    return record.model_copy(update={"reason": reason})


HEADS = (
    *("layout", "models", "method", "cleaned", "ACC before", "after", "ASR before", "after"),
    *("fidelity (SEAM)", "fidelity (NIST)", "seconds"),
)


def table(records: Sequence[CellRecord]) -> str:
    """A row for each layout, truth and method: means over its models, seconds too.

    Fidelities are of the poisoned models whose attack took, and of the clean ones.
    """
    rows = []
    for (layout, poisoned, method), group in _grouped(records):
        done = [r.result for r in group if r.result is not None]
        took = [r for r in done if r.before.asr is not None and r.before.asr >= ATTACK_TOOK]
        rows.append(
            [
                layout or "unreadable",
                {True: "poisoned", False: "clean", None: "unknown"}[poisoned],
                f"`{method}`",
                f"{len(done)} of {len(group)}",
                _mean([r.before.accuracy for r in done]),
                _mean([r.after.accuracy for r in done]),
                _mean([r.before.asr for r in done]),
                _mean([r.after.asr for r in done]),
                _mean([r.fidelity for r in took]),
                _mean([r.nist_fidelity for r in (took if poisoned else done)]),
                _seconds(done),
            ]
        )
    return markdown(HEADS, rows)


def _grouped(records: Sequence[CellRecord]) -> Iterator[tuple[tuple[str, bool | None, str], list[CellRecord]]]:
    order = {layout.told: index for index, layout in enumerate(LAYOUTS.values())}
    groups: dict[tuple[str, bool | None, str], list[CellRecord]] = {}
    for record in records:
        layout = (record.subject.dataset or "").removeprefix("TrojAI").removeprefix(", ")
        groups.setdefault((layout, record.subject.poisoned, record.defense), []).append(record)
    yield from sorted(groups.items(), key=lambda g: (order.get(g[0][0], 99), str(g[0][1]), g[0][2]))


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{100 * fmean(known):.1f}" if known else ""


def _seconds(done: Sequence[Result]) -> str:
    return f"{fmean(r.seconds for r in done):.1f}" if done else ""


def make(out: Path, arguments: argparse.Namespace) -> None:
    """Make the models that are missing."""
    asked = (
        (IMAGES, arguments.images),
        (TEXTS, arguments.texts),
        (("cyber",), arguments.vectors),
    )
    for names, total in asked:
        for index, name in enumerate(names):
            count = total // len(names) + (index < total % len(names))
            if count == 0:
                continue
            wanted = Generation(
                layout=name,
                count=count,
                seed=arguments.seed,
                first="poisoned" if index % 2 else "clean",
                pictures=PictureMaking(per_class=arguments.per_class, networks=tuple(arguments.networks)),
                sentences=SentenceMaking(training=arguments.training),
                encoder=arguments.encoder,
                data_root=arguments.data_root,
            )
            for folder, made in generate(out / name, wanted):
                if made is not None:
                    print(f"{folder}: {made.architecture}, ACC {made.accuracy:.3f}, ASR {made.asr}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("step", choices=("make", "clean", "table", "collect"))
    found.add_argument("--out", type=Path, required=True, help="the sweep's folder; for table also a file of records")
    found.add_argument("--images", type=int, default=0)
    found.add_argument("--texts", type=int, default=0)
    found.add_argument("--vectors", type=int, default=0)
    found.add_argument("--per-class", type=int, default=PictureMaking().per_class, help="training pictures of a class")
    found.add_argument("--networks", nargs="+", default=NETWORKS, help="specs that models of pictures draw from")
    found.add_argument("--training", type=int, default=SentenceMaking().training, help="training texts")
    found.add_argument("--encoder", type=Path, help="a folder with an encoder of transformers, for texts")
    found.add_argument("--data-root", type=Path, default=os.environ.get("UNBACKDOOR_DATA"))
    found.add_argument("--methods", nargs="+", default=METHODS)
    found.add_argument("--workers", type=int, default=1, help="processes that clean, with one thread each")
    found.add_argument("--retry-failed", action="store_true", help="run again what failed")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--write", type=Path, help="where collect writes its lines")
    return found


def main() -> None:
    arguments = parser().parse_args()
    out: Path = arguments.out
    if arguments.step == "make":
        torch.set_num_threads(1)
        make(out, arguments)
    elif arguments.step == "clean":
        told = clean(
            out,
            arguments.methods,
            workers=arguments.workers,
            seed=arguments.seed,
            retry_failed=arguments.retry_failed,
        )
        print(dict(told.counts), *told.failures, sep="\n")
    elif arguments.step == "table":
        print(table(read(out)))
    else:
        found = sorted((without_places(r, out) for r in read(out)), key=lambda r: (r.subject.name, r.defense, r.seed))
        target = arguments.write or Path(__file__).parent / "records" / "trojai.jsonl"
        files.write(target, lines_bytes(found), force=True)


if __name__ == "__main__":
    main()
