"""Guidance: how several predictions become one.

Plain guidance, ``other + scale (pred - other)``, is linear and costs nothing besides the second evaluation: its factors
go into the coefficients of the step. The forms that are not (rescaling, regions, more than two conditions) take passes
of their own. Pass one as ``sample(..., guidance=...)``; ``guidance_scale=`` and ``uncond=`` are a :class:`CFG`.

Noise levels are sigma / alpha, which is sigma in EDM's terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops

__all__ = ["CFG", "AutoGuidance", "Composed", "Guidance", "Regions"]

Model = Callable[[Tensor, Tensor, Any], Tensor]
Interval = tuple[float, float]
EVERYWHERE: Interval = (0.0, math.inf)


class Guidance:
    """What `sample` asks of a form of guidance."""

    def scale(self, level: float) -> float | None:
        """The factor of plain guidance at a noise level; 1: the other prediction is not needed; None: not plain."""
        return None

    def pair(self, model: Model, x: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """(pred, other) of plain guidance."""
        raise NotImplementedError

    def predict(self, model: Model, x: Tensor, t: Tensor, cond: Any, level: float) -> Tensor:
        """The guided prediction, for forms that are not plain."""
        raise NotImplementedError


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance: Ho & Salimans 2022 (arXiv:2207.12598).

    Attributes:
        guidance_scale: 1 is the conditional prediction, 0 the unconditional one.
        uncond: what the model is given in place of the condition: None (the library's models know it as no condition)
            or a negative condition shaped like the condition.
        interval: noise levels (low, high] at which to guide, elsewhere the scale is 1 (Kynkäänniemi et al. 2024,
            arXiv:2404.07724).
        rescale: in [0, 1], how far to bring the standard deviation of a guided sample back to that of the conditional
            prediction (Lin et al. 2024, arXiv:2305.08891, eq. 14-16); 0.7 in the paper.
        batched: ask for both predictions in one call where condition and `uncond` are tensors alike, with a row for
            every sample; otherwise always in two.
    """

    guidance_scale: float = 4.0
    uncond: Any = None
    interval: Interval = EVERYWHERE
    rescale: float = 0.0
    batched: bool = True

    def __post_init__(self) -> None:
        _check_scale("CFG", "guidance_scale", self.guidance_scale)
        _check_interval("CFG", self.interval)
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"[CFG] rescale: expected a number in [0, 1], got {self.rescale!r}")

    def scale(self, level: float) -> float | None:
        if not self.interval[0] < level <= self.interval[1]:
            return 1.0
        return self.guidance_scale if self.rescale == 0.0 or self.guidance_scale == 1.0 else None

    def pair(self, model: Model, x: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        if cond is None:
            raise ValueError(f"[sample] cond: expected one with guidance_scale={self.guidance_scale}, got None")
        if self.batched and _stackable(cond, self.uncond, len(x)):
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, self.uncond]))
            pred, other = both.chunk(2)
            return pred, other
        pred, other = _apart(x, model(x, t, cond), model(x, t, self.uncond))
        return pred, other

    def predict(self, model: Model, x: Tensor, t: Tensor, cond: Any, level: float) -> Tensor:
        if len(x) and x[0].numel() < 2:
            raise ValueError(f"[CFG] rescale: expected samples of at least two numbers, got a state {[*x.shape]}")
        pred, other = (_channels(p, x) for p in self.pair(model, x, t, cond))
        guided = ops.linear_update((self.guidance_scale, 1 - self.guidance_scale), (pred, other))
        over = tuple(range(1, x.dim()))
        wide = torch.promote_types(x.dtype, torch.float32)
        deviation = guided.to(wide).std(over).clamp(min=torch.finfo(wide).tiny)
        factor = self.rescale * pred.to(wide).std(over) / deviation + (1 - self.rescale)
        return ops.linear_update((factor,), (guided,))


