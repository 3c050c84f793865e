"""``fastdiff certify`` without its looks: every promise of every solver, measured on this machine."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from fastdiff.cli import _certify_diffusers as peers
from fastdiff.cli import _certify_runs as runs
from fastdiff.cli._certify_adaptive import ALLOWED, TOLERANCES, adaptive
from fastdiff.cli._certify_fit import METHOD as FIT
from fastdiff.cli._certify_promises import (
    ERROR_CALLS,
    INVERTED,
    ORDER_SCHEDULES,
    PROMISES,
    STEP_COUNTS,
)
from fastdiff.cli._machine import cores, machine
from fastdiff.cli._verify_engine import cuda_missing
from fastdiff.samplers import SOLVERS

__all__ = ["METHOD", "CertifyError", "certify"]

PREDICTIONS = ("epsilon", "v", "sample", "flow")
ADAPTIVE = "adaptive"
QUICK_COUNTS = (*range(1, 9), 15, 16, 50, 200)
PEER_COUNTS = range(1, 51)
_EVERY = 4  # step counts up to this are run with all prediction types

METHOD = (
    "Targets: three Gaussians and two mixtures of Gaussians on a line, six quantiles of each, whose exact paths are "
    "known (in one dimension the flow keeps quantiles); runs start on the exact path, and errors are taken where the "
    f"times of the run end. {FIT} The order is promised on the reference schedule, the first; on the others no more "
    "than the lower bound under 'elsewhere', because some methods gain an order there and some lose part of theirs: "
    "down to sigma = 0 not all steps shrink at one rate, and a last step of a fixed size to the data leaves "
    "dpmpp_2m_sde hardly any. 'kept': every bound held, with every schedule, prediction type and dtype that was "
    "measured. Stochastic solvers: the error of mean and standard deviation of a Gaussian, computed "
    "exactly from the coefficients of the plan (restart is held to 2e-3 at 160 evaluations; lcm and consistency to "
    "the data's moments in 4 steps, with a perfect consistency function for a network), and drawn samples within five "
    "standard errors of those moments. "
    "float32, bfloat16: the distance to the float64 run of the same plan and seed, against a bound from the rounding "
    "of every term of every step. On the reference schedule all four prediction types are fitted, on the others one. "
    "A flow begins without data, of which epsilon says nothing: that pair is held to finiteness alone. "
    "Inversions, the same plans from data to noise, are held to the order where it is not lost next to the data: "
    f"{', '.join(INVERTED)}. "
    f"Finite: float32, every step count from 1 to {STEP_COUNTS[-1]}, up to {_EVERY} with all four prediction types, "
    f"beyond with each in turn, and inversions up to {runs.INVERSIONS}. Adaptive: noise to data and back in float64 "
    f"with tolerances {', '.join(f'{t:g}' for t in TOLERANCES)}, the error at the end being at most {ALLOWED:g} "
    "tolerances times the growth of distances along the exact paths."
)

Progress = Callable[[int, int, str], None]
Job = tuple[str, str, bool]  # solver, schedule, quick


class CertifyError(Exception):
    """The request makes no sense here: an unknown name."""


def certify(
    *,
    solvers: Sequence[str] = (),
    quick: bool = False,
    diffusers: bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Hold every solver to its promises (`PROMISES`) on every schedule, with every prediction type and dtype.

    Args:
        solvers: names from `fastdiff.samplers.SOLVERS`; empty for all.
        quick: fewer schedules and step counts; half a minute or so.
        diffusers: measure diffusers' schedulers too, if it is installed.
        jobs: processes; None: as many as there are cores. With 1 everything runs in this one.
        progress: called with (parts done, parts in all, what was done).

    Returns:
        A record of plain data: ``ok``, ``summary``, ``broken``, ``promises``, ``order``, ``precision``, ``finite``,
        ``adaptive``, ``diffusers``, ``skipped`` and where it was measured.

    Raises:
        CertifyError: a solver is unknown.
    """
    start = time.perf_counter()
    for name in solvers:
        if name not in (*SOLVERS, ADAPTIVE):
            raise CertifyError(f"--solver: expected one of {', '.join(SOLVERS)}, {ADAPTIVE}; got {name!r}")
    chosen = list(dict.fromkeys(solvers)) or [*SOLVERS, ADAPTIVE]
    record: dict[str, Any] = {"ok": False, "summary": "", "broken": [], "method": METHOD, "machine": machine()}
    record["promises"] = {name: _promised(name) for name in chosen if name in PROMISES}
    # A solver that promises nothing would pass whatever it does.
    record["broken"] += [f"{name}: no promise is made for it" for name in chosen if name not in (*PROMISES, ADAPTIVE)]
    missing = cuda_missing()
    record["devices"] = ["cpu"] if missing else ["cpu", "cuda"]
    record["skipped"] = [f"cuda: {missing}"] if missing else []
    schedules = _schedules(quick)
    record["schedules"] = {name: repr(runs.schedule(name)) for name in schedules}
    work = [(solver, name, quick) for name in schedules for solver in chosen if solver in PROMISES]
    record |= {"order": [], "precision": [], "finite": [], "adaptive": [], "diffusers": None}
    version = peers.available() if diffusers else ""
    if not version:
        record["skipped"].append("diffusers: not asked for" if not diffusers else "diffusers: not installed")
    # The longest first, so that no process is left with one of them at the end.
    work.sort(key=lambda job: -_weight(job))
    tasks: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = []
    if version:
        tasks += [(_peer, (i, quick), f"diffusers {peer.name}") for i, peer in enumerate(peers.PEERS)]
    tasks += [(_measure, (job, tuple(record["devices"])), f"{job[0]}, {job[1]}") for job in work]
    if ADAPTIVE in chosen:
        tasks += [(_adaptive, (name,), f"{ADAPTIVE}, {name}") for name in schedules]
    rows: dict[int, Any] = {}
    for done, (index, found) in enumerate(_run(tasks, jobs or cores()), 1):
        if progress:
            progress(done, len(tasks), tasks[index][2])
        if tasks[index][0] is _peer:
            rows[index] = found
        else:
            for kind, cells in found.items():
                record[kind] += cells
    if version:
        record["diffusers"] = {"version": version, "rows": [rows[i] for i in sorted(rows)]}
    kinds = ("order", "precision", "finite", "adaptive")
    for kind in kinds:
        record[kind].sort(key=lambda cell: (chosen.index(cell["solver"]), schedules.index(cell["schedule"])))
        record["broken"] += [f"{_where(cell)}: {what}" for cell in record[kind] for what in cell["failures"]]
    record["seconds"] = round(time.perf_counter() - start, 1)
    record["ok"] = not record["broken"]
    count = sum(len(record[kind]) for kind in kinds)
    failed = f"; BROKEN: {len(record['broken'])}" if record["broken"] else ", all kept"
    record["summary"] = (
        f"{len(chosen)} solvers, {len(schedules)} schedules, {count} promises{failed} ({record['seconds']:.0f} s)"
    )
    return record


