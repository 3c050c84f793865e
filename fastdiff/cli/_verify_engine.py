"""``fastdiff verify`` without its looks: every operator on random calls, on this machine, against float64."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiff import _native, build_info
from fastdiff.cli import _check
from fastdiff.cli._table import Cell, Table
from fastdiff.ops import SPECS
from fastdiff.ops._registry import Call, OpSpec, map_tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DRAWS = 48
# Draw 0 is the largest named shape up to this size, so that the threads share work; the others are small and odd.
_LARGE_BYTES = 8 << 20
# Every so many draws, one input element is replaced by NaN or infinity: neither may vanish on the way.
_POISON = {6: math.nan, 7: math.inf}
_POISON_EVERY = 8
_MAX_REPORTED = 3  # failures printed in full per cell; all are counted

Progress = Callable[[int, int, str], None]


class VerifyError(Exception):
    """The request makes no sense here: an unknown name, or a device or instruction set this machine lacks."""


@dataclass
class _Cell:
    """One operator on one device, in one type, with one instruction set."""

    op: str
    device: str
    dtype: str
    isa: str
    draws: int = 0
    worst_output: float = 0.0
    worst_gradient: float = 0.0
    failed_draws: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)


def verify(
    *,
    ops: Sequence[str] = (),
    devices: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    isas: Sequence[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
    only_draw: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check every operator × device × dtype × instruction set on random calls.

    Args:
        ops: names from `fastdiff.ops.SPECS`; empty for all.
        devices: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; empty for all that this build and machine have.
        dtypes: ``"float32"``, ``"float16"``, ``"bfloat16"``; empty for all.
        isas: CPU instruction sets; empty for all that this machine runs.
        draws: calls per cell; number 0 is a large one, the others are random.
        seed: the same seed draws the same calls.
        only_draw: the draw of this number alone, to reproduce a failure.
        progress: called with (cells done, cells in all, what comes next).

    Returns:
        A record of plain data: ``ok``, ``summary``, ``cells``, ``skipped`` and what was asked.

    Raises:
        VerifyError: there is nothing native to verify, or a name is unknown.
    """
    start = time.perf_counter()
    if _native.extension is None:
        raise VerifyError(f"nothing to verify: fastdiff runs on its PyTorch reference: {_native.load_error}")
    specs = [SPECS[name] for name in _known("op", ops, list(SPECS))]
    chosen_dtypes = _known("dtype", dtypes, list(DTYPES))
    chosen_isas = _known("isa", isas, _native.isas())
    places, skipped = _places(devices)
    jobs = [
        (spec, place, dtype)
        for place in places
        for spec in specs
        for dtype in chosen_dtypes
        if spec.cuda or place == "cpu"
    ]
    cpu_only = [spec.name for spec in specs if not spec.cuda]
    if cpu_only and places != ["cpu"]:
        skipped = [*skipped, f"cuda: no kernel yet for {', '.join(cpu_only)}"]
    numbers = range(draws) if only_draw is None else [only_draw]
    if not jobs or not numbers:
        raise VerifyError("nothing to verify: no operator or no draw was asked for")
    cells: list[_Cell] = []
    for done, (spec, place, dtype) in enumerate(jobs):
        if progress:
            progress(done, len(jobs), f"{spec.name} {place} {dtype}")
        cells += _run_job(spec, place, dtype, chosen_isas if place == "cpu" else ["-"], numbers, seed)
    if progress:
        progress(len(jobs), len(jobs), "")
    failed = [cell for cell in cells if cell.failed_draws]
    seconds = time.perf_counter() - start
    calls = sum(cell.draws for cell in cells)
    summary = (
        f"{len(cells) - len(failed)} of {len(cells)} cells passed ({calls} calls of {len(specs)} operators, "
        f"seed {seed}, {seconds:.1f} s)" + (f"; FAILED: {len(failed)}" if failed else "")
    )
    return {
        "ok": not failed,
        "summary": summary,
        "build": build_info(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "draws": len(numbers),
        "seconds": round(seconds, 2),
        "skipped": skipped,
        "cells": [{"ok": not cell.failed_draws, **vars(cell)} for cell in cells],
    }


def table(record: dict[str, Any]) -> Table:
    """The record as a table: the worst error of each cell as a fraction of what is allowed."""
    found = Table(
        ("op", "device", "isa", "dtype", "draws", "output error", "gradient error", ""),
        frozenset({"draws", "output error", "gradient error"}),
        title="worst error / tolerance, against the float64 reference",
    )
    for cell in record["cells"]:
        found.add(
            cell["op"],
            cell["device"],
            cell["isa"],
            cell["dtype"],
            str(cell["draws"]),
            _error(cell["worst_output"]),
            _error(cell["worst_gradient"]),
            Cell("pass", "good") if cell["ok"] else Cell(f"FAIL {cell['failed_draws']}/{cell['draws']}", "bad"),
        )
    return found


def failure_lines(record: dict[str, Any]) -> list[str]:
    """What failed, on which call, and the command that repeats it."""
    lines = []
    for cell in record["cells"]:
        for failure in cell["failures"]:
            lines.append(f"FAILED {cell['op']} {cell['device']} {cell['isa']} {cell['dtype']}: {failure['what']}")
            lines.append(f"  call: {cell['op']}({failure['call']})")
            lines.append(f"  repeat: {failure['repeat']}")
        hidden = cell["failed_draws"] - len({f["draw"] for f in cell["failures"]})
        if hidden > 0:
            lines.append(f"  ... and {hidden} more draws of this cell")
    return lines


def _error(value: float) -> Cell:
    return Cell(f"{value:.3f}" if value < 1000 else f"{value:.1e}", "bad" if value > _check.LIMIT else "")


def _known(what: str, wanted: Sequence[str], known: list[str]) -> list[str]:
    for name in wanted:
        if name not in known:
            raise VerifyError(f"--{what}: expected one of {', '.join(known)}; got {name!r}")
    return list(dict.fromkeys(wanted)) or known


def _places(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Devices to run on; those that were not asked for by name and cannot be run, with why, are skipped."""
    why = cuda_missing()
    if not wanted:
        return (["cpu"], [f"cuda: {why}"]) if why else (["cpu", "cuda"], [])
    for name in wanted:
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise VerifyError(f"--device: expected cpu or cuda, got {name!r}")
        if name.startswith("cuda") and why:
            raise VerifyError(f"--device {name}: {why}")
        if name.startswith("cuda:") and not (name[5:].isdigit() and int(name[5:]) < torch.cuda.device_count()):
            raise VerifyError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return list(dict.fromkeys(wanted)), []


def cuda_missing() -> str:
    """Why CUDA kernels cannot run here; empty if they can."""
    if not build_info()["cuda"]:
        return "this build has no CUDA kernels (build with FASTDIFF_CUDA=ON)"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def _run_job(
    spec: OpSpec, device: str, dtype: str, isas: Sequence[str], numbers: Sequence[int], seed: int
) -> list[_Cell]:
    """All draws of one operator, device and type; the float64 work is shared by the instruction sets."""
    cells = [_Cell(spec.name, device, dtype, isa) for isa in isas]
    for number in numbers:
        text = "(the call could not be drawn)"
        expected: _check.Expected | Exception
        try:
            rng = random.Random(f"{seed} {spec.name} {dtype} {number}")
            poison = _POISON.get(number % _POISON_EVERY)
            args, kwargs = _draw(spec, number, rng, DTYPES[dtype], torch.device(device))
            if poison is not None and (victim := _victim(spec, args, kwargs)) is None:
                poison = None
            elif poison is not None:
                args, kwargs = _poisoned(rng, args, kwargs, victim, poison)
            text = _check.describe(args, kwargs) + ("" if poison is None else f"; one element is {poison}")
            expected = _check.expect(spec, args, kwargs, gradients=poison is None, seed=rng.getrandbits(31))
            # Which of inf and NaN follows from an infinity depends on how the formula is arranged: inf - inf is NaN.
            expected.any_nonfinite = poison is not None and math.isinf(poison)
        except Exception as error:  # a cell that cannot be checked is a failed cell, and the others still run
            expected = error
        for cell in cells:
            _run_draw(cell, expected, number, text, seed)
    return cells


def _run_draw(cell: _Cell, expected: _check.Expected | Exception, number: int, text: str, seed: int) -> None:
    cell.draws += 1
    try:
        if isinstance(expected, Exception):
            raise expected
        if cell.device == "cpu":
            with _native.use_isa(cell.isa):
                finding = _check.check(expected)
        else:
            finding = _check.check(expected)
        cell.worst_output = max(cell.worst_output, finding.worst_output)
        cell.worst_gradient = max(cell.worst_gradient, finding.worst_gradient)
        failures = finding.failures
    except Exception as error:  # reported as the failure it is
        failures = [f"{type(error).__name__}: {error}"]
    if not failures:
        return
    cell.failed_draws += 1
    if cell.failed_draws <= _MAX_REPORTED:
        isa = f" --isa {cell.isa}" if cell.device == "cpu" else ""
        repeat = (
            f"fastdiff verify --op {cell.op} --device {cell.device}{isa} --dtype {cell.dtype} --seed {seed} "
            f"--only-draw {number}"
        )
        for what in failures:
            cell.failures.append({"draw": number, "what": what, "call": text, "repeat": repeat})


def _draw(spec: OpSpec, number: int, rng: random.Random, dtype: torch.dtype, device: torch.device) -> Call:
    if number == 0:
        calls = [make(dtype, device) for make in spec.shapes.values()]
        sizes = [spec.bytes(*args, **kwargs) for args, kwargs in calls]
        fitting = [(size, i) for i, size in enumerate(sizes) if size <= _LARGE_BYTES]
        if fitting:
            return calls[max(fitting)[1]]
    return spec.example(rng, dtype, device)


def _victim(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The first tensor whose values flow into the result (corners of boxes, e.g., do not, and must be numbers)."""
    found = _check.differentiable(spec, args, kwargs).values()
    return next((t for t in found if t.dim() >= 2 and t.numel()), None)


def _poisoned(
    rng: random.Random, args: tuple[Any, ...], kwargs: dict[str, Any], victim: torch.Tensor | None, value: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with `value` in one element of the victim, in the same layout."""

    def place(t: torch.Tensor) -> torch.Tensor:
        if t is not victim:
            return t
        index = tuple(rng.randrange(n) for n in t.shape)
        same = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        same[index] = value
        return same

    return map_tensors(place, args), map_tensors(place, kwargs)
