"""``unbackdoor evaluate`` and ``inspect``: what they measure and show, and the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli_runs import as_folder, as_npz, colours, run
from unbackdoor.models.zoo import cnn, preact_resnet18
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import Recipe, fit


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    with isolated(Rng(0)):
        network = cnn(num_classes=4, in_channels=3, image_size=8, width=4)
    fit(network, colours(64, size=8), Recipe(epochs=40, batch_size=16, optimizer="adam", lr=5e-3), Rng(0))
    torch.save(network.state_dict(), folder / "small.pt")
    as_npz(colours(60, size=8, seed=1), folder / "clean.npz")
    return folder


def _network(path: Path) -> torch.nn.Module:
    network = cnn(num_classes=4, in_channels=3, image_size=8, width=4)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def test_the_figures_are_those_of_a_plain_forward_pass(small: Path) -> None:
    result = run(
        *("evaluate", small / "small.pt", "--samples", small / "clean.npz", "--normalize", "0-1", "--json"),
        *("--trigger", "badnets(size=4, target=2)"),
    )
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    samples = colours(60, size=8, seed=1)
    network, x = _network(small / "small.pt"), samples.inputs / 255
    answers = network(x).argmax(1)
    assert found["accuracy"]["value"] == pytest.approx((answers == samples.labels).double().mean().item())
    stamped = x.clone()
    stamped[:, :, 4:, 4:] = 1
    others = samples.labels != 2
    asr = (network(stamped).argmax(1)[others] == 2).double().mean().item()
    assert found["asr"]["value"] == pytest.approx(asr)
    assert found["asr"]["count"] == int(others.sum())
    assert found["trigger"] == "badnets(target=2, size=4)"
    assert found["model"]["architecture"] == "cnn(width=4)"
    assert len(found["per_class"]) == 4
    assert found["flags"] == []


def test_the_table_says_the_same(small: Path) -> None:
    arguments = ("evaluate", small / "small.pt", "--samples", small / "clean.npz", "--normalize", "0-1")
    found = json.loads(run(*arguments, "--json").stdout)
    result = run(*arguments)
    assert result.exit_code == 0
    assert f"{found['accuracy']['value']:.1%}" in result.stdout
    assert "No trigger is known" in result.stdout


def test_class_names_come_from_the_folders_or_the_file_of_classes(small: Path, tmp_path: Path) -> None:
    samples = colours(24, size=8, seed=2)
    folder = as_folder(samples, tmp_path / "pictures")
    for number, name in enumerate(("red", "green", "blue", "yellow")):
        (folder / str(number)).rename(folder / name)
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\nyellow\n")
    arguments = ("evaluate", small / "small.pt", "--samples", folder, "--normalize", "0-1", "--json")
    named = json.loads(run(*arguments, "--classes", tmp_path / "classes.txt").stdout)
    assert named["class_names"] == ["red", "green", "blue", "yellow"]
    assert named["accuracy"]["value"] > 0.9
    # In the order of the alphabet, the colours are not the network's classes: the figures say so, and no error does.
    sorted_names = run(*arguments)
    assert sorted_names.exit_code == 0
    assert json.loads(sorted_names.stdout)["accuracy"]["value"] <= 0.5


def test_a_class_without_samples_needs_the_networks_order(small: Path, tmp_path: Path) -> None:
    samples = colours(24, size=8, seed=2)
    three = samples.select(samples.labels < 3)
    folder = as_folder(three, tmp_path / "numbers")  # folders 0, 1 and 2 tell which classes they are
    found = json.loads(run("evaluate", small / "small.pt", "--samples", folder, "--json").stdout)
    assert found["per_class"][3] is None
    assert [flag["name"] for flag in found["flags"]] == ["held_out_too_small", "missing_classes"][
        -len(found["flags"]) :
    ]
    for number, name in enumerate(("red", "green", "blue")):
        (folder / str(number)).rename(folder / name)
    result = run("evaluate", small / "small.pt", "--samples", folder)
    assert result.exit_code == 1
    assert "3 class folders for 4 classes" in result.stderr


def test_a_network_at_chance_is_evaluated_and_flagged(tmp_path: Path) -> None:
    torch.save(cnn(num_classes=4, in_channels=3, image_size=8, width=2).state_dict(), tmp_path / "untrained.pt")
    as_npz(colours(80, size=8), tmp_path / "clean.npz")
    result = run("evaluate", tmp_path / "untrained.pt", "--samples", tmp_path / "clean.npz", "--normalize", "0-1")
    assert result.exit_code == 0
    assert "warning: accuracy at chance" in result.stderr


def test_inspect_tells_what_is_in_the_file(small: Path) -> None:
    result = run("inspect", small / "small.pt")
    assert result.exit_code == 0
    for part in ("torch-zip", "weights alone", "cnn(width=4)", "features.0.weight", "4×3×3×3", "float32"):
        assert part in result.stdout
    found = json.loads(run("inspect", small / "small.pt", "--json").stdout)
    assert found["architecture"]["spec"] == "cnn(width=4)"
    assert found["num_classes"] == 4


def test_inspect_shows_the_first_and_last_of_many_tensors(tmp_path: Path) -> None:
    state = preact_resnet18(width=2).state_dict()
    torch.save(state, tmp_path / "deep.pt")
    short, long = run("inspect", tmp_path / "deep.pt").stdout, run("inspect", tmp_path / "deep.pt", "--all").stdout
    names = list(state)
    assert names[0] in short
    assert names[-1] in short
    assert "--all lists them" in short
    shown = sum(f"\n{name} " in short for name in names)
    assert f"… {len(names) - shown} more" in short
    assert all(f"\n{name} " in long for name in names)
