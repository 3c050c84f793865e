"""Composition of K predictions over a background through soft masks, in one pass.

    out_0 = background,   out_k = out_{k-1} (1 - m_k) + objects[k] m_k,   k = 1 .. K, in order

m_k is box k, or mask k, blurred by a Gaussian with the reflect border. Masks of boxes are never stored (see box_mask).
Background and masks are read once. An object with a box is read where its mask is not 0 and nowhere else, so that NaN
or infinities there do no harm; one with a mask enters everywhere, as the formula says.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdiff import _native
from fastdiff.ops import _gaussian_plan as gp
from fastdiff.ops import _registry as reg
from fastdiff.ops._cache import bounded
from fastdiff.ops.boxes import (
    Boxes,
    box_mask_reference,
    check_boxes,
    check_corners,
    check_number,
    operands,
)
from fastdiff.ops.boxes import _backward as _box_backward
from fastdiff.ops.boxes import _backward_op as _box_backward_op
from fastdiff.ops.gaussian import gaussian_blur, gaussian_blur_reference

_OP = "gaussian_blend"
_DTYPES = list(_native.DTYPES)  # by code
BLOCK = 256  # kBlendBlock in csrc/fastdiff.h


# ------------------------------------------------------------------------------------------------- public functions


def gaussian_blend(
    background: torch.Tensor,
    objects: torch.Tensor,
    regions: Boxes,
    *,
    sigma: float | torch.Tensor = 2.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Blend objects over a background in order; differentiable in background, objects, masks and a tensor `sigma`.

    Memory beyond the result: for boxes 4 (H + W + 8) bytes each; for masks their blurred copy in float32. The backward
    pass: 3 K + 2 kilobytes per thread, and a float32 mask per object where its gradient or that to sigma is wanted.
    On CUDA, for boxes also 32 max(H, W) bytes each and nothing per thread; what `box_mask` says of CUDA tensors holds
    for boxes and sigma. Boxes in sequences are uploaded once and kept, those that a captured graph
    reads for the life of the process: make the first call outside the capture.

    Args:
        background: [B, C, H, W].
        objects: [K, B, C, H, W], any K.
        regions: boxes [K, 4] as (x1, y1, x2, y2), fractions of width and height, a tensor or nested sequences, as in
            `box_mask`; or masks [K, H, W], which are blurred as by ``gaussian_blur(masks, sigma)``. Boxes have no
            gradient: their corners are cut to pixels.
        sigma: standard deviation of the blur in pixels: a number >= 0 (to `torch.compile`, a constant), or a tensor
            [] or [K].
        out: shape and dtype of background; written and returned. May be background. Not differentiable.

    Returns:
        shape and dtype of background.

    Raises:
        ValueError: a shape, device or number does not fit, a corner is NaN, or `out` overlaps an input.
        TypeError: an argument is not a floating-point tensor or number.
    """
    if out is None and (found := _quick(background, objects, regions, sigma)) is not None:
        return found
    reg.check_tensor(_OP, "background", background)
    reg.check_tensor(_OP, "objects", objects, background)
    if background.dim() != 4:
        reg.fail(_OP, "background", "shape [B, C, H, W]", tuple(background.shape))
    if objects.dim() != 5 or objects.shape[1:] != background.shape:
        reg.fail(_OP, "objects", f"shape [K, *{tuple(background.shape)}]", tuple(objects.shape))
    masks, boxes = _regions(background, objects, regions)
    tensor, value = check_number(_OP, sigma, background, objects.shape[0])
    if out is not None:
        reg.check_out(_OP, out, background, (background, objects, masks, tensor), (background,))
    way = reg.route(_OP, (background, objects), (masks,))
    learned = tensor is not None and torch.is_grad_enabled() and tensor.requires_grad
    if way is reg.REFERENCE:
        found = gaussian_blend_reference(background, objects, regions, sigma=sigma)
        return found if out is None else out.copy_(found)
    if masks is not None:
        masks = gaussian_blur(masks.to(torch.float32), sigma)
    rule = (boxes, None if boxes is None else tensor, value)
    if out is not None:
        reg.call(_blend_out_op, _blend_out, background, objects, masks, *rule, out)
        reg.written(out)
        return out
    if way is reg.GRAD or learned:
        return _Blend.apply(background, objects, masks, *rule)  # type: ignore[no-any-return]
    return reg.call(_blend_op, _blend, background, objects, masks, *rule)  # type: ignore[no-any-return]


