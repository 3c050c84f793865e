"""What only the spectra promise: any size, known transforms, rings, and the edges of floating point."""

from __future__ import annotations

import math

import pytest
import torch

import fastdiff
from fastdiff import _native
from fastdiff.ops import radial_spectrum, spectral_features, spectrum

pytestmark = pytest.mark.skipif(_native.extension is None, reason="no native extension: only the reference exists")
every_isa = pytest.mark.parametrize("isa", _native.isas())
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To 2^-20 of the largest value: some 16 roundings of a transform's root mean square."""
    scale = want.abs().max().item()
    torch.testing.assert_close(got.double() / scale, want.double() / scale, rtol=0, atol=2.0**-20)


# Every radix alone and in company, direct primes, Bluestein (67, 257, 134 = 2 * 67), and the smallest of all.
LENGTHS = [*range(1, 41), 48, 61, 64, 67, 75, 100, 121, 128, 134, 243, 255, 256, 257, 300, 512]


@every_isa
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length_along_either_axis(n: int, isa: str) -> None:
    with _native.use_isa(isa), fastdiff.use_backend("native"):
        for shape in ((2, n, 6), (2, 5, n), (1, n, 1), (1, 1, n)):
            x = randn(*shape)
            close(spectral_features(x), spectrum.spectral_features_reference(x.double()))
            close(radial_spectrum(x), spectrum.radial_spectrum_reference(x.double()))


@every_isa
@pytest.mark.parametrize("size", [(1, 1), (1, 8), (7, 1), (16, 16), (33, 20), (31, 67), (130, 134), (257, 36)])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_gradients_of_every_kind_of_size(size: tuple[int, int], channels: int, isa: str) -> None:
    x = randn(2, *([channels] if channels else []), *size) + 0.3
    calls = [(spectral_features, spectrum.spectral_features_reference, {"shift": s}) for s in (False, True)]
    calls += [(radial_spectrum, spectrum.radial_spectrum_reference, {"normalize": s}) for s in (False, True)]
    for function, reference, options in calls:
        if size == (1, 1) and options.get("normalize"):
            continue  # one ring, always 1: the gradient is 0, and what is found a rounding error
        for log in (False, True):
            a, b = x.clone().requires_grad_(), x.double().requires_grad_()
            with _native.use_isa(isa), fastdiff.use_backend("native"):
                y = function(a, log=log, **options)
                up = randn(*y.shape, seed=1)
                (got,) = torch.autograd.grad(y, a, up)
            (want,) = torch.autograd.grad(reference(b, log=log, **options), b, up.double())
            scale = want.abs().max().item()
            torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=1e-4)


@every_isa
@pytest.mark.parametrize("size", [(64, 64), (45, 60), (31, 67), (257, 257)])
def test_parseval(size: tuple[int, int], isa: str) -> None:
    x = randn(3, *size)
    with _native.use_isa(isa):
        energy = spectral_features(x).double().square().sum((1, 2)) / math.prod(size)
    torch.testing.assert_close(energy, x.double().square().sum((1, 2)), rtol=1e-6, atol=0)


