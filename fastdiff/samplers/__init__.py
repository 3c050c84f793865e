"""Samplers: small functions that turn noise into data with a trained model."""

from __future__ import annotations

from fastdiff.samplers import schedules
from fastdiff.samplers.flow import sample_flow_euler
from fastdiff.samplers.plan import Plan, make_plan
from fastdiff.samplers.sample import sample
from fastdiff.samplers.solvers import SOLVERS

__all__ = ["SOLVERS", "Plan", "make_plan", "sample", "sample_flow_euler", "schedules"]
