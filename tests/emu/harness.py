"""Builds and loads the CUDA emulator, calls its kernels on CPU tensors, and says what they should have computed.

The references are written here from the formulas, in float64, and share nothing with the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastdiff import _native

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = os.environ.get("FASTDIFF_EMU_SANITIZE", "")  # e.g. address,undefined (run_sanitized.sh)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
STORED = [torch.float32, torch.float16, torch.bfloat16]
REDUCE = {"token": 1, "sample": 2, "table": 3}
CHUNK = 16

# ------------------------------------------------------------------------------------------------------- the build


def why_not() -> str | None:
    """What is missing to build the emulator here, or None."""
    if sys.platform != "linux":
        return "the emulator needs ucontext fibers (Linux)"
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(c and shutil.which(c) for c in compilers):
        return "no C++ compiler"
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            return f"no {tool}"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: its instantiation, such as ``forward<2, 72>``, and the configuration."""

    file: str
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int  # dynamic, bytes
    cluster: int

    @classmethod
    def parse(cls, line: str) -> Launch:
        file, name, grid, block, shared, cluster = line.split("\t")
        found = re.search(r"(?:kKernel|auto) = &?(.*)\]$", name)  # as g++ and clang++ spell it
        assert found, name
        kernel = re.sub(r"\{anonymous\}|\(anonymous namespace\)", "", found[1])
        kernel = re.sub(r"(?:\w*::)+", "", kernel)
        triple = [tuple(map(int, text.split())) for text in (grid, block)]
        return cls(Path(file).name, kernel, triple[0], triple[1], int(shared), int(cluster))


