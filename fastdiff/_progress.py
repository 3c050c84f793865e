"""One progress bar for everything that takes long; on stderr, so that stdout stays clean for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Update", "progress_bar"]


Update = Callable[[int, str], object]


@contextmanager
def progress_bar(description: str, total: int, *, start: int = 0, enabled: bool = True) -> Iterator[Update]:
    """Yields ``update(done, note)``, with done counted from 0 to total; does nothing when not enabled."""
    if not enabled:
        yield lambda done, note: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:<24}"),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("[dim]left[/]"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, completed=start, note="")
        yield lambda done, note: bars.update(task, completed=done, note=note)
