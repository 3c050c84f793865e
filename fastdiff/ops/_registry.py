"""One place where operators meet torch: specs, registration, and who serves a call.

A call takes one of these routes:

- **fast**: plain tensors, no gradient, no mode active: straight into the extension, which reads the tensors itself
  (csrc/dlpack.h). Dispatching to Python costs 2.7 µs a call, more than everything else in a small op together.
- **op**: the `torch.library` operator, for tracing (`torch.compile`, `torch.export`, fake tensors), tensor subclasses
  and the profiler; and the very function registered for it, called directly, where only the layout was unusual.
- **grad**: an `autograd.Function` around the native kernels, entered only when a gradient is needed.
- **reference**: the plain PyTorch formula. Chosen by ``use_backend("reference")``, when the native kernels cannot
  serve the call, and under forward-mode derivatives and functorch transforms, where it *is* the derivative.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.autograd import profiler as _profiler

from fastdiff import _native

Tensors = Sequence[torch.Tensor | None]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs of the public function

REFERENCE, GRAD, OP = "reference", "grad", "op"

library = torch.library.Library("fastdiff", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class OpSpec:
    """All that tests, `fastdiff verify` and `fastdiff bench` need to know of one operator.

    Attributes:
        name: public name, also the name in `torch.ops.fastdiff`.
        function: the public function.
        reference: the plain PyTorch formula with the public signature; float64 in, float64 out.
        example: ``example(rng, dtype, device) -> (args, kwargs)``, one valid call; shapes, layouts and options are
            drawn from `rng`, so hypothesis can drive and shrink it.
        lower: the torch operator and its arguments for a public call; None where the function is made of several.
        bound: ``bound(dtype, *args, **kwargs) -> (magnitude per output, ...)`` for the call with float64 tensors, the
            outputs being stored as `dtype`: the sum of the absolute values that meet on the way to each element, so
            that float32 arithmetic is off by a few units of 2^-24 of it. See `tolerance`.
        grad_bound: ``grad_bound(dtype, grads, *args, **kwargs) -> {argument: magnitude}``: likewise for the gradients,
            `grads` being the upstream gradient of every output in float64.
        differentiable: names of the tensor arguments that have gradients.
        growth: ``growth(*args, **kwargs)``: how many float32 roundings pile up in a reduction, e.g. sqrt(D).
        bad: calls that must fail: (description, make(args, kwargs) -> (args, kwargs), exception type, words expected
            in the message).
        bytes: bytes that any implementation must move for a call.
        flops: floating-point operations of a call.
        shapes: named shapes for the benchmark, ``name -> make(dtype, device) -> (args, kwargs)``.
        peers: ``name -> prepare(args, kwargs) -> zero-argument function``; `prepare` raises ImportError where the peer
            is not installed and ValueError where it cannot do the call.
        take: ``take(b, args, kwargs) -> (args, kwargs)``, the same call for sample b alone, as a batch of one.
        inplace: the position of an argument that ``out=`` may be, or None.
        cuda: there is a CUDA kernel. Where there is none, the reference serves tensors on a GPU.
        large: the name of the shape with enough work for every thread, and samples 0 to 3 at least.
        empty: valid calls on tensors without elements; None: derived from the first of `shapes` by cutting dimensions.
        exact_infinity: an infinity in the first argument leads to the same infinities and NaNs as in the reference;
            False: only to the same elements not being finite (inf - inf on one way, inf on another).
        compiled: the formulation of the reference that `torch.compile` does best with, where that is another.
        overhead: the smallest sensible call, of which the benchmark takes the price of a call; None: the first of
            `shapes` with every dimension cut to a few.
        products: it contains matrix products of torch's libraries, whose bits may differ with the batch and the number
            of threads.
        limits: ``limits(*lowered)``, or of the call itself where `lower` is None: why the kernels of the operands'
            device cannot serve a call, besides what holds for every operator; None: there is nothing of the kind.
        decisive: ``decisive(*args, **kwargs)``: whatever tensors must be of a type and on a device that the kernels
            serve; None: all that `lower` hands to the kernel.
        scaling: what the time is measured against: ``axis -> (expected exponent, {value: make(dtype, device)})``.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    example: Callable[[random.Random, torch.dtype, torch.device], Call]
    lower: Callable[..., tuple[Any, tuple[Any, ...]]] | None
    bound: Callable[..., tuple[torch.Tensor, ...]]
    grad_bound: Callable[..., dict[str, torch.Tensor]]
    differentiable: tuple[str, ...]
    growth: Callable[..., float]
    bad: Sequence[tuple[str, Callable[..., Call], type[Exception], tuple[str, ...]]]
    bytes: Callable[..., int]
    flops: Callable[..., int]
    shapes: dict[str, Callable[[torch.dtype, torch.device], Call]]
    take: Callable[[int, tuple[Any, ...], dict[str, Any]], Call]
    peers: dict[str, Callable[..., Callable[[], Any]]] = field(default_factory=dict)
    inplace: int | None = 0
    cuda: bool = True
    large: str = ""
    empty: Sequence[Callable[[torch.dtype, torch.device], Call]] | None = None
    exact_infinity: bool = True
    compiled: Callable[..., Any] | None = None
    overhead: Callable[[torch.dtype, torch.device], Call] | None = None
    products: bool = False
    limits: Callable[..., list[str]] | None = None
    decisive: Callable[..., Any] | None = None
    scaling: dict[str, tuple[float, dict[int, Callable[[torch.dtype, torch.device], Call]]]] = field(
        default_factory=dict
    )

    @property
    def has_out(self) -> bool:
        """The function takes ``out=``."""
        return "out" in inspect.signature(self.function).parameters

    def __repr__(self) -> str:
        return f"OpSpec({self.name})"


