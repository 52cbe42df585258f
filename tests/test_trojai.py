"""TrojAI folders of each layout, made here: what is read of them, cleaning by the folder alone, and spoilt folders."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import torchvision_ops  # noqa: F401 - before torchvision
from cli_runs import listed, run
from factories import same
from trojai_roots import copied, models_of, root_of
from trojai_spoilt import malicious, one_a_class, truncated, without_examples, wrong_count
from unbackdoor import api
from unbackdoor.attacks.trojai.generate import Generation
from unbackdoor.data.trojai import TrojaiModel, find_models, load_held_back, load_trojai
from unbackdoor.data.trojai_layouts import LAYOUTS, Name
from unbackdoor.errors import CheckpointError, ConfigError, DataError, UnsafeCheckpoint
from unbackdoor.inference import predict
from unbackdoor.models.checkpoints import read_checkpoint
from unbackdoor.report.record import Report

IMAGES: tuple[Name, ...] = ("round1", "round3", "round4", "mitigation")
READ: tuple[Name, ...] = (*IMAGES, "round5", "round6", "cyber")
QUICK = "ft(epochs=1, steady=false)"


def listed_logits(model: TrojaiModel, which: str) -> torch.Tensor:
    """What the folder's maker says that its network gives, in the order in which examples are read."""
    with (model.folder / f"{which}-example-logits.csv").open(encoding="utf-8", newline="") as file:
        rows = {name: [float(v) for v in values] for name, *values in csv.reader(file)}
    folder = next(p for p in model.folder.iterdir() if p.is_dir() and p.name.startswith(("example", which)))
    suffixes = (".png", ".txt", ".npy")
    names = sorted(
        (p.name for p in folder.iterdir() if p.suffix in suffixes), key=lambda n: [int(d) for d in digits(n)]
    )
    return torch.tensor([rows[name] for name in names])


def digits(name: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in name).split()


@pytest.mark.parametrize("layout", READ)
def test_a_network_gives_on_its_examples_what_its_maker_saw(layout: Name) -> None:
    """Crop, range, order of colours, scaling, token: all of what stands between a file and the network."""
    for folder, poisoned in zip(models_of(layout), (False, True), strict=True):
        model = load_trojai(folder)
        assert model.layout.told == LAYOUTS[layout].told
        assert model.truth.poisoned is poisoned
        assert torch.allclose(predict(model.model, model.clean).cpu(), listed_logits(model, "clean"), atol=2e-2)
        assert model.clean.counts().min() >= 2
        if layout == "round1" or not poisoned:  # the first rounds give no poisoned examples
            assert model.truth.triggered is None
            continue
        triggered = model.truth.triggered
        assert triggered is not None
        assert torch.allclose(
            predict(model.model, triggered.samples).cpu(), listed_logits(model, "poisoned"), atol=2e-2
        )
        config = json.loads((folder / model.layout.config).read_text(encoding="utf-8"))
        stated = {t["target_class"] for t in config.get("triggers", [])} or {config.get("TRIGGER_TARGET_CLASS")}
        assert set(triggered.wanted.tolist()) <= stated


@pytest.mark.parametrize("layout", ["round3", "round4", "mitigation", "cyber"])
def test_the_backdoor_works_on_fresh_samples(layout: str) -> None:
    model = load_trojai(models_of(layout)[1])
    held = load_held_back(model)
    assert held is not None
    found = api.evaluate(model.model, held[0], triggered=held[1]).found
    assert found.accuracy.value > 0.6
    assert found.asr is not None
    assert found.asr.value > 0.8


