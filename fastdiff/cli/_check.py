"""One call of an operator against its float64 reference: outputs, gradients, repeatability, and who computed it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiff import _native
from fastdiff.ops._registry import Call, OpSpec, map_tensors, tensors_in, tolerance, widen

# Exceeding the tolerance is what fails, so an error of exactly 1 passes.
LIMIT = 1.0


@dataclass
class Finding:
    """How one call went. `worst_*` are the largest error as a fraction of its tolerance."""

    worst_output: float = 0.0
    worst_gradient: float = 0.0
    failures: list[str] = field(default_factory=list)


@dataclass
class Expected:
    """What the float64 reference says of one call; computed once and compared with every instruction set."""

    spec: OpSpec
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtypes: list[torch.dtype]
    outputs: list[torch.Tensor]
    tolerances: list[torch.Tensor]
    upstream: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_tolerances: dict[str, torch.Tensor] = field(default_factory=dict)
    any_nonfinite: bool = False  # where the reference is not finite, neither inf nor NaN is insisted on


def expect(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any], *, gradients: bool, seed: int = 0) -> Expected:
    """Evaluate the reference in float64 on the very inputs that the kernel gets, and derive the tolerances.

    Args:
        spec: the operator.
        args: of the public function.
        kwargs: likewise.
        gradients: also those of the differentiable arguments, for random upstream gradients.
        seed: of the upstream gradients.
    """
    args64, kwargs64 = widen(args), widen(kwargs)
    with torch.no_grad():
        dtypes = [t.dtype for t in tensors_in(spec.reference(*args, **kwargs))]
        outputs = tensors_in(spec.reference(*args64, **kwargs64))
        # Elements that a NaN or infinity does not reach have the tolerance they would have without it.
        bounds = spec.bound(dtypes[0], *_finite(args64), **_finite(kwargs64))
        growth = spec.growth(*args, **kwargs)
        limits = [tolerance(e, b, growth, d) for e, b, d in zip(outputs, bounds, dtypes, strict=True)]
    found = Expected(spec, args, kwargs, dtypes, outputs, limits)
    if not gradients:
        return found
    generator = torch.Generator().manual_seed(seed)
    for out, dtype in zip(outputs, dtypes, strict=True):
        found.upstream.append(torch.randn(out.shape, generator=generator).to(out.device, dtype))
    upstream = widen(found.upstream)
    found.gradients = _gradients(spec.reference, spec, args64, kwargs64, upstream)
    with torch.no_grad():
        bound_of = spec.grad_bound(dtypes[0], upstream, *args64, **kwargs64)
        kept = differentiable(spec, args, kwargs)
        found.gradient_tolerances = {
            name: tolerance(g, bound_of[name], growth, kept[name].dtype) for name, g in found.gradients.items()
        }
    return found


def check(expected: Expected, *, native: bool = True) -> Finding:
    """Run the public function on the call of `expected`, and compare.

    Args:
        expected: from `expect`.
        native: insist on the native kernel, and on its being called.
    """
    spec, args, kwargs = expected.spec, expected.args, expected.kwargs
    finding = Finding()
    with _native.use_backend("native" if native else "auto"), kernel_calls() as calls:
        with torch.no_grad():
            outputs = tensors_in(spec.function(*args, **kwargs))
            again = tensors_in(spec.function(*args, **kwargs))
        if native and not calls and any(t.numel() for t in outputs):
            finding.failures.append("the native kernel was not called")
        _same_bits("output", outputs, again, finding)
        finding.worst_output = _compare_all(
            [(f"output {i}" if len(outputs) > 1 else "output", t) for i, t in enumerate(outputs)],
            expected.outputs,
            expected.tolerances,
            expected.dtypes,
            finding,
            any_nonfinite=expected.any_nonfinite,
        )
        if not expected.gradients:
            return finding
        calls.clear()
        grads = _gradients(spec.function, spec, args, kwargs, expected.upstream)
        repeated = _gradients(spec.function, spec, args, kwargs, expected.upstream)
        backward = [name for name in calls if "backward" in name]
        if native and not backward and any(g.numel() for g in grads.values()):
            finding.failures.append(f"the gradients did not come from a native kernel (calls: {sorted(set(calls))})")
    _same_bits("gradient", list(grads.values()), list(repeated.values()), finding)
    names, leaves = list(grads), differentiable(spec, args, kwargs)
    finding.worst_gradient = _compare_all(
        [(f"gradient of {name}", grads[name]) for name in names],
        [expected.gradients[name] for name in names],
        [expected.gradient_tolerances[name] for name in names],
        [leaves[name].dtype for name in names],
        finding,
    )
    return finding


def differentiable(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call that have gradients, by the names that `spec.differentiable` gives them."""
    found: dict[str, torch.Tensor] = {}
    for name, value in inspect.signature(spec.function).bind(*args, **kwargs).arguments.items():
        items = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for index, item in items:
            label = name if index is None else f"{name}[{index}]"
            if isinstance(item, torch.Tensor) and label in spec.differentiable:
                found[label] = item
    return found


