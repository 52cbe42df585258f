"""What goes wrong is said once, on stderr, without a traceback, and told by the exit code."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import unbackdoor
from cli_runs import as_folder, as_npz, colours, control_characters, listed, run
from unbackdoor import progress
from unbackdoor.cli.terminal import Terminal, plain
from unbackdoor.models.zoo import cnn
from unbackdoor.types import Samples


class Payload:
    """What a malicious checkpoint holds: unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.save(cnn(num_classes=4, in_channels=3, image_size=8, width=2).state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return as_npz(colours(40, size=8), tmp_path / "clean.npz")


def _refused(*arguments: object) -> str:
    """The one message of a command that fails."""
    before = listed(Path())
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert listed(Path()) == before
    return result.stderr


@pytest.mark.parametrize("command", ["clean", "evaluate"])
def test_a_malicious_pickle_does_not_run_and_the_error_says_what_it_held(
    command: str, tmp_path: Path, samples: Path
) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save({"state_dict": state, "extra": Payload(tmp_path / "owned")}, tmp_path / "bad.pt")
    message = _refused(command, "bad.pt", "--samples", samples)
    assert f"{os.system.__module__}.system" in message
    assert "touch" in message
    assert not (tmp_path / "owned").exists()


def test_inspect_shows_a_malicious_pickle_without_running_it(tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Linear(3, 2).state_dict(), "x": Payload(tmp_path / "owned")}, tmp_path / "bad.pt")
    result = run("inspect", "bad.pt")
    assert result.exit_code == 0
    assert "DANGEROUS" in result.stdout
    assert f"{os.system.__module__}.system" in result.stdout
    assert not (tmp_path / "owned").exists()


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b[2J\x1b]0;owned\x07[bold]w.weight": torch.ones(2, 3)}, tmp_path / "esc.pt")
    result = run("inspect", "esc.pt")
    assert control_characters(result.stdout) == set()
    assert r"\x1b[2J\x1b]0;owned\x07[bold]w.weight" in result.stdout
    assert plain("a\x1bb\n\u202ec é…") == "a\\x1bb\n\\u202ec é…"


