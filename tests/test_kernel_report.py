"""What is said of the CUDA kernels without a GPU: launches, residence, floors, the committed page, the targets."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind the installed package
from benchmarks import _h200, _launches, graph_time, kernel_report, ptxas_report, targets
from benchmarks.ptxas_report import ROOT, Kernel

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8fastdiff4cuda12_GLOBAL__N_17forwardILi2ELi72EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN8fastdiff4cuda12_GLOBAL__N_17forwardILi2ELi72EEEvi
    8 bytes stack frame, {} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 100 bytes smem, 400 bytes cmem[0]
"""


def test_the_report_of_ptxas_is_understood() -> None:
    (kernel,) = ptxas_report.parse(PTXAS.format(8), "a.cu", "80")
    assert kernel == Kernel("a.cu", "80", kernel.name, registers=168, shared=100, stack=8, spills=12)
    assert "**12**" in kernel.row()


@pytest.mark.parametrize(
    ("spelled", "short"),
    [
        ("void fastdiff::cuda::<unnamed>::forward<(int)2, (bool)1>(fastdiff::AttentionForward)", "forward<2, true>"),
        ("void fastdiff::cuda::(anonymous namespace)::rows<false>(Job)", "rows<false>"),
        ("elementwise<fastdiff::cuda::(anonymous namespace)::Work<true>, 8>", "elementwise<Work<true>, 8>"),
    ],
)
def test_a_kernel_has_one_name_whoever_spells_it(spelled: str, short: str) -> None:
    assert ptxas_report.short_name(spelled) == short


def test_headers_of_a_file_are_part_of_what_it_is_known_by() -> None:
    names = {path.name for path in ptxas_report.included(ROOT / "csrc" / "cuda" / "attention.cu")}
    assert {"attention.cu", "attention.cuh", "mma.cuh", "fastdiff.h"} <= names


def test_residence_follows_from_registers_shared_memory_and_threads() -> None:
    # 255 registers are given as 256: 8192 of a warp, two warps in a quarter of the register file.
    assert _h200.residence(255, 0, 128, 132) == _h200.Residence(2, 8, 0.5)
    assert _h200.residence(32, 0, 256, 10 * 132).blocks == 8  # 64 warps
    assert _h200.residence(32, 0, 32, 1).blocks == 32
    assert _h200.residence(32, 227 << 10, 128, 264) == _h200.Residence(1, 4, 2.0)
    assert _h200.residence(32, 75 << 10, 128, 1).blocks == 3


def test_the_floor_is_the_largest_limit() -> None:
    assert _h200.floor_us(43 * 10**8, 0, 0, tensor=False) == (pytest.approx(1000), "bytes")
    assert _h200.floor_us(1, 79 * 10**10, 0, tensor=True) == (pytest.approx(1000), "products")
    assert _h200.floor_us(1, 6 * 10**10, 0, tensor=False) == (pytest.approx(1000), "FMA")
    assert _h200.floor_us(0, 0, 3_706_560_000, tensor=False) == (pytest.approx(1000), "exp")


