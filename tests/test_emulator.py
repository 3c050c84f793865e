"""The CUDA kernels, run on the CPU by csrc/emu: right at every shape, layout and type, the same bits in every schedule.

`tests/emu/run_sanitized.sh` runs this file under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from emu import harness, mistakes
from emu.harness import CHUNK, LAYOUTS, MODULATION, PREDICTIONS, STORED, Adaln, Ddim, Emulator, make_adaln

SEEDS = range(2 if harness.SANITIZE else 4)  # a sanitizer does not look at bits
BATCHES = 5 if harness.SANITIZE else 12  # random cases are grouped, so that a failure names its seed
CASES = 12  # per group


@pytest.fixture(scope="session")
def built() -> Emulator:
    reason = harness.why_not()
    if reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")
    return harness.build()


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    yield built
    built.reset()


def random_adaln(rng: random.Random, backward: bool) -> Adaln:
    sizes = [1, 2, 7, 8, 31, 33, 64, 100, 129, 256, 264, 771, 1152, 1153, 1281, 2056, 3073]
    D = rng.choice(sizes if rng.random() < 0.9 else [4104, 8192, 8200, 9001])
    tokens = [1, 2, 3, 15, 16, 17, 40] if D < 300 and backward else [1, 2, 5, 17] if D < 1300 else [1, 2]
    normed = rng.random() < 0.85
    gated = rng.random() < 0.5 or not normed
    dtype = rng.choice(STORED)
    return make_adaln(
        rng.choice([1, 2, 3]), rng.choice(tokens), D, dtype=dtype, gated=gated, normed=normed,
        layout=rng.choice(LAYOUTS) if rng.random() < 0.5 else "packed", kind=rng.choice(MODULATION),
        mod_dtype=dtype if rng.random() < 0.6 else rng.choice(STORED),
        branch_dtype=dtype if rng.random() < 0.7 else rng.choice(STORED),
        affine=rng.choice(["", "", "w", "b", "wb"]), rms=rng.random() < 0.4,
        residual_grad=rng.random() < 0.6, seed=rng.randrange(1 << 30),
    )  # fmt: skip


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same bits (no output is NaN once it is written)."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def both(emu: Emulator, c: Adaln, check: bool = False) -> dict[str, torch.Tensor]:
    """Every output of forward and backward."""
    return harness.adaln_forward(emu, c, check) | harness.adaln_backward(emu, c, check)


# ------------------------------------------------------------------------------------------------------------- adaln


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("D", [1, 8, 256, 768, 1152, 1280, 3072, 8192, 8193, 9216])
def test_forward_takes_every_row_length(emu: Emulator, D: int, dtype: torch.dtype) -> None:
    harness.adaln_forward(emu, make_adaln(2, 3, D, dtype=dtype, gated=True, affine="wb"))
    harness.adaln_forward(emu, make_adaln(1, 5, D, dtype=dtype, kind="token", rms=True))


@pytest.mark.parametrize("group", range(BATCHES))
def test_forward_matches_float64(emu: Emulator, group: int) -> None:
    rng = random.Random(group)
    for _ in range(CASES):
        emu.seed(rng.randrange(1 << 30))
        harness.adaln_forward(emu, random_adaln(rng, backward=False))


@pytest.mark.parametrize("group", range(BATCHES))
def test_backward_matches_float64(emu: Emulator, group: int) -> None:
    rng = random.Random(100 + group)
    for _ in range(CASES):
        emu.seed(rng.randrange(1 << 30))
        harness.adaln_backward(emu, random_adaln(rng, backward=True), grad_dtype=rng.choice([None, torch.float32]))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("D", "gated"), [(40, True), (296, False), (1152, True), (1152, False)])
def test_the_norm_sites_of_a_transformer(emu: Emulator, D: int, gated: bool, dtype: torch.dtype) -> None:
    """One type, no weight or bias, modulation per sample or shared: kernels of their own, and two of them forward, one
    for few rows and one for many, that give the same bits."""
    for N, kind in ((1, "sample"), (11, "sample-packed"), (CHUNK + 2, "table")):
        c = make_adaln(2, N, D, dtype=dtype, gated=gated, kind=kind, residual_grad=gated and N != 11, rms=N == 11)
        found = []
        for processors in (1000, 1):
            emu.multiprocessors(processors)
            found.append(harness.adaln_forward(emu, c))
            assert emu.last_kernel().endswith("true>)") == (D <= 1280 and (processors > 1 or N == 1)), emu.last_kernel()
        assert identical(*found)
        harness.adaln_backward(emu, c)
    if gated:
        c.branch = None  # nobody wants the gate's gradient
        harness.adaln_backward(emu, c)


@pytest.mark.parametrize(
    ("N", "D", "dtype"), [(CHUNK + 3, 1152, torch.bfloat16), (CHUNK + 3, 297, torch.float16), (2, 4100, torch.float32)]
)
def test_adaln_bits_do_not_depend_on_the_schedule_or_the_grid(
    emu: Emulator, N: int, D: int, dtype: torch.dtype
) -> None:
    c = make_adaln(2, N, D, dtype=dtype, gated=True, affine="wb", kind="table")
    first = both(emu, c, check=True)
    for seed in SEEDS:
        emu.seed(seed)
        emu.grid_limit(1 + 2 * seed)  # few blocks, each with many rows
        assert identical(first, both(emu, c))
    emu.lockstep(True)
    assert identical(first, both(emu, c))


@pytest.mark.parametrize("D", [40, 1152, 1300])
def test_adaln_is_batch_invariant(emu: Emulator, D: int) -> None:
    c = make_adaln(3, CHUNK * 2 + 1, D, dtype=torch.bfloat16, gated=True, kind="sample")
    whole = both(emu, c)
    for b in range(c.B):
        alone = both(emu, c.sample(b))
        assert identical({k: v[b : b + 1] for k, v in whole.items()}, alone)


def test_backward_without_a_branch(emu: Emulator) -> None:
    """Nobody wants the gate's gradient, so the branch was not kept: only dx and dbranch are written."""
    for D in (64, 4104):
        c = make_adaln(2, 3, D, gated=True)
        c.branch = None
        assert set(harness.adaln_backward(emu, c)) == {"dx", "dbranch", "dshift", "dscale"}


