"""Spectra of images: ``|FFT2(gray)|``, whole or averaged over rings around the DC pixel.

The features by which generated images give themselves away: upsampling and denoising leave periodic peaks and a wrong
fall-off at high frequencies (Durall et al. 2020, "Watch your Up-Convolution", sec. 3.1; Ricker et al. 2022, "Towards
the Detection of Diffusion Model Deepfakes", sec. 5). With gray = 0.299 R + 0.587 G + 0.114 B,

    F[ky, kx] = sum_yx gray[y, x] exp(-2 pi i (ky y / H + kx x / W)),    feature = |F|  or  log(1 + |F|).

Shapes: images [B, 3, H, W] (RGB), [B, 1, H, W] or [B, H, W] (gray), any strides; H and W at least 1, any number, primes
too. float32, float16 or bfloat16; arithmetic in float32, the result in the dtype of images. The DC pixel alone is the
sum of all pixels: in float16 the features of an image of 256 x 256 pixels can overflow to infinity without `log`.

One native forward and one backward kernel. Deterministic, whatever the number of threads and the batch. Workspace:
per thread a half spectrum (about 4 H W bytes), 144 W + 512 bytes of rows (16 R at least for rings) and, where a length
has a prime factor above 61, 256 M bytes for Bluestein's length M < 3 max(H, W); for rings R (H / 8 + 4) bytes per
thread and 4 R per image. For a gradient the half spectrum of every image is kept. Tables: about 12 bytes per row and
column, and for rings H W bytes; at most 32 MB of them are kept for later calls, and none above 8 MB, so that beyond
some 8 million pixels a call of `radial_spectrum` makes its ring table anew.

On a GPU the workspace is the half spectra of the images that go through together (24 MB, one image at least), or none
where one block or cluster does an image in one launch; for rings R W / 8 floats per image more; and for sides that do
not fit into shared memory (some 12 000 numbers, or Bluestein's length of 6 000) 128 blocks' arrays. Tables of a new
size are copied to the device by its first call, which therefore cannot be captured in a CUDA graph; later ones can.
Tables that a captured graph reads are kept for the life of the process.

A NaN or an infinity anywhere reaches every frequency of its image, but which of the two a frequency becomes is not
defined: inf - inf is NaN, and it depends on the order of the transform's additions where infinities meet.
"""

from __future__ import annotations

import cmath
import functools
import math
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiff import _native
from fastdiff.ops import _registry as reg
from fastdiff.ops._cache import bounded, on_device

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_LANES = 16  # transforms at a time, and the padding that follows; csrc/cpu/fft.h
_MAX_PRIME = 61  # the largest radix that is summed directly
_SHAPE = "shape [B, 3, H, W], [B, 1, H, W] or [B, H, W]"


# ------------------------------------------------------------------------------------------------- public functions


def spectral_features(images: torch.Tensor, *, log: bool = False, shift: bool = True) -> torch.Tensor:
    """``|FFT2(gray)|`` of every image, differentiable.

    Args:
        images: [B, 3, H, W], [B, 1, H, W] or [B, H, W]; H, W >= 1.
        log: ``log(1 + |F|)``, which is finite (0) and differentiable where F is 0, instead of ``|F|``.
        shift: DC at (H // 2, W // 2), as `torch.fft.fftshift` over the last two axes does; never over the batch.

    Returns:
        [B, H, W], dtype of images. The gradient at F = 0 is 0, as that of `torch.abs`.

    Raises:
        ValueError: images has another shape, or no pixels.
        TypeError: images is not a floating-point tensor, or an option is no bool.
    """
    way = reg.route("spectral_features", (images,))
    _check("spectral_features", images, log=log, shift=shift)
    if way is reg.REFERENCE:
        return spectral_features_reference(images, log=log, shift=shift)
    if way is reg.GRAD:
        return _Spectrum.apply(images, False, log, shift)
    return reg.call(_features_op, _features, images, log, shift)


