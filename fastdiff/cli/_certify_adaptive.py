"""The adaptive solver in ``fastdiff certify``: its error follows the tolerance, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdiff.cli._certify_runs import Perfect, _gaps, _levels, cell_of, oracle, schedule
from fastdiff.samplers import solve
from fastdiff.samplers.adaptive import _initial_scale, ode_times

__all__ = ["ALLOWED", "TOLERANCES", "adaptive"]

TOLERANCES = (1e-3, 1e-5, 1e-7, 1e-9)
# Tolerances of error at the end. The tolerance is of one step and of a root mean square, so the worst of P = 30 points
# is off by up to sqrt(P) of it in each of some ten steps that matter.
ALLOWED = 50.0


def adaptive(name: str, prediction: str) -> dict[str, Any]:
    """Noise to data and back in float64 with falling tolerances, against the exact paths.

    An error grows like the distance between neighbouring paths (80 / 0.25 from a narrow target to the noise of EDM), of
    which the largest growth is allowed for. A run that ends with a step to data has to give the mean of the data there.
    """
    known, failures = oracle(), []
    runs = []
    noisy, clean = ode_times(schedule(name), prediction)
    for inverse in (False, True):
        first, last = (clean, noisy) if inverse else (noisy, clean)
        start, exact = (known.state(*_levels(name, t)) for t in (first, last))
        growth = max(1.0, (_gaps(exact) / _gaps(start)).max().item())
        if not inverse and schedule(name).sigma(last) > 0 and float(schedule(name).times(1)[-1]) == schedule(name).end:
            exact = known.data(exact, *_levels(name, last))
        begin = start if inverse else start / _initial_scale(schedule(name), first)
        for tolerance in TOLERANCES:
            model = Perfect(name, prediction, known)
            found = solve(
                _of_level(model), begin, schedule(name), prediction=prediction, rtol=tolerance, atol=tolerance,
                inverse=inverse,
            )  # fmt: skip
            error, allowed = (found.final - exact).abs().max().item(), ALLOWED * tolerance * growth
            if not error <= allowed:
                where = "inversion, " if inverse else ""
                failures.append(f"{where}tolerance {tolerance:g}: error {error:.1e}, allowed {allowed:.1e}")
            runs.append(
                {"tolerance": tolerance, "inverse": inverse, "nfe": found.nfe, "error": error, "allowed": allowed}
            )
    return {**cell_of("adaptive", name, prediction), "runs": runs, "ok": not failures, "failures": failures}


def _of_level(model: Perfect) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda x, t, level: model(x, t)
