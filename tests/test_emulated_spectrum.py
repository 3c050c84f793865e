"""The CUDA kernels of the spectra under csrc/emu: every path that a size can take, against float64."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from emu.harness import Emulator

import fastdiff
from fastdiff.cli import _check
from fastdiff.ops import SPECS, radial_spectrum, spectral_features, spectrum

CALLS = [(spectral_features, spectrum.spectral_features_reference, {"shift": s}) for s in (False, True)]
CALLS += [(radial_spectrum, spectrum.radial_spectrum_reference, {"normalize": s}) for s in (False, True)]


@pytest.fixture
def emu(built: Emulator) -> Iterator[Emulator]:
    built.reset()
    with built.operators(), fastdiff.use_backend("native"):
        yield built
    built.reset()


def launches(monkeypatch: pytest.MonkeyPatch, one: bool) -> None:
    """Whole images by one block each, where they fit; or rows and columns by many."""
    monkeypatch.setattr(spectrum, "_TINY", 1 << 60 if one else 0)
    monkeypatch.setattr(spectrum, "_SMALL", 0)
    monkeypatch.setattr(spectrum, "_MANY", 1 << 60)


def clusters(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Each image by a cluster of so many blocks."""
    monkeypatch.setattr(spectrum._DeviceTables, "together", lambda self, *_: (0, ranks))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor, units: float = 16) -> None:
    """To so many roundings of the largest value, which the root mean square of the spectrum does not exceed."""
    assert not got.isnan().any()
    scale = want.abs().max().item() or 1.0
    torch.testing.assert_close(got.double() / scale, want.double() / scale, rtol=0, atol=units * 2.0**-24)


def found(x: torch.Tensor, log: bool = False) -> list[torch.Tensor]:
    """Outputs and gradients of all calls."""
    results = []
    for function, _, options in CALLS:
        leaf = x.clone().requires_grad_() if x.is_contiguous() else x.detach().requires_grad_()
        y = function(leaf, log=log, **options)
        (grad,) = torch.autograd.grad(y, leaf, torch.cos(torch.arange(y.numel())).reshape(y.shape).to(y.dtype))
        results += [function(leaf.detach(), log=log, **options), y.detach(), grad]
    return results


def wanted(x: torch.Tensor, log: bool = False) -> list[torch.Tensor]:
    results = []
    for _, reference, options in CALLS:
        leaf = x.double().requires_grad_()
        y = reference(leaf, log=log, **options)
        (grad,) = torch.autograd.grad(y, leaf, torch.cos(torch.arange(y.numel())).reshape(y.shape).double())
        results += [y.detach(), y.detach(), grad]
    return results


def check(x: torch.Tensor, log: bool = False) -> list[torch.Tensor]:
    got = found(x, log)
    for i, (a, b) in enumerate(zip(got, wanted(x, log), strict=True)):
        if i % 3 == 2 and b.abs().max() < 1e-9:  # one ring, normalised: no gradient but a rounding error
            assert a.abs().max() < 1e-5
            continue
        # The phase of a frequency has the error of F over |F|, and small |F| occur.
        close(a, b, units=16 if i % 3 < 2 else 2048)
    return got


# Radices 8, 4, 2, 3, 5, 7 alone, in company and twice; direct sums first and later, twice; Bluestein.
LENGTHS = [*range(1, 17), 18, 20, 22, 24, 25, 27, 32, 33, 35, 49, 61, 64, 67, 100, 121, 128, 134, 143, 256, 257]


@pytest.mark.parametrize("one", [True, False])
def test_every_length_along_either_axis(emu: Emulator, monkeypatch: pytest.MonkeyPatch, one: bool) -> None:
    launches(monkeypatch, one)
    for n in LENGTHS:
        for shape in ((1, n, 6), (1, 5, n), (1, n, 1), (1, 1, n)):
            x = randn(*shape)
            close(spectral_features(x), spectrum.spectral_features_reference(x.double()))
            close(radial_spectrum(x), spectrum.radial_spectrum_reference(x.double()))


