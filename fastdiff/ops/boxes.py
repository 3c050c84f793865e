"""Soft masks of axis-aligned boxes, in closed form.

A blurred box is an outer product of two profiles: the indicator of its rows convolved with the taps of `gaussian_blur`
under the reflect border, and likewise its columns. A profile is a difference of partial sums of the taps, so a mask
costs one multiplication per pixel whatever sigma, and equals the blurred rasterised box to float rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdiff import _native
from fastdiff.ops import _gaussian_plan as gp
from fastdiff.ops import _registry as reg
from fastdiff.ops._cache import on_device
from fastdiff.ops.gaussian import brief, check_sigma, gaussian_blur_reference, integer

_OP = "box_mask"
_DTYPES = list(_native.DTYPES)  # by code

Boxes = torch.Tensor | Sequence[Sequence[float]]


# ------------------------------------------------------------------------------------------------- public functions


def box_mask(boxes: Boxes, size: tuple[int, int], *, sigma: float | torch.Tensor = 0.0) -> torch.Tensor:
    """One soft mask per box; differentiable in a tensor `sigma`.

    Box k is 1 on rows int(y1 H) .. int(y2 H) - 1 and columns int(x1 W) .. int(x2 W) - 1, else 0, then blurred:
    ``gaussian_blur(box, sigma, border="reflect")`` with its support int(6 sigma) | 1, tap by tap. The products are
    taken in float64 and boxes are cut to the image; one that ends before it begins is empty. The corners are integers,
    so there is no gradient to `boxes`.

    Memory beyond the result: 4 (H + W) bytes per box, 8 (H + W) in the backward pass; kept for later calls: at most 32
    MB of partial sums. Under `torch.vmap` neither boxes nor sigma may be vectorised.

    On CUDA everything that depends on boxes and sigma is computed there, and neither is read by the host: a NaN corner
    or a support beyond 131073 in a CUDA tensor makes the mask NaN instead of an error. Memory besides: 32 max(H, W)
    bytes per box, and 8 bytes per 32 rows of a mask in the backward pass.

    Args:
        boxes: [K, 4] as (x1, y1, x2, y2), fractions of width and height; a tensor or nested sequences.
        size: (H, W), each at least 1.
        sigma: standard deviation in pixels: a number >= 0, or a tensor [] or [K]. The sign of a tensor's values does
            not matter; where they are not finite, nor is the mask. A number is a constant to `torch.compile`, a
            tensor is not.

    Returns:
        [K, H, W]; dtype of `boxes`, float32 where they are sequences.

    Raises:
        ValueError: a shape or number does not fit, a corner is NaN, or the support exceeds 131073.
        TypeError: boxes are not floating-point numbers, size is no pair of integers, or sigma is not a number.
    """
    boxes, dtype = check_boxes(_OP, "boxes", boxes)
    H, W = _size(size, boxes.shape[0])
    tensor, value = check_number(_OP, sigma, boxes, boxes.shape[0])
    way = reg.route(_OP, (boxes if boxes.dtype == dtype else boxes.to(dtype),))
    if way is reg.REFERENCE:
        return box_mask_reference(boxes, (H, W), sigma=sigma).to(dtype)
    if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
        return _BoxMask.apply(tensor, boxes, H, W, dtype)  # type: ignore[no-any-return]
    return reg.call(_box_op, _box_mask, boxes, tensor, value, H, W, _native.DTYPES[dtype])  # type: ignore[no-any-return]


def box_mask_reference(boxes: Boxes, size: tuple[int, int], *, sigma: float | torch.Tensor = 0.0) -> torch.Tensor:
    """`box_mask` in plain PyTorch: any device, float64 included, differentiable to any order in sigma."""
    boxes, dtype = check_boxes(_OP, "boxes", boxes)
    check_corners(_OP, "boxes", boxes)
    H, W = size
    scale = torch.tensor([W, H, W, H], dtype=torch.float64, device=boxes.device)
    x1, y1, x2, y2 = (boxes.double() * scale).clamp(min=0).minimum(scale).long()[:, :, None].unbind(1)
    row, column = _count(H, boxes), _count(W, boxes)
    rows, columns = (row >= y1) & (row < y2), (column >= x1) & (column < x2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    box = (rows[:, :, None] & columns[:, None, :]).to(wide)
    return gaussian_blur_reference(box, sigma, border="reflect").to(dtype)


def _count(n: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int64, device=like.device)


# ------------------------------------------------------------------------------------------------------- validation


def check_boxes(op: str, argument: str, boxes: Any) -> tuple[torch.Tensor, torch.dtype]:
    """Boxes [K, 4] as a detached tensor, and the type of their masks. Sequences of numbers are taken in float64."""
    if isinstance(boxes, (list, tuple)):
        try:
            boxes = torch.tensor(boxes, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last two: an integer beyond float64
            reg.fail(op, argument, "a tensor [K, 4] or K sequences of four numbers", brief(boxes), TypeError)
        boxes, dtype = boxes.reshape(0, 4) if boxes.numel() == 0 else boxes, torch.float32
    else:
        reg.check_tensor(op, argument, boxes)
        boxes, dtype = boxes.detach(), boxes.dtype
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        reg.fail(op, argument, "shape [K, 4]", tuple(boxes.shape))
    return boxes, dtype


def check_corners(op: str, argument: str, boxes: torch.Tensor) -> None:
    """No corner is NaN. Where boxes are traced, the kernel asks; on a GPU its result is NaN."""
    if torch.compiler.is_compiling() or not boxes.is_cpu:
        return
    if torch._C._functorch.is_batchedtensor(boxes):
        reg.fail(op, argument, "boxes outside torch.vmap: their corners are read as numbers", "a vectorised tensor")
    if bool((boxes != boxes).any()):
        reg.fail(op, argument, "corners that are numbers", "NaN")


def _size(size: Any, count: int) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        reg.fail(_OP, "size", "a pair of integers (H, W)", brief(size), TypeError)
    H, W = (integer(n) for n in size)
    if H is None or W is None:
        reg.fail(_OP, "size", "a pair of integers (H, W)", brief(size), TypeError)
    if torch.compiler.is_compiling():
        return H, W  # perhaps symbols; the tensor made of them asks
    if min(H, W) < 1:
        reg.fail(_OP, "size", "a pair of integers (H, W), each at least 1", brief(size))
    if max(count, 1) * H * W >= 1 << 59:  # bytes must fit an int64
        reg.fail(_OP, "size", "a pair of integers (H, W), with masks of fewer than 2^59 pixels", brief(size))
    return H, W


def check_number(op: str, sigma: Any, like: torch.Tensor, count: int) -> tuple[torch.Tensor | None, float]:
    """sigma as a tensor, or None and a float."""
    if isinstance(sigma, torch.Tensor):
        check_sigma(op, sigma, like, count, "[K]")
        return sigma, 0.0
    value = reg.number(op, "sigma", sigma, low=0.0)
    if not torch.compiler.is_compiling():
        gp.check_support(op, "sigma", gp.support(value))
    return None, value


# -------------------------------------------------------------------------------------------------- native functions


def operands(
    op: str, argument: str, boxes: torch.Tensor, sigma: Any, value: float, like: torch.Tensor, size: tuple[int, int]
) -> tuple[Any, Any, list[Any]]:
    """Boxes and prefix sums for the native side (struct Boxes), struct Sigma, and what must live until the kernel
    returns. The kernel runs on the device of `like`, for masks of `size`."""
    check_corners(op, argument, boxes)
    if _native.place(like)[0] >= 0:
        numbers, _, there = gp.device_sigma(op, sigma, value, value, 0, 0, like)
        if boxes.device == like.device:
            corners = boxes.resolve_neg().to(torch.float64).contiguous()
        else:
            corners = _uploaded(tuple(boxes.to(torch.float64).reshape(-1).tolist()), like.device)
        entries = boxes.shape[0] * 4 * _native.extension.fold_entries(*size)  # type: ignore[union-attr]
        sums = torch.empty(entries, dtype=torch.float64, device=like.device)
        return (corners.data_ptr(), 0, 0, 0, 0), (*numbers, sums.data_ptr()), [corners, there, sums]
    reg.number(op, "sigma", value, low=0.0)  # a traced one comes unchecked
    values = [value] if sigma is None else sigma.detach().reshape(-1).tolist()
    for v in values:
        gp.check_support(op, "sigma", gp.support(v))
    radius, prefix = gp.prefixes(tuple(values))
    corners = boxes.resolve_neg().to(torch.float64).contiguous()
    shared = len(values) == 1
    arguments = (
        corners.data_ptr(),
        radius.data_ptr(),
        0 if shared else 1,
        prefix.data_ptr(),
        0 if shared else prefix.shape[1],
    )
    return arguments, gp.NO_SIGMA, [corners, radius, prefix]


@on_device("boxes in host memory", lambda corners: (corners,), lambda corners: 16 * corners.numel())  # with the key
def _uploaded(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Corners from the host on a GPU."""
    return torch.tensor(values, dtype=torch.float64, device=device)


