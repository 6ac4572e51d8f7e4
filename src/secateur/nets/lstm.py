"""A recurrent network for language or for whole sequences, made of plain linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError
from secateur.nets.common import check_counts, check_dropout, check_tokens


class LSTMLayer(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997): (N, T, inputs) → (N, T, hidden).

    Written out with two linear layers, and not with ``nn.LSTM``, whose fused kernels cannot be differentiated
    in evaluation mode on a GPU nor twice anywhere, and hide their layers from hooks. Gates stand in torch's
    order: input, forget, cell, output. Cost: a step of Python for every position.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_gates = nn.Linear(inputs, 4 * hidden)
        self.hidden_gates = nn.Linear(hidden, 4 * hidden, bias=False)
        # Cells that start by remembering learn long dependencies (Gers et al. 2000).
        with torch.no_grad():
            self.input_gates.bias[hidden : 2 * hidden] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """The hidden state at every position, starting from zeros."""
        every = self.input_gates(x).unbind(1)
        h = cell = x.new_zeros(x.shape[0], self.hidden, dtype=every[0].dtype)
        states = []
        for given in every:
            enter, keep, new, leave = (given + self.hidden_gates(h)).chunk(4, dim=-1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(new)
            h = torch.sigmoid(leave) * torch.tanh(cell)
            states.append(h)
        return torch.stack(states, dim=1)


class RecurrentNet(nn.Module):
    """Tokens (N, T) or vectors (N, T, inputs) → logits (N, T, outputs), or (N, outputs) for a classifier."""

    def __init__(
        self,
        vocab: int | None,
        inputs: int,
        hidden: int,
        layers: int,
        outputs: int,
        classify: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.classify = classify
        self.embedding = None if vocab is None else nn.Embedding(vocab, inputs)
        self.layers = nn.ModuleList(LSTMLayer(hidden if i else inputs, hidden) for i in range(layers))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at every position, or at the last one for a classifier.

        Raises:
            DataError: for inputs of the wrong shape or type, or without any position.
        """
        if self.embedding is not None:
            check_tokens("lstm", x)
        elif x.dim() != 3 or x.shape[2] != self.inputs:
            raise DataError(f"lstm takes sequences of shape (N, T, {self.inputs}), not {tuple(x.shape)}.")
        if x.shape[1] == 0:
            raise DataError("lstm: the batch holds sequences of length 0; give at least one position.")
        y = x if self.embedding is None else self.drop(self.embedding(x))
        for layer in self.layers:
            y = self.drop(layer(y))
        return self.head(y[:, -1] if self.classify else y)


def lstm(
    vocab: int | None = None,
    inputs: int | None = None,
    hidden: int = 128,
    layers: int = 1,
    outputs: int | None = None,
    classify: bool = False,
    dropout: float = 0.0,
) -> RecurrentNet:
    """LSTM language model, (N, T) tokens → (N, T, ``vocab``) logits, or one of its relatives.

    0.15 M parameters for 65 tokens with the default sizes.

    Args:
        vocab: number of different tokens, embedded in ``hidden`` numbers; ``outputs`` if only that is given.
        inputs: numbers at each position, for sequences (N, T, ``inputs``) instead of tokens.
        hidden: neurons of a layer.
        layers: layers, one upon the other.
        outputs: logits; ``vocab`` if only that is given.
        classify: give logits (N, ``outputs``) for the whole sequence, read off its last position, instead of
            logits (N, T, ``outputs``) for every position.
        dropout: probability of dropping an entry of the embedding and of each layer's output.

    Raises:
        UsageError: for sizes below 1, missing or contradicting ones, or a dropout outside ``[0, 1)``.
    """
    check_counts("lstm", vocab=vocab, inputs=inputs, hidden=hidden, layers=layers, outputs=outputs)
    check_dropout("lstm", dropout)
    if vocab is not None and inputs is not None:
        raise UsageError(f"lstm: vocab={vocab} is for tokens and inputs={inputs} for vectors; give one of them.")
    if inputs is None and not classify:
        vocab, outputs = vocab or outputs, outputs or vocab
    if vocab is None and inputs is None:
        raise UsageError("lstm: how many different tokens are there? Set vocab (or inputs, for sequences of vectors).")
    if outputs is None:
        raise UsageError("lstm: how many logits should it give? Set outputs.")
    return RecurrentNet(vocab, inputs or hidden, hidden, layers, outputs, classify, dropout)
