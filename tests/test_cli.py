"""The command line: what it prints, what it exits with, and that `verify` and `bench` notice broken kernels."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff import _native, cli
from fastdiff.cli import _bench_engine, _bench_report, _check, _machine, _scaling, _verify_engine
from fastdiff.cli._bench_timing import Contestant, quartiles, race, ratios
from fastdiff.cli._table import Cell, Table, to_json, write_text
from fastdiff.ops import SPECS

typer_testing = pytest.importorskip("typer.testing")
from fastdiff.cli._app import app  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
native = pytest.mark.skipif(_native.extension is None, reason="no native extension in this installation")
VERIFY = ["verify", "--device", "cpu", "--draws", "3"]


def invoke(*arguments: str) -> Any:
    result = typer_testing.CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in which the fastdiff under test, and after it this repository, can be imported."""
    env = {**os.environ, "PYTHONPATH": str(Path(fastdiff.__file__).resolve().parents[1])}
    for key, value in environment.items():
        if value is None:
            env.pop(key, None)
        else:
            env[key] = value
    whole = f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
    # Not in the checkout: its source tree, which has no extension, would come before the installed package.
    return subprocess.run(
        [sys.executable, "-c", whole], env=env, cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=120
    )


def replace(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Put a changed copy of a spec in the registry for the length of a test."""
    monkeypatch.setitem(SPECS, name, dataclasses.replace(SPECS[name], **changes))


# ---------------------------------------------------------------------------------------------------------- the rest


def test_help_names_every_command() -> None:
    text = invoke("--help").stdout
    for command in ("info", "verify", "bench", "demo"):
        assert command in text
        page = invoke(command, "--help")
        assert page.exit_code == 0
        assert "--json" in page.stdout


def test_version() -> None:
    assert invoke("--version").stdout.strip() == f"fastdiff {fastdiff.__version__}"


def test_info_as_json_and_as_a_table() -> None:
    # In a process of its own: this one has scikit-learn's copy of libgomp beside torch's, which `info` reports.
    command = "from fastdiff.cli._app import app; app({!r})"
    done = python(command.format(["info", "--json"]))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["native"] is (_native.extension is not None)
    assert found["cpu_isa"] == fastdiff.cpu_isa()
    assert found["torch"] == torch.__version__
    assert len(found["openmp_runtimes"] or [""]) == 1
    text = python(command.format(["info"]), COLUMNS="300").stdout
    for value in (fastdiff.__version__, torch.__version__, found["cpu"], *(found["openmp_runtimes"] or [])):
        assert value in text


def test_info_says_why_it_is_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "load_error", "the extension went for a walk")
    assert "the extension went for a walk" in invoke("info").stdout


def test_info_fails_on_two_openmp_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    result = invoke("info")
    assert result.exit_code == 1
    assert "2 OpenMP runtimes" in result.stdout


def test_waiting_threads_sleep() -> None:
    code = "sys.argv = ['fastdiff', 'info', '--json']\nfrom fastdiff.cli import main; main()"
    done = python(code, OMP_WAIT_POLICY=None, OMP_DISPLAY_ENV="VERBOSE")
    assert json.loads(done.stdout)["omp_wait_policy"] == "passive"
    # What libgomp itself read: it never spins if the variable was there when it was loaded, 300,000 turns if not.
    shown = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not shown:
        pytest.skip("this OpenMP runtime does not display its settings")
    assert shown[-1] == "0"


def test_waiting_threads_spin_if_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew for nothing"))
    cli._passive_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_the_engines_need_neither_typer_nor_rich() -> None:
    code = """
import contextlib, io, json
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich", "click", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Blocked())
from benchmarks.__main__ import main
from fastdiff.cli import main as program
results = []
def attempt(call):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = call()
        except SystemExit as error:
            code = error.code
    results.append([code, printed.getvalue()])
attempt(program)
attempt(lambda: main(["info", "--json"]))
attempt(lambda: main(["verify", "--op", "gate_residual", "--device", "cpu", "--draws", "2", "--dtype", "float16"]))
attempt(lambda: main(["--op", "gate_residual", "--shape", "[1,16", "--dtype", "float32", "--seconds", "0",
                      "--no-compile"]))
print(json.dumps(results))
"""
    done = python(code, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr
    program, info, verify, bench = json.loads(done.stdout.splitlines()[-1])
    assert "pip install typer rich" in program[0]
    assert info[0] == 0
    assert json.loads(info[1])["torch"] == torch.__version__
    if _native.extension is None:
        assert [verify[0], bench[0]] == [1, 1]
    else:
        assert [verify[0], bench[0]] == [0, 0]
        cells = len(_native.isas())
        assert f"{cells} of {cells} cells passed" in verify[1]
        assert "1 rows, 1 comparisons" in bench[1]


# ------------------------------------------------------------------------------------------------------------ verify


@native
def test_verify_passes_and_covers_what_it_says() -> None:
    result = invoke(*VERIFY, "--op", "gate_residual_adaln", "--op", "ddim_step", "--only-draw", "1", "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    cells = {(c["op"], c["device"], c["isa"], c["dtype"]) for c in record["cells"]}
    assert cells == {
        (op, "cpu", isa, dtype)
        for op in ("gate_residual_adaln", "ddim_step")
        for isa in _native.isas()
        for dtype in ("float32", "float16", "bfloat16")
    }
    assert record["ok"] is True
    for cell in record["cells"]:
        assert cell["draws"] == 1
        assert 0 < cell["worst_output"] <= 1
        assert 0 < cell["worst_gradient"] <= 1
    result = invoke(*VERIFY, "--op", "ddim_step", "--isa", "base")
    assert "3 of 3 cells passed (9 calls of 1 operators, seed 0" in result.stdout
    assert result.exit_code == 0


def _shifted(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, *, out: Any = None) -> Any:
        return function(x, branch, gate, out=out) + 1e-3

    return broken


def _wrong_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, *, out: Any = None) -> Any:
        silent = torch.where(x.isfinite(), x, 0.0) * 0.25
        return function(x, branch, gate, out=out) + (silent - silent.detach())

    return broken


def _unsteady(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def broken(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, *, out: Any = None) -> Any:
        calls[0] += 1
        result = function(x, branch, gate, out=out)
        return result if calls[0] % 2 or result.requires_grad else torch.nextafter(result, torch.zeros_like(result))

    return broken


def _nan_hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, *, out: Any = None) -> Any:
        return function(x, branch, gate, out=out).nan_to_num(0.0)

    return broken


def _reference_in_disguise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, branch, gate, *, out=None: SPECS["gate_residual"].reference(x, branch, gate)


def _raising(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, *, out: Any = None) -> Any:
        raise ZeroDivisionError("out of order")

    return broken


def _wrong_type(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, *, out: Any = None) -> Any:
        return function(x, branch, gate, out=out).double()

    return broken


@native
@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (_shifted, "output: "),
        (_wrong_gradient, "gradient of x: "),
        (_unsteady, "output: two runs of the same call differ"),
        (_nan_hidden, "expected nan, got 0"),
        (_reference_in_disguise, "the native kernel was not called"),
        (_raising, "ZeroDivisionError: out of order"),
        (_wrong_type, "expected torch.float32, got torch.float64"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_verify_notices_a_broken_kernel(
    breakage: Callable[..., Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, "gate_residual", function=breakage(SPECS["gate_residual"].function))
    options = ["--op", "gate_residual", "--op", "euler_step", "--dtype", "float32", "--isa", "base", "--device", "cpu"]
    result = invoke("verify", *options, "--draws", "8", "--seed", "5")
    assert result.exit_code == 1
    assert "FAILED gate_residual cpu base float32: " in result.stdout
    assert words in result.stdout
    assert re.search(r"call: gate_residual\(float32\[\d+, \d+, \d+\]", result.stdout)
    assert "1 of 2 cells passed" in result.stdout  # the other operator was still checked
    repeat = re.search(r"repeat: fastdiff (verify .*)", result.stdout)
    assert repeat
    assert "--seed 5" in repeat[1]
    again = invoke(*repeat[1].split(), "--json")  # and the command it prints does repeat the failure
    assert again.exit_code == 1
    record = json.loads(again.stdout)
    assert record["ok"] is False
    assert record["cells"][0]["failures"][0]["what"] in result.stdout


@native
def test_verify_notices_a_broken_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """Says it did the work, and did nothing."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(_native_extension, name)
            return value if not callable(value) or name in ("isa", "isas", "select_isa", "build_info") else _nothing

    def _nothing(*_: Any) -> None:
        return None

    _native_extension = _native.extension
    monkeypatch.setattr(_native, "extension", Broken())
    monkeypatch.setattr(_native, "fast", None)
    # Memory that nobody writes would hold whatever was there before, the right answer perhaps.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        result = invoke("verify", "--op", "gate_residual", "--dtype", "float32", "--isa", "base", "--draws", "4")
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.exit_code == 1
    assert "got nan" in result.stdout


@native
def test_verify_poisons_only_what_flows_into_the_result() -> None:
    result = invoke(*VERIFY, "--op", "box_mask", "--op", "gaussian_blend", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.stdout
    assert json.loads(result.stdout)["ok"]


@native
def test_verify_refuses_what_it_does_not_know() -> None:
    for options, words in (
        (["--op", "nonsense"], "gate_residual"),
        (["--dtype", "float8"], "bfloat16"),
        (["--isa", "mmx"], "base"),
        (["--device", "tpu"], "cpu or cuda"),
    ):
        result = invoke("verify", *options)
        assert result.exit_code == 1
        assert options[1] in result.stderr
        assert words in result.stderr
        assert result.stdout == ""
    if _verify_engine.cuda_missing():
        result = invoke("verify", "--device", "cuda", "--json")
        assert result.exit_code == 1
        assert _verify_engine.cuda_missing() in json.loads(result.stdout)["error"]


def test_verify_fails_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "load_error", "the extension went for a walk")
    result = invoke("verify")
    assert result.exit_code == 1
    assert "the extension went for a walk" in result.stderr
    record = json.loads(invoke("verify", "--json").stdout)
    assert record["ok"] is False
    assert "the extension went for a walk" in record["error"]


def test_compare_is_strict_about_what_is_not_finite() -> None:
    def verdict(got: list[float], expected: list[float], dtype: torch.dtype = torch.float32, **options: bool) -> float:
        limit = torch.full((len(got),), 0.5, dtype=torch.float64)
        error, message = _check.compare(
            torch.tensor(got, dtype=dtype), torch.tensor(expected, dtype=torch.float64), limit, dtype, **options
        )
        assert bool(message) == (error > 1)
        return error

    inf, nan = math.inf, math.nan
    assert verdict([1.0, 2.0], [1.0, 2.25]) == pytest.approx(0.5)
    assert verdict([1.0, 2.0], [1.0, 3.0]) == pytest.approx(2.0)
    assert verdict([nan, inf, -inf], [nan, inf, -inf]) == 0
    for got, expected in ((nan, 1.0), (1.0, nan), (inf, -inf), (1.0, inf), (inf, 1.0), (inf, nan), (nan, inf)):
        assert verdict([got], [expected]) > 1e30
    assert verdict([inf], [nan], any_nonfinite=True) == 0
    assert verdict([1.0], [nan], any_nonfinite=True) == inf
    assert verdict([inf], [1.0], any_nonfinite=True) > 1e30
    assert verdict([inf], [1e6], torch.float16) == 0  # beyond the largest float16, infinity is the right answer
    assert verdict([inf], [60000.0], torch.float16) > 1e3


# ------------------------------------------------------------------------------------------------------------- bench

BENCH = ["bench", "--op", "gate_residual", "--shape", "[1,16", "--dtype", "float32", "--seconds", "0", "--no-compile"]


@native
def test_bench_as_json() -> None:
    result = invoke(*BENCH, "--json", "-")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["cpu_isa"] == fastdiff.cpu_isa()
    (row,) = record["rows"]
    assert (row["op"], row["shape"], row["dtype"], row["mode"]) == (
        "gate_residual",
        "[1,16,1152]",
        "float32",
        "forward",
    )
    assert 0 < row["error"] <= 1
    assert set(row["times"]) == {"fastdiff", "eager", "copy"}
    ours = row["times"]["fastdiff"]
    assert ours["q1_us"] <= ours["median_us"] <= ours["q3_us"]
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / ours["median_us"] / 1e3)
    assert row["buffers"] == 8