@every_isa
@pytest.mark.parametrize("size", [(64, 64), (48, 50), (37, 67), (33, 31)])
@pytest.mark.parametrize("frequency", [(0, 0), (3, 5), (0, 7), (6, 0), (5, -4)])
def test_a_cosine_lands_in_its_bins_and_ring(size: tuple[int, int], frequency: tuple[int, int], isa: str) -> None:
    (H, W), (fy, fx) = size, frequency
    y, x = torch.arange(H).double()[:, None], torch.arange(W).double()
    image = torch.cos(2 * math.pi * (fy * y / H + fx * x / W)).float()[None]
    want = torch.zeros(H, W)
    for sign in (1, -1):
        want[(H // 2 + sign * fy) % H, (W // 2 + sign * fx) % W] += H * W / 2
    with _native.use_isa(isa):
        torch.testing.assert_close(spectral_features(image)[0], want, rtol=1e-5, atol=1e-3)
        profile = radial_spectrum(image)[0]
    ring = math.isqrt(fy * fy + fx * fx)
    assert profile.argmax() == ring
    others = torch.cat([profile[:ring], profile[ring + 1 :]])
    assert others.max() < 1e-3


def test_the_shift_is_over_the_last_two_axes_never_the_batch() -> None:
    x = randn(5, 3, 9, 12)
    whole = spectral_features(x)
    for b in range(5):
        assert torch.equal(spectral_features(x[b : b + 1])[0], whole[b])
    plain = spectral_features(x, shift=False)
    assert torch.equal(torch.fft.fftshift(plain, dim=(-2, -1)), whole)
    assert not torch.equal(torch.fft.fftshift(plain), whole)


def test_gray_is_the_luma_of_bt601_and_one_channel_is_itself() -> None:
    x = randn(2, 3, 16, 20)
    gray = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    close(spectral_features(x), spectral_features(gray))
    assert torch.equal(spectral_features(gray), spectral_features(gray[:, None]))
    assert torch.equal(radial_spectrum(gray), radial_spectrum(gray[:, None]))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (9, 7), (64, 30), (255, 257)])
def test_rings_are_all_there_and_none_is_empty(size: tuple[int, int]) -> None:
    H, W = size
    ky, kx = torch.arange(H) - H // 2, torch.arange(W) - W // 2
    ring = (ky[:, None] ** 2 + kx**2).double().sqrt().floor().long()
    sizes = torch.bincount(ring.flatten())
    assert (sizes > 0).all()
    assert spectrum.rings(H, W) == sizes.numel()
    m = spectral_features(randn(1, H, W))[0].double()
    want = torch.zeros(sizes.numel(), dtype=torch.float64).index_add(0, ring.flatten(), m.flatten()) / sizes
    torch.testing.assert_close(radial_spectrum(randn(1, H, W))[0].double(), want, rtol=1e-5, atol=1e-6)


def test_a_normalised_profile_is_a_distribution_whatever_the_brightness() -> None:
    x = randn(2, 3, 32, 40)
    profile = radial_spectrum(x, normalize=True)
    torch.testing.assert_close(profile.sum(1), torch.ones(2))
    torch.testing.assert_close(radial_spectrum(100 * x, normalize=True), profile, rtol=1e-5, atol=1e-6)


@every_isa
def test_a_black_image_is_zero_and_has_zero_gradients(isa: str) -> None:
    for function in (spectral_features, radial_spectrum):
        for option in (False, True):
            for log in (False, True):
                x = torch.zeros(1, 3, 12, 10, requires_grad=True)
                with _native.use_isa(isa):
                    y = function(x, log=log, **{"normalize" if function is radial_spectrum else "shift": option})
                    (g,) = torch.autograd.grad(y.sum(), x)
                assert not y.any()
                assert not g.any()


@every_isa
@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-12, 1e12, 1e25, 1e34])
def test_tiny_and_huge_images_neither_vanish_nor_overflow(scale: float, isa: str) -> None:
    x = randn(1, 3, 16, 18).double() * scale
    want = spectrum.spectral_features_reference(x)
    with _native.use_isa(isa):
        a = x.float().requires_grad_()
        got = spectral_features(a)
        (grad,) = torch.autograd.grad(got.sum(), a)
    close(got.detach(), want)
    b = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(spectrum.spectral_features_reference(b).sum(), b)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    close(spectral_features(x.float(), log=True), torch.log1p(want))


