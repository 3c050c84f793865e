"""Attention beyond the laws of tests/test_ops.py: extremes, long rows, packed operands, and the maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastdiff
from fastdiff import _native, ops
from fastdiff.ops.attention import LAYOUTS, attention_reference

pytestmark = pytest.mark.skipif(_native.extension is None, reason="no native extension: only the reference exists")
every_isa = pytest.mark.parametrize("isa", _native.isas())
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(isa: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with fastdiff.use_backend("native"), _native.use_isa(isa):
        return function(*args, **kwargs)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return attention_reference(q.double(), k.double(), v.double(), **kwargs)


@every_isa
def test_logits_of_ten_thousand_neither_overflow_nor_lose_the_winner(isa: str) -> None:
    q, k, v = (randn(1, 2, 40, 72, seed=i) for i in range(3))
    q = q * (1e4 / (q @ k.transpose(-1, -2)).abs().amax())
    for scale in (1.0, -1.0):
        got, want = run(isa, ops.attention, q, k, v, scale=scale), exact(q, k, v, scale=scale)
        # A logit of 1e4 has an ulp of 1e-3 and sqrt(72) roundings: weights are right to about a percent.
        torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=2e-2)
    equal = torch.full((1, 1, 3, 8), 100.0)  # scores of 8e4, all equal: the mean of v
    v = randn(1, 1, 9, 8)
    got = run(isa, ops.attention, equal, equal[:, :, :1].expand(1, 1, 9, 8), v, scale=1.0)
    torch.testing.assert_close(got, v.mean(2, keepdim=True).expand(1, 1, 3, 8))


@every_isa
def test_rows_in_increasing_and_decreasing_order_of_their_scores(isa: str) -> None:
    """Every step of the running maximum rescales what came before, or nothing does."""
    v = randn(1, 1, 1300, 24)
    k = torch.linspace(0, 60, 1300)[None, None, :, None].expand(1, 1, 1300, 24) / 24
    q = torch.stack([torch.ones(24), -torch.ones(24)])[None, None]
    torch.testing.assert_close(
        run(isa, ops.attention, q, k, v, scale=1.0).double(), exact(q, k, v, scale=1.0), atol=2e-5, rtol=2e-5
    )


@every_isa
def test_keys_at_minus_infinity_do_not_count(isa: str) -> None:
    q, k, v = torch.ones(1, 1, 5, 8), randn(1, 1, 200, 8, seed=1), randn(1, 1, 200, 8, seed=2)
    k[:, :, :130, 3] = float("-inf")  # two whole key tiles and a part of the third
    got = run(isa, ops.attention, q, k, v)
    torch.testing.assert_close(got, run(isa, ops.attention, q, k[:, :, 130:], v[:, :, 130:]))
    k[:, :, :, 3] = float("-inf")  # no key left: 0 / 0, as in the reference
    assert torch.isnan(run(isa, ops.attention, q, k, v)).all()
    assert torch.isnan(attention_reference(q, k, v)).all()


@every_isa
def test_weights_that_vanish_are_zero(isa: str) -> None:
    """2^-126 is not nothing beside a value of 1e38, but exp(-1000) is."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -1000.0]).view(1, 1, 2, 1)
    v = torch.tensor([1.0, 1e38]).view(1, 1, 2, 1)
    assert run(isa, ops.attention, q, k, v, scale=1.0).item() == 1.0
    k[0, 0, 1, 0] = -125.5 * 0.6931471805599453  # and what lies below 2^-125, as the docstring says
    assert run(isa, ops.attention, q, k, v, scale=1.0).item() == 1.0
    k[0, 0, 1, 0] = -124.5 * 0.6931471805599453
    assert run(isa, ops.attention, q, k, v, scale=1.0).item() > 1.0


