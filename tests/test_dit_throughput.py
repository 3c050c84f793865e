"""benchmarks/dit_throughput.py on a model small enough for a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind the installed package
from benchmarks import dit_throughput
from fastdiff.models import DiT

TINY = ["--width", "32", "--depth", "2", "--heads", "2", "--input-size", "8", "--dtype", "float32", "--rounds", "2"]


def test_a_tiny_run_measures_every_contestant_and_they_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    code = dit_throughput.main([*TINY, "--steps", "3", "--batch", "1", "--batch", "3", "--no-compile", *files])
    assert code == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert [(r["batch"], r["name"]) for r in record["rows"]] == [(b, n) for b in (1, 3) for n in ("eager", "fastdiff")]
    for row in record["rows"]:
        assert row["difference"] < 1e-4
        assert row["share_of_ceiling"] == pytest.approx(row["images_per_second"] / record["ceiling_images_per_second"])
        assert len(row["seconds"]) == 2
    page = (tmp_path / "r.md").read_text()
    assert page in capsys.readouterr().out
    assert "| 3 | fastdiff |" in page
    assert "graph: needs a GPU" in page


def test_what_is_wrong_or_out_of_time_is_said(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    common = [*TINY, "--steps", "2", "--batch", "1", "--no-compile", "--json", str(out)]
    assert dit_throughput.main([*common, "--tolerance", "-1"]) == 1
    assert any("WRONG" in line for line in json.loads(out.read_text())["skipped"])
    assert dit_throughput.main([*common, "--budget", "0"]) == 0
    assert json.loads(out.read_text())["rows"] == []
    assert "batch 1 eager: no time left" in json.loads(out.read_text())["skipped"]


def test_the_operations_are_those_that_torch_counts() -> None:
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2)
    for block in model.blocks:
        block.attn, block.mlp = dit_throughput.PlainAttention(block.attn), dit_throughput.PlainMlp(block.mlp)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.forward_with_cfg(torch.randn(1, 4, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64), 2.0)
    # The counter leaves out the attention kernel of the CPU.
    attention = 2 * 2 * 4 * 16 * 16 * 32
    assert dit_throughput.flops_per_image(model, 1) - counter.get_total_flops() in (0, attention)
