"""What ptxas made of every CUDA kernel: registers, shared memory, spills. Needs nvcc, not a GPU.

    python benchmarks/ptxas_report.py [--arch 80 --arch 90a ...] [--jobs N] [--output report.md] [file.cu ...]

Prints a Markdown table and exits with 1 when a kernel spills registers to memory or does not compile. What was compiled
before, with the same sources, flags and compiler, comes from `build/ptxas`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "ptxas"
ARCHS = ("80", "86", "89", "90a", "100")  # all that cmake/cuda.cmake compiles for
# As cmake/cuda.cmake compiles them.
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "--extended-lambda"]
FLAGS += ["-DFASTDIFF_CUDA"]


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


def sources() -> list[Path]:
    """Every .cu of the library."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> str:
    """The compiler, or an explanation of where it was sought."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{h}/bin/nvcc" for h in homes if h)]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    raise SystemExit("ptxas_report: no nvcc on PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda")


def demangle(names: list[str]) -> list[str]:
    """Readable names, such as ``forward<2, 72>``: no return types, parameters or namespaces."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool and names:
        done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()
    return [short_name(name) for name in names]


def short_name(name: str) -> str:
    """A demangled name without return type, parameters and namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", name)
    name = re.sub(r"\(bool\)([01])", lambda m: "true" if m[1] == "1" else "false", name)  # the casts of cu++filt
    name = re.sub(r"\([a-z ]+\)(?=-?\d)", "", name)
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\(.*$", "", name)
    name = re.sub(r"(\d)[uUlL]+\b", r"\1", name)
    return re.sub(r"\b(\w+::)+", "", name).replace("> >", ">>")


def parse(log: str, file: str, arch: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    entries = re.split(r"Compiling entry function '", log)[1:]
    names = demangle([e.split("'", 1)[0] for e in entries])
    kernels = []
    for name, entry in zip(names, entries, strict=True):

        def number(pattern: str, text: str = entry) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        shared, stack = number(r"(\d+) bytes smem"), number(r"(\d+) bytes stack frame")
        kernels.append(Kernel(file, arch, name, number(r"Used (\d+) registers"), shared, stack, spills))
    return sorted(kernels, key=lambda k: k.name)


def included(source: Path) -> list[Path]:
    """The file and everything of this project that it includes, sorted."""
    found, todo = set(), [source.resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
        todo += [p for p in ((path.parent / name).resolve() for name in names) if p.is_file()]
    return sorted(found)


def _key(nvcc: str, source: Path, arch: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join([_version(nvcc), arch, *FLAGS, *flags]).encode())
    for path in included(source):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _version(nvcc: str, _known: dict[str, str] = {}) -> str:  # noqa: B006
    if nvcc not in _known:
        _known[nvcc] = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return _known[nvcc]


def compile_one(nvcc: str, source: Path, arch: str, flags: Sequence[str] = ()) -> list[Kernel]:
    """Compiles one file for one architecture and reads the report; or finds what that gave before."""
    kept = CACHE / f"{source.stem}-{arch}-{_key(nvcc, source, arch, flags)}.json"
    if kept.is_file():
        return [Kernel(**entry) for entry in json.loads(kept.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run([nvcc, *FLAGS, *flags, *target, str(source)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"ptxas_report: {source.name} does not compile for sm_{arch}\n{done.stdout}{done.stderr}")
    kernels = parse(done.stdout + done.stderr, source.name, arch)
    if not kernels:
        raise SystemExit(f"ptxas_report: no kernel found in the report of {source.name} for sm_{arch}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")  # renamed when it is whole
    partial.write_text(json.dumps([dataclasses.asdict(k) for k in kernels]))
    partial.replace(kept)
    return kernels


def compile_all(
    files: Sequence[Path], archs: Sequence[str], *, jobs: int | None = None, flags: Sequence[str] = ()
) -> list[Kernel]:
    """Every kernel of `files`, compiled for every one of `archs`, in the order of both; says on stderr what is done."""
    nvcc = find_nvcc()
    tasks = [(file, arch) for file in files for arch in archs]

    def run(number: int) -> list[Kernel]:
        file, arch = tasks[number]
        kernels = compile_one(nvcc, file, arch, flags)
        print(f"{number + 1}/{len(tasks)} {file.name} sm_{arch}: {len(kernels)} kernels", file=sys.stderr, flush=True)
        return kernels

    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        return [kernel for group in pool.map(run, range(len(tasks))) for kernel in group]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of every CUDA kernel.")
    parser.add_argument("files", nargs="*", type=Path, help="default: every .cu of csrc/cuda")
    parser.add_argument("--arch", action="append", help="e.g. 80, 90a (the default is both); may be repeated")
    parser.add_argument("--jobs", "-j", type=int, help="compilations at a time (default: one per core)")
    parser.add_argument("--define", "-D", action="append", default=[], help="e.g. FASTDIFF_ALL_HEAD_DIMS")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    flags = [f"-D{name}" for name in options.define]
    kernels = compile_all(options.files or sources(), options.arch or ["80", "90a"], jobs=options.jobs, flags=flags)
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
