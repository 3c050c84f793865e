"""Where the error of a sampling run comes from: exact for Gaussian data and every linear scheme.

With Gaussian data a perfect network is affine in x, and every explicit solver is a sum of earlier states, outputs and
noise with known coefficients. So the state is Gaussian all the way, and its mean and covariance follow by recursion
without any sampling (Pierret & Galerne 2025, "Diffusion models for Gaussian distributions: exact solutions and
Wasserstein errors", arXiv:2405.14250). In the eigenbasis of the data's covariance the coordinates are independent, and
the recursion is one of small matrices: the covariance of the last few states of a multistep method.

Four laws follow one another from the data to what the run produces, and each step between two of them is one source:

    data --truncation--> exact marginal at the end of the run (sigma > 0 there, early stopping)
         --discretisation--> the run, started from the exact marginal, with the exact network
         --initialisation--> the same run, started from pure noise
         --score--> the same run with the network's error

W2 is a metric: the total is at most the sum of the four. KL(before || after) is given too, and does not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fastdiff.analysis.gaussians import Moments, diagonal_kl, diagonal_w2
from fastdiff.analysis.oracles import GaussianOracle
from fastdiff.samplers.solvers import Stage, conversion

__all__ = ["SOURCES", "ErrorBudget", "ModelError", "Scheme", "Source", "Trajectory", "error_budget", "propagate"]

SOURCES = ("truncation", "discretisation", "initialisation", "score")


class Scheme(Protocol):
    """What the recursion needs of a run; `fastdiff.samplers.make_plan` returns one."""

    @property
    def stages(self) -> tuple[Stage, ...]: ...
    @property
    def prediction(self) -> str: ...
    @property
    def initial_scale(self) -> float: ...
    @property
    def times(self) -> Tensor: ...
    @property
    def schedule(self) -> Any: ...


@dataclass(frozen=True)
class ModelError:
    """A planted error of the network: it returns (1 + relative) m + bias + random z instead of the exact m.

    Attributes:
        relative: a relative error; with ``prediction="epsilon"`` it is the relative error of the score.
        bias: a constant error along every eigenvector of the data's covariance.
        random: standard deviation of an error that is independent, z ~ N(0, 1), at every evaluation and coordinate.
    """

    relative: float = 0.0
    bias: float = 0.0
    random: float = 0.0

    def __bool__(self) -> bool:
        return self.relative != 0.0 or self.bias != 0.0 or self.random != 0.0


@dataclass(frozen=True)
class Trajectory:
    """Mean and variance of the state along a run, in the eigenbasis of the data: rows are the run's steps, 0 to N.

    Attributes:
        means: [N + 1, D].
        variances: [N + 1, D].
        score_mse: one number per evaluation of the network: E|s' - s|^2 / D of the planted error, s the score.
    """

    means: np.ndarray
    variances: np.ndarray
    score_mse: np.ndarray

    @property
    def final(self) -> Moments:
        return self.means[-1], self.variances[-1]


@dataclass(frozen=True)
class Source:
    """One source of error: W2 (not squared) and KL (nats) between the laws before and after it."""

    w2: float
    kl: float


@dataclass(frozen=True)
class ErrorBudget:
    """The error of a run by source; see the module's text.

    Attributes:
        sources: by name, in the order of `SOURCES`.
        total: between the data and what the run produces.
        dimension: D, the number of coordinates; W2 grows with its square root and KL with D.
        nfe: evaluations of the network.
        steps: W2 to the exact marginal after every step, [N + 1].
        score_mse: mean over the run of the planted error of the score, per coordinate.
    """

    sources: dict[str, Source]
    total: Source
    dimension: int
    nfe: int
    steps: tuple[float, ...]
    score_mse: float

    @property
    def dominating(self) -> str:
        """The source with the largest W2."""
        return max(self.sources, key=lambda name: self.sources[name].w2)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "sources": {name: {"w2": s.w2, "kl": s.kl} for name, s in self.sources.items()},
            "total": {"w2": self.total.w2, "kl": self.total.kl},
            "dominating": self.dominating,
            "dimension": self.dimension,
            "nfe": self.nfe,
            "steps_w2": list(self.steps),
            "score_mse": self.score_mse,
        }


def error_budget(oracle: GaussianOracle, scheme: Scheme, *, error: ModelError | None = None) -> ErrorBudget:
    """The exact error of a run by source.

    Args:
        oracle: the data, Gaussian.
        scheme: a plan from noise to data.
        error: what is wrong with the network; None: nothing.

    Raises:
        ValueError: a plan from data to noise.
    """
    data = _components(oracle)
    levels = [(_level(scheme.schedule.alpha, t), _level(scheme.schedule.sigma, t)) for t in scheme.times.tolist()]
    if levels[-1][1] * levels[0][0] > levels[0][1] * levels[-1][0]:
        raise ValueError("[error_budget] scheme: expected a run from noise to data, got one from data to noise")
    exact = [_marginal(data, *level) for level in levels]
    ideal = propagate(oracle, scheme, start="exact").final
    clean = propagate(oracle, scheme, start="noise")
    actual = propagate(oracle, scheme, start="noise", error=error) if error else clean
    laws = (data, exact[-1], ideal, clean.final, actual.final)
    sources = {
        name: _source(before, after) for name, before, after in zip(SOURCES, laws[:-1], laws[1:], strict=True)
    }
    steps = tuple(
        diagonal_w2(law, (mean, variance))
        for law, mean, variance in zip(exact, actual.means, actual.variances, strict=True)
    )
    return ErrorBudget(
        sources=sources,
        total=_source(data, actual.final),
        dimension=len(data[0]),
        nfe=len(scheme.stages),
        steps=steps,
        score_mse=float(np.mean(actual.score_mse)),
    )


def propagate(
    oracle: GaussianOracle, scheme: Scheme, *, start: str = "noise", error: ModelError | None = None
) -> Trajectory:
    """Mean and covariance of every state of a run, exactly.

    Args:
        oracle: the data, Gaussian.
        scheme: a plan.
        start: ``"noise"``: N(0, initial_scale^2); ``"exact"``: the marginal of the data at the first time.
        error: what is wrong with the network.

    Returns:
        The law of the state after each step.

    Raises:
        ValueError: unknown start.
    """
    if start not in ("noise", "exact"):
        raise ValueError(f"[propagate] start: expected 'noise' or 'exact', got {start!r}")
    error = error or ModelError()
    center, spread = _components(oracle)
    stages, size = scheme.stages, len(center)
    depth = 1 + max((lag for stage in stages for (_, lag), _ in stage.terms), default=0)
    # The window: states x, noises n and random errors e of the network, each of lags 0 .. depth - 1.
    base = {"x": 0, "n": depth, "e": 2 * depth}
    mean, cov = np.zeros((size, 3 * depth)), np.zeros((size, 3 * depth, 3 * depth))
    if start == "noise":
        cov[:, 0, 0] = scheme.initial_scale**2
    else:
        mean[:, 0], cov[:, 0, 0] = _marginal((center, spread), stages[0].alpha, stages[0].sigma)
    means, variances = [mean[:, 0].copy()], [cov[:, 0, 0].copy()]
    outputs: list[tuple[np.ndarray, np.ndarray]] = []  # by lag: the network is gain x + offset
    mse = []
    source = np.array([b + lag for b in base.values() for lag in range(depth - 1)], dtype=int)
    for stage in stages:
        for kind in ("n", "e"):
            cov[:, base[kind], base[kind]] = 1.0
        gain, offset = _network(scheme.prediction, stage, center, spread)
        mse.append(_score_mse(scheme.prediction, stage, error, gain, offset, mean[:, 0], cov[:, 0, 0]))
        outputs.insert(0, ((1 + error.relative) * gain, (1 + error.relative) * offset + error.bias))
        del outputs[depth:]
        row, shift = np.zeros((size, 3 * depth)), np.zeros(size)
        for (kind, lag), coefficient in stage.terms:
            if kind == "m":
                row[:, lag] += coefficient * outputs[lag][0]
                row[:, base["e"] + lag] += coefficient * error.random
                shift += coefficient * outputs[lag][1]
            else:
                row[:, base[kind] + lag] += coefficient
        new_mean = np.einsum("ds,ds->d", row, mean) + shift
        cross = np.einsum("dst,dt->ds", cov, row)
        new_variance = np.einsum("ds,ds->d", cross, row)
        shifted_mean, shifted_cov = np.zeros_like(mean), np.zeros_like(cov)
        shifted_mean[:, source + 1] = mean[:, source]
        shifted_cov[:, (source + 1)[:, None], source + 1] = cov[:, source[:, None], source]
        shifted_cov[:, 0, source + 1] = shifted_cov[:, source + 1, 0] = cross[:, source]
        shifted_mean[:, 0], shifted_cov[:, 0, 0] = new_mean, new_variance
        mean, cov = shifted_mean, shifted_cov
        if stage.step >= 0:
            means.append(new_mean)
            variances.append(np.maximum(new_variance, 0.0))
    return Trajectory(np.stack(means), np.stack(variances), np.array(mse))


def _network(prediction: str, stage: Stage, center: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact network along each eigenvector: gain and offset of its output as a function of x."""
    a, s = stage.alpha, stage.sigma
    total = a * a * spread + s * s
    data, noise = a * spread / total, s / total  # of x - alpha m
    gain, constant = {
        "epsilon": (noise, 0.0 * center),
        "sample": (data, center),
        "v": (a * noise - s * data, -s * center),
        "flow": (data - noise, center),
    }[prediction]
    return gain, constant - gain * a * center


def _score_mse(
    prediction: str, stage: Stage, error: ModelError, gain: np.ndarray, offset: np.ndarray, mean: np.ndarray,
    variance: np.ndarray,
) -> float:  # fmt: skip
    """E|s' - s|^2 / D at the states that the run visits; s = -noise / sigma."""
    if not error or stage.sigma == 0.0:
        return 0.0
    try:
        to_noise = conversion(prediction, stage.alpha, stage.sigma)[1][1] / stage.sigma
    except ValueError:  # this level's output does not say what the noise is
        return float("nan")
    systematic = error.relative * (gain * mean + offset) + error.bias
    square = systematic**2 + (error.relative * gain) ** 2 * variance + error.random**2
    return float(to_noise**2 * np.mean(square))


def _components(oracle: GaussianOracle) -> Moments:
    mean, variance = oracle.components()
    return mean.numpy(), variance.numpy()


def _marginal(data: Moments, alpha: float, sigma: float) -> Moments:
    return alpha * data[0], alpha**2 * data[1] + sigma**2


def _source(before: Moments, after: Moments) -> Source:
    return Source(diagonal_w2(before, after), diagonal_kl(before, after))


def _level(function: Any, t: float) -> float:
    return float(function(t))


