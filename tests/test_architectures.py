"""Networks by spec, and networks that fit a checkpoint."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor.errors import ArchitectureMismatch, CheckpointError, ConfigError, UnsafeCheckpoint
from unbackdoor.models.architectures import build_network, load_network, read_sizes, resolve_spec
from unbackdoor.models.checkpoints import read_checkpoint, write_like
from unbackdoor.models.zoo import ZOO, cnn, preact_resnet18, vit_tiny
from unbackdoor.rng import Rng

NETWORKS = Path(__file__).with_name("third_party_networks.py")


def build(spec: str, **given: Any) -> nn.Module:
    return build_network(spec, **({"num_classes": 5, "rng": Rng(0)} | given))


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[n], y[n]) for n in x)


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"vit_b_16", "vgg19_bn"}))
def test_zoo_networks_take_what_they_need(name: str) -> None:
    network = build(name, in_channels=1, image_size=16).eval()
    assert network(torch.rand(2, 1, 16, 16) if "vgg" not in name else torch.rand(2, 1, 32, 32)).shape == (2, 5)


def test_weights_depend_on_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = build("preact_resnet18(width=4)")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert equal(one, build("preact_resnet18(width=4)"))
    assert not equal(one, build("preact_resnet18(width=4)", rng=Rng(1)))


def test_the_specs_own_arguments_go_first() -> None:
    assert build("cnn(num_classes=3, width=2)", in_channels=2, image_size=8)(torch.rand(1, 2, 8, 8)).shape == (1, 3)


@pytest.mark.filterwarnings("ignore")
def test_timm_and_torchvision() -> None:
    pytest.importorskip("timm")
    assert build("timm:resnet18", in_channels=1).eval()(torch.rand(1, 1, 32, 32)).shape == (1, 5)
    assert build("timm:vit_tiny_patch16_224", image_size=48).eval()(torch.rand(1, 3, 48, 48)).shape == (1, 5)
    assert build("torchvision:resnet18", in_channels=2).eval()(torch.rand(1, 2, 32, 32)).shape == (1, 5)
    assert build("torchvision:shufflenet_v2_x0_5").eval()(torch.rand(1, 3, 32, 32)).shape == (1, 5)


def test_python_files_and_modules(tmp_path: Path) -> None:
    assert build(f"{NETWORKS}:ResNet20")(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    (tmp_path / "neighbour.py").write_text("WIDTH = 7\n")
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            from torch import nn
            from neighbour import WIDTH
            seen = {}
            class Net(nn.Module):
                def __init__(self, n_classes, in_chans=3, depth=1):
                    super().__init__()
                    self.body = nn.Linear(WIDTH, n_classes)
                    self.seen = (n_classes, in_chans, depth)
            def make(): return nn.Linear(1, 1)
            def wrong(): return 3
            def fails(): raise ValueError("no such luck")
            """
        )
    )
    path = list(sys.path)
    network = build(f"{tmp_path / 'mine.py'}:Net(depth=4)", in_channels=2)
    assert network.seen == (5, 2, 4)
    assert network.body.weight.shape == (5, 7)
    assert build(f"{tmp_path / 'mine.py'}:Net(n_classes=9)").seen[0] == 9
    assert isinstance(build(f"{tmp_path / 'mine.py'}:make"), nn.Linear)
    assert sys.path == path
    assert isinstance(build("unbackdoor.models.zoo:cnn(width=2)"), nn.Module)
    for spec, message in {
        f"{tmp_path / 'mine.py'}:Nett": "no class or function 'Nett'; its networks: Net",
        f"{tmp_path / 'mine.py'}:wrong": "gives a int, not an nn.Module",
        f"{tmp_path / 'mine.py'}:fails": "ValueError: no such luck",
        f"{tmp_path / 'absent.py'}:Net": "there is no such file",
        "no_such_package.x:Net": "cannot be imported",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build(spec)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="fails on import: ZeroDivisionError"):
        build(f"{tmp_path / 'broken.py'}:Net")


def test_unknown_names_suggest_near_ones() -> None:
    pytest.importorskip("timm")
    for spec, message in {
        "preact_resnet81": "did you mean 'preact_resnet18'",
        "timm:resnet1": "did you mean resnet1",
        "torchvision:resnet19": "did you mean resnet18|resnet1",
        "timm:": "names no network",
        "cnn(wdth=3)": "wdth",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build(spec)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r'pip install "unbackdoor\[timm\]"'):
        build("timm:resnet18")


