"""Causal depthwise convolution along a sequence, with SiLU: the short filter in front of Mamba's selective scan.

    out[b, d, t] = act(bias[d] + sum_k weight[d, k] x[b, d, t - K + 1 + k])

(Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", sec. 3.4; the semantics are those of
`causal_conv1d_fn` in the causal-conv1d package.) What lies before the start is `initial_state`, or zero; the final
state is what the next piece of the sequence needs there, so that a stream cut into chunks gives what the whole gives.

Shapes: x [B, D, L] (layout "bdl") or [B, L, D] ("bld"), weight [D, K] with any K >= 1, bias [D], states [B, D, K - 1]
in both layouts; any strides; either memory order is read as it lies. float32, float16, bfloat16 in any mixture;
arithmetic in float32; the result has the dtype of x and its order in memory.

Deterministic, whatever the number of threads, the batch and the layout: dweight and dbias are summed over t in sixteen
interleaved parts, 512 steps at a time, and then sample by sample. Workspace: 4 (K + 1) D bytes; per thread the larger
of 8 (L + K) and 1 KiB (K + 16), backward 12 (L + K) and 256 B (35 K + 62); backward 4 B (K + 1) D besides.

On CUDA up to K = 128 taps, more run on the reference. dweight and dbias are summed over t in tiles of 64 steps, 8 by 8,
and the tiles of all samples in eight interleaved parts. Workspace: backward 4 B (K + 1) D ceil(L / 64) bytes, else
none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _registry as reg

_OP = "causal_conv1d"
LAYOUTS = ("bdl", "bld")
ACTIVATIONS = (None, "silu", "swish")
MAX_TAPS_CUDA = 128  # kConvCudaTaps in csrc/fastdiff.h
_STEPS_CUDA = 64  # kConvCudaSteps
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


# -------------------------------------------------------------------------------------------------- public function


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    layout: str = "bdl",
    return_final_state: bool = False,
) -> Result:
    """Causal depthwise convolution, differentiable in every tensor.

    Args:
        x: [B, D, L], or [B, L, D] with ``layout="bld"``.
        weight: [D, K]; weight[:, K - 1] multiplies the present.
        bias: [D].
        activation: None, or ``"silu"`` (also called ``"swish"``).
        initial_state: [B, D, K - 1], the inputs just before the first; zeros if None.
        layout: ``"bdl"`` or ``"bld"``: the order of the dimensions of x and of the result.
        return_final_state: return (out, final state) instead of out alone; the final state is [B, D, K - 1], the last
            K - 1 inputs (of `initial_state` and x together), dtype of x.

    Returns:
        out, of the shape and dtype of x; or (out, final state).

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor, or `return_final_state` no bool.
    """
    way = reg.route(_OP, (x, weight), (bias, initial_state))
    _check(x, weight, bias, activation, initial_state, layout, return_final_state)
    way = reg.within_limits(_OP, way, limits(x, weight))
    if way is reg.REFERENCE:
        return causal_conv1d_reference(
            x, weight, bias, activation, initial_state=initial_state, layout=layout,
            return_final_state=return_final_state,
        )  # fmt: skip
    channels_last, silu = layout == "bld", activation is not None
    if way is reg.GRAD:
        if initial_state is x and torch.compiler.is_compiling():
            initial_state = x.view_as(x)  # dynamo takes no tensor twice
        out = _Conv.apply(x, weight, bias, initial_state, silu, channels_last)
    else:
        out = reg.call(_forward_op, _forward, x, weight, bias, initial_state, silu, channels_last)
    return (out, _final_state(x, weight, initial_state, channels_last)) if return_final_state else out


def limits(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> list[str]:
    """Why the kernels of x's device cannot take this many taps; empty if they can."""
    if weight.shape[1] <= MAX_TAPS_CUDA or not (x.is_cuda or _native._emulated):
        return []
    return [f"K = {weight.shape[1]} taps (native on CUDA: up to {MAX_TAPS_CUDA}) are served by the reference only"]


def _final_state(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor | None, channels_last: bool
) -> torch.Tensor:
    """The last K - 1 inputs [B, D, K - 1]: a copy."""
    x = x.transpose(1, 2) if channels_last else x
    K, L = weight.shape[1], x.shape[2]
    if L >= K - 1:
        return x[:, :, L - K + 1 :].clone(memory_format=torch.contiguous_format)
    head = x.new_zeros((x.shape[0], x.shape[1], K - 1 - L)) if state is None else state[:, :, L:].to(x.dtype)
    return torch.cat([head, x], dim=2)