@native
def test_bench_writes_whole_files(tmp_path: Path) -> None:
    options = [
        "--json",
        str(tmp_path / "a" / "b.json"),
        "--plot",
        str(tmp_path / "b.png"),
        "--markdown",
        str(tmp_path / "b.md"),
    ]
    result = invoke(*BENCH, "--shape", "overhead", *options)
    assert result.exit_code == 0
    assert "1,16,1152" in result.stdout
    record = json.loads((tmp_path / "a" / "b.json").read_text())
    assert [row["shape"] for row in record["rows"]] == ["[1,16,1152]", "overhead"]
    picture = (tmp_path / "b.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 10_000
    assert "| gate_residual | [1,16,1152] | float32 |" in (tmp_path / "b.md").read_text()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b.json", "b.md", "b.png"]


@native
def test_bench_does_not_time_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "gate_residual", function=_shifted(SPECS["gate_residual"].function))
    result = invoke(*BENCH, "--op", "euler_step", "--shape", "(1,4", "--json", "-")
    assert result.exit_code == 1
    wrong, right = json.loads(result.stdout)["rows"]
    assert "wrong, so not timed: output: " in wrong["problem"]
    assert wrong["times"] == {}
    assert wrong["error"] > 1
    assert right["problem"] == ""
    assert right["times"]


