"""Finds and loads the native extension; devices, instruction sets, streams, and the choice of implementation.

torch is imported first on purpose: the extension links `libgomp.so.1` dynamically and torch ships that very library,
so the process has one OpenMP runtime and `torch.set_num_threads` holds for fastdiff too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

# Storage types of the kernels and their codes in csrc/fastdiff.h.
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOAT64_CODE = 3  # per-sample coefficients only
BACKENDS = ("auto", "native", "reference")


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastdiff._C"), ""
    except ImportError as error:
        return None, f"the native extension could not be loaded: {error}"


extension, load_error = _load()
backend = os.environ.get("FASTDIFF_BACKEND", "auto")
if backend not in BACKENDS:
    message = f"FASTDIFF_BACKEND: expected one of {BACKENDS}, got {backend!r}; using 'auto'"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    backend = "auto"

# The fast way in (csrc/dlpack.h): the extension reads tensors by itself. None where torch or the build cannot.
_fast: ModuleType | None = extension if extension and extension.connect(torch.Tensor, torch.nn.Parameter) else None
fast = _fast if backend != "reference" else None  # what is in force, see use_backend

_warned = False


def warn_once_if_missing() -> None:
    """One warning per process when there is no extension: everything works, on plain PyTorch."""
    global _warned
    if extension is None and not _warned:
        _warned = True
        warnings.warn(f"fastdiff runs on its PyTorch reference: {load_error}", RuntimeWarning, stacklevel=4)


def isas() -> list[str]:
    """CPU instruction sets compiled in that this machine can run, slowest first; empty without the extension."""
    return list(extension.isas()) if extension else []


def cpu_isa() -> str | None:
    """The instruction set in use: the widest available, or the one the environment variable FASTDIFF_ISA names."""
    return str(extension.isa()) if extension else None


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set, for tests and comparisons.

    Raises:
        ValueError: `name` is not one of `isas()`.
    """
    if extension is None or name not in isas():
        raise ValueError(f"use_isa: name: expected one of {isas()}, got {name!r}")
    before = extension.isa()
    extension.select_isa(name)
    try:
        yield
    finally:
        extension.select_isa(before)


if extension is not None and os.environ.get("FASTDIFF_ISA", "") not in ("", *isas()):
    warnings.warn(
        f"FASTDIFF_ISA: expected one of {isas()}, got {os.environ['FASTDIFF_ISA']!r}; using {cpu_isa()}",
        RuntimeWarning,
        stacklevel=2,
    )


def stream(device_index: int) -> int:
    """The raw handle of torch's current stream on a CUDA device; 0 on the CPU."""
    return torch._C._cuda_getCurrentRawStream(device_index) if device_index >= 0 else 0


def stream_on(device: torch.device) -> int:
    """The same for a device; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    return stream(torch.cuda.current_device() if device.index is None else device.index)


def capturing(device: torch.device) -> bool:
    """torch's current stream on a CUDA device is being captured into a graph."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def used_here(t: torch.Tensor) -> None:
    """Tell torch's allocator that its current stream on the device of t reads t, which another stream made."""
    t.record_stream(torch.cuda.current_stream(t.device))


_emulated = False  # the extension is csrc/emu's, and CPU tensors stand for those of a GPU: see `emulate`


def place(t: torch.Tensor) -> tuple[int, int]:
    """Where a kernel on `t` runs, as the extension takes it: (device index, stream), (-1, 0) for the CPU."""
    device = t.get_device()
    if device >= 0:
        return device, stream(device)
    return (0, 0) if _emulated else (-1, 0)


@contextlib.contextmanager
def emulate(module: ModuleType) -> Iterator[None]:
    """Run the operators' CUDA kernels on CPU tensors, for tests: `module` is the emulator's extension (csrc/emu)."""
    global extension, fast, _emulated
    before = extension, fast, _emulated
    extension, fast, _emulated = module, None, True
    try:
        yield
    finally:
        extension, fast, _emulated = before


class use_backend:
    """Choose who computes: ``"auto"`` (native when it can, else the reference), ``"native"`` (or an error that lists
    every reason why not) or ``"reference"`` (plain PyTorch).

    Works as a setter, ``use_backend("reference")``, and as a context manager, ``with use_backend("native"): ...``.
    The setting is global to the process.

    Raises:
        ValueError: `name` is not one of the three.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"use_backend: name: expected one of {BACKENDS}, got {name!r}")
        self._name = name
        self._before = backend
        _set_backend(name)

    def __enter__(self) -> use_backend:
        if backend != self._name:  # entered again
            self._before = backend
            _set_backend(self._name)
        return self

    def __exit__(self, *exc: object) -> None:
        _set_backend(self._before)


def _set_backend(name: str) -> None:
    global backend, fast
    backend = name
    fast = _fast if name != "reference" and not _emulated else None


def reasons(tensors: Iterable[torch.Tensor | None], *, hard: bool = False, cuda: bool = True) -> list[str]:
    """Every reason why the native kernels cannot serve a call on these tensors; empty if they can.

    `hard` leaves out the user's own choice of backend. `cuda`: the operator has a CUDA kernel.
    """
    found = []
    if backend == "reference" and not hard:
        found.append('use_backend("reference") is in force')
    if extension is None:
        found.append(load_error)
    has_cuda = bool(extension and extension.build_info()["cuda"])
    for t in tensors:
        if not isinstance(t, torch.Tensor):
            continue
        if t.dtype not in DTYPES:
            found.append(f"dtype {t.dtype} is served by the reference only (native: float32, float16, bfloat16)")
        if t.device.type == "cuda" and extension is not None and not has_cuda:
            found.append("this build has no CUDA kernels (build with FASTDIFF_CUDA=ON)")
        elif t.device.type == "cuda" and not cuda:
            found.append("this operator has no CUDA kernel yet")
        if t.device.type not in ("cpu", "cuda"):
            found.append(f"device {t.device.type!r} has no native kernels (native: cpu, cuda)")
    return list(dict.fromkeys(found))


def build_info() -> dict[str, Any]:
    """Version, CPU instruction sets, CUDA support, compiler and OpenMP of this build."""
    from fastdiff import __version__

    info: dict[str, Any] = {"version": __version__, "native": extension is not None}
    native = extension.build_info() if extension else {}
    info.update(
        cpu_isa=cpu_isa(),
        isas=isas(),
        cuda=bool(native.get("cuda", False)),
        cuda_archs=[a for a in native.get("cuda_archs", "").split(",") if a],
        compiler=native.get("compiler"),
        openmp=bool(native.get("openmp", False)),
    )
    if extension is None:
        info["why_not_native"] = load_error
    return info