def test_launches_are_written_down_and_nothing_runs(emu: Any) -> None:
    emu.multiprocessors(132)
    before = emu.switches()
    forward, backward = _launches.trace(emu, "gelu", "[8,256,1536]", torch.bfloat16)
    assert emu.switches() == before
    count = 8 * 256 * 1536
    assert (forward.bytes, backward.bytes) == (4 * count, 6 * count)
    assert [(x.file, x.kernel) for x in forward.launches] == [("gelu.cu", "elementwise<Forward, 8>")]
    assert [(x.file, x.kernel) for x in backward.launches] == [("gelu.cu", "elementwise<Backward, 8>")]
    assert forward.launches[0].block == (256, 1, 1)
    # The next call runs again.
    with emu.operators():
        from fastdiff.ops import gelu

        x = torch.randn(3, 5)
        torch.testing.assert_close(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_scores_of_attention_and_steps_of_a_scan_are_counted(emu: Any) -> None:
    forward, _ = _launches.trace(emu, "attention", "[4,4,64,72]", torch.bfloat16)
    assert forward.exponentials == 4 * 4 * 64 * 64
    forward, _ = _launches.trace(emu, "selective_scan_multi", "[2,6x6,48,16]", torch.float32)
    assert forward.exponentials == 2 * 36 * 48 * 16 * 4


def _generate(emu: Any, monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> int:
    monkeypatch.setattr(_launches, "emulator", lambda: emu)
    return kernel_report.main(
        ["--op", "gelu", "--file", str(ROOT / "csrc/cuda/gelu.cu"), "--output", str(path), *options]
    )


def test_a_page_is_generated(emu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        ptxas_report.find_nvcc()
    except SystemExit as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(ptxas_report, "CACHE", tmp_path / "cache")
    page = tmp_path / "page.md"
    assert _generate(emu, monkeypatch, page, "--arch", "90a") == 0
    text = page.read_text()
    assert re.search(r"\| gelu \[8,256,1536\] \| bfloat16 forward \| 2\.93 \(bytes; 12\.6 MB, .*not measured \|", text)
    assert re.search(r"\| gelu\.cu \| `elementwise<Backward, 4>` \| \d+ \| 0 \| 0 \| 0 \|", text)
    version = ptxas_report._version(ptxas_report.find_nvcc())
    monkeypatch.setattr(ptxas_report, "_version", lambda nvcc: version)
    monkeypatch.setattr(ptxas_report.subprocess, "run", None)  # everything comes from what was kept
    assert _generate(emu, monkeypatch, page, "--arch", "90a") == 0


def test_a_spill_or_a_kernel_that_is_not_there_fails(
    emu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"elementwise<{way}, {vec}>" for way in ("Forward", "Backward") for vec in (4, 8)]
    kernels = [Kernel("gelu.cu", "90a", name, 40, 0, 0, 0) for name in names]
    monkeypatch.setattr(ptxas_report, "compile_all", lambda *_, **__: kernels)
    page = tmp_path / "page.md"
    assert _generate(emu, monkeypatch, page) == 0
    kernels[1] = dataclasses.replace(kernels[1], spills=16)
    assert _generate(emu, monkeypatch, page) == 1
    assert "spills 16 bytes on sm_90a: gelu.cu elementwise<Forward, 8>" in capsys.readouterr().err
    del kernels[1]
    assert _generate(emu, monkeypatch, page) == 1
    assert "not compiled: gelu.cu: elementwise<Forward, 8>" in capsys.readouterr().err


def test_the_committed_page_names_every_kernel() -> None:
    text = kernel_report.PAGE.read_text()
    listed = set(re.findall(r"^\| ([\w.]+\.cu) \| `(\w+)", text, re.MULTILINE))
    bounds = r"(?:\s+__launch_bounds__\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))?"
    for path in ptxas_report.sources():
        names = re.findall(rf"__global__ void{bounds}\s+(\w+)\(", path.read_text())
        assert names or "__global__" not in path.read_text(), path.name
        for name in names:
            assert (path.name, name) in listed, f"run `python -m benchmarks.kernel_report`: {path.name} has {name}"


def _row(op: str, shape: str, **values: Any) -> dict[str, Any]:
    return {"op": op, "shape": shape, "dtype": "bfloat16", "mode": "forward", "ratios": {}, **values}


def test_targets_are_met_missed_or_not_measured() -> None:
    copy = next(t for t in targets.TARGETS if "85 %" in t.text)
    rows = [_row(op, "[64,256,1152]", share_of_copy=0.9) for op in copy.ops]
    assert copy.state([]) == "not measured"
    assert copy.state(rows).startswith("met: 0.9 of copy")
    assert copy.state(rows[:-1]).startswith("met as far as measured") and "gate_residual_adaln" in copy.state(rows[:-1])
    rows[1]["share_of_copy"] = 0.84
    assert copy.state(rows).startswith("**missed**: 0.84 of copy (gate_residual ")
    rows[1]["problem"] = "wrong, so not timed"
    assert copy.state(rows) == "**missed**: gate_residual [64,256,1152] bfloat16: wrong, so not timed"
    everywhere = next(t for t in targets.TARGETS if "everywhere" in t.text)
    rows = [_row("adaln_modulate", "[1]", ratios={"compile": {"median": 1.2}}), _row("adaln_modulate", "[2]")]
    assert everywhere.state(rows[:1]).startswith("met: 1.2")
    assert everywhere.state(rows).startswith("met as far as measured") and "adaln_modulate [2]" in everywhere.state(
        rows
    )
    best = next(t for t in targets.TARGETS if "d = 72" in t.text)
    ratios = {"sdpa": {"median": 2.0}, "sdpa-cudnn": {"median": 1.1}, "eager": {"median": 0.5}}
    assert "1.1 ×" in best.state([_row("attention", "[64,16,256,72]", ratios=ratios)])
    assert targets.table([]).count("| not measured |") == len(targets.TARGETS) + 1


def test_targets_are_about_shapes_that_exist(tmp_path: Path) -> None:
    from fastdiff.ops import SPECS
    from fastdiff.ops._gpu_shapes import shapes_on

    for target in targets.TARGETS:
        for op in target.ops:
            assert set(target.shapes) <= set(shapes_on(SPECS[op], torch.device("cuda"))), (op, target.shapes)
    for op, shapes in graph_time.CASES.items():
        assert set(shapes) <= set(shapes_on(SPECS[op], torch.device("cuda"))), (op, shapes)
    record = tmp_path / "cpu.json"
    record.write_text('{"device": "cpu", "rows": [{"op": "gelu"}]}')
    cut = tmp_path / "cut.json"
    cut.write_text('{"device": "cuda", "rows": [{"op"')
    assert targets.read([cut, record, tmp_path / "absent.json"]) == ([], [])
