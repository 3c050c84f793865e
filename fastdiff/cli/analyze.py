"""``fastdiff analyze``: where the error of a sampling run comes from, and what would be better.

Exact, without sampling anything: data are taken to be Gaussian with a given spectrum, for which the law of the result
of every solver is known (`fastdiff.analysis.error_budget`). Nothing is trained and no model is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastdiff.analysis import Candidate, ErrorBudget, GaussianOracle
    from fastdiff.cli._table import Table
    from fastdiff.samplers.schedules import Schedule

__all__ = ["AnalyzeError", "AnalyzeSettings", "analyze", "run_analysis"]

SCHEDULES = ("vp", "edm", "flow")
_ONLY_FOR = {
    "betas": ("vp",),
    "spacing": ("vp",),
    "final": ("vp", "edm"),
    "zero_terminal_snr": ("vp",),
    "shift": ("flow",),
    "sigma_max": ("edm",),
}


class AnalyzeError(Exception):
    """A wrong option: reported without a traceback."""


@dataclass(frozen=True)
class AnalyzeSettings:
    """The run to be analysed, and the data; see the command's options."""

    solver: str = "ddim"
    schedule: str = "vp"
    steps: int = 20
    prediction: str | None = None
    betas: str = "linear"
    spacing: str = "linspace"
    final: str = "zero"
    zero_terminal_snr: bool = False
    shift: float = 1.0
    sigma_max: float = 80.0
    target_std: float = 0.5
    target_mean: float = 0.0
    spectrum: str = "power:1"
    dimension: int = 64
    score_error: float = 0.0
    optimise: bool = True


