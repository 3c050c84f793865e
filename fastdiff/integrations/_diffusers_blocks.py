"""diffusers' transformer blocks of DiT and PixArt, and their feed-forward: a gate, its residual and the next norm are
one pass, and the activation is applied where the product is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations._sites import drop, gate, gate_modulate, modulate, unwatched
from fastdiff.integrations._swap import Handler, Takes, defines
from fastdiff.ops import _linear

__all__ = ["HANDLERS"]


def _feed_forward(original: Any) -> type:
    class Fast:
        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first, dropout, last, *rest = self.net
            if args or kwargs or not unwatched(first):
                return original.forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
            if first.approximate == "tanh":
                x = _linear.call(first.proj, hidden_states, gelu=True)
            else:
                x = first.gelu(_linear.call(first.proj, hidden_states))
            x = _linear.call(last, drop(dropout, x))
            return drop(rest[0], x) if rest else x

    return Fast


def _gated_feed_forward(original: Any) -> type:
    class Fast:
        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first, dropout, last, *rest = self.net
            if args or kwargs or not unwatched(first):
                return original.forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
            x, factor = _linear.call(first.proj, hidden_states).chunk(2, dim=-1)
            x = _linear.call(last, drop(dropout, x * first.gelu(factor)))
            return drop(rest[0], x) if rest else x

    return Fast


def _is_feed_forward(obj: Any, activation: str) -> bool:
    return defines(obj, "diffusers", "FeedForward") and defines(obj.net[0], "diffusers", activation)


def _is_gelu(obj: Any) -> bool:
    return _is_feed_forward(obj, "GELU")


def _is_geglu(obj: Any) -> bool:
    return _is_feed_forward(obj, "GEGLU")


def _net(obj: Any) -> str | None:
    kinds = [type(layer).__name__ for layer in obj.net[1:]]
    if kinds[:1] == ["Dropout"] and len(kinds) in (2, 3) and kinds[2:] in ([], ["Dropout"]):
        return None
    return f"expected dropout, a linear layer and perhaps dropout after the activation, got {kinds}"


def _block(original: Any) -> type:
    class Fast:
        def forward(
            self: Any,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            encoder_hidden_states: Tensor | None = None,
            encoder_attention_mask: Tensor | None = None,
            timestep: Tensor | None = None,
            cross_attention_kwargs: dict[str, Any] | None = None,
            class_labels: Tensor | None = None,
            added_cond_kwargs: dict[str, Tensor] | None = None,
        ) -> Tensor:
            x, context, how = hidden_states, encoder_hidden_states, cross_attention_kwargs or {}
            if x.dim() != 3 or "gligen" in how or "scale" in how or self._chunk_size is not None:
                return original.forward(  # type: ignore[no-any-return]
                    self, x, attention_mask, context, encoder_attention_mask, timestep, how, class_labels,
                    added_cond_kwargs,
                )  # fmt: skip
            single = self.norm_type == "ada_norm_single"
            if single:
                assert timestep is not None
                mods = self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
                shift, scale, gate_1, shift_2, scale_2, gate_2 = mods.chunk(6, dim=1)
                h = modulate(self.norm1, x, shift, scale)
            else:
                found = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
                h, gate_1, shift_2, scale_2, gate_2 = found
            last_norm = self.norm2 if single else self.norm3
            branch = self.attn1(
                h,
                encoder_hidden_states=context if self.only_cross_attention else None,
                attention_mask=attention_mask,
                **how,
            )
            if self.attn2 is not None:
                x = gate(x, branch, gate_1)
                h = x if single else self.norm2(x)
                branch = self.attn2(h, encoder_hidden_states=context, attention_mask=encoder_attention_mask, **how)
                gate_1 = torch.ones_like(gate_2)
            x, h = gate_modulate(last_norm, x, branch, gate_1, shift_2, scale_2)
            return gate(x, self.ff(h), gate_2)

    return Fast


def _is_block(obj: Any) -> bool:
    """The kinds that modulate their norms; in the others the parts alone are replaced."""
    return defines(obj, "diffusers", "BasicTransformerBlock") and obj.norm_type in ("ada_norm_zero", "ada_norm_single")


def _no_positions(obj: Any) -> str | None:
    return None if obj.pos_embed is None else "it adds positions inside the block (positional_embeddings)"


_PARAMETERS = (
    "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep",
    "cross_attention_kwargs", "class_labels", "added_cond_kwargs",
)  # fmt: skip
_FEED = Takes(("hidden_states", "args", "kwargs"), besides=_net)
HANDLERS = [
    Handler("diffusers transformer block", _is_block, Takes(_PARAMETERS, besides=_no_positions), _block),
    Handler("diffusers feed-forward", _is_gelu, _FEED, _feed_forward),
    Handler("diffusers feed-forward", _is_geglu, _FEED, _gated_feed_forward),
]
