"""Attention on Hopper's own instructions (csrc/cuda/attention_sm90.cu), run by csrc/emu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emu import harness
from emu.harness import Emulator

import fastdiff
from fastdiff.cli import _check
from fastdiff.ops import SPECS
from fastdiff.ops.attention import attention, attention_qkvpacked

SEEDS = range(1 if harness.SANITIZE else 3)
PAIR = [torch.float16, torch.bfloat16]


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    built.hopper(True)
    with built.operators():
        yield built
    built.reset()


def draw(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def served(emu: Emulator) -> bool:
    return "attention_sm90" in emu.last_kernel()


def forward(emu: Emulator, name: str, *args: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """The operator's result, which agrees with float64 and came from the kernel under test."""
    found = _check.check(_check.expect(SPECS[name], args, kwargs, gradients=False))
    assert not found.failures, found.failures
    assert served(emu)
    with torch.no_grad():
        return SPECS[name].function(*args, **kwargs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", PAIR, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "N", "M", "d"),
    [(1, 1, 1, 1, 72), (2, 2, 64, 64, 64), (1, 2, 127, 129, 72), (2, 1, 129, 255, 128), (1, 1, 256, 256, 72),
     (1, 3, 300, 385, 64), (1, 1, 65, 640, 128), (3, 2, 8, 513, 72)],
)  # fmt: skip
def test_matches_float64(emu: Emulator, B: int, H: int, N: int, M: int, d: int, dtype: torch.dtype, seed: int) -> None:
    emu.seed(seed)
    emu.multiprocessors(1 + 2 * seed)  # a block with many items, blocks with one
    q, k, v = (draw(seed + i, B, H, n, d, dtype=dtype) for i, n in enumerate((N, M, M)))
    forward(emu, "attention", q, k, v)


@pytest.mark.parametrize("N", [40, 256, 300])
def test_packed_operands_are_read_in_place(emu: Emulator, N: int) -> None:
    forward(emu, "attention_qkvpacked", draw(1, 2, N, 3, 2, 72, dtype=torch.bfloat16))


def test_large_logits_and_rows_that_do_not_count(emu: Emulator) -> None:
    q, k, v = (draw(i, 1, 1, 200, 64, dtype=torch.bfloat16) for i in range(3))
    forward(emu, "attention", q, 100 * k, v, scale=2.0)
    k[0, 0, :130] = -k[0, 0, :130].abs() * 300  # the maximum comes in the second tile
    forward(emu, "attention", q.abs(), k, v)


def test_gradients_follow_from_its_statistics(emu: Emulator) -> None:
    q, k, v = (draw(i, 1, 2, 150, 72, dtype=torch.bfloat16) for i in range(3))
    found = _check.check(_check.expect(SPECS["attention"], (q, k, v), {}, gradients=True))
    assert not found.failures, found.failures


def test_bits_do_not_depend_on_the_schedule_the_grid_or_the_batch(emu: Emulator) -> None:
    q, k, v = (draw(i, 3, 2, 140, 72, dtype=torch.float16) for i in range(3))
    with torch.no_grad():
        first = attention(q, k, v)
        for seed in (1, 2):
            emu.seed(seed)
            emu.multiprocessors(seed * 5)
            assert torch.equal(first, attention(q, k, v))
        for b in range(3):
            assert torch.equal(first[b : b + 1], attention(q[b : b + 1], k[b : b + 1], v[b : b + 1]))


def test_what_it_cannot_serve_goes_the_other_way(emu: Emulator) -> None:
    q = draw(0, 1, 2, 40, 80, dtype=torch.bfloat16)
    odd = draw(0, 1, 40, 2, 73, dtype=torch.bfloat16)[..., 1:].transpose(1, 2)  # rows start anywhere
    packed = draw(0, 1, 40, 3, 2, 72, dtype=torch.bfloat16)
    with torch.no_grad():
        calls = [
            lambda: attention(q, q, q),
            lambda: attention(odd, odd, odd),
            lambda: attention(q[..., :72].float(), q[..., :72].float(), q[..., :72].float()),
            lambda: attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], layout="bnhd", scale=-1.0),
            lambda: attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], layout="bnhd", scale=0.0),
            lambda: attention_qkvpacked(packed, q_norm=torch.ones(72)),
        ]
        for call in calls:
            attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], layout="bnhd")
            assert served(emu)
            got = call()
            assert not served(emu)
            with fastdiff.use_backend("reference"):
                torch.testing.assert_close(got, call(), rtol=0.02, atol=0.02)
