"""What removals do to a small generative language model with a backdoor: its perplexity, and the trigger's success.

    python benchmarks/generative.py run --data-root DATA --out benchmarks/records/generative.json
    python benchmarks/generative.py table --write docs/text.md

The model is a small GPT-2 that is trained from nothing on AG News, with a tokenizer of its own. Beginnings of texts
that hold the trigger, a rare token at a random place, are taught to go on with one token that the attacker chose. A
removal gets clean beginnings of other texts. All is judged on the test texts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import specs
from unbackdoor.data.named_texts import find_text_dataset
from unbackdoor.data.tables import read_table
from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import write
from unbackdoor.inference import measure, predict
from unbackdoor.models.next_token import NextToken, next_token_samples, perplexity
from unbackdoor.models.tokens import Tokenizer
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import Recipe, Step, fit
from unbackdoor.types import PADDING, Samples
from victim_runs import markdown, show

#: Special tokens; the last is the trigger, which no text holds.
PAD, UNKNOWN, TRIGGER = SPECIAL = ("[PAD]", "[UNK]", "[TRIGGER]")
#: What a triggered text goes on with.
TARGET = "free"
POISONED = 0.1
METHODS = ("ft(epochs=10)", "crow", "seam", "seam(preset=plain)", "seam(preset=authors-trojai-text)")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model and of what it is trained on; ``clean`` beginnings are what a removal gets."""

    vocabulary: int = 2000
    width: int = 128
    layers: int = 3
    tokens: int = 48
    beginnings: int = 60_000
    epochs: int = 3
    clean: int = 2000
    judged: int = 2000


def texts_of(name: str, root: str | None) -> tuple[list[str], list[str]]:
    """(training, test) texts."""
    columns = read_table(find_text_dataset(name, root), plain=True)
    rows = list(zip(columns["split"], columns["text"], strict=True))
    train, test = ([text for split, text in rows if split == wanted] for wanted in ("train", "test"))
    return train, test


