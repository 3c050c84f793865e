"""The CPU kernels' elementary functions, against the C library in double precision, on every instruction set."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fastdiff import _native

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
LIMITS = {
    "exp": 1.1,
    "exp_inside": 1.1,
    "exp_inside<-1>": 1.1,
    "log1p": 1.5,
    "log1p_inside": 1.5,
}  # units in the last place, as csrc/cpu/math.h promises
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.skipif(platform.system() != "Linux", reason="compiler flags are for Linux")
@pytest.mark.parametrize("isa", [isa for isa in _native.isas() if isa in FLAGS] or ["base"])
def test_elementary_functions_are_as_exact_as_they_say(isa: str, tmp_path: Path) -> None:
    program = tmp_path / "probe"
    subprocess.run(
        [str(COMPILER), "-std=c++17", "-O2", "-w", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
         *FLAGS[isa], f"-DFASTDIFF_ISA={isa}", str(ROOT / "tests/cpu/math_probe.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(LIMITS)
    for line in lines:
        name, error, where = line.split(maxsplit=2)
        assert error != "EDGE", line
        assert float(error) <= LIMITS[name], f"{name} is off by {error} ulp at {where}"
