"""What ptxas made of every CUDA kernel: registers, shared memory, spills. Needs nvcc, not a GPU.

    python benchmarks/ptxas_report.py [--arch 80 --arch 90a ...] [--output report.md] [file.cu ...]

Prints a Markdown table and exits with 1 when a kernel spills registers to memory or does not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As cmake/cuda.cmake compiles them.
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "--extended-lambda"]


@dataclass
class Kernel:
    """One line of the table; sizes in bytes."""

    file: str
    arch: str
    name: str
    registers: int
    shared: int
    stack: int
    spills: int

    def row(self) -> str:
        spills = f"**{self.spills}**" if self.spills else "0"
        cells = [self.file, f"sm_{self.arch}", f"`{self.name}`", self.registers, self.shared, self.stack, spills]
        return "| " + " | ".join(map(str, cells)) + " |"


def find_nvcc() -> str:
    """The compiler, or an explanation of where it was sought."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{h}/bin/nvcc" for h in homes if h)]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    raise SystemExit("ptxas_report: no nvcc on PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda")


def demangle(names: list[str]) -> list[str]:
    """Readable names: no return types, parameters or namespaces."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool and names:
        done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()
    short = []
    for name in names:
        name = re.sub(r"\((anonymous namespace|int|bool)\)(::)?", "", name)  # also the casts of cu++filt: (int)8
        name = re.sub(r"^void ", "", name)
        name = re.sub(r"\(.*$", "", name)
        short.append(re.sub(r"\b(\w+::)+", "", name))
    return short


def parse(log: str, file: str, arch: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    entries = re.split(r"Compiling entry function '", log)[1:]
    names = demangle([e.split("'", 1)[0] for e in entries])
    kernels = []
    for name, entry in zip(names, entries, strict=False):

        def number(pattern: str, text: str = entry) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        shared, stack = number(r"(\d+) bytes smem"), number(r"(\d+) bytes stack frame")
        kernels.append(Kernel(file, arch, name, number(r"Used (\d+) registers"), shared, stack, spills))
    return sorted(kernels, key=lambda k: k.name)


def compile_one(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    """Compiles one file for one architecture and reads the report."""
    with tempfile.TemporaryDirectory() as folder:
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", "-o", f"{folder}/kernel.o"]
        done = subprocess.run([nvcc, *FLAGS, *target, str(source)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"ptxas_report: {source.name} does not compile for sm_{arch}\n{done.stdout}{done.stderr}")
    kernels = parse(done.stdout + done.stderr, source.name, arch)
    if not kernels:
        raise SystemExit(f"ptxas_report: no kernel found in the report of {source.name} for sm_{arch}")
    return kernels


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of every CUDA kernel.")
    parser.add_argument("files", nargs="*", type=Path, help="default: every .cu of csrc/cuda")
    parser.add_argument("--arch", action="append", help="e.g. 80, 90a (the default is both); may be repeated")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    files = options.files or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = find_nvcc()
    jobs = [(nvcc, file, arch) for file in files for arch in options.arch or ["80", "90a"]]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        kernels = [k for group in pool.map(lambda job: compile_one(*job), jobs) for k in group]
    head = ["| file | target | kernel | registers | shared bytes | stack bytes | spilled bytes |"]
    table = "\n".join([*head, "|---|---|---|--:|--:|--:|--:|", *(k.row() for k in kernels)]) + "\n"
    print(table, end="")
    if options.output:
        options.output.write_text(table)
    spilling = [k for k in kernels if k.spills]
    if spilling:
        print(f"\n{len(spilling)} of {len(kernels)} kernels spill registers", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
