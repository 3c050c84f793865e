"""Attention on the dot product of bf16 pairs (csrc/cpu/attention_bf16.cpp), with and without a processor that has it.

Where there is none, the emulator's module has instruction sets whose dot product is a software body of the same
arithmetic: `soft_bf16` on vectors of four, `soft_bf16_wide` on vectors of sixteen, as it ships.
"""

from __future__ import annotations

import contextlib
import math
import platform
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emu import harness

import fastdiff
from fastdiff import _native, ops
from fastdiff.cli._check import check, expect
from fastdiff.ops import SPECS
from fastdiff.ops.attention import _partner, attention_reference

ROOT = Path(__file__).resolve().parents[1]
BF16 = torch.bfloat16
U = 2.0**-8  # of bfloat16: half the distance of 1 from the next number
COMPILER = shutil.which("g++") or shutil.which("clang++")
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]


# ----------------------------------------------------------------------------------------------- the dot product itself


def probe(tmp_path: Path, flags: list[str]) -> list[str]:
    if COMPILER is None or platform.system() != "Linux":
        pytest.skip("needs a C++ compiler on Linux")
    program = tmp_path / f"probe{len(flags)}"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O2", "-w", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *flags,
         "-DFASTDIFF_ISA=probed", str(ROOT / "tests/cpu/dot_probe.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


def as_float(bits: int) -> float:
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def as_bits(value: float) -> int:
    return 0x7FC00000 if math.isnan(value) else struct.unpack("<I", struct.pack("<f", value))[0]


def rounded(value: Fraction, digits: int) -> float:
    """To nearest even, infinity beyond the largest float of so many digits, zero for subnormals; value is not 0."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - digits + 1)
    result = round(size / unit) * unit  # Python rounds halves to even
    sign = 1.0 if value > 0 else -1.0
    if result >= Fraction(2) ** 128:
        return sign * math.inf
    return sign * float(result) if result >= Fraction(2) ** -126 else sign * 0.0


def fma(a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))) or a * b == 0 or c == 0:
        finite = math.isfinite(a) and math.isfinite(b) and a * b != 0
        if not (finite and c == 0):
            return float(a * b + c)  # exact, infinite or NaN: a product of bfloat16 is a double
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return rounded(exact, 24) if exact else 0.0


def expected(name: str, words: list[int]) -> int:
    if name == "pair":
        halves = []
        for word in words:
            x = as_float(word)
            y = x if x == 0 or not math.isfinite(x) else rounded(Fraction(x), 8)
            halves.append(as_bits(y) >> 16)
        return halves[1] << 16 | halves[0]
    acc, a, b = words
    total = as_float(acc)
    for shift in (0xFFFF0000, 0xFFFF):  # the upper elements first
        x, y = (as_float((w & shift) << (0 if shift > 0xFFFF else 16)) for w in (a, b))
        total = fma(x, y, total)
    return as_bits(total)


@pytest.mark.parametrize("flags", [[], WIDE], ids=["base", "wide"])
def test_the_software_body_is_the_documented_arithmetic(flags: list[str], tmp_path: Path) -> None:
    if flags and "avx512" not in _native.isas():
        pytest.skip("no AVX-512 here")
    seen = set()
    for line in probe(tmp_path, [*flags, "-DFASTDIFF_SOFT_DOT"]):
        name, *words = line.split()
        *operands, got = (int(w, 16) for w in words)
        want = expected(name, operands)
        assert got == want, f"{line}: expected {want:08x}"
        seen.add((name, want & 0x7FFFFFFF in (0, 0x7F800000, 0x7FC00000), want >> 31))
    assert len(seen) >= 7  # zeros, infinities and plain numbers of both signs


@pytest.mark.skipif("avx512_bf16" not in _native.isas(), reason="no AVX512_BF16 here")
def test_the_instruction_is_its_software_body(tmp_path: Path) -> None:
    assert probe(tmp_path, [*WIDE, "-mavx512bf16"]) == probe(tmp_path, [*WIDE, "-DFASTDIFF_SOFT_DOT"])


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.fixture(scope="session")
def module() -> ModuleType:
    reason = harness.why_not()
    if reason:
        pytest.skip(f"the module cannot be built: {reason}")
    return harness.build().kernels


@contextlib.contextmanager
def using(module: ModuleType | None, isa: str) -> Iterator[None]:
    """Only native kernels of `isa`, out of `module` instead of the library's own."""
    before = _native.extension, _native._fast
    if module is not None:
        _native.extension, _native._fast = module, None
    try:
        with fastdiff.use_backend("native"), _native.use_isa(isa):
            yield
    finally:
        _native.extension, _native._fast = before
        _native._set_backend(_native.backend)


@pytest.fixture(params=["soft_bf16", "soft_bf16_wide", "avx512_bf16"])
def soft(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Something to enter that makes the dot product of pairs serve bfloat16."""
    isa, library = request.param, None
    if isa != "avx512_bf16":
        library = request.getfixturevalue("module")
    if isa not in (library.isas() if library else _native.isas()):
        pytest.skip(f"no {isa} here")
    return lambda: using(library, isa)


def randn(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(BF16)


def three(B: int, H: int, N: int, M: int, d: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    return randn(B, H, N, d, size=size), randn(B, H, M, d, seed=1), randn(B, H, M, d, seed=2)


def within(spec: str, *args: Any, any_nonfinite: bool = False, **kwargs: Any) -> float:
    wanted = expect(SPECS[spec], args, kwargs, gradients=False)
    wanted.any_nonfinite = any_nonfinite
    found = check(wanted)
    assert not found.failures, found.failures
    return found.worst_output


@pytest.mark.parametrize("name", ["attention", "attention_qkvpacked"])
def test_random_examples_are_within_the_bound(name: str, soft: Callable[[], Any]) -> None:
    """The bound has the weights' rounding in it, and these get near enough to notice."""
    worst = 0.0
    with soft():
        for seed in range(120):
            args, kwargs = SPECS[name].example(random.Random(seed), BF16, torch.device("cpu"))
            found = check(expect(SPECS[name], args, kwargs, gradients=seed < 8, seed=seed))
            assert not found.failures, (seed, found.failures)
            worst = max(worst, found.worst_output)
    assert worst > 0.2


@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 33, 72, 131, 256])
def test_head_dims_and_lengths_around_every_tile_edge(d: int, soft: Callable[[], Any]) -> None:
    with soft():
        for N, M in ((1, 1), (4, 2), (11, 3), (13, 64), (15, 65), (16, 127), (17, 128), (47, 1), (48, 5), (49, 513),
                     (64, 7), (97, 66)):  # fmt: skip
            within("attention", *three(1, 1, N, M, d))


