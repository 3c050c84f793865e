"""What an installed fastdiff promises: one OpenMP runtime, obeyed thread counts, honest fallbacks, clean objects."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import _native
from fastdiff.cli._machine import openmp_runtimes

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_PARENT = Path(fastdiff.__file__).resolve().parents[1]

native = pytest.mark.skipif(_native.extension is None, reason="no native extension in this installation")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BLOCK_EXTENSION = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "fastdiff._C":
            raise ImportError("blocked for this test")

sys.meta_path.insert(0, Blocked())
"""
# A call that is worth several threads, on inputs that one thread made; and how many threads there are.
BIG_CALL = """
import os

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x, branch, gate = torch.ones(8, 256, 1152), torch.ones(8, 256, 1152), torch.ones(8, 1152)

def big_call():
    with torch.no_grad(), fastdiff.use_backend("native"):
        assert float(fastdiff.ops.gate_residual(x, branch, gate)[7, 255, 1151]) == 2.0
    return threads()
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the very fastdiff that is under test, and no other setting of ours."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTDIFF_", "OMP_"))}
    env = {**clean, "PYTHONPATH": str(PACKAGE_PARENT), "OMP_WAIT_POLICY": "passive", **environment}
    # Not in the checkout: its source tree, which has no extension, would come before the installed package.
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=120
    )


def last_json(done: subprocess.CompletedProcess[str]) -> object:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------- threads


@native
@linux
@pytest.mark.parametrize("imports", ["import torch, fastdiff", "import fastdiff, torch"])
def test_one_openmp_runtime_that_obeys_torch_in_either_order_of_imports(imports: str) -> None:
    heavy = ["matplotlib", "sklearn", "diffusers", "typer", "rich", "safetensors", "torch._inductor"]
    code = f"""
import json, sys
{imports}
loaded = [m for m in {heavy!r} if m in sys.modules]
{BIG_CALL}
before, with_one = threads(), big_call()
torch.set_num_threads(3)
with_three = big_call()
torch.ones(1 << 22).exp_().sum()  # torch's own threads too
from fastdiff.cli._machine import openmp_runtimes
print(json.dumps([openmp_runtimes(), before, with_one, with_three, loaded]))
"""
    runtimes, before, with_one, with_three, loaded = last_json(run(code))
    assert loaded == [], "imported along with fastdiff"
    assert len(runtimes) == 1, runtimes
    assert with_one == before, "torch.set_num_threads(1) did not keep the kernel on one thread"
    if fastdiff.build_info()["openmp"]:
        assert with_three == before + 2, "the kernel does not use the threads it may, or this test proves nothing"


@linux
def test_a_second_openmp_runtime_would_be_noticed(tmp_path: Path) -> None:
    runtimes = openmp_runtimes()
    assert runtimes
    copy = tmp_path / "libgomp-0f3ac2.so.1.0.0"  # what wheels call the one they bring along
    shutil.copy(runtimes[0], copy)
    code = f"import ctypes, torch; ctypes.CDLL({str(copy)!r}); import sys; sys.argv = ['fastdiff', 'info', '--json'];"
    done = run(code + "from fastdiff.cli import main; main()")
    found = json.loads(done.stdout)
    assert str(copy) in found["openmp_runtimes"]
    assert found["problems"]
    assert done.returncode == 1


# --------------------------------------------------------------------------------------------------- instruction set


@native
def test_the_environment_chooses_the_instruction_set() -> None:
    isa = _native.isas()[0]  # not what a machine that has others would choose
    done = run("import fastdiff; print(fastdiff.cpu_isa())", FASTDIFF_ISA=isa)
    assert done.stdout.strip() == isa
    assert not done.stderr


@native
def test_an_unknown_instruction_set_warns_and_the_widest_is_used() -> None:
    done = run("import fastdiff; print(fastdiff.cpu_isa())", FASTDIFF_ISA="avx1024")
    assert done.stdout.strip() == _native.isas()[-1]
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1
    assert "FASTDIFF_ISA" in warned[0]
    assert "'avx1024'" in warned[0]


@native
def test_use_isa_refuses_what_this_machine_lacks_and_restores_what_was() -> None:
    before = fastdiff.cpu_isa()
    with pytest.raises(ValueError, match=r"use_isa: name: expected one of .*'mmx'"), _native.use_isa("mmx"):
        pass
    with _native.use_isa("base"):
        assert fastdiff.cpu_isa() == "base"
    assert fastdiff.cpu_isa() == before


# ---------------------------------------------------------------------------------------------------------- fallback


def test_without_the_extension_everything_works_with_one_warning() -> None:
    code = f"""
{BLOCK_EXTENSION}
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastdiff
    from fastdiff.ops import gate_residual, euler_step
    x = torch.arange(6.0).reshape(1, 2, 3)
    first = gate_residual(x, x, torch.full((3,), 2.0), )
    second = euler_step(x.requires_grad_(), torch.ones(1, 2, 3), 0.5)
    second.sum().backward()
try:
    with fastdiff.use_backend("native"):
        gate_residual(x.detach(), x.detach(), torch.ones(3))
    refused = ""
except RuntimeError as error:
    refused = str(error)
from fastdiff.cli import _bench_engine, _verify_engine
unmeasured = []
for engine in (_verify_engine.verify, _bench_engine.bench):
    try:
        engine()
    except (_verify_engine.VerifyError, _bench_engine.BenchError) as error:
        unmeasured.append(str(error))
texts = [str(w.message) for w in caught if "fastdiff" in str(w.message)]
info = fastdiff.build_info()
print(json.dumps([first.tolist(), second.tolist(), x.grad.tolist(), texts, refused, info,
                  fastdiff.explain("gate_residual", x, x, torch.ones(3)), unmeasured]))