@native
def test_bench_says_which_baselines_are_missing_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(*_: Any) -> Any:
        raise ImportError("No module named 'somebody'")

    def cannot(*_: Any) -> Any:
        raise ValueError("odd shapes")

    def breaks(*_: Any) -> Any:
        raise ZeroDivisionError("of its own")

    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no working compiler\nand more")

    def fine(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: torch.addcmul(x, branch, gate.unsqueeze(1))

    peers = {"absent": not_installed, "unable": cannot, "broken": breaks, "fine": fine}
    replace(monkeypatch, "gate_residual", peers=peers)
    monkeypatch.setattr(torch, "compile", no_compiler)
    result = invoke(*[option for option in BENCH if option != "--no-compile"], "--json", "-")
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)["rows"]
    assert set(row["ratios"]) == {"eager", "fine"}
    assert row["unavailable"] == {
        "absent": "not installed (No module named 'somebody')",
        "unable": "cannot: odd shapes",
        "broken": "failed: ZeroDivisionError: of its own",
        "compile": "RuntimeError: no working compiler",
    }


@native
def test_bench_names_a_baseline_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "gate_residual", peers={"patient": lambda x, *_: lambda: x + 0})
    monkeypatch.setattr(_bench_engine, "_PATIENCE", 0.0)
    (row,) = json.loads(invoke(*BENCH, "--json", "-").stdout)["rows"]
    assert "patient" not in row["ratios"]
    assert row["unavailable"]["patient"] == "one call took 0 s, so it was not raced"


