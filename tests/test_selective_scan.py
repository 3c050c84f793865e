"""The selective scan where it could go wrong: extreme steps and decays, long horizons, packing, chunks and orders."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastdiff
from fastdiff import _native
from fastdiff.ops import _registry as reg
from fastdiff.ops import selective_scan, selective_scan_multi

pytestmark = pytest.mark.skipif(_native.extension is None, reason="no native extension: only the reference exists")
every_isa = pytest.mark.parametrize("isa", _native.isas())
every_layout = pytest.mark.parametrize("layout", ["bdl", "bld"])
reference = fastdiff.ops.SPECS["selective_scan"].reference


@pytest.fixture(autouse=True)
def native_only() -> Any:
    with fastdiff.use_backend("native"):
        yield


def inputs(B: int = 2, D: int = 20, L: int = 70, N: int = 5, *, layout: str = "bdl", seed: int = 0,
           dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """u, delta, A, B, C with positive steps and negative A."""
    g = torch.Generator().manual_seed(seed)
    whole, rows = ((B, D, L), (B, N, L)) if layout == "bdl" else ((B, L, D), (B, L, N))
    u, delta, b, c = (torch.randn(s, generator=g).to(dtype) for s in (whole, whole, rows, rows))
    return u, delta.abs() * 0.5, -torch.rand(D, N, generator=g) * 2, b, c


def along(t: torch.Tensor, layout: str, index: Any) -> torch.Tensor:
    """Positions of a tensor in layout bdl or bld."""
    return t[..., index] if layout == "bdl" else t[:, index]


# ---------------------------------------------------------------------------------------------------------- extremes


@every_isa
def test_a_step_of_zero_keeps_the_state_exactly_and_a_huge_one_forgets_it(isa: str) -> None:
    u, delta, A, b, c = inputs(L=50)
    state = torch.randn(2, 20, 5)
    with _native.use_isa(isa):
        out, last = selective_scan(u, torch.zeros_like(delta), A, b, c, return_last_state=True, initial_state=state)
        assert torch.equal(last, state)
        torch.testing.assert_close(out, torch.einsum("bdn,bnl->bdl", state, c), rtol=1e-5, atol=1e-5)
        # exp(-1e4) underflows: only the last input is left.
        _, last = selective_scan(u, torch.full_like(delta, 1e4), A - 0.1, b, c, return_last_state=True,
                                 initial_state=state)  # fmt: skip
        want = 1e4 * u[:, :, -1, None] * b[:, None, :, -1]
        torch.testing.assert_close(last, want, rtol=1e-6, atol=0)
        # A = 0 integrates: no decay at all, and not the slightest bias of one.
        ones = torch.ones(1, 1, 4096)
        _, last = selective_scan(ones, ones, torch.zeros(1, 3), ones.expand(1, 3, -1), ones.expand(1, 3, -1),
                                 return_last_state=True)  # fmt: skip
        assert torch.equal(last, torch.full_like(last, 4096.0))


@every_isa
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 80.0, 87.0, 100.0, 1e4, 1e30])
def test_every_size_of_decay(isa: str, size: float) -> None:
    u, delta, A, b, c = inputs(D=33, N=3)
    A = A * size
    state = torch.randn(2, 33, 3)
    want, want_last = reference(*(t.double() for t in (u, delta, A, b, c)), return_last_state=True,
                                initial_state=state.double())  # fmt: skip
    with _native.use_isa(isa):
        got, last = selective_scan(u, delta, A, b, c, return_last_state=True, initial_state=state)
        leaves = [t.clone().requires_grad_() for t in (u, delta, A, b, c)]
        grads = torch.autograd.grad(selective_scan(*leaves).sum(), leaves)
    # Without decay a state is a walk of 70 roundings, each relative to how large it has become.
    for found, expected in ((got, want), (last, want_last)):
        atol = 70**0.5 * 2.0**-23 * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=atol)
    wide = [t.double().requires_grad_() for t in (u, delta, A, b, c)]
    for name, g, w in zip(
        ["u", "delta", "A", "B", "C"], grads, torch.autograd.grad(reference(*wide).sum(), wide), strict=True
    ):
        scale = w.abs().max().clamp(min=1e-30)
        assert ((g.double() - w).abs().max() / scale) < 1e-4, name


@every_isa
def test_a_growing_state_overflows_like_the_reference(isa: str) -> None:
    u, delta, A, b, c = inputs(L=40)
    for size in (100.0, 127.5, 200.0, 1e6):
        want = reference(u, torch.ones_like(delta), -A * size, b, c)
        with _native.use_isa(isa):
            got = selective_scan(u, torch.ones_like(delta), -A * size, b, c)
        assert torch.equal(torch.isfinite(got), torch.isfinite(want))


@every_isa
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_values_reach_what_they_reach_in_the_reference(isa: str, special: float) -> None:
    for index, softplus, position in itertools.product(range(5), (False, True), (0, 17, 69)):
        call = [t.clone() for t in inputs(D=18)]
        victim = call[index]
        if index == 2:
            victim[3, 2] = special
        else:
            victim[1, 3, position] = special
        z = torch.randn_like(call[0])
        want = reference(*call, z=z, delta_softplus=softplus)
        with _native.use_isa(isa):
            got = selective_scan(*call, z=z, delta_softplus=softplus)
        assert torch.equal(torch.isfinite(got), torch.isfinite(want)), (index, softplus, position)


@every_isa
def test_nan_with_a_payload_stays_nan(isa: str) -> None:
    call = [t.clone() for t in inputs(D=18)]
    call[1].view(torch.int32)[0, 5, 30] = 0x7FFFFFFF
    with _native.use_isa(isa):
        for softplus in (False, True):
            out = selective_scan(*call, z=torch.ones_like(call[0]), delta_softplus=softplus)
            assert torch.isnan(out[0, 5, 30:]).all()
            assert torch.isfinite(out[0, 5, :30]).all()
            assert torch.isfinite(out[1]).all()


@every_isa
def test_softplus_gate_and_their_derivatives_over_their_whole_range(isa: str) -> None:
    """One step, A = 0 and B = C = u = 1: out = softplus(delta) silu(z)."""
    x = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([0.0, -0.0, 20.0, 20.000002, 1e-20, 1e30, -1e30])])
    one = torch.ones(1, x.numel(), 1)
    A, b = torch.zeros(x.numel(), 1), torch.ones(1, 1, 1)
    delta = x.view(1, -1, 1).clone().requires_grad_()
    wide = x.double().requires_grad_()
    with _native.use_isa(isa):
        got = selective_scan(one, delta, A, b, b, delta_softplus=True).flatten()
        (slope,) = torch.autograd.grad(got.sum(), delta)
    want = F.softplus(wide)
    torch.testing.assert_close(got.double(), want, rtol=4e-6, atol=1e-36)
    (want_slope,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(slope.flatten().double(), want_slope, rtol=4e-6, atol=1e-36)
    z = x.clamp(-1e3, 1e3).view(1, -1, 1).clone().requires_grad_()
    wide = z.detach().double().requires_grad_()
    with _native.use_isa(isa):
        got = selective_scan(one, one, A, b, b, z=z)
        (slope,) = torch.autograd.grad(got.sum(), z)
    torch.testing.assert_close(got.double(), F.silu(wide), rtol=4e-6, atol=1e-34)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(F.silu(wide).sum(), wide)[0], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ long horizons


@every_isa
def test_a_decay_is_within_its_stated_error(isa: str) -> None:
    """h_1 = exp(t A) h_0 with t A over the whole range: 2.1e-7 relative, and 6e-8 per unit of |t A|."""
    steps = torch.cat([torch.linspace(0, 86, 65536), torch.logspace(-30, 0, 65536)])
    zero = torch.zeros(1, steps.numel(), 1)
    with _native.use_isa(isa):
        _, last = selective_scan(zero, steps.view(1, -1, 1), -torch.ones(steps.numel(), 1), zero[:, :1], zero[:, :1],
                                 return_last_state=True, initial_state=torch.ones(1, steps.numel(), 1))  # fmt: skip
    want = torch.exp(-steps.double())
    error = (last.flatten().double() - want).abs() / want
    assert (error <= 2.1e-7 + 6e-8 * (1 if isa != "base" else 2) * steps.double()).all(), error.max()


@every_isa
def test_a_hundred_thousand_steps_of_slow_decay(isa: str) -> None:
    """Decays of 1 - 1e-6 to 1 - 1e-2 over 100 001 steps: rounding grows like the memory of the state."""
    L, D = 100_001, 5
    g = torch.Generator().manual_seed(0)
    u = torch.randn(1, D, L, generator=g) + 1
    delta = torch.full((1, D, L), 0.1)
    A = -torch.logspace(-5, -1, D).unsqueeze(1)
    one = torch.ones(1, 1, L)
    with _native.use_isa(isa):
        out = selective_scan(u, delta, A, one, one)
    a = torch.exp(delta[0, :, 0].double() * A[:, 0].double())
    h, want = torch.zeros(D, dtype=torch.float64), []
    x = (delta.double() * u.double())[0]
    for i in range(L):
        h = a * h + x[:, i]
        want.append(h)
    want = torch.stack(want, 1)
    memory = torch.minimum(1 / (1 - a), torch.arange(1, L + 1).unsqueeze(1).double()).t()
    error = (out[0].double() - want).abs() / want.abs().clamp(min=1)
    # A decay near 1 is itself rounded to 2^-24, the same way at every step: that is what `memory` units allow for.
    assert (error <= (4 + memory) * 2.0**-24).all(), (error / ((4 + memory) * 2.0**-24)).max()


@pytest.mark.parametrize("L", [1, 2, 31, 32, 33, 64, 100_001])
def test_lengths_with_gradients(L: int) -> None:
    call = inputs(B=1, D=3, L=L, N=2)
    leaves = [t.requires_grad_() for t in call]
    grads = torch.autograd.grad(selective_scan(*leaves)[..., -1].sum(), leaves)
    # Only the last 400 steps reach the last output: with A below -0.01 and steps of 0.4, all before is exp(-100).
    short = [t.detach()[..., -400:].double().requires_grad_() if t.dim() > 2 else t.detach().double().requires_grad_()
             for t in leaves]  # fmt: skip
    want = torch.autograd.grad(reference(*short)[..., -1].sum(), short)
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g[..., -400:].double() if g.dim() > 2 else g.double(), w, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------- packing, chunks and orders


@every_layout
@pytest.mark.parametrize("cuts", [[23, 50], [32, 64], [1, 2, 69]])
def test_resets_are_separate_calls(layout: str, cuts: list[int]) -> None:
    u, delta, A, b, c = inputs(layout=layout)
    marks = torch.zeros(70, dtype=torch.bool)
    marks[cuts] = True
    state = torch.randn(2, 20, 5)
    leaves = [t.clone().requires_grad_() for t in (u, delta, A, b, c)]
    got, last = selective_scan(*leaves, layout=layout, resets=marks, initial_state=state, return_last_state=True)
    parts = []
    apart = [t.clone().requires_grad_() for t in (u, delta, A, b, c)]
    for low, high in itertools.pairwise([0, *cuts, 70]):
        uu, dd, AA, bb, cc = apart
        piece = [along(t, layout, slice(low, high)) for t in (uu, dd, bb, cc)]
        out, final = selective_scan(piece[0], piece[1], AA, piece[2], piece[3], layout=layout, return_last_state=True,
                                    initial_state=state if low == 0 else None)  # fmt: skip
        parts.append(out)
    want = torch.cat(parts, -1 if layout == "bdl" else 1)
    assert torch.equal(got, want)
    assert torch.equal(last, final)
    for g, w in zip(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), apart),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    per_sample = selective_scan(
        u, delta, A, b, c, layout=layout, resets=marks.long().expand(2, -1), initial_state=state
    )
    assert torch.equal(per_sample, got)


@every_isa
@every_layout
def test_chunked_calls_are_one_call(isa: str, layout: str) -> None:
    u, delta, A, b, c = inputs(L=100, layout=layout)
    with _native.use_isa(isa):
        want, want_last = selective_scan(u, delta, A, b, c, layout=layout, return_last_state=True)
        state, parts = None, []
        for low, high in itertools.pairwise([0, 1, 33, 40, 100]):
            piece = [along(t, layout, slice(low, high)) for t in (u, delta, b, c)]
            out, state = selective_scan(piece[0], piece[1], A, piece[2], piece[3], layout=layout, initial_state=state,
                                        return_last_state=True)  # fmt: skip
            parts.append(out)
    assert torch.equal(torch.cat(parts, -1 if layout == "bdl" else 1), want)
    assert torch.equal(state, want_last)


def test_gradients_flow_through_chunks() -> None:
    call = inputs(L=60)
    whole = [t.clone().requires_grad_() for t in call]
    split = [t.clone().requires_grad_() for t in call]
    u, delta, A, b, c = split
    first, state = selective_scan(u[..., :25], delta[..., :25], A, b[..., :25], c[..., :25], return_last_state=True)
    second = selective_scan(u[..., 25:], delta[..., 25:], A, b[..., 25:], c[..., 25:], initial_state=state)
    got = torch.autograd.grad(torch.cat([first, second], -1).square().sum(), split)
    for g, w in zip(got, torch.autograd.grad(selective_scan(*whole).square().sum(), whole), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@every_layout
@pytest.mark.parametrize("reverse", [False, True])
def test_an_order_is_gather_scan_scatter(layout: str, reverse: bool) -> None:
    u, delta, A, b, c = inputs(layout=layout)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    visits = order.flip(0) if reverse else order
    z, D = torch.randn_like(u), torch.randn(20)
    got = selective_scan(u, delta, A, b, c, D, z, layout=layout, order=order, reverse=reverse)
    dim = 2 if layout == "bdl" else 1
    moved = [t.index_select(dim, visits) for t in (u, delta, b, c, z)]
    scanned = selective_scan(moved[0], moved[1], A, moved[2], moved[3], D, moved[4], layout=layout)
    want = torch.empty_like(u).index_copy_(dim, visits, scanned)
    assert torch.equal(got, want)
    backwards = selective_scan(u, delta, A, b, c, D, z, layout=layout, reverse=True)
    flipped = [t.flip(dim) for t in (u, delta, b, c, z)]
    assert torch.equal(
        backwards,
        selective_scan(flipped[0], flipped[1], A, flipped[2], flipped[3], D, flipped[4], layout=layout).flip(dim),
    )


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_many_directions_are_the_sum_of_scans(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    B, L, K, D, N = 2, 49, 4, 70, 6
    u, delta = torch.randn(B, L, D, generator=g).to(dtype), (torch.randn(B, L, K, D, generator=g) - 1).to(dtype)
    A, skip, bias = -torch.rand(K, D, N, generator=g), torch.randn(K, D, generator=g), torch.randn(K, D, generator=g)
    b, c = (torch.randn(B, L, K, N, generator=g).to(dtype) for _ in range(2))
    grid = torch.arange(L).view(7, 7)
    orders = torch.stack([grid.flatten(), grid.t().flatten(), grid.flatten().flip(0), grid.t().flatten().flip(0)])
    with _native.use_isa(isa):
        got = selective_scan_multi(u, delta, A, b, c, skip, orders=orders, delta_bias=bias, delta_softplus=True)
        single = [
            selective_scan(u.float(), delta[:, :, k].float(), A[k], b[:, :, k].float(), c[:, :, k].float(), skip[k],
                           delta_bias=bias[k], delta_softplus=True, layout="bld", order=orders[k])
            for k in range(K)
        ]  # fmt: skip
    want = ((single[0] + single[1]) + single[2]) + single[3]
    assert torch.equal(got, want.to(dtype))


def test_a_permutation_is_checked_inside_a_compiled_call_too() -> None:
    call = inputs(B=1, D=2, L=8, N=1)
    compiled = torch.compile(lambda *t, order: selective_scan(*t, order=order), fullgraph=True)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    assert torch.equal(compiled(*call, order=order), selective_scan(*call, order=order))
    with pytest.raises(ValueError, match=r"order: expected a permutation of 0 .. 7, got 3 more than once"):
        compiled(*call, order=order.clamp(max=3))


# ---------------------------------------------------------------------------------------------------------- contract


def test_the_signature_is_that_of_mamba_ssm() -> None:
    u, delta, A, b, c = inputs()
    D, z, bias = torch.randn(20), torch.randn_like(u), torch.randn(20)
    out, last = selective_scan(u, delta, A, b.unsqueeze(1), c, D, z, bias, True, True)
    assert out.shape == u.shape
    assert last.shape == (2, 20, 5)
    assert last.dtype == torch.float32
    # By hand, as in the paper.
    t = F.softplus(delta + bias[:, None])
    h, ys = torch.zeros(2, 20, 5), []
    for i in range(70):
        h = torch.exp(t[:, :, i, None] * A) * h + (t * u)[:, :, i, None] * b[:, None, :, i]
        ys.append((h * c[:, None, :, i]).sum(-1))
    want = (torch.stack(ys, -1) + D[:, None] * u) * F.silu(z)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, h, rtol=1e-4, atol=1e-5)


def test_a_complex_scan_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 6, 30, generator=g), torch.rand(2, 6, 30, generator=g)
    A = torch.complex(-torch.rand(6, 4, generator=g), torch.randn(6, 4, generator=g) * 20)
    b, c = torch.randn(2, 4, 60, generator=g), torch.randn(2, 4, 60, generator=g)
    out, last = selective_scan(u, delta, A, b, c, return_last_state=True)
    bb, cc = (torch.view_as_complex(t.double().unflatten(-1, (30, 2))) for t in (b, c))
    h, ys = torch.zeros(2, 6, 4, dtype=torch.complex128), []
    for i in range(30):
        step = delta[:, :, i, None].double()
        h = torch.exp(step * A) * h + step * u[:, :, i, None] * bb[:, None, :, i]
        ys.append(2 * (h * cc[:, None, :, i]).sum(-1).real)
    torch.testing.assert_close(out.double(), torch.stack(ys, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.to(torch.complex128), h, rtol=1e-4, atol=1e-4)


@every_isa
def test_complex_phases_of_any_size(isa: str) -> None:
    """A step turns the state by t Im A; beyond 12 000 radians sine and cosine come from libm."""
    phases = torch.tensor([0.0, 1e-10, 0.5, 3.1415927, 100.0, 11999.0, 12001.0, 1e5, 1e8, -7.5, -1e6])
    n = phases.numel()
    zero, one = torch.zeros(1, n, 1), torch.ones(1, n, 1)
    A = torch.complex(torch.zeros(n, 1), phases.unsqueeze(1))
    with _native.use_isa(isa):
        _, last = selective_scan(zero, one, A, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), return_last_state=True,
                                 initial_state=torch.ones(1, n, 1, dtype=torch.complex64))  # fmt: skip
    want = torch.polar(torch.ones(n, dtype=torch.float64), phases.double())
    assert (last.flatten() - want).abs().max() < 3e-7


def test_states_beyond_the_kernels_go_to_the_reference_and_native_says_so() -> None:
    u, delta, A, b, c = inputs(B=1, D=2, L=3, N=257)
    with pytest.raises(RuntimeError, match=r"selective_scan: .*257 floats of state"):
        selective_scan(u, delta, A, b, c)
    with fastdiff.use_backend("auto"):
        assert torch.equal(selective_scan(u, delta, A, b, c), reference(u, delta, A, b, c))
    for N in (255, 256):
        call = inputs(B=1, D=2, L=3, N=N)
        torch.testing.assert_close(selective_scan(*call), reference(*call), rtol=1e-4, atol=1e-4)


def test_the_workspace_is_what_the_page_says() -> None:
    """Nothing is expanded to the states of all steps: they would be 16 times the size of u."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for t in reg.tensors_in(result):
                self.size = max(self.size, t.numel())
            return result

    call = [t.requires_grad_() for t in inputs(B=1, D=64, L=1024, N=16)]
    with Largest() as mode:
        torch.autograd.grad(selective_scan(*call).sum(), call)
    assert mode.size <= call[0].numel()


