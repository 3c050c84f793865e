"""GELU in its tanh form, the activation of diffusion transformers' MLPs, in one pass.

    out = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)

Hendrycks & Gimpel 2016, "Gaussian Error Linear Units" (arXiv:1606.08415), sec. 2. x may have any shape and strides;
dtypes float32, float16, bfloat16, arithmetic in float32, the result has the dtype of x. A bias belongs into the product
before it, where it is free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _registry as reg


def gelu(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.gelu(x, approximate="tanh")``, differentiable.

    Args:
        x: any shape.
        out: shape and dtype of x; written and returned. May be x itself. Not differentiable.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: `out` does not fit, or overlaps x in part.
        TypeError: an argument is not a floating-point tensor.
    """
    way = reg.route("gelu", (x,))
    reg.check_tensor("gelu", "x", x)
    if out is not None:
        reg.check_out("gelu", out, x, (x,), may_alias=(x,))
        if way is reg.REFERENCE:
            return out.copy_(gelu_reference(x))
        reg.call(_out_op, _gelu_out, x, out)
        reg.written(out)
        return out
    if way is reg.REFERENCE:
        return gelu_reference(x)
    if way is reg.GRAD:
        return _Gelu.apply(x)
    return reg.call(_op, _gelu, x)  # type: ignore[no-any-return]


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """`gelu` in plain PyTorch: any device, float64 included, differentiable to any order."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.gelu(x.to(wide), approximate="tanh").to(x.dtype)


# ------------------------------------------------------------------------------------------------------------ native


def _gelu(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _native.extension.gelu_forward(  # type: ignore[union-attr]
        *_native.place(x), (x.numel(), x.data_ptr(), out.data_ptr(), _native.DTYPES[x.dtype])
    )
    return out


def _gelu_out(x: torch.Tensor, out: torch.Tensor) -> None:
    if not (x.is_contiguous() and out.is_contiguous()):
        out.copy_(_gelu(x))
        return
    _native.extension.gelu_forward(  # type: ignore[union-attr]
        *_native.place(x), (x.numel(), x.data_ptr(), out.data_ptr(), _native.DTYPES[x.dtype])
    )


def _backward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    x, grad = x.contiguous(), grad.contiguous()
    out = torch.empty_like(x)
    _native.extension.gelu_backward(  # type: ignore[union-attr]
        *_native.place(x), (x.numel(), x.data_ptr(), grad.data_ptr(), out.data_ptr(), _native.DTYPES[x.dtype])
    )
    return out


def _fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return reg.call(_op, _gelu, x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if (create_graph and not torch.compiler.is_compiling()) or reg.vectorised([grad]):
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(gelu_reference(x), x, grad, create_graph=create_graph)[0]
        return reg.call(_backward_op, _backward, x, grad)


_op = reg.define("gelu", "Tensor x", "Tensor", _gelu, _fake)
_out_op = reg.define("gelu_out", "Tensor x, Tensor(a!) out", "()", _gelu_out, lambda *_: None)
_backward_op = reg.define("gelu_backward", "Tensor x, Tensor grad", "Tensor", _backward, _fake)
