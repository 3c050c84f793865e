"""Matrix products of `Linear` layers, which are torch's: which library, and in which type."""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _registry as reg
from fastdiff.ops.gelu import gelu as activate


def _has_units(dtype: torch.dtype) -> bool:
    """The CPU multiplies this 16-bit type in hardware."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        bf16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        names = bf16 if dtype is torch.bfloat16 else ("_is_amx_fp16_supported",)
        return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return bool(getattr(torch.ops.mkldnn, supported)())


_UNITS = {dtype: _has_units(dtype) for dtype in (torch.float16, torch.bfloat16)}
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool = False) -> torch.Tensor:
    """``x W^T + b``, then GELU (tanh form) if `gelu`; [..., in] -> [..., out].

    On a CPU without arithmetic units for a 16-bit type, the product is made in float32 and stays float32: there torch's
    own 16-bit products run at a fifth of the speed (measured: 63 against 320 GFLOP/s in bfloat16), and rounding the
    result would cost a pass and accuracy. Without gradients it goes to oneDNN, which adds the bias and applies GELU
    while the product is in registers.

    On a GPU the product is cuBLAS's in the type of x, to which the weights are rounded. Without gradients and with a
    bias, GELU is applied in its epilogue, in float32, before the result is rounded: a pass over [..., out] less.
    """
    kind = _product_type(x, weight)
    x, weight = x.to(kind), weight.to(kind)
    bias = None if bias is None else bias.to(kind)
    if _onednn(x, weight, bias):
        op: Any = torch.ops.mkldnn._linear_pointwise.default
        how: tuple[Any, ...] = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return op(_plain(x), _plain(weight), None if bias is None else _plain(bias), *how)  # type: ignore[no-any-return]
    if gelu and bias is not None and _epilogue(x, weight, bias):
        y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
        return y.view(*x.shape[:-1], weight.shape[0])
    y = F.linear(x, weight, bias)
    return activate(y) if gelu else y


def call(layer: torch.nn.Module, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """``layer(x)``, then GELU (tanh form) if `gelu`, in the type that ``layer(x)`` has.

    Around the layer where that makes no difference but in time: a plain linear layer that nobody watches goes to
    `linear`; one with hooks, of another class (LoRA, quantised), or under autocast is called as it is.
    """
    if is_plain(layer) and not torch.is_autocast_enabled(x.device.type):
        weight: Any = layer.weight
        bias: Any = layer.bias
        if x.dtype is weight.dtype:
            return linear(x, weight, bias, gelu=gelu).to(x.dtype)
    y = layer(x)
    return activate(y) if gelu else y


def is_plain(layer: torch.nn.Module, kind: type = torch.nn.Linear) -> bool:
    """A layer of just this kind that nobody watches or has changed: its product may be made without calling it."""
    every = torch.nn.modules.module
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(layer) is kind
        and "forward" not in vars(layer)
        and not any(getattr(layer, name) or getattr(every, f"_global{name}") for name in hooks)
    )


def _product_type(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    if not x.is_cpu or _native._emulated or x.dtype is torch.float64:
        return x.dtype
    if weight.dtype is torch.float64 or (x.dtype is not torch.float32 and not _UNITS[x.dtype]):
        return torch.float32
    return torch.promote_types(x.dtype, weight.dtype)


def _epilogue(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """The product on a GPU may apply GELU as it stores."""
    return (
        x.is_cuda
        and x.dtype in _native.DTYPES
        and torch.version.hip is None
        and x.numel() > 0
        and weight.numel() > 0
        and _native.backend != "reference"
        and not torch.is_autocast_enabled("cuda")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad))
        and not reg.transforms_active()
        and _unobserved((x, weight, bias))
        and _is_tanh(x.device)
    )


def _unobserved(tensors: tuple[torch.Tensor, ...]) -> bool:
    """No subclass and no mode (fake tensors, a counter of operations) that may not know torch's operator."""
    return torch.compiler.is_compiling() or (
        all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors) and reg.direct_is_safe()
    )


_TANH: dict[torch.device, bool] = {}


def _is_tanh(device: torch.device) -> bool:
    """The epilogue there is the tanh form of GELU, which torch does not promise: asked once, with products that are
    exact, so that only the other form (4.7e-4 away) can be that far off."""
    if torch.compiler.is_compiling():
        return True  # torch's own decomposition of the operator (tests/test_models.py)
    if device not in _TANH:
        if _native.capturing(device):
            return False
        kind: dict[str, Any] = {"device": device, "dtype": torch.float32}
        x = (torch.arange(-32, 32, **kind) / 8).expand(64, 64).contiguous()
        eye, zeros = torch.eye(64, **kind), torch.zeros(64, **kind)
        error = torch._addmm_activation(zeros, x, eye, use_gelu=True) - F.gelu(x, approximate="tanh")
        _TANH[device] = bool(error.abs().max() < 1e-4)
    return _TANH[device]


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and x.numel() > 0
        and weight.numel() > 0
        and not torch.compiler.is_compiling()
        and _native.backend != "reference"
        and _HAS_ONEDNN
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not reg.transforms_active()
        and _unobserved(tuple(tensors))
    )


def _plain(t: torch.Tensor) -> torch.Tensor:
    """What oneDNN can read, which takes memory for what it holds: no lazy negation, no zeros without storage.

    And contiguous, so that the same values give the same bits in any layout.
    """
    return t.clone() if t._is_zerotensor() else t.resolve_neg().contiguous()