def radial_spectrum(images: torch.Tensor, *, log: bool = False, normalize: bool = False) -> torch.Tensor:
    """The azimuthal mean of ``|FFT2(gray)|`` of every image, differentiable.

    Frequency (ky, kx), counted from DC, is in ring floor(sqrt(ky^2 + kx^2)), i.e. the distance in pixels from
    (H // 2, W // 2) in the shifted spectrum. All radii up to the corner: R = floor(sqrt((H//2)^2 + (W//2)^2)) + 1. No
    ring is empty: along the axis and then up to the corner the distance grows by at most 1 a step.

    Args:
        images: [B, 3, H, W], [B, 1, H, W] or [B, H, W]; H, W >= 1.
        log: the mean of ``log(1 + |F|)`` instead of ``|F|``.
        normalize: divide by the sum over the rings, so that a profile is a distribution over radii and does not depend
            on the brightness (unlike a division by DC, this is safe for images and residuals of zero mean). All zeros
            for an image that is zero.

    Returns:
        [B, R], dtype of images.

    Raises:
        ValueError: images has another shape, or no pixels.
        TypeError: images is not a floating-point tensor, or an option is no bool.
    """
    way = reg.route("radial_spectrum", (images,))
    _check("radial_spectrum", images, log=log, normalize=normalize)
    if way is reg.REFERENCE:
        return radial_spectrum_reference(images, log=log, normalize=normalize)
    if way is reg.GRAD:
        return _Spectrum.apply(images, True, log, normalize)
    return reg.call(_radial_op, _radial, images, log, normalize)


# ------------------------------------------------------------------------------------------------------- references


def _magnitude(images: torch.Tensor, log: bool) -> torch.Tensor:
    """[B, H, W], DC first, in float32 or float64."""
    x = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32)
    if x.dim() == 4:
        x = x[:, 0] if x.shape[1] == 1 else GRAY[0] * x[:, 0] + GRAY[1] * x[:, 1] + GRAY[2] * x[:, 2]
    magnitude = torch.fft.fft2(x).abs() if x.shape[0] else x.abs()  # MKL takes no empty batch
    return torch.log1p(magnitude) if log else magnitude


def spectral_features_reference(images: torch.Tensor, *, log: bool = False, shift: bool = True) -> torch.Tensor:
    """`spectral_features` in plain PyTorch."""
    magnitude = _magnitude(images, log)
    return (torch.fft.fftshift(magnitude, dim=(-2, -1)) if shift else magnitude).to(images.dtype)


def radial_spectrum_reference(images: torch.Tensor, *, log: bool = False, normalize: bool = False) -> torch.Tensor:
    """`radial_spectrum` in plain PyTorch."""
    magnitude = _magnitude(images, log)
    H, W = magnitude.shape[-2:]
    # Distances from DC of the frequencies in their order 0, 1, ..., -1.
    ky = torch.arange(H, dtype=torch.int64, device=images.device)
    kx = torch.arange(W, dtype=torch.int64, device=images.device)
    ky, kx = torch.minimum(ky, H - ky), torch.minimum(kx, W - kx)
    ring = (ky[:, None] ** 2 + kx[None, :] ** 2).double().sqrt().long().flatten()
    sums = magnitude.new_zeros(magnitude.shape[0], rings(H, W)).index_add(1, ring, magnitude.flatten(1))
    sizes = magnitude.new_zeros(rings(H, W)).index_add(0, ring, torch.ones_like(ring, dtype=magnitude.dtype))
    profile = sums / sizes
    if normalize:
        total = profile.sum(1, keepdim=True)
        profile = profile / torch.where(total > 0, total, torch.ones_like(total))
    return profile.to(images.dtype)


# ------------------------------------------------------------------------------------------------------- validation


def _check(op: str, images: Any, **options: Any) -> None:
    reg.check_tensor(op, "images", images)
    shape = tuple(images.shape)
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] not in (1, 3)):
        reg.fail(op, "images", _SHAPE, shape)
    if shape[-1] < 1 or shape[-2] < 1:
        reg.fail(op, "images", f"{_SHAPE} with H, W >= 1", shape)
    for name, value in options.items():
        if not isinstance(value, bool):
            reg.fail(op, name, "a bool", type(value).__name__, TypeError)


# ------------------------------------------------------------------------------------------------------------- plans


