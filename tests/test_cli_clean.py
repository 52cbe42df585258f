"""``unbackdoor clean`` on checkpoints that plain PyTorch made, and on victims of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

import cli_runs
from cli_runs import as_folder, as_npz, colours, listed, misbehaving, run  # noqa: F401 - a fixture
from unbackdoor.errors import CheckpointError
from unbackdoor.models.zoo import cnn
from unbackdoor.report import Report
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Samples

ARCH = "torchvision:shufflenet_v2_x0_5"
QUICK = "ft(epochs=1, steady=false)"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def shufflenet() -> nn.Module:
    """A network of torchvision that knows four colours."""
    with isolated(Rng(0)):
        network = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.5  # so that a few steps settle its statistics
    fit(network, colours(64), Recipe(epochs=4, batch_size=16, optimizer="adam", lr=2e-3), Rng(0))
    return network.eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_folder(colours(40, seed=1), tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state dict of a little network of the zoo that knows four colours at 8 pixels, and an .npz beside it."""
    folder = tmp_path_factory.mktemp("small")
    with isolated(Rng(0)):
        network = cnn(num_classes=4, in_channels=3, image_size=8, width=4)
    fit(network, colours(64, size=8), Recipe(epochs=40, batch_size=16, optimizer="adam", lr=5e-3), Rng(0))
    torch.save(network.state_dict(), folder / "small.pt")
    as_npz(colours(60, size=8, seed=1), folder / "clean.npz")
    return folder


def _saved(network: nn.Module, how: str, folder: Path) -> Path:
    path = folder / ("net.safetensors" if how == "safetensors" else "net.pth")
    match how:
        case "state dict":
            torch.save(network.state_dict(), path)
        case "wrapped dict":
            state = {f"module.{name}": value for name, value in network.state_dict().items()}
            torch.save({"epoch": 7, "state_dict": state, "best_acc": 0.9}, path)
        case "whole module":
            torch.save(network, path)
        case "safetensors":
            safetensors.torch.save_file(network.state_dict(), path)
    return path


