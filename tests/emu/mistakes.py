"""Calls on which a deliberate mistake of a CUDA kernel (csrc/cuda/mutate.cuh) must show, family by family.

An entry: the operator, a function that makes its arguments, whether the mistake is in the backward kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    op: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    backward: bool = False
    grid: int = 1000  # blocks of a launch, at most
    hopper: bool = False  # in a kernel for sm_90a


def _draws(M: int, dtype: torch.dtype) -> Any:
    x = torch.ones(2, M, dtype=dtype)
    return lambda: ((x, x, 0.3, 0.6), {"eta": 1.0, "seed": 3})


UPDATE: dict[str, Case] = {
    "kNoiseBlock": Case("ddim_step", _draws(64, torch.bfloat16)),
    "kNoiseLane": Case("ddim_step", _draws(7, torch.float32)),
}

GELU: dict[str, Case] = {}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def _normal(*shape: int, **options: Any) -> Callable[[], Call]:
    return lambda: ((torch.randn(shape, generator=torch.Generator().manual_seed(0)),), options)


GELU = {
    "kGeluStep": Case("gelu", _normal(5000)),
    "kGeluTail": Case("gelu", _normal(1027), backward=True),
}

ATTENTION: dict[str, Case] = {}


def hopper(tokens: int, keys: int, scale: float = 1.0) -> Callable[[], Any]:
    def make() -> Any:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 2, n, 72, generator=g) for n in (tokens, keys, keys))
        k[:, :, 128:] *= scale
        return (q.bfloat16(), k.bfloat16(), v.bfloat16()), {}

    return make


HOPPER: dict[str, Case] = {
    "kHopperInit": Case("attention", hopper(130, 130), hopper=True),
    "kHopperEmpty": Case("attention", hopper(130, 500), hopper=True, grid=1),
    "kHopperFull": Case("attention", hopper(130, 300), hopper=True),
    "kHopperWait": Case("attention", hopper(130, 300), hopper=True),
    "kHopperShrink": Case("attention", hopper(130, 300, scale=3.0), hopper=True),
}

SCAN: dict[str, Case] = {}

CONV: dict[str, Case] = {}

GAUSSIAN: dict[str, Case] = {}

SPECTRUM = {
    "kLoadBarrier": Case("spectral_features", _normal(1, 33, 20)),
    "kPassBarrier": Case("spectral_features", _normal(1, 3, 12, 32)),
    "kTwiddleBarrier": Case("spectral_features", _normal(1, 44, 22)),
    "kRowsReuse": Case("spectral_features", _normal(1, 260, 40), backward=True, grid=1),
    "kColumnsReuse": Case("spectral_features", _normal(1, 84, 82), backward=True, grid=1),
    "kGroupReuse": Case("spectral_features", _normal(1, 70, 12)),
    "kMagnitudeBarrier": Case("radial_spectrum", _normal(1, 84, 82)),
    "kPartialBarrier": Case("radial_spectrum", _normal(1, 30, 36)),
    "kUnshifted": Case("spectral_features", _normal(1, 5, 7)),
    "kMirrorRow": Case("spectral_features", _normal(1, 5, 7)),
    "kNyquistSlope": Case("spectral_features", _normal(1, 5, 8), backward=True),
    "kOddRow": Case("spectral_features", _normal(1, 5, 8), backward=True),
}

CASES = {**UPDATE, **GELU, **ATTENTION, **HOPPER, **SCAN, **CONV, **GAUSSIAN, **SPECTRUM}
