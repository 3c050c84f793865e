"""benchmarks/accelerate_models.py on a model small enough for a test."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind the installed package
from benchmarks import accelerate_models


def test_a_tiny_run_names_who_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accelerate_models.MODELS, "tiny", ("one block", partial(accelerate_models._plain, 64, 1, 4)))
    seen: list[str] = []
    record = accelerate_models.measure(["tiny"], seconds=0.05, compiled=False, progress=seen.append)
    (row,) = record["rows"]
    assert seen == ["tiny"] and record["ok"] and row["difference"] <= accelerate_models.TOLERANCE
    assert row["against"] == "eager" and row["replaced"] > 0
    assert row["accelerated"]["median_us"] > 0 and row["other"]["median_us"] > 0
    page = accelerate_models.markdown(record)
    assert f"| tiny | one block | eager | {row['ratio']['median']:.2f} |" in page


def test_the_plain_model_has_the_size_of_dit_s() -> None:
    model, args, _ = accelerate_models.MODELS["plain DiT"][1]()
    assert len(model.blocks) == 12 and {block.attn.num_heads for block in model.blocks} == {6}
    assert [list(argument.shape) for argument in args] == [[4, 256, 384], [4, 384]]
