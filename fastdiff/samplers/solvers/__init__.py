"""Every solver by name: a function that writes down its stages for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastdiff.samplers.solvers._run import Stage, conversion
from fastdiff.samplers.solvers.first_order import ddim, ddpm, euler, euler_ancestral
from fastdiff.samplers.solvers.multistep import adams_bashforth, deis, dpmpp_2m, dpmpp_3m, unipc
from fastdiff.samplers.solvers.runge_kutta import heun, midpoint, rk4
from fastdiff.samplers.solvers.singlestep import dpmpp_2s, dpmpp_3s
from fastdiff.samplers.solvers.stochastic import consistency, dpmpp_2m_sde, lcm, restart

__all__ = ["SOLVERS", "Solver", "Stage", "conversion"]


@dataclass(frozen=True)
class Solver:
    """A solver.

    Attributes:
        name: as in ``make_plan(name, ...)``.
        stages: ``stages(run, **options) -> (Stage, ...)``.
        order: its order, for the deterministic ones; the slope that its error shows against the number of steps.
        options: the names of its options.
        stochastic: it draws noise with its default options.
    """

    name: str
    stages: Callable[..., tuple[Stage, ...]]
    order: int
    options: tuple[str, ...] = ()
    stochastic: bool = False


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", ddim, 1, ("eta",)),
        Solver("ddpm", ddpm, 1, stochastic=True),
        Solver("euler", euler, 1),
        Solver("euler_ancestral", euler_ancestral, 1, ("eta",), stochastic=True),
        Solver("heun", heun, 2),
        Solver("midpoint", midpoint, 2),
        Solver("rk4", rk4, 4),
        Solver("dpmpp_2m", dpmpp_2m, 2),
        Solver("dpmpp_3m", dpmpp_3m, 3),
        Solver("dpmpp_2s", dpmpp_2s, 2),
        Solver("dpmpp_3s", dpmpp_3s, 3),
        Solver("unipc_2", partial(unipc, order=2), 3),
        Solver("unipc_3", partial(unipc, order=3), 4),
        Solver("deis_2", partial(deis, order=2), 2),
        Solver("deis_3", partial(deis, order=3), 3),
        Solver("dpmpp_2m_sde", dpmpp_2m_sde, 1, stochastic=True),
        Solver("lcm", lcm, 1, ("sigma_data", "timestep_scaling"), stochastic=True),
        Solver("consistency", consistency, 1, stochastic=True),
        Solver("restart", restart, 2, ("intervals", "rho"), stochastic=True),
        Solver("ab2", partial(adams_bashforth, order=2), 2),
        Solver("ab3", partial(adams_bashforth, order=3), 3),
        Solver("ab4", partial(adams_bashforth, order=4), 4),
    )
}
