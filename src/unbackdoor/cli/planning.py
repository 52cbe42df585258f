"""From the options of ``bench`` to the graph that they mean, and to who works through it."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from unbackdoor.cli import options as o
from unbackdoor.cli.terminal import Terminal
from unbackdoor.errors import DataError

if TYPE_CHECKING:
    from unbackdoor.bench.executors import Executor
    from unbackdoor.bench.plan import Graph, Plan, TrainSize


class Workers(StrEnum):
    """Who does the work."""

    AUTO = "auto"
    HERE = "here"
    PROCESSES = "processes"
    RAY = "ray"


def graph_of_options(plan: str | None, stated: dict[str, Any], train_size: TrainSize) -> Graph:
    from unbackdoor.bench.named_plans import load_plan
    from unbackdoor.bench.plan import graph_of

    if plan is None:
        return graph_of(_plan_of(stated), train_size)
    _refuse("--plan says it all", stated)
    return graph_of(load_plan(plan), train_size)


def _refuse(why: str, stated: dict[str, Any]) -> None:
    names = [f"--{name.replace('_', '-')}" for name, value in stated.items() if value]
    if names:
        raise typer.BadParameter(f"{why}: {', '.join(names)} would have no effect")


def _plan_of(stated: dict[str, Any]) -> Plan:
    from unbackdoor.bench.plan import Plan

    given: dict[str, Any] = {
        "datasets": stated["data"],
        "archs": stated["arch"],
        "attacks": stated["attack"] and [None if a.lower() == "none" else a for a in stated["attack"]],
        "defenses": stated["defense"],
        "per_class": stated["per_class"] or (None if stated["share"] else [10]),
        "shares": stated["share"],
        "seeds": stated["seeds"] and range(stated["seeds"]),
        "victim_seeds": stated["victim_seeds"] and range(stated["victim_seeds"]),
        "recipe": stated["epochs"] and {"epochs": stated["epochs"]},
        "min_asr": stated["min_asr"],
    }
    return Plan(**{name: value for name, value in given.items() if value is not None})


def graph_of_folder(folder: Path, stated: dict[str, Any], normalize: str | None) -> Graph:
    from unbackdoor.bench.given import brings_samples, graph_of_models, models_in
    from unbackdoor.bench.plan import DEFENSES
    from unbackdoor.evaluation.checks import ATTACK_TOOK

    allowed = ("data", "arch", "defense", "per_class", "seeds", "min_asr")
    _refuse("--models are there already", {k: v for k, v in stated.items() if k not in allowed})
    for name, most in (("data", 1), ("arch", 1)):
        if len(stated[name] or ()) > most:
            raise typer.BadParameter(f"--models takes one --{name}")
    data = (stated["data"] or [None])[0]
    found = models_in(folder, data, arch=(stated["arch"] or [None])[0], normalize=normalize)
    if data is None and not any(brings_samples(model) for model in found):
        raise typer.BadParameter(
            f"--models needs --data, labelled samples to clean and to judge with: nothing in {folder} brings its own"
        )
    least = ATTACK_TOOK if stated["min_asr"] is None else stated["min_asr"]
    seeds = range(stated["seeds"] or 1)
    return graph_of_models(found, stated["defense"] or DEFENSES, stated["per_class"], seeds, least)


def train_sizes(terminal: Terminal, root: Path | None, *, download: bool, dry_run: bool) -> TrainSize:
    from unbackdoor.data.named import dataset_info, load_dataset

    def size(name: str) -> int:
        try:
            return len(load_dataset(name, "train", root, download=download and not dry_run))
        except DataError:
            if not dry_run:
                raise
            terminal.notes([f"{name} is not here; its published size is counted with"])
            return dataset_info(name).train_count

    return size


def default_workers(device: o.Device, threads: int) -> int:
    import torch

    if device is not o.Device.CPU and torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def executor_of(by: Workers, count: int, device: o.Device, address: str | None, needs: tuple[float, float]) -> Executor:
    import torch

    from unbackdoor.bench.executors import in_process, processes

    if by is Workers.RAY:
        from unbackdoor.bench.ray_executor import on_ray

        return on_ray(address=address, workers=count, cpus=needs[0], gpus=needs[1])
    if address is not None:
        raise typer.BadParameter("--ray-address is for --by ray")
    if by is Workers.HERE or (by is Workers.AUTO and count == 1):
        return in_process
    gpus = torch.cuda.device_count() if device is not o.Device.CPU and torch.cuda.is_available() else 0
    return processes(count, gpus=gpus)
