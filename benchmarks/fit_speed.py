"""How many images a second ``fit()`` trains on, beside the loop that most code in the field has.

The other loop is plain PyTorch: a ``Dataset`` that makes a PIL image of each sample, pads, crops and flips it, turns it
into a tensor and normalises it; a ``DataLoader`` with no or two workers; float32, contiguous, cross-entropy, SGD. Both
train the same network (same first weights, same normalisation) on the same bytes with the same batch size and the same
kinds of augmentation: crop on 28×28, crop and flip on 32×32.

    python benchmarks/fit_speed.py                        # synthetic images of MNIST's and CIFAR-10's shapes
    python benchmarks/fit_speed.py --data DIR             # the data sets themselves, from mnist.npz and cifar10.npz
    python benchmarks/fit_speed.py --seconds 2 --repeats 3 --out speed.json

Contestants take turns, each for about ``--seconds`` a turn, and the turns' order rotates, so that a machine that slows
down slows all of them. Before the first turn each runs once unmeasured (workers started, kernels chosen). A turn's
ratio is fit()'s rate over the other's in the same round; shown are the median over the rounds, the lowest and highest.
``fit`` uses what it uses by default (bfloat16 where the hardware multiplies in it); ``fit, float32`` shows what is left
without. Figures mean something only on a machine that does nothing else meanwhile.

How much faster it could be is told by two figures in fit()'s own precision. ``bare passes`` takes turns with the
others: the network's passes forward and back on one batch that is ready, without data, augmentation or optimiser. And
the machine's peak is what a large matrix product reaches; convolutions with few channels cannot.

    python benchmarks/fit_speed.py --write docs/results.md    # the committed record -> Markdown
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from unbackdoor.augmentation import Augmentation, padding_for
from unbackdoor.data.named import load_dataset
from unbackdoor.files import write
from unbackdoor.inference import Precision, autocast, uses_bf16
from unbackdoor.models import zoo
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Samples
from victim_runs import markdown, show

BATCH = 128
#: Rows and columns of the matrices whose product shows the machine's peak.
PEAK_SIZE = 4096
#: Synthetic images: as many as the fastest contestant needs in a turn.
SYNTHETIC = 50_000


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and the data that it is timed on."""

    network: Callable[[], nn.Module]
    dataset: str
    shape: tuple[int, int, int]
    augment: Augmentation


CASES = {
    "cnn, 28×28": Case(network=zoo.cnn, dataset="mnist", shape=(1, 28, 28), augment="crop"),
    "preact_resnet18 at width 16, 32×32": Case(
        network=lambda: zoo.preact_resnet18(width=16), dataset="cifar10", shape=(3, 32, 32), augment="crop-flip"
    ),
    "preact_resnet18 at width 64, 32×32": Case(
        network=zoo.preact_resnet18, dataset="cifar10", shape=(3, 32, 32), augment="crop-flip"
    ),
}


