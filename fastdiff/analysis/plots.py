"""Pictures of what the other modules compute, as PNG files. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.analysis.budget import SOURCES, ErrorBudget
from fastdiff.analysis.convergence import SampleComplexity
from fastdiff.analysis.score_error import ScoreErrorReport, TimestepError

__all__ = ["plot_budgets", "plot_sample_complexity", "plot_score_error"]

_COLOURS = ("#3b6fb6", "#d1603d", "#2e9e5b", "#8a5fb0")


def plot_budgets(budgets: Mapping[str, ErrorBudget], path: str | os.PathLike[str]) -> None:
    """Bars of every source of every run, and the error along each run, per element of the data.

    Args:
        budgets: by label, at most four.
        path: of the PNG.
    """
    figure, (left, right) = _figure(2, (10.0, 3.9))
    width = 0.8 / len(budgets)
    for i, (label, budget) in enumerate(budgets.items()):
        values = [w2 / budget.dimension**0.5 for w2 in _sources(budget)]
        position = np.arange(len(values)) + (i - (len(budgets) - 1) / 2) * width
        left.bar(position, values, width * 0.92, color=_COLOURS[i % 4], label=label)
    positive = [v / b.dimension**0.5 for b in budgets.values() for v in _sources(b) if v > 1e-12]
    if positive:
        left.set_yscale("log")
        left.set_ylim(min(positive) / 3, max(positive) * 3)
    left.set_xticks(range(len(SOURCES) + 1), [*SOURCES, "total"], rotation=20)
    left.set(ylabel="W2 per element", title="Error by source")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=2, fontsize=9)
    for i, (label, budget) in enumerate(budgets.items()):
        progress = np.linspace(0, 1, len(budget.steps))
        along = np.maximum(budget.steps, 1e-16) / budget.dimension**0.5
        right.plot(progress, along, color=_COLOURS[i % 4], label=label, linewidth=1.5, marker="o", markersize=2.5)
    right.set(yscale="log", xlabel="part of the run's steps", ylabel="W2 to the exact marginal", title="Along the run")
    floor = min((v / b.dimension**0.5 for b in budgets.values() for v in b.steps if v > 1e-10), default=1e-10)
    right.set_ylim(bottom=floor / 3)
    _save(figure, path)


def _sources(budget: ErrorBudget) -> list[float]:
    """W2 of every source, then of all together."""
    return [*(budget.sources[name].w2 for name in SOURCES), budget.total.w2]


def plot_score_error(report: ScoreErrorReport, path: str | os.PathLike[str]) -> None:
    """Mean squared error of the score, and of the noise it implies, against the noise level."""
    figure, (left, right) = _figure(2, (9.0, 3.6))
    entries = sorted(report.timesteps, key=_ratio)
    ratio = [_ratio(e) for e in entries]
    left.plot(ratio, [e.mse for e in entries], color=_COLOURS[0], marker="o", markersize=3)
    left.fill_between(ratio, [e.low for e in entries], [e.high for e in entries], color=_COLOURS[0], alpha=0.25)
    left.scatter([_ratio(report.worst)], [report.worst.mse], color=_COLOURS[1], zorder=3, label="worst")
    left.axhline(report.mean, color="#666666", linewidth=1, linestyle="--", label="mean")
    left.legend(frameon=False)
    left.set(ylabel="MSE of the score", title=f"{report.confidence:.0%} intervals, {report.samples} samples")
    right.plot(ratio, [e.weighted for e in entries], color=_COLOURS[2], marker="o", markersize=3)
    right.set(ylabel="MSE of the noise, σ² times it", title="Comparable between levels")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="σ / α")
    _save(figure, path)


def plot_sample_complexity(result: SampleComplexity, path: str | os.PathLike[str]) -> None:
    """Error against the number of samples, with the fitted rate."""
    figure, (axis,) = _figure(1, (5.0, 3.8))
    for n, errors in zip(result.sizes, result.errors, strict=True):
        axis.scatter([n] * len(errors), errors, color=_COLOURS[0], s=8, alpha=0.35)
    below = np.array(result.means) - np.array(result.lows)
    above = np.array(result.highs) - np.array(result.means)
    axis.errorbar(result.sizes, result.means, yerr=[below, above], color=_COLOURS[0], marker="o", linestyle="none")
    sizes = np.array(result.sizes, dtype=float)
    label = f"rate {result.rate:.2f} ({result.rate_low:.2f} to {result.rate_high:.2f})"
    axis.plot(sizes, result.constant * sizes**-result.rate, color=_COLOURS[1], label=label)
    axis.set(xscale="log", yscale="log", xlabel="samples n", ylabel="error")
    axis.legend(frameon=False)
    _save(figure, path)


def _ratio(entry: TimestepError) -> float:
    """sigma / alpha, at most 10^4, for an axis on which pure noise has a place."""
    return entry.sigma / max(entry.alpha, 1e-4 * entry.sigma)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # Figure and its own canvas, not pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Under a temporary name first: what lies at `path` is always complete."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.png")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
