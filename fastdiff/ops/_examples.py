"""Random tensors for the specs: values, shapes and, above all, layouts that a kernel could get wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch


def randn(
    rng: random.Random, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, layout: str | None = None
) -> torch.Tensor:
    """Standard normal values in one of four layouts, drawn from `rng` unless given.

    ``plain`` is contiguous; ``slice`` is cut out of a tensor larger in every dimension; ``step`` takes every second
    element of the last dimension; ``transposed`` has its dimensions in reverse order in memory.
    """
    layout = layout or rng.choice(["plain", "slice", "step", "transposed"])
    g = torch.Generator().manual_seed(rng.getrandbits(31))

    def make(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g).to(device=device, dtype=dtype)

    if layout == "slice":
        t = make(*[n + 2 for n in shape])
        for d, n in enumerate(shape):
            t = t.narrow(d, 1, n)
        return t
    if layout == "step" and shape:
        return make(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "transposed":
        return make(*reversed(shape)).permute(*reversed(range(len(shape))))
    return make(*shape)


def dense(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Contiguous standard normal values, for benchmarks."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of memory that the elements of these tensors occupy, broadcast ones counted once."""
    total = 0
    for t in tensors:
        if t is not None:
            distinct = 1
            for n, s in zip(t.shape, t.stride(), strict=True):
                distinct *= 1 if s == 0 else n
            total += distinct * t.element_size()
    return total