# Just below and above the tiles of 32 rows and 32 (DC and Nyquist are one: 2 x 16) columns; every kind of length.
SIZES = [(1, 1), (1, 9), (7, 1), (31, 30), (32, 32), (33, 34), (34, 33), (63, 65), (24, 67), (67, 22), (84, 82)]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_launch_and_two_to_the_same_bits(
    emu: Emulator, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], log: bool
) -> None:
    x = randn(2, 3, *size) + 0.3
    launches(monkeypatch, True)
    one = check(x, log)
    launches(monkeypatch, False)
    for a, b in zip(one, found(x, log), strict=True):
        assert torch.equal(a, b)


# Columns that blocks divide evenly (48 = 2 x 24), unevenly, and fewer than there are blocks; pairs of rows likewise, in
# one group each and in several; radices that work in place, direct sums and Bluestein's method.
CLUSTERED = [(2, 32, 96), (2, 45, 50), (4, 52, 64), (4, 7, 9), (8, 36, 129), (8, 33, 24), (4, 67, 22), (2, 70, 14)]


@pytest.mark.parametrize(("ranks", "H", "W"), CLUSTERED)
def test_a_cluster_and_two_launches_to_the_same_bits(
    emu: Emulator, monkeypatch: pytest.MonkeyPatch, ranks: int, H: int, W: int
) -> None:
    x = randn(2, 3, H, W) + 0.3
    launches(monkeypatch, False)
    two = {False: check(x), True: found(x, True)}
    clusters(monkeypatch, ranks)
    for log in (False, True):
        emu.seed(H + log)
        emu.grid_limit(1 + log)  # clusters: one that does both images, or one each
        for a, b in zip(two[log], found(x, log), strict=True):
            assert torch.equal(a, b)
        assert emu.last_kernel() == "clusters"


@pytest.mark.parametrize("name", ["spectral_features", "radial_spectrum"])
def test_clusters_match_float64(emu: Emulator, name: str) -> None:
    emu.hopper(True)
    for number, dtype in enumerate([torch.float32, torch.float16, torch.bfloat16] * 2):
        args, kwargs = SPECS[name].example(random.Random(f"{name} {number}"), dtype, torch.device("cpu"))
        emu.seed(number)
        finding = _check.check(_check.expect(SPECS[name], args, kwargs, gradients=True, seed=number))
        assert not finding.failures, (number, _check.describe(args, kwargs), finding.failures)


def test_who_does_an_image(emu: Emulator) -> None:
    """A cluster only where it was asked for, of so many blocks as the size needs; whatever does not fit, by others."""

    def kernel(*shape: int) -> str:
        close(spectral_features(x := randn(*shape)), spectrum.spectral_features_reference(x.double()), units=32)
        return emu.last_kernel()

    assert kernel(1, 33, 40) == "whole"
    assert kernel(1, 84, 82) == "(columns<true>)"
    emu.hopper(True)
    assert kernel(1, 32, 32) == "whole"
    assert kernel(1, 33, 40) == kernel(1, 84, 82) == kernel(1, 256, 256) == "clusters"
    assert kernel(64, 3, 40, 4) == "whole"
    assert kernel(1, 1, 14000) == "(columns<true>)"


def test_the_largest_image_of_a_cluster(emu: Emulator) -> None:
    emu.hopper(True)
    x = randn(1, 3, 512, 512)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    up = randn(1, 512, 512, seed=1)
    got, want = spectral_features(leaf), spectrum.spectral_features_reference(wide)
    assert emu.last_kernel() == "clusters"
    close(got.detach(), want.detach())
    (grad,), (expected,) = torch.autograd.grad(got, leaf, up), torch.autograd.grad(want, wide, up.double())
    assert emu.last_kernel() == "clusters"
    close(grad, expected, units=2048)


@pytest.mark.parametrize(
    "shape", [(1, 1, 14000), (1, 14000, 2), (1, 3, 6007), (1, 6007, 1), (1, 2, 4500), (1, 2000, 30)]
)
def test_long_sides(emu: Emulator, shape: tuple[int, ...]) -> None:
    """Fewer lanes per block, one, and none: what does not fit into shared memory is done in global memory."""
    x = randn(*shape)
    close(spectral_features(x), spectrum.spectral_features_reference(x.double()), units=32)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    up = randn(*shape, seed=1)
    (got,) = torch.autograd.grad(spectral_features(leaf, log=True), leaf, up)
    (want,) = torch.autograd.grad(spectrum.spectral_features_reference(wide, log=True), wide, up.double())
    close(got, want, units=2048)


