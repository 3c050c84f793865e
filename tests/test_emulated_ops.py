"""The operators on their CUDA kernels, which csrc/emu runs on the CPU: every spec's random calls against float64.

What tests/test_ops.py does on a machine with a GPU, as far as it needs none: values, gradients, repeatability, that the
kernel was called, and that neither the schedule of the threads nor the rest of the batch shows in a bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from emu import harness, mistakes
from emu.harness import Emulator

from fastdiff.cli import _check
from fastdiff.ops import SPECS
from fastdiff.ops._registry import tensors_in

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = [name for name, spec in SPECS.items() if spec.cuda]
DRAWS = 4 if harness.SANITIZE else 12


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators():
        yield built
    built.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_float64(emu: Emulator, name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    for number in range(DRAWS):
        rng = random.Random(f"{name} {dtype} {number}")
        args, kwargs = spec.example(rng, dtype, torch.device("cpu"))
        emu.seed(number)
        expected = _check.expect(spec, args, kwargs, gradients=True, seed=number)
        finding = _check.check(expected)
        assert not finding.failures, (number, _check.describe(args, kwargs), finding.failures)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_the_schedule_or_the_grid(emu: Emulator, name: str) -> None:
    spec = SPECS[name]
    for number, dtype in enumerate(DTYPES):
        args, kwargs = spec.example(random.Random(f"{name} schedule {number}"), dtype, torch.device("cpu"))

        def run(args=args, kwargs=kwargs) -> list[torch.Tensor]:
            (a, k), leaves = _check.with_leaves(spec, args, kwargs)
            with torch.enable_grad():
                outputs = tensors_in(spec.function(*a, **k))
            ones = [torch.ones_like(t) for t in outputs]
            grads = torch.autograd.grad(outputs, list(leaves.values()), ones, allow_unused=True)
            return [t.detach() for t in (*outputs, *grads) if t is not None]

        first = run()
        for seed in (1, 2):
            emu.seed(seed)
            emu.grid_limit(2 * seed - 1)
            emu.multiprocessors(1 + 100 * seed)
            for a, b in zip(first, run(), strict=True):
                assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)), _check.describe(args, kwargs)
        emu.reset()


def noticed(emu: Emulator, case: mistakes.Case, expected: _check.Expected, seed: int) -> bool:
    emu.seed(seed)
    emu.grid_limit(case.grid)
    emu.hopper(case.hopper)
    try:
        return bool(_check.check(expected).failures)
    except RuntimeError:  # the emulator's: threads that wait for ever, too much shared memory
        return True


@pytest.mark.skipif(harness.SANITIZE != "", reason="a sanitizer would end the process at the first mistake")
@pytest.mark.parametrize("mistake", mistakes.CASES)
def test_a_mistake_is_noticed(emu: Emulator, mistake: str) -> None:
    case = mistakes.CASES[mistake]
    args, kwargs = case.make()
    expected = _check.expect(SPECS[case.op], args, kwargs, gradients=case.backward)
    assert not noticed(emu, case, expected, seed=0)
    emu.mutate(mistake)
    assert all(noticed(emu, case, expected, seed) for seed in range(3))
