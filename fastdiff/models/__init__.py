"""Networks: each is called as ``model(x, t, cond) -> prediction``."""

from __future__ import annotations

from fastdiff.models.diffusion_mamba import DIFFUSION_MAMBA_PRESETS, DiffusionMamba, HybridDiffusion, diffusion_mamba
from fastdiff.models.dit import DIT_PRESETS, DiT, dit
from fastdiff.models.mamba import MambaBlock, MambaLM, MambaState, mamba_lm

__all__ = ["DIT_PRESETS", "DiT", "dit"]
__all__ += ["DIFFUSION_MAMBA_PRESETS", "DiffusionMamba", "HybridDiffusion", "diffusion_mamba"]
__all__ += ["MambaBlock", "MambaLM", "MambaState", "mamba_lm"]