def _box_mask(boxes, sigma, value, H, W, code) -> torch.Tensor:  # type: ignore[no-untyped-def]
    K = boxes.shape[0]
    out = torch.empty(K, H, W, dtype=_DTYPES[code], device=boxes.device)
    if K:
        shared, numbers, keep = operands(_OP, "boxes", boxes, sigma, value, boxes, (H, W))
        profiles = torch.empty(K * (H + W), dtype=torch.float32, device=boxes.device)
        _native.extension.box_mask(  # type: ignore[union-attr]
            *_native.place(boxes), (K, H, W, *shared, profiles.data_ptr(), reg.operand(out), *numbers)
        )
        del keep
    return out


def _backward(grad, boxes, sigma) -> torch.Tensor:  # type: ignore[no-untyped-def]
    K, H, W = grad.shape
    dsigma = torch.zeros(K, dtype=torch.float64, device=grad.device)
    if K:
        shared, numbers, keep = operands(_OP, "boxes", boxes, sigma, 0.0, grad, (H, W))
        profiles = torch.empty(2 * K * (H + W), dtype=torch.float32, device=grad.device)
        device, stream = _native.place(grad)
        parts = 0 if device < 0 else K * _native.extension.mask_chunks(H)  # type: ignore[union-attr]
        partial = torch.empty(parts, dtype=torch.float64, device=grad.device)
        _native.extension.box_mask_backward(  # type: ignore[union-attr]
            device, stream,
            (K, H, W, *shared, profiles.data_ptr(), reg.operand(grad), dsigma.data_ptr(), partial.data_ptr(),
             *numbers),
        )  # fmt: skip
        del keep
    total = dsigma if sigma.numel() == K else dsigma.sum()
    return total.to(device=sigma.device, dtype=sigma.dtype).reshape(sigma.shape)


