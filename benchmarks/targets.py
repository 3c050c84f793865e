"""The speed that every kernel family is meant to reach on an H200, and what a run says of it.

    python -m benchmarks.targets results/DATE-gpu.json results/DATE-gpu-backward.json ... [--markdown PATH]

reads the records that run_gpu.sh writes and says of every target whether it was met, missed, or not measured. On
another card the ratios still mean something; the microseconds do not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Value = Callable[[Row], "float | None"]  # of one row of a record; None where the row does not tell
ADALN = ("adaln_modulate", "gate_residual", "gate_residual_adaln")
ATTENTION = ("attention", "attention_qkvpacked")
UPDATES = ("linear_update", "euler_step", "ddim_step")
SPECTRA = ("spectral_features", "radial_spectrum")
SDPA = ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """A number that every one of some rows must reach.

    Attributes:
        text: the target in words.
        ops: whose rows count.
        shapes: named like these; empty: all shapes but the price of a call.
        dtype: of the rows; empty: any.
        mode: "forward" or "forward+backward".
        value: of a row.
        unit: of the value, for the result.
        bound: that the value must reach ...
        at_most: ... or must not exceed.
    """

    text: str
    ops: tuple[str, ...]
    shapes: tuple[str, ...]
    value: Value
    unit: str
    bound: float
    dtype: str = "bfloat16"
    mode: str = "forward"
    at_most: bool = False

    def state(self, rows: Sequence[Row]) -> str:
        """Met, missed or not measured, with the worst value found and where."""
        rows = [row for row in rows if self._counts(row)]
        for row in rows:
            if row.get("problem"):
                return f"**missed**: {row['op']} {row['shape']} {row['dtype']}: {row['problem']}"
        found = [(value, row) for row in rows if (value := self.value(row)) is not None]
        wanted = {(op, shape) for op in self.ops for shape in self.shapes}
        if not self.shapes:
            wanted = {(row["op"], row["shape"]) for row in rows}
        absent = sorted(wanted - {(row["op"], row["shape"]) for _, row in found})
        if not found:
            return NOT_MEASURED
        worst, row = (max if self.at_most else min)(found, key=lambda pair: pair[0])
        good = worst <= self.bound if self.at_most else worst >= self.bound
        at = f"{worst:.3g} {self.unit} ({row['op']} {row['shape']} {row['dtype']}; {len(found)} rows)"
        left = f"; {NOT_MEASURED}: " + ", ".join(" ".join(pair) for pair in absent) if absent else ""
        return ("**missed**: " if not good else "met as far as measured: " if absent else "met: ") + at + left

    def _counts(self, row: Row) -> bool:
        return (
            row["op"] in self.ops
            and (row["shape"] in self.shapes if self.shapes else row["shape"] != "overhead")
            and row["mode"] == self.mode
            and self.dtype in ("", row["dtype"])
        )


def _against(*baselines: str) -> Value:
    """How many times longer the fastest of these takes."""

    def value(row: Row) -> float | None:
        ratios = [row["ratios"][name]["median"] for name in baselines if name in row.get("ratios", {})]
        return min(ratios, default=None)

    return value


def _copy(row: Row) -> float | None:
    return row.get("share_of_copy")


def _graph(row: Row) -> float | None:
    return row.get("graph_us")


def _launches(row: Row) -> float | None:
    return row.get("launches")


def _milliseconds(row: Row) -> float | None:
    ours = row.get("times", {}).get("fastdiff")
    return ours and ours["median_us"] / 1000


_BIG, _SMALL = ("[64,256,1152]",), ("[2,256,1152]",)
_TABLES = ("[2,256,1152] per token", "[16,256,1152] per token")
_SHORT, _LONG = ("[64,16,256,72]", "[64,16,1024,72]"), ("[4,16,4096,64]", "[4,16,4096,128]")
_SCAN, _CROSS = ("[8,1536,4096,16] channels last",), ("[16,56x56,192,16]",)
_WHOLE = ("[16,3,256,256]", "[16,3,512,512]")
_LATENTS = ("(1,4,64,64)", "(8,4,128,128)", "(16,16,256,256)")
_BOTH = "forward+backward"
TARGETS = (
    Target("adaln: at least 85 % of copy at [64,256,1152]", ADALN, _BIG, _copy, "of copy", 0.85),
    Target("adaln: at most 3 µs inside a graph at [2,256,1152]", ADALN, _SMALL, _graph, "µs", 3.0, at_most=True),
    Target("adaln: at least as fast as torch.compile everywhere", ADALN, (), _against("compile"), "×", 1.0, ""),
    Target(
        "adaln: 1.3 × torch.compile where gradients are summed over strided per-token tables", ADALN, _TABLES,
        _against("compile"), "×", 1.3, mode=_BOTH,
    ),
    Target("attention: 1.3 × the best SDPA at d = 72, N = 256, 1024", ATTENTION, _SHORT, _against(*SDPA), "×", 1.3),
    Target("attention: 0.9 × the best SDPA at d = 64, 128, N = 4096", ATTENTION, _LONG, _against(*SDPA), "×", 0.9),
    Target("attention block: 1.15 × compiled at B = 64", ("adaln_attention",), _BIG, _against("compile"), "×", 1.15),
    Target(
        "attention block: 1.5 × compiled at B = 1", ("adaln_attention",), ("[1,256,1152]",), _against("compile"), "×",
        1.5,
    ),
    Target("scan: 0.25 ms at B8 D1536 L4096 N16", ("selective_scan",), _SCAN, _milliseconds, "ms", 0.25, at_most=True),
    Target("scan: 1.3 × mamba_ssm forward", ("selective_scan",), _SCAN, _against("mamba_ssm"), "×", 1.3),
    Target(
        "scan: 1.5 × mamba_ssm backward (timed with its forward)", ("selective_scan",), _SCAN, _against("mamba_ssm"),
        "×", 1.5, mode=_BOTH,
    ),
    Target(
        "scan, 4 directions: 2.5 × copies and scans", ("selective_scan_multi",), _CROSS, _against("copies + scans"),
        "×", 2.5,
    ),
    Target(
        "blend: at least 80 % of copy at K = 8, 1024 x 1024", ("gaussian_blend",), ("K=8 (1,3,1024,1024)",), _copy,
        "of copy", 0.8,
    ),
    Target("blend: 5 × the chain of blurred masks", ("gaussian_blend",), (), _against("conv chain"), "×", 5.0),
    Target("blur: 5 × kornia", ("gaussian_blur",), (), _against("kornia"), "×", 5.0, ""),
    Target(
        "spectra: one launch up to 512 x 512", SPECTRA, _WHOLE, _launches, "launch(es)", 1, at_most=True,
    ),
    Target("spectra: 3 × the torch.fft pipeline", SPECTRA, _WHOLE, _against("eager"), "×", 3.0, ""),
    Target("updates: at least 90 % of copy when large", UPDATES, ("(16,16,256,256)",), _copy, "of copy", 0.9, ""),
    Target("updates: one launch", UPDATES, _LATENTS, _launches, "launch(es)", 1, at_most=True),
    Target(
        "updates: inside a CUDA graph, without a read by the host", UPDATES, ("(1,4,64,64)",), _graph, "µs", 1e9,
        at_most=True,
    ),
)  # fmt: skip
CEILING = "DiT-XL/2 at 256 x 256, 50 steps with guidance: images/s, of the 33 that 790 TFLOP/s allow"


def table(rows: Sequence[Row], loops: Sequence[dict[str, Any]] = ()) -> str:
    """A Markdown table: every target and how it stands. `loops`: records of benchmarks.dit_throughput."""
    lines = ["| target on an H200 | |", "|---|---|"]
    lines += [f"| {target.text} | {target.state(rows)} |" for target in TARGETS]
    speeds = [
        f"B = {row['batch']}, {row['name']}: {row['images_per_second']:.3g} ({row['share_of_ceiling']:.0%} of the "
        f"card's own {loop['ceiling_images_per_second']:.3g})"
        for loop in loops
        for row in loop["rows"]
    ]
    return "\n".join([*lines, f"| {CEILING} | {'; '.join(speeds) or NOT_MEASURED} |"]) + "\n"


def read(paths: Sequence[Path]) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of all records made on a GPU, and the records of sampling loops. A file that is not there has none."""
    rows, loops = [], []
    for path in paths:
        try:
            record = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:  # cut off while it was written; the others count all the same
            print(f"{path}: not read: {error}", file=sys.stderr)
            continue
        if not str(record.get("device")).startswith("cuda"):
            continue
        if "ceiling_images_per_second" in record:
            loops.append(record)
        else:
            rows += record["rows"]
    return rows, loops


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, whatever was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.split("\n")[0])
    parser.add_argument("records", nargs="*", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--shapes", action="store_true", help="print the shapes that the targets are about, and stop")
    options = parser.parse_args(arguments)
    if options.shapes:
        print("\n".join(dict.fromkeys(shape for target in TARGETS for shape in target.shapes)))
        return 0
    page = table(*read(options.records))
    print(page, end="")
    if options.markdown:
        options.markdown.write_text(f"# Targets\n\n{page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
