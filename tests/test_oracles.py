"""Oracles against automatic differentiation of their own density, against Monte Carlo, and against a solved ODE."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff import ops
from fastdiff.analysis import GaussianOracle, MixtureOracle, Oracle

LEVELS = [(0.9, math.sqrt(1 - 0.81)), (0.3, 0.7), (1.0, 2.5), (0.0, 1.0), (0.05, 0.1)]


class Flow:
    """x_t = t data + (1 - t) noise."""

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t


def make_oracles() -> dict[str, Oracle]:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    means = torch.randn(3, 2, 3, generator=g, dtype=torch.float64)
    return {
        "diagonal": GaussianOracle(means[0], std=torch.rand(2, 3, generator=g).double() + 0.1),
        "full": GaussianOracle(means[1], root @ root.T / 6 + 0.05 * torch.eye(6)),
        "mixture": MixtureOracle(torch.tensor([0.2, 0.5, 0.3]), means, torch.tensor([0.3, 0.5, 0.2])),
        "mixture_diagonal": MixtureOracle(
            torch.tensor([1.0, 3.0, 2.0]), means, torch.rand(3, 2, 3, generator=g).double() + 0.1
        ),
    }


ORACLES = make_oracles()
oracle_names = pytest.mark.parametrize("name", ORACLES)


def marginal(oracle: Oracle, alpha: float, sigma: float) -> torch.distributions.Distribution:
    """The law of alpha data + sigma noise, built by torch.distributions from the oracle's parameters."""
    d = torch.distributions
    if isinstance(oracle, GaussianOracle):
        eye = torch.eye(6, dtype=torch.float64)
        return d.MultivariateNormal(alpha * oracle.mean.flatten(), alpha**2 * oracle.cov + sigma**2 * eye)
    std = (alpha**2 * oracle.stds.flatten(1) ** 2 + sigma**2).sqrt()
    component = d.Independent(d.Normal(alpha * oracle.means.flatten(1), std), 1)
    return d.MixtureSameFamily(d.Categorical(oracle.weights), component)


