"""What tests, `fastdiff verify` and `fastdiff bench` know of the attention family."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.ops import _registry as reg
from fastdiff.ops import attention as page
from fastdiff.ops._adaln_spec import U, _option, _replace
from fastdiff.ops._examples import dense, nbytes, randn

# ---------------------------------------------------------------------------------------------------------- examples


# No single key: its weight is 1 whatever q and k are, and float32 noise around zero derivatives has no scale to be
# compared with. tests/test_attention.py has that case.


def _example(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, H = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    N, M = rng.choice([1, 2, 5, 16, 33, 50]), rng.choice([2, 3, 7, 17, 70, 130])
    d = rng.choice([1, 2, 3, 8, 8, 24, 33, 64, 72])
    layout = rng.choice(page.LAYOUTS)

    def make(tokens: int) -> torch.Tensor:
        return randn(rng, (B, H, tokens, d) if layout == "bhnd" else (B, tokens, H, d), dtype, device)

    q, k, v = make(N), make(M), make(M)
    if rng.random() < 0.2:
        v = k  # one tensor in two places
    return (q, k, v), {"layout": layout, **rng.choice([{}, {"scale": 0.5}, {"scale": -0.25}])}


def _rope(N: int, d: int, device: torch.device, full: bool, interleaved: bool) -> page.Rope:
    angle = torch.arange(N)[:, None] * 100.0 ** (-torch.arange(0, d, 2) / d)
    if full:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return angle.cos().to(device), angle.sin().to(device)


def _example_packed(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, H, N = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([2, 3, 5, 16, 33, 70])
    d = rng.choice([4, 8, 8, 24, 34, 64, 72])
    kwargs: dict[str, Any] = {}
    weights = torch.float32 if rng.random() < 0.3 else dtype
    for name in ("q_norm", "k_norm"):
        if d >= 8 and rng.random() < 0.5:
            kwargs[name] = randn(rng, (d,), weights, device)
    if rng.random() < 0.5:
        interleaved = rng.random() < 0.5
        kwargs.update(rope=_rope(N, d, device, rng.random() < 0.5, interleaved), rope_interleaved=interleaved)
    if rng.random() < 0.3:
        kwargs["scale"] = 0.5
    return (randn(rng, (B, N, 3, H, d), dtype, device),), kwargs


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    return tuple(t[b : b + 1] for t in args), kwargs


# ------------------------------------------------------------------------------------------------------------ bounds
# In float64: an upper bound, up to a small factor, of the absolute values that are added on the way to a result.


class _Bound:
    """Errors of attention on [B, H, tokens, d] in float32, in units of k = (4 + growth) U, what `tolerance` multiplies
    them with; qm and km are the magnitudes behind the elements of q and k.

    A score s_j is off by k e_j, e_j = |scale| sum_c qm_c km_jc. Its weight is 2^(s_j - m), m being the same number for
    the whole row (and with an online maximum, a product of powers whose exponents add up to that): besides the score,
    the difference and the power are rounded, x_j = e_j + |s_j - m| + 1 altogether. What all weights of a row share
    cancels when they are divided by their sum, so that a weight of the row, p_j, becomes at most

        p_j exp(k x_j) / sum_i p_i exp(-k x_i) <= p_j exp(k (x_j + sum_i p_i x_i))      (Jensen)

    and it is at most 1; below 2^-125 of the row's largest it may be 0. `moved` is how far that is from p_j (in units of
    k), `upper` the weight itself. Then

        out  = sum_j p_j v_j             is off by moved |v| and by the rounding of the products and sums, upper |v|
        dS_j = scale p_j (dP_j - delta)  by moved_j |dP_j - delta| + upper_j (what dP_j and delta are off by)

    where dP_j = g v_j is off by sum_c |g_c v_jc| and delta = sum_c g_c out_c by sum_c |g_c| times the error of out. The
    difference is that of the exact values: a weight's error enters once, not through the magnitudes on both sides.
    """

    def __init__(self, q: Any, k: Any, v: Any, qm: Any, km: Any, scale: float | None, growth: float) -> None:
        self.scale = page._default_scale(q) if scale is None else scale
        self.unit = (4 + growth) * U
        s = self.scale * q @ k.transpose(-1, -2)
        p = torch.softmax(s, -1)
        x = abs(self.scale) * qm @ km.transpose(-1, -2) + (s.amax(-1, keepdim=True) - s) + 1
        x = x + (p * x).sum(-1, keepdim=True)
        self.moved = (p * torch.expm1((self.unit * x).clamp(max=100))).clamp(max=1) / self.unit
        self.moved = self.moved + 2.0**-125 / self.unit
        self.upper = p + self.unit * self.moved
        self.v, self.plain = v, p @ v
        self.out = (self.moved + self.upper) @ v.abs()

    def gradients(self, dtype: torch.dtype, g: Any, qm: Any, km: Any) -> tuple[Any, Any, Any]:
        stored = 0.5 * torch.finfo(dtype).eps * self.plain.abs() / self.unit  # delta reads the stored result
        ga, v = g.abs(), self.v.transpose(-1, -2)
        difference = (g @ v - (g * self.plain).sum(-1, keepdim=True)).abs()
        parts = ga @ v.abs() + (ga * (self.out + stored)).sum(-1, keepdim=True)
        ds = abs(self.scale) * (self.moved * difference + self.upper * parts)
        return ds @ km, ds.transpose(-1, -2) @ qm, (self.moved + self.upper).transpose(-1, -2) @ ga


# Subnormal elements and products, which the dot product of bf16 pairs takes for zero, and the smallest step between
# weights in [0, 1].
_FLUSHED = {torch.bfloat16: 2.0**-126}
_WEIGHT_STEP = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


def _sixteen(dtype: torch.dtype, q: Any, k: Any, v: Any, scale: float, prepared: bool) -> Any:
    """How far operands of 16 bits may take the result of [B, H, tokens, d]; no more than is added to the float32 bound.

    Kernels may round to the type of q, k and v: the weights before the product with v, and what a norm or rotation
    makes of q and k (`prepared`). With u = eps / 2 the relative error of a rounding, the latter moves a score by up to

        e_j = |scale| ((1 + u)^2 - 1) sum_c |q_c k_jc|

    and a weight then is p_j w_j, exp(-e_j) (1 - u) <= w_j <= exp(e_j) (1 + u) =: 1 + r_j. The result is off by

        sum_j p_j (w_j - 1) (v_j - out) / sum_j p_j w_j <= sum_j p_j r_j (|v_j| + |out|) / sum_j p_j exp(-e_j) (1 - u)

    if the weights are divided by the sum of the rounded ones, and by less if by that of the unrounded (no |out| for the
    roundings of weights then). Both conventions are within it, also where a weight is subnormal (f16).
    """
    if dtype not in _WEIGHT_STEP:
        return 0.0
    u, flushed = 0.5 * torch.finfo(dtype).eps, _FLUSHED.get(dtype, 0.0)
    p = torch.softmax(scale * q @ k.transpose(-1, -2), -1)
    qa, ka, va = q.abs(), k.abs(), v.abs()
    e = flushed * (qa.sum(-1, keepdim=True) + ka.sum(-1).unsqueeze(-2) + 2 * q.shape[-1])
    if prepared:
        e = e + ((1 + u) ** 2 - 1) * (qa @ ka.transpose(-1, -2))
    e = abs(scale) * e
    moved = p * (torch.exp(e) * (1 + u) - 1) + _WEIGHT_STEP[dtype] * p.amax(-1, keepdim=True)
    out = moved @ va + moved.sum(-1, keepdim=True) * (p @ v).abs()
    return out / ((p * torch.exp(-e)).sum(-1, keepdim=True) * (1 - u)) + 2 * flushed * (v.shape[-2] + 1)


def _sixteen_gradients(
    dtype: torch.dtype, q: Any, k: Any, v: Any, g: Any, scale: float, prepared: bool
) -> tuple[Any, Any, Any]:
    """Likewise for the gradients of q, k (after norm and rotation) and v, g being that of the result; no more than is
    added to the float32 bounds.

    Kernels may round the weights before dV = P^T g, and dS = P (g v^T - delta) before dQ = scale dS k and dK = scale
    dS^T q. With e and u as in `_sixteen`, the weight p_j that comes of a rounded sum is off by a factor of at most

        exp(e_j) (1 + u) / (sum_k p_k exp(-e_k) (1 - u)) =: 1 + r_j

    and delta = sum_c g_c out_c by the error of out. One more rounding each takes P and dS to 16 bits (of f16, dS has
    steps of 2^-25 where it is subnormal; weights are kept scaled), and another k and q where they are prepared.
    """
    if dtype not in _WEIGHT_STEP:
        return 0.0, 0.0, 0.0
    u, flushed = 0.5 * torch.finfo(dtype).eps, _FLUSHED.get(dtype, 0.0)
    p = torch.softmax(scale * q @ k.transpose(-1, -2), -1)
    qa, ka, va, ga = q.abs(), k.abs(), v.abs(), g.abs()
    e = flushed * (qa.sum(-1, keepdim=True) + ka.sum(-1).unsqueeze(-2) + 2 * q.shape[-1])
    if prepared:
        e = e + ((1 + u) ** 2 - 1) * (qa @ ka.transpose(-1, -2))
    e = abs(scale) * e
    r = torch.exp(e) * (1 + u) / ((p * torch.exp(-e)).sum(-1, keepdim=True) * (1 - u)) - 1
    out = _sixteen(dtype, q, k, v, scale, prepared)
    size = ga @ va.transpose(-1, -2) + (ga * (p @ v).abs()).sum(-1, keepdim=True)  # of dP - delta
    roundings = (1 + r) * (1 + u) ** (2 if prepared else 1)
    ds = p * (roundings - 1) * size + p * roundings * (ga * out).sum(-1, keepdim=True) + _WEIGHT_STEP[dtype]
    dv = p * ((1 + r) * (1 + u) - 1) + flushed
    return abs(scale) * ds @ ka, abs(scale) * ds.transpose(-1, -2) @ qa, dv.transpose(-1, -2) @ ga


def _growth(q: Any, k: Any, v: Any, *, layout: str = "bhnd", **_: Any) -> float:
    return math.sqrt(max(q.shape[-1], page._heads(q, layout).shape[2], page._heads(k, layout).shape[2]))


def _bound(dtype: torch.dtype, q: Any, k: Any, v: Any, *, scale: Any = None, layout: str = "bhnd") -> Any:
    growth = _growth(q, k, v, layout=layout)
    q, k, v = (page._heads(t, layout) for t in (q, k, v))
    found = _Bound(q, k, v, q.abs(), k.abs(), scale, growth)
    return (page._heads(found.out + _sixteen(dtype, q, k, v, found.scale, False) / found.unit, layout),)


def _grad_bound(dtype: torch.dtype, grads: Any, q: Any, k: Any, v: Any, *, scale: Any = None,
                layout: str = "bhnd") -> dict[str, Any]:  # fmt: skip
    growth = _growth(q, k, v, layout=layout)
    q, k, v, g = (page._heads(t, layout) for t in (q, k, v, grads[0]))
    bound = _Bound(q, k, v, q.abs(), k.abs(), scale, growth)
    found = bound.gradients(dtype, g, q.abs(), k.abs())
    rounded = _sixteen_gradients(dtype, q, k, v, g, bound.scale, False)
    dq, dk, dv = (page._heads(t + r / bound.unit, layout) for t, r in zip(found, rounded, strict=True))
    if k.data_ptr() == v.data_ptr():  # the same tensor in two places has one gradient
        dk = dv = dk + dv
    return {"q": dq, "k": dk, "v": dv}


class _Prepared:
    """q or k of a packed call after norm and rotation, its magnitude, and the way back for magnitudes of gradients."""

    def __init__(self, x: Any, weight: Any, eps: float, tables: Any, interleaved: bool) -> None:
        self.weight, self.tables, self.interleaved = weight, tables, interleaved
        self.rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        self.hat = x * self.rstd
        y = x if weight is None else self.hat * weight
        # The sum of squares, the root and two products: a handful of roundings of the value itself.
        magnitude = y.abs() * (1 if weight is None else 4)
        if tables[0] is not None:
            cos, sin = (t.unsqueeze(1) for t in tables)
            y = y * cos + page._partner(y, interleaved) * sin
            magnitude = magnitude * cos.abs() + page._partner(magnitude, interleaved).abs() * sin.abs()
            magnitude = magnitude + magnitude  # and a product and a sum more
        self.value, self.magnitude = y, magnitude

    def back(self, g: Any) -> tuple[Any, Any]:
        """Gradient magnitudes of x and of the weight."""
        if self.tables[0] is not None:
            cos, sin = (t.unsqueeze(1).abs() for t in self.tables)
            g = 2 * (g * cos + page._partner(g * sin, self.interleaved).abs())
        if self.weight is None:
            return g, None
        per_token = g * self.hat.abs() * 4
        total = per_token.sum((0, 1, 2)) * (1 + math.sqrt(per_token[..., 0].numel()) / 8)
        g = g * self.weight.abs()
        return 4 * self.rstd * (g + self.hat.abs() * (g * self.hat.abs()).mean(-1, keepdim=True)), total


def _prepared(qkv: Any, q_norm: Any, k_norm: Any, eps: float, rope: Any, interleaved: bool) -> tuple[Any, Any, Any]:
    tables = page._tables(rope, qkv.shape[-1], interleaved, torch.float64)
    q, k, v = qkv.unbind(2)
    return _Prepared(q, q_norm, eps, tables, interleaved), _Prepared(k, k_norm, eps, tables, interleaved), v


def _growth_packed(qkv: Any, **_: Any) -> float:
    return math.sqrt(max(qkv.shape[-1], qkv.shape[1]))


def _packed_bound_of(q: Any, k: Any, v: Any, scale: Any, growth: float) -> tuple[_Bound, tuple[Any, ...]]:
    x, y, v, xm, ym = (t.transpose(1, 2) for t in (q.value, k.value, v, q.magnitude, k.magnitude))
    return _Bound(x, y, v, xm, ym, scale, growth), (xm, ym)


def _bound_packed(dtype: torch.dtype, qkv: Any, *, scale: Any = None, q_norm: Any = None, k_norm: Any = None,
                  eps: float = 1e-6, rope: Any = None, rope_interleaved: bool = False) -> Any:  # fmt: skip
    q, k, v = _prepared(qkv, q_norm, k_norm, eps, rope, rope_interleaved)
    bound, _ = _packed_bound_of(q, k, v, scale, _growth_packed(qkv))
    x, y, v = (t.transpose(1, 2) for t in (q.value, k.value, v))
    prepared = q_norm is not None or k_norm is not None or rope is not None
    rounded = _sixteen(dtype, x, y, v, bound.scale, prepared) / bound.unit
    return ((bound.out + rounded).transpose(1, 2),)


def _grad_bound_packed(dtype: torch.dtype, grads: Any, qkv: Any, *, scale: Any = None, q_norm: Any = None,
                       k_norm: Any = None, eps: float = 1e-6, rope: Any = None,
                       rope_interleaved: bool = False) -> dict[str, Any]:  # fmt: skip
    q, k, v = _prepared(qkv, q_norm, k_norm, eps, rope, rope_interleaved)
    bound, (qm, km) = _packed_bound_of(q, k, v, scale, _growth_packed(qkv))
    g = grads[0].transpose(1, 2)
    found = bound.gradients(dtype, g, qm, km)
    x, y, z = (t.transpose(1, 2) for t in (q.value, k.value, v))
    prepared = q_norm is not None or k_norm is not None or rope is not None
    rounded = _sixteen_gradients(dtype, x, y, z, g, bound.scale, prepared)
    dq, dk, dv = ((t + r / bound.unit).transpose(1, 2) for t, r in zip(found, rounded, strict=True))
    (dq, dq_norm), (dk, dk_norm) = q.back(dq), k.back(dk)
    return {"qkv": torch.stack([dq, dk, dv], 2), "q_norm": dq_norm, "k_norm": dk_norm}


# ------------------------------------------------------------------------------------------- benchmark shapes, peers


def _flops(q: Any, k: Any, v: Any, *, layout: str = "bhnd", **_: Any) -> int:
    B, H, N, d = page._heads(q, layout).shape
    return 4 * B * H * N * page._heads(k, layout).shape[2] * d


def _flops_packed(qkv: Any, **_: Any) -> int:
    B, N, _, H, d = qkv.shape
    return 4 * B * H * N * N * d


def _sdpa(q: Any, k: Any, v: Any, *, scale: float | None = None, layout: str = "bhnd") -> Callable[[], Any]:
    if layout == "bhnd":
        return lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _sdpa_packed(qkv: Any, *, scale: float | None = None, q_norm: Any = None, k_norm: Any = None, eps: float = 1e-6,
                 rope: Any = None, rope_interleaved: bool = False) -> Callable[[], Any]:  # fmt: skip
    """What a model does: views, torch's RMS norm and rotation in the type of the activations, SDPA."""
    cos, sin = page._tables(rope, qkv.shape[-1], rope_interleaved, qkv.dtype)

    def run() -> Any:
        rows = list(qkv.permute(2, 0, 3, 1, 4).unbind(0))
        for i, weight in enumerate((q_norm, k_norm)):
            x = rows[i]
            x = x if weight is None else F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
            rows[i] = x if cos is None or sin is None else x * cos + page._partner(x, rope_interleaved) * sin
        q, k, v = rows
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    return run


