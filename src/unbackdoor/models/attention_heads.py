"""The attention heads of a transformer, found by structure: which rows of its projections make which head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unbackdoor.models.surgery import is_row_layer

#: What modules of attention call their number of heads: torch and timm, transformers, DistilBERT, others.
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
#: Their projections: query, key and value apart, or in one layer.
_APART = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "to_q", "to_k", "to_v")
_JOINT = ("qkv", "to_qkv", "in_proj", "query_key_value")


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """One layer of attention.

    Attributes:
        name: its dotted name.
        heads: how many it has.
        layers: the projections that make their queries, keys and values: (dotted name, 3 where it makes all three, one
            after the other, else 1).
    """

    name: str
    heads: int
    layers: tuple[tuple[str, int], ...]

    def of_rows(self, rows: int, parts: int) -> list[int]:
        """The head that each row of a projection belongs to: each part's rows go to the heads in equal runs.

        Raises:
            ValueError: the rows cannot be shared out so.
        """
        if rows % (parts * self.heads):
            raise ValueError(f"{rows} rows of {parts} parts cannot be shared out among {self.heads} heads")
        each = rows // parts // self.heads
        return [row // each % self.heads for row in range(rows)]


def attention_heads(model: nn.Module) -> list[AttentionHeads]:
    """Every layer of attention with more than one head whose projections are linear, in the order of registration.

    Projections that fewer heads share than there are queries (grouped queries) are left out.
    """
    found = []
    for name, module in model.named_modules():
        heads = next((n for n in (getattr(module, count, None) for count in _COUNTS) if type(n) is int), 0)
        if heads < 2:
            continue
        if isinstance(module, nn.MultiheadAttention):
            layers = [(name, 3)] if module.in_proj_weight is not None else []
        else:
            layers = _projections(module, name, heads)
        if layers:
            found.append(AttentionHeads(name, heads, tuple(layers)))
    return found


def _projections(module: nn.Module, name: str, heads: int) -> list[tuple[str, int]]:
    rows = {
        child: (len(weight), 3 if child in _JOINT else 1)
        for child, layer in module.named_children()
        if child in (*_APART, *_JOINT) and is_row_layer(layer) and isinstance(weight := layer.weight, nn.Parameter)
    }
    most = max((count for count, _ in rows.values()), default=0)
    return [
        (f"{name}.{child}" if name else child, parts)
        for child, (count, parts) in rows.items()
        if count == most and count % (parts * heads) == 0
    ]
