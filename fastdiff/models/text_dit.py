"""Text-conditioned diffusion transformer: Chen et al., "PixArt-alpha", 2023 (arXiv:2310.00426).

A DiT whose blocks attend to the tokens of a caption between self-attention and MLP, and whose modulation is
adaLN-single (§2.3): one layer, shared by all blocks, makes six vectors from the time, and each block adds a table of
its own.

    x <- x + gate_1 * Attention(LN(x) * (1 + scale_1) + shift_1)
    x <- x +      CrossAttention(x, caption)
    x <- x + gate_2 *       MLP(LN(x) * (1 + scale_2) + shift_2)

The second residual has no gate and is followed by a modulated norm, the third by that of the next block: each pair is
one call, ``ops.gate_residual_adaln``, so the activations are visited once per norm site, as in `DiT`.

Parameters carry the names of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models._backbone import Backbone
from fastdiff.models._captions import (
    Caption,
    CaptionEmbedder,
    check_caption,
    join_captions,
    may_read,
    split_caption,
)
from fastdiff.models._diffusers_text_dit import DiffusersTextDiT
from fastdiff.models._layers import (
    Attention,
    CrossAttention,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
)
from fastdiff.models.modulation import Modulation, ModulationTable, check_times
from fastdiff.ops import _linear

__all__ = ["TEXT_DIT_PRESETS", "TextDiT", "text_dit"]

_XL = {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16, "caption_channels": 4096}
TEXT_DIT_PRESETS: dict[str, dict[str, Any]] = {
    "PixArt-XL/2-256": {**_XL, "input_size": 32},
    "PixArt-XL/2-512": {**_XL, "input_size": 64},
    "PixArt-XL/2-1024": {**_XL, "input_size": 128, "position_scale": 2.0, "micro_conditions": True},
    "PixArt-Sigma-XL/2-1024": {**_XL, "input_size": 128, "position_scale": 2.0, "caption_tokens": 300},
}


def text_dit(name: str, **overrides: Any) -> TextDiT:
    """Builds a TextDiT of a published size.

    Args:
        name: one of ``TEXT_DIT_PRESETS``; the last number is the side of the images.
        **overrides: any argument of :class:`TextDiT`.

    Raises:
        ValueError: the name is not a preset.
    """
    if name not in TEXT_DIT_PRESETS:
        raise ValueError(f"[text_dit] name: expected one of {', '.join(TEXT_DIT_PRESETS)}, got {name!r}")
    settings: dict[str, Any] = {**TEXT_DIT_PRESETS[name], **overrides}
    return TextDiT(**settings)


class TextDiTBlock(nn.Module):
    """The three branches of a block and its table; :meth:`TextDiT.forward` chains them across norm sites."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        text: Tensor,
        mask: Tensor | None,
        own: Sequence[Tensor],
        shift_next: Tensor,
        scale_next: Tensor,
        control: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, its modulated norm) -> the same for the next block, whose shift and scale follow `own`.

        `control` [B,N,D] is added to x behind this block.
        """
        gate_1, shift_2, scale_2, gate_2 = own
        x = ops.gate_residual(x, self.attn(h), gate_1)
        ones = torch.ones(1, dtype=x.dtype, device=x.device).expand(x.shape[-1])
        x, h = ops.gate_residual_adaln(x, self.cross_attn(x, text, mask), ones, shift_2, scale_2)
        branch = self.mlp(h)
        x = x if control is None else x + control
        return ops.gate_residual_adaln(x, branch, gate_2, shift_next, scale_next)


class FinalLayer(nn.Module):
    """Tokens [B,N,D], already normed and modulated, to patches [B,N,p*p*out_channels]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))


