"""What only the causal convolution promises: streaming, one result in every layout, and its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastdiff
from fastdiff import _native
from fastdiff.ops import causal_conv1d

pytestmark = pytest.mark.skipif(_native.extension is None, reason="no native extension: only the reference exists")
every_isa = pytest.mark.parametrize("isa", _native.isas())
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_isa
@pytest.mark.parametrize("K", [1, 2, 3, 4, 7, 20])
def test_equals_conv1d_of_torch(K: int, isa: str) -> None:
    x, w, b = randn(2, 37, 50), randn(37, K, seed=1), randn(37, seed=2)
    want = F.conv1d(x, w[:, None], b, padding=K - 1, groups=37)[..., :50]
    with _native.use_isa(isa), fastdiff.use_backend("native"):
        torch.testing.assert_close(causal_conv1d(x, w, b), want, rtol=1e-5, atol=1e-5)
        for name in ("silu", "swish"):
            torch.testing.assert_close(causal_conv1d(x, w, b, name), F.silu(want), rtol=1e-5, atol=1e-5)


@every_isa
@every_dtype
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("K", [1, 2, 4, 6])
def test_chunks_with_states_equal_the_whole(K: int, layout: str, dtype: torch.dtype, isa: str) -> None:
    B, D, L = 2, 70, 45
    x = randn(B, D, L, dtype=dtype) if layout == "bdl" else randn(B, L, D, dtype=dtype)
    w, b, start = randn(D, K, seed=1), randn(D, seed=2), randn(B, D, K - 1, seed=3, dtype=dtype)
    time = 2 if layout == "bdl" else 1
    with _native.use_isa(isa):
        whole, last = causal_conv1d(x, w, b, "silu", initial_state=start, layout=layout, return_final_state=True)
        state, pieces = start, []
        for piece in x.split([1, 1, 17, 2, 24], dim=time):  # shorter and longer than K - 1
            y, state = causal_conv1d(
                piece, w, b, "silu", initial_state=state, layout=layout, return_final_state=True
            )  # fmt: skip
            pieces.append(y)
    assert torch.equal(torch.cat(pieces, time), whole)
    assert torch.equal(state, last)
    rows = x if layout == "bdl" else x.transpose(1, 2)
    assert torch.equal(last, rows[:, :, L - K + 1 :])


def test_gradients_flow_through_the_states() -> None:
    D, K = 5, 4
    w, b = randn(D, K, seed=1), randn(D, seed=2)
    found = []
    for cuts in ([11], [2, 1, 8]):
        x, start = randn(2, D, 11).requires_grad_(), randn(2, D, K - 1, seed=3).requires_grad_()
        state, total = start, torch.zeros(())
        for piece in x.split(cuts, dim=2):
            y, state = causal_conv1d(piece, w, b, "silu", initial_state=state, return_final_state=True)
            total = total + y.square().sum()
        total = total + state.pow(3).sum()
        found.append(torch.autograd.grad(total, (x, start)))
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


@every_isa
@every_dtype
@pytest.mark.parametrize("K", [1, 3, 4, 9])
def test_every_layout_gives_the_same_bits_forward_and_backward(K: int, dtype: torch.dtype, isa: str) -> None:
    B, D, L = 3, 83, 101
    x, w, b = randn(B, D, L, dtype=dtype), randn(D, K, seed=1), randn(D, seed=2)
    start, up = randn(B, D, K - 1, seed=3, dtype=dtype), randn(B, D, L, seed=4, dtype=dtype)
    results = []
    for kind in ("bdl", "bld", "view", "wide"):
        rows = {
            "bdl": lambda t: t.clone(),
            "bld": lambda t: t.transpose(1, 2).contiguous(),
            "view": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
            "wide": lambda t: torch.stack([t, t], dim=3)[..., 0],
        }[kind]
        leaves = [t.clone().requires_grad_() for t in (w, b, start)]
        leaf = rows(x).detach().requires_grad_()
        with _native.use_isa(isa), fastdiff.use_backend("native"):
            y = causal_conv1d(
                leaf, leaves[0], leaves[1], "silu", initial_state=leaves[2], layout="bld" if kind == "bld" else "bdl"
            )
            dx, *rest = torch.autograd.grad(y, [leaf, *leaves], rows(up))
        y, dx = (t.transpose(1, 2) if kind == "bld" else t for t in (y, dx))
        results.append([y, dx, *rest])
    for other in results[1:]:
        for a, c in zip(results[0], other, strict=True):
            assert torch.equal(a, c)


@every_isa
def test_silu_over_the_whole_range(isa: str) -> None:
    x = torch.cat([torch.linspace(-120, 120, 100_001), torch.logspace(-30, 38, 1000), -torch.logspace(-30, 38, 1000)])
    with _native.use_isa(isa):
        got = causal_conv1d(x[None, None], torch.ones(1, 1), None, "silu")[0, 0].double()
    want = F.silu(x.double())
    assert ((got - want).abs() <= 2.0**-21 * want.abs() + 1e-35).all()
    edges = torch.tensor([float("inf"), float("-inf"), float("nan")])
    got = causal_conv1d(edges[:, None, None], torch.ones(1, 1), None, "silu").flatten()
    torch.testing.assert_close(got, F.silu(edges), equal_nan=True)


def test_the_final_state_is_a_copy() -> None:
    x = randn(1, 4, 9)
    _, state = causal_conv1d(x, randn(4, 3), return_final_state=True)
    before = state.clone()
    x.zero_()
    assert torch.equal(state, before)


def test_the_first_tap_of_a_state_without_a_bias_and_one_tap() -> None:
    x, w = randn(2, 3, 5), randn(3, 1, seed=1)
    y, state = causal_conv1d(x, w, initial_state=torch.zeros(2, 3, 0), return_final_state=True)
    assert torch.equal(y, x * w)
    assert state.shape == (2, 3, 0)


@every_isa
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_the_slope_of_silu_over_the_whole_range(layout: str, isa: str) -> None:
    ends = torch.logspace(-30, 38.5, 1000)
    v = torch.cat([torch.linspace(-120, 120, 10_001), ends, -ends, torch.tensor([3.4e38, -3.4e38])]).clone()
    x, one = (v[None, None] if layout == "bdl" else v[None, :, None]).requires_grad_(), torch.ones(1, 1)
    with _native.use_isa(isa), fastdiff.use_backend("native"):
        (got,) = torch.autograd.grad(causal_conv1d(x, one, None, "silu", layout=layout).double().sum(), x)
    wide = v.double().requires_grad_()
    (want,) = torch.autograd.grad(F.silu(wide).sum(), wide)
    # 2e-36: what the slope is below -87, where it is taken for 0.
    assert ((got.flatten().double() - want).abs() <= 2.0**-21 * want.abs().clamp(min=2.0**-3) * (want.abs() > 1e-6)
            + 2.0**-16 * want.abs() + 2e-36).all()  # fmt: skip
    edges = torch.tensor([float("inf"), float("-inf"), float("nan")])
    found = []
    for run in (lambda t: causal_conv1d(t[:, None, None], one, None, "silu").flatten(), F.silu):
        leaf = edges.clone().requires_grad_()
        found.append(torch.autograd.grad(run(leaf).sum(), leaf)[0])
    torch.testing.assert_close(*found, equal_nan=True)


@every_isa
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_huge_inputs_leave_the_other_gradients_alone(layout: str, isa: str) -> None:
    x = randn(1, 20, 16)
    x[..., 4] = 1e38
    w = randn(20, 4, seed=1).clamp(-1, 1)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    wide = [t.double().requires_grad_() for t in (x, w)]
    view = (lambda t: t) if layout == "bdl" else (lambda t: t.transpose(1, 2))
    with _native.use_isa(isa), fastdiff.use_backend("native"):
        y = causal_conv1d(view(leaves[0]), leaves[1], None, "silu", layout=layout)
        (dx,) = torch.autograd.grad(y, leaves[0], torch.ones_like(y))
    y = causal_conv1d(view(wide[0]), wide[1], None, "silu", layout=layout)
    (want,) = torch.autograd.grad(y, wide[0], torch.ones_like(y))
    torch.testing.assert_close(dx.double(), want, rtol=1e-5, atol=1e-5)


@every_isa
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_sums_over_a_long_sequence_keep_their_digits(layout: str, isa: str) -> None:
    L = 100_000
    x = torch.full((1, 3, L) if layout == "bdl" else (1, L, 3), 1.1)
    w, b = torch.ones(3, 4).requires_grad_(), torch.ones(3).requires_grad_()
    with _native.use_isa(isa), fastdiff.use_backend("native"):
        y = causal_conv1d(x, w, b, layout=layout)
        dw, db = torch.autograd.grad(y, (w, b), torch.full_like(y, 1.3))
    steps = torch.tensor([L - 3, L - 2, L - 1, L], dtype=torch.float64)
    x1, g1 = float(torch.tensor(1.1)), float(torch.tensor(1.3))
    torch.testing.assert_close(dw.double(), (steps * x1 * g1).expand(3, 4), rtol=4e-6, atol=0)
    torch.testing.assert_close(db.double(), torch.full((3,), L * g1, dtype=torch.float64), rtol=4e-6, atol=0)


def test_the_raw_operator_refuses_what_would_read_outside() -> None:
    x, w = randn(1, 8, 16), randn(8, 4)
    run, back = torch.ops.fastdiff.causal_conv1d, torch.ops.fastdiff.causal_conv1d_backward
    need = [True, True, True, True]
    assert run(x, w, None, None, False, False).shape == x.shape
    assert len(back(x, x, w, None, None, False, False, need)) == 2
    for bad in ((randn(1, 1_000_000, 16), randn(2, 4), None, None), (x, randn(8, 0), None, None), (x[0], w, None, None),
                (x, w[0], None, None), (x, w, randn(7), None), (x, w, None, randn(1, 8, 4))):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            run(*bad, False, False)
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            back(bad[0], *bad, False, False, need)
    with pytest.raises((ValueError, RuntimeError), match="grad: expected"):
        back(x[..., :-1], x, w, None, None, False, False, need)


def test_compiled_whole_with_one_tensor_twice() -> None:
    x, w = randn(2, 5, 3), randn(5, 4)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(x, w, None, "silu", initial_state=x)  # type: ignore[return-value]

    found = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        found.append(torch.autograd.grad(function(*leaves).square().sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