@every_isa
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15])
def test_large_logits_have_the_gradients_of_their_weights(size: float, isa: str) -> None:
    """What the backward pass takes for the weights is what the forward pass used, to the last bit of the scores."""
    q, k, v = randn(1, 1, 4, 64) * size, randn(1, 1, 1, 64, seed=1), randn(1, 1, 1, 64, seed=2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    dq, dk, dv = run(isa, lambda: torch.autograd.grad(ops.attention(*leaves).sum(), leaves))
    assert (dv == 4).all()  # a single key: every weight is 1
    rounding = 64 * 2**-24 * 64 * v.abs().max() / 8  # of dP - delta, times scale
    assert dq.abs().max() <= rounding * k.abs().max()
    assert dk.abs().max() <= rounding * 4 * q.abs().max()
    # Several keys: the weights are one of them or a tie of equal ones, whatever the scores, and sum to one.
    k, v = (randn(1, 1, 130, 64, seed=i) for i in (3, 4))
    k = torch.cat([k, k], 2)
    v = torch.cat([v, -v], 2).requires_grad_()
    (dv,) = run(isa, lambda: torch.autograd.grad(ops.attention(q, k, v).sum(), [v]))
    torch.testing.assert_close(dv.double().sum(2), torch.full((1, 1, 64), 4.0).double(), atol=2e-6, rtol=0)
    assert torch.equal(dv[:, :, :130], dv[:, :, 130:])


@every_isa
def test_a_backward_pass_on_another_instruction_set_takes_no_weight_above_one(isa: str) -> None:
    """Its scores may be rounded otherwise, and so exceed the maximum that the forward pass saved."""
    q, k, v = randn(1, 1, 48, 64) * 1e8, randn(1, 1, 1, 64, seed=1), randn(1, 1, 1, 64, seed=2).requires_grad_()
    for forward in _native.isas():
        (dv,) = run(isa, torch.autograd.grad, run(forward, ops.attention, q, k, v).sum(), [v])
        assert (dv <= 48).all()


@every_isa
@pytest.mark.parametrize("M", [4096, 65536])
def test_a_mean_of_many_equal_values_is_that_value(M: int, isa: str) -> None:
    """Blocks of 64 keys, then the sum of blocks: 64 + M / 64 roundings and not M of them, all to the same side."""
    q, v = randn(1, 1, 48, 64), torch.full((1, 1, M, 64), 1.1)
    got = run(isa, ops.attention, q, torch.zeros(1, 1, M, 64), v)
    torch.testing.assert_close(got.double() / v[0, 0, 0, 0].double(), torch.ones_like(got).double(),
                               atol=(64 + M / 64) * 2**-24, rtol=0)  # fmt: skip


@every_isa
@every_dtype
@pytest.mark.parametrize("N", [1, 17, 64, 65])
def test_a_single_key_returns_its_value_and_has_no_gradient_elsewhere(N: int, dtype: torch.dtype, isa: str) -> None:
    q, k, v = randn(2, 3, N, 40, dtype=dtype), randn(2, 3, 1, 40, seed=1, dtype=dtype), randn(2, 3, 1, 40, seed=2)
    v = v.to(dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = run(isa, ops.attention, *leaves)
    assert torch.equal(out, v.expand(2, 3, N, 40))
    up = randn(2, 3, N, 40, seed=3, dtype=dtype)
    dq, dk, dv = run(isa, torch.autograd.grad, out, leaves, up)
    assert dq.abs().max() < 1e-4
    assert dk.abs().max() < 1e-3
    torch.testing.assert_close(dv, up.double().sum(2, keepdim=True).to(dtype), atol=1e-4, rtol=2e-2)


@every_isa
@pytest.mark.parametrize("d", [1, 7, 8, 72, 96, 128, 131, 256])
def test_head_dims_and_lengths_around_every_tile_edge(d: int, isa: str) -> None:
    for N, M in ((15, 64), (16, 65), (47, 1), (49, 513), (64, 7), (97, 256)):
        q, k, v = randn(1, 1, N, d), randn(1, 1, M, d, seed=1), randn(1, 1, M, d, seed=2)
        leaves, wide = ([t.to(kind).requires_grad_() for t in (q, k, v)] for kind in (torch.float32, torch.float64))
        got, want = run(isa, ops.attention, *leaves), attention_reference(*wide)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        up = randn(1, 1, N, d, seed=3)
        found = run(isa, torch.autograd.grad, got, leaves, up)
        for g, w in zip(found, torch.autograd.grad(want, wide, up.double()), strict=True):
            torch.testing.assert_close(g.double(), w, atol=3e-5, rtol=3e-4)


def test_a_very_long_row_is_as_exact_as_a_short_one() -> None:
    q, k, v = randn(1, 1, 3, 16), randn(1, 1, 200_003, 16, seed=1), randn(1, 1, 200_003, 16, seed=2)
    leaves, wide = ([t.to(kind).requires_grad_() for t in (q, k, v)] for kind in (torch.float32, torch.float64))
    with fastdiff.use_backend("native"):
        got = ops.attention(*leaves)
        found = torch.autograd.grad(got.sum(), leaves)
    want = attention_reference(*wide)
    torch.testing.assert_close(got.double(), want, atol=2e-7, rtol=1e-4)
    for g, w in zip(found, torch.autograd.grad(want.sum(), wide), strict=True):
        torch.testing.assert_close(g.double() / w.abs().max(), w / w.abs().max(), atol=1e-4, rtol=1e-3)


def test_a_long_call_takes_no_memory_for_the_map() -> None:
    N, d = 100_000, 8
    floats = _native.extension.attention_workspace(N, N, d)  # type: ignore[union-attr]
    assert floats < 100_000  # the map would be 10^10
    backward = _native.extension.attention_backward_workspace(N, N, d)  # type: ignore[union-attr]
    assert backward < 20 * N  # dq of one head


@every_isa
@every_dtype
def test_a_query_does_not_depend_on_its_neighbours_or_its_place(isa: str, dtype: torch.dtype) -> None:
    q, k, v = randn(1, 2, 300, 72, dtype=dtype), *(randn(1, 2, 700, 72, seed=i, dtype=dtype) for i in (1, 2))
    whole = run(isa, ops.attention, q, k, v)
    for first, n in ((0, 1), (13, 40), (63, 237), (299, 1)):
        assert torch.equal(whole[:, :, first : first + n], run(isa, ops.attention, q[:, :, first : first + n], k, v))


@every_isa
@every_dtype
def test_packed_is_bitwise_the_unpacked_call(isa: str, dtype: torch.dtype) -> None:
    qkv = randn(2, 70, 3, 4, 72, dtype=dtype).requires_grad_()
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(2))
    a, b = run(isa, ops.attention_qkvpacked, qkv), run(isa, ops.attention, q, k, v, layout="bnhd")
    assert torch.equal(a, b)
    up = randn(2, 70, 4, 72, seed=5, dtype=dtype)
    (packed,) = run(isa, torch.autograd.grad, a, [qkv], up)
    assert torch.equal(packed, torch.stack(run(isa, torch.autograd.grad, b, [q, k, v], up), 2))
    heads = run(isa, ops.attention, *(t.transpose(1, 2) for t in (q, k, v)))
    assert torch.equal(heads.transpose(1, 2), b)


def test_rotations_follow_the_two_conventions() -> None:
    """Against the complex form of RoFormer: a pair (x1, x2) is x1 + i x2, times e^(i angle)."""
    N, d = 12, 16
    x, angle = randn(1, N, 3, 2, d), randn(N, d // 2, seed=1)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def rotated(t: torch.Tensor, interleaved: bool) -> torch.Tensor:
        pairs = (t[..., 0::2], t[..., 1::2]) if interleaved else (t[..., : d // 2], t[..., d // 2 :])
        z = torch.complex(*pairs) * turn
        return torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)

    q, k, v = x.unbind(2)
    for interleaved in (False, True):
        want = ops.attention(rotated(q, interleaved), rotated(k, interleaved), v, layout="bnhd")
        tables = (angle.cos(), angle.sin())
        full = tuple(t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in tables)
        for rope in (tables, full):
            got = ops.attention_qkvpacked(x, rope=rope, rope_interleaved=interleaved)
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_norms_are_torchs() -> None:
    x, wq, wk = randn(2, 20, 3, 2, 72) * 5, randn(72, seed=1), randn(72, seed=2)
    q, k, v = x.unbind(2)
    want = ops.attention(F.rms_norm(q, (72,), wq, 1e-5), F.rms_norm(k, (72,), wk, 1e-5), v, layout="bnhd")
    got = ops.attention_qkvpacked(x, q_norm=wq, k_norm=wk, eps=1e-5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_rope_table_that_is_learned_is_the_references() -> None:
    x, angle = randn(1, 5, 3, 2, 8), randn(5, 4).requires_grad_()
    rope = (angle.cos(), angle.sin())
    ops.attention_qkvpacked(x, rope=rope).square().sum().backward()
    assert angle.grad is not None
    assert angle.grad.abs().sum() > 0
    with fastdiff.use_backend("native"), pytest.raises(RuntimeError, match="rope table"):
        ops.attention_qkvpacked(x, rope=rope)


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_are_the_attention_they_belong_to(layout: str, dtype: torch.dtype) -> None:
    shapes = [(2, 3, n, 24) if layout == "bhnd" else (2, n, 3, 24) for n in (20, 31, 31)]
    q, k, v = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))
    want = exact(q, k, v, layout=layout)
    out, probs = ops.attention_with_probs(q, k, v, layout=layout)
    tol = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
    assert (out.shape, out.dtype, probs.shape, probs.dtype) == (q.shape, dtype, (2, 3, 20, 31), dtype)
    torch.testing.assert_close(out.double(), want, **tol)
    assert torch.equal(probs, ops.attention_probs(q, k, layout=layout))
    torch.testing.assert_close(probs.double().sum(-1), torch.ones(2, 3, 20).double(), atol=31 * tol["atol"], rtol=0)
    torch.testing.assert_close(ops.attention_inject(probs, v, layout=layout).double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(ops.attention(q, k, v, layout=layout).double(), want, **tol)


def test_maps_have_gradients() -> None:
    q, k, v = (randn(1, 2, n, 6, seed=i).double().requires_grad_() for i, n in enumerate((4, 5, 5)))
    assert torch.autograd.gradcheck(lambda *a: ops.attention_with_probs(*a), (q, k, v))
    assert torch.autograd.gradcheck(lambda a, b: ops.attention_probs(a, b, scale=0.7), (q, k))
    probs = torch.softmax(randn(1, 2, 4, 5).double(), -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, x: ops.attention_inject(p, x), (probs, v))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, p: ops.attention_probs(q, q[..., :-1]), ("attention_probs: k: expected", "got (2, 3, 4, 7)")),
        (
            lambda q, p: ops.attention_with_probs(q, q, q[:, :, 1:]),
            ("attention_with_probs: v: expected the shape of",),
        ),
        (lambda q, p: ops.attention_inject(p[..., 1:], q), ("attention_inject: probs: expected", "(2, 3, 4)")),
        (lambda q, p: ops.attention_inject(p, q[0]), ("attention_inject: v: expected",)),
        (lambda q, p: ops.attention_inject(p, q, layout="x"), ("attention_inject: layout: expected", "'x'")),
    ],
)
def test_bad_maps_are_named(call: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .*got ") as caught:
        call(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 4))
    for word in words:
        assert word in str(caught.value)


