"""`DiT` and diffusers' `DiTTransformer2DModel`: names and settings of one for the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
from fastdiff.models.checkpoints import CheckpointError

__all__ = ["DiffusersDiT"]


def _dit_names(config: Mapping[str, Any]) -> Names:
    names = block_names(config["depth"], cross=False)
    names |= {"x_embedder.proj": ("pos_embed.proj",), "final_layer.linear": ("proj_out_2",)}
    names["final_layer.adaLN_modulation.1"] = ("proj_out_1",)
    for i in range(config["depth"]):
        names[f"blocks.{i}.adaLN_modulation.1"] = (f"transformer_blocks.{i}.norm1.linear",)
    return names


def _dit_embedders(block: int, owner: str) -> dict[str, str]:
    """{our parameter: diffusers' parameter} of the embedders in a block."""
    theirs = f"transformer_blocks.{block}.norm1.emb"
    names = {
        f"{owner}t_embedder.{k}.{kind}": f"{theirs}.{v}.{kind}"
        for k, v in TIME_NAMES.items()
        for kind in ("weight", "bias")
    }
    names[f"{owner}y_embedder.embedding_table.weight"] = f"{theirs}.class_embedder.embedding_table.weight"
    return names


def embedders_agree(state: Mapping[str, Tensor], depth: int) -> bool:
    """All blocks of a diffusers DiT embed time and label alike, as in the published weights."""
    return all(
        torch.equal(state[first], state[other])
        for i in range(1, depth)
        for first, other in zip(_dit_embedders(0, "").values(), _dit_embedders(i, "").values(), strict=True)
        if first in state and other in state
    )


def dit_state_dict(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> State:
    """A state dict for our DiT with `config`, from one in its own names or in those of diffusers.

    A final layer that predicts the variance as well loses it where the model does not (``learn_sigma=False``): SiT's
    code drops that half of its prediction, too.

    Raises:
        CheckpointError: the blocks embed time and label each in its own way, and the model does not.
    """
    found = dict(state)
    if is_diffusers(state):
        found = from_diffusers(state, _dit_names(config))
        shared, depth = config["shared_embedders"], config["depth"]
        if shared and not embedders_agree(state, depth):
            reason = "its blocks have embedders of their own, which takes a DiT with shared_embedders=False"
            raise CheckpointError("state dict", reason)
        for i in range(depth):
            for ours, theirs in _dit_embedders(i, "" if shared else f"blocks.{i}.").items():
                if theirs in found:
                    found[ours] = found.pop(theirs)
    if not config["learn_sigma"]:
        drop_variance(config, found)
    return found


def to_diffusers_dit(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> State:
    """The state dict of our DiT in the names of diffusers, where every block has its embedders."""
    made = to_diffusers(state, _dit_names(config))
    for i in range(config["depth"]):
        for ours, theirs in _dit_embedders(i, "" if config["shared_embedders"] else f"blocks.{i}.").items():
            value = state[ours]
            if "class_embedder" in theirs and len(value) == config["num_classes"]:  # diffusers always has a null class
                value = torch.cat([value, torch.zeros_like(value[:1])])
            made[theirs] = value
    return made


class DiffusersDiT(nn.Module):
    """The part of `DiT` that speaks diffusers."""

    config: dict[str, Any]

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in our names, from theirs; see `dit_state_dict`."""
        return dit_state_dict(self.config, state)

    @classmethod
    def from_diffusers(cls, model: Any, config: Mapping[str, Any] | None = None, **overrides: Any) -> Any:
        """Our model with the weights, and in the type, of a diffusers ``DiTTransformer2DModel``; it computes the same.

        diffusers' own formula differs from the published one in the frequencies of the time embedding; ours follows it
        (``frequency_shift=1``). For the weights published by the authors, ``frequency_shift=0`` is what they were
        trained with.

        Args:
            model: the model, or its state dict.
            config: its settings; needed with a state dict.
            **overrides: arguments of `DiT` to change.

        Raises:
            ValueError: an option that our model does not have.
            CheckpointError: the weights do not fit the settings.
        """
        state, found = given("DiT.from_diffusers", model, config)
        chosen = settings("DiT.from_diffusers", found, "ada_norm_zero")
        chosen |= {"num_classes": found["num_embeds_ada_norm"], "mlp_norm_eps": found.get("norm_eps", 1e-5)}
        chosen |= {"frequency_shift": 1.0, "shared_embedders": embedders_agree(state, chosen["depth"])}
        return build(cls, {**chosen, **overrides}, state)

    def to_diffusers_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of diffusers' ``DiTTransformer2DModel(**model.diffusers_config())``.

        Raises:
            ValueError: diffusers' model computes something else (``frequency_shift``, ``time_scale``, ``mlp_ratio``).
        """
        self.diffusers_config()
        return to_diffusers_dit(self.config, self.state_dict())

    def diffusers_config(self) -> dict[str, Any]:
        """Arguments of diffusers' ``DiTTransformer2DModel`` for this model.

        Raises:
            ValueError: as in :meth:`to_diffusers_state_dict`.
        """
        config = config_of("DiT", self.config, {"frequency_shift": 1.0})
        classes = self.config["num_classes"]
        require(classes > 0, "DiT", "num_classes", "at least 1 for diffusers", classes)
        own = {"num_embeds_ada_norm": classes, "norm_eps": self.config["mlp_norm_eps"]}
        return {**config, **own, "norm_type": "ada_norm_zero"}