def with_leaves(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, dict[str, torch.Tensor]]:
    """The same call with every differentiable tensor made a leaf that requires a gradient, and those leaves."""
    leaves = {name: t.detach().requires_grad_() for name, t in differentiable(spec, args, kwargs).items()}
    bound = inspect.signature(spec.function).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        if isinstance(value, (list, tuple)):
            bound.arguments[name] = type(value)(leaves.get(f"{name}[{i}]", item) for i, item in enumerate(value))
        else:
            bound.arguments[name] = leaves.get(name, value)
    return (bound.args, bound.kwargs), leaves


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """A call in words: dtype, shape and strides of every tensor, and the value of everything else."""
    parts = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
    return ", ".join(parts)


@contextmanager
def kernel_calls() -> Iterator[list[str]]:
    """Names of the native kernels that were called, as they are called."""
    names: list[str] = []
    before = _native.extension, _native.fast
    counting: list[Any] = [module and _Counting(module, names) for module in before]
    _native.extension, _native.fast = counting
    try:
        yield names
    finally:
        _native.extension, _native.fast = before


class _Counting:
    """The extension, with a note of every function that was called and did its work."""

    def __init__(self, extension: object, names: list[str]) -> None:
        self._extension, self._names = extension, names

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._extension, name)
        if not callable(value):
            return value

        def called(*args: Any) -> Any:
            result = value(*args)
            if result is not False:  # a fast entry point that declines the call returns False
                self._names.append(name)
            return result

        return called


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        strides = "" if value.is_contiguous() else f" strides {tuple(value.stride())}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_describe, value)) + "]"
    return repr(value)


def _gradients(
    function: Callable[..., Any],
    spec: OpSpec,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    upstream: list[torch.Tensor],
) -> dict[str, torch.Tensor]:
    (args, kwargs), leaves = with_leaves(spec, args, kwargs)
    with torch.enable_grad():
        outputs = tensors_in(function(*args, **kwargs))
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def _finite(tree: Any) -> Any:
    return map_tensors(lambda t: t.nan_to_num(0.0, 0.0, 0.0) if t.is_floating_point() or t.is_complex() else t, tree)


def _same_bits(what: str, first: list[torch.Tensor], second: list[torch.Tensor], finding: Finding) -> None:
    for a, b in zip(first, second, strict=True):
        if not torch.equal(_bits(a), _bits(b)):
            finding.failures.append(f"{what}: two runs of the same call differ")
            return


def _bits(t: torch.Tensor) -> torch.Tensor:
    if t.is_complex():
        t = torch.view_as_real(t)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(integers[t.element_size()])


def _compare_all(
    named: list[tuple[str, torch.Tensor]],
    expected: list[torch.Tensor],
    limits: list[torch.Tensor],
    dtypes: list[torch.dtype],
    finding: Finding,
    *,
    any_nonfinite: bool = False,
) -> float:
    worst = 0.0
    if len(named) != len(expected):
        finding.failures.append(f"{len(named)} results, {len(expected)} expected")
        return math.inf
    for (what, got), wanted, limit, dtype in zip(named, expected, limits, dtypes, strict=True):
        error, message = compare(got.detach(), wanted, limit, dtype, any_nonfinite=any_nonfinite)
        worst = max(worst, error)
        if message:
            finding.failures.append(f"{what}: {message}")
    return worst


def compare(
    got: torch.Tensor,
    expected: torch.Tensor,
    limit: torch.Tensor,
    dtype: torch.dtype,
    *,
    any_nonfinite: bool = False,
) -> tuple[float, str]:
    """The largest error as a fraction of `limit`, and what is wrong, or an empty string.

    NaN must meet NaN, an infinity the same infinity; a finite value beyond the largest of `dtype` is that infinity.
    With `any_nonfinite` inf and NaN count as one, and where the tolerance itself is not a number (it was derived from
    the infinity) it is enough to be finite together.
    """
    if got.dtype != dtype:
        return math.inf, f"expected {dtype}, got {got.dtype}"
    if got.shape != expected.shape:
        return math.inf, f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if got.numel() == 0:
        return 0.0, ""
    if got.is_complex():
        got, expected, limit = torch.view_as_real(got), torch.view_as_real(expected), limit.unsqueeze(-1)
        dtype = got.dtype
    # Half a step past the largest finite value is where rounding gives infinity.
    largest = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)
    value = got.double()
    finite = expected.isfinite()
    if any_nonfinite:
        limit = torch.where(value.isfinite(), limit.nan_to_num(nan=math.inf), limit)
    error = (value.clamp(-largest, largest) - expected.clamp(-largest, largest)).abs() / limit
    agree = ~value.isfinite() if any_nonfinite else torch.where(expected.isnan(), value.isnan(), value == expected)
    error = torch.where(finite, error, torch.where(agree, 0.0, math.inf)).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = float(error.max())
    if worst <= LIMIT:
        return worst, ""
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    count = int((error > LIMIT).sum())
    return worst, (
        f"{count} of {error.numel()} elements are off, at worst at {list(index)}: "
        f"expected {float(expected[index]):.9g}, got {float(value[index]):.9g}, "
        f"tolerance {float(limit[index]):.3g}, error / tolerance {worst:.3g}"
    )
