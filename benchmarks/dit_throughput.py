"""Images per second of a whole sampling loop: DiT with random weights, DDIM steps, classifier-free guidance.

    python -m benchmarks.dit_throughput --device cuda                      DiT-XL/2 at 256 x 256, 50 steps, bfloat16
    python -m benchmarks.dit_throughput --width 32 --depth 2 --heads 2 --input-size 8 --steps 2 --batch 1

Contestants take turns, whole loops at a time: PyTorch eager and `torch.compile` on the plain model (SDPA, F.gelu),
ours, and on a GPU ours with a step as one CUDA graph, replayed: its coefficients come from tables by a
counter on the device.
The ceiling is what the loop's matrix products alone would take at the rate that a large product reaches here. Weights
are random: speed does not depend on them. A batch that fails, or for which no time is left, is named in the result.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PlainAttention(nn.Module):
    """What a PyTorch model does: SDPA on views."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = ours.num_heads, ours.qkv, ours.proj

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class PlainMlp(nn.Module):
    """Likewise with torch's GELU."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = ours.fc1, ours.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def flops_per_image(model: Any, steps: int) -> int:
    """Operations in the matrix products of one image: two predictions a step."""
    c = model.config
    D, tokens = c["hidden_size"], (c["input_size"] // c["patch_size"]) ** 2
    patch = c["patch_size"] ** 2
    hidden = int(D * c["mlp_ratio"])
    block = 2 * tokens * (4 * D * D + 2 * D * hidden) + 4 * tokens * tokens * D + 2 * 6 * D * D
    ends = 2 * tokens * D * patch * (c["in_channels"] + model.out_channels)
    condition = 2 * (2 * model.t_embedder.frequencies * D + D * D) + 2 * 2 * D * D
    return 2 * steps * (c["depth"] * block + ends + condition)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the best of some large products."""
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (512, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        for _ in range(5):
            best = max(best, 4 * 2 * n**3 / _seconds(device, lambda a=a, b=b: [a @ b for _ in range(4)]))
    return best


def _seconds(device: torch.device, call: Callable[[], Any]) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Loop:
    """One batch's sampling loop, the same for every contestant."""

    def __init__(self, batch: int, model: Any, steps: int, guidance: float, dtype: torch.dtype) -> None:
        c, device = model.config, model.pos_embed.device
        size = (batch, c["in_channels"], c["input_size"], c["input_size"])
        self.start = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        self.labels = (torch.arange(batch, device=device) * 7) % max(1, c["num_classes"])
        self.steps, self.guidance, self.channels = steps, guidance, c["in_channels"]
        # Linear betas, from the noisiest level on: alpha_bar of every step, and of the one after it.
        levels = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0).exp()
        index = torch.linspace(999, 0, steps, dtype=torch.float64).round().long()
        self.levels, self.times = levels[index].to(device), index.to(device, torch.float32)
        self.after = torch.cat([levels[index[1:]], torch.ones(1, dtype=torch.float64)]).to(device)
        self.numbers = list(zip(self.levels.tolist(), self.after.tolist(), strict=True))

    def eager(self, predict: Callable[..., Tensor], backend: str) -> Callable[[], Tensor]:
        """Every step issued from the host."""
        import fastdiff

        times = self.times[:, None].expand(-1, len(self.start)).contiguous()

        def run() -> Tensor:
            with fastdiff.use_backend(backend), torch.no_grad():
                x = self.start
                for t, (level, after) in zip(times, self.numbers, strict=True):
                    pred = predict(x, t, self.labels, self.guidance)[:, : self.channels]
                    x = fastdiff.ops.ddim_step(x, pred, level, after)
                return x

        return run

    def graph(self, predict: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """A step as a CUDA graph that finds its place in the tables by itself."""
        from fastdiff import ops

        x, step = self.start.clone(), torch.zeros(1, dtype=torch.int64, device=self.start.device)

        def one() -> None:
            t = self.times.index_select(0, step).expand(len(x))
            pred = predict(x, t, self.labels, self.guidance)[:, : self.channels]
            ops.ddim_step(x, pred, self.levels, self.after, step=step, out=x)
            step.add_(1)

        side: Any = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad():
            with torch.cuda.stream(side):
                for _ in range(2):
                    one()
                    step.zero_()
            torch.cuda.current_stream().wait_stream(side)
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                one()

        def run() -> Tensor:
            x.copy_(self.start)
            step.zero_()
            for _ in range(self.steps):
                recorded.replay()
            return x

        return run


def build(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """(our model, the plain one on the same weights)."""
    from fastdiff.models import DIT_PRESETS, DiT

    settings: dict[str, Any] = dict(DIT_PRESETS[options.preset], input_size=options.input_size)
    for name, value in (("hidden_size", options.width), ("depth", options.depth), ("num_heads", options.heads)):
        if value:
            settings[name] = value
    torch.manual_seed(0)
    ours = DiT(**settings).eval()
    for p in ours.parameters():  # not the zeros that training starts from
        nn.init.normal_(p, std=0.02)
    ours = ours.to(device, DTYPES[options.dtype]).requires_grad_(False)
    plain = copy.deepcopy(ours)
    for block in plain.blocks:
        block.attn, block.mlp = PlainAttention(block.attn), PlainMlp(block.mlp)
    return ours, plain


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole record."""
    import fastdiff
    from fastdiff.cli._machine import machine

    began = time.perf_counter()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    ours, plain = build(options, device)
    rate = matmul_rate(device, dtype)
    flops = flops_per_image(ours, options.steps)
    record: dict[str, Any] = {
        "ok": True, "machine": machine(), "device": options.device, "dtype": options.dtype, "preset": options.preset,
        "config": ours.config, "steps": options.steps, "guidance_scale": options.guidance, "flops_per_image": flops,
        "matmul_flops_per_second": rate, "ceiling_images_per_second": rate / flops, "rows": [], "skipped": [],
    }  # fmt: skip
    backend = "auto"
    for batch in options.batch:
        loop = Loop(batch, ours, options.steps, options.guidance, dtype)
        makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
            "eager": lambda loop=loop: loop.eager(plain.forward_with_cfg, "reference"),
            "fastdiff": lambda loop=loop: loop.eager(ours.forward_with_cfg, backend),
        }
        if device.type == "cuda":
            makers["fastdiff, graph"] = lambda loop=loop: loop.graph(ours.forward_with_cfg)
        else:
            record["skipped"].append(f"batch {batch} fastdiff, graph: needs a GPU")
        if options.compiled:
            makers["compile"] = lambda loop=loop: loop.eager(
                torch.compile(plain.forward_with_cfg, dynamic=False), "reference"
            )
        runs: dict[str, Callable[[], Tensor]] = {}
        last: dict[str, Tensor] = {}
        for name, make in makers.items():
            if time.perf_counter() - began > options.budget:
                record["skipped"].append(f"batch {batch} {name}: no time left")
                continue
            say(f"batch {batch} {name}: first run")
            try:
                if name == "compile":
                    torch.compiler.reset()
                run = make()
                last[name] = run().float().clone()
                _wait(device)
                runs[name] = run
            except Exception as error:  # the others are still measured
                lines = str(error).strip().splitlines() or [""]
                record["skipped"].append(f"batch {batch} {name}: failed: {type(error).__name__}: {lines[0]}")
                record["ok"] &= not name.startswith("fastdiff")
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            if time.perf_counter() - began > options.budget and all(times.values()):
                break
            for name, run in runs.items():
                times[name].append(_seconds(device, run))
        for name, found in times.items():
            row: dict[str, Any] = {"batch": batch, "name": name, "seconds": found}
            row["images_per_second"] = batch / statistics.median(found)
            row["share_of_ceiling"] = row["images_per_second"] * flops / rate
            if "eager" in last:
                scale = last["eager"].abs().max().item()
                row["difference"] = (last[name] - last["eager"]).abs().max().item() / scale
                if not row["difference"] <= options.tolerance:
                    record["ok"] = False
                    record["skipped"].append(
                        f"batch {batch} {name}: WRONG: off by {row['difference']:.3g} of the range"
                    )
            record["rows"].append(row)
    record["seconds"] = round(time.perf_counter() - began, 1)
    record["explain_attention"] = fastdiff.explain(
        "attention_qkvpacked", torch.empty(1, 4, 3, 2, 8, device=device, dtype=dtype)
    )
    return record


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    config = record["config"]
    size = f"width {config['hidden_size']}, depth {config['depth']}, input {config['input_size']}"
    lines = [
        f"# DiT sampling on {record['device']}, {record['machine']['date'][:10]}",
        "",
        f"{record['preset']} ({size}), {record['steps']} DDIM steps, guidance {record['guidance_scale']} (two "
        f"predictions a step), {record['dtype']}, random weights. Ceiling: {record['flops_per_image'] / 1e12:.3g} "
        f"TFLOP an image at the {record['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s of a large matrix product here: "
        f"{record['ceiling_images_per_second']:.3g} images/s.",
        "",
        "| batch | | images/s | of the ceiling | off eager by |",
        "|--:|---|--:|--:|--:|",
    ]
    for row in record["rows"]:
        off = f"{row['difference']:.1e}" if "difference" in row else "–"
        speed = f"{row['images_per_second']:.3g} | {row['share_of_ceiling']:.0%}"
        lines.append(f"| {row['batch']} | {row['name']} | {speed} | {off} |")
    notes = [*record["skipped"], *(f"our attention is not used: {why}" for why in record["explain_attention"])]
    gpus = ", ".join(gpu["name"] for gpu in record["machine"]["gpus"])
    notes.append(f"{gpus or record['machine']['cpu']}; torch {record['machine']['torch']}; {record['machine']['date']}")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when ours failed or differs from eager."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dit_throughput", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--preset", default="DiT-XL/2")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latent; 32 is a 256 x 256 image")
    parser.add_argument("--width", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, action="append", help="may be repeated (default: 1, 8, 64)")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=float("inf"), help="start nothing after so many seconds")
    parser.add_argument("--tolerance", type=float, default=0.1, help="of the range of the result; the loop amplifies")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--markdown", metavar="PATH")
    options = parser.parse_args(arguments)
    options.batch = options.batch or [1, 8, 64]
    record = measure(options, lambda line: print(line, file=sys.stderr, flush=True))
    record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    page = markdown(record)
    print(page, end="")
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(page)
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    from benchmarks.__main__ import _prefer_built_package

    _prefer_built_package()
    sys.exit(main())
