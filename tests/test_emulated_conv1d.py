"""The causal convolution's CUDA kernels under csrc/emu: what the random calls of test_emulated_ops.py may miss.

Every number of taps with code of its own, tiles just filled and just not, each way an operand comes in; the same bits
from both layouts, any strides and any batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emu import harness
from emu.harness import Emulator

from fastdiff import ops, use_backend
from fastdiff.cli import _check
from fastdiff.ops import SPECS
from fastdiff.ops._registry import tensors_in

page = importlib.import_module("fastdiff.ops.causal_conv1d")  # the package has a function of that name


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators():
        yield built
    built.reset()


def call(
    B: int = 2, D: int = 5, L: int = 9, K: int = 4, layout: str = "bld", dtype: torch.dtype = torch.float32,
    state: bool = True, activation: str | None = "silu",
) -> Any:  # fmt: skip
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    x = randn(B, L, D).transpose(1, 2) if layout == "bld" else randn(B, D, L)
    head = {"initial_state": randn(B, D, K - 1)} if state and K > 1 else {}
    x = x.transpose(1, 2) if layout == "bld" else x
    return (x, randn(D, K), randn(D), activation), {"layout": layout, **head}


def check(args: Any, kwargs: Any) -> None:
    with use_backend("native"):
        finding = _check.check(_check.expect(SPECS["causal_conv1d"], args, kwargs, gradients=True, seed=1))
    assert not finding.failures, (_check.describe(args, kwargs), finding.failures)


@pytest.mark.parametrize("layout", page.LAYOUTS)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 30])
def test_taps(emu: Emulator, K: int, layout: str) -> None:
    for activation in (None, "silu"):
        check(*call(L=67, K=K, layout=layout, activation=activation))


@pytest.mark.parametrize("layout", page.LAYOUTS)
def test_more_taps_than_a_tile_has_steps(emu: Emulator, layout: str) -> None:
    check(*call(B=1, D=3, L=140, K=128, layout=layout))
    check(*call(B=1, D=3, L=2, K=128, layout=layout))


@pytest.mark.parametrize("layout", page.LAYOUTS)
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 128, 300])
def test_steps(emu: Emulator, L: int, layout: str) -> None:
    check(*call(L=L, layout=layout))
    check(*call(L=L, layout=layout, state=False))


@pytest.mark.parametrize("dtype", harness.STORED, ids=str)
@pytest.mark.parametrize("layout", page.LAYOUTS)
@pytest.mark.parametrize("D", [4, 31, 32, 33, 68])
def test_channels(emu: Emulator, D: int, layout: str, dtype: torch.dtype) -> None:
    check(*call(B=1, D=D, L=20, layout=layout, dtype=dtype))


def bits(args: Any, kwargs: Any) -> list[torch.Tensor]:
    (a, k), leaves = _check.with_leaves(SPECS["causal_conv1d"], args, kwargs)
    with torch.enable_grad():
        outputs = tensors_in(ops.causal_conv1d(*a, **k))
        grads = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(t) for t in outputs])
    return [t.detach() for t in (*outputs, *grads)]


@pytest.mark.parametrize("K", [4, 6])
def test_bits_do_not_depend_on_layout_or_strides(emu: Emulator, K: int) -> None:
    args, kwargs = call(D=36, L=70, K=K)
    first = bits(args, kwargs)
    x = args[0].transpose(1, 2).contiguous()
    other = bits((x, *args[1:]), {**kwargs, "layout": "bdl"})
    wide = torch.full((*args[0].shape, 2), float("nan"))
    wide[..., 0] = args[0]
    strided = bits((wide[..., 0], *args[1:]), kwargs)
    for i, (a, b, c) in enumerate(zip(first, other, strided, strict=True)):
        assert torch.equal(a, b.transpose(1, 2) if i < 2 else b)  # the result and the gradient of x
        assert torch.equal(a, c)


def test_a_sample_does_not_depend_on_its_batch(emu: Emulator) -> None:
    args, kwargs = call(B=3, D=36, L=70)
    whole = ops.causal_conv1d(*args, **kwargs)
    for b in range(3):
        one_args, one_kwargs = SPECS["causal_conv1d"].take(b, args, kwargs)
        assert torch.equal(whole[b : b + 1], ops.causal_conv1d(*one_args, **one_kwargs))


def test_an_infinity_stays_where_it_is_seen(emu: Emulator) -> None:
    args, kwargs = call(B=1, D=2, L=64, activation=None, state=False)
    args[0][0, 63, 0] = float("inf")
    dweight = bits(args, kwargs)[2]
    assert torch.equal(dweight.isfinite(), torch.tensor([[True, True, True, False], [True] * 4]))


def test_more_taps_than_the_kernels_take_run_on_the_reference(emu: Emulator) -> None:
    assert (emu.kernels.conv_cuda_taps, emu.kernels.conv_cuda_steps) == (page.MAX_TAPS_CUDA, page._STEPS_CUDA)
    args, kwargs = call(B=1, D=2, L=3, K=129)
    with use_backend("native"), pytest.raises(RuntimeError, match="native on CUDA: up to 128"):
        ops.causal_conv1d(*args, **kwargs)
    assert torch.equal(ops.causal_conv1d(*args, **kwargs), page.causal_conv1d_reference(*args, **kwargs))
