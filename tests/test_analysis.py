"""Budgets, bounds and distances against sampling, numerical integration and other implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastdiff import analysis as fa
from fastdiff.samplers import SOLVERS, make_plan, schedules

HALF = fa.GaussianOracle(torch.zeros(1), std=0.5)
SPECTRUM = fa.GaussianOracle(torch.linspace(-0.5, 0.6, 6).double(), std=torch.linspace(0.1, 1.4, 6).double())
NARROW = fa.GaussianOracle(torch.zeros(1), std=0.01)


def digits(value: float, expected: str) -> bool:
    """Equal to as many digits as `expected` shows."""
    return float(f"{value:.{len(expected.split('e')[0]) - 2}e}") == float(expected)


# ---------------------------------------------------------------- the Ornstein-Uhlenbeck setting and its known figures


COUNTS = (50, 100, 200, 400, 800, 1600)
MARGINAL = ("5.436e-2", "1.435e-2", "3.620e-3", "9.041e-4", "2.256e-4", "5.633e-5")


def test_marginal_kl_has_the_known_values_and_slope():
    values = [fa.ou_marginal_kl(HALF, fa.ou_times(6.0, n)) for n in COUNTS]
    assert all(map(digits, values, MARGINAL))
    assert fa.observed_order(COUNTS, values, last=3).order == pytest.approx(2.0, abs=0.01)


def test_path_kl_has_slope_one_and_is_never_less():
    times = [fa.ou_times(6.0, n) for n in COUNTS]
    values = [fa.ou_path_kl(HALF, t) for t in times]
    assert digits(values[0], "9.072e-1") and digits(values[-1], "3.064e-2")
    assert fa.observed_order(COUNTS, values, last=3).order == pytest.approx(1.0, abs=0.01)
    assert all(p >= fa.ou_marginal_kl(HALF, t) for p, t in zip(values, times, strict=True))


def test_path_kl_of_a_long_run_is_finite():
    """e^2T is beyond float64; the part before T = 6, of data that is pure noise by then, is that of N(0, 1)."""
    late = torch.linspace(406, 6, 2001, dtype=torch.float64)
    unit = fa.ou_path_kl(fa.GaussianOracle(torch.zeros(1), std=1.0), late)
    assert fa.ou_path_kl(HALF, late) == pytest.approx(unit, rel=1e-4)


def test_the_grid_that_gains_360_times():
    uniform = fa.ou_marginal_kl(NARROW, fa.ou_times(6.0, 100, delta=1e-3))
    half = fa.ou_marginal_kl(NARROW, fa.ou_times(6.0, 100, delta=1e-3, grid="half_geometric"))
    assert digits(uniform, "1.56e0") and digits(half, "4.35e-3")
    assert 355 < uniform / half < 365


@pytest.mark.parametrize(
    ("error", "marginal", "path"),
    [(1e-3, "4.0e-6", "1.23e-2"), (1e-2, "4.7e-5", "1.31e-2"), (1e-1, "8.2e-3", "8.02e-2")],
)
def test_relative_score_error_has_the_known_values(error, marginal, path):
    times = fa.ou_times(6.0, 4000)
    assert digits(fa.ou_marginal_kl(HALF, times, relative_error=error), marginal)
    assert float(path) == pytest.approx(fa.ou_path_kl(HALF, times, relative_error=error), rel=5e-3)


def test_path_kl_is_a_sum_of_gaussian_conditional_divergences():
    """Another derivation: many substeps of the exact reversal, as a Gaussian chain, against the frozen score's chain.

    The KL of two Markov chains with equal noise is that of their starts plus the mean squared difference of their
    conditional means over twice the variance; it tends to the path KL as the substeps shrink.
    """
    T, steps, inner, c = 3.0, 6, 400, 0.25
    times = np.linspace(T, 0, steps + 1)
    v = lambda u: 1 + (c - 1) * np.exp(-2 * u)  # noqa: E731
    total = 0.5 * (v(T) - 1 - math.log(v(T)))
    for first, last in itertools.pairwise(times):
        fine = np.linspace(first, last, inner + 1)
        h = fine[0] - fine[1]
        for u in fine[:-1]:
            # The exact marginal at u and at the step's start are jointly Gaussian under the forward process.
            covariance = math.exp(-(first - u)) * v(u)
            square = 1 / v(u) + 1 / v(first) - 2 * covariance / (v(u) * v(first))
            total += (2 * h) ** 2 * square / (2 * 2 * h)
    assert fa.ou_path_kl(HALF, torch.from_numpy(times)) == pytest.approx(total, rel=1e-2)


def test_integrator_against_monte_carlo():
    """The recursion's mean and variance are those of the scheme as written in the papers, simulated."""
    oracle, g = fa.GaussianOracle(torch.tensor([0.7]).double(), std=0.5), torch.Generator().manual_seed(0)
    times = fa.ou_times(2.0, 8, delta=0.05)
    y = torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    for u, w in itertools.pairwise(times.tolist()):
        score = oracle.score(y, math.exp(-u), math.sqrt(1 - math.exp(-2 * u)))
        h = u - w
        y = math.exp(h) * y + 2 * math.expm1(h) * score
        y = y + math.sqrt(math.expm1(2 * h)) * torch.randn(y.shape, generator=g, dtype=torch.float64)
    mean, variance = fa.propagate(oracle, fa.ou_exponential_integrator(times)).final
    assert float(y.mean()) == pytest.approx(mean[0], abs=5 * math.sqrt(variance[0] / len(y)))
    assert float(y.var()) == pytest.approx(variance[0], rel=5 * math.sqrt(2 / len(y)))


