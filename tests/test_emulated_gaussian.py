"""The Gaussian kernels for CUDA, emulated, where random examples seldom go: edges of tiles, the largest radius of one
launch and the smallest of two, folded supports, radii that only the device knows, many boxes, every access width.

References are dense float64 operators made from the definition.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from emu.harness import Emulator

import fastdiff
from fastdiff.ops import SPECS, box_mask, gaussian_blend, gaussian_blur
from fastdiff.ops import _gaussian_plan as gp
from fastdiff.ops._gaussian_spec import matrix
from fastdiff.ops._registry import tolerance, widen

U = 2.0**-24
BORDERS = list(gp.BORDERS)


@pytest.fixture(autouse=True)
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators(), fastdiff.use_backend("native"):
        yield built
    built.reset()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_blur(x: torch.Tensor, sigma: float, size: int | tuple[int, int] | None, border: str) -> None:
    """Values and both gradients of x [B, C, H, W] against dense operators."""
    ky, kx = size if isinstance(size, tuple) else (size, size)
    (wy, dy), (wx, dx) = (gp.taps(sigma, k or gp.support(sigma)) for k in (ky, kx))
    H, W = x.shape[-2:]
    Ay, Ax, By, Bx = matrix(H, wy, border), matrix(W, wx, border), matrix(H, dy, border), matrix(W, dx, border)
    leaf = x.detach().requires_grad_()
    s = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    number = gaussian_blur(x.detach(), sigma, kernel_size=size, border=border)  # the host knows the radius
    out = gaussian_blur(leaf, s, kernel_size=size, border=border)
    g = randn(*x.shape, seed=1).to(x.dtype)
    grad_x, grad_s = torch.autograd.grad(out, (leaf, s), g)
    x64, g64 = x.detach().double(), g.double()
    units = (4 + 2 * (math.sqrt(wy.size) + math.sqrt(wx.size))) * U  # two passes
    eps = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0

    def close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, rounded: float) -> None:
        limit = units * magnitude + rounded * want.abs() + 1e-30
        assert ((got.double() - want).abs() <= limit).all(), ((got.double() - want).abs() / limit).max()

    for y in (number, out):
        close(y.detach(), Ay @ x64 @ Ax.T, Ay @ x64.abs() @ Ax.T, eps)
    close(grad_x, Ay.T @ g64 @ Ax, Ay.T @ g64.abs() @ Ax, eps)
    change = By @ x64 @ Ax.T + Ay @ x64 @ Bx.T
    most = By.abs() @ x64.abs() @ Ax.T + Ay @ x64.abs() @ Bx.abs().T
    close(grad_s, (g64 * change).sum(), (g64.abs() * most).sum(), 0.0)


@pytest.mark.parametrize(("border", "H", "W"), [
    ("reflect", 65, 129), ("replicate", 63, 65), ("constant", 64, 64), ("circular", 130, 9), ("symmetric", 17, 67),
])  # fmt: skip
def test_the_edges_of_tiles_and_of_the_one_launch(border: str, H: int, W: int) -> None:
    for size in (1, 5, 33, 35):  # radius 16 is the last that one launch serves
        check_blur(randn(1, 1, H, W), 0.3 + size / 5, size, border)


@pytest.mark.parametrize("border", BORDERS)
def test_large_radii(border: str) -> None:
    check_blur(randn(1, 2, 70, 133), 25.0, (41, 201), border)  # several chunks of taps, several bands, W % 4 != 0
    check_blur(randn(1, 1, 150, 36).bfloat16().transpose(2, 3), 9.0, (65, 129), border)  # whole chunks, any strides


@pytest.mark.parametrize("border", BORDERS)
def test_a_support_larger_than_the_image_is_folded(border: str) -> None:
    for (H, W), size in itertools.product([(1, 2), (3, 4), (5, 1), (16, 17), (33, 40)], (31, 201)):
        check_blur(randn(1, 1, H, W), size / 5, size, border)
    check_blur(randn(1, 1, 2, 3), 2000.0, 12001, border)  # a warp per folded tap


@pytest.mark.parametrize("border", BORDERS)
def test_one_impulse_not_finite_spreads_as_far_as_the_support(border: str) -> None:
    for size in (13, 15, 35):
        x = torch.zeros(1, 1, 66, 90)
        x[0, 0, 40, 41] = float("nan")
        x[0, 0, 40, 80] = float("inf")
        y = gaussian_blur(x, size / 6, kernel_size=size, border=border)[0, 0]
        spoiled = torch.zeros(66, 90, dtype=torch.bool)
        r = size // 2
        for column in (41, 80):
            mask = torch.zeros(1, 1, 66, 90, dtype=torch.float64)
            mask[0, 0, 40, column] = 1
            A = [matrix(n, torch.ones(2 * r + 1).double().numpy(), border) for n in (66, 90)]
            spoiled |= (A[0] @ mask @ A[1].T)[0, 0] != 0
        assert torch.equal(~y.isfinite(), spoiled)


def test_bytes() -> None:
    x = torch.randint(0, 256, (2, 3, 37, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for border, (size, sigma) in itertools.product(BORDERS, [(1, 1.0), (7, 1.3), (41, 9.0)]):
        w, _ = gp.taps(sigma, size)
        want = matrix(37, w, border) @ x.double() @ matrix(70, w, border).T
        got = gaussian_blur(x[..., ::1], sigma, kernel_size=size, border=border)
        assert got.dtype == torch.uint8
        away = (want - want.floor() - 0.5).abs() > 1e-4  # a tie may fall either way
        assert torch.equal(got.double()[away], want.round()[away])
        odd = x[..., 1::2]
        assert torch.equal(gaussian_blur(odd, sigma, kernel_size=size, border=border),
                           gaussian_blur(odd.contiguous(), sigma, kernel_size=size, border=border))  # fmt: skip


def test_radii_that_only_the_device_knows() -> None:
    """One call, samples of every path, and what no kernel serves: NaN instead of an error."""
    sigma = torch.tensor([0.0, 2.0, -5.6, 5.7, 9.0, float("nan"), float("inf"), 3e4, 1e30, -17.0, 300.0, 5000.0])
    x = randn(12, 1, 66, 70)
    leaf, s = x.clone().requires_grad_(), sigma.clone().requires_grad_()
    y = gaussian_blur(leaf, s)
    g = randn(12, 1, 66, 70, seed=2)
    dx, ds = torch.autograd.grad(y, (leaf, s), g)
    for b, value in enumerate(sigma.tolist()):
        if not abs(value) < 2e4:
            assert y[b].isnan().all()
            assert dx[b].isnan().all()
            assert ds[b].isnan()
            continue
        one, z = x[b : b + 1].clone().requires_grad_(), torch.tensor(value, requires_grad=True)
        alone = gaussian_blur(one, z)
        grads = torch.autograd.grad(alone, (one, z), g[b : b + 1])
        assert torch.equal(alone[0], y[b])
        assert torch.equal(grads[0][0], dx[b])
        assert torch.equal(grads[1], ds[b])
        w, _ = gp.taps(value, gp.support(value))
        want = matrix(66, w, "reflect") @ x[b].double() @ matrix(70, w, "reflect").T
        limit = slide_error(value, 66, 70) if abs(value) in (17, 300) else (4 + 4 * math.sqrt(w.size)) * U
        assert ((y[b].double() - want).abs() <= limit * x[b].abs().max()).all()


# ------------------------------------------------------------------------------------------------------ sliding path


def slide_error(sigma: float, H: int, W: int) -> float:
    """What csrc/cuda/gaussian_sliding.cuh allows itself, as a share of the largest |x|: the fit, which is found here,
    and 2.4 u for every rounding of all states together: 2 + 7 carries, and those of a segment and of the 32 starting
    sums, which grow like the square root of their number."""
    K = gp.support(sigma)
    A, theta = gp.cosines(abs(sigma), K)
    k = torch.arange(-(K // 2), K // 2 + 1, dtype=torch.float64)
    fitted = torch.cos(k[:, None] * torch.from_numpy(theta)) @ torch.from_numpy(A)
    fit = (fitted - torch.from_numpy(gp.taps(sigma, K)[0])).abs().sum().item()
    steps = [min(n, min(4096, max(512, 1 << (K - 1).bit_length()))) / 32 for n in (H, W)]
    terms = [min(K + 1, 2 * n) / 32**2 for n in (H, W)]
    return sum(fit + 2.4 * U * (9 + (math.sqrt(L) + math.sqrt(t)) / 2) for L, t in zip(steps, terms, strict=True))


def check_slide(emu: Emulator, x: torch.Tensor, sigma: float, border: str) -> None:
    """Values and the gradient to x, and that no block had to compute its outputs from the taps."""
    H, W = x.shape[-2:]
    w, _ = gp.taps(sigma, gp.support(sigma))
    Ay, Ax = matrix(H, w, border), matrix(W, w, border)
    g = randn(*x.shape, seed=1).to(x.dtype)
    x64, g64 = x.double(), g.double()
    eps = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    emu.mutate("kSlideForget")
    leaf = x.detach().requires_grad_()
    y = gaussian_blur(leaf, sigma, border=border)
    assert "blur_slide" in emu.last_kernel()
    (dx,) = torch.autograd.grad(y, leaf, g)
    # The adjoint of reflect doubles what it is given along the edges; that of replicate gathers tails there, of
    # which there are as many as samples.
    twice, gather = 4 if border == "reflect" else 1, math.sqrt(max(H, W)) if border == "replicate" else 0
    for got, want, size, A, B, by, more in (
        (y.detach(), Ay @ x64 @ Ax.T, x64.abs(), Ay, Ax, 1, 0),
        (dx, Ay.T @ g64 @ Ax, g64.abs(), Ay.T, Ax.T, twice, gather),
    ):
        share = A.sum(1).clamp(min=1)[:, None] * B.sum(1).clamp(min=1) * slide_error(sigma, H, W)
        limit = by * share * size.max() + (4 + 2 * more) * U * (A @ size @ B.T) + eps * want.abs()
        assert ((got.double() - want).abs() <= limit).all(), ((got.double() - want).abs() / limit).max()
    emu.mutate(None)


@pytest.mark.parametrize("border", BORDERS)
def test_wide_gaussians(emu: Emulator, border: str) -> None:
    """From the first sigma of the sliding path on, until the support is eighteen times the image."""
    check_slide(emu, randn(1, 1, 64, 70), 16.0, border)
    emu.seed(1)
    check_slide(emu, torch.ones(1, 1, 67, 65), 200.0, border)


def test_wide_gaussians_of_several_parts_of_any_type_and_strides(emu: Emulator) -> None:
    check_slide(emu, randn(64, 1, 2, 530).bfloat16().permute(1, 2, 3, 0)[:, 1:], 16.0, "replicate")
    check_slide(emu, randn(1, 1, 64, 530), 16.0, "circular")


def test_wide_gaussians_of_bytes() -> None:
    x = torch.randint(0, 256, (1, 3, 70, 65), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    w, _ = gp.taps(18.0, gp.support(18.0))
    want = matrix(70, w, "symmetric") @ x.double() @ matrix(65, w, "symmetric").T
    got = gaussian_blur(x.transpose(2, 3).contiguous().transpose(2, 3), 18.0, border="symmetric")
    away = (want - want.floor() - 0.5).abs() > 255 * slide_error(18.0, 70, 65)
    assert torch.equal(got.double()[away], want.round()[away])


def test_wide_gaussians_have_the_same_bits_in_every_schedule(emu: Emulator) -> None:
    x = randn(1, 2, 70, 66)
    want = gaussian_blur(x, 40.0, border="replicate")
    for seed in (1, 2):
        emu.seed(seed)
        emu.grid_limit(3 * seed)
        assert torch.equal(gaussian_blur(x, 40.0, border="replicate"), want)
    emu.reset()
    assert torch.equal(gaussian_blur(x[:, 1:], torch.tensor(40.0), border="replicate"), want[:, 1:])


@pytest.mark.parametrize("border", ["constant", "replicate"])
def test_in_a_wide_gaussian_too_what_is_not_finite_spreads_as_far_as_the_support(border: str) -> None:
    x = torch.zeros(1, 1, 120, 130)
    x[0, 0, 100, 5], x[0, 0, 10, 120] = float("nan"), float("inf")
    y = gaussian_blur(x, 16.0, border=border)[0, 0]
    spoiled = torch.zeros(120, 130, dtype=torch.bool)
    spoiled[52:, :54] = spoiled[:59, 72:] = True
    assert torch.equal(~y.isfinite(), spoiled)
    assert (y[~spoiled] == 0).all()


# ------------------------------------------------------------------------------------------------- boxes and blending


def close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, growth: float) -> None:
    """Within the rounding of the result and of what was added on the way to it, element by element."""
    limit = tolerance(want, magnitude, growth, got.dtype)
    assert ((got.double() - want).abs() <= limit).all(), ((got.double() - want).abs() / limit).max()


def layout(K: int, seed: int = 0) -> list[list[float]]:
    found = torch.rand(K, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = torch.minimum(found[:, :2], found[:, 2:]), torch.maximum(found[:, :2], found[:, 2:])
    return torch.cat([low, high], 1).tolist()


def dense_masks(boxes: list[list[float]], H: int, W: int, sigma: float, slope: bool = False) -> torch.Tensor:
    masks = torch.zeros(len(boxes), H, W, dtype=torch.float64)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1 * H) : int(y2 * H), int(x1 * W) : int(x2 * W)] = 1
    w, d = gp.taps(sigma, gp.support(sigma))
    Ay, Ax = matrix(H, w, "reflect"), matrix(W, w, "reflect")
    if slope:
        return matrix(H, d, "reflect") @ masks @ Ax.T + Ay @ masks @ matrix(W, d, "reflect").T
    return Ay @ masks @ Ax.T


@pytest.mark.parametrize(
    ("H", "W", "sigma"), [(33, 40, 2.0), (5, 3, 40.0), (40, 272, 0.0), (2, 1, 9.0), (90, 30, 30.0)]
)
def test_box_masks(H: int, W: int, sigma: float) -> None:
    boxes = [*layout(3), [0.0, 0.0, 1.0, 1.0], [0.7, 0.1, 0.2, 0.9], [-1.0, 0.2, 0.4, 3.0]]
    clipped = [[min(max(v, 0.0), 1.0) for v in box] for box in boxes]
    want = dense_masks(clipped, H, W, sigma)
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.tensor(boxes, dtype=torch.float64)
        if dtype != torch.float32:  # corners that the type holds
            given = (given * 8).round() / 8
            want = dense_masks((given.clamp(0, 1)).tolist(), H, W, sigma)
        s = torch.full((len(boxes),), sigma, dtype=torch.float64, requires_grad=True)
        got = box_mask(given.to(dtype), (H, W), sigma=s)
        spec, call = SPECS["box_mask"], ((given, (H, W)), {"sigma": s.detach()})
        close(got.detach(), want, *spec.bound(dtype, *call[0], **call[1]), 0.0)  # two profiles and their product
        assert torch.equal(got == 0, want.to(dtype) == 0) or sigma > 0
    if sigma > 0:
        g = randn(*got.shape).to(dtype)
        (ds,) = torch.autograd.grad(got, s, g)
        clean = (given.clamp(0, 1)).tolist()
        want = (g.double() * dense_masks(clean, H, W, sigma, slope=True)).sum((1, 2))
        most = spec.grad_bound(dtype, [g.double()], *call[0], **call[1])["sigma"]
        close(ds, want, most, spec.growth(*call[0], **call[1]))


def compose(background: torch.Tensor, objects: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    out = background.double()
    for o, m in zip(objects.double(), masks, strict=True):
        out = out * (1 - m) + o * m
    return out


@pytest.mark.parametrize(("K", "shape", "kinds"), [
    (2, (1, 2, 33, 136), (torch.float32, torch.float32)),
    (17, (2, 1, 35, 40), (torch.float32, torch.bfloat16)),  # two groups of boxes, three sweeps backward
    (9, (2, 2, 18, 264), (torch.bfloat16, torch.bfloat16)),
    (33, (1, 1, 40, 33), (torch.float16, torch.float16)),  # element by element
    (8, (1, 3, 20, 24), (torch.bfloat16, torch.float32)),
], ids=str)  # fmt: skip
def test_blending(K: int, shape: tuple[int, ...], kinds: tuple[torch.dtype, torch.dtype]) -> None:
    background, objects = randn(*shape).to(kinds[0]), randn(K, *shape, seed=1).to(kinds[1])
    boxes = layout(K)
    H, W = shape[2:]
    g = randn(*shape, seed=2).to(kinds[0])
    spec = SPECS["gaussian_blend"]
    for regions, sigma in itertools.product(("boxes", "masks"), (0.0, 2.0)):
        m64 = dense_masks(boxes, H, W, sigma)
        given = boxes if regions == "boxes" else dense_masks(boxes, H, W, 0.0).float().requires_grad_()
        b, o = background.clone().requires_grad_(), objects.clone().requires_grad_()
        s = torch.tensor(sigma, requires_grad=True)
        got = gaussian_blend(b, o, given, sigma=s)
        leaves = [b, o, s] if regions == "boxes" else [b, o, s, given]
        grads = torch.autograd.grad(got, leaves, g)
        b64, o64 = background.double().requires_grad_(), objects.double().requires_grad_()
        m = m64.clone().requires_grad_()
        want = compose(b64, o64, m)
        wanted = torch.autograd.grad(want, (b64, o64, m), g.double())
        args, kwargs = widen((background, objects, given)), {"sigma": s.detach().double()}
        growth = spec.growth(*args, **kwargs)
        most = spec.grad_bound(kinds[0], [g.double()], *args, **kwargs)
        close(got.detach(), want.detach(), *spec.bound(kinds[0], *args, **kwargs), growth)
        close(grads[0], wanted[0], most["background"], growth)
        close(grads[1], wanted[1], most["objects"], growth)
        if sigma > 0:
            close(grads[2], (wanted[2] * dense_masks(boxes, H, W, sigma, slope=True)).sum(), most["sigma"], growth)
        if regions == "masks":
            w, _ = gp.taps(sigma, gp.support(sigma))
            back = matrix(H, w, "reflect").T @ wanted[2] @ matrix(W, w, "reflect")
            close(grads[3], back, most["regions"], growth)
        own = background.clone()
        assert torch.equal(gaussian_blend(own, objects, given if regions == "boxes" else given.detach(), sigma=sigma,
                                          out=own), got)  # fmt: skip


def test_gradients_to_background_and_objects_alone() -> None:
    """Where no mask is learned, planes are tasks of their own and background and objects are not kept."""
    background, objects = randn(2, 3, 9, 12).requires_grad_(), randn(3, 2, 3, 9, 12, seed=1).requires_grad_()
    boxes = layout(3)
    g = randn(2, 3, 9, 12, seed=2)
    grads = torch.autograd.grad(gaussian_blend(background, objects, boxes, sigma=1.0), (background, objects), g)
    m = dense_masks(boxes, 9, 12, 1.0)
    b64, o64 = background.detach().double().requires_grad_(), objects.detach().double().requires_grad_()
    wanted = torch.autograd.grad(compose(b64, o64, m), (b64, o64), g.double())
    spec, args, kwargs = SPECS["gaussian_blend"], widen((background, objects, boxes)), {"sigma": 1.0}
    most, growth = spec.grad_bound(g.dtype, [g.double()], *args, **kwargs), spec.growth(*args, **kwargs)
    for name, mine, exact in zip(("background", "objects"), grads, wanted, strict=True):
        close(mine, exact, most[name], growth)


def test_an_object_is_not_read_where_its_box_is_not() -> None:
    background, objects = randn(1, 2, 40, 150), randn(2, 1, 2, 40, 150, seed=1)
    boxes = [[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.9, 0.8]]
    want = gaussian_blend(background, objects, boxes, sigma=1.0)
    objects[0, :, :, 20:], objects[1, :, :, :, :80] = float("nan"), float("inf")
    assert torch.equal(gaussian_blend(background, objects, boxes, sigma=1.0), want)
    sigma = torch.tensor(1.0, requires_grad=True)
    (ds,) = torch.autograd.grad(gaussian_blend(background, objects, boxes, sigma=sigma).sum(), sigma)
    assert ds.isfinite()


def test_what_the_device_alone_knows_of_boxes_is_nan_not_an_error() -> None:
    sigma = torch.tensor([1.0, float("nan"), 1e30])
    masks = box_mask(torch.tensor([[0.1, 0.1, 0.8, 0.8]] * 3), (9, 12), sigma=sigma)
    assert masks[0].isfinite().all()
    assert masks[1:].isnan().all()
