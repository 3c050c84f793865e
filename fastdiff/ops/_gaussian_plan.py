"""Taps of the Gaussian, their tables for the native kernels, and the border rules.

A tap is ``w[k] = exp(-k^2 / 2 sigma^2) / sum_j exp(-j^2 / 2 sigma^2)`` for |k| <= r, with support K = 2 r + 1. All of
it is computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastdiff import _native
from fastdiff.ops import _registry as reg
from fastdiff.ops._cache import bounded

BORDERS = {"reflect": 0, "replicate": 1, "constant": 2, "circular": 3, "symmetric": 4}  # enum Border, csrc/fastdiff.h
MAX_SUPPORT = (1 << 17) + 1
SLIDING_SIGMA = 8.0  # from here on, and on images of SLIDING_SIDE or more, the sum of cosines is faster
SLIDING_SIDE = 64
SLIDING_LARGEST = 4096.0  # up to here: rounding of sums over the whole support stays below 5e-6
COSINES = 6  # kCosines
ONE_LAUNCH = 16  # kBlurRadius: on CUDA, larger radii need memory
NO_SIGMA = (0, 3, 0, 0.0, 0.0, 0, 0, 0)  # struct Sigma on the CPU, which has tables
# The lowest frequency is pi / (SPREAD (r + 1/2)). At 1.24 the sum of |errors| of the taps is below 1.5e-6 for every
# sigma >= 8 (tests/test_gaussian.py); at 1.22 and 1.26 it is twice as large.
SPREAD = 1.24


def support(sigma: float) -> int:
    """``int(6 sigma) | 1``; 1 where sigma is not finite (its taps are NaN). Cut at 10^12, far beyond what is served."""
    return int(min(6.0 * abs(sigma), 1e12)) | 1 if math.isfinite(sigma) else 1


def check_support(op: str, argument: str, size: int) -> int:
    """`size`, if a kernel may be that long."""
    if size > MAX_SUPPORT:
        reg.fail(op, argument, f"a support of at most {MAX_SUPPORT}", size if size < 10**12 else "more than 10^12")
    return size


def taps(sigma: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Taps k = -r .. r and their derivatives by sigma, float64. Even in sigma; sigma = 0 is the identity."""
    k = np.arange(size) - size // 2
    if not math.isfinite(sigma):
        return np.full(size, np.nan), np.full(size, np.nan)
    s = max(abs(sigma), 1e-30)
    w = np.exp(-np.square(k / s) / 2)
    w /= w.sum()
    spread = np.where(w > 0, np.square(k / s), 0.0)
    slope = w * (spread - (w * spread).sum()) / s
    return w, math.copysign(1.0, sigma) * slope


def torch_taps(sigma: Any, size: int, device: torch.device) -> torch.Tensor:
    """The same taps from a tensor sigma [], differentiable to any order; float64 [size]."""
    k = torch.arange(size, dtype=torch.float64, device=device) - size // 2
    if not isinstance(sigma, torch.Tensor):
        sigma = torch.full((), float(sigma), dtype=torch.float64, device=device)
    s = sigma.to(device=device, dtype=torch.float64).abs()
    s = s + torch.where(torch.isfinite(s), 0.0, torch.nan)
    w = torch.exp(-(k / s.clamp(min=1e-30)).square() / 2)
    return w / w.sum()


def positions(n: int, r: int, border: str, device: torch.device) -> torch.Tensor:
    """Which sample stands at position -r .. n - 1 + r of an axis of n: int64 [n + 2 r], -1 for a zero."""
    v = torch.arange(-r, n + r, dtype=torch.int64, device=device)
    if border == "constant":
        return torch.where((v < 0) | (v >= n), -1, v)
    if border == "replicate":
        return v.clamp(0, n - 1)
    if border == "circular":
        return v % n
    if border == "symmetric":
        v = v % (2 * n)
        return torch.where(v < n, v, 2 * n - 1 - v)
    period = max(2 * n - 2, 1)
    v = v % period
    return torch.where(v < n, v, period - v)


