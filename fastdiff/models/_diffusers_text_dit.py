"""`TextDiT` and diffusers' `PixArtTransformer2DModel`: names and settings of one for the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastdiff.models._diffusers import (
    TIME_NAMES,
    Names,
    State,
    block_names,
    build,
    config_of,
    drop_variance,
    from_diffusers,
    given,
    is_diffusers,
    settings,
    to_diffusers,
)
from fastdiff.models._layers import require

__all__ = ["DiffusersTextDiT"]


def _text_dit_names(config: Mapping[str, Any]) -> Names:
    names = block_names(config["depth"], cross=True)
    names |= {"x_embedder.proj": ("pos_embed.proj",), "final_layer.linear": ("proj_out",)}
    names["t_block.1"] = ("adaln_single.linear",)
    names |= {f"t_embedder.{ours}": (f"adaln_single.emb.{theirs}",) for ours, theirs in TIME_NAMES.items()}
    for i, layer in (("0", "linear_1"), ("2", "linear_2")):
        names[f"csize_embedder.mlp.{i}"] = (f"adaln_single.emb.resolution_embedder.{layer}",)
        names[f"ar_embedder.mlp.{i}"] = (f"adaln_single.emb.aspect_ratio_embedder.{layer}",)
    return names | {f"y_embedder.y_proj.fc{i}": (f"caption_projection.linear_{i}",) for i in (1, 2)}


def _text_dit_tables(config: Mapping[str, Any]) -> dict[str, str]:
    blocks = range(config["depth"])
    tables = {f"blocks.{i}.scale_shift_table": f"transformer_blocks.{i}.scale_shift_table" for i in blocks}
    return {**tables, "final_layer.scale_shift_table": "scale_shift_table"}


def text_dit_state_dict(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> State:
    """A state dict for our TextDiT with `config`, from one in the published names or in those of diffusers.

    The position embedding is left out, as the published sampling scripts leave it out: it is computed. So is the null
    caption of a model that has none, and the variance as in `dit_state_dict`.
    """
    found = dict(state)
    if is_diffusers(state):
        found = from_diffusers(state, _text_dit_names(config))
        for ours, theirs in _text_dit_tables(config).items():
            if theirs in found:
                found[ours] = found.pop(theirs)
    found.pop("pos_embed", None)
    if not config["caption_dropout_prob"]:
        found.pop("y_embedder.y_embedding", None)
    if not config["learn_sigma"]:
        drop_variance(config, found)
    return found


def to_diffusers_text_dit(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> State:
    """The state dict of our TextDiT in the names of diffusers, which has no place for the null caption."""
    names = _text_dit_names(config)
    if not config["micro_conditions"]:
        names = {ours: theirs for ours, theirs in names.items() if not ours.startswith(("csize", "ar_"))}
    tables = {theirs: state[ours] for ours, theirs in _text_dit_tables(config).items()}
    return {**to_diffusers(state, names), **tables}


class DiffusersTextDiT(nn.Module):
    """The part of `TextDiT` that speaks diffusers."""

    config: dict[str, Any]

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in our names, from theirs; see `text_dit_state_dict`."""
        return text_dit_state_dict(self.config, state)

    @classmethod
    def from_diffusers(
        cls,
        model: Any,
        config: Mapping[str, Any] | None = None,
        *,
        null_caption: Tensor | None = None,
        **overrides: Any,
    ) -> Any:
        """Our model with the weights, and in the type, of a diffusers ``PixArtTransformer2DModel``; it does the same.

        Args:
            model: the model, or its state dict.
            config: its settings; needed with a state dict.
            null_caption: [S, E], the caption of the unconditional prediction, which diffusers does not keep with the
                weights (its pipelines encode the empty prompt). Without it the model has none.
            **overrides: arguments of `TextDiT` to change.

        Raises:
            ValueError: an option that our model does not have.
            CheckpointError: the weights do not fit the settings.
        """
        owner = "TextDiT.from_diffusers"
        state, found = given(owner, model, config)
        chosen = settings(owner, found, "ada_norm_single")
        width, size, text = chosen["hidden_size"], found["sample_size"], found.get("caption_channels")
        require(text is not None, owner, "caption_channels", "the width of the text encoder", None)
        require(
            found["cross_attention_dim"] == width, owner, "cross_attention_dim", width, found["cross_attention_dim"]
        )
        require(found.get("attention_type", "default") == "default", owner, "attention_type", "'default'", "another")
        eps = found.get("norm_eps", 1e-6)
        require(eps == 1e-6, owner, "norm_eps", "1e-6", eps)
        micro = found.get("use_additional_conditions")
        chosen |= {
            "caption_channels": text,
            "caption_dropout_prob": 0.0,
            "position_scale": float(found.get("interpolation_scale") or max(size // 64, 1)),
            "micro_conditions": size == 128 if micro is None else micro,
        }
        if null_caption is not None:
            chosen |= {"caption_dropout_prob": 0.1, "caption_tokens": len(null_caption)}
            state["y_embedder.y_embedding"] = null_caption
        return build(cls, {**chosen, **overrides}, state)

    def to_diffusers_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of diffusers' ``PixArtTransformer2DModel(**model.diffusers_config())``.

        Raises:
            ValueError: diffusers' model computes something else (``time_scale``, ``mlp_ratio``).
        """
        self.diffusers_config()
        return to_diffusers_text_dit(self.config, self.state_dict())

    def diffusers_config(self) -> dict[str, Any]:
        """Arguments of diffusers' ``PixArtTransformer2DModel`` for this model.

        Raises:
            ValueError: as in :meth:`to_diffusers_state_dict`.
        """
        return {
            **config_of("TextDiT", self.config, {}),
            "norm_type": "ada_norm_single",
            "norm_eps": 1e-6,
            "cross_attention_dim": self.config["hidden_size"],
            "caption_channels": self.config["caption_channels"],
            "interpolation_scale": self.config["position_scale"],
            "use_additional_conditions": self.config["micro_conditions"],
        }