def test_weights_are_rounded_and_so_are_their_sums(soft: Callable[[], Any]) -> None:
    """Emulated in torch for one block of keys: what is left is float32 noise, and the rounding of the result.

    Sums of unrounded weights would be off by up to 2^-8; the mean of equal values is that value to float32.
    """
    for M in (1, 2, 5, 63, 64):
        q, k, v = three(2, 2, 50, M, 24)
        s = (q.double() @ k.double().mT) * 24**-0.5
        p = torch.exp(s - s.amax(-1, keepdim=True))
        low, high = (p * (1 + e) for e in (-(2.0**-18), 2.0**-18))
        sure = low.float().to(BF16) == high.float().to(BF16)  # of weights that float32 noise cannot round otherwise
        p = p.float().to(BF16).double()
        want = (p @ v.double()) / p.sum(-1, keepdim=True)
        moved = (p * 2 * U * ~sure) @ (v.double().abs() + 1)
        limit = U * want.abs() * 1.01 + moved * 2 + 2.0**-18
        with soft():
            assert ((ops.attention(q, k, v).double() - want).abs() <= limit).all()
            same = torch.full_like(v, 1.1)
            assert torch.equal(ops.attention(q, k, same), torch.full_like(q, 1.1))


def test_a_single_key_returns_its_value(soft: Callable[[], Any]) -> None:
    for N, d in ((1, 1), (17, 40), (65, 72)):
        q, k, v = three(2, 3, N, 1, d)
        with soft():
            assert torch.equal(ops.attention(q, k, v), v.expand(2, 3, N, d))


def test_the_order_of_sums(soft: Callable[[], Any]) -> None:
    """The upper element of a pair first: 2^30 - 2^30 + 1 is 1, and 2^30 + 1 - 2^30 is 0."""
    q, k = torch.zeros(1, 1, 3, 4, dtype=BF16), torch.zeros(1, 1, 4, 4, dtype=BF16)
    v = torch.tensor([0.0, 2.0**30, 1.0, -(2.0**30)], dtype=BF16).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    with soft():
        assert (ops.attention(q, k, v) == 0.25).all()
    q = torch.ones(1, 1, 2, 4, dtype=BF16)  # the same of the scores, seen as weights 1 : e
    k = torch.stack([torch.tensor([0.0, 2.0**30, 1.0, -(2.0**30)]), torch.zeros(4)])[None, None].to(BF16)
    v = torch.tensor([1.0, 0.0], dtype=BF16).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    with soft():
        assert (ops.attention(q, k, v, scale=1.0).float() - math.e / (1 + math.e)).abs().max() < 4 * U