def _sweep(name: str, expected: float) -> dict[str, Any]:
    """A sweep whose sizes are the rows of a matrix."""
    make = {n: lambda dtype, device, n=n: ((torch.ones(n, 64), torch.ones(n, 64), 0.5), {}) for n in (64, 1024, 16384)}
    return {name: (expected, make)}


@native
def test_scaling_measures_an_exponent_beside_the_expected_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace(monkeypatch, "euler_step", scaling=_sweep("rows", 1.0))
    files = [
        "--json",
        str(tmp_path / "s.json"),
        "--markdown",
        str(tmp_path / "s.md"),
        "--plot",
        str(tmp_path / "s.png"),
    ]
    result = invoke("bench", "--scaling", "--op", "euler_step", "--seconds", "0", *files)
    assert result.exit_code == 0
    (sweep,) = json.loads((tmp_path / "s.json").read_text())["sweeps"]
    assert list(sweep["times_us"]) == ["64", "1024", "16384"]
    assert math.isfinite(sweep["exponent"])
    assert sweep["expected"] == 1.0
    assert "| euler_step | rows | float32 |" in (tmp_path / "s.md").read_text()
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG\r\n")
    replace(monkeypatch, "euler_step", scaling={})
    assert "names a sweep" in invoke("bench", "--scaling", "--op", "euler_step").stderr
    assert "expected one of" in invoke("bench", "--scaling", "--op", "nothing").stderr
    for ignored in (["--device", "cuda"], ["--shape", "x"], ["--backward"], ["--budget", "1"]):
        refused = invoke("bench", "--scaling", *ignored)
        assert refused.exit_code == 1
        assert "--scaling" in refused.stderr


def test_the_exponent_is_that_of_a_power_law() -> None:
    assert _scaling.exponent({n: 3.0 * n**2 for n in (1, 10, 100, 1000)}) == pytest.approx(2.0)
    # The smallest size, where the price of a call is what is seen, does not count.
    assert _scaling.exponent({1: 50.0, 10: 51.0, 100: 510.0, 1000: 5100.0}) == pytest.approx(1.0)


@native
def test_bench_with_backward() -> None:
    result = invoke(*BENCH, "--backward", "--json", "-")
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)["rows"]
    assert row["mode"] == "forward+backward"
    assert set(row["times"]) == {"fastdiff", "eager"}
    assert row["gb_per_s"] is None


