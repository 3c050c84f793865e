"""Calls on which a deliberate mistake of a CUDA kernel (csrc/cuda/mutate.cuh) must show, family by family.

An entry: the operator, a function that makes its arguments, whether the mistake is in the backward kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    op: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    backward: bool = False
    grid: int = 1000  # blocks of a launch, at most
    hopper: bool = False  # in a kernel for sm_90 or sm_90a


def _draws(M: int, dtype: torch.dtype) -> Any:
    x = torch.ones(2, M, dtype=dtype)
    return lambda: ((x, x, 0.3, 0.6), {"eta": 1.0, "seed": 3})


UPDATE: dict[str, Case] = {
    "kNoiseBlock": Case("ddim_step", _draws(64, torch.bfloat16)),
    "kNoiseLane": Case("ddim_step", _draws(7, torch.float32)),
}

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _normal(*shape: int, **options: Any) -> Callable[[], Call]:
    return lambda: ((torch.randn(shape, generator=torch.Generator().manual_seed(0)),), options)


GELU = {
    "kGeluStep": Case("gelu", _normal(5000)),
    "kGeluTail": Case("gelu", _normal(1027), backward=True),
}


def _attention(N: int, M: int, d: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> Callable[[], Any]:
    def make() -> Any:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, n, d, generator=g).to(dtype) for n in (N, M, M))
        return (q, k, v), {"scale": scale}

    return make


def _attention_normed(N: int, d: int, dtype: torch.dtype = torch.float16, size: float = 1.0) -> Callable[[], Any]:
    def make() -> Any:
        g = torch.Generator().manual_seed(0)
        qkv, w = torch.randn(1, N, 3, 1, d, generator=g), torch.randn(2, d, generator=g)
        return (qkv.to(dtype) * 3,), {"q_norm": w[0] * size, "k_norm": w[1] * size}

    return make


ATTENTION = {
    "kAttentionTileBarrier": Case("attention", _attention(70, 150, 72)),
    "kAttentionQueryBarrier": Case("attention", _attention(60, 20, 128)),
    "kAttentionPrepared": Case("attention_qkvpacked", _attention_normed(64, 128)),
    "kAttentionStage": Case("attention", _attention(20, 150, 32)),
    "kAttentionSingleStage": Case("attention", _attention(40, 70, 128, torch.float32)),
    "kAttentionResultBarrier": Case("attention", _attention(70, 60, 72)),
    "kAttentionRagged": Case("attention", _attention(5, 70, 32, scale=0.1)),
    "kAttentionRescale": Case("attention", _attention(20, 150, 32)),
    "kAttentionDelta": Case("attention", _attention(10, 20, 32), True),
    "kAttentionBackTile": Case("attention", _attention(70, 150, 32), True),
    "kAttentionBackResult": Case("attention", _attention(20, 40, 256, scale=0.01), True),
    "kAttentionPartTail": Case("attention_qkvpacked", _attention_normed(20, 32, torch.float32, 0.1), True),
}


def hopper(tokens: int, keys: int, scale: float = 1.0, B: int = 2, d: int = 72) -> Callable[[], Any]:
    def make() -> Any:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, 2, n, d, generator=g) for n in (tokens, keys, keys))
        k[:, :, 128:] *= scale
        return (q.bfloat16(), k.bfloat16(), v.bfloat16()), {}

    return make


HOPPER: dict[str, Case] = {
    "kHopperInit": Case("attention", hopper(130, 257), hopper=True),
    "kHopperEmpty": Case("attention", hopper(8, 900), hopper=True, grid=1),
    "kHopperFull": Case("attention", hopper(8, 900), hopper=True),
    "kHopperWait": Case("attention", hopper(8, 300), hopper=True),
    "kHopperShrink": Case("attention", hopper(8, 300, scale=3.0), hopper=True),
    "kShortInit": Case("attention", hopper(130, 130), hopper=True),
    "kShortKeysEmpty": Case("attention", hopper(8, 70, d=64), hopper=True, grid=1),
    "kShortValuesEmpty": Case("attention", hopper(8, 70, d=64), hopper=True, grid=1),
    "kShortQueriesEmpty": Case("attention", hopper(300, 20, d=64), hopper=True, grid=1),
    "kShortKeysFull": Case("attention", hopper(8, 130), hopper=True),
    "kShortValuesFull": Case("attention", hopper(8, 20, B=12, d=64), hopper=True),
    "kShortWait": Case("attention", hopper(8, 130), hopper=True),
    "kShortRagged": Case("attention", hopper(8, 100, d=64), hopper=True),
}


def _scan(D: int, L: int, N: int, layout: str, *, resets: bool = False) -> Callable[[], Any]:
    def make() -> Any:
        g = torch.Generator().manual_seed(5)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g)

        first = layout == "bdl"
        whole, projected = ((1, D, L), (1, N, L)) if first else ((1, L, D), (1, L, N))
        args = (randn(*whole), randn(*whole).abs(), -randn(D, N).abs(), randn(*projected), randn(*projected), randn(D))
        marks = {"resets": torch.rand(1, L, generator=g) < 0.2} if resets else {}
        return args, {"layout": layout, "z": randn(*whole), **marks}

    return make


def _segments(B: int, *marks: int) -> Callable[[], Any]:
    """Long enough to be cut, decays slow enough for the first segment to matter in the last; restarts at `marks`."""

    def make() -> Any:
        (u, delta, A, *rest), kwargs = _scan(5, 500, 3, "bld")()
        resets = torch.zeros(500, dtype=torch.bool)
        resets[list(marks)] = True
        u, delta, *projections = (t.expand(B, -1, -1) for t in (u, delta, *rest[:2]))
        z = kwargs["z"].expand(B, -1, -1)
        return (u, delta, A * 1e-3, *projections, rest[2]), {"layout": "bld", "z": z, "resets": resets}

    return make


SCAN: dict[str, Case] = {
    "kScanTurn": Case("selective_scan", _scan(33, 40, 8, "bld"), grid=1),
    "kScanTileBarrier": Case("selective_scan", _scan(33, 40, 8, "bld"), grid=1),
    "kScanSumBarrier": Case("selective_scan", _scan(33, 40, 8, "bld"), grid=1),
    "kScanOutBarrier": Case("selective_scan", _scan(33, 40, 8, "bdl"), grid=1),
    "kScanStageBarrier": Case("selective_scan", _scan(32, 40, 8, "bld"), grid=1),
    "kScanAhead": Case("selective_scan", _scan(32, 40, 8, "bld")),
    "kScanGateWait": Case("selective_scan", _scan(32, 40, 8, "bld")),
    "kScanCarry": Case("selective_scan", _segments(1)),
    "kScanCarryReset": Case("selective_scan", _segments(1, 200)),
    "kScanRestarted": Case("selective_scan", _segments(5, 70)),
    "kScanReset": Case("selective_scan", _scan(5, 20, 3, "bld", resets=True)),
    "kBackStageBarrier": Case("selective_scan", _scan(32, 40, 8, "bld"), True, grid=1),
    "kBackAhead": Case("selective_scan", _scan(32, 64, 8, "bld"), True),
    "kBackTurn": Case("selective_scan", _scan(33, 40, 8, "bld"), True, grid=1),
    "kBackTileBarrier": Case("selective_scan", _scan(33, 40, 8, "bld"), True, grid=1),
    "kBackSumBarrier": Case("selective_scan", _scan(33, 40, 8, "bld"), True, grid=1),
    "kBackOutBarrier": Case("selective_scan", _scan(33, 40, 8, "bdl"), True, grid=1),
    "kBackSumTurn": Case("selective_scan", _scan(33, 40, 8, "bld"), True, grid=1),
}


def _conv(D: int, L: int, K: int, layout: str) -> Callable[[], Any]:
    def make() -> Any:
        g = torch.Generator().manual_seed(6)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g)

        x = randn(3, D, L) if layout == "bdl" else randn(3, L, D)
        return (x, randn(D, K), randn(D), "silu"), {"layout": layout, "initial_state": randn(3, D, K - 1)}

    return make


CONV: dict[str, Case] = {
    "kConvStateBarrier": Case("causal_conv1d", _conv(33, 70, 4, "bdl"), grid=2),
    "kConvTileBarrier": Case("causal_conv1d", _conv(33, 130, 4, "bld"), grid=2),
    "kConvOutBarrier": Case("causal_conv1d", _conv(33, 130, 4, "bdl"), grid=2),
    "kConvBackTileBarrier": Case("causal_conv1d", _conv(33, 130, 4, "bld"), True, grid=2),
    "kConvBackSumBarrier": Case("causal_conv1d", _conv(33, 130, 4, "bld"), True, grid=2),
    "kConvBackOutBarrier": Case("causal_conv1d", _conv(33, 130, 4, "bdl"), True, grid=2),
    "kConvHalo": Case("causal_conv1d", _conv(2, 70, 4, "bld"), True),
    "kConvPartBarrier": Case("causal_conv1d", _conv(2, 600, 4, "bld"), True),
}


def _image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _blur(shape: tuple[int, ...], sigma: float, backward: bool = False, grid: int = 1000, **options: Any) -> Case:
    return Case("gaussian_blur", lambda: ((_image(*shape), torch.tensor(sigma)), options), backward, grid)


def _wide(shape: tuple[int, ...], sigma: float, grid: int = 1000, **options: Any) -> Case:
    """With a number for sigma: nothing but the sliding path is launched."""
    return Case("gaussian_blur", lambda: ((_image(*shape), sigma), options), grid=grid)


def _spoiled(shape: tuple[int, ...], sigma: float, grid: int = 1000) -> Case:
    def make() -> Call:
        x = _image(*shape)
        x[0, -1, -1] = float("inf")
        return (x, sigma), {"border": "constant"}

    return Case("gaussian_blur", make, grid=grid)


def _blend(shape: tuple[int, ...], boxes: list[list[float]], sigma: float = 1.0, backward: bool = False) -> Case:
    return Case(
        "gaussian_blend",
        lambda: ((_image(*shape), _image(len(boxes), *shape, seed=1), boxes), {"sigma": sigma}),
        backward,
    )


_BOX = [0.1, 0.2, 0.7, 0.9]

GAUSSIAN: dict[str, Case] = {
    "kFoldHalf": _blur((1, 5, 6), 4.0),
    "kDoubleSumBarrier": _blur((1, 20, 30), 1.0, backward=True),
    "kTileBarrier": _blur((1, 20, 30), 1.0),
    "kRowsBarrier": _blur((1, 50, 30), 2.0),
    "kRowsInPlace": _blur((1, 20, 60), 2.0),
    "kTileReuse": _blur((4, 20, 30), 1.0, grid=1),
    "kTailTap": _blur((1, 20, 30), 1.0),
    "kRingBarrier": _blur((1, 90, 30), 30.0, kernel_size=(141, 3), border="constant"),
    "kEdgeHalf": _blur((1, 20, 30), 1.0, backward=True),
    "kSlideSystem": _wide((1, 64, 64), 16.0),
    "kSlideFold": _wide((1, 64, 64), 70.0),
    "kSlideEnds": _wide((1, 64, 64), 16.0, border="replicate"),
    "kSlideStart": _wide((1, 64, 64), 16.0, grid=1),
    "kSlideCarry": _wide((1, 64, 64), 16.0),
    "kSlidePower": _wide((1, 64, 64), 16.0),
    "kSlideTurn": _wide((1, 264, 64), 16.0),
    "kSlideForget": _spoiled((1, 64, 64), 16.0),
    "kSlideSpoiled": _spoiled((1, 64, 64), 16.0),
    "kSlideReuse": _spoiled((1, 64, 64), 16.0, grid=1),
    "kProfileBarrier": _blend((1, 1, 20, 30), [_BOX, _BOX]),
    "kBoxEnd": _blend((1, 1, 20, 30), [_BOX]),
    "kSkippedBox": _blend((1, 1, 40, 32), [[0.0, 0.0, 1.0, 0.83]], sigma=0.0),  # one row of it in the second tile
    "kLaterMasks": _blend((1, 1, 20, 30), [_BOX, _BOX], backward=True),
}

SPECTRUM = {
    "kLoadBarrier": Case("spectral_features", _normal(1, 33, 20)),
    "kPassBarrier": Case("spectral_features", _normal(1, 3, 12, 32)),
    "kTwiddleBarrier": Case("spectral_features", _normal(1, 44, 22)),
    "kRowsReuse": Case("spectral_features", _normal(1, 260, 40), backward=True, grid=1),
    "kColumnsReuse": Case("spectral_features", _normal(1, 84, 82), backward=True, grid=1),
    "kGroupReuse": Case("spectral_features", _normal(1, 70, 12)),
    "kMagnitudeBarrier": Case("radial_spectrum", _normal(1, 84, 82)),
    "kPartialBarrier": Case("radial_spectrum", _normal(1, 30, 36)),
    "kUnshifted": Case("spectral_features", _normal(1, 5, 7)),
    "kMirrorRow": Case("spectral_features", _normal(1, 5, 7)),
    "kNyquistSlope": Case("spectral_features", _normal(1, 5, 8), backward=True),
    "kOddRow": Case("spectral_features", _normal(1, 5, 8), backward=True),
}


def _cluster(*shape: int, op: str = "spectral_features", backward: bool = False, grid: int = 1000) -> Case:
    return Case(op, _normal(*shape), backward, grid, hopper=True)


SPECTRUM_CLUSTER = {
    "kClusterReuse": _cluster(2, 33, 40, grid=1),
    "kClusterColumns": _cluster(1, 70, 16),
    "kClusterGroup": _cluster(1, 70, 16),
    "kClusterPartial": _cluster(4, 5, 256, op="radial_spectrum", grid=1),
    "kClusterOwner": _cluster(1, 33, 40),
    "kClusterPlace": _cluster(1, 33, 40),
    "kClusterOdd": _cluster(1, 33, 41),
    "kClusterGather": _cluster(1, 33, 40, backward=True),
    "kClusterLeave": _cluster(2, 70, 16, backward=True, grid=1),
    "kClusterBackGroup": _cluster(1, 70, 16, backward=True),
}

CASES = {**UPDATE, **GELU, **ATTENTION, **HOPPER, **SCAN, **CONV, **GAUSSIAN, **SPECTRUM, **SPECTRUM_CLUSTER}
