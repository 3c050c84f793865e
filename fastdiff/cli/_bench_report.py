"""The record of a benchmark as a table, and as a picture."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from fastdiff.cli._bench_engine import EVEN
from fastdiff.cli._table import Cell, Table

_STANDARD = ("eager", "compile")
_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def table(record: dict[str, Any]) -> Table:
    """One line per row: our time, how many times longer each baseline takes, and the share of the machine's ceiling."""
    found = Table(
        ("op", "shape", "dtype", "fastdiff µs", "eager", "compile", "peers", "GB/s", "of copy", "error/tol"),
        frozenset({"fastdiff µs", "eager", "compile", "GB/s", "of copy", "error/tol"}),
        title="ratio = baseline time / fastdiff time (baseline µs); above 1 fastdiff is faster",
    )
    none = Cell("–", "dim")
    for row in record["rows"]:
        name = row["op"] + ("\n+ backward" if row["mode"] == "forward+backward" else "")
        error = none
        if row["error"] is not None:
            error = Cell(f"{row['error']:.2f}", "bad" if row["error"] > 1 else "")
        if row["problem"]:
            found.add(name, row["shape"], row["dtype"], Cell("FAILED", "bad"), *[none] * 5, error)
            continue
        ours = row["times"]["fastdiff"]
        peers = [peer for peer in row["ratios"] if peer not in _STANDARD]
        worst = min((row["ratios"][peer]["median"] for peer in peers), default=0.0)
        lines = [f"{peer} {_ratio(row, peer)}" for peer in peers]
        share = row["share_of_matmul"]
        found.add(
            name,
            row["shape"],
            row["dtype"],
            f"{_us(ours['median_us'])} ({_us(ours['q1_us'])}–{_us(ours['q3_us'])})",
            *(_ratio_cell(row, baseline) for baseline in _STANDARD),
            Cell("\n".join(lines) or "–", _style(worst) if peers else "dim"),
            none if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}",
            none
            if row["share_of_copy"] is None
            else f"{row['share_of_copy']:.0%}" + (f"\n{share:.0%} of matmul" if share is not None else ""),
            error,
        )
    return found


def notes(record: dict[str, Any]) -> list[str]:
    """What the table leaves out: failures, missing baselines, the machine, and how it was measured."""
    lines = []
    for row in record["rows"]:
        if row["problem"]:
            lines.append(f"FAILED {row['op']} {row['shape']} {row['dtype']} {row['mode']}: {row['problem']}")
    missing: dict[tuple[str, str, str], int] = {}
    for row in record["rows"]:
        for name, why in row["unavailable"].items():
            missing[row["op"], name, why] = missing.get((row["op"], name, why), 0) + 1
    lines += [f"no {name} for {op} in {count} row(s): {why}" for (op, name, why), count in missing.items()]
    if record["not_measured"]:
        lines.append("not measured: " + "; ".join(record["not_measured"]))
    lines.append(machine_line(record))
    return lines


def markdown(record: dict[str, Any]) -> str:
    """The table and its notes as a Markdown page."""
    found = table(record)
    lines = "\n".join(f"- {line}" for line in notes(record))
    return f"# {record['summary']}\n\n{found.title}.\n\n{found.markdown()}\n\n{lines}\n\n{record['method']}\n"


def machine_line(record: dict[str, Any]) -> str:
    """The machine and how busy it was."""
    m = record["machine"]
    gpu = ", ".join(gpu["name"] for gpu in m["gpus"])
    where = f"{record['device']}: {gpu}" if record["device"] != "cpu" else m["cpu"]
    load = m["load_average"]
    busy = f", load {load[0]:.1f}" if load else ""
    after = m.get("load_average_after")
    busy += f" to {after[0]:.1f}" if after else ""
    return (
        f"{where}; {m['cores']} cores, {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; "
        f"fastdiff {m['version']}; {m['date']}{busy}"
    )


def _ratio(row: dict[str, Any], baseline: str) -> str:
    return f"{_number(row['ratios'][baseline]['median'])}× ({_us(row['times'][baseline]['median_us'])})"


def _ratio_cell(row: dict[str, Any], baseline: str) -> Cell:
    if baseline not in row["ratios"]:
        return Cell("–", "dim")
    return Cell(_ratio(row, baseline), _style(row["ratios"][baseline]["median"]))