# -------------------------------------------------------------------------------------------------------- reference


def causal_conv1d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    layout: str = "bdl",
    return_final_state: bool = False,
) -> Result:
    """`causal_conv1d` in plain PyTorch: one multiplication and addition per tap."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.transpose(1, 2) if layout == "bld" else x
    B, D, L = rows.shape
    K = weight.shape[1]
    head = rows.new_zeros((B, D, K - 1), dtype=wide) if initial_state is None else initial_state.to(wide)
    past = torch.cat([head, rows.to(wide)], dim=2)
    w = weight.to(wide)
    out = past[:, :, :L] * w[:, :1]
    for k in range(1, K):
        out = out + past[:, :, k : k + L] * w[:, k : k + 1]
    if bias is not None:
        out = out + bias.to(wide)[:, None]
    if activation is not None:
        out = F.silu(out)
    out = (out.transpose(1, 2) if layout == "bld" else out).to(x.dtype)
    return (out, past[:, :, L:].to(x.dtype)) if return_final_state else out


# ------------------------------------------------------------------------------------------------------- validation


def _check(
    x: Any, weight: Any, bias: Any, activation: Any, state: Any, layout: Any, return_final_state: Any
) -> None:  # fmt: skip
    if layout not in LAYOUTS:
        reg.fail(_OP, "layout", f"one of {LAYOUTS}", repr(layout))
    if activation not in ACTIVATIONS:
        reg.fail(_OP, "activation", f"one of {ACTIVATIONS}", repr(activation))
    if not isinstance(return_final_state, bool):
        reg.fail(_OP, "return_final_state", "a bool", type(return_final_state).__name__, TypeError)
    shape = "[B, D, L]" if layout == "bdl" else "[B, L, D]"
    reg.check_tensor(_OP, "x", x)
    if x.dim() != 3:
        reg.fail(_OP, "x", f"shape {shape}", tuple(x.shape))
    B, D = x.shape[0], x.shape[1 if layout == "bdl" else 2]
    reg.check_tensor(_OP, "weight", weight, x)
    if weight.dim() != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        reg.fail(_OP, "weight", f"shape [D, K] = ({D}, K) with K >= 1", tuple(weight.shape))
    if bias is not None:
        reg.check_tensor(_OP, "bias", bias, x)
        if tuple(bias.shape) != (D,):
            reg.fail(_OP, "bias", f"shape [D] = ({D},)", tuple(bias.shape))
    if state is not None:
        reg.check_tensor(_OP, "initial_state", state, x)
        if tuple(state.shape) != (B, D, weight.shape[1] - 1):
            reg.fail(
                _OP, "initial_state", f"shape [B, D, K - 1] = ({B}, {D}, {weight.shape[1] - 1})", tuple(state.shape)
            )


# -------------------------------------------------------------------------------------------------- native functions


def _rows(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.transpose(1, 2) if channels_last else x


def _up(n: int) -> int:
    return (n + 15) // 16 * 16


def _workspace(x: torch.Tensor, K: int, backward: bool) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Threads, floats of scratch for each, taps [K + 1, D'], scratch; csrc/cpu/conv1d.cpp says what lies where.
    Nothing of this on CUDA."""
    if _native.place(x)[0] >= 0:
        nothing = x.new_empty((0,), dtype=torch.float32)
        return 1, 0, nothing, nothing
    _, D, L = x.shape
    threads = torch.get_num_threads()
    if backward:
        rows = 2 * _up(K + _up(L)) + _up(2 * K + _up(L)) + 16
        strips = (3 * (K - 1) + 32 + 32 * (K + 1) + 1) * 64
    else:
        rows = _up(K + _up(L)) + _up(L)
        strips = (K - 1 + 16 + 1) * 256
    size = max(rows, strips)
    taps = x.new_empty((K + 1, _up(D)), dtype=torch.float32)
    return threads, size, taps, x.new_empty((threads, size), dtype=torch.float32)


