"""transformers' Mamba as it is, compiled, and after `accelerate`.

    python -m benchmarks.mamba_transformers                 2 layers of width 256 and 768 (130m), 1 x 512 tokens
    python -m benchmarks.mamba_transformers --compile       and torch.compile of it, which takes many minutes

Copies of one model take turns, a call at a time: PyTorch eager, `torch.compile` of it (with its associative scan), and
ours. Also the mixer alone in a training step, over 64 tokens (the original's backward pass is quadratic in their
number: the slice of every step has a gradient of the whole length). Outputs are compared before anything is timed.
Beside the ratio of times stands that of the processor's time of all threads, which a neighbour hardly changes. Weights
are random: speed does not depend on them. The wider the model, the more of all times is the same matrix products.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.token_scaling import save


def build(width: int, layers: int) -> Any:
    """transformers' MambaModel in eval mode; without a cache, which no contestant needs."""
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1000, hidden_size=width, num_hidden_layers=layers, use_cache=False, state_size=16)
    return MambaModel(config).eval()


def contestants(
    options: argparse.Namespace, width: int, notes: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """name: the model, called once."""
    from fastdiff.integrations.accelerate import accelerate

    eager = build(width, options.layers)
    ours = accelerate(copy.deepcopy(eager))
    models = {"transformers": eager, "fastdiff": ours}
    tokens = tokens_of(options)
    if options.compiled:
        say(f"width {width}: torch.compile of transformers")
        start = time.perf_counter()
        try:
            compiled = torch.compile(copy.deepcopy(eager), dynamic=False)
            with torch.no_grad():
                compiled(tokens)
            models["torch.compile"] = compiled
            notes.append(
                f"width {width}: torch.compile took {time.perf_counter() - start:.0f} s before its first result"
            )
        except Exception as error:  # the others are still measured
            notes.append(
                f"width {width}: torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            )
    with torch.no_grad():
        expected = eager(tokens).last_hidden_state
        for name, model in list(models.items())[1:]:
            error = (model(tokens).last_hidden_state - expected).abs().max() / expected.abs().max()
            if not error <= 1e-4:
                raise RuntimeError(f"{name} is off by {error:.2g} of the range")
            notes.append(f"width {width}: {name} differs from transformers by {error:.1e} of the range")
    return models


def tokens_of(options: argparse.Namespace) -> torch.Tensor:
    return torch.randint(0, 1000, (options.batch, options.length), generator=torch.Generator().manual_seed(1))


def forward(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    """One call of the model, without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return model(tokens)

    return run


def train(mixer: Any, x: torch.Tensor) -> Callable[[], Any]:
    """One call and its gradients."""

    def run() -> None:
        mixer.zero_grad()
        mixer(x).square().mean().backward()

    return run


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole record."""
    import transformers

    from fastdiff.cli._bench_timing import Contestant, ratios
    from fastdiff.cli._machine import load_average, machine

    notes = [] if options.compiled else ["torch.compile was not asked for (--compile)"]
    record: dict[str, Any] = {
        "machine": machine(), "transformers": transformers.__version__, "widths": options.width,
        "layers": options.layers, "batch": options.batch, "length": options.length, "rows": [], "notes": notes,
    }  # fmt: skip
    for width in options.width:
        models, tokens = contestants(options, width, notes, say), tokens_of(options)
        x = torch.randn(options.batch, 64, width, generator=torch.Generator().manual_seed(2))
        mixers = {n: copy.deepcopy(m.layers[0].mixer).train() for n, m in models.items() if n != "torch.compile"}
        races = {
            "model, forward": {name: forward(model, tokens) for name, model in models.items()},
            "a mixer, 64 tokens, forward and backward": {name: train(mixer, x) for name, mixer in mixers.items()},
        }
        for what, calls in races.items():
            say(f"width {width}: {what}")
            wall, cpu = ({name: Contestant(name, [call]) for name, call in calls.items()} for _ in range(2))
            for call in calls.values():
                call()
            for number in range(options.rounds):
                names = list(calls)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    start, busy = time.perf_counter(), time.process_time()
                    calls[name]()
                    wall[name].seconds.append(time.perf_counter() - start)
                    cpu[name].seconds.append(time.process_time() - busy)
            for name in calls:
                row: dict[str, Any] = {"width": width, "what": what, "name": name, **wall[name].summary()}
                row["ratio"] = ratios(wall[name], wall["fastdiff"])
                row["cpu_ratio"] = ratios(cpu[name], cpu["fastdiff"])
                row["cpu_median_us"] = cpu[name].summary()["median_us"]
                record["rows"].append(row)
    record["machine"]["load_average_after"] = load_average()
    return record


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    m = record["machine"]
    lines = [
        "# transformers' Mamba",
        "",
        f"{record['layers']} layers (state 16), {record['batch']} x {record['length']} "
        "tokens, float32. Ratio: time over that of fastdiff in the same round, median and quartiles.",
        "",
        "| width | | | ms (median) | quartiles | time / fastdiff | all threads' |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in record["rows"]:
        ms = [row[key] * 1e-3 for key in ("median_us", "q1_us", "q3_us")]
        cells = [f"{ms[0]:.4g}", f"{ms[1]:.4g} to {ms[2]:.4g}"]
        for ratio in (row["ratio"], row["cpu_ratio"]):
            cells.append(f"**{ratio['median']:.1f}** ({ratio['q1']:.1f} to {ratio['q3']:.1f})")
        lines.append(f"| {row['width']} | {row['what']} | {row['name']} | {' | '.join(cells)} |")
    where = f"{m['cpu']}; {m['cores']} cores, {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; {m['date']}"
    load = f"load average before and after: {m['load_average']}, {m['load_average_after']}"
    notes = [*record["notes"], f"{where}; transformers {record['transformers']}", load]
    return (
        "\n".join([*lines, "", *(f"- {note}" for note in notes), "- `python -m benchmarks.mamba_transformers`"]) + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mamba_transformers", description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, action="append", help="may be repeated (default: 256, 768)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", dest="compiled", action="store_true", help="torch.compile of it too: minutes")
    parser.add_argument("--out", metavar="DIR", help="write mamba-transformers.json and .md there")
    options = parser.parse_args(arguments)
    options.width = options.width or [256, 768]
    record = measure(options, lambda line: print(line, file=sys.stderr, flush=True))
    page = markdown(record)
    print(page, end="")
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        save(json.dumps(record, indent=1) + "\n", out / "mamba-transformers.json")
        save(page, out / "mamba-transformers.md")
    return 0


if __name__ == "__main__":
    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    sys.exit(main())
