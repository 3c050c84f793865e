"""Noise schedules against their published definitions, and the times of a run."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.samplers import schedules

T = 1000
ALL = {
    **{f"{b} {s} {f}": schedules.vp(b, spacing=s, final=f)
       for b in ("linear", "scaled_linear", "cosine") for s in ("linspace", "trailing", "leading", "karras")
       for f in ("zero", "min")},
    "zero snr": schedules.vp("scaled_linear", spacing="trailing", zero_terminal_snr=True),
    "edm": schedules.edm(),
    "edm min": schedules.edm(final="min"),
    "flow": schedules.flow(),
    "flow 3": schedules.flow(3.0),
    "own": schedules.from_times(schedules.vp("scaled_linear"), [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, -1]),
    "own flow": schedules.from_times(schedules.flow(), [0.0, 0.1, 0.5, 1.0]),
}  # fmt: skip


def alpha_bar(betas: str) -> torch.Tensor:
    """The products that training uses, in float64."""
    k = torch.arange(T, dtype=torch.float64) / (T - 1)
    if betas == "linear":
        values = 1e-4 + k * (0.02 - 1e-4)
    elif betas == "scaled_linear":
        values = (0.00085**0.5 + k * (0.012**0.5 - 0.00085**0.5)) ** 2
    else:
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        values = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - values).cumprod(0)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_levels_at_training_timesteps_are_those_of_training(betas: str) -> None:
    schedule, expected = schedules.vp(betas), alpha_bar(betas)
    t = torch.arange(T)
    torch.testing.assert_close(schedule.alpha(t), expected.sqrt(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(schedule.sigma(t), (1 - expected).sqrt(), rtol=1e-10, atol=0)
    assert schedule.alpha(-1.0) == 1.0
    assert schedule.sigma(-1.0) == 0.0
    given = schedules.vp(1 - expected / torch.cat([torch.ones(1), expected[:-1]]))
    torch.testing.assert_close(given.alpha(t), expected.sqrt(), rtol=1e-9, atol=1e-13)
    half = torch.arange(1, T - 20) + 0.5
    torch.testing.assert_close(given.alpha(half), schedule.alpha(half), rtol=1e-4, atol=0)


def test_zero_terminal_snr_is_the_published_rescaling() -> None:
    root = alpha_bar("scaled_linear").sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    schedule = ALL["zero snr"]
    torch.testing.assert_close(schedule.alpha(torch.arange(T)), expected, rtol=1e-9, atol=1e-13)
    assert schedule.alpha(999.0) == 0.0
    assert schedule.sigma(999.0) == 1.0
    assert schedule.sigma(schedule.end) == 0.0


@pytest.mark.parametrize("name", ALL)
def test_rates_are_derivatives_and_time_at_is_the_inverse(name: str) -> None:
    schedule = ALL[name]
    inner = torch.linspace(0.02, 0.98, 23, dtype=torch.float64)
    t = schedule.end + (schedule.start - schedule.end) * inner
    h = 1e-6 * abs(schedule.start - schedule.end)
    for level, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        torch.testing.assert_close((level(t + h) - level(t - h)) / (2 * h), rate(t), rtol=1e-5, atol=1e-9)
        assert level(float(t[3])) == pytest.approx(float(level(t)[3]), rel=1e-14)
    ratio = schedule.sigma(t) / schedule.alpha(t)
    torch.testing.assert_close(schedule.time_at(ratio), t, rtol=1e-9, atol=1e-9)
    assert schedule.time_at(float(ratio[5])) == pytest.approx(float(t[5]), rel=1e-9)
    assert schedule.log_snr(float(t[4])) == pytest.approx(float(schedule.log_snr(t)[4]))
    assert schedule.time_at(0.0) == pytest.approx(schedule.end, abs=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_noise_falls_along_the_times_of_every_run(name: str) -> None:
    schedule = ALL[name]
    for steps in (*range(1, 51), 199, 200):
        times = schedule.times(steps)
        assert times.shape == (steps + 1,)
        assert times.dtype == torch.float64
        angle = torch.atan2(schedule.sigma(times), schedule.alpha(times))
        assert bool((angle.diff() < 0).all()), (name, steps)
    assert (schedule.sigma(float(times[-1])) == 0.0) == (not name.endswith("min"))


def test_grids_are_the_published_ones() -> None:
    def close(schedule: schedules.Schedule, steps: int, expected: list[float]) -> None:
        torch.testing.assert_close(schedule.times(steps), torch.tensor(expected, dtype=torch.float64))

    close(schedules.vp(), 4, [999, 666, 333, 0, -1])
    close(schedules.vp(spacing="trailing"), 4, [999, 749, 499, 249, -1])
    close(schedules.vp(spacing="leading"), 4, [750, 500, 250, 0, -1])
    close(schedules.vp(final="min"), 3, [999, 666, 333, 0])
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    close(schedules.edm(), 3, [80, middle, 0.002, 0])
    close(schedules.flow(3.0), 2, [0, 0.25, 1])  # s = 1/2 -> 3/2 / 2 = 0.75
    close(ALL["own flow"], 3, [0, 0.1, 0.5, 1])
    karras = schedules.vp("scaled_linear", spacing="karras", final="min")
    times = karras.times(10)
    roots = (karras.sigma(times) / karras.alpha(times)) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(10), rtol=1e-9, atol=0)


def test_noising() -> None:
    data, noise, t = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.0, 0.25, 1.0])
    expected = t.view(3, 1, 1) * data + (1 - t.view(3, 1, 1)) * noise
    torch.testing.assert_close(schedules.flow().add_noise(data, noise, t), expected)


def test_bad_schedules_are_refused() -> None:
    for make, word in (
        (lambda: schedules.vp("quadratic"), "betas"),
        (lambda: schedules.vp(spacing="log"), "spacing"),
        (lambda: schedules.vp(final="none"), "final"),
        (lambda: schedules.vp([0.1, 0.2]), "betas"),
        (lambda: schedules.vp([0.1, 1.2], 2), "betas"),
        (lambda: schedules.vp(num_train_timesteps=1), "num_train_timesteps"),
        (lambda: schedules.edm(1.0, 0.5), "sigma_min"),
        (lambda: schedules.edm(rho=0.0), "rho"),
        (lambda: schedules.flow(0.0), "shift"),
        (lambda: schedules.flow().times(0), "steps"),
        (lambda: schedules.from_times(schedules.flow(), [0.5, 0.1]), "times"),
    ):
        with pytest.raises(ValueError, match=word):
            make()


@pytest.mark.parametrize(("final", "most"), [("zero", 1000), ("min", 999)])
def test_leading_times_are_those_of_training(final: str, most: int) -> None:
    for betas in ("linear", "cosine"):
        schedule = schedules.vp(betas, spacing="leading", final=final)
        assert schedule.times(most)[0] == schedule.start
    with pytest.raises(ValueError, match=f"steps: expected at most {most} with leading times, got {most + 1}"):
        schedule.times(most + 1)
