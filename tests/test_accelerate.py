"""The engine of `fastdiff.accelerate`: classes exchanged in place, reports, what it takes and what it leaves."""

from __future__ import annotations

import copy
import io
import pickle
import types
from typing import Any

import pytest
import torch
from test_accelerate_dit import Block, D, Mlp, Model
from torch import nn
from torch.nn.utils import parametrizations

import fastdiff
from fastdiff.integrations import _swap
from fastdiff.integrations.accelerate import HANDLERS


class _Sharded:
    """Stands in for what FSDP mixes in."""


@pytest.mark.parametrize("function", [fastdiff.accelerate, fastdiff.restore, fastdiff.acceleration_report])
def test_what_is_not_taken(function: Any) -> None:
    with pytest.raises(TypeError, match=r"\[\w+\] obj: expected a torch.nn.Module, .* got int"):
        function(3)


def test_returns_the_object_and_the_report() -> None:
    model = Model()
    assert fastdiff.accelerate(model) is model
    same, report = fastdiff.accelerate(model, return_report=True)
    assert same is model and report == fastdiff.acceleration_report(model)
    assert fastdiff.restore(model) is model


def test_report_before_and_after() -> None:
    model = Model()
    report = fastdiff.acceleration_report(model)
    assert not report.replaced and {e.why_not for e in report.refused} == {"not accelerated yet"}
    fastdiff.accelerate(model.blocks[0])
    _, report = fastdiff.accelerate(model, return_report=True)
    assert not report.refused and next(e.path for e in report.replaced) == "blocks.0"
    fastdiff.restore(model.blocks[0])
    assert {e.path.split(".")[1] for e in fastdiff.acceleration_report(model).replaced if "blocks" in e.path} == {"1"}


def test_nothing_to_replace() -> None:
    _, report = fastdiff.accelerate(
        nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.Linear(2, 2)), return_report=True
    )
    assert not report.replaced and report.unknown == {"Linear": 2, "Conv2d": 1}
    assert str(report).splitlines() == [
        "0 replaced, 0 refused",
        "  unchanged    2 x Linear: no replacement",
        "  unchanged    1 x Conv2d: no replacement",
    ]


def test_the_class_seems_the_same() -> None:
    mlp = Mlp()
    fastdiff.accelerate(mlp)
    assert type(mlp) is not Mlp and isinstance(mlp, Mlp)
    assert (type(mlp).__name__, type(mlp).__module__, type(mlp).__doc__) == (Mlp.__name__, Mlp.__module__, Mlp.__doc__)
    assert _swap.original_class(mlp) is Mlp
    fastdiff.restore(mlp)
    assert type(mlp) is Mlp


def test_shared_modules_are_counted_once() -> None:
    mlp = Mlp()
    _, report = fastdiff.accelerate(nn.ModuleList([Block(mlp=mlp), Block(mlp=mlp)]), return_report=True)
    assert sum(e.kind == "Mlp" for e in report.replaced) == 1


def test_a_forward_of_somebody_elses_is_kept() -> None:
    mlp, x = Mlp(), torch.randn(2, 3, D)
    mlp.forward = types.MethodType(lambda self, x: x + 1, mlp)  # type: ignore[method-assign]
    _, report = fastdiff.accelerate(mlp, return_report=True)
    assert not report.replaced and "somebody else's" in str(report.refused[0].why_not)
    assert torch.equal(mlp(x), x + 1)


def test_a_forward_wrapped_later_is_undone_as_well() -> None:
    """As offloading does it: the wrapper keeps the bound forward in the module."""
    mlp, x = Mlp(), torch.randn(2, 3, D)
    theirs = mlp(x)
    fastdiff.accelerate(mlp)
    mlp._old_forward = mlp.forward
    mlp.forward = lambda x: 2 * mlp._old_forward(x)  # type: ignore[method-assign]
    assert torch.allclose(mlp(x), 2 * theirs, atol=1e-5)
    fastdiff.restore(mlp)
    assert torch.equal(mlp(x), 2 * theirs)
    assert mlp._old_forward.__func__ is Mlp.forward


@pytest.mark.parametrize("mixed_in", [(), (_Sharded,)])
def test_a_class_derived_later_is_undone_as_well(mixed_in: tuple[type, ...]) -> None:
    """As FSDP and parametrisations make one for an object."""
    mlp, x = Mlp().eval(), torch.randn(2, 3, D)
    theirs = mlp(x)
    fastdiff.accelerate(mlp)
    mlp.__class__ = type("DerivedMlp", (*mixed_in, type(mlp)), {"answer": 42})
    assert len(fastdiff.acceleration_report(mlp).replaced) == 1
    derived = type(mlp)
    assert type(fastdiff.accelerate(mlp)) is derived
    for same in (mlp, copy.deepcopy(mlp)):
        assert type(same) is derived and torch.equal(same(x), mlp(x))
    fastdiff.restore(mlp)
    assert type(mlp).__mro__[1:] == (*mixed_in, *Mlp.__mro__) and type(mlp).__name__ == "DerivedMlp"
    assert mlp.answer == 42 and torch.equal(mlp(x), theirs)
    assert not fastdiff.acceleration_report(mlp).replaced


def test_parametrised_parts_agree() -> None:
    block, x, c = Block().eval(), torch.randn(2, 9, D), torch.randn(2, D)
    fastdiff.accelerate(block)
    parametrizations.weight_norm(block.attn.proj)
    with torch.no_grad():
        block.attn.proj.parametrizations.weight.original0.mul_(3)
        ours = block(x, c)
        assert torch.allclose(ours, fastdiff.restore(block)(x, c), atol=1e-5)


def test_saved_whole_and_loaded() -> None:
    """`torch.save` of a fast module, and weights that go both ways."""
    model, x, c = Model(), torch.randn(2, 9, D), torch.randn(2, D)
    plain = copy.deepcopy(model)
    fastdiff.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(x, c), model(x, c))
        other = fastdiff.accelerate(Model())
        other.load_state_dict(plain.state_dict())
        assert torch.equal(other(x, c), model(x, c))


def test_compiled_before_and_after() -> None:
    """A module that was compiled takes up the exchange, and its undoing."""
    model, x = Mlp().eval(), torch.randn(2, 9, D)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        theirs = compiled(x)
        _, report = fastdiff.accelerate(compiled, return_report=True)
        assert len(report.replaced) == 1
        assert torch.allclose(compiled(x), theirs, atol=1e-5)
        model.fc1.weight.mul_(2)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        fastdiff.restore(compiled)
        assert torch.equal(compiled(x), Mlp.forward(model, x))


def test_handlers_are_pickled_and_compared_by_value() -> None:
    for handler in HANDLERS:
        assert pickle.loads(pickle.dumps(handler)) == handler


def test_unknown_parameters_are_named() -> None:
    def forward(self: Any, x: Any, more: Any) -> None: ...

    assert _swap.takes(forward, "x", "more") is None
    assert "expected arguments ('x',), got ('x', 'more')" in str(_swap.takes(forward, "x"))


def test_autocast_agrees() -> None:
    model, x, c = Model().eval(), torch.randn(2, 9, D), torch.randn(2, D)
    fast = fastdiff.accelerate(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(x, c), model(x, c)
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()
