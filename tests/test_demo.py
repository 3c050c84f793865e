"""``fastdiff demo`` at toy size: its files, its promises (same seed, resume, kill), its errors, and its judges."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
scipy_linalg = pytest.importorskip("scipy.linalg")

import typer  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.cli import demo as demo_module  # noqa: E402
from fastdiff.cli.demo import DemoError, DemoSettings, demo, run_demo  # noqa: E402
from fastdiff.data import frechet_distance, load_digits, train_digit_judge  # noqa: E402
from fastdiff.models import DiT  # noqa: E402
from fastdiff.training import RectifiedFlowModel  # noqa: E402

TINY = {
    "steps": 6,
    "reflow_steps": 4,
    "batch_size": 8,
    "hidden_size": 16,
    "depth": 1,
    "num_heads": 2,
    "num_pairs": 16,
    "pair_steps": 2,
    "judge_epochs": 1,
    "columns": 2,
    "checkpoint_every": 2,
    "speed_rounds": 2,
}
PICTURES = [f"samples-{n:02d}-{when}.png" for n in (1, 2, 4, 16) for when in ("before", "after")]
REPEATABLE = [*PICTURES, "samples-real.png", "loss.png", "frechet.png", "model-before-reflow.safetensors"]
REPEATABLE += ["model.safetensors", "state/train/loss.csv", "state/reflow/round-1/loss.csv"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished toy run; tests leave it as it is."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    run_demo(DemoSettings(**TINY), out, progress=False)
    return out


# -------------------------------------------------------------------------------------------------------- the judges


def test_digits_are_split_by_class_without_overlap() -> None:
    train, held_out = load_digits()
    assert len(train.labels) + len(held_out.labels) == 1797
    assert train.images.min() == -1
    assert train.images.max() == 1
    both = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # the scans are all different, so a shared one would be seen
    shares = held_out.labels.bincount() / (held_out.labels.bincount() + train.labels.bincount())
    assert ((shares - 0.25).abs() < 0.01).all()
    again, other = load_digits()[1], load_digits(seed=1)[1]
    assert torch.equal(again.images, held_out.images)
    assert not torch.equal(other.images[:400], held_out.images[:400])
    zero = held_out.images[held_out.labels == 0].mean(0)[0]
    assert zero[4, 3:5].max() < -0.5 < 0.3 < zero[4, [1, 2, 5, 6]].max()  # a hole, with ink around it
    with pytest.raises(ValueError, match=r"held_out.*\(0, 1\).*1.0"):
        load_digits(held_out=1.0)


def test_judge_reads_digits_it_has_not_seen() -> None:
    train, held_out = load_digits()
    judge = train_digit_judge(train, epochs=4)
    assert judge.accuracy(*held_out) > 0.93
    assert judge.accuracy(held_out.images, held_out.labels.roll(1)) < 0.3
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert judge.accuracy(noise, torch.arange(500) % 10) < 0.25


def test_frechet_distance_against_matrix_square_roots() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    b = torch.randn(300, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 1.0
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy_linalg.sqrtm(cov_a @ cov_b).real
    gap = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(gap + np.trace(cov_a + cov_b - 2 * root), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(5 * 4.0, rel=1e-5)
    with pytest.raises(ValueError, match=r"\[200, 5\], \[300, 4\]"):
        frechet_distance(a, b[:, :4])


# ----------------------------------------------------------------------------------------------------------- results


def test_a_run_leaves_readable_pictures_models_and_figures(finished: Path) -> None:
    assert not [path for path in finished.rglob("*") if ".partial" in path.name]
    for name in [*PICTURES, "samples-real.png", "loss.png", "frechet.png"]:
        with Image.open(finished / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert len(picture.convert("L").getcolors()) > 20, name
    results = json.loads((finished / "results.json").read_text())
    assert results["settings"]["steps"] == 6
    assert results["reference"]["images"] == 450
    assert 0 < results["reference"]["frechet_real"] < results["reference"]["class_means"]["frechet"]
    for n in (1, 2, 4, 16):
        for when in ("before", "after"):
            assert 0 <= results["steps"][str(n)][when]["accuracy"] <= 1
    assert set(results["speed"]) > {"training_step", "sampling_4_steps"}


def test_the_saved_models_draw_the_saved_pictures(finished: Path) -> None:
    for name, when in (("model-before-reflow", "before"), ("model", "after")):
        path = finished / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["fastdiff"])["config"]
        backbone = DiT(**config)
        backbone.load_state_dict(load_file(path))
        pictures = demo_module._Pictures(finished.parent, 2, 0, torch.device("cpu"))
        pictures.samples(RectifiedFlowModel(backbone), 4, when)
        redrawn = finished.parent / f"samples-04-{when}.png"
        assert redrawn.read_bytes() == (finished / redrawn.name).read_bytes()


def test_the_page_is_self_contained_and_quotes_the_figures(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    results = json.loads((finished / "results.json").read_text())
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 11
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    for row in results["steps"].values():
        for figures in row.values():
            assert f">{figures['frechet']:.2f}<" in page
            assert f">{figures['accuracy']:.3f}<" in page
    assert f"{results['speed']['training_step']['speedup']:.2f}&times;" in page


def test_same_seed_same_bytes_and_another_seed_other_pictures(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    run_demo(DemoSettings(**TINY), out, progress=False)
    for name in REPEATABLE:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    foreign = ["samples-old.png", "samples-03-after.png", "model-mine.safetensors", "mine.txt", "state/thesis.txt"]
    foreign += ["state/train/notes.txt", "state/reflow/round-1/pairs/mine.safetensors", "state/reflow/round-2/mine.txt"]
    for name in foreign:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    leftover = out / "state" / "train" / ".checkpoint.partial.pt"
    leftover.touch()
    run_demo(DemoSettings(**TINY, seed=1), out, overwrite=True, progress=False)
    for name in PICTURES:
        assert (out / name).read_bytes() != (finished / name).read_bytes(), name
    assert [(out / name).read_text() for name in foreign] == foreign  # replaces the run, and only what is its own
    assert not leftover.exists()
    assert json.loads((out / "run.json").read_text())["seed"] == 1


# --------------------------------------------------------------------------------------------- what may be overwritten


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite"]])
@pytest.mark.parametrize(
    "files",
    [
        {"state/thesis.txt": "x"},
        {"model.safetensors": "x", "loss.png": "x"},
        {"run.json": '{"steps": 5}', "model.safetensors": "x"},  # somebody else's record
        {"run.json": json.dumps({**vars(DemoSettings()), "num_pairs": "many"}), "loss.png": "x"},
    ],
)
def test_folders_that_are_not_the_demos_are_refused(tmp_path: Path, options: list[str], files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    ran = command("--steps", "1", "--out", str(tmp_path), *options)
    assert ran.exit_code == 1, ran.output
    assert "error:" in ran.stderr
    assert str(tmp_path) in ran.stderr
    assert "choose another --out" in ran.stderr
    assert tree(tmp_path) == before


def test_a_finished_run_survives_a_plain_rerun(finished: Path) -> None:
    before = tree(finished)
    ran = command("--steps", "1", "--out", str(finished))
    assert ran.exit_code == 1
    assert all(word in ran.stderr for word in (str(finished), "`--resume`", "`--overwrite`", "another --out"))
    assert tree(finished) == before
    ran = command("--out", str(finished), "--overwrite", "--resume")
    assert ran.exit_code == 1
    assert "--resume and --overwrite" in ran.stderr
    assert tree(finished) == before


def test_overwrite_removes_everything_a_run_wrote(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    assert len(tree(out)) > 20
    demo_module._remove_run(DemoSettings(**TINY), out)
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_overwrite_and_resume_start_where_nothing_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / ".run.partial.json").touch()  # killed while run.json was written
    for k, options in enumerate([(False, False), (True, False), (False, True)]):
        demo_module._open_folder(DemoSettings(seed=k), tmp_path / str(k), *options)
        assert json.loads((tmp_path / str(k) / "run.json").read_text())["seed"] == k


def test_damaged_state_is_reported(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    checkpoint = out / "state" / "train" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(DemoError, match=r"checkpoint\.pt is damaged.*--overwrite"):
        run_demo(DemoSettings(**TINY), out, resume=True, progress=False)


# ------------------------------------------------------------------------------------------------ stopping and resuming

_HANGS = """
import sys, time
from fastdiff.cli.demo import DemoSettings, run_demo
from fastdiff.training import trainer

