"""``fastdiff bench`` without its looks: every operator against PyTorch, `torch.compile` and its peers.

Every row is checked against the float64 reference before it is timed, and every baseline is timed in turns with ours
in the same run. See `_bench_timing` for the clock.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastdiff import _native
from fastdiff.cli import _check
from fastdiff.cli._bench_timing import Contestant, race, ratios
from fastdiff.cli._machine import load_average, machine
from fastdiff.cli._table import Table
from fastdiff.cli._verify_engine import DTYPES, cuda_missing
from fastdiff.ops import SPECS
from fastdiff.ops._registry import Call, OpSpec, map_tensors, tensors_in

OURS, EAGER, COMPILE, COPY, MATMUL = "fastdiff", "eager", "compile", "copy", "matmul"
OVERHEAD = "overhead"
DEFAULT_DTYPES = ("float32", "bfloat16")
EVEN = 0.005  # a ratio that rounds to 1.00 is neither won nor lost
_TINY = 4  # the overhead row cuts every dimension to this
_PATIENCE = 10.0  # seconds of a baseline's call; a slower one is named with its time, and not raced
_ROTATED_BYTES, _MAX_BUFFERS = 64 << 20, 8
_COMPUTE_BOUND = 8.0  # operations per byte from which a share of the matmul ceiling says something
METHOD = (
    "Checked against the float64 reference, then timed in turns with the baselines in one run. CPU: samples of at "
    "least 1 ms and, below 10 ms a call, 4 calls, after one that is not timed; inputs rotated over up to 8 copies (64 "
    "MiB in all; `buffers` in the record). GPU: device events around single calls, L2 overwritten before each; the "
    "overhead rows are the host's time. Ratio: baseline / fastdiff, median over rounds. GB/s: the bytes any "
    "implementation must move, over the median; copy: a contiguous copy that moves as many bytes, timed in the same "
    "turns. Forward rows run under no_grad."
)

Progress = Callable[[int, int, str], None]


class BenchError(Exception):
    """The request makes no sense here: an unknown name, or a device this machine lacks."""


@dataclass(frozen=True)
class Case:
    """One row: an operator on a named shape, in one type."""

    spec: OpSpec
    shape: str
    dtype: str
    backward: bool

    @property
    def label(self) -> str:
        return f"{self.spec.name} {self.shape} {self.dtype}" + (" forward+backward" if self.backward else "")


def list_shapes() -> list[dict[str, Any]]:
    """What can be asked for: operators with their shapes and peers."""
    return [
        {
            "op": spec.name,
            "shapes": [*spec.shapes, *spec.gpu_shapes, OVERHEAD],
            "baselines": [EAGER, COMPILE, *spec.peers],
        }
        for spec in SPECS.values()
    ]


def listing() -> Table:
    """The same as a table."""
    found = Table(("op", "shapes", "baselines"))
    for entry in list_shapes():
        found.add(entry["op"], "\n".join(entry["shapes"]), "\n".join(entry["baselines"]))
    return found


def bench(
    *,
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    backward: bool = False,
    device: str = "cpu",
    seconds: float = 1.0,
    compiled: bool = True,
    buffers: int | None = None,
    budget: float = math.inf,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure.

    Args:
        ops: names from `fastdiff.ops.SPECS`; empty for all.
        shapes: names from `OpSpec.shapes`, or parts of names; ``"overhead"`` is a tiny call; empty for all.
        dtypes: ``"float32"``, ``"float16"``, ``"bfloat16"``; empty for float32 and bfloat16.
        backward: time forward and backward together instead of forward.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        seconds: of timing per row, all contestants together, at least; compiling and checking come on top.
        compiled: race against `torch.compile(reference)` too.
        buffers: copies of the inputs to rotate over; None: up to 8, 64 MiB in all, on the CPU, and one on a GPU.
        budget: rows that would start after so many seconds are left out, and named in ``not_measured``.
        progress: called with (rows done, rows in all, what comes next).

    Returns:
        A record of plain data: ``ok``, ``summary``, ``machine``, ``method``, ``rows``, ``not_measured``.

    Raises:
        BenchError: there is nothing native to measure, or a name is unknown.
    """
    if _native.extension is None:
        raise BenchError(f"nothing to measure: fastdiff runs on its PyTorch reference: {_native.load_error}")
    place = _device(device)
    cases = _cases(ops, shapes, dtypes, backward, place.type == "cuda")
    record: dict[str, Any] = {"ok": True, "summary": "", "machine": machine(), "method": METHOD, "device": device}
    rows: list[dict[str, Any]] = []
    left_out = [f"{case.label} (no CUDA kernel yet)" for case in cases if place.type == "cuda" and not case.spec.cuda]
    cases = [case for case in cases if place.type != "cuda" or case.spec.cuda]
    start = time.perf_counter()
    for done, case in enumerate(cases):
        if rows and time.perf_counter() - start > budget:
            left_out.append(case.label)
            continue
        if progress:
            progress(done, len(cases), case.label)
        rows.append(_row(case, place, seconds, compiled, buffers))
    if progress:
        progress(len(cases), len(cases), "")
    order = list(SPECS)
    rows.sort(key=lambda row: order.index(row["op"]))
    failed = [row for row in rows if row["problem"]]
    compared = [r["median"] for row in rows for r in row["ratios"].values()]
    wins, losses = sum(ratio >= 1 + EVEN for ratio in compared), sum(ratio < 1 - EVEN for ratio in compared)
    record["ok"] = not failed
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["machine"]["load_average_after"] = load_average()
    record["summary"] = (
        f"{len(rows)} rows, {len(compared)} comparisons: {wins} won, {losses} lost, "
        f"{len(compared) - wins - losses} even"
        + (f"; FAILED: {len(failed)} rows" if failed else "")
        + (f"; {len(left_out)} rows left out" if left_out else "")
        + f" ({record['seconds']:.0f} s)"
    )
    record.update(rows=rows, not_measured=left_out)
    return record


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and cuda_missing():
        raise BenchError(f"--device {name}: {cuda_missing()}")
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    return device