class TextDiT(DiffusersTextDiT, Backbone):
    """Diffusion transformer with cross-attention to text tokens and adaLN-single conditioning.

    Args:
        input_size: side of the (square) image or latent, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch; the sequence has ``(input_size / patch_size)**2`` tokens.
        in_channels: channels C of the input.
        hidden_size: token width D; a multiple of 4 and of ``num_heads``.
        depth: number of blocks, at least 1.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        caption_channels: width E of the text tokens (4096 for T5-XXL).
        caption_tokens: length of the null caption, and the most tokens of a caption that can be dropped or guided.
        caption_dropout_prob: share of captions replaced by the null caption in training mode, in [0, 1]; above 0 the
            model can also be asked for its unconditional prediction (``cond=None``). The draw is from torch's global
            generator.
        learn_sigma: predict 2C channels in place of C.
        time_scale: see `DiT`.
        position_scale: positions are divided by it before they are embedded: 2 in the published models at 1024, else 1.
        micro_conditions: embed the size and the aspect ratio of the image as well (PixArt-alpha at 1024).

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
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        caption_tokens: int = 120,
        caption_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        *,
        time_scale: float = 1.0,
        position_scale: float = 1.0,
        micro_conditions: bool = False,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = settings
        counts, positive = ("num_heads", "caption_channels", "caption_tokens"), ("mlp_ratio", "position_scale")
        self._check_config(counts=counts, positive=positive)
        if micro_conditions:
            self._require(hidden_size % 3 == 0, "hidden_size", "a multiple of 3 (micro_conditions=True)", hidden_size)

        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, time_scale)
        if micro_conditions:
            self.csize_embedder = TimestepEmbedder(hidden_size // 3, 1.0)
            self.ar_embedder = TimestepEmbedder(hidden_size // 3, 1.0)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, caption_tokens, caption_dropout_prob)
        positions = sincos_position_embedding(hidden_size, input_size // patch_size, position_scale)
        self.register_buffer("pos_embed", positions[None])
        blocks = (TextDiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.blocks: Sequence[TextDiTBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """As published: the caption and the output have no effect at first; embedders and their products are small."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "cross_attn.proj" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
            elif name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=self.config["hidden_size"] ** -0.5)
            elif name.startswith(("t_embedder", "y_embedder", "csize_embedder", "ar_embedder", "t_block")):
                nn.init.normal_(parameter, std=0.02)
            else:  # matrices; the patch embedding is one as well, over flattened patches
                nn.init.xavier_uniform_(parameter.data.flatten(1))

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Caption | None = None,
        *,
        modulation: Modulation | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
        taps: list[Tensor] | None = None,
    ) -> Tensor:
        """Predicts the training target (noise, velocity, ...) for noisy images.

        Args:
            x: [B, in_channels, input_size, input_size].
            t: [B], times in the units that ``time_scale`` was chosen for.
            cond: text tokens [B,S,E], or (tokens, mask [B,S]), the mask true (or not 0) where a token counts; None for
                the unconditional prediction. A sample without a token that counts attends to all of them.
            modulation: a step of a table (:meth:`precompute_modulation`), in place of t.
            resolution: [B,2], height and width of the images in pixels, for ``micro_conditions``; by default what a x8
                autoencoder makes of the input size.
            aspect_ratio: [B], height over width, likewise; by default 1.
            control: what to add to the tokens [B,N,D] before each block and, last, behind the last one: up to
                ``depth + 1`` tensors of their shape or [1,N,D], or None for nothing there (`ControlNet`).
            taps: a list to which the tokens behind each block are appended.

        Returns:
            [B, out_channels, input_size, input_size].

        Raises:
            ValueError: a shape, the presence of a caption or the table does not fit the model.
        """
        self._check(x, t, cond, modulation)
        width = self.config["hidden_size"]
        if modulation is not None:
            c = modulation.for_batch(len(x))
        else:
            assert t is not None  # checked
            c = self._modulation(t, resolution, aspect_ratio)
        # One [B,D] vector per (site, role); a site's shift and scale are used where the norm is, after the last gate.
        shared, last = c[:, : 6 * width].unflatten(-1, (6, width)), c[:, None, 6 * width :]
        vectors = [(block.scale_shift_table + shared).unbind(1) for block in self.blocks]
        vectors.append((self.final_layer.scale_shift_table + last).unbind(1))

        tokens, mask = self._caption(cond, x)
        text = self.y_embedder(tokens)
        return self._through_blocks(x, vectors, text, mask, control=control, taps=taps)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Caption,
        guidance_scale: float,
        *,
        negative: Caption | None = None,
        modulation: Modulation | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Classifier-free guidance: ``uncond + guidance_scale * (pred - uncond)``, in one batch, but for the variances.

        Args:
            x: [B, in_channels, input_size, input_size].
            t: [B].
            cond: tokens, or (tokens, mask), as in :meth:`forward`.
            guidance_scale: 1 is the conditional prediction, 0 the unconditional one.
            negative: a caption in place of the null caption, of any length. The null caption has the mask of cond, as
                in training.
            modulation: as in :meth:`forward`, and so are the others.

        Returns:
            [B, out_channels, input_size, input_size].

        Raises:
            ValueError: as in :meth:`forward`; there is neither a null caption nor `negative`.
        """
        if cond is None:
            raise ValueError("[TextDiT.forward_with_cfg] cond: expected a caption, got None")
        self._check(x, t, cond, modulation)
        tokens, mask = split_caption(cond)
        if negative is None:
            self._check_null(tokens.shape[1])
            other = self.y_embedder.y_embedding[: tokens.shape[1]].to(tokens.dtype).expand_as(tokens)
            other_mask = mask
        else:
            self._check(x, t, negative, modulation)
            other, other_mask = split_caption(negative)
        both = join_captions(tokens, mask, other, other_mask)
        twice = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        extra = {name: None if value is None else torch.cat([value, value]) for name, value in twice.items()}
        if modulation is not None:
            modulation = modulation.guided(len(x))
        times = None if t is None else torch.cat([t, t])
        return self._guided(self(torch.cat([x, x]), times, both, modulation=modulation, **extra), guidance_scale)

    # ------------------------------------------------------------------------------------------------ modulation

    @torch.no_grad()
    def precompute_modulation(
        self,
        timesteps: Tensor,
        cond: Caption | None = None,
        *,
        guidance: bool = False,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> ModulationTable:
        """What adaLN-single computes from the time, for a whole schedule, in one product.

        It does not depend on the caption, so the table serves any caption, batch and guidance.

        Args:
            timesteps: [T], the times of the steps.
            cond: not used; there for the sake of one signature with `DiT`.
            guidance: likewise.
            resolution: [2], of all images; see :meth:`forward`.
            aspect_ratio: a number as a tensor, likewise.

        Returns:
            ``(T, 7 D)`` numbers, in the type of the weights: the six shared vectors and the embedding of the time. (The
            blocks add their tables as they run; with these added it would take 6 depth / 7 times the memory.)

        Raises:
            ValueError: a shape does not fit.
        """
        check_times("TextDiT.precompute_modulation", timesteps)
        steps = len(timesteps)
        resolution = None if resolution is None else resolution.reshape(1, -1).expand(steps, -1)
        aspect_ratio = None if aspect_ratio is None else aspect_ratio.reshape(-1).expand(steps)
        values = self._modulation(timesteps, resolution, aspect_ratio)
        return ModulationTable(values.unsqueeze(1), timesteps, null_row=0)

    def _modulation(self, t: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        """[B, 7 D]: the six vectors of the blocks, and the embedding of the time for the final layer."""
        self._require_modulation_weights()
        c: Tensor = self.t_embedder(t)
        if self.config["micro_conditions"]:
            if resolution is None:
                resolution = t.new_full((len(t), 2), 8 * self.config["input_size"])
            if aspect_ratio is None:
                aspect_ratio = t.new_ones(len(t))
            self._require(resolution.shape == (len(t), 2), "resolution", f"shape [{len(t)},2]", list(resolution.shape))
            self._require(aspect_ratio.numel() == len(t), "aspect_ratio", f"shape [{len(t)}]", list(aspect_ratio.shape))
            size = self.csize_embedder(resolution.flatten()).reshape(len(t), -1)
            c = c + torch.cat([size, self.ar_embedder(aspect_ratio.flatten())], dim=1)
        else:
            given = {"resolution": resolution, "aspect_ratio": aspect_ratio}
            extra = ", ".join(name for name, value in given.items() if value is not None)
            self._require(not extra, extra, "None (the model was built without micro_conditions)", "a tensor")
        return torch.cat([_linear.call(self._modulation_layers()["t_block.1"], F.silu(c)), c], dim=-1)

    def _modulation_layers(self) -> dict[str, nn.Linear]:
        layer: Any = self.t_block[1]
        return {"t_block.1": layer}

    # ------------------------------------------------------------------------------------------------ captions

    def _caption(self, cond: Caption | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens in the type of x, with dropout in training, and the mask, if it is not known to hide nothing."""
        if cond is None:
            return self.y_embedder.y_embedding.to(x.dtype).expand(x.shape[0], -1, -1), None
        tokens, mask = split_caption(cond)
        tokens = tokens.to(x.dtype)
        if self.training and self.config["caption_dropout_prob"] > 0:
            self._check_null(tokens.shape[1])
            tokens = self.y_embedder.drop(tokens)
        if mask is None or not may_read(mask) or any(block.cross_attn.processor for block in self.blocks):
            return tokens, mask
        # Tokens that no sample has are left out; they are most of a padded caption.
        kept = mask.any(0)
        if not bool(kept.all()) and bool(mask.any(1).all()):
            tokens, mask = tokens[:, kept], mask[:, kept]
        return tokens, None if bool(mask.all()) else mask

    def _check_null(self, tokens: int) -> None:
        has_null = self.config["caption_dropout_prob"] > 0
        self._require(has_null, "cond", "a caption (caption_dropout_prob=0 leaves no unconditional prediction)", None)
        most = self.config["caption_tokens"]
        self._require(tokens <= most, "cond", f"at most {most} tokens (caption_tokens) beside the null caption", tokens)

    def _check(self, x: Tensor, t: Tensor | None, cond: Caption | None, modulation: Modulation | None) -> None:
        self._check_inputs(x, t, modulation, 7 * self.config["hidden_size"])
        if cond is None:
            self._check_null(0)
            return
        check_caption("TextDiT", cond, x.shape[0], self.config["caption_channels"])
