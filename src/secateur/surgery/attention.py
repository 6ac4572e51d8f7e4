"""Attention with fewer heads than its width would hold: what ``nn.MultiheadAttention`` becomes once heads are gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ThinAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads together may be narrower than its inputs.

    Torch's own divides the width of the inputs among the heads. Here the projections say how wide a head is. Names of
    parameters, arguments and results are the same; a module becomes one by :meth:`adopt`, and keeps its parameters.
    """

    @staticmethod
    def adopt(module: nn.MultiheadAttention) -> None:
        """Make a module of torch's own class one of this, in place.

        Its fast path, which knows torch's sizes only, is off from then on.
        """
        module.__class__ = ThinAttention
        module._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        single = query.dim() == 2
        turned = self.batch_first or single
        if single:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._split(x) for x in self._projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, is_causal, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        found = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if single:
            return found[0], None if weights is None else weights[0]
        return (found if turned else found.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        packed: Any = self.in_proj_weight
        weights = (
            packed.chunk(3) if packed is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, given: Tensor | None, padding: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        if given is None and causal:
            given = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        made = None
        if given is not None:
            made = _added(given, q)
            made = made.unflatten(0, (q.shape[0], -1)) if made.dim() == 3 else made
        if padding is not None:
            own = _added(padding, q)[:, None, None, :]
            made = own if made is None else made + own
        return made


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -torch.inf)
    return mask.to(like.dtype)