def test_strided_views_and_packed_operands_have_the_bits_of_plain_ones(soft: Callable[[], Any]) -> None:
    for d in (6, 7, 72):
        wide = randn(2, 70, 3, 4, 2 * d + 1)
        for view in (wide[..., :d], wide[..., 1 : d + 1], wide[..., : 2 * d : 2], wide.flip(1)[..., :d]):
            q, k, v = (t.transpose(1, 2) for t in view.unbind(2))
            with soft():
                plain = ops.attention(q.contiguous(), k.contiguous(), v.contiguous())
                assert torch.equal(ops.attention(q, k, v), plain)
                assert torch.equal(ops.attention_qkvpacked(view), plain.transpose(1, 2))
                mixed = ops.attention(q, k.contiguous(), v.transpose(0, 1).contiguous().transpose(0, 1))
                assert torch.equal(mixed, plain)
                channels = (t.mT.contiguous().mT for t in (q, k, v))  # keys next to each other
                assert torch.equal(ops.attention(*channels), plain)
                assert torch.equal(ops.attention(*view.unbind(2), layout="bnhd"), plain.transpose(1, 2))


def test_samples_queries_and_threads_do_not_matter(soft: Callable[[], Any]) -> None:
    q, k, v = three(3, 2, 300, 700, 72)
    threads = torch.get_num_threads()
    with soft():
        whole = ops.attention(q, k, v)
        for b in range(3):
            assert torch.equal(whole[b : b + 1], ops.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1]))
        for first, n in ((0, 1), (13, 40), (63, 237), (299, 1)):
            assert torch.equal(whole[:, :, first : first + n], ops.attention(q[:, :, first : first + n], k, v))
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert torch.equal(whole, ops.attention(q, k, v))
        finally:
            torch.set_num_threads(threads)


def test_logits_of_ten_thousand_neither_overflow_nor_lose_the_winner(soft: Callable[[], Any]) -> None:
    q, k, v = three(1, 2, 40, 130, 72)
    size = 1e4 / float((q.float() @ k.float().mT).abs().amax())
    for scale in (size, -size):
        with soft():
            within("attention", q, k, v, scale=scale)
    # Every block of keys raises the maximum, or none does.
    k = torch.linspace(0, 60, 1300)[None, None, :, None].expand(1, 1, 1300, 24).div(24).to(BF16)
    q, v = torch.stack([torch.ones(24), -torch.ones(24)])[None, None].to(BF16), randn(1, 1, 1300, 24)
    with soft():
        within("attention", q, k, v, scale=1.0)


def test_nan_and_infinity_go_where_the_reference_takes_them(soft: Callable[[], Any]) -> None:
    for position in ("q", "k", "v"):
        for bad in (math.nan, math.inf, -math.inf):
            q, k, v = three(1, 2, 20, 67, 24)
            {"q": q, "k": k, "v": v}[position][0, 1, 3, 5] = bad
            with soft():
                got = ops.attention(q, k, v)
            want = attention_reference(q.double(), k.double(), v.double())
            assert torch.equal(got.isfinite(), want.isfinite()), (position, bad)
            assert torch.equal(got.isnan(), want.isnan()), (position, bad)
            if not math.isnan(bad) or position != "v":
                assert torch.equal(got == bad, want == bad)
    q, k, v = torch.ones(1, 1, 5, 8, dtype=BF16), randn(1, 1, 200, 8, seed=1), randn(1, 1, 200, 8, seed=2)
    k[:, :, :128, 3] = -math.inf  # two whole blocks of keys
    with soft():
        assert torch.equal(ops.attention(q, k, v), ops.attention(q, k[:, :, 128:], v[:, :, 128:]))
        k[:, :, :, 3] = -math.inf
        assert ops.attention(q, k, v).isnan().all()


