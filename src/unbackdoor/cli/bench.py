"""``unbackdoor bench``: attacks × defenses × budgets × seeds, or a folder of suspicious models; resumable."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import options as o
from unbackdoor.cli.planning import (
    Workers,
    default_workers,
    executor_of,
    graph_of_folder,
    graph_of_options,
    train_sizes,
)
from unbackdoor.cli.terminal import Terminal, add, table

if TYPE_CHECKING:
    from unbackdoor.bench.plan import Graph
    from unbackdoor.bench.store import Store
    from unbackdoor.bench.sweep import Missing, Summary

INTERRUPTED = 130

_PLAN, _MODELS, _WORK, _RESULTS = "The plan", "A folder of models", "Who does the work", "The results"


def bench(
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A plan with a name (smoke, ulrl-two-cores, seam-two-cores, ulrl-gpu, seam-gpu), or a Python file "
            "that defines plan = Plan(...). The file is run.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="none is a network without a backdoor. Repeat it.", rich_help_panel=_PLAN),
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="By default ft, seam and ulrl. Repeat it.", rich_help_panel=_PLAN),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A data set, by default digits. Repeat it. With --models: the labelled images or texts to clean and "
            "to judge with, as for clean --samples; TrojAI models bring theirs.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="The network; by default the usual one. Repeat it.", rich_help_panel=_PLAN),
    ] = None,
    per_class: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Clean samples of each class; by default 10, and all that a TrojAI model brings. Repeat it.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(metavar="X", help="The same as a share of the training set: 0.01.", rich_help_panel=_PLAN),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Draws of clean samples; by default 1.", rich_help_panel=_PLAN),
    ] = None,
    victim_seeds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Victims of each kind; by default 1.", rich_help_panel=_PLAN),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a victim's training.", rich_help_panel=_PLAN)
    ] = None,
    min_asr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Skip victims whose attack succeeds less often, or broke the network; by default 0.8. 0 cleans all.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Clean every model below this folder, instead of planting: checkpoints, and folders of victims, of "
            "TrojAI models and of text classifiers. A model that cannot be read gets a record that says so.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="How the models take images; as for clean.", rich_help_panel=_MODELS),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The results. What is there is not done again.", rich_help_panel=_RESULTS),
    ] = Path("bench-results"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to do, and do nothing.", rich_help_panel=_RESULTS)
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that failed.", rich_help_panel=_RESULTS)
    ] = False,
    export: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Write the plan's records to a .jsonl or .parquet file too.", rich_help_panel=_RESULTS
        ),
    ] = None,
    take: Annotated[
        list[Path] | None,
        typer.Option(
            "--import", metavar="FILE", help="Take records from a .jsonl file first.", rich_help_panel=_RESULTS
        ),
    ] = None,
    by: Annotated[
        Workers,
        typer.Option(
            help="This process alone, several of this machine, or a Ray cluster. By default several processes where "
            "there are several workers.",
            rich_help_panel=_WORK,
        ),
    ] = Workers.AUTO,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="How many. By default one a CPU core, or one a GPU.", rich_help_panel=_WORK
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of a running cluster, or auto. By default one on this machine.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    task_cpus: Annotated[
        float, typer.Option(metavar="X", min=0, help="CPUs that a task needs, with Ray.", rich_help_panel=_WORK)
    ] = 1.0,
    task_gpus: Annotated[
        float, typer.Option(metavar="X", min=0, help="GPUs that a task needs, with Ray.", rich_help_panel=_WORK)
    ] = 0.0,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads of each.", rich_help_panel=_WORK)] = 1,
    device: o.DeviceOption = o.Device.AUTO,
    data_root: o.DataRoot = None,
    download: o.Download = False,
    quiet: o.Quiet = False,
) -> None:
    """Plant backdoors, remove them by each method, and keep a record of each removal.

    Name attacks, defenses, data, budgets and seeds, or a plan. It may be stopped at any time; the same command goes on
    where it was. Failures are records too.
    """
    from unbackdoor.bench.exports import check_suffix, import_lines
    from unbackdoor.bench.exports import export as export_records
    from unbackdoor.bench.site import Site
    from unbackdoor.bench.store import Store
    from unbackdoor.bench.sweep import missing, sweep

    terminal = Terminal(quiet=quiet)
    stated = {
        "attack": attack,
        "defense": defense,
        "data": data,
        "arch": arch,
        "per_class": per_class,
        "share": share,
        "seeds": seeds,
        "victim_seeds": victim_seeds,
        "epochs": epochs,
        "min_asr": min_asr,
    }
    for path in export or ():
        check_suffix(path)
    with terminal.working("planning"):
        if models is not None:
            graph = graph_of_folder(models, {**stated, "plan": plan}, normalize)
        elif normalize is not None:
            raise typer.BadParameter("--normalize is for --models: planted victims take images in 0-1")
        else:
            sizes = train_sizes(terminal, data_root, download=download, dry_run=dry_run)
            graph = graph_of_options(plan, stated, sizes)
    count = workers or default_workers(device, threads)
    executor = executor_of(by, count, device, ray_address, (task_cpus, task_gpus))
    store = Store(out) if out.exists() or not dry_run else None
    for path in take or ():
        if store is not None and not dry_run:
            terminal.notes([f"{import_lines(path, store)} new records from {path}"])
    left = missing(graph, store, retry_failed=retry_failed)
    _tell_plan(terminal, graph, left)
    if dry_run:
        _tell_estimate(terminal, left, store, count)
        return
    assert store is not None
    site = Site(
        store=str(out.resolve()),
        data_root=None if data_root is None else str(data_root.resolve()),
        device=device.value,
        threads=threads,
    )
    site.torch_device()
    try:
        with terminal.progress():
            summary = sweep(graph, site, executor, retry_failed=retry_failed)
    except KeyboardInterrupt:
        there = sum(store.has(cell.key) for cell in graph.cells)
        terminal.error(f"interrupted; {there} of {len(graph.cells)} cells are done. The same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None
    for path in export or ():
        export_records((store.record(c.key) for c in graph.cells if store.has(c.key)), path)
    _tell_results(terminal, summary, out)


def _tell_plan(terminal: Terminal, graph: Graph, left: Missing) -> None:
    from unbackdoor.bench.jobs import VictimJob

    numbers = ("victims", "to plant", "cells", "to run")
    rows = table("data", "network", *numbers, right=numbers)
    counts: dict[tuple[str, str], Counter[str]] = {}

    def place(subject: Any) -> Counter[str]:
        dataset = subject.dataset if isinstance(subject, VictimJob) else subject.data
        return counts.setdefault((dataset or "their own examples", subject.arch or "as the file says"), Counter())

    for victim in graph.victims:
        place(victim)["victims"] += 1
    for victim in left.victims:
        place(victim)["to plant"] += 1
    for cell in graph.cells:
        place(cell.subject)["cells"] += 1
    for cell in left.cells:
        place(cell.subject)["to run"] += 1
    for (dataset, arch), found in counts.items():
        add(rows, dataset, arch, *(f"{found[c]:,}" for c in numbers))
    terminal.show(rows)


def _tell_estimate(terminal: Terminal, left: Missing, store: Store | None, workers: int) -> None:
    from unbackdoor.bench.estimate import estimate

    total = len(left.victims) + len(left.cells)
    found = estimate(left, () if store is None else store.records())
    if not total:
        terminal.say("Everything is there.")
    elif found.unknown == total:
        terminal.say("How long it takes cannot be said: there are no records of anything like it.")
    else:
        seconds = found.seconds / workers
        shown = f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
        besides = f"; {found.unknown:,} of {total:,} jobs, unlike any so far, come on top" if found.unknown else ""
        terminal.say(f"About {shown} with {workers} at work, by the records that are there{besides}.")


def _tell_results(terminal: Terminal, summary: Summary, out: Path) -> None:
    told = ", ".join(f"{count:,} {status}" for status, count in sorted(summary.counts.items()))
    terminal.say(f"cells: {told}. Records: {out / 'cells'}")
    for failure in summary.failures[:5]:
        terminal.warn(failure)
    if len(summary.failures) > 5:
        terminal.warn(f"and {len(summary.failures) - 5:,} more that failed; each record says why")
