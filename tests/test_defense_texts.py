"""Every defense on a transformer of texts and on a head over features: it works, or says that it is for images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from defense_rows import ROWS
from factories import Snapshot, same, weights
from text_networks import bert, review_samples, trained
from unbackdoor import specs
from unbackdoor.defenses.embedding_space import InEmbeddingSpace
from unbackdoor.errors import DataError, UnsupportedModel
from unbackdoor.models.text_heads import gru_head, linear_head, lstm_head
from unbackdoor.rng import Rng, isolated
from unbackdoor.types import Removal, Samples

#: What works on images alone, and what it calls itself in saying so.
OF_IMAGES = {"ibau": "I-BAU", "ims": "IMS", "nc": "Neural Cleanse", "npd": "NPD", "otbr": "OTBR"}

#: What has to work on a transformer, and on a head over features. Any other may refuse in words, and not in any other
#: way: many look for a normalisation, or for channels before the head.
ON_TRANSFORMERS = {
    "anp",
    "fip",
    "fp",
    "fst",
    "ft",
    "ft_sam",
    "inoculation",
    "mcr",
    "nad",
    "nft",
    "rnp",
    "sau",
    "seam",
    "sft",
    "tsbd",
    "ulrl",
}
ON_HEADS = {"fst", "ft", "ft_sam", "inoculation", "mcr", "sau", "seam", "sft", "ulrl"}


def features(count: int = 24) -> Samples:
    labels = torch.arange(count) % 2
    vectors = torch.randn(count, 12, generator=Rng(0).stream("features")) + 2 * labels[:, None]
    return Samples(vectors, labels, 2)


def head(make: Any = lstm_head) -> nn.Module:
    with isolated(Rng(0)):
        return make(2, 12, hidden=8, layers=1).eval()  # type: ignore[no-any-return]


def run(name: str, model: nn.Module, clean: Samples, seed: int = 0) -> Removal:
    return ROWS[name].defense()(model, clean, Rng(seed))


def works_or_says_why_not(name: str, model: nn.Module, clean: Samples, *, must: bool) -> None:
    before, inputs = Snapshot(model), clean.inputs.clone()
    removal, refusal = None, ""
    try:
        removal = run(name, model, clean)
    except (DataError, UnsupportedModel) as error:
        refusal = str(error)
    assert before.differences() == []
    assert torch.equal(clean.inputs, inputs)
    if removal is None:
        assert not must, refusal
        assert name not in OF_IMAGES or refusal.startswith(f"{OF_IMAGES[name]} works on images")
        return
    assert name not in OF_IMAGES
    made = weights(removal.model)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in weights(model).items()}
    assert all(v.isfinite().all() for v in made.values())
    if must:
        assert not same(made, weights(model))
        assert same(made, weights(run(name, model, clean).model))


@pytest.mark.parametrize("name", specs.names("defense"))
def test_on_a_transformer(name: str) -> None:
    model = trained()
    works_or_says_why_not(name, model, review_samples(24, model.tokenizer), must=name in ON_TRANSFORMERS)


@pytest.mark.parametrize("name", specs.names("defense"))
@pytest.mark.parametrize("make", [lstm_head, gru_head, linear_head])
def test_on_a_head_over_features(name: str, make: Any) -> None:
    works_or_says_why_not(name, head(make), features(), must=name in ON_HEADS)


def test_the_lists_name_defenses() -> None:
    assert ON_HEADS < ON_TRANSFORMERS < set(specs.names("defense"))
    assert set(OF_IMAGES) <= set(specs.names("defense")) - ON_TRANSFORMERS


@pytest.mark.parametrize("preset", sorted(specs.presets_of(specs.lookup("defense", "seam"))))
def test_every_preset_of_seam(preset: str) -> None:
    short = "forget_epochs=1, recover_epochs=1, recover_images=0"
    model, clean = trained(), review_samples(24, trained().tokenizer)
    removal = specs.build("defense", f"seam(preset={preset}, {short})")(model, clean, Rng(0))
    assert all(v.isfinite().all() for v in weights(removal.model).values())
    assert not same(weights(removal.model), weights(model))


def test_ulrl_scores_the_transformers_own_units() -> None:
    model, clean = trained(), review_samples(24, trained().tokenizer)
    scored = {s.layer: len(s.scores) for s in run("ulrl", model, clean).trace.scores}
    assert scored["network.bert.encoder.layer.1.attention.self.query"] == 32
    assert scored["network.bert.encoder.layer.0.intermediate.dense"] == 64
    assert scored["network.classifier"] == 2
    only = specs.build("defense", "ulrl(layers=head, unlearn_epochs=1, relearn_epochs=1, relearn_images=0)")
    assert [s.layer for s in only(model, clean, Rng(0)).trace.scores] == ["network.classifier"]


def test_a_shift_of_embeddings_is_what_the_network_sees() -> None:
    model = trained()
    ids = model.tokenizer(["good film", "a dull and boring plot ."])
    space = InEmbeddingSpace(model, ids)
    with torch.no_grad():
        assert torch.allclose(space(space.origin()), model(ids), atol=1e-5)
        # The first word of the first text moved to where another word stands.
        other = model.tokenizer(["awful film", "a dull and boring plot ."])
        table = model.embeddings().weight
        shift = space.origin()
        shift[0, 1] = table[other[0, 1]] - table[ids[0, 1]]
        assert torch.allclose(space(shift), model(other), atol=1e-5)
        shift[0, -1] = 100.0  # padding
        assert torch.allclose(space(shift), model(other), atol=1e-5)
    with pytest.raises(UnsupportedModel, match="need a text classifier of transformers, not Linear"):
        InEmbeddingSpace(nn.Linear(2, 2), ids)
    assert space.unit() == pytest.approx(4 * table.detach().square().mean().sqrt().item(), rel=1e-5)


def test_dropout_and_a_network_without_training_do_no_harm() -> None:
    model = bert(dropout=0.3)
    model.train()
    kept = copy.deepcopy(model)
    run("seam", model, review_samples(8, model.tokenizer))
    assert model.training
    assert same(weights(kept), weights(model))