def test_the_raw_operator_refuses_what_would_read_outside() -> None:
    u, delta, A, b, c = fastdiff.ops.SPECS["selective_scan"].lower(*inputs())[1][:5]
    rest = (None, None, None, None, None, None, False, False, False, False)
    run = torch.ops.fastdiff.selective_scan
    assert run(u, delta, A, b, c, *rest)[0].shape == u.shape
    for bad in ((u[:, :-1], delta, A, b, c), (u, delta, A[:, :-1], b, c), (u, delta, A, b[..., :-1, :], c),
                (u, delta, A, b, c[..., :-1]), (u[0], delta, A, b, c)):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            run(*bad, *rest)
    resets = torch.zeros(u.shape[:2], dtype=torch.int64)
    with pytest.raises(TypeError, match=r"resets: expected dtype torch\.bool, got torch\.int64"):
        run(u, delta, A, b, c, *rest[:5], resets, *rest[6:])
    out, last, states = run(u, delta, A, b, c, *rest[:-1], True)
    back, more = torch.ops.fastdiff.selective_scan_backward, (False, False, [True] * 9)
    back(out, last, u, delta, A, b, c, *rest[:6], states, *more)
    for bad in ((out[:, :-1], last, states), (out, last[..., :-1], states), (out, last, states[:, :, :-1])):
        with pytest.raises((ValueError, RuntimeError)):
            back(*bad[:2], u, delta, A, b, c, *rest[:6], bad[2], *more)


