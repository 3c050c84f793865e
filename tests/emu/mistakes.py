"""Calls on which a deliberate mistake of a CUDA kernel (csrc/cuda/mutate.cuh) must show, family by family.

An entry: the operator, a function that makes its arguments, whether the mistake is in the backward kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    op: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    backward: bool = False
    grid: int = 1000  # blocks of a launch, at most


GELU: dict[str, Case] = {}

ATTENTION: dict[str, Case] = {}

SCAN: dict[str, Case] = {}

CONV: dict[str, Case] = {}

GAUSSIAN: dict[str, Case] = {}

SPECTRUM: dict[str, Case] = {}

CASES = {**GELU, **ATTENTION, **SCAN, **CONV, **GAUSSIAN, **SPECTRUM}
