"""Networks: each is called as ``model(x, t, cond) -> prediction``."""

from __future__ import annotations

from fastdiff.models.checkpoints import CheckpointError, load_model, load_state, load_weights, save_weights
from fastdiff.models.dit import DIT_PRESETS, DiT, dit
from fastdiff.models.modulation import ModulationTable, with_table
from fastdiff.models.text_dit import TEXT_DIT_PRESETS, TextDiT, text_dit

__all__ = [
    "DIT_PRESETS",
    "TEXT_DIT_PRESETS",
    "CheckpointError",
    "DiT",
    "ModulationTable",
    "TextDiT",
    "dit",
    "load_model",
    "load_state",
    "load_weights",
    "save_weights",
    "text_dit",
    "with_table",
]