# ------------------------------------------------------------------------------------------------------ error budgets


CASES = [
    ("ddim", schedules.vp(), "epsilon"),
    ("ddpm", schedules.vp("scaled_linear", spacing="karras"), "v"),
    ("heun", schedules.edm(), "epsilon"),
    ("dpmpp_2m", schedules.vp("cosine", spacing="trailing"), "v"),
    ("unipc_3", schedules.edm(final="min"), "sample"),
    ("rk4", schedules.flow(2.0), "flow"),
    ("dpmpp_3s", schedules.flow(), "v"),
]
case = pytest.mark.parametrize(("solver", "schedule", "prediction"), CASES, ids=[f"{c[0]}-{c[1].kind}" for c in CASES])


@case
def test_recursion_against_the_run_itself(solver, schedule, prediction):
    """Propagated mean and covariance against a run of the plan with the oracle as its model, with a planted error.

    Deterministic plans are affine, so that runs from 0 and from 1 tell mean and variance exactly; those with noise are
    compared with 100,000 samples.
    """
    plan = make_plan(solver, schedule, 7, prediction=prediction)
    error = fa.ModelError(relative=0.03, bias=0.02)
    mean, variance = fa.propagate(SPECTRUM, plan, error=error).final
    exact = SPECTRUM.model(schedule, prediction)

    def model(x, t):
        return (1 + error.relative) * exact(x, t) + error.bias

    if not plan.stochastic:
        low, high = fa.run_plan(plan, model, torch.tensor([0.0, 1.0]).double()[:, None].expand(2, 6))
        np.testing.assert_allclose(low, mean, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(((high - low) * plan.initial_scale) ** 2, variance, rtol=1e-9, atol=1e-12)
        return
    g, n = torch.Generator().manual_seed(1), 100_000
    x = plan.initial_scale * torch.randn(n, 6, generator=g, dtype=torch.float64)
    x = fa.run_plan(plan, model, x, g)
    assert np.all(np.abs(x.mean(0).numpy() - mean) < 5 * np.sqrt(variance / n))
    np.testing.assert_allclose(x.var(0), variance, rtol=6 * math.sqrt(2 / n))


def test_random_error_against_monte_carlo():
    """Independent errors of the network, which a multistep solver carries from step to step."""
    plan, g, n = (
        make_plan("dpmpp_2m", schedules.flow(), 6, prediction="flow"),
        torch.Generator().manual_seed(2),
        100_000,
    )
    exact = SPECTRUM.model(plan.schedule, "flow")

    def model(x, t):
        return exact(x, t) + 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64)

    x = fa.run_plan(plan, model, torch.randn(n, 6, generator=g, dtype=torch.float64))
    mean, variance = fa.propagate(SPECTRUM, plan, error=fa.ModelError(random=0.3)).final
    assert np.all(np.abs(x.mean(0).numpy() - mean) < 5 * np.sqrt(variance / n))
    np.testing.assert_allclose(x.var(0), variance, rtol=6 * math.sqrt(2 / n))