def _schedules(quick: bool) -> list[str]:
    names = list(runs.SCHEDULES)
    return [names[0], names[1], "flow"] if quick else names


def _promised(solver: str) -> dict[str, Any]:
    promise = PROMISES[solver]
    return {
        "order": promise.order,
        "within": promise.within,
        "at_least": promise.at_least,
        "error": None if promise.error == float("inf") else promise.error,
        "error_calls": ERROR_CALLS,
        "stochastic": promise.stochastic,
        "text": promise.text(),
        "elsewhere": promise.text(reference=False),
    }


def _weight(job: Job) -> float:
    per_step = {"rk4": 4, "dpmpp_3s": 3, "heun": 2, "midpoint": 2, "dpmpp_2s": 2}
    return per_step.get(job[0], 1) * (2 if job[1].startswith("vp") else 1)


def _where(cell: dict[str, Any]) -> str:
    parts = [cell["solver"], cell["schedule"], *(cell[k] for k in ("prediction", "dtype", "device") if k in cell)]
    return " ".join([*parts, "reference"] if cell.get("backend") == "reference" else parts)


# ------------------------------------------------------------------------------------------------------- processes


def _run(tasks: Sequence[tuple[Callable[..., Any], tuple[Any, ...], str]], jobs: int) -> Iterator[tuple[int, Any]]:
    """(number, result) of every task, as they are done."""
    if jobs == 1 or len(tasks) == 1:
        for index, (function, args, _) in enumerate(tasks):
            yield index, function(*args)
        return
    # Fresh processes: a forked copy of a process with OpenMP threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        futures = {pool.submit(function, *args): index for index, (function, args, _) in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _peer(index: int, quick: bool) -> dict[str, Any]:
    return peers.certify(peers.PEERS[index], QUICK_COUNTS[:10] if quick else PEER_COUNTS)


def _measure(job: Job, devices: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """All cells of one solver on one schedule."""
    solver, name, quick = job
    found: dict[str, list[dict[str, Any]]] = {"order": [], "precision": [], "finite": []}
    predictions: Sequence[str] = PREDICTIONS[:2] if quick else PREDICTIONS
    if name in ORDER_SCHEDULES:
        place = list(ORDER_SCHEDULES).index(name)
        if place and not quick:  # in float64 a run is the same for all of them; beyond the reference, each in its turn
            predictions = [PREDICTIONS[place % 3 + 1]]
        # A flow begins without data, of which epsilon says nothing: such a run starts elsewhere, off an even grid.
        predictions = [p for p in predictions if not (p == "epsilon" and name.startswith("flow"))]
        function = runs.weak_order if PROMISES[solver].stochastic else runs.order
        found["order"] = [_guarded(function, runs.cell_of(solver, name, p), solver, name, p) for p in predictions]
        if name in INVERTED and not PROMISES[solver].stochastic:
            for p in predictions:
                cell = {**runs.cell_of(solver, name, p), "inverse": True}
                found["order"].append(_guarded(runs.order, cell, solver, name, p, True))
        for p in predictions:
            cells = _guarded(runs.precision, runs.cell_of(solver, name, p, "float32"), solver, name, p, devices)
            found["precision"] += cells if isinstance(cells, list) else [cells]
    counts = QUICK_COUNTS if quick else STEP_COUNTS
    found["finite"] = [runs.finite(solver, name, counts, PREDICTIONS, _EVERY)]
    return found


def _adaptive(name: str) -> dict[str, list[dict[str, Any]]]:
    """The cells of the adaptive solver on one schedule."""
    return {"adaptive": [_guarded(adaptive, runs.cell_of(ADAPTIVE, name, p), name, p) for p in PREDICTIONS]}


def _guarded(function: Callable[..., Any], cell: dict[str, Any], *args: Any) -> Any:
    """``function(*args)``. A cell that cannot be measured is a broken promise, and the others are still measured."""
    try:
        return function(*args)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        nothing: dict[str, Any] = {"error": float("nan"), "errors": [], "nfe": [], "order": None, "runs": []}
        return {**cell, "ok": False, "failures": [what], **nothing}
