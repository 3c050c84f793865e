"""Distances between normal distributions, in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["diagonal_kl", "diagonal_w2", "gaussian_kl", "gaussian_w2", "gaussian_w2_squared"]


def gaussian_w2_squared(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Squared 2-Wasserstein distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C2^1/2 C1 C2^1/2)^1/2) (Gelbrich 1990).

    Args:
        mean_1, mean_2: [D].
        cov_1, cov_2: [D, D], symmetric, no negative eigenvalue.

    Raises:
        ValueError: shapes that do not fit.
    """
    m1, c1, m2, c2 = _checked("gaussian_w2_squared", mean_1, cov_1, mean_2, cov_2)
    root = _root(c2)
    cross = torch.linalg.eigvalsh(root @ c1 @ root).clamp(min=0).sqrt().sum()
    return max(float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross), 0.0)


def gaussian_w2(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """2-Wasserstein distance (not squared); arguments as for `gaussian_w2_squared`."""
    return float(gaussian_w2_squared(mean_1, cov_1, mean_2, cov_2) ** 0.5)


def gaussian_kl(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """KL(N(m1, C1) || N(m2, C2)) in nats; infinite where C2 or C1 is singular. Arguments as above."""
    m1, c1, m2, c2 = _checked("gaussian_kl", mean_1, cov_1, mean_2, cov_2)
    root, info = torch.linalg.cholesky_ex(c2)
    if int(info):
        return float("inf")
    inner = torch.linalg.solve_triangular(root, c1, upper=False)
    inner = torch.linalg.solve_triangular(root, inner.T, upper=False)
    ratio = torch.linalg.eigvalsh(0.5 * (inner + inner.T))
    if float(ratio[0]) <= 0:
        return float("inf")
    shift = torch.linalg.solve_triangular(root, (m1 - m2)[:, None], upper=False)
    return 0.5 * float((ratio - 1 - torch.log1p(ratio - 1)).sum() + shift.square().sum())


Moments = tuple[np.ndarray, np.ndarray]  # means and variances [D] of independent coordinates


def diagonal_w2(p: Moments, q: Moments) -> float:
    """2-Wasserstein distance (not squared) of normal distributions with independent coordinates."""
    return float(np.sqrt(np.sum((p[0] - q[0]) ** 2) + np.sum((np.sqrt(p[1]) - np.sqrt(q[1])) ** 2)))


def diagonal_kl(p: Moments, q: Moments) -> float:
    """KL(p || q) in nats of normal distributions with independent coordinates; infinite if one has no spread."""
    if bool(np.all(p[1] == q[1])) and bool(np.all(p[0] == q[0])):
        return 0.0
    if bool(np.any(p[1] <= 0)) or bool(np.any(q[1] <= 0)):
        return float("inf")
    excess = (p[1] - q[1]) / q[1]
    return 0.5 * float(np.sum(excess - np.log1p(excess) + (p[0] - q[0]) ** 2 / q[1]))


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _checked(name: str, *values: Tensor) -> list[Tensor]:
    m1, c1, m2, c2 = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in values)
    m1, m2 = m1.flatten(), m2.flatten()
    size = len(m1)
    for argument, value, shape in (("cov_1", c1, (size, size)), ("mean_2", m2, (size,)), ("cov_2", c2, (size, size))):
        if tuple(value.shape) != shape:
            raise ValueError(f"[{name}] {argument}: expected shape {shape}, from mean_1, got {tuple(value.shape)}")
    return [m1, c1, m2, c2]
