"""EDM2's magnitude-preserving layers, and a U-Net made of them.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv:2312.02696). Every layer
keeps the root mean square of its input, in expectation for random inputs, so that no norm is needed on the main path;
and weights are kept on the unit sphere, so that the effective learning rate does not decay as they grow. Equation
numbers are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models._layers import require

__all__ = [
    "EDM2Block",
    "EDM2UNet",
    "MPAttention",
    "MPConv",
    "MPFourier",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize",
    "normalize_weights",
]

SILU_RMS = 0.596  # root mean square of silu(x), x ~ N(0, 1)


def normalize(x: Tensor, dim: int | Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """x over its root mean square along `dim` (all but the first if None): pixel norm with ``dim=1``.

    The norm is taken in at least float32; `eps` is added to the root mean square.
    """
    dims = tuple(range(1, x.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    count = math.prod([x.shape[d] for d in dims])
    wide = torch.promote_types(x.dtype, torch.float32)
    rms = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide) / math.sqrt(max(count, 1))
    return x / (rms + eps).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square for normal x (eq. 81)."""
    return F.silu(x) / SILU_RMS


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """``((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)`` (eq. 88): of unit magnitude for independent a, b that are."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, dim: int = 1, t: float = 0.5) -> Tensor:
    """Concatenation in which b has the share `t` of the next layer's output, whatever their widths (eq. 103)."""
    n_a, n_b = a.shape[dim], b.shape[dim]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=dim)


