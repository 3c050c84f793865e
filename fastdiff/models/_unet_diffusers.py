"""``diffusers.UNet2DConditionModel`` as our U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdiff.models._unet_keys import rename_unet_keys
from fastdiff.models.unet import UNet

__all__ = ["unet_config_from_diffusers", "unet_from_diffusers"]

# What must have this value, or be absent, for our U-Net to compute the same.
_REQUIRED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
}


def unet_config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`UNet` for a configuration of ``UNet2DConditionModel`` (Stable Diffusion 1.x and 2.x).

    Raises:
        ValueError: the configuration has options that our U-Net lacks; all of them are named.
    """
    wrong = [
        f"{name}={config[name]!r}"
        for name, value in _REQUIRED.items()
        if (config.get(name, value) or None) != (value or None)
    ]
    channels = list(config["block_out_channels"])
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
    attended = [kinds.get(kind) for kind in down]
    if None in attended or attended != [kinds.get(kind) for kind in reversed(up)]:
        wrong.append(f"down_block_types={down}, up_block_types={up}")
    layers, depth = config["layers_per_block"], config.get("transformer_layers_per_block", 1)
    if not isinstance(layers, int) or not isinstance(depth, int):
        wrong.append(f"layers_per_block={layers}, transformer_layers_per_block={depth}")
    if any(c % channels[0] for c in channels):
        wrong.append(f"block_out_channels={channels}")
    # `attention_head_dim` is, by a mistake kept for compatibility, the number of heads.
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    heads = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    widths = {c // h for c, h in zip(channels, heads, strict=True)}
    if len(set(heads)) > 1 and len(widths) > 1:
        wrong.append(f"attention_head_dim={heads}")
    context = config["cross_attention_dim"]
    if not isinstance(context, int):
        wrong.append(f"cross_attention_dim={context}")
    if config.get("num_class_embeds"):
        wrong.append(f"num_class_embeds={config['num_class_embeds']}")
    scale_shift = {"default": False, "scale_shift": True}.get(config.get("resnet_time_scale_shift", "default"))
    if scale_shift is None:
        wrong.append(f"resnet_time_scale_shift={config['resnet_time_scale_shift']!r}")
    if wrong:
        raise ValueError(f"[unet_from_diffusers] config: expected options that UNet has, got {', '.join(wrong)}")
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": layers,
        "attention_resolutions": [2**i for i, has in enumerate(attended) if has],
        "transformer_depth": depth,
        "context_dim": context,
        "norm_groups": config.get("norm_num_groups", 32),
        "use_scale_shift_norm": scale_shift,
        **({"num_heads": heads[0]} if len(set(heads)) == 1 else {"head_dim": widths.pop()}),
    }


def unet_from_diffusers(source: Any, weights: Mapping[str, Tensor] | None = None) -> UNet:
    """A :class:`UNet` that computes what a ``diffusers.UNet2DConditionModel`` does, with a copy of its weights.

    Args:
        source: the model; or its configuration, a mapping, with `weights`.
        weights: its state dict, where `source` is a configuration.

    Raises:
        ValueError: an option that our U-Net lacks.
        RuntimeError: missing or unexpected keys, or shapes that differ (from ``load_state_dict``).
    """
    config = source.config if weights is None else source
    weights = source.state_dict() if weights is None else weights
    model = UNet(**unet_config_from_diffusers(config))
    first = next(iter(weights.values()))
    model.load_state_dict(rename_unet_keys(weights))
    return model.to(first.dtype).eval()
