"""Laws that everything keeps that `fastdiff.accelerate` takes, whoever wrote it; see `laws`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff

TOLERANCE = 1e-5


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for part in parts if part is not None for t in tensors(part)]


def apart(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the range."""
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    wide = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in wide)


def fast_copy(module: Any) -> Any:
    made, report = fastdiff.accelerate(copy.deepcopy(module), return_report=True)
    assert report.replaced, report
    return made


def same_numbers(module: nn.Module, inputs: dict[str, Any]) -> None:
    """With and without gradients, in training and evaluation, on our kernels and on their references."""
    fast = fast_copy(module)
    for training in (False, True):
        module.train(training), fast.train(training)
        torch.manual_seed(1)
        theirs = module(**inputs)
        torch.manual_seed(1)
        ours = fast(**inputs)
        assert apart(ours, theirs) < TOLERANCE
        weights = [torch.randn_like(t) for t in tensors(theirs)]
        for output in (ours, theirs):
            torch.autograd.backward(tensors(output), weights)
        most = max(p.grad.abs().max() for p in module.parameters() if p.grad is not None)
        for (name, p), q in zip(module.named_parameters(), fast.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert (p.grad - q.grad).abs().max() <= 3e-5 * p.grad.abs().max() + 1e-6 * most, name
            p.grad = q.grad = None
    module.eval(), fast.eval()
    with torch.no_grad():
        theirs = module(**inputs)
        assert apart(fast(**inputs), theirs) < TOLERANCE
        with fastdiff.use_backend("reference"):
            assert apart(fast(**inputs), theirs) < TOLERANCE


def as_before(module: nn.Module, inputs: dict[str, Any]) -> None:
    """Keys stay, a second call changes nothing, copies are fast, and undoing gives the same bits."""
    module.eval()
    with torch.no_grad():
        theirs = tensors(module(**inputs))
        keys, kinds = list(module.state_dict()), [type(m) for m in module.modules()]
        _, first = fastdiff.accelerate(module, return_report=True)
        _, again = fastdiff.accelerate(module, return_report=True)
        assert first == again == fastdiff.acceleration_report(module)
        assert list(module.state_dict()) == keys
        assert all(isinstance(m, kind) for m, kind in zip(module.modules(), kinds, strict=True))
        ours = tensors(module(**inputs))
        for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert fastdiff.acceleration_report(same) == first
            assert all(torch.equal(a, b) for a, b in zip(tensors(same(**inputs)), ours, strict=True))
        fastdiff.restore(module)
        assert [type(m) for m in module.modules()] == kinds
        assert not fastdiff.acceleration_report(module).replaced
        assert all(torch.equal(a, b) for a, b in zip(tensors(module(**inputs)), theirs, strict=True))


def other_types(module: nn.Module, inputs: dict[str, Any]) -> None:
    """float64 agrees to its own precision; bfloat16 is as near to the truth as the module's own."""

    def cast(dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
        def to(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: to(v) for k, v in value.items()}
            if isinstance(value, (tuple, list)):
                return tuple(to(v) for v in value)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return {k: to(v) for k, v in given.items()}

    module.eval()
    with torch.no_grad():
        wide = copy.deepcopy(module).double()
        exact = cast(torch.float64, inputs)
        truth = wide(**exact)
        fast = fast_copy(wide)(**exact)
        assert apart(fast, truth) < 1e-6  # some layers of diffusers compute in float32 whatever they are given
        low = copy.deepcopy(module).bfloat16()
        rounded = cast(torch.bfloat16, inputs)
        truth = copy.deepcopy(low).double()(**cast(torch.float64, rounded))
        ours, theirs = (tensors(m(**rounded)) for m in (fast_copy(low), low))
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        for a, b, t in zip(ours, theirs, tensors(truth), strict=True):
            ours_off, theirs_off = (float((s.double() - t).square().mean().sqrt()) for s in (a, b))
            assert ours_off <= 1.15 * theirs_off


def watched(module: nn.Module, inputs: dict[str, Any]) -> None:
    """Every hook that the module's own forward would run still runs, on the same values."""
    module.eval()

    def record(m: nn.Module, fast: bool) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_m: Any, _args: Any, output: Any) -> None:
                seen[name] = tensors(output)[0]

            return keep

        for name, part in m.named_modules():
            part.register_forward_hook(hook(name))
        if fast:
            fastdiff.accelerate(m)
        with torch.no_grad():
            m(**inputs)
        return seen

    theirs, ours = record(copy.deepcopy(module), False), record(copy.deepcopy(module), True)
    assert set(theirs) == set(ours)
    for name in theirs:
        assert apart(ours[name], theirs[name]) < 1e-4, name


def compiles(module: nn.Module, inputs: dict[str, Any]) -> None:
    """As one graph."""
    fast = fast_copy(module.eval())
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fast(**inputs)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        assert apart(compiled(**inputs), expected) < TOLERANCE


LAWS: list[Callable[[Any, dict[str, Any]], None]] = [same_numbers, as_before, other_types, watched]
