"""What a call of an operator launches on CUDA, found on the CPU: the emulator writes launches down and runs nothing.

Tensors have their real sizes, but nobody fills or reads them: their pages are mostly never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
PASSES = ("forward", "backward")


@dataclass
class Traced:
    """One pass of a call: what it must move and compute, and what it launches."""

    op: str
    shape: str
    dtype: str
    mode: str
    bytes: int
    flops: int
    exponentials: int
    launches: list[Any] = field(default_factory=list)


def emulator() -> Any:
    """The emulator with the head dims of a normal build, as a device of 132 multiprocessors."""
    sys.path.insert(0, str(ROOT / "tests"))
    from emu import harness

    reason = harness.why_not()
    if reason:
        raise SystemExit(f"the CUDA emulator cannot be built: {reason}")
    found = harness.build("default")
    found.reset()
    found.multiprocessors(132)
    return found


@contextmanager
def unfilled() -> Iterator[None]:
    """Random tensors are not filled: nobody looks at them."""

    def randn(*size: Any, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
        shape = size[0] if size and isinstance(size[0], (tuple, list, torch.Size)) else size
        return torch.empty(shape, dtype=dtype, device=device)

    with mock.patch("torch.randn", randn):
        yield


def trace(emu: Any, name: str, shape: str, dtype: torch.dtype, *, hopper: bool = False) -> list[Traced]:
    """Forward and backward of an operator on one of its GPU benchmark shapes. `hopper`: kernels for sm_90a alone are
    used where they can."""
    from fastdiff import _native
    from fastdiff.cli import _check
    from fastdiff.ops import SPECS
    from fastdiff.ops._gpu_shapes import shapes_on
    from fastdiff.ops._registry import tensors_in

    spec, kind = SPECS[name], str(dtype).removeprefix("torch.")
    emu.hopper(hopper)
    with unfilled():
        args, kwargs = shapes_on(spec, torch.device("cuda"))[shape](dtype, torch.device("cpu"))
    flops, exponentials = spec.flops(*args, **kwargs), _exponentials(name, args, kwargs)
    with _native.emulate(emu.kernels), _native.use_backend("native"):
        with torch.no_grad():
            _, launches = emu.record(lambda: spec.function(*args, **kwargs))
        size = spec.bytes(*args, **kwargs)
        found = [Traced(name, shape, kind, "forward", size, flops, exponentials, launches)]
        (args, kwargs), leaves = _check.with_leaves(spec, args, kwargs)
        kept: dict[int, int] = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            kept[t.data_ptr()] = max(kept.get(t.data_ptr(), 0), _distinct(t))
            return t

        def run() -> list[torch.Tensor]:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                return tensors_in(spec.function(*args, **kwargs))

        outputs, _ = emu.record(run)
        upstream = [torch.empty_like(t) for t in outputs]
        grads, launches = emu.record(
            lambda: torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
        )
    size = sum(kept.values()) + sum(_distinct(t) for t in (*upstream, *grads) if t is not None)
    found.append(Traced(name, shape, kind, "backward", size, _backward_flops(name, flops), exponentials, launches))
    return found


def _distinct(t: torch.Tensor) -> int:
    from fastdiff.ops._examples import nbytes

    return nbytes(t)


def _backward_flops(name: str, flops: int) -> int:
    """Attention: five products for two. Otherwise about one operation per operation for each of two operands."""
    return flops * 5 // 2 if name.startswith("attention") else 2 * flops


def _exponentials(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Those that a pass cannot do without: one per score of attention, one per step and state of a scan."""
    if name == "attention":
        q, k = args[:2]
        axis = 2 if kwargs.get("layout", "bhnd") == "bhnd" else 1
        return q.numel() // q.shape[-1] * k.shape[axis]
    if name == "attention_qkvpacked":
        return args[0].shape[0] * args[0].shape[3] * args[0].shape[1] ** 2
    if name.startswith("selective_scan"):
        u, A = args[0], args[2]
        return u.numel() * A.shape[-1] * (A.shape[0] if A.dim() == 3 else 1)
    return 0