def _pinned(backend: str, make: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    """The same peer with one of SDPA's backends and no other."""

    def prepare(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if not args[0].is_cuda:
            raise ValueError("this backend of SDPA is raced on GPUs")
        if not hasattr(SDPBackend, backend):
            raise ImportError(f"this torch has no {backend}")
        chosen, call = getattr(SDPBackend, backend), make(*args, **kwargs)

        def run() -> Any:
            with sdpa_kernel(chosen):
                return call()

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch gives its reasons as warnings
                run()
        except RuntimeError as error:
            raise ValueError(f"{backend} does not serve this call ({str(error).splitlines()[0]})") from error
        return run

    return prepare


def _peers(make: Callable[..., Callable[[], Any]]) -> dict[str, Callable[..., Callable[[], Any]]]:
    pinned = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {"sdpa": make, **{f"sdpa-{name}": _pinned(backend, make) for name, backend in pinned.items()}}


_SIZES = {
    "[4,4,64,72]": (4, 4, 64, 72),
    "[8,16,256,72]": (8, 16, 256, 72),  # DiT-XL/2 at 256 x 256
    "[2,16,1024,72]": (2, 16, 1024, 72),  # DiT-XL/2 at 512 x 512
    "[1,8,4096,64]": (1, 8, 4096, 64),
}


def _sized(size: tuple[int, int, int, int]) -> Callable[..., reg.Call]:
    return lambda dtype, device: (tuple(dense(size, dtype, device, i) for i in range(3)), {})


def _sized_packed(size: tuple[int, int, int, int], prepared: bool = False) -> Callable[..., reg.Call]:
    B, H, N, d = size

    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        kwargs: dict[str, Any] = {}
        if prepared:
            kwargs = {"q_norm": dense((d,), dtype, device, 1), "k_norm": dense((d,), dtype, device, 2)}
            kwargs["rope"] = _rope(N, d, device, False, False)
        return (dense((B, N, 3, H, d), dtype, device),), kwargs

    return make


def _empty(B: int, H: int, N: int, M: int) -> Callable[..., reg.Call]:
    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        q, kv = dense((B, H, N, 8), dtype, device), dense((B, H, M, 8), dtype, device, 1)
        return (q, kv, kv.clone()), {}

    return make


def _empty_packed(B: int, N: int, H: int) -> Callable[..., reg.Call]:
    return lambda dtype, device: (
        (dense((B, N, 3, H, 8), dtype, device),),
        {"q_norm": dense((8,), dtype, device), "rope": _rope(N, 8, device, False, False)},
    )


def _bad_operand(index: int, name: str) -> list[Any]:
    return [
        (f"{name} of 3 dimensions", _replace(index, lambda t: t[0]), ValueError, (f" {name}:", "[B, H,")),
        (f"{name} is no tensor", _replace(index, lambda t: [1.0]), TypeError, (f" {name}:", "Tensor", "list")),
        (f"{name} is sparse", _replace(index, lambda t: t.to_sparse()), TypeError, (f" {name}:", "dense")),
        (f"{name} of an integer type", _replace(index, lambda t: t.long()), TypeError, (f" {name}:", "int64")),
    ]


_BAD_SCALE = [
    ("scale is NaN", _option(scale=float("nan")), ValueError, ("scale", "nan")),
    ("scale is text", _option(scale="1"), TypeError, ("scale", "str")),
    ("scale is a tensor", _option(scale=torch.ones(2)), TypeError, ("scale", "Tensor")),
]

reg.add(
    reg.OpSpec(
        name="attention",
        function=page.attention,
        reference=page.attention_reference,
        example=_example,
        lower=lambda q, k, v, *, scale=None, layout="bhnd": (
            torch.ops.fastdiff.attention.default,
            (q, k, v, page._default_scale(q) if scale is None else scale, layout == "bnhd"),
        ),
        bound=_bound,
        grad_bound=_grad_bound,
        differentiable=("q", "k", "v"),
        growth=_growth,
        bad=[
            *_bad_operand(0, "q"), *_bad_operand(1, "k"), *_bad_operand(2, "v"), *_BAD_SCALE,
            ("k of another head dim", _replace(1, lambda t: t[..., :-1]), ValueError, (" k:", "B, H, d")),
            ("k of other heads", _replace(1, lambda t: t[:, :1]), ValueError, (" k:", "B, H, d")),
            ("v shorter than k", _replace(2, lambda t: t[:, :, :-1]), ValueError, (" v:", "shape of k")),
            ("v of another head dim", _replace(2, lambda t: t[..., :-1]), ValueError, (" v:", "B, H, d")),
            ("k of another batch", _replace(1, lambda t: t[:1]), ValueError, (" k:", "B, H, d")),
            ("v of another type", _replace(2, lambda t: t.half()), TypeError, (" v:", "float16")),
            ("k on another device", _replace(1, lambda t: t.to("meta")), ValueError, (" k:", "meta")),
            ("unknown layout", _option(layout="nbhd"), ValueError, ("layout", "'nbhd'")),
        ],
        bytes=lambda q, k, v, **_: nbytes(q, k, v) + nbytes(q),
        flops=_flops,
        shapes={name: _sized(size) for name, size in _SIZES.items()},
        scaling={"tokens N, 8 heads of 64": (2.0, {n: _sized((1, 8, n, 64)) for n in (128, 256, 512, 1024, 2048)})},
        peers=_peers(_sdpa),
        take=_take,
        large="[8,16,256,72]",
        inplace=None,
        limits=page.limits,
        empty=[_empty(0, 2, 3, 3), _empty(2, 0, 3, 3), _empty(2, 2, 0, 3), _empty(2, 2, 3, 0), _empty(1, 1, 0, 0)],
    )
)  # fmt: skip

reg.add(
    reg.OpSpec(
        name="attention_qkvpacked",
        function=page.attention_qkvpacked,
        reference=page.attention_qkvpacked_reference,
        example=_example_packed,
        lower=lambda qkv, *, scale=None, q_norm=None, k_norm=None, eps=1e-6, rope=None, rope_interleaved=False: (
            torch.ops.fastdiff.attention_qkvpacked.default,
            (
                qkv, q_norm, k_norm, *page._tables(rope, qkv.shape[-1], rope_interleaved),
                page._default_scale(qkv) if scale is None else scale, eps, rope_interleaved,
            ),
        ),
        bound=_bound_packed,
        grad_bound=_grad_bound_packed,
        differentiable=("qkv", "q_norm", "k_norm"),
        growth=_growth_packed,
        bad=[
            ("qkv of 4 dimensions", _replace(0, lambda t: t[0]), ValueError, ("qkv", "[B, N, 3, H, d]")),
            ("qkv of two parts", _replace(0, lambda t: t[:, :, :2]), ValueError, ("qkv", "[B, N, 3, H, d]")),
            ("qkv is no tensor", _replace(0, lambda t: None), TypeError, ("qkv", "Tensor", "NoneType")),
            ("qkv is sparse", _replace(0, lambda t: t.to_sparse()), TypeError, ("qkv", "dense")),
            ("qkv of an integer type", _replace(0, lambda t: t.long()), TypeError, ("qkv", "int64")),
            ("q_norm of another width", _option(q_norm=torch.ones(5)), ValueError, ("q_norm", "[d]", "(5,)")),
            ("k_norm is a number", _option(k_norm=1.0), TypeError, ("k_norm", "Tensor", "float")),
            ("k_norm on another device", _option(k_norm=torch.ones(72, device="meta")), ValueError,
             ("k_norm", "meta")),
            ("negative eps", _option(eps=-1.0), ValueError, ("eps", "-1.0")),
            ("rope is one tensor", _option(rope=torch.ones(2, 64, 72)), TypeError, ("rope", "pair")),
            ("rope of another length", _option(rope=(torch.ones(63, 72), torch.ones(63, 72))), ValueError,
             ("rope[0]", "[N, d/2]")),
            ("rope tables that differ", _option(rope=(torch.ones(64, 72), torch.ones(64, 36))), ValueError,
             ("rope[1]", "rope[0]")),
            ("rope with an odd head dim",
             lambda a, k: ((a[0][..., :71],), {"rope": (torch.ones(64, 71), torch.ones(64, 71))}), ValueError,
             ("rope", "even")),
            *_BAD_SCALE,
        ],
        bytes=lambda qkv, **k: nbytes(qkv) * 4 // 3 + nbytes(k.get("q_norm"), k.get("k_norm")),
        flops=_flops_packed,
        shapes={
            **{name: _sized_packed(size) for name, size in _SIZES.items()},
            "[8,16,256,72] norm, rope": _sized_packed((8, 16, 256, 72), True),
        },
        scaling={
            "tokens N, 16 heads of 72": (2.0, {n: _sized_packed((1, 16, n, 72)) for n in (128, 256, 512, 1024, 2048)})
        },
        peers=_peers(_sdpa_packed),
        take=_take,
        large="[8,16,256,72] norm, rope",
        inplace=None,
        limits=page.packed_limits,
        empty=[_empty_packed(0, 3, 2), _empty_packed(2, 0, 2), _empty_packed(2, 3, 0)],
    )
)  # fmt: skip
