"""Attention: ``softmax(scale q k^T) v`` per head, forward and backward, without storing the N x M map.

Vaswani et al. 2017, "Attention Is All You Need", eq. 1; tiles with a running maximum and sum as in Dao et al. 2022,
"FlashAttention". Not causal, as diffusion transformers use it, and exact in the head dim: 72 (DiT-XL, PixArt, SiT) is
not padded to 96.

Shapes: q [B, H, N, d], k and v [B, H, M, d] (``layout="bhnd"``) or [B, N, H, d], [B, M, H, d] (``"bnhd"``), or all
three packed as qkv [B, N, 3, H, d]; any strides, any lengths, any head dim. One of float32, float16, bfloat16 for all
of them; arithmetic in float32; results have that dtype. With no keys (M = 0) the result is zero, as in PyTorch.

Numerics: float32 calls are float32 throughout. Where the processor multiplies 16-bit operands (``avx512_bf16`` for
bfloat16 without gradients), two more things are rounded to the type of q, k and v, as PyTorch's fused kernels do: the
weights ``exp(score - maximum)`` before the product with v, and q and k after their norm and rotation. The result is
then off by up to ``u sum_j p_j (|v_j| + |out|)``, u = 2^-8 for bfloat16 and 2^-11 for float16, p the weights, which is
a rounding of every v_j; and with norm or rotation by what ``2 u |scale| sum_c |q_c k_jc|`` more or less in the score
of key j makes of it (`_attention_spec._sixteen` derives both). The weights are divided by the sum of the rounded ones,
so they still sum to one. Elements and products below 2^-126 count as zero there. Calls that need a gradient keep
float32 weights.

Memory besides the results: ``4 (2 (r + c) d + ...)`` bytes for each thread, where r <= 768 queries and c <= 512 keys;
`attention_workspace` in csrc/fastdiff.h is the exact count. The backward pass keeps the maximum and the sum of
exponentials of every row, [B, H, N, 2], and takes ``4 (N + 4 c) d + ...`` bytes, c <= 256, for each thread that has a
head to work on (`attention_backward_workspace`).

CUDA: head dims up to 256 (wider ones run on the reference). 16-bit calls multiply on tensor cores and round to the
type of q, k and v what `_attention_spec._sixteen` and `_sixteen_gradients` bound: the weights, dS, and q and k after
their norm and rotation; the weights are divided by the sum of the rounded ones. float16 gradients are lost where dS,
the gradient of a score, is below 2^-25, and not finite where it is above 65504. The forward pass needs no workspace,
the backward pass 4 B H N bytes, and with norms 8 B H d (ceil(N / 16) + 1) more.

The functions that return or take the N x M map (`attention_probs`, `attention_with_probs`, `attention_inject`) are for
editing and are made of PyTorch's matmul and softmax, in float32: storing the map is what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _registry as reg

LAYOUTS = ("bhnd", "bnhd")
Rope = tuple[torch.Tensor, torch.Tensor]


# ------------------------------------------------------------------------------------------------- public functions


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, layout: str = "bhnd"
) -> torch.Tensor:
    """``softmax(scale q k^T) v`` for every head, differentiable in q, k and v.

    The native kernel takes weights below 2^-125 of the row's largest as zero, so that such a key adds nothing, however
    large its value, and NaN where its value is infinite.

    Args:
        q: [B, H, N, d], or [B, N, H, d] with ``layout="bnhd"``.
        k: [B, H, M, d], or [B, M, H, d]; dtype of q.
        v: shape and dtype of k.
        scale: multiplies the scores; ``d ** -0.5`` if None.
        layout: ``"bhnd"`` or ``"bnhd"``.

    Returns:
        shape and dtype of q, contiguous.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
    """
    op = "attention"
    way = reg.route(op, (q, k, v))
    scale = _check(op, q, k, v, scale, layout)
    way = reg.within_limits(op, way, limits(q))
    if way is reg.REFERENCE:
        return attention_reference(q, k, v, scale=scale, layout=layout)
    if way is reg.GRAD:
        return _Attention.apply(*reg.distinct(q, k, v), scale, layout == "bnhd")
    return reg.call(_attention_op, _attention, q, k, v, scale, layout == "bnhd")


def attention_qkvpacked(
    qkv: torch.Tensor,
    *,
    scale: float | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
    rope_interleaved: bool = False,
) -> torch.Tensor:
    """Self-attention that reads the output of the qkv projection in place, differentiable in qkv, q_norm and k_norm.

    Per head, q and k are first normalised, ``x rsqrt(mean(x^2) + eps) weight`` (Zhang & Sennrich 2019, eq. 4; as q/k
    norm Henry et al. 2020), then rotated (Su et al. 2021, "RoFormer", eq. 34), each step only where it is given:

        x[i] cos[n, i] + partner(x)[i] sin[n, i]

    where the pairs (x1, x2) with partner (-x2, x1) are (x[i], x[i + d/2]) ("rotate half": GPT-NeoX, Llama, DINOv3), or
    (x[2i], x[2i + 1]) with ``rope_interleaved=True`` (RoFormer, GPT-J, Flux).

    Args:
        qkv: [B, N, 3, H, d], e.g. ``linear(x).view(B, N, 3, H, d)``.
        scale: multiplies the scores; ``d ** -0.5`` if None.
        q_norm: [d], weight of the norm of q.
        k_norm: [d], likewise of k.
        eps: of the norms; at least 0.
        rope: (cos, sin), each [N, d/2], one entry per pair, or [N, d], one per element. d must be even. Not
            differentiated by the native kernel: where a table requires a gradient, the reference serves the call.
        rope_interleaved: which elements make a pair, see above.

    Returns:
        [B, N, H, d], dtype of qkv, contiguous.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor.
    """
    op = "attention_qkvpacked"
    way = reg.route(op, (qkv,), (q_norm, k_norm))
    scale, eps = _check_packed(op, qkv, scale, q_norm, k_norm, eps, rope)
    interleaved = bool(rope_interleaved)
    way = reg.within_limits(op, way, packed_limits(qkv, None, None, *(rope or ())))
    if way is reg.REFERENCE:
        return attention_qkvpacked_reference(
            qkv, scale=scale, q_norm=q_norm, k_norm=k_norm, eps=eps, rope=rope, rope_interleaved=interleaved
        )
    args = (qkv, q_norm, k_norm, *_tables(rope, qkv.shape[-1], interleaved), scale, eps, interleaved)
    if way is reg.GRAD:
        return _Packed.apply(*reg.distinct(*args))
    return reg.call(_packed_op, _packed, *args)


def attention_probs(
    q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, layout: str = "bhnd"
) -> torch.Tensor:
    """The attention map ``softmax(scale q k^T)``, differentiable in q and k. Made of PyTorch's matmul and softmax.

    Args:
        q: [B, H, N, d], or [B, N, H, d] with ``layout="bnhd"``.
        k: [B, H, M, d], or [B, M, H, d]; dtype of q.
        scale: multiplies the scores; ``d ** -0.5`` if None.
        layout: ``"bhnd"`` or ``"bnhd"``.

    Returns:
        [B, H, N, M] whatever the layout, dtype of q; rows sum to one.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
    """
    scale = _check("attention_probs", q, k, None, scale, layout)
    return _map(q, k, scale, layout).to(q.dtype)


def attention_with_probs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, layout: str = "bhnd"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` and its map, for editing methods that capture maps; differentiable in q, k and v.

    The product with v takes the map as it is before rounding to 16 bits, so the first result is that of `attention` up
    to rounding. Made of PyTorch's matmul and softmax.

    Args:
        q: as in `attention`.
        k: likewise.
        v: likewise.
        scale: likewise.
        layout: likewise.

    Returns:
        (out, probs): shape and dtype of q; [B, H, N, M], dtype of q.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
    """
    scale = _check("attention_with_probs", q, k, v, scale, layout)
    probs = _map(q, k, scale, layout)
    out = probs @ _heads(v, layout).to(probs.dtype)
    return _heads(out, layout).to(q.dtype).contiguous(), probs.to(q.dtype)


