"""transformers' Mamba as it is, compiled, and after `accelerate`.

    python -m benchmarks.mamba_transformers                 a 130m's layers (width 768), 4 of them, 1 x 512 tokens
    python -m benchmarks.mamba_transformers --no-compile    without torch.compile, which takes minutes

Three copies of one model take turns: PyTorch eager, `torch.compile` of it (with its associative scan), and ours. Also
the mixer alone in a training step. Outputs are compared before anything is timed. Weights are random: speed does not
depend on them.
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


def build(options: argparse.Namespace) -> Any:
    """transformers' MambaModel in eval mode; without a cache, which no contestant needs."""
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=1000, hidden_size=options.width, num_hidden_layers=options.layers, use_cache=False, state_size=16
    )
    return MambaModel(config).eval()


def contestants(options: argparse.Namespace, skipped: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """name: the model, called once."""
    from fastdiff.integrations.accelerate import accelerate

    eager = build(options)
    ours = accelerate(copy.deepcopy(eager))
    models = {"transformers": eager, "fastdiff": ours}
    tokens = tokens_of(options)
    if options.compiled:
        say("torch.compile of transformers")
        start = time.perf_counter()
        try:
            compiled = torch.compile(copy.deepcopy(eager), dynamic=False)
            with torch.no_grad():
                compiled(tokens)
            models["torch.compile"] = compiled
            skipped.append(f"torch.compile took {time.perf_counter() - start:.0f} s before its first result")
        except Exception as error:  # the others are still measured
            skipped.append(f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    with torch.no_grad():
        expected = eager(tokens).last_hidden_state
        for name, model in models.items():
            error = (model(tokens).last_hidden_state - expected).abs().max() / expected.abs().max()
            if not error <= 1e-4:
                raise RuntimeError(f"{name} is off by {error:.2g} of the range")
            skipped.append(f"{name} differs from transformers by {error:.1e} of the range")
    return models


def tokens_of(options: argparse.Namespace) -> torch.Tensor:
    return torch.randint(0, 1000, (options.batch, options.length), generator=torch.Generator().manual_seed(1))


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole record."""
    import transformers

    from fastdiff.cli._bench_timing import Contestant, race, ratios
    from fastdiff.cli._machine import load_average, machine

    notes: list[str] = []
    record: dict[str, Any] = {
        "machine": machine(), "transformers": transformers.__version__, "width": options.width,
        "layers": options.layers, "batch": options.batch, "length": options.length, "rows": [], "notes": notes,
    }  # fmt: skip
    models, tokens = contestants(options, notes, say), tokens_of(options)
    x = torch.randn(options.batch, options.length, options.width, generator=torch.Generator().manual_seed(2))

    def forward(model: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return model(tokens)

        return run

    def train(mixer: Any) -> Callable[[], Any]:
        def run() -> None:
            mixer.zero_grad()
            mixer(x).square().mean().backward()

        return run

    mixers = {name: copy.deepcopy(m.layers[0].mixer).train() for name, m in models.items() if name != "torch.compile"}
    races = {
        "model, forward": {name: forward(model) for name, model in models.items()},
        "one mixer, forward and backward": {name: train(mixer) for name, mixer in mixers.items()},
    }
    for what, calls in races.items():
        say(what)
        runners = {name: Contestant(name, [call]) for name, call in calls.items()}
        race(list(runners.values()), torch.device("cpu"), options.seconds)
        for name, runner in runners.items():
            row: dict[str, Any] = {"what": what, "name": name, **runner.summary()}
            row["ratio"] = ratios(runner, runners["fastdiff"])
            record["rows"].append(row)
    record["machine"]["load_average_after"] = load_average()
    return record


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    m = record["machine"]
    lines = [
        "# transformers' Mamba",
        "",
        f"{record['layers']} layers of width {record['width']} (state 16), {record['batch']} x {record['length']} "
        "tokens, float32. Ratio: time over that of fastdiff in the same round, median and quartiles.",
        "",
        "| | | ms (median) | quartiles | time / fastdiff |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in record["rows"]:
        ms = [row[key] * 1e-3 for key in ("median_us", "q1_us", "q3_us")]
        ratio = row["ratio"]
        cells = f"{ms[0]:.4g} | {ms[1]:.4g} to {ms[2]:.4g}"
        quotient = (
            f"**{ratio['median']:.1f}** ({ratio['q1']:.1f} to {ratio['q3']:.1f})" if row["name"] != "fastdiff" else "1"
        )
        lines.append(f"| {row['what']} | {row['name']} | {cells} | {quotient} |")
    where = f"{m['cpu']}; {m['cores']} cores, {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; {m['date']}"
    load = f"load average before and after: {m['load_average']}, {m['load_average_after']}"
    notes = [*record["notes"], f"{where}; transformers {record['transformers']}", load]
    return (
        "\n".join([*lines, "", *(f"- {note}" for note in notes), "- `python -m benchmarks.mamba_transformers`"]) + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mamba_transformers", description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per race, at least")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--out", metavar="DIR", help="write mamba-transformers.json and .md there")
    options = parser.parse_args(arguments)
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
