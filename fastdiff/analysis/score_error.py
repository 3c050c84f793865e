"""How wrong a score network is, noise level by noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.analysis._student import interval_factor
from fastdiff.analysis.oracles import Oracle, Schedule
from fastdiff.ops.update import PREDICTIONS

__all__ = ["ScoreErrorReport", "TimestepError", "analyze_score_estimation_error"]


@dataclass(frozen=True)
class TimestepError:
    """The error at one time.

    Attributes:
        t: the time.
        alpha, sigma: the levels there.
        mse: E|s' - s|^2 / D, per element of x.
        low, high: confidence interval of `mse`.
        relative: E|s' - s|^2 / E|s|^2.
        weighted: sigma^2 mse, the error of the predicted noise, which is comparable between times.
    """

    t: float
    alpha: float
    sigma: float
    mse: float
    low: float
    high: float
    relative: float
    weighted: float


@dataclass(frozen=True)
class ScoreErrorReport:
    """What `analyze_score_estimation_error` found.

    Attributes:
        timesteps: one entry per time, in the order given.
        mean: mean of the timesteps' mse.
        low, high: confidence interval of `mean`; the data, not the pairs (data, time), count as independent.
        worst: the entry with the largest mse; one that is NaN is the worst of all.
        samples: number of test data.
        dimension: D, elements of a sample: E|s' - s|^2 is D times the mse.
        confidence: level of all intervals.
    """

    timesteps: tuple[TimestepError, ...]
    mean: float
    low: float
    high: float
    worst: TimestepError
    samples: int
    dimension: int
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def analyze_score_estimation_error(
    model: Callable[..., Tensor],
    true_score: Oracle | Callable[..., Tensor],
    test_data: Tensor,
    timesteps: Sequence[float] | Tensor,
    *,
    schedule: Schedule,
    prediction: str = "score",
    cond: Tensor | None = None,
    repeats: int = 1,
    batch_size: int = 4096,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> ScoreErrorReport:
    """Mean squared error of a score network against the true score, at every time, with confidence intervals.

    Test data are noised to x_t = alpha(t) data + sigma(t) noise; all times go through the model in the same batches.

    Args:
        model: ``model(x, t, cond) -> [B, ...]`` with t [B] float64, or float32 for float32 data and below; called
            ``model(x, t)`` without `cond`.
        true_score: an oracle, or ``true_score(x, t)`` (with `cond`: ``true_score(x, t, cond)``), the exact score of the
            marginal, grad log p_t(x).
        test_data: [n, ...], floating point, samples of the data; n >= 2.
        timesteps: times, with sigma(t) > 0 at each.
        schedule: gives alpha and sigma.
        prediction: what the model returns: ``"score"``, or ``"epsilon"``, ``"v"``, ``"sample"``, ``"flow"`` as in
            `fastdiff.samplers.make_plan`, which is converted (score = -noise / sigma).
        cond: [n, ...], conditions of the data, or None.
        repeats: noises per datum and time.
        batch_size: largest batch given to the model.
        confidence: of the intervals, Student's t over the test data.
        generator: for the noise, on the device of the data.

    Raises:
        ValueError: an argument is not one of these or out of range, or a model's output has another shape.
    """
    name = "analyze_score_estimation_error"
    if prediction != "score" and prediction not in PREDICTIONS:
        raise ValueError(f"[{name}] prediction: expected 'score' or one of {tuple(PREDICTIONS)}, got {prediction!r}")
    if test_data.dim() < 1 or len(test_data) < 2 or not test_data.is_floating_point():
        raise ValueError(f"[{name}] test_data: expected at least two samples, got {tuple(test_data.shape)}")
    if repeats < 1 or batch_size < 1:
        raise ValueError(f"[{name}] repeats, batch_size: expected at least 1, got {repeats}, {batch_size}")
    if cond is not None and len(cond) != len(test_data):
        raise ValueError(f"[{name}] cond: expected {len(test_data)} conditions, got {len(cond)}")
    times = torch.as_tensor(timesteps, dtype=torch.float64, device=test_data.device).flatten()
    alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
    if not len(times) or not bool((sigmas > 0).all()):
        raise ValueError(f"[{name}] timesteps: expected times at which sigma > 0, got {times.tolist()}")

    n, count = len(test_data), len(times)
    dimension = max(test_data[0].numel(), 1)
    error = torch.zeros(count * n, dtype=torch.float64, device=test_data.device)
    power = torch.zeros_like(error)
    time_dtype = torch.float64 if test_data.dtype == torch.float64 else torch.float32
    for _ in range(repeats):
        for first in range(0, count * n, batch_size):
            rows = torch.arange(first, min(first + batch_size, count * n), device=test_data.device)
            which, sample = rows // n, rows % n
            data = test_data[sample]
            column = (-1, *[1] * (data.dim() - 1))
            a, s = alphas[which].reshape(column), sigmas[which].reshape(column)
            noise = torch.randn(data.shape, generator=generator, dtype=time_dtype, device=data.device)
            x = (a * data + s * noise).to(test_data.dtype)
            t = times[which].to(time_dtype)
            extra = () if cond is None else (cond[sample],)
            output = model(x, t, *extra)
            if isinstance(true_score, Oracle):
                truth = true_score.score(x, alphas[which], sigmas[which], *extra)
            else:
                truth = true_score(x, t, *extra)
            for argument, value in (("model", output), ("true_score", truth)):
                if value.shape != x.shape:
                    raise ValueError(f"[{name}] {argument}: expected {tuple(x.shape)}, got {tuple(value.shape)}")
            score = output.double() if prediction == "score" else _score(output.double(), x.double(), a, s, prediction)
            difference = (score - truth.double()).square().reshape(len(x), -1).sum(1)
            error[rows] += difference / (dimension * repeats)
            power[rows] += truth.double().square().reshape(len(x), -1).sum(1) / (dimension * repeats)

    error, power = error.reshape(count, n).cpu(), power.reshape(count, n).cpu()
    factor = interval_factor(n - 1, confidence) / n**0.5
    means, half = error.mean(1), factor * error.std(1)
    entries = tuple(
        TimestepError(
            t=float(times[i]),
            alpha=float(alphas[i]),
            sigma=float(sigmas[i]),
            mse=float(means[i]),
            low=max(float(means[i] - half[i]), 0.0),
            high=float(means[i] + half[i]),
            relative=float(means[i] / power[i].mean()),
            weighted=float(sigmas[i].cpu() ** 2 * means[i]),
        )
        for i in range(count)
    )
    per_sample = error.mean(0)
    mean, spread = float(per_sample.mean()), factor * float(per_sample.std())
    worst = max(entries, key=lambda entry: math.inf if math.isnan(entry.mse) else entry.mse)
    return ScoreErrorReport(entries, mean, max(mean - spread, 0.0), mean + spread, worst, n, dimension, confidence)


def _score(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    if prediction == "epsilon":
        return -output / sigma
    if prediction == "sample":
        return (alpha * output - x) / sigma**2
    if prediction == "v":
        return -(sigma * x + alpha * output) / (sigma * (alpha**2 + sigma**2))
    return (alpha * output - x) / (sigma * (alpha + sigma))