def test_adaln_in_place(emu: Emulator) -> None:
    """The residual may overwrite x: every element is read before it is written, by the thread that writes it."""
    for D in (64, 1153, 2048, 8200):
        c = make_adaln(1, 3, D, gated=True)
        want = harness.adaln_forward(emu, c)
        y, stats = torch.empty_like(want["y"]), torch.empty(2, 3)
        emu.kernels.adaln_forward(
            0, 0, 1, 3, D, False, c.eps, *map(harness.operand, (c.x, c.branch, c.gate, c.shift, c.scale, None, None)),
            harness.operand(c.x), harness.operand(y), stats[0].data_ptr(), stats[1].data_ptr(),
        )  # fmt: skip
        assert torch.equal(c.x, want["residual"])
        assert torch.equal(y, want["y"])


@pytest.mark.parametrize(("B", "N", "D"), [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty_tensors_launch_nothing(emu: Emulator, B: int, N: int, D: int) -> None:
    before = emu.switches()
    c = make_adaln(B, N, D, gated=True, kind="token")
    harness.adaln_forward(emu, c, check=False)
    harness.adaln_backward(emu, c, check=False)
    harness.update(emu, Ddim([torch.empty(B, N * D)] * 2), torch.float32, check=False)
    assert emu.switches() == before


def test_gradients_of_no_tokens_are_zero(emu: Emulator) -> None:
    for kind in ("sample", "table"):
        got = harness.adaln_backward(emu, make_adaln(2, 0, 40, kind=kind), check=False)
        assert torch.equal(got["dshift"], torch.zeros_like(got["dshift"]))


# ------------------------------------------------------------------------------------------------------------ update


def random_update(rng: random.Random) -> Ddim:
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    B, M = rng.choice([(1, 1), (1, 4096), (1, 16387), (3, 7), (2, 264), (4, 1031), (70, 5)])
    dtype = rng.choice(STORED)

    def term() -> torch.Tensor:
        return torch.randn(B, M, generator=g).to(dtype if rng.random() < 0.7 else rng.choice(STORED))

    def number(low: float, high: float):
        values = low + (high - low) * torch.rand(B, generator=g, dtype=torch.float64)
        return rng.choice([float(values[0]), values, values.float()])

    if rng.random() < 0.4:
        count = rng.randint(1, 8)
        return Ddim([term() for _ in range(count)], [number(-2, 2) for _ in range(count)])
    d = Ddim([term(), term()], alpha_bar=number(0.1, 0.5), alpha_bar_next=number(0.55, 0.95))
    d.prediction, d.clip = rng.choice(PREDICTIONS), rng.choice([-1.0, 0.8])
    if rng.random() < 0.5:
        d.uncond, d.guidance = True, 2.5
        d.terms.append(term())
    if rng.random() < 0.5:
        d.noise, d.eta = True, 0.7
        d.terms.append(term())
    return d


@pytest.mark.parametrize("group", range(BATCHES))
def test_update_matches_float64(emu: Emulator, group: int) -> None:
    rng = random.Random(200 + group)
    for _ in range(CASES):
        emu.seed(rng.randrange(1 << 30))
        d = random_update(rng)
        same = [i for i, t in enumerate(d.terms) if t.dtype == d.terms[0].dtype]
        harness.update(emu, d, rng.choice(STORED), shifted=rng.random() < 0.3)
        harness.update(emu, d, d.terms[0].dtype, alias=rng.choice(same))
        grad = torch.randn(d.terms[0].shape, generator=torch.Generator().manual_seed(1)).to(rng.choice(STORED))
        harness.update_backward(emu, d, grad, skip=rng.choice([-1, 0]))


def test_update_bits_do_not_depend_on_the_schedule_the_grid_or_the_batch(emu: Emulator) -> None:
    g = torch.Generator().manual_seed(0)
    terms = [torch.randn(6, 1024, generator=g).bfloat16() for _ in range(3)]
    d = Ddim(terms, alpha_bar=torch.rand(6, generator=g) * 0.4 + 0.1, uncond=True, guidance=3.0, clip=0.9)
    first = harness.update(emu, d, torch.float32)
    for seed in SEEDS:
        emu.seed(seed)
        emu.grid_limit(1 + seed)
        assert torch.equal(first, harness.update(emu, d, torch.float32, check=False))
    for b in range(6):
        alone = replace(d, terms=[t[b : b + 1] for t in terms], alpha_bar=d.alpha_bar[b : b + 1])
        assert torch.equal(first[b : b + 1], harness.update(emu, alone, torch.float32, check=False))


# ------------------------------------------------------------------------------------------- mistakes must be noticed


def adaln_case(backward: bool, *shape: int, **options) -> Callable[[Emulator], object]:
    run = harness.adaln_backward if backward else harness.adaln_forward
    return lambda emu: run(emu, make_adaln(*shape, **options))


def update_case(emu: Emulator) -> object:
    g = torch.Generator().manual_seed(3)
    terms = [torch.randn(5, 1024, generator=g) for _ in range(2)]
    return harness.update(emu, Ddim(terms, [torch.randn(5, generator=g), 0.5]), torch.float32)


def update_tail_case(emu: Emulator) -> object:
    return harness.update(emu, Ddim([torch.ones(1, 1031)], [2.0]), torch.float32)


# Deliberate mistakes of csrc/cuda/mutate.cuh: a case that shows each, and the largest grid there. The others
# are in emu/mistakes.py, for test_emulated_ops.py.
MISTAKES: dict[str, tuple[Callable[[Emulator], object], int]] = {
    "kSumBarrier": (adaln_case(False, 2, 3, 1400), 1000),
    "kSumTurn": (adaln_case(False, 2, 3, 1400), 1000),
    "kShortShuffle": (adaln_case(False, 2, 3, 64), 1000),
    "kVarianceTail": (adaln_case(False, 2, 3, 100), 1000),
    "kUnbiased": (adaln_case(False, 2, 3, 1152), 1000),
    "kBatchIndex": (adaln_case(False, 2, 3, 64, kind="sample"), 1000),
    "kStride": (adaln_case(False, 2, 3, 64, layout="transposed"), 1000),
    "kStoreTail": (adaln_case(False, 2, 3, 33), 1000),
    "kUnroundedResidual": (adaln_case(False, 2, 8, 64, gated=True, dtype=torch.bfloat16), 1000),
    "kChunkEnd": (adaln_case(True, 1, CHUNK + 2, 64), 1000),
    "kPartBarrier": (adaln_case(True, 3, 2 * CHUNK, 64), 2),
    "kEarlyVector": (adaln_case(False, 1, 3, 300), 1000),
    "kPairBarrier": (adaln_case(True, 1, 3, 1152, residual_grad=False), 1000),
    "kPairTurn": (adaln_case(True, 1, 3, 1152, residual_grad=False), 1000),
    "kAheadTurn": (adaln_case(True, 1, 3, 64, dtype=torch.bfloat16, residual_grad=False), 1000),
    "kTermsBarrier": (update_case, 1000),
    "kTermsReuse": (update_case, 2),
    "kUpdateTail": (update_tail_case, 1000),
}


def noticed(emu: Emulator, mistake: str, seed: int) -> bool:
    case, grid = MISTAKES[mistake]
    emu.seed(seed)
    emu.grid_limit(grid)
    try:
        case(emu)
    except (AssertionError, RuntimeError):
        return True
    return False


def test_every_mistake_has_a_case(emu: Emulator) -> None:
    assert not set(MISTAKES) & set(mistakes.CASES)
    assert set(MISTAKES) | set(mistakes.CASES) == set(emu.mutations())


@pytest.mark.skipif(harness.SANITIZE != "", reason="a sanitizer would end the process at the first mistake")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(emu: Emulator, mistake: str) -> None:
    assert not noticed(emu, mistake, seed=0)
    emu.mutate(mistake)
    assert all(noticed(emu, mistake, seed) for seed in SEEDS)


@pytest.mark.skipif(harness.SANITIZE != "", reason="a sanitizer would end the process at the first mistake")
@pytest.mark.parametrize("mistake", ["kPartBarrier"])
def test_lockstep_order_would_miss_a_removed_barrier(emu: Emulator, mistake: str) -> None:
    emu.mutate(mistake)
    emu.lockstep(True)
    assert not noticed(emu, mistake, seed=0)
    emu.lockstep(False)
    assert noticed(emu, mistake, seed=0)


@pytest.mark.skipif("address" not in harness.SANITIZE, reason="needs AddressSanitizer (tests/emu/run_sanitized.sh)")
@pytest.mark.parametrize(
    "what",
    [
        "emu.probe('shared_overrun', 32)",
        "emu.probe('positions', 143)",
        "x = torch.randn(1, 2, 33); y = x.clone(); w = torch.randn(33).expand(1, 2, 33); s = torch.empty(2, 2);"
        "emu.mutate('kStoreTail');"
        "emu.kernels.adaln_forward(0, 0, 1, 2, 33, False, 1e-6, op(x), None, None, op(w), op(w), None, None, None,"
        " op(y), s.data_ptr(), s[1].data_ptr())",
    ],
    ids=["shared", "probe", "kernel"],
)
def test_an_overrun_ends_the_sanitized_run(emu: Emulator, what: str) -> None:
    code = f"import torch; from emu import harness; op = harness.operand; emu = harness.build(); {what}"
    options = os.environ.get("ASAN_OPTIONS", "") + ":symbolize=0"  # reading torch's symbols takes a minute
    environment = os.environ | {"PYTHONPATH": str(harness.ROOT / "tests"), "ASAN_OPTIONS": options}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


# --------------------------------------------------------------------------------------------- the emulator itself


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_run(emu: Emulator, seed: int) -> None:
    emu.seed(seed)
    assert torch.equal(emu.probe("reverse_in_block", 96)[:3], torch.zeros(3))
    assert torch.equal(emu.probe("positions", 144), torch.arange(144.0) % 24 + torch.arange(144.0) // 24 * 1000)
    assert emu.probe("unwritten_shared", 32).isnan().all()
    assert torch.equal(emu.probe("deep_stack", 1024), torch.zeros(1024))
    lane = torch.arange(64) % 32
    want = [(lane + 1) % 32, lane ^ 1, torch.where(lane < 29, lane + 3, lane), (lane - 1).clamp(min=0)]
    assert torch.equal(emu.probe("shuffles", 256).view(64, 4), torch.stack(want, 1).float())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("probe", "depth", "dtype"),
    [("product_bf16", 16, torch.bfloat16), ("product_f16", 16, torch.float16), ("product_tf32", 8, None)],
)
def test_tensor_core_products(emu: Emulator, probe: str, depth: int, dtype: torch.dtype | None, seed: int) -> None:
    emu.seed(seed)
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(16, depth, generator=g), torch.randn(depth, 8, generator=g)
    if dtype is None:  # what tf32 holds: 10 bits behind the point
        a, b = (((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in (a, b))
        got = emu.probe(probe, 192 + 128, torch.cat([a.flatten(), b.flatten()]))[192:]
    else:
        a, b = a.to(dtype).float(), b.to(dtype).float()
        got = emu.probe(probe, 384 + 128, torch.cat([a.flatten(), b.flatten()]))[384:]
    assert torch.equal(got.view(16, 8), (a.double() @ b.double()).float())


@pytest.mark.parametrize("seed", SEEDS)
def test_hopper_products_and_copies(emu: Emulator, seed: int) -> None:
    emu.seed(seed)
    g = torch.Generator().manual_seed(seed)
    k, p = torch.randn(40, 72, generator=g).bfloat16(), torch.randn(64, 16, generator=g).bfloat16()
    start = k.numel() + p.numel()
    data = emu.probe("hopper_products", start + 64 * (64 + 72), torch.cat([k.flatten(), p.flatten()]).float())
    k = torch.cat([k.double(), torch.zeros(24, 72)])
    scores, results = data[start:].split([64 * 64, 64 * 72])
    torch.testing.assert_close(scores.view(64, 64).double(), k @ k.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results.view(64, 72).double(), p.double() @ k[:16], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_see_each_other(emu: Emulator, seed: int) -> None:
    emu.seed(seed)
    block = torch.arange(8)
    other = block // 4 * 4 + (block + 1) % 4
    want = 100.0 * other[:, None] + torch.arange(32)
    assert torch.equal(emu.probe("around_the_cluster", 256), want.flatten())


def test_copies_arrive_when_they_are_waited_for(emu: Emulator) -> None:
    values = torch.randn(64)
    data = emu.probe("copies", 208, values)
    cut = torch.where((torch.arange(64) < 32) | (torch.arange(64) % 4 < 2), values, 0.0)
    assert data[64:128].isnan().all()
    assert torch.equal(data[128:192], cut)
    assert data[192:].isnan().all()  # the second group was not waited for


def test_votes(emu: Emulator) -> None:
    assert torch.equal(emu.probe("votes", 32), torch.full((32,), float(0b1001001001001001)))


def test_threads_run_in_a_seeded_random_order(emu: Emulator) -> None:
    def run(seed: int) -> torch.Tensor:
        emu.seed(seed)
        return emu.probe("racy_chain", 64).nan_to_num(nan=-1.0)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert (run(1) == -1.0).any()  # someone read before its neighbour had written
    emu.lockstep(True)
    assert not (run(1) == -1.0).any()


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("return_before_barrier", r"return_before_barrier, block \(0, 0, 0\).* 63 threads wait at the barrier"),
        ("return_before_barrier", "1 threads have returned"),
        ("different_barriers", "32 threads wait at the barrier"),
        ("absent_lane", "31 threads wait in a warp operation for lanes ffffffff"),
        ("unnamed_caller", "whose mask does not name it"),
        ("unnamed_source", "reads from one that the mask does not name"),
        ("shuffle_against_barrier", "16 threads wait at the barrier"),
        ("copy_not_waited_for", "copies in flight"),
        ("product_not_waited_for", "products in flight"),
        ("phase_that_never_ends", "32 threads wait for a phase"),
        ("barrier_of_too_few", "31 threads wait for a phase or named barrier"),
        ("half_a_cluster", "32 threads wait for the cluster"),
        ("uneven_clusters", "invalid configuration"),
        ("too_many_threads", "invalid configuration"),
        ("no_blocks", "invalid configuration"),
        ("too_much_shared", "invalid configuration"),
    ],
)
def test_wrong_kernels_are_errors_not_hangs(emu: Emulator, probe: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emu.probe(probe, 64)
    assert torch.equal(emu.probe("deep_stack", 1024), torch.zeros(1024))  # and the next launch is not disturbed
