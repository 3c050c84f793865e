"""What can be known of every CUDA kernel without a GPU, as one page. Needs nvcc, cmake, ninja, pybind11, g++.

    python -m benchmarks.kernel_report                      writes benchmarks/results/kernels-without-gpu.md
    python -m benchmarks.kernel_report --op gelu --arch 90a --output /tmp/page.md

For every operator and benchmark shape: the kernels that forward and backward launch (the emulator writes them down),
grid, block, shared memory, registers (ptxas), how many blocks an H200 keeps in flight, and the least time that the
bytes and operations allow there. For every kernel: registers on each architecture. Exits with 1 when a kernel spills
registers, does not compile without warnings, or is launched but not found. Compilations are kept in build/ptxas.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import _h200, _launches, ptxas_report, targets
from benchmarks._launches import Traced
from benchmarks.ptxas_report import Kernel

PAGE = ptxas_report.ROOT / "benchmarks" / "results" / "kernels-without-gpu.md"
DTYPES = (torch.bfloat16, torch.float32)
H200 = "90a"
INTRODUCTION = """# Kernels, as far as they are known without a GPU

Written by `python -m benchmarks.kernel_report`; nothing here was measured on a GPU. Launches are those that the
operators ask for on a device of 132 multiprocessors (csrc/emu writes them down instead of running them), registers and
shared memory are ptxas's, residence follows from them for an H200: 65536 registers, 228 KB and 64 warps per
multiprocessor. The floor is the largest of bytes / 4.3 TB/s (a copy), operations / 790 TFLOP/s (products of 16-bit
types) or 60 TFLOP/s (other float32), and exponentials / 3.7 T/s. Bytes of a forward pass: inputs and outputs once. Of a
backward pass: what the forward pass keeps, the gradients that come and those that go, once; operations 2.5 times those
of the forward pass for attention, else twice. Lines "on sm_90a": where kernels for that architecture alone are in use
(FASTDIFF_SM90=1 for attention).
"""


@dataclass(frozen=True)
class Found:
    """The kernels of one pass of one call; `variant`: they are for this architecture alone."""

    call: Traced
    variant: str = ""


def collect(emu: Any, ops: Sequence[str], shapes: Sequence[str] = ()) -> list[Found]:
    """Every pass of every benchmark call; twice where kernels for sm_90a alone make a difference."""
    from fastdiff.ops import SPECS
    from fastdiff.ops._gpu_shapes import shapes_on

    found = []
    for name in ops:
        if not SPECS[name].cuda:
            continue
        for dtype in DTYPES:
            for shape in shapes_on(SPECS[name], torch.device("cuda")):
                if shapes and not any(part in shape for part in shapes):
                    continue
                plain = _launches.trace(emu, name, shape, dtype)
                found += [Found(call) for call in plain]
                hopper = _launches.trace(emu, name, shape, dtype, hopper=True)
                found += [
                    Found(b, f"on sm_{H200}") for a, b in zip(plain, hopper, strict=True) if a.launches != b.launches
                ]
    return found


def shape_table(found: Sequence[Found], kernels: Sequence[Kernel]) -> tuple[str, list[str]]:
    """A line per launch, and the launches whose kernel is not among `kernels`."""
    lines = [
        "| op, shape | | floor µs | kernel | grid | block | shared B | regs | blocks/SM | warps/SM | waves | time |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    unknown: dict[str, None] = {}  # in order
    for item in found:
        call = item.call
        tensor = call.op.startswith(("attention", "adaln_attention", "adaln_mlp")) and call.dtype != "float32"
        floor, limit = _h200.floor_us(call.bytes, call.flops, call.exponentials, tensor=tensor)
        work = f"{floor:.3g} ({limit}; {_amount(call.bytes)}B, {_amount(call.flops)}op)"
        head = [f"{call.op} {call.shape}", f"{call.dtype} {call.mode}" + (f" {item.variant}" if item.variant else "")]
        if not call.launches:
            lines.append("| " + " | ".join([*head, work, "none"]) + " |" + " |" * 8)
        for launch, count in _counted(call.launches):
            kernel = _find(launch, kernels)
            cells: list[Any] = [*head, work, f"`{launch.kernel}`" + (f" × {count}" if count > 1 else "")]
            cells += [_size(launch.grid) + (f" / {launch.cluster}" if launch.cluster > 1 else ""), _size(launch.block)]
            if kernel is None:
                unknown[f"{launch.file}: {launch.kernel}, launched by {call.op}"] = None
                cells += [launch.shared, "?", "?", "?", "?"]
            else:
                shared = launch.shared + kernel.shared
                stay = _h200.residence(kernel.registers, shared, _product(launch.block), _product(launch.grid))
                cells += [shared, kernel.registers, stay.blocks, stay.warps, f"{stay.waves:.2g}"]
            lines.append("| " + " | ".join(map(str, [*cells, targets.NOT_MEASURED])) + " |")
            head, work = ["", ""], ""
    return "\n".join(lines) + "\n", list(unknown)


def kernel_table(kernels: Sequence[Kernel], archs: Sequence[str]) -> str:
    """A line per kernel: registers on every architecture."""
    by_name: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault((kernel.file, kernel.name), {})[kernel.arch] = kernel
    lines = [
        "| file | kernel | "
        + " | ".join(f"sm_{arch}" for arch in archs)
        + " | static shared B | stack B | spilled B |",
        "|---|---|" + "--:|" * (len(archs) + 3),
    ]
    for (file, name), found in by_name.items():
        registers = [str(found[arch].registers) if arch in found else "–" for arch in archs]
        most = [max(getattr(k, field) for k in found.values()) for field in ("shared", "stack", "spills")]
        lines.append("| " + " | ".join([file, f"`{name}`", *registers, *map(str, most)]) + " |")
    return "\n".join(lines) + "\n"


def target_rows(found: Iterable[Found]) -> list[dict[str, Any]]:
    """What targets.py can tell from launches alone: those on an H200."""
    rows = {}
    for f in found:  # a variant comes after what it replaces
        call = f.call
        rows[call.op, call.shape, call.dtype, call.mode] = {
            "op": call.op, "shape": call.shape, "dtype": call.dtype, "mode": call.mode,
            "launches": len(call.launches), "ratios": {},
        }  # fmt: skip
    return list(rows.values())


def _find(launch: Any, kernels: Sequence[Kernel]) -> Kernel | None:
    """The compiled kernel of a launch. A launch in a header belongs to every file that includes it."""
    name = ptxas_report.short_name(launch.kernel)
    same = [k for k in kernels if k.name == name and k.arch == H200] or [k for k in kernels if k.name == name]
    return next(
        (k for k in same if k.file == launch.file), None if launch.file.endswith(".cu") else next(iter(same), None)
    )


def _counted(launches: Sequence[Any]) -> list[tuple[Any, int]]:
    """Launches in order; equal ones in a row are one entry."""
    found: list[tuple[Any, int]] = []
    for launch in launches:
        if found and found[-1][0] == launch:
            found[-1] = (launch, found[-1][1] + 1)
        else:
            found.append((launch, 1))
    return found


def _size(triple: Sequence[int]) -> str:
    shown = list(triple)
    while len(shown) > 1 and shown[-1] == 1:
        shown.pop()
    return "×".join(map(str, shown))


def _product(triple: Sequence[int]) -> int:
    return triple[0] * triple[1] * triple[2]


def _amount(number: int) -> str:
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.3g} {prefix}"
    return f"{number} "


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    from fastdiff.ops import SPECS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", default=[], help="only these operators; may be repeated")
    parser.add_argument("--shape", action="append", default=[], help="only shapes whose names contain this")
    parser.add_argument("--file", action="append", type=Path, help="only these .cu; may be repeated")
    parser.add_argument("--arch", action="append", help=f"default: {', '.join(ptxas_report.ARCHS)}")
    parser.add_argument("--jobs", "-j", type=int, help="compilations at a time (default: one per core)")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    archs = options.arch or list(ptxas_report.ARCHS)
    found = collect(_launches.emulator(), options.op or list(SPECS), options.shape)
    kernels = ptxas_report.compile_all(options.file or ptxas_report.sources(), archs, jobs=options.jobs)
    shapes, unknown = shape_table(found, kernels)
    spilling = [k for k in kernels if k.spills]
    counts = f"{len({(k.file, k.name) for k in kernels})} kernels, compiled for {', '.join('sm_' + a for a in archs)}"
    summary = f"{counts} without warnings; {len(spilling) or 'none'} spill registers."
    launched = "Launches were counted without a GPU; all else waits for one (benchmarks/run_gpu.sh)."
    page = "\n".join(
        [INTRODUCTION, f"{summary}\n\n## Targets\n\n{launched}\n\n{targets.table(target_rows(found))}",
         f"## Launches by operator and shape\n\nRegisters: sm_{H200 if H200 in archs else archs[0]}.\n\n{shapes}",
         f"## Registers by architecture\n\n{kernel_table(kernels, archs)}"]
    )  # fmt: skip
    options.output.write_text(page)
    print(f"{summary} {len(found)} passes of operators. Written: {options.output}")
    for line in unknown:
        print(f"not compiled: {line}", file=sys.stderr)
    for kernel in spilling:
        print(f"spills {kernel.spills} bytes on sm_{kernel.arch}: {kernel.file} {kernel.name}", file=sys.stderr)
    return 1 if unknown or spilling else 0


if __name__ == "__main__":
    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    sys.exit(main())