@pytest.mark.parametrize("solver", [name for name, s in SOLVERS.items() if not s.stochastic])
def test_discretisation_vanishes_and_leaves_the_other_sources(solver):
    """With many steps a run from the exact start ends at the exact marginal; from noise, where the flow takes it."""
    schedule = schedules.edm(sigma_max=5.0, final="min")
    oracle = fa.GaussianOracle(torch.tensor([0.4, -1.0]).double(), std=torch.tensor([0.5, 1.0]).double())
    errors = [fa.error_budget(oracle, make_plan(solver, schedule, n)) for n in (20, 80)]
    shrink = errors[0].sources["discretisation"].w2 / errors[1].sources["discretisation"].w2
    assert shrink > 3.0 ** SOLVERS[solver].order * 0.9
    # Closed form of the flow: z = (x - m) / sqrt(c + s^2) is kept, from N(0, 25) instead of N(m, c + 25).
    mean, c = oracle.components()
    scale = ((c + 0.002**2) / (c + 25)).sqrt()
    other = fa.gaussian_w2(mean, torch.diag(c + 0.002**2), mean - scale * mean, torch.diag(25 * scale**2))
    fine = fa.error_budget(oracle, make_plan("rk4", schedule, 100))
    assert fine.sources["initialisation"].w2 == pytest.approx(other, rel=1e-3)
    assert fine.sources["truncation"].w2 == pytest.approx(
        fa.gaussian_w2(mean, torch.diag(c), mean, torch.diag(c + 0.002**2)), rel=1e-4
    )


def test_budget_adds_up_and_names_the_culprit():
    flow = schedules.flow()
    coarse = fa.error_budget(SPECTRUM, make_plan("ddim", flow, 5, prediction="flow"))
    assert coarse.dominating == "discretisation" and coarse.sources["initialisation"].w2 < 1e-14
    wrong = fa.error_budget(SPECTRUM, make_plan("rk4", flow, 40, prediction="flow"), error=fa.ModelError(0.1))
    assert wrong.dominating == "score" and wrong.score_mse > 0
    early = make_plan("rk4", schedules.edm(sigma_max=500.0, sigma_min=0.3, final="min"), 60)
    assert fa.error_budget(SPECTRUM, early).dominating == "truncation"
    late = make_plan("rk4", schedules.edm(sigma_max=3.0), 60)
    assert fa.error_budget(SPECTRUM, late).dominating == "initialisation"
    for budget in (coarse, wrong):
        assert budget.total.w2 <= sum(s.w2 for s in budget.sources.values()) + 1e-12
        assert budget.steps[-1] == pytest.approx(budget.total.w2)


