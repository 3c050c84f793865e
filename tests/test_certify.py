"""The certificate of the samplers: it passes on what ships, and names what is broken when a solver is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.analysis.oracles import GaussianOracle, MixtureOracle
from fastdiff.cli import _certify_adaptive, _certify_diffusers, _certify_engine, _certify_report, _certify_runs
from fastdiff.cli._certify_fit import fit, observe
from fastdiff.cli._certify_promises import PROMISES, Promise
from fastdiff.cli._certify_targets import ALL, GAUSSIANS, Oracle
from fastdiff.samplers import SOLVERS, sample

typer_testing = pytest.importorskip("typer.testing")
from fastdiff.cli._app import app  # noqa: E402

QUICK = ["certify", "--quick", "--no-diffusers", "--jobs", "1", "--json"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few step counts: what is tested is the certificate, not the samplers."""
    monkeypatch.setattr(_certify_engine, "QUICK_COUNTS", (1, 2, 7, 16))


def certify(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = typer_testing.CliRunner().invoke(app, [*QUICK, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def replace(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Put `change(stages)` in the place of a solver's stages."""
    original = SOLVERS[name]
    stages = original.stages
    changed = lambda run, **options: change(run, stages(run, **options))  # noqa: E731
    monkeypatch.setitem(SOLVERS, name, dataclasses.replace(original, stages=changed))


def scaled(stage: Any, factor: float) -> Any:
    """The same stage with its first coefficient times `factor`."""
    (key, c), *rest = stage.terms
    return dataclasses.replace(stage, terms=((key, c * factor), *rest))


def test_what_ships_keeps_its_promises_and_writes_a_record_a_page_and_a_picture(tmp_path: Path) -> None:
    code, record = certify("--solver", "dpmpp_2m", "--solver", "ddpm", "--out", str(tmp_path))
    assert code == 0, record["broken"]
    assert record["ok"] and record["broken"] == []
    assert list(record["promises"]) == ["dpmpp_2m", "ddpm"]
    for kind, keys in {
        "order": {"solver", "schedule", "prediction", "dtype", "nfe", "errors", "order", "ok", "failures"},
        "precision": {"solver", "schedule", "prediction", "dtype", "device", "backend", "error", "allowed", "ok"},
        "finite": {"solver", "schedule", "counts", "runs", "not_finite", "raised", "ok", "failures"},
    }.items():
        assert record[kind], kind
        assert all(keys <= set(cell) and cell["ok"] for cell in record[kind])
    home = [cell for cell in record["order"] if cell["schedule"] == next(iter(record["schedules"]))]
    assert {cell["solver"] for cell in home} == {"dpmpp_2m", "ddpm"}
    assert {cell["dtype"] for cell in record["precision"]} == {"float32", "bfloat16"}
    assert {cell["backend"] for cell in record["precision"]} == {"auto", "reference"}
    assert json.loads((tmp_path / "certificate.json").read_text())["summary"] == record["summary"]
    page = (tmp_path / "certificate.md").read_text()
    assert "| dpmpp_2m | 2 ± 0.1 |" in page and "certificate.png" in page
    assert (tmp_path / "certificate.png").read_bytes().startswith(b"\x89PNG")


def test_a_perturbed_coefficient_breaks_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "dpmpp_2m", lambda run, stages: tuple(scaled(s, 1.001) for s in stages))
    code, record = certify("--solver", "dpmpp_2m")
    assert code == 1
    broken = [line for line in record["broken"] if "promised 2 ± 0.1" in line]
    assert broken and broken[0].startswith("dpmpp_2m vp scaled_linear karras, min epsilon float64: order ")
    assert "BROKEN" in _certify_report.table(record).text()


def test_a_wrong_variance_breaks_the_order_of_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    def louder(run: Any, stages: Any) -> Any:
        more = [tuple((k, c * 1.05 if k[0] == "n" else c) for k, c in stage.terms) for stage in stages]
        return tuple(dataclasses.replace(stage, terms=terms) for stage, terms in zip(stages, more, strict=True))

    replace(monkeypatch, "ddpm", louder)
    code, record = certify("--solver", "ddpm")
    assert code == 1
    assert any("of the moments, promised" in line for line in record["broken"])


@pytest.mark.parametrize("solver", ["restart", "consistency", "lcm"])
def test_solvers_without_an_order_are_held_to_their_moments(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    def louder(run: Any, stages: Any) -> Any:
        more = [tuple((k, c * 1.05 if k[0] == "n" else c) for k, c in stage.terms) for stage in stages]
        return tuple(dataclasses.replace(stage, terms=terms) for stage, terms in zip(stages, more, strict=True))

    cell = _certify_runs.weak_order(solver, "vp scaled_linear karras, min", "v")
    assert cell["ok"], cell["failures"]
    replace(monkeypatch, solver, louder)
    cell = _certify_runs.weak_order(solver, "vp scaled_linear karras, min", "v")
    assert not cell["ok"] and "moments" in cell["failures"][0]


def test_nan_at_one_number_of_steps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, noise: Any, *, plan: Any, **kwargs: Any) -> Any:
        return sample(model, noise, plan=plan, **kwargs) * (math.nan if plan.steps == 7 else 1.0)

    monkeypatch.setattr(_certify_runs, "sample", broken)
    code, record = certify("--solver", "euler")
    assert code == 1
    assert len(record["broken"]) == len(record["schedules"])
    assert all(line.startswith("euler ") and "not finite with 7 " in line for line in record["broken"])


def test_an_exception_is_a_broken_promise_and_the_rest_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any, stages: Any) -> Any:
        if run.steps == 2:
            raise RuntimeError("planted")
        return stages

    replace(monkeypatch, "euler", fails)
    code, record = certify("--solver", "euler", "--solver", "ddim")
    assert code == 1
    assert all(line.startswith("euler ") and "planted" in line for line in record["broken"])
    assert any(cell["solver"] == "ddim" and cell["ok"] for cell in record["finite"])


def test_rounded_timesteps_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(model: Any, noise: Any, **kwargs: Any) -> Any:
        return sample(lambda x, t, cond: model(x, t.round(), cond), noise, **kwargs)

    monkeypatch.setattr(_certify_runs, "sample", rounds)
    cell = _certify_runs.order("dpmpp_2m", "vp scaled_linear karras, min", "epsilon")
    assert not cell["ok"]
    assert any("not asked at the times of the plan" in line for line in cell["failures"])
    assert cell["order"] < 1.5


def test_kernels_and_reference_must_draw_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = _certify_runs.precision("ddpm", "flow", "v", ["cpu"])
    assert cells and all(cell["ok"] for cell in cells)

    def other(model: Any, noise: Any, *, seed: int, **kwargs: Any) -> Any:
        return sample(model, noise, seed=seed + (noise.dtype != torch.float64), **kwargs)

    monkeypatch.setattr(_certify_runs, "sample", other)
    assert not any(
        cell["ok"] for cell in _certify_runs.precision("ddpm", "flow", "v", ["cpu"]) if cell["dtype"] == "float32"
    )


def test_an_inversion_is_held_to_its_order_and_must_be_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vp scaled_linear karras, min"
    assert _certify_runs.order("dpmpp_2m", name, "v", True)["ok"]
    counts = (1, 2, 7)

    def off(run: Any, stages: Any) -> Any:
        if run.forward:
            return stages
        return tuple(scaled(s, math.nan if run.steps == 7 else 1.001) for s in stages)

    replace(monkeypatch, "dpmpp_2m", off)
    assert _certify_runs.order("dpmpp_2m", name, "v")["ok"]
    cell = _certify_runs.order("dpmpp_2m", name, "v", True)
    assert cell["inverse"] and not cell["ok"] and "order of the inversion" in cell["failures"][0]
    cell = _certify_runs.finite("dpmpp_2m", name, counts, ("epsilon", "v"), 2)
    assert list(cell["raised"]) == ["7 epsilon inverse"] and cell["runs"] == 2 * 2 + 1 + len(counts)


def test_the_adaptive_solver_is_held_to_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    code, record = certify("--solver", "adaptive")
    assert code == 0, record["broken"]
    assert len(record["adaptive"]) == len(record["schedules"]) * 4 and record["promises"] == {}
    runs = record["adaptive"][0]["runs"]
    assert {r["inverse"] for r in runs} == {True, False} and all(0 < r["error"] <= r["allowed"] for r in runs)
    assert "kept" in _certify_report.adaptive_table(record).text()
    honest = _certify_adaptive.solve

    def lax(*args: Any, rtol: float, atol: float, **kwargs: Any) -> Any:
        return honest(*args, rtol=1e3 * rtol, atol=1e3 * atol, **kwargs)

    monkeypatch.setattr(_certify_adaptive, "solve", lax)
    code, record = certify("--solver", "adaptive")
    assert code == 1 and any("tolerance 1e-07: error" in line for line in record["broken"])
    assert "BROKEN" in _certify_report.adaptive_table(record).text()


def test_a_page_of_the_adaptive_solver_alone(tmp_path: Path) -> None:
    code, _ = certify("--solver", "adaptive", "--out", str(tmp_path))
    assert code == 0 and "adaptive solver" in (tmp_path / "certificate.md").read_text().lower()


def test_every_solver_makes_a_promise_and_one_without_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PROMISES) == set(SOLVERS)
    monkeypatch.setattr(_certify_engine, "PROMISES", {"ddim": PROMISES["ddim"]})
    record = _certify_engine.certify(solvers=["euler"], quick=True, diffusers=False, jobs=1)
    assert record["broken"] == ["euler: no promise is made for it"]


def test_an_unknown_solver_is_refused() -> None:
    code, record = certify("--solver", "nonsense")
    assert code == 1
    assert "expected one of ddim" in record["error"] and "nonsense" in record["error"]


def test_a_folder_that_cannot_be_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(_certify_engine, "certify", lambda **options: pytest.fail("worked for nothing"))
    code, record = certify("--solver", "euler", "--out", str(tmp_path / "file"))
    assert code == 1 and "--out: expected a folder" in record["error"]
    assert (tmp_path / "file").read_text() == "kept"


def test_the_page_states_what_is_promised_off_the_reference_schedule() -> None:
    page = (Path(__file__).parents[1] / "docs" / "certificate.md").read_text(encoding="utf-8")
    assert _certify_engine.METHOD in page
    head = next(line for line in page.splitlines() if line.startswith("| solver | promised"))
    place = head.split(" | ").index("elsewhere")
    for solver, promise in PROMISES.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {solver} | "))
        cell = line.split(" | ")[place]
        assert cell == (promise.text(reference=False) if promise.order else "–")


def test_the_fit_finds_the_order_and_leaves_rounding_out() -> None:
    points = [(n, 7.0 * n**-3.0) for n in (20, 40, 80, 160)]
    assert fit(points, floor=1e-30).order == pytest.approx(3, abs=1e-9)
    assert fit([*points, (320, 1e-12), (640, 5.0)], floor=1e-11).order == pytest.approx(3, abs=1e-9)
    assert math.isnan(fit([*points, (320, math.nan)], floor=1e-11).order)
    assert math.isnan(fit(points[:1], floor=1e-11).order)
    # A term of first order that only shows late: the runs go on until the slope settles.
    late = observe(lambda n: (n, n**-2.0 + 4e-3 / n), floor=1e-12)
    assert late.nfe[-1] == 1280 and late.order < 1.4
    assert observe(lambda n: (n, n**-2.0), floor=1e-12).nfe[-1] == 320


def test_promises_hold_the_order_from_both_sides_on_the_reference_schedule() -> None:
    promise = Promise(2)
    assert promise.kept_by(2.05, reference=True) and not promise.kept_by(2.2, reference=True)
    assert not promise.kept_by(1.85, reference=True) and promise.kept_by(1.85, reference=False)
    assert promise.kept_by(3.0, reference=False) and not promise.kept_by(math.nan, reference=False)
    assert Promise(3, at_least=True).kept_by(4.0, reference=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_its_oracle_agrees_with_that_of_the_analysis(prediction: str) -> None:
    ours, start, end = Oracle(ALL), (0.2, 0.97), (0.98, 0.15)
    x, last = ours.state(*start), ours.state(*end)
    for i, target in enumerate(ALL):
        place = slice(6 * i, 6 * i + 6)
        column = x[0, place, None]
        if len(target.weights) == 1:
            theirs: Any = GaussianOracle(torch.tensor([target.means[0]]), std=torch.tensor([target.deviations[0]]))
        else:
            weights, means, stds = (torch.tensor(v) for v in (target.weights, target.means, target.deviations))
            theirs = MixtureOracle(weights, means[:, None], stds[:, None])
        expected = theirs.predict(column, *start, prediction)
        torch.testing.assert_close(
            ours.predict(x, *start, prediction)[0, place, None], expected.double(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(theirs.path(column, start, end), last[0, place, None], rtol=1e-5, atol=1e-5)


def test_paths_of_a_gaussian_are_the_closed_form() -> None:
    ours = Oracle(GAUSSIANS)
    a, b = ours.state(0.3, 0.8), ours.state(1.0, 0.01)
    m = torch.tensor([g.means[0] for g in GAUSSIANS], dtype=torch.float64).repeat_interleave(6)
    s = torch.tensor([g.deviations[0] for g in GAUSSIANS], dtype=torch.float64).repeat_interleave(6)
    growth = torch.hypot(s, torch.tensor(0.01)) / torch.hypot(0.3 * s, torch.tensor(0.8))
    torch.testing.assert_close(b[0], m + (a[0] - 0.3 * m) * growth, rtol=1e-7, atol=1e-7)


def test_diffusers_schedulers_are_measured_in_the_same_way() -> None:
    pytest.importorskip("diffusers")
    peers = {peer.name: peer for peer in _certify_diffusers.PEERS}
    row = _certify_diffusers.certify(peers["FlowMatchEuler"], (1, 2, 5))
    assert row.get("problem") is None and row["not_finite"] == [] and row["raised"] == {}
    assert row["order"] == pytest.approx(1.0, abs=0.05)
    missing = dataclasses.replace(peers["DDIM"], cls="NoSuchScheduler")
    assert "NoSuchScheduler" in _certify_diffusers.certify(missing, (1,))["problem"]


def test_the_cost_benchmark_measures_and_prints() -> None:
    from benchmarks import sampler_cost

    record = sampler_cost.measure(0.0, ["ddim", "ddpm"])
    assert [row["solver"] for row in record["rows"]] == ["ddim", "ddpm"]
    assert all(row["us"] > 0 for row in record["rows"]) and record["rows"][1]["noise_us"] > 0
    text = sampler_cost.page(record)
    assert "| ddim | 20 |" in text and "Targets" in text
