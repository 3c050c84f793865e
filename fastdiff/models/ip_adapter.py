"""IP-Adapter: Ye et al. 2023, "Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (2308.06721).

Decoupled cross-attention (eq. 5): the image gets keys and values of its own in every cross-attention layer, and its
attention is added to the text's,

    softmax(q k^T / sqrt(d)) v  +  scale * softmax(q k_ip^T / sqrt(d)) v_ip,

with k_ip, v_ip linear maps of a few tokens made from the image's embedding. The model itself stays as it is: the
adapter is a link in the chain of attention processors (`fastdiff.models.attention_hooks`).

Parameters carry the names of the published files (``image_proj.proj.weight``, ``ip_adapter.1.to_k_ip.weight``, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models._layers import require
from fastdiff.models.attention_hooks import Attend, AttentionCall, Layers, attach_attention, attention_layers

__all__ = ["IPAdapter", "ImageProjection", "Resampler"]


class ImageProjection(nn.Module):
    """An image embedding [B, image_dim] as `num_tokens` tokens [B, num_tokens, token_dim], normed."""

    def __init__(self, image_dim: int, token_dim: int, num_tokens: int = 4) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(image_dim, num_tokens * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(image).unflatten(-1, (self.num_tokens, -1)))
        return tokens


class PerceiverAttention(nn.Module):
    """Learned queries [B,T,D] attend to image features [B,N,D] and to themselves (Alayrac et al. 2022, Flamingo)."""

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        q = self.to_q(latents).unflatten(-1, (self.num_heads, -1))
        kv = self.to_kv(torch.cat([self.norm1(features), latents], dim=1))
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        out: Tensor = self.to_out(ops.attention(q, k, v, layout="bnhd").flatten(2))
        return out


class Resampler(nn.Module):
    """Image features [B,N,image_dim] as tokens [B,num_tokens,token_dim]: the projection of "IP-Adapter Plus"."""

    def __init__(
        self,
        image_dim: int,
        token_dim: int,
        num_tokens: int = 16,
        *,
        width: int = 768,
        depth: int = 4,
        num_heads: int = 12,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_tokens, width) / width**0.5)
        self.proj_in, self.proj_out = nn.Linear(image_dim, width), nn.Linear(width, token_dim)
        self.norm_out = nn.LayerNorm(token_dim)

        def mlp() -> nn.Module:
            up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
            return nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)

        blocks = [nn.ModuleList([PerceiverAttention(width, num_heads, head_dim), mlp()]) for _ in range(depth)]
        self.layers = nn.ModuleList(blocks)

    def forward(self, features: Tensor) -> Tensor:
        features, latents = self.proj_in(features), self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = latents + attention(features, latents)
            latents = latents + mlp(latents)
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens


class _Keys(nn.Module):
    """Keys and values of the image for one cross-attention layer; at first those of the layer itself, for its text."""

    def __init__(self, to_k: Tensor, to_v: Tensor) -> None:
        super().__init__()
        for name, weight in (("to_k_ip", to_k), ("to_v_ip", to_v)):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
            layer.weight.data.copy_(weight.detach())
            self.add_module(name, layer)


class IPAdapter(nn.Module):
    """Makes a model with cross-attention follow an image as well, until :meth:`remove`.

    Its parameters are its own alone (those of the model are frozen, see `freeze`), and so is its ``state_dict``. Files
    load with ``load_state_dict``, nested (``{"image_proj": {...}, "ip_adapter": {...}}``) or flat.

    Args:
        model: any model with cross-attention layers of ours, e.g. a text-conditional :class:`~fastdiff.models.UNet`.
        image_dim: width of the image embedding.
        num_tokens: tokens that an image becomes.
        scale: weight of the image's attention; may be set at any time. At 0 the model is what it was, exactly.
        image_proj: what makes tokens [B,T,token_dim] of an image, if not :class:`ImageProjection`; a `Resampler`, say.
        layers: which cross-attention layers, see `attention_layers`; None for all.
        freeze: ``requires_grad_(False)`` on the model.

    Raises:
        ValueError: the model has no cross-attention, or one of a kind that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        image_dim: int,
        num_tokens: int = 4,
        scale: float = 1.0,
        *,
        image_proj: nn.Module | None = None,
        layers: Layers = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        self.scale = scale
        self._model = (model,)  # in a tuple: no submodule, so that its parameters are not ours
        self._tokens: Tensor | None = None
        # The files count all attention layers, self-attention too, in the order of diffusers: the middle comes last.
        order = sorted(attention_layers(model), key=lambda name: name.split(".")[0] == "middle_block")
        chosen = attention_layers(model, layers, cross=True)
        require(len(chosen) > 0, "IPAdapter", "model", "cross-attention layers inside", type(model).__name__)
        weights = {name: _key_value_weights(name, layer) for name, layer in chosen.items()}
        self._keys_of = {name: str(order.index(name)) for name in chosen}
        widths = {to_k.shape[1] for to_k, _ in weights.values()}
        require(len(widths) == 1, "IPAdapter", "layers", "cross-attention to tokens of one width", sorted(widths))
        self.image_proj = image_proj or ImageProjection(image_dim, widths.pop(), num_tokens)
        in_order = sorted(chosen, key=order.index)
        self.ip_adapter = nn.ModuleDict({self._keys_of[name]: _Keys(*weights[name]) for name in in_order})
        if freeze:
            model.requires_grad_(False)
        self.remove: Callable[[], None] = attach_attention(model, self._link, list(chosen))

    def _link(self, call: AttentionCall, attend: Attend) -> Tensor:
        out = attend(call)
        if self._tokens is None or self.scale == 0:
            return out
        keys: Any = self.ip_adapter[self._keys_of[call.name]]
        heads, d = call.q.shape[2:]
        tokens = _repeated(self._tokens, len(call.q))
        k, v = (to(tokens).unflatten(-1, (heads, -1)) for to in (keys.to_k_ip, keys.to_v_ip))
        # With a mask of the text, q has more channels, zero for us but for the scale, which is that of all of them.
        k, v = F.pad(k, (0, d - k.shape[-1])), F.pad(v, (0, d - v.shape[-1]))
        return out + self.scale * ops.attention(call.q, k, v, layout="bnhd")

    @contextmanager
    def image(self, image: Tensor) -> Iterator[None]:
        """Within the context, the model follows `image`, the input of ``image_proj`` (e.g. embeddings [B,image_dim]).

        A batch of the model that is a multiple of B (guidance) sees the images again and again; for an unconditional
        half give it a zero embedding, as it is trained.
        """
        before, self._tokens = self._tokens, self.image_proj(image)
        try:
            yield
        finally:
            self._tokens = before

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, image: Tensor, **extras: Any) -> Tensor:
        """``model(x, t, cond)`` with the image."""
        with self.image(image):
            out: Tensor = self._model[0](x, t, cond, **extras)
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As always; the published ``.bin`` files, nested by part, load as well."""
        flat = {}
        for key, value in state_dict.items():
            inner = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
            flat.update(inner)
        return super().load_state_dict(flat, *args, **kwargs)


def _repeated(tokens: Tensor, batch: int) -> Tensor:
    """Tokens for a batch that is a multiple of theirs, the images in turn."""
    n = len(tokens)
    require(n > 0 and batch % n == 0, "IPAdapter", "image", f"a batch that divides the model's, {batch}", n)
    return tokens.repeat(batch // n, 1, 1) if batch != n else tokens


def _key_value_weights(name: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weights [D,E] that make keys and values of the text."""
    one: Any = layer
    if hasattr(one, "to_k"):
        return one.to_k.weight, one.to_v.weight
    require(hasattr(one, "kv_linear"), "IPAdapter", f"layer {name}", "to_k, to_v or kv_linear", type(layer).__name__)
    k, v = one.kv_linear.weight.chunk(2)
    return k, v
