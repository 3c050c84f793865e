"""How a number is made: contestants take turns in one run, and every sample is long enough to be measured.

On the CPU a sample is a run of calls of at least a millisecond between two readings of the clock, after one call that
is not timed: it meets the caches, the allocator and the sleeping threads as the contestant before left them. On a GPU
it is one call between two device events, after the L2 cache has been overwritten and while the device is still busy
with a delay, so that the time to issue the call is not part of it. The cost of a call itself is read from the host's
clock.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SAMPLE_SECONDS = 1e-3
_FEW_CALLS, _LONG_CALL = 4, 10e-3  # at least so many calls in a sample, unless one of them takes that long
_MIN_ROUNDS, _MAX_ROUNDS = 7, 400
_DELAY_CYCLES = 400_000  # some 200 µs on the device: longer than issuing any chain of kernels measured here


@dataclass
class Contestant:
    """One implementation of one call, on several copies of its inputs that take turns."""

    name: str
    calls: Sequence[Callable[[], Any]]
    repeat: int = 1
    seconds: list[float] = field(default_factory=list)  # per call, one entry per round
    turns: Iterator[Callable[[], Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.turns = itertools.cycle(self.calls)

    def next_calls(self) -> list[Callable[[], Any]]:
        """The calls of one sample, and before them the one that is not timed."""
        return list(itertools.islice(self.turns, self.repeat + 1))

    def summary(self) -> dict[str, Any]:
        """Median and quartiles in microseconds."""
        q1, median, q3 = quartiles([1e6 * s for s in self.seconds])
        return {
            "median_us": median,
            "q1_us": q1,
            "q3_us": q3,
            "samples": len(self.seconds),
            "calls_per_sample": self.repeat,
        }


def race(
    contestants: Sequence[Contestant],
    device: torch.device,
    seconds: float,
    *,
    host: bool = False,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> None:
    """Time all contestants in turns for about `seconds`, each round in another order; fills their `seconds`.

    Args:
        contestants: what to time.
        device: where it runs.
        seconds: stop after the first round that ends later, but not before a few rounds are done.
        host: on a GPU, time issuing the calls instead of their work.
        clock: nanoseconds on the host. ``time.thread_time_ns`` for work that is done in this thread alone: it stands
            still while other processes have the core.
    """
    events = device.type == "cuda" and not host
    sample: Callable[[list[Callable[[], Any]]], float] = _GpuSample(device) if events else _host_sample(device, clock)
    for contestant in contestants:
        _warm_up(contestant, sample, single=events)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for number in range(_MAX_ROUNDS):
            if number >= _MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = number % len(contestants)
            for contestant in [*contestants[first:], *contestants[:first]]:
                contestant.seconds.append(sample(contestant.next_calls()))
    finally:
        if collecting:
            gc.enable()


def ratios(other: Contestant, ours: Contestant) -> dict[str, float]:
    """Median and quartiles of other / ours, paired by round: what slows a whole round down cancels out."""
    pairs = zip(other.seconds, ours.seconds, strict=True)
    q1, median, q3 = quartiles([theirs / mine for theirs, mine in pairs])
    return {"median": median, "q1": q1, "q3": q3}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def _warm_up(contestant: Contestant, sample: Callable[[list[Callable[[], Any]]], float], *, single: bool) -> None:
    """Touch every buffer, then choose how many calls make a sample."""
    for call in contestant.calls:
        call()
    if single:  # events time a single call well; more of them would find a warm cache
        for _ in range(3):
            sample(contestant.next_calls())
        return
    once = min(sample(contestant.next_calls()) for _ in range(3))
    contestant.repeat = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
    # A single call includes waking the threads; a run of them tells how many more fit.
    several = sample(contestant.next_calls())
    least = _FEW_CALLS if several < _LONG_CALL else 1
    contestant.repeat = max(least, math.ceil(1.2 * SAMPLE_SECONDS / max(several, 1e-7)))


def _host_sample(device: torch.device, clock: Callable[[], int]) -> Callable[[list[Callable[[], Any]]], float]:
    def sample(calls: list[Callable[[], Any]]) -> float:
        first, *timed = calls
        first()
        start = clock()
        for call in timed:
            call()
        elapsed = clock() - start
        if device.type == "cuda":  # let the queue drain before the next sample, so that nobody pays for the last one
            torch.cuda.synchronize(device)
        return elapsed * 1e-9 / len(timed)

    return sample


class _GpuSample:
    """Seconds per call on the device's own clock, with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)
        event: Any = torch.cuda.Event  # untyped in torch
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._delay: Any = torch.cuda._sleep
        self._device = device

    def __call__(self, calls: list[Callable[[], Any]]) -> float:
        first, *timed = calls
        with torch.cuda.device(self._device):
            first()
            self._flush.zero_()
            self._delay(_DELAY_CYCLES)
            self._start.record()
            for call in timed:
                call()
            self._end.record()
            self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e-3 / len(timed)
