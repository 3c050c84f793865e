"""Solvers against the exact solution for Gaussian data, and against formulas of their papers written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops
from fastdiff.samplers import SOLVERS, GraphedRun, Plan, guidance, make_plan, sample, schedules
from fastdiff.training import RectifiedFlowModel

PREDICTIONS = ("epsilon", "v", "sample", "flow")
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]
SCHEDULES = {
    "edm": schedules.edm(),
    "edm min": schedules.edm(final="min"),
    "vp": schedules.vp(),
    "trailing": schedules.vp("scaled_linear", spacing="trailing"),
    "leading min": schedules.vp("scaled_linear", spacing="leading", final="min"),
    "cosine": schedules.vp("cosine", spacing="trailing"),
    "karras": schedules.vp("scaled_linear", spacing="karras", final="min"),
    "zero snr": schedules.vp("scaled_linear", spacing="trailing", zero_terminal_snr=True),
    "flow": schedules.flow(),
    "flow 3": schedules.flow(3.0),
}
MEAN, STD = 0.3, 0.5


def gaussian(schedule: schedules.Schedule, prediction: str) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The exact model of data from N(MEAN, STD^2): E[data | x] and E[noise | x]."""

    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        a, s = (level(t).view(-1, *[1] * (x.dim() - 1)) for level in (schedule.alpha, schedule.sigma))
        away = (x - a * MEAN) / (a**2 * STD**2 + s**2)
        data, noise = MEAN + a * STD**2 * away, s * away
        return {"epsilon": noise, "sample": data, "v": a * noise - s * data, "flow": data - noise}[prediction]

    return model


def exact(plan: Plan, start: Tensor) -> Tensor:
    """Where the probability-flow ODE carries a state from the first time of a plan to the last."""
    schedule, (first, last) = plan.schedule, (float(plan.times[0]), float(plan.times[-1]))
    spread = [math.hypot(schedule.alpha(t) * STD, schedule.sigma(t)) for t in (first, last)]
    return schedule.alpha(last) * MEAN + (start - schedule.alpha(first) * MEAN) * spread[1] / spread[0]


def points() -> Tensor:
    return torch.tensor([[-1.3], [0.2], [1.7], [0.9]], dtype=torch.float64)


def error(plan: Plan, noise: Tensor) -> float:
    got = sample(gaussian(plan.schedule, plan.prediction), noise, plan=plan)
    return float((got - exact(plan, noise * plan.initial_scale)).abs().max())


def slope(solver: str, schedule: schedules.Schedule, prediction: str, steps: tuple[int, int]) -> float:
    few, many = (error(make_plan(solver, schedule, n, prediction=prediction), points()) for n in steps)
    return math.log(few / many) / math.log(steps[1] / steps[0])


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [("ddim", 0.95, 1.05), ("euler", 0.95, 1.05), ("heun", 1.9, 2.1), ("midpoint", 1.9, 2.1), ("rk4", 3.8, 4.2),
     ("dpmpp_2m", 1.9, 2.1), ("dpmpp_2s", 1.9, 2.1), ("dpmpp_3m", 2.9, 3.1), ("dpmpp_3s", 2.9, 3.1),
     ("unipc_2", 2.9, 3.1), ("unipc_3", 3.9, 4.1), ("deis_2", 1.9, 2.15), ("deis_3", 2.8, 3.1),
     ("ab2", 1.9, 2.1), ("ab3", 2.9, 3.1), ("ab4", 3.6, 4.2)],
)  # fmt: skip
def test_order_on_karras_times(solver: str, low: float, high: float) -> None:
    assert low <= slope(solver, SCHEDULES["karras"], "v", (80, 160)) <= high


@pytest.mark.parametrize(
    ("solver", "schedule", "least"),
    [("euler", "flow", 0.95), ("heun", "trailing", 1.9), ("rk4", "trailing", 3.8), ("dpmpp_2m", "trailing", 1.8),
     ("dpmpp_2m", "flow", 1.95), ("dpmpp_3m", "flow", 2.9), ("dpmpp_3m", "cosine", 2.9), ("dpmpp_3s", "flow", 2.8),
     ("unipc_2", "flow", 2.8),
     ("deis_3", "cosine", 2.8), ("unipc_3", "cosine", 3.7), ("ab3", "edm", 2.8), ("dpmpp_2m", "zero snr", 1.8)],
)  # fmt: skip
def test_order_is_kept_up_to_data_without_noise(solver: str, schedule: str, least: float) -> None:
    """Times even in t, whose last steps stretch to infinity in log(alpha / sigma)."""
    assert slope(solver, SCHEDULES[schedule], "v", (80, 160)) >= least