@dataclass
class Emulator:
    kernels: ModuleType  # the bindings of the library, over emulated kernels
    library: ctypes.CDLL  # the same file: its probes and its knobs (end of csrc/emu/emu.cpp)

    def seed(self, value: int) -> None:
        """Of the order in which threads and blocks run."""
        self.library.emu_seed(ctypes.c_uint64(value))

    def lockstep(self, on: bool) -> None:
        """Threads in index order instead."""
        self.library.emu_lockstep(int(on))

    def grid_limit(self, blocks: int) -> None:
        """Largest grid that a kernel asks for."""
        self.library.emu_grid_limit(ctypes.c_int64(blocks))

    def switches(self) -> int:
        """How often a thread was resumed so far."""
        self.library.emu_switches.restype = ctypes.c_int64
        return self.library.emu_switches()

    def mutations(self) -> list[str]:
        self.library.emu_mutations.restype = ctypes.c_char_p
        return self.library.emu_mutations().decode().split()

    def mutate(self, name: str | None) -> None:
        """Puts a deliberate mistake of csrc/cuda/mutate.cuh in force."""
        self.library.emu_mutate(self.mutations().index(name) + 1 if name else 0)

    def reset(self) -> None:
        self.seed(int(os.environ.get("FASTDIFF_EMU_SEED", "0")))
        self.lockstep(False)
        self.grid_limit(0x7FFFFFFF)
        self.multiprocessors(4)
        self.hopper(False)
        self.mutate(None)

    def hopper(self, on: bool) -> None:
        """Kernels of sm_90a are used where they can."""
        self.library.emu_hopper(int(on))

    def last_kernel(self) -> str:
        """The kernel launched last, as the launch spells it."""
        self.library.emu_last_kernel.restype = ctypes.c_char_p
        return self.library.emu_last_kernel().decode()

    def record(self, call: Callable[[], Any]) -> tuple[Any, list[Launch]]:
        """`call()` and what it would have launched; nothing runs, so that what it returns is garbage."""
        self.library.emu_recorded.restype = ctypes.c_char_p
        self.library.emu_record(1)
        try:
            result = call()
            return result, [Launch.parse(line) for line in self.library.emu_recorded().decode().splitlines()]
        finally:
            self.library.emu_record(0)

    def multiprocessors(self, count: int) -> None:
        """That the device is said to have."""
        self.library.emu_multiprocessors(count)

    @contextlib.contextmanager
    def operators(self) -> Iterator[None]:
        """fastdiff's operators on CPU tensors run the emulated CUDA kernels, and fresh tensors hold NaN."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            with _native.emulate(self.kernels):
                yield
        finally:
            torch.use_deterministic_algorithms(before)

    def probe(self, name: str, size: int, values: torch.Tensor | None = None) -> torch.Tensor:
        data, message = torch.zeros(size), ctypes.create_string_buffer(4096)
        if values is not None:
            data[: values.numel()] = values.flatten()
        status = self.library.fastdiff_probe(name.encode(), ctypes.c_void_p(data.data_ptr()), message, 4096)
        if status == 1:
            raise RuntimeError(message.value.decode())
        assert status == 0, f"no probe {name}"
        return data


@functools.cache
def build(head_dims: str = "") -> Emulator:
    """Configures and builds `_C_emu` in a directory that later runs find again, and loads it.

    `head_dims`: those of attention, as FASTDIFF_HEAD_DIMS; "": the emulator's own few.
    """
    key = hashlib.sha256(f"{ROOT}|{SANITIZE}|{sys.version}|{sys.executable}|{head_dims}".encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fastdiff-emu-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # the compiler is not under test
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DFASTDIFF_EMU=ON"]
        configure += ["-DFASTDIFF_CUDA=OFF", f"-DFASTDIFF_SANITIZE={SANITIZE}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DFASTDIFF_HEAD_DIMS={head_dims}"]
        for command in (configure, ["ninja", "-C", str(folder), "_C_emu"]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    path = max(folder.glob("_C_emu.*.so"), key=lambda p: p.stat().st_mtime)

    spec = importlib.util.spec_from_file_location("_C_emu", path)
    assert spec is not None and spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return Emulator(kernels, ctypes.CDLL(str(path)))


# ----------------------------------------------------------------------------------------------- tensors and layouts

GUARD = 64  # elements before and after every output
SENTINEL = 777.0


@dataclass
class Output:
    """A tensor full of NaN inside a buffer full of sentinels, which nobody may touch."""

    view: torch.Tensor
    buffer: torch.Tensor

    def check_surroundings(self, what: str) -> None:
        rest = self.buffer.clone()
        rest.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(SENTINEL)
        touched = (rest != SENTINEL).nonzero().flatten()
        assert touched.numel() == 0, f"{what}: wrote outside its tensor, at {touched[:5].tolist()}"


LAYOUTS = ["packed", "padded", "ragged", "shifted", "transposed", "sliced"]


def strides(layout: str, B: int, N: int, D: int) -> tuple[tuple[int, int, int], int, int]:
    """(strides, offset, buffer size) of a [B, N, D] view."""
    row = {"padded": (D + 15) // 16 * 16 + 16, "ragged": D + 3, "sliced": 3 * D}.get(layout, D)
    if layout == "transposed":
        s = (N * D, 1, N)
    elif layout == "sliced":
        s = (N * row + 5, row, 3)
    else:
        s = (N * row, row, 1)
    offset = GUARD + (1 if layout == "shifted" else 0)
    return s, offset, offset + B * s[0] + N * s[1] + D * s[2] + GUARD


def place(values: torch.Tensor, layout: str) -> torch.Tensor:
    s, offset, size = strides(layout, *values.shape)
    view = torch.full((size,), SENTINEL, dtype=values.dtype).as_strided(values.shape, s, offset)
    return view.copy_(values)


def output(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "packed") -> Output:
    three = (1,) * (3 - len(shape)) + tuple(shape)
    s, offset, size = strides(layout, *three)
    buffer = torch.full((size,), SENTINEL, dtype=dtype)
    view = buffer.as_strided(three, s, offset).fill_(math.nan)
    return Output(view if len(shape) == 3 else view.view(shape), buffer)


MODULATION = ["table", "sample", "sample-packed", "token", "token-strided", "constant"]


def modulation(kind: str, B: int, N: int, D: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """A [B, N, D] view: one row for all, a chunk of a [B, 6 D] tensor, per token, or one number."""
    if kind == "table":
        return torch.randn(D, generator=g).to(dtype).expand(B, N, D)
    if kind == "sample":
        return torch.randn(B, 6 * D, generator=g).to(dtype)[:, 2 * D : 3 * D].unsqueeze(1).expand(B, N, D)
    if kind == "sample-packed":
        return torch.randn(B, 1, D, generator=g).to(dtype).expand(B, N, D)
    if kind == "constant":
        return torch.randn(1, 1, 1, generator=g).to(dtype).expand(B, N, D)
    return place(torch.randn(B, N, D, generator=g).to(dtype), "packed" if kind == "token" else "sliced")


def operand(t: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], *t.stride())


# -------------------------------------------------------------------------------------------------------- tolerances

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}  # the same among subnormals


def close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, terms: int, what: str) -> None:
    """The one place that says how far a float32 kernel may be from float64.

    Storing the result rounds it once: UNIT of its type. Each float32 operation before that adds 2^-24 of the quantities
    it handles, and `magnitude` is the same formula with every term made positive: 16 covers the operations of the
    formula, sqrt(terms) the growth of rounding errors in a sum of that many terms.
    """
    got64 = got.double()
    allowed = UNIT[got.dtype] * want.abs() + TINY[got.dtype]
    allowed = allowed + (1 + UNIT[got.dtype]) * 2.0**-24 * (16 + math.sqrt(terms)) * magnitude
    error = (got64 - want).abs()
    bad = ~(error <= allowed)  # NaN is bad
    if bad.any():
        at = int((error / allowed).nan_to_num(nan=math.inf).flatten().argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} wrong; worst at {at}: got {got64.flatten()[at]:.9g}, "
            f"expected {want.flatten()[at]:.9g} +- {allowed.flatten()[at]:.3g}"
        )


# ------------------------------------------------------------------------------------------------------------- adaln


@dataclass
class Adaln:
    """One call: the inputs of forward and backward, or absent operands as None."""

    B: int
    N: int
    D: int
    rms: bool = False
    eps: float = 1e-6
    normed: bool = True
    layout: str = "packed"
    dtype: torch.dtype = torch.float32
    x: torch.Tensor | None = None
    branch: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    grad_y: torch.Tensor | None = None
    grad_residual: torch.Tensor | None = None

    def sample(self, b: int) -> Adaln:
        """The call for sample b alone."""
        names = ["x", "branch", "gate", "shift", "scale", "weight", "bias", "grad_y", "grad_residual"]
        parts = {n: getattr(self, n)[b : b + 1] for n in names if getattr(self, n) is not None}
        return replace(self, B=1, **parts)


def make_adaln(
    B: int,
    N: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "packed",
    kind: str = "sample",
    mod_dtype: torch.dtype | None = None,
    branch_dtype: torch.dtype | None = None,
    gated: bool = False,
    normed: bool = True,
    affine: str = "",
    rms: bool = False,
    residual_grad: bool = True,
    seed: int = 0,
) -> Adaln:
    g = torch.Generator().manual_seed(seed)
    mod_dtype = mod_dtype or dtype

    def rows(d: torch.dtype, mean: float = 0.0) -> torch.Tensor:
        return place((torch.randn(B, N, D, generator=g) + mean).to(d), layout)

    def mod() -> torch.Tensor:
        return modulation(kind, B, N, D, mod_dtype, g)

    c = Adaln(B, N, D, rms=rms, normed=normed, layout=layout, dtype=dtype)
    c.x = rows(dtype, mean=2.0)  # a mean that a one-pass variance or a wrong tail would feel
    if gated:
        c.branch, c.gate = rows(branch_dtype or dtype), mod()
        c.kinds["gate"] = kind
    if normed:
        c.shift, c.scale = mod(), mod()
        c.kinds["shift"] = c.kinds["scale"] = kind
        if "w" in affine:
            c.weight = modulation("table", B, N, D, mod_dtype, g)
        if "b" in affine:
            c.bias = modulation("table", B, N, D, mod_dtype, g)
        c.grad_y = rows(dtype)
    if residual_grad or not normed:
        c.grad_residual = rows(dtype)
    return c


def adaln_forward(emu: Emulator, c: Adaln, check: bool = True) -> dict[str, torch.Tensor]:
    """Runs the kernel; with `check`, compares every output with the formula. Returns the outputs."""
    shape = (c.B, c.N, c.D)
    out: dict[str, Output] = {}
    if c.gate is not None:
        out["residual"] = output(shape, c.dtype, c.layout)
    if c.normed:
        out["y"] = output(shape, c.dtype, c.layout)
        out["mean"], out["rstd"] = output((c.B, c.N), torch.float32), output((c.B, c.N), torch.float32)
    got = {k: v.view for k, v in out.items()}
    emu.kernels.adaln_forward(
        0, 0, *shape, c.rms, c.eps, *map(operand, (c.x, c.branch, c.gate, c.shift, c.scale, c.weight, c.bias)),
        operand(got.get("residual")), operand(got.get("y")),
        got["mean"].data_ptr() if c.normed else 0, got["rstd"].data_ptr() if c.normed else 0,
    )  # fmt: skip
    for name, o in out.items():
        o.check_surroundings(name)
    if not check:
        return got
    r = c.x.double()
    if c.gate is not None:
        step = c.gate.double() * c.branch.double()
        close(got["residual"], r + step, r.abs() + step.abs(), 1, "residual")
        r = got["residual"].double()  # the norm sees what was stored
    if c.normed:
        mean = torch.zeros_like(r[..., :1]) if c.rms else r.mean(-1, keepdim=True)
        variance = (r - mean).square().mean(-1, keepdim=True)
        rstd = (variance + c.eps).rsqrt()
        one = torch.ones_like(r[..., :1])
        size = r.abs().mean(-1, keepdim=True)
        close(got["mean"], mean[..., 0], size[..., 0], c.D, "mean")
        # An error e of the mean moves the variance by e^2 and by rounding of the deviations; with variance + eps small
        # the deviations are rounding errors of r itself.
        noise = (2.0**-24 * (4 + math.sqrt(c.D)) * size).square() * (0 if c.rms else 1)
        relative = rstd * (1 + noise * rstd.square() * 2.0**24)
        close(got["rstd"], rstd[..., 0], relative[..., 0], c.D, "rstd")
        n, n_size = (r - mean) * rstd, (r.abs() + (0 if c.rms else 1) * (mean.abs() + size)) * relative
        w = one if c.weight is None else c.weight.double()
        b = one * 0 if c.bias is None else c.bias.double()
        scale, shift = c.scale.double(), c.shift.double()
        want = (n * w + b) * (1 + scale) + shift
        size_y = (n_size * w.abs() + b.abs()) * (1 + scale.abs()) + shift.abs()
        close(got["y"], want, size_y, c.D, "y")
    return got


def adaln_backward(emu: Emulator, c: Adaln, check: bool = True, grad_dtype: torch.dtype | None = None):
    """The same for the backward pass, with mean and rstd computed here."""
    shape = (c.B, c.N, c.D)
    r = c.x.double()
    mean = torch.zeros(c.B, c.N) if c.rms else r.mean(-1).float()
    rstd = ((r - mean.double()[..., None]).square().mean(-1) + c.eps).rsqrt().float()
    out = {"dx": output(shape, c.dtype, c.layout)}
    if c.gate is not None:
        out["dbranch"] = output(shape, (c.x if c.branch is None else c.branch).dtype, c.layout)
    grads, keep = {}, []
    chunks = -(-c.N // CHUNK)
    gate = None if c.branch is None else c.gate  # without the branch there is no dgate
    wanted = {"dgate": (gate, "gate"), "dshift": (c.shift, "shift"), "dscale": (c.scale, "scale"),
              "dweight": (c.weight, ""), "dbias": (c.bias, "")}  # fmt: skip
    for name, (tensor, key) in wanted.items():
        if tensor is None:
            grads[name] = None
            continue
        kind = c.kinds.get(key, "table").split("-")[0]
        kind = "token" if kind == "constant" else kind
        size = {"token": shape, "sample": (c.B, c.D), "table": (c.D,)}[kind]
        out[name] = output(size, grad_dtype or tensor.dtype)
        partial = output((c.B, chunks, c.D), torch.float32) if kind != "token" else None
        keep.append(partial)
        grads[name] = (out[name].view.data_ptr(), DTYPES[out[name].view.dtype], REDUCE[kind],
                       0 if partial is None else partial.view.data_ptr())  # fmt: skip
    got = {k: v.view for k, v in out.items()}
    emu.kernels.adaln_backward(
        0, 0, *shape, c.rms, operand(c.x) if c.normed else None, *map(operand, (c.branch, c.gate, c.scale, c.weight,
        c.bias, c.grad_y, c.grad_residual)), mean.data_ptr() if c.normed else 0, rstd.data_ptr() if c.normed else 0,
        operand(got["dx"]), operand(got.get("dbranch")),
        *(grads[k] for k in ("dgate", "dshift", "dscale", "dweight", "dbias")),
    )  # fmt: skip
    for name, o in out.items():
        o.check_surroundings(name)
    for partial in keep:
        if partial is not None:
            partial.check_surroundings("workspace")
    if not check:
        return got
    want = backward_reference(c, mean.double(), rstd.double(), absolute=False)
    size = backward_reference(c, mean.double(), rstd.double(), absolute=True)
    for name, tensor in got.items():
        kind = {2: (1,), 1: (0, 1), 3: ()}[tensor.dim()]
        rows = c.B * c.N if tensor.dim() == 1 else c.N if tensor.dim() == 2 else 1
        value, scale = want[name], size[name]
        if kind:
            value, scale = value.sum(kind), scale.sum(kind)
        close(tensor, value, scale, c.D + rows, name)
    return got


def backward_reference(c: Adaln, mean: torch.Tensor, rstd: torch.Tensor, absolute: bool) -> dict[str, torch.Tensor]:
    """Gradients per token. `absolute`: every operand and every term made positive, the size of what is added up."""

    def f(t: torch.Tensor | None, default: float = 0.0) -> torch.Tensor:
        v = torch.full((1, 1, 1), default, dtype=torch.float64) if t is None else t.double()
        return v.abs() if absolute else v

    minus = 1.0 if absolute else -1.0
    shape = (c.B, c.N, c.D)
    out: dict[str, torch.Tensor] = {}
    dx = f(c.grad_residual).expand(shape)
    if c.normed:
        hat = (f(c.x) + minus * f(mean)[..., None]) * rstd[..., None]
        gy = f(c.grad_y)
        out["dshift"] = gy
        out["dscale"] = gy * (hat * f(c.weight, 1.0) + f(c.bias))
        d = gy * (1 + f(c.scale))
        out["dbias"], out["dweight"] = d, d * hat
        d = d * f(c.weight, 1.0)
        m1 = 0.0 if c.rms else d.mean(-1, keepdim=True)
        m2 = (d * hat).mean(-1, keepdim=True)
        dx = dx + (d + minus * m1 + minus * hat * m2) * rstd[..., None]
    if c.gate is not None:
        out["dgate"] = dx * f(c.branch)
        out["dbranch"] = dx * f(c.gate)
    out["dx"] = dx
    return {k: v.expand(shape) for k, v in out.items()}


# ------------------------------------------------------------------------------------------------------------ update

PREDICTIONS = ["epsilon", "v", "sample", "flow"]


@dataclass
class Ddim:
    """A DDIM step, or a linear update when `coefficients` is set. A number is a float, or per sample a tensor [B]."""

    terms: list[torch.Tensor]
    coefficients: list | None = None
    alpha_bar: object = 0.5
    alpha_bar_next: object = 0.6
    prediction: str = "epsilon"
    eta: float = 0.0
    guidance: float = 1.0
    uncond: bool = False
    noise: bool = False
    clip: float = -1.0

    def rule(self) -> tuple:
        def number(c):
            return (c.data_ptr(), DTYPES[c.dtype], 0, 1) if isinstance(c, torch.Tensor) else float(c)

        if self.coefficients is not None:
            return tuple(number(c) for c in self.coefficients)
        return (number(self.alpha_bar), number(self.alpha_bar_next), PREDICTIONS.index(self.prediction), self.eta,
                self.guidance, self.uncond, self.noise, self.clip)  # fmt: skip

    def parts(self, terms: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the unclamped linear part, k * x0) in float64; their sum is the step when nothing is clamped."""
        f = [t.double() for t in terms]

        def column(c):
            return c.double()[:, None] if isinstance(c, torch.Tensor) else torch.tensor(float(c), dtype=torch.float64)

        if self.coefficients is not None:
            return sum(column(c) * t for c, t in zip(self.coefficients, f, strict=True)), torch.zeros_like(f[0])
        x, g = f[0], f[1]
        if self.uncond:
            g = f[2] + self.guidance * (f[1] - f[2])
        ab, ab2 = column(self.alpha_bar), column(self.alpha_bar_next)
        a, s = ab.sqrt(), (1 - ab).sqrt()
        if self.prediction == "epsilon":
            x0, noise = (x - s * g) / a, g
        elif self.prediction == "v":
            x0, noise = a * x - s * g, s * x + a * g
        elif self.prediction == "sample":
            x0, noise = g, (x - a * g) / s
        else:  # x = a x0 + s noise, g = x0 - noise
            x0 = (x + s * g) / (a + s)
            noise = x0 - g
        sigma = self.eta * ((1 - ab2) / (1 - ab) * (1 - ab / ab2)).sqrt() if self.eta > 0 else 0 * ab
        linear = (1 - ab2 - sigma**2).sqrt() * noise
        if self.noise:
            linear = linear + sigma * f[-1]
        return linear, ab2.sqrt() * x0

    def magnitude(self, terms: list[torch.Tensor]) -> torch.Tensor:
        """Both parts are linear: the sum over terms of what each alone contributes, made positive."""
        total = torch.zeros_like(terms[0], dtype=torch.float64)
        for i, t in enumerate(terms):
            alone = self.parts([t if i == j else torch.zeros_like(u) for j, u in enumerate(terms)])
            total += alone[0].abs() + alone[1].abs()
        return total

    def bound(self) -> torch.Tensor:  # of k * x0
        k = self.alpha_bar_next
        return self.clip * (k.double().sqrt()[:, None] if isinstance(k, torch.Tensor) else math.sqrt(k))


