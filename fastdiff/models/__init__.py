"""Networks: each is called as ``model(x, t, cond) -> prediction``. Weights, hooks and adapters for them."""

from __future__ import annotations

from fastdiff.models._unet_diffusers import unet_from_diffusers
from fastdiff.models.attention_hooks import capture_attention, edit_attention, inject_attention
from fastdiff.models.checkpoints import CheckpointError, load_model, load_state, load_weights, save_weights
from fastdiff.models.controlnet import ControlledModel, ControlNet, controlnet_from_diffusers
from fastdiff.models.diffusion_mamba import DIFFUSION_MAMBA_PRESETS, DiffusionMamba, HybridDiffusion, diffusion_mamba
from fastdiff.models.dit import DIT_PRESETS, DiT, dit
from fastdiff.models.edm2 import EDM2UNet
from fastdiff.models.ip_adapter import IPAdapter
from fastdiff.models.lora import add_lora, load_lora, merge_lora, save_lora
from fastdiff.models.mamba import MambaBlock, MambaLM, MambaState, mamba_lm
from fastdiff.models.modulation import ModulationTable, with_table
from fastdiff.models.text_dit import TEXT_DIT_PRESETS, TextDiT, text_dit
from fastdiff.models.unet import UNet

__all__ = [
    "DIFFUSION_MAMBA_PRESETS",
    "DIT_PRESETS",
    "TEXT_DIT_PRESETS",
    "CheckpointError",
    "ControlNet",
    "ControlledModel",
    "DiT",
    "DiffusionMamba",
    "EDM2UNet",
    "HybridDiffusion",
    "IPAdapter",
    "MambaBlock",
    "MambaLM",
    "MambaState",
    "ModulationTable",
    "TextDiT",
    "UNet",
    "add_lora",
    "capture_attention",
    "controlnet_from_diffusers",
    "diffusion_mamba",
    "dit",
    "edit_attention",
    "inject_attention",
    "load_lora",
    "load_model",
    "load_state",
    "load_weights",
    "mamba_lm",
    "merge_lora",
    "save_lora",
    "save_weights",
    "text_dit",
    "unet_from_diffusers",
    "with_table",
]
