"""Samplers: they turn noise into data with a trained model, and data into noise.

    from fastdiff.samplers import sample, schedules

    schedule = schedules.vp("scaled_linear", spacing="trailing")
    images = sample(model, noise, solver="dpmpp_2m", schedule=schedule, steps=20, prediction="epsilon", cond=labels,
                    guidance_scale=4.0)

`make_plan` computes a run in advance, in float64, and `sample` runs it; `guidance`, `solve` (adaptive steps) and
`log_likelihood` are the rest.
"""

from __future__ import annotations

from fastdiff.samplers import guidance, schedules
from fastdiff.samplers.adaptive import Trajectory, solve
from fastdiff.samplers.graph import GraphedRun
from fastdiff.samplers.likelihood import Likelihood, log_likelihood
from fastdiff.samplers.plan import Plan, make_plan
from fastdiff.samplers.sample import sample
from fastdiff.samplers.solvers import SOLVERS, Solver

__all__ = [
    "SOLVERS",
    "GraphedRun",
    "Likelihood",
    "Plan",
    "Solver",
    "Trajectory",
    "guidance",
    "log_likelihood",
    "make_plan",
    "sample",
    "schedules",
    "solve",
]