def test_the_batch_in_waves_changes_nothing(emu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(5, 3, 36, 40)
    launches(monkeypatch, False)
    whole = found(x)
    for wave in (1, 2, 3):
        monkeypatch.setattr(spectrum._DeviceTables, "together", lambda self, B, *_, wave=wave: (min(B, wave), 0))
        for a, b in zip(whole, found(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one", [True, False])
def test_layouts_and_types(emu: Emulator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, one: bool) -> None:
    """Vectors of 16 bytes, or pixel by pixel: the same bits, those of float32 rounded."""
    launches(monkeypatch, one)
    dense = (randn(2, 3, 33, 40) / 64).to(dtype)
    want = [t.to(dtype) for t in found(dense.float())[::3]]  # outputs; gradients meet another upstream
    gradients = found(dense)[2::3]
    larger = torch.full((2, 3, 35, 45), float("nan"), dtype=dtype)
    larger[:, :, 1:34, 3:43] = dense
    turned = dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for x in (dense, larger[:, :, 1:34, 3:43], turned):
        got = found(x)
        for a, b in zip(got[::3], want, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(got[2::3], gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("hopper", [False, True])
def test_a_sample_alone_and_in_a_batch(emu: Emulator, monkeypatch: pytest.MonkeyPatch, hopper: bool) -> None:
    emu.hopper(hopper)
    monkeypatch.setattr(spectrum, "_MANY", 3)
    x = randn(3, 3, 84, 90)  # by one block together, in two launches or by a cluster alone
    whole = spectral_features(x), radial_spectrum(x)
    for b in range(3):
        assert torch.equal(spectral_features(x[b : b + 1])[0], whole[0][b])
        assert torch.equal(radial_spectrum(x[b : b + 1])[0], whole[1][b])


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e-25, 1e25, 1e34])
def test_black_tiny_and_huge_images(emu: Emulator, monkeypatch: pytest.MonkeyPatch, scale: float, one: bool) -> None:
    launches(monkeypatch, one)
    x = randn(1, 3, 16, 18).double() * scale
    a, b = x.float().requires_grad_(), x.clone().requires_grad_()
    got, want = spectral_features(a), spectrum.spectral_features_reference(b)
    close(got.detach(), want.detach())
    (grad,), (expected,) = torch.autograd.grad(got.sum(), a), torch.autograd.grad(want.sum(), b)
    close(grad, expected, units=2048)
    close(spectral_features(x.float(), log=True), torch.log1p(want.detach()))
    assert radial_spectrum(x.float(), normalize=True).isfinite().all() or scale > 1e30


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(8, 8), (5, 67), (61, 12), (1, 1)])
def test_nan_and_infinity_reach_every_frequency(emu: Emulator, value: float, size: tuple[int, int]) -> None:
    x = randn(2, 3, *size)
    x[0, 1, size[0] // 2, size[1] // 3] = value
    for log in (False, True):
        y, profile = spectral_features(x, log=log), radial_spectrum(x, log=log)
        assert not y[0].isfinite().any()
        assert not profile[0].isfinite().any()
        assert torch.equal(y[1:], spectral_features(x[1:], log=log))


def test_log_is_log1p_to_an_ulp_or_two(emu: Emulator) -> None:
    x = torch.cat([torch.zeros(1), torch.logspace(-30, 37, 400)])
    got = spectral_features(x[:, None, None], log=True).flatten().double()  # 1 x 1: |F| is the pixel itself
    want = torch.log1p(x.double())
    assert ((got - want).abs() <= 2.0**-22 * want).all()


def test_a_cosine_lands_in_its_bins_and_ring(emu: Emulator) -> None:
    for H, W in ((64, 64), (37, 66)):
        for fy, fx in ((0, 0), (3, 5), (0, 7), (6, 0), (5, -4)):
            y, x = torch.arange(H).double()[:, None], torch.arange(W).double()
            image = torch.cos(2 * torch.pi * (fy * y / H + fx * x / W)).float()[None]
            want = torch.zeros(H, W)
            for sign in (1, -1):
                want[(H // 2 + sign * fy) % H, (W // 2 + sign * fx) % W] += H * W / 2
            torch.testing.assert_close(spectral_features(image)[0], want, rtol=1e-5, atol=1e-3)
            assert radial_spectrum(image)[0].argmax() == int((fy * fy + fx * fx) ** 0.5)
