"""diffusers' attention processors: products by oneDNN on the CPU, and attention without the map or copies of heads.

A call that brings a mask is left to the processor itself: our operator has none, and whether a mask masks anything
could only be told by reading it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.integrations._sites import attend, drop, normalise_heads, rms_of
from fastdiff.integrations._swap import Handler, OfClass, Takes
from fastdiff.ops import _linear

__all__ = ["HANDLERS"]


def _attention(original: Any, *, packed: bool = False, scaled: bool = False, normed: bool = True) -> type:
    """Self- or cross-attention of `Attention` layers, with tokens [B,N,D] or images [B,D,H,W]."""

    class Fast:
        def __call__(
            self: Any,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            temb: Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            if attention_mask is not None or args or kwargs.get("scale") is not None or _grouped(attn):
                return original.__call__(  # type: ignore[no-any-return]
                    self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
                )
            residual = hidden_states
            x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
            image = x.shape if x.dim() == 4 else None
            if image is not None:
                x = x.flatten(2).transpose(1, 2)
            if attn.group_norm is not None:
                x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
            context = encoder_hidden_states
            if context is not None and attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
            q, k, v = (_heads(t, attn.heads) for t in _project(attn, x, context, packed))
            if normed:
                q, k = normalise_heads(attn.norm_q, q), normalise_heads(attn.norm_k, k)
            out = _linear.call(attn.to_out[0], attend(q, k, v, attn.scale if scaled else None))
            out = drop(attn.to_out[1], out)
            if image is not None:
                out = out.transpose(-1, -2).reshape(image)
            if attn.residual_connection:
                out = out + residual
            return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    return Fast


def _plain(original: Any) -> type:
    return _attention(original, scaled=True, normed=False)


def _sdpa(original: Any) -> type:
    return _attention(original)


def _fused_sdpa(original: Any) -> type:
    return _attention(original, packed=True)


def _joint(original: Any) -> type:
    """Attention over image and text tokens together (Stable Diffusion 3)."""

    class Fast:
        def __call__(
            self: Any,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor | tuple[Tensor, Tensor]:
            x, context = hidden_states, encoder_hidden_states
            q, k, v = (_heads(t, attn.heads) for t in _project(attn, x, None, False))
            q, k = normalise_heads(attn.norm_q, q), normalise_heads(attn.norm_k, k)
            if context is not None:
                cq, ck, cv = (_heads(t, attn.heads) for t in _project_added(attn, context))
                cq, ck = normalise_heads(attn.norm_added_q, cq), normalise_heads(attn.norm_added_k, ck)
                q, k, v = (torch.cat(pair, dim=1) for pair in ((q, cq), (k, ck), (v, cv)))
            out = attend(q, k, v)
            if context is None:
                return drop(attn.to_out[1], _linear.call(attn.to_out[0], out))
            out, context = out[:, : x.shape[1]], out[:, x.shape[1] :]
            if not attn.context_pre_only:
                context = _linear.call(attn.to_add_out, context)
            return drop(attn.to_out[1], _linear.call(attn.to_out[0], out)), context

    return Fast


def _flux(original: Any) -> type:
    """Attention with norms of queries and keys and a rotation, over text and image tokens (Flux)."""

    class Fast:
        def __call__(
            self: Any,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ) -> Tensor | tuple[Tensor, Tensor]:
            x, context, rope = hidden_states, encoder_hidden_states, image_rotary_emb
            joint = attn.added_kv_proj_dim is not None
            if (
                attention_mask is not None
                or joint is (context is None)
                or _elsewhere(self)
                or torch.is_autocast_enabled(x.device.type)
                or not _is_table(rope)
            ):
                return original.__call__(  # type: ignore[no-any-return]
                    self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
                )
            packed = bool(attn.fused_projections)
            q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in _project(attn, x, None, packed))
            if context is None:
                return _rotated(q, k, v, attn.norm_q, attn.norm_k, rope)
            projected = _linear.call(attn.to_added_qkv, context).chunk(3, dim=-1) if packed else None
            added = projected or _project_added(attn, context)
            cq, ck, cv = (t.unflatten(-1, (-1, attn.head_dim)) for t in added)
            norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
            parts = zip(norms, (q, k, cq, ck), strict=True)
            q, k, cq, ck = (normalise_heads(norm, t, heads_first=False) for norm, t in parts)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((cq, q), (ck, k), (cv, v)))
            out = _rotated(q, k, v, None, None, rope)
            n = context.shape[1]
            image = drop(attn.to_out[1], _linear.call(attn.to_out[0], out[:, n:]))
            return image, _linear.call(attn.to_add_out, out[:, :n])

    return Fast


def _project(attn: Any, x: Tensor, context: Tensor | None, packed: bool) -> tuple[Tensor, ...]:
    """Queries of x, keys and values of the context (or x)."""
    if packed and context is None:
        return _linear.call(attn.to_qkv, x).chunk(3, dim=-1)
    q = _linear.call(attn.to_q, x)
    if context is None:
        context = x
    elif packed:
        return (q, *_linear.call(attn.to_kv, context).chunk(2, dim=-1))
    return q, _linear.call(attn.to_k, context), _linear.call(attn.to_v, context)


def _project_added(attn: Any, context: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of the text tokens."""
    return tuple(_linear.call(layer, context) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _rotated(q: Tensor, k: Tensor, v: Tensor, norm_q: Any, norm_k: Any, rope: Any) -> Tensor:
    """Norms, rotation and attention of q, k, v [B,N,H,d]: [B,N,H*d]."""
    weights = rms_of(norm_q, q), rms_of(norm_k, k)
    inside = weights[0] is not None and weights[1] is not None and norm_q.eps == norm_k.eps
    if not inside:
        q, k = (normalise_heads(norm, t, heads_first=False) for norm, t in ((norm_q, q), (norm_k, k)))
        weights = None, None
        if rope is None:
            return attend(q, k, v)
    if rope is not None:
        rope = tuple(t.to(q.device) for t in rope)
    qkv = torch.stack((q, k, v), dim=2)
    out = ops.attention_qkvpacked(
        qkv, q_norm=weights[0], k_norm=weights[1], eps=norm_q.eps if inside else 1e-6, rope=rope, rope_interleaved=True
    )
    return out.flatten(2)


def _is_table(rope: Any) -> bool:
    """Cosines and sines [N,d], or no rotation."""
    return rope is None or (isinstance(rope, (tuple, list)) and len(rope) == 2 and all(t.dim() == 2 for t in rope))


def _grouped(attn: Any) -> bool:
    """Several queries share a key."""
    return bool(attn.inner_kv_dim != attn.inner_dim)


def _elsewhere(processor: Any) -> bool:
    """Somebody chose a backend for it, or spread the tokens over devices."""
    return processor._attention_backend is not None or processor._parallel_config is not None


_SELF = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb", "args", "kwargs")
_JOINT = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "args", "kwargs")
_FLUX = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask", "image_rotary_emb")


def _handler(name: str, parameters: tuple[str, ...], mixin: Any) -> Handler:
    claims = OfClass("diffusers", name, "__call__")
    return Handler("diffusers attention", claims, Takes(parameters, "__call__"), mixin)


HANDLERS = [
    _handler("AttnProcessor", _SELF, _plain),
    _handler("AttnProcessor2_0", _SELF, _sdpa),
    _handler("FusedAttnProcessor2_0", _SELF, _fused_sdpa),
    _handler("JointAttnProcessor2_0", _JOINT, _joint),
    _handler("FluxAttnProcessor", _FLUX, _flux),
]
