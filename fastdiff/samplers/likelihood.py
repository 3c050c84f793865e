"""Exact log-likelihood through the probability-flow ODE: Song et al. 2021 (arXiv:2011.13456), §4.3 and Appendix D.2.

log p(data) = log N(x_noise; 0, scale^2) + integral of the divergence of dx/dt along the way from data to noise
(instantaneous change of variables, Chen et al. 2018, arXiv:1806.07366, eq. 8). The divergence is the trace of a
Jacobian, exact with one vector-Jacobian product for every dimension, or estimated without bias by Hutchinson's probes
(Grathwohl et al. 2019, arXiv:1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.samplers.adaptive import _initial_scale, _Solution, ode_times, solve_ode, velocity_factors
from fastdiff.samplers.guidance import _channels
from fastdiff.samplers.plan import PREDICTIONS
from fastdiff.samplers.sample import _evaluation_mode
from fastdiff.samplers.schedules import Schedule

__all__ = ["Likelihood", "log_likelihood"]


@dataclass(frozen=True)
class Likelihood:
    """What :func:`log_likelihood` found.

    Attributes:
        log_prob: [B] float64, log p(data) in nats.
        noise: [B, ...], the data carried to the noise end, as a standard normal sample.
        nfe: evaluations of the model and its Jacobian products.
    """

    log_prob: Tensor
    noise: Tensor
    nfe: int

    @property
    def bits_per_dim(self) -> Tensor:
        """-log2 p(data) over the number of dimensions, for data as it was given (no change of units)."""
        return -self.log_prob / (math.log(2.0) * max(self.noise[0].numel(), 1))


def log_likelihood(
    model: Callable[[Tensor, Tensor, Any], Tensor],
    data: Tensor,
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    cond: Any = None,
    trace: str = "hutchinson",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    generator: torch.Generator | None = None,
    max_steps: int = 10_000,
) -> Likelihood:
    """log p(data) of the model's probability-flow ODE, started at ``schedule.last``.

    The density is that of data with the noise of ``schedule.last`` (none for flows), under the prior of sampling; on
    times of one's own that end in more noise, of data with that.

    Args:
        model: ``model(x, t, cond) -> prediction``, differentiable in x.
        data: [B, ...], float32 or float64.
        schedule: from ``fastdiff.samplers.schedules``.
        prediction: what the model predicts.
        cond: given to the model.
        trace: ``"hutchinson"``: an unbiased estimate from `probes` vectors of random signs, the same all the
            way.
            ``"exact"``: as many products as dimensions.
        probes: number of them, at least 1.
        rtol: relative tolerance of the solver, for the state and the logarithm.
        atol: absolute tolerance.
        generator: where the probes come from.
        max_steps: give up after so many steps.

    Raises:
        ValueError: an argument is not one of these or out of range, or the prediction has another shape or no gradient.
        RuntimeError: the tolerance is not met, or the model is not finite.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"[log_likelihood] prediction: expected one of {PREDICTIONS}, got {prediction!r}")
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"[log_likelihood] trace: expected 'hutchinson' or 'exact', got {trace!r}")
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"[log_likelihood] probes: expected at least 1, got {probes!r}")
    if data.dtype not in (torch.float32, torch.float64) or data.dim() < 2:
        raise ValueError(
            f"[log_likelihood] data: expected [B, ...] float32 or float64, got {data.dtype} {[*data.shape]}"
        )
    noisy, clean = ode_times(schedule, prediction)
    size = data[0].numel()
    signs = None
    if trace == "hutchinson":
        bits = torch.empty((probes, *data.shape), dtype=data.dtype, device=data.device)
        signs = bits.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    count = 0

    def right_hand_side(t: float, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal count
        p, q = velocity_factors(schedule, prediction, t)
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            pred = _channels(model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), cond), x).to(x.dtype)
            divergence = _divergence(pred, x, signs)
        count += 1
        velocity = ops.linear_update((p, q), (x.detach(), pred.detach()))
        return velocity, p * size + q * divergence

    start = (data.detach(), torch.zeros(len(data), dtype=data.dtype, device=data.device))
    with _evaluation_mode(model), torch.no_grad():
        solution = solve_ode(right_hand_side, start, clean, noisy, rtol=rtol, atol=atol, max_steps=max_steps)
    assert isinstance(solution, _Solution)
    scale = _initial_scale(schedule, noisy)
    noise = solution.final / scale
    energy = noise.double().flatten(1).square().sum(1) / 2
    prior = -energy - size * (math.log(2 * math.pi) / 2 + math.log(scale))
    return Likelihood(prior + solution.extra[0].double(), noise, count)


def _divergence(pred: Tensor, x: Tensor, signs: Tensor | None) -> Tensor:
    """[B]: the trace of d pred / d x of every sample, exact or by probes."""
    if not pred.requires_grad:
        raise ValueError("[log_likelihood] model: expected a prediction with gradients in x, got one without any")
    total = x.new_zeros(len(x))
    if signs is not None:
        for i, probe in enumerate(signs):
            (product,) = torch.autograd.grad(pred, x, probe, retain_graph=i + 1 < len(signs), materialize_grads=True)
            total = total + (product * probe).flatten(1).sum(1)
        return total / len(signs)
    size = x[0].numel()
    for i in range(size):
        unit = torch.zeros_like(pred).flatten(1)
        unit[:, i] = 1.0
        (product,) = torch.autograd.grad(pred, x, unit.view_as(pred), retain_graph=i + 1 < size, materialize_grads=True)
        total = total + product.flatten(1)[:, i]
    return total
