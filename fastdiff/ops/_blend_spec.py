"""What tests, `fastdiff verify` and `fastdiff bench` know of box masks and blending."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _gaussian_plan as gp
from fastdiff.ops import _registry as reg
from fastdiff.ops import blend as page
from fastdiff.ops import boxes as box_page
from fastdiff.ops._adaln_spec import _BAD_OUT, _option, _replace
from fastdiff.ops._examples import dense, nbytes, randn
from fastdiff.ops._gaussian_spec import Operators, _opencv, sigma_of, take_sigma

_SIGMAS = [0.0, 0.3, 1.0, 2.0, 4.1]


def _corners(rng: random.Random, K: int) -> list[list[float]]:
    """Boxes of every kind: inside, across the edges, empty, the whole image."""
    kinds = [[0.0, 0.0, 1.0, 1.0], [0.6, 0.2, 0.4, 0.9], [-0.3, 0.5, 0.2, 1.7]]
    return [rng.choice(kinds) if rng.random() < 0.2 else [rng.random() for _ in range(4)] for _ in range(K)]


# ---------------------------------------------------------------------------------------------------------- box_mask


def _example_box(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    K = rng.choice([1, 2, 5])
    boxes = torch.tensor(_corners(rng, K), device=device).to(dtype)
    if rng.random() < 0.3:
        boxes = boxes.t().contiguous().t()
    size = (rng.choice([1, 2, 7, 19]), rng.choice([1, 3, 8, 33]))
    drawn = [rng.choice(_SIGMAS[1:]) * rng.uniform(0.9, 1.1) for _ in range(K)]
    return (boxes, size), {"sigma": torch.tensor(drawn, device=device)}


def _box_shape(K: int, n: int) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        boxes = torch.tensor(_corners(random.Random(0), K), device=device).to(dtype)
        return (boxes, (n, n)), {"sigma": torch.full((K,), 2.0, device=device)}

    return make


def _box_operators(size: Any, sigma: Any) -> Operators:
    return Operators(size, sigma, None, "reflect")


def _bound_box(dtype: torch.dtype, boxes: Any, size: Any, *, sigma: Any = 0.0) -> tuple[torch.Tensor, ...]:
    return (box_page.box_mask_reference(boxes, size, sigma=sigma).abs(),)


def _grad_bound_box(dtype: torch.dtype, grads: Any, boxes: Any, size: Any, *, sigma: Any = 0.0) -> dict[str, Any]:
    plain = box_page.box_mask_reference(boxes, size)
    return {"sigma": _box_operators(size, sigma).slope(plain, grads[0], sigma)}


reg.add(
    reg.OpSpec(
        name="box_mask",
        function=box_page.box_mask,
        reference=box_page.box_mask_reference,
        example=_example_box,
        lower=lambda boxes, size, *, sigma=0.0: (
            torch.ops.fastdiff.box_mask.default,
            (boxes, *box_page.check_number("box_mask", sigma, boxes, len(boxes)), *size,
             _native.DTYPES.get(boxes.dtype, 0)),
        ),
        decisive=lambda boxes, *_, **__: boxes,
        bound=_bound_box,
        grad_bound=_grad_bound_box,
        differentiable=("sigma",),
        growth=lambda boxes, size, *, sigma=0.0: math.sqrt(sum(size)),
        bad=[
            ("boxes of another shape", _replace(0, lambda t: t[:, :3]), ValueError, ("boxes", "[K, 4]")),
            ("a NaN corner", _replace(0, lambda t: t * float("nan")), ValueError, ("boxes", "NaN")),
            ("a NaN corner in a list", _replace(0, lambda t: [[0.0, 0.0, float("nan"), 1.0]] * len(t)), ValueError,
             ("boxes", "NaN")),
            ("boxes of integers", _replace(0, lambda t: t.long()), TypeError, ("boxes", "int64")),
            ("ragged boxes", _replace(0, lambda t: [[0.0, 1.0], [0.0]]), TypeError, ("boxes", "four numbers")),
            ("boxes are text", _replace(0, lambda t: "box"), TypeError, ("boxes", "str")),
            ("size is a number", _replace(1, lambda s: 5), TypeError, ("size", "pair")),
            ("size of floats", _replace(1, lambda s: (5.0, 5)), TypeError, ("size", "pair")),
            ("size 0", _replace(1, lambda s: (0, 5)), ValueError, ("size", "at least 1")),
            ("negative sigma", _option(sigma=-1.0), ValueError, ("sigma", "-1")),
            ("huge sigma", _option(sigma=1e9), ValueError, ("sigma", "131073")),
            ("sigma is text", _option(sigma="1"), TypeError, ("sigma", "str")),
            ("sigma of a wrong length", _option(sigma=torch.rand(77)), ValueError, ("sigma", "(77,)")),
        ],
        bytes=lambda boxes, size, **_: boxes.shape[0] * size[0] * size[1] * boxes.element_size(),
        flops=lambda boxes, size, **_: boxes.shape[0] * size[0] * size[1],
        shapes={
            f"K={K} {n}x{n}": _box_shape(K, n)
            for K, n in ((4, 128), (8, 512))
        },
        scaling={"side of the mask, K=4": (2.0, {n: _box_shape(4, n) for n in (64, 128, 256, 512, 1024)})},
        take=lambda b, args, kwargs: (
            (args[0][b : b + 1], args[1]), {"sigma": take_sigma(b, kwargs["sigma"], args[0].shape[0])}
        ),
        inplace=None,
        large="K=8 512x512",
        empty=[
            lambda dtype, device: (
                (torch.empty(0, 4, dtype=dtype, device=device), (5, 7)), {"sigma": torch.rand(0, device=device)},
            )
        ],
    )
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- gaussian_blend


def _example_blend(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    K, B, C = rng.choice([1, 2, 4, 5, 9]), rng.choice([1, 2, 3]), rng.choice([1, 2])
    H, W = rng.choice([1, 2, 7, 16]), rng.choice([1, 3, 8, 19, 33])
    kind = torch.float32 if rng.random() < 0.2 else dtype
    background, objects = randn(rng, (B, C, H, W), dtype, device), randn(rng, (K, B, C, H, W), kind, device)
    regions: Any = _corners(rng, K)
    if rng.random() < 0.5:
        regions = randn(rng, (K, H, W), rng.choice([dtype, torch.float32]), device).abs().clamp(max=1)
    return (background, objects, regions), {"sigma": sigma_of(rng, _SIGMAS, K, device)}


class _Terms:
    """Masks, what is added on the way to each result, and the same for the gradients; all in float64."""

    def __init__(self, background: Any, objects: Any, regions: Any, sigma: Any) -> None:
        K, (H, W) = objects.shape[0], background.shape[2:]
        self.operators = Operators((K, H, W), sigma, None, "reflect")
        self.given = isinstance(regions, torch.Tensor) and regions.dim() == 3
        self.plain = regions if self.given else box_page.box_mask_reference(
            torch.as_tensor(regions, dtype=torch.float64).reshape(-1, 4), (H, W))  # fmt: skip
        self.m = self.operators.apply(self.plain.abs()) if K else self.plain
        self.keep = 1 + self.m  # bounds |1 - m| and the rounding of m in it
        self.before = [background.abs()]
        for o, m, keep in zip(objects.abs(), self.m, self.keep, strict=True):
            self.before.append(self.before[-1] * keep + o * m)
        self.objects = objects.abs()


def _bound_blend(dtype: torch.dtype, background: Any, objects: Any, regions: Any, *, sigma: Any = 2.0) -> Any:
    return (_Terms(background, objects, regions, sigma).before[-1],)


def _grad_bound_blend(dtype: torch.dtype, grads: Any, background: Any, objects: Any, regions: Any, *,
                      sigma: Any = 2.0) -> dict[str, Any]:  # fmt: skip
    t = _Terms(background, objects, regions, sigma)
    g, dobjects, dmasks = grads[0].abs(), [], []
    for k in reversed(range(objects.shape[0])):
        dobjects.append(g * t.m[k])
        dmasks.append((g * (t.objects[k] + t.before[k])).sum((0, 1)))
        g = g * t.keep[k]
    found = {"background": g, "objects": torch.stack(dobjects[::-1]) if dobjects else objects.abs()}
    if objects.shape[0]:
        dm = torch.stack(dmasks[::-1])
        if t.given:
            found["regions"] = t.operators.apply(dm, transposed=True)
        if isinstance(sigma, torch.Tensor):
            found["sigma"] = t.operators.slope(t.plain, dm, sigma)
    elif t.given:
        found["regions"] = regions.abs()
    return found


def _growth_blend(background: Any, objects: Any, regions: Any, *, sigma: Any = 2.0) -> float:
    B, C = background.shape[:2]
    K, (H, W) = objects.shape[0], background.shape[2:]
    return K + math.sqrt(B * C) + 2 * Operators((K, H, W), sigma, None, "reflect").growth


def _conv_chain(background: Any, objects: Any, regions: Any, *, sigma: Any = 2.0) -> Any:
    """Mask by mask, as editing code does it: rasterise, blur with a dense K x K convolution, blend."""
    if isinstance(regions, torch.Tensor) or isinstance(sigma, torch.Tensor):
        raise ValueError("boxes in a list, one number for sigma")
    H, W = background.shape[2:]
    K = gp.support(sigma)
    w = gp.torch_taps(sigma, K, background.device).float()
    kernel = torch.outer(w, w)[None, None]
    if min(H, W) <= K // 2:
        raise ValueError("an image larger than the support")

    def run() -> torch.Tensor:
        result = background
        for (x1, y1, x2, y2), o in zip(regions, objects, strict=True):
            mask = torch.zeros(1, 1, H, W)
            mask[:, :, int(y1 * H) : int(y2 * H), int(x1 * W) : int(x2 * W)] = 1.0
            mask = F.conv2d(F.pad(mask, [K // 2] * 4, mode="reflect"), kernel).to(result.dtype)
            result = result * (1 - mask) + o * mask
        return result

    return run


def _opencv_chain(background: Any, objects: Any, regions: Any, *, sigma: Any = 2.0) -> Any:
    """The same chain, every mask blurred by OpenCV's separable filter."""
    if isinstance(regions, torch.Tensor) or isinstance(sigma, torch.Tensor) or background.dtype != torch.float32:
        raise ValueError("boxes in a list, one number for sigma, float32")
    H, W = background.shape[2:]
    blank = torch.zeros(1, 1, H, W)
    _opencv(blank, sigma)  # is it here?

    def run() -> torch.Tensor:
        result = background
        for (x1, y1, x2, y2), o in zip(regions, objects, strict=True):
            mask = torch.zeros(1, 1, H, W)
            mask[:, :, int(y1 * H) : int(y2 * H), int(x1 * W) : int(x2 * W)] = 1.0
            mask = _opencv(mask, sigma)()
            result = result * (1 - mask) + o * mask
        return result

    return run


