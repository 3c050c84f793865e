"""Names and settings of diffusers' `DiTTransformer2DModel` and `PixArtTransformer2DModel`, and ours for the same.

diffusers keeps q, k and v apart; several of its layers stacked are one of ours. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.models._layers import require
from fastdiff.models.checkpoints import load_weights

__all__ = [
    "TIME_NAMES",
    "Names",
    "State",
    "block_names",
    "build",
    "config_of",
    "drop_variance",
    "from_diffusers",
    "given",
    "is_diffusers",
    "settings",
    "to_diffusers",
]

Names = dict[str, tuple[str, ...]]
State = dict[str, Tensor]

_BLOCK: Names = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_CROSS: Names = {
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
}


TIME_NAMES = {"mlp.0": "timestep_embedder.linear_1", "mlp.2": "timestep_embedder.linear_2"}


def block_names(depth: int, *, cross: bool) -> Names:
    """{our layer: diffusers' layers} of the blocks, without what is modulation."""
    inside = {**_BLOCK, **_CROSS} if cross else _BLOCK
    return {
        f"blocks.{i}.{ours}": tuple(f"transformer_blocks.{i}.{name}" for name in theirs)
        for i in range(depth)
        for ours, theirs in inside.items()
    }


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """The names are those of a transformer of diffusers."""
    return any(name.startswith("transformer_blocks.0.") for name in state)


def from_diffusers(state: Mapping[str, Tensor], names: Names) -> State:
    """`state` under our names; what `names` does not mention stays as it is.

    In a model whose q, k and v have no biases (``attention_bias=False``), ours are zero.
    """
    rest, made = dict(state), State()
    biased = any(name.endswith("to_q.bias") for name in state)
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            parts = [rest.pop(f"{name}.{kind}", None) for name in theirs]
            found = [part for part in parts if part is not None]
            if len(found) == len(theirs):
                made[f"{ours}.{kind}"] = torch.cat(found) if len(found) > 1 else found[0]
            elif found:  # then the error is about the names in the file
                rest.update({f"{name}.{kind}": state[f"{name}.{kind}"] for name in theirs if f"{name}.{kind}" in state})
            elif kind == "bias" and not biased and ours.endswith(("qkv", "q_linear", "kv_linear")):
                weight = made[f"{ours}.weight"]
                made[f"{ours}.bias"] = weight.new_zeros(len(weight))
    return {**made, **rest}


def to_diffusers(state: Mapping[str, Tensor], names: Names) -> State:
    """The way back; names that `names` does not mention are left out."""
    made = State()
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.{kind}"].chunk(len(theirs))
            made.update({f"{name}.{kind}": part.contiguous() for name, part in zip(theirs, parts, strict=True)})
    return made


def settings(owner: str, config: Mapping[str, Any], norm_type: str) -> dict[str, Any]:
    """Our settings for those of a diffusers model, or the reason why there are none.

    Raises:
        ValueError: an option that these models do not have.
    """
    fixed = {
        "activation_fn": "gelu-approximate",
        "norm_type": norm_type,
        "norm_elementwise_affine": False,
        "dropout": 0.0,
    }
    for name, expected in fixed.items():
        require(config.get(name, expected) == expected, owner, name, repr(expected), repr(config.get(name)))
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    require(out in (channels, 2 * channels), owner, "out_channels", f"{channels} or {2 * channels}", out)
    return {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "learn_sigma": out == 2 * channels,
    }


def given(owner: str, model: Any, config: Mapping[str, Any] | None) -> tuple[State, dict[str, Any]]:
    """(state dict, settings) of a diffusers model, or of a state dict and its config.

    Raises:
        ValueError: a state dict came without its config.
    """
    if isinstance(model, torch.nn.Module):
        return dict(model.state_dict()), dict(config if config is not None else model.config)  # type: ignore[arg-type]
    require(config is not None, owner, "config", "the settings of the diffusers model beside its state dict", None)
    return dict(model), dict(config or {})


def build(kind: Any, settings: dict[str, Any], state: Mapping[str, Tensor]) -> Any:
    """A model of class `kind` with these weights, in their type."""
    model = kind(**settings)
    like = next((value for value in state.values() if value.is_floating_point()), None)
    if like is not None:
        model.to(like.device, like.dtype)
    load_weights(model, state)
    return model


def config_of(owner: str, config: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the diffusers model that computes what ours with `config` does, as far as both models share them.

    Raises:
        ValueError: there is none.
    """
    for name, expected in {"time_scale": 1.0, "mlp_ratio": 4.0, **fixed}.items():
        require(config[name] == expected, owner, name, f"{expected} for diffusers", config[name])
    channels = config["in_channels"]
    return {
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["hidden_size"] // config["num_heads"],
        "in_channels": channels,
        "out_channels": channels * (2 if config["learn_sigma"] else 1),
        "num_layers": config["depth"],
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "activation_fn": "gelu-approximate",
        "norm_elementwise_affine": False,
    }


def drop_variance(config: Mapping[str, Any], state: State) -> None:
    """The rows of the final layer are (row, column, channel); the first half of the channels is the prediction."""
    patches, channels = config["patch_size"] ** 2, config["in_channels"]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = state.get(name)
        if value is not None and value.dim() and len(value) == 2 * patches * channels:
            state[name] = value.unflatten(0, (patches, 2 * channels))[:, :channels].flatten(0, 1)