def cosines(sigma: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The taps as ``sum_m A[m] cos(theta[m] k)``: A and theta [COSINES], the sum of all taps being 1."""
    r = size // 2
    k = np.arange(r + 1)
    w, _ = taps(sigma, size)
    weight = np.where(k == 0, 1.0, math.sqrt(2.0))  # taps k and -k
    theta = math.pi * np.arange(COSINES) / (SPREAD * (r + 0.5))
    basis = np.cos(np.outer(k, theta))
    A = np.linalg.lstsq(basis * weight[:, None], w[r:] * weight, rcond=None)[0]
    return A / (weight**2 @ (basis @ A)), theta


def _sliding_table(sigma: float, size: int) -> list[np.ndarray]:
    """Coefficients [16] and starting weights [size + 1, 12] of csrc/cpu/gaussian_sliding.h."""
    A, theta = cosines(sigma, size)
    r = size // 2
    j = np.arange(-r - 1, r + 1)[:, None]
    inside, before = np.abs(j) <= r, j <= r - 1
    F = A * np.cos(theta * j) * inside
    D = F[:, 1:] - (A * np.cos(theta * (j + 1)) * before)[:, 1:]
    start = np.concatenate([F, D, np.zeros((size + 1, 1))], axis=1)
    t, a = theta[1:], A[1:]
    head = np.concatenate(
        [A[:1], 4 * np.sin(t / 2) ** 2, a * np.cos(t * r), 2 * a * np.sin(t / 2) * np.sin(t * (r + 0.5))]
    )
    return [head, start.ravel()]


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@bounded(_bytes)
def single(sigma_y: float, sigma_x: float, Ky: int, Kx: int, sliding: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``plan`` int64 [1, 5] and ``table`` float32 [1, T] of one sample (struct GaussianBlur)."""
    (wy, dy), (wx, dx) = taps(sigma_y, Ky), taps(sigma_x, Kx)
    parts = [wy, wx, dy, dx, *(np.cumsum(w[w.size // 2 :][::-1])[::-1] for w in (wy, wx))]
    restart = []
    for sigma, K, least in ((sigma_y, Ky, 256), (sigma_x, Kx, 512)):
        # A start costs as much as a third of K steps; rounding grows with the steps between two of them.
        restart.append(min(4096, max(least, 1 << (K - 1).bit_length())))
        if sliding:
            parts += _sliding_table(sigma, K)
    plan = np.array([[Ky // 2, Kx // 2, int(sliding), *restart]], dtype=np.int64)
    return torch.from_numpy(plan), torch.from_numpy(np.concatenate(parts).astype(np.float32)[None])


def plans(rows: list[tuple[float, float, int, int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``plan`` [S, 5] and ``table`` [S, T] of several samples."""
    found = [single(*row) for row in rows]
    if len(found) == 1:
        return found[0]
    width = max(table.shape[1] for _, table in found)
    stacked = torch.zeros(len(found), width, dtype=torch.float32, device="cpu")
    for i, (_, table) in enumerate(found):
        stacked[i, : table.shape[1]] = table[0]
    return torch.cat([plan for plan, _ in found]), stacked


@bounded(lambda table: table.nbytes)
def _prefix(sigma: float) -> np.ndarray:
    w, slope = taps(sigma, support(sigma))
    return np.concatenate([[0.0], np.cumsum(w), [0.0], np.cumsum(slope)])


def prefixes(sigmas: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """``radius`` int64 [S] and ``prefix`` float64 [S, T] (struct Boxes)."""
    return _shared_prefix(sigmas[0]) if len(sigmas) == 1 else _prefixes(sigmas)


@bounded(_bytes)
def _shared_prefix(sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _prefixes((sigma,))


def _prefixes(sigmas: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    found = [_prefix(s) for s in sigmas]
    table = np.zeros((len(found), max((p.size for p in found), default=1)))
    for i, p in enumerate(found):
        table[i, : p.size] = p
    radius = np.array([support(s) // 2 for s in sigmas], dtype=np.int64)
    return torch.from_numpy(radius), torch.from_numpy(table)


def on_device(sigma: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A sigma that the CUDA kernels read by themselves; None where the host knows the numbers."""
    return sigma if sigma is not None and sigma.device == like.device else None


def device_sigma(
    op: str, sigma: torch.Tensor | None, y: float, x: float, Ky: int, Kx: int, like: torch.Tensor
) -> tuple[tuple[Any, ...], list[int], torch.Tensor | None]:
    """struct Sigma without `sums`, the largest supports (y, x) there may be, and what must live until the launch.

    Nothing is read from a tensor on the device of `like`.
    """
    there = on_device(sigma, like)
    if there is None:
        if sigma is None:
            y, x = reg.number(op, "sigma", y, low=0.0), reg.number(op, "sigma", x, low=0.0)
        else:  # [] on the CPU
            y = x = float(sigma.detach())
        supports = [k or check_support(op, "sigma", support(s)) for s, k in ((y, Ky), (x, Kx))]
        return (0, 3, 0, y, x, Ky, Kx), supports, None
    there = there.detach().resolve_neg().reshape(-1)
    if there.dtype not in (torch.float64, *_native.DTYPES):
        there = there.to(torch.float64)
    code = _native.DTYPES.get(there.dtype, _native.FLOAT64_CODE)
    stride = 0 if there.numel() == 1 else there.stride(0)
    return (there.data_ptr(), code, stride, 0.0, 0.0, Ky, Kx), [Ky or MAX_SUPPORT, Kx or MAX_SUPPORT], there