SPECS: dict[str, OpSpec] = {}


def add(spec: OpSpec) -> OpSpec:
    """Publish a spec: from here on the laws, `verify` and `bench` know the operator."""
    SPECS[spec.name] = spec
    return spec


def define(
    name: str,
    arguments: str,
    returns: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    operands: Callable[..., Any] = lambda *args: args,
    cuda: bool = True,
) -> Any:
    """Register ``fastdiff::name`` with torch and return its overload.

    Args:
        name: operator name.
        arguments: schema arguments, e.g. ``"Tensor x, float eps"``.
        returns: schema of the result; ``"()"`` for an operator that fills arguments marked ``Tensor(a!)``.
        kernel: the implementation for CPU and CUDA.
        fake: the same for shapes only.
        operands: which of the arguments must be of a type the kernels serve; all tensors unless given.
        cuda: `kernel` serves CUDA tensors too.
    """

    def guarded(*args: Any) -> Any:
        why = _native.reasons(tensors_in(operands(*args)), hard=True)
        if why:
            raise RuntimeError(f"torch.ops.fastdiff.{name} is native only, which cannot serve this: " + "; ".join(why))
        return kernel(*args)

    library.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA") if cuda else ("CPU",):
        library.impl(name, guarded, key)
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=library)
    return getattr(torch.ops.fastdiff, name).default


def transforms_active() -> bool:
    """True inside forward-mode AD or a functorch transform, where only PyTorch's own operators will do."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def vectorised(grads: Tensors) -> bool:
    """A backward pass runs for many upstream gradients at once (`is_grads_batched`, vmap): no plain memory."""
    if torch.compiler.is_compiling():
        return False
    if transforms_active():
        return True
    # `is_grads_batched` is not a functorch transform; only the tensor's own keys tell.
    return any(g is not None and "Batched" in str(torch._C._dispatch_keys(g)) for g in grads)


def route(op: str, required: Tensors, optional: Tensors = (), cuda: bool = True) -> str:
    """Who serves a call on these tensors; see the module's docstring. `optional` ones may be None. `cuda`: the
    operator has a CUDA kernel.

    Anything that is not a tensor is answered with the reference route, whose validation names it.

    Raises:
        RuntimeError: ``use_backend("native")`` is in force and the native kernels cannot serve the call.
    """
    if _native.backend == "reference" or _native.extension is None or transforms_active():
        return _fallback(op, (*required, *optional), cuda)
    dtypes, grad = _native.DTYPES, torch.is_grad_enabled()
    needs_grad = False
    for t in (*required, *[o for o in optional if o is not None]) if optional else required:
        if not isinstance(t, torch.Tensor):
            return REFERENCE
        if t.dtype not in dtypes or not (t.is_cpu or (t.is_cuda and _has_cuda and cuda)):
            return _fallback(op, (*required, *optional), cuda)
        if grad and t.requires_grad:
            needs_grad = True
    return GRAD if needs_grad else OP


_has_cuda = bool(_native.extension and _native.extension.build_info()["cuda"])


def direct_is_safe() -> bool:
    """No tracer, mode or profiler would miss the call if it went around the dispatcher."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or _profiler._is_profiler_enabled
        or torch._C._len_torch_function_stack()
    )