def _loaded(path: Path, how: str) -> dict[str, Tensor]:
    """The state dict, by plain PyTorch alone, as the owner of such a file would load it."""
    if how == "safetensors":
        return safetensors.torch.load_file(path)
    content: Any = torch.load(path, weights_only=how != "whole module")
    if how == "whole module":
        assert isinstance(content, torchvision.models.ShuffleNetV2)
        return content.state_dict()
    if how == "wrapped dict":
        assert (content["epoch"], content["best_acc"]) == (7, 0.9)
        return {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    return content


def _accuracy(state: dict[str, Tensor], samples: Samples) -> float:
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    network.load_state_dict(state)
    answers = network.eval()(samples.images(slice(None))).argmax(1)
    return (answers == samples.labels).double().mean().item()


@pytest.mark.parametrize("how", ["state dict", "wrapped dict", "whole module", "safetensors"])
def test_a_checkpoint_made_elsewhere_is_cleaned_and_loads_back_in_plain_torch(
    how: str, shufflenet: nn.Module, pictures: Path, tmp_path: Path
) -> None:
    given = _saved(shufflenet, how, tmp_path)
    digest = given.read_bytes()
    arch = [] if how == "whole module" else ["--arch", ARCH]
    test = as_npz(colours(32, seed=2), tmp_path / "test.npz")
    result = run("clean", given, "--samples", pictures, "--test", test, *arch, "--method", QUICK, "--normalize", "0-1")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "net-cleaned"
    assert listed(out) == sorted({given.name, "model.safetensors", "report.html", "report.json"})
    state, copy = _loaded(out / given.name, how), safetensors.torch.load_file(out / "model.safetensors")
    before = shufflenet.state_dict()
    assert state.keys() == copy.keys() == before.keys()
    for name, value in state.items():
        assert torch.equal(value, copy[name])
    assert not torch.equal(state["fc.weight"], before["fc.weight"])
    report = Report.load(out / "report.json")
    assert report.after.accuracy.value == pytest.approx(_accuracy(state, colours(32, seed=2)))
    assert report.before.accuracy.value == pytest.approx(_accuracy(before, colours(32, seed=2)))
    assert report.measured.source == "test"
    assert given.read_bytes() == digest
    for place in ("net-cleaned/report.html", f"net-cleaned/{given.name}", "That a backdoor is gone is not proven"):
        assert place in result.stdout


def test_a_network_of_the_zoo_needs_no_options(small: Path, tmp_path: Path) -> None:
    result = run("clean", small / "small.pt", "--samples", small / "clean.npz", "--method", QUICK)
    assert result.exit_code == 0
    assert "the network is cnn(width=4), as its weights tell" in result.stderr
    report = Report.load(tmp_path / "small-cleaned" / "report.json")
    assert f"note: input format {report.model.input_format}, found by its accuracy of" in result.stderr
    assert report.model.name == "small.pt"
    assert report.measured.source == "held_out"
    assert any("found by its accuracy" in note for note in report.notes)
    fresh = cnn(num_classes=4, in_channels=3, image_size=8, width=4)
    fresh.load_state_dict(torch.load(tmp_path / "small-cleaned" / "small.pt", weights_only=True))


def test_pictures_are_brought_to_what_the_network_takes_and_the_notes_say_so(small: Path, tmp_path: Path) -> None:
    pictures = as_folder(colours(24, size=20, seed=3), tmp_path / "pictures")
    result = run("clean", small / "small.pt", "--samples", pictures, "--method", QUICK)
    assert result.exit_code == 0, result.stderr
    assert Report.load(tmp_path / "small-cleaned" / "report.json").samples.image_shape == (3, 8, 8)
    assert "8×8" in result.stderr


def test_the_known_trigger_is_measured_but_the_defense_never_gets_it(
    small: Path,
    tmp_path: Path,
    misbehaving: None,  # noqa: F811
) -> None:
    result = run(
        *("clean", small / "small.pt", "--samples", small / "clean.npz", "--method", "spy"),
        *("--trigger", "badnets(size=2, target=1)", "--per-class", 4),
    )
    assert result.exit_code == 0
    ((model, clean, rng),) = cli_runs.Spy.seen
    assert clean.counts().tolist() == [4, 4, 4, 4]
    assert "badnets" not in repr((model, rng)).lower()
    report = Report.load(tmp_path / "small-cleaned" / "report.json")
    assert report.attack is not None
    assert report.attack.spec == "badnets(target=1, size=2)"
    assert (report.measured.source, report.measured.count) == ("test", 60 - 16)
    assert report.verdict == "unchanged"
    assert "attack did not take" in result.stderr


def test_a_destroyed_network_gives_its_own_exit_code_and_the_report_alone(
    small: Path,
    tmp_path: Path,
    misbehaving: None,  # noqa: F811
) -> None:
    arguments = ("clean", small / "small.pt", "--samples", small / "clean.npz")
    assert run(*arguments, "--method", QUICK).exit_code == 0
    assert "small.pt" in listed(tmp_path / "small-cleaned")
    # With --force, the weights of the earlier run do not stay beside the report of a destroyed network.
    result = run(*arguments, "--method", "wreck", "--force")
    assert result.exit_code == 3
    assert listed(tmp_path / "small-cleaned") == ["report.html", "report.json"]
    assert "The network was destroyed. Do not use it." in result.stdout
    assert "weights  " not in result.stdout


def test_nothing_is_overwritten_without_force_and_that_is_said_before_any_work(
    small: Path,
    tmp_path: Path,
    misbehaving: None,  # noqa: F811
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("mine")
    (tmp_path / "out" / "other.txt").write_text("mine too")
    arguments = ("clean", small / "small.pt", "--samples", small / "clean.npz", "--method", "spy", "--out", "out")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "report.json" in result.stderr
    assert "--force" in result.stderr
    assert not cli_runs.Spy.seen
    assert listed(tmp_path) == ["out", "out/other.txt", "out/report.json"]
    assert run(*arguments, "--force").exit_code == 0
    assert len(listed(tmp_path / "out")) == 5
    assert (tmp_path / "out" / "other.txt").read_text() == "mine too"


def test_the_given_model_is_never_overwritten_not_even_with_force(small: Path) -> None:
    before = (small / "small.pt").read_bytes()
    result = run("clean", small / "small.pt", "--samples", small / "clean.npz", "--out", small, "--force")
    assert result.exit_code == 1
    assert "would overwrite" in result.stderr
    assert (small / "small.pt").read_bytes() == before


def test_an_interruption_leaves_nothing_behind(
    small: Path,
    tmp_path: Path,
    misbehaving: None,  # noqa: F811
) -> None:
    result = run("clean", small / "small.pt", "--samples", small / "clean.npz", "--method", "interrupted")
    assert result.exit_code == 130
    assert result.stderr.endswith("error: interrupted; nothing was written\n")
    assert listed(tmp_path) == []


def test_an_interruption_while_writing_leaves_nothing_behind(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unbackdoor.models.checkpoints.write_like", interrupt)
    result = run("clean", small / "small.pt", "--samples", small / "clean.npz", "--method", QUICK)
    assert result.exit_code == 130
    assert listed(tmp_path) == []


def test_weights_that_do_not_go_back_into_their_form_are_still_saved(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("a shares its memory with b")

    monkeypatch.setattr("unbackdoor.models.checkpoints.write_like", refuse)
    result = run("clean", small / "small.pt", "--samples", small / "clean.npz", "--method", QUICK)
    assert result.exit_code == 1
    assert "a shares its memory with b" in result.stderr
    assert "small-cleaned/model.safetensors alone" in " ".join(result.stderr.split())
    assert listed(tmp_path / "small-cleaned") == ["model.safetensors", "report.html", "report.json"]


def test_further_weights_in_the_file_are_warned_of(small: Path, tmp_path: Path) -> None:
    state = torch.load(small / "small.pt", weights_only=True)
    torch.save({"state_dict": state, "ema": {k: v.clone() for k, v in state.items()}}, tmp_path / "two.pt")
    result = run("clean", "two.pt", "--samples", small / "clean.npz", "--method", QUICK)
    assert result.exit_code == 0
    assert "warning: two.pt holds further weights" in result.stderr
    assert "ema" in result.stderr
    left = torch.load(tmp_path / "two-cleaned" / "two.pt", weights_only=True)["ema"]
    assert all(torch.equal(left[name], state[name]) for name in state)


def test_the_same_seed_gives_the_same_weights(small: Path, tmp_path: Path) -> None:
    arguments = ("clean", small / "small.pt", "--samples", small / "clean.npz", "--method", QUICK)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(*arguments, "--out", out, "--seed", seed).exit_code == 0
    first, again, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert first == again != other


def test_quiet_says_nothing(small: Path) -> None:
    result = run(
        "clean", small / "small.pt", "--samples", small / "clean.npz", "--method", QUICK, "--quiet", "--seed", 1
    )
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "note" not in result.stderr


def test_a_classifier_of_fewer_outputs_than_the_samples_have_classes(small: Path, tmp_path: Path) -> None:
    samples = colours(40, size=8)
    samples.labels[:5] = 6
    as_npz(Samples(samples.inputs, samples.labels, 7), tmp_path / "seven.npz")
    result = run("clean", small / "small.pt", "--samples", "seven.npz", "--method", QUICK)
    assert result.exit_code == 1
    assert "4" in result.stderr
    assert "6" in result.stderr


def test_labels_that_are_not_the_networks_are_near_chance(small: Path, tmp_path: Path) -> None:
    samples = colours(60, size=8, seed=1)
    as_npz(Samples(samples.inputs, (samples.labels + 1) % 4, 4), tmp_path / "shifted.npz")
    result = run("clean", small / "small.pt", "--samples", "shifted.npz", "--method", QUICK)
    assert result.exit_code == 1
    assert "chance" in result.stderr
    assert listed(tmp_path) == ["shifted.npz"]


def test_the_name_of_the_report_is_no_name_for_a_checkpoint(small: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((small / "small.pt").read_bytes())
    result = run("clean", "report.json", "--samples", small / "clean.npz")
    assert result.exit_code == 1
    assert "rename" in result.stderr
