"""Files of a run: whole or absent, and an error of their own when they are neither."""

from __future__ import annotations

from fastdiff._files import partial_path, replacing

__all__ = ["DamagedFileError", "partial_path", "replacing"]


class DamagedFileError(ValueError):
    """A file that a run wrote can no longer be read: cut short, overwritten, or never one of ours."""
