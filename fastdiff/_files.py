"""Files that are whole or absent: everything is written under a temporary name and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["partial_path", "replacing"]


def partial_path(path: Path) -> Path:
    """The temporary name, with the same suffix, under which ``path`` is written."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` (with the same suffix) and renames it to ``path`` on success.

    A process killed at any moment leaves either the old file or the new one under ``path``, never a part.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():  # each writer would say so in a way of its own, about a name that nobody gave
        raise FileNotFoundError(f"no such folder to write {path.name} into: {path.parent}")
    temporary = partial_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())  # or a power cut could keep the rename and lose the content
        # Some writers (safetensors) make files that only their owner may read; this is an ordinary result.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
