"""The attention kernels for CUDA, run by csrc/emu: what the random calls of tests/test_emulated_ops.py miss.

Every kernel (types, head dims below, at and above what is compiled), lengths around every tile edge, layouts that are
not aligned, extremes of the scores, and independence of batch, neighbours and layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emu.harness import Emulator

import fastdiff
from fastdiff import _native, ops
from fastdiff.cli import _check
from fastdiff.ops import SPECS
from fastdiff.ops.attention import attention_reference

TYPES = [torch.float32, torch.float16, torch.bfloat16]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t).removeprefix("torch."))


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators(), fastdiff.use_backend("native"):
        yield built
    built.reset()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(N: int, M: int, d: int, dtype: torch.dtype, heads: int = 1) -> list[torch.Tensor]:
    return [randn(1, heads, n, d, seed=i, dtype=dtype) for i, n in enumerate((N, M, M))]


def verify(name: str, args: tuple[Any, ...], gradients: bool = True, **kwargs: Any) -> None:
    finding = _check.check(_check.expect(SPECS[name], args, kwargs, gradients=gradients))
    assert not finding.failures, (_check.describe(args, kwargs), finding.failures)


def gradients(*leaves: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    """The result and its gradients, of `attention` or of the packed call."""
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    out = ops.attention(*leaves, **kwargs) if len(leaves) == 3 else ops.attention_qkvpacked(*leaves, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, seed=9, dtype=out.dtype))]


@every_type
@pytest.mark.parametrize("d", [1, 7, 31, 32, 40, 72, 73, 96, 128, 136, 256])
def test_every_head_dim_has_its_kernel(emu: Emulator, d: int, dtype: torch.dtype) -> None:
    verify("attention", tuple(qkv(21, 35, d, dtype)))


@every_type
@pytest.mark.parametrize(("N", "M"), [(1, 64), (16, 65), (17, 63), (31, 32), (33, 33), (63, 16), (64, 15), (65, 97),
                                      (127, 2), (128, 31), (129, 1)])  # fmt: skip
def test_lengths_around_every_tile_edge(emu: Emulator, N: int, M: int, dtype: torch.dtype) -> None:
    verify("attention", tuple(qkv(N, M, 24, dtype)), gradients=M > 1)
    if N <= 33:
        verify("attention", tuple(qkv(N, M, 256, dtype)), gradients=False)


@every_type
def test_long_rows_of_keys_and_of_queries(emu: Emulator, dtype: torch.dtype) -> None:
    verify("attention", tuple(qkv(3, 333, 16, dtype)))
    verify("attention", tuple(qkv(150, 5, 8, dtype)))


@every_type
@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_and_rotation_of_many_tiles(emu: Emulator, interleaved: bool, dtype: torch.dtype) -> None:
    for N, d in ((66, 24), (20, 72), (19, 130)):
        angle = randn(N, d // 2, seed=3)
        x, norms = randn(1, N, 3, 1, d, dtype=dtype), {f"{n}_norm": randn(d, seed=i) for i, n in enumerate("qk")}
        rope = (angle.cos(), angle.sin())
        verify("attention_qkvpacked", (x,), rope=rope, rope_interleaved=interleaved, **norms)
    verify("attention_qkvpacked", (x[..., :24],), q_norm=norms["q_norm"][:24], eps=0.0)  # no 0 / 0 in absent rows
    verify("attention_qkvpacked", (x[..., :24],), rope=(rope[0][:, :12], rope[1][:, :12]), rope_interleaved=interleaved)
    verify("attention_qkvpacked", (randn(2, 19, 3, 2, 9, dtype=dtype),), k_norm=randn(9))  # a pair of one


@every_type
def test_layouts_do_not_show(emu: Emulator, dtype: torch.dtype) -> None:
    """Whether rows come 16 bytes at a time or one element, from wherever they lie, the bits are the same."""
    q, k, v = qkv(20, 40, 24, dtype, heads=2)
    want = gradients(q, k, v)

    def moved(t: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "shifted":
            return torch.zeros(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t)
        if kind == "spread":
            return torch.zeros(*t.shape, 2, dtype=dtype)[..., 1].copy_(t)
        return torch.zeros(*t.shape[:3], t.shape[3] + 3, dtype=dtype)[..., :-3].copy_(t)

    for kind in ("shifted", "spread", "ragged"):
        for a, b in zip(want, gradients(*(moved(t, kind) for t in (q, k, v))), strict=True):
            assert torch.equal(a, b), kind
    turned = gradients(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), layout="bnhd")
    assert torch.equal(want[0].transpose(1, 2), turned[0])
    one = k[:, :1, :1].expand(1, 2, 40, 24)
    assert torch.equal(ops.attention(q, one, v), ops.attention(q, one.contiguous(), v))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = ops.attention(*leaves)
    up = torch.full((), 1.5, dtype=dtype).expand(out.shape)  # one element everywhere, as sum() has it
    found = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (up, up.contiguous())]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@every_type
def test_packed_is_bitwise_the_unpacked_call(emu: Emulator, dtype: torch.dtype) -> None:
    x = randn(2, 33, 3, 2, 72, dtype=dtype)
    packed, apart = gradients(x), gradients(*x.unbind(2), layout="bnhd")
    assert torch.equal(packed[0], apart[0])
    assert torch.equal(packed[1], torch.stack(apart[1:], 2))


@every_type
def test_batch_and_neighbours_do_not_show(emu: Emulator, dtype: torch.dtype) -> None:
    x = randn(3, 40, 3, 1, 24, dtype=dtype)
    norms = {"q_norm": randn(24, seed=1), "k_norm": randn(24, seed=2)}
    out = ops.attention_qkvpacked(x, **norms)
    for b in range(3):
        assert torch.equal(out[b : b + 1], ops.attention_qkvpacked(x[b : b + 1], **norms))
    q, k, v = qkv(140, 70, 24, dtype)
    whole = ops.attention(q, k, v)
    for first, n in ((0, 1), (13, 40), (63, 70), (139, 1)):
        assert torch.equal(whole[:, :, first : first + n], ops.attention(q[:, :, first : first + n], k, v))


def test_logits_of_ten_thousand(emu: Emulator) -> None:
    q, k, v = qkv(33, 40, 72, torch.float32)
    q = q * (1e4 / (q @ k.transpose(-1, -2)).abs().amax())
    for dtype in TYPES:
        call = [t.to(dtype) for t in (q, k, v)]
        for scale in (1.0, -1.0, 0.0):
            got = ops.attention(*call, scale=scale).double()
            want = attention_reference(*(t.double() for t in call), scale=scale)
            # A logit of 1e4 has an ulp of 1e-3 and sqrt(72) roundings: weights are right to about a percent.
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@every_type
def test_rows_in_increasing_and_decreasing_order_of_their_scores(emu: Emulator, dtype: torch.dtype) -> None:
    """Every tile rescales what came before, or none does."""
    k = torch.linspace(0, 60, 300)[None, None, :, None].expand(1, 1, 300, 8) / 8
    q = torch.stack([torch.ones(8), -torch.ones(8)])[None, None]
    verify("attention", (q.to(dtype), k.to(dtype), randn(1, 1, 300, 8, dtype=dtype)), gradients=False, scale=1.0)


@every_type
def test_infinity_and_nan(emu: Emulator, dtype: torch.dtype) -> None:
    q, k, v = torch.ones(1, 1, 5, 8, dtype=dtype), *(randn(1, 1, 150, 8, seed=i, dtype=dtype) for i in (1, 2))
    k[:, :, :130, 3] = -math.inf  # whole tiles of keys that do not count, and a part of one
    leaves = [q, k, v]
    got = gradients(*leaves)
    want = ops.attention(q, k[:, :, 130:], v[:, :, 130:])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], want, atol=2 * eps, rtol=4 * eps)
    assert (got[3][:, :, :130] == 0).all()  # dv
    k[:, :, :, 3] = -math.inf  # no key left: 0 / 0, as in the reference
    assert torch.isnan(ops.attention(*leaves)).all()
    for value, where in itertools.product((math.nan, math.inf), range(3)):
        call = [t.clone() for t in qkv(20, 70, 8, dtype)]
        call[where][0, 0, 17, 5] = value
        a, b = ops.attention(*call), attention_reference(*call)
        assert torch.equal(torch.isfinite(a), torch.isfinite(b))
        assert torch.equal(torch.isinf(a), torch.isinf(b))


@pytest.mark.parametrize("size", [1e4, 1e8, 1e15])
def test_large_logits_have_the_gradients_of_their_weights(emu: Emulator, size: float) -> None:
    """What the backward pass takes for the weights is what the forward pass used, to the last bit of the scores."""
    q, k, v = randn(1, 1, 4, 64) * size, randn(1, 1, 1, 64, seed=1), randn(1, 1, 1, 64, seed=2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    dv = torch.autograd.grad(ops.attention(*leaves).sum(), leaves)[2]
    assert (dv == 4).all()  # a single key: every weight is 1
    k, v = (randn(1, 1, 65, 64, seed=i) for i in (3, 4))
    k, v = torch.cat([k, k], 2), torch.cat([v, -v], 2).requires_grad_()
    (dv,) = torch.autograd.grad(ops.attention(q, k, v).sum(), [v])
    torch.testing.assert_close(dv.double().sum(2), torch.full((1, 1, 64), 4.0).double(), atol=2e-6, rtol=0)
    assert torch.equal(dv[:, :, :65], dv[:, :, 65:])


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_bounds_of_gradients_at_large_scores_hide_nothing(emu: Emulator, scale: float) -> None:
    """Scores of some hundreds, and weights too small to be kept: right results pass, and those without delta do not."""
    call = tuple(qkv(10, 20, 32, torch.float32))
    expected = _check.expect(SPECS["attention"], call, {"scale": scale}, gradients=True)
    assert not _check.check(expected).failures
    emu.mutate("kAttentionDelta")
    assert _check.check(expected).failures


def test_small_weights_of_float16_count(emu: Emulator) -> None:
    """511 weights of 2^-23 of the largest: float16 has a single bit for them, unless they are scaled."""
    k = torch.full((1, 1, 512, 8), -23.0 * math.log(2) / 8)
    k[:, :, 0] = 0
    call = [
        torch.ones(1, 1, 1, 8).half(),
        k.half(),
        torch.linspace(1, 2, 512)[:, None].expand(512, 8)[None, None].half(),
    ]
    leaves = [t.requires_grad_() for t in call]
    (dv,) = torch.autograd.grad(ops.attention(*leaves, scale=1.0).float().sum() * 1024, [leaves[2]])
    wide = [t.detach().double().requires_grad_() for t in call]
    (want,) = torch.autograd.grad(attention_reference(*wide, scale=1.0).sum() * 1024, [wide[2]])
    torch.testing.assert_close(dv.double(), want, rtol=2e-3, atol=0)


def test_a_mean_of_many_equal_values_is_that_value(emu: Emulator) -> None:
    got = ops.attention(randn(1, 1, 3, 8), torch.zeros(1, 1, 2048, 8), torch.full((1, 1, 2048, 8), 1.1))
    assert ((got / 1.1 - 1).abs() <= (32 + 2048 / 32) * 2.0**-24).all()


@every_type
def test_saved_maxima_and_sums_mean_what_they_mean_on_the_cpu(built: Emulator, dtype: torch.dtype) -> None:
    if _native.extension is None:
        pytest.skip("no native extension")
    q, k, v = qkv(20, 70, 24, dtype)
    _, want = torch.ops.fastdiff.attention_stats(q, k, v, 0.3, False)
    with built.operators():
        _, got = torch.ops.fastdiff.attention_stats(q, k, v, 0.3, False)
    torch.testing.assert_close(got[..., 0], want[..., 0])
    torch.testing.assert_close(got[..., 1], want[..., 1], rtol=max(torch.finfo(dtype).eps, 1e-5), atol=0)


def test_wider_heads_are_the_references(emu: Emulator) -> None:
    q, k, v = qkv(5, 7, 257, torch.float32)
    with pytest.raises(RuntimeError, match="head dim of 257"):
        ops.attention(q, k, v)
    assert any("head dim of 257" in why for why in fastdiff.explain("attention", q, k, v))
    x = randn(1, 5, 3, 2, 264)
    assert any("head dim of 264" in why for why in fastdiff.explain("attention_qkvpacked", x))
    with fastdiff.use_backend("auto"):
        assert torch.equal(ops.attention(q, k, v), attention_reference(q, k, v))
    with pytest.raises(RuntimeError, match="256"):
        torch.ops.fastdiff.attention(q, k, v, 1.0, False)
    assert not fastdiff.explain("attention", *qkv(5, 7, 256, torch.float32))