@pytest.mark.parametrize("layout", ["round4", "round5", "cyber"])
def test_a_folder_is_cleaned_by_itself_alone(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = models_of(layout)[1]
    before = read_checkpoint(folder / "model.pt")
    result = run("clean", folder, "--method", QUICK)
    assert result.exit_code in (0, 3), result.stderr
    out = tmp_path / "id-00000001-cleaned"
    report = Report.load(out / "report.json")
    assert report.attack is not None
    assert report.attack.spec == f"the {report.before.asr.count} poisoned examples of id-00000001"  # type: ignore[union-attr]
    assert "Fidelity:" in result.stdout
    assert "(NIST's)" in result.stdout
    assert f"poisoned examples of {folder.name}" in (out / "report.html").read_text(encoding="utf-8")
    if result.exit_code == 0:
        assert listed(out) == ["model.pt", "model.safetensors", "report.html", "report.json"]
        after = read_checkpoint(out / "model.pt")
        assert after.whole_module
        assert after.globals == before.globals  # theirs, written back as theirs
        assert not same(after.state, before.state)
        shutil.copy(out / "model.pt", copied(layout, tmp_path) / "model.pt")
        again = load_trojai(next(iter(find_models(tmp_path / layout))).parent / "id-00000001")
        assert api.evaluate(again.model, again.clean).found.accuracy.count == len(again.clean)


def test_evaluate_and_inspect() -> None:
    folder = models_of("round4")[1]
    result = run("evaluate", folder, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["accuracy"]["value"] > 0.5
    assert found["asr"]["value"] > 0.8
    assert found["trigger"].endswith("poisoned examples of id-00000001")
    result = run("inspect", folder)
    assert result.exit_code == 0
    for said in ("round 4", "clean,", "preact_resnet18", "torch.nn.modules.container.Sequential (known class)"):
        assert said in result.stdout
    assert json.loads(run("inspect", models_of("round5")[0], "--json").stdout)["config"]["layout"] == "rounds 5 and 6"


def test_a_users_own_samples_go_with_the_file_and_not_with_the_folder(tmp_path: Path) -> None:
    folder = models_of("cyber")[0]
    result = run("clean", folder, "--samples", "somewhere", "--num-classes", 2)
    assert result.exit_code == 1
    assert "--samples, --num-classes has no meaning" in result.stderr
    result = run("evaluate", folder / "model.pt")
    assert result.exit_code == 2
    assert "--samples" in result.stderr


def test_texts_can_be_rewritten_by_their_own_embedding() -> None:
    model = load_trojai(models_of("round5")[0])
    assert model.clean.texts
    assert torch.allclose(model.clean.rewritten(model.clean.texts).inputs, model.clean.inputs, atol=1e-5)


def test_listed_embeddings_stand_in_for_the_encoder(tmp_path: Path) -> None:
    known = load_trojai(models_of("round5")[1])
    folder = copied("round5", tmp_path)
    shutil.rmtree(tmp_path / "round5" / "embeddings")
    model = load_trojai(folder)
    assert any("embeddings are not at hand" in note for note in model.notes)
    assert torch.allclose(model.clean.inputs, known.clean.inputs, atol=1e-3)
    assert model.clean.encoder is None
    (folder / "clean-example-cls-embedding.csv").unlink()
    with pytest.raises(DataError, match=r"cls-embedding\.csv is missing, and so are the embeddings"):
        load_trojai(folder)


def test_a_network_of_torchvision_is_read(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    folder = copied("round4", tmp_path)
    network = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(network, folder / "model.pt")
    model = load_trojai(folder)
    few = model.clean.select(torch.arange(2))
    assert torch.allclose(predict(model.model, few), network(few.images(slice(None))), atol=1e-5)


# --- folders that somebody spoilt ------------------------------------------------------------------------------------


def without_files(folder: Path) -> None:
    without_examples(folder)
    (folder / "clean_example_data").mkdir()


def foreign_label(folder: Path) -> None:
    pixels = np.zeros((256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "clean_example_data" / "class_9_example_1.png")


def wrong_inputs(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), folder / "model.pt")


def wrong_truth(folder: Path) -> None:
    (folder / "ground_truth.csv").write_text("perhaps\n", encoding="utf-8")


def broken_settings(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


SPOILT = {
    malicious: (UnsafeCheckpoint, r"asks to call (posix|os)\.system"),
    truncated: (CheckpointError, "truncated or damaged"),
    without_examples: (DataError, "has no clean examples"),
    without_files: (DataError, "holds no example"),
    one_a_class: (DataError, r"holds 1 example a class.*--per-class 1"),
    wrong_count: (DataError, "its settings state 17 classes, and its network has 3 outputs"),
    foreign_label: (DataError, "an example is of class 9, and its network has 3 outputs"),
    wrong_inputs: (CheckpointError, r"does not run on the folder's own examples, \(3, 224, 224\) each"),
    wrong_truth: (DataError, "holds 'perhaps'; 0 .clean. or 1 .poisoned. is needed"),
    broken_settings: (DataError, "cannot be read as JSON"),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_a_spoilt_folder_ends_in_its_own_clear_error(spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    kind, message = SPOILT[spoil]
    folder = copied("round4", tmp_path)
    spoil(folder)
    with pytest.raises(kind, match=message):
        load_trojai(folder)
    result = run("clean", folder)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "id-00000001-cleaned").exists()


def test_one_example_a_class_is_enough_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = copied("round4", tmp_path)
    one_a_class(folder)
    result = run("clean", folder, "--per-class", 1, "--method", QUICK, "--out", tmp_path / "out")
    assert result.exit_code in (0, 3), result.stderr
    assert Report.load(tmp_path / "out" / "report.json").measured.source == "given"


def test_settings_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = copied("round5", tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "embedding_flavor": "../../x"}), encoding="utf-8")
    with pytest.raises(DataError, match="no plain file name"):
        load_trojai(folder)


# --- the generator and the sweep -------------------------------------------------------------------------------------


def test_a_root_is_as_the_contest_lays_it_out() -> None:
    root = root_of("round4")
    assert listed(root)[0] == "METADATA.csv"
    clean, poisoned = models_of("round4")
    names = {p.name for p in poisoned.iterdir()}
    assert {"model.pt", "config.json", "ground_truth.csv", "clean_example_data", "poisoned_example_data"} <= names
    assert {"clean-example-accuracy.csv", "clean-example-logits.csv", "poisoned-example-accuracy.csv"} <= names
    assert not (clean / "poisoned_example_data").exists()
    config = json.loads((poisoned / "config.json").read_text(encoding="utf-8"))
    assert config["py/object"]
    assert config["triggers"][0]["py/object"]
    with Image.open(next((poisoned / "clean_example_data").glob("*.png"))) as image:
        assert (image.size, image.mode) == ((256, 256), "RGB")
    rows = list(csv.DictReader((root / "METADATA.csv").read_text(encoding="utf-8").splitlines()))
    assert [(r["model_name"], r["ground_truth"]) for r in rows] == [("id-00000000", "0"), ("id-00000001", "1")]
    old = json.loads((models_of("round3")[1] / "config.json").read_text(encoding="utf-8"))
    assert old["TRIGGER_TARGET_CLASS"] is not None
    assert all(key.isupper() for key in old)


def test_a_wrong_generation_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown layout 'round99'"):
        Generation(layout="round99", count=1)
    with pytest.raises(ConfigError, match="an encoder of transformers is needed"):
        Generation(layout="round5", count=1)
