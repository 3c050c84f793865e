"""What a chain of blocks is given by a :class:`~fastdiff.models.controlnet.ControlNet`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastdiff.models._layers import require

__all__ = ["control_entries"]


def control_entries(owner: str, control: Sequence[Tensor | None] | None, depth: int) -> list[Tensor | None]:
    """What to add to the tokens before each of `depth` blocks and behind the last one: ``depth + 1`` entries.

    Raises:
        ValueError: `control` has more.
    """
    given = list(control or ())
    require(len(given) <= depth + 1, owner, "control", f"at most {depth + 1} entries", len(given))
    return given + [None] * (depth + 1 - len(given))
