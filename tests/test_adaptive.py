"""Adaptive integration and exact likelihoods against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.samplers import log_likelihood, sample, schedules, solve
from fastdiff.samplers.adaptive import solve_ode

PREDICTIONS = ("epsilon", "v", "sample", "flow")
SCHEDULES = {
    "edm": schedules.edm(final="min"),
    "vp": schedules.vp("scaled_linear", final="min"),
    "flow": schedules.flow(),
}
MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5], dtype=torch.float64)


def gaussian(schedule: schedules.Schedule, prediction: str) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The exact model of two independent normal coordinates."""

    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        a, s = schedule.alpha(t)[:, None].to(x.dtype), schedule.sigma(t)[:, None].to(x.dtype)
        away = (x - a * MEAN.to(x.dtype)) / (a**2 * STD.to(x.dtype) ** 2 + s**2)
        data, noise = MEAN.to(x.dtype) + a * STD.to(x.dtype) ** 2 * away, s * away
        return {"epsilon": noise, "sample": data, "v": a * noise - s * data, "flow": data - noise}[prediction]

    return model


def spread(schedule: schedules.Schedule, t: float) -> Tensor:
    return (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt()


def path(schedule: schedules.Schedule, x: Tensor, now: float, to: float) -> Tensor:
    away = (x - schedule.alpha(now) * MEAN) / spread(schedule, now)
    return schedule.alpha(to) * MEAN + away * spread(schedule, to)


def noise() -> Tensor:
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_end_the_way_and_the_inverse(name: str, prediction: str) -> None:
    schedule = SCHEDULES[name]
    model = gaussian(schedule, prediction)
    asked: list[float] = []

    def counted(x: Tensor, t: Tensor, level: float) -> Tensor:
        asked.append(float(t[0]))
        alpha = schedule.alpha(asked[-1])
        assert level == (pytest.approx(schedule.sigma(asked[-1]) / alpha) if alpha else math.inf)
        return model(x, t, None)

    run = solve(counted, noise(), schedule, prediction=prediction, rtol=1e-8, atol=1e-8, dense=True)
    first, last = run.times[0], run.times[-1]
    scale = 1.0 if name == "vp" else schedule.sigma(first)
    # A prediction of the data says nothing at data: the ODE ends before, and DDIM's step does the rest.
    short = (name, prediction) == ("flow", "sample")
    end = 1.0 if short else last
    torch.testing.assert_close(run.final, path(schedule, noise() * scale, first, end), rtol=1e-5, atol=1e-6)
    assert run.nfe == len(asked)
    assert run.nfe == 1 + 6 * (len(run.times) - 1 + run.rejected) + short
    for part in (0.013, 0.31, 0.77, 0.99):
        t = first + part * (last - first)
        torch.testing.assert_close(run(t), path(schedule, noise() * scale, first, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(first), noise() * scale)
    torch.testing.assert_close(run(last), path(schedule, noise() * scale, first, last), rtol=1e-5, atol=1e-6)
    back = solve(counted, run(last), schedule, prediction=prediction, rtol=1e-8, atol=1e-8, inverse=True)
    torch.testing.assert_close(back.final / scale, noise(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading", "karras"])
def test_it_starts_at_the_noisiest_time_on_any_spacing(spacing: str) -> None:
    """Leading times of one step begin (and end) next to the data; the ODE does not."""
    schedule = schedules.vp("linear", spacing=spacing)
    found = solve(gaussian(schedule, "v"), noise(), schedule, prediction="v", rtol=1e-8, atol=1e-8)
    assert found.times[0] == 999.0 and found.times[-1] == 0.0
    least = path(schedule, noise(), 999.0, 0.0)
    exact = gaussian(schedule, "sample")(least, torch.zeros(5, dtype=torch.float64), None)
    torch.testing.assert_close(found.final, exact, rtol=0, atol=1e-6)


def test_error_follows_the_tolerance_and_evaluations_grow_slowly() -> None:
    schedule = SCHEDULES["edm"]
    model = gaussian(schedule, "epsilon")
    expected = path(schedule, noise() * 80, 80.0, 0.002)
    errors, costs = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        run = solve(lambda x, t, level: model(x, t, None), noise(), schedule, rtol=tolerance, atol=tolerance)
        errors.append(float((run.final - expected).abs().max()))
        costs.append(run.nfe)
    assert all(b < a / 10 for a, b in pairwise(errors)), errors
    assert costs[-1] < 2000


def test_fifth_order_on_an_equation_with_a_known_solution() -> None:
    """y' = cos(t) y, backwards in time too, in float64 down to 1e-10."""
    y = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    for first, last in ((0.0, 3.0), (3.0, -1.0)):
        run = solve_ode(lambda t, s: (math.cos(t) * s[0],), (y,), first, last, rtol=1e-11, atol=1e-11, dense=True)
        for t in (first, last, 0.3 * first + 0.7 * last):
            expected = y * math.exp(math.sin(t) - math.sin(first))
            torch.testing.assert_close(run(t), expected, rtol=1e-7 if t not in (first, last) else 1e-9, atol=0)


def test_adaptive_sampling_guides_and_ends_at_data() -> None:
    schedule = schedules.edm()
    model = gaussian(schedule, "sample")

    def guided(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return model(x, t, None) if cond is None else model(x, t, None) + 0 * cond

    options = {"solver": "adaptive", "schedule": schedule, "prediction": "sample", "rtol": 1e-6, "atol": 1e-6}
    got = sample(guided, noise(), cond=1.0, guidance_scale=3.0, **options)
    torch.testing.assert_close(got, path(schedule, noise() * 80, 80.0, 0.0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sample(guided, noise().float(), **options), got.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_likelihood_is_that_of_the_gaussian(name: str, trace: str) -> None:
    """The Jacobian is diagonal, for which random signs give the exact trace: sign^2 = 1."""
    schedule = SCHEDULES[name]
    data = MEAN + STD * noise()
    for prediction in ("epsilon", "flow"):
        found = log_likelihood(
            gaussian(schedule, prediction), data, schedule, prediction=prediction, trace=trace, rtol=1e-8, atol=1e-8
        )
        # Sampling starts from a normal distribution without the data's mean and width; the flow carries it exactly.
        noisy, last = float(schedule.times(1)[0]), schedule.last
        if name == "flow" and prediction == "epsilon":
            noisy = 1 / 1001
        scale = 1.0 if name == "vp" else schedule.sigma(noisy)
        z = path(schedule, data, last, noisy) / scale
        stretch = spread(schedule, noisy) / spread(schedule, last) / scale
        expected = (-(z**2) / 2 - math.log(2 * math.pi) / 2 + stretch.log()).sum(1)
        torch.testing.assert_close(found.noise, z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-5)
        if name == "flow" and prediction == "flow":  # where that start is exact
            away = (data - MEAN) / STD
            expected = (-(away**2) / 2 - STD.log() - math.log(2 * math.pi) / 2).sum(1)
            torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.bits_per_dim, -found.log_prob / (2 * math.log(2)))


def test_hutchinson_is_unbiased_where_the_jacobian_is_not_diagonal() -> None:
    mixing = torch.tensor([[0.4, 1.0], [-0.7, 0.2]], dtype=torch.float64)
    data = noise()[:1].expand(600, 2)
    schedule = schedules.flow()
    options = {"prediction": "flow", "rtol": 1e-4, "atol": 1e-4}
    model = lambda x, t, c: torch.tanh(x @ mixing.T)  # noqa: E731
    exact = log_likelihood(model, data[:1], schedule, trace="exact", **options).log_prob
    estimates = log_likelihood(model, data, schedule, generator=torch.Generator().manual_seed(0), **options).log_prob
    deviation = float(estimates.std())
    assert deviation > 0.01
    assert abs(float(estimates.mean() - exact)) < 4 * deviation / math.sqrt(600)
    several = log_likelihood(
        model, data, schedule, probes=16, generator=torch.Generator().manual_seed(1), **options
    ).log_prob  # fmt: skip
    assert float(several.std()) == pytest.approx(deviation / 4, rel=0.35)


def test_bad_calls_are_refused() -> None:
    schedule, x = schedules.flow(), torch.randn(2, 3)
    model = lambda x, t, c: x / 2  # noqa: E731
    for call, kind, word in (
        (lambda: solve(model, x, schedule, prediction="score"), ValueError, "prediction"),
        (lambda: solve(model, x, schedule, prediction="flow", rtol=0.0), ValueError, "rtol"),
        (lambda: solve(model, x, schedule, prediction="flow", max_steps=1, rtol=1e-12), RuntimeError, "max_steps"),
        (lambda: solve(lambda x, t, c: x * math.nan, x, schedule, prediction="flow"), RuntimeError, "finite"),
        (lambda: solve(model, x, schedule, prediction="flow")(0.5), ValueError, "dense"),
        (lambda: solve(model, x, schedule, prediction="flow", dense=True)(1.5), ValueError, "between"),
        (lambda: log_likelihood(model, x, schedule, trace="sum"), ValueError, "trace"),
        (lambda: log_likelihood(model, x, schedule, probes=0), ValueError, "probes"),
        (lambda: log_likelihood(model, x.half(), schedule), ValueError, "data"),
        (lambda: log_likelihood(model, x, schedule, prediction="x"), ValueError, "prediction"),
    ):
        with pytest.raises(kind, match=word):
            call()


@pytest.mark.parametrize(
    "times", [(schedules.vp("linear"), [900.0, 500.0, 100.0]), (schedules.flow(), [0.1, 0.3, 0.8])], ids=["vp", "flow"]
)
def test_times_of_ones_own_that_end_in_noise_end_the_ode(times: tuple[schedules.Schedule, list[float]]) -> None:
    schedule = schedules.from_times(*times)
    first, last = times[1][0], times[1][-1]
    model = gaussian(schedule, "v")
    scale = 1.0 if schedule.kind == "vp" else schedule.sigma(first)
    start = noise() * scale
    exact = path(schedule, start, first, last)
    options: dict[str, Any] = {"schedule": schedule, "prediction": "v"}
    ended = sample(model, start / scale, solver="adaptive", rtol=1e-8, atol=1e-8, **options)
    assert (ended - exact).abs().max() < 1e-6
    assert (sample(model, start / scale, solver="rk4", steps=200, **options) - exact).abs().max() < 1e-4
    back = solve(lambda x, t, _: model(x, t, None), exact, schedule, prediction="v", rtol=1e-8, atol=1e-8, inverse=True)
    assert back.times[0] == last and (back.final - start).abs().max() < 1e-6
    found = log_likelihood(model, exact, schedule, prediction="v", trace="exact", rtol=1e-8, atol=1e-8)
    grown = (spread(schedule, first) / spread(schedule, last) / scale).log().sum()
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(start / scale).sum(1)
    assert (found.log_prob - prior - grown).abs().max() < 1e-6
