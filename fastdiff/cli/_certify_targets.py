"""What the certificate samples from: distributions on a line whose probability-flow paths are known exactly.

In one dimension the flow keeps the order of points, so a point stays at its quantile: with F_t the distribution
function of alpha_t x0 + sigma_t e, the exact path through x is F_t^-1(F_s(x)), for a mixture of Gaussians as well as
for a Gaussian, where it is the familiar m alpha_t + (x - m alpha_s) times the ratio of the deviations. A state [1, P]
holds P such points, each with a target of its own, so one run measures all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALL", "GAUSSIANS", "Oracle", "Target"]

_QUANTILES = (-1.8, -0.9, -0.2, 0.4, 1.1, 2.0)  # of a standard normal


@dataclass(frozen=True)
class Target:
    """A mixture of Gaussians on a line: weights, means and standard deviations of its components."""

    name: str
    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]


GAUSSIANS = (
    Target("gaussian s=0.25", (1.0,), (0.6,), (0.25,)),
    Target("gaussian s=0.5", (1.0,), (-0.4,), (0.5,)),
    Target("gaussian s=2", (1.0,), (0.3,), (2.0,)),
)
_MIXTURES = (
    Target("mixture of 2", (0.5, 0.5), (-0.8, 0.8), (0.6, 0.6)),
    Target("mixture of 3", (0.3, 0.45, 0.25), (-1.2, 0.1, 1.3), (0.6, 0.5, 0.7)),
)
ALL = (*GAUSSIANS, *_MIXTURES)


class Oracle:
    """Exact predictions and paths of some targets, in float64, for states [B, P] on any device.

    Attributes:
        points: P, six quantiles of every target.
        groups: the target of every point.
    """

    def __init__(self, targets: tuple[Target, ...]) -> None:
        most = max(len(target.weights) for target in targets)
        self.groups = [target.name for target in targets for _ in _QUANTILES]
        self.points = len(self.groups)
        columns = [
            [*values, *[pad] * (most - len(values))]
            for target in targets
            for _ in _QUANTILES
            for values, pad in ((target.weights, 0.0), (target.means, 0.0), (target.deviations, 1.0))
        ]
        table = torch.tensor(columns, dtype=torch.float64).reshape(self.points, 3, most).permute(1, 2, 0)
        self._weights, self._means, deviations = table.unsqueeze(-2)  # each [K, 1, P]
        self._variances = deviations.square()
        self._probability = torch.special.ndtr(torch.tensor(_QUANTILES, dtype=torch.float64).repeat(len(targets)))
        self._remembered: dict[tuple[float, float, torch.device], tuple[Tensor, ...]] = {}
        self._exact: dict[tuple[float, float], Tensor] = {}

    def state(self, alpha: float, sigma: float) -> Tensor:
        """[1, P] float64: where the points are when the data is scaled by `alpha` and has noise of size `sigma`."""
        key = (alpha, sigma)
        if key not in self._exact:
            centres, scales = alpha * self._means, (alpha**2 * self._variances + sigma**2).sqrt()
            low, high = (centres - 9 * scales).amin(0), (centres + 9 * scales).amax(0)
            for _ in range(70):  # halves an interval; the density is bounded below at these quantiles
                middle = (low + high) / 2
                below = (self._weights * torch.special.ndtr((middle - centres) / scales)).sum(0) < self._probability
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            middle = (low + high) / 2
            for _ in range(2):  # Newton, to the last digits
                z = (middle - centres) / scales
                density = (self._weights * torch.exp(-z.square() / 2) / scales).sum(0) * 0.3989422804014327
                middle = middle - ((self._weights * torch.special.ndtr(z)).sum(0) - self._probability) / density
            self._exact[key] = middle
        return self._exact[key]

    def data(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The mean of the data given x [B, P] at this level: what a perfect network predicts."""
        key = (alpha, sigma, x.device)
        if key not in self._remembered:
            variances = alpha**2 * self._variances + sigma**2
            centre = alpha * self._means
            slope = alpha * self._variances / variances
            quadratic, linear = -0.5 / variances, centre / variances
            constant = self._weights.log() - 0.5 * (variances.log() + centre.square() / variances)
            found = (slope, self._means - slope * centre, quadratic, linear, constant)
            self._remembered[key] = tuple(t.to(x.device) for t in found)
        slope, offset, quadratic, linear, constant = self._remembered[key]
        means = torch.addcmul(offset, slope, x)
        if len(slope) == 1:
            return means[0]
        logits = torch.addcmul(constant, torch.addcmul(linear, quadratic, x), x)
        return (torch.softmax(logits, 0) * means).sum(0)

    def predict(self, x: Tensor, alpha: float, sigma: float, prediction: str) -> Tensor:
        """The output of a perfect network: ``"epsilon"``, ``"v"``, ``"sample"`` or ``"flow"`` (data minus noise)."""
        data = self.data(x, alpha, sigma)
        if prediction == "sample":
            return data
        # At the data itself the noise that is left has a mean of zero: sigma times the score, with its sign turned.
        noise = torch.sub(x, data, alpha=alpha) / sigma if sigma else torch.zeros_like(x)
        if prediction == "epsilon":
            return noise
        return torch.sub(data, noise) if prediction == "flow" else alpha * noise - sigma * data