_LAYOUT = [[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.8], [0.05, 0.5, 0.45, 0.95], [0.55, 0.05, 0.95, 0.4]]


def _blend_shape(K: int, shape: tuple[int, ...], masks: bool = False) -> Any:
    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        regions: Any = (_LAYOUT * K)[:K]
        if masks:
            regions = dense((K, *shape[2:]), dtype, device, 2).sigmoid()
        return (dense(shape, dtype, device), dense((K, *shape), dtype, device, 1), regions), {}

    return make


reg.add(
    reg.OpSpec(
        name="gaussian_blend",
        function=page.gaussian_blend,
        reference=page.gaussian_blend_reference,
        example=_example_blend,
        lower=lambda background, objects, regions, *, sigma=2.0: (
            torch.ops.fastdiff.gaussian_blend.default,
            _lower(background, objects, regions, sigma),
        ),
        decisive=lambda background, objects, regions, **_: (
            background, objects, regions if isinstance(regions, torch.Tensor) and regions.dim() == 3 else None
        ),
        bound=_bound_blend,
        grad_bound=_grad_bound_blend,
        differentiable=("background", "objects", "regions", "sigma"),
        growth=_growth_blend,
        bad=[
            ("background is None", _replace(0, lambda t: None), TypeError, ("background", "Tensor")),
            ("background of three dimensions", _replace(0, lambda t: t[0]), ValueError, ("background", "[B, C, H, W]")),
            ("objects of another shape", _replace(1, lambda t: t[..., :-1]), ValueError, ("objects", "shape")),
            ("objects of four dimensions", _replace(1, lambda t: t[0]), ValueError, ("objects", "shape")),
            ("objects of integers", _replace(1, lambda t: t.long()), TypeError, ("objects", "int64")),
            ("too few boxes", _replace(2, lambda r: r[:-1]), ValueError, ("regions", "boxes [")),
            ("boxes of three numbers", _replace(2, lambda r: torch.rand(4, 3)), ValueError, ("regions", "[K, 4]")),
            ("masks of another size", _replace(2, lambda r: torch.rand(4, 3, 3)), ValueError, ("regions", "masks [")),
            ("a NaN corner", _replace(2, lambda r: torch.full((4, 4), float("nan"))), ValueError, ("regions", "NaN")),
            ("regions are a number", _replace(2, lambda r: 3), TypeError, ("regions", "int")),
            ("negative sigma", _option(sigma=-1.0), ValueError, ("sigma", "-1")),
            ("sigma is text", _option(sigma="1"), TypeError, ("sigma", "str")),
            *_BAD_OUT,
        ],
        bytes=lambda background, objects, regions, **_: 2 * nbytes(background) + nbytes(objects) + nbytes(
            *reg.tensors_in(regions)),
        flops=lambda background, objects, regions, **_: 4 * objects.numel(),
        shapes={
            "K=4 (2,4,128,128)": _blend_shape(4, (2, 4, 128, 128)),
            "K=4 (2,4,128,128) masks": _blend_shape(4, (2, 4, 128, 128), masks=True),
            "K=8 (1,3,1024,1024)": _blend_shape(8, (1, 3, 1024, 1024)),
            "K=2 (4,4,64,64)": _blend_shape(2, (4, 4, 64, 64)),
        },
        scaling={
            "regions K, masks, (1,4,256,256)": (
                1.0, {K: _blend_shape(K, (1, 4, 256, 256), masks=True) for K in (1, 2, 4, 8, 16)}
            ),
            "side of the image, K=4": (2.0, {n: _blend_shape(4, (1, 4, n, n)) for n in (64, 128, 256, 512, 1024)}),
        },
        take=lambda b, args, kwargs: ((args[0][b : b + 1], args[1][:, b : b + 1], args[2]), kwargs),
        peers={"conv chain": _conv_chain, "OpenCV chain": _opencv_chain},
        large="K=4 (2,4,128,128) masks",
        empty=[
            lambda dtype, device: (
                (torch.empty(0, 2, 5, 5, dtype=dtype), torch.empty(2, 0, 2, 5, 5, dtype=dtype), torch.rand(2, 5, 5)), {}
            ),
            lambda dtype, device: (
                (torch.empty(1, 2, 0, 5, dtype=dtype), torch.empty(1, 1, 2, 0, 5, dtype=dtype), [[0.0, 0.0, 1.0, 1.0]]),
                {},
            ),
            lambda dtype, device: (
                (torch.rand(1, 2, 3, 5).to(dtype), torch.empty(0, 1, 2, 3, 5, dtype=dtype), []), {}
            ),
        ],
    )
)  # fmt: skip


def _lower(background: Any, objects: Any, regions: Any, sigma: Any) -> tuple[Any, ...]:
    masks, boxes = page._regions(background, objects, regions)
    tensor, value = box_page.check_number("gaussian_blend", sigma, background, objects.shape[0])
    if masks is not None:
        masks = masks.detach().float() if background.dtype != torch.float64 else masks.detach()
        return background, objects, masks, None, None, 0.0
    return background, objects, None, boxes, tensor, value
