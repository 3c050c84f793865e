"""Blur, box masks and blending against constructions of their own: index maps, plain loops, the extremes."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import _native
from fastdiff.ops import _gaussian_plan as gp
from fastdiff.ops import box_mask, gaussian_blend, gaussian_blur
from fastdiff.ops._cache import BUDGET, bounded
from fastdiff.ops._gaussian_spec import SLIDING_ERROR, matrix
from fastdiff.ops.boxes import box_mask_reference
from fastdiff.ops.gaussian import gaussian_blur_reference

ISAS = _native.isas()
every_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("none", marks=pytest.mark.skip("no extension"))])
BORDERS = list(gp.BORDERS)
U = 2.0**-24


def walk(v: int, n: int, border: str) -> int:
    """The sample at position v, by walking back one reflection at a time; -1 for a zero."""
    while not 0 <= v < n:
        if border == "constant":
            return -1
        if border == "replicate":
            v = min(max(v, 0), n - 1)
        elif border == "circular":
            v += n if v < 0 else -n
        elif border == "symmetric":
            v = -1 - v if v < 0 else 2 * n - 1 - v
        elif n == 1:
            v = 0
        else:
            v = -v if v < 0 else 2 * (n - 1) - v
    return v


@functools.cache
def dense(n: int, sigma: float, size: int, border: str) -> np.ndarray:
    """The operator of one axis, [n, n]: the formula of the documentation, tap by tap."""
    r = size // 2
    weights = [math.exp(-k * k / (2 * sigma * sigma)) if sigma else float(k == 0) for k in range(-r, r + 1)]
    where = np.array([walk(v, n, border) for v in range(-r, n + r)])
    A = np.zeros((n, n))
    for t, w in enumerate(weights):
        j = where[t : t + n]
        np.add.at(A, (np.arange(n)[j >= 0], j[j >= 0]), w / sum(weights))
    return A


def construct(x: torch.Tensor, sigma: float, size: int, border: str) -> torch.Tensor:
    Ay, Ax = (torch.from_numpy(dense(n, sigma, size, border)) for n in x.shape[-2:])
    return Ay @ x.double() @ Ax.T


SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 40), (17, 33), (40, 5)]


@every_isa
@pytest.mark.parametrize("border", BORDERS)
def test_every_border_equals_its_index_map(border: str, isa: str) -> None:
    """Images of one pixel, one row, one column, and smaller than the support; values and gradients."""
    with _native.use_isa(isa):
        for (H, W), sigma in itertools.product(SHAPES, (0.0, 0.1, 0.5, 1.0, 2.0, 7.0)):
            size = int(6 * sigma) | 1
            x, g = torch.randn(2, H, W), torch.randn(2, H, W)
            x.requires_grad_()
            got = gaussian_blur(x, sigma, border=border)
            (dx,) = torch.autograd.grad(got, x, g)
            want = construct(x.detach(), sigma, size, border)
            Ay, Ax = (torch.from_numpy(dense(n, sigma, size, border)) for n in (H, W))
            limit = (6 + 2 * math.sqrt(size)) * U
            bound = Ay @ x.detach().double().abs() @ Ax.T
            assert ((got.double() - want).abs() <= limit * bound + 1e-30).all(), (H, W, sigma)
            error = (dx.double() - Ay.T @ g.double() @ Ax).abs()
            assert (error <= limit * (Ay.T @ g.double().abs() @ Ax) + 1e-30).all(), (H, W, sigma)


def test_the_reference_itself_equals_the_index_maps() -> None:
    for border, (H, W), sigma in itertools.product(BORDERS, SHAPES, (0.0, 0.7, 3.0)):
        x = torch.randn(H, W, dtype=torch.float64)
        want = construct(x, sigma, int(6 * sigma) | 1, border)
        torch.testing.assert_close(gaussian_blur_reference(x, sigma, border=border), want, rtol=1e-13, atol=1e-13)


def test_a_vanishing_sigma_is_the_identity() -> None:
    x = torch.randn(2, 3, 9, 20)
    for sigma in (0.0, 1e-30, 1e-4, torch.tensor(0.0), torch.tensor([0.0, 1e-20])):
        for size in (None, 5):
            assert torch.equal(gaussian_blur(x, sigma, kernel_size=size), x)
    s = torch.zeros(2, requires_grad=True)
    (ds,) = torch.autograd.grad(gaussian_blur(x, s, kernel_size=5).square().sum(), s)
    assert torch.equal(ds, torch.zeros(2))


def test_sizes_pairs_and_dimensions() -> None:
    x = torch.randn(12, 30)
    want = construct(x, 1.5, 5, "reflect")
    torch.testing.assert_close(gaussian_blur(x, 1.5, kernel_size=5).double(), want, rtol=0, atol=1e-6)
    Ay, Ax = torch.from_numpy(dense(12, 1.0, 3, "circular")), torch.from_numpy(dense(30, 2.0, 13, "circular"))
    got = gaussian_blur(x, (1.0, 2.0), kernel_size=(3, None), border="circular")
    torch.testing.assert_close(got.double(), Ay @ x.double() @ Ax.T, rtol=0, atol=1e-6)
    y = torch.randn(2, 2, 3, 2, 12, 30)
    assert torch.equal(gaussian_blur(y, 1.5)[1, 0, 2, 1], gaussian_blur(y[1, 0, 2, 1], 1.5))


@every_isa
def test_per_sample_sigma_is_each_sample_alone(isa: str) -> None:
    """Direct and sliding samples, one of them not a number, in one batch."""
    sigma = torch.tensor([0.0, 9.0, 2.5, float("nan"), 30.0])
    x = torch.randn(5, 2, 70, 90)
    with _native.use_isa(isa):
        got = gaussian_blur(x, sigma)
        for b in (0, 1, 2, 4):
            assert torch.equal(got[b], gaussian_blur(x[b], float(sigma[b])))
        assert got[3].isnan().all()
        assert torch.equal(gaussian_blur(x, -sigma)[:3], got[:3])  # the sign does not matter


@every_isa
@pytest.mark.parametrize("border", BORDERS)
def test_uint8_is_rounded_and_clamped(border: str, isa: str) -> None:
    x = torch.randint(0, 256, (2, 3, 37, 50), dtype=torch.uint8)
    x[0, 0] = 255
    with _native.use_isa(isa):
        for sigma in (0.0, 0.8, 3.0):
            got = gaussian_blur(x, sigma, border=border)
            exact = construct(x, sigma, int(6 * sigma) | 1, border)
            assert got.dtype == torch.uint8
            assert ((got.double() - exact).abs() <= 0.5 + 1e-4).all()
        strided = torch.stack([x, x], dim=-1)[..., 0]
        assert torch.equal(gaussian_blur(strided, 3.0, border=border), gaussian_blur(x, 3.0, border=border))
    assert torch.equal(gaussian_blur(x[0, 0], 2.0), x[0, 0])
    flat = torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]], dtype=torch.uint8)  # a flat kernel of three: thirds
    thirds = gaussian_blur(flat, (0.0, 1e4), kernel_size=(1, 3), border="circular")
    assert thirds.tolist() == [[1, 0, 1, 0], [3, 2, 3, 2]]
    big = torch.randint(0, 256, (1, 100, 130), dtype=torch.uint8)
    exact = construct(big, 12.0, 73, border)
    assert ((gaussian_blur(big, 12.0, border=border).double() - exact).abs() <= 0.5 + 255 * SLIDING_ERROR).all()
    with fastdiff.use_backend("reference"):
        assert (gaussian_blur(x, 3.0, border=border).int() - got.int()).abs().max() <= 1


# ------------------------------------------------------------------------------------------------- the sliding path


def test_the_fit_of_the_cosines_is_as_good_as_stated() -> None:
    worst = 0.0
    for sigma in [*np.linspace(8, 40, 97), 50.3, 99.9, 250.0, 1000.0]:
        size = gp.support(float(sigma))
        A, theta = gp.cosines(float(sigma), size)
        k = np.arange(size) - size // 2
        fitted = np.cos(np.outer(k, theta)) @ A
        assert abs(fitted.sum() - 1) < 1e-12
        worst = max(worst, np.abs(fitted - gp.taps(float(sigma), size)[0]).sum())
    assert worst < 1.5e-6


@every_isa
@pytest.mark.parametrize("border", BORDERS)
def test_the_sliding_path_keeps_its_error(border: str, isa: str) -> None:
    """White noise, a constant, and an impulse, whose errors are largest where its taps are."""
    worst = 0.0
    with _native.use_isa(isa):
        for (H, W), sigma in itertools.product([(64, 64), (65, 600), (530, 67), (64, 1100)], (8.0, 11.3, 33.0, 90.0)):
            impulse = torch.zeros(H, W)
            impulse[H // 2, W // 3] = impulse[0, W - 1] = 1.0
            x = torch.stack([torch.randn(H, W), torch.full((H, W), 3.0), impulse, torch.rand(H, W)])
            x.requires_grad_()
            got = gaussian_blur(x, sigma, border=border)
            want = construct(x.detach(), sigma, int(6 * sigma) | 1, border)
            g = torch.rand(4, H, W)
            (dx,) = torch.autograd.grad(got, x, g)
            Ay, Ax = (torch.from_numpy(dense(n, sigma, int(6 * sigma) | 1, border)) for n in (H, W))
            back = Ay.T @ g.double() @ Ax
            error = ((got.double() - want).abs().amax((1, 2)) / x.detach().abs().amax((1, 2))).max().item()
            gain = max(1.0, back.abs().max().item())  # a border pixel of replicate gathers all that is outside
            # Transposed, a pixel may come in through the image and its mirror image.
            worst = max(worst, error, (dx.double() - back).abs().max().item() / gain / 2)
    assert worst <= SLIDING_ERROR, worst


def test_an_explicit_size_is_exact() -> None:
    x = torch.zeros(80, 80)
    x[40, 40] = 1.0
    got = gaussian_blur(x, 9.0, kernel_size=55)
    want = construct(x, 9.0, 55, "reflect")
    assert ((got.double() - want).abs() <= 8 * U * want + 1e-30).all()  # relative: no sum of cosines could
    assert not torch.equal(got, gaussian_blur(x, 9.0))


@every_isa
def test_not_a_number_reaches_its_support_and_nothing_else(isa: str) -> None:
    with _native.use_isa(isa):
        for sigma, border in itertools.product((2.0, 9.0, 20.0), BORDERS):
            for value in (float("nan"), float("inf"), -float("inf")):
                x = torch.randn(1, 1, 150, 330)
                x[0, 0, 31, 64] = value
                x[0, 0, 149, 0] = value
                got, want = gaussian_blur(x, sigma, border=border), gaussian_blur_reference(x, sigma, border=border)
                assert torch.equal(got.isnan(), want.isnan())
                assert torch.equal(got.isinf(), want.isinf())
                finite = want.isfinite()
                torch.testing.assert_close(got[finite], want[finite], rtol=0, atol=3e-5)
        x = torch.full((1, 1, 80, 80), 3e38)  # two of them overflow in a recurrence
        torch.testing.assert_close(gaussian_blur(x, 9.0), x, rtol=1e-5, atol=0)


@every_isa
def test_the_bits_do_not_depend_on_threads(isa: str) -> None:
    x = torch.randn(3, 2, 300, 257)
    sigma = torch.tensor([3.0, 12.0, 25.0])
    threads = torch.get_num_threads()
    found = []
    try:
        with _native.use_isa(isa):
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                leaf, s = x.clone().requires_grad_(), sigma.clone().requires_grad_()
                y = gaussian_blur(leaf, s)
                found.append((y, *torch.autograd.grad(y, (leaf, s), torch.cos(x))))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


MEMORY = """
import resource, sys, torch
from fastdiff.ops import gaussian_blur
torch.set_num_threads(2)
sigma = float(sys.argv[1])
x = torch.ones(1, 1, 40000, 512).to(getattr(torch, sys.argv[2]))
gaussian_blur(x[:, :, :200], sigma)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = gaussian_blur(x, sigma)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - y.numel() * y.element_size())
"""


@pytest.mark.skipif(_native.extension is None or sys.platform != "linux", reason="measures the native kernels")
@pytest.mark.parametrize(("sigma", "dtype"), [(2.0, "float32"), (40.0, "float32"), (40.0, "bfloat16")])
def test_a_tall_image_needs_no_more_than_rows(sigma: float, dtype: str) -> None:
    """82 MB of float32: beyond the result, two threads hold a few rows each (and as many as the support)."""
    run = subprocess.run([sys.executable, "-c", MEMORY, str(sigma), dtype], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 8 << 20


def test_the_workspace_does_not_grow_with_the_height(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real: Callable[..., torch.Tensor] = torch.empty

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = real(*args, **kwargs)
        sizes.append(t.numel() * t.element_size())
        return t

    found = []
    for H in (512, 4096):
        x = torch.randn(1, 2, H, 128)
        monkeypatch.setattr(torch, "empty", count)
        sizes.clear()
        gaussian_blur(x, 20.0)
        monkeypatch.undo()
        found.append(sum(sizes) - x.numel() * 4)
    assert found[0] == found[1] < 64 * (128 + 240) * 4 * torch.get_num_threads()


# ------------------------------------------------------------------------------------------------- boxes and blending


def rectangle(box: list[float], H: int, W: int) -> torch.Tensor:
    mask = torch.zeros(H, W)
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in box)
    mask[int(y1 * H) : int(y2 * H), int(x1 * W) : int(x2 * W)] = 1.0
    return mask


BOXES = [[0.0, 0.0, 1.0, 1.0], [0.29, 0.57, 0.7, 0.58], [0.5, 0.5, 0.5, 0.9], [0.8, 0.1, 0.2, 0.9],
         [-1.0, 0.4, 0.1, 7.0], [0.99, 0.0, 1.0, 0.02], [0.0, 0.0, 0.03, 1.0],
         [-float("inf"), 0.2, float("inf"), 0.6]]  # fmt: skip


@every_isa
def test_a_blurred_rectangle_is_the_closed_form(isa: str) -> None:
    random_boxes = torch.rand(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    with _native.use_isa(isa):
        for (H, W), sigma in itertools.product(
            [(1, 1), (1, 8), (100, 100), (17, 40), (128, 64)], (0.0, 0.5, 2.0, 9.0, 40.0)
        ):
            boxes = BOXES + random_boxes
            masks = torch.stack([rectangle(b, H, W) for b in boxes])
            got = box_mask(boxes, (H, W), sigma=sigma)
            assert got.dtype == torch.float32
            size = int(6 * sigma) | 1
            want = construct(masks, sigma, size, "reflect")
            assert ((got.double() - want).abs() <= 4 * U * want + 1e-12).all()
            blurred = gaussian_blur(masks, sigma, kernel_size=size)
            assert ((got - blurred).abs() <= (8 + 2 * math.sqrt(size)) * U * want + 1e-12).all()


def test_corners_are_multiplied_as_python_does() -> None:
    for n in (7, 10, 50, 64, 100):
        for v in torch.rand(200, dtype=torch.float64).tolist() + [i / 100 for i in range(101)]:
            edge = int(v * n)
            assert box_mask([[0.0, 0.0, v, 1.0]], (1, n)).sum() == edge
            single = torch.tensor([[0.0, 0.0, v, 1.0]])
            assert box_mask(single, (1, n)).sum() == int(single[0, 2].item() * n)


def test_box_masks_of_every_type() -> None:
    boxes = torch.tensor(BOXES)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got = box_mask(boxes.to(dtype), (40, 30), sigma=2.0)
        assert got.dtype == dtype
        want = box_mask_reference(boxes.to(dtype).double(), (40, 30), sigma=2.0)
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)


def loop(background: torch.Tensor, objects: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    out = background.double()
    for o, m in zip(objects.double(), masks.double(), strict=True):
        out = out * (1 - m) + o * m
    return out


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blending_equals_the_plain_loop(dtype: torch.dtype, isa: str) -> None:
    with _native.use_isa(isa):
        for K, (B, C, H, W) in itertools.product((1, 3, 4, 5, 17), [(2, 4, 16, 24), (1, 3, 33, 1300), (3, 1, 1, 1)]):
            background, objects = torch.randn(B, C, H, W).to(dtype), torch.randn(K, B, C, H, W).to(dtype)
            boxes = torch.rand(K, 4, dtype=torch.float64).tolist()
            raster = torch.stack([rectangle(b, H, W) for b in boxes])
            eps = max(torch.finfo(dtype).eps, 64 * U)
            for sigma in (0.0, 2.0):
                want = loop(background, objects, construct(raster, sigma, int(6 * sigma) | 1, "reflect"))
                for regions in (boxes, torch.tensor(boxes, dtype=torch.float64), raster):
                    got = gaussian_blend(background, objects, regions, sigma=sigma)
                    torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * 4)
                    own = background.clone()
                    assert gaussian_blend(own, objects, regions, sigma=sigma, out=own) is own
                    assert torch.equal(own, got)


def test_an_object_has_no_say_outside_its_box_whatever_it_holds() -> None:
    background, objects = torch.randn(1, 2, 40, 40), torch.randn(2, 1, 2, 40, 40)
    boxes = [[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.9, 0.8]]
    want = gaussian_blend(background, objects, boxes, sigma=1.0)
    objects[0, :, :, 20:], objects[1, :, :, :, :15] = float("nan"), float("inf")
    sigma = torch.tensor(1.0, requires_grad=True)
    for regions in (boxes, torch.tensor(boxes, dtype=torch.float64)):
        for backend in ("auto", "reference"):
            with fastdiff.use_backend(backend):
                torch.testing.assert_close(gaussian_blend(background, objects, regions, sigma=1.0), want)
                got = gaussian_blend(background, objects, regions, sigma=sigma)
                (ds,) = torch.autograd.grad(got.square().sum(), sigma)
                assert ds.isfinite()
    inside = objects.clone()
    inside[0, 0, 0, 8, 8] = float("nan")
    assert gaussian_blend(background, inside, boxes, sigma=1.0)[0, 0, 8, 8].isnan()


def test_boolean_masks_and_a_sigma_per_object() -> None:
    background, objects = torch.randn(2, 3, 20, 30), torch.randn(3, 2, 3, 20, 30)
    masks = torch.rand(3, 20, 30) > 0.5
    sigma = torch.tensor([0.0, 1.0, 3.0])
    blurred = torch.stack([gaussian_blur(m.float(), float(s)) for m, s in zip(masks, sigma, strict=True)])
    got = gaussian_blend(background, objects, masks, sigma=sigma)
    torch.testing.assert_close(got.double(), loop(background, objects, blurred), rtol=1e-5, atol=1e-5)


def test_a_list_that_changes_is_read_again() -> None:
    """The fast way in keeps boxes by value."""
    background, objects = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 1, 8, 8)
    boxes = [[0.0, 0.0, 0.5, 1.0]]
    assert gaussian_blend(background, objects, boxes, sigma=0.0).sum() == 32
    boxes[0][2] = 1.0
    assert gaussian_blend(background, objects, boxes, sigma=0.0).sum() == 64


# ------------------------------------------------------------------------------- what an adversarial review turned up


def test_the_default_dtype_changes_nothing() -> None:
    """Tables of several samples are float32 whatever torch's default."""
    x, sigma = torch.randn(3, 1, 70, 70), torch.tensor([1.0, 2.0, 9.0])
    background, objects = torch.randn(1, 2, 12, 12), torch.randn(2, 1, 2, 12, 12)
    masks = torch.rand(2, 12, 12)

    def found() -> list[torch.Tensor]:
        leaf = masks.clone().requires_grad_()
        blend = gaussian_blend(background, objects, leaf, sigma=1.0)
        boxes = box_mask([[0.1, 0.1, 0.6, 0.6]] * 3, (12, 12), sigma=sigma)
        return [gaussian_blur(x, sigma), boxes, *torch.autograd.grad(blend.sum(), leaf)]

    want = found()
    torch.set_default_dtype(torch.float64)
    try:
        got = found()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def structured(H: int, W: int, sigma: float) -> torch.Tensor:
    """Constants, noise, a ramp, an edge, the slowest cosine of the recurrence."""
    x = torch.arange(W, dtype=torch.float32).expand(H, W)
    edge = torch.zeros(H, W)
    edge[H // 2 :, W // 3 :] = 1.0
    slow = torch.cos(x * math.pi / (3 * gp.SPREAD * sigma))
    return torch.stack([torch.ones(H, W), torch.full((H, W), 0.3), torch.randn(H, W), torch.rand(H, W), x / W, edge,
                        slow, 10 + torch.rand(H, W)])  # fmt: skip


@every_isa
@pytest.mark.parametrize("sigma", [9.0, 32.0, 100.0, 150.0, 250.0, 500.0, 1000.0, 3000.0, gp.SLIDING_LARGEST, 21000.0])
@pytest.mark.parametrize("size", [(64, 64), (512, 512), (1024, 100), (64, 1024), (64, 8192)])
def test_the_stated_error_holds_for_every_sigma(sigma: float, size: tuple[int, int], isa: str) -> None:
    H, W = size
    if W > 1024 and sigma not in (1000.0, gp.SLIDING_LARGEST):
        pytest.skip("where recurrences run longest")
    x = structured(H, W, sigma)
    w, _ = gp.taps(sigma, gp.support(sigma))
    Ay, Ax = matrix(H, w, "reflect"), matrix(W, w, "reflect")
    if sigma > gp.SLIDING_LARGEST:
        if H * W > 4096:
            pytest.skip("tap by tap: slow")
        x = x[:1]
    with _native.use_isa(isa):
        got = gaussian_blur(x, sigma)
    error = (got.double() - Ay @ x.double() @ Ax.T).abs().amax((1, 2)) / x.abs().amax((1, 2))
    exact = 2 * (4 + math.sqrt(w.size)) * U  # two passes of K roundings
    assert error.max() <= (SLIDING_ERROR if sigma <= gp.SLIDING_LARGEST else exact), error


def test_the_gradient_of_a_rounded_image_to_sigma_is_refused() -> None:
    x = torch.randint(0, 256, (1, 1, 20, 20), dtype=torch.uint8)
    sigma = torch.tensor(1.5, requires_grad=True)
    with pytest.raises(TypeError, match=r"gaussian_blur: sigma: .*uint8"):
        gaussian_blur(x, sigma)
    with torch.no_grad():
        assert torch.equal(gaussian_blur(x, sigma), gaussian_blur(x, 1.5))
    with pytest.raises(TypeError, match=r"gaussian_blur: x: expected a dense tensor"):
        gaussian_blur(x[0, 0].to_sparse(), 1.5)


def test_absurd_numbers_are_named_in_few_words() -> None:
    boxes = [[0.1, 0.1, 0.5, 0.5]]
    x = torch.rand(1, 1, 9, 9)
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: gaussian_blur(x, 1e300), ValueError, "sigma"),
        (lambda: gaussian_blur(x, torch.tensor(1e300, dtype=torch.float64)), ValueError, "sigma"),
        (lambda: gaussian_blur(x, 1e308), ValueError, "sigma"),
        (lambda: gaussian_blur(x, 1.0, kernel_size=10**5000), ValueError, "kernel_size"),
        (lambda: box_mask(boxes, (2**40, 2**40)), ValueError, "size"),
        (lambda: box_mask(boxes, (2**70, 1)), ValueError, "size"),
        (lambda: box_mask(boxes, (4.0, 5)), TypeError, "size"),  # type: ignore[arg-type]
        (lambda: box_mask([[10**400] * 4], (4, 5)), TypeError, "boxes"),
        (lambda: gaussian_blend(x, x[None], [[10**5000] * 4]), TypeError, "regions"),
        (lambda: torch.vmap(lambda s: gaussian_blur(x, s))(torch.rand(3)), ValueError, "sigma"),
        (lambda: torch.vmap(lambda b: box_mask(b, (4, 4)))(torch.rand(3, 1, 4)), ValueError, "boxes"),
    ]
    for call, kind, argument in calls:
        with pytest.raises(kind, match=rf"^gaussian_bl(ur|end): {argument}: |^box_mask: {argument}: ") as caught:
            call()
        assert len(str(caught.value)) < 250


