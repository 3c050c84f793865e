"""What every oracle can do, and how its arguments are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from fastdiff.ops.update import PREDICTIONS

__all__ = ["Level", "Oracle", "Schedule", "check_x", "column", "fail", "levels"]

Level = float | Tensor  # alpha or sigma: one number, or one per sample [B]
_WIDE = torch.float64


class Schedule(Protocol):
    """x_t = alpha(t) data + sigma(t) noise; t and the results are float64 tensors of one shape."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...


class Oracle(ABC):
    """A distribution with exact score, denoiser and predictions under any x = alpha data + sigma noise.

    x has shape [B, *shape] (or any [B, ...] that the parameters broadcast to); `alpha` and `sigma` are floats or
    tensors [B]. Every result has the shape, dtype and device of x unless stated otherwise.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def denoise(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        """E[data | x]."""

    @abstractmethod
    def noise(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        """E[noise | x] = -sigma score."""

    @abstractmethod
    def score(self, x: Tensor, alpha: Level, sigma: Level, cond: Tensor | None = None) -> Tensor:
        """grad_x log p(x) of the marginal. Not finite where the marginal has no density (sigma = 0, no spread)."""

    @abstractmethod
    def log_prob(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """log p(x) of the marginal, in nats: [B] float64."""

    @abstractmethod
    def moments(self, alpha: float = 1.0, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean [*shape] and covariance [D, D] of the marginal, D the number of elements of `shape`; float64."""

    @abstractmethod
    def path(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """Where the probability-flow ODE takes x from the levels `start` = (alpha, sigma) to the levels `end`."""

    @abstractmethod
    def sample(
        self, n: int, generator: torch.Generator | None = None, *, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """n samples of the data, [n, *shape] float64 on the CPU; `shape`: one the parameters broadcast to."""

    def predict(
        self, x: Tensor, alpha: Level, sigma: Level, prediction: str = "epsilon", cond: Tensor | None = None
    ) -> Tensor:
        """What a perfectly trained network returns, in the conventions of `fastdiff.ops.ddim_step`.

        Args:
            x: [B, ...].
            alpha, sigma: levels of x, float or [B].
            prediction: ``"epsilon"`` E[noise | x]; ``"sample"`` E[data | x]; ``"v"`` alpha E[noise | x] - sigma
                E[data | x]; ``"flow"`` E[data - noise | x], the velocity of x_t = t data + (1 - t) noise.
            cond: [B] component of each sample (`MixtureOracle` only), or None.

        Raises:
            ValueError: unknown prediction, or shapes that do not fit.
        """
        if prediction not in PREDICTIONS:
            fail(self, "prediction", f"one of {tuple(PREDICTIONS)}", repr(prediction))
        if prediction == "epsilon":
            return self.noise(x, alpha, sigma, cond)
        if prediction == "sample":
            return self.denoise(x, alpha, sigma, cond)
        wide = x.to(_WIDE)
        data, noise = self.denoise(wide, alpha, sigma, cond), self.noise(wide, alpha, sigma, cond)
        if prediction == "flow":
            return (data - noise).to(x.dtype)
        a, s = (column(level, x) for level in (alpha, sigma))
        return (a * noise - s * data).to(x.dtype)

    def model(self, schedule: Schedule, prediction: str = "epsilon") -> Callable[..., Tensor]:
        """A perfectly trained network for a schedule: ``model(x, t, cond=None) -> prediction``, t float [B] or []."""
        if prediction not in PREDICTIONS:
            fail(self, "prediction", f"one of {tuple(PREDICTIONS)}", repr(prediction))

        def perfect(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            alpha, sigma = levels(schedule, t)
            return self.predict(x, alpha, sigma, prediction, cond)

        return perfect

    def score_model(self, schedule: Schedule) -> Callable[..., Tensor]:
        """The exact score for a schedule: ``score(x, t, cond=None)``, t float [B] or []."""

        def exact(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            alpha, sigma = levels(schedule, t)
            return self.score(x, alpha, sigma, cond)

        return exact

    def diffuse(self, n: int, alpha: float, sigma: float, generator: torch.Generator | None = None) -> Tensor:
        """n samples of the marginal alpha data + sigma noise: [n, *shape] float64 on the CPU."""
        data = self.sample(n, generator)
        return alpha * data + sigma * torch.randn(data.shape, generator=generator, dtype=_WIDE)


def levels(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    wide = t.to(_WIDE)
    return schedule.alpha(wide), schedule.sigma(wide)


def column(level: Level, x: Tensor) -> Tensor:
    """A level as float64 that broadcasts against x: [] or [B, 1, ..., 1]."""
    value = torch.as_tensor(level, dtype=_WIDE, device=x.device)
    if value.numel() == 1:
        return value.reshape(())
    if value.shape != x.shape[:1]:
        raise ValueError(f"[oracle] alpha, sigma: expected numbers or shape ({len(x)},), got {tuple(value.shape)}")
    return value.reshape(-1, *[1] * (x.dim() - 1))


def check_x(owner: object, x: Tensor, shape: tuple[int, ...], exact: bool) -> None:
    if x.dim() >= 1 and x.is_floating_point():
        inner = tuple(x.shape[1:])
        if inner == shape:
            return
        if not exact and len(inner) >= len(shape):
            tail = inner[len(inner) - len(shape) :]
            if all(have in (1, want) for have, want in zip(shape, tail, strict=True)):
                return
    fail(owner, "x", f"floating point of shape [B, {', '.join(map(str, shape))}]", f"{x.dtype} {tuple(x.shape)}")


def fail(owner: object, argument: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"[{type(owner).__name__}] {argument}: expected {expected}, got {got}")
