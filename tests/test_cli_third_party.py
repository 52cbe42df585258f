"""Public checkpoints that others trained go through ``inspect``, ``evaluate`` and ``clean`` with their own networks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import third_party_networks
from cli_runs import run
from unbackdoor.report import Report


@dataclass(frozen=True)
class Public:
    """A checkpoint, the class of its network here, and what is known of it."""

    file: str
    network: str
    data: str
    trigger: str | None
    formats: tuple[str, ...]
    inspected: str


PUBLIC = [
    Public(
        file="ibau_cifar10_badnets.pth",
        network="IBAUNet",
        data="cifar10",
        trigger="badnets(size=4, margin=1, target=8)",
        formats=("0-1",),
        inspected="torch-",
    ),
    Public(
        file="verazuo_mnist_badnets.pth",
        network="BadNetsMNIST",
        data="mnist",
        trigger="badnets(size=5, target=1)",
        formats=("pm1", "mnist"),
        inspected="torch-",
    ),
    Public(
        file="akamaster_cifar10_resnet20_clean.th",
        network="ResNet20",
        data="cifar10",
        trigger=None,
        formats=("imagenet", "cifar10", "cifar100"),
        inspected="ResNet-20 for small images",
    ),
]


@pytest.fixture(scope="module")
def few(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """300 test images of each data set, as .npz files."""
    folder = tmp_path_factory.mktemp("few")
    from unbackdoor.data.named import load_dataset

    made = {}
    for name in ("mnist", "cifar10"):
        if not (data_root / f"{name}.npz").exists():
            pytest.skip(f"{name}.npz is not under UNBACKDOOR_DATA")
        samples = load_dataset(name, "test", data_root).select(torch.arange(300))
        made[name] = folder / f"{name}.npz"
        np.savez(made[name], x=samples.inputs.permute(0, 2, 3, 1).numpy(), y=samples.labels.numpy())
    return made


@pytest.mark.parametrize("public", PUBLIC, ids=lambda p: p.network)
def test_inspect_evaluate_clean(
    public: Public, data_root: Path, few: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = data_root / "third_party" / public.file
    if not file.exists():
        pytest.skip(f"{file.name} is not under UNBACKDOOR_DATA")
    monkeypatch.chdir(tmp_path)
    assert public.inspected in run("inspect", file).stdout

    own = ["--arch", f"{third_party_networks.__file__}:{public.network}"]
    own += ["--trigger", public.trigger] if public.trigger else []
    result = run("evaluate", file, "--samples", few[public.data], *own, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["accuracy"]["value"] > 0.8
    assert found["model"]["input_format"] in public.formats
    assert (found["asr"] is None) == (public.trigger is None)
    assert public.trigger is None or found["asr"]["value"] > 0.9

    result = run(
        *("clean", file, "--samples", few[public.data], *own, "--per-class", 8, "--out", "out"),
        *("--method", "ft(epochs=1, steady=false, lr=0.001)"),
    )
    assert result.exit_code == 0, result.stderr
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.after.accuracy.value > 0.7
    # The owner's code loads what came out: a network built from its class takes the new weights under the old names.
    old, new = (_state(path) for path in (file, tmp_path / "out" / file.name))
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    network = getattr(third_party_networks, public.network)()
    network.load_state_dict({name.removeprefix("module."): value for name, value in new.items()})


def _state(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True, map_location="cpu")
    for key in ("state_dict", "net"):
        content = content.get(key, content)
    return content
