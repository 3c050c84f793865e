"""Code written for the mamba_ssm and causal_conv1d packages, run on our operators where these are absent.

    import fastdiff.integrations.mamba_ssm as shim

    shim.install()                          # or:  with shim.install(): ...
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

Before such code is imported, since ``from ... import`` binds what it finds then: transformers, for one, looks for both
packages when its Mamba models are imported, and keeps what it found. There are the functions of Mamba (the first one);
modules of Mamba-2 (``mamba_ssm.ops.triton.ssd_combined``) are missing here as they are where only an old version of
the package is installed, and the version that ours gives is an old one.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.selective_scan import selective_scan_reference

__all__ = [
    "Installed",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "install",
    "mamba_inner_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "uninstall",
]

VERSION = "1.2.2+fastdiff"  # the last one before Mamba-2 (2.0), whose functions we do not have
_replaced: dict[str, ModuleType | None] = {}  # what stood in sys.modules where ours stand now


class Installed:
    """The packages are ours until `uninstall`, or until a ``with`` block ends."""

    def __init__(self, ours: bool) -> None:
        self._ours = ours

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            uninstall()


def install(*, force: bool = False) -> Installed:
    """Puts ``mamba_ssm`` and, if absent, ``causal_conv1d`` into `sys.modules`. Harmless if ours are there already.

    Args:
        force: also where the real packages are installed; `uninstall` brings them back.

    Returns:
        A context manager that undoes it.

    Raises:
        RuntimeError: mamba_ssm is installed, and `force` is not given.
    """
    if _replaced:
        return Installed(False)
    present = {name: importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d")}
    if present["mamba_ssm"] and not force:
        raise RuntimeError(
            "[mamba_ssm.install] mamba_ssm is installed: code that imports it has the real one; force=True puts ours "
            "in front of it"
        )
    modules = _mamba_ssm() | ({} if present["causal_conv1d"] and not force else _causal_conv1d())
    real = [name for name in sys.modules if name.split(".")[0] in {m.split(".")[0] for m in modules}]
    _replaced.update(dict.fromkeys(modules) | {name: sys.modules.pop(name) for name in real})
    sys.modules.update(modules)
    return Installed(True)


def uninstall() -> None:
    """Takes ours out of `sys.modules`. What was imported from it in the meantime keeps working."""
    for name, before in _replaced.items():
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
    _replaced.clear()


def _mamba_ssm() -> dict[str, ModuleType]:
    scan: dict[str, Any] = {
        "selective_scan_fn": selective_scan_fn,
        "selective_scan_ref": selective_scan_ref,
        "mamba_inner_fn": mamba_inner_fn,
        "mamba_inner_ref": mamba_inner_fn,
    }
    update: dict[str, Any] = {"selective_state_update": selective_state_update}
    interface = _module("mamba_ssm.ops.selective_scan_interface", **scan)
    step = _module("mamba_ssm.ops.triton.selective_state_update", **update)
    triton = _module("mamba_ssm.ops.triton", package=True, selective_state_update=step)
    parts = _module("mamba_ssm.ops", package=True, selective_scan_interface=interface, triton=triton)
    functions: dict[str, Any] = {name: scan[name] for name in ("selective_scan_fn", "mamba_inner_fn")}
    whole = _module("mamba_ssm", package=True, __version__=VERSION, ops=parts, **functions)
    return {m.__name__: m for m in (whole, parts, interface, triton, step)}


def _causal_conv1d() -> dict[str, ModuleType]:
    functions: dict[str, Any] = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
    interface = _module("causal_conv1d.causal_conv1d_interface", **functions)
    whole = _module("causal_conv1d", package=True, __version__=VERSION, causal_conv1d_interface=interface, **functions)
    return {m.__name__: m for m in (whole, interface)}


def _module(name: str, *, package: bool = False, **contents: Any) -> ModuleType:
    """A module with a spec, which `importlib.util.find_spec` insists on; a package finds no files of its own."""
    module = ModuleType(name, "Stands in for the package of this name: fastdiff.integrations.mamba_ssm.")
    module.__spec__ = ModuleSpec(name, None, is_package=package)
    module.__package__ = name if package else name.rpartition(".")[0]
    if package:
        module.__path__ = []
    vars(module).update(contents)
    return module


# --------------------------------------------------------------------------------------------------------- functions


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`fastdiff.ops.selective_scan` with the arguments of mamba_ssm's function of this name."""
    return ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The same in plain PyTorch, step by step."""
    return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block after its input projection: convolution, scan, gate and output projection.

    Args:
        xz: (B, 2 E, L), the input and the gate.
        conv1d_weight: (E, 1, K); conv1d_bias (E,).
        x_proj_weight: (R + N for each of B and C that is None, E): rows of dt first, then of B, then of C.
        delta_proj_weight: (E, R).
        out_proj_weight: (D, E); out_proj_bias (D,).
        A: (E, N), real.
        B: as in `selective_scan_fn`, or None where it comes from the input; C likewise. B_proj_bias, C_proj_bias (N,)
            are added to what comes from the input.
        D: (E,); delta_bias (E,).
        checkpoint_lvl: not used: what the backward pass needs is kept, and no more.
        b_rms_weight: (N,), of an RMS norm of B; c_rms_weight of C; dt_rms_weight (E,) of the projected step sizes.

    Returns:
        (B, L, D).

    Raises:
        ValueError: A is complex and B or C comes from the input.
    """
    if A.is_complex() and (B is None or C is None):
        raise ValueError("[mamba_inner_fn] A: expected a real tensor where B or C is None, got a complex one")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # [B, L, E]: as a linear layer left it
    u: Any = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu", layout="bld")
    parts = list(F.linear(u, x_proj_weight).split([rank] + [states] * ((B is None) + (C is None)), dim=-1))
    delta = F.linear(parts.pop(0), delta_proj_weight)
    B = _projection(B, parts, B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    C = _projection(C, parts, C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    if dt_rms_weight is not None:
        delta = F.rms_norm(delta, delta.shape[-1:], dt_rms_weight, b_c_dt_rms_eps)
    y = ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, layout="bld")
    return F.linear(y, out_proj_weight, out_proj_bias)


def _projection(
    given: Tensor | None, parts: list[Tensor], bias: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    """B or C with channels last: the caller's, or the next part of the projected input."""
    if given is not None:
        return given if given.dim() == 2 else given.movedim(-1, 1)
    found = parts.pop(0)
    found = found if bias is None else found + bias
    return found if norm is None else F.rms_norm(found, found.shape[-1:], norm, eps)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of the scan; `state` is updated in place.

    Args:
        state: (B, D, N), or (B, H, D, N) with heads.
        x: (B, D) or (B, H, D); dt and z likewise.
        A: (D, N) or (H, D, N).
        B: (B, N) or, in groups of heads, (B, G, N); C likewise.
        D: (D,) or (H, D); dt_bias likewise.

    Returns:
        The shape of x.
    """
    channels, states = A.shape[:-1].numel(), A.shape[-1]

    def step(t: Tensor | None) -> Tensor | None:  # [B, 1, channels]
        return None if t is None else t.reshape(len(state), 1, channels)

    def each(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(channels)

    def groups(t: Tensor) -> Tensor:  # [B, 1, G, N]
        return t.reshape(len(state), 1, -1, states)

    out, last = ops.selective_scan(
        step(x),  # type: ignore[arg-type]
        step(dt),  # type: ignore[arg-type]
        A.reshape(channels, states),
        groups(B),
        groups(C),
        each(D),
        step(z),
        each(dt_bias),
        dt_softplus,
        True,
        initial_state=state.reshape(len(state), channels, states),
        layout="bld",
    )
    state.copy_(last.reshape(state.shape))
    found: Tensor = out.reshape(x.shape)
    return found


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """`fastdiff.ops.causal_conv1d` with the arguments of the causal-conv1d package: x (B, D, L), weight (D, K).

    Raises:
        ValueError: `seq_idx` is given: sequences packed in one are not served.
    """
    if seq_idx is not None:
        raise ValueError("[causal_conv1d_fn] seq_idx: expected None (packed sequences are not served), got a tensor")
    keep = return_final_states or final_states_out is not None
    found: Any = ops.causal_conv1d(x, weight, bias, activation, initial_state=initial_states, return_final_state=keep)
    if final_states_out is not None:
        found = (found[0], final_states_out.copy_(found[1]))
    return found if return_final_states or not keep else found[0]


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next step or steps of a convolution; `conv_state` is updated in place.

    Args:
        x: (B, D) or (B, D, L).
        conv_state: (B, D, S) with S >= K - 1, the last inputs.
        weight: (D, K).

    Returns:
        The shape of x.

    Raises:
        ValueError: `cache_seqlens` or `conv_state_indices` is given: neither is served.
    """
    for name, given in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if given is not None:
            raise ValueError(f"[causal_conv1d_update] {name}: expected None (it is not served), got a tensor")
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    size = conv_state.shape[-1]
    head = conv_state[..., size - weight.shape[1] + 1 :]
    out: Any = ops.causal_conv1d(steps, weight, bias, activation, initial_state=head)
    # torch.cat makes a copy before anything is overwritten.
    past = torch.cat([conv_state, steps.to(conv_state.dtype)], dim=-1)
    conv_state.copy_(past[..., past.shape[-1] - size :])
    found: Tensor = out.reshape(x.shape)
    return found
