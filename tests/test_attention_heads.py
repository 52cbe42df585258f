"""Attention heads are found in networks of many makes, their rows are theirs alone, and ULRL scores them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from text_networks import bert, reviews
from unbackdoor.data.texts import load_texts
from unbackdoor.defenses.ulrl import ULRL
from unbackdoor.models import zoo
from unbackdoor.models.attention_heads import AttentionHeads, attention_heads
from unbackdoor.models.surgery import unit_layers
from unbackdoor.rng import Rng, isolated
from unbackdoor.types import Samples

SHORT = ULRL(unlearn_epochs=1, relearn_images=40, mix=False, distill=0.0, steady=False)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, depth=2)
    return made


def encoder(name: str) -> nn.Module:
    small: dict[str, Any] = {
        "bert": transformers.BertConfig(
            vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16
        ),
        "distilbert": transformers.DistilBertConfig(vocab_size=30, dim=24, n_layers=2, n_heads=3, hidden_dim=16),
        "roberta": transformers.RobertaConfig(
            vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16
        ),
        "vit": transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16, image_size=16
        ),
    }
    made: nn.Module = transformers.AutoModel.from_config(small[name])
    return made


def zoos() -> nn.Module:
    return zoo.vit_tiny(depth=2, dim=96)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (zoos, [3]),
        (timm_vit, [3]),
        (lambda: encoder("bert"), [1, 1, 1]),
        (lambda: encoder("distilbert"), [1, 1, 1]),
        (lambda: encoder("roberta"), [1, 1, 1]),
        (lambda: encoder("vit"), [1, 1, 1]),
    ],
    ids=["zoo", "timm", "bert", "distilbert", "roberta", "vit"],
)
def test_heads_are_found_with_the_rows_that_make_them(make: Any, parts: list[int]) -> None:
    with isolated(Rng(0)):
        model = make()
    found = attention_heads(model)
    assert [layer.heads for layer in found] == [3, 3]
    assert [[p for _, p in layer.layers] for layer in found] == [parts, parts]
    scored = {layer.name: len(layer.weight) for layer in unit_layers(model)}
    for layer in found:
        for name, count in layer.layers:
            heads = layer.of_rows(scored[name], count)
            assert len(heads) == scored[name]
            assert [heads.count(h) for h in range(3)] == [scored[name] // 3] * 3


def test_networks_without_attention_have_none() -> None:
    assert attention_heads(zoo.cnn()) == []
    assert attention_heads(nn.MultiheadAttention(8, 1)) == []


def test_projections_that_heads_share_are_left_out() -> None:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=6
    )
    layer = transformers.LlamaModel(config).layers[0].self_attn
    layer.num_heads = 4
    assert [name for name, _ in attention_heads(layer)[0].layers] == ["q_proj"]


def test_rows_that_cannot_be_shared_out_are_told() -> None:
    with pytest.raises(ValueError, match="10 rows of 3 parts cannot be shared out among 2 heads"):
        AttentionHeads("a", 2, (("a", 3),)).of_rows(10, 3)


@pytest.mark.parametrize("head", range(3))
def test_the_rows_of_a_head_change_what_it_alone_gives(head: int) -> None:
    """Of torch's own attention: with the values' rows of one head at zero, its part of the joined output is zero."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    (found,) = attention_heads(attention)
    (name, parts), rows = found.layers[0], len(attention.in_proj_weight)
    mine = torch.tensor([h == head for h in found.of_rows(rows, parts)])
    mine[: 2 * rows // 3] = False
    seen: list[Tensor] = []
    with torch.no_grad():
        attention.in_proj_weight[mine] = 0
        attention.in_proj_bias[mine] = 0
        attention.out_proj.weight.copy_(torch.eye(12))
        attention.out_proj.bias.zero_()
        seen.append(attention(x := torch.randn(2, 5, 12), x, x)[0])
    assert name == ""
    nothing = (seen[0] == 0).all(0).all(0)
    assert nothing.tolist() == [unit // 4 == head for unit in range(12)]


def test_ulrl_sums_the_scores_of_each_heads_rows() -> None:
    model = bert()
    samples = load_texts(reviews(16), model.tokenizer).samples
    trace = SHORT(model, samples, Rng(0)).trace
    units = {layer.layer: layer.scores for layer in trace.scores}
    assert len(trace.heads) == 2
    for layer in trace.heads:
        rows = [units[f"{layer.layer}.{part}"] for part in ("query", "key", "value")]
        expected = [sum(sum(part[16 * head : 16 * (head + 1)]) for part in rows) for head in range(2)]
        assert layer.scores == pytest.approx(expected, rel=1e-12)
        assert layer.flagged == ()  # of two none can be told apart


def test_ulrl_flags_a_head_that_stands_out_and_tells_of_no_heads_that_it_did_not_score() -> None:
    rows = AttentionHeads("a", 5, (("a.q", 1),))
    moved = torch.tensor([0.1, 0.12, 0.09, 0.12, 0.1, 0.1, 3.0, 3.0, 0.1, 0.13]).view(-1, 1)
    before, after = nn.Linear(1, 10), nn.Linear(1, 10)
    with torch.no_grad():
        after.weight.copy_(before.weight + moved)
        after.bias.copy_(before.bias)
    scores = ULRL(cap=1).score(unit_layers(before)[0], unit_layers(after)[0])
    scores = type(scores)("a.q", *(getattr(scores, f) for f in ("scores", "median", "mad", "deviations", "flagged")))
    assert ULRL(cap=1)._head_scores(rows, [scores]).flagged == (3,)
    assert ULRL()._head_scores(rows, []).scores == ()
    images = Samples(torch.rand(20, 3, 32, 32), torch.arange(20) % 10, 10)
    with isolated(Rng(0)):
        vit = zoo.vit_tiny(depth=1, dim=64)
    assert (
        ULRL(**{**ULRL.PRESETS["authors-v1"], "unlearn_epochs": 1, "relearn_epochs": 1})(
            vit, images, Rng(0)
        ).trace.heads
        == ()
    )
