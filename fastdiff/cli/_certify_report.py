"""The certificate for people: tables, a Markdown page and a picture of errors against model evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from fastdiff.cli._bench_report import save_figure
from fastdiff.cli._table import Cell, Table

__all__ = ["adaptive_table", "markdown", "notes", "orders_table", "peer_table", "plot", "table"]

_COMMAND = "fastdiff certify"


def table(record: dict[str, Any]) -> Table:
    """A line for every solver: the worst of all schedules and prediction types."""
    found = Table(
        (
            "solver",
            "promised",
            "observed",
            "elsewhere",
            "all schedules",
            "inverse",
            "error at 160",
            "float32",
            "bfloat16",
            "runs",
            "NaN",
            "",
        ),
        frozenset({"observed", "inverse", "error at 160", "float32", "bfloat16", "runs", "NaN"}),
        title="order in float64 (reference schedule; promise elsewhere, range over all), that of inversions on the "
        "reference schedule, largest error at 160 evaluations there, float32 and bfloat16 rounding as a share of what "
        "is allowed, runs that must be finite",
    )
    reference = next(iter(record["schedules"]), "")
    for solver, promise in record["promises"].items():
        inverse, cells = _ways(record, solver)
        home = [cell for cell in cells if cell["schedule"] == reference]
        finite = [cell for cell in record["finite"] if cell["solver"] == solver]
        bad = sum(len(cell["not_finite"]) + len(cell["raised"]) for cell in finite)
        broken = sum(line.startswith(f"{solver} ") for line in record["broken"])
        errors = [_error_at(cell, promise["error_calls"]) for cell in home]
        found.add(
            solver,
            promise["text"] + (" (moments)" if promise["stochastic"] else ""),
            _range([cell["order"] for cell in home]) if promise["order"] else "–",
            promise["elsewhere"] if promise["order"] else "–",
            _range([cell["order"] for cell in cells]) if promise["order"] else "–",
            _range([cell["order"] for cell in inverse if cell["schedule"] == reference]),
            f"{max(errors):.1e}" if errors else "–",
            _share(record, solver, "float32"),
            _share(record, solver, "bfloat16"),
            str(sum(cell["runs"] for cell in finite)),
            Cell(str(bad), "bad" if bad else ""),
            Cell(f"BROKEN {broken}", "bad") if broken else Cell("kept", "good"),
        )
    return found


def orders_table(record: dict[str, Any]) -> Table:
    """Observed orders by solver and schedule: the range over prediction types."""
    schedules = [s for s in record["schedules"] if any(cell["schedule"] == s for cell in record["order"])]
    found = Table(("solver", *schedules), frozenset(schedules), title="observed order, float64")
    for solver, promise in record["promises"].items():
        if not promise["order"]:
            continue  # a fixed number of steps, or no probability flow to follow
        row = [_range([c["order"] for c in _ways(record, solver)[1] if c["schedule"] == name]) for name in schedules]
        found.add(solver, *row)
    return found


def adaptive_table(record: dict[str, Any]) -> Table:
    """The adaptive solver by schedule and tolerance: the worst of all prediction types."""
    tolerances = sorted({run["tolerance"] for cell in record["adaptive"] for run in cell["runs"]}, reverse=True)
    names = [f"{way}{tolerance:g}" for way in ("", "inverse ") for tolerance in tolerances]
    found = Table(
        ("schedule", *names, ""), frozenset(names),
        title="adaptive solver, float64: error as a share of what is allowed (evaluations) by tolerance",
    )  # fmt: skip
    for name in dict.fromkeys(cell["schedule"] for cell in record["adaptive"]):
        cells = [cell for cell in record["adaptive"] if cell["schedule"] == name]
        row = []
        for inverse in (False, True):
            for tolerance in tolerances:
                runs = [r for c in cells for r in c["runs"] if (r["inverse"], r["tolerance"]) == (inverse, tolerance)]
                worst = max((r["error"] / r["allowed"] for r in runs), default=math.nan)
                row.append(f"{worst:.2f} ({max((r['nfe'] for r in runs), default=0)})")
        kept = all(cell["ok"] for cell in cells)
        found.add(name, *row, Cell("kept", "good") if kept else Cell("BROKEN", "bad"))
    return found


def peer_table(record: dict[str, Any]) -> Table:
    """diffusers' schedulers, measured in the same way."""
    peers = record["diffusers"]
    found = Table(
        ("diffusers scheduler", "method's order", "observed", "own levels", "error at 160", "NaN or exception"),
        frozenset({"method's order", "observed", "own levels", "error at 160"}),
        title=f"diffusers {peers['version']}, float64 input, model asked at the timestep given to it "
        "(own levels: at the noise level that the scheduler computes with)",
    )
    for row in peers["rows"]:
        if "problem" in row:
            found.add(row["name"], "–", "–", "–", "–", Cell(row["problem"], "bad"))
            continue
        bad = [*map(str, row["not_finite"]), *row["raised"]]
        lost = not row["order"] > row["nominal_order"] - 0.25
        found.add(
            row["name"],
            str(row["nominal_order"]),
            Cell(_number(row["order"]), "bad" if lost else ""),
            _number(row["order_own_level"]),
            f"{_error_at(row, 160):.1e}",
            Cell(f"{len(bad)} of {row['finite_checked']} step counts, first {bad[0]}", "bad") if bad else "none",
        )
    return found