def _inner(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None, channels_last: bool,
    grad: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Check what would make a kernel read outside: the operator can be called without the public function."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        reg.fail(_OP, "x, weight", "three dimensions and [D, K] with K >= 1", (tuple(x.shape), tuple(weight.shape)))
    B, D, _ = _rows(x, channels_last).shape
    K = weight.shape[1]
    if limits(x, weight):
        reg.fail(_OP, "weight", f"up to {MAX_TAPS_CUDA} taps on CUDA", K)
    for name, t, shape in (("weight", weight, (D, K)), ("bias", bias, (D,)), ("initial_state", state, (B, D, K - 1)),
                           ("grad", grad, tuple(x.shape))):  # fmt: skip
        if t is not None and tuple(t.shape) != shape:
            reg.fail(_OP, name, f"shape {shape}", tuple(t.shape))


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None, silu: bool,
    channels_last: bool,
) -> torch.Tensor:  # fmt: skip
    _inner(x, weight, bias, state, channels_last)
    out = torch.empty_like(x)
    if out.numel():
        rows, K = _rows(x, channels_last), weight.shape[1]
        threads, size, taps, scratch = _workspace(rows, K, False)
        _native.extension.causal_conv1d(  # type: ignore[union-attr]
            *_native.place(x),
            (*rows.shape, K, int(silu), threads, size, reg.operand(rows), reg.operand(weight), reg.operand(bias),
             reg.operand(state), reg.operand(_rows(out, channels_last)), taps.data_ptr(), scratch.data_ptr()),
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------- gradient


def _backward_outputs(grad, x, weight, bias, state, need):  # type: ignore[no-untyped-def]
    return [
        None if t is None or not n else torch.empty_like(t) if i == 0 else t.new_empty(t.shape)
        for i, (t, n) in enumerate(zip((x, weight, bias, state), need, strict=True))
    ]


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None,
    silu: bool, channels_last: bool, need: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of (x, weight, bias, initial_state) where `need` says so, in that order."""
    _inner(x, weight, bias, state, channels_last, grad)
    outputs = _backward_outputs(grad, x, weight, bias, state, need)
    dx, dweight, dbias, dstate = outputs
    if x.numel():
        rows, K = _rows(x, channels_last), weight.shape[1]
        threads, size, taps, scratch = _workspace(rows, K, True)
        sums = dweight is not None or dbias is not None
        each = (-(-rows.shape[2] // _STEPS_CUDA), K + 1, rows.shape[1]) if _native.place(x)[0] >= 0 else taps.shape
        partial = taps.new_empty((rows.shape[0], *each)) if sums else None
        _native.extension.causal_conv1d_backward(  # type: ignore[union-attr]
            *_native.place(x),
            (*rows.shape, K, int(silu), threads, size, reg.operand(rows), reg.operand(weight), reg.operand(bias),
             reg.operand(state), reg.operand(_rows(grad, channels_last)), taps.data_ptr(), scratch.data_ptr(),
             reg.operand(None if dx is None else _rows(dx, channels_last)), reg.operand(dstate), reg.operand(dweight),
             reg.operand(dbias), 0 if partial is None else partial.data_ptr()),
        )  # fmt: skip
    else:
        outputs = [None if g is None else g.zero_() for g in outputs]
    return [g for g in outputs if g is not None]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, silu, channels_last):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight, bias, state)
        ctx.options = (silu, channels_last)
        return reg.call(_forward_op, _forward, x, weight, bias, state, silu, channels_last)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        tensors = ctx.saved_tensors
        silu, channels_last = ctx.options
        need = [n and t is not None for n, t in zip(ctx.needs_input_grad, tensors, strict=False)]
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised([grad]):
            # create_graph=True, or a backward pass that is itself vectorised
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                at = [
                    t if create_graph or not n else t.detach().requires_grad_()
                    for t, n in zip(tensors, need, strict=True)
                ]
                x, weight, bias, state = at
                out = causal_conv1d_reference(
                    x, weight, bias, "silu" if silu else None, initial_state=state,
                    layout="bld" if channels_last else "bdl",
                )  # fmt: skip
            wanted = [t for t, n in zip(at, need, strict=True) if n]
            full = torch.autograd.grad(out, wanted, grad, create_graph=create_graph, materialize_grads=True)
        else:
            full = reg.call(_backward_op, _backward, grad, *tensors, silu, channels_last, need)
        found = iter(full)
        return (*(next(found) if n else None for n in need), None, None)


# ------------------------------------------------------------------------------------------------------ registration

_ARGS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu, bool channels_last"

_forward_op = reg.define(_OP, _ARGS, "Tensor", _forward, lambda x, *_: torch.empty_like(x))
_backward_op = reg.define(
    "causal_conv1d_backward",
    f"Tensor grad, {_ARGS}, bool[] need",
    "Tensor[]",
    _backward,
    lambda grad, x, weight, bias, state, silu, channels_last, need: [
        g for g in _backward_outputs(grad, x, weight, bias, state, need) if g is not None
    ],
)
