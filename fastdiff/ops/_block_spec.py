"""What tests, `fastdiff verify` and `fastdiff bench` know of the halves of a transformer block."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.ops import _registry as reg
from fastdiff.ops import block
from fastdiff.ops._adaln_spec import (
    _BAD_NORM,
    _BAD_OUT,
    _BAD_X,
    U,
    _bad_modulation,
    _modulated,
    _modulation,
    _Norm,
    _option,
    _replace,
    _rows,
)
from fastdiff.ops._attention_spec import _sixteen
from fastdiff.ops._examples import dense, nbytes, randn

# ---------------------------------------------------------------------------------------------------------- examples


def _site(rng: random.Random, B: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Any]:
    return [randn(rng, (B, N, D), dtype, device), *(_modulation(rng, B, N, D, dtype, device) for _ in range(3))]


def _weight(rng: random.Random, out: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of the size that keeps activations of order one."""
    kind = torch.float32 if rng.random() < 0.3 else dtype
    return randn(rng, (out, width), kind, device) / math.sqrt(width)


def _bias(rng: random.Random, out: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    return randn(rng, (out,), dtype, device) if rng.random() < 0.8 else None


def _example_attention(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    heads, width = rng.choice([1, 2, 3]), rng.choice([4, 8, 9, 16])
    B, N, D = rng.choice([1, 2, 3]), rng.choice([1, 4, 17]), heads * width
    args = _site(rng, B, N, D, dtype, device)
    for out in (3 * D, D):
        args += [_weight(rng, out, D, dtype, device), _bias(rng, out, dtype, device)]
    return (*args, heads), {"norm": rng.choice(["layer", "rms"])}


def _example_mlp(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, N, D, M = rng.choice([1, 2, 3]), rng.choice([1, 4, 17]), rng.choice([5, 8, 24]), rng.choice([7, 16, 40])
    args = _site(rng, B, N, D, dtype, device)
    for out, width in ((M, D), (D, M)):
        args += [_weight(rng, out, width, dtype, device), _bias(rng, out, dtype, device)]
    return tuple(args), {"norm": rng.choice(["layer", "rms"])}


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    B = args[0].shape[0]

    def one(t: Any) -> Any:
        return t[b : b + 1] if isinstance(t, torch.Tensor) and t.dim() >= 2 and t.shape[0] == B else t

    return (*(one(t) for t in args[:4]), *args[4:]), kwargs


# ------------------------------------------------------------------------------------------------------------ bounds
# Errors travel through the chain: every stage passes on those of its input (independent roundings, so their squares
# add) and adds its own. A magnitude m stands for an error of about (4 + growth) U m.


class _Chain:
    """A float64 value `v` with the magnitude `m` of its error, `unit` of which a stored 16-bit value adds."""

    def __init__(self, dtype: torch.dtype, growth: float, v: torch.Tensor, m: torch.Tensor) -> None:
        self.dtype, self.growth = dtype, growth
        self.v, self.m = v, m + 0.5 * torch.finfo(dtype).eps / ((4 + growth) * U) * v.abs()

    def then(self, v: torch.Tensor, m: torch.Tensor) -> _Chain:
        return _Chain(self.dtype, self.growth, v, m)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> _Chain:
        # On a GPU float32 weights and biases are rounded to the type of x.
        rounding = 0.5 * torch.finfo(self.dtype).eps / ((4 + self.growth) * U)
        m = F.linear(self.m.square() + (1 + rounding**2) * self.v.square(), weight.square()).sqrt()
        v = F.linear(self.v, weight, bias)
        return self.then(v, m + v.abs() + (0 if bias is None else (1 + rounding) * bias.abs()))


def _normed(dtype: torch.dtype, growth: float, x: Any, shift: Any, scale: Any, norm: str, eps: float) -> _Chain:
    n = _Norm(x, x.abs(), norm, eps)
    return _Chain(dtype, growth, n.hat * (1 + _rows(scale)) + _rows(shift), _modulated(n, shift, scale))


def _gated(x: Any, gate: Any, branch: _Chain) -> tuple[torch.Tensor, ...]:
    return (x.abs() + _rows(gate).abs() * (branch.m + branch.v.abs()),)


def _bound_attention(dtype: torch.dtype, x: Any, shift: Any, scale: Any, gate: Any, qkv_weight: Any, qkv_bias: Any,
                     out_weight: Any, out_bias: Any, num_heads: int, *, eps: float = 1e-6,
                     norm: str = "layer") -> tuple[torch.Tensor, ...]:  # fmt: skip
    B, N, D = x.shape
    packed = _normed(dtype, _growth(x), x, shift, scale, norm, eps).linear(qkv_weight, qkv_bias)
    (q, k, v), (mq, mk, mv) = (
        t.view(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0) for t in (packed.v, packed.m)
    )
    unit = (D // num_heads) ** -0.5
    p = torch.softmax(unit * q @ k.mT, -1)
    squares = (mq.square() + q.square()) @ k.square().mT + q.square() @ mk.square().mT
    ml = 1 + unit * (squares.sqrt() + (q @ k.mT).abs())
    mp = p * (ml + (p * ml).sum(-1, keepdim=True))
    m = (mp.square() @ v.square() + p.square() @ mv.square()).sqrt() + p @ v.abs()
    m = m + _sixteen(dtype, q, k, v, unit, False) / ((4 + _growth(x)) * U)
    mixed = packed.then(*((t.transpose(1, 2).reshape(B, N, D)) for t in (p @ v, m)))
    return _gated(x, gate, mixed.linear(out_weight, out_bias))


def _bound_mlp(dtype: torch.dtype, x: Any, shift: Any, scale: Any, gate: Any, fc1_weight: Any, fc1_bias: Any,
               fc2_weight: Any, fc2_bias: Any, *, eps: float = 1e-6, norm: str = "layer") -> Any:  # fmt: skip
    h = _normed(dtype, _growth(x), x, shift, scale, norm, eps).linear(fc1_weight, fc1_bias)
    h = h.then(F.gelu(h.v, approximate="tanh"), 1.13 * h.m + h.v.abs())  # |GELU'| <= 1.13
    return _gated(x, gate, h.linear(fc2_weight, fc2_bias))


def _growth(x: torch.Tensor, *_: Any, **__: Any) -> float:
    return math.sqrt(x.shape[-1])


def _grad_bound(reference: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    """Norm-wise: each of some ten roundings on the way back is at most one of the largest value there is.

    The pieces have element-wise bounds of their own; what is checked here is how they are put together.
    """

    def bound(dtype: torch.dtype, grads: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with torch.enable_grad():
            leaves = {n: t.detach().requires_grad_() for n, t in zip(names, args, strict=False) if t is not None}
            call = [leaves.get(n, t) for n, t in zip(names, args, strict=False)]
            out = reference(*call, *args[len(names) :], **kwargs)
            found = torch.autograd.grad(out, list(leaves.values()), grads[0], materialize_grads=True)
        growth = _growth(args[0])
        x = args[0]
        spread = _Norm(x, x.abs(), kwargs.get("norm", "layer"), kwargs.get("eps", 1e-6))
        condition = float((spread.rstd * spread.relative).amax()) if x.numel() else 1.0
        roundings = 10 * (1 + torch.finfo(dtype).eps / ((4 + growth) * U)) * max(1.0, condition)
        largest = max((float(g.abs().amax()) for g in found if g.numel()), default=0.0)
        return {n: torch.full_like(g, roundings * largest) for n, g in zip(leaves, found, strict=True)}

    return bound


# --------------------------------------------------------------------------------------- benchmark shapes and peers

_SIZES = {"[2,16,64]": (2, 16, 64, 4), "[8,256,384]": (8, 256, 384, 6), "[8,256,1152]": (8, 256, 1152, 16),
          "[1,256,1152]": (1, 256, 1152, 16)}  # fmt: skip


def _decisive(x: Any, shift: Any, scale: Any, gate: Any, *_: Any, q_norm: Any = None, k_norm: Any = None,
              **__: Any) -> Any:  # fmt: skip
    return x, shift, scale, gate, q_norm, k_norm


def _dit(B: int, N: int, D: int, layers: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> list[Any]:
    """x, the modulations as chunks of one tensor, as in DiT, and weights with biases."""
    found = [dense((B, N, D), dtype, device, 1), *dense((B, 6 * D), dtype, device, 2).chunk(6, dim=1)[:3]]
    for i, (out, width) in enumerate(layers):
        found += [dense((out, width), dtype, device, 3 + i) / math.sqrt(width), dense((out,), dtype, device, 7 + i)]
    return found


def _attention_call(B: int, N: int, D: int, heads: int) -> Callable[..., reg.Call]:
    return lambda dtype, device: ((*_dit(B, N, D, [(3 * D, D), (D, D)], dtype, device), heads), {})


def _mlp_call(B: int, N: int, D: int, heads: int) -> Callable[..., reg.Call]:
    return lambda dtype, device: (tuple(_dit(B, N, D, [(4 * D, D), (D, 4 * D)], dtype, device)), {})


def _shipped_attention(x: Any, shift: Any, scale: Any, gate: Any, qkv_weight: Any, qkv_bias: Any, out_weight: Any,
                       out_bias: Any, num_heads: int, **options: Any) -> Callable[[], Any]:  # fmt: skip
    """The code that DiT ships, all of it in the type of the activations, with PyTorch's fused attention."""
    if options:
        raise ValueError("no options")
    B, N, D = x.shape

    def run() -> torch.Tensor:
        y = F.layer_norm(x, (D,), eps=1e-6) * (1 + _rows(scale)) + _rows(shift)
        q, k, v = F.linear(y, qkv_weight, qkv_bias).view(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        return x + _rows(gate) * F.linear(mixed, out_weight, out_bias)

    return run


def _shipped_mlp(x: Any, shift: Any, scale: Any, gate: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any,
                 fc2_bias: Any, **options: Any) -> Callable[[], Any]:  # fmt: skip
    if options or x.dtype == torch.float32:
        raise ValueError("no options, in a 16-bit type (in float32 it is the reference)")

    def run() -> torch.Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + _rows(scale)) + _rows(shift)
        h = F.gelu(F.linear(y, fc1_weight, fc1_bias), approximate="tanh")
        return x + _rows(gate) * F.linear(h, fc2_weight, fc2_bias)

    return run


def _compiled(shipped: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    """The same through `torch.compile`, on a GPU: in the type of the activations, where the reference is float32."""

    def prepare(x: Any, *args: Any, **options: Any) -> Callable[[], Any]:
        if not x.is_cuda:
            raise ValueError("timed on GPUs")
        run: Callable[[], Any] = torch.compile(shipped(x, *args, **options), fullgraph=True, dynamic=False)
        return run

    return prepare


# --------------------------------------------------------------------------------------------------------- bad calls


def _bad_weights(first: str, second: str) -> list[Any]:
    return [
        (f"{first}_weight transposed", _replace(4, lambda t: t.mT), ValueError, (f"{first}_weight", "[out, in]")),
        (f"{first}_weight is None", _replace(4, lambda t: None), TypeError, (f"{first}_weight", "NoneType")),
        (f"{first}_bias too short", _replace(5, lambda t: t[1:]), ValueError, (f"{first}_bias",)),
        (f"{second}_weight too wide", _replace(6, lambda t: torch.cat([t, t], 1)), ValueError, (f"{second}_weight",)),
        (f"{second}_weight on another device", _replace(6, lambda t: t.to("meta")), ValueError,
         (f"{second}_weight", "meta")),
        (f"{second}_bias of an integer type", _replace(7, lambda t: t.long()), TypeError, (f"{second}_bias", "int64")),
    ]  # fmt: skip


_BAD = [*_BAD_X, *_bad_modulation(1, "shift"), *_bad_modulation(2, "scale"), *_bad_modulation(3, "gate"), *_BAD_NORM,
        *_BAD_OUT]  # fmt: skip
_ATTENTION = ("x", "shift", "scale", "gate", "qkv_weight", "qkv_bias", "out_weight", "out_bias")
_MLP = ("x", "shift", "scale", "gate", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def _attention_flops(x: torch.Tensor, *_: Any, **__: Any) -> int:
    B, N, D = x.shape
    return B * (8 * N * D * D + 4 * N * N * D)


def _mlp_flops(x: torch.Tensor, *args: Any, **__: Any) -> int:
    return 4 * x.numel() * int(args[3].shape[0])


reg.add(
    reg.OpSpec(
        name="adaln_attention",
        function=block.adaln_attention,
        reference=block.adaln_attention_reference,
        example=_example_attention,
        lower=None,
        bound=_bound_attention,
        grad_bound=_grad_bound(block.adaln_attention_reference, _ATTENTION),
        differentiable=_ATTENTION,
        growth=_growth,
        bad=[
            *_BAD, *_bad_weights("qkv", "out"),
            ("heads do not divide D", _replace(8, lambda _: 5), ValueError, ("num_heads", "divisor", "5")),
            ("num_heads is a float", _replace(8, lambda _: 4.0), TypeError, ("num_heads", "float")),
            ("q_norm of another width", _option(q_norm=torch.ones(5)), ValueError, ("adaln_attention: q_norm", "(5,)")),
            ("k_norm is a number", _option(k_norm=1.0), TypeError, ("adaln_attention: k_norm", "Tensor", "float")),
            ("rope is one tensor", _option(rope=torch.ones(2)), TypeError, ("adaln_attention: rope", "pair")),
        ],
        bytes=lambda x, *args, **_: 2 * nbytes(x) + nbytes(*args[:7]),
        flops=_attention_flops,
        shapes={name: _attention_call(*size) for name, size in _SIZES.items()},
        take=_take,
        peers={"DiT's code": _shipped_attention, "DiT's code, compiled": _compiled(_shipped_attention)},
        large="[8,256,384]",
        empty=[_attention_call(0, 4, 16, 2), _attention_call(2, 0, 16, 2)],
        overhead=_attention_call(4, 4, 4, 2),
        exact_infinity=False,
        products=True,
        limits=block.limits,
        decisive=_decisive,
        scaling={"tokens N, D = 384": (1.5, {n: _attention_call(1, n, 384, 6) for n in (64, 256, 1024, 4096)})},
    )
)  # fmt: skip

reg.add(
    reg.OpSpec(
        name="adaln_mlp",
        function=block.adaln_mlp,
        reference=block.adaln_mlp_reference,
        example=_example_mlp,
        lower=None,
        bound=_bound_mlp,
        grad_bound=_grad_bound(block.adaln_mlp_reference, _MLP),
        differentiable=_MLP,
        growth=_growth,
        bad=[*_BAD, *_bad_weights("fc1", "fc2")],
        bytes=lambda x, *args, **_: 2 * nbytes(x) + nbytes(*args[:7]),
        flops=_mlp_flops,
        shapes={name: _mlp_call(*size) for name, size in _SIZES.items()},
        take=_take,
        peers={"DiT's code": _shipped_mlp, "DiT's code, compiled": _compiled(_shipped_mlp)},
        large="[8,256,384]",
        empty=[_mlp_call(0, 4, 16, 2), _mlp_call(2, 0, 16, 2)],
        overhead=_mlp_call(4, 4, 4, 2),
        exact_infinity=False,
        products=True,
        decisive=_decisive,
        scaling={"tokens N, D = 384": (1.0, {n: _mlp_call(1, n, 384, 6) for n in (64, 256, 1024, 4096)})},
    )
)
