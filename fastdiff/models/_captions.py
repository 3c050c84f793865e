"""Captions as text tokens with an optional mask: checked, embedded, joined."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models._layers import Mlp, require
from fastdiff.ops import _registry as reg

__all__ = ["Caption", "CaptionEmbedder", "check_caption", "join_captions", "may_read", "split_caption"]

# Tokens [B,S,E], or (tokens, mask [B,S]) with a mask that is true (or not 0) where a token counts.
Caption = Tensor | tuple[Tensor, Tensor]


class CaptionEmbedder(nn.Module):
    """Projects tokens [B,S,E] to [B,S,D]; with dropout it also holds the null caption of guidance, [tokens, E]."""

    y_embedding: Tensor

    def __init__(self, channels: int, hidden_size: int, tokens: int, dropout_prob: float) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob
        self.y_proj = Mlp(channels, hidden_size, hidden_size)
        if dropout_prob > 0:  # fixed, as in the published code
            self.register_buffer("y_embedding", torch.randn(tokens, channels) / math.sqrt(channels))

    def drop(self, tokens: Tensor) -> Tensor:
        """A share of the captions replaced by the null caption."""
        dropped = torch.rand(len(tokens), device=tokens.device) < self.dropout_prob
        null = self.y_embedding[: tokens.shape[1]].to(tokens.dtype)
        return torch.where(dropped[:, None, None], null, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.y_proj(tokens)
        return embedded


def check_caption(owner: str, cond: Caption, batch: int, channels: int) -> None:
    """Tokens [batch, S, channels], with a mask [batch, S] or without.

    Raises:
        ValueError: they are something else.
    """
    pair = isinstance(cond, (tuple, list)) and len(cond) == 2
    kind = type(cond).__name__
    require(isinstance(cond, Tensor) or pair, owner, "cond", "tokens or (tokens, mask)", kind)
    tokens = cond if isinstance(cond, Tensor) else cond[0]
    fits = tokens.dim() == 3 and tokens.shape[0] == batch and tokens.shape[2] == channels and tokens.shape[1] > 0
    if not fits or not tokens.is_floating_point():  # a batch that is named, if only to a check, is fixed in an export
        got = f"{list(tokens.shape)} {tokens.dtype}"
        require(False, owner, "cond", f"tokens [{batch},S,{channels}]", got)
    if not isinstance(cond, Tensor) and cond[1].shape != tokens.shape[:2]:
        require(False, owner, "cond", f"a mask {list(tokens.shape[:2])}", list(cond[1].shape))


def split_caption(cond: Caption) -> tuple[Tensor, Tensor | None]:
    """(tokens, mask as bool or None)."""
    if isinstance(cond, Tensor):
        return cond, None
    tokens, mask = cond
    return tokens, mask if mask.dtype is torch.bool else mask != 0


def may_read(mask: Tensor) -> bool:
    """Looking at the values costs nothing and is allowed: they are in host memory, and nobody records or transforms."""
    plain = mask.is_cpu and type(mask) is Tensor and not torch.compiler.is_compiling()
    return plain and reg.direct_is_safe() and not reg.transforms_active()


def join_captions(tokens: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None) -> Caption:
    """Two batches of captions as one; the shorter are filled up with tokens that do not count."""
    length = max(tokens.shape[1], other.shape[1])
    if mask is None and other_mask is None and tokens.shape[1] == other.shape[1]:
        return torch.cat([tokens, other])
    filled, masks = [], []
    for part, hides in ((tokens, mask), (other.to(tokens.dtype), other_mask)):
        there = torch.ones(part.shape[:2], dtype=torch.bool, device=part.device) if hides is None else hides
        filled.append(F.pad(part, (0, 0, 0, length - part.shape[1])))
        masks.append(F.pad(there, (0, length - part.shape[1]), value=False))
    return torch.cat(filled), torch.cat(masks)