def analyze(
    solver: Annotated[str, typer.Option(help="Solver of the run.")] = "ddim",
    schedule: Annotated[str, typer.Option(help="vp, edm or flow.")] = "vp",
    steps: Annotated[int, typer.Option(help="Steps of the run.")] = 20,
    prediction: Annotated[
        str | None,
        typer.Option(
            help="What the network predicts: epsilon, v, sample or flow (default: flow for flows, else epsilon).",
            show_default=False,
        ),
    ] = None,
    betas: Annotated[str, typer.Option(help="vp: linear, scaled_linear or cosine.")] = "linear",
    spacing: Annotated[str, typer.Option(help="vp: linspace, trailing, leading or karras.")] = "linspace",
    final: Annotated[
        str, typer.Option(help="vp, edm: end at sigma = 0 (zero) or at the smallest sigma (min).")
    ] = "zero",
    zero_terminal_snr: Annotated[
        bool, typer.Option("--zero-terminal-snr", help="vp: noise levels rescaled to start at pure noise.")
    ] = False,
    shift: Annotated[float, typer.Option(help="flow: shift of the times towards noise.")] = 1.0,
    sigma_max: Annotated[float, typer.Option(help="edm: the largest noise level.")] = 80.0,
    target_std: Annotated[float, typer.Option(help="Standard deviation of the data, per element.")] = 0.5,
    target_mean: Annotated[float, typer.Option(help="Mean of the data, along every direction.")] = 0.0,
    spectrum: Annotated[
        str,
        typer.Option(
            help="Variances of the data by direction, relative to target-std^2: power:A for k^-A (natural images: "
            "about power:1), or numbers such as 4,1,0.25; scaled to mean 1."
        ),
    ] = "power:1",
    dimension: Annotated[int, typer.Option(help="Directions of a power:A spectrum.")] = 64,
    score_error: Annotated[
        float, typer.Option(help="Relative error of the network's output, e.g. 0.01; 0: a perfect network.")
    ] = 0.0,
    optimise: Annotated[bool, typer.Option(help="Also optimise the times of the best run for this data.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and analysis.png.")] = Path("fastdiff-analysis"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only, on standard output.")] = False,
) -> None:
    """Split the error of a sampling run by source, exactly, and recommend a better run of the same cost.

    Sources: truncation (the run stops before the data), discretisation (its steps), initialisation (it starts from pure
    noise) and score (the network's error). Exits with 1 on a wrong option.
    """
    from rich.console import Console

    from fastdiff.cli._show import progress_bar, show
    from fastdiff.cli._table import to_json

    settings = AnalyzeSettings(
        solver, schedule, steps, prediction, betas, spacing, final, zero_terminal_snr, shift, sigma_max,
        target_std, target_mean, spectrum, dimension, score_error, optimise,
    )  # fmt: skip
    try:
        with progress_bar("analyze") as report:
            results = run_analysis(settings, out, progress=report)
    except (AnalyzeError, ImportError, OSError) as error:
        if as_json:
            typer.echo(to_json({"ok": False, "error": str(error)}))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(to_json(results))
        return
    show(_table(results), Console())
    for line in results["summary"]:
        typer.echo(line)
    typer.echo(f"saved {out / 'analysis.json'} and {out / 'analysis.png'}")


def run_analysis(
    settings: AnalyzeSettings, out: Path, *, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Does what ``fastdiff analyze`` does.

    Args:
        settings: the run and the data.
        out: folder for analysis.json and analysis.png, made if missing; files of these names are replaced.
        progress: ``progress(done, total, label)``.

    Returns:
        The figures, as in analysis.json.

    Raises:
        AnalyzeError: an option is not one of those allowed, out of range, or of another schedule.
        OSError: files cannot be written in `out`.
        ImportError: matplotlib is missing.
    """
    from fastdiff.analysis import ADVICE, ModelError, better_runs, error_budget, plot_budgets, steps_for
    from fastdiff.cli._table import check_folder, to_json, write_text
    from fastdiff.samplers import make_plan

    check_folder(out)
    _check_unused(settings)
    oracle = _data(settings)
    error = ModelError(relative=settings.score_error)
    prediction = settings.prediction or ("flow" if settings.schedule == "flow" else "epsilon")
    try:
        given_name, given_schedule = _given_schedule(settings)
        plan = make_plan(settings.solver, given_schedule, settings.steps, prediction=prediction)
        given = error_budget(oracle, plan, error=error)
        found = better_runs(
            oracle, _alternatives(settings), given.nfe, prediction=prediction, error=error,
            optimise=settings.optimise, progress=progress,
        )  # fmt: skip
    except ValueError as problem:
        raise AnalyzeError(str(problem)) from problem
    if not math.isfinite(given.total.w2):
        raise AnalyzeError(
            f"--steps: {settings.solver} in {settings.steps} steps does not stay finite on this schedule"
        )
    best = found[0]
    cost = sum(source.w2 for source in given.sources.values())
    improves = best.cost < cost
    enough = None
    if improves:
        enough = steps_for(
            oracle, best.plan.schedule, best.solver, cost, prediction=prediction, error=error, most=best.plan.steps
        )

    results: dict[str, Any] = {
        "ok": True,
        "settings": asdict(settings),
        "dimension": given.dimension,
        "given": _row(settings.solver, given_name, settings.steps, given),
        "recommended": _candidate(best) if improves else None,
        "steps_to_match": enough,
        "candidates": [_candidate(c) for c in found],
        "advice": ADVICE[given.dominating] if given.total.w2 > 0 else "nothing to improve",
    }
    if improves:
        results["recommended"]["times"] = best.plan.times.tolist()
        results["recommended"]["interpolation"] = best.plan.interpolation
    results["summary"] = _summary(results)
    budgets = {f"given: {settings.solver}, {given_name}": given}
    if improves:
        budgets[f"recommended: {best.solver}, {best.schedule}"] = best.budget
    plot_budgets(budgets, out / "analysis.png")
    write_text(out / "analysis.json", to_json(results) + "\n")
    return results


# ------------------------------------------------------------------------------------------------ options to objects


def _data(settings: AnalyzeSettings) -> GaussianOracle:
    import torch

    from fastdiff.analysis import GaussianOracle

    if not (settings.target_std > 0 and math.isfinite(settings.target_std)):
        raise AnalyzeError(f"--target-std: expected a number > 0, got {settings.target_std}")
    if not math.isfinite(settings.target_mean) or not math.isfinite(settings.score_error):
        raise AnalyzeError("--target-mean, --score-error: expected finite numbers")
    if settings.dimension < 1:
        raise AnalyzeError(f"--dimension: expected at least 1, got {settings.dimension}")
    text = settings.spectrum
    try:
        if text.startswith("power:"):
            relative = torch.arange(1, settings.dimension + 1, dtype=torch.float64) ** -float(text[len("power:") :])
        else:
            relative = torch.tensor([float(part) for part in text.split(",")], dtype=torch.float64)
    except ValueError:
        raise AnalyzeError(f"--spectrum: expected power:A or numbers like 4,1,0.25, got {text!r}") from None
    if not bool((relative > 0).all()) or not bool(torch.isfinite(relative).all()):
        raise AnalyzeError(f"--spectrum: expected variances > 0, got {text!r}")
    std = settings.target_std * (relative / relative.mean()).sqrt()
    return GaussianOracle(torch.full_like(std, settings.target_mean), std=std)


def _check_unused(settings: AnalyzeSettings) -> None:
    """An option of another schedule would change nothing, and its user would not know."""
    default = AnalyzeSettings()
    for name, users in _ONLY_FOR.items():
        other = settings.schedule in SCHEDULES and settings.schedule not in users
        if other and getattr(settings, name) != getattr(default, name):
            option = "--" + name.replace("_", "-")
            raise AnalyzeError(f"{option}: expected only with --schedule {' or '.join(users)}")


def _given_schedule(settings: AnalyzeSettings) -> tuple[str, Schedule]:
    from fastdiff.samplers import schedules

    if settings.schedule == "vp":
        return _vp(settings, settings.spacing, settings.final)
    if settings.schedule == "edm":
        made = schedules.edm(sigma_max=settings.sigma_max, final=settings.final)
        return f"edm {settings.final}", made
    if settings.schedule == "flow":
        return f"flow shift {settings.shift:g}", schedules.flow(settings.shift)
    raise AnalyzeError(f"--schedule: expected one of {', '.join(SCHEDULES)}, got {settings.schedule!r}")


def _vp(settings: AnalyzeSettings, spacing: str, final: str) -> tuple[str, Schedule]:
    from fastdiff.samplers import schedules

    zero = settings.zero_terminal_snr
    name = f"vp {settings.betas} {spacing} {final}" + (" zero-snr" if zero else "")
    return name, schedules.vp(settings.betas, spacing=spacing, final=final, zero_terminal_snr=zero)


def _alternatives(settings: AnalyzeSettings) -> dict[str, Schedule]:
    """Schedules that the same network can be run on: its noise levels on other times."""
    from fastdiff.samplers import schedules

    found = dict([_given_schedule(settings)])
    if settings.schedule == "vp":
        for spacing in ("trailing", "karras"):
            for final in ("zero", "min"):
                name, made = _vp(settings, spacing, final)
                found[name] = made
    elif settings.schedule == "edm":
        for final in ("zero", "min"):
            found[f"edm {final}"] = schedules.edm(sigma_max=settings.sigma_max, final=final)
    else:
        for shift in (0.5, 1.0, 2.0, 3.0):
            found[f"flow shift {shift:g}"] = schedules.flow(shift)
    return found


# ----------------------------------------------------------------------------------------------------------- results


def _row(solver: str, schedule: str, steps: int, budget: ErrorBudget) -> dict[str, Any]:
    return {"solver": solver, "schedule": schedule, "steps": steps, **budget.to_dict()}


def _candidate(found: Candidate) -> dict[str, Any]:
    return _row(found.solver, found.schedule, found.plan.steps, found.budget)


def _summary(results: dict[str, Any]) -> list[str]:
    given, best = results["given"], results["recommended"]
    source = given["dominating"]
    lines = [f"given: {source} dominates; {results['advice']}"]
    if best is None:
        return [
            *lines,
            f"none of the {len(results['candidates'])} runs tried, of at most {given['nfe']} evaluations, is better",
        ]
    factor = given["total"]["w2"] / best["total"]["w2"] if best["total"]["w2"] > 0 else math.inf
    gain = f"W2 {factor:.3g} times smaller"
    if factor < 1:  # chosen by the sum of the sources
        summed = [sum(source["w2"] for source in row["sources"].values()) for row in (given, best)]
        gain = f"sum of sources {summed[0] / summed[1]:.3g} times smaller (those of the given run cancel in part)"
    lines.append(
        f"recommended: {best['solver']} on {best['schedule']}, {best['steps']} steps, {best['nfe']} evaluations: "
        f"{gain}; {best['dominating']} dominates"
    )
    if results["steps_to_match"]:
        lines.append(f"as good as the given run: {best['solver']} in {results['steps_to_match']} steps")
    return lines


def _table(results: dict[str, Any]) -> Table:
    from fastdiff.analysis import SOURCES
    from fastdiff.cli._table import Cell, Table

    columns = ("run", "solver", "schedule", "steps", "NFE", *SOURCES, "total W2", "total KL")
    root = results["dimension"] ** 0.5
    title = "Error by source: W2 per element (units of the data), KL in nats"
    table = Table(columns, right=frozenset(columns[3:]), title=title)
    for label in ("given", "recommended"):
        row = results[label]
        if row is None:
            continue
        cells = [
            Cell(f"{row['sources'][name]['w2'] / root:.2e}", "bad" if name == row["dominating"] else "")
            for name in SOURCES
        ]
        table.add(
            label, row["solver"], row["schedule"], str(row["steps"]), str(row["nfe"]), *cells,
            f"{row['total']['w2'] / root:.2e}", f"{row['total']['kl']:.2e}",
        )  # fmt: skip
    return table
