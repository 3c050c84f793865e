"""Gaussian blur of images: separable, five borders, any support, differentiable in the image and in sigma.

    out = Ay x Ax^T,   (A x)[i] = sum_k w[k] x[border(i + k)],   w[k] ~ exp(-k^2 / 2 sigma^2),   sum_k w[k] = 1

over |k| <= K // 2, K being the support. Borders say which sample stands at a position outside the image; the maps are
periodic, so the support may exceed the image, even one of a single pixel:

    reflect     c b | a b c d | c b     as torchvision, OpenCV's BORDER_REFLECT_101
    symmetric   b a | a b c d | d c     OpenCV's BORDER_REFLECT
    replicate   a a | a b c d | d d
    circular    c d | a b c d | a b
    constant    0 0 | a b c d | 0 0

dtypes float32, float16, bfloat16 (arithmetic in float32) and uint8 (in float32, rounded to nearest, halves to even, and
clamped); the result has the dtype of x. Any strides.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _gaussian_plan as gp
from fastdiff.ops import _registry as reg

_CODES: dict[torch.dtype, int] = {**_native.DTYPES, torch.uint8: 4}  # kU8 in csrc/fastdiff.h
_NAMES = {code: name for name, code in gp.BORDERS.items()}
_OP = "gaussian_blur"

Sigma = float | tuple[float, float] | torch.Tensor
Size = int | tuple[int | None, int | None] | None


# ------------------------------------------------------------------------------------------------- public functions


def gaussian_blur(
    x: torch.Tensor,
    sigma: Sigma,
    *,
    kernel_size: Size = None,
    border: str = "reflect",
) -> torch.Tensor:
    """Blur the last two axes of `x`; differentiable in `x` and in a tensor `sigma`.

    With ``kernel_size=None``, 8 <= sigma <= 4096 in both axes and images of 64 x 64 or more, the taps are a sum of six
    cosines and the cost no longer depends on sigma: the result is then within 1e-5 max|x| of the exact one (the maximum
    over the image). Any other sigma and an explicit `kernel_size` are computed tap by tap. The gradient to sigma is
    always exact.

    Memory beyond the result: per thread about 40 rows of the image; for any but float32 rows of unit stride also as
    many rows as the support, in float32; with a gradient to sigma, 8 bytes per row of the image. An x of five
    dimensions or more is copied where its axes between the first and the image do not fall together into one (a
    transposed or cut view of a larger tensor). Tables of taps are kept for later calls, at most 32 MB of them.

    On CUDA the same holds from sigma = 16 on, and below it, or with a `kernel_size`, every support is computed tap by
    tap, exactly; taps beyond the image are folded back onto it. None is made or read by the host, so that a captured
    graph may be replayed with another sigma in its tensor. One launch and no memory where no radius K // 2 exceeds 16.
    Where one does, or may, because sigma is a CUDA tensor and kernel_size None: a float32 copy of x (two for the
    gradient to sigma) and at most 56 max(H, W) bytes per sigma, 270 max(H, W) where cosines may serve. A support beyond
    131073 that only the device knows of makes its sample NaN instead of an error.

    Args:
        x: [..., H, W]. With sigma per sample, [B, ..., H, W].
        sigma: standard deviation in pixels: a number >= 0, a pair of them (sigma_y, sigma_x), or a tensor [] or [B].
            0 is the identity. The sign of a tensor's values does not matter; where they are not finite, nor is the
            sample. `torch.compile` makes a number a constant of the compiled code and compiles anew for another; a
            tensor's values may change freely.
        kernel_size: the support K, odd, or a pair (K_y, K_x); None: int(6 sigma) | 1, about three sigma either side.
        border: ``"reflect"``, ``"replicate"``, ``"constant"`` (zeros), ``"circular"`` or ``"symmetric"``.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: a shape, size, option or number does not fit, or the support exceeds 131073.
        TypeError: x is neither a floating-point nor a uint8 tensor, sigma is not a number, or it requires a gradient
            where x is uint8.
    """
    tensor, sy, sx, ky, kx = _check(x, sigma, kernel_size, border)
    way = _route(x, tensor)
    if way is reg.REFERENCE:
        return gaussian_blur_reference(x, sigma, kernel_size=kernel_size, border=border)
    rule = (sy, sx, ky, kx, gp.BORDERS[border])
    if way is reg.GRAD:
        return _Blur.apply(x, tensor, *rule)  # type: ignore[no-any-return]
    return reg.call(_blur_op, _blur, x, tensor, *rule)  # type: ignore[no-any-return]


def gaussian_blur_reference(
    x: torch.Tensor,
    sigma: Sigma,
    *,
    kernel_size: Size = None,
    border: str = "reflect",
) -> torch.Tensor:
    """`gaussian_blur` in plain PyTorch: any device, float64 included, differentiable to any order."""
    if x.numel() == 0:
        return x + 0 * sigma.sum().to(x.dtype) if isinstance(sigma, torch.Tensor) else x.clone()
    if isinstance(sigma, torch.Tensor) and sigma.dim() == 1 and sigma.numel() == x.shape[0] != 1:
        rows = [gaussian_blur_reference(x[b], s, kernel_size=kernel_size, border=border) for b, s in enumerate(sigma)]
        return torch.stack(rows)
    if isinstance(sigma, torch.Tensor):
        sigma = sigma.reshape(())
    sy, sx = sigma if isinstance(sigma, (tuple, list)) else (sigma, sigma)
    ky, kx = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = _along(_along(x.to(wide), -2, sy, ky, border), -1, sx, kx, border)
    if x.dtype == torch.uint8:
        result = result.round().clamp(0, 255)
    return result.to(x.dtype)


def _along(x: torch.Tensor, dim: int, sigma: Any, size: int | None, border: str) -> torch.Tensor:
    """One axis: the sum over the taps of the shifted image."""
    n = x.shape[dim]
    if not size and _is_tensor(sigma) and torch._C._functorch.is_batchedtensor(sigma):
        reg.fail(_OP, "sigma", "a kernel_size where torch.vmap vectorises sigma", "None")
    K = size or gp.check_support(_OP, "sigma", gp.support(float(sigma.detach() if _is_tensor(sigma) else sigma)))
    w = gp.torch_taps(sigma, K, x.device).to(x.dtype)
    where = gp.positions(n, K // 2, border, x.device)
    padded = x.index_select(dim, where.clamp(min=0))
    if border == "constant":
        r = K // 2
        padded = F.pad(x, (r, r) if dim == -1 else (0, 0, r, r))
    total = w[0] * padded.narrow(dim, 0, n)
    for t in range(1, K):
        total = total + w[t] * padded.narrow(dim, t, n)
    return total


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


# ------------------------------------------------------------------------------------------------------- validation


def _check(x: Any, sigma: Any, kernel_size: Any, border: Any) -> tuple[Any, float, float, int, int]:
    """The whole contract; returns sigma as a tensor or None, as two floats, and the sizes (0: from sigma)."""
    if not (isinstance(x, torch.Tensor) and x.dtype == torch.uint8):
        reg.check_tensor(_OP, "x", x)
    elif x.layout != torch.strided or x.is_nested:
        reg.fail(_OP, "x", "a dense tensor", "a nested one" if x.is_nested else x.layout, TypeError)
    if x.dim() < 2:
        reg.fail(_OP, "x", "at least two dimensions [..., H, W]", f"shape {tuple(x.shape)}")
    if not isinstance(border, str) or border not in gp.BORDERS:
        reg.fail(_OP, "border", f"one of {tuple(gp.BORDERS)}", repr(border))
    ky, kx = _sizes(kernel_size)
    if isinstance(sigma, torch.Tensor):
        check_sigma(_OP, sigma, x, x.shape[0] if x.dim() > 2 else 1, "[B]")
        if x.dtype == torch.uint8 and sigma.requires_grad and torch.is_grad_enabled():
            expected = "a sigma that requires no gradient where x is uint8 (a rounded image has none to sigma)"
            reg.fail(_OP, "sigma", expected, "one that does", TypeError)
        return sigma, 0.0, 0.0, ky, kx
    sy, sx = sigma if isinstance(sigma, (tuple, list)) and len(sigma) == 2 else (sigma, sigma)
    sy, sx = reg.number(_OP, "sigma", sy, low=0.0), reg.number(_OP, "sigma", sx, low=0.0)
    if not torch.compiler.is_compiling():
        for s, k in ((sy, ky), (sx, kx)):
            gp.check_support(_OP, "sigma", k or gp.support(s))
    return None, sy, sx, ky, kx


def check_sigma(op: str, sigma: torch.Tensor, like: torch.Tensor, count: int, shape: str) -> None:
    """A tensor sigma: floating-point, [] or one value per sample (box)."""
    if not sigma.is_floating_point():
        reg.fail(op, "sigma", "a floating-point tensor or a number", sigma.dtype, TypeError)
    if sigma.dim() > 1 or sigma.numel() not in (1, count):
        reg.fail(op, "sigma", f"a number or a tensor of shape [] or {shape} = ({count},)", tuple(sigma.shape))
    if sigma.device != like.device and not (sigma.dim() == 0 and sigma.device.type == "cpu"):
        reg.fail(op, "sigma", f"a tensor on {like.device}", sigma.device)


def integer(value: Any) -> int | None:
    """`value` as an int, from whatever stands for one (numpy's too); None if it does not."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, torch.Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def brief(value: Any) -> str:
    """For a message: Python prints no integer of more than 4300 digits."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a huge number"


def _sizes(kernel_size: Any) -> tuple[int, int]:
    pair = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    if len(pair) != 2:
        reg.fail(_OP, "kernel_size", "an odd number, a pair (K_y, K_x) or None", brief(kernel_size))
    sizes = []
    for given in pair:
        if given is None:
            sizes.append(0)
            continue
        k = integer(given)
        if k is None:
            reg.fail(_OP, "kernel_size", "an odd number, a pair (K_y, K_x) or None", brief(given), TypeError)
        if k < 1 or k % 2 == 0:
            reg.fail(_OP, "kernel_size", "an odd number >= 1", brief(k))
        sizes.append(gp.check_support(_OP, "kernel_size", k))
    return sizes[0], sizes[1]


def _route(x: torch.Tensor, sigma: torch.Tensor | None) -> str:
    if x.dtype != torch.uint8:
        way = reg.route(_OP, (x,))
    elif (
        _native.backend == "reference"
        or _native.extension is None
        or not (x.is_cpu or (x.is_cuda and reg._has_cuda))
        or reg.transforms_active()
    ):
        way = reg._fallback(_OP, (x,))
    else:
        return reg.OP
    if way is reg.OP and sigma is not None and torch.is_grad_enabled() and sigma.requires_grad:
        return reg.GRAD
    return way


# -------------------------------------------------------------------------------------------------- native functions


def _planes(x: torch.Tensor) -> torch.Tensor:
    """x as [B, C, H, W]."""
    if x.dim() == 4:
        return x
    if x.dim() == 2:
        return x[None, None]
    return x.unsqueeze(1) if x.dim() == 3 else x.reshape(x.shape[0], -1, *x.shape[-2:])


def _plan(x: torch.Tensor, sigma: Any, sy: float, sx: float, ky: int, kx: int, border: int) -> Any:
    """The tables of a call on x [B, C, H, W] and the floats of workspace that one thread needs, without the ring."""
    H, W = x.shape[-2:]
    for s in (sy, sx):  # traced numbers come unchecked
        reg.number(_OP, "sigma", s, low=0.0)
    values = [(sy, sx)] if sigma is None else [(s, s) for s in sigma.detach().reshape(-1).tolist()]
    rows = []
    for y, z in values:
        Ky = ky or gp.check_support(_OP, "sigma", gp.support(y))
        Kx = kx or gp.check_support(_OP, "sigma", gp.support(z))
        wide = min(abs(y), abs(z)) >= gp.SLIDING_SIGMA and max(abs(y), abs(z)) <= gp.SLIDING_LARGEST
        wide = wide and min(H, W) >= gp.SLIDING_SIDE
        # An axis of one sample is what it is, whatever the taps, wherever outside is a copy of it.
        alone = border != gp.BORDERS["constant"]
        rows.append((y, z, 1 if H == 1 and alone else Ky, 1 if W == 1 and alone else Kx, wide and ky == kx == 0))
    plan, table = gp.plans(rows)
    shared = len(rows) == 1
    return plan, table, (0 if shared else 5), (0 if shared else table.shape[1]), max(r[2] for r in rows), max(
        r[3] for r in rows
    )  # fmt: skip


def _arguments(x: torch.Tensor, operands: list[torch.Tensor], sigma: Any, rule: Any) -> tuple[Any, list[torch.Tensor]]:
    """The arguments that forward and backward share, and what must live until the kernel returns."""
    B, C, H, W = x.shape
    plan, table, plan_stride, table_stride, Ky, Kx = _plan(x, sigma, *rule)
    row = -(-W // 16) * 16 + 64  # as csrc/cpu/gaussian_rows.h cuts it up
    line = 2 * (-(-(Kx // 2 + 1) // 16) * 16) + row
    floats = 15 * row + 17 * line + 2 * (-(-(Ky + 64) // 16) * 16)
    if any(t.dtype != torch.float32 or t.stride(-1) != 1 or W < 32 for t in operands):
        floats += (Ky + 18) * row
    slots = max(1, min(torch.get_num_threads(), B * C * (-(-H // 8))))
    workspace = torch.empty(slots * floats, dtype=torch.float32, device="cpu")
    return (
        (plan.data_ptr(), plan_stride, table.data_ptr(), table_stride, workspace.data_ptr(), slots, floats),
        [plan, table, workspace],
    )


def _cuda_arguments(x: torch.Tensor, sigma: Any, rule: Any, copies: int) -> tuple[Any, Any, list[Any]]:
    """The same for CUDA, struct Sigma (csrc/fastdiff.h), and what must live. `copies`: images of workspace."""
    sy, sx, ky, kx, border = rule
    H, W = x.shape[-2:]
    numbers, supports, there = gp.device_sigma(_OP, sigma, sy, sx, ky, kx, x)
    ext = _native.extension
    assert ext is not None
    workspace = sums = None
    if max(ext.fold_reach(K // 2, n, border) for K, n in zip(supports, (H, W), strict=True)) > gp.ONE_LAUNCH:
        samples = x.shape[0] if numbers[2] else 1
        workspace = torch.empty(copies * x.numel(), dtype=torch.float32, device=x.device)
        sliding = ext.slide_doubles(H, W, ky, kx, numbers[0] != 0, *numbers[3:5])
        doubles = samples * (7 * ext.fold_entries(H, W) + sliding) + 1
        sums = torch.empty(doubles, dtype=torch.float64, device=x.device)
    shared = (0, 0, 0, 0, 0 if workspace is None else workspace.data_ptr(), 0, 0)
    return shared, (*numbers, 0 if sums is None else sums.data_ptr()), [there, workspace, sums]


def _operand(t: torch.Tensor) -> tuple[int, ...]:
    return (t.data_ptr(), _CODES[t.dtype], *t.stride())


def _blur(x, sigma, sy, sx, ky, kx, border) -> torch.Tensor:  # type: ignore[no-untyped-def]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x4, rule = _planes(x), (sy, sx, ky, kx, border)
    device, stream = _native.place(x)
    keep: list[Any]
    if device < 0:
        shared, keep = _arguments(x4, [x4], sigma, rule)
        numbers: Any = gp.NO_SIGMA
    else:
        shared, numbers, keep = _cuda_arguments(x4, sigma, rule, 1)
    _native.extension.gaussian_blur(  # type: ignore[union-attr]
        device, stream, (*x4.shape, border, _operand(x4), *shared, _operand(_planes(out)), *numbers)
    )
    del keep
    return out


def _backward(  # type: ignore[no-untyped-def]
    grad, x, sigma, sy, sx, ky, kx, border, want_x, want_sigma
) -> list[torch.Tensor]:
    """[gradient to x, if wanted] + [gradient to sigma, if wanted]."""
    g = _planes(grad)
    dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if want_x else None
    found = [] if dx is None else [dx]
    B, C, H, W = g.shape
    dsigma = torch.zeros(B, dtype=torch.float64, device=grad.device) if want_sigma else None
    if grad.numel():
        x4, rule = g if x is None else _planes(x), (sy, sx, ky, kx, border)
        device, stream = _native.place(grad)
        keep: list[Any]
        if device < 0:
            shared, keep = _arguments(g, [g, x4], sigma, rule)
            numbers: Any = gp.NO_SIGMA
        else:
            shared, numbers, keep = _cuda_arguments(g, sigma, rule, 2 if want_sigma else 1)
        parts = H if device < 0 else _native.extension.blur_tiles(H, W)  # type: ignore[union-attr]
        partial = torch.empty(B * C * parts if want_sigma else 0, dtype=torch.float64, device=grad.device)
        _native.extension.gaussian_blur_backward(  # type: ignore[union-attr]
            device, stream,
            (*g.shape, border, _operand(x4), *shared, _operand(g), None if dx is None else _operand(_planes(dx)),
             partial.data_ptr() if want_sigma else 0, 0 if dsigma is None else dsigma.data_ptr(), *numbers),
        )  # fmt: skip
        del keep
    if dsigma is not None:
        total = dsigma if sigma.numel() == B else dsigma.sum()
        found.append(total.to(device=sigma.device, dtype=sigma.dtype).reshape(sigma.shape))
    return found


def _backward_fake(  # type: ignore[no-untyped-def]
    grad, x, sigma, sy, sx, ky, kx, border, want_x, want_sigma
) -> list[torch.Tensor]:
    found = [grad.new_empty(grad.shape)] if want_x else []
    return [*found, sigma.new_empty(sigma.shape)] if want_sigma else found


# ---------------------------------------------------------------------------------------------------------- gradient


class _Blur(torch.autograd.Function):
    """Linear in x, so x is kept only where a gradient to sigma is wanted."""

    @staticmethod
    def forward(ctx, x, sigma, *rule):  # type: ignore[no-untyped-def,override]
        ctx.rule, ctx.shape, ctx.dtype = rule, x.shape, x.dtype
        ctx.learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if ctx.learned else None, sigma)
        return reg.call(_blur_op, _blur, x, sigma, *rule)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        x, sigma = ctx.saved_tensors
        need_x, need_sigma = ctx.needs_input_grad[:2]
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised([grad]):
            # create_graph=True, or a backward pass that is itself vectorised
            found = iter(_reference_gradient(ctx, grad, x, sigma))
        else:
            found = iter(reg.call(_backward_op, _backward, grad, x, sigma, *ctx.rule, need_x, need_sigma))
        return (next(found) if need_x else None, next(found) if need_sigma else None, *[None] * 5)


def _reference_gradient(ctx: Any, grad: torch.Tensor, x: Any, sigma: Any) -> list[torch.Tensor]:
    """The same gradients as a differentiable expression. Where sigma is fixed any x will do, so zero it is."""
    create_graph = torch.is_grad_enabled()
    sy, sx, ky, kx, border = ctx.rule
    with torch.enable_grad():
        at = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device, requires_grad=True) if x is None else x
        result = gaussian_blur_reference(
            at, (sy, sx) if sigma is None else sigma, kernel_size=(ky or None, kx or None), border=_NAMES[border]
        )
        wanted = [t for t, n in zip((at, sigma), ctx.needs_input_grad, strict=False) if n]
    found = torch.autograd.grad(result, wanted, grad, create_graph=create_graph, materialize_grads=True)
    return list(found)


# ------------------------------------------------------------------------------------------------------ registration

_RULE = "float sigma_y, float sigma_x, int size_y, int size_x, int border"


def _floats(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Images, for the check of their types: uint8 is served, sigma may be of any floating-point type."""
    return [t for t in tensors if t is not None and t.dtype != torch.uint8]


_blur_op = reg.define(
    "gaussian_blur",
    f"Tensor x, Tensor? sigma, {_RULE}",
    "Tensor",
    _blur,
    lambda x, *_: x.new_empty(x.shape),
    lambda x, *_: _floats(x),
)
_backward_op = reg.define(
    "gaussian_blur_backward",
    f"Tensor grad, Tensor? x, Tensor? sigma, {_RULE}, bool want_x, bool want_sigma",
    "Tensor[]",
    _backward,
    _backward_fake,
    lambda grad, x, *_: _floats(grad, x),
)