step = trainer._Run.train_step

def hang_after_three(self, *arguments):
    if self.step == 3:
        time.sleep(600)
    return step(self, *arguments)

trainer._Run.train_step = hang_after_three
run_demo(DemoSettings(**{settings!r}), sys.argv[1], progress=False)
"""


def test_a_killed_run_leaves_whole_files_and_resumes_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "state" / "train" / "checkpoint.pt"
    # In the scratch folder, with the fastdiff under test: in the checkout, its source tree would be found first.
    env = {**os.environ, "PYTHONPATH": str(Path(fastdiff.__file__).resolve().parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", _HANGS.format(settings=TINY), str(tmp_path)], cwd=tmp_path, env=env
    )
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()  # SIGKILL: nothing of the program runs after it
        process.wait()
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    assert len((tmp_path / "state" / "train" / "loss.csv").read_text().splitlines()) == 1 + 2
    with pytest.raises(DemoError, match=r"steps=6 \(now 7\)"):
        run_demo(DemoSettings(**{**TINY, "steps": 7}), tmp_path, resume=True, progress=False)
    run_demo(DemoSettings(**TINY), tmp_path, resume=True, progress=False)
    for name in REPEATABLE:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(("phase", "step"), [("train", 3), ("reflow", 3)])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, step: int
) -> None:
    from fastdiff.training import trainer

    original = trainer._Run.train_step

    def interrupted(self: trainer._Run, *arguments: object) -> float:
        if self.step == step and ("coupling" in self.settings) == (phase == "train"):
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(trainer._Run, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoSettings(**TINY), tmp_path, progress=False)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (tmp_path / "state" / "train" / "checkpoint.pt") in written
    assert ((tmp_path / "samples-16-before.png") in written) == (phase == "reflow")
    steps: list[int] = []

    def counted(self: trainer._Run, *arguments: object) -> float:
        steps.append(self.step)
        return original(self, *arguments)

    monkeypatch.setattr(trainer._Run, "train_step", counted)
    run_demo(DemoSettings(**TINY), tmp_path, resume=True, progress=False)
    assert steps == ([2, 3, 4, 5, 0, 1, 2, 3] if phase == "train" else [2, 3])  # nothing is done twice
    for name in REPEATABLE:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ command line


def command(*arguments: str):
    app = typer.Typer()
    app.command()(demo)
    return CliRunner().invoke(app, list(arguments))


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, finished: Path, tmp_path: Path) -> None:
    calls: list[tuple[DemoSettings, Path, bool, bool]] = []
    results = json.loads((finished / "results.json").read_text())

    def record(
        settings: DemoSettings, out: Path, *, resume: bool, overwrite: bool, progress: bool
    ) -> dict[str, object]:
        calls.append((settings, out, resume, overwrite))
        return results

    monkeypatch.setattr(demo_module, "run_demo", record)
    ran = command("--steps", "7", "--seed", "3", "--out", str(tmp_path / "x"), "--json")
    assert ran.exit_code == 0
    assert json.loads(ran.stdout) == results
    assert calls == [(DemoSettings(steps=7, seed=3), tmp_path / "x", False, False)]
    command("--overwrite", "--out", str(finished))  # a new run, with settings of its own
    assert calls[-1] == (DemoSettings(), finished, False, True)
    ran = command("--resume", "--out", str(finished))  # takes the settings of the run that is there
    assert ran.exit_code == 0
    assert calls[-1] == (DemoSettings(**TINY), finished, True, False)
    one_step = results["steps"]["1"]["after"]
    assert f"{one_step['frechet']:.2f}" in ran.stdout
    assert "report.html" in ran.stdout
    command("--resume", "--seed", "9", "--out", str(finished))
    assert calls[-1][0] == DemoSettings(**{**TINY, "seed": 9})

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "run_demo", interrupt)
    ran = command("--out", str(tmp_path / "x"))
    assert ran.exit_code == 130
    assert "--resume" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["--steps", "at least 1", "0"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--device", "toaster"], ["--device", "cpu, cuda or cuda:N", "'toaster'"]),
        (["--device", "meta"], ["--device", "'meta'"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'", "not available"]),
    ],
)
def test_bad_options_are_named(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    ran = command(*arguments, "--out", str(tmp_path / "out"))
    assert ran.exit_code == 1
    assert all(word in ran.stderr for word in ["error:", *words]), ran.stderr
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    ran = command("--out", str(tmp_path / "file"))
    assert ran.exit_code == 1
    assert "is a file" in ran.stderr
    assert (tmp_path / "file").read_text() == "precious"
    ran = command("--out", str(finished), "--resume", "--seed", "4")
    assert ran.exit_code == 1
    assert "seed=0 (now 4)" in ran.stderr
    (tmp_path / "run.json").write_text("{")
    ran = command("--out", str(tmp_path), "--resume")
    assert ran.exit_code == 1
    assert "run.json is not the record of a run" in ran.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    ran = command("--out", str(tmp_path / "out"))
    assert ran.exit_code == 1
    assert "pip install scikit-learn pillow" in ran.stderr
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_digits()