def test_small_stacks_are_enough() -> None:
    """The caller's thread and OpenMP's have 256 KB; the most states, real and complex, on every instruction set."""
    script = """
        import threading, torch
        from fastdiff import _native
        from fastdiff.ops import selective_scan
        torch.set_num_threads(2)
        done = []
        def body():
            for isa in _native.isas():
                with _native.use_isa(isa):
                    for is_complex, N in ((False, 256), (True, 128)):
                        u, delta = torch.randn(2, 70, 70), torch.rand(2, 70, 70)
                        A = -torch.rand(70, N)
                        A = torch.complex(A, -A) if is_complex else A
                        b = torch.randn(2, N, 140 if is_complex else 70)
                        for B in (b, A + 1):
                            leaves = [t.clone().requires_grad_() for t in (u, delta, A, B)]
                            selective_scan(*leaves, leaves[3] * 2, z=u).sum().backward()
                            assert all(t.grad.isfinite().all() for t in leaves)
                            done.append(isa)
        threading.stack_size(256 * 1024)
        t = threading.Thread(target=body)
        t.start()
        t.join()
        assert len(done) == 4 * len(_native.isas())
        print("all well")
    """
    env = {**os.environ, "OMP_STACKSIZE": "256k", "OMP_NUM_THREADS": "2"}
    got = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    assert got.returncode == 0, (got.returncode, got.stderr[-2000:])
    assert "all well" in got.stdout


