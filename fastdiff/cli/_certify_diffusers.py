"""The same certificate for the schedulers of diffusers, where it is installed: same targets, points and fits.

A perfect network is asked at the level of noise that the *timestep* handed to it stands for, as every real network is:
between training steps log sigma is interpolated. A second run asks at the level the scheduler itself computes with;
where the two differ, it is rounding of the timesteps that costs accuracy. Errors are taken at the last level of the
scheduler's own grid, so that a grid that stops early is not blamed for it.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.cli._certify_fit import ENOUGH, observe
from fastdiff.cli._certify_targets import ALL, Oracle

__all__ = ["PEERS", "Peer", "available", "certify"]

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_KARRAS = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}


@dataclass(frozen=True)
class Peer:
    """A scheduler and settings: what its state is (see `_Loop`), the order its method has, calls per step."""

    name: str
    cls: str
    settings: dict[str, Any]
    order: int
    state: str = "vp"

    def make(self) -> Any:
        import diffusers

        settings = self.settings if self.state == "flow" else {**_BETAS, **self.settings}
        return getattr(diffusers, self.cls)(**settings)


PEERS = (
    Peer("DDIM", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 1, "trained"),
    Peer("PNDM (PLMS)", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 4, "trained"),
    Peer("Euler", "EulerDiscreteScheduler", {}, 1, "ve"),
    Peer("Euler karras", "EulerDiscreteScheduler", _KARRAS, 1, "ve"),
    Peer("Heun karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}, 2, "ve"),
    Peer("LMS karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}, 4, "ve"),
    Peer("DPM++ 2M", "DPMSolverMultistepScheduler", {}, 2),
    Peer("DPM++ 2M karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 2),
    Peer("DPM++ 2M karras, sigma_min", "DPMSolverMultistepScheduler", _KARRAS, 2),
    Peer("DPM++ 2M heun karras, sigma_min", "DPMSolverMultistepScheduler", {**_KARRAS, "solver_type": "heun"}, 2),
    Peer("DPM++ 3M karras, sigma_min", "DPMSolverMultistepScheduler", {**_KARRAS, "solver_order": 3}, 3),
    Peer("DPM++ 3S karras, sigma_min", "DPMSolverSinglestepScheduler", {**_KARRAS, "solver_order": 3}, 3),
    Peer("UniPC-2", "UniPCMultistepScheduler", {}, 3),
    Peer("UniPC-2 karras, sigma_min", "UniPCMultistepScheduler", _KARRAS, 3),
    Peer("UniPC-3 karras, sigma_min", "UniPCMultistepScheduler", {**_KARRAS, "solver_order": 3}, 4),
    Peer("DEIS-3 karras", "DEISMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}, 3),
    Peer("FlowMatchEuler", "FlowMatchEulerDiscreteScheduler", {}, 1, "flow"),
    Peer("FlowMatchEuler shift 3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1, "flow"),
    Peer("FlowMatchHeun", "FlowMatchHeunDiscreteScheduler", {}, 2, "flow"),
)


def available() -> str:
    """The version of diffusers, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers
    except ImportError:
        return ""
    return str(diffusers.__version__)


def certify(peer: Peer, finite_counts: Sequence[int]) -> dict[str, Any]:
    """A row of plain data: errors, fitted orders, step counts with NaN or an exception, and what it warned of.

    Args:
        peer: the scheduler.
        finite_counts: step counts at which the result must be finite.
    """
    log = _Heard()
    with warnings.catch_warnings(record=True) as caught, _logging_to(log):
        warnings.simplefilter("always")
        try:
            row = _row(peer, Oracle(ALL), finite_counts)
        except Exception as error:  # a version without this class or setting: said, and the others still run
            row = {"name": peer.name, "problem": f"{type(error).__name__}: {error}"}
        lines = [*(str(w.message).split("\n")[0] for w in caught), *log.lines]
    return {**row, "warnings": list(dict.fromkeys(lines))}


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().split("\n")[0])


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    """diffusers' warnings go to `handler` alone."""
    logger = logging.getLogger("diffusers")
    before, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagate


def _row(peer: Peer, oracle: Oracle, finite_counts: Sequence[int]) -> dict[str, Any]:
    each = _Loop(peer, oracle, 20, False).calls / 20

    def measure(calls: int, own_level: bool) -> tuple[int, float]:
        loop = _Loop(peer, oracle, round(calls / each), own_level)
        end = loop.run(torch.float64)
        return loop.calls, (end - loop.exact()).abs().max().item()

    # Its tables of sigmas are float32. Beyond 320 steps of 1000 training steps, rounded timesteps coincide.
    shipped, own = (
        observe(functools.partial(measure, own_level=level), floor=1e-6, last=ENOUGH) for level in (False, True)
    )
    not_finite, raised = [], {}
    for steps in finite_counts:
        try:
            if not _Loop(peer, oracle, steps, False).run(torch.float64).isfinite().all():
                not_finite.append(steps)
        except Exception as error:
            raised[steps] = f"{type(error).__name__}: {error}".split("\n")[0]
    return {
        "name": peer.name,
        "class": peer.cls,
        "settings": dict(peer.settings),
        "nominal_order": peer.order,
        "nfe": shipped.nfe,
        "errors": shipped.errors,
        "order": shipped.order,
        "errors_own_level": own.errors,
        "order_own_level": own.order,
        "finite_checked": len(finite_counts),
        "not_finite": not_finite,
        "raised": raised,
    }


class _Loop:
    """The public loop of a scheduler. Its state is sqrt(abar) x0 + sqrt(1 - abar) e ("vp", and "trained": at training
    steps only), x0 + sigma e ("ve") or (1 - sigma) x0 + sigma e ("flow")."""

    def __init__(self, peer: Peer, oracle: Oracle, steps: int, own_level: bool) -> None:
        self.peer, self.oracle, self.own_level = peer, oracle, own_level
        self.scheduler = peer.make()
        self.scheduler.set_timesteps(steps)
        self.calls = len(self.scheduler.timesteps)
        if peer.state != "flow":
            abar = self.scheduler.alphas_cumprod.double()
            self._trained = (0.5 * torch.log((1 - abar) / abar)).tolist()  # log sigma by training step

    def _at_timestep(self, t: float) -> float:
        """sigma (noise / signal, or the flow's) of a timestep."""
        if self.peer.state == "flow":
            return t / float(self.scheduler.config.num_train_timesteps)
        low = min(max(math.floor(t), 0), len(self._trained) - 1)
        high = min(low + 1, len(self._trained) - 1)
        return math.exp(self._trained[low] + (t - low) * (self._trained[high] - self._trained[low]))

    def _level(self, sigma: float) -> tuple[float, float]:
        """(alpha, sigma) of what the network is shown."""
        if self.peer.state == "flow":
            return 1 - sigma, sigma
        return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)

    def _state(self, sigma: float) -> Tensor:
        """Exact points at this level, as the scheduler keeps them."""
        return self.oracle.state(1.0, sigma) if self.peer.state == "ve" else self.oracle.state(*self._level(sigma))

    def exact(self) -> Tensor:
        """Where the points are at the scheduler's last level."""
        if self.peer.state != "trained":
            return self._state(float(self.scheduler.sigmas[-1]))
        abar = float(self.scheduler.final_alpha_cumprod)
        return self._state(math.sqrt((1 - abar) / abar))

    @torch.no_grad()
    def run(self, dtype: torch.dtype) -> Tensor:
        scheduler, kind = self.scheduler, self.peer.state
        first = self._at_timestep(float(scheduler.timesteps[0])) if kind == "trained" else float(scheduler.sigmas[0])
        x = self._state(first).to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            own = self.own_level and kind != "trained"
            alpha, sigma = self._level(float(scheduler.sigmas[i]) if own else self._at_timestep(float(t)))
            if kind == "flow":
                output = -self.oracle.predict(shown, alpha, sigma, "flow")  # diffusers: noise minus data
            else:
                output = self.oracle.predict(shown, alpha, sigma, "epsilon")
            x = scheduler.step(output, t, x)[0]
        return x