def notes(record: dict[str, Any]) -> list[str]:
    """What was skipped, and what diffusers warned of."""
    lines = [f"skipped {line}" for line in record["skipped"]]
    if record["diffusers"]:
        heard: dict[str, int] = {}
        for row in record["diffusers"]["rows"]:
            for line in row["warnings"]:
                heard[line] = heard.get(line, 0) + 1
        lines += [f"diffusers warned ({count} schedulers): {line[:160]}" for line, count in heard.items()]
    return lines


def markdown(record: dict[str, Any]) -> str:
    """All tables as a page."""
    m = record["machine"]
    parts = [f"# Certificate of the samplers: {record['summary']}", f"`{_COMMAND}` prints and writes this page."]
    parts += [f"- **broken** {line}" for line in record["broken"]]
    made_all = [table(record), orders_table(record)] if record["promises"] else []
    made_all += [adaptive_table(record)] if record["adaptive"] else []
    for made in (*made_all, *([peer_table(record)] if record["diffusers"] else [])):
        parts += [f"## {made.title[0].upper()}{made.title[1:]}", made.markdown()]
    parts.append("![errors](certificate.png)")
    parts.append("\n".join(f"- {line}" for line in notes(record)))
    parts.append(record["method"])
    parts.append(
        f"{m['cpu']}; {m['cores']} cores, {m['cpu_isa']}; torch {m['torch']}; fastdiff {m['version']}; {m['date']}"
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a PNG: errors against model evaluations, log-log; ours on the reference schedule, diffusers' beside.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reference = next(iter(record["schedules"]))
    ours = [
        (f"{c['solver']}  {_number(c['order'])}", c["nfe"], c["errors"])
        for c in record["order"]
        if c["schedule"] == reference
        and c["prediction"] == "epsilon"
        and c["errors"]
        and not c.get("inverse")
        and record["promises"][c["solver"]]["order"]
    ]
    for cell in record["adaptive"]:
        if (cell["schedule"], cell["prediction"]) == (reference, "epsilon"):
            runs = [r for r in cell["runs"] if not r["inverse"]]
            ours.append((cell["solver"], [r["nfe"] for r in runs], [r["error"] for r in runs]))
    panels = [(f"fastdiff, {reference}, epsilon", ours)]
    if record["diffusers"]:
        rows = [row for row in record["diffusers"]["rows"] if "problem" not in row]
        theirs = [(f"{row['name']}  {_number(row['order'])}", row["nfe"], row["errors"]) for row in rows]
        panels.append((f"diffusers {record['diffusers']['version']}, as shipped", theirs))
    figure, axes = plt.subplots(1, len(panels), figsize=(7.6 * len(panels), 6.2), squeeze=False, sharey=True)
    colors, markers = plt.get_cmap("tab20").colors, "osv^D"
    smallest = 1e-9
    for axis, (title, curves) in zip(axes[0], panels, strict=True):
        for i, (label, nfe, errors) in enumerate(curves):
            points = [(n, max(e, smallest)) for n, e in zip(nfe, errors, strict=True) if math.isfinite(e) and n <= 400]
            style = {"color": colors[i % 20], "marker": markers[i % len(markers)], "lw": 1.4, "ms": 4}
            axis.loglog(*(zip(*points, strict=True) if points else ([], [])), label=label, **style)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel("model evaluations")
        axis.set_xticks([20, 40, 80, 160, 320], ["20", "40", "80", "160", "320"])
        axis.minorticks_off()
        axis.set_xlim(9, 420)
        axis.set_ylim(smallest / 2, 3)
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, loc="lower left", ncols=2, title="observed order", title_fontsize=8, frameon=False)
    axes[0][0].set_ylabel("largest error against the exact path")
    figure.suptitle("Samplers against exact probability-flow paths", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def _ways(record: dict[str, Any], solver: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cells of a solver's order: inversions, and the rest."""
    cells = [cell for cell in record["order"] if cell["solver"] == solver]
    return [c for c in cells if c.get("inverse")], [c for c in cells if not c.get("inverse")]


def _share(record: dict[str, Any], solver: str, dtype: str) -> Cell:
    cells = [c for c in record["precision"] if c["solver"] == solver and c["dtype"] == dtype and "allowed" in c]
    if not cells:
        return Cell("–", "dim")
    worst = max((c["error"] / c["allowed"] if math.isfinite(c["error"]) else math.inf) for c in cells)
    return Cell(f"{worst:.2f}", "bad" if worst > 1 else "")


def _error_at(cell: dict[str, Any], calls: int) -> float:
    """The error at the most evaluations up to so many."""
    errors = [error for called, error in zip(cell["nfe"], cell["errors"], strict=True) if called <= calls]
    return errors[-1] if errors else math.nan


def _range(values: Sequence[float | None]) -> str:
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    if len(numbers) < len(values) or not numbers:
        return "NaN" if values else "–"
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return low if low == high else f"{low} – {high}"


def _number(value: float | None) -> str:
    return "NaN" if value is None or not math.isfinite(value) else f"{value:.2f}"