def test_planted_score_error_is_what_the_report_measures():
    """`score_mse` of the budget at the exact marginal against the same error measured on samples."""
    schedule, t = schedules.vp(), 500.0
    exact, error = SPECTRUM.model(schedule, "epsilon"), 0.2
    data = SPECTRUM.sample(20_000, torch.Generator().manual_seed(3))
    report = fa.analyze_score_estimation_error(
        lambda x, t: (1 + error) * exact(x, t), SPECTRUM, data, [t, 900.0], schedule=schedule, prediction="epsilon",
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    expected = error**2 * float((1 / (alpha**2 * SPECTRUM.spectrum + sigma**2)).mean())  # E|score|^2 / D
    assert report.timesteps[0].low < expected < report.timesteps[0].high
    assert report.timesteps[0].relative == pytest.approx(error**2)
    assert report.worst is report.timesteps[0] and report.low < report.mean < report.high
    plan = make_plan("ddim", schedule, None, times=torch.tensor([t, 400.0]))
    planted = fa.propagate(SPECTRUM, plan, start="exact", error=fa.ModelError(relative=error)).score_mse
    assert planted[0] == pytest.approx(expected, rel=1e-9)


# --------------------------------------------------------------------------------------------------- score estimation


@pytest.mark.parametrize("prediction", ["score", "epsilon", "v", "sample", "flow"])
def test_a_perfect_network_has_no_error(prediction):
    schedule = schedules.flow()
    perfect = SPECTRUM.score_model(schedule) if prediction == "score" else SPECTRUM.model(schedule, prediction)
    truth = SPECTRUM.score_model(schedule)
    report = fa.analyze_score_estimation_error(
        perfect, truth, SPECTRUM.sample(50), [0.1, 0.5, 0.9], schedule=schedule, prediction=prediction, batch_size=37
    )
    assert report.mean < 1e-18


def test_intervals_cover_as_often_as_they_say():
    """An error |x|^2-like with a known mean: 95 % intervals contain it in 90 to 99 % of 300 repetitions."""
    oracle, schedule, g = fa.GaussianOracle(torch.zeros(2), std=1.0), schedules.flow(), torch.Generator().manual_seed(5)
    truth, covered = oracle.score_model(schedule), 0
    expected = 1 / (0.5**2 + 0.5**2)  # E|score|^2 / D of the zero network
    for _ in range(300):
        report = fa.analyze_score_estimation_error(
            lambda x, t: torch.zeros_like(x), truth, oracle.sample(60, g), [0.5], schedule=schedule, generator=g
        )
        covered += report.low <= expected <= report.high
    assert 270 <= covered <= 297


def test_a_time_without_an_answer_is_the_worst():
    def model(x, t):
        return torch.where(t > 0.6, math.nan, 1.0)[:, None] * x

    report = fa.analyze_score_estimation_error(
        model, SPECTRUM, SPECTRUM.sample(5), [0.2, 0.8], schedule=schedules.flow()
    )
    assert report.worst.t == 0.8 and math.isnan(report.mean)


def test_conditions_follow_their_data():
    mixture = fa.MixtureOracle(torch.ones(2), torch.tensor([[-2.0], [2.0]]), torch.tensor([0.3, 0.3]))
    labels = torch.tensor([0, 1]).repeat(20)
    data = mixture.means[labels]
    report = fa.analyze_score_estimation_error(
        mixture.model(schedules.flow(), "flow"), mixture, data, [0.3, 0.6], schedule=schedules.flow(),
        prediction="flow", cond=labels, batch_size=7,
    )  # fmt: skip
    assert report.mean < 1e-18


# ------------------------------------------------------------------------------------------------- bounds and distances


def test_bounds_scale_as_their_theorems_say():
    chen = {"d": 4, "T": 5.0, "h": 0.01, "L": 3.0, "m2": 2.0, "kl_data": 1.5, "eps_score": 0.1}
    terms = fa.bound_chen(**chen).terms
    assert terms["initialisation"] == pytest.approx(math.sqrt(1.5) * math.exp(-5))
    assert terms["discretisation (noise)"] == pytest.approx(3 * math.sqrt(4 * 0.01 * 5))
    assert terms["discretisation (drift)"] == pytest.approx(3 * 2 * 0.01 * math.sqrt(5))
    assert terms["score"] == pytest.approx(0.1 * math.sqrt(5))
    assert fa.bound_chen(**{**chen, "h": 0.5}).violated == ("h <= 1 / L",)
    benton = fa.bound_benton(d=4, T=5.0, steps=100, kappa=0.1, eps_score_squared=0.2)
    assert benton.total == pytest.approx(0.2 + 0.01 * 4 * 100 + 0.1 * 4 * 5 + 4 * math.exp(-10))
    assert not fa.bound_chen_lee_lu(d=4, T=5, steps=10, L=1, second_moment=4, eps_score_squared=0).checked


def test_bounds_hold_for_gaussians_up_to_their_constants():
    """Where its assumptions hold, Benton et al.'s bound is above the exact path KL, and falls like it."""
    unit = fa.GaussianOracle(torch.zeros(3), std=1.0)
    for steps in (50, 400):
        times = fa.ou_times(5.0, steps, delta=1e-2, grid="half_geometric")
        _, benton, _ = fa.ou_bounds(unit, times)
        assert not benton.violated and benton.total > fa.ou_path_kl(unit, times)
    assert fa.step_ratio(torch.tensor([3.0, 2.0, 0.5])) == 3.0
    assert fa.step_ratio(fa.ou_times(1.0, 4)) == math.inf
    assert fa.ou_bounds(SPECTRUM, fa.ou_times(4.0, 10))[0].violated


def test_gaussian_distances_against_their_definitions():
    g = torch.Generator().manual_seed(6)
    a, b = (torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    c1, c2 = a @ a.T + 0.1 * torch.eye(4), b @ b.T + 0.1 * torch.eye(4)
    m1, m2 = (torch.randn(4, generator=g, dtype=torch.float64) for _ in range(2))
    d = torch.distributions
    kl = d.kl_divergence(d.MultivariateNormal(m1, c1), d.MultivariateNormal(m2, c2))
    assert fa.gaussian_kl(m1, c1, m2, c2) == pytest.approx(float(kl))

    # The optimal map x -> m2 + A (x - m1), A = C1^-1/2 (C1^1/2 C2 C1^1/2)^1/2 C1^-1/2, pushes C1 to C2 at this cost.
    def root(c):
        values, vectors = torch.linalg.eigh(c)
        return (vectors * values.sqrt()) @ vectors.T

    r = root(c1)
    linear = torch.linalg.inv(r) @ root(r @ c2 @ r) @ torch.linalg.inv(r)
    torch.testing.assert_close(linear @ c1 @ linear.T, c2)
    gap = torch.eye(4) - linear
    cost = (m1 - m2).square().sum() + (gap @ c1 @ gap.T).trace()
    assert fa.gaussian_w2_squared(m1, c1, m2, c2) == pytest.approx(float(cost))
    assert fa.gaussian_w2(m1, c1, m2, c2) == pytest.approx(float(cost) ** 0.5)
    assert fa.gaussian_kl(m1, c1, m2, torch.diag(torch.tensor([1.0, 1, 1, 0]))) == math.inf


def test_w2_of_samples_against_all_permutations():
    g = torch.Generator().manual_seed(7)
    for shape in ((6, 1), (6, 2), (6,)):
        x, y = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        if len(shape) == 2 and shape[1] > 1:
            pytest.importorskip("scipy")
        best = min(float((x - y[list(p)]).square().sum()) / 6 for p in itertools.permutations(range(6)))
        assert fa.w2_squared(x, y) == pytest.approx(best, rel=1e-5)
        assert fa.w2(x, y) == pytest.approx(best**0.5, rel=1e-5)


def test_w2_of_samples_far_from_zero_is_exact():
    pytest.importorskip("scipy")
    x = 1e3 + torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fa.w2(x, x.flip(0)) == 0.0
    assert fa.w2(x, x + 1e-4) == pytest.approx(1e-4 * 3**0.5, rel=1e-6)


def test_w2_without_scipy_says_what_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"fastdiff\[bench\]"):
        fa.w2(torch.zeros(3, 2), torch.ones(3, 2))
    assert fa.w2(torch.zeros(3), torch.ones(3)) == 1.0


def test_mmd_is_unbiased_and_sees_a_shift():
    """Against the closed form for two normal laws, E k = (1 + 2 / b^2)^-1/2 exp(-m^2 / (2 (b^2 + 2)))."""
    g, b, shift = torch.Generator().manual_seed(8), 0.8, 0.5

    def kernel(m):
        return (1 + 2 / b**2) ** -0.5 * math.exp(-(m**2) / (2 * (b**2 + 2)))

    expected = 2 * kernel(0.0) - 2 * kernel(shift)
    draws = [
        fa.mmd_squared(torch.randn(50, 1, generator=g), torch.randn(40, 1, generator=g) + s, [b])
        for s in (0.0, shift)
        for _ in range(200)
    ]
    for values, mean in ((np.array(draws[:200]), 0.0), (np.array(draws[200:]), expected)):
        assert abs(values.mean() - mean) < 4 * values.std() / math.sqrt(200)
    x = torch.randn(30, 2, generator=g)
    assert fa.mmd_squared(x, x + 3) > 0.5 > abs(fa.mmd_squared(x, torch.randn(30, 2, generator=g)))


# --------------------------------------------------------------------------------------------------------------- rates


def test_observed_order_ignores_the_rounding_floor():
    n = [10, 20, 40, 80, 160, 320, 640, 1280]
    errors = [max(3e-3 * k**-4.0, 3e-16 * math.sqrt(k)) for k in n]
    result = fa.observed_order(n, errors)
    assert result.order == pytest.approx(4.0, abs=0.02) and result.low <= result.order <= result.high
    assert result.floor and set(result.used) | set(result.floor) == set(n)
    assert fa.observed_order(n, [0.3 / k**2 for k in n]).floor == ()
    float32 = fa.observed_order(n, [max(k**-2.0, 3e-6) for k in n], epsilon=2.0**-23)
    assert float32.order == pytest.approx(2.0, abs=0.05)
    with pytest.raises(ValueError, match="above rounding"):
        fa.observed_order(n[:3], [1e-16] * 3)


def test_sample_complexity_finds_the_rate_of_a_mean():
    """|mean of n normals|^2 falls like 1 / n."""

    def run(n, seed):
        return float(torch.randn(n, 50, generator=torch.Generator().manual_seed(seed)).mean(0).square().mean())

    result = fa.sample_complexity(run, [16, 64, 256, 1024], repeats=8)
    assert result.rate_low < 1.0 < result.rate_high and result.rate_high - result.rate_low < 0.3
    assert all(lo < 1 / n < hi for n, lo, hi in zip(result.sizes, result.lows, result.highs, strict=True))
    assert result.samples_for(1e-4) == pytest.approx(1e4, rel=0.5)
    flat = fa.sample_complexity(lambda n, s: 1.0 - 1e-4 * math.log(n) + 1e-6 * (s % 3), [1, 10, 100])
    assert flat.rate > 0 and flat.samples_for(1e-9) == math.inf
    with pytest.raises(ValueError, match=r"\[SampleComplexity\] error"):
        result.samples_for(-1.0)


def test_student_intervals():
    """Against the closed forms for 1 and 2 degrees of freedom, and the normal limit."""
    from fastdiff.analysis._student import interval_factor

    assert interval_factor(1, 0.95) == pytest.approx(math.tan(0.95 * math.pi / 2))
    assert interval_factor(2, 0.95) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)))
    assert interval_factor(10**6, 0.95) == pytest.approx(1.959964, rel=1e-5)


