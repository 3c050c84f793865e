"""What tests, `fastdiff verify` and `fastdiff bench` know of the adaptive layer norm family."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.ops import _registry as reg
from fastdiff.ops import adaln
from fastdiff.ops._examples import dense, nbytes, randn

U = 2.0**-24  # unit roundoff of float32
Bad = tuple[str, Callable[..., reg.Call], type[Exception], tuple[str, ...]]


# ---------------------------------------------------------------------------------------------------------- examples


def _sizes(rng: random.Random) -> tuple[int, int, int]:
    return (
        rng.choice([1, 2, 3]),
        rng.choice([1, 2, 5, 16, 17, 33]),
        rng.choice([1, 2, 3, 7, 16, 31, 64, 72, 100, 257, 384]),
    )


def _modulation(rng: random.Random, B: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A shift, scale or gate in any of the documented shapes; float32 beside 16-bit activations now and then."""
    dtype = rng.choice([dtype, torch.float32]) if dtype in (torch.float16, torch.bfloat16) else dtype
    kind = rng.choice(["sample", "sample1", "token", "shared", "shared1", "table", "chunk", "expanded"])
    if kind == "chunk":
        return randn(rng, (B, 6 * D), dtype, device, layout="plain").chunk(6, dim=1)[rng.choice([0, 3, 5])]
    if kind == "expanded":
        return randn(rng, (B, 1, D), dtype, device).expand(B, N, D)
    shape = {
        "sample": (B, D), "sample1": (B, 1, D), "token": (B, N, D), "shared": (D,), "shared1": (1, 1, D),
        "table": (1, N, D),
    }[kind]  # fmt: skip
    return randn(rng, shape, dtype, device)