def _style(ratio: float) -> str:
    """A loss is as visible as a win."""
    return "bad" if ratio < 1 - EVEN else "good" if ratio >= 1 + EVEN else ""


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else _number(value)


def plot(record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a PNG: one panel per operator, one bar per baseline, the line at 1 where fastdiff is as fast.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no ratio to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["ratios"]:
            groups.setdefault(row["op"], []).append(row)
    if not groups:
        raise ValueError("no row has a ratio to draw")
    names = list(dict.fromkeys(name for rows in groups.values() for row in rows for name in row["ratios"]))
    color = dict(zip(names, _COLORS * (1 + len(names) // len(_COLORS)), strict=False))
    everything = [r for rows in groups.values() for row in rows for r in row["ratios"].values()]
    low = min(0.7, *(0.8 * r["q1"] for r in everything))
    high = 1.4 * max(2.0, *(r["q3"] for r in everything))

    slots = {op: sum(len(row["ratios"]) + 0.9 for row in rows) + 2.5 for op, rows in groups.items()}
    columns = _columns(slots)
    tallest = max(sum(slots[op] for op in column) for column in columns)
    figure = plt.figure(figsize=(9.5 * len(columns), 1.7 + 0.19 * tallest), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)
    for part, column in zip(parts[0], columns, strict=True):
        spare = tallest - sum(slots[op] for op in column)  # so that bars are as thick in every column
        heights = [slots[op] for op in column] + [spare] * (spare > 0)
        axes = part.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axis in axes[len(column) :]:
            axis.axis("off")
        for axis, op in zip(axes, column, strict=False):
            _panel(axis, groups[op], color)
            axis.set_xscale("log")
            axis.set_xlim(low, high)
            axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", which="both", length=0, labelsize=8, labelbottom=op == column[-1])
        axes[len(column) - 1].set_xlabel(
            "baseline time / fastdiff time (median; line: quartiles); left of 1× fastdiff is slower"
        )
    handles = [Patch(color=color[name]) for name in names]
    legend_names = [{"eager": "PyTorch eager", "compile": "torch.compile"}.get(name, name) for name in names]
    figure.suptitle("How many times faster is fastdiff?", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.legend(handles, legend_names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=9)
    figure.text(0.01, -0.005, machine_line(record), fontsize=7, color="#555555", va="top")
    save_figure(figure, path)
    plt.close(figure)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a PNG whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / "bench.png"
        figure.savefig(whole, dpi=150, bbox_inches="tight", facecolor="white", format="png")
        os.replace(whole, target)


def _columns(slots: dict[str, float]) -> list[list[str]]:
    """Operators in one column, or, where that would be a very tall picture, in two of about the same height."""
    whole, names = sum(slots.values()), list(slots)
    if whole < 70 or len(names) < 2:
        return [names]
    cuts = range(1, len(names))
    cut = min(cuts, key=lambda i: max(sum(slots[n] for n in names[:i]), sum(slots[n] for n in names[i:])))
    return [names[:cut], names[cut:]]


def _panel(axis: Any, rows: list[dict[str, Any]], color: dict[str, str]) -> None:
    """One operator: a group of bars for every row."""
    position, ticks, labels = 0.0, [], []
    for row in rows:
        first = position
        for name, ratio in row["ratios"].items():
            median = ratio["median"]
            # On a logarithmic axis a bar's length means something only from 1 on: to the left of it we are slower.
            axis.barh(position, median - 1, left=1, height=0.86, color=color[name], zorder=2)
            axis.plot([ratio["q1"], ratio["q3"]], [position, position], color="#222222", lw=0.9, zorder=3)
            axis.text(
                max(1, median, ratio["q3"]) * 1.03, position, f"{_number(median)}×", va="center", fontsize=7,
                color="#b00020" if _style(median) == "bad" else "#222222", zorder=4,
            )  # fmt: skip
            position += 1.0
        ticks.append((first + position - 1) / 2)
        labels.append(f"{row['shape']} {row['dtype']}")
        position += 0.9
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_ylim(position - 1.2, -0.8)
    axis.axvline(1.0, color="#222222", lw=1.3, zorder=3)
    title = rows[0]["op"] + (" + backward" if rows[0]["mode"] == "forward+backward" else "")
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axis.grid(axis="x", color="#dddddd", lw=0.6, zorder=0)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