def test_wrong_models(tmp_path: Path, samples: Path, network: Path) -> None:
    assert "nowhere.pt does not exist" in _refused("clean", "nowhere.pt", "--samples", samples)
    (tmp_path / "folder").mkdir()
    assert "victim.json" in _refused("evaluate", "folder", "--samples", samples)
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in _refused("inspect", "text.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert "plain.pkl" in _refused("clean", "plain.pkl", "--samples", samples)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "linear.pt")
    assert "--arch" in _refused("clean", "linear.pt", "--samples", samples)
    wrong = _refused("clean", network, "--samples", samples, "--arch", "vgg11_bn")
    assert "missing in the file" in wrong
    assert "did you mean" in _refused("clean", network, "--samples", samples, "--arch", "preact_resnet")


def test_wrong_samples(tmp_path: Path, network: Path) -> None:
    good = colours(12, size=8)
    assert "does not exist" in _refused("clean", network, "--samples", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in _refused("clean", network, "--samples", "empty")
    one = Samples(good.inputs, torch.zeros_like(good.labels), 4)
    as_npz(one, tmp_path / "one.npz")
    assert "all 12 samples are of one class" in _refused("clean", network, "--samples", "one.npz")
    as_folder(good, tmp_path / "broken")
    (tmp_path / "broken" / "1" / "broken.png").write_bytes(b"\x89PNG and nothing more")
    assert "broken.png" in _refused("clean", network, "--samples", "broken")
    np.savez(tmp_path / "range.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.array([0, 1, 2, -1]))
    assert "-1" in _refused("clean", network, "--samples", "range.npz")
    assert "another one" in _refused("clean", network, "--samples", "broken", "--test", "broken")


def test_a_damaged_picture_can_be_left_out(tmp_path: Path, network: Path) -> None:
    as_folder(colours(12, size=8), tmp_path / "broken")
    (tmp_path / "broken" / "1" / "broken.png").write_bytes(b"\x89PNG and nothing more")
    result = run("evaluate", network, "--samples", "broken", "--on-corrupt", "skip")
    assert result.exit_code == 0
    assert "1 damaged and left out" in result.stderr


def test_wrong_options(network: Path, samples: Path, tmp_path: Path) -> None:
    arguments = ("clean", network, "--samples", samples)
    assert "did you mean 'seam'" in _refused(*arguments, "--method", "seem")
    assert "no field 'epoch'" in _refused(*arguments, "--method", "ft(epoch=3)")
    assert "unknown attack" in _refused(*arguments, "--trigger", "badnet5")
    assert "unknown input format" in _refused(*arguments, "--normalize", "imagenot")
    assert "--held-out must lie between 0 and 1" in _refused(*arguments, "--held-out", 1.5)
    assert "(4,) in the file, (10,) in the network" in _refused(*arguments, "--num-classes", 10)
    (tmp_path / "file").write_text("")
    assert "is a file" in _refused(*arguments, "--out", "file")
    if not torch.cuda.is_available():
        assert "no CUDA device" in _refused(*arguments, "--device", "cuda")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_to_is_said_before_the_work(
    network: Path, samples: Path, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in _refused("clean", network, "--samples", samples, "--out", "locked/out")


@pytest.mark.parametrize(
    "arguments",
    [
        ["clean"],
        ["clean", "net.pt"],
        ["clean", "net.pt", "--samples", "x", "--device", "tpu"],
        ["clean", "net.pt", "--samples", "x", "--seed", "-1"],
        ["attack"],
        ["attack", "badnets", "--clean"],
        ["list", "everything"],
        ["cleanse"],
        ["evaluate", "net.pt", "--samples", "x", "--forcibly"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("unbackdoor ")
    for command in ("clean", "evaluate", "inspect", "attack", "list", "demo"):
        assert run(command, "-h").exit_code == 0
        assert command in run("--help").stdout


def _process(
    *arguments: str, code: str = "from unbackdoor.cli import main; main()"
) -> subprocess.CompletedProcess[str]:
    hidden = {"FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TTY_COMPATIBLE", "COLUMNS"}
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env["PYTHONPATH"] = str(Path(unbackdoor.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize("arguments", [["--help"], ["clean", "--help"], ["demo", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = """
import sys
from unbackdoor.cli import main
try:
    main()
finally:
    print(sorted(m for m in ("torch", "numpy", "PIL", "matplotlib", "sklearn") if m in sys.modules), file=sys.stderr)
"""
    done = _process(*arguments, code=code)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert control_characters(done.stdout) == set()


def test_a_pipe_gets_no_control_characters_and_no_progress(tmp_path: Path) -> None:
    assert run("attack", "badnets(size=2)", "--epochs", "3", "--out", "v").exit_code == 0
    done = _process("clean", "v", "--samples", "digits", "--per-class", "5", "--method", "ft(epochs=1)")
    assert done.returncode == 0
    for text in (done.stdout, done.stderr):
        assert control_characters(text) == set()
    assert "v-cleaned/report.html" in done.stdout
    assert "fine-tune" not in done.stderr


def test_progress_goes_to_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for terminal, quiet, shown in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")  # rich's word for "this is a terminal"
        made = Terminal(quiet=quiet)
        with made.progress(), progress.task("forget\x1b[2J", 2) as bar:
            bar.advance("loss [bold]1[/bold]")
            bar.advance()
            made.say("a result")
        results, written = capfd.readouterr()
        # Where both are one screen, results go through the console that draws the bars.
        assert ("a result" in written, "a result" in results) == (shown, not shown and not quiet)
        assert ("forget" in written) == shown
        assert "\x1b[2J" not in written
        assert (written != "") == shown


def test_a_full_memory_is_told_in_one_line(network: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr("unbackdoor.evaluation.assessment.predict", full)
    result = run("evaluate", network, "--samples", samples, "--arch", "cnn(width=2)")
    assert result.exit_code == 1
    assert "error: the device's memory is full" in result.stderr
    assert "or --device cpu: Tried to allocate 2.00 GiB" in result.stderr
    assert "Traceback" not in result.output