@dataclass(frozen=True)
class AutoGuidance(Guidance):
    """Guidance away from a weaker model: Karras et al. 2024 (arXiv:2406.02507).

    Attributes:
        weak: ``weak(x, t, cond) -> prediction``, of the same type as the model's.
        guidance_scale: 1 is the model alone.
        interval: noise levels (low, high] at which to guide.
        conditional: the weak model is given the condition; otherwise None.
    """

    weak: Model
    guidance_scale: float = 2.0
    interval: Interval = EVERYWHERE
    conditional: bool = True

    def __post_init__(self) -> None:
        _check_scale("AutoGuidance", "guidance_scale", self.guidance_scale)
        _check_interval("AutoGuidance", self.interval)

    def scale(self, level: float) -> float | None:
        return self.guidance_scale if self.interval[0] < level <= self.interval[1] else 1.0

    def pair(self, model: Model, x: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        pred, other = _apart(x, model(x, t, cond), self.weak(x, t, cond if self.conditional else None))
        return pred, other


@dataclass(frozen=True)
class Composed(Guidance):
    """AND and NOT of conditions: other + sum_i w_i (pred_i - other) (Liu et al. 2022, arXiv:2206.01714, eq. 11 and 13).

    Attributes:
        conds: the conditions, each as the model takes it. `sample`'s own condition is not used.
        weights: one a condition; below 0 for NOT.
        uncond: as in :class:`CFG`.
    """

    conds: Sequence[Any]
    weights: Sequence[float]
    uncond: Any = None

    def __post_init__(self) -> None:
        _check_count("Composed", "weights", self.weights, self.conds)
        for weight in self.weights:
            _check_scale("Composed", "weights", weight)

    def predict(self, model: Model, x: Tensor, t: Tensor, cond: Any, level: float) -> Tensor:
        predictions = [_channels(p, x) for p in _ask(model, x, t, [*self.conds, self.uncond])]
        return ops.linear_update([*self.weights, 1 - math.fsum(self.weights)], predictions)


@dataclass(frozen=True)
class Regions(Guidance):
    """A condition for every region: sum_k mask_k pred_k / sum_k mask_k, each guided (Bar-Tal et al. 2023,
    arXiv:2302.08113, eq. 5, with weights).

    Attributes:
        conds: one condition a region; regions and the unconditional prediction go through the model as one batch where
            all of them are tensors.
        masks: [K, H, W] weights >= 0, on the device of the images; where all are 0, the prediction is the first
            region's, so that the background belongs there with a mask of ones or a small number.
        guidance_scale: as in :class:`CFG`.
        uncond: likewise.
    """

    conds: Sequence[Any]
    masks: Tensor
    guidance_scale: float = 4.0
    uncond: Any = None

    def __post_init__(self) -> None:
        _check_count("Regions", "masks", self.masks, self.conds)
        _check_scale("Regions", "guidance_scale", self.guidance_scale)

    def predict(self, model: Model, x: Tensor, t: Tensor, cond: Any, level: float) -> Tensor:
        if self.masks.dim() != 3 or self.masks.shape[1:] != x.shape[-2:]:
            raise ValueError(
                f"[Regions] masks: expected shape [K,{x.shape[-2]},{x.shape[-1]}], got {[*self.masks.shape]}"
            )
        conds = [*self.conds, self.uncond] if self.guidance_scale != 1.0 else list(self.conds)
        predictions = [_channels(p, x) for p in _ask(model, x, t, conds)]
        total = self.masks.sum(0)
        shares = torch.where(total > 0, self.masks / total, 0.0)
        shares = torch.cat([shares[:1] + (total == 0), shares[1:]]).to(x.dtype)
        blended = torch.zeros_like(predictions[0])
        for share, prediction in zip(shares, predictions, strict=False):
            blended += share * prediction
        if self.guidance_scale == 1.0:
            return blended
        return ops.linear_update((self.guidance_scale, 1 - self.guidance_scale), (blended, predictions[-1]))


def _ask(model: Model, x: Tensor, t: Tensor, conds: list[Any]) -> list[Tensor]:
    """The model under every condition: in one batch if the conditions can be stacked."""
    if all(_stackable(conds[0], c, len(x)) for c in conds):
        n = len(conds)
        return list(model(torch.cat([x] * n), torch.cat([t] * n), torch.cat(conds)).chunk(n))
    return [*_apart(x, *(model(x, t, c) for c in conds))]


def _apart(x: Tensor, *predictions: Tensor) -> tuple[Tensor, ...]:
    """These predictions, if none of them was overwritten by the next; the model may give back its input every time."""
    addresses = [p.data_ptr() for p in predictions if isinstance(p, Tensor) and p.numel()]
    own = [address for address in addresses if address != x.data_ptr()]
    if len(set(own)) < len(own):
        raise ValueError(
            "[sample] model: expected a prediction in memory of its own at every call, got one buffer for two "
            "predictions of one guidance (clone the output of a model that reuses its buffers)"
        )
    return predictions


def _stackable(a: Any, b: Any, batch: int) -> bool:
    """Two tensors alike, with a row for every sample; others cannot be told apart in one batch."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and a.shape[:1] == (batch,)


def _channels(prediction: Tensor, x: Tensor) -> Tensor:
    """The prediction of a model that also predicts variances, in as many channels again."""
    if not isinstance(prediction, Tensor):
        raise ValueError(f"[sample] model: expected a prediction that is a tensor, got {type(prediction).__name__}")
    if prediction.dim() > 1 and prediction.shape[1] == 2 * x.shape[1] and prediction.shape[2:] == x.shape[2:]:
        prediction = prediction[:, : x.shape[1]]
    if prediction.shape != x.shape:
        raise ValueError(f"[sample] model: expected a prediction of shape {[*x.shape]}, got {[*prediction.shape]}")
    return prediction


def _check_scale(name: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"[{name}] {argument}: expected a finite number, got {value!r}")


def _check_interval(name: str, interval: Interval) -> None:
    if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1]:
        raise ValueError(f"[{name}] interval: expected (low, high) with 0 <= low <= high, got {interval!r}")


def _check_count(name: str, argument: str, values: Any, conds: Sequence[Any]) -> None:
    if not conds or len(values) != len(conds):
        raise ValueError(f"[{name}] {argument}: expected one for each of {len(conds)} conditions, got {len(values)}")
