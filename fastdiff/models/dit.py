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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff import ops
from fastdiff.models._control import control_entries
from fastdiff.models._diffusers_dit import DiffusersDiT
from fastdiff.models._layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    may_recompute,
    require,
    sincos_position_embedding,
    unpatchify,
)
from fastdiff.models.modulation import Modulated, Modulation, ModulationTable, check_times, rows_of_labels
from fastdiff.ops import _linear

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
    """The two branches of a block and its modulation; :meth:`DiT.forward` chains them across norm sites."""

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


class DiT(DiffusersDiT, Modulated):
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

    pos_embed: Tensor
    gradient_checkpointing: bool
    derived_buffers = ("pos_embed",)  # computed here; a file need not have it

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
        super().__init__()
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "time_scale": time_scale,
            "frequency_shift": frequency_shift,
            "mlp_norm_eps": mlp_norm_eps,
            "shared_embedders": shared_embedders,
        }
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            _require(self.config[name] >= 1, name, "at least 1", self.config[name])
        _require(input_size % patch_size == 0, "input_size", f"a multiple of patch_size={patch_size}", input_size)
        _require(hidden_size % num_heads == 0, "hidden_size", f"a multiple of num_heads={num_heads}", hidden_size)
        _require(hidden_size % 4 == 0, "hidden_size", "a multiple of 4", hidden_size)
        _require(mlp_ratio > 0, "mlp_ratio", "above 0", mlp_ratio)
        _require(0 <= class_dropout_prob <= 1, "class_dropout_prob", "in [0, 1]", class_dropout_prob)
        _require(num_classes >= 0, "num_classes", "0 (unconditional) or more", num_classes)
        _require(time_scale > 0, "time_scale", "above 0", time_scale)

        _require(frequency_shift < TimestepEmbedder.frequencies, "frequency_shift", "below 128", frequency_shift)
        _require(mlp_norm_eps >= 0, "mlp_norm_eps", "0 or more", mlp_norm_eps)

        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False
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

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Tensor | None = None,
        *,
        modulation: Modulation | None = None,
        control: Sequence[Tensor | None] | None = None,
        taps: list[Tensor] | None = None,
    ) -> Tensor:
        """Predicts the training target (noise, velocity, ...) for noisy images.

        Args:
            x: [B, in_channels, input_size, input_size].
            t: [B], times in the units that ``time_scale`` was chosen for.
            cond: [B] int64 class labels; None for the unconditional prediction. ``num_classes`` is the null class.
            modulation: a step of a table (:meth:`precompute_modulation`), in place of t and cond, which are not used.
            control: what to add to the tokens [B,N,D] before each block and, last, behind the last one: up to
                ``depth + 1`` tensors of their shape, or None for nothing there (`ControlNet`).
            taps: a list to which the tokens behind each block are appended.

        Returns:
            [B, out_channels, input_size, input_size].

        Raises:
            ValueError: a shape, the presence of labels or the table does not fit the model.
        """
        self._check(x, t, cond, modulation)
        if modulation is not None:
            width = self.config["hidden_size"]
            found = modulation.for_batch(len(x)).split([6 * width] * len(self.blocks) + [2 * width], dim=-1)
        else:
            assert t is not None  # checked
            found = tuple(self._modulation(t, cond, drop=self.training))
        # One [B,D] vector per (site, role); a site's shift and scale are used where the norm is, after the last gate.
        mods = [row.chunk(6, dim=-1) for row in found[:-1]]
        mods.append(found[-1].chunk(2, dim=-1))
        added = control_entries("DiT", control, len(self.blocks))
        x = self.x_embedder(x) + self.pos_embed
        x = x if added[0] is None else x + added[0]
        h = ops.adaln_modulate(x, mods[0][0], mods[0][1])
        for i, block in enumerate(self.blocks):
            site = (x, h, mods[i][2:], *mods[i + 1][:2], added[i + 1])
            if self.gradient_checkpointing and torch.is_grad_enabled() and may_recompute(block):
                x, h = checkpoint(block, *site, use_reentrant=False)  # type: ignore[misc]
            else:
                x, h = block(*site)
            if taps is not None:
                taps.append(x)
        return unpatchify(_linear.call(self.final_layer.linear, h), self.config["patch_size"])

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor | None,
        cond: Tensor | None,
        guidance_scale: float,
        *,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans, 2022): ``uncond + guidance_scale * (pred - uncond)``, in one batch.

        All ``in_channels`` of the prediction are guided; learned variance channels are the conditional ones. (The
        published sampling code guides three of its four latent channels, by its own account for reproducibility only.)

        Args:
            x: [B, in_channels, input_size, input_size].
            t: [B].
            cond: [B] int64 class labels.
            guidance_scale: 1 is the conditional prediction, 0 the unconditional one.
            modulation: a step of a table with ``guidance=True``, in place of t and cond.

        Returns:
            [B, out_channels, input_size, input_size].

        Raises:
            ValueError: as in :meth:`forward`; the model or the table has no null class.
        """
        self._check(x, t, cond, modulation)
        twice = torch.cat([x, x])
        if modulation is not None:
            pred, uncond = self(twice, None, modulation=modulation.guided(len(x))).chunk(2)
        else:
            if cond is None or t is None:
                raise ValueError("[DiT.forward_with_cfg] cond: expected labels [B], got None")
            self._check(x, t, None)  # guidance needs the null class
            labels = torch.cat([cond, torch.full_like(cond, self.config["num_classes"])])
            pred, uncond = self(twice, torch.cat([t, t]), labels).chunk(2)
        c = self.config["in_channels"]
        guided = uncond[:, :c] + guidance_scale * (pred[:, :c] - uncond[:, :c])
        return torch.cat([guided, pred[:, c:]], dim=1)

    # ------------------------------------------------------------------------------------------------ modulation

    @torch.no_grad()
    def precompute_modulation(
        self, timesteps: Tensor, cond: Tensor | None = None, *, guidance: bool = False
    ) -> ModulationTable:
        """The modulation of every block for a whole schedule: each layer makes one product for all times and labels.

        Args:
            timesteps: [T], the times of the steps.
            cond: [B] int64 class labels, the same at every step; equal ones are computed once. If all are equal (or
                None: the unconditional prediction), the table serves a batch of any size.
            guidance: add the null class, for :meth:`forward_with_cfg`.

        Returns:
            ``(T * U, (6 depth + 2) D)`` numbers for U distinct labels, in the type of the weights.

        Raises:
            ValueError: a shape or the labels do not fit the model.
        """
        check_times("DiT.precompute_modulation", timesteps)
        null = self.config["num_classes"]
        rows, null_row, distinct = None, None, None
        if cond is not None:
            _require(cond.dim() == 1 and len(cond) > 0, "cond", "labels [B], at least one", list(cond.shape))
        self._check_labels(cond, 0 if cond is None else len(cond))
        if guidance:
            _require(cond is not None, "cond", "labels [B], to be guided away from the null class", None)
            self._check_labels(None, 0)
        if cond is not None:
            distinct, rows, null_row = rows_of_labels(cond, null if guidance else None)
        each = 1 if distinct is None else len(distinct)
        times = timesteps.repeat_interleave(each)
        labels = None if distinct is None else distinct.repeat(len(timesteps))
        values = torch.cat(self._modulation(times, labels, drop=False), dim=-1)
        return ModulationTable(values.view(len(timesteps), each, -1), timesteps, rows, null_row)

    def _modulation(self, t: Tensor, labels: Tensor | None, *, drop: bool) -> list[Tensor]:
        """[B, 6 D] of every block and [B, 2 D] of the final layer; ``drop``: with label dropout."""
        self._require_modulation_weights()
        if labels is None:
            labels = t.new_full(t.shape, self.config["num_classes"], dtype=torch.long)
        owners: list[Any] = [self] if self.config["shared_embedders"] else [*self.blocks, self.blocks[0]]
        conditions = []
        for owner in owners:
            c = owner.t_embedder(t)
            if owner.y_embedder is not None:
                c = c + (owner.y_embedder if drop else owner.y_embedder.embedding_table)(labels)
            conditions.append(F.silu(c))
        layers = list(self._modulation_layers().values())
        conditions = conditions * len(layers) if len(conditions) == 1 else conditions
        return [_linear.call(layer, c) for layer, c in zip(layers, conditions, strict=True)]

    def _modulation_layers(self) -> dict[str, nn.Linear]:
        layers: dict[str, Any] = {
            f"blocks.{i}.adaLN_modulation.1": b.adaLN_modulation[1] for i, b in enumerate(self.blocks)
        }
        return {**layers, "final_layer.adaLN_modulation.1": self.final_layer.adaLN_modulation[1]}

    # ------------------------------------------------------------------------------------------------ checks

    def _check(self, x: Tensor, t: Tensor | None, cond: Tensor | None, modulation: Modulation | None = None) -> None:
        c, s = self.config["in_channels"], self.config["input_size"]
        _require(x.dim() == 4 and x.shape[1:] == (c, s, s), "x", f"shape [B,{c},{s},{s}]", list(x.shape))
        if modulation is not None:
            self._check_table(modulation, (6 * len(self.blocks) + 2) * self.config["hidden_size"])
            return
        _require(t is not None, "t", f"shape [{len(x)}]", None)
        _require(
            t is not None and t.shape == x.shape[:1], "t", f"shape [{len(x)}]", None if t is None else list(t.shape)
        )
        self._check_labels(cond, len(x))

    def _check_labels(self, cond: Tensor | None, batch: int) -> None:
        classes = self.config["num_classes"]
        if cond is not None:
            _require(classes > 0, "cond", "None (the model was built with num_classes=0)", list(cond.shape))
            _require(cond.shape == (batch,), "cond", f"shape [{batch}]", list(cond.shape))
            _require(cond.dtype in (torch.int64, torch.int32), "cond", "integer labels", cond.dtype)
        elif classes > 0:
            has_null = self.config["class_dropout_prob"] > 0
            _require(has_null, "cond", "labels [B] (class_dropout_prob=0 leaves no unconditional prediction)", None)


def _require(ok: bool, argument: str, expected: str, got: object) -> None:
    require(ok, "DiT", argument, expected, got)
