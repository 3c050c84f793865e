"""U-Net of ADM and Stable Diffusion: Dhariwal & Nichol 2021 (arXiv:2105.05233), Rombach et al. 2022 (arXiv:2112.10752).

Residual blocks at falling, then at rising resolution, with a skip connection between each pair; self-attention, or
transformer blocks that also attend to a text, at the resolutions that are asked for. Time (and label) come in through
an embedding that every residual block adds to its features, or scales and shifts them with.

Parameters carry the names of the published checkpoints (``input_blocks.1.0.in_layers.0.weight``, ...), so ADM's and
Stable Diffusion 1.x and 2.x's load with ``load_state_dict``; `fastdiff.models.load_weights` reads the files, of whole
Stable Diffusion models too, and of ``diffusers.UNet2DConditionModel``, whose configuration `unet_from_diffusers` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models._layers import require
from fastdiff.models._unet_blocks import (
    AttentionBlock,
    Context,
    Downsample,
    ResBlock,
    SpatialTransformer,
    Stage,
    Upsample,
    sinusoids,
)
from fastdiff.models._unet_keys import adapted_to

__all__ = ["UNet"]

Cond = Tensor | tuple[Tensor, Tensor] | None


class UNet(nn.Module):
    """U-Net with residual blocks and attention.

    Args:
        in_channels: channels C of the input.
        model_channels: channels at full resolution; a multiple of ``norm_groups``.
        out_channels: channels of the prediction; C if None.
        num_res_blocks: residual blocks per resolution on the way down (one more on the way up).
        attention_resolutions: factors of downsampling (1, 2, 4, ...) at which there is attention. (ADM's scripts name
            the sides of the feature maps instead: for 64x64 images, their 16 is 4 here.) The middle always has it.
        channel_mult: channels over ``model_channels`` at each resolution; its length is the number of resolutions.
        num_heads: attention heads; of ``num_heads`` and ``head_dim`` exactly one is given.
        head_dim: channels per head, the number of heads following from it.
        num_classes: labels of a class-conditional model; 0 for none.
        class_dropout_prob: share of labels replaced by the null class in training mode, in [0, 1]; above 0 there is one
            more row in ``label_emb``, and the model can be asked for its unconditional prediction (``cond=None``).
        context_dim: width E of the text tokens of a text-conditional model; None for none.
        transformer_depth: transformer blocks per place of attention, with a context.
        learn_sigma: predict twice the channels (the second half is the variance: ADM, §2).
        use_scale_shift_norm: the embedding scales and shifts the second norm of a residual block, and is not added.
        resblock_updown: residual blocks change the resolution, in place of convolutions.
        use_new_attention_order: how the checkpoint orders channels of qkv without a context; see `AttentionBlock`.
        dropout: in residual blocks, in [0, 1).
        norm_groups: groups of every group norm.
        time_scale: times are multiplied by it before they are embedded: 1 for timesteps 0..999, 1000 for [0, 1].

    Raises:
        ValueError: an argument is out of range, or two of them exclude each other.
    """

    def __init__(
        self,
        in_channels: int = 4,
        model_channels: int = 320,
        out_channels: int | None = None,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (1, 2, 4),
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_classes: int = 0,
        class_dropout_prob: float = 0.0,
        context_dim: int | None = None,
        *,
        transformer_depth: int = 1,
        learn_sigma: bool = False,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        dropout: float = 0.0,
        norm_groups: int = 32,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "model_channels": model_channels,
            "out_channels": out_channels,
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": tuple(attention_resolutions),
            "channel_mult": tuple(channel_mult),
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_classes": num_classes,
            "class_dropout_prob": class_dropout_prob,
            "context_dim": context_dim,
            "transformer_depth": transformer_depth,
            "learn_sigma": learn_sigma,
            "use_scale_shift_norm": use_scale_shift_norm,
            "resblock_updown": resblock_updown,
            "use_new_attention_order": use_new_attention_order,
            "dropout": dropout,
            "norm_groups": norm_groups,
            "time_scale": time_scale,
        }
        self._check_config()
        self.out_channels = out_channels * (1 + learn_sigma)
        width, emb = model_channels, 4 * model_channels

        def res(channels: int, out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, emb, out, dropout, use_scale_shift_norm, resample, norm_groups)

        def attention(channels: int) -> nn.Module:
            heads = num_heads or channels // (head_dim or channels)
            require(channels % heads == 0, "UNet", "num_heads", f"a divisor of {channels} channels", heads)
            require(
                head_dim is None or heads * head_dim == channels,
                "UNet",
                "head_dim",
                f"a divisor of {channels}",
                head_dim,
            )
            if context_dim is None:
                return AttentionBlock(channels, heads, use_new_attention_order, norm_groups)
            return SpatialTransformer(channels, heads, transformer_depth, context_dim, norm_groups)

        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes + (class_dropout_prob > 0), emb)

        channels = width * channel_mult[0]
        stages = [Stage(nn.Conv2d(in_channels, channels, 3, padding=1))]
        skips = [channels]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(channels, channels := width * mult)]
                if 2**level in attention_resolutions:
                    layers.append(attention(channels))
                stages.append(Stage(*layers))
                skips.append(channels)
            if level + 1 < len(channel_mult):
                stages.append(
                    Stage(res(channels, channels, "down") if resblock_updown else Downsample(channels, channels))
                )
                skips.append(channels)
        self.skip_channels = tuple(skips)
        self.input_blocks: Sequence[Stage] = nn.ModuleList(stages)  # type: ignore[assignment]
        self.middle_block = Stage(res(channels, channels), attention(channels), res(channels, channels))

        stages = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), channels := width * mult)]
                if 2**level in attention_resolutions:
                    layers.append(attention(channels))
                if level and i == num_res_blocks:
                    layers.append(res(channels, channels, "up") if resblock_updown else Upsample(channels, channels))
                stages.append(Stage(*layers))
        self.output_blocks: Sequence[Stage] = nn.ModuleList(stages)  # type: ignore[assignment]
        conv = nn.Conv2d(channels, self.out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(norm_groups, channels), nn.SiLU(), conv)
        self._initialise()

    def _initialise(self) -> None:
        """Every residual branch, and the output, starts at zero; the rest is torch's default."""
        last: list[nn.Module] = [self.out[2]]
        for module in self.modules():
            if isinstance(module, ResBlock):
                last.append(module.out_layers[3])
            elif isinstance(module, AttentionBlock | SpatialTransformer):
                last.append(module.proj_out)
        for layer in last:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, *, control: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Predicts the training target (noise, velocity, ...) for noisy images.

        Args:
            x: [B, in_channels, H, W], any size (one that halving does not divide is as good).
            t: [B], times in the units that ``time_scale`` was chosen for.
            cond: with classes, [B] int64 labels, or None for the unconditional prediction; with a context, tokens
                [B, S, context_dim], or (tokens, mask [B, S] of bools, True where a token counts; at least one per row).
            control: what to add to the skip connections and, last, to the middle: ``len(input_blocks) + 1`` tensors of
                their shapes, or None for nothing there.

        Returns:
            [B, out_channels, H, W], twice the channels with ``learn_sigma``.

        Raises:
            ValueError: a shape or the presence of a condition does not fit the model.
        """
        emb, context, skips, h = self.encode(x, t, cond)
        if control is not None:
            expected = f"{len(skips) + 1} entries, one per skip connection and the middle"
            require(len(control) == len(skips) + 1, "UNet", "control", expected, len(control))
            *rest, last = control
            skips = [s if c is None else s + c for s, c in zip(skips, rest, strict=True)]
            h = h if last is None else h + last
        for stage in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = stage(h, emb, context, skips[-1].shape[2:] if skips else None)
        out: Tensor = self.out(h)
        return out

    def encode(
        self, x: Tensor, t: Tensor, cond: Cond = None, *, hint: Tensor | None = None
    ) -> tuple[Tensor, Context | None, list[Tensor], Tensor]:
        """The way down: (embedding [B,4*model_channels], context, skip connections, output of the middle).

        `hint` is added after the first convolution: the entry of a :class:`~fastdiff.models.controlnet.ControlNet`.
        """
        self._check(x, t, cond)
        kind = next(self.parameters()).dtype
        times = t.to(torch.promote_types(t.dtype, torch.float32)) * self.config["time_scale"]
        emb = self.time_embed(sinusoids(times, self.config["model_channels"]).to(kind))
        context: Context | None = None
        if self.config["num_classes"]:
            emb = emb + self.label_emb(self._labels(t, cond))
        elif self.config["context_dim"]:
            context = cond if isinstance(cond, tuple) else (cond, None)  # type: ignore[assignment]
        h = x
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            if hint is not None and not skips:
                h = h + hint
            skips.append(h)
        return emb, context, skips, self.middle_block(h, emb, context)

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as ``load_state_dict`` takes them, from a whole Stable Diffusion model, or by diffusers' names."""
        return adapted_to(self, state)

    def _labels(self, t: Tensor, cond: Any) -> Tensor:
        null, p = self.config["num_classes"], self.config["class_dropout_prob"]
        labels: Tensor = t.new_full(t.shape, null, dtype=torch.long) if cond is None else cond
        if self.training and p > 0:
            labels = labels.masked_fill(torch.rand(labels.shape, device=labels.device) < p, null)
        return labels

    def _check_config(self) -> None:
        c = self.config
        for name in (
            "in_channels",
            "model_channels",
            "out_channels",
            "num_res_blocks",
            "transformer_depth",
            "norm_groups",
        ):
            require(c[name] >= 1, "UNet", name, "at least 1", c[name])
        groups = c["norm_groups"]
        require(
            c["model_channels"] % groups == 0, "UNet", "model_channels", f"a multiple of {groups}", c["model_channels"]
        )
        good = len(c["channel_mult"]) > 0 and all(m >= 1 for m in c["channel_mult"])
        require(good, "UNet", "channel_mult", "factors of at least 1", c["channel_mult"])
        heads = (c["num_heads"], c["head_dim"])
        one = (heads[0] is None) != (heads[1] is None) and max(h or 0 for h in heads) >= 1
        require(one, "UNet", "num_heads, head_dim", "exactly one of them, at least 1", heads)
        known = [2**level for level in range(len(c["channel_mult"]))]
        good = set(c["attention_resolutions"]) <= set(known)
        require(good, "UNet", "attention_resolutions", f"some of {known}", c["attention_resolutions"])
        require(c["num_classes"] >= 0, "UNet", "num_classes", "0 or more", c["num_classes"])
        require(0 <= c["class_dropout_prob"] <= 1, "UNet", "class_dropout_prob", "in [0, 1]", c["class_dropout_prob"])
        both = bool(c["num_classes"] and c["context_dim"])
        require(not both, "UNet", "num_classes", "0 with a context_dim (one condition)", c["num_classes"])
        require(0 <= c["dropout"] < 1, "UNet", "dropout", "in [0, 1)", c["dropout"])
        require(c["time_scale"] > 0, "UNet", "time_scale", "above 0", c["time_scale"])

    def _check(self, x: Tensor, t: Tensor, cond: Any) -> None:
        channels, classes, width = self.config["in_channels"], self.config["num_classes"], self.config["context_dim"]
        require(x.dim() == 4 and x.shape[1] == channels, "UNet", "x", f"shape [B,{channels},H,W]", list(x.shape))
        require(t.shape == x.shape[:1], "UNet", "t", f"shape [{len(x)}]", list(t.shape))
        if width is not None:
            tokens, mask = cond if isinstance(cond, tuple) else (cond, None)
            got = list(tokens.shape) if isinstance(tokens, Tensor) else tokens
            good = (
                isinstance(tokens, Tensor) and tokens.dim() == 3 and (len(x), width) == (len(tokens), tokens.shape[-1])
            )
            require(good, "UNet", "cond", f"tokens of shape [{len(x)},S,{width}]", got)
            good = mask is None or (mask.shape == tokens.shape[:2] and mask.dtype is torch.bool)
            got = None if mask is None else (list(mask.shape), mask.dtype)
            require(good, "UNet", "cond", f"a mask of bools of shape {list(tokens.shape[:2])}", got)
        elif not classes:
            require(
                cond is None, "UNet", "cond", "None (the model has neither classes nor a context)", type(cond).__name__
            )
        elif cond is None:
            has_null = self.config["class_dropout_prob"] > 0
            require(
                has_null, "UNet", "cond", "labels [B] (class_dropout_prob=0 leaves no unconditional prediction)", None
            )
        else:
            good = isinstance(cond, Tensor) and cond.shape == x.shape[:1] and cond.dtype in (torch.int64, torch.int32)
            got = (list(cond.shape), cond.dtype) if isinstance(cond, Tensor) else type(cond).__name__
            require(good, "UNet", "cond", f"integer labels of shape [{len(x)}]", got)
