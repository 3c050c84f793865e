"""A better solver, schedule or step count for the same number of evaluations of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastdiff.analysis.budget import ErrorBudget, ModelError, error_budget
from fastdiff.analysis.optimise import optimise_times
from fastdiff.analysis.oracles import GaussianOracle
from fastdiff.samplers import Plan, make_plan
from fastdiff.samplers.schedules import Schedule

__all__ = ["ADVICE", "Candidate", "better_runs", "steps_for"]

# Evaluations in a step; 1 for all others.
_EVALUATIONS = {"heun": 2, "midpoint": 2, "dpmpp_2s": 2, "dpmpp_3s": 3, "rk4": 4}
CANDIDATES = ("ddim", "heun", "rk4", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "deis_3")

ADVICE = {
    "truncation": "the run stops before the data: end it where sigma = 0 (final='zero'), or at a smaller sigma",
    "discretisation": "the steps are too coarse for this solver: another solver or schedule, or more steps",
    "initialisation": "pure noise is not the marginal at the first time: start at more noise (zero terminal SNR, or a "
    "larger sigma_max), or a flow, whose start is noise exactly",
    "score": "the network is what is wrong: steps and solvers cannot help, training can; fewer steps may do as well",
}


@dataclass(frozen=True)
class Candidate:
    """A run that was tried: solver, name of the schedule, its plan and its exact budget."""

    solver: str
    schedule: str
    plan: Plan
    budget: ErrorBudget

    @property
    def cost(self) -> float:
        """Sum of the W2 of all sources: unlike the total, it does not profit from errors that happen to cancel."""
        total = sum(source.w2 for source in self.budget.sources.values())
        return total if math.isfinite(total) else math.inf


def better_runs(
    oracle: GaussianOracle,
    schedules: Mapping[str, Schedule],
    nfe: int,
    *,
    prediction: str = "epsilon",
    error: ModelError | None = None,
    solvers: tuple[str, ...] = CANDIDATES,
    optimise: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Candidate]:
    """Exact budgets of all solvers on all schedules with at most `nfe` evaluations, best first.

    Args:
        oracle: the data.
        schedules: by name, those that the network can be run on.
        nfe: evaluations allowed.
        prediction: what the network predicts.
        error: what is wrong with the network.
        solvers: names.
        optimise: also optimise the times of the best one, for this data.
        progress: ``progress(done, total, label)``.

    Returns:
        Candidates by rising `Candidate.cost`.

    Raises:
        ValueError: fewer evaluations than any solver needs.
    """
    pairs = [(s, name) for name in schedules for s in solvers if nfe >= _EVALUATIONS.get(s, 1)]
    if not pairs:
        least = min((_EVALUATIONS.get(s, 1) for s in solvers), default=1)
        raise ValueError(f"[better_runs] nfe: expected at least {least}, a step of the cheapest solver, got {nfe}")
    found = []
    for done, (solver, name) in enumerate(pairs):
        if progress is not None:
            progress(done, len(pairs), f"{solver} on {name}")
        steps = nfe // _EVALUATIONS.get(solver, 1)
        plan = make_plan(solver, schedules[name], steps, prediction=prediction)
        while plan.nfe > nfe and steps > 1:  # some solvers spend more on their first steps
            steps -= 1
            plan = make_plan(solver, schedules[name], steps, prediction=prediction)
        if plan.nfe <= nfe:
            found.append(Candidate(solver, name, plan, error_budget(oracle, plan, error=error)))
    found.sort(key=lambda c: c.cost)
    best = found[0]
    if optimise and best.plan.steps >= 2:
        tuned = optimise_times(
            oracle, best.plan.schedule, best.solver, best.plan.steps, prediction=prediction, times=best.plan.times
        )
        name = f"{best.schedule}, times optimised"
        found.append(Candidate(best.solver, name, tuned.plan, error_budget(oracle, tuned.plan, error=error)))
        found.sort(key=lambda c: c.cost)
    return found


def steps_for(
    oracle: GaussianOracle,
    schedule: Schedule,
    solver: str,
    target: float,
    *,
    prediction: str = "epsilon",
    error: ModelError | None = None,
    most: int = 1024,
) -> int | None:
    """The smallest number of steps at which the sum of a run's sources (`Candidate.cost`) is at most `target`.

    By doubling and bisection, which takes the error to fall with the steps; None if `most` steps do not reach it.

    Raises:
        ValueError: `most` is less than 1.
    """

    def reached(steps: int) -> bool:
        plan = make_plan(solver, schedule, steps, prediction=prediction)
        return Candidate(solver, "", plan, error_budget(oracle, plan, error=error)).cost <= target

    if most < 1:
        raise ValueError(f"[steps_for] most: expected at least 1, got {most}")
    low, high = 0, 1  # low: not reached
    while not reached(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
