"""Noise by counter: the published vectors, the normal law, and the same bits from every kernel and from PyTorch."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastdiff
from fastdiff import _native
from fastdiff.ops import _philox, ddim_step, linear_update, philox_normal

ROOT = Path(__file__).resolve().parents[1]
ISAS = _native.isas()
needs_native = pytest.mark.skipif(_native.extension is None, reason="no native extension")
# sigma is 1 to the last bit, so that a step from zeros is the noise itself.
ALONE = {"eta": math.sqrt(3.0), "alpha_bar": 0.25, "alpha_bar_next": 0.5}


def drawn(shape: tuple[int, ...], seed: int | torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros(shape)
    with fastdiff.use_backend("native"):
        return ddim_step(zeros, zeros, seed=seed, **ALONE)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors, "philox4x32 10"
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    got = _philox.philox([torch.tensor(c) for c in counter], *(torch.tensor(k) for k in key))
    assert [int(w) for w in got] == words


def test_a_word_becomes_the_quantile_it_stands_for() -> None:
    edges = torch.arange(32).exp2().long()
    words = torch.cat([torch.randint(0, 1 << 32, (100_000,)) >> shift for shift in range(0, 32, 4)])
    words = torch.cat([words, edges, edges - 1, edges + (1 << 31), torch.tensor([(1 << 32) - 1])]) & 0xFFFFFFFF
    p = (2.0 * (words & 0x7FFFFFFF).double() + 1) * 2.0**-33
    want = torch.where(words >> 31 > 0, 1.0, -1.0) * torch.special.ndtri(p)
    got = _philox.normal(words).double()
    # The cubic's 2e-8, and float32's own rounding.
    assert ((got - want).abs() <= 2e-8 + 2.0**-24 * want.abs()).all()
    assert got.abs().max() < 6.35


def test_the_noise_is_normal_and_neither_words_nor_samples_are_correlated() -> None:
    B, n = 4, 1 << 20
    z = philox_normal((B, n), 20260101).double()
    count = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(count)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs(z.pow(3).mean()) < 5 * math.sqrt(15 / count)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    ordered = torch.special.ndtr(z.flatten().sort().values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov at 0.1 %
    words = z.reshape(-1, 4)
    for rows in (z, words.T):
        off = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
        assert off.abs().max() < 5 / math.sqrt(rows.shape[1])
    for lag in (1, 4, 1024):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 5 / math.sqrt(count)
    other = philox_normal((B, n), torch.tensor([20260101, 1])).double()
    assert abs((z * other).mean()) < 5 / math.sqrt(count)


SHAPES = [(1,), (3,), (2, 5), (3, 1030), (2, 4, 33, 33), (1, 20_000), (5, 17_001)]


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_draws_the_bits_of_the_reference(shape: tuple[int, ...], isa: str) -> None:
    pairs = torch.randint(-(1 << 63), (1 << 63) - 1, (shape[0], 2))
    with _native.use_isa(isa):
        for seed in (0, -1, (1 << 63) - 1, -(1 << 63), pairs[0, :1], pairs[0], pairs):
            assert torch.equal(drawn(shape, seed), philox_normal(shape, seed))


@needs_native
def test_a_sample_alone_draws_what_it_draws_in_a_batch() -> None:
    whole = philox_normal((5, 999), 7)
    assert torch.equal(philox_normal((2, 999), 7), whole[:2])
    assert torch.equal(philox_normal((5, 400), 7), whole[:, :400])
    assert not torch.equal(whole[0], whole[1])
    pairs = torch.tensor([[7, 0], [8, 0], [7, 1]])
    own = philox_normal((3, 999), pairs)
    assert torch.equal(own[0], whole[0])
    for b in range(3):
        assert torch.equal(drawn((1, 999), pairs[b : b + 1]), own[b : b + 1])
    assert len({tuple(row[:4].tolist()) for row in own}) == 3


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_step_that_draws_has_the_bits_of_one_that_is_given_the_noise(isa: str, dtype: torch.dtype) -> None:
    x, pred, uncond = (torch.randn(3, 2, 33, 41).to(dtype) for _ in range(3))
    for options in ({}, {"clip_sample": 0.5}, {"uncond": uncond, "guidance_scale": 3.0}, {"prediction": "sample"}):
        common = {"eta": 1.0, **options}
        with _native.use_isa(isa), fastdiff.use_backend("native"):
            got = ddim_step(x, pred, 0.3, 0.6, seed=5, **common)
            want = ddim_step(x, pred, 0.3, 0.6, noise=philox_normal(x.shape, 5), **common)
            assert torch.equal(got, want)
            out = x.clone()
            assert torch.equal(ddim_step(out, pred, 0.3, 0.6, seed=5, **common, out=out), want)
            # Memory in another order: the noise belongs to the element, not to its place.
            last = x.contiguous(memory_format=torch.channels_last)
            assert torch.equal(ddim_step(last, pred, 0.3, 0.6, seed=5, **common), want)
            out = torch.empty_like(last)
            assert torch.equal(ddim_step(last, pred, 0.3, 0.6, seed=5, **common, out=out), want)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_linear_update_that_draws_has_the_bits_of_one_that_is_given_the_noise(isa: str, dtype: torch.dtype) -> None:
    seed = torch.tensor([5, 3])
    z = philox_normal((3, 2, 33, 41), seed)
    for count in (1, 2, 3, 4, 5, 7, 8, 11):
        tensors = [torch.randn(3, 2, 33, 41).to(dtype) for _ in range(count)]
        coefficients = [0.5 - 0.1 * i for i in range(count)]
        with _native.use_isa(isa), fastdiff.use_backend("native"):
            for scale in (0.7, torch.tensor([0.7, -2.0, 0.0], dtype=torch.float64)):
                got = linear_update(coefficients, tensors, seed=seed, noise_scale=scale)
                # float32 alone: whatever is narrower is rounded after the noise was added.
                want = linear_update([*coefficients, scale], [*tensors, z])
                assert torch.equal(got, want)
                out = tensors[-1].clone()
                inside = [*tensors[:-1], out]
                assert torch.equal(linear_update(coefficients, inside, seed=seed, noise_scale=scale, out=out), want)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_scale_of_drawn_noise_is_a_coefficient_like_others(backend: str) -> None:
    if backend == "native" and _native.extension is None:
        pytest.skip("no native extension")
    x, z = torch.randn(3, 50, requires_grad=True), philox_normal((3, 50), -9)
    with fastdiff.use_backend(backend):
        got = linear_update([2.0], [x], seed=-9)
        torch.testing.assert_close(got, 2 * x + z)
        assert torch.autograd.grad(got.sum(), x)[0].eq(2).all()
        # A table of its own, and one beside tables of coefficients.
        scale, step = torch.rand(4, 3, dtype=torch.float64), torch.tensor([2])
        want = 2 * x + scale[2, :, None].float() * z
        torch.testing.assert_close(linear_update([2.0], [x], seed=-9, noise_scale=scale, step=step), want)
        table = torch.full((4, 1), 2.0)
        torch.testing.assert_close(linear_update(table, [x], seed=-9, noise_scale=scale, step=step), want)
    learned = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (slope,) = torch.autograd.grad(linear_update([2.0], [x], seed=-9, noise_scale=learned).sum(), learned)
    torch.testing.assert_close(slope, z.sum(1))
    got = linear_update([2.0], [x.detach().double()], seed=-9, noise_scale=0.1)
    assert torch.equal(got, 2 * x.detach().double() + 0.1 * z.double())


def test_a_seed_is_ignored_without_noise_and_checked_all_the_same() -> None:
    x = torch.randn(2, 9)
    assert torch.equal(ddim_step(x, x, 0.3, 0.6, seed=3), ddim_step(x, x, 0.3, 0.6))
    with pytest.raises(ValueError, match="ddim_step: seed: expected"):
        ddim_step(x, x, 0.3, 0.6, seed=torch.zeros(5, dtype=torch.int64))


def test_what_philox_normal_refuses() -> None:
    for seed, kind in (("1", TypeError), (1 << 63, ValueError), (torch.zeros(2, 3, dtype=torch.int64), ValueError)):
        with pytest.raises(kind, match="philox_normal: seed: expected"):
            philox_normal((2, 3), seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most"):
        philox_normal((1, (1 << 34) + 1), 0)
    assert philox_normal((0, 4), 1).shape == (0, 4)
    assert philox_normal((2, 0), 1).shape == (2, 0)
    assert philox_normal((), 1).shape == ()
    assert philox_normal((2, 3), 1, dtype=torch.float16).dtype == torch.float16


def test_both_tables_are_what_their_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "csrc/common/normal_table.py"))
    want = torch.tensor(script["table"]())
    header = (ROOT / "csrc/common/normal_table.h").read_text()
    numbers = [int(n) for line in header.splitlines() if line.startswith("{") for n in re.findall(r"-?\d+", line)]
    shipped = _philox._table(torch.device("cpu")).long()
    assert torch.equal(torch.tensor(numbers).reshape(512, 4), shipped)
    assert (shipped - want).abs().max() <= 1  # another machine's logarithm


def loop(x: torch.Tensor, fixed: bool) -> torch.Tensor:
    """Five steps, the coefficients from tables or as numbers."""
    levels = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.8, 0.99], dtype=torch.float64)
    seed = torch.tensor([99, 0])
    step = seed[1:]
    x = x.clone()
    for i in range(5):
        if fixed:
            noise = torch.tensor([99, i])
            x = ddim_step(x, 0.1 * x, levels[i].item(), levels[i + 1].item(), eta=0.7, seed=noise)
        else:
            ddim_step(x, 0.1 * x, levels[:-1], levels[1:], eta=0.7, seed=seed, step=step, out=x)
            step += 1
    return x


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_counter_walks_the_table_and_the_noise(backend: str) -> None:
    if backend == "native" and _native.extension is None:
        pytest.skip("no native extension")
    x = torch.randn(3, 50)
    with fastdiff.use_backend(backend):
        assert torch.equal(loop(x, fixed=False), loop(x, fixed=True))


@needs_native
@pytest.mark.parametrize("row", [-(1 << 62), -1, 0, 3, 4, 5, 1 << 62])
def test_a_counter_beyond_the_table_reads_its_first_or_last_row(row: int) -> None:
    # The table is the middle of a tensor of NaN: what is read outside shows.
    around = torch.full((15, 3), float("nan"), dtype=torch.float64)
    around[5:10] = torch.rand(5, 3, dtype=torch.float64)
    x = torch.randn(3, 100)
    with fastdiff.use_backend("native"):
        got = linear_update([around[5:10], 2.0], [x, x], step=torch.tensor([row]))
        want = linear_update([around[5 + min(max(row, 0), 4)], 2.0], [x, x])
    assert torch.equal(got, want)


def test_a_seed_may_have_any_strides() -> None:
    x = torch.zeros(4, 3)
    wide = torch.tensor([[1, 0, 9], [2, 0, 9], [3, 0, 9], [4, 5, 9]])
    seeds = [wide[:, :2], wide[:, :2].t().contiguous().t(), torch.tensor([[7, 0]]).expand(4, 2),
             torch.tensor([7, 99, 3, 99])[::2], wide[:1, 0]]  # fmt: skip
    for seed in seeds:
        got = ddim_step(x, x, 0.5, 0.7, eta=1.0, seed=seed)
        assert torch.equal(
            got, ddim_step(x, x, 0.5, 0.7, eta=1.0, seed=seed.clone(memory_format=torch.contiguous_format))
        )
        with fastdiff.use_backend("reference"):
            torch.testing.assert_close(got, ddim_step(x, x, 0.5, 0.7, eta=1.0, seed=seed), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, -1), (2, 1.5), 3, "ab"])
def test_a_bad_shape_is_named(shape: object) -> None:
    with pytest.raises((TypeError, ValueError), match="philox_normal: shape: expected"):
        philox_normal(shape, 1)  # type: ignore[arg-type]


def test_a_seed_of_numpy() -> None:
    assert torch.equal(philox_normal((2, 5), np.int64(-3)), philox_normal((2, 5), -3))


def noisy(x: torch.Tensor, seed: int | torch.Tensor, level: float | torch.Tensor = 0.3) -> torch.Tensor:
    return ddim_step(x, 0.5 * x, level, 0.6, eta=1.0, seed=seed)


@pytest.mark.parametrize(
    ("case", "seed"),
    [("alone", 7), ("float64", torch.tensor([[7, 0], [8, 1], [9, 2]])), ("learned", torch.tensor([7, 3])),
     ("reference", torch.tensor([7]))],
)  # fmt: skip
def test_compiled_noise_of_the_reference_has_its_bits(case: str, seed: int | torch.Tensor) -> None:
    """Wherever PyTorch draws: `philox_normal`, types and coefficients that the kernels do not serve."""
    torch.compiler.reset()
    x = torch.randn(3, 50, dtype=torch.float64 if case == "float64" else torch.float32)
    level = torch.tensor(0.3, requires_grad=case == "learned")

    def run(x: torch.Tensor, seed: int | torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return philox_normal(x.shape, seed) if case == "alone" else noisy(x, seed, level)

    with fastdiff.use_backend("reference" if case == "reference" else "auto"):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        got, want = compiled(x, seed, level), run(x, seed, level)
    assert torch.equal(got, want)
    if case == "learned":
        (slope,) = torch.autograd.grad(got.sum(), level)
        (expected,) = torch.autograd.grad(want.sum(), level)
        torch.testing.assert_close(slope, expected)


def test_noise_without_memory_has_a_shape_and_a_type() -> None:
    for shape in ((3, 5), (2, 0), (0, 4), ()):
        for seed in (1, torch.zeros(2, dtype=torch.int64, device="meta")):
            z = philox_normal(shape, seed, device="meta", dtype=torch.bfloat16)
            assert (z.shape, z.dtype, z.device.type) == (shape, torch.bfloat16, "meta")
    with FakeTensorMode():
        z = philox_normal((3, 5), 1)
        assert (z.shape, z.dtype, z.device.type) == ((3, 5), torch.float32, "cpu")
        assert noisy(torch.empty(3, 5, dtype=torch.float64), 1).shape == (3, 5)


def test_compiled_noise_of_any_shape_is_compiled_once() -> None:
    compiled = torch.compile(lambda s, n: philox_normal((2, n), s), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        assert torch.equal(compiled(torch.tensor([3]), n), philox_normal((2, n), 3))
