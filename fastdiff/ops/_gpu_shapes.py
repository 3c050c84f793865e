"""Benchmark shapes for GPUs, besides those of the specs: enough work for a large GPU, too much for two CPU cores.

They are the shapes that the targets of benchmarks/targets.py are about.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastdiff.ops import _adaln_spec, _attention_spec, _block_spec, _selective_scan_spec
from fastdiff.ops import _registry as reg

Shapes = dict[str, Callable[[torch.dtype, torch.device], reg.Call]]


def _adaln(parts: int) -> Shapes:
    def call(B: int, per_token: bool = False) -> Callable[[torch.dtype, torch.device], reg.Call]:
        made = _adaln_spec._dit(B, 256, 1152, 3, per_token=per_token)

        def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
            x, branch, *modulation = made(dtype, device)
            if parts == 1:
                return (x, branch, modulation[0]), {}
            return (x, *modulation[:2]) if parts == 2 else (x, branch, *modulation), {}

        return make

    return {
        "[2,256,1152]": call(2),  # one image with guidance, DiT-XL/2 at 256 x 256
        "[64,256,1152]": call(64),
        "[16,256,1152] per token": call(16, True),
    }


def _attention(make: Callable[[tuple[int, int, int, int]], Callable[..., reg.Call]]) -> Shapes:
    sizes = ((64, 16, 256, 72), (64, 16, 1024, 72), (4, 16, 4096, 64), (4, 16, 4096, 128))
    return {f"[{','.join(map(str, size))}]": make(size) for size in sizes}


def _block(make: Callable[[int, int, int, int], Callable[..., reg.Call]]) -> Shapes:
    return {f"[{B},{N},1152]": make(B, N, 1152, 16) for B, N in ((64, 256), (8, 1024))}


SHAPES: dict[str, Shapes] = {
    "adaln_modulate": _adaln(2),
    "gate_residual": _adaln(1),
    "gate_residual_adaln": _adaln(3),
    "attention": _attention(_attention_spec._sized),
    "attention_qkvpacked": _attention(_attention_spec._sized_packed),
    "adaln_attention": _block(_block_spec._attention_call),
    "adaln_mlp": _block(_block_spec._mlp_call),
    "selective_scan": {"[8,1536,4096,16] channels last": _selective_scan_spec._mamba(8, 1536, 4096, 16, "bld", True)},
    # A stage of VMamba-T at 224 x 224
    "selective_scan_multi": {"[16,56x56,192,16]": _selective_scan_spec._cross(16, 56, 192, 16)},
}


def shapes_on(spec: reg.OpSpec, device: torch.device) -> Shapes:
    """The benchmark shapes of an operator on a device."""
    return {**spec.shapes, **SHAPES.get(spec.name, {})} if device.type == "cuda" else spec.shapes