class MPFourier(nn.Module):
    """Random Fourier features of numbers [B]: [B, channels], ``sqrt(2) cos(2 pi (f x + phase))`` (eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * bandwidth * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = x.to(wide)[:, None] * self.freqs.to(wide) + self.phases.to(wide)
        return (math.sqrt(2) * angles.cos()).to(x.dtype)


class MPConv(nn.Module):
    """Convolution (or linear layer, ``kernel=()``) by unit vectors, without bias, times a gain that the caller has.

    The weight used is the stored one over its norm (eq. 47), through which gradients are orthogonal to it. In training
    mode the stored weight itself is brought to root mean square 1 first: forced weight normalization (eq. 66). Only its
    values change, to those that give the same output, so that earlier calls may still be differentiated.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel: sides of the kernel, odd; () for a linear layer on [..., in_channels].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        if self.training:
            self.normalize_weight()
        fan_in = self.weight[0].numel()
        w = (
            normalize(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))) / math.sqrt(fan_in)
        ) * gain
        w = w.to(x.dtype)
        if w.dim() == 2:
            return F.linear(x, w)
        return F.conv2d(x, w, padding=(w.shape[-2] // 2, w.shape[-1] // 2))

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Brings every output channel's stored weights to root mean square 1."""
        self.weight.data.copy_(normalize(self.weight.data))


def normalize_weights(model: nn.Module) -> None:
    """Forced weight normalization (eq. 66) of every layer of a model: what a training step does by itself."""
    for module in model.modules():
        if isinstance(module, MPConv):
            module.normalize_weight()


class MPAttention(nn.Module):
    """Cosine self-attention over the positions of [B,C,H,W]: q, k and v have magnitude 1 per head (§2.2, fig. 21)."""

    is_cross = False

    def __init__(self, channels: int, num_heads: int, balance: float = 0.3) -> None:
        super().__init__()
        self.num_heads, self.balance = num_heads, balance
        self.processor: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] | None = None
        self.attn_qkv = MPConv(channels, 3 * channels, (1, 1))
        self.attn_proj = MPConv(channels, channels, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn_qkv(x).flatten(2).transpose(1, 2).unflatten(-1, (3, self.num_heads, -1))
        qkv = normalize(qkv, dim=-1)
        h = ops.attention_qkvpacked(qkv) if self.processor is None else self.processor(self, *qkv.unbind(2))
        h = h.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
        return mp_sum(x, self.attn_proj(h), self.balance)


class EDM2Block(nn.Module):
    """Residual block of the encoder (norms its input over channels) or decoder, with optional resampling and attention.

    Args:
        channels: of the input.
        out_channels: of the output.
        emb_channels: width of the embedding.
        decoder: which of the two.
        resample: None, ``"down"`` or ``"up"``.
        num_heads: of attention behind the block; 0 for none.
        balance: share of a branch in its sum with the main path.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        decoder: bool,
        resample: str | None = None,
        num_heads: int = 0,
        balance: float = 0.3,
    ) -> None:
        super().__init__()
        self.decoder, self.resample, self.balance = decoder, resample, balance
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res0 = MPConv(channels if decoder else out_channels, out_channels, (3, 3))
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(channels, out_channels, (1, 1)) if channels != out_channels else None
        self.attention = MPAttention(out_channels, num_heads, balance) if num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)  # EDM2 keeps the mean, not the magnitude, of a 2x2 patch: images are smooth
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if not self.decoder:
            x = normalize(self.conv_skip(x) if self.conv_skip is not None else x, dim=1)
        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None])
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, self.conv_res1(y), self.balance)
        x = x if self.attention is None else self.attention(x)
        return x.clamp(-256, 256)  # the largest magnitude that half precision is to meet


class EDM2UNet(nn.Module):
    """U-Net of magnitude-preserving blocks (config G of the paper, without its preconditioning).

    Args:
        in_channels: channels C of the input and the prediction. Inputs and targets should have magnitude 1.
        model_channels: channels at full resolution.
        num_blocks: residual blocks per resolution on the way down (one more on the way up).
        channel_mult: channels over ``model_channels`` at each resolution.
        attention_resolutions: factors of downsampling (1, 2, ...) at which there is attention; the middle has it.
        head_dim: channels per head.
        num_classes: labels; 0 for an unconditional model.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int = 4,
        model_channels: int = 128,
        num_blocks: int = 3,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        attention_resolutions: Sequence[int] = (4, 8),
        head_dim: int = 64,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "model_channels": model_channels,
            "num_blocks": num_blocks,
            "channel_mult": tuple(channel_mult),
            "attention_resolutions": tuple(attention_resolutions),
            "head_dim": head_dim,
            "num_classes": num_classes,
        }
        for name in ("in_channels", "model_channels", "num_blocks", "head_dim"):
            require(self.config[name] >= 1, "EDM2UNet", name, "at least 1", self.config[name])
        good = len(channel_mult) > 0 and all(m >= 1 for m in channel_mult)
        require(good, "EDM2UNet", "channel_mult", "factors of at least 1", channel_mult)
        require(num_classes >= 0, "EDM2UNet", "num_classes", "0 or more", num_classes)
        widths = [model_channels * m for m in channel_mult]
        emb = max(widths)

        def heads(width: int, level: int | None = None) -> int:
            if level is not None and 2**level not in attention_resolutions:
                return 0
            require(width % head_dim == 0, "EDM2UNet", "head_dim", f"a divisor of {width} channels", head_dim)
            return width // head_dim

        self.emb_fourier = MPFourier(model_channels)
        self.emb_noise = MPConv(model_channels, emb)
        self.emb_label = MPConv(num_classes, emb) if num_classes else None
        self.conv_in = MPConv(in_channels + 1, widths[0], (3, 3))
        self.enc, self.dec = nn.ModuleList(), nn.ModuleList()
        skips, channels = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            if level:
                self.enc.append(EDM2Block(channels, channels, emb, False, "down"))
                skips.append(channels)
            for _ in range(num_blocks):
                self.enc.append(EDM2Block(channels, width, emb, False, None, heads(width, level)))
                skips.append(channels := width)
        self.middle = nn.ModuleList(
            [
                EDM2Block(channels, channels, emb, True, None, heads(channels)),
                EDM2Block(channels, channels, emb, True),
            ]
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_blocks + 1):
                self.dec.append(EDM2Block(channels + skips.pop(), width, emb, True, None, heads(width, level)))
                channels = width
            if level:
                self.dec.append(EDM2Block(channels, channels, emb, True, "up"))
        self.conv_out = MPConv(channels, in_channels, (3, 3))
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Predicts the training target.

        Args:
            x: [B,C,H,W]; H and W multiples of 2 per resolution after the first.
            t: [B], the noise level as the paper gives it to the network: ``log(sigma) / 4``.
            cond: [B] int64 labels; None for the unconditional prediction (or where there are no classes).

        Returns:
            [B,C,H,W], zero at first.

        Raises:
            ValueError: a shape does not fit the model.
        """
        self._check(x, t, cond)
        wide = torch.promote_types(x.dtype, torch.float32)  # in half precision, noise levels would lose 1/512
        emb = self.emb_noise(self.emb_fourier(t.to(wide)).to(x.dtype))
        if self.emb_label is not None and cond is not None:
            classes = self.config["num_classes"]
            one_hot = F.one_hot(cond, classes).to(emb.dtype) * math.sqrt(classes)
            emb = mp_sum(emb, self.emb_label(one_hot), 0.5)
        emb = mp_silu(emb)
        h = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))  # a constant stands in for all biases
        skips = [h]
        for block in self.enc:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.dec:
            if not block.resample:
                h = mp_cat(h, skips.pop())
            h = block(h, emb)
        out: Tensor = self.conv_out(h, self.out_gain)
        return out

    def _check(self, x: Tensor, t: Tensor, cond: Tensor | None) -> None:
        c, factor, classes = (
            self.config["in_channels"],
            2 ** (len(self.config["channel_mult"]) - 1),
            self.config["num_classes"],
        )
        fits = x.dim() == 4 and x.shape[1] == c and x.shape[2] % factor == 0 and x.shape[3] % factor == 0
        require(fits, "EDM2UNet", "x", f"shape [B,{c},H,W], H and W multiples of {factor}", list(x.shape))
        require(t.shape == x.shape[:1], "EDM2UNet", "t", f"shape [{len(x)}]", list(t.shape))
        if cond is not None:
            require(classes > 0, "EDM2UNet", "cond", "None (the model was built with num_classes=0)", list(cond.shape))
            good = cond.shape == x.shape[:1] and cond.dtype is torch.int64
            require(good, "EDM2UNet", "cond", f"int64 labels of shape [{len(x)}]", (list(cond.shape), cond.dtype))
