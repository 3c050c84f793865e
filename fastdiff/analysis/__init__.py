"""Theory as tested code: exact oracles, error budgets, convergence bounds, distances between distributions."""

from __future__ import annotations

from fastdiff.analysis.oracles import GaussianOracle, MixtureOracle, Oracle

__all__ = ["GaussianOracle", "MixtureOracle", "Oracle"]
