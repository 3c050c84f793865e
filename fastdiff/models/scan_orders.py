"""Paths through a grid of patches, for scans: permutations of the row-major positions of h x w patches.

A path is an int64 tensor [L], L = h * w: step i visits position ``path[i]``. `ops.selective_scan` walks it with
``order=path`` and several at once, [K,L], with ``orders=``; nothing is copied into the order of a path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.models._layers import require

__all__ = ["NAMES", "bidirectional", "block_orders", "cross", "hilbert", "inverse", "raster", "zigzag"]

NAMES = ("raster", "bidirectional", "zigzag", "hilbert", "cross")
ZIGZAGS, HILBERTS = 8, 4  # variants


def raster(height: int, width: int) -> Tensor:
    """Row by row, each from left to right: [L]."""
    return _grid(height, width).flatten()


def bidirectional(height: int, width: int) -> Tensor:
    """Row by row, and the same from its end (Vision Mamba, Zhu et al., 2024, arXiv:2401.09417): [2,L]."""
    rows = raster(height, width)
    return torch.stack([rows, rows.flip(0)])


def cross(height: int, width: int) -> Tensor:
    """Rows, columns, and both from their ends (VMamba, Liu et al., 2024, arXiv:2401.10166, sec. 4.2): [4,L]."""
    rows, columns = raster(height, width), _grid(height, width).t().flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def zigzag(height: int, width: int, variant: int = 0) -> Tensor:
    """One of the eight boustrophedon paths (ZigMa, Hu et al., 2024, arXiv:2403.13802, sec. 3.2): [L].

    Every step goes to a neighbour. Variants 0, 2, 4, 6 run along rows and columns from the upper left, and the same
    from another corner; each odd one is the variant before it from its end. So two blocks in a row see everything.

    Args:
        height: rows.
        width: columns.
        variant: 0..7.

    Raises:
        ValueError: an argument is out of range.
    """
    require(0 <= variant < ZIGZAGS, "zigzag", "variant", f"0..{ZIGZAGS - 1}", variant)
    grid = _grid(height, width)
    lines = (grid if variant % 4 < 2 else grid.t()).clone()
    lines = lines.flip(1) if variant >= 4 else lines
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten().flip(0) if variant % 2 else lines.flatten()


def hilbert(height: int, width: int, variant: int = 0) -> Tensor:
    """A Hilbert-like path through a rectangle of any size: [L]. Every step goes to a neighbour.

    The rectangle is halved along its longer side, or cut into an "up, across, down" triple, until it is a line; pieces
    have even sides where they can, since a path between two corners of one side needs that (the general form of the
    curve is J. Cerveny's "gilbert"; on a square whose side is a power of two, every aligned quarter is walked through
    before the next one, as by Hilbert's).

    Args:
        height: rows.
        width: columns.
        variant: 0..3: from the upper left corner, and mirrored; each odd one is the variant before it from its end.

    Raises:
        ValueError: an argument is out of range.
    """
    require(0 <= variant < HILBERTS, "hilbert", "variant", f"0..{HILBERTS - 1}", variant)
    grid = _grid(height, width)
    # Start and end are the corners of one side; it must be even, or both must be odd (colours of a chessboard).
    along_rows = height == 1 or (width > 1 and (width >= height if width % 2 == height % 2 else width % 2 == 0))
    major, minor = ((0, width), (height, 0)) if along_rows else ((height, 0), (0, width))
    cells: list[tuple[int, int]] = []
    _curve((0, 0), major, minor, cells)
    rows, columns = torch.tensor(cells, device=grid.device).unbind(1)
    mirrored = grid.flip(0 if along_rows else 1)  # on the other axis it would be the same path from its end
    path = (mirrored if variant >= 2 else grid)[rows, columns]
    return path.flip(0) if variant % 2 else path


def _curve(at: tuple[int, int], major: tuple[int, int], minor: tuple[int, int], cells: list[tuple[int, int]]) -> None:
    """Appends the cells of the rectangle with corner `at` and sides `major`, `minor`, from `at` to the end of `major`.

    A side is (rows, columns), one of them zero, the other with the direction in which it runs.
    """
    long, high = abs(sum(major)), abs(sum(minor))
    step, rise = _unit(major), _unit(minor)
    if long == 1 or high == 1:  # a line; where it is one cell long, the end of `major` is `at` and it goes up
        towards, n = (step, long) if high == 1 else (rise, high)
        cells.extend(_along(at, towards, i) for i in range(n))
    elif 2 * long > 3 * high:
        half = _even(long // 2, long)
        _curve(at, _times(step, half), minor, cells)
        _curve(_along(at, step, half), _times(step, long - half), minor, cells)
    else:
        half, up = long // 2, _even(high // 2, high)
        _curve(at, _times(rise, up), _times(step, half), cells)
        _curve(_along(at, rise, up), major, _times(rise, high - up), cells)
        end = _along(_along(at, step, long - 1), rise, up - 1)
        _curve(end, _times(rise, -up), _times(step, half - long), cells)


def _even(n: int, whole: int) -> int:
    return n + 1 if n % 2 and whole > 2 else n


def _unit(side: tuple[int, int]) -> tuple[int, int]:
    return (side[0] > 0) - (side[0] < 0), (side[1] > 0) - (side[1] < 0)


def _times(unit: tuple[int, int], n: int) -> tuple[int, int]:
    return unit[0] * n, unit[1] * n


def _along(at: tuple[int, int], unit: tuple[int, int], n: int) -> tuple[int, int]:
    return at[0] + unit[0] * n, at[1] + unit[1] * n


def block_orders(name: str, height: int, width: int) -> Tensor:
    """The paths of a stack of blocks, [V,K,L]: block i scans the K paths of row i mod V.

    Args:
        name: one of `NAMES`: V = 1 with K = 1 (raster), 2 (bidirectional) or 4 (cross); K = 1 with V = 8 (zigzag) or 4
            (hilbert).
        height: rows.
        width: columns.

    Raises:
        ValueError: the name is unknown or a size below 1.
    """
    require(name in NAMES, "block_orders", "name", f"one of {', '.join(NAMES)}", repr(name))
    if name == "zigzag":
        return torch.stack([zigzag(height, width, v) for v in range(ZIGZAGS)])[:, None]
    if name == "hilbert":
        return torch.stack([hilbert(height, width, v) for v in range(HILBERTS)])[:, None]
    if name == "raster":
        return raster(height, width)[None, None]
    return (bidirectional if name == "bidirectional" else cross)(height, width)[None]


def inverse(order: Tensor) -> Tensor:
    """At which step a path visits each position: [...,L] to [...,L]."""
    return order.argsort(-1)


def _grid(height: int, width: int) -> Tensor:
    require(height >= 1 and width >= 1, "scan_orders", "height, width", "at least 1", (height, width))
    # Paths are in no file, so a model built on the "meta" device needs them now.
    device = torch.get_default_device()
    return torch.arange(height * width, device="cpu" if device.type == "meta" else device).view(height, width)
