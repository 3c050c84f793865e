"""Convergence bounds with every term by name, for the exponential integrator of `fastdiff.analysis.ou`.

All of them hold *up to a universal constant* that the papers do not state (their "≲"), so what they say is how each
source scales, not how large the error is; `ou_path_kl` and `ou_marginal_kl` say that exactly for Gaussian data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.analysis.gaussians import gaussian_kl
from fastdiff.analysis.oracles import GaussianOracle

__all__ = ["Bound", "bound_benton", "bound_chen", "bound_chen_lee_lu", "ou_bounds", "step_ratio"]


@dataclass(frozen=True)
class Bound:
    """A bound up to a universal constant.

    Attributes:
        theorem: which one.
        metric: what it bounds: ``"TV"`` or ``"KL"``.
        terms: initialisation, discretisation (in as many parts as the theorem has) and score.
        formula: the bound as stated.
        checked: the statement was compared with independent quotations of it; False: it is given from memory, and is
            no more than an indication.
        violated: assumptions of the theorem that do not hold here.
    """

    theorem: str
    metric: str
    terms: dict[str, float]
    formula: str
    checked: bool = True
    violated: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "theorem": self.theorem,
            "metric": self.metric,
            "terms": dict(self.terms),
            "total": self.total,
            "formula": self.formula,
            "checked": self.checked,
            "violated": list(self.violated),
        }


def bound_chen(*, d: int, T: float, h: float, L: float, m2: float, kl_data: float, eps_score: float) -> Bound:
    """Chen, Chewi, Li, Li, Salim & Zhang 2023, "Sampling is as easy as learning the score", Theorem 2 (arXiv:2209.11215).

        TV(p_T, q) ≲ sqrt(KL(q || N(0, I))) e^-T + (L sqrt(d h) + L m2 h) sqrt(T) + eps_score sqrt(T)

    Assumptions: the score of every marginal is L-Lipschitz; E|x|^2 = m2^2 is finite; the network's score is within
    eps_score^2 in L2 at every step; steps are even with h ≲ 1 / L; L >= 1.

    Args:
        d: dimension.
        T: noise time at which the run starts.
        h: step.
        L: Lipschitz constant of the scores.
        m2: root of the second moment, sqrt(E|x|^2).
        kl_data: KL(data || N(0, I)), nats.
        eps_score: root of E|s' - s|^2, summed over coordinates.
    """
    violated = (*(("h <= 1 / L",) if h * L > 1 else ()), *(("L >= 1",) if L < 1 else ()))
    terms = {
        "initialisation": math.sqrt(kl_data) * math.exp(-T),
        "discretisation (noise)": L * math.sqrt(d * h) * math.sqrt(T),
        "discretisation (drift)": L * m2 * h * math.sqrt(T),
        "score": eps_score * math.sqrt(T),
    }
    formula = "TV ≲ sqrt(KL(q||γ)) e^-T + (L sqrt(d h) + L m2 h) sqrt(T) + ε sqrt(T)"
    return Bound("Chen et al. 2023, Theorem 2 (arXiv:2209.11215)", "TV", terms, formula, violated=violated)


def bound_benton(*, d: int, T: float, steps: int, kappa: float, eps_score_squared: float) -> Bound:
    """Benton, De Bortoli, Doucet & Deligiannidis 2024, "Nearly d-linear convergence bounds", Theorem 1 (arXiv:2308.03686).

        KL(q_delta || p) ≲ eps_score^2 + kappa^2 d N + kappa d T + d e^-2T

    for steps gamma_k <= kappa min(1, T - t_k+1), that is at most kappa times the noise time left at their end (or
    kappa). Assumptions: E x = 0 and Cov x = I; no smoothness. q_delta is the marginal at the early stop.

    Args:
        d: dimension.
        T: noise time at which the run starts.
        steps: N.
        kappa: see `step_ratio`.
        eps_score_squared: sum_k gamma_k E|s' - s|^2, the squared error integrated over the run.
    """
    terms = {
        "initialisation": d * math.exp(-2 * T),
        "discretisation (steps)": kappa**2 * d * steps,
        "discretisation (time)": kappa * d * T,
        "score": eps_score_squared,
    }
    formula = "KL ≲ ε² + κ² d N + κ d T + d e^-2T"
    return Bound("Benton et al. 2024, Theorem 1 (arXiv:2308.03686)", "KL", terms, formula)


def bound_chen_lee_lu(*, d: int, T: float, steps: int, L: float, second_moment: float, eps_score_squared: float) -> Bound:
    """H. Chen, Lee & Lu 2023, "Improved analysis of score-based generative modeling", Theorem 2.1 (arXiv:2211.01916).

        KL(q || p) ≲ (M2 + d) e^-T + T eps^2 + d T^2 L^2 / N

    *This form is given from memory and could not be compared with the paper* (`Bound.checked` is False): do not quote
    it. Their forward process is dX = -X / 2 dt + dB, whose time is twice that of `fastdiff.analysis.ou`: T here is
    theirs.

    Args:
        d: dimension.
        T: time at which the run starts, of dX = -X / 2 dt + dB.
        steps: N, even steps.
        L: Lipschitz constant of the scores.
        second_moment: M2 = E|x|^2.
        eps_score_squared: E|s' - s|^2 averaged over the run.
    """
    terms = {
        "initialisation": (second_moment + d) * math.exp(-T),
        "discretisation": d * T**2 * L**2 / steps,
        "score": T * eps_score_squared,
    }
    formula = "KL ≲ (M2 + d) e^-T + T ε² + d T² L² / N"
    return Bound("H. Chen, Lee & Lu 2023, Theorem 2.1 (arXiv:2211.01916)", "KL", terms, formula, checked=False)


def step_ratio(times: Tensor) -> float:
    """Benton et al.'s kappa of noise times u_0 > ... > u_N: the largest (u_k - u_k+1) / min(1, u_k+1).

    Infinite for a run that ends at 0: the theorem needs an early stop.
    """
    u = torch.as_tensor(times, dtype=torch.float64).cpu()
    return float(((u[:-1] - u[1:]) / u[1:].clamp(max=1.0)).max())


def ou_bounds(oracle: GaussianOracle, times: Tensor, *, relative_error: float = 0.0) -> list[Bound]:
    """All bounds for Gaussian data on noise times, with L, moments and the score's error computed exactly.

    Args:
        oracle: the data; its smallest standard deviation must be positive.
        times: [N + 1] noise times, falling.
        relative_error: the network returns (1 + relative_error) times the score.

    Raises:
        ValueError: data without spread in some direction, whose scores have no Lipschitz constant at 0.
    """
    u = torch.as_tensor(times, dtype=torch.float64).cpu()
    mean, variance = oracle.components()
    if float(variance.min()) <= 0 and float(u[-1]) == 0:
        raise ValueError("[ou_bounds] oracle: expected a positive spread in every direction, or an early stop")
    d, T, N = len(mean), float(u[0]), len(u) - 1
    marginal = 1 + (variance - 1) * (-2 * u[:, None]).exp()  # [N + 1, d]
    L = float((1 / marginal).max())
    moment = float((mean**2 + variance).sum())
    squared = relative_error**2 * (1 / marginal[:-1]).sum(1)  # E|r s|^2 at each evaluation
    h = u[:-1] - u[1:]
    even = float(h.max()) <= 1.0001 * float(h.min())
    eye = torch.eye(d, dtype=torch.float64)
    chen = bound_chen(
        d=d, T=T, h=float(h.max()), L=L, m2=moment**0.5,
        kl_data=gaussian_kl(mean, torch.diag(variance), 0 * mean, eye), eps_score=float(squared.max()) ** 0.5,
    )  # fmt: skip
    benton = bound_benton(d=d, T=T, steps=N, kappa=step_ratio(u), eps_score_squared=float((h * squared).sum()))
    lu = bound_chen_lee_lu(
        d=d, T=2 * T, steps=N, L=max(L, 1.0), second_moment=moment, eps_score_squared=float(squared.mean())
    )
    uneven = () if even else ("even steps",)
    normal = bool((mean.abs() < 1e-12).all()) and bool(((variance - 1).abs() < 1e-12).all())
    return [
        _with(chen, (*chen.violated, *uneven)),
        _with(benton, () if normal else ("mean 0, covariance I",)),
        _with(lu, uneven),
    ]


def _with(bound: Bound, violated: tuple[str, ...]) -> Bound:
    return Bound(bound.theorem, bound.metric, bound.terms, bound.formula, bound.checked, violated)
