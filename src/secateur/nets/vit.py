"""A small vision transformer; parameters are named as in timm, so DeiT's weights load."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import UsageError
from secateur.nets.common import check_counts, check_dropout, check_heads, check_ratio


class PatchEmbed(nn.Module):
    """Cuts images into patches: (N, C, H, W) → (N, H·W / patch², dim)."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """One token a patch, row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Every token looks at every token: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of ``heads`` heads, projected back."""
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a GELU between them, token by token: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """The two layers."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm and beside a shortcut: (N, T, dim) → (N, T, dim)."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens with both parts added."""
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Patches and a class token through ``depth`` blocks: (N, C, size, size) → (N, outputs) logits."""

    def __init__(
        self,
        tokens: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        channels: int,
        outputs: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, dim))
        self.patch_embed = PatchEmbed(channels, patch, dim)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, outputs) of images (N, channels, size, size)."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.blocks(self.pos_drop(x + self.pos_embed))
        return self.head(self.norm(x)[:, 0])


def vit_tiny(
    size: int = 32,
    patch: int = 4,
    dim: int = 192,
    depth: int = 6,
    heads: int = 3,
    mlp_ratio: float = 4.0,
    channels: int = 3,
    outputs: int = 10,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Vision transformer (Dosovitskiy et al. 2020): 2.7 M parameters with the default sizes.

    ``vit_tiny(224, 16, depth=12, outputs=1000)`` is DeiT-tiny. Cost grows with the square of the patches.

    Args:
        size: side of the images in pixels.
        patch: side of a patch in pixels, a divisor of ``size``.
        dim: numbers in a token, a multiple of ``heads``.
        depth: blocks.
        heads: attention heads of a block.
        mlp_ratio: hidden neurons of a block's MLP over ``dim``.
        channels: channels of the images.
        outputs: logits.
        dropout: probability of dropping an entry of the attention and behind each part of a block.

    Raises:
        UsageError: for a size below 1, sides or heads that do not divide, or a dropout outside ``[0, 1)``.
    """
    name = "vit_tiny"
    check_counts(name, size=size, patch=patch, depth=depth, channels=channels, outputs=outputs)
    check_heads(name, dim, heads)
    check_ratio(name, mlp_ratio=mlp_ratio)
    check_dropout(name, dropout)
    if size % patch:
        raise UsageError(
            f"{name}: size={size} is not divisible by patch={patch}. Set patch to a divisor of the image side."
        )
    hidden = max(1, round(dim * mlp_ratio))
    return VisionTransformer((size // patch) ** 2, patch, dim, depth, heads, hidden, channels, outputs, dropout)
