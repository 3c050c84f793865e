"""A whole sampling run as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.samplers.plan import Plan
from fastdiff.samplers.sample import sample

__all__ = ["GraphedRun"]


class GraphedRun:
    """Records ``sample(model, noise, plan=plan, ...)`` once and replays it without any work of the host.

    Every evaluation of the model and every step is in the graph, with the coefficients as constants; noise that the
    solver draws is fresh at every replay, whose seed comes from torch's default generator of the device.

    Args:
        model: as in :func:`sample`; capturable: static shapes, no reading back.
        noise: [B, ...] on a CUDA device; fixes shape and dtype of later calls.
        plan: from :func:`make_plan`.
        cond: a tensor or None; a tensor fixes shape and dtype of later conditions.
        **options: of :func:`sample`, besides callback, progress, generator and seed.

    Raises:
        ValueError: noise is not on a CUDA device, or an option is of the host.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Any], Tensor],
        noise: Tensor,
        plan: Plan,
        cond: Tensor | None = None,
        **options: Any,
    ) -> None:
        if noise.device.type != "cuda":
            raise ValueError(f"[GraphedRun] noise: expected a tensor on a CUDA device, got {noise.device}")
        for name in ("callback", "progress", "generator", "seed"):
            value = options.get(name)
            if value is not None and value is not False:  # a seed may be 0
                raise ValueError(f"[GraphedRun] {name}: expected none, got one")
        self._noise = noise.clone()
        self._cond = None if cond is None else cond.clone()
        stream = torch.cuda.Stream(noise.device)
        stream.wait_stream(torch.cuda.current_stream(noise.device))
        with torch.cuda.stream(stream):  # lazy initialisation of libraries, and the plan's copies to the device
            sample(model, self._noise, plan=plan, cond=self._cond, **options)
        torch.cuda.current_stream(noise.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = sample(model, self._noise, plan=plan, cond=self._cond, **options)

    def __call__(self, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Samples [B, ...] for other noise and, if given, another condition."""
        if noise.shape != self._noise.shape or noise.dtype != self._noise.dtype:
            expected, got = (f"{t.dtype} {[*t.shape]}" for t in (self._noise, noise))
            raise ValueError(f"[GraphedRun] noise: expected {expected}, got {got}")
        self._noise.copy_(noise)
        if cond is not None:
            if self._cond is None or cond.shape != self._cond.shape or cond.dtype != self._cond.dtype:
                expected = "None" if self._cond is None else f"{self._cond.dtype} {[*self._cond.shape]}"
                raise ValueError(f"[GraphedRun] cond: expected {expected}, got {cond.dtype} {[*cond.shape]}")
            self._cond.copy_(cond)
        self._graph.replay()
        return self._result.clone()
