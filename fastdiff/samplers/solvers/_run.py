"""The language in which solvers are written: they run once, on symbols, in float64.

A solver calls :meth:`Run.evaluate` on a state and gets back what the model will say there, as *data* (its x0) and
*noise* (its epsilon): linear combinations of tensors that do not exist yet. It combines them as its paper does; what
reaches the next ``evaluate`` or the end is recorded: a list of :class:`Stage`, one for each evaluation of the model,
each with the coefficients of the state that follows. Running the plan is then a single ``ops.linear_update`` per
stage. That all explicit solvers are such lists is because prediction -> (data, noise) is linear in (x, prediction).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastdiff.samplers.schedules import Schedule

__all__ = ["Evaluation", "Point", "Run", "Stage", "Sum", "conversion"]

Key = tuple[str, int]  # ("x" | "m" | "n", i): the state, the model's output, the noise drawn at the i-th evaluation


class Sum:
    """A linear combination of states, model outputs and noises: ``{("x", i) | ("m", i) | ("n", i): coefficient}``."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Key, float]) -> None:
        self.terms = dict(terms)

    def __add__(self, other: Sum) -> Sum:
        terms = dict(self.terms)
        for key, c in other.terms.items():
            terms[key] = terms.get(key, 0.0) + c
        return Sum(terms)

    def __sub__(self, other: Sum) -> Sum:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Sum:
        return Sum({key: float(factor) * c for key, c in self.terms.items()})


@dataclass(frozen=True)
class Point:
    """A time of the schedule with its levels."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma)."""
        if self.alpha == 0.0 or self.sigma == 0.0:
            return -math.inf if self.alpha == 0.0 else math.inf
        return math.log(self.alpha) - math.log(self.sigma)


@dataclass(frozen=True)
class Evaluation:
    """The model at a point: the state it is given, and the data and noise that its output stands for."""

    point: Point
    x: Sum
    data: Sum
    noise: Sum


@dataclass(frozen=True)
class Stage:
    """One evaluation of the model and the state that follows it.

    Attributes:
        time: what the model is given.
        alpha: level of the state that the model is given.
        sigma: likewise.
        terms: ((kind, lag), coefficient): the next state is the sum over states ``"x"`` and model outputs ``"m"``, this
            stage's for lag 0, the one's before for lag 1, ..., and fresh normal noise ``"n"``.
        step: the number of the step that this stage completes, or -1.
    """

    time: float
    alpha: float
    sigma: float
    terms: tuple[tuple[tuple[str, int], float], ...]
    step: int


def conversion(prediction: str, alpha: float, sigma: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """((a, b), (c, d)): data = a x + b pred and noise = c x + d pred, at x = alpha data + sigma noise.

    Raises:
        ValueError: the level at which such a prediction says nothing of the other part (epsilon without data, sample
            without noise).
    """
    if prediction == "epsilon":
        if alpha == 0.0:
            raise ValueError("[samplers] prediction: expected anything but 'epsilon' where alpha = 0, got 'epsilon'")
        return (1 / alpha, -sigma / alpha), (0.0, 1.0)
    if prediction == "sample":
        if sigma == 0.0:
            raise ValueError("[samplers] prediction: expected anything but 'sample' where sigma = 0, got 'sample'")
        return (0.0, 1.0), (1 / sigma, -alpha / sigma)
    if prediction == "v":  # alpha noise - sigma data
        power = alpha * alpha + sigma * sigma
        return (alpha / power, -sigma / power), (sigma / power, alpha / power)
    total = alpha + sigma  # "flow": data - noise
    return (1 / total, sigma / total), (1 / total, -alpha / total)


class Run:
    """What a solver sees: the points of the run, and the recorder of stages.

    Attributes:
        points: the N + 1 points of the run.
        steps: N.
        start: the state at ``points[0]``.
        schedule: where more points come from, :meth:`at`.
        forward: the run goes from noise to data; an inversion goes the other way.
        logarithmic: multistep solvers interpolate in lambda, as in their papers; see `solvers._exponential`.
    """

    def __init__(
        self, schedule: Schedule, points: tuple[Point, ...], prediction: str, *, forward: bool, logarithmic: bool
    ) -> None:
        self.schedule, self.points, self.prediction = schedule, points, prediction
        self.forward, self.logarithmic = forward, logarithmic
        self.steps = len(points) - 1
        self.start = Sum({("x", 0): 1.0})
        self.stages: list[Stage] = []
        self._asked: list[Point] = []
        self._noises = 0
        self._done = self._reported = 0

    def at(self, t: float) -> Point:
        """Any other point."""
        return Point(t, self.schedule.alpha(t), self.schedule.sigma(t))

    def evaluate(self, x: Sum, point: Point) -> Evaluation:
        """Asks the model at state `x`, which becomes a tensor here."""
        i = len(self._asked)
        if i:
            self._record(x)
        (a, b), (c, d) = conversion(self.prediction, point.alpha, point.sigma)
        self._asked.append(point)
        state, model = ("x", i), ("m", i)
        return Evaluation(point, Sum({state: 1.0}), Sum({state: a, model: b}), Sum({state: c, model: d}))

    def noise(self) -> Sum:
        """Fresh standard normal noise; at most one between two evaluations."""
        return Sum({("n", len(self._asked) - 1): 1.0})

    def completed(self) -> None:
        """Says that the state given next, to `evaluate` or `finish`, is at the end of a step."""
        self._done += 1

    def finish(self, x: Sum) -> tuple[Stage, ...]:
        """Ends the run with state `x`."""
        self._record(x)
        return tuple(self.stages)

    def _record(self, x: Sum) -> None:
        i = len(self._asked) - 1
        point = self._asked[i]
        terms = tuple(((kind, i - j), c) for (kind, j), c in sorted(x.terms.items(), key=_order(i)) if c != 0.0)
        step = self._done - 1 if self._done > self._reported else -1
        self._reported = self._done
        self.stages.append(Stage(point.t, point.alpha, point.sigma, terms, step))

    # ------------------------------------------------------------------------------------------------- for solvers

    def mix(self, now: Evaluation, to: Point) -> Sum:
        """alpha data + sigma noise at another level: DDIM's deterministic step (Song et al. 2021, eq. 12)."""
        return to.alpha * now.data + to.sigma * now.noise

    def slope(self, now: Evaluation) -> Sum:
        """dx/dt of the probability-flow ODE: alpha' data + sigma' noise (Song et al., arXiv:2011.13456, eq. 13)."""
        t = now.point.t
        return self.schedule.alpha_rate(t) * now.data + self.schedule.sigma_rate(t) * now.noise


def _order(i: int):  # type: ignore[no-untyped-def]
    """Newest first; of one age the state, the output, the noise."""
    return lambda item: (i - item[0][1], "xmn".index(item[0][0]))