@every_isa
def test_the_gate_and_softplus_are_right_for_every_finite_number(isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    edges = torch.tensor([0.0, 1.0, 20.0, 80.0, 86.5, 88.0, 104.0, 1e3, 1e30, 1e38, 3.4e38])
    edges = torch.cat([edges, -edges])
    n = edges.numel()
    z, delta = edges.view(1, 1, n), edges.clamp(max=100).view(1, 1, n)
    u, b = torch.randn(1, 1, n, generator=g), torch.rand(1, 3, n, generator=g)
    # No gate is so large that its product with y overflows.
    leaves = [t.clone().requires_grad_() for t in (u * 1e-3, delta, -torch.rand(1, 3, generator=g), b * 1e-3, b, z)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    with _native.use_isa(isa):
        out = selective_scan(*leaves[:5], z=leaves[5], delta_softplus=True)
        got = torch.autograd.grad(out, leaves, torch.full_like(out, 1e-3))
    want_out = reference(*wide[:5], z=wide[5], delta_softplus=True)
    want = torch.autograd.grad(want_out, wide, torch.full_like(want_out, 1e-3))
    torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-30)
    for name, one, other in zip(["u", "delta", "A", "B", "C", "z"], got, want, strict=True):
        scale = other.abs().max() if name in "AB" else 0.0
        torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=1e-6 * float(scale) + 1e-12, msg=name)