def attention_inject(probs: torch.Tensor, v: torch.Tensor, *, layout: str = "bhnd") -> torch.Tensor:
    """``probs v``: attention with a map that was captured elsewhere, or edited; differentiable in both.

    The map is used as given (its rows need not sum to one). The product is PyTorch's, in float32.

    Args:
        probs: [B, H, N, M], any floating-point dtype.
        v: [B, H, M, d], or [B, M, H, d] with ``layout="bnhd"``.
        layout: ``"bhnd"`` or ``"bnhd"``, of v and the result.

    Returns:
        [B, H, N, d] or [B, N, H, d], dtype of v, contiguous.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: an argument is not a floating-point tensor.
    """
    op = "attention_inject"
    _check_layout(op, layout)
    reg.check_tensor(op, "v", v)
    if v.dim() != 4:
        reg.fail(op, "v", f"shape {_named(layout, 'M')}", tuple(v.shape))
    reg.check_tensor(op, "probs", probs, v)
    B, H, M, _ = _heads(v, layout).shape
    if probs.dim() != 4 or (probs.shape[0], probs.shape[1], probs.shape[3]) != (B, H, M):
        reg.fail(op, "probs", f"shape [B, H, N, M] with B, H, M = {(B, H, M)}", tuple(probs.shape))
    wide = _wide(v)
    return _heads(probs.to(wide) @ _heads(v, layout).to(wide), layout).to(v.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------- limits


def limits(x: torch.Tensor, *_: Any) -> list[str]:
    """Why the kernels of x's device cannot serve a call on it (q or qkv), besides its type; empty if they can."""
    ext = _native.extension
    if ext is None or x.dim() < 4 or (x.device.type != "cuda" and _native.place(x)[0] < 0):
        return []
    d, most = x.shape[-1], ext.attention_head_dim
    return [f"a head dim of {d} is served by the reference only on CUDA (native: up to {most})"] if d > most else []


def packed_limits(qkv: torch.Tensor, q_norm: object, k_norm: object, *rope: Any) -> list[str]:
    """The same for `attention_qkvpacked`, whose tables come after the norms."""
    found = limits(qkv)
    if reg.learned(rope[:2]):
        found = [*found, "a rope table requires a gradient: the reference is its derivative"]
    return found


# ------------------------------------------------------------------------------------------------------- references


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, layout: str = "bhnd"
) -> torch.Tensor:
    """`attention` in plain PyTorch: any device, float64 included, differentiable to any order."""
    scale = _default_scale(q) if scale is None else scale
    out = _map(q, k, scale, layout) @ _heads(v, layout).to(_wide(q))
    return _heads(out, layout).to(q.dtype).contiguous()