def test_an_interpolation_in_lambda_would_lose_the_order_there() -> None:
    plans = [make_plan("dpmpp_2m", SCHEDULES["trailing"], n, prediction="v", interpolation="lambda") for n in (80, 160)]
    few, many = (error(plan, points()) for plan in plans)
    assert math.log2(few / many) < 1.4


def test_third_order_singlestep_is_accurate() -> None:
    plan = make_plan("dpmpp_3s", SCHEDULES["karras"], 54, prediction="v")  # 160 to 162 evaluations
    assert plan.nfe <= 162
    assert error(plan, points()) <= 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_coefficients_are_finite_for_every_number_of_steps(solver: str) -> None:
    names = list(SCHEDULES)
    for n in (*range(1, 26), *range(26, 51, 3)):
        # Each number with two of the ten schedules and one of the four predictions, and each of those with many.
        for name in (names[n % 10], names[(3 * n + 5) % 10]):
            plan = make_plan(solver, SCHEDULES[name], n, prediction=PREDICTIONS[(n // 2) % 4])
            table = plan.tables().coefficients
            assert bool(table.isfinite().all()), (solver, name, n)
            assert plan.times.shape == (n + 1,)
            assert [stage.step for stage in plan.stages if stage.step >= 0] == list(range(n))
    for name in names:  # one step from noise alone to data alone
        for prediction in PREDICTIONS:
            table = make_plan(solver, SCHEDULES[name], 1, prediction=prediction).tables().coefficients
            assert bool(table.isfinite().all()), (solver, name, prediction)


def test_repeated_times_are_steps_that_do_nothing() -> None:
    schedule = SCHEDULES["karras"]
    times = schedule.times(12)
    doubled = torch.cat([times[:6], times[5:9], times[8:], times[-1:]])
    for solver in DETERMINISTIC:
        plan = make_plan(solver, schedule, None, prediction="v", times=doubled)
        got = sample(gaussian(schedule, "v"), points(), plan=plan)
        assert bool(got.isfinite().all()), solver
        assert float((got - exact(plan, points())).abs().max()) < 0.2


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_all_predictions_of_one_model_give_one_trajectory(solver: str) -> None:
    for name in ("edm", "cosine", "flow 3"):
        schedule = SCHEDULES[name]
        times = schedule.times(9)
        times[0] = schedule.time_at(500.0 if name != "edm" else 80.0)  # epsilon says nothing where alpha = 0
        results = []
        for prediction in PREDICTIONS:
            plan = make_plan(solver, schedule, None, prediction=prediction, times=times)
            results.append(sample(gaussian(schedule, prediction), points(), plan=plan))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-8, atol=1e-8)


def test_predictions_that_say_nothing_at_an_end_start_beside_it() -> None:
    for name in ("flow", "zero snr"):
        schedule = SCHEDULES[name]
        first = float(make_plan("ddim", schedule, 5, prediction="epsilon").times[0])
        assert schedule.sigma(first) / schedule.alpha(first) == pytest.approx(1000, rel=1e-6)
        assert float(make_plan("ddim", schedule, 5, prediction="v").times[0]) == float(schedule.times(5)[0])
    inverse = make_plan("ddim", SCHEDULES["flow"], 5, prediction="sample").reversed()
    assert float(inverse.times[0]) == pytest.approx(1000 / 1001, rel=1e-9)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_inversion_and_back(solver: str) -> None:
    for name in ("trailing", "edm min", "flow"):
        forward = make_plan(solver, SCHEDULES[name], 60, prediction="v")
        backward = forward.reversed()
        assert backward.times.tolist() == forward.times.flip(0).tolist()
        assert backward.initial_scale == 1.0
        model, data = gaussian(SCHEDULES[name], "v"), points()
        noise = sample(model, data, plan=backward)
        assert bool(noise.isfinite().all())
        back = sample(model, noise / forward.initial_scale, plan=forward)
        assert float((back - data).abs().max()) < (0.2 if SOLVERS[solver].order == 1 else 0.03), (solver, name)


@pytest.mark.parametrize("solver", ["rk4", "dpmpp_3s", "ddim"])
def test_an_inversion_by_epsilon_ends_where_epsilon_still_says_something(solver: str) -> None:
    """As its run starts there: alpha is 0 at the end of a flow's own times, and rk4 asks the model at the end."""
    schedule = schedules.flow()
    plan = make_plan(solver, schedule, None, times=schedule.times(7).flip(0), prediction="epsilon")
    assert plan.step_times == make_plan(solver, schedule, 7, prediction="epsilon").reversed().step_times
    assert plan.step_times[0] == 1.0 and schedule.sigma(plan.step_times[-1]) < 1.0 and not plan.forward


def test_ddim_inversion_is_the_published_formula() -> None:
    schedule = SCHEDULES["trailing"]
    plan = make_plan("ddim", schedule, 3).reversed()
    model, x = gaussian(schedule, "epsilon"), points()
    got = sample(model, x, plan=plan)
    for now, to in pairwise(plan.times.tolist()):
        e = model(x, torch.full((4,), now, dtype=torch.float64), None)
        ab, ab_to = schedule.alpha(now) ** 2, schedule.alpha(to) ** 2
        x = math.sqrt(ab_to / ab) * (x - math.sqrt(1 - ab) * e) + math.sqrt(1 - ab_to) * e
    torch.testing.assert_close(got, x)


def test_second_order_multistep_is_the_published_algorithm() -> None:
    """DPM-Solver++ Algorithm 2 on Karras times, written as in the paper."""
    schedule = SCHEDULES["karras"]
    plan = make_plan("dpmpp_2m", schedule, 7, prediction="sample")
    model, x, before, h_before = gaussian(schedule, "sample"), points(), None, 0.0
    got = sample(model, x, plan=plan)
    for now, to in pairwise(plan.times.tolist()):
        data = model(x, torch.full((4,), now, dtype=torch.float64), None)
        h = schedule.log_snr(to) - schedule.log_snr(now)
        d = data if before is None else (1 + h / (2 * h_before)) * data - h / (2 * h_before) * before
        x = schedule.sigma(to) / schedule.sigma(now) * x - schedule.alpha(to) * math.expm1(-h) * d
        before, h_before = data, h
    torch.testing.assert_close(got, x)


def test_unipc_is_its_predictor_and_corrector_apart() -> None:
    """UniPC-2 with B_2 (Algorithms 5 and 6) in its two updates a step, with the corrected state kept."""
    schedule = SCHEDULES["karras"]
    plan = make_plan("unipc_2", schedule, 6, prediction="sample")
    model, start = gaussian(schedule, "sample"), points()
    times = plan.times.tolist()
    lam, alpha, sigma = ([f(t) for t in times] for f in (schedule.log_snr, schedule.alpha, schedule.sigma))

    def ask(x: Tensor, k: int) -> Tensor:
        return model(x, torch.full((4,), times[k], dtype=torch.float64), None)

    def update(x: Tensor, k: int, nodes: list[int], values: dict[int, Tensor]) -> Tensor:
        """From k to k + 1 by the differences at `nodes`, with coefficients that integrate polynomials in lambda."""
        h = lam[k + 1] - lam[k]
        phi = [-math.expm1(-h)]  # phi_i = integral of e^-(h - s) (s / h)^i, s from 0 to h
        phi.append(1 - phi[0] / h)
        phi.append(1 - 2 * phi[1] / h)
        if len(nodes) == 1:
            weights = torch.tensor([phi[0] / 2], dtype=torch.float64) * h / (lam[nodes[0]] - lam[k])
        else:
            r = torch.tensor([(lam[n] - lam[k]) / h for n in nodes], dtype=torch.float64)
            weights = torch.linalg.solve(torch.stack([r, r**2]), torch.tensor(phi[1:], dtype=torch.float64))
        x = sigma[k + 1] / sigma[k] * x + alpha[k + 1] * phi[0] * values[k]
        for w, n in zip(weights, nodes, strict=True):
            x = x + alpha[k + 1] * w * (values[n] - values[k])
        return x

    corrected, values = start, {0: ask(start, 0)}
    for k in range(6):
        predicted = update(corrected, k, [k - 1] if k else [], values) if k else (
            sigma[1] / sigma[0] * start - alpha[1] * math.expm1(lam[0] - lam[1]) * values[0])  # fmt: skip
        if k < 5:
            values[k + 1] = ask(predicted, k + 1)
            corrected = update(corrected, k, [k + 1, k - 1] if k else [k + 1], values)
    torch.testing.assert_close(sample(model, start, plan=plan), predicted)


@pytest.mark.filterwarnings("ignore")
def test_ddim_against_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
        prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 4

    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.tanh(torch.einsum("ij,bjhw->bihw", weight, x) + t.view(-1, 1, 1, 1) / 1000)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = noise
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, t.float().expand(2), None), t, expected).prev_sample
    schedule = schedules.vp("scaled_linear", spacing="leading")
    got = sample(model, noise, solver="ddim", schedule=schedule, steps=10, prediction="v")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "restart", "ddim"])
