"""Other people's models before and after `fastdiff.accelerate`: forward passes in turns, random weights, no gradients.

    python -m benchmarks.accelerate_models                         every model, float32
    python -m benchmarks.accelerate_models --model "DiT-S/2" --seconds 30 --json out.json --markdown out.md

Contestants: the model as its library builds it, the same accelerated, and for the DiT `torch.compile` of both. A ratio
is *other time / accelerated time*, the median over rounds in which all ran one after the other: above 1 `accelerate` is
faster. Losses stay in. A model whose outputs differ by more than 1e-5 of their range is an error.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _dit() -> Made:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=12, sample_size=32)
    times, labels = torch.tensor([1, 250, 500, 999]), torch.tensor([1, 2, 3, 4])
    return model, (torch.randn(4, 4, 32, 32), times, labels), {"return_dict": False}


def _pixart() -> Made:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(
        1152, 16, 72, cross_attention_dim=1152, activation_fn="gelu-approximate", attention_bias=True,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    inputs = {"encoder_hidden_states": torch.randn(1, 120, 1152), "timestep": torch.randn(1, 6 * 1152)}
    return block, (torch.randn(1, 1024, 1152),), inputs


def _sd3() -> Made:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(1536, 24, 64), (_x(1024, 1536), _x(154, 1536), torch.randn(1, 1536)), {}


def _flux(kind: str) -> Made:
    from diffusers.models.transformers import transformer_flux

    block = getattr(transformer_flux, kind)(1536, 12, 128)
    angles = torch.randn(1024 + 256, 64).repeat_interleave(2, -1)
    inputs = {"image_rotary_emb": (angles.cos(), angles.sin())}
    return block, (_x(1024, 1536), _x(256, 1536), torch.randn(1, 1536)), inputs


def _unet() -> Made:
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    widths = {"block_out_channels": (128, 256), "cross_attention_dim": 256, "attention_head_dim": 8}
    model = UNet2DConditionModel(sample_size=32, layers_per_block=1, **blocks, **widths)
    return model, (torch.randn(2, 4, 32, 32), torch.tensor([1, 500]), torch.randn(2, 77, 256)), {"return_dict": False}


def _plain(dim: int = 384, depth: int = 12, tokens: int = 256) -> Made:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # behind everything else
    from plain_torch import Network

    return Network(dim, depth), (torch.randn(4, tokens, dim), torch.randn(4, dim)), {}


def _x(tokens: int, width: int) -> Tensor:
    return torch.randn(1, tokens, width)


MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "DiT-S/2": ("diffusers DiT-S/2, batch 4", _dit),
    "plain DiT": ("DiT-S/2 blocks in plain torch, batch 4", _plain),
    "PixArt block": ("diffusers, width 1152, 1024 + 120 tokens", _pixart),
    "SD3 block": ("diffusers, width 1536, 1024 + 154 tokens", _sd3),
    "Flux block": ("diffusers, width 1536, 1024 + 256 tokens", partial(_flux, "FluxTransformerBlock")),
    "Flux single block": ("diffusers, width 1536, 1024 + 256 tokens", partial(_flux, "FluxSingleTransformerBlock")),
    "SD U-Net": ("diffusers, 128 and 256 channels, 32 x 32, batch 2", _unet),
}
COMPILED = {"DiT-S/2"}


def measure(names: Sequence[str], seconds: float, compiled: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """One row per model and contestant, as plain data."""
    import fastdiff
    from fastdiff.cli._bench_timing import Contestant, race, ratios
    from fastdiff.cli._machine import load_average, machine

    record: dict[str, Any] = {"ok": True, "machine": machine(), "rows": []}
    for name in names:
        progress(name)
        what, make = MODELS[name]
        torch.manual_seed(0)
        model, args, kwargs = make()
        model.eval()
        fast, report = fastdiff.accelerate(copy.deepcopy(model), return_report=True)
        calls = {"accelerated": fast, "eager": model}
        if compiled and name in COMPILED:
            calls |= {"torch.compile": torch.compile(model), "torch.compile of accelerated": torch.compile(fast)}
        with torch.no_grad():
            expected = _tensors(model(*args, **kwargs))
            difference = max(_apart(a, b) for a, b in zip(_tensors(fast(*args, **kwargs)), expected, strict=True))
            contestants = [Contestant(key, [partial(call, *args, **kwargs)]) for key, call in calls.items()]
            race(contestants, torch.device("cpu"), seconds)
        record["ok"] &= difference <= TOLERANCE
        for other in contestants[1:]:
            times = {"accelerated": contestants[0].summary(), "other": other.summary()}
            row = {"model": name, "what": what, "against": other.name, "ratio": ratios(other, contestants[0]), **times}
            record["rows"].append({**row, "difference": difference, "replaced": len(report.replaced)})
    record["machine"]["load_average_after"] = load_average()
    return record


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    m = record["machine"]
    lines = [
        f"# fastdiff.accelerate, {m['date'][:10]}",
        "",
        "Other time / accelerated time, median and quartiles over rounds; float32, forward, no gradients.",
        "",
        "| model | | against | ratio | quartiles | accelerated | off by |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        r, own = row["ratio"], row["accelerated"]["median_us"] / 1e3
        spread = f"{r['q1']:.2f} – {r['q3']:.2f}"
        cells = (row["model"], row["what"], row["against"], f"{r['median']:.2f}", spread, f"{own:.1f} ms")
        lines.append(f"| {' | '.join(cells)} | {row['difference']:.0e} |")
    where = f"{m['cpu']}; {m['cores']} cores, {m['threads']} threads, {m['cpu_isa']}; torch {m['torch']}; {m['date']}"
    load = f"load average {m['load_average']} before, {m['load_average_after']} after"
    return "\n".join([*lines, "", f"- {where}", f"- {load}"]) + "\n"


def write(path: str, text: str) -> None:
    """Under a temporary name first: what is there is whole."""
    target = Path(path)
    part = target.with_name(target.name + ".part")
    part.write_text(text)
    os.replace(part, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when an output differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerate_models", description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per model, at least")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--markdown", metavar="PATH")
    options = parser.parse_args(arguments)
    names = options.model or list(MODELS)
    record = measure(names, options.seconds, options.compiled, lambda name: print(name, file=sys.stderr, flush=True))
    page = markdown(record)
    print(page, end="")
    if options.json:
        write(options.json, json.dumps(record, indent=1) + "\n")
    if options.markdown:
        write(options.markdown, page)
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    sys.exit(main())
