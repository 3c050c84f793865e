"""Every operator with a CUDA kernel in a CUDA graph: captured, replayed on new values, the bits of a plain call."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.cli import _check
from fastdiff.ops import (
    SPECS,
    OpSpec,
    _cache,
    _philox,
    boxes,
    ddim_step,
    gaussian_blend,
    philox_normal,
    radial_spectrum,
    spectrum,
)
from fastdiff.ops._registry import map_tensors, tensors_in

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not fastdiff.build_info()["cuda"], reason="needs a GPU and a build with CUDA"
)
DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAPTURED = {name: spec for name, spec in SPECS.items() if spec.cuda}


def captured(run: Callable[[], list[torch.Tensor]]) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """(replay, the tensors that it fills). What is cached on first use is made before the capture."""
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


def own(t: torch.Tensor) -> torch.Tensor:
    """A tensor whose elements can be written: not a broadcast view."""
    shared = any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True))
    return t.clone(memory_format=torch.contiguous_format) if shared else t


def check_replay(spec: OpSpec, call: Any, gradients: bool) -> None:
    args, kwargs = map_tensors(own, call)
    if gradients:
        (args, kwargs), leaves = _check.with_leaves(spec, args, kwargs)

    def run() -> list[torch.Tensor]:
        if not gradients:
            with torch.no_grad():
                return tensors_in(spec.function(*args, **kwargs))
        results = tensors_in(spec.function(*args, **kwargs))
        ones = [torch.ones_like(r) for r in results]
        grads = torch.autograd.grad(results, list(leaves.values()), ones, allow_unused=True)
        return [*(r.detach() for r in results), *(g for g in grads if g is not None)]

    with fastdiff.use_backend("native"):
        replay, found = captured(run)
        # Reversed along every dimension, values stay where they are allowed to be: levels, orders, flags.
        inputs = tensors_in((args, kwargs))
        reversed_values = [t.detach().flip(tuple(range(t.dim()))).clone() for t in inputs]
        for t, value in zip(inputs, reversed_values, strict=True):
            t.detach().copy_(value)
        for f in found:
            f.fill_(float("nan") if f.is_floating_point() else 99)
        replay()
        torch.cuda.synchronize()
        want = run()
        for got, expected in zip(found, want, strict=True):
            assert torch.equal(got.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0)), spec.name


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("spec", CAPTURED.values(), ids=CAPTURED)
def test_replay_on_new_values(spec: OpSpec, dtype: torch.dtype, gradients: bool) -> None:
    check_replay(spec, spec.shapes[next(iter(spec.shapes))](dtype, DEVICE), gradients)
    for number in range(4):
        check_replay(spec, spec.example(random.Random(f"{spec.name} {number}"), dtype, DEVICE), gradients)


def test_a_sampling_loop_is_one_graph_replayed() -> None:
    levels = torch.linspace(0.02, 0.99, 11, dtype=torch.float64, device=DEVICE)
    start = torch.randn(3, 4, 16, 16, device=DEVICE)

    def loop(replayed: bool) -> torch.Tensor:
        seed = torch.tensor([99, 0], device=DEVICE)
        x, step = start.clone(), seed[1:]

        def one() -> list[torch.Tensor]:
            ddim_step(x, 0.1 * x, levels[:-1], levels[1:], eta=0.7, seed=seed, step=step, out=x)
            step.add_(1)
            return []

        if replayed:
            advance, _ = captured(one)
            x.copy_(start)
            step.zero_()
        for _ in range(10):
            advance() if replayed else one()
        return x

    with fastdiff.use_backend("native"):
        assert torch.equal(loop(replayed=True), loop(replayed=False))


def test_a_replay_reads_tables_that_others_have_driven_out() -> None:
    """A replay gives the bits of the captured call after the caches have given back what they may, and someone else has
    written on that memory."""
    x, seed = torch.randn(2, 96, 80, device=DEVICE), torch.tensor([5, 0], device=DEVICE)
    background, objects = torch.randn(1, 3, 32, 32, device=DEVICE), torch.randn(2, 1, 3, 32, 32, device=DEVICE)
    regions = [[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.9, 0.8]]
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: radial_spectrum(x, normalize=True),
        lambda: gaussian_blend(background, objects, regions),
        lambda: philox_normal((2, 1000), seed),
    ]
    for call in calls:
        want = call().clone()
        replay, (found,) = captured(lambda call=call: [call()])
        for cache in (spectrum._device_tables, boxes._uploaded, _philox._table):
            cache.clear()  # type: ignore[attr-defined]
        scribbled = [torch.full((n,), float("nan"), device=DEVICE) for n in (32, 128, 2048) for _ in range(10_000)]
        found.zero_()
        replay()
        torch.cuda.synchronize()
        del scribbled
        assert torch.equal(found, want)


def test_a_capture_that_would_have_to_copy_says_so() -> None:
    x = torch.randn(1, 34, 38, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once before the capture"), torch.cuda.graph(graph):
        radial_spectrum(x)
    torch.cuda.synchronize()
    seed = torch.tensor([5, 0], device=DEVICE)
    replay, (found,) = captured(lambda: [philox_normal((2, 1000), seed)])
    seed.copy_(torch.tensor([6, 1], device=DEVICE))
    replay()
    assert torch.equal(found, philox_normal((2, 1000), torch.tensor([6, 1], device=DEVICE)))


def test_a_coefficient_on_the_host_is_captured_as_a_number() -> None:
    x = torch.randn(2, 100, device=DEVICE)
    level = torch.tensor(0.3, dtype=torch.float64)
    replay, (found,) = captured(lambda: [ddim_step(x, x, level, 0.6)])
    x.normal_()
    replay()
    assert torch.equal(found, ddim_step(x, x, 0.3, 0.6))


def test_a_table_is_not_given_away_while_another_stream_reads_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())

    @_cache.on_device("numbers", lambda t: (t,), budget=64 << 10)
    def numbers(n: int, device: torch.device) -> torch.Tensor:
        return torch.full((1024,), float(n), device=device)

    side: Any = torch.cuda.Stream()
    made = numbers(1, device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        seen = numbers(1, device).clone()
    del made
    for n in range(2, 40):  # drives it out while `side` has not read it yet
        numbers(n, device)
    scribbled = [torch.full((1024,), -1.0, device=device) for _ in range(200)]
    torch.cuda.synchronize()
    del scribbled
    assert bool((seen == 1.0).all())