def _cases(ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], backward: bool, gpu: bool) -> list[Case]:
    for name in ops:
        if name not in SPECS:
            raise BenchError(f"--op: expected one of {', '.join(SPECS)}; got {name!r}")
    for name in dtypes:
        if name not in DTYPES:
            raise BenchError(f"--dtype: expected one of {', '.join(DTYPES)}; got {name!r}")
    found = []
    specs = [SPECS[name] for name in dict.fromkeys(ops)] or list(SPECS.values())
    chosen = list(dict.fromkeys(dtypes or DEFAULT_DTYPES))
    for dtype in chosen:  # outermost, so that a run that is cut short has seen every operator
        for spec in specs:
            named = [*spec.shapes, *(spec.gpu_shapes if gpu else ())]
            found += [Case(spec, name, dtype, backward) for name in named if _wanted(name, shapes)]
            if not backward and dtype == chosen[0] and _wanted(OVERHEAD, shapes):
                found.append(Case(spec, OVERHEAD, dtype, False))
    if not found:
        raise BenchError(f"--shape: no shape is named like {' or '.join(map(repr, shapes))}; --list shows them")
    return found


def _wanted(name: str, shapes: Sequence[str]) -> bool:
    return not shapes or any(part in name for part in shapes)


def _row(case: Case, device: torch.device, seconds: float, compiled: bool, buffers: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "op": case.spec.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "mode": "forward+backward" if case.backward else "forward",
        "problem": "",
        "error": None,
        "times": {},
        "ratios": {},
        "unavailable": {},
        "gb_per_s": None,
        "share_of_copy": None,
        "share_of_matmul": None,
    }
    try:
        _measure(case, device, seconds, compiled, buffers, row)
    except Exception as error:  # one row that fails is reported; the others are still measured
        row["problem"] = f"{type(error).__name__}: {error}"
    return row


def _measure(
    case: Case, device: torch.device, seconds: float, compiled: bool, buffers: int | None, row: dict[str, Any]
) -> None:
    spec = case.spec
    args, kwargs = _call(case, device)
    size = spec.bytes(*args, **kwargs)
    if buffers is None:
        buffers = max(1, min(_MAX_BUFFERS, math.ceil(_ROTATED_BYTES / max(size, 1)))) if device.type == "cpu" else 1
    row.update(bytes=size, flops=spec.flops(*args, **kwargs), buffers=buffers)
    finding = _check.check(_check.expect(spec, args, kwargs, gradients=case.backward))
    row["error"] = max(finding.worst_output, finding.worst_gradient)
    if finding.failures:
        row["problem"] = "wrong, so not timed: " + "; ".join(finding.failures)
        return
    calls = [(args, kwargs), *(_call(case, device) for _ in range(buffers - 1))]
    contestants = _contestants(case, calls, compiled, row)
    bandwidth = not case.backward and case.shape != OVERHEAD
    if bandwidth:
        contestants.append(_copy(size, buffers, device))
        if row["flops"] >= _COMPUTE_BOUND * size:
            contestants.append(_matmul(DTYPES[case.dtype], device))
    with torch.set_grad_enabled(case.backward), _native.use_backend("native"):
        race(contestants, device, seconds, host=case.shape == OVERHEAD)
    ours = contestants[0]
    row["times"] = {c.name: c.summary() for c in contestants}
    row["ratios"] = {c.name: ratios(c, ours) for c in contestants[1:] if c.name not in (COPY, MATMUL)}
    if bandwidth:
        row["gb_per_s"] = size / row["times"][OURS]["median_us"] * 1e-3
        row["share_of_copy"] = ratios(next(c for c in contestants if c.name == COPY), ours)["median"]
    for ceiling in contestants:
        if ceiling.name == MATMUL:
            rate = 2 * 1024**3 / ceiling.summary()["median_us"]
            row["share_of_matmul"] = row["flops"] / row["times"][OURS]["median_us"] / rate


