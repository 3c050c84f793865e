"""Time and memory of one forward pass against the number of tokens: DiT, state-space and hybrid backbones.

    python -m benchmarks.token_scaling                        256 to 65,536 tokens, width 192, 2 blocks, batch 1
    python -m benchmarks.token_scaling --most 4096 --out DIR  fewer tokens; JSON, table and plot into DIR

Every point runs in a process of its own, so that its peak of resident memory is its own: the highest during the calls
less what was resident before the first. The time is the least of several calls (one suffices where it takes long), for
whatever else runs on the machine only adds to it; the processor's time of all threads is given besides, which a
neighbour hardly changes. Slopes are least-squares fits of log(time) and log(memory) against
log(tokens) over the upper half of the points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODELS = ("DiT", "Mamba", "hybrid")
PATCH, CHANNELS = 2, 4
COLORS = {"DiT": "#e45756", "Mamba": "#4c78a8", "hybrid": "#f2a541"}
CALLS, ENOUGH_SECONDS = 25, 3.0  # at most so many calls of a point, and none more after so long


def build(name: str, side: int, width: int, depth: int) -> Any:
    """A backbone for side x side tokens; its weights are random, which speed does not depend on."""
    import torch

    from fastdiff.models import DiffusionMamba, DiT, HybridDiffusion

    common: dict[str, Any] = {
        "input_size": side * PATCH, "patch_size": PATCH, "in_channels": CHANNELS, "hidden_size": width, "depth": depth,
        "num_classes": 0, "learn_sigma": False,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "DiT":
        model: Any = DiT(num_heads=width // 64, **common)
    elif name == "hybrid":
        model = HybridDiffusion(attention_every=2, num_heads=width // 64, **common)
    else:
        model = DiffusionMamba(**common)
    for p in model.parameters():  # not the zeros that training starts from
        p.data.add_(torch.randn_like(p) * 0.02)
    return model.eval().requires_grad_(False)


def point(name: str, tokens: int, width: int, depth: int) -> dict[str, Any]:
    """Time and memory of one model at one size, in this process."""
    import torch

    side = math.isqrt(tokens)
    model = build(name, side, width, depth)
    x, t = torch.randn(1, CHANNELS, side * PATCH, side * PATCH), torch.tensor([500.0])
    small = build(name, 4, width, depth)
    small(torch.randn(1, CHANNELS, 4 * PATCH, 4 * PATCH), t)  # libraries are loaded and threads started by now
    del small
    _forget_peak()
    before, times, busy = _memory("VmRSS"), [], []
    while not times or (sum(times) < ENOUGH_SECONDS and len(times) < CALLS):
        start, cpu = time.perf_counter(), time.process_time()
        out = model(x, t)
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    if not torch.isfinite(out).all():
        raise RuntimeError(f"{name} at {tokens} tokens: the prediction is not finite")
    parameters = sum(p.numel() for p in model.parameters())
    peak = _memory("VmHWM")
    memory = {"peak_bytes": peak - before, "resident_bytes": peak}
    return {"seconds": times, "cpu_seconds": busy, **memory, "parameters": parameters}


def _memory(field: str) -> int:
    """Bytes of this process: resident now (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _forget_peak() -> None:
    """The highest resident memory is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole record, one process per point and smallest sizes first, models in turns."""
    import torch

    from fastdiff.cli._machine import load_average, machine
    from fastdiff.cli._scaling import exponent

    sizes = [4**k for k in range(4, 12) if options.least <= 4**k <= options.most]
    record: dict[str, Any] = {
        "machine": machine(), "width": options.width, "depth": options.depth, "batch": 1, "dtype": "float32",
        "parameters": {}, "points": {name: {} for name in MODELS}, "slopes": {},
    }  # fmt: skip
    for tokens in sizes:
        for name in MODELS:
            say(f"{tokens} tokens: {name}")
            job = [sys.executable, "-m", "benchmarks.token_scaling", "--point", name, "--most", str(tokens)]
            job += ["--width", str(options.width), "--depth", str(options.depth)]
            threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "passive"}
            done = subprocess.run(job, capture_output=True, text=True, env={**os.environ, **threads}, check=False)
            if done.returncode:
                raise RuntimeError(f"{name} at {tokens} tokens failed:\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            record["parameters"][name] = found.pop("parameters")
            best = {"best_seconds": min(found["seconds"]), "best_cpu_seconds": min(found["cpu_seconds"])}
            record["points"][name][str(tokens)] = {**found, **best}
    for name, points in record["points"].items():
        if len(points) > 2:
            fields = {"time": "best_seconds", "cpu": "best_cpu_seconds", "memory": "peak_bytes"}
            values = {kind: {int(n): max(1e-9, p[field]) for n, p in points.items()} for kind, field in fields.items()}
            record["slopes"][name] = {kind: exponent(v) for kind, v in values.items()}
    record["machine"]["load_average_after"] = load_average()
    return record


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    sizes = list(record["points"]["DiT"])
    m = record["machine"]
    head = " | ".join(f"{int(n):,}" for n in sizes)
    lines = [
        "# One forward pass against the number of tokens",
        "",
        f"Width {record['width']}, {record['depth']} blocks, batch 1, {record['dtype']}; bidirectional scans; the "
        "hybrid attends in every second block. Slope: of log against log, upper half of the points.",
    ]
    kinds = (("time", "best_seconds", _time), ("cpu", "best_cpu_seconds", _time), ("memory", "peak_bytes", _mebibytes))
    titles = {"time": "time", "cpu": "time of all threads", "memory": "peak memory of the pass"}
    for kind, field, text in kinds:
        lines += ["", f"| {titles[kind]} | {head} | slope |", f"| --- | {' | '.join('---:' for _ in sizes)} | ---: |"]
        for name, points in record["points"].items():
            cells = " | ".join(text(points[n][field]) for n in sizes)
            lines.append(f"| {name} | {cells} | {record['slopes'].get(name, {}).get(kind, math.nan):.2f} |")
        for name in MODELS[1:]:
            cells = " | ".join(
                f"{record['points']['DiT'][n][field] / record['points'][name][n][field]:.2f}" for n in sizes
            )
            lines.append(f"| *DiT / {name}* | {cells} | |")
    where = f"{m['cpu']}; {m['cores']} cores, {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; {m['date']}"
    load = f"load average before and after: {m['load_average']}, {m['load_average_after']}"
    weights = ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in record["parameters"].items())
    return (
        "\n".join(
            [
                *lines,
                "",
                f"- parameters: {weights}",
                f"- {where}",
                f"- {load}",
                "- `python -m benchmarks.token_scaling`",
            ]
        )
        + "\n"
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """Time and memory, log-log, with lines of slope 1 and 2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fastdiff.cli._bench_report import save_figure

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    panels = (
        ("cpu", "best_cpu_seconds", 1.0, "time of all threads, seconds"),
        ("memory", "peak_bytes", 2.0**20, "peak memory of the pass, MiB"),
    )
    for axis, (kind, field, unit, label) in zip(axes, panels, strict=True):
        for name, points in record["points"].items():
            sizes = [int(n) for n in points]
            values = [points[n][field] / unit for n in points]
            slope = record["slopes"][name][kind]
            axis.loglog(sizes, values, "o-", color=COLORS[name], label=f"{name} ({slope:.2f})", base=10)
        sizes = [int(n) for n in record["points"]["Mamba"]]
        last = {name: points[str(sizes[-1])][field] / unit for name, points in record["points"].items()}
        guides = ((1, last["Mamba"] / 1.6), (2, last["DiT"] * 1.6)) if kind == "cpu" else ((1, last["Mamba"] / 2.5),)
        for power, end in guides:
            drawn = [n for n in sizes if n >= sizes[-1] / 64]
            line = [end * (n / sizes[-1]) ** power for n in drawn]
            style = "--" if power == 1 else ":"
            axis.loglog(drawn, line, style, color="#888888", linewidth=1, label=f"slope {power}")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8, title="measured slope, upper half", title_fontsize=8)
    m = record["machine"]
    where = f"{m['cores']} cores, {m['cpu_isa']}"
    title = f"One forward pass, width {record['width']}, {record['depth']} blocks, batch 1 ({where})"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save_figure(figure, path)
    plt.close(figure)


def save(text: str, path: Path) -> None:
    """Under a temporary name first: a reader never finds half a file."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _mebibytes(n: float) -> str:
    return f"{n / 2**20:.0f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--least", type=int, default=256, help="tokens; sizes are the powers of 4 from here")
    parser.add_argument("--most", type=int, default=65_536, help="to here")
    parser.add_argument("--width", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--out", metavar="DIR", help="write token-scaling.json, .md and .png there")
    parser.add_argument("--point", choices=MODELS, help=argparse.SUPPRESS)  # one model, at --most tokens
    options = parser.parse_args(arguments)
    if options.width % 64 or options.depth < 2:
        parser.error("expected --width a multiple of 64 and --depth at least 2 (the hybrid's second block attends)")
    if options.point:
        print(json.dumps(point(options.point, options.most, options.width, options.depth)))
        return 0
    record = measure(options, lambda line: print(line, file=sys.stderr, flush=True))
    page = markdown(record)
    print(page, end="")
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        save(json.dumps(record, indent=1) + "\n", out / "token-scaling.json")
        save(page, out / "token-scaling.md")
        if record["slopes"]:
            plot(record, out / "token-scaling.png")
    return 0


if __name__ == "__main__":
    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    sys.exit(main())