@oracle_names
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_score_and_density(name, alpha, sigma):
    oracle = ORACLES[name]
    x = oracle.diffuse(5, alpha, sigma, torch.Generator().manual_seed(1)).requires_grad_()
    density = marginal(oracle, alpha, sigma).log_prob(x.flatten(1))
    torch.testing.assert_close(oracle.log_prob(x, alpha, sigma), density, rtol=1e-12, atol=1e-12)
    (score,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(oracle.score(x, alpha, sigma), score, rtol=1e-10, atol=1e-10)


@oracle_names
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_predictions_agree(name, alpha, sigma):
    """Tweedie's formula, the definitions of v and flow, and x = alpha E[data] + sigma E[noise]."""
    oracle = ORACLES[name]
    x = oracle.diffuse(5, alpha, sigma, torch.Generator().manual_seed(2))
    data, noise = oracle.predict(x, alpha, sigma, "sample"), oracle.predict(x, alpha, sigma, "epsilon")
    score = oracle.score(x, alpha, sigma)
    torch.testing.assert_close(noise, -sigma * score)
    torch.testing.assert_close(alpha * data + sigma * noise, x)
    if alpha > 0:
        torch.testing.assert_close(data, (x + sigma**2 * score) / alpha, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(oracle.predict(x, alpha, sigma, "v"), alpha * noise - sigma * data)
    torch.testing.assert_close(oracle.predict(x, alpha, sigma, "flow"), data - noise)


@oracle_names
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_conventions_of_the_update_kernel(name, prediction):
    """A DDIM step to alpha_bar = 1 returns E[data | x], whatever the prediction, so signs are those of `ddim_step`."""
    oracle, alpha, sigma = ORACLES[name], 0.6, 0.8
    x = oracle.diffuse(5, alpha, sigma, torch.Generator().manual_seed(3))
    out = ops.ddim_step(x, oracle.predict(x, alpha, sigma, prediction), alpha**2, 1.0, prediction=prediction)
    torch.testing.assert_close(out, oracle.denoise(x, alpha, sigma), rtol=1e-9, atol=1e-9)


@oracle_names
def test_denoiser_is_a_conditional_mean(name):
    """E[data | x] by importance sampling of the data: nothing of the closed form is used."""
    oracle, alpha, sigma = ORACLES[name], 0.7, 0.9
    g = torch.Generator().manual_seed(4)
    x, data = oracle.diffuse(1, alpha, sigma, g)[0], oracle.sample(200_000, g)
    log_weight = -0.5 * ((x - alpha * data) / sigma).square().flatten(1).sum(1)
    weight = torch.softmax(log_weight, 0).reshape(-1, 1, 1)
    mean = (weight * data).sum(0)
    error = (weight * (data - mean)).square().sum(0).sqrt()  # standard error of the self-normalised estimate
    assert bool(((oracle.denoise(x[None], alpha, sigma)[0] - mean).abs() < 5 * error).all())


@oracle_names
def test_moments_of_samples(name):
    oracle, n = ORACLES[name], 100_000
    x = oracle.diffuse(n, 0.8, 0.5, torch.Generator().manual_seed(5)).flatten(1)
    mean, cov = oracle.moments(0.8, 0.5)
    spread = cov.diagonal().sqrt()
    assert bool(((x.mean(0) - mean.flatten()).abs() < 5 * spread / n**0.5).all())
    assert bool(((torch.cov(x.T) - cov).abs() < 8 * spread[:, None] * spread / n**0.5).all())


def ode(oracle: Oracle, x: torch.Tensor, start: float, end: float, steps: int) -> torch.Tensor:
    """dx/dt = E[data - noise | x] of the flow process, by the classical Runge-Kutta method."""
    model, h, t = oracle.model(Flow(), "flow"), (end - start) / steps, torch.tensor(start, dtype=torch.float64)
    for _ in range(steps):
        k1 = model(x, t)
        k2 = model(x + h / 2 * k1, t + h / 2)
        k3 = model(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + model(x + h * k3, t + h))
        t = t + h
    return x


@pytest.mark.parametrize("name", ["diagonal", "full"])
def test_gaussian_path_solves_the_flow(name):
    oracle = ORACLES[name]
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    exact = oracle.path(x, (0.0, 1.0), (0.9, 0.1))
    torch.testing.assert_close(ode(oracle, x, 0.0, 0.9, 400), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(oracle.path(exact, (0.9, 0.1), (0.0, 1.0)), x, rtol=1e-12, atol=1e-12)


def test_variance_exploding_path_is_the_closed_form():
    m, s, first, last = 0.4, 0.7, 20.0, 0.01
    x = first * torch.randn(9, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = m + (x - m) * math.sqrt((s**2 + last**2) / (s**2 + first**2))
    torch.testing.assert_close(GaussianOracle(m, std=s).path(x, (1.0, first), (1.0, last)), expected)


def test_mixture_path_solves_the_flow_in_one_dimension():
    oracle = MixtureOracle(
        torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]).double(), torch.tensor([0.4, 0.3]).double()
    )
    x = torch.tensor([-7.0, -1.0, 0.0, 0.2, 3.0, 7.0], dtype=torch.float64)[:, None]
    exact = oracle.path(x, (0.0, 1.0), (0.9, 0.1))
    torch.testing.assert_close(ode(oracle, x, 0.0, 0.9, 500), exact, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match=r"\[MixtureOracle\] x: expected one-dimensional"):
        ORACLES["mixture"].path(torch.zeros(1, 2, 3), (0.0, 1.0), (0.9, 0.1))


@oracle_names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_is_rounded_once(name, dtype):
    oracle = ORACLES[name]
    x = oracle.diffuse(7, 0.6, 0.8, torch.Generator().manual_seed(8)).to(dtype)
    for prediction in ops.update.PREDICTIONS:
        got = oracle.predict(x, 0.6, 0.8, prediction)
        assert got.dtype == dtype
        assert torch.equal(got, oracle.predict(x.double(), 0.6, 0.8, prediction).to(dtype))


@oracle_names
def test_levels_per_sample(name):
    oracle, t = ORACLES[name], torch.tensor([0.1, 0.5, 0.9, 0.0])
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(9))
    batched = oracle.model(Flow(), "v")(x, t)
    one_by_one = [oracle.model(Flow(), "v")(x[i : i + 1], t[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(batched, torch.cat(one_by_one), rtol=0, atol=0)
    torch.testing.assert_close(oracle.score_model(Flow())(x, t)[1:2], oracle.score(x[1:2], 0.5, 0.5))


def test_condition_picks_a_component():
    oracle = ORACLES["mixture"]
    x = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    conditional = oracle.model(Flow())(x, torch.full((3,), 0.6), torch.tensor([2, 0, 1]))
    for row, k in enumerate([2, 0, 1]):
        alone = GaussianOracle(oracle.means[k], std=oracle.stds[k])
        torch.testing.assert_close(
            conditional[row : row + 1], alone.noise(x[row : row + 1], 0.6000000238418579, 0.3999999761581421)
        )


def test_numbers_stand_for_any_shape():
    oracle, full = GaussianOracle(0.3, std=0.5), GaussianOracle(torch.full((2, 3), 0.3, dtype=torch.float64), std=0.5)
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(11))
    assert torch.equal(oracle.denoise(x, 0.6, 0.8), full.denoise(x, 0.6, 0.8))
    assert torch.equal(oracle.log_prob(x, 0.6, 0.8), full.log_prob(x, 0.6, 0.8))
    draw = [o.sample(4, torch.Generator().manual_seed(0), shape=(2, 3)) for o in (oracle, full)]
    assert torch.equal(*draw)
    pair = MixtureOracle(torch.ones(2), torch.tensor([-1.0, 1.0]), torch.tensor([0.2, 0.4]))
    wide = MixtureOracle(
        torch.ones(2), torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 2, 3), torch.tensor([0.2, 0.4])
    )
    torch.testing.assert_close(pair.predict(x, 0.6, 0.8, "v"), wide.predict(x, 0.6, 0.8, "v"))
    assert pair.sample(5, shape=(2, 3)).shape == (5, 2, 3) and pair.sample(5).shape == (5,)
    mean, cov = pair.moments(0.6, 0.8)
    assert mean.shape == () and float(mean) == 0.0
    assert float(cov) == pytest.approx(0.36 * (1 + (0.04 + 0.16) / 2) + 0.64)


def test_limits_of_the_levels():
    for oracle in ORACLES.values():
        x = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
        assert torch.equal(oracle.denoise(x, 1.0, 0.0), x) or (oracle.denoise(x, 1.0, 0.0) - x).abs().max() < 1e-12
        mean = oracle.moments()[0].expand_as(x)
        torch.testing.assert_close(oracle.denoise(x, 0.0, 1.0), mean)
        assert oracle.denoise(x[:0], 0.5, 0.5).shape == (0, 2, 3)
    flat = GaussianOracle(torch.tensor([0.3, 0.4]), std=torch.tensor([0.0, 1.0]))
    assert torch.equal(flat.denoise(flat.mean[None], 1.0, 0.0), flat.mean[None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianOracle(0.0), r"\[GaussianOracle\] cov: expected exactly one"),
        (lambda: GaussianOracle(0.0, std=-1.0), r"\[GaussianOracle\] std: expected numbers >= 0"),
        (lambda: GaussianOracle(torch.zeros(2), torch.eye(3)), r"\[GaussianOracle\] cov: expected shape \(2, 2\)"),
        (lambda: GaussianOracle(torch.zeros(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "a symmetric matrix"),
        (lambda: GaussianOracle(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "no negative eigenvalue"),
        (lambda: MixtureOracle(torch.zeros(2), torch.zeros(2), torch.ones(2)), r"\[MixtureOracle\] weights: expected"),
        (
            lambda: MixtureOracle(torch.tensor([1.0, math.inf]), torch.zeros(2), torch.ones(2)),
            r"weights: .* got \[1.0, inf",
        ),
        (lambda: MixtureOracle(torch.ones(2), torch.zeros(3), torch.ones(2)), r"\[MixtureOracle\] means: expected"),
        (
            lambda: ORACLES["mixture"].noise(torch.zeros(2, 2, 3), 0.5, 0.5, torch.tensor([0, 3])),
            r"\[MixtureOracle\] cond: expected components 0 to 2, got \[0, 3\]",
        ),
        (lambda: ORACLES["full"].denoise(torch.zeros(2, 6), 0.5, 0.5), r"\[GaussianOracle\] x: expected"),
        (lambda: ORACLES["mixture"].predict(torch.zeros(2, 2, 3), 0.5, 0.5, "x0"), r"prediction: expected one of"),
        (
            lambda: ORACLES["mixture"].score(torch.zeros(2, 2, 3), torch.ones(3), 0.5),
            r"expected numbers or shape \(2,\)",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
