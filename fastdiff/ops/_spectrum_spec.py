"""What tests, `fastdiff verify` and `fastdiff bench` know of the spectra."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch

from fastdiff.ops import _registry as reg
from fastdiff.ops import spectrum
from fastdiff.ops._examples import dense, nbytes, randn

# ---------------------------------------------------------------------------------------------------------- examples

_LENGTHS = [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 20, 31, 32, 33, 36, 64, 67, 100]


def _images(rng: random.Random, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    B, H, W = rng.choice([1, 2, 3]), rng.choice(_LENGTHS), rng.choice(_LENGTHS)
    shape = rng.choice([(B, 3, H, W), (B, 3, H, W), (B, 1, H, W), (B, H, W)])
    return randn(rng, shape, dtype, device) + rng.choice([0.0, 0.5])


def _example(option: str) -> Callable[..., reg.Call]:
    def make(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
        return (_images(rng, dtype, device),), {"log": rng.random() < 0.5, option: rng.random() < 0.5}

    return make


# ------------------------------------------------------------------------------------------------------------ bounds
# What a pass of radix r computes is a sum of r numbers with weights of modulus 1, rounded to log2(r) units (sqrt(r)
# where they are summed one by one) of the numbers' size. A value of a pass after which G-th parts of the spectrum are
# still to be combined into G frequencies, n/G apart, is the mean of those with weights of modulus 1; its error reaches
# all G of them, and each of them G such errors, which are independent. So a pass costs frequency k log2(r) units of
# the root mean square of |F| over the group of k: over everything for the first pass (that is ||gray||_2, and not
# sum |gray|, which is sqrt(H W) times larger), over a few neighbours of a strong DC for the last. `_growth` counts the
# units, `_transform` averages the sizes.


def _passes(n: int) -> list[tuple[int, float]]:
    """(group, units) of every pass of length n, last first; for Bluestein's two transforms one group of everything."""
    m = spectrum.bluestein_length(n)
    if m:  # and three multiplications; what is cut off was as large as what is kept
        return [(0, 2 * sum(units for _, units in _passes(m)) + 3)]
    found, group = [], 1
    for r in reversed(spectrum.factor(n)):
        group *= r
        found.append((group, math.log2(r) if r <= 8 else math.sqrt(r)))
    return found


def _growth(images: torch.Tensor, **_: Any) -> float:
    return sum(units for n in images.shape[-2:] for _, units in _passes(n))


