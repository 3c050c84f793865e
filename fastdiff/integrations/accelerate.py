"""`accelerate(obj)`: our operators inside a model or pipeline as it is, in place; `restore(obj)`: as it was.

What is replaced is found by walking: the modules of a model, their attention processors, the components of a pipeline
(schedulers among them), the transforms of a list of transforms. Each kind has a `Handler` in a file of this folder.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload
from typing import Literal as L

from torch import nn

from fastdiff.integrations import (
    _blur,
    _diffusers_attention,
    _diffusers_blocks,
    _diffusers_joint,
    _diffusers_norms,
    _diffusers_schedulers,
    _facebook_dit,
    _transformers_mamba,
)
from fastdiff.integrations._swap import Handler, handler_of, make_fast, make_slow, original_class

__all__ = ["HANDLERS", "Entry", "Report", "accelerate", "acceleration_report", "restore"]

T = TypeVar("T")
log = logging.getLogger(__name__)

# The first that claims an object has it.
HANDLERS: list[Handler] = [
    *_diffusers_norms.HANDLERS,
    *_diffusers_attention.HANDLERS,
    *_diffusers_blocks.HANDLERS,
    *_diffusers_joint.HANDLERS,
    *_diffusers_schedulers.HANDLERS,
    _transformers_mamba.HANDLER,
    *_blur.HANDLERS,
    *_facebook_dit.HANDLERS,
]


@dataclass(frozen=True)
class Entry:
    """One object of a walk.

    Args:
        path: where it hangs, e.g. ``"transformer.blocks.0.norm1"``; empty for the object itself.
        kind: its class.
        handler: the kind of replacement.
        tolerance: of the handler; relative to the range of the output, in float32.
        why_not: why it was left as it is; None if it is replaced.
    """

    path: str
    kind: str
    handler: str
    tolerance: float
    why_not: str | None = None


@dataclass(frozen=True)
class Report:
    """What `accelerate` found.

    Args:
        replaced: what runs on our operators now.
        refused: what could have, but for the reason given.
        unknown: classes with parameters of their own, outside of what is replaced, for which there is no replacement;
            with their numbers.
    """

    replaced: list[Entry] = field(default_factory=list)
    refused: list[Entry] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.refused)} refused"]
        kinds = Counter((e.handler, e.kind, e.tolerance) for e in self.replaced)
        lines += [f"  replaced  {n:4d} x {kind}: {name} (within {tol:g})" for (name, kind, tol), n in kinds.items()]
        reasons = Counter((e.kind, e.why_not) for e in self.refused)
        lines += [f"  refused   {n:4d} x {kind}: {why}" for (kind, why), n in reasons.items()]
        lines += [f"  unchanged {n:4d} x {kind}: no replacement" for kind, n in self.unknown.items()]
        return "\n".join(lines)


@overload
def accelerate(obj: T, *, return_report: L[False] = False) -> T: ...
@overload
def accelerate(obj: T, *, return_report: L[True]) -> tuple[T, Report]: ...
def accelerate(obj: T, *, return_report: bool = False) -> T | tuple[T, Report]:
    """Replaces what our operators can do in a module, pipeline or scheduler, in place.

    Parameters, ``state_dict`` keys, hooks and the type of everything stay; training and `torch.compile` work as before.
    Outputs agree within the tolerance that the report names. Calling it again only takes up what is new.

    Args:
        obj: a `torch.nn.Module`, a diffusers pipeline or scheduler, a transform or a ``Compose`` of transforms.
        return_report: also return what was replaced, what was not, and why.

    Returns:
        `obj` itself, or (`obj`, `Report`).

    Raises:
        TypeError: `obj` is none of these.
    """
    for _, part in _parts(obj, "accelerate"):
        handler = _handler(part)
        if handler is not None and handler_of(part) is None and _why_not(part, handler) is None:
            make_fast(part, handler)
    report = acceleration_report(obj)
    log.info("accelerate(%s): %s", type(obj).__name__, report)
    return (obj, report) if return_report else obj


def restore(obj: T) -> T:
    """Undoes `accelerate`: every part is as it was. Harmless where nothing was replaced.

    Args:
        obj: what `accelerate` was given, a part of it, or something it is a part of.

    Returns:
        `obj` itself.

    Raises:
        TypeError: `obj` is nothing that `accelerate` takes.
    """
    for _, part in _parts(obj, "restore"):
        if handler_of(part) is not None:
            make_slow(part)
    return obj


def acceleration_report(obj: Any) -> Report:
    """What of `obj` runs on our operators, what does not, and why; changes nothing.

    Args:
        obj: what `accelerate` takes, before or after it.

    Raises:
        TypeError: `obj` is nothing that `accelerate` takes.
    """
    report, unknown = Report(), Counter[str]()
    served: set[str] = set()  # paths below which the layers are ours to call
    for path, part in _parts(obj, "acceleration_report"):
        kind = original_class(part).__name__
        done, handler = handler_of(part), _handler(part)
        if done is not None:
            report.replaced.append(Entry(path, kind, done.name, done.tolerance))
            served.add(path.removesuffix("processor").removesuffix("."))
        elif handler is not None:
            why = _why_not(part, handler) or "not accelerated yet"
            report.refused.append(Entry(path, kind, handler.name, handler.tolerance, why))
        elif isinstance(part, nn.Module) and next(part.parameters(recurse=False), None) is not None:
            unknown[kind] += served.isdisjoint(_above(path))
    report.unknown.update(+unknown)
    return report


def _above(path: str) -> Iterator[str]:
    """The path and those of everything it is a part of."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _handler(part: Any) -> Handler | None:
    return next((h for h in HANDLERS if h.claims(part)), None)


def _why_not(part: Any, handler: Handler) -> str | None:
    if "forward" in getattr(part, "__dict__", {}):
        return "its forward was replaced by somebody else's"
    return handler.refuses(part)


def _parts(obj: Any, function: str) -> Iterator[tuple[str, Any]]:
    """(path, object) of all that could be replaced, each object once."""
    if not (isinstance(obj, nn.Module) or _is_pipeline(obj) or _is_compose(obj) or _handler(obj)):
        expected = "a torch.nn.Module, a diffusers pipeline or scheduler, or a transform"
        raise TypeError(f"[{function}] obj: expected {expected}, got {type(obj).__name__}")
    seen: set[int] = set()
    for path, part in _walk("", obj):
        if id(part) not in seen:
            seen.add(id(part))
            yield path, part


def _walk(path: str, obj: Any) -> Iterator[tuple[str, Any]]:
    prefix = f"{path}." if path else ""
    if isinstance(obj, nn.Module):
        for name, module in obj.named_modules():
            here = f"{prefix}{name}" if name else path
            yield here, module
            below = f"{here}." if here else ""
            processor = module.__dict__.get("processor")  # of an attention layer of diffusers
            if processor is not None:
                yield f"{below}processor", processor
            if _is_compose(module):  # torchvision's keeps its transforms in a list
                for i, part in enumerate(module.transforms):
                    yield from _walk(f"{below}transforms.{i}", part)
    elif _is_pipeline(obj):
        for name, part in obj.components.items():
            if part is not None:
                yield from _walk(f"{prefix}{name}", part)
    elif _is_compose(obj):
        for i, part in enumerate(obj.transforms):
            yield from _walk(f"{prefix}transforms.{i}", part)
    else:
        yield path, obj


def _is_pipeline(obj: Any) -> bool:
    return isinstance(getattr(obj, "components", None), dict) and hasattr(obj, "register_modules")


def _is_compose(obj: Any) -> bool:
    return isinstance(getattr(obj, "transforms", None), list)
