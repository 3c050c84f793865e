"""What this build and this machine are: the data behind ``fastdiff info``, and the heading of every benchmark."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from fastdiff.cli._table import Cell, Table

_OPENMP = re.compile(r"lib(?:gomp|iomp5|omp)(?:[-.]\w+)*\.(?:so|dylib)(?:\.\d+)*$")


def info() -> dict[str, Any]:
    """Everything ``fastdiff info`` prints, as plain data."""
    import torch

    import fastdiff

    build = fastdiff.build_info()
    runtimes = openmp_runtimes()
    problems = []
    if runtimes is not None and len(runtimes) > 1:
        problems.append(f"{len(runtimes)} OpenMP runtimes compete for the cores: {', '.join(runtimes)}")
    return {
        **build,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "openmp_runtimes": runtimes,
        "torch_cuda": torch.version.cuda,
        "gpus": gpus(),
        "problems": problems,
    }


def info_table(found: dict[str, Any]) -> Table:
    """The data of `info` for people."""
    table = Table(("", ""), title=f"fastdiff {found['version']}")
    native = Cell("yes", "good") if found["native"] else Cell(f"no: {found['why_not_native']}", "bad")
    table.add("native kernels", native)
    if found["native"]:
        table.add("CPU instruction set", f"{found['cpu_isa']} (of {', '.join(found['isas'])}; FASTDIFF_ISA picks one)")
        table.add("compiler", f"{found['compiler']}, OpenMP {'on' if found['openmp'] else 'off'}")
        archs = ", ".join(found["cuda_archs"])
        without = "not in this build (FASTDIFF_CUDA=ON builds them)"
        table.add("CUDA kernels", f"yes, for {archs}" if found["cuda"] else without)
    table.add("torch", f"{found['torch']} (CUDA {found['torch_cuda'] or 'none'}), Python {found['python']}")
    table.add("CPU", f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads")
    runtimes = found["openmp_runtimes"]
    policy = found["omp_wait_policy"] or "unset"
    if runtimes is None:
        table.add("OpenMP runtimes", "cannot be listed on this system")
    else:
        table.add("OpenMP runtimes", "\n".join([*(runtimes or ["none"]), f"OMP_WAIT_POLICY {policy}"]))
    for gpu in found["gpus"]:
        capability = f"compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors"
        table.add("GPU", f"{gpu['name']}, {capability}, {gpu['memory_gib']} GiB")
    if not found["gpus"]:
        table.add("GPU", "none that torch sees")
    for problem in found["problems"]:
        table.add("problem", Cell(problem, "bad"))
    return table


def machine() -> dict[str, Any]:
    """The part of `info` that a timing depends on, with the date and how busy the machine is."""
    whole = info()
    build = ("version", "native", "cpu_isa", "compiler", "cuda", "cuda_archs", "torch", "python")
    found = {key: whole[key] for key in (*build, "cpu", "cores", "threads", "omp_wait_policy", "gpus")}
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found["load_average"] = load_average()
    return found


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes, where the system tells."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, as far as the system knows it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        names = re.findall(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", listing.read_text(), re.MULTILINE)
        if names:
            return str(names[0]).strip()
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of every CUDA device that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def openmp_runtimes() -> list[str] | None:
    """OpenMP libraries mapped into this process, one path for each distinct file; None where that cannot be read.

    More than one means two thread pools: twice the threads, and `torch.set_num_threads` reaching only one of them.
    """
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.exists():
        return None
    found: dict[tuple[str, str], str] = {}  # device and inode tell files apart, whatever links lead to them
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _OPENMP.search(fields[5].removesuffix(" (deleted)")):
            found.setdefault((fields[3], fields[4]), fields[5])
    return sorted(found.values())
