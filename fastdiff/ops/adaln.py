"""Adaptive layer norm: ``norm(x) * (1 + scale) + shift``, ``x + gate * branch``, and both in one pass.

The conditioning of diffusion transformers (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", sec.
3.2, adaLN-Zero). One kernel family serves all three operators; what is absent is skipped.

Shapes: x, branch [B, N, D]. A modulation (shift, scale, gate) is [B, D] or [B, 1, D] per sample, [B, N, D] per token,
[D] or [1, 1, D] shared, or [1, N, D] a table over tokens; any strides, e.g. chunks of one [B, 6 D] tensor. dtypes
float32, float16, bfloat16 in any mixture; arithmetic and statistics in float32; results have the dtype of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _registry as reg

_MODULATIONS = {  # which modulations each operator insists on
    "adaln_modulate": ("shift", "scale"),
    "gate_residual": ("gate",),
    "gate_residual_adaln": ("gate", "shift", "scale"),
    "adaln_attention": ("gate", "shift", "scale"),
    "adaln_mlp": ("gate", "shift", "scale"),
}
_MODULATION = "shape [B, D], [B, 1, D], [B, N, D], [D], [1, 1, D] or [1, N, D]"
_CODES = _native.DTYPES
Stats = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# ------------------------------------------------------------------------------------------------- public functions


def adaln_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift``, differentiable in every tensor.

    Args:
        x: [B, N, D].
        shift: see the shapes of a modulation above.
        scale: likewise.
        norm: ``"layer"`` (mean and biased variance) or ``"rms"`` (mean square), over D.
        weight: [D], multiplies the normalised value first.
        bias: [D], added after `weight`.
        eps: added to the variance or mean square; at least 0.
        out: [B, N, D], dtype of x; written and returned. May be x itself. Not differentiable.

    Returns:
        [B, N, D], dtype of x.

    Raises:
        ValueError: a shape, device or option does not fit, or `out` overlaps an input.
        TypeError: an argument is not a floating-point tensor.
    """
    rms = _rms("adaln_modulate", norm)
    if weight is None and bias is None and (fast := reg.fast(x)):
        y = torch.empty_like(x) if out is None else out
        if fast.fast_adaln(
            torch.is_grad_enabled(), out is None, rms, eps, x, None, None, shift, scale, None, None, None, y
        ):
            reg.written(out)
            return y
    way = reg.route("adaln_modulate", (x, shift, scale), (weight, bias))
    _check("adaln_modulate", x, None, None, shift, scale, weight, bias, eps)
    if out is not None:
        reg.check_out("adaln_modulate", out, x, (x, shift, scale, weight, bias), may_alias=(x,))
        if way is reg.REFERENCE:
            return out.copy_(adaln_modulate_reference(x, shift, scale, norm=norm, weight=weight, bias=bias, eps=eps))
        reg.call(_modulate_out_op, _modulate_out, x, shift, scale, weight, bias, rms, eps, out)
        reg.written(out)
        return out
    if way is reg.REFERENCE:
        return adaln_modulate_reference(x, shift, scale, norm=norm, weight=weight, bias=bias, eps=eps)
    if way is reg.GRAD:
        return _Adaln.apply(*reg.distinct(x, None, None, shift, scale, weight, bias), rms, eps)
    return reg.call(_modulate_op, _modulate, x, shift, scale, weight, bias, rms, eps)