def rings(H: int, W: int) -> int:
    """How many rings an H x W spectrum has."""
    square = (H // 2) ** 2 + (W // 2) ** 2
    if isinstance(square, torch.SymInt):  # while a size is traced as a symbol; exact below 2^52
        return torch.sym_int(torch.sym_sqrt(square)) + 1  # type: ignore[no-any-return]
    return math.isqrt(square) + 1


def factor(n: int) -> list[int]:
    """The radices for length n, first pass first; empty if n has a prime factor above 61."""
    radices = []
    while n % 8 == 0:
        radices.append(8)
        n //= 8
    if n % 4 == 0:
        radices.append(4)
        n //= 4
    elif n % 2 == 0:  # 8 * 2 as 4 * 4
        radices[-1:] = [4, 4] if radices else [2]
        n //= 2
    for p in (3, 5, *range(7, _MAX_PRIME + 1, 2)):
        while n % p == 0:
            radices.append(p)
            n //= p
    return radices if n == 1 else []


_COST = {2: 1.0, 3: 1.6, 4: 1.3, 5: 2.2, 8: 1.6}  # of a pass, per point


@functools.lru_cache(maxsize=64)
def bluestein_length(n: int) -> int:
    """0 if length n is transformed directly, else the length >= 2 n - 1 that Bluestein's method goes through."""
    if n == 1 or factor(n):
        return 0
    best, cheapest = 0, math.inf
    for fives in (1, 5, 25):
        for threes in (1, 3, 9, 27):
            m = fives * threes
            while m < 2 * n - 1:
                m *= 2
            cost = m * sum(_COST[r] for r in factor(m))
            if cost < cheapest:
                best, cheapest = m, cost
    return best


def _position(radices: list[int], i: int, n: int) -> int:
    """Where decimation in time wants element i: its digits in reverse order."""
    position = 0
    for r in reversed(radices):
        n //= r
        position += i % r * n
        i //= r
    return position


@bounded(lambda tables: sum(t.itemsize * len(t) for t in tables))
def plan(n: int) -> tuple[array[int], array[float]]:
    """How csrc/cpu/fft.h transforms length n: (integers, floats).

    Integers: n, Bluestein's length m or 0, number of radices, number of floats before the chirp, the radices, and the
    positions. Floats: twiddles of each pass, then chirp and filter of Bluestein's method. Rounded once, from double.
    """
    m = bluestein_length(n)
    length = m or n
    radices = factor(length)
    table = array("f")
    L = 1
    for r in radices:
        for j in range(L) if L > 1 else ():
            for q in range(1, r):
                _append(table, cmath.exp(-2j * math.pi * (j * q) / (r * L)))
        if r not in _COST:
            for j in range(r):
                angle = 2 * math.pi * j / r
                table.extend((math.cos(angle), math.sin(angle)))
        L *= r
    integers = array("i", [n, m, len(radices), len(table), *radices])
    integers.extend(_position(radices, i, length) for i in range(length))
    if m:
        chirp = [cmath.exp(-1j * math.pi * (k * k % (2 * n)) / n) for k in range(n)]
        wrapped = [0j] * m
        for k, c in enumerate(chirp):
            wrapped[k] = wrapped[-k] = c.conjugate()
        for c in chirp:
            _append(table, c)
        for c in torch.fft.fft(torch.tensor(wrapped, dtype=torch.complex128, device="cpu")).tolist():
            _append(table, c / m)
    return integers, table


def _append(table: array[float], c: complex) -> None:
    table.extend((c.real, c.imag))


def _ring_table(H: int, W: int) -> tuple[np.ndarray, np.ndarray]:
    """The ring of every frequency with 0 <= ky <= H/2, 0 <= kx <= W/2, and how many of all H W each ring has."""
    ky, kx = np.arange(H // 2 + 1), np.arange(W // 2 + 1)
    table = np.empty((ky.size, kx.size), dtype=np.int32)
    sizes = np.zeros(rings(H, W))
    columns = np.where((kx == 0) | (2 * kx == W), 1.0, 2.0)
    block = max(1, (1 << 18) // kx.size)  # rows at a time: no float64 copy of it all
    for y0 in range(0, ky.size, block):
        y = ky[y0 : y0 + block, None]
        table[y0 : y0 + block] = np.sqrt((y * y + kx * kx).astype(np.float64))  # rounded correctly: exact below 2^52
        weight = np.where((y == 0) | (2 * y == H), 1.0, 2.0) * columns
        sizes += np.bincount(table[y0 : y0 + block].ravel(), weight.ravel(), sizes.size)
    return table, sizes.astype(np.float32)


# -------------------------------------------------------------------------------------------------- native functions


def _up(n: int, to: int = _LANES) -> int:
    return (n + to - 1) // to * to


def _half_size(H: int, W: int) -> int:
    """Floats in one image's half spectrum (csrc/fastdiff.h: Spectrum)."""
    return 2 * H * _up((W + 1) // 2) + 3 * _up(H)


def _launch(
    images: torch.Tensor, out: torch.Tensor, log: bool, shift: bool, normalize: bool, radial: bool, half: Any = None
) -> torch.Tensor | None:
    """Fill `out`, and `half` if given; returns the ring means before normalisation."""
    x = images if images.dim() == 4 else images.unsqueeze(1)
    B, C, H, W = x.shape
    threads, R = torch.get_num_threads(), rings(H, W) if radial else 0
    device, stream = _native.place(x)
    if device >= 0:
        return _launch_cuda(x, out, log, shift, normalize, R, half, device, stream)
    addresses, size, _ = _tables(H, W, radial)
    scratch = x.new_empty((threads, size), dtype=torch.float32)
    slots = min(B, threads)
    partial = profile = None
    if radial:
        rows = _native.extension.ring_rows  # type: ignore[union-attr]
        partial = x.new_empty((slots, -(-(H // 2 + 1) // rows), R), dtype=torch.float32)
        profile = x.new_empty((B, R), dtype=torch.float32)
    kept = half is not None
    half = half if kept else x.new_empty((slots, _half_size(H, W)), dtype=torch.float32)
    if B:
        _native.extension.spectrum(  # type: ignore[union-attr]
            -1, 0,
            (B, C, H, W, R, half.shape[1], scratch.shape[1], threads, int(kept), int(log), int(shift), int(normalize),
             reg.operand(x), reg.operand(out), *addresses, half.data_ptr(), scratch.data_ptr(), _pointer(partial),
             _pointer(profile), 0, 0, 0, 0),
        )  # fmt: skip
    return profile


def _launch_cuda(
    x: torch.Tensor, out: torch.Tensor, log: bool, shift: bool, normalize: bool, R: int, half: Any, device: int,
    stream: int,
) -> torch.Tensor | None:  # fmt: skip
    B, C, H, W = x.shape
    tables = _device_tables(H, W, R > 0, x.device)
    kept, (wave, ranks) = half is not None, tables.together(B, H * W, device)
    if not kept:
        half = x.new_empty((wave, _half_size(H, W)), dtype=torch.float32)
    scratch = x.new_empty((tables.blocks, tables.scratch), dtype=torch.float32)
    partial = x.new_empty((B, tables.ring_parts, R), dtype=torch.float32) if R else None
    profile = x.new_empty((B, R), dtype=torch.float32) if R else None
    if B:
        _native.extension.spectrum(  # type: ignore[union-attr]
            device, stream,
            (B, C, H, W, R, half.shape[1], scratch.shape[1], 1, int(kept), int(log), int(shift), int(normalize),
             reg.operand(x), reg.operand(out), *tables.plans, 0, _pointer(tables.ring_size), half.data_ptr(),
             scratch.data_ptr(), _pointer(partial), _pointer(profile), *tables.positions, wave, ranks),
        )  # fmt: skip
    return profile


@dataclass(frozen=True)
class _DeviceTables:
    """What the CUDA kernels read, and how they divide an image (csrc/common/spectrum.h)."""

    plans: tuple[int, int, int, int]  # addresses: plan (on the host) and twiddles (on the device) of W, and of H
    positions: tuple[int, int]  # addresses on the device
    ring_size: torch.Tensor | None
    ring_parts: int
    scratch: int  # floats per block
    blocks: int  # that need them
    fits: bool  # an image fits into a block's shared memory
    cluster: int  # blocks of the cluster whose shared memory it fits into, or 0
    wave: int  # images whose half spectra fit into half the L2 cache of a large GPU
    alive: tuple[Any, ...]

    def together(self, B: int, size: int, device: int) -> tuple[int, int]:
        """How many of B images go together through two launches, or 0 and how many blocks do each in one; all to the
        same bits. Where there are few of some size, more blocks than images are faster. Clusters are asked for by
        FASTDIFF_SM90=1 (csrc/cuda/spectrum.cu says why)."""
        if self.fits and (size <= _TINY or B >= _MANY):
            return 0, 1
        if self.cluster and _native.extension.spectrum_clusters(device):  # type: ignore[union-attr]
            return 0, self.cluster
        return (0, 1) if self.fits and size <= _SMALL else (min(B, self.wave), 0)


_WAVE = 24 << 20  # bytes
_TINY = 32 * 32  # pixels
_SMALL = 80 * 80
_MANY = 64  # images


@on_device(
    "the tables of a spectrum of this size",
    lambda t: [a for a in t.alive if isinstance(a, torch.Tensor)],
    lambda t: sum(a.itemsize * len(a) if isinstance(a, array) else a.nbytes for a in t.alive),
)
def _device_tables(H: int, W: int, radial: bool, device: torch.device) -> _DeviceTables:
    """The plans, and their tables on a device."""
    alive: list[Any] = []
    plans, positions = [], []
    for n in (W, H):
        integers, table = plan(n)
        count = integers[2]
        place = torch.tensor(integers[4 + count :], dtype=torch.int32, device=device)
        twiddles = torch.tensor(table or [0.0], dtype=torch.float32, device=device)
        plans += [integers.buffer_info()[0], twiddles.data_ptr()]
        positions.append(place.data_ptr())
        alive += [integers, place, twiddles]
    ring_size = torch.from_numpy(_ring_table(H, W)[1]).to(device, copy=True) if radial else None
    layout = _native.extension.spectrum_layout(plans[0], plans[2])  # type: ignore[union-attr]
    parts, scratch, blocks, fits, cluster = layout
    wave = max(1, _WAVE // (4 * _half_size(H, W)))
    alive += [] if ring_size is None else [ring_size]
    return _DeviceTables(
        (plans[0], plans[1], plans[2], plans[3]), (positions[0], positions[1]), ring_size, parts, scratch,
        blocks if scratch else 0, fits, cluster, wave, tuple(alive),
    )  # fmt: skip


def _table_bytes(found: tuple[Any, int, Any]) -> int:
    return sum(t.itemsize * len(t.reshape(-1) if isinstance(t, np.ndarray) else t) for t in found[2])


@bounded(_table_bytes)
def _tables(H: int, W: int, radial: bool) -> tuple[tuple[int, ...], int, Any]:
    """Addresses of the plans and ring tables, floats of scratch per thread, and what must be kept alive."""
    tables = [*plan(W), *plan(H), *(_ring_table(H, W) if radial else ())]
    starts = (t.ctypes.data if isinstance(t, np.ndarray) else t.buffer_info()[0] for t in tables)
    addresses = (*starts, *(() if radial else (0, 0)))
    rows = max(2 * _LANES * W, _up(4 * rings(H, W)) if radial else 0)
    size = rows + 4 * _LANES * max(bluestein_length(H), bluestein_length(W)) + 4 * (_up(W) + 2 * _LANES)
    return addresses, size, tables


def _pointer(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _features_out(images: torch.Tensor) -> torch.Tensor:
    return images.new_empty((images.shape[0], images.shape[-2], images.shape[-1]))


def _radial_out(images: torch.Tensor) -> torch.Tensor:
    return images.new_empty((images.shape[0], rings(images.shape[-2], images.shape[-1])))


def _half_out(images: torch.Tensor) -> torch.Tensor:
    size = _half_size(images.shape[-2], images.shape[-1])
    return images.new_empty((images.shape[0], size), dtype=torch.float32)


def _features(images: torch.Tensor, log: bool, shift: bool) -> torch.Tensor:
    out = _features_out(images)
    _launch(images, out, log, shift, False, False)
    return out


def _features_kept(images: torch.Tensor, log: bool, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, half = _features_out(images), _half_out(images)
    _launch(images, out, log, shift, False, False, half)
    return out, half


def _radial(images: torch.Tensor, log: bool, normalize: bool) -> torch.Tensor:
    out = _radial_out(images)
    _launch(images, out, log, False, normalize, True)
    return out


def _radial_kept(
    images: torch.Tensor, log: bool, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    out, half = _radial_out(images), _half_out(images)
    profile = _launch(images, out, log, False, normalize, True, half)
    assert profile is not None
    return out, half, profile


# ---------------------------------------------------------------------------------------------------------- gradient


def _backward(
    grad: torch.Tensor, half: torch.Tensor, profile: torch.Tensor | None, shape: list[int], log: bool, shift: bool,
    normalize: bool,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the images, of `shape`, from what the forward pass kept."""
    out = grad.new_empty(shape)
    x = out if out.dim() == 4 else out.unsqueeze(1)
    B, C, H, W = x.shape
    radial = profile is not None
    threads = torch.get_num_threads()
    device, stream = _native.place(grad)
    if device >= 0:
        R, tables = rings(H, W) if radial else 0, _device_tables(H, W, radial, grad.device)
        wave, ranks = tables.together(B, H * W, device)
        work = torch.empty_like(half[:wave])
        scratch = x.new_empty((tables.blocks, tables.scratch), dtype=torch.float32)
        ring_grad = x.new_empty((B, R), dtype=torch.float32) if radial else None
        if B:
            _native.extension.spectrum_backward(  # type: ignore[union-attr]
                device, stream,
                (B, C, H, W, R, half.shape[1], tables.scratch, 1, int(log), int(shift), int(normalize),
                 reg.operand(grad), reg.operand(x), *tables.plans, 0, _pointer(tables.ring_size), half.data_ptr(),
                 _pointer(profile), work.data_ptr(), scratch.data_ptr(), *tables.positions, wave, ranks,
                 _pointer(ring_grad)),
            )  # fmt: skip
        return out
    addresses, size, _ = _tables(H, W, radial)
    scratch = x.new_empty((threads, size), dtype=torch.float32)
    work = torch.empty_like(half[: min(B, threads)])
    if B:
        _native.extension.spectrum_backward(  # type: ignore[union-attr]
            -1, 0,
            (B, C, H, W, rings(H, W) if radial else 0, half.shape[1], scratch.shape[1], threads, int(log), int(shift),
             int(normalize), reg.operand(grad), reg.operand(x), *addresses, half.data_ptr(), _pointer(profile),
             work.data_ptr(), scratch.data_ptr(), 0, 0, 0, 0, 0),
        )  # fmt: skip
    return out


class _Spectrum(torch.autograd.Function):
    """Both operators; `option` is the shift of the whole spectrum or the normalisation of the rings."""

    @staticmethod
    def forward(ctx, images, radial, log, option):  # type: ignore[no-untyped-def,override]
        profile = None
        if radial:
            out, half, profile = reg.call(_radial_kept_op, _radial_kept, images, log, option)
        else:
            out, half = reg.call(_features_kept_op, _features_kept, images, log, option)
        ctx.save_for_backward(images, half, profile)
        ctx.options = (radial, log, option)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        images, half, profile = ctx.saved_tensors
        radial, log, option = ctx.options
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised([grad]):
            # create_graph=True, or a backward pass that is itself vectorised
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                at = images if create_graph else images.detach().requires_grad_()
                result = (
                    radial_spectrum_reference(at, log=log, normalize=option)
                    if radial
                    else spectral_features_reference(at, log=log, shift=option)
                )
            return (*torch.autograd.grad(result, at, grad, create_graph=create_graph), None, None, None)
        shift, normalize = option and not radial, option and radial
        found = reg.call(
            _backward_op, _backward, grad, half, profile, list(images.shape), log, shift, normalize
        )  # fmt: skip
        return found, None, None, None


# ------------------------------------------------------------------------------------------------------ registration

_features_op = reg.define(
    "spectral_features", "Tensor images, bool log, bool shift", "Tensor", _features,
    lambda images, *_: _features_out(images),
)  # fmt: skip
_features_kept_op = reg.define(
    "spectral_features_kept", "Tensor images, bool log, bool shift", "(Tensor, Tensor)", _features_kept,
    lambda images, *_: (_features_out(images), _half_out(images)),
)  # fmt: skip
_radial_op = reg.define(
    "radial_spectrum", "Tensor images, bool log, bool normalize", "Tensor", _radial,
    lambda images, *_: _radial_out(images),
)  # fmt: skip
_radial_kept_op = reg.define(
    "radial_spectrum_kept", "Tensor images, bool log, bool normalize", "(Tensor, Tensor, Tensor)", _radial_kept,
    lambda images, *_: (
        _radial_out(images), _half_out(images), torch.empty_like(_radial_out(images), dtype=torch.float32)
    ),
)  # fmt: skip
_backward_op = reg.define(
    "spectrum_backward",
    "Tensor grad, Tensor half, Tensor? profile, SymInt[] shape, bool log, bool shift, bool normalize",
    "Tensor", _backward, lambda grad, half, profile, shape, *_: grad.new_empty(shape),
)  # fmt: skip