def attention_qkvpacked_reference(
    qkv: torch.Tensor,
    *,
    scale: float | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
    rope_interleaved: bool = False,
) -> torch.Tensor:
    """`attention_qkvpacked` in plain PyTorch: any device, float64 included, differentiable to any order."""
    wide = _wide(qkv)
    cos, sin = _tables(rope, qkv.shape[-1], rope_interleaved, wide)
    rows: list[Any] = []
    for x, weight in zip(qkv.to(wide).unbind(2)[:2], (q_norm, k_norm), strict=True):
        if weight is not None and x.numel():
            x = F.rms_norm(x, (x.shape[-1],), weight.to(wide), eps)
        if cos is not None and sin is not None:
            x = x * cos.unsqueeze(1) + _partner(x, rope_interleaved) * sin.unsqueeze(1)
        rows.append(x)
    q, k = rows
    return attention_reference(q, k, qkv.to(wide).select(2, 2), scale=scale, layout="bnhd").to(qkv.dtype)


def _map(q: torch.Tensor, k: torch.Tensor, scale: float, layout: str) -> torch.Tensor:
    """softmax(scale q k^T), [B, H, N, M], in the type of the arithmetic."""
    wide = _wide(q)
    return torch.softmax((_heads(q, layout).to(wide) * scale) @ _heads(k, layout).to(wide).transpose(-1, -2), -1)


