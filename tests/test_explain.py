"""`explain` and the native kernels agree: it names every reason, and only reasons, why a call runs on the reference."""

from __future__ import annotations

import ast
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emu import harness

import fastdiff
from fastdiff import _native
from fastdiff.ops import SPECS
from fastdiff.ops._registry import map_tensors, tensors_in

ROOT = Path(fastdiff.__file__).parent / "ops"
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(_native.extension is None, reason="no native extension")


def kernels(where: str) -> contextlib.AbstractContextManager[None]:
    """Those of the CPU, or those of CUDA, which the emulator runs on CPU tensors."""
    if where == "cpu":
        return contextlib.nullcontext()
    reason = harness.why_not()
    if reason:
        pytest.skip(f"the CUDA emulator cannot be built: {reason}")
    return harness.build().operators()


def agree(name: str, args: Any, kwargs: Any) -> list[str]:
    """The reasons; they are what ``use_backend("native")`` complains of, and none where it serves the call."""
    why = fastdiff.explain(name, *args, **kwargs)
    said = ""
    with fastdiff.use_backend("native"):
        try:
            SPECS[name].function(*args, **kwargs)
        except RuntimeError as error:
            said = str(error)
    assert bool(said) == bool(why), (why, said)
    assert all(reason in said for reason in why), (why, said)
    return why


def one_in_float64(args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The call with each of its floating-point tensors in turn in double precision."""
    count = len(tensors_in((args, kwargs)))
    for i in range(count):
        turn = iter(range(count))
        yield map_tensors(
            lambda t, i=i, turn=turn: t.detach().double() if next(turn) == i and t.is_floating_point() else t,
            (args, kwargs),
        )


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SPECS)
def test_types_that_decide_are_named_and_others_are_not(name: str, where: str) -> None:
    with kernels(where):
        for number in range(3):
            args, kwargs = SPECS[name].example(random.Random(f"{name} {number}"), torch.float32, CPU)
            assert agree(name, args, kwargs) == []
            for call in one_in_float64(args, kwargs):
                with contextlib.suppress(ValueError, TypeError):  # where all must be of one type
                    agree(name, *call)


def scan(states: int, multi: bool = False) -> tuple[Any, Any]:
    u = torch.zeros(1, 2, 3)
    if not multi:
        return (u, u, torch.zeros(3, states), *[torch.zeros(1, 2, states)] * 2), {"layout": "bld"}
    orders = torch.arange(2)[None]
    return (u, u, torch.zeros(3, states), *[torch.zeros(1, 2, 1, states)] * 2), {"orders": orders}


def half(d: int, heads: int = 1, **options: Any) -> tuple[Any, Any]:
    x, m = torch.zeros(1, 2, d), torch.zeros(1, d)
    return (x, m, m, m, torch.zeros(3 * d, d), None, torch.zeros(d, d), None, heads), options


def learned() -> torch.Tensor:
    return torch.full((2,), 0.3, requires_grad=True)


X, ROPE = torch.zeros(2, 3), (torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2))
# (operator, call, the words of the reason, where the kernels have that limit)
BEYOND: list[tuple[str, Callable[[], tuple[Any, Any]], str, tuple[str, ...]]] = [
    ("causal_conv1d", lambda: ((torch.zeros(1, 2, 3), torch.zeros(2, 129)), {}), "129 taps", ("cuda",)),
    ("selective_scan", lambda: scan(129), "129 floats of state", ("cuda",)),
    ("selective_scan", lambda: scan(257), "257 floats of state", ("cpu", "cuda")),
    ("selective_scan_multi", lambda: scan(129, multi=True), "129 floats of state", ("cuda",)),
    ("attention", lambda: ([torch.zeros(1, 1, 2, 257)] * 3, {}), "head dim of 257", ("cuda",)),
    ("attention_qkvpacked", lambda: ([torch.zeros(1, 2, 3, 1, 258)], {}), "head dim of 258", ("cuda",)),
    ("attention_qkvpacked", lambda: ([torch.zeros(1, 2, 3, 1, 4)], {"rope": ROPE}), "rope table", ("cpu", "cuda")),
    ("adaln_attention", lambda: half(260), "head dim of 260", ("cuda",)),
    ("adaln_attention", lambda: half(260, 2), "", ()),
    ("adaln_attention", lambda: half(8, 2, rope=ROPE), "rope table", ("cpu", "cuda")),
    ("linear_update", lambda: (([learned(), 1.0], [X, X]), {}), "coefficient", ("cpu", "cuda")),
    ("euler_step", lambda: ((X, X, learned()), {}), "coefficient", ("cpu", "cuda")),
    ("ddim_step", lambda: ((X, X, learned(), 0.6), {}), "coefficient", ("cpu", "cuda")),
]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("case", BEYOND, ids=lambda c: f"{c[0]} {c[2]}")
def test_a_limit_of_the_kernels_is_named(case: Any, where: str) -> None:
    name, make, words, limited = case
    args, kwargs = make()
    with kernels(where):
        why = agree(name, args, kwargs)
        assert any(words in reason for reason in why) == (where in limited)
        # All reasons, not the first.
        if why and name != "attention":
            wide = map_tensors(lambda t: t.double() if t.is_floating_point() and t.dim() > 1 else t, (args, kwargs))
            both = fastdiff.explain(name, *wide[0], **wide[1])
            assert any("float64" in reason for reason in both)
            assert any(words in reason for reason in both)


def test_no_operator_falls_back_behind_explain() -> None:
    """`route` and `within_limits` alone choose the reference, and what the latter is told has a case above."""
    limited = set()
    for page in sorted(ROOT.glob("[a-z]*.py")):
        tree = ast.parse(page.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                assert "REFERENCE" not in ast.unparse(node.value), f"{page.name}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "reg.within_limits":
                limited.add(page.stem)
    covered = {SPECS[name].function.__module__.rsplit(".", 1)[1] for name, *_ in BEYOND}
    assert limited <= covered
    for name, spec in SPECS.items():
        assert spec.limits is None or name in {case[0] for case in BEYOND}, name
