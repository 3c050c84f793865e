"""One forward pass of DiT: ours beside diffusers' model with the same weights; and what modulation tables save.

    python -m benchmarks.dit_forward                  DiT-S/2, 32 x 32 latents, batch 4, float32
    python -m benchmarks.dit_forward --modulation     batch 1, with and without a table, DiT-S/2 to DiT-L/2

Contestants take turns in one run; a ratio is theirs / ours, the median over rounds with quartiles, losses too. All
outputs are compared first. Targets: 1.5 beside diffusers in eager mode, 1.3 beside `torch.compile` of it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = {"diffusers": 1.5, "torch.compile(diffusers)": 1.3}
TOLERANCE = 1e-5  # of the range of the output


def build(preset: str, input_size: int) -> Any:
    """Our model with random weights, in which nothing is zero."""
    from fastdiff.models import dit

    torch.manual_seed(0)
    model = dit(preset, input_size=input_size, frequency_shift=1.0).eval().requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() > 1 else 0.02)
    return model


def inputs(model: Any, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, times and labels."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    size = config["input_size"]
    x = torch.randn(batch, config["in_channels"], size, size, generator=generator)
    return x, torch.linspace(1, 999, batch).round().long(), (torch.arange(batch) * 37) % config["num_classes"]


def forward(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Ours, diffusers, `torch.compile` of it, and `accelerate` of it."""
    import fastdiff
    from fastdiff.cli._bench_timing import Contestant, race, ratios
    from fastdiff.cli._machine import machine

    ours = build(options.preset[0], options.input_size)
    x, t, y = inputs(ours, options.batch)
    record: dict[str, Any] = {
        "ok": True, "what": "forward", "preset": options.preset[0], "batch": options.batch, "config": ours.config,
        "machine": machine(), "targets": TARGETS, "rows": [], "skipped": [],
    }  # fmt: skip
    calls: dict[str, Callable[[], Tensor]] = {"fastdiff": lambda: ours(x, t, y)}
    try:
        from diffusers import DiTTransformer2DModel

        theirs = DiTTransformer2DModel(**ours.diffusers_config()).eval().requires_grad_(False)
    except ImportError:
        record["skipped"].append("diffusers is not installed: pip install 'fastdiff[bench]'")
    else:
        theirs.load_state_dict(ours.to_diffusers_state_dict())
        fast, report = fastdiff.accelerate(copy.deepcopy(theirs), return_report=True)
        calls["diffusers"] = lambda: theirs(x, timestep=t, class_labels=y, return_dict=False)[0]
        if report.replaced:
            calls["accelerate(diffusers)"] = lambda: fast(x, timestep=t, class_labels=y, return_dict=False)[0]
        else:
            record["skipped"].append("accelerate(diffusers): nothing of it is replaced")
        if options.compiled:
            compiled = torch.compile(theirs)
            calls["torch.compile(diffusers)"] = lambda: compiled(x, timestep=t, class_labels=y, return_dict=False)[0]
    with torch.inference_mode():
        outputs = {}
        for name in list(calls):
            say(f"first run of {name}")
            try:
                outputs[name] = calls[name]()
            except Exception as error:  # the others are still measured
                line = (str(error).strip().splitlines() or [""])[0]
                record["skipped"].append(f"{name}: failed: {type(error).__name__}: {line}")
                record["ok"] &= name == "torch.compile(diffusers)"
                del calls[name]
        contestants = [Contestant(name, [call]) for name, call in calls.items()]
        contestants += [Contestant(name, [call]) for name, call in products(ours, options.batch).items()]
        say("timing")
        race(contestants, torch.device("cpu"), options.seconds)
    scale = max(float(outputs.get("diffusers", outputs["fastdiff"]).abs().max()), 1e-30)
    for contestant in contestants:
        if contestant.name not in outputs:
            record["rows"].append(
                {"name": contestant.name, **contestant.summary(), "ratio": ratios(contestant, contestants[0])}
            )
            continue
        off = (outputs[contestant.name] - outputs["fastdiff"]).abs().max().item() / scale
        record["ok"] &= off <= TOLERANCE
        row = {"name": contestant.name, **contestant.summary(), "off": off}
        record["rows"].append({**row, "ratio": ratios(contestant, contestants[0])})
    record["load_average_after"] = list(os.getloadavg())
    return record


