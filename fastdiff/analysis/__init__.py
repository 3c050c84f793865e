"""Theory as tested code: exact oracles, error budgets, convergence bounds, distances between distributions.

- Oracles: `GaussianOracle`, `MixtureOracle`: exact scores, predictions, densities and probability-flow paths.
- Where a run's error comes from: `error_budget`, exact for Gaussian data and every solver; `better_runs`,
  `optimise_times`, `steps_for` to do something about it; `fastdiff analyze` does all of it.
- The setting of the convergence theorems: `ou_marginal_kl`, `ou_path_kl` (exact) and `ou_bounds`.
- What to measure a model with: `analyze_score_estimation_error`, `analyze_paths`, `w2`, `w2_squared`, `mmd_squared`,
  `observed_order`, `sample_complexity`.
"""

from __future__ import annotations

from fastdiff.analysis.bounds import Bound, bound_benton, bound_chen, bound_chen_lee_lu, ou_bounds, step_ratio
from fastdiff.analysis.budget import (
    SOURCES,
    ErrorBudget,
    ModelError,
    Source,
    Trajectory,
    error_budget,
    propagate,
)
from fastdiff.analysis.convergence import ObservedOrder, SampleComplexity, observed_order, sample_complexity
from fastdiff.analysis.distances import mmd_squared, w2, w2_squared
from fastdiff.analysis.gaussians import gaussian_kl, gaussian_w2, gaussian_w2_squared
from fastdiff.analysis.optimise import OptimisedTimes, discretisation_error, optimise_times, run_plan
from fastdiff.analysis.oracles import GaussianOracle, MixtureOracle, Oracle
from fastdiff.analysis.ou import OUScheme, ou_exponential_integrator, ou_marginal_kl, ou_path_kl, ou_times
from fastdiff.analysis.paths import PathReport, analyze_paths
from fastdiff.analysis.plots import plot_budgets, plot_sample_complexity, plot_score_error
from fastdiff.analysis.recommend import ADVICE, Candidate, better_runs, steps_for
from fastdiff.analysis.score_error import ScoreErrorReport, TimestepError, analyze_score_estimation_error

__all__ = [
    "ADVICE",
    "SOURCES",
    "Bound",
    "Candidate",
    "ErrorBudget",
    "GaussianOracle",
    "MixtureOracle",
    "ModelError",
    "OUScheme",
    "ObservedOrder",
    "OptimisedTimes",
    "Oracle",
    "PathReport",
    "SampleComplexity",
    "ScoreErrorReport",
    "Source",
    "TimestepError",
    "Trajectory",
    "analyze_paths",
    "analyze_score_estimation_error",
    "better_runs",
    "bound_benton",
    "bound_chen",
    "bound_chen_lee_lu",
    "discretisation_error",
    "error_budget",
    "gaussian_kl",
    "gaussian_w2",
    "gaussian_w2_squared",
    "mmd_squared",
    "observed_order",
    "optimise_times",
    "ou_bounds",
    "ou_exponential_integrator",
    "ou_marginal_kl",
    "ou_path_kl",
    "ou_times",
    "plot_budgets",
    "plot_sample_complexity",
    "plot_score_error",
    "propagate",
    "run_plan",
    "sample_complexity",
    "step_ratio",
    "steps_for",
    "w2",
    "w2_squared",
]