def test_subnormal_elements_and_products_are_zero(soft: Callable[[], Any]) -> None:
    q, k, v = three(1, 1, 3, 3, 8)
    for exponent in (-127, -133):  # elements: of v, then of k, at what the other factor may be at most
        with soft():
            assert not ops.attention(q, k, torch.full_like(v, 2.0**exponent)).any()
            score = ops.attention(torch.full_like(q, 2.0**127), torch.full_like(k, 2.0**exponent), v, scale=1.0)
            assert torch.equal(score, ops.attention(q * 0, k, v))
            within("attention", q, k, torch.full_like(v, 2.0**exponent))
            within("attention", torch.full_like(q, 2.0**127), torch.full_like(k, 2.0**exponent), v)
    # Products of 2^-127 are zero alone, but not in a sum with 2^-120 that is 2^-125 off when that is taken away.
    q = torch.ones(1, 1, 1, 1, dtype=BF16)
    k = torch.tensor([0.0, *[-10 * math.log(2)] * 4, 0.0], dtype=BF16).view(1, 1, 6, 1)
    v = torch.tensor([-(2.0**-120), *[2.0**-117] * 4, 2.0**-120], dtype=BF16).view(1, 1, 6, 1)
    with soft():
        assert ops.attention(q, k, v, scale=1.0).item() == pytest.approx(2.0**-126, rel=0.05)
        assert ops.attention(q, k[:, :, :5], v[:, :, :5].abs().minimum(v[:, :, 1:2]), scale=1.0).item() > 0
        within("attention", q, k, v)


def test_norm_and_rotation_round_as_a_model_in_bfloat16_does(soft: Callable[[], Any]) -> None:
    """The call with norm and rotation is, to the bit, the call on q and k that were prepared in float32 and rounded."""
    for d in (8, 72):
        qkv, weight, other = randn(2, 70, 3, 2, d), randn(d, seed=3), randn(d, seed=4)
        angle = torch.arange(70)[:, None] * 100.0 ** (-torch.arange(0, d, 2) / d)
        rope = (angle.cos(), angle.sin())
        for options in ({"q_norm": weight}, {"rope": rope}, {"q_norm": weight, "k_norm": other, "rope": rope}):
            with soft():
                within("attention_qkvpacked", qkv, **options)
            plain = prepared(qkv, options)
            with soft():
                got, want = ops.attention_qkvpacked(qkv, **options), ops.attention_qkvpacked(plain)
            # Where float32 rounds another way than here, an element of q or k is one bfloat16 step off.
            assert (got == want).double().mean() > 0.99
            torch.testing.assert_close(got.float(), want.float(), atol=0.05, rtol=0.05)


def prepared(qkv: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    rows = list(qkv.float().unbind(2))
    for i, name in enumerate(("q_norm", "k_norm")):
        if name in options:
            rstd = torch.rsqrt(rows[i].square().mean(-1, keepdim=True) + 1e-6)
            rows[i] = rows[i] * rstd * options[name].float()
        if "rope" in options:
            cos, sin = (torch.cat([t, t], -1).unsqueeze(1) for t in options["rope"])
            rows[i] = rows[i] * cos + _partner(rows[i], False) * sin
    return torch.stack(rows, 2).to(BF16)


def test_calls_with_gradients_keep_float32_weights(soft: Callable[[], Any]) -> None:
    """Backward recomputes the scores in float32, and the weights of forward must be those."""
    q, k, v = three(1, 2, 30, 70, 64)
    with soft():
        plain = ops.attention(q, k, v)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        trained = ops.attention(*leaves)
    with fastdiff.use_backend("native"), _native.use_isa("base"):
        want = ops.attention(q, k, v)
    assert not torch.equal(plain, want)
    assert (trained == want).double().mean() > 0.99  # avx512 differs from base in the last bit of float32
    size = 1e8  # logits of 1e8: one key has all the weight, and dv must say so
    leaves = [t.clone().requires_grad_() for t in (q * size, k, v)]
    with soft():
        (dv,) = torch.autograd.grad(ops.attention(*leaves).sum(), [leaves[2]])
    torch.testing.assert_close(dv.float().sum(2), torch.full((1, 2, 64), 30.0), atol=0, rtol=2 * U)


def test_other_types_are_those_of_the_set_below(soft: Callable[[], Any]) -> None:
    for dtype in (torch.float32, torch.float16):
        q, k, v = (t.to(dtype) for t in three(1, 2, 50, 70, 64))
        with soft():
            within("attention", q, k, v)


def test_the_module_is_put_back(module: ModuleType) -> None:
    before = _native.extension, _native.fast, _native.isas()
    assert not any("soft" in isa for isa in _native.isas())
    with using(module, "soft_bf16"):
        assert _native.isas()[:2] == ["base", "soft_bf16"]
    assert (_native.extension, _native.fast, _native.isas()) == before
