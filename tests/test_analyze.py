"""`fastdiff analyze`: its figures are those of the library, its files are whole, its exit codes tell."""

from __future__ import annotations

import json

import pytest
import torch

typer_testing = pytest.importorskip("typer.testing")

from fastdiff import analysis as fa  # noqa: E402
from fastdiff.cli._app import app  # noqa: E402
from fastdiff.samplers import make_plan, schedules  # noqa: E402

QUICK = ("--no-optimise", "--steps", "8", "--schedule", "flow")


def run(*options, out=None):
    extra = () if out is None else ("--out", str(out))
    return typer_testing.CliRunner().invoke(app, ["analyze", *options, *extra])


def test_figures_files_and_recommendation(tmp_path):
    result = run(
        *QUICK, "--spectrum", "4,1,0.25", "--target-std", "0.7", "--score-error", "0.001", "--json", out=tmp_path
    )
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "analysis.json").read_text())
    assert (tmp_path / "analysis.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis.json", "analysis.png"]

    std = 0.7 * (torch.tensor([4, 1, 0.25], dtype=torch.float64) / 1.75).sqrt()
    oracle = fa.GaussianOracle(torch.zeros(3), std=std)
    plan = make_plan("ddim", schedules.flow(), 8, prediction="flow")
    expected = fa.error_budget(oracle, plan, error=fa.ModelError(relative=0.001))
    assert record["given"]["total"]["w2"] == pytest.approx(expected.total.w2)
    assert record["given"]["dominating"] == expected.dominating == "discretisation"

    best = record["recommended"]
    assert best["nfe"] <= record["given"]["nfe"] and best["total"]["w2"] < expected.total.w2
    again = make_plan(
        best["solver"], schedules.flow(), None, prediction="flow", times=torch.tensor(best["times"]).double()
    )
    budget = fa.error_budget(oracle, again, error=fa.ModelError(relative=0.001))
    assert budget.total.w2 == pytest.approx(best["total"]["w2"], rel=1e-6)
    assert 1 <= record["steps_to_match"] <= best["steps"]


def test_text_names_the_source_and_the_better_run(tmp_path):
    result = run(*QUICK, "--spectrum", "power:1", "--dimension", "16", out=tmp_path)
    assert result.exit_code == 0
    assert "given: discretisation dominates" in result.stdout and "recommended: " in result.stdout
    assert "truncation" in result.stdout.splitlines()[1]


def test_the_network_is_blamed_when_it_is_at_fault(tmp_path):
    result = run(*QUICK, "--solver", "unipc_2", "--steps", "16", "--score-error", "0.2", "--json", out=tmp_path)
    record = json.loads(result.stdout)
    assert record["given"]["dominating"] == "score" and "training can" in record["advice"]


def test_optimised_times_are_among_the_candidates(tmp_path):
    result = run("--steps", "5", "--schedule", "edm", "--spectrum", "4,1,0.25", "--json", out=tmp_path)
    record = json.loads(result.stdout)
    assert any("optimised" in c["schedule"] for c in record["candidates"])
    assert len(record["recommended"]["times"]) == record["recommended"]["steps"] + 1


def test_a_folder_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(fa, "better_runs", lambda *args, **kwargs: pytest.fail("worked for nothing"))
    result = run(*QUICK, "--json", out=tmp_path / "file" / "new")
    assert result.exit_code == 1 and "--out: expected a folder" in json.loads(result.stdout)["error"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_smaller_total_that_is_luck_is_not_sold_as_a_loss(tmp_path):
    """Runs are ranked by the sum of their sources; the given run's may cancel, to a smaller total."""
    from fastdiff.cli.analyze import _summary

    def row(total, *sources):
        sources = {name: {"w2": w2} for name, w2 in zip(fa.SOURCES, sources, strict=True)}
        where = {"solver": "ddim", "schedule": "flow", "steps": 8, "nfe": 8, "dominating": "discretisation"}
        return {**where, "sources": sources, "total": {"w2": total}}

    results = {"given": row(0.1, 0, 0.5, 0.4, 0), "recommended": row(0.2, 0, 0.3, 0, 0), "advice": ""}
    line = _summary({**results, "steps_to_match": None, "candidates": []})[1]
    assert "sum of sources 3 times smaller" in line and "W2 0.5" not in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "magic"), "solver"),
        (("--schedule", "magic"), "--schedule"),
        (("--steps", "0"), "steps"),
        (("--target-std", "0"), "--target-std"),
        (("--spectrum", "power:x"), "--spectrum"),
        (("--spectrum", "1,-1"), "--spectrum"),
        (("--score-error", "nan"), "--score-error"),
        (("--betas", "cosine"), "--betas: expected only with --schedule vp"),
        (("--schedule", "vp", "--sigma-max", "3"), "--sigma-max"),
        (("--schedule", "edm", "--shift", "3"), "--shift"),
    ],
)
def test_wrong_options_exit_with_1_and_write_nothing(tmp_path, options, message):
    result = run(*QUICK, *options, "--json", out=tmp_path / "new")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["ok"] is False and message in record["error"]
    assert not (tmp_path / "new").exists()
