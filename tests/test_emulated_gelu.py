"""The CUDA kernel of GELU under csrc/emu: sizes around vectors and tiles, every alignment, the range's ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from emu.harness import Emulator

import fastdiff
from fastdiff.ops import gelu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators(), fastdiff.use_backend("native"):
        yield built
    built.reset()


def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = gelu(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_and_tiles(emu: Emulator, dtype: torch.dtype) -> None:
    for n in (1, 3, 4, 5, 7, 8, 9, 1023, 1025, 2047, 4096, 4100, 8191, 8193):
        x = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 3).to(dtype)
        wide = x.double().requires_grad_()
        want = F.gelu(wide, approximate="tanh")
        (slope,) = torch.autograd.grad(want.sum(), wide)
        got, grad = both(x)
        # Eight roundings of |x|, or of 1 + x 2 u' (1 - s is rounded to units of s), and one of the result.
        unit, size = 2.0**-21, x.double().abs()
        eps = torch.finfo(dtype).eps
        assert ((got.double() - want).abs() <= unit * (1e-6 + size) + eps * want.abs()).all()
        assert ((grad.double() - slope).abs() <= unit * (1 + size * (1.6 + 0.22 * size**2)) + eps * slope.abs()).all()
        shifted = torch.cat([x[:1], x])[1:]  # not aligned to 16 bytes: element by element, to the same bits
        assert all(torch.equal(a, b) for a, b in zip(both(shifted), (got, grad), strict=True))
        assert torch.equal(gelu(x.clone(), out=x), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_of_the_range(emu: Emulator, dtype: torch.dtype) -> None:
    largest, infinity = torch.finfo(dtype).max, float("inf")
    x = torch.tensor([infinity, largest, 200.0, 20.0, 0.0, -20.0, -200.0, -largest, float("nan")], dtype=dtype)
    got, grad = both(x)
    assert torch.equal(got[:4], x[:4])
    assert torch.equal(grad[1:4], torch.ones(3, dtype=dtype))
    assert torch.equal(got[4:8].abs(), torch.zeros(4, dtype=dtype))
    assert torch.equal(grad[5:8].abs(), torch.zeros(3, dtype=dtype))
    assert got[8].isnan()
    assert grad[8].isnan()
