"""What tests, `fastdiff verify` and `fastdiff bench` know of the causal convolution."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.ops import _registry as reg
from fastdiff.ops._examples import dense, nbytes, randn
from fastdiff.ops.causal_conv1d import ACTIVATIONS, LAYOUTS, causal_conv1d, causal_conv1d_reference, limits


def _example(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, D = rng.choice([1, 2, 3]), rng.choice([1, 2, 7, 16, 31, 64, 72, 130, 300])
    L, K = rng.choice([1, 2, 3, 5, 16, 17, 33, 70]), rng.choice([1, 2, 3, 4, 4, 4, 5, 9])
    layout = rng.choice(LAYOUTS)
    other = rng.choice([dtype, torch.float32]) if dtype in (torch.float16, torch.bfloat16) else dtype
    x = randn(rng, (B, D, L) if layout == "bdl" else (B, L, D), dtype, device)
    bias = randn(rng, (D,), other, device) if rng.random() < 0.7 else None
    kwargs: dict[str, Any] = {"layout": layout, "return_final_state": K > 1 and rng.random() < 0.5}
    if K > 1 and rng.random() < 0.5:
        kwargs["initial_state"] = randn(rng, (B, D, K - 1), dtype, device)
    return (x, randn(rng, (D, K), other, device), bias, rng.choice(ACTIVATIONS)), kwargs


# ------------------------------------------------------------------------------------------------------------ bounds


def _past(x: Any, weight: Any, initial_state: Any, layout: str) -> torch.Tensor:
    rows = x.transpose(1, 2) if layout == "bld" else x
    head = rows.new_zeros(*rows.shape[:2], weight.shape[1] - 1) if initial_state is None else initial_state
    return torch.cat([head, rows], dim=2)


def _pre(past: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    """The sum of absolute values behind every value before the activation, [B, D, L]."""
    K, L = weight.shape[1], past.shape[2] - weight.shape[1] + 1
    total = sum(past[:, :, k : k + L].abs() * weight[:, k, None].abs() for k in range(K))
    return total if bias is None else total + bias.abs()[:, None]


def _bound(
    dtype: torch.dtype, x: Any, weight: Any, bias: Any = None, activation: str | None = None, *,
    initial_state: Any = None, layout: str = "bdl", return_final_state: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    past = _past(x, weight, initial_state, layout)
    out = _pre(past, weight, bias)
    # |silu'| <= 1.1; exp, a sum and a division of its own, relative to |silu| <= |pre|.
    out = 1.1 * out + 2 * out if activation else out
    out = out.transpose(1, 2) if layout == "bld" else out
    return (out, past[:, :, x.shape[1 if layout == "bld" else 2] :].abs()) if return_final_state else (out,)


def _grad_bound(
    dtype: torch.dtype, grads: Any, x: Any, weight: Any, bias: Any = None, activation: str | None = None, *,
    initial_state: Any = None, layout: str = "bdl", return_final_state: bool = False,
) -> dict[str, Any]:  # fmt: skip
    past = _past(x, weight, initial_state, layout)
    K = weight.shape[1]
    L = past.shape[2] - K + 1
    g = (grads[0].transpose(1, 2) if layout == "bld" else grads[0]).abs()
    if activation:  # |silu''| <= 0.5, and the slope itself, at most 1.1, costs some ten roundings
        g = g * (3 + 0.5 * _pre(past, weight, bias))
    dpast = torch.zeros_like(past)
    for k in range(K):
        dpast[:, :, k : k + L] += g * weight[:, k, None].abs()
    if return_final_state:  # its gradient, and a sum that is rounded to the type of the result
        end = grads[1].abs()
        rounded = 1 + torch.finfo(dtype).eps * 2.0**22  # in units of 2^-24, times the 4 of `tolerance`
        dpast[:, :, L:] = (dpast[:, :, L:] + end) * rounded
    summed = 1 + math.sqrt(g.shape[0] * L) / 8  # roundings of n additions grow like sqrt(n)
    dx = dpast[:, :, K - 1 :]
    return {
        "x": dx.transpose(1, 2) if layout == "bld" else dx,
        "weight": torch.stack([(g * past[:, :, k : k + L].abs()).sum((0, 2)) for k in range(K)], 1) * summed,
        "bias": g.sum((0, 2)) * summed,
        "initial_state": dpast[:, :, : K - 1],
    }


# --------------------------------------------------------------------------------------------------------- bad calls


def _replace(index: int, change: Callable[[Any], Any]) -> Callable[..., reg.Call]:
    return lambda a, k: (tuple(change(t) if i == index else t for i, t in enumerate(a)), k)


def _option(**changes: Any) -> Callable[..., reg.Call]:
    return lambda a, k: (a, {**k, **changes})


_BAD: list[Any] = [
    ("x of 2 dimensions", _replace(0, lambda t: t[0]), ValueError, ("x", "[B, D, L]")),
    ("x is a list", _replace(0, lambda t: [1.0]), TypeError, ("x", "Tensor", "list")),
    ("x of an integer type", _replace(0, lambda t: t.long()), TypeError, ("x", "int64")),
    ("x in the other layout", _option(layout="bld"), ValueError, ("weight", "[D, K]")),
    ("weight of other channels", _replace(1, lambda t: t[:-1]), ValueError, ("weight", "[D, K]")),
    ("weight as nn.Conv1d has it", _replace(1, lambda t: t[:, None]), ValueError, ("weight", "[D, K]")),
    ("weight without taps", _replace(1, lambda t: t[:, :0]), ValueError, ("weight", "K >= 1")),
    ("weight is None", _replace(1, lambda t: None), TypeError, ("weight", "NoneType")),
    ("weight on another device", _replace(1, lambda t: t.to("meta")), ValueError, ("weight", "meta")),
    ("bias of another length", _replace(2, lambda t: t[:-1]), ValueError, ("bias", "[D]")),
    ("bias is a number", _replace(2, lambda t: 1.0), TypeError, ("bias", "float")),
    ("unknown activation", _replace(3, lambda t: "relu"), ValueError, ("activation", "'relu'")),
    ("unknown layout", _option(layout="ldb"), ValueError, ("layout", "'ldb'")),
    ("a state of another length", _option(initial_state=torch.zeros(2, 1536, 4)), ValueError,
     ("initial_state", "[B, D, K - 1]", "(2, 1536, 4)")),
    ("a state of an integer type", _option(initial_state=torch.zeros(2, 1536, 3).int()), TypeError,
     ("initial_state", "int32")),
    ("return_final_state is a number", _option(return_final_state=1), TypeError, ("return_final_state", "int")),
]  # fmt: skip


# ------------------------------------------------------------------------------------------- benchmark shapes and peers


def _call(B: int, D: int, L: int, K: int, layout: str) -> Callable[..., reg.Call]:
    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        x = dense((B, D, L) if layout == "bdl" else (B, L, D), dtype, device)
        return (x, dense((D, K), dtype, device, 1) * 0.5, dense((D,), dtype, device, 2), "silu"), {"layout": layout}

    return make


def _conv1d(
    x: Any, weight: Any, bias: Any = None, activation: str | None = None, *, initial_state: Any = None,
    layout: str = "bdl", return_final_state: bool = False,
) -> Callable[[], Any]:  # fmt: skip
    """What Mamba runs without the causal-conv1d package: `nn.Conv1d` with padding, cut to L."""
    if initial_state is not None or return_final_state:
        raise ValueError("no states")
    K = weight.shape[1]

    def run() -> Any:
        rows = x.transpose(1, 2) if layout == "bld" else x
        y = F.conv1d(rows, weight[:, None], bias, padding=K - 1, groups=weight.shape[0])[..., : rows.shape[2]]
        y = F.silu(y) if activation else y
        return y.transpose(1, 2) if layout == "bld" else y

    return run


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    state = kwargs.get("initial_state")
    one = kwargs if state is None else {**kwargs, "initial_state": state[b : b + 1]}
    return (args[0][b : b + 1], *args[1:]), one


def _empty(B: int, D: int, L: int, state: bool) -> Callable[..., reg.Call]:
    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        x, weight, bias = (torch.ones(s, dtype=dtype, device=device) for s in ((B, D, L), (D, 4), (D,)))
        more = {"initial_state": torch.ones(B, D, 3, dtype=dtype, device=device)} if state else {}
        return (x, weight, bias, "silu"), {**more, "return_final_state": True}

    return make


reg.add(
    reg.OpSpec(
        name="causal_conv1d",
        function=causal_conv1d,
        reference=causal_conv1d_reference,
        example=_example,
        lower=lambda x, weight, bias=None, activation=None, *, initial_state=None, layout="bdl", **_: (
            torch.ops.fastdiff.causal_conv1d.default,
            (x, weight, bias, initial_state, activation is not None, layout == "bld"),
        ),
        bound=_bound,
        grad_bound=_grad_bound,
        differentiable=("x", "weight", "bias", "initial_state"),
        growth=lambda x, weight, *_, **__: float(weight.shape[1]),
        limits=limits,
        bad=_BAD,
        bytes=lambda x, weight, bias=None, *_, **__: 2 * nbytes(x) + nbytes(weight, bias),
        flops=lambda x, weight, *_, **__: (2 * weight.shape[1] + 4) * x.numel(),
        shapes={
            "[2,1536,1024] K=4": _call(2, 1536, 1024, 4, "bdl"),
            "[2,1024,1536] bld K=4": _call(2, 1536, 1024, 4, "bld"),
            "[8,768,256] K=4": _call(8, 768, 256, 4, "bdl"),
            "[8,256,768] bld K=4": _call(8, 768, 256, 4, "bld"),
            "[1,768,4096] K=3": _call(1, 768, 4096, 3, "bdl"),
            "[16,1,1536] bld K=4 one step": _call(16, 1536, 1, 4, "bld"),
        },
        scaling={
            "length L, 768 channels, K=4": (1.0, {n: _call(1, 768, n, 4, "bld") for n in (64, 256, 1024, 4096)}),
        },
        take=_take,
        peers={"torch conv1d": _conv1d},
        inplace=None,
        large="[2,1536,1024] K=4",
        empty=[_empty(0, 3, 5, False), _empty(2, 0, 5, True), _empty(2, 3, 0, False), _empty(2, 3, 0, True)],
    )
)
