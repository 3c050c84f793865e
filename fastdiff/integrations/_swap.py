"""How one object is made fast and slow again: its class is replaced by a subclass, and back.

An object keeps everything that is its own (parameters, hooks, buffers, its place in the module tree, ``state_dict``
keys); only methods are looked up in another class. So `torch.compile`, copies, hooks and `isinstance` see what they saw
before, and undoing is one assignment. The subclass bears the name and module of the class it replaces, since libraries
save and sort by them (``save_pretrained``, ``_no_split_modules``).
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = [
    "Handler",
    "OfClass",
    "Takes",
    "defines",
    "fast_class",
    "handler_of",
    "make_fast",
    "make_slow",
    "original_class",
    "takes",
]

_CLASS: Any = vars(object)["__class__"]  # assigns the class even where a fast class hides it


@dataclass(frozen=True)
class Handler:
    """One kind of object that can be made fast. Its functions stand at the top of a module (handlers are pickled).

    Args:
        name: what the report calls it, e.g. ``"diffusers DiT block"``.
        claims: whether an object is of this kind; looks at names and attributes only and imports nothing.
        refuses: why an object of this kind must stay as it is (an option that our operators do not have), or None.
        mixin: for the class of such an object, the class whose methods come first.
        tolerance: largest difference of the outputs, relative to their range, in float32.
    """

    name: str
    claims: Callable[[Any], bool]
    refuses: Callable[[Any], str | None]
    mixin: Callable[[type], type]
    tolerance: float = 1e-5


def make_fast(obj: Any, handler: Handler) -> None:
    """Replaces the class of `obj`; what `make_slow` undoes."""
    kind: Any = type(obj)
    _CLASS.__set__(obj, fast_class(kind, handler))


def make_slow(obj: Any) -> None:
    """Gives `obj` its own class back; a class that somebody has derived from the fast one since is derived from that.

    Methods that somebody has taken from the fast object and kept in it (offloading wraps ``forward`` so) are exchanged.
    """
    _CLASS.__set__(obj, _slow_class(type(obj)))
    own = vars(obj)
    for name, method in own.items():
        if inspect.ismethod(method) and method.__self__ is obj and "forward" in name:
            own[name] = getattr(type(obj), method.__name__).__get__(obj)


def handler_of(obj: Any) -> Handler | None:
    """Who made `obj` fast, if anyone did."""
    handler: Handler | None = getattr(_fast(type(obj)), "_fastdiff_handler", None)
    return handler


def original_class(obj: Any) -> type:
    """The class of `obj` without us."""
    cls: type = getattr(_fast(type(obj)), "_fastdiff_original", type(obj))
    return cls


def _fast(cls: type) -> type | None:
    """The fast class that an object of class `cls` has its methods from.

    Mostly `cls` itself; parametrisations of torch and FSDP give an object a class of its own, derived from that.
    """
    return next((base for base in cls.__mro__ if "_fastdiff_original" in vars(base)), None)


def _slow_class(cls: type) -> type:
    """`cls` with the original in place of the fast class among its bases."""
    found: type | None = vars(cls).get("_fastdiff_original")
    if found is not None:
        return found
    bases = tuple(map(_slow_class, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    contents = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, contents)


@functools.cache
def fast_class(original: type, handler: Handler) -> type:
    """The subclass of `original` with the methods of `handler`; the same one whenever it is asked for."""
    names: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_fastdiff_original": original,
        "_fastdiff_handler": handler,
    }
    if not issubclass(original, nn.Module):
        # Libraries look these up by class: `processor.__class__ in CROSS_ATTENTION_PROCESSORS` of diffusers.
        names["__class__"] = property(lambda _: original)
    return type(original.__name__, (handler.mixin(original), original), names)


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles of a fast object are fast: the class is made again where they are read."""
    original: Any = original_class(self)
    made, args, *rest = original.__reduce_ex__(self, protocol)
    own = type(self) is _fast(type(self))
    if own and made is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
        return (_new, (original, handler_of(self)), *rest)
    return (made, args, *rest)


def _new(original: type, handler: Handler) -> Any:
    cls: Any = fast_class(original, handler)
    return cls.__new__(cls)


def defines(obj: Any, package: str, name: str, method: str = "forward") -> bool:
    """`obj` is of class `name` of `package`, or of a class derived from it that leaves `method` as it is there."""
    for cls in original_class(obj).__mro__:
        if method in vars(cls):
            return cls.__name__ == name and cls.__module__.split(".")[0] == package
    return False


@dataclass(frozen=True)
class OfClass:
    """A `Handler.claims` that compares by value: see `defines`."""

    package: str
    name: str
    method: str = "forward"

    def __call__(self, obj: Any) -> bool:
        return defines(obj, self.package, self.name, self.method)


@dataclass(frozen=True)
class Takes:
    """A `Handler.refuses` that compares by value: other parameters of `method` than these, or what `besides` finds."""

    names: tuple[str, ...]
    method: str = "forward"
    besides: Callable[[Any], str | None] | None = None

    def __call__(self, obj: Any) -> str | None:
        unknown = takes(getattr(original_class(obj), self.method), *self.names)
        return unknown or (self.besides(obj) if self.besides else None)


def takes(function: Callable[..., Any], *names: str) -> str | None:
    """None if `function` has just these parameters (after self), else what differs: another version than we know."""
    found = tuple(inspect.signature(function).parameters)[1:]
    if found == names:
        return None
    return f"an unknown version of {function.__qualname__}: expected arguments {names}, got {found}"