# -------------------------------------------------------------------------------------------- paths and the optimiser


def test_paths_of_a_gaussian_flow():
    """N(0, 1) to N(0, s^2) along x_t = t x_1 + (1 - t) x_0 with independent ends: known energy, by quadrature."""
    s, oracle = 0.3, fa.GaussianOracle(torch.zeros(1), std=0.3)
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    report = fa.analyze_paths(oracle.model(schedules.flow(), "flow"), noise, num_steps=200, w2_squared=(1 - s) ** 2)
    t = (np.arange(20000) + 0.5) / 20000
    width = np.sqrt(t**2 * s**2 + (1 - t) ** 2)  # Z_t = width z
    speed = (t * s**2 - (1 - t)) / width
    second = float(noise.square().mean())
    assert report.energy == pytest.approx(second * np.mean(speed**2), rel=1e-3)
    assert report.straightness == pytest.approx(second * (np.mean(speed**2) - (1 - s) ** 2), rel=1e-3)
    torch.testing.assert_close(report.ends, s * noise, rtol=1e-3, atol=1e-3)
    assert report.excess == pytest.approx(report.energy / 0.49 - 1)
    straight = fa.analyze_paths(lambda x, t: torch.full_like(x, 2.0), noise, num_steps=5)
    assert straight.straightness < 1e-12 and straight.energy == pytest.approx(4.0)


