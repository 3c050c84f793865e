"""Attention on Hopper's own instructions (csrc/cuda/attention_sm90.cu, attention_short_sm90.cu), run by csrc/emu."""

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


def kernel(emu: Emulator) -> str:
    """Which of the kernels ran last: up to 128 keys, up to 256, any number, or none of Hopper's."""
    name = emu.last_kernel()
    return name if "attention_short" in name or "attention_sm90" in name else ""


def served(emu: Emulator) -> bool:
    return kernel(emu) != ""


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
    [(1, 1, 127, 257, 72), (1, 1, 129, 255, 128), (1, 1, 140, 385, 64), (1, 1, 65, 640, 128), (1, 3, 8, 300, 72)],
)  # fmt: skip
def test_matches_float64(emu: Emulator, B: int, H: int, N: int, M: int, d: int, dtype: torch.dtype, seed: int) -> None:
    emu.seed(seed)
    emu.multiprocessors(1 + 2 * seed)  # a block with many items, blocks with one
    q, k, v = (draw(seed + i, B, H, n, d, dtype=dtype) for i, n in enumerate((N, M, M)))
    forward(emu, "attention", q, k, v)
    assert "attention_sm90" in kernel(emu)


@pytest.mark.parametrize("dtype", PAIR, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "N", "M", "d", "blocks"),
    [(1, 1, 1, 1, 72, 1), (2, 3, 64, 64, 64, 2), (1, 2, 65, 77, 72, 1), (3, 1, 130, 128, 128, 1),
     (1, 2, 200, 129, 64, 1), (2, 2, 8, 200, 72, 1), (1, 1, 256, 256, 72, 3), (1, 1, 513, 17, 72, 4)],
)  # fmt: skip
def test_short_rows_match_float64(
    emu: Emulator, B: int, H: int, N: int, M: int, d: int, blocks: int, dtype: torch.dtype
) -> None:
    """Heads of one tile of 64 queries, of an odd number, cut into several items; rows of one and of two halves."""
    emu.seed(N)
    emu.multiprocessors(blocks)
    q, k, v = (draw(N + i, B, H, n, d, dtype=dtype) for i, n in enumerate((N, M, M)))
    forward(emu, "attention", q, k, v)
    assert "attention_short" in kernel(emu)


def test_the_kernel_depends_on_the_keys_the_head_dim_and_the_type(emu: Emulator) -> None:
    """Not on the batch, the heads, the queries, nor on whether a sample is a slice of a batch; nor do the bits."""
    for d, M, name in ((72, 65, "attention_short"), (64, 200, "attention_short"), (72, 257, "attention_sm90")):
        q, k, v = (draw(i, 2, 2, n, d, dtype=torch.bfloat16) for i, n in enumerate((70, M, M)))
        with torch.no_grad():
            want = attention(q, k, v)
            assert name in kernel(emu), (d, M)
            for B, H, N, blocks in ((1, 1, 70, 1), (2, 1, 1, 3), (1, 2, 64, 132)):
                emu.seed(blocks)
                emu.multiprocessors(blocks)
                got = attention(q[:B, :H, :N], k[:B, :H], v[:B, :H])
                assert name in kernel(emu), (d, M, B, H, N)
                assert torch.equal(got, want[:B, :H, :N]), (d, M, B, H, N)
    for M, name in ((128, "attention_short"), (129, "attention_sm90")):
        with torch.no_grad():
            attention(draw(0, 1, 1, 1, 128, dtype=torch.half), *draw(1, 2, 1, 1, M, 128, dtype=torch.half))
        assert name in kernel(emu)


@pytest.mark.parametrize("M", [70, 300])
def test_keys_that_samples_or_heads_share(emu: Emulator, M: int) -> None:
    q, k, v = (draw(i, 2, 2, n, 72, dtype=torch.float16) for i, n in enumerate((20, M, M)))
    with torch.no_grad():
        for one, all_v in ((k[:1].expand_as(k), v), (k[:, 1:].expand(2, 2, M, 72), v[1:, :1].expand_as(k))):
            got = attention(q, one, all_v)
            assert served(emu)
            assert torch.equal(got, attention(q, one.contiguous(), all_v.contiguous()))


@pytest.mark.parametrize("N", [40, 200, 300])
def test_packed_operands_are_read_in_place(emu: Emulator, N: int) -> None:
    forward(emu, "attention_qkvpacked", draw(1, 2, N, 3, 2, 72, dtype=torch.bfloat16))


def test_large_logits_and_rows_that_do_not_count(emu: Emulator) -> None:
    for M in (200, 300):
        q, k, v = (draw(i, 1, 1, n, 64, dtype=torch.bfloat16) for i, n in enumerate((70, M, M)))
        forward(emu, "attention", q, 100 * k, v, scale=2.0)
        k[0, 0, :130] = -k[0, 0, :130].abs() * 300  # the maximum comes in the second tile
        forward(emu, "attention", q.abs(), k, v)


@pytest.mark.parametrize("M", [250, 512])
def test_small_weights_keep_their_bits(emu: Emulator, M: int) -> None:
    """One key has nearly all the weight and a value of 0: the others, each at 1.5 * 2^-24, make the result."""
    q, k, v = (torch.zeros(1, 1, n, 64, dtype=torch.float16) for n in (8, M, M))
    q[..., 0], k[..., 1:, 0], v[..., 1:, :] = 8, -2, 1
    with torch.no_grad():
        found = attention(q, k, v, scale=16.06 / 16)
        want = attention(*(t.double() for t in (q, k, v)), scale=16.06 / 16)
    assert served(emu)
    torch.testing.assert_close(found.double(), want, rtol=2e-2, atol=0)


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