def test_no_keys_and_no_queries_are_what_torch_makes_of_them() -> None:
    for N, M in ((3, 0), (0, 3), (0, 0)):
        q, k = randn(2, 2, N, 8), randn(2, 2, M, 8)
        assert torch.equal(ops.attention(q, k, k), F.scaled_dot_product_attention(q, k, k))


def test_compiled_calls_may_take_one_tensor_twice() -> None:
    x, qkv, w = randn(1, 2, 9, 8), randn(1, 5, 3, 2, 8), torch.ones(8)
    table = randn(5, 8, seed=1)
    for function, leaves in (
        (lambda q: ops.attention(q, q, q), (x,)),
        (lambda q, k: ops.attention(q, k, k), (x, x + 1)),
        (lambda t, w: ops.attention_qkvpacked(t, q_norm=w, k_norm=w, rope=(table, table)), (qkv, w)),
        (lambda a, s: ops.adaln_modulate(a, s, s), (x[0], x[0, :, 0])),
        (lambda a, s: ops.adaln_modulate(a, s, s, weight=w, bias=w), (x[0], x[0, :, 0])),
        (lambda a, s: ops.gate_residual(a, a, s), (x[0], x[0, :, 0])),
    ):
        wide = [t.clone().requires_grad_() for t in leaves]
        found = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            out = call(*wide)
            found.append((out, *torch.autograd.grad(out.square().sum(), wide)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_a_scale_that_only_the_kernel_sees_is_looked_at() -> None:
    q = randn(1, 2, 9, 8)
    call = torch.compile(lambda q, s: ops.attention(q, q, q, scale=s), fullgraph=True, backend="aot_eager")
    call(q, 0.5)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        call(q, float("nan"))


_Q, _X = (2, 2, 5, 8), (2, 5, 3, 2, 8)


@pytest.mark.parametrize(
    ("operator", "shapes", "rest", "words"),
    [
        ("attention", [(200, 2, 5, 8), _Q, _Q], (1.0, False), "k: expected shape"),
        ("attention", [_Q, _Q, (2, 2, 4, 8)], (1.0, False), "v: expected shape"),
        ("attention", [_Q, (2, 2, 5, 7), _Q], (1.0, False), "k: expected shape"),
        ("attention", [_Q, (2, 2, 5, 8, 1), _Q], (1.0, False), "q, k: expected 4 dim"),
        ("attention", [_Q, (2, 3, 4, 8), (2, 3, 4, 8)], (1.0, True), "k: expected shape"),
        ("attention", [_Q, _Q, _Q], (float("nan"), False), "scale: expected"),
        ("attention_stats", [_Q, (2, 1, 5, 8), _Q], (1.0, False), "k: expected shape"),
        ("attention_backward", [(2, 2, 5, 9), _Q, _Q, _Q, _Q, (2, 2, 5, 2)], (1.0, False), "grad: expected shape"),
        ("attention_backward", [_Q, _Q, _Q, _Q, (1, 2, 5, 8), (2, 2, 5, 2)], (1.0, False), "out: expected shape"),
        ("attention_backward", [_Q, _Q, _Q, _Q, _Q, (2, 2, 5)], (1.0, False), "stats: expected shape"),
        ("attention_qkvpacked", [(2, 5, 2, 2, 8), None, None, None, None], (1.0, 0.0, False), "qkv: expected"),
        ("attention_qkvpacked", [_X, (7,), None, None, None], (1.0, 0.0, False), "q_norm: expected shape"),
        ("attention_qkvpacked", [_X, None, (9,), None, None], (1.0, 0.0, False), "k_norm: expected shape"),
        ("attention_qkvpacked", [_X, None, None, (5, 8), None], (1.0, 0.0, False), "cos, sin: expected both"),
        ("attention_qkvpacked", [_X, None, None, (5, 8), (4, 8)], (1.0, 0.0, False), "sin: expected shape"),
        ("attention_qkvpacked_stats", [_X, None, None, (5, 4), (5, 4)], (1.0, 0.0, True), "cos: expected shape"),
        ("attention_qkvpacked_backward", [(2, 5, 2, 7), _X, (2, 5, 2, 8), (2, 2, 5, 2), None, None, None, None],
         (1.0, 0.0, False), "grad: expected shape"),
        ("attention_qkvpacked_backward", [(2, 5, 2, 8), _X, (2, 5, 2, 8), (2, 5, 2, 2), None, None, None, None],
         (1.0, 0.0, False), "stats: expected shape"),
    ],
)  # fmt: skip
def test_raw_operators_name_what_would_crash_them(operator: str, shapes: Any, rest: Any, words: str) -> None:
    tensors = [None if s is None else torch.ones(s) for s in shapes]
    with pytest.raises(ValueError, match=words):
        getattr(torch.ops.fastdiff, operator).default(*tensors, *rest)


def test_opcheck_of_the_operators_behind() -> None:
    fd = torch.ops.fastdiff
    q, k, v = (randn(2, 3, n, 8, seed=i) for i, n in enumerate((5, 7, 7)))
    out, stats = fd.attention_stats.default(q, k, v, 0.3, False)
    torch.library.opcheck(fd.attention_stats.default, (q, k, v, 0.3, False))
    torch.library.opcheck(fd.attention_backward.default, (out.clone(), q, k, v, out, stats, 0.3, False))
    x, w, table = randn(2, 5, 3, 3, 8), randn(8), randn(5, 8)
    rest = (w, None, table, table.clone(), 0.3, 1e-6, True)
    y, stats = fd.attention_qkvpacked_stats.default(x, *rest)
    torch.library.opcheck(fd.attention_qkvpacked_stats.default, (x, *rest))
    torch.library.opcheck(fd.attention_qkvpacked_backward.default, (y.clone(), x, y, stats, *rest))
