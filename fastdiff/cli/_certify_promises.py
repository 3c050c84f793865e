"""What every solver promises: the one table that ``fastdiff certify`` holds them to, and the schedules it uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastdiff.samplers import schedules
from fastdiff.samplers.schedules import Schedule

__all__ = ["ENDS_AT_DATA", "ERROR_CALLS", "ORDER_SCHEDULES", "PROMISES", "Promise"]

ERROR_CALLS = 160  # model evaluations for `Promise.error`


@dataclass(frozen=True)
class Promise:
    """What is promised of one solver, for every schedule, prediction type and number of steps.

    Attributes:
        order: of the error in float64 against the number of model evaluations; of a stochastic solver, of the error
            of the mean and deviation that it gives a Gaussian target. On the reference schedule, the first of
            `ORDER_SCHEDULES`, neither less nor more; on others some methods gain an order from symmetry, or are far from
            their asymptotic range, and it is a lower bound.
        within: allowed distance of the observed order from it.
        at_least: the order, less `within`, is a lower bound alone.
        error: bound on the error at `ERROR_CALLS` evaluations on the reference schedule, in float64.
        stochastic: draws noise.
    """

    order: float
    within: float = 0.1
    at_least: bool = False
    error: float = math.inf
    stochastic: bool = False

    def kept_by(self, observed: float, *, exactly: bool) -> bool:
        """`exactly`: too high an order breaks it as well. NaN, an order that could not be observed, keeps nothing."""
        above = self.at_least or not exactly
        return observed >= self.order - self.within and (above or observed <= self.order + self.within)

    def text(self, *, exactly: bool = True) -> str:
        if self.at_least or not exactly:
            return f"≥ {self.order - self.within:g}"
        return f"{self.order:g} ± {self.within:g}"


PROMISES = {
    "ddim": Promise(1, 0.05),
    "euler": Promise(1, 0.05),
    "heun": Promise(2),
    "midpoint": Promise(2),
    "rk4": Promise(4, 0.2),
    "dpmpp_2m": Promise(2),
    "dpmpp_3m": Promise(3),
    "dpmpp_2s": Promise(2),
    "dpmpp_3s": Promise(3, error=1e-5),
    "unipc_2": Promise(3, 0.1, at_least=True),
    "unipc_3": Promise(4, 0.2, at_least=True),
    "deis_2": Promise(2),
    "deis_3": Promise(3),
    "ab2": Promise(2),
    "ab3": Promise(3),
    "ab4": Promise(4, 0.2),
    "ddpm": Promise(1, 0.1, at_least=True, stochastic=True),
    "euler_ancestral": Promise(1, 0.1, at_least=True, stochastic=True),
}

# Grids whose steps all shrink as their number grows, so that there is an order to observe. "karras" and EDM grids that
# go on to sigma = 0 have a last step of a fixed size (from sigma_min), so these end at sigma_min.
ORDER_SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "vp scaled_linear karras, min": lambda: schedules.vp("scaled_linear", spacing="karras", final="min"),
    "vp scaled_linear trailing": lambda: schedules.vp("scaled_linear", spacing="trailing"),
    "vp linear linspace": lambda: schedules.vp("linear", spacing="linspace"),
    "vp cosine leading": lambda: schedules.vp("cosine", spacing="leading"),
    "edm, min": lambda: schedules.edm(final="min"),
    "flow": lambda: schedules.flow(),
    "flow shift 3": lambda: schedules.flow(shift=3.0),
}
# Also sampled with every number of steps.
ENDS_AT_DATA: dict[str, Callable[[], Schedule]] = {
    "vp scaled_linear karras": lambda: schedules.vp("scaled_linear", spacing="karras"),
    "vp linear zero terminal SNR": lambda: schedules.vp("linear", spacing="trailing", zero_terminal_snr=True),
    "edm": lambda: schedules.edm(),
}
