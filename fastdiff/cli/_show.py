"""Draws `Table`s and progress bars with rich. The only helper that imports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fastdiff.cli._table import Table

_STYLES = {"good": "green", "bad": "bold red", "dim": "dim", "": ""}


def show(table: Table, console: Console) -> None:
    """Print a table: with colours and lines on a terminal, as plain text into a file or pipe."""
    if not console.is_terminal:
        console.file.write(table.text() + "\n")
        return
    drawn = rich.table.Table(title=table.title or None, title_justify="left", header_style="bold")
    for name in table.columns:
        drawn.add_column(name, justify="right" if name in table.right else "left", no_wrap=name in table.right)
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, style=_STYLES[cell.style]) for cell in row))
    console.print(drawn)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, if that is a terminal; yields ``report(done, total, label)``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {label}")

        yield report
