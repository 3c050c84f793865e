"""Blocks of the U-Nets of ADM and Stable Diffusion, under the names of their published checkpoints.

Residual blocks and self-attention are those of Dhariwal & Nichol 2021 (arXiv:2105.05233, §3 and appendix A),
transformer blocks with cross-attention those of Rombach et al. 2022 (arXiv:2112.10752, §3.3).

1x1 convolutions over tokens (``qkv``, ``proj_in``, ``proj_out``) are linear layers here: the same product, on tokens
[B,N,C] as attention wants them. They load weights of either shape, [C_out,C_in] or with trailing ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.ops import _linear

__all__ = [
    "AttentionBlock",
    "Context",
    "Downsample",
    "ResBlock",
    "SpatialTransformer",
    "Stage",
    "Upsample",
    "sinusoids",
]

Context = tuple[Tensor, Tensor | None]  # tokens [B,S,E]; mask [B,S], True where a token counts, or None
Processor = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def sinusoids(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Times [B] as [B, width]: cosines, then sines, of t times frequencies from 1 down to 1/max_period."""
    # At least float32: times up to 999 in half precision have steps of 0.5.
    wide = torch.promote_types(t.dtype, torch.float32)
    index = torch.arange(width // 2, device=t.device, dtype=wide)
    angles = t.to(wide)[:, None] * torch.exp(-math.log(max_period) * index / (width // 2))
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class Stage(nn.Sequential):
    """Layers in a row, each given of (embedding, context, output size) what it takes."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Context | None, size: tuple[int, int] | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, size)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class Downsample(nn.Module):
    """Halves [B,C,H,W], rounding up, by a strided convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Doubles [B,C,H,W] (or to the size given, that of the skip connection: odd sizes) and convolves."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        out: Tensor = self.conv(_enlarge(x, size))
        return out


def _enlarge(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.interpolate(x, size=size, mode="nearest")


class ResBlock(nn.Module):
    """Residual block conditioned on the embedding, at the same, half or double resolution.

    Args:
        channels: of the input.
        emb_channels: width of the embedding.
        out_channels: of the output.
        dropout: probability, in [0, 1).
        scale_shift: the embedding scales and shifts the second norm (AdaGN, eq. 4 of ADM) in place of being added.
        resample: None, ``"down"`` (means of 2x2) or ``"up"``, before the first convolution and on the skip connection.
        groups: of the group norms.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (1 + scale_shift)))
        conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, out_channels), nn.SiLU(), nn.Dropout(dropout), conv)
        same = channels == out_channels
        self.skip_connection: nn.Module = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2, ceil_mode=True), F.avg_pool2d(x, 2, ceil_mode=True)
        elif self.resample == "up":
            h, x = _enlarge(h, size), _enlarge(x, size)
        h = conv(h)
        mods = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            norm, *rest = self.out_layers
            scale, shift = mods.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
            for layer in rest:
                h = layer(h)
        else:
            h = self.out_layers(h + mods)
        out: Tensor = self.skip_connection(x) + h
        return out


class _Pointwise(nn.Module):
    """A module whose linear layers named in `pointwise` may be stored as 1x1 convolutions."""

    pointwise: tuple[str, ...] = ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.pointwise:
            key = f"{prefix}{name}.weight"
            if key in state_dict and state_dict[key].dim() > 2 and state_dict[key].shape[2:].numel() == 1:
                state_dict[key] = state_dict[key].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AttentionBlock(_Pointwise):
    """Self-attention over the positions of [B,C,H,W], with a residual connection (ADM).

    The ``qkv`` layer's channels are ordered (head, q|k|v, channel) in all published ADM weights, "legacy", and (q|k|v,
    head, channel) in the new order.
    """

    is_cross = False
    pointwise = ("qkv", "proj_out")

    def __init__(self, channels: int, num_heads: int, new_order: bool, groups: int = 32) -> None:
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.processor: Processor | None = None
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = _linear.call(self.qkv, _tokens(self.norm(x)))
        if self.new_order:
            qkv = tokens.unflatten(-1, (3, self.num_heads, -1))
        else:
            qkv = tokens.unflatten(-1, (self.num_heads, 3, -1)).transpose(2, 3)  # [B,N,3,H,d]
        if self.processor is None:
            h = ops.attention_qkvpacked(qkv)
        else:
            h = self.processor(self, *qkv.unbind(2))
        return x + _image(_linear.call(self.proj_out, h.flatten(2)), x)


class CrossAttention(nn.Module):
    """Attention of tokens [B,N,C] to the context [B,S,E], or to themselves.

    A mask is carried by one more coordinate of q and k, which puts about -3e4 on the scores of masked keys and nothing
    on those of others: so the fused kernel serves masked calls, and processors see the mask in q and k.
    """

    def __init__(self, query_dim: int, context_dim: int | None, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.is_cross = num_heads, context_dim is not None
        self.processor: Processor | None = None
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim))  # a list in the checkpoints: to_out.0

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        tokens, mask = (x, None) if context is None else context
        q = _linear.call(self.to_q, x).unflatten(-1, (self.num_heads, -1))
        k, v = (_linear.call(to, tokens).unflatten(-1, (self.num_heads, -1)) for to in (self.to_k, self.to_v))
        d = q.shape[-1]
        if mask is not None:
            q, k, v = _masked(q, k, v, mask)
        h = ops.attention(q, k, v, layout="bnhd") if self.processor is None else self.processor(self, q, k, v)
        return _linear.call(self.to_out[0], h[..., :d].flatten(2))


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [.,.,H,d+8] whose attention, at the default scale, is that of the keys where `mask` [B,S] is True."""
    d = q.shape[-1]
    q = F.pad(q * ((d + 8) / d) ** 0.5, (0, 8))
    q[..., d] = (d + 8) ** 0.5
    k, v = F.pad(k, (0, 8)), F.pad(v, (0, 8))
    k[..., d] = torch.where(mask, 0.0, -3e4).to(k.dtype)[:, :, None]
    return q, k, v


class GEGLU(nn.Module):
    """``a * gelu(b)`` for the halves a, b of a linear map (Shazeer 2020, arXiv:2002.05202), the exact form of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, b = _linear.call(self.proj, x).chunk(2, dim=-1)
        return a * F.gelu(b)


class FeedForward(nn.Module):
    """MLP of a transformer block; ``net.1`` is the place of the checkpoints' dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return _linear.call(self.net[2], self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and MLP on tokens [B,N,C], each behind a layer norm."""

    def __init__(self, width: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, None, num_heads)
        self.attn2 = CrossAttention(width, context_dim, num_heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(_Pointwise):
    """Transformer blocks over the positions of [B,C,H,W], with a residual connection around them."""

    pointwise = ("proj_in", "proj_out")

    def __init__(self, channels: int, num_heads: int, depth: int, context_dim: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        blocks = (TransformerBlock(channels, num_heads, context_dim) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        h = _linear.call(self.proj_in, _tokens(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + _image(_linear.call(self.proj_out, h), x)


def _tokens(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,H*W,C]."""
    return x.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B,H*W,C] -> [B,C,H,W] of the height and width of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])