def test_stochastic_solvers_keep_the_distribution(solver: str) -> None:
    noise = torch.randn(8_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("karras", "flow"):
        plan = make_plan(solver, SCHEDULES[name], 100, prediction="v", **({"eta": 0.5} if solver == "ddim" else {}))
        assert plan.stochastic
        wide = gaussian(SCHEDULES[name], "v")
        model = lambda x, t, c, wide=wide: wide(x, t, c).to(x.dtype)  # noqa: E731
        end = SCHEDULES[name].sigma(float(plan.times[-1]))
        # One number of each of many samples, and many of a few: the noise of each is drawn in its own way.
        for got in (
            sample(model, noise, plan=plan, generator=torch.Generator().manual_seed(1)),
            sample(model, noise.float().view(4, 40, 50), plan=plan, seed=2),
            sample(model, noise.float().view(2, -1), plan=plan,
                   generator=[torch.Generator().manual_seed(i) for i in (3, 4)]),
        ):  # fmt: skip
            assert float(got.mean()) == pytest.approx(MEAN, abs=0.025)
            assert float(got.std()) == pytest.approx(math.hypot(STD, end), rel=0.04)
        with pytest.raises(ValueError, match="draws no noise"):
            plan.reversed()


def test_the_sde_step_integrates_its_kernel() -> None:
    """The mean at t is a multiple of x_s and 2 alpha_t times the integral of w D, w = (alpha / sigma) over its end."""
    times = torch.tensor([0.2, 0.45, 0.6], dtype=torch.float64)
    plan = make_plan("dpmpp_2m_sde", SCHEDULES["flow"], None, prediction="sample", times=times)
    terms = dict(plan.stages[1].terms)

    def bounded(alpha: Tensor, sigma: Tensor) -> Tensor:  # D is a line in this variable
        return sigma**2 / (sigma**2 + alpha * torch.hypot(alpha, sigma))

    data = bounded(times, 1 - times)
    a, s, first = 0.6, 0.4, (0.45 / 0.55) / (0.6 / 0.4)
    w = first + (1 - first) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    integral = (2 * a * w * bounded(w * a, torch.full_like(w, s))).mean() * (1 - first)
    got = terms["m", 0] * data[1] + terms["m", 1] * data[0]
    assert float(got) == pytest.approx(float(integral), rel=1e-7)
    assert terms["x", 0] == pytest.approx(s / 0.55 * first)
    assert terms["n", 0] == pytest.approx(s * math.sqrt(1 - first**2))


def test_consistency_sampling_and_lcm() -> None:
    schedule, noise = schedules.edm(sigma_min=0.5), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[float, Tensor]] = []

    def function(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append((float(t[0]), x.clone()))
        return torch.tanh(x / t.view(-1, 1))

    got = sample(function, noise, solver="consistency", schedule=schedule, steps=3, prediction="sample", seed=5)
    levels = schedule.times(3).tolist()
    assert [t for t, _ in seen] == pytest.approx(levels[:3], rel=1e-6)
    x = torch.tanh(noise)
    for i, tau in enumerate(levels[1:3]):  # Algorithm 1 of Song et al.
        x = x + math.sqrt(tau**2 - 0.5**2) * ops.philox_normal((4, 3), torch.tensor([5, i]))
        x = torch.tanh(x / tau)
    torch.testing.assert_close(got, x)

    vp = schedules.vp("scaled_linear", spacing="trailing")
    got = sample(lambda x, t, c: 0.5 * x, noise, solver="lcm", schedule=vp, steps=2, seed=6)
    first, second, _ = vp.times(2).tolist()
    x = noise
    for t in (first, second):
        data = (x - vp.sigma(t) * 0.5 * x) / vp.alpha(t)
        x = 0.25 / ((10 * t) ** 2 + 0.25) * x + 10 * t / math.sqrt((10 * t) ** 2 + 0.25) * data
        if t == first:
            x = vp.alpha(second) * x + vp.sigma(second) * ops.philox_normal((4, 3), torch.tensor([6, 0]))
    torch.testing.assert_close(got, x)


class NoReading(TorchDispatchMode):
    """Fails on whatever reads a value of a tensor back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_is_read_back_and_float32_follows_float64(solver: str) -> None:
    schedule = SCHEDULES["flow"]
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        plan = make_plan(solver, schedule, 6, prediction="flow")
        x, generator = noise.to(dtype), torch.Generator().manual_seed(1)
        with NoReading():
            got = sample(
                lambda x, t, c: torch.sin(x) - 1, x, plan=plan, generator=generator, guidance_scale=1.5, cond=0
            )
        assert got.dtype == dtype
        assert torch.equal(x, noise.to(dtype))
        results.append(got.double())
    # Noise is the same in every type.
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(results[2], results[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_tables_with_a_counter_are_the_same_run(solver: str) -> None:
    schedule = SCHEDULES["trailing"]
    plan = make_plan(solver, schedule, 5, prediction="v")
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    model = lambda x, t, c: torch.cos(x + t.view(-1, 1, 1) / 500)  # noqa: E731
    expected = sample(model, x, plan=plan, seed=1)
    tables = plan.tables()
    seed = torch.tensor([1, 0])
    counter, xs, ms = seed[1:], [x], []  # the number of the stage is the offset of its noise
    noisy = ("n", 0) in tables.terms  # the last column
    scales = {"seed": seed, "noise_scale": tables.coefficients[:, -1]} if noisy else {}
    count = len(tables.terms) - noisy
    for i, t in enumerate(tables.times.float()):
        ms.append(model(xs[-1], t.expand(2), None))
        tensors = [
            (ms if kind == "m" else xs)[-1 - lag] if lag <= i else torch.zeros_like(x)
            for kind, lag in tables.terms[:count]
        ]
        xs.append(ops.linear_update(tables.coefficients[:, :count], tensors, step=counter, **scales))
        counter.add_(1)
    torch.testing.assert_close(xs[-1], expected, rtol=1e-4, atol=1e-4)


def affine(shift: float) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """A model whose output is easy to guide by hand: x / 4 + shift + its condition."""
    return lambda x, t, c: x / 4 + shift + (0.0 if c is None else c.view(-1, *[1] * (x.dim() - 1)))


@pytest.mark.parametrize("solver", ["euler", "dpmpp_3m", "unipc_3", "rk4", "ab4"])
def test_guidance_in_the_coefficients_is_guidance_of_the_model(solver: str) -> None:
    schedule, x = SCHEDULES["flow"], torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    plan = make_plan(solver, schedule, 7, prediction="flow")
    c, negative = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 0.0])
    base = affine(0.2)

    def by_hand(scale: Callable[[float], float], other: Tensor | None) -> Tensor:
        def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
            g = scale(float(t[0]))
            return base(x, t, other) + g * (base(x, t, cond) - base(x, t, other))

        return sample(model, x, plan=plan, cond=c)

    plain = sample(base, x, plan=plan, cond=c, guidance_scale=3.0)
    torch.testing.assert_close(plain, by_hand(lambda t: 3.0, None))
    for batched in (True, False):
        form = guidance.CFG(3.0, uncond=negative, batched=batched)
        torch.testing.assert_close(sample(base, x, plan=plan, cond=c, guidance=form), by_hand(lambda t: 3.0, negative))
    limited = guidance.CFG(3.0, interval=(0.5, 2.0))
    expected = by_hand(lambda t: 3.0 if 0.5 < (1 - t) / max(t, 1e-9) <= 2.0 else 1.0, None)
    torch.testing.assert_close(sample(base, x, plan=plan, cond=c, guidance=limited), expected)
    weak = guidance.AutoGuidance(affine(-0.3), 2.0)
    expected = sample(lambda x, t, c: 2 * base(x, t, c) - affine(-0.3)(x, t, c), x, plan=plan, cond=c)
    torch.testing.assert_close(sample(base, x, plan=plan, cond=c, guidance=weak), expected)


def test_guidance_that_is_not_plain() -> None:
    schedule, x = SCHEDULES["flow"], torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plan = make_plan("dpmpp_2m", schedule, 4, prediction="flow")
    base, a, b = affine(0.1), torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 3.0])

    def run(form: guidance.Guidance) -> Tensor:
        return sample(base, x, plan=plan, cond=a, guidance=form)

    composed = run(guidance.Composed([a, b], [2.0, -0.5]))
    expected = sample(lambda x, t, c: base(x, t, None) + (2 * a - 0.5 * b).view(-1, 1, 1, 1), x, plan=plan)
    torch.testing.assert_close(composed, expected)

    masks = torch.zeros(2, 4, 4)
    masks[0, :, :3], masks[1, :, 2:] = 1.0, 3.0
    shares = masks / masks.sum(0)

    def regional(x: Tensor, t: Tensor, c: Any) -> Tensor:
        mixed = shares[0] * base(x, t, a) + shares[1] * base(x, t, b)
        return base(x, t, None) + 2.5 * (mixed - base(x, t, None))

    torch.testing.assert_close(run(guidance.Regions([a, b], masks, 2.5)), sample(regional, x, plan=plan))

    def rescaled(x: Tensor, t: Tensor, c: Any) -> Tensor:
        pos, neg = base(x, t, a), base(x, t, None) / 2
        cfg = neg + 5.0 * (pos - neg)
        scaled = cfg * pos.std((1, 2, 3), keepdim=True) / cfg.std((1, 2, 3), keepdim=True)
        return 0.7 * scaled + 0.3 * cfg

    halved = lambda x, t, c: base(x, t, c) / (2 if c is None else 1)  # noqa: E731
    form = guidance.CFG(5.0, rescale=0.7)
    torch.testing.assert_close(sample(halved, x, plan=plan, cond=a, guidance=form), sample(rescaled, x, plan=plan))


def test_clamped_data() -> None:
    schedule, x = SCHEDULES["trailing"], torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    model = lambda x, t, c: torch.sin(3 * x)  # noqa: E731
    got = sample(model, x, solver="dpmpp_2m", schedule=schedule, steps=5, clip_sample=0.7)
    assert float(got.abs().max()) <= 1.5

    def data(x: Tensor, t: Tensor, c: Any, threshold: float | None = None) -> Tensor:
        a, s = (f(t).view(-1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        data = (x - s * model(x, t, c)) / a
        if threshold is None:
            return data.clamp(-0.7, 0.7).float()
        bound = torch.quantile(data.abs().flatten(1), threshold, dim=1).clamp(min=1).view(-1, 1, 1)
        return (data.clamp(-bound, bound) / bound).float()

    plan = make_plan("dpmpp_2m", schedule, 5, prediction="sample")
    torch.testing.assert_close(got, sample(data, x, plan=plan), rtol=1e-4, atol=1e-4)
    got = sample(model, x, solver="dpmpp_2m", schedule=schedule, steps=5, threshold=0.9)
    expected = sample(lambda *a: data(*a, threshold=0.9), x, plan=plan)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_noise_of_a_sample_need_not_depend_on_its_batch() -> None:
    noise = torch.randn(3, 5)
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    run = lambda x, g: sample(  # noqa: E731
        lambda x, t, c: x / 2, x, solver="ddpm", schedule=SCHEDULES["trailing"], steps=4, generator=g
    )
    together = run(noise, seeds)
    for b in range(3):
        for alone in ([torch.Generator().manual_seed(b)], torch.Generator().manual_seed(b)):
            assert torch.equal(together[b : b + 1], run(noise[b : b + 1], alone))
    split = run(noise[:2], [torch.Generator().manual_seed(i) for i in range(2)])
    assert torch.equal(together[:2], split)
    assert not torch.equal(*run(noise[:1].expand(2, -1), seeds[:2]))
    with pytest.raises(ValueError, match="generator"):
        run(noise, seeds[:2])


def test_a_run_has_a_seed_that_is_given_or_drawn() -> None:
    noise = torch.randn(3, 50)
    run = lambda x=noise, **options: sample(  # noqa: E731
        lambda x, t, c: x / 2, x, solver="euler_ancestral", schedule=SCHEDULES["trailing"], steps=4, **options
    )
    generator, lowest = torch.Generator().manual_seed(7), -(1 << 63)
    seed = torch.empty(1, dtype=torch.int64).random_(lowest, None, generator=generator)
    assert torch.equal(run(generator=torch.Generator().manual_seed(7)), run(seed=int(seed)))
    assert not torch.equal(run(generator=generator), run(generator=generator))
    torch.manual_seed(8)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(8)
    assert torch.equal(run(), first)
    # A seed's samples are numbered.
    for s in (0, lowest, (1 << 63) - 1):
        assert torch.equal(run(noise[:2], seed=s), run(seed=s)[:2])
    assert not torch.equal(*run(noise[:1].expand(2, -1), seed=0))


def test_callback_sees_every_step_and_may_replace_the_state() -> None:
    plan = make_plan("euler", SCHEDULES["flow"], 4, prediction="flow")
    seen: list[tuple[int, float]] = []

    def zero_at_two(i: int, t: float, x: Tensor, pred: Tensor) -> Tensor | None:
        seen.append((i, t))
        return torch.zeros_like(x) if i == 2 else None

    constant = lambda x, t, c: torch.ones_like(x)  # noqa: E731
    got = sample(constant, torch.randn(2, 3), plan=plan, callback=zero_at_two)
    assert seen == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)]
    torch.testing.assert_close(got, torch.full((2, 3), 0.25))
    with pytest.raises(ValueError, match="callback"):
        sample(constant, torch.randn(2, 3), plan=plan, callback=lambda i, t, x, p: x[:1])


def test_models_of_every_habit() -> None:
    schedule, x = SCHEDULES["karras"], torch.randn(2, 4, 3, 3)
    run = lambda model: sample(model, x, solver="unipc_2", schedule=schedule, steps=6, prediction="v")  # noqa: E731
    expected = run(lambda x, t, c: x.clone())
    torch.testing.assert_close(run(lambda x, t, c: x), expected)  # gives back its own input
    torch.testing.assert_close(run(lambda x, t, c: torch.cat([x, x * 0], 1)), expected)  # predicts variances too
    # A state that is not needed itself, but that the prediction lives in.
    options = {"solver": "dpmpp_3m", "schedule": schedule, "steps": 6, "prediction": "sample"}
    torch.testing.assert_close(sample(lambda x, t, c: x, x, **options), sample(lambda x, t, c: x.clone(), x, **options))
    buffer = torch.empty_like(x)
    with pytest.raises(ValueError, match="memory of its own"):
        run(lambda x, t, c: buffer.copy_(x))
    with pytest.raises(ValueError, match="prediction of shape"):
        run(lambda x, t, c: x[:, :2])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            assert not self.training
            return self.inner(x)

    model = Model()
    model.train()
    model.frozen.eval()
    torch.testing.assert_close(run(model), expected)
    assert model.training and model.inner.training and not model.frozen.training


def test_a_plan_is_never_changed_and_channels_last_is_kept() -> None:
    plan = make_plan("dpmpp_3m", SCHEDULES["flow"], 5, prediction="flow")
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    first = sample(lambda x, t, c: x.sin(), x, plan=plan)
    sample(lambda x, t, c: x.cos(), torch.randn(3, 2), plan=plan, cond=1, guidance_scale=2.0)
    again = sample(lambda x, t, c: x.sin(), x, plan=plan, progress=True)
    assert torch.equal(first, again)
    assert first.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(AttributeError):
        plan.solver = "ddim"  # type: ignore[misc]


def test_rectified_flow_samples_by_a_plan() -> None:
    class Backbone(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
            return torch.sin(3 * x + t[:, None]) if cond is None else torch.cos(x * cond[:, None] + t[:, None])

    flow, x, labels = RectifiedFlowModel(Backbone()), torch.randn(8, 5), torch.rand(8)
    for steps in (1, 3, 7, 50):
        expected = x
        for k in range(steps):
            t = torch.full((8,), k / steps)
            u, v = flow.backbone(expected, t, None), flow.backbone(expected, t, labels)
            expected = ops.euler_step(expected, v, 1 / steps, uncond=u, guidance_scale=2.5)
        assert torch.equal(flow.sample(x, steps, labels, guidance_scale=2.5), expected)
    assert not torch.equal(flow.sample(x, 5, solver="heun"), flow.sample(x, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", ["dpmpp_3m", "unipc_2", "rk4", "ddpm"])
def test_a_run_is_one_graph(solver: str) -> None:
    plan = make_plan(solver, SCHEDULES["flow"], 6, prediction="flow")
    model, noise = (lambda x, t, c: torch.sin(x + c)), torch.randn(2, 4, 8, 8, device="cuda")
    cond = torch.zeros((), device="cuda")
    replay = GraphedRun(model, noise, plan, cond)
    other = torch.randn_like(noise)
    if solver == "ddpm":
        assert not torch.equal(replay(other), replay(other))
        return
    for value in (0.0, 0.5):
        c = torch.full((), value, device="cuda")
        torch.testing.assert_close(replay(other, c), sample(model, other, plan=plan, cond=c))


def test_bad_calls_are_refused() -> None:
    schedule, x = SCHEDULES["flow"], torch.randn(2, 3)
    model = lambda x, t, c: x / 2  # noqa: E731
    for call, kind, word in (
        (lambda: make_plan("eule", schedule, 4), ValueError, "solver"),
        (lambda: make_plan("euler", schedule, 4, prediction="score"), ValueError, "prediction"),
        (lambda: make_plan("euler", schedule, 0), ValueError, "steps"),
        (lambda: make_plan("euler", schedule, None), ValueError, "steps"),
        (lambda: make_plan("euler", schedule, 4, eta=1.0), TypeError, "eta"),
        (lambda: make_plan("euler", schedule, 2, times=torch.tensor([0.0, 1.0])), ValueError, "times"),
        (lambda: make_plan("euler", schedule, None, times=torch.tensor([0.0, 0.5, 0.2, 1.0])), ValueError, "times"),
        (lambda: make_plan("euler", schedule, 4, interpolation="t"), ValueError, "interpolation"),
        (lambda: make_plan("ddpm", schedule, 1).reversed(), ValueError, "draws no noise"),
        (lambda: make_plan("lcm", schedule, None, times=torch.tensor([1.0, 0.0])), ValueError, "falls"),
        (lambda: sample(model, x), ValueError, "schedule"),
        (lambda: sample(model, torch.zeros(2, dtype=torch.long), schedule=schedule), ValueError, "noise"),
        (lambda: sample(model, x, schedule=schedule, guidance_scale=2.0), ValueError, "cond"),
        (
            lambda: sample(model, x, schedule=schedule, guidance_scale=2.0, guidance=guidance.CFG()),
            ValueError,
            "guidance",
        ),
        (lambda: sample(model, x, schedule=schedule, clip_sample=0.0), ValueError, "clip_sample"),
        (lambda: sample(model, x, schedule=schedule, threshold=2.0), ValueError, "threshold"),
        (lambda: sample(model, x, schedule=schedule, seed=1, generator=torch.Generator()), ValueError, "seed"),
        (lambda: sample(model, x, solver="ddpm", schedule=schedule, generator=5), ValueError, "generator"),
        (lambda: sample(model, x, solver="ddpm", schedule=schedule, generator=[5, 6]), ValueError, "generator"),
        (lambda: sample(model, x, schedule=schedule, seed=True), ValueError, "seed"),
        (lambda: sample(model, x, schedule=schedule, seed=1 << 63), ValueError, "seed"),
        (lambda: sample(model, x, schedule=schedule, seed=0.5), ValueError, "seed"),
        (lambda: guidance.CFG(float("nan")), ValueError, "guidance_scale"),
        (lambda: guidance.CFG(rescale=2.0), ValueError, "rescale"),
        (lambda: guidance.CFG(interval=(2.0, 1.0)), ValueError, "interval"),
        (lambda: guidance.Composed([1], [1.0, 2.0]), ValueError, "weights"),
        (lambda: GraphedRun(model, x, make_plan("euler", schedule, 2)), ValueError, "CUDA"),
    ):
        with pytest.raises(kind, match=word):
            call()


@pytest.mark.parametrize("option", [{"seed": 0}, {"seed": 1}, {"generator": torch.Generator()}, {"progress": True}])
def test_a_recorded_run_refuses_options_of_the_host(option: dict[str, Any]) -> None:
    with FakeTensorMode():
        noise = torch.empty(2, 3, device="cuda")
    plan = make_plan("ddpm", SCHEDULES["trailing"], 2)
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected none"):
        GraphedRun(lambda x, t, c: x, noise, plan, **option)
