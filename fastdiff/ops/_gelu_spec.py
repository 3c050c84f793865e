"""What tests, `fastdiff verify` and `fastdiff bench` know of GELU."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.ops import _registry as reg
from fastdiff.ops._adaln_spec import _BAD_OUT, _replace
from fastdiff.ops._examples import dense, nbytes, randn
from fastdiff.ops._update_spec import _take
from fastdiff.ops.gelu import _op, gelu, gelu_reference


def _example(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    shape = rng.choice([(1,), (3,), (2, 5), (3, 1, 7), (2, 4, 16), (1, 1030), (3, 33, 17)])
    return (randn(rng, shape, dtype, device) * rng.choice([1.0, 4.0]),), {}


def _call(*size: int) -> Callable[..., reg.Call]:
    return lambda dtype, device: ((dense(size, dtype, device),), {})


def _in_place(x: torch.Tensor) -> Callable[[], Any]:
    """torch's kernel in the type of the activations, without the reference's casts."""
    if x.dtype == torch.float32:
        raise ValueError("a 16-bit type (in float32 it is the reference)")
    return lambda: F.gelu(x, approximate="tanh")


_CANCELLED = 2.0**-29  # 1 + tanh(u) of the float64 reference is off by 2^-53 where it should be almost 0


def _condition(x: torch.Tensor) -> torch.Tensor:
    """exp(-2 u) carries the error of its argument, |2 u| of its last places."""
    return 1 + 1.6 * (x.abs() + 0.045 * x.abs() ** 3)


reg.add(
    reg.OpSpec(
        name="gelu",
        function=gelu,
        reference=gelu_reference,
        example=_example,
        lower=lambda x: (_op, (x,)),
        bound=lambda dtype, x: (F.gelu(x, approximate="tanh").abs() * _condition(x) + _CANCELLED * x.abs(),),
        # s + x s (1 - s) 2 u': each term with the error of s; x s stands for s at the right.
        grad_bound=lambda dtype, grads, x: {
            "x": grads[0].abs()
            * (_condition(x) ** 2 * torch.sigmoid(1.6 * (x + 0.0447 * x**3)) + _CANCELLED * _condition(x))
        },
        differentiable=("x",),
        growth=lambda x: 4.0,
        bad=[
            ("x is no tensor", _replace(0, lambda t: [1.0]), TypeError, ("x", "Tensor", "list")),
            ("x of an integer type", _replace(0, lambda t: t.long()), TypeError, ("x", "int64")),
            *_BAD_OUT,
        ],
        bytes=lambda x: 2 * nbytes(x),
        flops=lambda x: 20 * x.numel(),
        shapes={
            "[2,16,64]": _call(2, 16, 64),
            "[8,256,1536]": _call(8, 256, 1536),
            "[8,256,4608]": _call(8, 256, 4608),
        },
        take=_take,
        peers={"torch, 16-bit": _in_place},
        large="[8,256,1536]",
        empty=[_call(0), _call(2, 0, 3)],
        scaling={"tokens, width 1536": (1.0, {n: _call(n, 1536) for n in (16, 64, 256, 1024, 4096)})},
    )
)
