"""Networks: each is called as ``model(x, t, cond) -> prediction``."""

from __future__ import annotations

from fastdiff.models.dit import DIT_PRESETS, DiT, dit

__all__ = ["DIT_PRESETS", "DiT", "dit"]
