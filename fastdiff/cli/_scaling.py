"""``fastdiff bench --scaling``: how the time of an operator grows with its sizes, beside how it should."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastdiff import _native
from fastdiff.cli._bench_engine import BenchError
from fastdiff.cli._bench_timing import Contestant, race
from fastdiff.cli._machine import load_average, machine
from fastdiff.cli._table import Table
from fastdiff.cli._verify_engine import DTYPES
from fastdiff.ops import SPECS

METHOD = (
    "Native kernels, no gradients. The sizes of a sweep are timed in turns in one run; the exponent is the "
    "least-squares slope of log(time) against log(size) over the upper half of the sizes, where the price of a "
    "call no longer counts."
)


def scaling(
    *,
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    seconds: float = 1.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure every sweep that the operators' specs name.

    Args:
        ops: names from `fastdiff.ops.SPECS`; empty for all.
        dtypes: ``"float32"``, ``"float16"``, ``"bfloat16"``; empty for float32.
        seconds: of timing per sweep, at least.
        progress: called with (sweeps done, sweeps in all, what comes next).

    Returns:
        A record of plain data: ``summary``, ``machine``, ``method``, ``sweeps``.

    Raises:
        BenchError: there is nothing native to measure, or a name is unknown.
    """
    if _native.extension is None:
        raise BenchError(f"nothing to measure: fastdiff runs on its PyTorch reference: {_native.load_error}")
    for name in ops:
        if name not in SPECS:
            raise BenchError(f"--op: expected one of {', '.join(SPECS)}; got {name!r}")
    for name in dtypes:
        if name not in DTYPES:
            raise BenchError(f"--dtype: expected one of {', '.join(DTYPES)}; got {name!r}")
    chosen = [SPECS[name] for name in dict.fromkeys(ops)] or list(SPECS.values())
    jobs = [(s, axis, dtype) for s in chosen for axis in s.scaling for dtype in dict.fromkeys(dtypes or ("float32",))]
    if not jobs:
        raise BenchError("--scaling: none of these operators names a sweep")
    record: dict[str, Any] = {"ok": True, "machine": machine(), "method": METHOD, "device": "cpu", "sweeps": []}
    start = time.perf_counter()
    for done, (spec, axis, dtype) in enumerate(jobs):
        if progress:
            progress(done, len(jobs), f"{spec.name} {axis} {dtype}")
        expected, calls = spec.scaling[axis]
        contestants = []
        for size, make in calls.items():
            args, kwargs = make(DTYPES[dtype], torch.device("cpu"))
            contestants.append(Contestant(str(size), [partial(spec.function, *args, **kwargs)]))
        with torch.no_grad(), _native.use_backend("native"):
            race(contestants, torch.device("cpu"), seconds)
        times = {size: c.summary()["median_us"] for size, c in zip(calls, contestants, strict=True)}
        record["sweeps"].append(
            {"op": spec.name, "axis": axis, "dtype": dtype, "expected": expected, "times_us": times,
             "exponent": exponent(times)}
        )  # fmt: skip
    if progress:
        progress(len(jobs), len(jobs), "")
    record["machine"]["load_average_after"] = load_average()
    record["summary"] = f"{len(jobs)} sweeps ({time.perf_counter() - start:.0f} s)"
    return record


def refuse_what_it_ignores(*, device: str, shapes: Sequence[str], backward: bool, budget: float) -> None:
    """Options of the benchmark that a sweep has no use for.

    Raises:
        BenchError: one of them was given.
    """
    if device != "cpu":
        raise BenchError(f"--scaling: expected --device cpu, got {device!r}")
    for name, given in (("--shape", bool(shapes)), ("--backward", backward), ("--budget", budget != math.inf)):
        if given:
            raise BenchError(f"--scaling: sweeps have no {name}")


def exponent(times: dict[int, float]) -> float:
    """Least-squares slope of log(time) against log(size) over the upper half of the sizes."""
    points = [(math.log(size), math.log(t)) for size, t in sorted(times.items())][(len(times) - 1) // 2 :]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def table(record: dict[str, Any]) -> Table:
    """One line per sweep: sizes with their times, and the exponent beside the expected one."""
    found = Table(
        ("op", "axis", "dtype", "size: time", "exponent", "expected"),
        frozenset({"exponent", "expected"}),
        title="time against size; exponent: slope of log(time) against log(size), upper half",
    )
    for sweep in record["sweeps"]:
        points = ", ".join(f"{size}: {_time(us)}" for size, us in sweep["times_us"].items())
        found.add(
            sweep["op"], sweep["axis"], sweep["dtype"], points, f"{sweep['exponent']:.2f}", f"{sweep['expected']:g}"
        )
    return found


def markdown(record: dict[str, Any]) -> str:
    """The table as a Markdown page."""
    m = record["machine"]
    where = f"{m['cpu']}; {m['cores']} cores, {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; {m['date']}"
    found = table(record)
    return f"# {record['summary']}\n\n{found.title}.\n\n{found.markdown()}\n\n- {where}\n\n{record['method']}\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Log-log pictures, one per sweep, each with a line of the expected slope."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    from fastdiff.cli._bench_report import save_figure

    sweeps = record["sweeps"]
    columns = min(4, len(sweeps))
    rows = math.ceil(len(sweeps) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.9 * rows), squeeze=False)
    for axis, sweep in zip(axes.flat, sweeps, strict=False):
        sizes = [float(s) for s in sweep["times_us"]]
        times = list(sweep["times_us"].values())
        axis.loglog(sizes, times, "o-", color="#4c78a8", label=f"measured, {sweep['exponent']:.2f}")
        last = times[-1]
        line = [last * (s / sizes[-1]) ** sweep["expected"] for s in sizes]
        axis.loglog(sizes, line, "--", color="#999999", label=f"expected, {sweep['expected']:g}")
        axis.set_title(sweep["op"], fontsize=10)
        axis.set_xlabel(sweep["axis"], fontsize=9)
        axis.set_ylabel("µs", fontsize=9)
        axis.grid(True, which="major", alpha=0.3)
        axis.xaxis.set_minor_formatter(NullFormatter())  # a sweep of a decade or two would label all its minor ticks
        axis.legend(fontsize=7, title="exponent", title_fontsize=7)
    for axis in list(axes.flat)[len(sweeps) :]:
        axis.set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def _time(us: float) -> str:
    return f"{us:.0f} µs" if us < 1e3 else (f"{us * 1e-3:.2f} ms" if us < 1e5 else f"{us * 1e-3:.0f} ms")
