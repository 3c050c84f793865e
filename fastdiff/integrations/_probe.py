"""Whether our forward of somebody else's layer is theirs: both are run once on random numbers.

A layer that is recognised by its attribute names alone may do anything with them. So a copy of it gets random
parameters (those of a fresh DiT are zero, and would hide any difference), runs its own forward and ours, and is left
alone unless they agree: in evaluation, and in training with the same random numbers, where dropout by a function would
otherwise go unnoticed. So is a layer whose forward keeps something for later (a map of attention, say): ours would not.
The layer itself is not called, no hook runs, and the random generators stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations._swap import original_class

__all__ = ["disagreement", "extra_parts"]

TOLERANCE = 2e-5  # float32, relative to the range of the output; another form of GELU is 1e-4 away
_TRIALS = ((False, 2, 16), (False, 1, 272), (True, 2, 16))  # training, samples, tokens


def disagreement(
    module: nn.Module, width: int, inputs: int, forward: Callable[..., Any], *, loudness: float = 30.0
) -> str | None:
    """Why `module` is not what `forward` computes, or None.

    Args:
        module: takes tokens [B,N,width], and with ``inputs=2`` a condition [B,width].
        width: of the tokens.
        inputs: 1 or 2.
        forward: ours, ``forward(module, tokens, condition)``.
        loudness: standard deviation of the tokens in the long trial, which shows what is clamped, and windows.
    """
    kind: Any = original_class(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
            random = _Random(device)
            stand_in = _stand_in(module, random)
            for training, samples, tokens in _TRIALS:
                size = loudness if samples == 1 else 1.0
                x = [size * random(samples, tokens, width), random(samples, width)][:inputs]
                stand_in.train(training)
                before, states = _kept(stand_in), _states(devices)
                theirs: Any = kind.forward(stand_in, *x)
                kept = [name for name, held in _kept(stand_in).items() if before.get(name) != held]
                if kept:
                    return f"its forward sets attributes: {', '.join(kept)}"
                _set_states(states)
                ours: Any = forward(stand_in, *x)
                if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
                    return f"its forward returns something else than one tensor {tuple(ours.shape)}"
                apart = float((theirs - ours).abs().max() / theirs.abs().max())
                if not apart <= TOLERANCE:
                    when = " in training" if training else ""
                    return f"its forward is not the usual one{when}: outputs differ by {apart:.1e} of their range"
    except Exception as error:
        return f"its forward could not be tried out: {type(error).__name__}: {error}"
    return None


def extra_parts(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """Why a layer is more than its known parts: it has other children, parameters or buffers of its own."""
    found = [name for name, child in module.named_children() if name not in known and type(child) is not nn.Identity]
    found += [name for name, _ in module.named_parameters(recurse=False)]
    found += [name for name, _ in module.named_buffers(recurse=False)]
    return f"it has parts that the usual one has not: {', '.join(found)}" if found else None


class _Random:
    """Normal numbers that leave every generator as it is."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(self.device)


def _kept(module: nn.Module) -> dict[str, tuple[int, int]]:
    """What every attribute holds: which object, and how many of them if it is a collection."""
    return {
        name: (id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
        for name, value in vars(module).items()
    }


def _states(devices: list[torch.device]) -> list[tuple[torch.device | None, Tensor]]:
    """Of the generators that a layer draws from: the CPU's (None) and the devices'."""
    return [(None, torch.get_rng_state()), *((device, torch.cuda.get_rng_state(device)) for device in devices)]


def _set_states(states: list[tuple[torch.device | None, Tensor]]) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _stand_in(module: nn.Module, random: _Random) -> Any:
    """A copy in float32, with random parameters and without hooks."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, dict) and "_hooks" in name:
                memo[id(value)] = type(value)()
    for p in module.parameters():
        # Large enough to show in the output, small enough to keep products in range.
        scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
        memo[id(p)] = nn.Parameter(scale * random(*p.shape), requires_grad=False)
    return copy.deepcopy(module, memo).float()
