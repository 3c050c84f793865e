"""Names under which the weights of U-Nets and ControlNets are published, as ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["adapted_to", "controlnet_keys", "matrices_of", "rename_unet_keys"]

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def rename_unet_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of diffusers' U-Net, under ours; names that are not known stay as they are."""
    per_level = 1 + max(
        (int(m[1]) for m in (re.match(r"down_blocks\.0\.resnets\.(\d+)\.", k) for k in weights) if m), default=0
    )
    attended = {int(m[1]) for m in (re.match(r"up_blocks\.(\d+)\.attentions\.", k) for k in weights) if m}

    def inner(kind: str, rest: str) -> str:
        if kind != "resnets":
            return rest
        name, _, leaf = rest.rpartition(".")
        return f"{_RESNET.get(name, name)}.{leaf}"

    def renamed(key: str) -> str:
        name, _, leaf = key.rpartition(".")
        if name in _TOP:
            return f"{_TOP[name]}.{leaf}"
        if m := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
            stage = 1 + int(m[1]) * (per_level + 1) + int(m[3])
            return f"input_blocks.{stage}.{int(m[2] == 'attentions')}.{inner(m[2], m[4])}"
        if m := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", key):
            return f"input_blocks.{(int(m[1]) + 1) * (per_level + 1)}.0.op.{m[2]}"
        if m := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
            place = 1 if m[1] == "attentions" else 2 * int(m[2])
            return f"middle_block.{place}.{inner(m[1], m[3])}"
        if m := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
            stage = int(m[1]) * (per_level + 1) + int(m[3])
            return f"output_blocks.{stage}.{int(m[2] == 'attentions')}.{inner(m[2], m[4])}"
        if m := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", key):
            stage = (int(m[1]) + 1) * (per_level + 1) - 1
            return f"output_blocks.{stage}.{1 + (int(m[1]) in attended)}.conv.{m[2]}"
        return key

    return {renamed(key): value for key, value in weights.items()}


def controlnet_keys(weights: Mapping[str, Tensor], hint_layers: int) -> dict[str, Tensor]:
    """Weights of a published ControlNet or ``diffusers.ControlNetModel`` under the names of our `ControlNet`.

    Args:
        weights: by their names, with or without the prefix ``control_model.``.
        hint_layers: convolutions of the image's embedder, but for the last.
    """
    weights = _part(weights, "control_model.")
    if any(key.startswith("controlnet_down_blocks.") for key in weights):
        weights = rename_unet_keys(weights)

    def renamed(key: str) -> str:
        part, _, rest = key.partition(".")
        if part in ("time_embed", "label_emb", "input_blocks", "middle_block"):
            return f"branch.{key}"
        if part == "controlnet_mid_block":
            return f"middle_block_out.0.{rest}"
        if part == "controlnet_down_blocks":
            index, leaf = rest.split(".")
            return f"zero_convs.{index}.0.{leaf}"
        if m := re.fullmatch(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d+))\.(\w+)", key):
            place = {"conv_in": 0, "conv_out": 2 * hint_layers}.get(m[1])
            return f"input_hint_block.{2 + 2 * int(m[2]) if place is None else place}.{m[3]}"
        return key

    return {renamed(key): value for key, value in weights.items()}


def adapted_to(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `UNet` as it has them: taken out of a whole Stable Diffusion model, diffusers' renamed, 1x1
    convolutions as matrices where it has matrices."""
    weights = _part(weights, "model.diffusion_model.")
    if any(key.startswith("down_blocks.") for key in weights):
        weights = rename_unet_keys(weights)
    return matrices_of(model, weights)


def matrices_of(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights [.,.,1(,1)] as [.,.] where the model has two dimensions."""
    flat = {key for key, value in model.state_dict(keep_vars=True).items() if value.dim() == 2}
    return {
        key: value.flatten(1) if key in flat and value.dim() > 2 and value.shape[2:].numel() == 1 else value
        for key, value in weights.items()
    }


def _part(weights: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """What begins with the prefix, without it; everything if nothing does."""
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return found or weights
