"""Heads of sentiment networks over one embedding a text, with the attribute names of TrojAI's rounds 5 and 6.

Each takes (N, 1, E), the embedding of one token as a sequence of one, and gives logits (N, classes). A pickled network
of these rounds is rebuilt with the classes here (:data:`unbackdoor.models._pickle_tree.KNOWN_ALIASES`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn


class LinearModel(nn.Module):
    """One linear layer."""

    def __init__(self, input_size: int, output_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, output_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, data: Tensor) -> Tensor:
        out: Tensor = self.linear(self.dropout(data[:, 0]))
        return out


class FcLinearModel(nn.Module):
    """Linear layers one upon the other, with nothing between them."""

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, dropout: float = 0.0, n_layers: int = 2
    ) -> None:
        super().__init__()
        sizes = [input_size, *([hidden_size] * n_layers)]
        self.fc_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.linear = nn.Linear(hidden_size, output_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, data: Tensor) -> Tensor:
        hidden = data[:, 0]
        for layer in self.fc_layers:
            hidden = layer(hidden)
        out: Tensor = self.linear(self.dropout(hidden))
        return out


class _Recurrent(nn.Module):
    """The last layer's final state, both directions side by side, and a linear layer."""

    KIND: ClassVar[type[nn.LSTM] | type[nn.GRU]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        dropout: float = 0.0,
        bidirectional: bool = True,
        n_layers: int = 2,
    ) -> None:
        super().__init__()
        between = dropout if n_layers > 1 else 0.0
        self.rnn = self.KIND(
            input_size, hidden_size, n_layers, batch_first=True, dropout=between, bidirectional=bidirectional
        )
        self.linear = nn.Linear(hidden_size * (2 if bidirectional else 1), output_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, data: Tensor) -> Tensor:
        _, state = self.rnn(data)
        hidden = state[0] if isinstance(state, tuple) else state
        last = torch.cat((hidden[-2], hidden[-1]), 1) if self.rnn.bidirectional else hidden[-1]
        out: Tensor = self.linear(self.dropout(last))
        return out


class LstmLinearModel(_Recurrent):
    """An LSTM."""

    KIND = nn.LSTM


class GruLinearModel(_Recurrent):
    """A GRU."""

    KIND = nn.GRU