@every_isa
@every_layout
def test_sums_over_a_long_sequence_keep_their_digits(layout: str, isa: str) -> None:
    """dD, the gradient of the bias, dA and those of constant B and C are sums over L."""
    L, D, N = 100_000, 3, 2
    shape = (1, D, L) if layout == "bdl" else (1, L, D)
    u, delta = torch.full(shape, 1.1), torch.full(shape, 0.7)
    A = -torch.rand(D, N, generator=torch.Generator().manual_seed(0)) - 0.5
    B, C, skip, bias = torch.full((D, N), 0.9), torch.full((D, N), 1.3), torch.ones(D), torch.zeros(D)
    leaves = [t.requires_grad_() for t in (A, B, C, skip, bias)]

    def scan(function: Any, u: Any, delta: Any, leaves: Any, **more: Any) -> Any:
        return function(u, delta, *leaves[:4], None, leaves[4], **more)

    with _native.use_isa(isa):
        out = scan(selective_scan, u, delta, leaves, layout=layout)
        got = torch.autograd.grad(out, leaves, torch.ones_like(out))
    # In closed form: the state is constant but for the ends, which a scan of 1000 steps has, too.
    ends = []
    for length in (1000, 2000):
        wide = [t.detach().double().requires_grad_() for t in leaves]
        cut = (along(t, layout, slice(length)).double() for t in (u, delta))
        y = scan(reference, *cut, wide, layout=layout)
        ends.append(torch.autograd.grad(y, wide, torch.ones_like(y)))
    # 256 additions of equal terms, then 391: half a unit of the last place each, of a sum that on average is half done.
    for name, one, short, long in zip(["A", "B", "C", "D", "bias"], got, *ends, strict=True):
        want = short + (long - short) * (L / 1000 - 1)
        torch.testing.assert_close(one.double(), want, rtol=2e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_compiled_whole_with_complex_states_and_with_one_tensor_twice() -> None:
    g = torch.Generator().manual_seed(0)
    u, b = torch.randn(2, 6, 12, generator=g), torch.randn(2, 4, 24, generator=g)
    A = torch.complex(-torch.rand(6, 4, generator=g), torch.randn(6, 4, generator=g))

    def twice(u: Any, A: Any, B: Any) -> Any:
        return selective_scan(u, u.abs(), torch.view_as_complex(A), B, B)

    def real(u: Any, A: Any, B: Any) -> Any:
        return selective_scan(u, u, A, B, B, z=u)

    for function, call in ((twice, (u, torch.view_as_real(A).clone(), b)), (real, (u.abs(), A.real, b[..., :12]))):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*call), function(*call))
        results = []
        for run in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in call]
            results.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_groups_of_symbolic_number() -> None:
    u, delta, A, b, _ = inputs(B=1, D=4, L=8, N=3)
    c = torch.randn(1, 2, 3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: selective_scan(*t), fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(u, delta, A, b, c), selective_scan(u, delta, A, b, c))


def test_the_last_state_is_double_where_any_argument_is() -> None:
    call = inputs(B=1, D=4, L=8, N=3)
    with fastdiff.use_backend("auto"):
        for more in ({"D": torch.ones(4).double()}, {"initial_state": torch.zeros(1, 4, 3).double()}):
            out, last = selective_scan(*call, return_last_state=True, **more)
            assert (out.dtype, last.dtype) == (torch.float32, torch.float64)


def test_a_sparse_complex_matrix_is_named() -> None:
    u, delta, A, b, c = inputs(B=1, D=4, L=8, N=3)
    A = torch.complex(A, A).to_sparse()
    with fastdiff.use_backend("auto"), pytest.raises(TypeError, match=r"A: expected a dense tensor"):
        selective_scan(u, delta, A, b.repeat(1, 1, 2), c.repeat(1, 1, 2))
