"""What the examples print: how far two outputs are apart, and which call takes longer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the range of `theirs`."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def speed(theirs: Callable[[], object], ours: Callable[[], object], rounds: int = 9) -> float:
    """How many times longer `theirs` takes: the median over rounds in which both run, after one that is not timed."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        theirs(), ours()
        return statistics.median(seconds(theirs) / seconds(ours) for _ in range(rounds))


def report(name: str, apart: float, tolerance: float, ratio: float | None = None) -> None:
    """One line; exits with an error if the outputs differ by more than `tolerance`."""
    print(f"{name}: difference {apart:.1e} of the range" + (f", {ratio:.2f} times as fast" if ratio else ""))
    if not apart <= tolerance:
        raise SystemExit(f"{name}: expected a difference of at most {tolerance:.0e}")
