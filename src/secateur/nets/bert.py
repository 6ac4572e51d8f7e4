"""A small BERT encoder with a classifier on its first token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import DataError
from secateur.nets.common import check_counts, check_dropout, check_heads, check_tokens, small_normal


class Attention(nn.Module):
    """Every token looks at the tokens that are not padding: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` is true where a token may be looked at, (N, 1, 1, T)."""
        q, k, v = (self._split(part(x)) for part in (self.query, self.key, self.value))
        dropped = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        return self.output(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        return x.reshape(n, t, self.heads, -1).transpose(1, 2)


class Layer(nn.Module):
    """Attention and MLP, each followed by LayerNorm over its sum with the shortcut: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens after both parts."""
        x = self.norm1(x + self.drop(self.attention(x, mask)))
        return self.norm2(x + self.drop(self.fc2(self.act(self.fc1(x)))))


class Bert(nn.Module):
    """Tokens to logits: (N, T) whole numbers, T ≤ length → (N, outputs)."""

    def __init__(
        self, vocab: int, length: int, dim: int, depth: int, heads: int, outputs: int, segments: int, dropout: float
    ) -> None:
        super().__init__()
        self.length = length
        self.token = nn.Embedding(vocab, dim)
        self.position = nn.Embedding(length, dim)
        self.segment = nn.Embedding(segments, dim) if segments else None
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dim, heads, dropout) for _ in range(depth))
        self.pooler = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, outputs)
        small_normal(self)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (N, outputs), read off the first token, which must not be padding.

        Args:
            input_ids: tokens (N, T).
            attention_mask: (N, T), not 0 for tokens, 0 for padding; without it every token counts.
            token_type_ids: segment of each token (N, T); all 0 without it.

        Raises:
            DataError: for tokens that are not whole numbers or more of them than positions.
        """
        check_tokens("bert_tiny", input_ids, self.length)
        x = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        elif token_type_ids is not None:
            raise DataError("bert_tiny: the batch has token_type_ids, the network has segments=0. Set segments=2.")
        x = self.drop(self.norm(x))
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.drop(torch.tanh(self.pooler(x[:, 0]))))


def bert_tiny(
    vocab: int,
    length: int,
    dim: int = 128,
    depth: int = 2,
    heads: int = 2,
    outputs: int = 2,
    segments: int = 2,
    dropout: float = 0.1,
) -> Bert:
    """BERT (Devlin et al. 2018) with a classifier; the default sizes are BERT-tiny's (Turc et al. 2019).

    4,385,920 parameters without the classifier at ``vocab=30522, length=512``.

    Args:
        vocab: number of different tokens.
        length: largest number of tokens in a text.
        dim: numbers in a token's vector, a multiple of ``heads``.
        depth: layers.
        heads: attention heads of a layer.
        outputs: logits.
        segments: segments a text may have; 0 leaves their embedding out.
        dropout: probability of dropping an entry, in the attention and behind each part.

    Raises:
        UsageError: for a size below 1, heads that do not divide, or a dropout outside ``[0, 1)``.
    """
    check_counts("bert_tiny", vocab=vocab, length=length, depth=depth, outputs=outputs, segments=segments or None)
    check_heads("bert_tiny", dim, heads)
    check_dropout("bert_tiny", dropout)
    return Bert(vocab, length, dim, depth, heads, outputs, segments, dropout)
