"""Memory for tables: the least recently used go when a budget of bytes is spent.

`bounded` keeps what lies in host memory, `on_device` what kernels on a GPU read. The latter must outlive more than the
call that asks for it:

- A CUDA graph replays the addresses it was captured with. What a call takes from here while its stream is being
  captured is therefore kept for the life of the process, outside the budget: as much as the captured calls need, since
  equal ones share it. Such a call may not make anything: a copy from the host cannot be captured, and memory taken
  during a capture belongs to the graph. It is an error that says so, and the cure is the same call once before.
- torch's allocator gives the memory of what goes from here to the next who asks on the stream it was made on. A kernel
  on another stream may be reading it then, so its use there is recorded with the allocator.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from fastdiff import _native

P = ParamSpec("P")
T = TypeVar("T")

BUDGET = 32 << 20  # bytes, of each cache


class _Store:
    """Values by key, `budget` bytes in all. One larger than a quarter of the budget is not kept."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._pinned: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self._total = 0

    def find(self, key: Any, pin: bool = False) -> Any:
        """The value, or None; it stays for ever if `pin`."""
        with self._lock:
            if key in self._kept:
                if pin:
                    value, n = self._kept.pop(key)
                    self._total -= n
                    self._pinned[key] = value
                    return value
                self._kept.move_to_end(key)
                return self._kept[key][0]
            return self._pinned.get(key)

    def keep(self, key: Any, value: Any, size: int) -> None:
        n = size + 1024  # the key and the bookkeeping
        if n > self._budget // 4:
            return
        with self._lock:
            if key in self._kept or key in self._pinned:
                return
            self._kept[key] = (value, n)
            self._total += n
            while self._total > self._budget:
                self._total -= self._kept.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Give back everything that no captured graph holds."""
        with self._lock:
            self._kept.clear()
            self._total = 0

    def held(self) -> int:
        """Bytes kept within the budget."""
        with self._lock:
            return self._total


def bounded(size: Callable[[Any], int], budget: int = BUDGET) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keep the results of a function of hashable positional arguments, `size(result)` bytes each, `budget` in all.

    A result larger than a quarter of the budget is not kept. Threads may share it; two that ask for the same thing at
    the same time may both make it.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        store = _Store(budget)

        @functools.wraps(make)
        def found(*key: Any, **none: Any) -> Any:
            kept = store.find(key)
            if kept is not None:
                return kept[0]
            value = make(*key, **none)
            store.keep(key, (value,), size(value))
            return value

        found.held, found.clear = store.held, store.clear  # type: ignore[attr-defined]
        return found

    return decorate


def on_device(
    what: str,
    tensors: Callable[[Any], Sequence[torch.Tensor]],
    size: Callable[[Any], int] | None = None,
    budget: int = BUDGET,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`bounded` for a function whose last argument is the torch.device that the result's tensors are on; see above.

    Args:
        what: it makes, for the error.
        tensors: of a result, those on the device.
        size: of a result in bytes; None: that of its tensors.
        budget: bytes, besides what captured graphs hold.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        store = _Store(budget)

        @functools.wraps(make)
        def found(*key: Any, **none: Any) -> Any:
            device: torch.device = key[-1]
            capturing = _native.capturing(device)
            kept = store.find(key, pin=capturing)
            if kept is None:
                if capturing:
                    raise RuntimeError(
                        f"{what}: not on {device} yet, and cannot be copied there while a CUDA graph is captured; make "
                        f"the same call once before the capture (what takes more than {budget >> 22} MB is never kept: "
                        "pass it as a tensor on the GPU, or leave the call out of the graph)"
                    )
                value = make(*key, **none)
                n = sum(t.nbytes for t in tensors(value)) if size is None else size(value)
                store.keep(key, (value, _native.stream_on(device)), n)
                return value
            value, made_on = kept
            if not capturing and _native.stream_on(device) != made_on:
                for t in tensors(value):
                    _native.used_here(t)
            return value

        found.held, found.clear = store.held, store.clear  # type: ignore[attr-defined]
        return found

    return decorate
