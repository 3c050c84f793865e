"""What tests, `fastdiff verify` and `fastdiff bench` know of the Gaussian blur."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastdiff.ops import _gaussian_plan as gp
from fastdiff.ops import _registry as reg
from fastdiff.ops import gaussian as page
from fastdiff.ops._adaln_spec import _option, _replace
from fastdiff.ops._examples import dense, nbytes, randn

U = 2.0**-24  # unit roundoff of float32
# Of the sliding path, as a share of the largest |x|: two axes at 1.5e-6 by the fit (COSINES, SPREAD), and float32
# roundings of six recurrences between restarts, u sqrt(steps) of each amplitude: about 2e-6 for 1000 steps, and those
# of the K taps that a start sums, up to 4e-6 at sigma 4096 (a constant image); doubled for good measure. The largest
# measured over constants, noise, ramps and edges of 64 to 1024 pixels is 4.2e-6 (tests/test_gaussian.py).
SLIDING_ERROR = 1e-5


# ---------------------------------------------------------------------------------------------------------- examples


def sigma_of(rng: random.Random, values: list[float], count: int, device: torch.device) -> Any:
    """A number, or the same as a tensor [] or one value per sample, in a type that has nothing to do with x's."""
    kind = rng.choice(["number", "number", "scalar", "each", "each64"])
    if kind == "number":
        return rng.choice(values)
    # A tensor's values stay off the points where the support jumps, so that difference quotients make sense.
    drawn = [rng.choice([v for v in values if v > 0]) * rng.uniform(0.9, 1.1) for _ in range(count)]
    if kind == "scalar":
        return torch.tensor(drawn[0], device=device)
    return torch.tensor(drawn, device=device, dtype=torch.float64 if kind == "each64" else torch.float32)


