"""Diffusion transformer (DiT): Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022 (arXiv:2212.09748).

A transformer over image patches in which every block is conditioned by adaLN-Zero: from the condition c = t_emb + y_emb
each block computes six vectors (shift, scale, gate; once for attention, once for the MLP) and does, with LN(·) a layer
norm without parameters,

    x <- x + gate_1 * Attention(LN(x) * (1 + scale_1) + shift_1)
    x <- x + gate_2 *       MLP(LN(x) * (1 + scale_2) + shift_2)

Between two branches there is always a gated residual followed by a modulated norm, and the norm that follows a block's
last gate belongs to the *next* block (or to the final layer). Here that pair is one call, ``ops.gate_residual_adaln``,
so the activations are visited once per norm site; the first norm, which no gate precedes, is ``ops.adaln_modulate``.

Parameters carry the names of the published checkpoints, of DiT and of SiT (Ma et al., 2024, arXiv:2401.08740), so
those load with ``load_state_dict``; `fastdiff.models.load_weights` reads the files, and the names of diffusers as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models._backbone import ClassConditional
from fastdiff.models._diffusers_dit import DiffusersDiT
from fastdiff.models._layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
)

__all__ = ["DIT_PRESETS", "DiT", "dit"]

# (hidden_size, depth, num_heads) by size, and the patch sizes of the paper (Table 1).
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
DIT_PRESETS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"patch_size": patch, "hidden_size": width, "depth": depth, "num_heads": heads}
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}


def dit(name: str, **overrides: Any) -> DiT:
    """Builds a DiT of a published size.

    Args:
        name: ``"DiT-{S,B,L,XL}/{2,4,8}"``: width and depth, then the patch side in (latent) pixels.
        **overrides: any argument of :class:`DiT`; e.g. ``input_size=32`` for 256x256 images through a x8 autoencoder.

    Raises:
        ValueError: the name is not a preset.
    """
    if name not in DIT_PRESETS:
        raise ValueError(f"[dit] name: expected one of {', '.join(DIT_PRESETS)}, got {name!r}")
    settings: dict[str, Any] = {**DIT_PRESETS[name], **overrides}
    return DiT(**settings)


class DiTBlock(nn.Module):
    """The two branches of a block and its modulation; `DiT` chains them across norm sites."""

    branches = 2

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, mlp_norm_eps: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.mlp_norm_eps = mlp_norm_eps

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
        gate_1, shift_2, scale_2, gate_2 = own
        x, h = ops.gate_residual_adaln(x, self.attn(h), gate_1, shift_2, scale_2, eps=self.mlp_norm_eps)
        branch = self.mlp(h)
        x = x if control is None else x + control
        return ops.gate_residual_adaln(x, branch, gate_2, shift_next, scale_next)


class FinalLayer(nn.Module):
    """Tokens [B,N,D], already normed and modulated, to patches [B,N,p*p*out_channels]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))


class DiT(DiffusersDiT, ClassConditional):
    """Diffusion transformer with adaLN-Zero conditioning.

    Args:
        input_size: side of the (square) image or latent, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch; the sequence has ``(input_size / patch_size)**2`` tokens.
        in_channels: channels C of the input.
        hidden_size: token width D; a multiple of 4 (position embedding) and of ``num_heads``.
        depth: number of blocks, at least 1.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        class_dropout_prob: share of labels replaced by the null class in training mode, in [0, 1]; above 0 the model
            can also be asked for its unconditional prediction (``cond=None``), which guidance needs. The draw is from
            torch's global generator.
        num_classes: number of labels; 0 builds an unconditional model.
        learn_sigma: predict 2C channels (the second half is the variance of the paper, §3.2) in place of C.
        time_scale: times are multiplied by it before they are embedded. The sinusoids resolve differences of about 1,
            so: 1 (default) for integer timesteps 0..999, as the published weights expect; 1000 for flow time in [0, 1].
        frequency_shift: of the sinusoids of time, see `TimestepEmbedder`; 1 computes what diffusers does.
        mlp_norm_eps: epsilon of the norm before the MLP.
        shared_embedders: one embedding of time and label for all blocks. A model that was trained in diffusers has one
            in every block; that of the first serves the final layer.

    Attributes:
        gradient_checkpointing: keep only what goes from block to block for the backward pass, and compute the rest
            again then: memory for time. Blocks with attention hooks (`attention_hooks`, `IPAdapter`) keep everything.

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
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        time_scale: float = 1.0,
        frequency_shift: float = 0.0,
        mlp_norm_eps: float = 1e-6,
        shared_embedders: bool = True,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = settings
        self._check_config(counts=("num_heads",), positive=("mlp_ratio",))
        self._require(num_classes >= 0, "num_classes", "0 (unconditional) or more", num_classes)
        self._require(frequency_shift < TimestepEmbedder.frequencies, "frequency_shift", "below 128", frequency_shift)
        self._require(mlp_norm_eps >= 0, "mlp_norm_eps", "0 or more", mlp_norm_eps)

        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)

        def embedders() -> tuple[Any, Any]:
            times = TimestepEmbedder(hidden_size, time_scale, frequency_shift=frequency_shift)
            return times, LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None

        if shared_embedders:
            self.t_embedder, self.y_embedder = embedders()
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, input_size // patch_size)[None])
        blocks = [DiTBlock(hidden_size, num_heads, mlp_ratio, mlp_norm_eps) for _ in range(depth)]
        if not shared_embedders:
            for block in blocks:
                block.t_embedder, block.y_embedder = embedders()
        self.blocks: Sequence[DiTBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """adaLN-Zero (§3.2): modulation and output start at zero, so that every block starts as the identity."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
            elif "t_embedder" in name or "y_embedder" in name:
                nn.init.normal_(parameter, std=0.02)
            else:  # matrices; the patch embedding is one as well, over flattened patches
                nn.init.xavier_uniform_(parameter.data.flatten(1))

    def _embedders(self) -> Sequence[Any]:
        return [self] if self.config["shared_embedders"] else [*self.blocks, self.blocks[0]]