def products(model: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """The matrix products of all blocks and nothing else, by either library: what no fusion can take away."""
    from fastdiff.ops import _linear

    block, tokens = model.blocks[0], (model.config["input_size"] // model.config["patch_size"]) ** 2
    layers = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2] * len(model.blocks)
    rows = {width: torch.randn(batch, tokens, width) for width in {layer.in_features for layer in layers}}
    pairs = [(rows[layer.in_features], layer.weight, layer.bias) for layer in layers]

    def every(product: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> None:
            for pair in pairs:
                product(*pair)  # dropped at once: to keep them all would be to measure the kernel's clearing of pages

        return run

    return {
        "products alone, F.linear": every(nn.functional.linear),
        "products alone, as in fastdiff": every(_linear.linear),
    }


def modulation(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """With and without tables."""
    from fastdiff.cli._bench_timing import Contestant, race, ratios
    from fastdiff.cli._machine import machine

    record: dict[str, Any] = {
        "ok": True, "what": "modulation", "batch": 1, "steps": options.steps, "machine": machine(), "rows": [],
        "skipped": [],
    }  # fmt: skip
    for preset in options.preset:
        say(preset)
        model = build(preset, options.input_size)
        x, _, y = inputs(model, 1)
        times = torch.linspace(999, 1, options.steps).round().long()
        with torch.inference_mode():
            start = time.perf_counter()
            table = model.precompute_modulation(times, y)
            seconds = time.perf_counter() - start
            step, t = table.at(options.steps // 2), times[options.steps // 2].reshape(1)
            expected = model(x, t, y)
            plain = Contestant("without", [lambda model=model, x=x, t=t, y=y: model(x, t, y)])
            tabled = Contestant("with", [lambda model=model, x=x, step=step: model(x, None, modulation=step)])
            race([plain, tabled], torch.device("cpu"), options.seconds)
            weights, resident = bytes_of(model), resident_bytes()
            model.drop_modulation_weights()
            gc.collect()
            freed = resident - resident_bytes()
            off = (model(x, None, modulation=step) - expected).abs().max() / expected.abs().max()
        record["ok"] &= bool(off <= 1e-6)
        record["rows"].append(
            {
                "preset": preset, "without": plain.summary(), "with": tabled.summary(),
                "ratio": ratios(plain, tabled), "precompute_seconds": seconds, "off": off.item(),
                "weights_bytes": weights, "weights_bytes_dropped": bytes_of(model), "table_bytes": table.nbytes,
                "resident_bytes_freed": freed,
            }
        )  # fmt: skip
        del model, table, step, plain, tabled
        gc.collect()
    return record


def bytes_of(model: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def resident_bytes() -> int:
    """Memory of this process that is in RAM, where the system tells (Linux), else 0."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    m = record["machine"]
    if record["what"] == "forward":
        lines = [
            f"# {record['preset']} forward, batch {record['batch']}, float32, {m['date'][:10]}",
            "",
            "Same weights; ratio: theirs / fastdiff, median of paired rounds and quartiles.",
            "",
            "| | ms, median (quartiles) | ratio | target | off fastdiff by |",
            "|---|--:|--:|--:|--:|",
        ]
        for row in record["rows"]:
            q1, median, q3 = (row[k] / 1e3 for k in ("q1_us", "median_us", "q3_us"))
            r = row["ratio"]
            target = record["targets"].get(row["name"])
            wanted = f"{target:g} ({'met' if r['median'] >= target else 'missed'})" if target else ""
            ratio = f"{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})"
            off = f"{row['off']:.1e}" if "off" in row else ""
            lines.append(f"| {row['name']} | {median:.1f} ({q1:.1f} to {q3:.1f}) | {ratio} | {wanted} | {off} |")
    else:
        lines = [
            f"# Modulation tables, batch 1, float32, {m['date'][:10]}",
            "",
            f"A table for {record['steps']} steps and one label. Ratio: without / with, median of paired rounds and "
            "quartiles. Freed: resident memory of the process before and after `drop_modulation_weights()`.",
            "",
            "| | ms without | ms with | ratio | weights MB | without adaLN MB | table MB | freed MB | made in s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in record["rows"]:
            r = row["ratio"]
            times = " | ".join(f"{row[k]['median_us'] / 1e3:.1f}" for k in ("without", "with"))
            sizes = ("weights_bytes", "weights_bytes_dropped", "table_bytes", "resident_bytes_freed")
            held = " | ".join(f"{row[k] / 1e6:.1f}" for k in sizes)
            ratio = f"{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})"
            lines.append(f"| {row['preset']} | {times} | {ratio} | {held} | {row['precompute_seconds']:.3f} |")
    notes = [*record["skipped"], f"{m['cpu']}, {m['threads']} threads; torch {m['torch']}; {m['date']}"]
    notes.append(f"load average before: {m['load_average']}")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when an output is wrong or ours failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dit_forward", description=__doc__.split("\n")[0])
    parser.add_argument("--modulation", action="store_true", help="measure modulation tables at batch 1")
    parser.add_argument("--preset", action="append", help="e.g. DiT-S/2; with --modulation it may be repeated")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latent; 32 is a 256 x 256 image")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50, help="length of the table")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, for each table row or race")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--markdown", metavar="PATH")
    options = parser.parse_args(arguments)
    options.preset = options.preset or (["DiT-S/2", "DiT-B/2", "DiT-L/2"] if options.modulation else ["DiT-S/2"])
    measure = modulation if options.modulation else forward
    record = measure(options, lambda line: print(line, file=sys.stderr, flush=True))
    record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    page = markdown(record)
    print(page, end="")
    for path, text in ((options.json, json.dumps(record, indent=1) + "\n"), (options.markdown, page)):
        if path:
            _write(Path(path), text)
    return 0 if record["ok"] else 1


def _write(path: Path, text: str) -> None:
    from fastdiff._files import replacing

    with replacing(path) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    from benchmarks.__main__ import _prefer_built_package

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _prefer_built_package()
    sys.exit(main())
