"""``fastdiff demo``: the main job on real pictures, end to end, in about two minutes on two CPU cores.

A class-conditional DiT learns scikit-learn's handwritten digits as a rectified flow, is straightened by one round of
reflow, and is sampled with 1, 2, 4 and 16 Euler steps before and after. The pictures are judged by a classifier that
has seen real digits only, and everything is kept in one folder with a report.

Training state lives in ``OUT/state``; every file is renamed into place when it is complete, so that the process may be
killed at any moment and ``--resume`` continues bitwise from the last checkpoint. The demo starts in an empty folder
only, and what it removes (``--overwrite``) is named file by file: no other file in the folder is ever touched.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastdiff.data import DigitJudge, Digits
    from fastdiff.training import RectifiedFlowModel

__all__ = ["DemoError", "DemoSettings", "demo", "run_demo"]

STEP_COUNTS = (1, 2, 4, 16)
RECORD = "run.json"
RESULTS = (
    *(f"samples-{n:02d}-{when}.png" for n in STEP_COUNTS for when in ("before", "after")),
    *("samples-real.png", "loss.png", "frechet.png"),
    *("model-before-reflow.safetensors", "model.safetensors", "results.json", "report.html"),
)


class DemoError(Exception):
    """A wrong option, or a folder or machine that does not fit it: reported without a traceback."""


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """All that the pictures depend on; saved with the run, and compared when it is resumed."""

    steps: int = 2000
    seed: int = 0
    device: str = "cpu"
    reflow_steps: int | None = None  # None: a third of steps
    batch_size: int = 48
    lr: float = 4e-3
    reflow_lr: float = 1.5e-3
    ema_decay: float = 0.995
    hidden_size: int = 64
    depth: int = 4
    num_heads: int = 2
    num_pairs: int = 4096
    pair_steps: int = 12
    judge_epochs: int = 15
    columns: int = 10  # pictures of each class in a grid
    checkpoint_every: int = 100
    speed_rounds: int = 7


def demo(
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps (default: 2000); reflow takes a third as many.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, the models and the report.")] = Path(
        "fastdiff-demo"
    ),
    seed: Annotated[int | None, typer.Option(help="Same seed, same pictures (default: 0).", show_default=False)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the folder; other files stay.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: cpu).", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Train, reflow and sample a diffusion transformer on real handwritten digits, and write a report.

    About two minutes on two CPU cores. It may be interrupted at any time: --resume continues it.
    """
    from rich.console import Console

    given = {"steps": steps, "seed": seed, "device": device}
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    console = Console(stderr=True)
    try:
        settings = _resumed_settings(out, overrides) if resume and not overwrite else None
        results = run_demo(
            settings or DemoSettings(**overrides), out, resume=resume, overwrite=overwrite, progress=True
        )
    except (DemoError, ImportError, OSError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print(
            f"\ninterrupted; what was written is kept. Continue with: fastdiff demo --out {out} --resume",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        from fastdiff.cli._report import print_summary

        print_summary(results, out)


def run_demo(
    settings: DemoSettings,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Does what ``fastdiff demo`` does.

    Args:
        settings: size, length and seed of the run.
        out: folder for the results; made if missing. It must be empty, or hold an earlier run and one of the following
            be given.
        resume: continue the run in ``out``; with nothing there yet, start it.
        overwrite: remove the files of the run in ``out``, and none but these, and start anew.
        progress: show progress on stderr.

    Returns:
        The figures, as in ``out/results.json``.

    Raises:
        DemoError: an option is out of range, the folder or device cannot be used, the run in ``out`` was started with
            other settings or is damaged, or training diverged.
        ImportError: scikit-learn, matplotlib or Pillow is missing.
    """
    out = Path(out)
    _check_packages()
    _check_settings(settings, out)
    import torch

    from fastdiff.cli import _report
    from fastdiff.data import load_digits, train_digit_judge
    from fastdiff.models import DiT
    from fastdiff.training import RectifiedFlowModel, reflow, train_rectified_flow

    _open_folder(settings, out, resume, overwrite)
    clock = _Clock(progress)
    device = torch.device(settings.device)
    seed = settings.seed
    reflow_steps = settings.reflow_steps or max(1, settings.steps // 3)

    with clock.phase("digits and their judge"):
        train, held_out = load_digits()
        judge = train_digit_judge(train, epochs=settings.judge_epochs, seed=seed)
        scores = _Scores(judge, train, held_out)

    with clock.phase("training"), _training_errors():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = DiT(
                input_size=8,
                patch_size=2,
                in_channels=1,
                hidden_size=settings.hidden_size,
                depth=settings.depth,
                num_heads=settings.num_heads,
                class_dropout_prob=0.0,
                num_classes=10,
                learn_sigma=False,
                time_scale=1000.0,
            )
        model = RectifiedFlowModel(backbone).to(device)
        train_rectified_flow(
            model,
            train.images,
            labels=train.labels,
            steps=settings.steps,
            batch_size=settings.batch_size,
            lr=settings.lr,
            lr_schedule="cosine",
            ema_decay=settings.ema_decay,
            seed=seed,
            out=out / "state" / "train",
            resume=resume,
            progress=progress,
            checkpoint_every=settings.checkpoint_every,
        )
        _save_model(model, out / "model-before-reflow.safetensors")

    figures: dict[str, dict[str, Any]] = {str(n): {} for n in STEP_COUNTS}
    pictures = _Pictures(out, settings.columns, seed, device)
    pictures.real(train)
    with clock.phase("sampling before reflow"):
        for n in STEP_COUNTS:
            figures[str(n)]["before"] = scores.of(model, n, seed)
            pictures.samples(model, n, "before")

    with clock.phase("reflow"), _training_errors():
        reflow(
            model,
            source=_source,
            labels=train.labels,
            num_pairs=settings.num_pairs,
            num_steps=settings.pair_steps,
            steps=reflow_steps,
            batch_size=settings.batch_size,
            lr=settings.reflow_lr,
            lr_schedule="cosine",
            ema_decay=settings.ema_decay,
            seed=seed,
            out=out / "state" / "reflow",
            resume=resume,
            progress=progress,
            checkpoint_every=settings.checkpoint_every,
        )
        _save_model(model, out / "model.safetensors")

    with clock.phase("sampling after reflow"):
        for n in STEP_COUNTS:
            figures[str(n)]["after"] = scores.of(model, n, seed)
            pictures.samples(model, n, "after")

    with clock.phase("speed against the reference"):
        speed = _measure_speed(model, train, settings, device)

    results: dict[str, Any] = {
        "settings": {**dataclasses.asdict(settings), "reflow_steps": reflow_steps},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": figures,
        "reference": scores.reference(seed),
        "speed": speed,
        "environment": _environment(),
        "seconds": clock.seconds,
        "resumed": resume,  # the seconds are then those of the last part
    }
    curves = {
        "training": _report.read_losses(out / "state" / "train" / "loss.csv"),
        "reflow": _report.read_losses(out / "state" / "reflow" / "round-1" / "loss.csv"),
    }
    with clock.phase("report"):
        _report.plot_losses(curves, out / "loss.png")
        _report.plot_distances(results, out / "frechet.png")
    results["seconds"]["total"] = sum(clock.seconds.values())
    _report.write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    _report.write_html(results, out)
    return results


# ---------------------------------------------------------------------------------------------- options and folders


def _check_packages() -> None:
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow", "safetensors": "safetensors"}
    missing = []
    for module, package in needed.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(f"fastdiff demo needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _check_settings(settings: DemoSettings, out: Path) -> None:
    import torch

    for name in ("steps", "batch_size", "num_pairs", "pair_steps", "judge_epochs", "columns", "checkpoint_every"):
        if getattr(settings, name) < 1:
            raise DemoError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(settings, name)}")
    if not 0 <= settings.seed < 2**32:
        raise DemoError(f"--seed: expected 0 to 2^32 - 1, got {settings.seed}")
    if settings.speed_rounds < 2:
        raise DemoError(f"--speed-rounds: expected at least 2, got {settings.speed_rounds}")
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        raise DemoError(f"--device: expected cpu, cuda or cuda:N, got {settings.device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device: expected cpu, cuda or cuda:N, got {settings.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DemoError(f"--device: {settings.device!r} is not available here (torch sees {count} GPUs)")
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out: expected a folder, but {out} is a file")


def _resumed_settings(out: Path, overrides: dict[str, Any]) -> DemoSettings | None:
    """The settings of the run in ``out`` (None without one) under the options that were given again."""
    path = out / RECORD
    if not path.is_file():
        return None
    return dataclasses.replace(_read_settings(path), **overrides)


def _read_settings(path: Path) -> DemoSettings:
    """The settings in a run.json that the demo wrote; anything else of that name is refused."""
    expected = dataclasses.asdict(DemoSettings())
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or saved.keys() != expected.keys():
            raise ValueError("it has other entries")
        allowed = {k: {type(v), int} if isinstance(v, float) else {type(v)} for k, v in expected.items()}
        allowed["reflow_steps"] = {int, type(None)}
        wrong = [k for k, v in saved.items() if type(v) not in allowed[k]]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: of another type")
    except ValueError as error:  # of JSON and of UTF-8 as well
        raise DemoError(
            f"--out: {path} is not the record of a run of this version ({error}); choose another --out"
        ) from error
    return DemoSettings(**saved)


def _open_folder(settings: DemoSettings, out: Path, resume: bool, overwrite: bool) -> None:
    """Leaves ``out`` with a run.json that describes this run and no remains of another one, or refuses it untouched.

    The results of two runs must not be mixed, and nothing that is not the demo's own may be lost.
    """
    from fastdiff.cli._report import write_text
    from fastdiff.training._files import partial_path

    if resume and overwrite:
        raise DemoError("--resume and --overwrite: expected one of them, got both")
    record = out / RECORD
    if record.is_file():
        saved = _read_settings(record)
        if not resume and not overwrite:
            raise DemoError(
                f"--out: {out} holds an earlier run: `--resume` continues it, `--overwrite` replaces it, or choose "
                "another --out"
            )
        if resume:
            before, now = dataclasses.asdict(saved), dataclasses.asdict(settings)
            different = [f"{k}={before[k]} (now {now[k]})" for k in before if before[k] != now[k]]
            if different:
                raise DemoError(
                    f"--resume: the run in {out} was started with {', '.join(different)}; resume it with the same "
                    "settings, or start another one with another --out"
                )
            return
        _remove_run(saved, out)
    elif out.is_dir() and any(path != partial_path(record) for path in out.iterdir()):
        raise DemoError(
            f"--out: expected an empty folder or an earlier run of the demo, but {out} holds other files; choose "
            "another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def _remove_run(saved: DemoSettings, out: Path) -> None:
    """Removes the files, by name, that a run with the settings ``saved`` writes, and the folders that this empties.

    All but run.json, which the next run replaces: killed half-way, the folder is still known as the demo's.
    """
    from fastdiff.training._files import partial_path
    from fastdiff.training.reflow import pair_files
    from fastdiff.training.trainer import RUN_FILES

    state = out / "state"
    train, rounds = state / "train", state / "reflow"
    pairs = rounds / "round-1" / "pairs"
    files = [out / name for name in RESULTS]
    files += [folder / name for folder in (train, pairs.parent) for name in RUN_FILES]
    files += pair_files(pairs, saved.num_pairs)
    for path in files:
        for name in (path, partial_path(path)):  # the latter is left by a kill in the middle of a write
            if name.is_file() or name.is_symlink():
                name.unlink()
    for folder in (pairs, pairs.parent, rounds, train, state):
        with suppress(OSError):  # not there, or not empty: it holds somebody's files
            folder.rmdir()


@contextmanager
def _training_errors() -> Iterator[None]:
    """What a damaged state or a diverged loss ends the training with, as a message in place of a traceback."""
    from fastdiff.training._files import DamagedFileError

    try:
        yield
    except (DamagedFileError, FloatingPointError) as error:
        raise DemoError(f"{error} (`--overwrite` starts the demo anew)") from error


def _save_model(model: RectifiedFlowModel, path: Path) -> None:
    """The backbone under the published names; what it takes to build it again is in the metadata.

    In one entry, because safetensors writes several in an order that changes from run to run.
    """
    from safetensors.torch import save_file

    from fastdiff.training._files import replacing

    backbone = model.backbone
    metadata = {"fastdiff": json.dumps({"model": "DiT", "prediction": "flow", "config": backbone.config})}
    with replacing(path) as temporary:
        save_file({k: v.contiguous().cpu() for k, v in backbone.state_dict().items()}, temporary, metadata=metadata)


# ------------------------------------------------------------------------------------------------ scores and pictures


def _source(n: int, generator: torch.Generator) -> Tensor:
    import torch

    return torch.randn(n, 1, 8, 8, generator=generator)


class _Scores:
    """Accuracy and Fréchet distance of sets of pictures, always against the held-out digits."""

    def __init__(self, judge: DigitJudge, train: Digits, held_out: Digits) -> None:
        self.judge, self.train, self.held_out = judge, train, held_out

    def of(self, model: RectifiedFlowModel, num_steps: int, seed: int) -> dict[str, float]:
        """One sample for each held-out digit, of its class; the same noise for every model and step count."""
        import torch

        labels = self.held_out.labels
        x_0 = _source(len(labels), torch.Generator().manual_seed(seed + 1))
        device = next(model.parameters()).device
        return self._judge(model.sample(x_0.to(device), num_steps, labels.to(device)).cpu(), labels)

    def reference(self, seed: int) -> dict[str, Any]:
        """What real digits score, and what ten blurry class means score."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        n = len(self.held_out.labels)
        subsets = [torch.randperm(len(self.train.labels), generator=generator)[:n] for _ in range(8)]
        real = [self._judge(self.train.images[index], self.train.labels[index])["frechet"] for index in subsets]
        means = torch.stack([self.train.images[self.train.labels == k].mean(0) for k in range(10)])
        return {
            "images": n,
            "classifier_accuracy": self.judge.accuracy(*self.held_out),
            "frechet_real": statistics.mean(real),
            "frechet_real_min": min(real),
            "frechet_real_max": max(real),
            "class_means": self._judge(means[self.held_out.labels], self.held_out.labels),
        }

    def _judge(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        import torch

        from fastdiff.data import frechet_distance

        with torch.no_grad():
            distance = frechet_distance(self.judge.features(images), self.judge.features(self.held_out.images))
        return {"accuracy": self.judge.accuracy(images, labels), "frechet": distance}


class _Pictures:
    """Grids with one row for each class; a cell starts from the same noise in every grid."""

    def __init__(self, out: Path, columns: int, seed: int, device: torch.device) -> None:
        import torch

        self.out, self.columns, self.device = out, columns, device
        self.labels = torch.arange(10).repeat_interleave(columns)
        self.noise = _source(len(self.labels), torch.Generator().manual_seed(seed + 2))

    def samples(self, model: RectifiedFlowModel, num_steps: int, when: str) -> None:
        from fastdiff.cli._report import save_grid

        images = model.sample(self.noise.to(self.device), num_steps, self.labels.to(self.device)).cpu()
        title = f"{num_steps} Euler step{'s' if num_steps > 1 else ''}, {when} reflow"
        save_grid(images, self.columns, title, self.out / f"samples-{num_steps:02d}-{when}.png")

    def real(self, digits: Digits) -> None:
        import torch

        from fastdiff.cli._report import save_grid

        rows = [digits.images[digits.labels == k][: self.columns] for k in range(10)]
        save_grid(torch.cat(rows), self.columns, "Real digits", self.out / "samples-real.png")


# -------------------------------------------------------------------------------------------------------------- speed


def _measure_speed(
    model: RectifiedFlowModel, train: Digits, settings: DemoSettings, device: torch.device
) -> dict[str, Any]:
    """Milliseconds with our kernels and with the plain PyTorch reference, taken in turns so that both meet the same
    neighbours; the ratio is the median of the rounds' ratios."""
    import torch

    model = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(train.labels), (settings.batch_size,), generator=generator)
    x_1, labels = train.images[index].to(device), train.labels[index].to(device)
    x_0 = _source(len(index), generator).to(device)
    t = torch.rand(len(index), generator=generator).to(device)

    def training_step() -> None:
        x_t, target = model.forward_flow(x_0, x_1, t)
        loss = (model(x_t, t, labels) - target).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    def sampling() -> None:
        model.sample(x_0, 4, labels)

    return {
        "training_step": _interleaved(training_step, device, settings.speed_rounds),
        "sampling_4_steps": _interleaved(sampling, device, settings.speed_rounds),
        "batch_size": settings.batch_size,
        "rounds": settings.speed_rounds,
    }


def _interleaved(job: Callable[[], None], device: torch.device, rounds: int) -> dict[str, float]:
    import torch

    import fastdiff

    def seconds(backend: str) -> float:
        with fastdiff.use_backend(backend):
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

    backends = ("auto", "reference")
    for backend in backends:
        seconds(backend)  # first calls allocate and compile
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for k in range(rounds):
        for backend in backends if k % 2 == 0 else backends[::-1]:
            times[backend].append(seconds(backend))
    ratios = [b / a for a, b in zip(times["auto"], times["reference"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ours_ms": 1e3 * statistics.median(times["auto"]),
        "reference_ms": 1e3 * statistics.median(times["reference"]),
        "speedup": statistics.median(ratios),
        "speedup_q1": quartiles[0],
        "speedup_q3": quartiles[2],
    }


def _environment() -> dict[str, Any]:
    import torch

    import fastdiff

    return {
        "fastdiff": fastdiff.build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


class _Clock:
    """Announces the phases and keeps their wall-clock seconds."""

    def __init__(self, announce: bool) -> None:
        self.announce, self.seconds = announce, dict[str, float]()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        from rich.console import Console

        if self.announce:
            Console(stderr=True).print(f"[bold]{name}[/]", highlight=False)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