@native
def test_bench_keeps_to_its_budget_and_names_what_it_left_out() -> None:
    record = json.loads(invoke(*BENCH, "--op", "euler_step", "--shape", "(1,4", "--budget", "0", "--json", "-").stdout)
    assert len(record["rows"]) == 1
    assert record["not_measured"] == ["euler_step (1,4,64,64) float32"]
    assert any("euler_step (1,4,64,64) float32" in line for line in _bench_report.notes(record))


@native
def test_a_loss_is_printed_like_a_win(tmp_path: Path) -> None:
    record = _bench_engine.bench(ops=["gate_residual"], shapes=["[1,16"], dtypes=["float32"], seconds=0, compiled=False)
    row = record["rows"][0]
    for ratio, style in ((0.5, "bad"), (2.5, "good")):
        row["ratios"]["eager"] = {"median": ratio, "q1": ratio * 0.9, "q3": ratio * 1.1}
        cell = _bench_report.table(record).rows[0][4]
        assert cell.text.startswith(f"{ratio:.2f}× (")
        assert cell.style == style
        _bench_report.plot(record, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").stat().st_size > 10_000


@native
def test_bench_refuses_what_it_does_not_know() -> None:
    for options, words in (
        (["--op", "nonsense"], "gate_residual"),
        (["--shape", "nonsense"], "--list"),
        (["--dtype", "float8"], "bfloat16"),
        (["--device", "tpu"], "cpu"),
    ):
        result = invoke("bench", *options)
        assert result.exit_code == 1
        assert words in result.stderr
        assert result.stdout == ""


def test_bench_lists_operators_shapes_and_baselines() -> None:
    listed = json.loads(invoke("bench", "--list", "--json", "-").stdout)
    assert [entry["op"] for entry in listed] == list(SPECS)
    text = invoke("bench", "--list").stdout
    for entry in listed:
        assert entry["shapes"][-1] == "overhead"
        for name in (entry["op"], *entry["shapes"], *entry["gpu_shapes"], *entry["baselines"]):
            assert name in text


def test_contestants_take_turns_over_their_buffers_and_ratios_are_paired() -> None:
    seen: list[str] = []

    def slow_call(name: str) -> Callable[[], None]:
        def call() -> None:
            seen.append(name)
            time.sleep(11e-3)  # so long that every sample is one call, and one before it

        return call

    first = Contestant("first", [slow_call("a0"), slow_call("a1")])
    second = Contestant("second", [slow_call("b0"), slow_call("b1")])
    race([first, second], torch.device("cpu"), 0.0)
    assert len(first.seconds) == len(second.seconds) >= 7
    letters = "".join(name[0] for name in seen)
    assert letters.endswith("aabbbbaa" * 3 + "aabb")  # in turns, and in another order every time
    assert [name for name in seen if name[0] == "a"][:8] == ["a0", "a1"] * 4
    assert first.repeat == 1
    quick = Contestant("quick", [lambda: None])
    race([quick], torch.device("cpu"), 0.0)
    assert quick.repeat > 100
    # A round that is slow for everybody moves the medians, not the ratio.
    first.seconds, second.seconds = [1.0, 1.0, 10.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0, 20.0]
    assert ratios(second, first) == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


# ------------------------------------------------------------------------------------------------------------ tables


def test_tables_as_text_and_markdown() -> None:
    table = Table(("name", "value"), frozenset({"value"}), title="a title")
    table.add("first", Cell("1\n22", "bad"))
    table.add("a|b", "3")
    lines = ["a title", "name   value", "-----  -----", "first      1", "          22", "a|b        3"]
    assert table.text().splitlines() == lines
    assert table.markdown().splitlines() == [
        "| name | value |",
        "| --- | ---: |",
        "| first | 1<br>22 |",
        "| a\\|b | 3 |",
    ]


def test_tables_on_a_terminal() -> None:
    import io

    from rich.console import Console

    from fastdiff.cli._show import progress_bar, show

    table = Table(("name", "value"), title="a title")
    table.add("first", Cell("[bold]not markup[/]", "bad"))
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    show(table, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]not markup[/]" in text
    assert "\x1b[1;31m" in text
    with progress_bar("work") as report:
        report(1, 2, "half")


def test_json_has_no_nan_and_files_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(to_json({"a": [math.inf, -math.inf, math.nan, 1.5]})) == {"a": ["inf", "-inf", "nan", 1.5]}
    target = tmp_path / "file.txt"
    write_text(target, "first")

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_text(target, "second")
    assert target.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
