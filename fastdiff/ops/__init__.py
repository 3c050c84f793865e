"""The operators. One page per family, each with formula, shapes, reference, validation and registration."""

from fastdiff.ops import _adaln_spec as _adaln_spec
from fastdiff.ops import _update_spec as _update_spec
from fastdiff.ops._registry import SPECS, OpSpec, explain
from fastdiff.ops.adaln import adaln_modulate, gate_residual, gate_residual_adaln
from fastdiff.ops.update import ddim_step, euler_step, linear_update

__all__ = [
    "SPECS",
    "OpSpec",
    "adaln_modulate",
    "ddim_step",
    "euler_step",
    "explain",
    "gate_residual",
    "gate_residual_adaln",
    "linear_update",
]
