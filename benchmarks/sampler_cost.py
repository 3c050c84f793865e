"""What sampling costs besides the model, and what modulation tables save: fastdiff beside diffusers, interleaved.

    python -m benchmarks.sampler_cost                    every solver on (1, 4, 64, 64) float32, with its diffusers twin
    python -m benchmarks.sampler_cost --pipeline         DiT-S/2, 20 guided steps: modulation tables and diffusers

The model returns a tensor that lies ready, so a loop's time is that of the sampler. fastdiff: ``sample`` with a plan
made before; diffusers: the public loop (``scale_model_input``, model, ``step``), less ``set_timesteps``, which it
needs before every run and which takes part in the race by itself. Both are given by the run's 20 steps, whatever the
evaluations of the model; "of it noise" is what an update that draws its noise takes longer than one that does not. Time
is that of the thread (all work is done in one), so that other processes count less; medians, and quartiles of the ratio
by round.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEPS, SHAPE = 20, (1, 4, 64, 64)
TARGET_US, TARGET_RATIO, TARGET_PIPELINE = 15.0, 5.0, 1.5
REQUIRED = ("ddim", "euler", "dpmpp_2m", "unipc_2")  # those of TARGET_RATIO
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "unipc_2": ("UniPCMultistepScheduler", {}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}),
}


def measure(seconds: float, solvers: Sequence[str] = ()) -> dict[str, Any]:
    """A record with one row per solver."""
    import torch

    from fastdiff import ops
    from fastdiff.cli._bench_timing import Contestant, quartiles, race
    from fastdiff.cli._machine import load_average, machine
    from fastdiff.samplers import SOLVERS, make_plan, sample, schedules

    noise, cpu = torch.randn(SHAPE), torch.device("cpu")
    ready = itertools.cycle([torch.randn(SHAPE) for _ in range(16)])  # a model's outputs are different tensors
    schedule = schedules.vp("scaled_linear")

    def model(x: Any, t: Any, cond: Any = None) -> Any:
        return next(ready)

    rows = []
    for name in solvers or SOLVERS:
        plan = make_plan(name, schedule, STEPS)
        ours = Contestant(name, [lambda plan=plan: sample(model, noise, plan=plan)])
        contestants, twin = [ours], _twin(name)
        if twin is not None:
            loop, prepare, calls = twin(noise, lambda: next(ready))
            contestants += [Contestant("loop", [loop]), Contestant("prepare", [prepare])]
        if plan.stochastic:
            seed, x = torch.tensor([1, 0]), torch.zeros(SHAPE)
            update = lambda seed, x=x: ops.linear_update((0.5, 0.5), (x, noise), seed=seed, out=x)  # noqa: E731
            contestants.append(Contestant("without noise", [lambda update=update: update(None)]))
            contestants.append(Contestant("noise", [lambda update=update, seed=seed: update(seed)]))
        race(contestants, cpu, seconds, clock=time.thread_time_ns)
        step = [1e6 * s / STEPS for s in ours.seconds]
        q1, median, q3 = quartiles(step)
        row: dict[str, Any] = {"solver": name, "nfe": plan.nfe, "us": median, "us_q1": q1, "us_q3": q3}
        draws = sum(kind == "n" for stage in plan.stages for (kind, _), _ in stage.terms)
        row["noise_us"] = 0.0
        if draws:
            pairs = zip(*(c.seconds for c in contestants[-2:]), strict=True)
            row["noise_us"] = draws / STEPS * quartiles([1e6 * (b - a) for a, b in pairs])[1]
        row["us_per_call"] = (median - row["noise_us"]) * STEPS / plan.nfe
        if twin is not None:
            theirs = [1e6 * (a - b) / STEPS for a, b in zip(*(c.seconds for c in contestants[1:3]), strict=True)]
            r1, ratio, r3 = quartiles([a / b for a, b in zip(theirs, step, strict=True)])
            row |= {"diffusers": TWINS[name][0], "diffusers_settings": TWINS[name][1], "diffusers_calls": calls}
            row |= {"diffusers_us": quartiles(theirs)[1], "ratio": ratio, "ratio_q1": r1, "ratio_q3": r3}
        rows.append(row)
    found = {**machine(), "load_average_after": load_average()}
    return {"what": "sampler cost", "shape": SHAPE, "steps": STEPS, "machine": found, "rows": rows}


def _twin(name: str) -> Callable[..., tuple[Callable[[], Any], Callable[[], Any], int]] | None:
    """``twin(noise, output) -> (loop, set_timesteps alone, model evaluations)``, or None."""
    try:
        import diffusers
    except ImportError:
        return None
    if name not in TWINS:
        return None
    cls, settings = TWINS[name]

    def make(noise: Any, output: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any], int]:
        import torch

        scheduler = getattr(diffusers, cls)(**_BETAS, **settings)

        @torch.no_grad()
        def loop() -> Any:
            scheduler.set_timesteps(STEPS)
            x = noise
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(output(), t, x).prev_sample
            return x

        scheduler.set_timesteps(STEPS)
        return loop, lambda: scheduler.set_timesteps(STEPS), len(scheduler.timesteps)

    return make


# ----------------------------------------------------------------------------------------------------------- pipeline


def measure_pipeline(seconds: float, steps: int = STEPS, scale: float = 4.0, **sizes: int) -> dict[str, Any]:
    """DiT-S/2 with one set of random weights: diffusers' `DiTPipeline`, and ours with and without modulation tables."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from fastdiff.cli._bench_timing import Contestant, race, ratios
    from fastdiff.cli._machine import load_average, machine
    from fastdiff.models import DiT
    from fastdiff.samplers import make_plan, sample, schedules

    config = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "sample_size": 32, **sizes}
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=1000, **config)
    for parameter in theirs.parameters():  # fresh gates are zero, which would switch every block off
        torch.nn.init.normal_(parameter, std=0.02)
    theirs.eval()
    # A decoder of one small convolution: what remains is the loop.
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, layers_per_block=1, latent_channels=4).eval()
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    pipe = DiTPipeline(theirs, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(steps)
    times = torch.tensor([*map(float, scheduler.timesteps), -1.0], dtype=torch.float64)
    plan = make_plan("ddim", schedules.vp("linear"), None, times=times)
    model, labels = DiT.from_diffusers(theirs).eval(), torch.tensor([207])

    def noise() -> Any:
        return torch.randn(1, 4, config["sample_size"], config["sample_size"], generator=_seeded())

    def finish(latents: Any) -> Any:
        with torch.no_grad():
            return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def tables() -> Any:
        table = model.precompute_modulation(times[:-1].float(), labels, guidance=True)
        steps_left = iter(range(steps))
        return finish(
            sample(
                lambda x, t, cond: model.forward_with_cfg(x, None, None, scale, modulation=table.at(next(steps_left))),
                noise(),
                plan=plan,
            )
        )

    def plain() -> Any:
        return finish(sample(lambda x, t, cond: model.forward_with_cfg(x, t, labels, scale), noise(), plan=plan))

    def pipeline() -> Any:
        arguments = {"class_labels": [207], "guidance_scale": scale, "num_inference_steps": steps}
        return pipe(**arguments, generator=_seeded(), output_type="pt").images

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipeline()
        errors = {f.__name__: (f() - expected).abs().max().item() for f in (tables, plain)}
        contestants = [Contestant(f.__name__, [f]) for f in (tables, plain, pipeline)]
        race(contestants, torch.device("cpu"), seconds)
    ours, without, other = contestants
    return {
        "what": "DiT-S/2 sampling",
        "steps": steps,
        "guidance_scale": scale,
        "config": config,
        "machine": {**machine(), "load_average_after": load_average()},
        "errors": errors,
        "times": {c.name: c.summary() for c in contestants},
        "ratio": ratios(other, ours),
        "ratio_without_tables": ratios(other, without),
    }


def _seeded() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------------------------------------- report


def table(record: dict[str, Any]) -> Any:
    """The record's rows; a figure that misses its target is marked with an exclamation mark."""
    from fastdiff.cli._table import Cell, Table

    columns = ("solver", "calls", "µs / step", "quartiles", "of it noise", "µs / call", "diffusers µs", "ratio", "twin")
    found = Table(columns, frozenset(columns[1:8]))
    for row in record["rows"]:
        slow = row["us_per_call"] > TARGET_US
        cells: list[Any] = [row["solver"], str(row["nfe"]), f"{row['us']:.1f}"]
        cells += [f"{row['us_q1']:.1f} – {row['us_q3']:.1f}", f"{row['noise_us']:.1f}" if row["noise_us"] else "–"]
        cells.append(Cell(f"{row['us_per_call']:.1f}{' !' * slow}", "bad" if slow else ""))
        if "ratio" in row:
            low = row["solver"] in REQUIRED and row["ratio"] < TARGET_RATIO
            ratio = f"{row['ratio']:.1f}× ({row['ratio_q1']:.1f} – {row['ratio_q3']:.1f}){' !' * low}"
            cells += [f"{row['diffusers_us']:.0f}", Cell(ratio, "bad" if low else "good"), row["diffusers"]]
        else:
            cells += ["–", "–", "–"]
        found.add(*cells)
    return found


def page(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    m = record["machine"]
    where = f"{m['cpu']}; {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; {m['date']}; load "
    where += f"{m['load_average']} to {m['load_average_after']}"
    if record["what"] == "sampler cost":
        shape = "×".join(map(str, record["shape"]))
        head = f"# Samplers: µs per step beyond the model, {shape} float32, {record['steps']} steps"
        targets = f"Targets: at most {TARGET_US:g} µs a call, noise apart; at least {TARGET_RATIO:g}× for "
        targets += f"{', '.join(REQUIRED)}. ! marks what misses them."
        return "\n\n".join([head, table(record).markdown(), targets, where, __doc__.split("\n\n")[2].strip()]) + "\n"
    lines = [f"# DiT-S/2: {record['steps']} DDIM steps, guidance {record['guidance_scale']:g}, one image, float32", ""]
    lines += ["| | ms | pipeline / this | largest difference |", "|---|--:|--:|--:|"]
    for name, ratio in (("tables", "ratio"), ("plain", "ratio_without_tables"), ("pipeline", "")):
        ms = record["times"][name]["median_us"] * 1e-3
        q = record.get(ratio)
        against = f"{q['median']:.2f}× ({q['q1']:.2f} – {q['q3']:.2f})" if q else "–"
        error = f"{record['errors'][name]:.1e}" if name in record["errors"] else "–"
        lines.append(f"| {_CONTESTANTS[name]} | {ms:.0f} | {against} | {error} |")
    return "\n".join([*lines, "", f"Target: at least {TARGET_PIPELINE:g}× with tables.", "", where]) + "\n"


_CONTESTANTS = {
    "tables": "fastdiff, modulation tables (made anew in every run)",
    "plain": "fastdiff, without tables",
    "pipeline": "diffusers DiTPipeline",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", action="store_true", help="DiT-S/2 sampling in place of the solvers")
    parser.add_argument("--solver", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per row, at least")
    parser.add_argument("--threads", type=int, help="default: 1; --pipeline: torch's choice")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    import torch

    from fastdiff.cli._table import to_json, write_text

    if options.threads or not options.pipeline:
        torch.set_num_threads(options.threads or 1)
    if options.pipeline:
        record = measure_pipeline(options.seconds)
        kept = record["ratio"]["median"] >= TARGET_PIPELINE
    else:
        record = measure(options.seconds, options.solver)
        fast = all(row["us_per_call"] <= TARGET_US for row in record["rows"])
        kept = fast and all(row.get("ratio", 99) >= TARGET_RATIO for row in record["rows"] if row["solver"] in REQUIRED)
    text = page(record)
    print(text if options.pipeline else f"{table(record).text()}\n", end="")
    if options.json:
        write_text(options.json, to_json(record) + "\n")
    if options.markdown:
        write_text(options.markdown, text)
    return 0 if kept else 1


if __name__ == "__main__":
    import os

    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
