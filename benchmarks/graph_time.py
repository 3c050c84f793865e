"""What a call costs inside a CUDA graph, and how many kernels it launches: the launch-bound end of the targets.

    python -m benchmarks.graph_time --device cuda --json DATE-gpu-graph.json

A graph of 20 calls one after the other, replayed: host time is out of it, and data are where the last call left them,
mostly in the L2 cache, as in a sampling loop. A call that reads the device from the host cannot be captured and fails.
On the CPU calls are timed as they are, to test this script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CALLS, REPLAYS = 20, 30
CASES = {
    "adaln_modulate": ("[2,256,1152]",),
    "gate_residual": ("[2,256,1152]",),
    "gate_residual_adaln": ("[2,256,1152]",),
    "linear_update": ("(1,4,64,64)", "(8,4,128,128)", "(16,16,256,256)"),
    "euler_step": ("(1,4,64,64)", "(8,4,128,128)", "(16,16,256,256)"),
    "ddim_step": ("(1,4,64,64)", "(8,4,128,128)", "(16,16,256,256)"),
    "spectral_features": ("[16,3,256,256]", "[16,3,512,512]"),
    "radial_spectrum": ("[16,3,256,256]", "[16,3,512,512]"),
}


def graph_us(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of one call among `CALLS` in a graph: the median over replays."""
    if device.type != "cuda":
        call()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    side: Any = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    event: Any = torch.cuda.Event
    times = []
    for _ in range(REPLAYS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels that one call starts on a GPU; None where the profiler does not see them."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels) or None


def measure(device: torch.device) -> dict[str, Any]:
    """A record with one row per operator and shape; a row that fails says why and the others are still measured."""
    from fastdiff import _native
    from fastdiff.cli._machine import machine
    from fastdiff.ops import SPECS
    from fastdiff.ops._gpu_shapes import SHAPES

    rows: list[dict[str, Any]] = []
    for name, shapes in CASES.items():
        for shape in shapes:
            row: dict[str, Any] = {"op": name, "shape": shape, "dtype": "bfloat16", "mode": "forward", "ratios": {}}
            rows.append(row)
            try:
                makers = {**SPECS[name].shapes, **SHAPES.get(name, {})}
                args, kwargs = makers[shape](torch.bfloat16, device)
                call = lambda s=SPECS[name], a=args, k=kwargs: s.function(*a, **k)  # noqa: E731
                with torch.no_grad(), _native.use_backend("native"):
                    row["launches"] = launches(call, device)
                    row["graph_us"] = graph_us(call, device)
            except Exception as error:
                row["problem"] = f"{type(error).__name__}: {error}"
    return {"device": str(device), "machine": machine(), "rows": rows, "ok": not any("problem" in row for row in rows)}


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    where = "inside a CUDA graph" if record["device"].startswith("cuda") else "one call on the CPU (a dry run)"
    lines = [f"# {where}, {record['machine']['date'][:10]}", "", "| op | shape | µs | kernels |", "|---|---|--:|--:|"]
    for row in record["rows"]:
        time_or_why = f"FAILED: {row['problem']}" if "problem" in row else f"{row['graph_us']:.2f}"
        lines.append(f"| {row['op']} | {row['shape']} | {time_or_why} | {row.get('launches') or '–'} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a row failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graph_time", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    record = measure(torch.device(options.device))
    page = markdown(record)
    print(page, end="")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(page)
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    sys.exit(main())