# --- loading ---------------------------------------------------------------------------------------------------------


def saved(content: Any, tmp_path: Path) -> Any:
    torch.save(content, tmp_path / "c.pt")
    return read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("network", "arch"),
    [
        (lambda: preact_resnet18(num_classes=7, in_channels=1, width=4), "preact_resnet18"),
        (lambda: cnn(num_classes=3, image_size=32, width=4, in_channels=2), "cnn"),
        (lambda: vit_tiny(num_classes=4, image_size=24, dim=32, depth=2), "vit_tiny"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_sizes_are_read_from_the_weights(network: Any, arch: str, given: bool, tmp_path: Path) -> None:
    original = network()
    checkpoint = saved(original.state_dict(), tmp_path)
    loaded = load_network(checkpoint, arch if given else None)
    assert equal(original, loaded)
    assert not loaded.training
    assert resolve_spec(checkpoint, None).startswith(arch)


@pytest.mark.filterwarnings("ignore")
def test_sizes_are_read_for_other_packages(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    original = timm.create_model("vit_tiny_patch16_224", num_classes=6, in_chans=1, img_size=32)
    assert equal(original, load_network(saved(original.state_dict(), tmp_path), "timm:vit_tiny_patch16_224"))
    original = build("torchvision:resnet18", in_channels=1, num_classes=6)
    assert equal(original, load_network(saved(original.state_dict(), tmp_path), "torchvision:resnet18"))


def test_sizes_are_told_as_far_as_the_weights_tell(tmp_path: Path) -> None:
    torch.save(cnn(num_classes=7, image_size=12, width=4).state_dict(), tmp_path / "cnn.pt")
    told = {"num_classes": 7, "in_channels": 1, "image_size": 12}
    assert read_sizes(read_checkpoint(tmp_path / "cnn.pt")) == told
    torch.save(preact_resnet18(num_classes=5, width=4).state_dict(), tmp_path / "resnet.pt")
    assert read_sizes(read_checkpoint(tmp_path / "resnet.pt"))["image_size"] is None
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match="--arch"):
        read_sizes(read_checkpoint(tmp_path / "linear.pt"))
    assert read_sizes(read_checkpoint(tmp_path / "linear.pt"), "x.py:Linear")["num_classes"] == 2


def test_mismatch_names_the_keys(tmp_path: Path) -> None:
    state = dict(preact_resnet18(width=4).state_dict())
    del state["linear.bias"]
    state["more"] = torch.ones(1)
    state["layer1.0.bn1.weight"] = torch.ones(9)
    checkpoint = saved(state, tmp_path)
    with pytest.raises(ArchitectureMismatch) as caught:
        load_network(checkpoint, "preact_resnet18", num_classes=10)
    assert caught.value.missing == ("linear.bias",)
    assert caught.value.unexpected == ("more",)
    assert caught.value.misshapen == ("layer1.0.bn1.weight",)
    assert "(9,) in the file, (4,) in the network" in str(caught.value)
    with pytest.raises(ArchitectureMismatch, match=r"more\)") as caught:
        load_network(checkpoint, "vgg11_bn(width=4)")
    assert len(caught.value.missing) > 5


def test_given_sizes_win(tmp_path: Path) -> None:
    checkpoint = saved(cnn(width=2).state_dict(), tmp_path)
    with pytest.raises(ArchitectureMismatch, match=r"classifier\.3\.weight \(10, 8\) in the file, \(4, 8\)"):
        load_network(checkpoint, "cnn", num_classes=4)


def test_low_precision_loads_as_float32_and_goes_back_in_its_own(tmp_path: Path) -> None:
    original = cnn(width=2).bfloat16()
    checkpoint = saved(original.state_dict(), tmp_path)
    loaded = load_network(checkpoint, "cnn")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    write_like(checkpoint, loaded.state_dict(), tmp_path / "new.pt")
    plain = torch.load(tmp_path / "new.pt")
    assert all(torch.equal(plain[n], t) and plain[n].dtype == t.dtype for n, t in original.state_dict().items())


def test_a_network_whose_own_names_have_the_prefix(tmp_path: Path) -> None:
    """Saved from DataParallel around a network that keeps another in ``self.model``."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = nn.Linear(3, 2)\n"
    )
    state = {f"module.model.{n}": t for n, t in nn.Linear(3, 2).state_dict().items()}
    checkpoint = saved(state, tmp_path)
    assert checkpoint.prefix == "module.model."
    loaded = load_network(checkpoint, f"{tmp_path / 'mine.py'}:Net")
    assert torch.equal(loaded.model.weight, state["module.model.weight"])
    write_like(checkpoint, loaded.state_dict(), tmp_path / "new.pt")
    assert list(torch.load(tmp_path / "new.pt")) == list(state)


def test_files_from_before_batch_counters(tmp_path: Path) -> None:
    original = preact_resnet18(width=4)
    state = {n: t for n, t in original.state_dict().items() if not n.endswith("num_batches_tracked")}
    checkpoint = saved(state, tmp_path)
    loaded = load_network(checkpoint, None)
    assert equal(original, loaded)
    write_like(checkpoint, loaded.state_dict(), tmp_path / "new.pt")
    assert list(torch.load(tmp_path / "new.pt")) == list(state)


def test_whole_modules(tmp_path: Path) -> None:
    original = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).bfloat16()
    checkpoint = saved(original, tmp_path)
    assert resolve_spec(checkpoint, None) is None
    loaded = load_network(checkpoint, None)
    assert loaded is not checkpoint.module
    assert loaded[1].weight.dtype == torch.float32


def test_without_arch_the_error_has_the_guess(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    with pytest.raises(CheckpointError, match=r"--arch.*it is torchvision:resnet18"):
        load_network(saved(models.resnet18(weights=None).state_dict(), tmp_path), None)
    with pytest.raises(CheckpointError, match="--arch"):
        load_network(saved({"a": torch.ones(2)}, tmp_path), None)


class Foreign(nn.Module):
    """A class that no allow-list knows."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(3, num_classes)


def test_unknown_whole_modules_need_arch(tmp_path: Path) -> None:
    original = Foreign(4)
    checkpoint = saved(original, tmp_path)
    with pytest.raises(UnsafeCheckpoint, match=r"test_architectures\.Foreign"):
        load_network(checkpoint, None)
    assert equal(original, load_network(checkpoint, f"{__file__}:Foreign"))


@pytest.mark.parametrize(
    ("name", "network", "size"),
    [
        ("ibau_cifar10_badnets.pth", "IBAUNet", 3),
        ("verazuo_mnist_badnets.pth", "BadNetsMNIST", 1),
        ("akamaster_cifar10_resnet20_clean.th", "ResNet20", 3),
    ],
)
def test_third_party_networks(name: str, network: str, size: int, data_root: Path, tmp_path: Path) -> None:
    """The owners' networks load, and the changed weights load back in the owners' way: plain torch, strictly."""
    checkpoint = read_checkpoint(data_root / "third_party" / name)
    loaded = load_network(checkpoint, f"{NETWORKS}:{network}")
    pixels = 28 if size == 1 else 32
    assert loaded(torch.rand(2, size, pixels, pixels)).shape == (2, 10)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.mul_(1.5)
    write_like(checkpoint, loaded.state_dict(), tmp_path / name)
    plain = torch.load(tmp_path / name, weights_only=True, map_location="cpu")
    for key in checkpoint.wrapping:
        plain = plain[key]
    owner = load_network(checkpoint, f"{NETWORKS}:{network}")
    target = nn.DataParallel(owner) if checkpoint.prefix else owner
    target.load_state_dict(plain)
    assert equal(owner, loaded)


def test_third_party_mnist_network_still_classifies(data_root: Path) -> None:
    import numpy as np

    network = load_network(
        read_checkpoint(data_root / "third_party" / "verazuo_mnist_badnets.pth"), f"{NETWORKS}:BadNetsMNIST"
    )
    with np.load(data_root / "mnist.npz") as data:
        images = torch.from_numpy(data["x_test"][:500]).float().div(255).sub(0.5).div(0.5).unsqueeze(1)
        labels = torch.from_numpy(data["y_test"][:500]).long()
    with torch.no_grad():
        assert (network(images).argmax(1) == labels).float().mean() > 0.95