def _example(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    kwargs: dict[str, Any] = {"border": rng.choice(list(gp.BORDERS))}
    B = rng.choice([1, 2, 3])
    if rng.random() < 0.2:  # the sliding path
        shape = rng.choice([(B, 64, 70), (B, 2, 81, 64)])
        return (randn(rng, shape, dtype, device), sigma_of(rng, [8.0, 9.3, 15.0], B, device)), kwargs
    H, W = rng.choice([1, 2, 5, 8, 19]), rng.choice([1, 2, 3, 7, 16, 33, 70])
    shape = rng.choice([(B, H, W), (B, 2, H, W), (B, 1, H, W), (B, 2, 2, H, W)])
    x = randn(rng, shape, dtype, device)
    if len(shape) == 4 and rng.random() < 0.2:
        x = x.contiguous(memory_format=torch.channels_last)
    sigma = sigma_of(rng, [0.0, 0.1, 0.5, 0.8, 1.0, 2.0, 3.7], B, device)
    if isinstance(sigma, float) and rng.random() < 0.3:
        sigma = (sigma, rng.choice([0.0, 0.7, 1.3]))
    size = rng.choice([None, None, 1, 3, 9, (3, 7)])
    return (x, sigma), {**kwargs, "kernel_size": size}


def take_sigma(b: int, sigma: Any, count: int) -> Any:
    per_sample = isinstance(sigma, torch.Tensor) and sigma.dim() == 1 and sigma.numel() == count
    return sigma[b : b + 1] if per_sample else sigma


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    x, sigma = args
    return (x[b : b + 1], take_sigma(b, sigma, x.shape[0])), kwargs


# ------------------------------------------------------------------------------------------------------------ bounds


def matrix(n: int, taps: np.ndarray, border: str) -> torch.Tensor:
    """The operator of one axis as a dense float64 [n, n], straight from the definition: row i gathers its taps."""
    where = gp.positions(n, taps.size // 2, border, torch.device("cpu")).numpy()
    A = np.zeros((n, n))
    for i in range(n):
        at = where[i : i + taps.size]
        np.add.at(A[i], at[at >= 0], taps[at >= 0])
    return torch.from_numpy(A)


class Operators:
    """Per sample: |Ay|, |Ax| and those of the derivatives by sigma, and whether the sliding path serves."""

    def __init__(self, shape: Any, sigma: Any, kernel_size: Any, border: str) -> None:
        H, W = shape[-2:]
        values = [float(s) for s in sigma.reshape(-1)] if isinstance(sigma, torch.Tensor) else [sigma]
        sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        self.rows, self.growth, self.sliding = [], 0.0, False
        for value in values:
            pair = value if isinstance(value, (tuple, list)) else (value, value)
            found = []
            for n, s, k in zip((H, W), pair, sizes, strict=True):
                w, slope = gp.taps(float(s), k or gp.support(float(s)))
                found.append((matrix(n, w, border), matrix(n, np.abs(slope), border)))
                self.growth = max(self.growth, math.sqrt(w.size))
            self.rows.append(found)
            wide = kernel_size is None and min(abs(float(s)) for s in pair) >= gp.SLIDING_SIGMA
            wide = wide and max(abs(float(s)) for s in pair) <= gp.SLIDING_LARGEST
            self.sliding = self.sliding or (wide and min(H, W) >= gp.SLIDING_SIDE)

    def apply(self, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """The blur of non-negative x [B, ..., H, W], or its transpose, with what the sliding path may add."""
        parts = []
        for b, part in enumerate(x if len(self.rows) > 1 else [x]):
            (Ay, _), (Ax, _) = self.rows[b]
            parts.append(Ay.T @ part @ Ax if transposed else Ay @ part @ Ax.T)
        result = torch.stack(parts) if len(self.rows) > 1 else parts[0]
        if self.sliding and x.numel():
            result = result + SLIDING_ERROR * (1 + transposed) * x.abs().max() / ((4 + 2 * self.growth) * U)
        return result

    def slope(self, x: torch.Tensor, g: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Magnitude of the gradient to sigma."""
        x, g = x.abs(), g.abs()
        found = []
        each = sigma.numel() > 1
        for b, row in enumerate(self.rows):
            (Ay, dy), (Ax, dx) = row
            part = x[b] if each else x
            change = dy @ part @ Ax.T + Ay @ part @ dx.T
            found.append(((g[b] if each else g) * change).sum())
        return torch.stack(found).reshape(sigma.shape)


def _bound(dtype: torch.dtype, x: Any, sigma: Any, *, kernel_size: Any = None, border: str = "reflect") -> Any:
    return (Operators(x.shape, sigma, kernel_size, border).apply(x.abs()),)


def _grad_bound(dtype: torch.dtype, grads: Any, x: Any, sigma: Any, *, kernel_size: Any = None,
                border: str = "reflect") -> dict[str, Any]:  # fmt: skip
    operators = Operators(x.shape, sigma, kernel_size, border)
    found = {"x": operators.apply(grads[0].abs(), transposed=True)}
    if isinstance(sigma, torch.Tensor):
        found["sigma"] = operators.slope(x, grads[0], sigma)
    return found


def _growth(x: Any, sigma: Any, *, kernel_size: Any = None, border: str = "reflect") -> float:
    return 2 * Operators(x.shape, sigma, kernel_size, border).growth  # two passes of K roundings each


# --------------------------------------------------------------------------------------------- baselines and peers


def conv_blur(x: torch.Tensor, sigma: Any, *, kernel_size: Any = None, border: str = "reflect") -> torch.Tensor:
    """The reference as two depthwise convolutions, which is what `torch.compile` does best with."""
    if isinstance(sigma, torch.Tensor):
        raise ValueError("a number for sigma")
    sy, sx = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    ky, kx = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    wy = gp.torch_taps(sy, ky or gp.support(sy), x.device).to(x.dtype)
    wx = gp.torch_taps(sx, kx or gp.support(sx), x.device).to(x.dtype)
    planes = x.reshape(-1, 1, *x.shape[-2:])
    for w, dim in ((wy, 2), (wx, 3)):
        r = w.numel() // 2
        where = gp.positions(planes.shape[dim], r, "reflect" if border == "constant" else border, x.device)
        if border == "constant":
            planes = F.pad(planes, (0, 0, r, r) if dim == 2 else (r, r))
        else:
            planes = planes.index_select(dim, where)
        planes = F.conv2d(planes, w.reshape((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)))
    return planes.reshape(x.shape)


def _plain_call(x: Any, sigma: Any, kernel_size: Any, dtypes: tuple[torch.dtype, ...]) -> tuple[float, int]:
    if isinstance(sigma, (tuple, torch.Tensor)) or isinstance(kernel_size, tuple) or x.dtype not in dtypes:
        raise ValueError("one number for sigma, float32")
    return float(sigma), kernel_size or gp.support(sigma)


def _opencv(x: Any, sigma: Any, *, kernel_size: Any = None, border: str = "reflect") -> Callable[[], Any]:
    """cv2.GaussianBlur of the images, channels last, with as many threads as torch."""
    import cv2

    s, k = _plain_call(x, sigma, kernel_size, (torch.float32,))
    rules = {"reflect": cv2.BORDER_REFLECT_101, "symmetric": cv2.BORDER_REFLECT, "replicate": cv2.BORDER_REPLICATE,
             "constant": cv2.BORDER_CONSTANT}  # fmt: skip
    if border not in rules or x.dim() != 4 or x.shape[1] > 4:
        raise ValueError("images of 1 to 4 channels, no circular border")
    images = [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in x]

    def run() -> Any:
        cv2.setNumThreads(torch.get_num_threads())
        found = [cv2.GaussianBlur(i, (k, k), s, sigmaY=s, borderType=rules[border]) for i in images]
        return torch.stack([torch.from_numpy(f.reshape(i.shape)) for f, i in zip(found, images, strict=True)]).permute(
            0, 3, 1, 2
        )

    return run if x.shape[0] > 1 else lambda: _opencv_one(cv2, images[0], k, s, rules[border])


def _opencv_one(cv2: Any, image: Any, k: int, s: float, rule: Any) -> Any:
    cv2.setNumThreads(torch.get_num_threads())
    found = cv2.GaussianBlur(image, (k, k), s, sigmaY=s, borderType=rule)
    return torch.from_numpy(found.reshape(image.shape)).permute(2, 0, 1)[None]


def _scipy(x: Any, sigma: Any, *, kernel_size: Any = None, border: str = "reflect") -> Callable[[], Any]:
    """scipy.ndimage.gaussian_filter; one thread."""
    from scipy.ndimage import gaussian_filter

    s, k = _plain_call(x, sigma, kernel_size, (torch.float32,))
    mode = {"reflect": "mirror", "symmetric": "reflect", "replicate": "nearest", "constant": "constant",
            "circular": "wrap"}[border]  # fmt: skip
    array = x.numpy()
    sigmas = [0.0] * (x.dim() - 2) + [s, s]
    return lambda: torch.from_numpy(gaussian_filter(array, sigmas, mode=mode, radius=k // 2))


def _kornia(x: Any, sigma: Any, *, kernel_size: Any = None, border: str = "reflect") -> Callable[[], Any]:
    """kornia.filters.gaussian_blur2d, separable."""
    from kornia.filters import gaussian_blur2d

    s, k = _plain_call(x, sigma, kernel_size, (torch.float32, torch.bfloat16, torch.float16))
    if border == "symmetric" or x.dim() != 4 or k // 2 >= min(x.shape[-2:]):
        raise ValueError("[B, C, H, W] larger than the support, no symmetric border")
    return lambda: gaussian_blur2d(x, (k, k), (s, s), border_type=border)


def _shape(size: tuple[int, ...], sigma: float) -> Callable[..., reg.Call]:
    return lambda dtype, device: ((dense(size, dtype, device), sigma), {})


def _exact_shape(size: tuple[int, ...], sigma: float) -> Callable[..., reg.Call]:
    """With the support given, which insists on the exact sum."""
    return lambda dtype, device: ((dense(size, dtype, device), sigma), {"kernel_size": int(6 * sigma) | 1})


_BAD: list[Any] = [
    ("x is a list", _replace(0, lambda t: [1.0]), TypeError, ("x", "Tensor", "list")),
    ("x of an integer type", _replace(0, lambda t: t.to(torch.int32)), TypeError, ("x", "int32")),
    ("x of one dimension", _replace(0, lambda t: t.reshape(-1)), ValueError, ("x", "[..., H, W]")),
    ("unknown border", _option(border="wrap"), ValueError, ("border", "'wrap'")),
    ("border is no text", _option(border=3), ValueError, ("border", "3")),
    ("even kernel_size", _option(kernel_size=4), ValueError, ("kernel_size", "odd", "4")),
    ("kernel_size 0", _option(kernel_size=0), ValueError, ("kernel_size", "odd", "0")),
    ("negative kernel_size", _option(kernel_size=(3, -1)), ValueError, ("kernel_size", "-1")),
    ("kernel_size of three", _option(kernel_size=(3, 3, 3)), ValueError, ("kernel_size", "pair")),
    ("kernel_size is a float", _option(kernel_size=3.0), TypeError, ("kernel_size", "3.0")),
    ("huge kernel_size", _option(kernel_size=10**9 + 1), ValueError, ("kernel_size", "131073")),
    ("negative sigma", _replace(1, lambda s: -1.0), ValueError, ("sigma", "-1")),
    ("sigma is NaN", _replace(1, lambda s: float("nan")), ValueError, ("sigma", "nan")),
    ("sigma is infinite", _replace(1, lambda s: (1.0, float("inf"))), ValueError, ("sigma", "inf")),
    ("huge sigma", _replace(1, lambda s: 1e30), ValueError, ("sigma", "131073")),
    ("huge sigma in a tensor", _replace(1, lambda s: torch.tensor(1e30)), ValueError, ("sigma", "131073")),
    ("sigma is text", _replace(1, lambda s: "2"), TypeError, ("sigma", "str")),
    ("sigma of an integer type", _replace(1, lambda s: torch.tensor(2)), TypeError, ("sigma", "int64")),
    ("sigma of a wrong length", _replace(1, lambda s: torch.rand(7)), ValueError, ("sigma", "(7,)")),
    ("three sigmas", _replace(1, lambda s: (1.0, 2.0, 3.0)), TypeError, ("sigma", "tuple")),
]  # fmt: skip


def _lower(x: Any, sigma: Any, *, kernel_size: Any = None, border: str = "reflect") -> tuple[Any, tuple[Any, ...]]:
    tensor, sy, sx, ky, kx = page._check(x, sigma, kernel_size, border)
    return torch.ops.fastdiff.gaussian_blur.default, (x, tensor, sy, sx, ky, kx, gp.BORDERS[border])


reg.add(
    reg.OpSpec(
        name="gaussian_blur",
        function=page.gaussian_blur,
        reference=page.gaussian_blur_reference,
        example=_example,
        lower=_lower,
        decisive=lambda x, *_, **__: x,
        bound=_bound,
        grad_bound=_grad_bound,
        differentiable=("x", "sigma"),
        growth=_growth,
        bad=_BAD,
        bytes=lambda x, sigma, **_: 2 * nbytes(x),
        flops=lambda x, sigma, *, kernel_size=None, **_: 4 * (kernel_size or gp.support(sigma)) * x.numel(),
        shapes={
            "[1,1,1024,1024] sigma 2": _shape((1, 1, 1024, 1024), 2.0),
            "[1,3,1024,1024] sigma 2": _shape((1, 3, 1024, 1024), 2.0),
            "[1,1,1024,1024] sigma 32": _shape((1, 1, 1024, 1024), 32.0),
            "[1,3,1024,1024] sigma 32": _shape((1, 3, 1024, 1024), 32.0),
            "[4,3,300,300] sigma 8": _shape((4, 3, 300, 300), 8.0),
        },
        scaling={
            "sigma, exact, 512 x 512": (
                1.0,
                {n: _exact_shape((1, 1, 512, 512), float(n)) for n in (1, 2, 4, 8, 16, 32)},
            ),
            # The starting sums of a column are 6 sigma taps: they show where the support nears the image.
            "sigma, sliding, 2048 x 2048": (
                0.0,
                {n: _shape((1, 1, 2048, 2048), float(n)) for n in (8, 16, 32, 64, 128)},
            ),
            "side of the image, sigma 2": (
                2.0,
                {n: _shape((1, 1, n, n), 2.0) for n in (64, 128, 256, 512, 1024, 2048)},
            ),
        },
        take=_take,
        peers={"OpenCV": _opencv, "SciPy": _scipy, "kornia": _kornia},
        large="[4,3,300,300] sigma 8",
        empty=[
            lambda dtype, device: ((torch.empty(0, 3, 5, 5, dtype=dtype, device=device), 1.0), {}),
            lambda dtype, device: (
                (torch.empty(2, 0, 5, 5, dtype=dtype, device=device), torch.rand(2, device=device)),
                {},
            ),
            lambda dtype, device: ((torch.empty(2, 1, 0, 5, dtype=dtype, device=device), 2.0), {"border": "circular"}),
            lambda dtype, device: ((torch.empty(2, 1, 5, 0, dtype=dtype, device=device), 2.0), {"border": "constant"}),
        ],
        compiled=conv_blur,
    )
)