def fast(x: Any) -> Any:
    """The extension's fast entry points, or None where a call on x may need more thought.

    They serve plain tensors that need no gradient, with no mode, tracer or transform active; what else could be unusual
    about a call they find themselves, and decline.
    """
    entry = _native.fast
    if (
        entry is None
        or type(x) not in _PLAIN
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or _profiler._is_profiler_enabled
        or torch._C._len_torch_function_stack()
    ):
        return None
    return entry


def written(*out: torch.Tensor | None) -> None:
    """Tell autograd that these were written in place, so that a backward pass that needed the old values says so."""
    for t in out:
        if t is not None and not torch.compiler.is_compiling() and not t.is_inference():
            torch.autograd.graph.increment_version(t)


def call(op: Any, kernel: Callable[..., Any], *args: Any) -> Any:
    """The registered operator, or its kernel directly where going around the dispatcher is safe."""
    # Lazily negated and all-zero tensors (z.conj().imag, forward-mode zeros) are made real by the dispatcher.
    plain = direct_is_safe() and all(
        type(t) in _PLAIN and not t.is_neg() and not t._is_zerotensor() for t in tensors_in(args)
    )
    return kernel(*args) if plain else op(*args)


def distinct(*args: Any) -> tuple[Any, ...]:
    """The arguments of an ``autograd.Function.apply``. While compiling, a tensor that comes again becomes a view of
    itself: torch.compile refuses to trace an apply that takes one tensor twice."""
    if not torch.compiler.is_compiling():
        return args
    found: list[Any] = []
    for t in args:
        again = isinstance(t, torch.Tensor) and any(t is other for other in found)
        found.append(t.view_as(t) if again else t)
    return tuple(found)


def _fallback(op: str, tensors: Tensors, cuda: bool = True) -> str:
    if _native.backend == "native":
        why = _native.reasons(tensors, cuda=cuda)
        if transforms_active():
            why.append("a forward-mode derivative or functorch transform is active")
        raise RuntimeError(f'{op}: use_backend("native") cannot serve this call: ' + "; ".join(why))
    if _native.backend == "auto":
        _native.warn_once_if_missing()
    return REFERENCE


def within_limits(op: str, way: str, why: Sequence[str]) -> str:
    """The route of a call that the kernels cannot serve for the reasons `why`, or `way` where there are none. What is
    said here, `OpSpec.limits` must say too: it is how `explain` knows.

    Raises:
        RuntimeError: there are reasons, and ``use_backend("native")`` is in force.
    """
    if way is REFERENCE or not why:
        return way
    if _native.backend == "native":
        raise RuntimeError(f'{op}: use_backend("native") cannot serve this call: ' + "; ".join(why))
    return REFERENCE


LEARNED = "a coefficient requires a gradient: the reference is its derivative"


def learned(coefficients: Sequence[Any]) -> bool:
    """A gradient is wanted of a coefficient."""
    return torch.is_grad_enabled() and any(isinstance(c, torch.Tensor) and c.requires_grad for c in coefficients)


def explain(op_name: str, *args: Any, **kwargs: Any) -> list[str]:
    """Every reason why ``op_name(*args, **kwargs)`` would not run on the native kernels; empty if it would.

    Raises:
        ValueError: there is no operator of that name; also what the call itself would raise for bad coefficients.
    """
    if op_name not in SPECS:
        raise ValueError(f"explain: op_name: expected one of {sorted(SPECS)}, got {op_name!r}")
    spec = SPECS[op_name]
    lowered: tuple[Any, ...] = spec.lower(*args, **kwargs)[1] if spec.lower else args
    # An update's first argument are its terms; its per-sample coefficients may be of more types.
    operands = spec.decisive(*args, **kwargs) if spec.decisive else lowered[0] if _is_update(lowered) else lowered
    found = _native.reasons([t for t in tensors_in(operands) if t.is_floating_point()], cuda=spec.cuda)
    if spec.limits:
        found += spec.limits(*lowered) if spec.lower else spec.limits(*args, **kwargs)
    if transforms_active():
        found.append("a forward-mode derivative or functorch transform is active: the reference is its derivative")
    if _is_update(lowered) and learned(tensors_in(lowered[1:])):
        found.append(LEARNED)
    return found


def _is_update(lowered: tuple[Any, ...]) -> bool:
    return isinstance(lowered[0], list)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (tuple, list)):
        return [t for item in tree for t in tensors_in(item)]
    return []


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The same nested structure with every tensor replaced by ``function(tensor)``."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {k: map_tensors(function, v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(function, v) for v in tree)
    return tree


