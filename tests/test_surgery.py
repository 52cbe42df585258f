"""Layers of output units, the head among them, and resetting units."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from factories import Snapshot, convolutional, samples, weights
from unbackdoor.errors import UnsupportedModel
from unbackdoor.models import zoo
from unbackdoor.models.inputs import Classifier
from unbackdoor.models.surgery import UnitLayer, find_head, is_row_layer, reset_units, unit_layers
from unbackdoor.rng import Rng, isolated
from unbackdoor.types import Samples

CLASSES = 7


def clean(size: int = 32, channels: int = 3, classes: int = CLASSES) -> Samples:
    return samples(classes, classes, size=size, channels=channels)


def made(make: Any, *args: Any, **options: Any) -> nn.Module:
    with isolated(Rng(0)):
        network: nn.Module = make(*args, **options)
    return network


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


# find_head


@pytest.mark.parametrize(
    ("name", "options", "images", "head"),
    [
        ("airbench", {"width": 4}, clean(), "linear"),
        ("preact_resnet18", {"width": 4}, clean(), "linear"),
        ("vgg11_bn", {"width": 4}, clean(), "classifier"),
        ("vit_tiny", {"image_size": 8, "dim": 32, "depth": 1}, clean(8), "head"),
        ("cnn", {"width": 4}, clean(28, 1), "classifier.3"),
    ],
)
def test_head_of_the_zoo(name: str, options: dict[str, Any], images: Samples, head: str) -> None:
    model = made(zoo.ZOO[name], num_classes=CLASSES, **options)
    found = find_head(model, images)
    assert found.name == head
    assert found.module is model.get_submodule(head)
    assert found.weight is model.get_parameter(f"{head}.weight")
    assert found.bias is model.get_parameter(f"{head}.bias")


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("resnet10t", {}, "fc"),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, "head"),
        ("convnext_atto", {}, "head.fc"),
    ],
)
def test_head_of_timm_networks(name: str, options: dict[str, Any], head: str) -> None:
    timm = pytest.importorskip("timm")
    model = made(timm.create_model, name, pretrained=False, num_classes=CLASSES, **options)
    assert find_head(model, clean()).name == head


@pytest.mark.parametrize(
    ("name", "size", "head"), [("squeezenet1_1", 64, "classifier.1"), ("shufflenet_v2_x0_5", 32, "fc")]
)
def test_head_of_torchvision_networks(name: str, size: int, head: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = made(models.get_model, name, weights=None, num_classes=CLASSES)
    found = find_head(model, clean(size))
    assert found.name == head
    assert found.units == CLASSES
    assert found.rows().shape == (CLASSES, 512 if name == "squeezenet1_1" else 1024)


class Softmaxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.softmax = nn.Linear(12, 5), nn.Linear(5, CLASSES), nn.Softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.softmax(self.last(self.first(x.flatten(1))))
        return out


def test_head_within_a_classifier_around_a_softmax() -> None:
    wrapped = Classifier(made(Softmaxed), output="probabilities", softmax="softmax", channels=3)
    assert find_head(wrapped, clean(2)).name == "network.last"


class HeadFirst(nn.Module):
    """Registers its head before a middle layer of as many units, as a network with an auxiliary exit might."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.head = nn.Linear(classes, classes)
        self.middle = nn.Linear(12, classes)
        self.unused = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(x.flatten(1)).relu())
        return out


def test_a_middle_layer_of_as_many_units_does_not_fool_it() -> None:
    assert find_head(made(HeadFirst), clean(2)).name == "head"


def test_a_middle_convolution_of_as_many_units_does_not_fool_it() -> None:
    assert find_head(convolutional(6), clean(8, classes=6)).name == "10"


def test_the_network_may_be_its_own_head() -> None:
    bare = nn.Linear(2, 2)
    assert find_head(bare, samples(2, 2, size=2)).name == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_", [torch.jit.script, lambda m: torch.jit.trace(m, torch.rand(1, 3, 2, 2))])
def test_torchscript_goes_by_registration(compile_: Any) -> None:
    plain = made(nn.Sequential, nn.Flatten(), nn.Linear(12, CLASSES), nn.ReLU(), nn.Linear(CLASSES, CLASSES))
    scripted = compile_(plain.eval())
    found = find_head(scripted, clean(2))
    assert found.name == "3"
    before = plain[3].weight.detach().clone()
    assert torch.equal(found.weight, before)
    assert found.bias is not None
    reset_units(found, [2], Rng(0).stream("reset"))
    changed = (scripted.state_dict()["3.weight"] != before).any(1)
    assert changed.tolist() == [i == 2 for i in range(CLASSES)], "the script's own row is reset"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_without_bias() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES, bias=False))
    for scripted in (torch.jit.script(plain), torch.jit.trace(plain, torch.rand(1, 3, 2, 2))):
        assert find_head(scripted, clean(2)).bias is None


