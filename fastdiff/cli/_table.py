"""Tables as plain data, drawn as text; and JSON that any parser accepts, written in one piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A table's cell; `style` is ``"good"``, ``"bad"``, ``"dim"`` or empty, and means nothing to plain text."""

    text: str
    style: str = ""


@dataclass
class Table:
    """Rows of cells under column headings; the columns named in `right` are aligned to the right."""

    columns: Sequence[str]
    right: frozenset[str] = frozenset()
    title: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def add(self, *cells: str | Cell) -> None:
        self.rows.append([c if isinstance(c, Cell) else Cell(c) for c in cells])

    def text(self) -> str:
        """The table with plain characters; a cell may have several lines."""
        columns = [[name, *(row[i].text for row in self.rows)] for i, name in enumerate(self.columns)]
        widths = [max(len(line) for text in column for line in text.split("\n")) for column in columns]
        lines = [self.title] if self.title else []
        lines.append(self._line(list(self.columns), widths))
        lines.append("  ".join("-" * width for width in widths))
        for row in self.rows:
            parts = [cell.text.split("\n") for cell in row]
            for i in range(max(map(len, parts))):
                lines.append(self._line([p[i] if i < len(p) else "" for p in parts], widths))
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table for a Markdown page."""
        rule = ["---:" if name in self.right else "---" for name in self.columns]
        rows = [[cell.text.replace("\n", "<br>").replace("|", "\\|") for cell in row] for row in self.rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in ([*self.columns], rule, *rows))

    def _line(self, texts: list[str], widths: list[int]) -> str:
        aligned = [
            text.rjust(width) if name in self.right else text.ljust(width)
            for name, text, width in zip(self.columns, texts, widths, strict=True)
        ]
        return "  ".join(aligned).rstrip()


def clean(value: Any) -> Any:
    """The same data with infinities and NaN as strings: JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value


def to_json(value: Any) -> str:
    """`value` as JSON text, two spaces deep."""
    return json.dumps(clean(value), indent=2, allow_nan=False)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Before work that takes long: files could be written in this folder, which need not exist yet.

    Raises:
        OSError: they could not. Nothing is made.
    """
    found = Path(path).absolute()
    while not found.exists():
        found = found.parent
    if not found.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got {path}; {found} is a file")
    if not os.access(found, os.W_OK | os.X_OK):
        raise PermissionError(f"--out: expected a folder that can be written, got {path}; {found} cannot be")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file under a temporary name, then rename it: what lies at `path` is always complete."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