class Normalised(nn.Module):
    """(x − 0.5) / 0.25 before the network, as the other loop's transform does it before the batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network((x - 0.5) / 0.25)
        return out


# The other loop


class PerSample(Dataset[tuple[Tensor, int]]):
    """One PIL image at a time: pad, crop, flip, to tensor, normalise."""

    def __init__(self, data: Samples, augment: Augmentation) -> None:
        self.images: NDArray[np.uint8] = data.inputs.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.tolist()
        self.flip = augment == "crop-flip"
        self.padding = padding_for(data.image_shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images[index]
        height, width, channels = pixels.shape
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        image = ImageOps.expand(image, border=self.padding, fill=0)
        left, top = torch.randint(0, 2 * self.padding + 1, (2,)).tolist()
        image = image.crop((left, top, left + width, top + height))
        if self.flip and torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = np.array(image, copy=True).reshape(height, width, channels)
        tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)
        return (tensor - 0.5) / 0.25, self.labels[index]


class PlainLoop:
    """Trains on the first ``count`` samples for one epoch per call. Workers, where there are any, stay alive."""

    def __init__(self, network: nn.Module, data: Samples, case: Case, workers: int) -> None:
        self.network, self.data, self.case, self.workers = copy.deepcopy(network), data, case, workers
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.loader: DataLoader[tuple[Tensor, int]] | None = None

    def prepare(self, count: int) -> None:
        subset = PerSample(self.data.select(torch.arange(count)), self.case.augment)
        self.loader = DataLoader(
            subset, BATCH, shuffle=True, num_workers=self.workers, persistent_workers=self.workers > 0
        )

    def __call__(self) -> None:
        assert self.loader is not None
        self.network.train()
        for x, y in self.loader:
            self.optimizer.zero_grad()
            F.cross_entropy(self.network(x), y).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()


class Ours:
    """One epoch of fit() on the first ``count`` samples per call."""

    def __init__(self, network: nn.Module, data: Samples, case: Case, precision: Precision) -> None:
        self.network, self.data = Normalised(copy.deepcopy(network)), data
        self.recipe = Recipe(
            epochs=1, batch_size=BATCH, lr=0.01, weight_decay=5e-4, augment=case.augment, precision=precision
        )

    def prepare(self, count: int) -> None:
        self.part = self.data.select(torch.arange(count))

    def __call__(self) -> None:
        fit(self.network, self.part, self.recipe, Rng(0))


class BarePasses:
    """Forward and back on one batch that lies ready, as fit() lays it out; no optimiser moves the weights."""

    def __init__(self, network: nn.Module, case: Case) -> None:
        self.network = Normalised(copy.deepcopy(network)).train()
        generator = Rng(0).stream("bare")
        x = torch.rand((BATCH, *case.shape), generator=generator)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(0, 10, (BATCH,), generator=generator)

    def prepare(self, count: int) -> None:
        self.passes = count // BATCH

    def __call__(self) -> None:
        for _ in range(self.passes):
            self.once()

    def once(self) -> None:
        self.network.zero_grad()
        with autocast("auto", self.x.device):
            loss = F.cross_entropy(self.network(self.x).float(), self.y)
        loss.backward()  # type: ignore[no-untyped-call]

    def flops_per_image(self) -> float:
        """Of a pass forward and back; a multiplication and its addition are two."""
        with FlopCounterMode(display=False) as counter:
            self.once()
        return float(counter.get_total_flops()) / BATCH


# Timing


def peak_flops(seconds: float) -> float:
    """Operations a second of large matrix products in fit()'s own precision: the best of several."""
    dtype = torch.bfloat16 if uses_bf16("auto", torch.device("cpu")) else torch.float32
    a = torch.rand(PEAK_SIZE, PEAK_SIZE, generator=Rng(0).stream("peak")).to(dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        best = min(best, seconds_of(lambda: torch.mm(a, a)))
    return 2 * PEAK_SIZE**3 / best


def seconds_of(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(case: Case, data: Samples, seconds: float, repeats: int) -> dict[str, Any]:
    """Rates (images/s, one a round) of every contestant, and fit()'s ratios to the others."""
    with isolated(Rng(0)):
        network = case.network()
    bare = BarePasses(network, case)
    contestants: dict[str, PlainLoop | Ours | BarePasses] = {
        "fit": Ours(network, data, case, "auto"),
        "fit, float32": Ours(network, data, case, "fp32"),
        "plain, no workers": PlainLoop(network, data, case, 0),
        "plain, 2 workers": PlainLoop(network, data, case, 2),
        "bare passes": bare,
    }
    counts = {}
    for name, contestant in contestants.items():
        contestant.prepare(4 * BATCH)
        contestant()
        rate = 4 * BATCH / seconds_of(contestant)
        counts[name] = min(len(data), max(2, round(rate * seconds / BATCH)) * BATCH)
        contestant.prepare(counts[name])
        contestant()
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(repeats):
        for name in order:
            rates[name].append(counts[name] / seconds_of(contestants[name]))
        order = [*order[1:], order[0]]
    ratios = {
        f"{ours} / {other}": [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
        for ours in ("fit", "fit, float32")
        for other in ("plain, no workers", "plain, 2 workers")
    }
    ratios["fit / bare passes"] = [a / b for a, b in zip(rates["fit"], rates["bare passes"], strict=True)]
    return {
        "images": counts,
        "images_per_second": rates,
        "ratios": ratios,
        "flops_per_image": bare.flops_per_image(),
    }


def samples_for(case: Case, root: Path | None) -> Samples:
    if root is not None:
        return load_dataset(case.dataset, "train", root)
    generator = Rng(0).stream("synthetic", case.dataset)
    inputs = torch.randint(0, 256, (SYNTHETIC, *case.shape), generator=generator, dtype=torch.uint8)
    return Samples(inputs, torch.randint(0, 10, (SYNTHETIC,), generator=generator), 10)


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):10,.2f}   {min(values):,.2f} .. {max(values):,.2f}"


HEADS = (
    "network",
    "fit, images/s",
    "of bare passes",
    "of the peak",
    "plain loop, no workers",
    "ratio",
    "ratio to 2 workers",
    "float32 alone",
)


def tables(records: Path) -> dict[str, str]:
    content = json.loads((records / "fit_speed.json").read_text(encoding="utf-8"))
    peak = content["peak_flops"]
    rows = []
    for name, case in content["cases"].items():
        rates, ratios = (
            {of: statistics.median(values) for of, values in case[which].items()}
            for which in ("images_per_second", "ratios")
        )
        shares = (ratios["fit / bare passes"], rates["fit"] * case["flops_per_image"] / peak)
        times = ("fit / plain, no workers", "fit / plain, 2 workers", "fit, float32 / plain, no workers")
        rows.append(
            [
                name,
                f"{rates['fit']:,.0f}",
                *(f"{100 * share:.0f} %" for share in shares),
                f"{rates['plain, no workers']:,.0f}",
                *(f"{ratios[ratio]:.2f}×" for ratio in times),
            ]
        )
    kind = "bfloat16" if content["bfloat16"] else "float32"
    rounds = len(next(iter(content["cases"].values()))["ratios"]["fit / bare passes"])
    about = (
        f"{content['threads']} threads, batches of {content['batch_size']}, medians of {rounds} rounds. The machine's "
        f"peak is {peak / 1e12:.2f} TFLOP/s, in products of {PEAK_SIZE}×{PEAK_SIZE} matrices in {kind}."
    )
    return {"fit-speed": f"{about}\n\n{markdown(HEADS, rows)}"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="folder with mnist.npz and cifar10.npz; synthetic images without")
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long a turn takes (default 8)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; can be repeated")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, for every contestant (default 2)")
    parser.add_argument("--out", type=Path, help="also write every single figure here, as JSON")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="measure nothing: put the committed figures' table into a page"
    )
    given = parser.parse_args(arguments)
    if given.write is not None:
        show(tables(Path(__file__).parent / "records"), given.write)
        return
    if given.seconds <= 0 or given.repeats < 1 or given.threads < 1:
        parser.error("--seconds must be above 0, --repeats and --threads at least 1")
    torch.set_num_threads(given.threads)
    about = {
        "threads": given.threads,
        "batch_size": BATCH,
        "data": "synthetic" if given.data is None else "real",
        "bfloat16": uses_bf16("auto", torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "peak_flops": peak_flops(given.seconds),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = {}
    for name in given.case or CASES:
        case = CASES[name]
        results[name] = compare(case, samples_for(case, given.data), given.seconds, given.repeats)
        print(f"\n{name}")
        for contestant, rates in results[name]["images_per_second"].items():
            print(f"  {contestant:40} {summary(rates)} images/s")
        for ratio, values in results[name]["ratios"].items():
            print(f"  {ratio:40} {summary(values)} ×")
        if given.out is not None:
            text = json.dumps({**about, "cases": results}, indent=2, ensure_ascii=False)
            write(given.out, f"{text}\n".encode(), force=True)


if __name__ == "__main__":
    main(sys.argv[1:])