def test_no_head_says_which_sizes_there_are() -> None:
    with pytest.raises(UnsupportedModel, match=r"has 5 output units, one a class; the layers have 4, 6, 8$"):
        find_head(convolutional(4), samples(5, 5))


def test_nothing_to_score() -> None:
    with pytest.raises(UnsupportedModel, match="no linear or convolution layer"):
        unit_layers(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()))


def test_the_given_model_is_not_touched() -> None:
    model = convolutional().train()
    model[1].eval()
    before = Snapshot(model)
    find_head(model, samples())
    assert before.differences() == []
    assert hooks(model) == 0


def test_the_owners_hooks_stay() -> None:
    model = convolutional()
    model[0].register_forward_hook(lambda *_: None)
    find_head(model, samples())
    assert hooks(model) == 1


# unit_layers


def test_layers_of_a_network_in_order() -> None:
    layers = unit_layers(convolutional(4))
    assert [(x.name, x.units, x.fan_in) for x in layers] == [("0", 6, 27), ("4", 8, 54), ("10", 4, 32)]
    assert layers[0].bias is None
    assert layers[2].bias is not None
    assert layers[0].rows().shape == (6, 27)
    assert layers[0].rows().data_ptr() == layers[0].weight.data_ptr()


def test_attention_counts_its_joint_projection() -> None:
    attention = nn.MultiheadAttention(8, 2)
    layers = {x.name: x for x in unit_layers(nn.Sequential(attention))}
    assert layers["0"].weight is attention.in_proj_weight
    assert layers["0"].bias is attention.in_proj_bias
    assert (layers["0"].units, layers["0"].fan_in) == (24, 8)
    assert layers["0.out_proj"].weight is attention.out_proj.weight
    # With other sizes for keys and values there is no joint matrix.
    assert [x.name for x in unit_layers(nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4)))] == ["0.out_proj"]


def test_transposed_convolutions_have_no_rows_of_output_units() -> None:
    assert not is_row_layer(nn.ConvTranspose2d(3, 4, 1))
    assert all(map(is_row_layer, (nn.Linear(1, 1), nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1))))


# reset_units


@pytest.mark.parametrize("module", [nn.Linear(18, 500), nn.Conv2d(2, 500, 3)])
def test_a_reset_draws_uniformly_up_to_the_bound(module: nn.Module) -> None:
    layer = unit_layers(copy.deepcopy(module))[0]
    reset_units(layer, range(500), Rng(0).stream("reset"))
    drawn, bound = layer.weight.detach().flatten(), math.sqrt(2 / 18)
    assert drawn.abs().max() <= bound
    # 9000 draws: the largest is near the bound, the mean within 5 standard errors, and the halves are filled alike.
    assert drawn.abs().max() > 0.995 * bound
    assert abs(drawn.mean()) < 5 * bound / math.sqrt(3 * 9000)
    assert (drawn.abs() > bound / 2).double().mean() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(9000))
    assert layer.bias is not None
    assert not layer.bias.any()


def test_a_reset_leaves_the_others() -> None:
    model = convolutional()
    before, layer = weights(model), find_head(model, samples())
    reset_units(layer, [1, 3], Rng(0).stream("reset"))
    after = weights(model)
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["10.weight", "10.bias"]
    assert torch.equal(after["10.weight"][[0, 2]], before["10.weight"][[0, 2]])
    assert torch.equal(after["10.bias"][[0, 2]], before["10.bias"][[0, 2]])
    assert (after["10.weight"][[1, 3]] != before["10.weight"][[1, 3]]).all()
    assert not torch.equal(after["10.weight"][1], after["10.weight"][3])
    assert not after["10.bias"][[1, 3]].any()


def test_a_reset_repeats_with_its_generator() -> None:
    def drawn(seed: int) -> Tensor:
        layer = UnitLayer("", module := nn.Linear(4, 3, bias=False), module.weight, None)
        reset_units(layer, [0, 1, 2], Rng(seed).stream("reset"))
        return layer.weight.detach()

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
