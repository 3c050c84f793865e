"""Memory for tables: the least recently used go when a budget of bytes is spent."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

BUDGET = 32 << 20  # bytes, of each cache


def bounded(size: Callable[[Any], int], budget: int = BUDGET) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keep the results of a function of hashable positional arguments, `size(result)` bytes each, `budget` in all.

    A result larger than a quarter of the budget is not kept. Threads may share it; two that ask for the same thing at
    the same time may both make it.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        lock = threading.Lock()
        total = 0

        @functools.wraps(make)
        def found(*key: Any, **none: Any) -> Any:
            nonlocal total
            with lock:
                if key in kept:
                    kept.move_to_end(key)
                    return kept[key][0]
            value = make(*key, **none)
            n = size(value) + 1024  # the key and the bookkeeping
            if n <= budget // 4:
                with lock:
                    if key not in kept:
                        kept[key] = (value, n)
                        total += n
                        while total > budget:
                            total -= kept.popitem(last=False)[1][1]
            return value

        def held() -> int:
            """Bytes kept."""
            with lock:
                return total

        found.held = held  # type: ignore[attr-defined]
        return found

    return decorate
