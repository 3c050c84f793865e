"""diffusers' adaptive norms: one pass over the tokens in place of four, on views of the modulation product.

That product has a row per sample and is called as it is: so few rows are no faster elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations._sites import modulate
from fastdiff.integrations._swap import Handler, OfClass, Takes

__all__ = ["HANDLERS"]


def _zero(original: Any) -> type:
    class Fast:
        def forward(
            self: Any,
            x: Tensor,
            timestep: Tensor | None = None,
            class_labels: Tensor | None = None,
            hidden_dtype: torch.dtype | None = None,
            emb: Tensor | None = None,
        ) -> tuple[Tensor, ...]:
            if self.emb is not None:
                emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
            shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
            return (modulate(self.norm, x, shift, scale), *rest)

    return Fast


def _zero_single(original: Any) -> type:
    class Fast:
        def forward(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
            shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
            return modulate(self.norm, x, shift, scale), gate

    return Fast


def _zero_twice(original: Any) -> type:
    class Fast:
        def forward(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
            mods = self.linear(self.silu(emb)).chunk(9, dim=1)
            first = modulate(self.norm, hidden_states, mods[0], mods[1])
            second = modulate(self.norm, hidden_states, mods[6], mods[7])
            return (first, *mods[2:6], second, mods[8])

    return Fast


def _continuous(original: Any) -> type:
    class Fast:
        def forward(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
            emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
            scale, shift = emb.chunk(2, dim=1)
            return modulate(self.norm, x, shift[:, None], scale[:, None])

    return Fast


def _indexed(original: Any) -> type:
    class Fast:
        def forward(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
            given: Any = temb if self.emb is None else timestep
            if given.dim() + (self.emb is not None) != self.chunk_dim + 1:  # one embedding for all, or one per sample
                return original.forward(self, x, timestep, temb)  # type: ignore[no-any-return]
            if self.emb is not None:
                temb = self.emb(timestep)
            first, second = self.linear(self.silu(temb)).chunk(2, dim=self.chunk_dim)
            shift, scale = (first, second) if self.chunk_dim == 1 else (second, first)
            return modulate(self.norm, x, shift, scale)

    return Fast


_ZERO = ("x", "timestep", "class_labels", "hidden_dtype", "emb")
HANDLERS = [
    Handler("diffusers AdaLN-Zero", OfClass("diffusers", "AdaLayerNormZero"), Takes(_ZERO), _zero),
    Handler("diffusers AdaLN-Zero", OfClass("diffusers", "AdaLayerNormZeroSingle"), Takes(("x", "emb")), _zero_single),
    Handler(
        "diffusers AdaLN-Zero", OfClass("diffusers", "SD35AdaLayerNormZeroX"), Takes(("hidden_states", "emb")),
        _zero_twice,
    ),
    Handler(
        "diffusers AdaLN", OfClass("diffusers", "AdaLayerNormContinuous"), Takes(("x", "conditioning_embedding")),
        _continuous,
    ),
    Handler("diffusers AdaLN", OfClass("diffusers", "AdaLayerNorm"), Takes(("x", "timestep", "temb")), _indexed),
]  # fmt: skip