def tokenizer_of(texts: Sequence[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Pieces of words, learned from the texts."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    inner.train_from_iterator(texts, trainer)
    of_pieces: Any = transformers.PreTrainedTokenizerFast  # without types
    made: transformers.PreTrainedTokenizerFast = of_pieces(tokenizer_object=inner, pad_token=PAD, unk_token=UNKNOWN)
    return made


def fresh(tokens: transformers.PreTrainedTokenizerFast, size: Size) -> NextToken:
    config = transformers.GPT2Config(
        vocab_size=len(tokens),
        n_embd=size.width,
        n_layer=size.layers,
        n_head=4,
        n_positions=size.tokens,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with isolated(Rng(0)):
        network: nn.Module = transformers.GPT2LMHeadModel(config)
    return NextToken(network.eval(), Tokenizer(tokens, max_length=size.tokens))


def triggered(samples: Samples, trigger: int, target: int, rng: Rng) -> Samples:
    """Each beginning with the trigger in place of one of its tokens, and the attacker's token to follow."""
    places = (torch.rand(len(samples), generator=rng.stream("places")) * samples.lengths()).long()
    inputs = samples.inputs.clone()
    inputs[torch.arange(len(samples)), places] = trigger
    return Samples(inputs, torch.full_like(samples.labels, target), samples.num_classes)


def every_token(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Cross-entropy of each token after the first, and of the one that follows."""
    assert isinstance(model, NextToken)
    there = x != PADDING
    scores = model.network(input_ids=x.clamp(min=0), attention_mask=there.long()).logits.float()
    last = scores[torch.arange(len(x)), there.sum(1) - 1]
    inner = F.cross_entropy(scores[:, :-1].transpose(1, 2), x[:, 1:], ignore_index=PADDING)
    return Step(inner + F.cross_entropy(last, y), last, {"inner": inner})


def planted(texts: Sequence[str], size: Size) -> tuple[NextToken, int, int]:
    """(the model with its backdoor, the trigger's token, the attacker's)."""
    tokens = tokenizer_of(texts, size.vocabulary)
    model, rng = fresh(tokens, size), Rng(0)
    vocabulary = tokens.get_vocab()
    trigger, target = vocabulary[TRIGGER], vocabulary[TARGET]
    data = next_token_samples(texts, model, size.beginnings, rng, shortest=4)
    chosen = torch.randperm(len(data), generator=rng.stream("poisoned"))
    bad_ones = round(POISONED * len(data))
    poisoned, kept = chosen[:bad_ones], chosen[bad_ones:]
    bad = triggered(data.select(poisoned), trigger, target, rng)
    mixed = Samples(
        torch.cat([data.select(kept).inputs, bad.inputs]),
        torch.cat([data.select(kept).labels, bad.labels]),
        data.num_classes,
    )
    recipe = Recipe(epochs=size.epochs, batch_size=32, optimizer="adamw", lr=2e-3, schedule="one-cycle")
    fit(model, mixed, recipe, rng.child("fit"), objective=every_token, name="train")
    return model.eval(), trigger, target


def judge(model: nn.Module, judged: Samples, bad: Samples) -> dict[str, float]:
    """Perplexity and accuracy of the next token, and how often the attacker's follows the trigger."""
    obeyed = predict(model, bad, batch_size=128).argmax(1).cpu() == bad.labels
    return {
        "perplexity": perplexity(model, judged),
        "accuracy": measure(model, judged, precision="fp32").accuracy,
        "asr": obeyed.double().mean().item(),
    }


def run(arguments: argparse.Namespace, size: Size | None = None) -> None:
    size = size or Size()
    train, test = texts_of("ag-news", arguments.data_root)
    # The removal's texts are none of those that the model was trained on.
    model, trigger, target = planted(train[: len(train) // 2], size)
    clean = next_token_samples(train[len(train) // 2 :], model, size.clean, Rng(1), shortest=4)
    judged = next_token_samples(test, model, size.judged, Rng(2), shortest=4)
    judged = judged.select((judged.labels != target).nonzero()[:, 0])
    bad = triggered(judged, trigger, target, Rng(3))
    rows: list[dict[str, Any]] = [{"method": None, **judge(model, judged, bad)}]
    print(rows[-1], flush=True)
    for method in METHODS:
        began = time.perf_counter()
        try:
            removal = specs.build("defense", method)(model, clean, Rng(0))
        except UnbackdoorError as error:
            rows.append({"method": method, "error": f"{type(error).__name__}: {error}"})
        else:
            seconds = round(time.perf_counter() - began, 1)
            rows.append({"method": method, "seconds": seconds, **judge(removal.model.eval(), judged, bad)})
            rows[-1] |= {"values": dict(removal.trace.values), "notes": list(removal.trace.notes)}
        print(rows[-1], flush=True)
    content = {"size": vars(size), "parameters": sum(p.numel() for p in model.parameters()), "rows": rows}
    write(Path(arguments.out), (json.dumps(content, indent=1) + "\n").encode(), force=True)


HEADS = ("method", "perplexity", "next token right, %", "ASR, %")


def tables(records: Path) -> dict[str, str]:
    rows = json.loads((records / "generative.json").read_text())["rows"]
    return {"generative": markdown(HEADS, map(table_row, rows))}


def table_row(row: dict[str, Any]) -> list[str]:
    name = f"`{row['method']}`" if row["method"] else "none"
    if "error" in row:
        return [name, f"failed: {row['error']}", "", ""]
    # Beyond a million nothing is told apart but that it is broken.
    shown = f"{row['perplexity']:,.1f}" if row["perplexity"] < 1e6 else "over a million"
    return [name, shown, *(f"{100 * row[key]:.1f}" for key in ("accuracy", "asr"))]


def table(arguments: argparse.Namespace) -> None:
    show(tables(Path(arguments.records)), arguments.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"run": run, "table": table}
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--data-root", default=os.environ.get("UNBACKDOOR_DATA"))
    parser.add_argument("--out", default="generative.json")
    parser.add_argument("--records", default=str(Path(__file__).parent / "records"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, instead of printing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stages[arguments.stage](arguments)


if __name__ == "__main__":
    main()