def _call(case: Case, device: torch.device) -> Call:
    dtype = DTYPES[case.dtype]
    if case.shape != OVERHEAD:
        return {**case.spec.shapes, **case.spec.gpu_shapes}[case.shape](dtype, device)
    if case.spec.overhead:
        return case.spec.overhead(dtype, device)
    # Any named shape will do: with every dimension cut to a few, what is left is the price of the call.
    args, kwargs = next(iter(case.spec.shapes.values()))(dtype, device)
    corner = slice(0, _TINY)
    return map_tensors(lambda t: t[(corner,) * t.dim()].clone(), args), map_tensors(
        lambda t: t[(corner,) * t.dim()].clone(), kwargs
    )


def _contestants(case: Case, calls: list[Call], compiled: bool, row: dict[str, Any]) -> list[Contestant]:
    """Ours first, then every baseline that can do the call; for the others, why not goes into the row."""
    spec, unavailable = case.spec, row["unavailable"]
    prepare = partial(_prepare, case)
    found = [Contestant(OURS, [prepare(spec.function, *call) for call in calls])]
    found.append(Contestant(EAGER, [prepare(spec.reference, *call) for call in calls]))
    if compiled:
        start = time.perf_counter()
        try:
            torch.compiler.reset()
            function = torch.compile(spec.compiled or spec.reference, fullgraph=True, dynamic=False)
            runs = [prepare(function, *call) for call in calls]
            with torch.set_grad_enabled(case.backward):
                runs[0]()
            found.append(Contestant(COMPILE, runs))
            row["compile_seconds"] = round(time.perf_counter() - start, 2)
        except Exception as error:  # no baseline, and the row says why
            unavailable[COMPILE] = _why_no_compile(error)
    for name, peer in spec.peers.items():
        try:
            runs = [_prepare_peer(case, peer, *call) for call in calls]
            took = _once(runs[0], case.backward)
            if took > _PATIENCE:  # perhaps it compiled something
                took = _once(runs[0], case.backward)
            if took > _PATIENCE:
                unavailable[name] = f"one call took {took:.0f} s, so it was not raced"
            else:
                found.append(Contestant(name, runs))
        except ImportError as error:
            unavailable[name] = f"not installed ({error})"
        except ValueError as error:
            unavailable[name] = f"cannot: {error}"
        except Exception as error:  # a peer that breaks is no failure of ours, but no secret either
            unavailable[name] = f"failed: {type(error).__name__}: {error}"
    return found


def _once(run: Callable[[], Any], grad: bool) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    with torch.set_grad_enabled(grad):
        run()
    return time.perf_counter() - start


def _prepare(case: Case, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call without arguments; with `case.backward`, of the function and of all its gradients."""
    if not case.backward:
        return partial(function, *args, **kwargs)
    (args, kwargs), leaves = _check.with_leaves(case.spec, args, kwargs)
    return _with_gradients(partial(function, *args, **kwargs), list(leaves.values()), case.spec, args, kwargs)


def _prepare_peer(
    case: Case, peer: Callable[..., Callable[[], Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not case.backward:
        return peer(*args, **kwargs)
    (args, kwargs), leaves = _check.with_leaves(case.spec, args, kwargs)
    call = peer(*args, **kwargs)
    if not all(t.requires_grad for t in tensors_in(call())):
        raise ValueError("it has no gradient")
    return _with_gradients(call, list(leaves.values()), case.spec, args, kwargs)


def _with_gradients(
    call: Callable[[], Any], leaves: list[torch.Tensor], spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    with torch.no_grad():
        upstream = [torch.randn_like(t) for t in tensors_in(spec.reference(*args, **kwargs))]

    def run() -> Any:
        return torch.autograd.grad(tensors_in(call()), leaves, upstream, allow_unused=True)

    return run


def _copy(size: int, buffers: int, device: torch.device) -> Contestant:
    """The ceiling of whatever only moves memory: reads half of `size`, writes the other half."""
    calls = []
    for _ in range(buffers):
        source, target = (torch.ones(max(1, size // 8), dtype=torch.float32, device=device) for _ in range(2))
        calls.append(partial(target.copy_, source))
    return Contestant(COPY, calls)


def _matmul(dtype: torch.dtype, device: torch.device) -> Contestant:
    """The ceiling of whatever only computes."""
    a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
    return Contestant(MATMUL, [partial(torch.mm, a, b)])


def _why_no_compile(error: Exception) -> str:
    missing = not any(map(shutil.which, ("c++", "g++", "clang++")))
    if missing and ("Cxx" in type(error).__name__ or "compiler" in str(error).lower()):
        return "inductor found no C++ compiler"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