def update(emu: Emulator, d: Ddim, out_dtype: torch.dtype, shifted: bool = False, alias: int = -1, check: bool = True):
    B, M = d.terms[0].shape
    terms = [t.contiguous() for t in d.terms]
    out = output((1, B, M), out_dtype, "shifted" if shifted else "packed")
    if alias >= 0:
        out.view.copy_(terms[alias])
        terms[alias] = out.view[0]
    saved = [t.clone() for t in terms]
    emu.kernels.update(0, 0, B, M, tuple((t.data_ptr(), DTYPES[t.dtype]) for t in terms), d.rule(), None,
                       d.coefficients is None, out.view.data_ptr(), DTYPES[out_dtype])  # fmt: skip
    out.check_surroundings("out")
    if check:
        linear, data = d.parts(saved)
        want = linear + (data if d.clip < 0 else data.clamp(min=-d.bound(), max=d.bound()))
        close(out.view[0], want, d.magnitude(saved), 1, "out")
    return out.view[0]


def update_backward(emu: Emulator, d: Ddim, grad: torch.Tensor, skip: int = -1, check: bool = True):
    B, M = grad.shape
    outs = [output((1, B, M), t.dtype, "packed") for t in d.terms]
    pointers = tuple(0 if i == skip else o.view.data_ptr() for i, o in enumerate(outs))
    emu.kernels.update_backward(0, 0, B, M, tuple((t.data_ptr(), DTYPES[t.dtype]) for t in d.terms), d.rule(), None,
                                d.coefficients is None, grad.data_ptr(), DTYPES[grad.dtype], pointers)  # fmt: skip
    for o in outs:
        o.check_surroundings("grad")
    if not check:
        return [o.view[0] for o in outs]
    terms = [t.double().requires_grad_() for t in d.terms]
    linear, data = d.parts(terms)
    sure = torch.ones_like(grad, dtype=torch.bool)
    if d.clip >= 0:
        inside = data.detach().abs() <= d.bound()
        data = data * inside
        # Where x0 is within rounding of the bound, either derivative is right.
        sure = (data.detach().abs() - d.bound()).abs() > 2.0**-20 * (1 + d.magnitude(d.terms))
    want = torch.autograd.grad(linear.mul(grad.double()).sum() + data.mul(grad.double()).sum(), terms,
                               allow_unused=True)  # fmt: skip
    ones = [torch.ones_like(t, dtype=torch.float64) for t in d.terms]
    for i, o in enumerate(outs):
        if i == skip:
            assert o.view.isnan().all()
            continue
        alone = d.parts([u if i == j else torch.zeros_like(u) for j, u in enumerate(ones)])
        w = torch.zeros_like(grad, dtype=torch.float64) if want[i] is None else want[i]
        got = o.view[0]
        close(got[sure], w[sure], (grad.double().abs() * (alone[0].abs() + alone[1].abs()))[sure], 1, f"grad {i}")
    return [o.view[0] for o in outs]