@pytest.mark.parametrize(("solver", "gain"), [("ddim", 1.02), ("dpmpp_2m", 1.3)])
def test_optimised_times_beat_those_they_start_from(solver, gain):
    """On variances that the optimiser has not seen, in between its own."""
    schedule, seen = schedules.edm(final="min"), torch.logspace(-1, 0.3, 12, dtype=torch.float64)
    unseen = fa.GaussianOracle(torch.zeros(11), std=(seen[1:] * seen[:-1]).sqrt())
    result = fa.optimise_times(fa.GaussianOracle(torch.zeros(12), std=seen), schedule, solver, 10, iterations=12)
    before, after = (
        fa.discretisation_error(unseen, make_plan(solver, schedule, None, times=times))
        for times in (schedule.times(10), result.times)
    )
    assert after < before / gain and result.after < result.before / gain
    assert bool((result.times.diff() < 0).all()) and list(result.history) == sorted(result.history, reverse=True)
    assert torch.equal(result.schedule.times(10), result.times) and torch.equal(result.plan.times, result.times)
    assert fa.discretisation_error(fa.GaussianOracle(torch.zeros(12), std=seen), result.plan) == pytest.approx(
        result.after
    )
    assert float(result.times[0]) == 80.0 and float(result.times[-1]) == pytest.approx(0.002)


