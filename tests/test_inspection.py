"""What `inspect` tells of a file is in the file, and telling it runs nothing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor.errors import CheckpointError
from unbackdoor.models._guessing import count_classes, guess_architecture, read_image_size
from unbackdoor.models._pickle_tree import verdict
from unbackdoor.models.checkpoints import write_safetensors
from unbackdoor.models.inspection import inspect_checkpoint
from unbackdoor.models.zoo import ZOO, cnn, preact_resnet18, vgg11_bn, vit_tiny


def test_facts_of_a_wrapped_state(tmp_path: Path) -> None:
    network = preact_resnet18(num_classes=7, in_channels=1, width=8)
    path = tmp_path / "c.pt"
    torch.save({"epoch": 3, "acc": float("inf"), "net": nn.DataParallel(network).state_dict()}, path)
    found = inspect_checkpoint(path)
    assert found.bytes == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.container, found.whole_module, found.wrapping, found.prefix) == ("torch-zip", "", ("net",), "module.")
    assert [(t.name, t.shape) for t in found.tensors] == [(n, tuple(t.shape)) for n, t in network.state_dict().items()]
    assert found.values == sum(t.numel() for t in network.state_dict().values())
    assert (found.num_classes, found.in_channels, found.image_size) == (7, 1, None)
    assert found.architecture is not None
    assert found.architecture.confident
    assert found.architecture.spec == "preact_resnet18(width=8)"
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["entries"] == {"epoch": 3, "acc": "inf"}
    assert plain["tensors"][0] == {"name": "conv1.weight", "shape": [8, 1, 3, 3], "dtype": "float32"}
    assert plain["globals"]["torch.FloatStorage"] == "tensor machinery"
    text = "\n".join(found.lines())
    assert "preact_resnet18(width=8)" in text
    assert "8×1×3×3" in text
    assert "8×1×3×3" not in "\n".join(found.lines(tensors=False))


class Touch:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.proof}",))


def test_a_malicious_file_is_described_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "x": Touch(proof)}, tmp_path / "c.pt")
    found = inspect_checkpoint(tmp_path / "c.pt")
    assert dict(found.globals)[f"{os.system.__module__}.system"] == "dangerous"
    assert found.dangerous_calls == (f"{os.system.__module__}.system('touch {proof}')",)
    assert any("DANGEROUS" in line and "touch" in line for line in found.lines())
    assert [t.name for t in found.tensors] == ["weight", "bias"]
    torch.save(Touch(proof), tmp_path / "d.pt")
    assert inspect_checkpoint(tmp_path / "d.pt").tensors == ()
    assert not proof.exists()


def test_whole_module_and_safetensors(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "c.pt")
    assert inspect_checkpoint(tmp_path / "c.pt").whole_module == "torch.nn.modules.container.Sequential"
    write_safetensors(cnn(width=4).state_dict(), tmp_path / "c.safetensors", metadata={"author": "x"})
    found = inspect_checkpoint(tmp_path / "c.safetensors")
    assert (found.container, found.entries, found.globals) == ("safetensors", {"author": "x"}, ())
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("os.system", "dangerous"),
        ("posix.system", "dangerous"),
        ("builtins.eval", "dangerous"),
        ("builtins.set", "tensor machinery"),
        ("torch._utils._rebuild_tensor_v2", "tensor machinery"),
        ("torch.bfloat16", "tensor machinery"),
        ("torch.hub.load", "dangerous"),
        ("torch.serialization.os.system", "dangerous"),
        ("torch.nn.modules.linear.Linear", "known class"),
        ("torchvision.models.resnet.ResNet", "known class"),
        ("torchvision.models.os.system", "dangerous"),
        ("models.resnet.ResNet", "unknown"),
        ("oscar.Net", "unknown"),
        ("__torch__.Net", "TorchScript"),
    ],
)
def test_verdicts(name: str, expected: str) -> None:
    assert verdict(name) == expected


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in network.state_dict().items()}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo_networks_are_known_again(name: str) -> None:
    with torch.device("meta"):
        found = guess_architecture(shapes(ZOO[name](num_classes=11)))
    assert found is not None
    assert found.confident
    assert found.spec.partition("(")[0] == name


@pytest.mark.parametrize(
    ("network", "spec"),
    [
        (lambda: ZOO["airbench"](width=6), "airbench(width=6)"),
        (lambda: preact_resnet18(width=5), "preact_resnet18(width=5)"),
        (lambda: vgg11_bn(width=8), "vgg11_bn(width=8)"),
        (lambda: cnn(width=6, image_size=32), "cnn(width=6)"),
        (lambda: vit_tiny(dim=64, depth=2, patch=8, image_size=64), "vit_tiny(patch=8, dim=64, depth=2)"),
    ],
)
def test_sizes_of_zoo_networks_are_read(network: Any, spec: str) -> None:
    found = guess_architecture(shapes(network()))
    assert found is not None
    assert (found.spec, found.confident) == (spec, True)


def test_one_more_tensor_takes_the_confidence() -> None:
    found = guess_architecture({**shapes(preact_resnet18(width=4)), "extra.weight": (3, 3)})
    assert found is None or not found.confident


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "vgg11_bn", "vgg16", "vit_b_16", "densenet121", "mobilenet_v2", "convnext_tiny"]
)
def test_torchvision_families(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        network = models.get_model(name, weights=None, num_classes=13)
    found = guess_architecture(shapes(network))
    assert found is not None
    assert not found.confident
    assert found.spec in (f"torchvision:{name}", "")
    assert (found.spec != "") == (name not in ("mobilenet_v2", "convnext_tiny"))
    assert count_classes(shapes(network)) == 13
    assert read_image_size(shapes(network)) == (224 if name == "vit_b_16" else None)


@pytest.mark.filterwarnings("ignore")
def test_timm_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model("vit_small_patch16_224", num_classes=13, img_size=96)
    found = guess_architecture(shapes(network))
    assert found is not None
    assert found.spec == "timm:vit_small_patch16_224"
    assert read_image_size(shapes(network)) == 96
    assert count_classes(shapes(network)) == 13


def test_third_party_files(data_root: Path) -> None:
    found = inspect_checkpoint(data_root / "third_party" / "akamaster_cifar10_resnet20_clean.th")
    assert found.container == "torch-legacy"
    assert found.architecture is not None
    assert "ResNet-20" in found.architecture.why
    assert found.entries["best_prec1"] == pytest.approx(91.78)
    assert (found.num_classes, found.in_channels) == (10, 3)
