"""Every operator with a CUDA kernel in a CUDA graph: captured, replayed on new values, the bits of a plain call."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.cli import _check
from fastdiff.ops import SPECS, OpSpec, ddim_step
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