def test_whatever_stands_for_an_integer_will_do() -> None:
    x = torch.rand(1, 1, 9, 9)
    assert torch.equal(gaussian_blur(x, 1.0, kernel_size=np.int64(5)), gaussian_blur(x, 1.0, kernel_size=5))
    boxes = [[0.1, 0.1, 0.5, 0.5]]
    assert torch.equal(box_mask(boxes, (np.int64(8), np.int32(9))), box_mask(boxes, (8, 9)))


def test_compiled_code_takes_any_tensor_sigma_and_any_size() -> None:
    """And a number that no check has seen while tracing is checked by the operator."""
    x = torch.rand(1, 1, 40, 40)
    torch._dynamo.reset()
    blur = torch.compile(lambda x, s: gaussian_blur(x, s), fullgraph=True, backend="aot_eager")
    for i in range(12):
        s = 0.5 + 0.7 * i
        assert torch.equal(blur(x, torch.tensor(s)), gaussian_blur(x, torch.tensor(s)))
    mask = torch.compile(lambda b, H, W: box_mask(b, (H, W), sigma=1.0), fullgraph=True, backend="aot_eager")
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    for i in range(12):
        assert torch.equal(mask(boxes, 20 + i, 30 + 2 * i), box_mask(boxes, (20 + i, 30 + 2 * i), sigma=1.0))
    for bad in (-1.0, float("inf")):
        torch._dynamo.reset()
        with pytest.raises(ValueError, match="gaussian_blur: sigma"):
            blur(x, bad)


