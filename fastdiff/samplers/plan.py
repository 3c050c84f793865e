"""Plans: everything of a sampling run that does not depend on the model, computed once in float64.

    plan = make_plan("dpmpp_2m", schedules.vp("scaled_linear", spacing="karras"), 20, prediction="v")
    images = sample(model, noise, plan=plan)

A plan is a list of stages: ask the model at time t, then form the next state, a sum of earlier states, outputs and
noise with known coefficients. It is immutable, holds no tensors of the run, and serves any number of runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastdiff.samplers.schedules import Schedule
from fastdiff.samplers.solvers import SOLVERS, Stage
from fastdiff.samplers.solvers._run import Point, Run

__all__ = ["PREDICTIONS", "Plan", "Tables", "make_plan"]

PREDICTIONS = ("epsilon", "v", "sample", "flow")
DEEPEST = 1e3  # sigma / alpha (or its inverse) at which a prediction that says nothing at the very end is first asked


@dataclass(frozen=True, eq=False)
class Tables:
    """A plan as tensors.

    A stage's next state is ``linear_update(coefficients[i], terms)`` or, with a counter on the device that a CUDA graph
    of one stage advances, ``linear_update(coefficients, terms, step=counter)``. Noise is drawn on the way, without a
    tensor of its own, by ``linear_update(coefficients[:, :-1], others, seed=seed, noise_scale=coefficients[:, -1],
    step=seed[1:])`` from seed = (run's seed, counter).

    Attributes:
        times: [nfe] float64, what the model is given.
        terms: for each column of `coefficients` what it multiplies: ("x", lag) a state and ("m", lag) a prediction,
            this stage's for lag 0, or ("n", 0) fresh noise, which comes last.
        coefficients: [nfe, len(terms)] float64.
    """

    times: Tensor
    terms: tuple[tuple[str, int], ...]
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """The run of a solver on a schedule. Made by :func:`make_plan`.

    Attributes:
        solver: its name.
        schedule: the schedule.
        prediction: what the model predicts.
        stages: one for every evaluation of the model, in order.
        options: the solver's options.
        interpolation: ``"lambda"`` or ``"bounded"``, see :func:`make_plan`.
        forward: the run goes from noise to data.
        stochastic: it draws noise.
        initial_scale: the factor that makes standard normal noise a state at ``times[0]``: sigma there for EDM and
            flows, 1 for VP schedules, whose states have unit variance, and for an inversion.
        step_times: the times of the run, first to last: noise to data, or data to noise for an inversion.
    """

    solver: str
    schedule: Schedule
    prediction: str
    stages: tuple[Stage, ...]
    options: Mapping[str, Any]
    interpolation: str
    forward: bool
    stochastic: bool
    initial_scale: float
    step_times: tuple[float, ...]
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of the arguments; what was kept for a device stays behind."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return Plan, (*{**values, "options": dict(self.options)}.values(),)

    @property
    def times(self) -> Tensor:
        """[steps + 1] float64, `step_times` as a new tensor."""
        return torch.tensor(self.step_times, dtype=torch.float64)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.step_times) - 1

    @property
    def nfe(self) -> int:
        """Evaluations of the model in a run, without guidance (which doubles them)."""
        return len(self.stages)

    def tables(self, device: torch.device | str = "cpu") -> Tables:
        """The plan as tensors, for a loop of one's own: see :class:`Tables`."""
        keys = sorted({key for stage in self.stages for key, _ in stage.terms}, key=lambda k: ("xmn".index(k[0]), k[1]))
        coefficients = torch.zeros(self.nfe, len(keys), dtype=torch.float64)
        for row, stage in zip(coefficients, self.stages, strict=True):
            for key, c in stage.terms:
                row[keys.index(key)] = c
        times = torch.tensor([stage.time for stage in self.stages], dtype=torch.float64)
        return Tables(times.to(device), tuple(keys), coefficients.to(device))

    def reversed(self) -> Plan:
        """The same solver from the last time to the first: an inversion, from data to noise (and back again).

        Raises:
            ValueError: the plan draws noise.
        """
        if self.stochastic or SOLVERS[self.solver].stochastic:
            raise ValueError(f"[Plan.reversed] solver: expected one that draws no noise, got {self.solver!r}")
        return make_plan(
            self.solver, self.schedule, None, prediction=self.prediction, times=self.times.flip(0),
            interpolation=self.interpolation, **self.options,
        )  # fmt: skip

    def with_prediction(self, prediction: str) -> Plan:
        """The same run for a model that predicts something else."""
        return make_plan(
            self.solver, self.schedule, None, prediction=prediction, times=self.times,
            interpolation=self.interpolation, **self.options,
        )  # fmt: skip


def make_plan(
    solver: str,
    schedule: Schedule,
    steps: int | None,
    *,
    prediction: str = "epsilon",
    times: Tensor | Sequence[float] | None = None,
    interpolation: str = "auto",
    **options: Any,
) -> Plan:
    """Computes the plan of a run.

    Args:
        solver: a name in ``fastdiff.samplers.SOLVERS``.
        schedule: from ``fastdiff.samplers.schedules``.
        steps: number of steps N, at least 1; None with `times`.
        prediction: what the model predicts of x = alpha data + sigma noise: ``"epsilon"`` noise; ``"v"`` alpha noise -
            sigma data; ``"sample"`` data; ``"flow"`` data - noise. A model that predicts epsilon says nothing where
            alpha = 0: such a run starts (an inversion ends) at sigma / alpha = 1000 instead of infinity, and that of a
            sample prediction from sigma = 0 (an inversion) at 1 / 1000.
        times: [N + 1] times of one's own, in place of ``schedule.times(steps)``; noise falling all the way (or, for
            an inversion, rising).
        interpolation: the variable of multistep and singlestep solvers. ``"lambda"``: log(alpha / sigma), as in
            their papers. ``"bounded"``: one that stays smooth up to data and noise, which keeps their order on
            times that are not even in lambda. ``"auto"``: lambda on Karras and EDM times, bounded on others.
        **options: the solver's, e.g. ``eta`` of DDIM.

    Raises:
        ValueError: an argument is not one of these or out of range, or the noise does not fall (or rise).
        TypeError: the solver has no such option.
    """
    if solver not in SOLVERS:
        raise ValueError(f"[make_plan] solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"[make_plan] prediction: expected one of {PREDICTIONS}, got {prediction!r}")
    if interpolation not in ("auto", "lambda", "bounded"):
        raise ValueError(f"[make_plan] interpolation: expected 'auto', 'lambda' or 'bounded', got {interpolation!r}")
    known = SOLVERS[solver]
    for name in options:
        if name not in known.options:
            expected = ", ".join(known.options) or "none"
            raise TypeError(f"[make_plan] options of {solver}: expected {expected}, got {name!r}")
    if times is None:
        if steps is None:
            raise ValueError("[make_plan] steps: expected a number of steps, or times, got None")
        times = schedule.times(steps)
    times = torch.as_tensor(times, dtype=torch.float64).detach().to("cpu", copy=True)
    if times.dim() != 1 or len(times) < 2 or (steps is not None and len(times) != steps + 1):
        expected = "[steps + 1], steps at least 1" if steps is None else f"[{steps + 1}]"
        raise ValueError(f"[make_plan] times: expected shape {expected}, got {list(times.shape)}")
    low, high = schedule._range
    if not bool(((times >= low) & (times <= high)).all()):
        raise ValueError(
            f"[make_plan] times: expected times of the schedule, {low:g} to {high:g}, got {times.tolist()}"
        )
    forward = _falls(schedule, times)
    if not forward and known.stochastic:
        raise ValueError(f"[make_plan] times: expected noise that falls with {solver!r}, got {times.tolist()}")
    times = _informative(schedule, times, prediction)
    if not forward:
        times = _informative(schedule, times.flip(0), prediction).flip(0)
    angles = torch.atan2(schedule.sigma(times), schedule.alpha(times)).diff()
    if not bool((angles <= 0).all() if forward else (angles >= 0).all()):
        raise ValueError(f"[make_plan] times: expected noise that falls (or rises) all the way, got {times.tolist()}")
    if interpolation == "auto":
        interpolation = "lambda" if schedule.log_spaced else "bounded"
    points = tuple(
        Point(t, a, s)
        for t, a, s in zip(times.tolist(), schedule.alpha(times).tolist(), schedule.sigma(times).tolist(), strict=True)
    )
    run = Run(schedule, points, prediction, forward=forward, logarithmic=interpolation == "lambda")
    stages = known.stages(run, **options)
    stochastic = any(kind == "n" for stage in stages for (kind, _), _ in stage.terms)
    scale = 1.0 if not forward or schedule.kind == "vp" else points[0].sigma
    ends = tuple(p.t for p in points)
    return Plan(solver, schedule, prediction, stages, options, interpolation, forward, stochastic, scale, ends)


def _falls(schedule: Schedule, times: Tensor) -> bool:
    first, last = float(times[0]), float(times[-1])
    return schedule.sigma(last) * schedule.alpha(first) <= schedule.sigma(first) * schedule.alpha(last)


def _informative(schedule: Schedule, times: Tensor, prediction: str) -> Tensor:
    """The times of a run, which begins where the prediction first says something."""
    first = _first_time(schedule, float(times[0]), prediction)
    if first == float(times[0]):
        return times
    # Times before it are moved into what is left, so that the noise still falls (or rises) in every step.
    rest = ((times - first) * (first - times[0]) > 0).nonzero()
    if not len(rest):
        expected = f"some after {first}, before which predicting {prediction} says nothing of the rest"
        raise ValueError(f"[make_plan] times: expected {expected}, got {times.tolist()}")
    later = int(rest[0])
    moved = times.clone()
    moved[: later + 1] = torch.linspace(first, float(times[later]), later + 1, dtype=torch.float64)
    return moved


def _first_time(schedule: Schedule, t: float, prediction: str) -> float:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if prediction == "epsilon" and alpha * DEEPEST < sigma:
        return schedule.time_at(DEEPEST)
    if prediction == "sample" and sigma * DEEPEST < alpha:
        return schedule.time_at(1 / DEEPEST)
    return t
