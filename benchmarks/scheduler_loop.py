"""What a sampling loop costs beside its model: schedulers of diffusers, the same under `accelerate`, and our own loop.

    python -m benchmarks.scheduler_loop
    python -m benchmarks.scheduler_loop --threads 1 --clock cpu --json DATE-MACHINE.json --markdown DATE-MACHINE.md

The model returns a tensor that was there before, so what is timed is the loop: scaling the model's input, guidance
(where there is any), the step. Contestants take turns, whole loops at a time (`fastdiff.cli._bench_timing`). On a
busy machine a loop of diffusers takes longer than the slice of time it is given, ours does not: there, ``--clock cpu``
with one thread counts the time that the process itself ran.


- diffusers: the loop of its pipelines (`return_dict=False`, the timesteps one by one, guidance as they write it);
- accelerated: the very same code, the scheduler after `accelerate`;
- own loop: `ops.ddim_step`, `ops.euler_step` or `ops.linear_update` with guidance folded in (README, "A sampler loop");
  the predicted data, which a scheduler hands out beside the next state, is not made;
- compile: diffusers' step under `torch.compile`, timesteps as Python integers, for DDIM.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
}
GUIDANCE = 4.0


class Loop:
    """One schedule, one start, one prediction; loops over them return the last state."""

    def __init__(self, family: str, shape: Sequence[int], steps: int, guided: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.family, self.steps, self.guided, self.device = family, steps, guided, device
        self.start = torch.randn(*shape, device=device)
        self.cond, self.uncond = (0.1 * torch.randn(*shape, device=device) for _ in range(2))
        self.both = torch.cat([self.uncond, self.cond])

    def scheduler(self, fast: bool) -> Any:
        import diffusers

        from fastdiff.integrations.accelerate import accelerate

        name, config = FAMILIES[self.family]
        scheduler = getattr(diffusers, name)(**config)
        return accelerate(scheduler) if fast else scheduler

    def pipeline(
        self, scheduler: Any, step: Callable[..., Any] | None = None, whole: bool = False
    ) -> Callable[[], torch.Tensor]:
        """What a pipeline of diffusers does between two calls of its model."""
        scales = hasattr(scheduler, "scale_model_input")
        scheduler.set_timesteps(self.steps, device=self.device)
        table = scheduler.timesteps.tolist() if whole else scheduler.timesteps

        def run() -> torch.Tensor:
            x = self.start
            self._rewind(scheduler)
            for t in table:
                if scales:
                    scheduler.scale_model_input(x, t)
                pred = self.cond
                if self.guided:
                    uncond, cond = self.both.chunk(2)
                    pred = uncond + GUIDANCE * (cond - uncond)
                x = (step or scheduler.step)(pred, t, x, return_dict=False)[0]
            return x

        return run

    @staticmethod
    def _rewind(scheduler: Any) -> None:
        """Where `set_timesteps`, which is timed apart, leaves a scheduler."""
        if hasattr(scheduler, "model_outputs"):
            scheduler.model_outputs, scheduler.lower_order_nums = [None] * scheduler.config.solver_order, 0
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = None

    def own(self) -> Callable[[], torch.Tensor] | None:
        """The same numbers by our operators alone; None where that is no loop of a line or two."""
        from fastdiff import ops

        scheduler = self.scheduler(False)
        scheduler.set_timesteps(self.steps)
        how: dict[str, Any] = {"uncond": self.uncond, "guidance_scale": GUIDANCE} if self.guided else {}
        if self.family == "DDIM":
            ratio = scheduler.config.num_train_timesteps // self.steps
            levels = scheduler.alphas_cumprod.tolist()
            times = scheduler.timesteps.tolist()
            pairs = [(levels[t], levels[t - ratio] if t >= ratio else 1.0) for t in times]

            def ddim() -> torch.Tensor:
                x = self.start
                for level, after in pairs:
                    x = ops.ddim_step(x, self.cond, level, after, **how)
                return x

            return ddim
        if self.family in ("Euler", "flow matching"):
            sigmas = scheduler.sigmas.tolist()
            scales = [1 / (s * s + 1) ** 0.5 for s in sigmas] if self.family == "Euler" else None
            moves = [after - s for s, after in itertools.pairwise(sigmas)]

            def euler() -> torch.Tensor:
                x = self.start
                for i, dt in enumerate(moves):
                    if scales:
                        ops.linear_update([scales[i]], [x])
                    x = ops.euler_step(x, self.cond, dt, **how)
                return x

            return euler
        return None

    def compiled(self) -> Callable[[], torch.Tensor] | None:
        """diffusers' DDIM step, compiled. With timesteps that are tensors it breaks into pieces and gains nothing."""
        if self.family != "DDIM":
            return None
        scheduler = self.scheduler(False)
        scheduler.set_timesteps(self.steps)
        return self.pipeline(scheduler, torch.compile(scheduler.step), whole=True)


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole record."""
    from fastdiff.cli._bench_timing import Contestant, ratios
    from fastdiff.cli._machine import machine

    device = torch.device(options.device)
    record: dict[str, Any] = {
        "ok": True, "machine": machine(), "device": options.device, "clock": options.clock,
        "steps": options.steps, "rows": [], "notes": [],
    }  # fmt: skip
    for family in options.family or FAMILIES:
        for shape in options.shapes:
            for guided in (False, True):
                say(f"{family} {list(shape)} guided={guided}")
                loop = Loop(family, shape, options.steps, guided, device)
                runs: dict[str, Any] = {
                    "diffusers": loop.pipeline(loop.scheduler(False)),
                    "accelerated": loop.pipeline(loop.scheduler(True)),
                    "own loop": loop.own(),
                }
                if options.compile and shape == options.shapes[0]:
                    runs["compile"] = loop.compiled()
                expected = runs["diffusers"]()
                contestants, differences = [], {}
                for name, run in runs.items():
                    if run is None:
                        continue
                    try:
                        off = (run() - expected).abs().max().item() / expected.abs().max().item()
                    except Exception as error:  # the others are still measured
                        record["notes"].append(f"{family}: {name} failed: {type(error).__name__}: {error}"[:300])
                        record["ok"] &= name == "compile"
                        continue
                    if not off <= options.tolerance:
                        record["ok"] = False
                        record["notes"].append(
                            f"{family} {list(shape)}: {name} is WRONG: off by {off:.3g} of the range"
                        )
                    differences[name] = off
                    contestants.append(Contestant(name, [run]))
                _race(contestants, options, device)
                row: dict[str, Any] = {"family": family, "shape": list(shape), "guided": guided, "contestants": {}}
                for c in contestants:
                    found = {k: v / options.steps if k.endswith("_us") else v for k, v in c.summary().items()}
                    ratio = ratios(contestants[0], c)
                    row["contestants"][c.name] = {**found, "ratio": ratio, "difference": differences[c.name]}
                record["rows"].append(row)
        record["rows"].append(_schedule(family, options, device))
    return record


def _race(contestants: list[Any], options: argparse.Namespace, device: torch.device) -> None:
    """Turns by the wall's clock, or by the process's own: whole loops, after one that is not timed."""
    from fastdiff.cli._bench_timing import race

    if options.clock == "wall":
        race(contestants, device, options.seconds, host=device.type == "cuda")
        return
    end, rounds = time.perf_counter() + options.seconds, 0
    while rounds < 7 or time.perf_counter() < end:
        first = rounds % len(contestants)
        for c in [*contestants[first:], *contestants[:first]]:
            (call,) = c.calls
            call()
            start = time.process_time_ns()
            for _ in range(3):
                call()
            c.seconds.append((time.process_time_ns() - start) * 1e-9 / 3)
            c.repeat = 3
        rounds += 1


def _schedule(family: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What `set_timesteps` costs, in a row of its own."""
    from fastdiff.cli._bench_timing import Contestant, ratios

    loop = Loop(family, (1,), options.steps, False, device)
    both = {name: loop.scheduler(name == "accelerated") for name in ("diffusers", "accelerated")}
    contestants = [Contestant(name, [lambda s=s: s.set_timesteps(options.steps)]) for name, s in both.items()]
    _race(contestants, options, device)
    row: dict[str, Any] = {"family": family, "shape": None, "guided": False, "contestants": {}}
    for c in contestants:
        row["contestants"][c.name] = {**c.summary(), "ratio": ratios(contestants[0], c)}
    return row


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    names = ("diffusers", "accelerated", "own loop", "compile")
    lines = [
        f"# Schedulers on {record['device']}, {record['machine']['date'][:10]}",
        "",
        f"Microseconds ({record['clock']} time) a step of a loop of {record['steps']} steps beside its model, float32: "
        "median (quartiles), and diffusers' time / this time, median of the ratios of rounds in which all took turns. "
        f"*set_timesteps* is one call. Guided: `uncond + {GUIDANCE:g} (cond - uncond)`, in the loop's own code but for "
        "*own loop*, where the step does it and the predicted data is not made.",
        "",
        "| scheduler | shape | guided | " + " | ".join(names) + " |",
        "|---|---|---|" + "---:|" * len(names),
    ]
    for row in record["rows"]:
        cells = []
        for name in names:
            found = row["contestants"].get(name)
            if found is None:
                cells.append("–")
                continue
            cell = f"{found['median_us']:.1f} ({found['q1_us']:.1f}–{found['q3_us']:.1f})"
            cells.append(cell if name == "diffusers" else f"**{found['ratio']['median']:.2f}×** {cell}")
        shape = "set_timesteps" if row["shape"] is None else f"[{','.join(map(str, row['shape']))}]"
        lines.append(f"| {row['family']} | {shape} | {'yes' if row['guided'] else ''} | " + " | ".join(cells) + " |")
    worst = max(c.get("difference", 0.0) for row in record["rows"] for c in row["contestants"].values())
    notes = [*record["notes"], f"last states differ by {worst:.1e} of their range at most"]
    m = record["machine"]
    gpus = ", ".join(gpu["name"] for gpu in m["gpus"])
    notes.append(f"{gpus or m['cpu']}; {torch.get_num_threads()} threads; torch {m['torch']}; {m['date']}")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when ours failed or gave other numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler_loop", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="may be repeated (default: all)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--threads", type=int, help="of torch and of the kernels (default: as torch has it)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for every row")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the last state, relative to its range")
    parser.add_argument("--small", action="store_true", help="the first shape only")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--markdown", metavar="PATH")
    options = parser.parse_args(arguments)
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.shapes = SHAPES[:1] if options.small else SHAPES
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries', while they are imported
        record = measure(options, lambda line: print(line, file=sys.stderr, flush=True))
    record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    page = markdown(record)
    print(page, end="")
    for path, text in ((options.json, json.dumps(record, indent=1) + "\n"), (options.markdown, page)):
        if path:
            part = Path(path).with_name(Path(path).name + ".part")
            part.write_text(text)
            os.replace(part, path)
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    sys.exit(main())
