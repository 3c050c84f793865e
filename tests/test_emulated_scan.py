"""The selective scan's CUDA kernels under csrc/emu: what the random calls of test_emulated_ops.py may miss.

Every mapping of states to threads and its edges, tiles just filled and just not, each way an operand comes in, long
inputs; bits that must not depend on strides or the batch; and an order that is no permutation.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emu import harness
from emu.harness import Emulator

from fastdiff import _native, ops, use_backend
from fastdiff.cli import _check
from fastdiff.ops import SPECS
from fastdiff.ops._registry import tensors_in

page = importlib.import_module("fastdiff.ops.selective_scan")  # the package has a function of that name
EXP2_ERROR = {3: 1.02e-4, 4: 2.9e-6, 5: 1.6e-7}


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators():
        yield built
    built.reset()


def call(
    B: int = 2, D: int = 5, L: int = 9, N: int = 4, *, layout: str = "bld", groups: int = 0, is_complex: bool = False,
    constant: str = "", dtype: torch.dtype = torch.float32, everything: bool = True, seed: int = 0,
) -> Any:  # fmt: skip
    """One call with every option in force."""
    g = torch.Generator().manual_seed(seed)
    first, parts = layout == "bdl", 2 if is_complex else 1

    def randn(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(of)

    def states(*shape: int) -> torch.Tensor:
        return torch.view_as_complex(randn(*shape, 2, of=torch.float32)) if is_complex else randn(*shape)

    def projection(name: str) -> torch.Tensor:
        if name in constant:
            return states(D, N)
        inner = [groups] if groups else []
        return randn(B, *inner, N, L * parts) if first else randn(B, L, *inner, N * parts)

    whole = (B, D, L) if first else (B, L, D)
    A = states(D, N)
    if is_complex:
        torch.view_as_real(A)[..., 0].abs_().neg_()
    else:
        A = -A.abs()
    args = (randn(*whole), randn(*whole), A, projection("B"), projection("C"))
    kwargs: dict[str, Any] = {"layout": layout, "delta_softplus": True}
    if everything:
        kwargs |= {
            "D": randn(D), "z": randn(*whole), "delta_bias": randn(D), "return_last_state": True,
            "initial_state": states(B, D, N), "order": torch.randperm(L, generator=g), "reverse": True,
            "resets": torch.rand(B, L, generator=g) < 0.1,
        }  # fmt: skip
    return args, kwargs


def check(args: Any, kwargs: Any, op: str = "selective_scan") -> None:
    with use_backend("native"):
        finding = _check.check(_check.expect(SPECS[op], args, kwargs, gradients=True, seed=1))
    assert not finding.failures, (_check.describe(args, kwargs), finding.failures)


@pytest.mark.parametrize("L", [5, 38])
def test_a_state_that_forgets_at_once(emu: Emulator, L: int) -> None:
    """A of minus infinity (-exp of a large number): the steps that fill up the last tile leave its state alone."""
    args, kwargs = call(B=1, D=8, L=L, N=4, everything=False)
    args[2][0, 0] = -math.inf
    with torch.no_grad(), use_backend("native"):
        y, last = SPECS["selective_scan"].function(*args, return_last_state=True, **kwargs)
    with torch.no_grad(), use_backend("reference"):
        want_y, want = SPECS["selective_scan"].function(*args, return_last_state=True, **kwargs)
    assert want.isfinite().all()
    torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-4)


# Floats of state: one lane to 32, just below and above each count of lanes and the change from 32 channels to 8.
@pytest.mark.parametrize("N", [0, 1, 4, 5, 16, 17, 32, 33, 128])
def test_states(emu: Emulator, N: int) -> None:
    check(*call(B=1, D=9, L=6, N=N))


@pytest.mark.parametrize("N", [1, 3, 16, 17, 64])
def test_complex_states(emu: Emulator, N: int) -> None:
    check(*call(B=1, D=9, L=6, N=N, is_complex=True, layout="bdl" if N % 2 else "bld"))


@pytest.mark.parametrize("N", [6, 40])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_constant_projections(emu: Emulator, constant: str, is_complex: bool, N: int) -> None:
    check(*call(D=10, L=35, N=N, constant=constant, is_complex=is_complex))


@pytest.mark.parametrize("layout", page.LAYOUTS)
@pytest.mark.parametrize("D", [8, 31, 32, 33, 64])
def test_channels(emu: Emulator, D: int, layout: str) -> None:
    check(*call(B=1, D=D, L=33, N=3, layout=layout))


@pytest.mark.parametrize("layout", page.LAYOUTS)
@pytest.mark.parametrize("L", [1, 31, 32, 64, 65, 200])
def test_steps(emu: Emulator, L: int, layout: str) -> None:
    check(*call(B=1, D=4, L=L, N=8, layout=layout))
    check(*call(B=1, D=4, L=L, N=8, layout=layout, everything=False))


@pytest.mark.parametrize("dtype", harness.STORED, ids=str)
@pytest.mark.parametrize(("D", "groups"), [(12, 3), (80, 2), (6, 6)])
def test_groups(emu: Emulator, D: int, groups: int, dtype: torch.dtype) -> None:
    check(*call(B=1, D=D, L=34, N=8, groups=groups, dtype=dtype))


@pytest.mark.parametrize("layout", page.LAYOUTS)
@pytest.mark.parametrize(("D", "L"), [(8, 40), (3, 33)])
def test_directions(emu: Emulator, D: int, L: int, layout: str) -> None:
    g = torch.Generator().manual_seed(3)
    B, K, N, first = 2, 3, 4, layout == "bdl"

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    u, delta, Bm, C = (
        (randn(B, D, L), randn(B, K, D, L), randn(B, K, N, L), randn(B, K, N, L)) if first
        else (randn(B, L, D), randn(B, L, K, D), randn(B, L, K, N), randn(B, L, K, N))
    )  # fmt: skip
    orders = torch.stack([torch.randperm(L, generator=g) for _ in range(K)])
    args = (u, delta, -randn(K, D, N).abs(), Bm, C, randn(K, D))
    check(args, {"orders": orders, "layout": layout, "delta_softplus": True}, "selective_scan_multi")


def long(B: int = 2, L: int = 500, **options: Any) -> Any:
    """A call that is cut along L, and whose first steps are still felt in the last: slow decays, one restart."""
    args, kwargs = call(B, L=L, **options)
    args[2].mul_(0.004)
    kwargs["resets"] = torch.zeros(L, dtype=torch.bool)
    kwargs["resets"][kwargs["order"][L // 3]] = True
    return args, kwargs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "bdl", "L": 545, "constant": "B"},
        {"is_complex": True, "N": 3, "L": 512},
        {"D": 34, "groups": 2, "dtype": torch.bfloat16, "L": 513},
    ],
    ids=["plain", "channels first", "complex", "groups"],
)
def test_segments(emu: Emulator, options: dict[str, Any]) -> None:
    """Side by side and one after the other: the same bits, and right ones."""
    args, kwargs = long(**options)
    apart = ops.selective_scan(*args, **kwargs)
    assert emu.last_kernel().endswith("kReplay>)")
    emu.multiprocessors(1)
    together = ops.selective_scan(*args, **kwargs)
    assert emu.last_kernel().endswith("kFused>)")
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)
    check(*long(1, **options))


@pytest.mark.parametrize("processors", [1, 4])
def test_segments_of_one_sample_do_not_depend_on_the_batch(emu: Emulator, processors: int) -> None:
    args, kwargs = long(3)
    emu.multiprocessors(processors)
    whole = ops.selective_scan(*args, **kwargs)
    emu.multiprocessors(4)
    one = SPECS["selective_scan"].take(2, args, kwargs)
    for a, b in zip(whole, ops.selective_scan(*one[0], **one[1]), strict=True):
        assert torch.equal(a[2:], b)


def test_powers_of_two_without_the_special_function_unit(emu: Emulator) -> None:
    """The errors that csrc/cuda/exp2.cuh states for degrees 3, 4, 5: relative, against float64."""
    x = torch.cat([torch.linspace(-126, 126, 3072), torch.linspace(-1, 1, 1019), torch.tensor([0.0, 128, -200, -1e38])])
    x = torch.cat([x, torch.tensor([math.nan])])
    found = emu.probe("powers_of_two", 4 * 4096, x).view(4, 4096)[1:].double()
    want = torch.exp2(x.double())
    for degree, got in zip((3, 4, 5), found, strict=True):
        error = (got / want - 1)[:-5].abs().max().item()
        print(f"degree {degree}: {error:.3g} = {error * 2**24:.3g} units of 2^-24")
        assert EXP2_ERROR[degree] / 2 < error <= EXP2_ERROR[degree]
        assert got[-5:].nan_to_num(nan=-1, posinf=math.inf).tolist() == [1, math.inf, 0, 0, -1]


def test_softplus_is_within_its_stated_error(emu: Emulator) -> None:
    """One step of A = 0, B = C = u = 1: y = softplus(delta). Units of 2^-24, and the rounding of y."""
    x = torch.cat([torch.linspace(-80, 30, 1021), torch.tensor([0.0, -math.inf, math.nan])])
    one = torch.ones(1, 1, 1024)
    y = ops.selective_scan(one, x.view(1, 1, -1), torch.zeros(1024, 1), one[..., :1], one[..., :1], delta_softplus=True,
                           layout="bld").flatten().double()  # fmt: skip
    want = torch.nn.functional.softplus(x.double(), threshold=1e3)
    error = (y / want - 1)[:-2].abs() * 2**24
    assert (error <= 7 + x[:-2].double().clamp(max=0).abs() * 4 / 3).all(), error.max()
    assert y[-2:].nan_to_num(nan=-1).tolist() == [0, -1]


def bits(args: Any, kwargs: Any) -> list[torch.Tensor]:
    (a, k), leaves = _check.with_leaves(SPECS["selective_scan"], args, kwargs)
    with torch.enable_grad():
        outputs = tensors_in(ops.selective_scan(*a, **k))
        grads = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(t) for t in outputs])
    return [t.detach() for t in (*outputs, *grads)]


@pytest.mark.parametrize("dtype", harness.STORED, ids=str)
def test_bits_do_not_depend_on_strides(emu: Emulator, dtype: torch.dtype) -> None:
    args, kwargs = call(D=36, L=40, N=8, dtype=dtype)

    def apart(t: Any) -> Any:
        """The same values in every second element of a larger tensor: no vectors, no contiguous axis."""
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
        wide[..., 0] = t
        return wide[..., 0]

    strided = tuple(map(apart, args)), {k: apart(v) for k, v in kwargs.items()}
    for a, b in zip(bits(args, kwargs), bits(*strided), strict=True):
        assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_its_batch(emu: Emulator) -> None:
    args, kwargs = call(B=3, D=36, L=70, N=16)
    whole = ops.selective_scan(*args, **kwargs)
    for b in range(3):
        one = ops.selective_scan(*SPECS["selective_scan"].take(b, args, kwargs)[0],
                                 **SPECS["selective_scan"].take(b, args, kwargs)[1])  # fmt: skip
        for a, c in zip(whole, one, strict=True):
            assert torch.equal(a[b : b + 1], c)


def test_an_order_out_of_range_stays_inside_the_tensors(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody looks at the values before the kernel does: positions outside go to the nearest end."""
    monkeypatch.setattr(page, "_check_permutations", lambda *a: None)
    args, kwargs = call(B=1, D=3, L=6, N=4, everything=False)
    wild, tame = torch.tensor([0, 1, 2, 3, 4, 2**62]), torch.arange(6)
    out = ops.selective_scan(*args, **kwargs, order=wild)
    assert torch.equal(out, ops.selective_scan(*args, **kwargs, order=tame))
    out = ops.selective_scan(*args, **kwargs, order=torch.tensor([-(2**62), 1, 2, 3, 4, 5]))
    assert torch.equal(out, ops.selective_scan(*args, **kwargs, order=tame))


def test_what_the_kernels_cannot_hold_runs_on_the_reference(emu: Emulator) -> None:
    assert emu.kernels.scan_cuda_states == page.MAX_STATES_CUDA
    for N, is_complex in ((129, False), (65, True)):
        args, kwargs = call(B=1, D=2, L=2, N=N, is_complex=is_complex, everything=False)
        with use_backend("native"), pytest.raises(RuntimeError, match="native on CUDA: up to 128"):
            ops.selective_scan(*args, **kwargs)
        expected = page.selective_scan_reference(*args, **kwargs)
        assert torch.equal(ops.selective_scan(*args, **kwargs), expected)
    assert _native.backend == "auto"
