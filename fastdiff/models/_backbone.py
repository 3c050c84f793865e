"""The chain of blocks that `DiT`, `TextDiT` and `DiffusionMamba` are, and what they do with a condition.

Tokens x and their modulated norm h go from block to block, and the norm behind a block's last gate is that of the next
block, so every block is given the shift and the scale of its successor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff import ops
from fastdiff.models._layers import may_recompute, require, unpatchify
from fastdiff.models.modulation import Modulated, Modulation, ModulationTable, check_times, rows_of_labels
from fastdiff.ops import _linear

__all__ = ["Backbone", "ClassConditional"]


class Backbone(Modulated):
    """Patches of square images through blocks between modulated norms; derived classes have the layers.

    They are `x_embedder`, `pos_embed`, `blocks`, called as ``block(x, h, *extra, own, shift_next, scale_next, control)
    -> (x, h)``, and `final_layer.linear`.
    """

    config: dict[str, Any]
    x_embedder: Any
    pos_embed: Tensor
    blocks: Sequence[Any]
    final_layer: Any
    derived_buffers = ("pos_embed",)  # computed; a file need not have it
    gradient_checkpointing = False

    def _through_blocks(
        self,
        x: Tensor,
        vectors: Sequence[Sequence[Tensor]],
        *extra: Any,
        control: Sequence[Tensor | None] | None,
        taps: list[Tensor] | None,
    ) -> Tensor:
        """Images [B,C,H,W] to predictions.

        Args:
            x: the images.
            vectors: for each block (shift, scale, gate) of every branch, and last (shift, scale) of the final layer:
                [B,D] each.
            *extra: what every block is given besides.
            control: as for ``forward``.
            taps: likewise.
        """
        depth, given = len(self.blocks), [] if control is None else list(control)
        self._require(len(given) <= depth + 1, "control", f"at most {depth + 1} entries", len(given))
        added = given + [None] * (depth + 1 - len(given))
        x = self.x_embedder(x) + self.pos_embed
        shapes = x.shape, (1, *x.shape[1:])
        misfit = next((list(a.shape) for a in given if a is not None and a.shape not in shapes), None)
        self._require(misfit is None, "control", f"tensors of shape {list(x.shape)}", misfit)
        x = x if added[0] is None else x + added[0]
        h = ops.adaln_modulate(x, *vectors[0][:2])
        for i, block in enumerate(self.blocks):
            site = (x, h, *extra, vectors[i][2:], *vectors[i + 1][:2], added[i + 1])
            if self.gradient_checkpointing and torch.is_grad_enabled() and may_recompute(block):
                x, h = checkpoint(block, *site, use_reentrant=False)  # type: ignore[misc]
            else:
                x, h = block(*site)
            if taps is not None:
                taps.append(x)
        return unpatchify(_linear.call(self.final_layer.linear, h), self.config["patch_size"])

    def _guided(self, both: Tensor, scale: float) -> Tensor:
        """From predictions of a batch and its unconditional copy; the variances are the conditional ones."""
        c = self.config["in_channels"]
        pred, uncond = both.chunk(2)
        guided = uncond[:, :c] + scale * (pred[:, :c] - uncond[:, :c])
        return torch.cat([guided, pred[:, c:]], dim=1)

    def _check_config(self, *, counts: Sequence[str] = (), positive: Sequence[str] = ()) -> None:
        """What holds for the settings of every backbone, and the names of those that must be at least 1 or above 0."""
        config = self.config
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", *counts):
            self._require(config[name] >= 1, name, "at least 1", config[name])
        for name in ("time_scale", *positive):
            self._require(config[name] > 0, name, "above 0", config[name])
        size, patch, width = config["input_size"], config["patch_size"], config["hidden_size"]
        self._require(size % patch == 0, "input_size", f"a multiple of patch_size={patch}", size)
        self._require(width % 4 == 0, "hidden_size", "a multiple of 4", width)
        if "num_heads" in counts:
            heads = config["num_heads"]
            self._require(width % heads == 0, "hidden_size", f"a multiple of num_heads={heads}", width)
        for name in ("class_dropout_prob", "caption_dropout_prob"):
            self._require(0 <= config.get(name, 0) <= 1, name, "in [0, 1]", config.get(name))

    def _check_inputs(self, x: Tensor, t: Tensor | None, modulation: Modulation | None, width: int) -> None:
        """Images, and times or a step of a table with rows of `width`."""
        c, s = self.config["in_channels"], self.config["input_size"]
        self._require(x.dim() == 4 and x.shape[1:] == (c, s, s), "x", f"shape [B,{c},{s},{s}]", list(x.shape))
        if modulation is not None:
            self._check_table(modulation, width)
        elif t is None or t.shape != x.shape[:1]:  # a batch is named in errors only: export would make it a constant
            self._require(False, "t", f"shape [{len(x)}]", None if t is None else list(t.shape))

    def _require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        require(ok, type(self).__name__, argument, expected, got)


class ClassConditional(Backbone):
    """A backbone with adaLN-Zero from the condition c = t_emb + y_emb, y being a class label.

    Each block computes three vectors (shift, scale, gate) for each of its `branches`, the final layer two.
    """

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
                ``depth + 1`` tensors of their shape or [1,N,D], or None for nothing there (`ControlNet`).
            taps: a list to which the tokens behind each block are appended.

        Returns:
            [B, out_channels, input_size, input_size].

        Raises:
            ValueError: a shape, the presence of labels or the table does not fit the model.
        """
        self._check(x, t, cond, modulation)
        counts = self._vectors()
        if modulation is not None:
            width = self.config["hidden_size"]
            found = modulation.for_batch(len(x)).split([n * width for n in counts], dim=-1)
        else:
            assert t is not None  # checked
            found = tuple(self._modulation(t, cond, drop=self.training))
        # One [B,D] vector per (site, role); a site's shift and scale are used where the norm is, after the last gate.
        vectors = [row.chunk(n, dim=-1) for row, n in zip(found, counts, strict=True)]
        return self._through_blocks(x, vectors, control=control, taps=taps)

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

        All ``in_channels`` of the prediction are guided; learned variance channels are the conditional ones. (DiT's
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
            return self._guided(self(twice, None, modulation=modulation.guided(len(x))), guidance_scale)
        if cond is None or t is None:
            raise ValueError(f"[{type(self).__name__}.forward_with_cfg] cond: expected labels [B], got None")
        self._check(x, t, None)  # guidance needs the null class
        labels = torch.cat([cond, torch.full_like(cond, self.config["num_classes"])])
        return self._guided(self(twice, torch.cat([t, t]), labels), guidance_scale)

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
            ``(T * U, K)`` numbers for U distinct labels, in the type of the weights; see `fastdiff.models.modulation`.

        Raises:
            ValueError: a shape or the labels do not fit the model.
        """
        check_times(f"{type(self).__name__}.precompute_modulation", timesteps)
        null = self.config["num_classes"]
        rows, null_row, distinct = None, None, None
        if cond is not None:
            self._require(cond.dim() == 1 and len(cond) > 0, "cond", "labels [B], at least one", list(cond.shape))
        self._check_labels(cond, 0 if cond is None else len(cond))
        if guidance:
            self._require(cond is not None, "cond", "labels [B], to be guided away from the null class", None)
            self._check_labels(None, 0)
        if cond is not None:
            distinct, rows, null_row = rows_of_labels(cond, null if guidance else None)
        each = 1 if distinct is None else len(distinct)
        times = timesteps.repeat_interleave(each)
        labels = None if distinct is None else distinct.repeat(len(timesteps))
        values = torch.cat(self._modulation(times, labels, drop=False), dim=-1)
        of = timesteps.new_empty(0) if distinct is None else distinct
        return ModulationTable(values.view(len(timesteps), each, -1), timesteps, rows, null_row, of)

    def _vectors(self) -> list[int]:
        """How many the blocks and the final layer have."""
        return [*(3 * block.branches for block in self.blocks), 2]

    def _embedders(self) -> Sequence[Any]:
        """Who has the `t_embedder` and `y_embedder` of all modulation layers, or of each."""
        return [self]

    def _modulation(self, t: Tensor, labels: Tensor | None, *, drop: bool) -> list[Tensor]:
        """[B, 3 branches D] of every block and [B, 2 D] of the final layer; ``drop``: with label dropout."""
        self._require_modulation_weights()
        if labels is None:
            labels = t.new_full(t.shape, self.config["num_classes"], dtype=torch.long)
        owners = self._embedders()
        if drop and owners[0].y_embedder is not None:
            labels = owners[0].y_embedder.drop(labels)  # once: a sample has its label in all layers or in none
        conditions = []
        for owner in owners:
            c = owner.t_embedder(t)
            if owner.y_embedder is not None:
                c = c + owner.y_embedder(labels)
            conditions.append(F.silu(c))
        layers = list(self._modulation_layers().values())
        conditions = conditions * len(layers) if len(conditions) == 1 else conditions
        return [_linear.call(layer, c) for layer, c in zip(layers, conditions, strict=True)]

    def _modulation_layers(self) -> dict[str, nn.Linear]:
        parts: dict[str, Any] = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        parts["final_layer"] = self.final_layer
        return {f"{name}.adaLN_modulation.1": part.adaLN_modulation[1] for name, part in parts.items()}

    # ------------------------------------------------------------------------------------------------ checks

    def _check(self, x: Tensor, t: Tensor | None, cond: Tensor | None, modulation: Modulation | None = None) -> None:
        self._check_inputs(x, t, modulation, sum(self._vectors()) * self.config["hidden_size"])
        if modulation is None:
            self._check_labels(cond, x.shape[0])

    def _check_labels(self, cond: Tensor | None, batch: int) -> None:
        classes = self.config["num_classes"]
        if cond is not None:
            self._require(classes > 0, "cond", "None (the model was built with num_classes=0)", list(cond.shape))
            if cond.shape != (batch,):
                self._require(False, "cond", f"shape [{batch}]", list(cond.shape))
            self._require(cond.dtype in (torch.int64, torch.int32), "cond", "integer labels", cond.dtype)
        elif classes > 0:
            expected = "labels [B] (class_dropout_prob=0 leaves no unconditional prediction)"
            self._require(self.config["class_dropout_prob"] > 0, "cond", expected, None)