def _example_modulate(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, N, D = _sizes(rng)
    x = randn(rng, (B, N, D), dtype, device) * rng.choice([1.0, 30.0]) + rng.choice([0.0, 3.0])
    args = (x, _modulation(rng, B, N, D, dtype, device), _modulation(rng, B, N, D, dtype, device))
    kwargs: dict[str, Any] = {"norm": rng.choice(["layer", "rms"]), "eps": rng.choice([1e-6, 1e-5])}
    affine = rng.choice(["none", "weight", "both"])
    if affine != "none":
        kwargs["weight"] = randn(rng, (D,), dtype, device)
    if affine == "both":
        kwargs["bias"] = randn(rng, (D,), dtype, device)
    return args, kwargs


def _example_gate(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, N, D = _sizes(rng)
    x, branch = randn(rng, (B, N, D), dtype, device), randn(rng, (B, N, D), dtype, device)
    return (x, branch, _modulation(rng, B, N, D, dtype, device)), {}


def _example_fused(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, N, D = _sizes(rng)
    x, branch = randn(rng, (B, N, D), dtype, device), randn(rng, (B, N, D), dtype, device)
    modulations = [_modulation(rng, B, N, D, dtype, device) for _ in range(3)]
    return (x, branch, *modulations), {"norm": rng.choice(["layer", "rms"])}


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    B = args[0].shape[0]

    def one(t: torch.Tensor) -> torch.Tensor:
        return t[b : b + 1] if t.dim() >= 2 and t.shape[0] == B else t

    return reg.map_tensors(one, args), kwargs


# ------------------------------------------------------------------------------------------------------------ bounds
# In float64: an upper bound, up to a small factor, of the absolute values that are added on the way to a result.


class _Norm:
    """Normalised values and how their error scales: `h` bounds the magnitudes behind `hat`."""

    def __init__(self, r: torch.Tensor, r_magnitude: torch.Tensor, norm: str, eps: float) -> None:
        center = r - r.mean(-1, keepdim=True) if norm == "layer" else r
        self.rstd = torch.rsqrt(center.square().mean(-1, keepdim=True) + eps)
        self.hat = center * self.rstd
        # An error of r moves hat directly, through the mean, and through rstd (times |hat|).
        spread = (r_magnitude + r_magnitude.mean(-1, keepdim=True)) * self.rstd
        self.relative = 1 + r_magnitude.mean(-1, keepdim=True) * self.rstd
        self.h = (spread + 1) * (1 + self.hat.abs())


def _rows(m: torch.Tensor) -> torch.Tensor:
    return m.unsqueeze(1) if m.dim() == 2 else m


def _growth(x: torch.Tensor, *_: Any, **__: Any) -> float:
    return math.sqrt(x.shape[-1])


def _modulated(n: _Norm, shift: Any, scale: Any, weight: Any = None, bias: Any = None) -> torch.Tensor:
    affine = n.h if weight is None else n.h * weight.abs()
    affine = affine if bias is None else affine + bias.abs()
    return affine * (1 + _rows(scale).abs()) + _rows(shift).abs()


def _stored(dtype: torch.dtype, r: torch.Tensor, magnitude: torch.Tensor, growth: float) -> torch.Tensor:
    """The magnitude of a residual that was rounded to `dtype` before the norm read it."""
    return magnitude + 0.5 * torch.finfo(dtype).eps * r.abs() / ((4 + growth) * U)


def _sum_like(m: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Magnitudes of a sum over whatever t is broadcast along; roundings of n additions grow like sqrt(n)."""
    total = m.sum_to_size(_rows(t).shape).reshape(t.shape)
    return total * (1 + math.sqrt(m.numel() / max(t.numel(), 1)) / 8)


def _norm_grads(n: _Norm, gy: torch.Tensor, shift: Any, scale: Any, weight: Any = None, bias: Any = None) -> Any:
    gy = gy.abs()
    affine = n.h if weight is None else n.h * weight.abs()
    affine = affine if bias is None else affine + bias.abs()
    d = gy * (1 + _rows(scale).abs())
    found = {"shift": _sum_like(gy, shift), "scale": _sum_like(gy * affine, scale)}
    if weight is not None:
        found["weight"] = _sum_like(d * n.h, weight)
    if bias is not None:
        found["bias"] = _sum_like(d, bias)
    d = d if weight is None else d * weight.abs()
    dx = (d + d.mean(-1, keepdim=True) + n.h * (d * n.h).mean(-1, keepdim=True)) * n.rstd * n.relative
    return dx, found


def _bound_modulate(dtype: torch.dtype, x: Any, shift: Any, scale: Any, *, norm: str = "layer", weight: Any = None,
                    bias: Any = None, eps: float = 1e-6) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return (_modulated(_Norm(x, x.abs(), norm, eps), shift, scale, weight, bias),)


def _grad_bound_modulate(dtype: torch.dtype, grads: Any, x: Any, shift: Any, scale: Any, *, norm: str = "layer",
                         weight: Any = None, bias: Any = None, eps: float = 1e-6) -> dict[str, Any]:  # fmt: skip
    dx, found = _norm_grads(_Norm(x, x.abs(), norm, eps), grads[0], shift, scale, weight, bias)
    return {"x": dx, **found}


def _bound_gate(dtype: torch.dtype, x: Any, branch: Any, gate: Any) -> tuple[torch.Tensor, ...]:
    return (x.abs() + (_rows(gate) * branch).abs(),)


def _gate_grads(dr: torch.Tensor, branch: Any, gate: Any) -> dict[str, Any]:
    return {"x": dr, "branch": dr * _rows(gate).abs(), "gate": _sum_like(dr * branch.abs(), gate)}


def _grad_bound_gate(dtype: torch.dtype, grads: Any, x: Any, branch: Any, gate: Any) -> dict[str, Any]:
    return _gate_grads(grads[0].abs(), branch, gate)


def _fused_norm(dtype: torch.dtype, x: Any, branch: Any, gate: Any, norm: str, eps: float) -> tuple[Any, _Norm]:
    r, (magnitude,) = x + _rows(gate) * branch, _bound_gate(dtype, x, branch, gate)
    return magnitude, _Norm(r, _stored(dtype, r, magnitude, _growth(x)), norm, eps)


def _bound_fused(dtype: torch.dtype, x: Any, branch: Any, gate: Any, shift: Any, scale: Any, *, norm: str = "layer",
                 eps: float = 1e-6) -> tuple[torch.Tensor, ...]:  # fmt: skip
    magnitude, n = _fused_norm(dtype, x, branch, gate, norm, eps)
    return magnitude, _modulated(n, shift, scale)


def _grad_bound_fused(dtype: torch.dtype, grads: Any, x: Any, branch: Any, gate: Any, shift: Any, scale: Any, *,
                      norm: str = "layer", eps: float = 1e-6) -> dict[str, Any]:  # fmt: skip
    _, n = _fused_norm(dtype, x, branch, gate, norm, eps)
    dx, found = _norm_grads(n, grads[1], shift, scale)
    return {**_gate_grads(dx + grads[0].abs(), branch, gate), **found}


# --------------------------------------------------------------------------------------------------------- bad calls


def _replace(index: int, change: Callable[[Any], Any]) -> Callable[..., reg.Call]:
    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
        return tuple(change(a) if i == index else a for i, a in enumerate(args)), kwargs

    return make


def _option(**changes: Any) -> Callable[..., reg.Call]:
    return lambda args, kwargs: (args, {**kwargs, **changes})


def _longer(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[..., :1]], dim=-1) if t.shape[-1] else t


def _bad_modulation(index: int, name: str) -> list[Bad]:
    return [
        (f"{name} of another width", _replace(index, _longer), ValueError, (name, "[B, N, D]")),
        (f"{name} of 4 dimensions", _replace(index, lambda t: t.reshape(1, 1, 1, -1)), ValueError, (name, "1, 1, 1")),
        (f"{name} is None", _replace(index, lambda t: None), TypeError, (name, "Tensor", "NoneType")),
        (f"{name} is an integer tensor", _replace(index, lambda t: t.long()), TypeError, (name, "int64")),
        (f"{name} on another device", _replace(index, lambda t: t.to("meta")), ValueError, (name, "meta")),
    ]


_BAD_X: list[Bad] = [
    ("x of 2 dimensions", _replace(0, lambda t: t[0]), ValueError, ("x", "[B, N, D]")),
    ("x is no tensor", _replace(0, lambda t: [1.0]), TypeError, ("x", "Tensor", "list")),
    ("x is sparse", _replace(0, lambda t: t.to_sparse()), TypeError, ("x", "dense")),
    ("x of an integer type", _replace(0, lambda t: t.long()), TypeError, ("x", "int64")),
]
_BAD_NORM: list[Bad] = [
    ("unknown norm", _option(norm="batch"), ValueError, ("norm", "'batch'")),
    ("negative eps", _option(eps=-1.0), ValueError, ("eps", "-1.0")),
    ("eps is no number", _option(eps="small"), TypeError, ("eps", "str")),
]
_BAD_OUT: list[Bad] = [
    (
        "out of another type",
        lambda a, k: (a, {**k, "out": torch.empty_like(a[0]).double()}),
        TypeError,
        ("out", "float64"),
    ),
    ("out of another shape", lambda a, k: (a, {**k, "out": torch.empty_like(a[0])[:0]}), ValueError, ("out",)),
    ("out overlaps itself", lambda a, k: (a, {**k, "out": _self_overlapping(a[0])}), ValueError, ("out", "distinct")),
    ("out overlaps an input", lambda a, k: _overlapping(a, k), ValueError, ("out", "overlap")),
]


def _self_overlapping(x: torch.Tensor) -> torch.Tensor:
    """Of the shape of x, with rows that share half of their memory."""
    strides = [1] * x.dim()
    for d in range(x.dim() - 2, -1, -1):
        strides[d] = max(1, strides[d + 1] * x.shape[d + 1] // 2)
    return torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device).as_strided(x.shape, strides)


def _overlapping(args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    x = args[0]
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return (flat[:-1].view(x.shape), *args[1:]), {**kwargs, "out": flat[1:].view(x.shape)}


# -------------------------------------------------------------------------------------------------- benchmark shapes


def _dit(B: int, N: int, D: int, parts: int, *, per_token: bool = False) -> Callable[..., Any]:
    """x, branch and `parts` modulations that are chunks of one [B, 6 D] (or [B, N, 6 D]) tensor, as in DiT."""

    def make(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        six = dense((B, N, 6 * D) if per_token else (B, 6 * D), dtype, device, 3).chunk(6, dim=-1)
        return (dense((B, N, D), dtype, device, 1), dense((B, N, D), dtype, device, 2), *six[:parts])

    return make


_SIZES = {
    "[8,256,1152]": (8, 256, 1152),  # DiT-XL/2 at 256 x 256
    "[8,256,384]": (8, 256, 384),  # DiT-S/2
    "[2,1024,1152]": (2, 1024, 1152),  # DiT-XL/2 at 512 x 512
    "[1,16,1152]": (1, 16, 1152),
}


def _shapes(pick: Callable[[tuple[torch.Tensor, ...]], tuple[Any, ...]], parts: int) -> dict[str, Any]:
    def call(size: tuple[int, int, int], per_token: bool) -> Callable[..., reg.Call]:
        return lambda dtype, device: (pick(_dit(*size, parts, per_token=per_token)(dtype, device)), {})

    shapes = {name: call(size, False) for name, size in _SIZES.items()}
    shapes["[2,256,1152] per token"] = call((2, 256, 1152), True)
    return shapes


def _scaling(pick: Callable[[tuple[torch.Tensor, ...]], tuple[Any, ...]], parts: int) -> dict[str, Any]:
    def call(tokens: int) -> Callable[..., reg.Call]:
        return lambda dtype, device: (pick(_dit(1, tokens, 1152, parts)(dtype, device)), {})

    # From about 16 MB on the pages of an output are fresh at every call, and the allocator is what is measured.
    return {"tokens N, D = 1152": (1.0, {n: call(n) for n in (32, 64, 128, 256, 512, 1024, 2048)})}


# ------------------------------------------------------------------------------------------------------------- peers
# The code that DiT, SiT and PixArt ship, in the type of the activations: rounds after every operation, which for
# 16-bit types is cheaper than the reference (float32 inside) and less exact.


def _plain_modulate(x: Any, shift: Any, scale: Any, *, norm: str = "layer", eps: float = 1e-6, **affine: Any) -> Any:
    if x.dtype == torch.float32 or norm != "layer" or affine:
        raise ValueError("a layer norm without parameters, in a 16-bit type (in float32 it is the reference)")
    return lambda: F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + _rows(scale)) + _rows(shift)


def _plain_gate(x: Any, branch: Any, gate: Any) -> Any:
    if x.dtype == torch.float32:
        raise ValueError("a 16-bit type (in float32 it is the reference)")
    return lambda: x + _rows(gate) * branch


def _plain_fused(x: Any, branch: Any, gate: Any, shift: Any, scale: Any, *, norm: str = "layer",
                 eps: float = 1e-6) -> Any:  # fmt: skip
    if x.dtype == torch.float32 or norm != "layer":
        raise ValueError("a layer norm in a 16-bit type (in float32 it is the reference)")

    def run() -> Any:
        r = x + _rows(gate) * branch
        return r, F.layer_norm(r, x.shape[-1:], eps=eps) * (1 + _rows(scale)) + _rows(shift)

    return run


reg.add(
    reg.OpSpec(
        name="adaln_modulate",
        function=adaln.adaln_modulate,
        reference=adaln.adaln_modulate_reference,
        example=_example_modulate,
        lower=lambda x, shift, scale, *, norm="layer", weight=None, bias=None, eps=1e-6: (
            torch.ops.fastdiff.adaln_modulate.default, (x, shift, scale, weight, bias, norm == "rms", eps),
        ),
        bound=_bound_modulate,
        grad_bound=_grad_bound_modulate,
        differentiable=("x", "shift", "scale", "weight", "bias"),
        growth=_growth,
        bad=[
            *_BAD_X, *_bad_modulation(1, "shift"), *_bad_modulation(2, "scale"), *_BAD_NORM, *_BAD_OUT,
            ("weight of another width", lambda a, k: (a, {**k, "weight": torch.ones(a[0].shape[-1] + 1)}), ValueError,
             ("weight", "[D]")),
        ],
        bytes=lambda x, shift, scale, **k: 2 * nbytes(x) + nbytes(shift, scale, k.get("weight"), k.get("bias")),
        flops=lambda x, *_, **__: 8 * x.numel(),
        shapes=_shapes(lambda t: (t[0], t[2], t[3]), 2),
        scaling=_scaling(lambda t: (t[0], t[2], t[3]), 2),
        take=_take,
        large="[8,256,384]",
        peers={"DiT's code": _plain_modulate},
    )
)  # fmt: skip

reg.add(
    reg.OpSpec(
        name="gate_residual",
        function=adaln.gate_residual,
        reference=adaln.gate_residual_reference,
        example=_example_gate,
        lower=lambda x, branch, gate: (torch.ops.fastdiff.gate_residual.default, (x, branch, gate)),
        bound=_bound_gate,
        grad_bound=_grad_bound_gate,
        differentiable=("x", "branch", "gate"),
        growth=lambda *_, **__: 0.0,
        bad=[
            *_BAD_X, *_bad_modulation(2, "gate"), *_BAD_OUT,
            ("branch of another shape", _replace(1, _longer), ValueError, ("branch", "shape of x")),
        ],
        bytes=lambda x, branch, gate: 2 * nbytes(x) + nbytes(branch, gate),
        flops=lambda x, *_: 2 * x.numel(),
        shapes=_shapes(lambda t: t[:3], 1),
        scaling=_scaling(lambda t: t[:3], 1),
        take=_take,
        large="[8,256,384]",
        peers={"DiT's code": _plain_gate},
    )
)  # fmt: skip

reg.add(
    reg.OpSpec(
        name="gate_residual_adaln",
        function=adaln.gate_residual_adaln,
        reference=adaln.gate_residual_adaln_reference,
        example=_example_fused,
        lower=lambda x, branch, gate, shift, scale, *, norm="layer", eps=1e-6: (
            torch.ops.fastdiff.gate_residual_adaln.default, (x, branch, gate, shift, scale, norm == "rms", eps),
        ),
        bound=_bound_fused,
        grad_bound=_grad_bound_fused,
        differentiable=("x", "branch", "gate", "shift", "scale"),
        growth=_growth,
        bad=[
            *_BAD_X, *_bad_modulation(2, "gate"), *_bad_modulation(3, "shift"), *_bad_modulation(4, "scale"),
            *_BAD_NORM,
            ("branch of another shape", _replace(1, _longer), ValueError, ("branch", "shape of x")),
            (
                "half a pair",
                lambda a, k: (a, {**k, "out": (torch.empty_like(a[0]), None)}),
                TypeError,
                ("out", "NoneType"),
            ),
            ("out is no pair", lambda a, k: (a, {**k, "out": torch.empty_like(a[0])}), TypeError, ("out", "pair")),
        ],
        bytes=lambda x, branch, gate, shift, scale, **_: 3 * nbytes(x) + nbytes(branch, gate, shift, scale),
        flops=lambda x, *_, **__: 10 * x.numel(),
        shapes=_shapes(lambda t: t[:5], 3),
        scaling=_scaling(lambda t: t[:5], 3),
        take=_take,
        large="[8,256,384]",
        peers={"DiT's code": _plain_fused},
        inplace=None,  # out= is a pair
    )
)  # fmt: skip
