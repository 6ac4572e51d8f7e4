"""A small GPT: a language model that sees only the past; parameters are named as in GPT-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.nets.common import check_counts, check_dropout, check_heads, check_tokens, small_normal


class CausalAttention(nn.Module):
    """Every token looks at itself and the tokens before it: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of ``heads`` heads, projected back."""
        n, t, _ = x.shape
        q, k, v = self.c_attn(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        dropped = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a GELU between them, token by token: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """The two layers."""
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm and beside a shortcut: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, heads, dropout)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens with both parts added."""
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Tokens to the logits of each next token: (N, T) whole numbers, T ≤ length → (N, T, vocab)."""

    def __init__(self, vocab: int, length: int, dim: int, depth: int, heads: int, tied: bool, dropout: float) -> None:
        super().__init__()
        self.length = length
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Embedding(length, dim)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        small_normal(self)
        # GPT-2: the residual stream adds up 2·depth parts, whose variance must not grow with the depth.
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth))
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (N, T, vocab); those at position t depend on tokens 0..t only.

        Raises:
            DataError: for tokens that are not whole numbers or more of them than positions.
        """
        check_tokens("gpt_tiny", input_ids, self.length)
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def gpt_tiny(
    vocab: int = 65,
    length: int = 128,
    dim: int = 128,
    depth: int = 4,
    heads: int = 4,
    tied: bool = True,
    dropout: float = 0.0,
) -> GPT:
    """GPT-2 (Radford et al. 2019) in small: 0.82 M parameters with the default sizes.

    ``gpt_tiny(50257, 1024, 768, 12, 12)`` is GPT-2 small. Cost of the attention grows with the square of the tokens.

    Args:
        vocab: number of different tokens.
        length: largest number of tokens in a text.
        dim: numbers in a token's vector, a multiple of ``heads``.
        depth: blocks.
        heads: attention heads of a block.
        tied: the last layer's weight is the token embedding itself (one tensor).
        dropout: probability of dropping an entry, in the attention and behind each part.

    Raises:
        UsageError: for a size below 1, heads that do not divide, or a dropout outside ``[0, 1)``.
    """
    check_counts("gpt_tiny", vocab=vocab, length=length, depth=depth)
    check_heads("gpt_tiny", dim, heads)
    check_dropout("gpt_tiny", dropout)
    return GPT(vocab, length, dim, depth, heads, tied, dropout)