def _transform(F: torch.Tensor) -> torch.Tensor:
    """[B, H, W]: the magnitude of the errors of a transform with results of size F."""
    H, W = F.shape[-2:]
    square = F.square()
    if W % 2 == 0:  # the DC and the Nyquist column are transformed as one
        square = square.clone()
        square[..., 0] = square[..., W // 2] = square[..., 0] + square[..., W // 2]
    total, count = torch.zeros_like(F), 0.0
    # Errors of the rows' transforms, which come first, are spread over all of a column.
    for axis, n, power in ((-1, W, square.mean(-2, keepdim=True).expand_as(F)), (-2, H, square)):
        for group, units in _passes(n):
            if group:
                mean = power.unflatten(axis, (group, n // group)).mean(axis - 1, keepdim=True)
                size = mean.expand(*(power.unflatten(axis, (group, n // group)).shape)).flatten(axis - 1, axis)
            else:  # the groups of Bluestein's lengths are not those of n
                size = power.amax(axis, keepdim=True).expand_as(F)
            total = total + units * size.sqrt()
            count += units
    return total / max(count, 1.0)


class _Bounds:
    """Float64, DC first: `F` the spectrum, `norm` its magnitude, `value` the feature, `of` the magnitude of that."""

    def __init__(self, images: torch.Tensor, log: bool) -> None:
        channels = images if images.dim() == 3 else images[:, 0]
        parts = [torch.fft.fft2(channels)]
        if images.dim() == 4 and images.shape[1] == 3:
            parts = [torch.fft.fft2(w * images[:, c]) for c, w in enumerate(spectrum.GRAY)]
        self.F = sum(parts[1:], parts[0]).abs()
        # The weights of the channels are rounded, the same way for every pixel.
        apart = torch.stack([part.abs() for part in parts]).sum(0)
        self.norm = _transform(self.F) + apart
        self.value = torch.log1p(self.F) if log else self.F
        # d log(1 + m) / dm = 1 / (1 + m); the logarithm costs a unit of its own.
        self.of = self.norm / (1 + self.F) + self.value if log else self.norm

    def phase(self, growth: float) -> torch.Tensor:
        """Error of F / |F|: that of F over |F|, at most 2 however it is computed."""
        return torch.clamp(self.norm / self.F, max=2 / ((4 + growth) * 2.0**-24)) + 1


def _ring(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ring of every frequency [H W], and the size of each ring."""
    H, W = images.shape[-2:]
    ky, kx = torch.arange(H), torch.arange(W)
    ky, kx = torch.minimum(ky, H - ky), torch.minimum(kx, W - kx)
    ring = (ky[:, None] ** 2 + kx[None, :] ** 2).double().sqrt().long().flatten().to(images.device)
    return ring, torch.bincount(ring).double()


def _mean(ring: torch.Tensor, sizes: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return m.new_zeros(m.shape[0], sizes.numel()).index_add(1, ring, m.flatten(1)) / sizes


def _bound_features(
    dtype: torch.dtype, images: Any, *, log: bool = False, shift: bool = True
) -> tuple[torch.Tensor, ...]:
    of = _Bounds(images, log).of
    return (torch.fft.fftshift(of, dim=(-2, -1)) if shift else of,)


def _bound_radial(
    dtype: torch.dtype, images: Any, *, log: bool = False, normalize: bool = False
) -> tuple[torch.Tensor, ...]:
    bounds, (ring, sizes) = _Bounds(images, log), _ring(images)
    # Errors of a ring's members at their worst, and those of adding them up.
    of = _mean(ring, sizes, bounds.of) + _mean(ring, sizes, bounds.value) * sizes.sqrt()
    if not normalize:
        return (of,)
    profile = _mean(ring, sizes, bounds.value)
    total = profile.sum(1, keepdim=True)
    return ((of + profile * of.sum(1, keepdim=True) / total) / total,)


def _weights(images: torch.Tensor, gray: torch.Tensor) -> torch.Tensor:
    """The magnitude of every channel's gradient, from that of gray."""
    if images.dim() == 3:
        return gray.expand(images.shape)
    weights = spectrum.GRAY if images.shape[1] == 3 else (1.0,)
    return torch.stack([w * gray for w in weights], dim=1).expand(images.shape)


def _pixels(bounds: _Bounds, growth: float, up: torch.Tensor, up_error: torch.Tensor, log: bool) -> torch.Tensor:
    """The magnitude of the gradient of gray [B, 1, 1]: the 2-norm of what is transformed, as for F above.

    up: gradients of the features [B, H, W], DC first; up_error: the magnitude of their error.
    """
    slope = 1 / (1 + bounds.F) if log else 1.0
    # The slope's own error: d (1 / (1 + m)) = error of m / (1 + m)^2.
    steep = 1 + bounds.norm / (1 + bounds.F) if log else 1.0
    each = (up.abs() * bounds.phase(growth) * steep + up_error) * slope
    return torch.linalg.vector_norm(each, dim=(-2, -1), keepdim=True)


def _grad_bound_features(
    dtype: torch.dtype, grads: Any, images: Any, *, log: bool = False, shift: bool = True
) -> dict[str, Any]:
    up = torch.fft.ifftshift(grads[0], dim=(-2, -1)) if shift else grads[0]
    gray = _pixels(_Bounds(images, log), _growth(images), up, torch.zeros_like(up), log)
    return {"images": _weights(images, gray)}


def _grad_bound_radial(
    dtype: torch.dtype, grads: Any, images: Any, *, log: bool = False, normalize: bool = False
) -> dict[str, Any]:
    bounds, (ring, sizes), up = _Bounds(images, log), _ring(images), grads[0].abs()
    error = up
    if normalize:
        profile = _mean(ring, sizes, bounds.value)
        total = profile.sum(1, keepdim=True)
        (of,) = _bound_radial(dtype, images, log=log)
        share = profile / total
        # (up - up . share) / total: both terms, their condition, and that of the total.
        up = (up + (up * share).sum(1, keepdim=True)) / total
        relative = of.sum(1, keepdim=True) / total
        error = up * (1 + relative) + (grads[0].abs() * of / total).sum(1, keepdim=True) / total
    up, error = ((t / sizes)[:, ring].reshape(bounds.F.shape) for t in (up, error))
    return {"images": _weights(images, _pixels(bounds, _growth(images), up, error, log))}


# --------------------------------------------------------------------------------------------------------- bad calls


def _given(change: Callable[[torch.Tensor], Any]) -> Callable[..., reg.Call]:
    return lambda args, kwargs: ((change(args[0]),), kwargs)


def _bad(option: str) -> list[Any]:
    return [
        ("images of 2 dimensions", _given(lambda t: t[0, 0]), ValueError, ("images", "[B, 3, H, W]")),
        ("images of 2 channels", _given(lambda t: t[:, :2]), ValueError, ("images", "[B, 3, H, W]", "2")),
        ("images of no height", _given(lambda t: t[:, :, :0]), ValueError, ("images", "H, W >= 1", "0")),
        ("images of no width", _given(lambda t: t[..., :0]), ValueError, ("images", "H, W >= 1", "0")),
        ("images is a list", _given(lambda t: [1.0]), TypeError, ("images", "Tensor", "list")),
        ("images of an integer type", _given(lambda t: t.to(torch.uint8)), TypeError, ("images", "uint8")),
        ("images is complex", _given(lambda t: t.to(torch.complex64)), TypeError, ("images", "complex64")),
        ("images is sparse", _given(lambda t: t.to_sparse()), TypeError, ("images", "dense")),
        ("log is a number", lambda a, k: (a, {**k, "log": 1}), TypeError, ("log", "bool", "int")),
        (f"{option} is text", lambda a, k: (a, {**k, option: "yes"}), TypeError, (option, "bool", "str")),
    ]


# ------------------------------------------------------------------------------------------- benchmark shapes and peers

_SIZES = {
    "[16,3,256,256]": (16, 3, 256, 256),
    "[1,3,256,256]": (1, 3, 256, 256),
    "[64,3,64,64]": (64, 3, 64, 64),
    "[16,3,255,255]": (16, 3, 255, 255),
    "[16,3,257,257]": (16, 3, 257, 257),  # a prime
    "[16,3,512,512]": (16, 3, 512, 512),
    "[2,3,1024,1024]": (2, 3, 1024, 1024),
}


def _shapes(**kwargs: Any) -> dict[str, Any]:
    def call(size: tuple[int, ...]) -> Callable[..., reg.Call]:
        return lambda dtype, device: ((dense(size, dtype, device),), dict(kwargs))

    return {name: call(size) for name, size in _SIZES.items()}


def _scaling(**kwargs: Any) -> dict[str, Any]:
    def call(side: int) -> Callable[..., reg.Call]:
        return lambda dtype, device: ((dense((2, 3, side, side), dtype, device),), dict(kwargs))

    # 2 and the logarithm, which is 0.1 to 0.2 of an exponent here
    return {"side of the image": (2.0, {side: call(side) for side in (32, 64, 128, 256, 512, 1024)})}


def _flops(images: torch.Tensor, **_: Any) -> int:
    H, W = images.shape[-2:]
    return int(images.shape[0] * H * W * (5 + 2.5 * math.log2(max(H * W, 2))))


def _gray(images: Any) -> Any:
    x = images.float()
    if x.dim() == 3 or x.shape[1] == 1:
        return x.reshape(x.shape[0], *x.shape[-2:])
    r, g, b = spectrum.GRAY
    return (x[:, 0] * r).add_(x[:, 1], alpha=g).add_(x[:, 2], alpha=b)


def _whole(half: Any, W: int, shift: bool) -> Any:
    """The whole magnitudes [B, H, W] from those of columns 0 .. W//2: row -ky, backwards, is the other half."""
    H, rest = half.shape[-2], (W - 1) // 2  # `rest` columns are mirror images
    out = half.new_empty(half.shape[0], H, W)
    mirrored = half[..., 1 : rest + 1].flip(-2, -1)  # row i is row -1 - i
    rows, columns = (H // 2, W // 2) if shift else (0, 0)
    own = (W + 1) // 2  # columns kx >= 0 without Nyquist
    first = columns - rest if shift else W - rest
    for to, count, ky in ((rows, H - rows, 0), (0, rows, H - rows)):
        target, source = out[:, to : to + count], half[:, ky : ky + count]
        target[..., columns : columns + own] = source[..., :own]
        if W % 2 == 0:
            target[..., 0 if shift else W // 2] = source[..., W // 2]
        if ky == 0 and count:  # row 0 is its own mirror image
            target[:, 0, first : first + rest] = mirrored[:, H - 1]
            target[:, 1:, first : first + rest] = mirrored[:, : count - 1]
        else:
            target[..., first : first + rest] = mirrored[:, ky - 1 : ky - 1 + count]
    return out


def _torch_rfft2(images: Any, *, log: bool = False, shift: bool = True) -> Callable[[], Any]:
    def run() -> Any:
        half = torch.fft.rfft2(_gray(images)).abs()
        half = half.log1p_() if log else half
        return _whole(half, images.shape[-1], shift).to(images.dtype)

    return run


def _scipy_rfft2(images: Any, *, log: bool = False, shift: bool = True) -> Callable[[], Any]:
    from scipy import fft

    def run() -> Any:
        spectra = fft.rfft2(_gray(images).numpy(), workers=torch.get_num_threads(), overwrite_x=True)
        half = torch.from_numpy(spectra).abs()
        half = half.log1p_() if log else half
        return _whole(half, images.shape[-1], shift).to(images.dtype)

    return run


def _torch_rfft2_rings(images: Any, *, log: bool = False, normalize: bool = False) -> Callable[[], Any]:
    """The half spectrum's magnitudes against a sparse table of weights, made once."""
    H, W = images.shape[-2:]
    ring, sizes = _ring(images)
    K = W // 2 + 1
    ring = ring.reshape(H, W)[:, :K].flatten()
    kx = torch.arange(K)
    twice = torch.where((kx == 0) | (2 * kx == W), 1.0, 2.0).expand(H, K).flatten()
    weight = (twice / sizes.float()[ring]).contiguous()

    def run() -> Any:
        half = torch.fft.rfft2(_gray(images)).abs()
        half = (half.log1p_() if log else half).flatten(1) * weight
        profile = half.new_zeros(half.shape[0], sizes.numel()).index_add_(1, ring, half)
        return (profile / profile.sum(1, keepdim=True) if normalize else profile).to(images.dtype)

    return run


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    return (args[0][b : b + 1],), kwargs


_EMPTY = [
    lambda dtype, device: ((torch.zeros(0, 3, 8, 8, dtype=dtype, device=device),), {}),
    lambda dtype, device: ((torch.zeros(0, 5, 7, dtype=dtype, device=device),), {"log": True}),
]

reg.add(
    reg.OpSpec(
        name="spectral_features",
        function=spectrum.spectral_features,
        reference=spectrum.spectral_features_reference,
        example=_example("shift"),
        lower=lambda images, *, log=False, shift=True: (
            torch.ops.fastdiff.spectral_features.default, (images, log, shift),
        ),
        bound=_bound_features,
        grad_bound=_grad_bound_features,
        differentiable=("images",),
        growth=_growth,
        bad=_bad("shift"),
        bytes=lambda images, **_: nbytes(images) + images[..., 0, 0].numel() // (images.shape[1] if images.dim() == 4
                                                                                else 1)
        * images.shape[-2] * images.shape[-1] * images.element_size(),
        flops=_flops,
        shapes=_shapes(),
        scaling=_scaling(),
        take=_take,
        peers={"torch rfft2": _torch_rfft2, "scipy rfft2": _scipy_rfft2},
        inplace=None,
        large="[16,3,256,256]",
        empty=_EMPTY,
        exact_infinity=False,
    )
)  # fmt: skip

reg.add(
    reg.OpSpec(
        name="radial_spectrum",
        function=spectrum.radial_spectrum,
        reference=spectrum.radial_spectrum_reference,
        example=_example("normalize"),
        lower=lambda images, *, log=False, normalize=False: (
            torch.ops.fastdiff.radial_spectrum.default, (images, log, normalize),
        ),
        bound=_bound_radial,
        grad_bound=_grad_bound_radial,
        differentiable=("images",),
        growth=_growth,
        bad=_bad("normalize"),
        bytes=lambda images, **_: nbytes(images),
        flops=_flops,
        shapes=_shapes(log=True),
        scaling=_scaling(log=True),
        take=_take,
        peers={"torch rfft2": _torch_rfft2_rings},
        inplace=None,
        large="[16,3,256,256]",
        empty=_EMPTY,
        exact_infinity=False,
    )
)  # fmt: skip