def gate_residual(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x + gate * branch``, differentiable in every tensor.

    Args:
        x: [B, N, D].
        branch: [B, N, D].
        gate: see the shapes of a modulation above.
        out: [B, N, D], dtype of x; written and returned. May be x or branch itself. Not differentiable.

    Returns:
        [B, N, D], dtype of x.

    Raises:
        ValueError: a shape or device does not fit, or `out` overlaps an input.
        TypeError: an argument is not a floating-point tensor.
    """
    if fast := reg.fast(x):
        r = torch.empty_like(x) if out is None else out
        if fast.fast_adaln(
            torch.is_grad_enabled(), out is None, False, 0.0, x, branch, gate, None, None, None, None, r, None
        ):
            reg.written(out)
            return r
    way = reg.route("gate_residual", (x, branch, gate))
    _check("gate_residual", x, branch, gate, None, None, None, None, 0.0)
    if out is not None:
        reg.check_out("gate_residual", out, x, (x, branch, gate), may_alias=(x, branch))
        if way is reg.REFERENCE:
            return out.copy_(gate_residual_reference(x, branch, gate))
        reg.call(_gate_residual_out_op, _gate_residual_out, x, branch, gate, out)
        reg.written(out)
        return out
    if way is reg.REFERENCE:
        return gate_residual_reference(x, branch, gate)
    if way is reg.GRAD:
        return _Adaln.apply(*reg.distinct(x, branch, gate, None, None, None, None), False, 0.0)
    return reg.call(_gate_residual_op, _gate_residual, x, branch, gate)


def gate_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``r = x + gate * branch`` and ``norm(r) * (1 + scale) + shift`` in one pass, differentiable in every tensor.

    The last step of one transformer sub-block and the first of the next. The norm sees r as it is stored (rounded to
    the dtype of x), so the result is bitwise that of `gate_residual` followed by `adaln_modulate`.

    Args:
        x: [B, N, D].
        branch: [B, N, D].
        gate: see the shapes of a modulation above.
        shift: likewise.
        scale: likewise.
        norm: ``"layer"`` or ``"rms"``.
        eps: added to the variance or mean square; at least 0.
        out: (residual, modulated), each [B, N, D] with the dtype of x. The first may be x or branch itself.

    Returns:
        (residual, modulated), each [B, N, D], dtype of x.

    Raises:
        ValueError: a shape, device or option does not fit, or `out` overlaps an input.
        TypeError: an argument is not a floating-point tensor.
    """
    rms = _rms("gate_residual_adaln", norm)
    tensors = (x, branch, gate, shift, scale)
    if out is None:
        if fast := reg.fast(x):
            r, y = torch.empty_like(x), torch.empty_like(x)
            if fast.fast_adaln(
                torch.is_grad_enabled(), out is None, rms, eps, x, branch, gate, shift, scale, None, None, r, y
            ):
                return r, y
    elif isinstance(out, (tuple, list)) and len(out) == 2 and (fast := reg.fast(x)):
        r, y = out
        if fast.fast_adaln(
            torch.is_grad_enabled(), out is None, rms, eps, x, branch, gate, shift, scale, None, None, r, y
        ):
            reg.written(r, y)
            return r, y
    way = reg.route("gate_residual_adaln", tensors)
    _check("gate_residual_adaln", x, branch, gate, shift, scale, None, None, eps)
    if out is not None:
        if not (isinstance(out, (tuple, list)) and len(out) == 2):
            reg.fail("gate_residual_adaln", "out", "a pair (residual, modulated)", type(out).__name__, TypeError)
        reg.check_out("gate_residual_adaln", out[0], x, tensors, may_alias=(x, branch))
        reg.check_out("gate_residual_adaln", out[1], x, (*tensors, out[0]))
        if way is reg.REFERENCE:
            r, y = gate_residual_adaln_reference(x, branch, gate, shift, scale, norm=norm, eps=eps)
            return out[0].copy_(r), out[1].copy_(y)
        args = (x, branch, gate, shift, scale, rms, eps, out[0], out[1])
        reg.call(_gate_residual_adaln_out_op, _gate_residual_adaln_out, *args)
        reg.written(out[0], out[1])
        return out[0], out[1]
    if way is reg.REFERENCE:
        return gate_residual_adaln_reference(x, branch, gate, shift, scale, norm=norm, eps=eps)
    if way is reg.GRAD:
        return _Adaln.apply(*reg.distinct(x, branch, gate, shift, scale, None, None), rms, eps)
    return reg.call(_gate_residual_adaln_op, _gate_residual_adaln, x, branch, gate, shift, scale, rms, eps)


# ------------------------------------------------------------------------------------------------------- references


def adaln_modulate_reference(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`adaln_modulate` in plain PyTorch: any device, float64 included, differentiable to any order."""
    wide, width = _wide(x), (x.shape[-1],)
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if x.numel() == 0:  # torch's norms refuse a row of no elements
        h = x.to(wide)
    elif norm == "layer":
        h = F.layer_norm(x.to(wide), width, weight, bias, eps)
    else:
        h = F.rms_norm(x.to(wide), width, weight, eps)
        h = h if bias is None else h + bias
    return (h * (1 + _rows(scale).to(h.dtype)) + _rows(shift).to(h.dtype)).to(x.dtype)


def gate_residual_reference(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`gate_residual` in plain PyTorch: any device, float64 included, differentiable to any order."""
    wide = _wide(x)
    return (x.to(wide) + _rows(gate).to(wide) * branch.to(wide)).to(x.dtype)


def gate_residual_adaln_reference(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_residual_adaln` in plain PyTorch: the other two references, one after the other."""
    r = gate_residual_reference(x, branch, gate)
    return r, adaln_modulate_reference(r, shift, scale, norm=norm, eps=eps)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(m: torch.Tensor) -> torch.Tensor:
    """A modulation as something that broadcasts against [B, N, D]."""
    return m.unsqueeze(1) if m.dim() == 2 else m


# ------------------------------------------------------------------------------------------------------- validation


def _rms(op: str, norm: str) -> bool:
    if norm == "layer":
        return False
    if norm == "rms":
        return True
    reg.fail(op, "norm", "'layer' or 'rms'", repr(norm))


def _check(
    op: str,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    """The whole contract, for every route but the fast one, which declines what it does not know."""
    reg.check_tensor(op, "x", x)
    B, N, D = _sizes(op, x)
    if branch is not None or op.startswith("gate"):
        reg.check_tensor(op, "branch", branch, x)
        _strides(op, "branch", branch, B, N, D)
    for name, m in (("gate", gate), ("shift", shift), ("scale", scale)):
        if m is not None or name in _MODULATIONS[op]:
            reg.check_tensor(op, name, m, x)
            _strides(op, name, m, B, N, D)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            reg.check_tensor(op, name, p, x)
            _strides(op, name, p, B, N, D)
    reg.number(op, "eps", eps, low=0.0)


def _sizes(op: str, x: torch.Tensor) -> tuple[int, int, int]:
    shape = x.shape
    if len(shape) != 3:
        reg.fail(op, "x", "shape [B, N, D]", tuple(shape))
    return shape  # type: ignore[return-value]


def _strides(op: str, argument: str, t: Any, B: int, N: int, D: int) -> tuple[int, int, int]:
    """Strides of `t` seen as [B, N, D], 0 where it is broadcast, or the error that says what does not fit."""
    shape, st = t.shape, t.stride()
    n = len(shape)
    if argument == "weight" or argument == "bias":
        if n == 1 and shape[0] == D:
            return 0, 0, st[0]
        reg.fail(op, argument, f"shape [D] = ({D},)", tuple(shape))
    if argument == "branch":
        if n == 3 and shape[0] == B and shape[1] == N and shape[2] == D:
            return st
        reg.fail(op, argument, f"the shape of x, {(B, N, D)}", tuple(shape))
    if n and shape[-1] == D:
        if n == 2 and shape[0] == B:
            return st[0], 0, st[1]
        if n == 3 and (shape[0] == B or shape[0] == 1) and (shape[1] == N or shape[1] == 1):
            return (st[0] if shape[0] == B else 0), (st[1] if shape[1] == N else 0), st[2]
        if n == 1:
            return 0, 0, st[0]
        if n == 2 and shape[0] == 1:
            return 0, 0, st[1]
    reg.fail(op, argument, f"{_MODULATION} with x {(B, N, D)}", tuple(shape))


def _view(op: str, argument: str, t: torch.Tensor, B: int, N: int, D: int, device: int) -> tuple[int, ...]:
    """An operand for the native side: (pointer, dtype, strides as [B, N, D])."""
    sb, sn, sd = _strides(op, argument, t, B, N, D)
    if t.get_device() != device:
        reg.fail(op, argument, "a tensor on the device of x", t.device)
    return t.data_ptr(), _CODES[t.dtype], sb, sn, sd


def _out_view(t: torch.Tensor) -> tuple[int, ...]:
    return (t.data_ptr(), _CODES[t.dtype], *t.stride())


# -------------------------------------------------------------------------------------------------- native functions


def _forward(
    op: str,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
    eps: float,
    residual: torch.Tensor | None,
    y: torch.Tensor | None,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
) -> None:
    B, N, D = _sizes(op, x)
    where = x.get_device()
    device, stream = _native.place(x)
    ext = _native.extension
    ext.adaln_forward(  # type: ignore[union-attr]
        device,
        stream,
        B,
        N,
        D,
        rms,
        eps,
        (x.data_ptr(), _CODES[x.dtype], *x.stride()),
        None if branch is None else _view(op, "branch", branch, B, N, D, where),
        None if gate is None else _view(op, "gate", gate, B, N, D, where),
        None if shift is None else _view(op, "shift", shift, B, N, D, where),
        None if scale is None else _view(op, "scale", scale, B, N, D, where),
        None if weight is None else _view(op, "weight", weight, B, N, D, where),
        None if bias is None else _view(op, "bias", bias, B, N, D, where),
        None if residual is None else _out_view(residual),
        None if y is None else _out_view(y),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
    )


def _new(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _new_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], x.shape[1])
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
    eps: float,
) -> torch.Tensor:
    y = _new(x)
    _forward("adaln_modulate", x, None, None, shift, scale, weight, bias, rms, eps, None, y)
    return y


def _modulate_stats(x, shift, scale, weight, bias, rms, eps):  # type: ignore[no-untyped-def]
    y, (mean, rstd) = _new(x), _new_stats(x)
    _forward("adaln_modulate", x, None, None, shift, scale, weight, bias, rms, eps, None, y, mean, rstd)
    return y, mean, rstd


def _modulate_out(x, shift, scale, weight, bias, rms, eps, out):  # type: ignore[no-untyped-def]
    _forward("adaln_modulate", x, None, None, shift, scale, weight, bias, rms, eps, None, out)


def _gate_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    r = _new(x)
    _forward("gate_residual", x, branch, gate, None, None, None, None, False, 0.0, r, None)
    return r


def _gate_residual_out(x, branch, gate, out):  # type: ignore[no-untyped-def]
    _forward("gate_residual", x, branch, gate, None, None, None, None, False, 0.0, out, None)


def _gate_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rms: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r, y = _new(x), _new(x)
    _forward("gate_residual_adaln", x, branch, gate, shift, scale, None, None, rms, eps, r, y)
    return r, y


def _gate_residual_adaln_stats(x, branch, gate, shift, scale, rms, eps):  # type: ignore[no-untyped-def]
    r, y, (mean, rstd) = _new(x), _new(x), _new_stats(x)
    _forward("gate_residual_adaln", x, branch, gate, shift, scale, None, None, rms, eps, r, y, mean, rstd)
    return r, y, mean, rstd


def _gate_residual_adaln_out(x, branch, gate, shift, scale, rms, eps, residual, modulated):  # type: ignore[no-untyped-def]
    _forward("gate_residual_adaln", x, branch, gate, shift, scale, None, None, rms, eps, residual, modulated)


# ---------------------------------------------------------------------------------------------------------- gradient

_KINDS = {"absent": 0, "token": 1, "sample": 2, "shared": 3}  # enum Reduce in csrc/fastdiff.h


def _backward(
    grad_y: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    r: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    rms: bool,
    need: list[bool],
) -> list[torch.Tensor]:
    """Gradients of (x, branch, gate, shift, scale, weight, bias) where `need` says so, in that order."""
    op = "adaln_backward"
    B, N, D = _sizes(op, r)
    where = r.get_device()
    device, stream = _native.place(r)
    outputs = _backward_outputs(r, branch, gate, shift, scale, weight, bias, need)
    workspace = []

    def param(t: torch.Tensor | None, index: int) -> tuple[int, int, int, int] | None:
        if outputs[index] is None:
            return None
        assert t is not None
        kind, g = _kind(t, B, N, D), outputs[index]
        partial = 0
        if kind != "token":
            chunk = _native.extension.chunk  # type: ignore[union-attr]
            workspace.append(r.new_empty(B * -(-N // chunk) * D, dtype=torch.float32))
            partial = workspace[-1].data_ptr()
        elif g.dim() != 3 or g.shape[0] != B or g.shape[1] != N:  # [1, N, D] with B > 1: summed over B below
            workspace.append(g.new_empty((B, N, D), dtype=torch.float32))
            over_batch.append((index, g, workspace[-1]))
            g = workspace[-1]
        return g.data_ptr(), _CODES[g.dtype], _KINDS[kind], partial

    over_batch: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    ext = _native.extension
    ext.adaln_backward(  # type: ignore[union-attr]
        device,
        stream,
        B,
        N,
        D,
        rms,
        _out_view(r),
        None if branch is None else _view(op, "branch", branch, B, N, D, where),
        None if gate is None else _view(op, "gate", gate, B, N, D, where),
        None if scale is None else _view(op, "scale", scale, B, N, D, where),
        None if weight is None else _view(op, "weight", weight, B, N, D, where),
        None if bias is None else _view(op, "bias", bias, B, N, D, where),
        None if grad_y is None else _view(op, "grad_y", grad_y, B, N, D, where),
        None if grad_residual is None else _view(op, "grad_residual", grad_residual, B, N, D, where),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        None if outputs[0] is None else _out_view(outputs[0]),
        None if outputs[1] is None else _out_view(outputs[1]),
        param(gate, 2),
        param(shift, 3),
        param(scale, 4),
        param(weight, 5),
        param(bias, 6),
    )
    for index, g, full in over_batch:
        outputs[index] = g.copy_(full.sum(0, keepdim=True))
    return [g for g in outputs if g is not None]


def _kind(t: torch.Tensor, B: int, N: int, D: int) -> str:
    """Over what the gradient of a broadcast operand is summed: nothing, the tokens of a sample, or everything."""
    shape = t.shape
    if len(shape) == 3:
        if shape[1] == N and N > 1:
            return "token"
        return "sample" if shape[0] == B else "shared"
    return "sample" if len(shape) == 2 and shape[0] == B else "shared"


def _backward_outputs(r, branch, gate, shift, scale, weight, bias, need):  # type: ignore[no-untyped-def]
    tensors = (r, branch, gate, shift, scale, weight, bias)
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if n and t is not None else None
        for t, n in zip(tensors, need, strict=True)
    ]


def _backward_fake(grad_y, grad_residual, r, branch, gate, shift, scale, weight, bias, mean, rstd, rms, need):  # type: ignore[no-untyped-def]
    return [g for g in _backward_outputs(r, branch, gate, shift, scale, weight, bias, need) if g is not None]


def adaln_backward_reference(
    grad_y: torch.Tensor | None,
    grad_residual: torch.Tensor | None,
    r: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
    eps: float,
) -> list[torch.Tensor | None]:
    """The gradient formulas in plain PyTorch, differentiable themselves: second derivatives come from here."""
    wide = _wide(r)
    grads: list[torch.Tensor | None] = [None] * 7
    dr = None if grad_residual is None else grad_residual.to(wide)

    def like(g: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return g.sum_to_size(_rows(t).shape).reshape(t.shape).to(t.dtype)

    if grad_y is not None:
        assert shift is not None and scale is not None
        gy, h = grad_y.to(wide), r.to(wide)
        if not rms:
            h = h - h.mean(-1, keepdim=True)
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        hat = h * rstd
        affine = hat if weight is None else hat * weight.to(wide)
        affine = affine if bias is None else affine + bias.to(wide)
        d = gy * (1 + _rows(scale).to(wide))
        grads[3], grads[4] = like(gy, shift), like(gy * affine, scale)
        if weight is not None:
            grads[5] = like(d * hat, weight)
        if bias is not None:
            grads[6] = like(d, bias)
        d = d if weight is None else d * weight.to(wide)
        dn = d - hat * (d * hat).mean(-1, keepdim=True)
        dn = (dn if rms else dn - d.mean(-1, keepdim=True)) * rstd
        dr = dn if dr is None else dr + dn
    assert dr is not None
    grads[0] = dr.to(r.dtype)
    if gate is not None:
        assert branch is not None
        grads[1] = (dr * _rows(gate).to(wide)).to(branch.dtype)
        grads[2] = like(dr * branch.to(wide), gate)
    return grads


class _Adaln(torch.autograd.Function):
    """The three operators with their shared backward kernel."""

    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, weight, bias, rms, eps):  # type: ignore[no-untyped-def,override]
        mean = rstd = None
        result: Any
        if gate is None:
            y, mean, rstd = reg.call(_modulate_stats_op, _modulate_stats, x, shift, scale, weight, bias, rms, eps)
            r, result = x, y
        elif scale is None:
            # dx and dbranch need neither x nor the result, but a tensor of their shape and type must be kept: x.
            r, result = x, reg.call(_gate_residual_op, _gate_residual, x, branch, gate)
        else:
            r, y, mean, rstd = reg.call(
                _gate_residual_adaln_stats_op, _gate_residual_adaln_stats, x, branch, gate, shift, scale, rms, eps
            )
            result = (r, y)
        ctx.save_for_backward(r, branch, gate, shift, scale, weight, bias, mean, rstd)
        ctx.rms, ctx.eps = rms, eps
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        r, branch, gate, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
        if scale is None:
            grad_residual, grad_y = grads[0], None
        elif gate is None:
            grad_residual, grad_y = None, grads[0]
        else:
            grad_residual, grad_y = grads
        if grad_residual is None and grad_y is None:
            return (None,) * 9
        need = list(ctx.needs_input_grad[:7])
        if grad_y is None:
            shift = scale = weight = bias = None
            need[3:] = [False] * 4
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised(grads):
            # create_graph=True, or a backward pass that is itself vectorised
            full = adaln_backward_reference(
                grad_y, grad_residual, r, branch, gate, shift, scale, weight, bias, ctx.rms, ctx.eps
            )
            return (*(g if n else None for g, n in zip(full, need, strict=True)), None, None)
        found = iter(
            reg.call(
                _backward_op, _backward,
                grad_y, grad_residual, r, branch, gate, shift, scale, weight, bias, mean, rstd, ctx.rms, need,
            )
        )  # fmt: skip
        return (*(next(found) if n else None for n in need), None, None)


# ------------------------------------------------------------------------------------------------------ registration

_NORM_ARGS = "Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, bool rms, float eps"
_FUSED_ARGS = "Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, bool rms, float eps"

_modulate_op = reg.define("adaln_modulate", _NORM_ARGS, "Tensor", _modulate, lambda x, *_: _new(x))
_modulate_stats_op = reg.define(
    "adaln_modulate_stats",
    _NORM_ARGS,
    "(Tensor, Tensor, Tensor)",
    _modulate_stats,
    lambda x, *_: (_new(x), *_new_stats(x)),
)
_modulate_out_op = reg.define(
    "adaln_modulate_out", _NORM_ARGS + ", Tensor(a!) out", "()", _modulate_out, lambda *_: None
)
_gate_residual_op = reg.define(
    "gate_residual", "Tensor x, Tensor branch, Tensor gate", "Tensor", _gate_residual, lambda x, *_: _new(x)
)
_gate_residual_out_op = reg.define(
    "gate_residual_out",
    "Tensor x, Tensor branch, Tensor gate, Tensor(a!) out",
    "()",
    _gate_residual_out,
    lambda *_: None,
)
_gate_residual_adaln_op = reg.define(
    "gate_residual_adaln", _FUSED_ARGS, "(Tensor, Tensor)", _gate_residual_adaln, lambda x, *_: (_new(x), _new(x))
)
_gate_residual_adaln_stats_op = reg.define(
    "gate_residual_adaln_stats",
    _FUSED_ARGS,
    "(Tensor, Tensor, Tensor, Tensor)",
    _gate_residual_adaln_stats,
    lambda x, *_: (_new(x), _new(x), *_new_stats(x)),
)
_gate_residual_adaln_out_op = reg.define(
    "gate_residual_adaln_out",
    _FUSED_ARGS + ", Tensor(a!) residual, Tensor(b!) modulated",
    "()",
    _gate_residual_adaln_out,
    lambda *_: None,
)
_backward_op = reg.define(
    "adaln_backward",
    "Tensor? grad_y, Tensor? grad_residual, Tensor r, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? rstd, bool rms, bool[] need",
    "Tensor[]",
    _backward,
    _backward_fake,
)
