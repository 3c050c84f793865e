"""Paths through a grid: permutations, steps between neighbours, inverses, and that a scan along one is what it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import ops
from fastdiff.models import scan_orders

SIDES = st.integers(1, 21)


def steps(path: torch.Tensor, width: int) -> torch.Tensor:
    """Distance (in rows plus columns) of each position of a path from the one before."""
    return (path // width).diff().abs() + (path % width).diff().abs()


@given(SIDES, SIDES, st.sampled_from(scan_orders.NAMES))
def test_every_path_is_a_permutation_and_has_an_inverse(height: int, width: int, name: str) -> None:
    orders = scan_orders.block_orders(name, height, width)
    everywhere = torch.arange(height * width)
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(-1).values, everywhere.expand_as(orders))
    assert torch.equal(orders.gather(-1, scan_orders.inverse(orders)), everywhere.expand_as(orders))


@given(SIDES, SIDES, st.sampled_from(("zigzag", "hilbert")))
def test_zigzag_and_hilbert_step_to_neighbours(height: int, width: int, name: str) -> None:
    for path in scan_orders.block_orders(name, height, width).flatten(0, 1):
        assert (steps(path, width) == 1).all()


def test_every_rectangle_up_to_24_has_a_hilbert_path_of_neighbours() -> None:
    for height in range(1, 25):
        for width in range(1, 25):
            path = scan_orders.hilbert(height, width)
            assert (steps(path, width) == 1).all() and path.unique().numel() == height * width, (height, width)


@given(st.integers(2, 12), st.integers(2, 12))
def test_the_eight_zigzags_start_at_four_corners_in_two_directions(height: int, width: int) -> None:
    paths = scan_orders.block_orders("zigzag", height, width)[:, 0]
    corners = {0, width - 1, (height - 1) * width, height * width - 1}
    assert {(int(p[0]), int((p[1] - p[0]).abs())) for p in paths} == {(c, s) for c in corners for s in (1, width)}


@pytest.mark.parametrize("name", ["zigzag", "hilbert"])
def test_each_odd_variant_is_the_one_before_from_its_end(name: str) -> None:
    paths = scan_orders.block_orders(name, 5, 6)[:, 0]
    assert torch.equal(paths[1::2], paths[::2].flip(-1))
    assert len({tuple(p.tolist()) for p in paths}) == len(paths)


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_on_powers_of_two_hilbert_walks_through_one_quarter_after_the_other(side: int) -> None:
    path = scan_orders.hilbert(side, side)
    size = side
    while size > 1:
        size //= 2
        tile = (path // side // size) * (side // size) + path % side // size
        visited = tile.view(-1, size * size)  # pieces of the path of a tile's length
        assert (visited == visited[:, :1]).all()


def test_cross_scan_is_rows_columns_and_both_reversed() -> None:
    rows = [0, 1, 2, 3, 4, 5]
    columns = [0, 3, 1, 4, 2, 5]
    assert scan_orders.cross(2, 3).tolist() == [rows, columns, rows[::-1], columns[::-1]]
    assert scan_orders.bidirectional(2, 3).tolist() == [rows, rows[::-1]]


def test_a_scan_with_orders_is_one_over_gathered_tokens() -> None:
    b, h, w, d, n = 2, 3, 5, 8, 4
    orders = scan_orders.cross(h, w)
    u, A = torch.randn(b, h * w, d), -torch.rand(4, d, n)
    delta, B, C = torch.rand(b, h * w, 4, d), torch.randn(b, h * w, 4, n), torch.randn(b, h * w, 4, n)
    merged = ops.selective_scan_multi(u, delta, A, B, C, orders=orders)
    one_by_one = torch.zeros_like(u)
    for k, path in enumerate(orders):
        there = [t[:, path] for t in (u, delta[:, :, k], B[:, :, k], C[:, :, k])]
        y = ops.selective_scan(there[0], there[1], A[k], there[2], there[3], layout="bld")
        one_by_one += y[:, scan_orders.inverse(path)]
    torch.testing.assert_close(merged, one_by_one, rtol=1e-5, atol=1e-5)


def test_bad_arguments_name_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"\[block_orders\] name: expected one of raster.*got 'spiral'"):
        scan_orders.block_orders("spiral", 4, 4)
    with pytest.raises(ValueError, match=r"\[zigzag\] variant: expected 0..7, got 8"):
        scan_orders.zigzag(4, 4, 8)
    with pytest.raises(ValueError, match=r"\[hilbert\] variant: expected 0..3, got -1"):
        scan_orders.hilbert(4, 4, -1)
    with pytest.raises(ValueError, match="at least 1"):
        scan_orders.raster(0, 4)