# ---------------------------------------------------------------------------------------------------------- gradient


class _BoxMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigma, boxes, H, W, dtype):  # type: ignore[no-untyped-def,override]
        ctx.size, ctx.dtype = (H, W), dtype
        ctx.save_for_backward(sigma, boxes)
        return reg.call(_box_op, _box_mask, boxes, sigma, 0.0, H, W, _native.DTYPES[dtype])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        sigma, boxes = ctx.saved_tensors
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised([grad]):
            # create_graph=True, or a backward pass that is itself vectorised
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                result = box_mask_reference(boxes, ctx.size, sigma=sigma).to(ctx.dtype)
            (found,) = torch.autograd.grad(result, sigma, grad, create_graph=create_graph, materialize_grads=True)
        else:
            found = reg.call(_backward_op, _backward, grad, boxes, sigma)
        return found, None, None, None, None


# ------------------------------------------------------------------------------------------------------ registration

_box_op = reg.define(
    "box_mask",
    "Tensor boxes, Tensor? sigma, float value, SymInt H, SymInt W, int dtype",
    "Tensor",
    _box_mask,
    lambda boxes, sigma, value, H, W, code: boxes.new_empty(boxes.shape[0], H, W, dtype=_DTYPES[code]),
    lambda *_: (),  # boxes and sigma may be of any floating-point type
)
_backward_op = reg.define(
    "box_mask_backward",
    "Tensor grad, Tensor boxes, Tensor sigma",
    "Tensor",
    _backward,
    lambda grad, boxes, sigma: sigma.new_empty(sigma.shape),
    lambda grad, *_: grad,
)
