"""What the fast forwards of other people's layers are made of: norm sites, feed-forwards, attention.

Each function computes what the layers themselves would, with our operators where that is the same, and by calling the
layers where it is not: where somebody watches one (hooks), where it is of another class than is known, or where the
results would have another type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops

__all__ = ["attend", "drop", "gate", "gate_modulate", "modulate", "normalise_heads", "rms_of", "unwatched"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERY: Any = nn.modules.module


def unwatched(module: Any) -> bool:
    """Nobody would notice that this module is not called."""
    return "forward" not in vars(module) and not any(
        getattr(module, name) or getattr(_EVERY, f"_global{name}") for name in _HOOKS
    )


def modulate(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``; x [B,N,D], shift and scale [B,D] or [B,1,D]."""
    kind = _kind(norm)
    if kind is not None and _keeps_type(x, shift, scale, norm.weight, _bias(norm)):
        return ops.adaln_modulate(x, shift, scale, norm=kind, weight=norm.weight, bias=_bias(norm), eps=norm.eps)
    return norm(x) * (1 + _rows(scale)) + _rows(shift)


def gate(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * branch``; x and branch [B,N,D], gate [B,D] or [B,1,D]."""
    if _keeps_type(x, branch, gate):
        return ops.gate_residual(x, branch, gate)
    return x + _rows(gate) * branch


def gate_modulate(
    norm: Any, x: Tensor, branch: Tensor, gate_: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``r = x + gate_ * branch`` and ``norm(r) * (1 + scale) + shift``, in one pass where the norm has no weights."""
    kind = _kind(norm)
    if kind is not None and norm.weight is None and _bias(norm) is None and _keeps_type(x, branch, gate_, shift, scale):
        return ops.gate_residual_adaln(x, branch, gate_, shift, scale, norm=kind, eps=norm.eps)
    r = gate(x, branch, gate_)
    return r, modulate(norm, r, shift, scale)


def drop(dropout: Any, x: Tensor) -> Tensor:
    """A dropout layer (or None, or an identity), called only where it does something or is watched."""
    if dropout is None or (unwatched(dropout) and (type(dropout) is nn.Identity or _idle(dropout))):
        return x
    return dropout(x)  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention over q, k, v [B,N,H,d]: [B,N,H*d]."""
    if q.dtype == k.dtype == v.dtype:
        return ops.attention(q, k, v, scale=scale, layout="bnhd").flatten(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # autocast makes one type of them
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def normalise_heads(norm: Any, x: Tensor, *, heads_first: bool = True) -> Tensor:
    """The norm of queries or keys over the head dim, x [B,N,H,d]; None is no norm.

    Where it has to be called, it is called with what it is used to: [B,H,N,d], or x as it is.
    """
    if norm is None:
        return x
    weight = rms_of(norm, x)
    if weight is not None:
        zero = x.new_zeros(x.shape[-1])
        return ops.adaln_modulate(x.flatten(1, 2), zero, zero, norm="rms", weight=weight, eps=norm.eps).view(x.shape)
    if not heads_first:
        return norm(x)  # type: ignore[no-any-return]
    return norm(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def rms_of(norm: Any, like: Tensor) -> Tensor | None:
    """The weight of a plain RMS norm over the head dim that our attention can apply itself, else None."""
    if _kind(norm) == "rms" and norm.weight is not None and norm.weight.dtype is like.dtype and _bias(norm) is None:
        weight: Tensor = norm.weight
        return weight
    return None


def _kind(norm: Any) -> str | None:
    """``"layer"`` or ``"rms"`` if our operators compute this norm over the last axis, else None."""
    cls = type(norm)
    if cls is nn.LayerNorm or (cls.__name__ == "FP32LayerNorm" and _diffusers(cls)):
        kind, shape = "layer", norm.normalized_shape
    elif cls is nn.RMSNorm:
        kind, shape = "rms", norm.normalized_shape
    elif cls.__name__ == "RMSNorm" and _diffusers(cls):
        kind, shape = "rms", norm.dim
    else:
        return None
    return kind if len(shape) == 1 and norm.eps is not None and unwatched(norm) else None


def _diffusers(cls: type) -> bool:
    return cls.__module__ == "diffusers.models.normalization"


def _bias(norm: Any) -> Tensor | None:
    bias: Tensor | None = getattr(norm, "bias", None)
    return bias


def _keeps_type(x: Tensor, *others: Tensor | None) -> bool:
    """The layers' own arithmetic gives the type of x as well: nothing wider takes part, and autocast keeps out."""
    if x.dim() != 3 or (x.dtype is not torch.float32 and torch.is_autocast_enabled(x.device.type)):
        return False
    return all(t is None or t.dtype is x.dtype or torch.promote_types(t.dtype, x.dtype) is x.dtype for t in others)


def _rows(t: Tensor) -> Tensor:
    return t.unsqueeze(1) if t.dim() == 2 else t


def _idle(dropout: Any) -> bool:
    return type(dropout) is nn.Dropout and (dropout.p == 0 or not dropout.training)
