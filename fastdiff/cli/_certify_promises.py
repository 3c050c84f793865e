"""What every solver promises: the one table that ``fastdiff certify`` holds them to, and the schedules it uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastdiff.samplers import schedules
from fastdiff.samplers.schedules import Schedule

__all__ = [
    "ENDS_AT_DATA",
    "ERROR_CALLS",
    "INVERTED",
    "ORDER_SCHEDULES",
    "PROMISES",
    "STEP_COUNTS",
    "Promise",
]

ERROR_CALLS = 160  # model evaluations for `Promise.error`


@dataclass(frozen=True)
class Promise:
    """What is promised of one solver, for every schedule, prediction type and number of steps.

    Attributes:
        order: of the error in float64 against the number of model evaluations; of a stochastic solver, of the error
            of the mean and deviation that it gives a Gaussian target. This on the reference schedule, the first of
            `ORDER_SCHEDULES`. None: no order: restarts have a fixed number of steps, and moments of a
            consistency model are right only with a perfect consistency function (`consistent`).
        within: allowed distance of the observed order from it.
        at_least: more is allowed, too.
        elsewhere: lower bound on the other schedules, where some methods gain an order from symmetry and some are not
            in their asymptotic range after a thousand evaluations. None: 85 % of the order.
        error: bound on the error at `ERROR_CALLS` evaluations on the reference schedule, in float64.
        stochastic: draws noise.
        consistent: bound on the error of the moments in 4 steps on the reference schedule, when the network is a
            perfect consistency function, which takes any state to where its path ends.
    """

    order: float | None
    within: float = 0.1
    at_least: bool = False
    elsewhere: float | None = None
    error: float = math.inf
    stochastic: bool = False
    consistent: float | None = None

    def bounds(self, *, reference: bool) -> tuple[float, float]:
        """The observed order must lie in these."""
        if self.order is None:
            return -math.inf, math.inf
        if not reference:
            return (0.85 * self.order if self.elsewhere is None else self.elsewhere), math.inf
        return self.order - self.within, math.inf if self.at_least else self.order + self.within

    def kept_by(self, observed: float, *, reference: bool) -> bool:
        """NaN, an order that could not be observed, keeps nothing."""
        low, high = self.bounds(reference=reference)
        return self.order is None or low <= observed <= high

    def text(self, *, reference: bool = True) -> str:
        if self.order is None:
            return f"error ≤ {self.error:g}" if self.consistent is None else f"consistent within {self.consistent:g}"
        low, high = self.bounds(reference=reference)
        return f"≥ {low:g}" if high == math.inf else f"{self.order:g} ± {self.within:g}"


# On times even in t that go down to sigma = 0, sigma of a VP schedule falls like sqrt(t), in steps that do not all
# shrink at the same rate: DDIM's error is h log(1/h) there, and DEIS, a polynomial in sigma / alpha, keeps an order
# of 3/2 to 2. A flow begins without data, where the first step of DEIS is DDIM's.
PROMISES = {
    "ddim": Promise(1, 0.05, elsewhere=0.8),
    "euler": Promise(1, 0.05, elsewhere=0.8),
    "heun": Promise(2),
    "midpoint": Promise(2),
    "rk4": Promise(4, 0.2),
    "dpmpp_2m": Promise(2),
    "dpmpp_3m": Promise(3),
    "dpmpp_2s": Promise(2),
    "dpmpp_3s": Promise(3, error=1e-5),
    "unipc_2": Promise(3, 0.1, at_least=True),
    "unipc_3": Promise(4, 0.2, at_least=True),
    "deis_2": Promise(2, elsewhere=1.2),
    "deis_3": Promise(3, elsewhere=1.7),
    "ab2": Promise(2),
    "ab3": Promise(3, 0.2),
    "ab4": Promise(4, 0.2),
    "ddpm": Promise(1, 0.1, at_least=True, stochastic=True),
    "euler_ancestral": Promise(1, 0.1, at_least=True, stochastic=True),
    # The last of linspace and leading times is a step of a fixed size to data, which leaves the variance of denoising.
    "dpmpp_2m_sde": Promise(2, elsewhere=0.1, stochastic=True),
    "restart": Promise(None, error=2e-3, stochastic=True),
    # Its function is a little off the network's at small times.
    "lcm": Promise(None, stochastic=True, consistent=1e-5),
    "consistency": Promise(None, stochastic=True, consistent=1e-9),
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
# From sigma = 0 on, where sigma of a VP schedule rises like sqrt(t), an inversion loses part of its order.
INVERTED = ("vp scaled_linear karras, min", "edm, min")
# More that must give finite results.
ENDS_AT_DATA: dict[str, Callable[[], Schedule]] = {
    "vp scaled_linear karras": lambda: schedules.vp("scaled_linear", spacing="karras"),
    "vp linear zero terminal SNR": lambda: schedules.vp("linear", spacing="trailing", zero_terminal_snr=True),
    "edm": lambda: schedules.edm(),
}
STEP_COUNTS = range(1, 201)
