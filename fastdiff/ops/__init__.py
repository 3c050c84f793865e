"""The operators. One page per family, each with formula, shapes, reference, validation and registration."""

from fastdiff.ops import _adaln_spec as _adaln_spec
from fastdiff.ops import _attention_spec as _attention_spec
from fastdiff.ops import _blend_spec as _blend_spec
from fastdiff.ops import _block_spec as _block_spec
from fastdiff.ops import _causal_conv1d_spec as _causal_conv1d_spec
from fastdiff.ops import _gaussian_spec as _gaussian_spec
from fastdiff.ops import _gelu_spec as _gelu_spec
from fastdiff.ops import _selective_scan_spec as _selective_scan_spec
from fastdiff.ops import _spectrum_spec as _spectrum_spec
from fastdiff.ops import _update_spec as _update_spec
from fastdiff.ops._philox import philox_normal
from fastdiff.ops._registry import SPECS, OpSpec, explain
from fastdiff.ops.adaln import adaln_modulate, gate_residual, gate_residual_adaln
from fastdiff.ops.attention import (
    attention,
    attention_inject,
    attention_probs,
    attention_qkvpacked,
    attention_with_probs,
)
from fastdiff.ops.blend import gaussian_blend
from fastdiff.ops.block import adaln_attention, adaln_mlp
from fastdiff.ops.boxes import box_mask
from fastdiff.ops.causal_conv1d import causal_conv1d
from fastdiff.ops.gaussian import gaussian_blur
from fastdiff.ops.gelu import gelu
from fastdiff.ops.selective_scan import selective_scan, selective_scan_multi
from fastdiff.ops.spectrum import radial_spectrum, spectral_features
from fastdiff.ops.update import ddim_step, euler_step, linear_update

__all__ = [
    "SPECS",
    "OpSpec",
    "adaln_attention",
    "adaln_mlp",
    "adaln_modulate",
    "attention",
    "attention_inject",
    "attention_probs",
    "attention_qkvpacked",
    "attention_with_probs",
    "box_mask",
    "causal_conv1d",
    "ddim_step",
    "euler_step",
    "explain",
    "gate_residual",
    "gate_residual_adaln",
    "gaussian_blend",
    "gaussian_blur",
    "gelu",
    "linear_update",
    "philox_normal",
    "radial_spectrum",
    "selective_scan",
    "selective_scan_multi",
    "spectral_features",
]