def test_what_is_kept_is_bounded_in_bytes() -> None:
    for i in range(40):
        gp.single(5000.0 + i, 5000.0 + i, 30001, 30001, True)
        gp.prefixes((5000.0 + i,))
    for cache in (gp.single, gp._shared_prefix, gp._prefix):
        assert 0 < cache.held() <= BUDGET  # type: ignore[attr-defined]
    before = gp._shared_prefix.held()  # type: ignore[attr-defined]
    gp.prefixes((1.25, 1.5, 1.75))
    assert gp._shared_prefix.held() == before  # type: ignore[attr-defined]  # a learned tuple never comes again


def test_a_cache_forgets_the_least_recently_used() -> None:
    made: list[int] = []

    @bounded(lambda n: n * 1024, budget=100 * 1024)
    def make(n: int) -> int:
        made.append(n)
        return n

    for n in (20, 21, 22, 23, 20, 24, 20, 21):  # 24 pushes out 21
        assert make(n) == n
    assert made == [20, 21, 22, 23, 24, 21]
    make(90), make(90)  # more than a quarter of the budget
    assert made[-2:] == [90, 90]
    assert make.held() <= 100 * 1024  # type: ignore[attr-defined]


def test_boxes_on_another_device_are_refused() -> None:
    background, objects = torch.randn(1, 3, 8, 9), torch.randn(2, 1, 3, 8, 9)
    with pytest.raises(ValueError, match="gaussian_blend: regions: expected boxes on cpu"):
        gaussian_blend(background, objects, torch.rand(2, 4, device="meta"))