def test_mixture_error_is_a_distance_of_paths():
    mixture = fa.MixtureOracle(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), torch.tensor([0.3, 0.2]))
    flow = schedules.flow()
    errors = [fa.discretisation_error(mixture, make_plan("heun", flow, n, prediction="flow")) for n in (40, 80)]
    assert fa.observed_order((40, 80), errors).order == pytest.approx(2.0, abs=0.25)
    plane = fa.MixtureOracle(mixture.weights, torch.tensor([[-1.0, 0.0], [1.5, 0.0]]), torch.tensor([0.3, 0.2]))
    flat = fa.discretisation_error(plane, make_plan("heun", flow, 40, prediction="flow"), paths=64)
    assert flat == pytest.approx(errors[0], rel=0.5)
    with pytest.raises(ValueError, match="without noise"):
        fa.discretisation_error(mixture, make_plan("ddpm", flow, 5, prediction="flow"))


def test_recommendation_is_better_and_costs_no_more():
    flow = schedules.flow()
    given = fa.error_budget(SPECTRUM, make_plan("ddim", flow, 8, prediction="flow"))
    found = fa.better_runs(SPECTRUM, {"flow": flow}, given.nfe, prediction="flow", optimise=False)
    best = found[0]
    assert best.budget.total.w2 < given.total.w2 / 3 and all(c.budget.nfe <= 8 for c in found)
    steps = fa.steps_for(SPECTRUM, flow, best.solver, given.total.w2, prediction="flow")
    reached = [
        fa.error_budget(SPECTRUM, make_plan(best.solver, flow, n, prediction="flow")).total.w2 <= given.total.w2
        for n in (steps - 1, steps)
    ]
    assert reached == [False, True]