def _partner(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """(-x2, x1) for every pair (x1, x2)."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _tables(
    rope: Rope | None, d: int, interleaved: bool, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin as [N, d], contiguous."""
    if rope is None:
        return None, None
    found = []
    for t in rope:
        t = t.to(dtype)
        if t.shape[-1] != d:
            t = t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1)
        found.append(t.contiguous())
    return found[0], found[1]


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads(t: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, H, tokens, d] from either layout, and the way back."""
    return t if layout == "bhnd" else t.transpose(1, 2)


def _default_scale(q: torch.Tensor) -> float:
    return max(q.shape[-1], 1) ** -0.5


# ------------------------------------------------------------------------------------------------------- validation


def _check_layout(op: str, layout: object) -> None:
    if layout not in LAYOUTS:
        reg.fail(op, "layout", f"one of {LAYOUTS}", repr(layout))


def _named(layout: str, tokens: str) -> str:
    return f"[B, H, {tokens}, d]" if layout == "bhnd" else f"[B, {tokens}, H, d]"


def _check(op: str, q: Any, k: Any, v: Any, scale: Any, layout: Any) -> float:
    """The whole contract of unpacked operands (v may be None); the scale to use."""
    _check_layout(op, layout)
    reg.check_tensor(op, "q", q)
    if q.dim() != 4:
        reg.fail(op, "q", f"shape {_named(layout, 'N')}", tuple(q.shape))
    B, H, _, d = _heads(q, layout).shape
    for name, t in (("k", k),) if op == "attention_probs" else (("k", k), ("v", v)):
        reg.check_tensor(op, name, t, q)
        if t.dtype != q.dtype:
            reg.fail(op, name, f"the dtype of q, {q.dtype}", t.dtype, TypeError)
        if t.dim() != 4 or (t.shape[0], _heads(t, layout).shape[1], t.shape[3]) != (B, H, d):
            reg.fail(op, name, f"shape {_named(layout, 'M')} with B, H, d = {(B, H, d)}", tuple(t.shape))
        if t.shape != k.shape:
            reg.fail(op, name, f"the shape of k, {tuple(k.shape)}", tuple(t.shape))
    return _default_scale(q) if scale is None else reg.number(op, "scale", scale)


def _check_packed(op: str, qkv: Any, scale: Any, q_norm: Any, k_norm: Any, eps: Any, rope: Any) -> tuple[float, float]:
    reg.check_tensor(op, "qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        reg.fail(op, "qkv", "shape [B, N, 3, H, d]", tuple(qkv.shape))
    _check_prologue(op, qkv, qkv.shape[1], qkv.shape[4], q_norm, k_norm, rope)
    eps = reg.number(op, "eps", eps, low=0.0)
    return _default_scale(qkv) if scale is None else reg.number(op, "scale", scale), eps


def _check_prologue(op: str, like: torch.Tensor, N: int, d: int, q_norm: Any, k_norm: Any, rope: Any) -> None:
    """Norm weights and tables for N tokens of heads [d], on the device of `like`."""
    for name, w in (("q_norm", q_norm), ("k_norm", k_norm)):
        if w is not None:
            reg.check_tensor(op, name, w, like)
            if tuple(w.shape) != (d,):
                reg.fail(op, name, f"shape [d] = ({d},)", tuple(w.shape))
    if rope is not None:
        if not (isinstance(rope, (tuple, list)) and len(rope) == 2):
            reg.fail(op, "rope", "a pair (cos, sin)", type(rope).__name__, TypeError)
        if d % 2:
            reg.fail(op, "rope", "an even head dim d", d)
        for name, t in zip(("rope[0]", "rope[1]"), rope, strict=True):
            reg.check_tensor(op, name, t, like)
            if tuple(t.shape) not in ((N, d // 2), (N, d)):
                reg.fail(op, name, f"shape [N, d/2] = {(N, d // 2)} or [N, d] = {(N, d)}", tuple(t.shape))
        if rope[0].shape != rope[1].shape:
            reg.fail(op, "rope[1]", f"the shape of rope[0], {tuple(rope[0].shape)}", tuple(rope[1].shape))


def _check_operands(
    op: str, q: Any, k: Any, v: Any, bnhd: bool, scale: float, rest: Any = (), stats: Any = None
) -> None:
    """What would crash the kernel: the operators can be called without the public functions. `rest`: name and tensor of
    whatever has the shape of q."""
    if q.dim() != 4 or k.dim() != 4:
        reg.fail(op, "q, k", "4 dimensions", (tuple(q.shape), tuple(k.shape)))
    B, H, N, d = q.shape
    if bnhd:
        H, N = N, H
    shape = (B, k.shape[1], H, d) if bnhd else (B, H, k.shape[2], d)
    _check_shapes(op, [("k", k, shape), ("v", v, shape), *((name, t, q.shape) for name, t in rest)], scale)
    _check_stats(op, stats, (B, H, N, 2))


def _check_packed_operands(
    op: str, qkv: Any, q_norm: Any, k_norm: Any, cos: Any, sin: Any, scale: float, rest: Any = (), stats: Any = None
) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        reg.fail(op, "qkv", "shape [B, N, 3, H, d]", tuple(qkv.shape))
    B, N, _, H, d = qkv.shape
    if (cos is None) != (sin is None) or (cos is not None and d % 2):
        reg.fail(op, "cos, sin", "both or none, and an even head dim d", f"d = {d}, cos {cos is not None}")
    extra = [("q_norm", q_norm, (d,)), ("k_norm", k_norm, (d,)), ("cos", cos, (N, d)), ("sin", sin, (N, d))]
    _check_shapes(op, [*extra, *((name, t, (B, N, H, d)) for name, t in rest)], scale)
    _check_stats(op, stats, (B, H, N, 2))


def _check_shapes(op: str, expected: Any, scale: float) -> None:
    for name, t, shape in expected:
        if t is not None and t.shape != shape:
            reg.fail(op, name, f"shape {tuple(shape)}", tuple(t.shape))
    if not abs(scale) < float("inf"):  # a traced scale has not been looked at yet
        reg.fail(op, "scale", "a finite number", scale)


def _check_stats(op: str, stats: Any, shape: tuple[int, ...]) -> None:
    if stats is not None and (stats.shape != shape or stats.dtype != torch.float32):
        reg.fail(op, "stats", f"shape {shape}, float32", (tuple(stats.shape), stats.dtype))


# -------------------------------------------------------------------------------------------------- native functions
# On [B, H, tokens, d] views of whatever came.


def _launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, stats: torch.Tensor | None, scale: float,
    eps: float = 0.0, interleaved: bool = False, extra: Any = (None, None, None, None),
) -> None:  # fmt: skip
    """`extra`: q_norm, k_norm, cos, sin, all float32 and contiguous."""
    (B, H, N, d), M = q.shape, k.shape[2]
    if out.numel() == 0 or M == 0:
        out.zero_()
        if stats is not None:
            stats.zero_()
        return
    ext = _native.extension
    assert ext is not None
    device, stream = _native.place(q)
    slots, floats = (torch.get_num_threads(), ext.attention_workspace(N, M, d)) if device < 0 else (0, 0)
    workspace = torch.empty(slots, floats, dtype=torch.float32, device=q.device)
    ext.attention_forward(
        device, stream, (
            B, H, N, M, d, scale, eps, interleaved, *map(reg.operand, (q, k, v, out)), *map(_address, extra),
            _address(stats), workspace.data_ptr(), slots, floats,
        ),
    )  # fmt: skip


def _launch_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, stats: torch.Tensor,
    results: Sequence[torch.Tensor], scale: float, eps: float = 0.0, interleaved: bool = False,
    extra: Any = (None, None, None, None), d_norm: Any = (None, None),
) -> None:  # fmt: skip
    (B, H, N, d), M = q.shape, k.shape[2]
    if out.numel() == 0 or M == 0:
        for t in (*results, *d_norm):
            if t is not None:
                t.zero_()
        return
    ext = _native.extension
    assert ext is not None
    device, stream = _native.place(q)
    if device < 0:
        slots, floats, parts = min(torch.get_num_threads(), B * H), ext.attention_backward_workspace(N, M, d), 1
    else:
        slots, floats, parts = 1, B * H * N, ext.attention_parts(N) + 1
    workspace = torch.empty(slots, floats, dtype=torch.float32, device=q.device)
    normed = extra[0] is not None or extra[1] is not None
    partial = torch.empty(2, B * H * parts, d, dtype=torch.float32, device=q.device) if normed else None
    stats = stats.contiguous()
    ext.attention_backward(
        device, stream, (
            B, H, N, M, d, scale, eps, interleaved, *map(reg.operand, (q, k, v, out)), *map(_address, extra),
            _address(stats), workspace.data_ptr(), slots, floats, *map(reg.operand, (grad, *results)),
            *map(_address, d_norm), _address(partial),
        ),
    )  # fmt: skip


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _new(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _turned(bnhd: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors) if bnhd else tensors


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bnhd: bool) -> torch.Tensor:
    _check_operands("attention", q, k, v, bnhd, scale)
    out = _new(q)
    q, k, v, turned = _turned(bnhd, q, k, v, out)
    _launch(q, k, v, turned, None, scale)
    return out


def _attention_stats(q, k, v, scale, bnhd):  # type: ignore[no-untyped-def]
    _check_operands("attention", q, k, v, bnhd, scale)
    out, stats = _attention_stats_fake(q, k, v, scale, bnhd)
    q, k, v, turned = _turned(bnhd, q, k, v, out)
    _launch(q, k, v, turned, stats, scale)
    return out, stats


def _attention_stats_fake(q, k, v, scale, bnhd):  # type: ignore[no-untyped-def]
    B, H, N = (q.shape[0], q.shape[2], q.shape[1]) if bnhd else q.shape[:3]
    return _new(q), q.new_empty((B, H, N, 2), dtype=torch.float32)


def _attention_backward(grad, q, k, v, out, stats, scale, bnhd):  # type: ignore[no-untyped-def]
    _check_operands("attention_backward", q, k, v, bnhd, scale, (("grad", grad), ("out", out)), stats)
    dq, dk, dv = _new(q), _new(k), _new(v)
    grad, q, k, v, out, *turned = _turned(bnhd, grad, q, k, v, out, dq, dk, dv)
    _launch_backward(grad, q, k, v, out, stats, turned, scale)
    return dq, dk, dv


def _packed(qkv, q_norm, k_norm, cos, sin, scale, eps, interleaved):  # type: ignore[no-untyped-def]
    return _packed_run(qkv, q_norm, k_norm, cos, sin, scale, eps, interleaved, False)[0]


def _packed_stats(qkv, q_norm, k_norm, cos, sin, scale, eps, interleaved):  # type: ignore[no-untyped-def]
    return _packed_run(qkv, q_norm, k_norm, cos, sin, scale, eps, interleaved, True)


def _packed_run(qkv, q_norm, k_norm, cos, sin, scale, eps, interleaved, with_stats):  # type: ignore[no-untyped-def]
    _check_packed_operands("attention_qkvpacked", qkv, q_norm, k_norm, cos, sin, scale)
    out, stats = _packed_fake(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    extra = _plain(q_norm, k_norm, cos, sin)
    _launch(q, k, v, out.transpose(1, 2), stats if with_stats else None, scale, eps, interleaved, extra)
    return out, stats


def _plain(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.float().contiguous() for t in tensors)


def _packed_fake(qkv, *_):  # type: ignore[no-untyped-def]
    B, N, _, H, d = qkv.shape
    return qkv.new_empty((B, N, H, d)), qkv.new_empty((B, H, N, 2), dtype=torch.float32)


def _packed_backward(grad, qkv, out, stats, q_norm, k_norm, cos, sin, scale, eps, interleaved):  # type: ignore[no-untyped-def]
    """Gradients of qkv and of whichever of q_norm and k_norm are there."""
    op, rest = "attention_qkvpacked_backward", (("grad", grad), ("out", out))
    _check_packed_operands(op, qkv, q_norm, k_norm, cos, sin, scale, rest, stats)
    dqkv, *d_norms = _packed_backward_fake(grad, qkv, out, stats, q_norm, k_norm)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    dq, dk, dv = dqkv.permute(2, 0, 3, 1, 4).unbind(0)
    wide = iter([torch.empty(d.shape, dtype=torch.float32, device=d.device) for d in d_norms])
    each = [None if w is None else next(wide) for w in (q_norm, k_norm)]
    extra = _plain(q_norm, k_norm, cos, sin)
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    _launch_backward(grad, q, k, v, out, stats, (dq, dk, dv), scale, eps, interleaved, extra, each)
    return [dqkv, *(d.copy_(w) for d, w in zip(d_norms, [w for w in each if w is not None], strict=True))]


def _packed_backward_fake(grad, qkv, out, stats, q_norm, k_norm, *_):  # type: ignore[no-untyped-def]
    return [_new(qkv), *(_new(w) for w in (q_norm, k_norm) if w is not None)]


# ---------------------------------------------------------------------------------------------------------- gradient


def _by_reference(grad: torch.Tensor) -> bool:
    """create_graph=True, or a backward pass that is itself vectorised."""
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised([grad])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, bnhd):  # type: ignore[no-untyped-def,override]
        out, stats = reg.call(_attention_stats_op, _attention_stats, q, k, v, scale, bnhd)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.scale, ctx.bnhd = scale, bnhd
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        q, k, v, out, stats = ctx.saved_tensors
        if not _by_reference(grad):
            args = (grad, q, k, v, out, stats, ctx.scale, ctx.bnhd)
            found = reg.call(_attention_backward_op, _attention_backward, *args)
            return (*found, None, None)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            result = attention_reference(q, k, v, scale=ctx.scale, layout=LAYOUTS[ctx.bnhd])
        return (*_differentiate(result, (q, k, v), ctx.needs_input_grad, grad, create_graph), None, None)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_norm, k_norm, cos, sin, scale, eps, interleaved):  # type: ignore[no-untyped-def,override]
        out, stats = reg.call(_packed_stats_op, _packed_stats, qkv, q_norm, k_norm, cos, sin, scale, eps, interleaved)
        ctx.save_for_backward(qkv, q_norm, k_norm, cos, sin, out, stats)
        ctx.options = (scale, eps, interleaved)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        qkv, q_norm, k_norm, cos, sin, out, stats = ctx.saved_tensors
        scale, eps, interleaved = ctx.options
        if not _by_reference(grad):
            args = (grad, qkv, out, stats, q_norm, k_norm, cos, sin, scale, eps, interleaved)
            found = iter(reg.call(_packed_backward_op, _packed_backward, *args))
            grads = [None if t is None else next(found) for t in (qkv, q_norm, k_norm)]
        else:
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                result = attention_qkvpacked_reference(
                    qkv, scale=scale, q_norm=q_norm, k_norm=k_norm, eps=eps,
                    rope=None if cos is None else (cos, sin), rope_interleaved=interleaved,
                )  # fmt: skip
            grads = _differentiate(result, (qkv, q_norm, k_norm), ctx.needs_input_grad, grad, create_graph)
        return (*grads, None, None, None, None, None)


def _differentiate(result: torch.Tensor, at: Any, need: Any, grad: torch.Tensor, create_graph: bool) -> list[Any]:
    """The gradients of a reference, None where `need` says so; differentiable themselves with create_graph."""
    wanted = [t for t, n in zip(at, need, strict=False) if n]
    found = iter(torch.autograd.grad(result, wanted, grad, create_graph=create_graph, materialize_grads=True))
    return [next(found) if n else None for _, n in zip(at, need, strict=False)]


# ------------------------------------------------------------------------------------------------------ registration

_ARGUMENTS = "Tensor q, Tensor k, Tensor v"
_PACKED = "Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin, float scale, float eps, bool interleaved"


def _packed_operands(qkv, *_):  # type: ignore[no-untyped-def]
    return (qkv,)


_attention_op = reg.define(
    "attention", f"{_ARGUMENTS}, float scale, bool bnhd", "Tensor", _attention, lambda q, *_: _new(q)
)
_attention_stats_op = reg.define(
    "attention_stats", f"{_ARGUMENTS}, float scale, bool bnhd", "(Tensor, Tensor)", _attention_stats,
    _attention_stats_fake,
)  # fmt: skip
_attention_backward_op = reg.define(
    "attention_backward", f"Tensor grad, {_ARGUMENTS}, Tensor out, Tensor stats, float scale, bool bnhd",
    "(Tensor, Tensor, Tensor)", _attention_backward, lambda grad, q, k, v, *_: (_new(q), _new(k), _new(v)),
)  # fmt: skip
_packed_op = reg.define(
    "attention_qkvpacked", f"Tensor qkv, {_PACKED}", "Tensor", _packed, lambda qkv, *_: _packed_fake(qkv)[0],
    _packed_operands,
)  # fmt: skip
_packed_stats_op = reg.define(
    "attention_qkvpacked_stats", f"Tensor qkv, {_PACKED}", "(Tensor, Tensor)", _packed_stats, _packed_fake,
    _packed_operands,
)  # fmt: skip
_packed_backward_op = reg.define(
    "attention_qkvpacked_backward", f"Tensor grad, Tensor qkv, Tensor out, Tensor stats, {_PACKED}", "Tensor[]",
    _packed_backward, _packed_backward_fake, lambda grad, qkv, out, stats, *_: (grad, qkv, out),
)  # fmt: skip
