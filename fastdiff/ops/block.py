"""The two halves of a diffusion transformer's block, whole: norm + modulation, products, and gate + residual.

    adaln_attention:  x + gate * (Attention(LN(x) * (1 + scale) + shift) W_out^T + b_out)
    adaln_mlp:        x + gate * (GELU((LN(x) * (1 + scale) + shift) W_1^T + b_1) W_2^T + b_2)

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", sec. 3.2 (adaLN-Zero). The pieces are the operators
of this package, the packed product of q, k and v is read in place, and the products themselves are torch's (`_linear`):
those may round differently for another batch size or number of threads, everything else here does not.

Shapes: x [B, N, D]; shift, scale, gate as in `adaln_modulate`; weights as in `torch.nn.Linear`, [out, in]. dtypes
float32, float16, bfloat16; parameters may be float32 beside 16-bit activations. On CPUs without 16-bit arithmetic the
products and what lies between them are float32, so more exact than the 16-bit code they replace. On a GPU products take
weights rounded to the type of x, and the first layer of the MLP applies GELU in the product's own epilogue where no
gradient is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.ops import _registry as reg
from fastdiff.ops import adaln
from fastdiff.ops._linear import linear
from fastdiff.ops.adaln import adaln_modulate, adaln_modulate_reference, gate_residual, gate_residual_reference
from fastdiff.ops.attention import (
    _check_prologue,
    attention_qkvpacked,
    attention_qkvpacked_reference,
    packed_limits,
)

Rope = tuple[torch.Tensor, torch.Tensor]


def adaln_attention(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    num_heads: int,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    rope: Rope | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention half of an adaLN block, differentiable in every tensor.

    Args:
        x: [B, N, D].
        shift: see `adaln_modulate`.
        scale: likewise.
        gate: likewise.
        qkv_weight: [3 D, D], rows in the order q, k, v, each of `num_heads` heads.
        qkv_bias: [3 D] or None.
        out_weight: [D, D].
        out_bias: [D] or None.
        num_heads: H, a divisor of D.
        eps: of the norm, at least 0.
        norm: ``"layer"`` or ``"rms"``.
        q_norm: see `attention_qkvpacked`.
        k_norm: likewise.
        rope: likewise.
        out: [B, N, D], dtype of x; written and returned. May be x itself. Not differentiable.

    Returns:
        [B, N, D], dtype of x.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor.
    """
    op = "adaln_attention"
    B, N, D = _check_site(op, x, shift, scale, gate, norm, eps)
    _check_weight(op, "qkv", qkv_weight, qkv_bias, (3 * D, D), x)
    _check_weight(op, "out", out_weight, out_bias, (D, D), x)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        reg.fail(op, "num_heads", "an integer", type(num_heads).__name__, TypeError)
    if num_heads < 1 or D % num_heads:
        reg.fail(op, "num_heads", f"a divisor of D = {D}", num_heads)
    _check_prologue(op, x, N, D // num_heads, q_norm, k_norm, rope)
    if out is not None:
        tensors = (x, shift, scale, gate, qkv_weight, qkv_bias, out_weight, out_bias, q_norm, k_norm)
        reg.check_out(op, out, x, tensors, may_alias=(x,))
    y = adaln_modulate(x, shift, scale, norm=norm, eps=eps)
    qkv = linear(y, qkv_weight, qkv_bias).view(B, N, 3, num_heads, D // num_heads)
    mixed = attention_qkvpacked(qkv, q_norm=q_norm, k_norm=k_norm, rope=rope)
    branch = linear(mixed.reshape(B, N, D), out_weight, out_bias)
    return gate_residual(x, branch, gate, out=out)


def adaln_mlp(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The MLP half of an adaLN block, with the tanh form of GELU; differentiable in every tensor.

    Args:
        x: [B, N, D].
        shift: see `adaln_modulate`.
        scale: likewise.
        gate: likewise.
        fc1_weight: [M, D].
        fc1_bias: [M] or None.
        fc2_weight: [D, M].
        fc2_bias: [D] or None.
        eps: of the norm, at least 0.
        norm: ``"layer"`` or ``"rms"``.
        out: [B, N, D], dtype of x; written and returned. May be x itself. Not differentiable.

    Returns:
        [B, N, D], dtype of x.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor.
    """
    op = "adaln_mlp"
    D = _check_site(op, x, shift, scale, gate, norm, eps)[2]
    reg.check_tensor(op, "fc1_weight", fc1_weight, x)
    hidden = fc1_weight.shape[0] if fc1_weight.dim() else 0
    _check_weight(op, "fc1", fc1_weight, fc1_bias, (hidden, D), x)
    _check_weight(op, "fc2", fc2_weight, fc2_bias, (D, hidden), x)
    if out is not None:
        tensors = (x, shift, scale, gate, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        reg.check_out(op, out, x, tensors, may_alias=(x,))
    y = adaln_modulate(x, shift, scale, norm=norm, eps=eps)
    branch = linear(linear(y, fc1_weight, fc1_bias, gelu=True), fc2_weight, fc2_bias)
    return gate_residual(x, branch, gate, out=out)


def limits(x: torch.Tensor, *args: Any, rope: Rope | None = None, **_: Any) -> list[str]:
    """Why the kernels of x's device cannot serve the attention of `adaln_attention`; empty if they can."""
    return packed_limits(x.unflatten(-1, (args[7], -1)), None, None, *(rope or ()))


# ------------------------------------------------------------------------------------------------------- references


def adaln_attention_reference(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    num_heads: int,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    rope: Rope | None = None,
) -> torch.Tensor:
    """`adaln_attention` in plain PyTorch: any device, float64 included, differentiable to any order."""
    B, N, D = x.shape
    y = adaln_modulate_reference(x, shift, scale, norm=norm, eps=eps)
    qkv = _linear_reference(y, qkv_weight, qkv_bias).view(B, N, 3, num_heads, D // num_heads)
    mixed = attention_qkvpacked_reference(qkv, q_norm=q_norm, k_norm=k_norm, rope=rope)
    return gate_residual_reference(x, _linear_reference(mixed.reshape(B, N, D), out_weight, out_bias), gate)


def adaln_mlp_reference(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
) -> torch.Tensor:
    """`adaln_mlp` in plain PyTorch: any device, float64 included, differentiable to any order."""
    y = adaln_modulate_reference(x, shift, scale, norm=norm, eps=eps)
    h = F.gelu(_linear_reference(y, fc1_weight, fc1_bias), approximate="tanh")
    return gate_residual_reference(x, _linear_reference(h, fc2_weight, fc2_bias), gate)


def _linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In the wider of both types, like every reference."""
    kind = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))


# ------------------------------------------------------------------------------------------------------- validation


def _check_site(op: str, x: Any, shift: Any, scale: Any, gate: Any, norm: str, eps: float) -> tuple[int, int, int]:
    adaln._rms(op, norm)
    adaln._check(op, x, None, gate, shift, scale, None, None, eps)
    return adaln._sizes(op, x)


def _check_weight(op: str, name: str, weight: Any, bias: Any, shape: tuple[int, int], x: torch.Tensor) -> None:
    reg.check_tensor(op, f"{name}_weight", weight, x)
    if tuple(weight.shape) != shape:
        reg.fail(op, f"{name}_weight", f"shape [out, in] = {shape}", tuple(weight.shape))
    if bias is not None:
        reg.check_tensor(op, f"{name}_bias", bias, x)
        if tuple(bias.shape) != shape[:1]:
            reg.fail(op, f"{name}_bias", f"shape ({shape[0]},) or None", tuple(bias.shape))
