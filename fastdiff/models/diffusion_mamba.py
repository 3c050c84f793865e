"""Diffusion backbones whose tokens meet in selective scans: linear in their number, where attention is quadratic.

The blocks are those of a DiT (Peebles & Xie, 2022, arXiv:2212.09748) with a state-space mixer in place of attention and
MLP. From the condition c = t_emb + y_emb every branch has a shift, a scale and a gate, and between two branches there
is always ``x + gate * branch`` followed by the next one's modulated norm: one call, ``ops.gate_residual_adaln``.

A scan has a direction and an image has none, so paths differ (`scan_orders`): two or four in one scan, merged where
they stand (Vision Mamba, arXiv:2401.09417; VMamba, arXiv:2401.10166), or one that alternates over the blocks (ZigMa,
arXiv:2403.13802). Mamba's causal convolution would need a filter for each; as in VMamba it is one depthwise 3 x 3
filter on the grid instead, which is a neighbourhood for every path and needs no copy of the tokens in their orders.
Only ``order="raster"`` keeps Mamba's own block: there a patch knows nothing of those after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models import scan_orders
from fastdiff.models._backbone import ClassConditional
from fastdiff.models._layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    require,
    sincos_position_embedding,
)
from fastdiff.models.dit import FinalLayer
from fastdiff.models.mamba import MambaBlock, initial_step_bias
from fastdiff.ops import _linear

__all__ = ["DIFFUSION_MAMBA_PRESETS", "DiffusionMamba", "GridScan", "HybridDiffusion", "diffusion_mamba"]

# DiT's widths; a mixer has about half the weights of a transformer block, so there are twice as many.
DIFFUSION_MAMBA_PRESETS: dict[str, dict[str, int]] = {
    f"Mamba-{size}/{patch}": {"patch_size": patch, "hidden_size": width, "depth": depth}
    for size, (width, depth) in {"S": (384, 24), "B": (768, 24), "L": (1024, 48), "XL": (1152, 56)}.items()
    for patch in (2, 4, 8)
}


def diffusion_mamba(name: str, **overrides: Any) -> DiffusionMamba:
    """Builds a `DiffusionMamba` of DiT's sizes.

    Args:
        name: ``"Mamba-{S,B,L,XL}/{2,4,8}"``: width and depth, then the patch side in (latent) pixels.
        **overrides: any argument of `DiffusionMamba`.

    Raises:
        ValueError: the name is not a preset.
    """
    require(
        name in DIFFUSION_MAMBA_PRESETS, "diffusion_mamba", "name", f"one of {', '.join(DIFFUSION_MAMBA_PRESETS)}", name
    )
    settings: dict[str, Any] = {**DIFFUSION_MAMBA_PRESETS[name], **overrides}
    return DiffusionMamba(**settings)


class GridScan(nn.Module):
    """Mamba's mixer on a grid: tokens [B,L,D] to [B,L,D], scanned along K paths of row-major positions.

    Each path has its own dt, B, C, A and D (VMamba's cross-scan); convolution, gate and projections are shared. With
    one path the parameters are those of `MambaBlock`, but for the convolution.

    Args:
        hidden_size: width D.
        orders: [K,L] int64, each row a permutation.
        grid: (rows, columns), rows * columns = L.
        d_state: states of each channel.
        expand: E = expand * D channels inside.
    """

    orders: Tensor

    def __init__(
        self, hidden_size: int, orders: Tensor, grid: tuple[int, int], d_state: int = 16, expand: int = 2
    ) -> None:
        super().__init__()
        self.grid, paths, inner, rank = grid, len(orders), expand * hidden_size, math.ceil(hidden_size / 16)
        self.rank, self.d_state = rank, d_state
        self.register_buffer("orders", orders, persistent=False)
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj = nn.Linear(inner, paths * (rank + 2 * d_state), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(paths, rank, inner).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_bias = nn.Parameter(initial_step_bias(paths * inner, 1e-3, 0.1, 1e-4).view(paths, inner))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(paths, inner, 1))
        self.D = nn.Parameter(torch.ones(paths, inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        paths, rank, inner = self.dt_weight.shape
        u, z = _linear.call(self.in_proj, x).chunk(2, dim=-1)
        image = u.view(b, *self.grid, inner).permute(0, 3, 1, 2)
        u = F.silu(self.conv2d(image)).permute(0, 2, 3, 1).reshape(b, length, inner)
        parts = _linear.call(self.x_proj, u).view(b, length, paths, rank + 2 * self.d_state)
        dt, B, C = parts.split([rank, self.d_state, self.d_state], dim=-1)
        # One product for all paths: [K, B*L, R] x [K, R, E].
        delta = torch.bmm(dt.permute(2, 0, 1, 3).reshape(paths, b * length, rank), self.dt_weight)
        delta = delta.view(paths, b, length, inner).permute(1, 2, 0, 3)
        A = -torch.exp(_at_least_float(self.A_log))
        skip, bias = _at_least_float(self.D), _at_least_float(self.dt_bias)
        if paths == 1:
            y = ops.selective_scan(
                u, delta[:, :, 0], A[0], B[:, :, 0], C[:, :, 0], skip[0], z, bias[0], True,
                layout="bld", order=self.orders[0],
            )  # fmt: skip
        else:
            y = ops.selective_scan_multi(
                u, delta, A, B, C, skip, orders=self.orders, delta_bias=bias, delta_softplus=True
            ) * F.silu(z)
        return _linear.call(self.out_proj, y)


class Block(nn.Module):
    """Branches in a row, each with three vectors of modulation; `DiffusionMamba` chains them across norm sites."""

    def __init__(self, hidden_size: int, **branches: nn.Module) -> None:
        super().__init__()
        self.names = tuple(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * len(branches) * hidden_size))

    @property
    def branches(self) -> int:
        return len(self.names)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        own: Sequence[Tensor],
        shift_next: Tensor,
        scale_next: Tensor,
        control: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, its modulated norm) -> the same for the next block, whose shift and scale follow `own`.

        `control` [B,N,D] is added to x behind this block.
        """
        vectors = (*own, shift_next, scale_next)
        for i, name in enumerate(self.names, 1):
            branch = getattr(self, name)(h)
            x = x if control is None or i < len(self.names) else x + control
            x, h = ops.gate_residual_adaln(x, branch, *vectors[3 * i - 3 : 3 * i])
        return x, h


class DiffusionMamba(ClassConditional):
    """State-space backbone with adaLN-Zero conditioning.

    Args:
        input_size: side of the (square) image or latent, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch; the sequence has ``(input_size / patch_size)**2`` tokens.
        in_channels: channels C of the input.
        hidden_size: token width D; a multiple of 4.
        depth: number of blocks, at least 1.
        order: ``"bidirectional"``, ``"cross"`` (several paths in every block), ``"zigzag"``, ``"hilbert"`` (one path,
            another in the next block) or ``"raster"`` (one path, causal).
        d_state: states of each channel.
        expand: channels inside a block over D.
        class_dropout_prob: share of labels replaced by the null class in training mode; above 0 the model can also be
            asked for its unconditional prediction (``cond=None``), which guidance needs.
        num_classes: number of labels; 0 builds an unconditional model.
        learn_sigma: predict 2C channels in place of C.
        time_scale: times are multiplied by it before they are embedded: 1 for timesteps 0..999, 1000 for [0, 1].
        attention_every: every so many blocks, attention and an MLP instead of a scan; 0 for none.
        num_heads: of the attention.
        mlp_ratio: hidden width of the MLP over D.

    Attributes:
        gradient_checkpointing: see `DiT`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 24,
        *,
        order: str = "bidirectional",
        d_state: int = 16,
        expand: int = 2,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        time_scale: float = 1.0,
        attention_every: int = 0,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = settings
        self._check_config(counts=("d_state", "expand"))
        names = ", ".join(scan_orders.NAMES)
        self._require(order in scan_orders.NAMES, "order", f"one of {names}", repr(order))
        self._require(num_classes >= 0, "num_classes", "0 (unconditional) or more", num_classes)
        self._require(attention_every >= 0, "attention_every", "0 (none) or more", attention_every)
        if attention_every:
            heads_fit = num_heads >= 1 and hidden_size % num_heads == 0
            self._require(heads_fit, "num_heads", f"a divisor of hidden_size={hidden_size}", num_heads)
            self._require(mlp_ratio > 0, "mlp_ratio", "above 0", mlp_ratio)

        self.out_channels = in_channels * (2 if learn_sigma else 1)
        side = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, time_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, side)[None])
        orders = scan_orders.block_orders(order, side, side)

        def block(i: int) -> Block:
            if attention_every and (i + 1) % attention_every == 0:
                attention, mlp = Attention(hidden_size, num_heads), Mlp(hidden_size, int(hidden_size * mlp_ratio))
                return Block(hidden_size, attn=attention, mlp=mlp)
            if order == "raster":
                return Block(hidden_size, mixer=MambaBlock(hidden_size, d_state, expand=expand))
            paths = orders[i % len(orders)]
            return Block(hidden_size, mixer=GridScan(hidden_size, paths, (side, side), d_state, expand))

        self.blocks: Sequence[Block] = nn.ModuleList(block(i) for i in range(depth))  # type: ignore[assignment]
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """adaLN-Zero: modulation and output start at zero, so that every block starts as the identity."""
        for name, module in self.named_modules():
            if "adaLN_modulation" in name or name.startswith("final_layer"):
                for parameter in module.parameters(recurse=False):
                    nn.init.zeros_(parameter)
            elif isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and name.startswith("t_embedder")):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear) and "dt_proj" not in name:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]


class HybridDiffusion(DiffusionMamba):
    """A `DiffusionMamba` in which every k-th block is one of a DiT: attention and an MLP.

    Args:
        attention_every: k; at least 1.
        **options: of `DiffusionMamba`.
    """

    def __init__(self, *args: Any, attention_every: int = 4, **options: Any) -> None:
        require(attention_every >= 1, "HybridDiffusion", "attention_every", "at least 1", attention_every)
        super().__init__(*args, attention_every=attention_every, **options)


def _at_least_float(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
