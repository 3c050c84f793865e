"""What the backbones have in common: embeddings of patches, times, labels and positions; attention; the MLP.

Parameters carry the names of the published DiT checkpoints (Peebles & Xie, 2022, arXiv:2212.09748).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.ops import _linear

__all__ = [
    "Attention",
    "CrossAttention",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "Processor",
    "TimestepEmbedder",
    "may_recompute",
    "require",
    "sincos_position_embedding",
    "unpatchify",
]


class PatchEmbed(nn.Module):
    """Cuts images [B,C,H,W] into patches and maps each linearly to a token: [B,N,D], row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if not _linear.is_plain(self.proj, nn.Conv2d):
            embedded: Tensor = self.proj(x)
            return embedded.flatten(2).transpose(1, 2)
        # A strided convolution is this matrix product; the product is the faster of the two on small patches.
        p = self.proj.kernel_size[0]
        b, c, h, w = x.shape
        patches = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(b, (h // p) * (w // p), c * p * p)  # no -1: it is ambiguous for an empty batch
        weight = self.proj.weight.flatten(1)
        if torch.is_autocast_enabled(x.device.type) or x.dtype is not weight.dtype:
            return F.linear(patches, weight, self.proj.bias)
        return _linear.linear(patches, weight, self.proj.bias).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Embeds scalar times [B] as sinusoids of ``time_scale * t``, then a two-layer MLP: [B,D].

    The frequencies are ``10000 ** (-i / (128 - frequency_shift))``, i = 0..127. The published models have a shift of 0,
    diffusers' `DiTTransformer2DModel` of 1.
    """

    frequencies, max_period = 128, 10000.0

    def __init__(self, hidden_size: int, time_scale: float, *, frequency_shift: float = 0.0) -> None:
        super().__init__()
        width = 2 * self.frequencies
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.time_scale, self.frequency_shift = time_scale, frequency_shift

    def forward(self, t: Tensor) -> Tensor:
        # At least float32: 1000 * t in half precision has steps of 0.5.
        wide = torch.promote_types(t.dtype, torch.float32)
        index = torch.arange(self.frequencies, device=t.device, dtype=wide)
        rates = torch.exp(-math.log(self.max_period) * index / (self.frequencies - self.frequency_shift))
        angles = (self.time_scale * t.to(wide))[:, None] * rates
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        first, _, second = self.mlp
        return _linear.call(second, F.silu(_linear.call(first, sinusoids.to(next(self.parameters()).dtype))))


class LabelEmbedder(nn.Module):
    """Embeds class labels [B] (int64) as [B,D]; with dropout there is one more row, the null class of guidance."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def drop(self, labels: Tensor) -> Tensor:
        """In training mode, a share of the labels replaced by the null class."""
        if not self.training or self.dropout_prob == 0:
            return labels
        dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        return labels.masked_fill(dropped, self.num_classes)

    def forward(self, labels: Tensor) -> Tensor:
        embedding: Tensor = self.embedding_table(labels)
        return embedding


# What may stand in for the product of an attention layer, to capture or edit it: (layer, q, k, v) -> out, where q and
# out are [B,N,H,d], k and v [B,M,H,d] (views; not to be written to), and the scores are scaled by d ** -0.5.
Processor = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def may_recompute(block: nn.Module) -> bool:
    """Whether gradient checkpointing may run a block again in the backward pass: not with processors in it.

    They may be gone by then, or count and record their calls.
    """
    return all(getattr(module, "processor", None) is None for module in block.modules())


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B,N,D].

    With `processor` set, it makes the product in place of the fused operator.
    """

    is_cross = False

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor: Processor | None = None

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = _linear.call(self.qkv, x).view(b, n, 3, self.num_heads, d // self.num_heads)
        if self.processor is None:
            mixed = ops.attention_qkvpacked(qkv)
        else:
            mixed = self.processor(self, *qkv.unbind(2))
        return _linear.call(self.proj, mixed.reshape(b, n, d))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens [B,N,D] to context [B,S,D], as in PixArt (Chen et al., 2023, arXiv:2310.00426).

    With `processor` set, it makes the product in place of the fused operator. A mask comes to it, as to the operator,
    inside q and k: eight channels more, of which the first adds a large negative number to the scores of absent tokens
    (and for a processor q is rescaled, so that d ** -0.5 with the d that it sees is right).
    """

    is_cross = True
    # Under exp it is 0 even after the scale of a head of 256 channels, and float16 can hold it.
    ABSENT = -3e4

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor: Processor | None = None

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B,N,D], context [B,S,D], mask [B,S] bool, True where a token counts -> [B,N,D].

        A sample without a single token that counts attends to all of them.
        """
        b, n, d = x.shape
        heads = self.num_heads
        q = _linear.call(self.q_linear, x).view(b, n, heads, d // heads)
        kv = _linear.call(self.kv_linear, context).view(b, context.shape[1], 2, heads, d // heads)
        k, v = kv.unbind(2)
        scale = (d // heads) ** -0.5
        if mask is not None:
            q, k, v = self._with_mask(q, k, v, mask)
        if self.processor is None:
            mixed = ops.attention(q, k, v, scale=scale, layout="bnhd")
        else:
            mixed = self.processor(self, q * (scale * math.sqrt(q.shape[-1])) if mask is not None else q, k, v)
        return _linear.call(self.proj, mixed[..., : d // heads].reshape(b, n, d))

    def _with_mask(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels for the mask; eight, so that rows stay aligned for tensor cores."""
        q = F.pad(q, (0, 1), value=1.0)
        absent = torch.zeros(mask.shape, dtype=k.dtype, device=k.device).masked_fill(~mask, self.ABSENT)
        k = torch.cat([k, absent[:, :, None, None].expand(*k.shape[:3], 1)], dim=-1)
        return F.pad(q, (0, 7)), F.pad(k, (0, 7)), F.pad(v, (0, 8))


class Mlp(nn.Module):
    """Two-layer perceptron with the tanh form of GELU."""

    def __init__(self, hidden_size: int, mlp_hidden: int, out_size: int | None = None) -> None:
        super().__init__()
        out_size = hidden_size if out_size is None else out_size
        self.fc1, self.fc2 = nn.Linear(hidden_size, mlp_hidden), nn.Linear(mlp_hidden, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return _linear.call(self.fc2, _linear.call(self.fc1, x, gelu=True))


def sincos_position_embedding(hidden_size: int, grid: int, scale: float = 1.0) -> Tensor:
    """Fixed 2-D sine-cosine embedding [grid*grid, D] of row-major patches; the first half of D encodes the column.

    Positions are divided by `scale` (PixArt's models of larger images: 2 at 1024, 1 up to 512).
    """
    omega = 1.0 / 10000 ** (torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] / scale * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [grid, D/2]
    columns, rows = line.expand(grid, grid, -1), line[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """[B, N, p*p*C] of a square image -> [B, C, H, W]; within a token the order is (row, column, channel)."""
    b, n, values = tokens.shape
    grid, channels = math.isqrt(n), values // (patch * patch)
    tokens = tokens.reshape(b, grid, grid, patch, patch, channels)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, grid * patch, grid * patch)


def require(ok: bool, owner: str, argument: str, expected: str, got: object) -> None:
    """The exception for bad input to a model.

    Raises:
        ValueError: `ok` is false.
    """
    if not ok:
        raise ValueError(f"[{owner}] {argument}: expected {expected}, got {got}")
