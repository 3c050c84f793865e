"""Data distributions whose diffusion is known in closed form: what samplers and score models are measured against.

A noising process is x = alpha data + sigma noise with noise ~ N(0, I): variance preserving, variance exploding (alpha =
1) and flow matching (alpha = t, sigma = 1 - t) alike. For Gaussian data and for mixtures of Gaussians every quantity
that a network would have to learn is then elementary:

    marginal     x ~ sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I)
    score        grad log p(x) = -sum_k r_k(x) (alpha^2 C_k + sigma^2 I)^-1 (x - alpha m_k),  r_k: responsibilities
    denoiser     E[data | x]  = sum_k r_k(x) (m_k + alpha C_k (alpha^2 C_k + sigma^2 I)^-1 (x - alpha m_k))
    noise        E[noise | x] = -sigma grad log p(x)

(Karras et al. 2022, arXiv:2206.00364, appendix B.3, for the denoiser and its relation to the score.) All of it is
computed in float64 and rounded once, to the type of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.analysis._oracle import Level, Oracle, Schedule, check_x, column, fail

__all__ = ["GaussianOracle", "MixtureOracle", "Oracle", "Schedule"]

_WIDE = torch.float64


class GaussianOracle(Oracle):
    """Data ~ N(mean, C), with C = diag(std^2) or any covariance.

    Args:
        mean: the mean, any shape; it is the shape of a sample. A number makes every element of x independent and
            alike, whatever x's shape.
        cov: [D, D], symmetric, no negative eigenvalue, D the number of elements of `mean`; or None.
        std: number or a tensor that broadcasts with `mean`, >= 0; this or `cov`.

    Raises:
        ValueError: both or none of `cov` and `std`, a shape that does not fit, or no covariance.
    """

    def __init__(self, mean: float | Tensor, cov: Tensor | None = None, *, std: float | Tensor | None = None) -> None:
        if (cov is None) == (std is None):
            fail(self, "cov", "exactly one of cov and std", "none" if cov is None else "both")
        center = torch.as_tensor(mean, dtype=_WIDE).cpu()
        self._basis: Tensor | None = None  # columns: eigenvectors of cov
        if cov is None:
            spread = torch.as_tensor(std, dtype=_WIDE).cpu()
            if not bool((spread >= 0).all()):
                fail(self, "std", "numbers >= 0", spread.min().item())
            try:
                center, spread = torch.broadcast_tensors(center, spread)
            except RuntimeError:
                fail(self, "std", f"a shape that broadcasts with mean's, {tuple(center.shape)}", tuple(spread.shape))
            variance = spread.square()
        else:
            cov = torch.as_tensor(cov, dtype=_WIDE).cpu()
            size = center.numel()
            if cov.shape != (size, size):
                fail(self, "cov", f"shape ({size}, {size}), from mean", tuple(cov.shape))
            if not torch.allclose(cov, cov.T, rtol=1e-9, atol=1e-12):
                fail(self, "cov", "a symmetric matrix", "one that is not")
            values, self._basis = torch.linalg.eigh(0.5 * (cov + cov.T))
            if values[0] < -1e-10 * max(1.0, float(values[-1])):
                fail(self, "cov", "no negative eigenvalue", values[0].item())
            variance = values.clamp(min=0.0)
        self.mean = center  # [*shape]
        self._variance = variance  # [*shape], or the D eigenvalues of cov
        self.shape = tuple(center.shape)

    @property
    def spectrum(self) -> Tensor:
        """Eigenvalues of the covariance, [D] float64."""
        return self._variance.flatten().clone()

    @property
    def cov(self) -> Tensor:
        """The covariance, [D, D] float64."""
        return self.moments()[1]

    def components(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [D] of the coordinates along the eigenvectors of the covariance; they are independent."""
        mean = self.mean.flatten()
        return (mean if self._basis is None else self._basis.T @ mean), self._variance.flatten().clone()

    def denoise(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        def gain(var: Tensor, a: Tensor, s: Tensor) -> Tensor:
            total = a * a * var + s * s
            return a * var / torch.where(total > 0, total, 1.0)  # no spread and no noise: the data are the mean

        return (self._filter(x, alpha, sigma, gain) + self.mean.to(x.device)).to(x.dtype)

    def noise(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        return self._filter(x, alpha, sigma, lambda var, a, s: s / (a * a * var + s * s)).to(x.dtype)

    def score(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        return self._filter(x, alpha, sigma, lambda var, a, s: -1.0 / (a * a * var + s * s)).to(x.dtype)

    def log_prob(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        a, s, y = self._project(x, alpha, sigma)
        total = (a * a * self._spread(y) + s * s).expand_as(y)
        terms = y.square() / total + total.log() + math.log(2 * math.pi)
        return -0.5 * terms.flatten(1).sum(1) if terms.dim() > 1 else -0.5 * terms

    def moments(self, alpha: float = 1.0, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
        variance = alpha**2 * self._variance.flatten() + sigma**2
        basis = torch.eye(len(variance), dtype=_WIDE) if self._basis is None else self._basis
        return alpha * self.mean, (basis * variance) @ basis.T

    def path(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The probability-flow path, exact for every schedule.

        In each eigendirection of C, with variance c, the marginal variance is alpha^2 c + sigma^2, and the flow keeps
        (x - alpha m) / sqrt(alpha^2 c + sigma^2) constant.

        Args:
            x: [B, ...] at the levels `start`.
            start, end: (alpha, sigma).

        Returns:
            [B, ...] at the levels `end`, dtype of x.
        """
        (a0, s0), (a1, s1) = start, end

        def gain(var: Tensor, a: Tensor, s: Tensor) -> Tensor:
            return ((a1 * a1 * var + s1 * s1) / (a * a * var + s * s)).sqrt()

        return (a1 * self.mean.to(x.device) + self._filter(x, a0, s0, gain)).to(x.dtype)

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        z = torch.randn((n, *(self.shape if shape is None else shape)), generator=generator, dtype=_WIDE)
        self._check(z)
        y = (
            z * self._spread(z).sqrt()
            if self._basis is None
            else z.reshape(n, len(self._variance)) * self._variance.sqrt()
        )
        return self.mean + self._rotate_back(y, z)

    # --------------------------------------------------------------------------------------------------- internals

    def _filter(
        self, x: Tensor, alpha: Level, sigma: Level, gain: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """gain(C) (x - alpha m), the gain applied to each eigenvalue; float64, shape of x."""
        a, s, y = self._project(x, alpha, sigma)
        return self._rotate_back(gain(self._spread(y), a, s) * y, x)

    def _project(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and x - alpha m in the basis in which C is diagonal: [B, *shape], or [B, D] with a basis."""
        self._check(x)
        a, s = column(alpha, x), column(sigma, x)
        y = x.to(_WIDE) - a * self.mean.to(x.device)
        if self._basis is not None:
            y = y.reshape(len(x), len(self._variance)) @ self._basis.to(x.device)
            a, s = (level.reshape(-1, 1) if level.dim() else level for level in (a, s))
        return a, s, y

    def _rotate_back(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self._basis is None else (y @ self._basis.T.to(y.device)).reshape(x.shape)

    def _spread(self, y: Tensor) -> Tensor:
        return self._variance.to(y.device)

    def _check(self, x: Tensor) -> None:
        check_x(self, x, self.shape, exact=self._basis is not None)


class MixtureOracle(Oracle):
    """Data ~ sum_k w_k N(m_k, diag(s_k^2)).

    With ``cond`` [B] (int64), sample b is conditioned on component ``cond[b]``; so classifier-free guidance has an
    exact conditional and unconditional model.

    Args:
        weights: [K], >= 0; normalised here.
        means: [K, *shape].
        stds: [K], or a tensor that broadcasts with `means`; >= 0.

    Raises:
        ValueError: a shape or range does not fit.
    """

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        w, m, s = (torch.as_tensor(value, dtype=_WIDE).cpu() for value in (weights, means, stds))
        if w.dim() != 1 or not len(w) or not bool((w >= 0).all()) or not 0 < float(w.sum()) < math.inf:
            got = w.tolist() if w.dim() == 1 and len(w) else f"shape {tuple(w.shape)}"
            fail(self, "weights", "shape [K], numbers >= 0 with a positive, finite sum", got)
        if m.dim() < 1 or len(m) != len(w):
            fail(self, "means", f"shape [{len(w)}, ...], one per weight", tuple(m.shape))
        if s.dim() == 1 and len(s) == len(w):
            s = s.reshape(-1, *[1] * (m.dim() - 1))
        if not bool((s >= 0).all()):
            fail(self, "stds", "numbers >= 0", s.min().item())
        try:
            s = s.expand_as(m)
        except RuntimeError:
            fail(self, "stds", f"shape [{len(w)}] or one that broadcasts to means', {tuple(m.shape)}", tuple(s.shape))
        self.weights, self.means, self.stds = w / w.sum(), m, s
        self.shape = tuple(m.shape[1:])

    def denoise(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        a, _, y, total, mix = self._parts(x, alpha, sigma, cond)
        mean, var = self._aligned(self.means, x), self._aligned(self.stds, x).square()
        return (mix * (mean + a * var / total * y)).sum(1).to(x.dtype)

    def noise(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        _, s, y, total, mix = self._parts(x, alpha, sigma, cond)
        return (mix * (s / total * y)).sum(1).to(x.dtype)

    def score(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        _, _, y, total, mix = self._parts(x, alpha, sigma, cond)
        return -(mix * (y / total)).sum(1).to(x.dtype)

    def log_prob(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        return torch.logsumexp(self._log_joint(x, alpha, sigma)[3], 1)

    def moments(self, alpha: float = 1.0, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
        flat, var = (value.reshape(len(self.weights), -1) for value in (self.means, self.stds.square()))
        mean = self.weights @ flat
        centered = flat - mean
        cov = (self.weights[:, None] * centered).T @ centered + torch.diag(self.weights @ var)
        eye = torch.eye(len(cov), dtype=_WIDE)
        return alpha * mean.reshape(self.shape), alpha**2 * cov + sigma**2 * eye

    def path(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The probability-flow path of one-dimensional data.

        In one dimension paths cannot cross, so the flow keeps F(x), the distribution function, constant: the result is
        the quantile at the levels `end`, found by bisection in float64 (from the tail on the side of x and with
        logarithms, so that small probabilities are not rounded away).

        Args:
            x: [B] or [B, 1], at the levels `start`.
            start, end: (alpha, sigma), with a positive spread of every component.

        Returns:
            shape of x, dtype of x.

        Raises:
            ValueError: data of more than one dimension: no closed form is known.
        """
        if math.prod(self.shape) != 1 or x.numel() != len(x):
            fail(self, "x", "one-dimensional data (no closed form otherwise)", tuple(x.shape))
        y = x.to(_WIDE).flatten()
        upper = y > self._quantile(torch.full((1,), math.log(0.5), dtype=_WIDE, device=x.device), start, upper=False)
        low = self._quantile(self._tail(y, start, upper=False), end, upper=False)
        high = self._quantile(self._tail(y, start, upper=True), end, upper=True)
        return torch.where(upper, high, low).reshape(x.shape).to(x.dtype)

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        z = torch.randn((n, *(self.shape if shape is None else shape)), generator=generator, dtype=_WIDE)
        check_x(self, z, self.shape, exact=False)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator) if n else torch.zeros(0).long()
        mean, std = (self._aligned(value, z).expand(1, -1, *z.shape[1:])[0][k] for value in (self.means, self.stds))
        return mean + std * z

    # --------------------------------------------------------------------------------------------------- internals

    def _aligned(self, value: Tensor, x: Tensor) -> Tensor:
        """[K, *shape] as [1, K, 1.., *shape], which broadcasts with x[:, None]."""
        return value.to(x.device).reshape(1, len(value), *[1] * (x.dim() - 1 - len(self.shape)), *self.shape)

    def _log_joint(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, x - alpha m_k [B,K,...], log (w_k N(x; k)) [B,K], alpha^2 s_k^2 + sigma^2."""
        check_x(self, x, self.shape, exact=False)
        a, s = (level.unsqueeze(1) if level.dim() else level for level in (column(alpha, x), column(sigma, x)))
        y = x.to(_WIDE).unsqueeze(1) - a * self._aligned(self.means, x)
        total = a * a * self._aligned(self.stds, x).square() + s * s
        terms = y.square() / total + (total.log() + math.log(2 * math.pi))
        log_joint = self.weights.to(x.device).log() - 0.5 * (terms.flatten(2).sum(2) if terms.dim() > 2 else terms)
        return a, s, y, log_joint, total

    def _parts(
        self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, x - alpha m_k, alpha^2 s_k^2 + sigma^2, and responsibilities [B,K,1,...]."""
        a, s, y, log_joint, total = self._log_joint(x, alpha, sigma)
        if cond is None:
            mix = torch.softmax(log_joint, 1)
        elif cond.shape != x.shape[:1] or cond.dtype != torch.int64:
            fail(self, "cond", f"int64 of shape ({len(x)},)", f"{cond.dtype} of shape {tuple(cond.shape)}")
        else:
            if cond.device.type == "cpu" and not bool(((cond >= 0) & (cond < len(self.weights))).all()):
                fail(self, "cond", f"components 0 to {len(self.weights) - 1}", cond.tolist())
            mix = torch.nn.functional.one_hot(cond.to(x.device), len(self.weights)).to(_WIDE)
        return a, s, y, total, mix.reshape(*mix.shape, *[1] * (x.dim() - 1))

    def _tail(self, y: Tensor, levels: tuple[float, float], *, upper: bool) -> Tensor:
        """log P(X <= y), or log P(X > y) for `upper`: [n]."""
        (alpha, sigma), sign = levels, -1.0 if upper else 1.0
        m, s = self.means.to(y.device).reshape(1, -1), self.stds.to(y.device).reshape(1, -1)
        z = sign * (y[:, None] - alpha * m) / (alpha**2 * s.square() + sigma**2).sqrt()
        return torch.logsumexp(self.weights.to(y.device).log() + torch.special.log_ndtr(z), 1)

    def _quantile(self, log_p: Tensor, levels: tuple[float, float], *, upper: bool) -> Tensor:
        (alpha, sigma), width = levels, 40.0
        spread = (alpha**2 * self.stds.square() + sigma**2).sqrt()
        low = torch.full_like(log_p, float((alpha * self.means - width * spread).min()))
        high = torch.full_like(log_p, float((alpha * self.means + width * spread).max()))
        for _ in range(110):  # more halvings than float64 has bits and exponents of use here
            middle = 0.5 * (low + high)
            below = (self._tail(middle, levels, upper=upper) < log_p) != upper
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)
