"""What random calls miss of the CUDA sampler update: each vector width drawing noise, and counters beyond a table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emu.harness import Emulator
from test_philox import SHAPES, loop

from fastdiff.ops import ddim_step, euler_step, linear_update, philox_normal


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators():
        yield built
    built.reset()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 24), (2, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_draws_the_bits_of_the_reference(emu: Emulator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    zeros = torch.zeros(shape, dtype=dtype)
    pairs = torch.randint(-(1 << 62), 1 << 62, (shape[0], 2))
    for number, seed in enumerate((12345678901234, pairs[0, :1], pairs[0], pairs)):
        emu.seed(number)
        emu.grid_limit(1000 if number % 2 else 3)
        # sigma is 1: see test_philox.py
        got = ddim_step(zeros, zeros, 0.25, 0.5, eta=3**0.5, seed=seed)
        assert torch.equal(got, philox_normal(shape, seed, dtype=dtype))


@pytest.mark.parametrize("count", [1, 3, 5, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_update_of_any_length_draws(emu: Emulator, count: int, dtype: torch.dtype) -> None:
    for shape in ((3, 7), (2, 24)):  # elements by themselves, and whole vectors
        tensors, seed = [torch.randn(shape).to(dtype) for _ in range(count)], torch.tensor([3, 1])
        scale = torch.linspace(0.5, 2.0, shape[0])
        got = linear_update([0.5] * count, tensors, seed=seed, noise_scale=scale)
        want = linear_update([*[0.5] * count, scale], [*tensors, philox_normal(shape, seed)])
        # The same operations in the same order, but for what the compiler contracts: bits of the sum's terms.
        torch.testing.assert_close(got, want, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


def test_one_counter_walks_the_table_and_the_noise(emu: Emulator) -> None:
    x = torch.randn(3, 50)
    assert torch.equal(loop(x, fixed=False), loop(x, fixed=True))


@pytest.mark.parametrize("row", [-(1 << 62), -1, 0, 3, 4, 5, 1 << 62])
def test_a_counter_beyond_the_table_reads_its_first_or_last_row(emu: Emulator, row: int) -> None:
    around = torch.full((15, 3), float("nan"), dtype=torch.float64)
    around[5:10] = torch.rand(5, 3, dtype=torch.float64)
    x, step, last = torch.randn(3, 100), torch.tensor([row]), min(max(row, 0), 4)
    table = around[5:10]
    assert torch.equal(linear_update([table, 2.0], [x, x], step=step), linear_update([table[last], 2.0], [x, x]))
    assert torch.equal(linear_update(table[:, :2], [x, x], step=step), linear_update(table[last, :2].tolist(), [x, x]))
    assert torch.equal(euler_step(x, x, table[:, 1], step=step), euler_step(x, x, table[last, 1].item()))