def test_steps_for_reaches_the_most_steps_allowed():
    flow = schedules.flow()
    costs = [
        fa.Candidate("ddim", "", plan, fa.error_budget(SPECTRUM, plan)).cost
        for plan in (make_plan("ddim", flow, n, prediction="flow") for n in (17, 18, 19))
    ]
    least = [fa.steps_for(SPECTRUM, flow, "ddim", cost, prediction="flow", most=19) for cost in costs]
    assert least == [17, 18, 19]
    assert fa.steps_for(SPECTRUM, flow, "ddim", costs[-1] * 0.99, prediction="flow", most=19) is None
    assert fa.steps_for(SPECTRUM, flow, "ddim", math.inf, prediction="flow", most=1) == 1


def test_pictures_are_whole_files(tmp_path):
    flow = schedules.flow()
    report = fa.analyze_score_estimation_error(
        lambda x, t: torch.zeros_like(x), SPECTRUM, SPECTRUM.sample(20), [0.1, 0.5, 0.9], schedule=flow
    )
    fa.plot_score_error(report, tmp_path / "new" / "score.png")
    rate = fa.sample_complexity(lambda n, s: (1 + 0.1 * (s % 3)) / n, [10, 20, 40], repeats=3)
    fa.plot_sample_complexity(rate, tmp_path / "rate.png")
    budget = fa.error_budget(SPECTRUM, make_plan("ddim", flow, 5, prediction="flow"))
    fa.plot_budgets({"a": budget}, tmp_path / "budget.png")
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png"))
    assert found == ["budget.png", "new/score.png", "rate.png"]
    for name in found:
        data = (tmp_path / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fa.propagate(HALF, make_plan("ddim", schedules.flow(), 2), start="data"), r"\[propagate\] start"),
        (
            lambda: fa.error_budget(HALF, make_plan("ddim", schedules.flow(), 2, prediction="v").reversed()),
            "noise to data",
        ),
        (lambda: fa.ou_times(1.0, 3, delta=2.0), r"\[ou_times\] T, delta"),
        (lambda: fa.ou_times(math.inf, 3), r"\[ou_times\] T, delta"),
        (
            lambda: fa.better_runs(HALF, {"flow": schedules.flow()}, 3, prediction="flow", solvers=("rk4",)),
            "nfe: expected at least 4",
        ),
        (lambda: fa.steps_for(HALF, schedules.flow(), "ddim", 1.0, most=0), r"\[steps_for\] most"),
        (lambda: fa.ou_exponential_integrator(torch.tensor([0.0, 1.0])), "falling times"),
        (lambda: fa.w2(torch.zeros(3), torch.zeros(4)), r"\[w2_squared\] y"),
        (lambda: fa.mmd_squared(torch.zeros(3), torch.zeros(4), [0.0]), "bandwidths"),
        (lambda: fa.observed_order([2, 1], [1.0, 1.0]), "rising counts"),
        (lambda: fa.sample_complexity(lambda n, s: math.nan, [1, 2]), "positive error"),
        (lambda: fa.analyze_paths(lambda x, t: x, torch.zeros(2), num_steps=0), "num_steps"),
        (lambda: fa.optimise_times(HALF, schedules.flow(), "ddim", 1), "at least 2"),
        (
            lambda: fa.analyze_score_estimation_error(
                lambda x, t: x, HALF, torch.zeros(4, 1), [1.0], schedule=schedules.flow()
            ),
            "sigma > 0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
