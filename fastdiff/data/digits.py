"""The handwritten digits that come with scikit-learn: 1,797 real 8x8 scans (Alpaydin & Kaynak, UCI, 1998)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Digits", "load_digits"]


class Digits(NamedTuple):
    """A split of the digits: images [N,1,8,8] float32 in [-1, 1] (-1 is paper, 1 is ink), labels [N] int64 in 0..9."""

    images: Tensor
    labels: Tensor


def load_digits(*, held_out: float = 0.25, seed: int = 0) -> tuple[Digits, Digits]:
    """Loads the digits in two disjoint parts.

    Args:
        held_out: share of *each class* that goes to the second part, in (0, 1).
        seed: of the split; the same seed always gives the same split.

    Returns:
        (train, held-out).

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: held_out is out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"[load_digits] held_out: expected a share in (0, 1), got {held_out}")
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    raw, target = load(return_X_y=True)
    images = torch.from_numpy(raw).float().view(-1, 1, 8, 8) / 8.0 - 1.0  # 0..16 ink counts -> [-1, 1]
    labels = torch.from_numpy(target).long()

    generator = torch.Generator().manual_seed(seed)
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        is_held_out[shuffled[: max(1, round(held_out * len(members)))]] = True
    train, test = ~is_held_out, is_held_out
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])