def gaussian_blend_reference(
    background: torch.Tensor, objects: torch.Tensor, regions: Boxes, *, sigma: float | torch.Tensor = 2.0
) -> torch.Tensor:
    """`gaussian_blend` in plain PyTorch: any device, float64 included, differentiable to any order."""
    wide = torch.float64 if background.dtype == torch.float64 else torch.float32
    if isinstance(regions, torch.Tensor) and regions.dim() == 3:
        masks = gaussian_blur_reference(regions.to(wide), sigma)
    else:
        boxes, _ = check_boxes(_OP, "regions", regions)
        check_corners(_OP, "regions", boxes)
        masks = box_mask_reference(boxes.double(), (background.shape[2], background.shape[3]), sigma=sigma)
        return _compose(background, objects, masks, boxed=True)
    return _compose(background, objects, masks, boxed=False)


def _compose(background: torch.Tensor, objects: torch.Tensor, masks: torch.Tensor, boxed: bool) -> torch.Tensor:
    """The blend through masks [K, H, W] that are blurred already."""
    wide = torch.float64 if background.dtype == torch.float64 else torch.float32
    result = background.to(wide)
    for o, m in zip(objects.to(wide), masks.to(wide), strict=True):
        if boxed:
            o = torch.where(m == 0, 0.0, o)
        result = result * (1 - m) + o * m
    return result.to(background.dtype)


# ------------------------------------------------------------------------------------------------------- validation