@every_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(8, 8), (5, 67), (61, 12), (1, 1)])
def test_nan_and_infinity_reach_every_frequency(value: float, size: tuple[int, int], isa: str) -> None:
    x = randn(2, 3, *size)
    x[0, 1, size[0] // 2, size[1] // 3] = value
    with _native.use_isa(isa):
        for log in (False, True):
            y, profile = spectral_features(x, log=log), radial_spectrum(x, log=log)
            assert not y[0].isfinite().any()
            assert not profile[0].isfinite().any()
            assert torch.equal(y[1:], spectral_features(x[1:], log=log))


@every_isa
def test_log_is_log1p_to_an_ulp_or_two(isa: str) -> None:
    x = torch.cat([torch.zeros(1), torch.logspace(-30, 37, 20_000)])
    with _native.use_isa(isa):
        got = spectral_features(x[:, None, None], log=True).flatten().double()  # 1 x 1: |F| is the pixel itself
    want = torch.log1p(x.double())
    assert ((got - want).abs() <= 2.0**-22 * want).all()


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", [(1, 3, 256, 250), (3, 3, 257, 130), (2, 600, 256), (5, 3, 256, 256)])
def test_threads_within_one_image_change_nothing(shape: tuple[int, ...], threads: int) -> None:
    x = randn(*shape)
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            leaf = x.clone().requires_grad_()
            y, profile = spectral_features(leaf), radial_spectrum(leaf, log=True, normalize=True)
            grads = torch.autograd.grad((y, profile), leaf, (torch.cos(y.detach()), torch.ones_like(profile)))
            found.append([y.detach(), profile.detach(), *grads])
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*found, strict=True):
        assert torch.equal(one, many)


def test_sixteen_bit_images_are_transformed_in_float32() -> None:
    for dtype in DTYPES[1:]:
        x = randn(2, 3, 40, 33).to(dtype)
        assert torch.equal(spectral_features(x), spectral_features(x.float()).to(dtype))
        assert torch.equal(radial_spectrum(x), radial_spectrum(x.float()).to(dtype))


def test_plans_cover_every_length() -> None:
    for n in range(1, 400):
        m = spectrum.bluestein_length(n)
        assert math.prod(spectrum.factor(m or n)) == (m or n)
        assert m == 0 or m >= 2 * n - 1
        assert m <= 3 * n


@every_isa
def test_the_modulus_of_infinity_is_infinity(isa: str) -> None:
    """A single pixel, whose spectrum is itself."""
    with _native.use_isa(isa):
        for value in (float("inf"), -float("inf"), float("nan")):
            x = torch.full((1, 1, 1), value)
            for log in (False, True):
                for function, reference in (
                    (spectral_features, spectrum.spectral_features_reference),
                    (radial_spectrum, spectrum.radial_spectrum_reference),
                ):
                    got, want = function(x, log=log), reference(x, log=log)
                    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (9, 7), (64, 30), (701, 1200)])
def test_the_ring_table_is_that_of_a_plain_loop(size: tuple[int, int]) -> None:
    H, W = size
    table, sizes = spectrum._ring_table(H, W)
    want = [0] * spectrum.rings(H, W)
    for ky in range(H):
        for kx in range(W):
            want[math.isqrt(min(ky, H - ky) ** 2 + min(kx, W - kx) ** 2)] += 1
    assert sizes.tolist() == want
    assert table.tolist() == [[math.isqrt(y * y + x * x) for x in range(W // 2 + 1)] for y in range(H // 2 + 1)]


def test_what_is_kept_is_bounded_in_bytes() -> None:
    for i in range(40):
        spectrum._tables(2000, 1500 + i, True)
    assert 0 < spectrum._tables.held() <= 32 << 20  # type: ignore[attr-defined]
    before = spectrum._tables.held()  # type: ignore[attr-defined]
    spectrum._tables(8000, 2000, True)  # 16 MB: not kept
    assert spectrum._tables.held() == before  # type: ignore[attr-defined]


def test_compiled_code_takes_any_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(radial_spectrum, fullgraph=True, backend="aot_eager")
    for i in range(12):
        x = randn(1, 20 + i, 30 + 2 * i)
        assert torch.equal(compiled(x), radial_spectrum(x))