def widen(tree: Any) -> Any:
    """The same nested structure in double precision; integers and booleans stay."""

    def wide(t: torch.Tensor) -> torch.Tensor:
        if t.is_complex():
            return t.detach().to(torch.complex128)
        return t.detach().double() if t.is_floating_point() else t

    return map_tensors(wide, tree)


def operand(t: torch.Tensor | None) -> tuple[int, ...] | None:
    """A tensor as the native side takes it (`Strided`): pointer, dtype, strides in elements, 0 where the size is 1."""
    if t is None:
        return None
    strides = [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return (t.data_ptr(), _native.DTYPES[t.dtype], *strides)


def tolerance(expected: torch.Tensor, magnitude: torch.Tensor, growth: float, dtype: torch.dtype) -> torch.Tensor:
    """How far an output of type `dtype` may be from its float64 value, per element.

    Two roundings are unavoidable: the result's own, half a unit in its last place (doubled here, since an error just
    before a rounding boundary moves it by a whole unit), and those of the float32 arithmetic behind it, each at most
    2^-24 of the magnitudes involved. `growth` counts the latter; for a sum of n terms they grow like sqrt(n).
    """
    storage = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return storage + (4.0 + growth) * 2.0**-24 * magnitude


def fail(op: str, argument: str, expected: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise the one form of error that every operator uses."""
    raise kind(f"{op}: {argument}: expected {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object, like: torch.Tensor | None = None) -> None:
    """`value` is a floating-point tensor, on the device of `like`."""
    if not isinstance(value, torch.Tensor):
        fail(op, argument, "a torch.Tensor", type(value).__name__, TypeError)
    if not value.is_floating_point():
        fail(op, argument, "a floating-point tensor", value.dtype, TypeError)
    if value.layout != torch.strided or value.is_nested:
        fail(op, argument, "a dense tensor", "a nested one" if value.is_nested else value.layout, TypeError)
    if like is not None and value.device != like.device:
        fail(op, argument, f"a tensor on {like.device}", value.device)


def check_out(op: str, out: object, like: torch.Tensor, inputs: Tensors, may_alias: Tensors = ()) -> None:
    """`out` can be written: type, shape, dtype, device, no gradient, and no partial overlap with an input."""
    check_tensor(op, "out", out, like)
    assert isinstance(out, torch.Tensor)
    if out.shape != like.shape:
        fail(op, "out", f"shape {tuple(like.shape)}", tuple(out.shape))
    if out.dtype != like.dtype:
        fail(op, "out", f"dtype {like.dtype}", out.dtype, TypeError)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *inputs)):
        fail(op, "out", "no argument that requires a gradient (out= is not differentiable)", "one that does")
    if not _distinct(out):
        fail(op, "out", "a tensor whose elements are distinct in memory", f"strides {out.stride()}")
    for t in inputs:
        if t is None or not overlaps(out, t):
            continue
        same = t.data_ptr() == out.data_ptr() and t.stride() == out.stride() and t.shape == out.shape
        if not (same and t.dtype == out.dtype and any(t is a for a in may_alias)):
            fail(op, "out", "memory apart from the inputs, or exactly that of one it may replace", "an overlap")


def _distinct(t: torch.Tensor) -> bool:
    """No two elements share memory: each stride steps over everything that the smaller strides span."""
    if t.is_contiguous():
        return True
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride if size > 1 else 0
    return True


def number(op: str, argument: str, value: Any, low: float = float("-inf")) -> float:
    """`value` as a float: a finite number that is no tensor, at least `low`. While tracing, the value as it is."""
    if torch.compiler.is_compiling() and not isinstance(value, torch.Tensor):
        return value  # perhaps a symbol; to look at it would compile anew for every value
    expected = "a finite number" + (f" >= {low:g}" if low > float("-inf") else "")
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__float__"):
        fail(op, argument, expected, type(value).__name__, TypeError)
    try:
        result = float(value)
    except (TypeError, ValueError):
        fail(op, argument, expected, type(value).__name__, TypeError)
    if not (low <= result and abs(result) < float("inf")):
        fail(op, argument, expected, repr(value))
    return result


def overlaps(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The address ranges of two tensors intersect (an interleaved pair counts as overlapping)."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device or torch.compiler.is_compiling():
        return False
    if type(a) not in _PLAIN or type(b) not in _PLAIN or a.is_meta:
        return False

    def span(t: torch.Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1