def _regions(background: Any, objects: Any, regions: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(masks, None) or (None, boxes)."""
    K, (H, W) = objects.shape[0], background.shape[2:]
    if isinstance(regions, torch.Tensor) and regions.dim() == 3:
        if regions.dtype == torch.bool:
            regions = regions.to(torch.float32)
        reg.check_tensor(_OP, "regions", regions, background)
        if regions.shape != (K, H, W):
            reg.fail(_OP, "regions", f"boxes [{K}, 4] or masks [{K}, {H}, {W}]", tuple(regions.shape))
        return regions, None
    boxes, _ = check_boxes(_OP, "regions", regions)
    if boxes.device != background.device and not boxes.is_cpu:
        reg.fail(_OP, "regions", f"boxes on {background.device} or the CPU", boxes.device)
    if boxes.shape[0] != K:
        reg.fail(_OP, "regions", f"boxes [{K}, 4] or masks [{K}, {H}, {W}]", tuple(boxes.shape))
    return None, boxes


# -------------------------------------------------------------------------------------------------- native functions


def _quick(background: Any, objects: Any, regions: Any, sigma: Any) -> torch.Tensor | None:
    """The usual call, with nothing unusual about it: plain tensors, no gradient, boxes in a list, a number for sigma.

    It does no more than `_blend` would and saves the 40 us that finding out takes. None where more thought is needed.
    """
    if type(sigma) is not float or type(regions) is not list or not 0 <= sigma < 1e4 or reg.fast(background) is None:
        return None
    if _native.place(background)[0] >= 0:  # CPU kernels only, and not where CPU tensors stand for a GPU's
        return None
    grad = torch.is_grad_enabled()
    for t, axes in ((background, 4), (objects, 5)):
        if (
            type(t) not in reg._PLAIN
            or not t.is_cpu
            or t.dtype not in _native.DTYPES
            or t.dim() != axes
            or (grad and t.requires_grad)
            or t.is_neg()
            or t._is_zerotensor()
            or t.layout != torch.strided
        ):
            return None
    K, B, C, H, W = objects.shape
    if background.shape != objects.shape[1:] or len(regions) != K or objects.numel() == 0:
        return None
    try:
        boxes = _listed(tuple(map(tuple, regions)))
    except TypeError:  # something in the list is not what it should be; the ordinary way names it
        return None
    if boxes is None:
        return None
    radius, prefix = gp.prefixes((sigma,))
    out = torch.empty(background.shape, dtype=background.dtype, device="cpu")
    workspace = torch.empty(K * (H + W + 8), dtype=torch.float32, device="cpu")
    at, codes = workspace.data_ptr(), _native.DTYPES
    code = codes[background.dtype]
    _native.extension.gaussian_blend(  # type: ignore[union-attr]
        -1, 0,
        (K, B, C, H, W, (background.data_ptr(), code, *background.stride()),
         (objects.data_ptr(), codes[objects.dtype], *objects.stride()), None, boxes.data_ptr(), radius.data_ptr(), 0,
         prefix.data_ptr(), 0, at + 32 * K, at, (out.data_ptr(), code, *out.stride()), *gp.NO_SIGMA),
    )  # fmt: skip
    return out


@bounded(lambda boxes: 0 if boxes is None else 512 * boxes.shape[0])  # with the key, which is Python's
def _listed(boxes: tuple[tuple[float, ...], ...]) -> torch.Tensor | None:
    """Boxes as float64 [K, 4], kept because a sampler blends the same ones at every step; None if they are not."""
    if not all(len(box) == 4 and all(type(v) is float and v == v for v in box) for box in boxes):
        return None
    return torch.tensor(boxes, dtype=torch.float64, device="cpu")


def _shared(
    background: Any, objects: Any, masks: Any, boxes: Any, sigma: Any, value: float, like: torch.Tensor
) -> tuple[Any, Any, list[Any]]:
    """Everything the native forward and backward have in common: sizes, operands, boxes, profiles; struct Sigma. The
    kernel runs on the device of `like`."""
    K, B, C, H, W = objects.shape
    boxed: Any = (0, 0, 0, 0, 0, 0, 0)
    numbers: Any = gp.NO_SIGMA
    keep: list[Any] = []
    if boxes is not None:
        boxed, numbers, keep = operands(_OP, "regions", boxes, sigma, value, like, (H, W))
        # ranges, int64 [K, 4], and profiles
        workspace = torch.empty(K * (H + W + 8), dtype=torch.float32, device=like.device)
        keep.append(workspace)
        at = workspace.data_ptr()
        boxed = (*boxed, at + 32 * K, at)
    masks = None if masks is None or not masks.numel() else masks
    return (
        (K, B, C, H, W, reg.operand(background), reg.operand(objects), reg.operand(masks), *boxed),
        numbers,
        keep,
    )  # fmt: skip


def _blend(background, objects, masks, boxes, sigma, value) -> torch.Tensor:  # type: ignore[no-untyped-def]
    out = torch.empty(background.shape, dtype=background.dtype, device=background.device)
    _blend_out(background, objects, masks, boxes, sigma, value, out)
    return out


def _blend_out(background, objects, masks, boxes, sigma, value, out) -> None:  # type: ignore[no-untyped-def]
    if out.numel():
        arguments, numbers, keep = _shared(background, objects, masks, boxes, sigma, value, out)
        _native.extension.gaussian_blend(  # type: ignore[union-attr]
            *_native.place(out), (*arguments, reg.operand(out), *numbers)
        )
        del keep


def _backward(  # type: ignore[no-untyped-def]
    grad, background, objects, masks, boxes, sigma, value, K, code, want_background, want_objects, want_masks
) -> list[torch.Tensor]:
    """Gradients to background, objects and masks, those that are wanted; the first two operands may be absent where
    the last is not."""
    shape, place = grad.shape, grad.device
    dbackground = torch.empty(shape, dtype=grad.dtype, device=place) if want_background else None
    dobjects = torch.empty(K, *shape, dtype=_DTYPES[code], device=place) if want_objects else None
    dmasks = torch.zeros(K, *shape[2:], dtype=torch.float32, device=place) if want_masks else None
    if grad.numel():
        like = torch.empty(1, dtype=torch.float32, device=place).expand(K, *shape) if objects is None else objects
        arguments, numbers, keep = _shared(background, like, masks, boxes, sigma, value, grad)
        device, stream = _native.place(grad)
        slots = max(1, min(torch.get_num_threads(), shape[2])) if device < 0 else 0
        floats = (3 * K + 2) * BLOCK
        workspace = torch.empty(slots * floats, dtype=torch.float32, device=place)
        _native.extension.gaussian_blend_backward(  # type: ignore[union-attr]
            device, stream,
            (*arguments, reg.operand(grad), reg.operand(dbackground), reg.operand(dobjects),
             0 if dmasks is None else dmasks.data_ptr(), workspace.data_ptr(), slots, floats, *numbers),
        )  # fmt: skip
        del keep
    return [g for g in (dbackground, dobjects, dmasks) if g is not None]


def _backward_fake(  # type: ignore[no-untyped-def]
    grad, background, objects, masks, boxes, sigma, value, K, code, want_background, want_objects, want_masks
) -> list[torch.Tensor]:
    found = [grad.new_empty(grad.shape)] if want_background else []
    if want_objects:
        found.append(grad.new_empty(K, *grad.shape, dtype=_DTYPES[code]))
    if want_masks:
        found.append(grad.new_empty(K, *grad.shape[2:], dtype=torch.float32))
    return found


# ---------------------------------------------------------------------------------------------------------- gradient


class _Blend(torch.autograd.Function):
    """Background and objects are kept only where a gradient to the masks, or through boxes to sigma, is wanted."""

    @staticmethod
    def forward(ctx, background, objects, masks, boxes, sigma, value):  # type: ignore[no-untyped-def,override]
        ctx.value, ctx.code, ctx.K, ctx.types = value, _native.DTYPES[objects.dtype], objects.shape[0], background.dtype
        learned = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
        ctx.save_for_backward(background if learned else None, objects if learned else None, masks, boxes, sigma)
        return reg.call(_blend_op, _blend, background, objects, masks, boxes, sigma, value)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        background, objects, masks, boxes, sigma = ctx.saved_tensors
        need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised([grad]):
            # create_graph=True, or a backward pass that is itself vectorised
            full = _reference_gradient(ctx, grad, need)
        else:
            full = reg.call(
                _backward_op, _backward, grad, background, objects, masks, boxes, sigma, ctx.value, ctx.K, ctx.code,
                need[0], need[1], need[2] or need[3],
            )  # fmt: skip
            if need[3]:  # through the masks of the boxes, which only this gradient asks for
                full = [*full[:-1], reg.call(_box_backward_op, _box_backward, full[-1], boxes, sigma)]
        found = iter(full)
        dbackground, dobjects, dmasks, dsigma = [next(found) if n else None for n in need]
        return dbackground, dobjects, dmasks, None, dsigma, None


def _reference_gradient(ctx: Any, grad: torch.Tensor, need: list[bool]) -> list[torch.Tensor]:
    """The same gradients as a differentiable expression. Where no mask is learned any point will do, so zero it is."""
    background, objects, masks, boxes, sigma = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if masks is None:
            size = (grad.shape[2], grad.shape[3])
            m = box_mask_reference(boxes.double(), size, sigma=ctx.value if sigma is None else sigma)
        else:
            m = masks
        if background is None:
            background = torch.zeros(grad.shape, dtype=ctx.types, device=grad.device, requires_grad=True)
            like = {"dtype": _DTYPES[ctx.code], "device": grad.device}
            objects = torch.zeros(ctx.K, *grad.shape, **like, requires_grad=True)
        result = _compose(background, objects, m, boxed=masks is None)
        wanted = [t for t, n in zip((background, objects, masks, sigma), need, strict=True) if n]
    return list(torch.autograd.grad(result, wanted, grad, create_graph=create_graph, materialize_grads=True))


# ------------------------------------------------------------------------------------------------------ registration

_ARGUMENTS = "Tensor background, Tensor objects, Tensor? masks, Tensor? boxes, Tensor? sigma, float value"

_blend_op = reg.define(
    "gaussian_blend",
    _ARGUMENTS,
    "Tensor",
    _blend,
    lambda background, *_: background.new_empty(background.shape),
    lambda background, objects, masks, *_: (background, objects, masks),
)
_blend_out_op = reg.define(
    "gaussian_blend_out",
    f"{_ARGUMENTS}, Tensor(a!) out",
    "()",
    _blend_out,
    lambda *_: None,
    lambda background, objects, masks, boxes, sigma, value, out: (background, objects, masks, out),
)
_backward_op = reg.define(
    "gaussian_blend_backward",
    "Tensor grad, Tensor? background, Tensor? objects, Tensor? masks, Tensor? boxes, Tensor? sigma, float value, "
    "SymInt K, int dtype, bool want_background, bool want_objects, bool want_masks",
    "Tensor[]",
    _backward,
    _backward_fake,
    lambda grad, background, objects, masks, *_: (grad, background, objects, masks),
)