"""
    first, second, grad, texts, refused, info, reasons, unmeasured = last_json(run(code))
    assert first == [[[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]]]
    assert second == [[[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]]]
    assert grad == [[[1.0] * 3] * 2]
    assert len(texts) == 1, texts
    assert "blocked for this test" in texts[0]
    assert "blocked for this test" in refused
    assert info["native"] is False
    assert info["isas"] == []
    assert "blocked for this test" in info["why_not_native"]
    assert any("blocked for this test" in reason for reason in reasons)
    assert len(unmeasured) == 2  # neither verify nor bench has anything to do, and both say so
    assert all("blocked for this test" in reason for reason in unmeasured)


@native
def test_native_or_nothing_lists_every_reason() -> None:
    wrong = torch.zeros(1, 2, 3, dtype=torch.float64, device="meta")
    with (
        fastdiff.use_backend("native"),
        pytest.raises(RuntimeError, match=r"gate_residual: use_backend\(\"native\"\)") as caught,
    ):
        fastdiff.ops.gate_residual(wrong, wrong, wrong)
    for reason in ("torch.float64", "'meta'"):
        assert reason in str(caught.value)
    with fastdiff.use_backend("native"):  # and what it can serve, it does
        x = torch.ones(1, 2, 3)
        assert torch.equal(fastdiff.ops.gate_residual(x, x, x), x + x)


@native
def test_explain() -> None:
    x = torch.zeros(1, 2, 3)
    assert fastdiff.explain("gate_residual", x, x, x) == []
    reasons = fastdiff.explain("gate_residual", x.double(), x.to("meta"), x)
    assert len(reasons) == 2
    assert any("float64" in reason for reason in reasons)
    assert any("'meta'" in reason for reason in reasons)
    with fastdiff.use_backend("reference"):
        assert any("reference" in reason for reason in fastdiff.explain("gate_residual", x, x, x))
    with pytest.raises(ValueError, match=r"explain: op_name: expected one of .*gate_residual.*got 'gate'"):
        fastdiff.explain("gate", x)


def test_use_backend_refuses_unknown_names_and_restores() -> None:
    before = _native.backend
    setting = fastdiff.use_backend("reference")
    for _ in range(2):  # the same object, entered twice
        with setting:
            assert _native.backend == "reference"
        assert _native.backend == before
    with pytest.raises(ValueError, match=r"use_backend: name: expected one of .*'fast'"):
        fastdiff.use_backend("fast")
    with fastdiff.use_backend("reference"):
        assert _native.backend == "reference"
        with fastdiff.use_backend("native"):
            assert _native.backend == "native"
        assert _native.backend == "reference"
    assert _native.backend == before


# ------------------------------------------------------------------------------------------------------------- build


def weak_symbols(listing: str) -> list[str]:
    """Weak and unique symbols of an `nm -C` listing that the linker could take from one object for all.

    An inline function compiled for AVX-512 that ends up serving the base kernels is an illegal instruction on an older
    machine.
    """
    found = re.findall(r"^[0-9a-f ]* ([WwVvu]) (.+)$", listing, re.MULTILINE)
    return [name for _, name in found]


def test_no_weak_symbols_in_per_isa_objects(tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    missing = [name for name in ("cmake", "ninja", "nm") if not shutil.which(name)]
    if not compiler or missing or importlib.util.find_spec("pybind11") is None:
        pytest.skip(
            f"needs a C++ compiler, cmake, ninja, nm and pybind11; not found: {missing or compiler or 'pybind11'}"
        )
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("no source tree here")

    def symbols(path: Path) -> list[str]:
        return weak_symbols(subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout)

    # First, that weak symbols would be seen.
    source = tmp_path / "weak.cpp"
    source.write_text("inline int shared(int x) { return x + 1; }\nint (*pointer)(int) = shared;\n")
    subprocess.run([compiler, "-c", str(source), "-o", str(tmp_path / "weak.o")], check=True)
    assert symbols(tmp_path / "weak.o") == ["shared(int)"]

    build = tmp_path / "build"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DFASTDIFF_CUDA=OFF"]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True, capture_output=True)
    listing = subprocess.run(
        ["ninja", "-C", str(build), "-t", "targets", "all"], check=True, capture_output=True, text=True
    )
    found = re.findall(r"^(fastdiff_(?:base|avx2|avx512|avx512_bf16)): phony", listing.stdout, re.MULTILINE)
    targets = sorted(set(found))
    assert "fastdiff_base" in targets
    made = subprocess.run(["cmake", "--build", str(build), "--target", *targets], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    per_target = [list(build.glob(f"CMakeFiles/{target}.dir/**/*.o")) for target in targets]
    assert all(per_target)
    objects = [path for paths in per_target for path in paths]
    assert len(objects) > 10
    for path in build.glob("CMakeFiles/fastdiff_avx512_bf16.dir/**/*.o"):  # where the compiler knows the instruction
        if shutil.which("objdump"):
            code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
            assert code.count("vdpbf16ps") >= 48, f"{path}: not made of dot products"
    assert {str(path.relative_to(build)): symbols(path) for path in objects if symbols(path)} == {}


def test_torch_is_not_needed_to_build() -> None:
    project = ROOT / "pyproject.toml"
    if not project.exists():
        pytest.skip("no source tree here")
    requires = re.search(r"^requires\s*=\s*\[(.*?)\]", project.read_text(), re.MULTILINE | re.DOTALL)
    assert requires
    names = set(re.findall(r'"([\w-]+)', requires[1]))
    assert names == {"setuptools", "cmake", "ninja", "pybind11"}
