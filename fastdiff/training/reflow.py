"""Reflow: straighten a flow by training on its own pairs (Liu, Gong & Liu, 2022, §2.2 and algorithm 1).

A trained flow carries each noise sample x_0 to *one* x_1. Trained again on exactly these pairs, the paths no longer
cross, become straight, and can be followed in few Euler steps. The pairing is the point: the same samples paired at
random would only be a second, worse data set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.training._files import replacing
from fastdiff.training._progress import progress_bar
from fastdiff.training.rectified_flow import RectifiedFlowModel
from fastdiff.training.trainer import Source, fingerprint, fit

__all__ = ["generate_pairs", "reflow"]

_CHUNK = 512  # pairs per file: some seconds of work, so that an interrupted run loses no more


def reflow(
    model: RectifiedFlowModel,
    *,
    source: Source,
    num_pairs: int,
    rounds: int = 1,
    num_steps: int = 100,
    steps: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    resume: bool = False,
    ema_decay: float = 0.0,
    weight_decay: float = 0.0,
    lr_schedule: str = "constant",
    checkpoint_every: int = 100,
    on_step: Callable[[int, float], None] | None = None,
    description: str = "reflow",
) -> RectifiedFlowModel:
    """Trains a flow on the pairs (x_0, x_1) that it generates itself; each round starts from the last one's weights.

    Args:
        model: a trained flow; trained further in place.
        source: ``source(n, generator) -> x_0 [n,...]``, the noise the flow was trained on; CPU generator.
        num_pairs: pairs per round.
        rounds: how often to generate and train.
        num_steps: Euler steps by which a pair is generated.
        steps: optimiser steps per round.
        batch_size, lr, ema_decay, weight_decay, lr_schedule, checkpoint_every, on_step, description: as in
            :func:`fastdiff.training.train_rectified_flow`.
        seed: the result is a function of it, of the arguments and of the model.
        out: folder; round k keeps ``round-k/pairs/*.safetensors``, ``checkpoint.pt`` and ``loss.csv`` in it.
        progress: show progress bars on stderr.
        labels: [K,...], conditions; each pair is generated under one of them, drawn uniformly, and trained with it.
        guidance_scale: classifier-free guidance while generating; the result reproduces it at guidance 1.
        resume: continue from what ``out`` holds, bitwise; ``model`` must be the one that the run was started with.

    Returns:
        ``model``.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds a run with other settings.
    """
    if rounds < 1:
        raise ValueError(f"[reflow] rounds: expected at least 1, got {rounds}")
    for k in range(1, rounds + 1):
        folder = None if out is None else Path(out) / f"round-{k}"
        suffix = f" {k}/{rounds}" if rounds > 1 else ""
        x_0, x_1, conditions = generate_pairs(
            model,
            source=source,
            num_pairs=num_pairs,
            num_steps=num_steps,
            labels=labels,
            guidance_scale=guidance_scale,
            seed=seed + 1_000_003 * k,
            out=None if folder is None else folder / "pairs",
            resume=resume,
            progress=progress,
            description=f"{description}{suffix}: pairs",
        )

        def batch(
            index: Tensor,
            generator: torch.Generator,
            pairs: tuple[Tensor, Tensor, Tensor | None] = (x_0, x_1, conditions),
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            x_0, x_1, conditions = pairs
            return x_0[index], x_1[index], None if conditions is None else conditions[index]

        fit(
            model,
            batch,
            num_pairs,
            settings={"data": fingerprint(x_0, x_1, conditions)},
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed + k,
            out=folder,
            progress=progress,
            resume=resume,
            ema_decay=ema_decay,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            checkpoint_every=checkpoint_every,
            on_step=on_step,
            description=f"{description}{suffix}",
        )
    return model


def generate_pairs(
    model: RectifiedFlowModel,
    *,
    source: Source,
    num_pairs: int,
    num_steps: int = 100,
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    description: str = "pairs",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pairs of noise and what the flow makes of it.

    They come in chunks of 512, each with a seed of its own, so that a chunk does not depend on the others: with
    ``resume``, chunks that ``out`` holds already are read in place of being generated. Arguments as in :func:`reflow`.

    Returns:
        (x_0 [P,...], x_1 [P,...], conditions [P,...] or None), on the CPU.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds pairs of another model or with other settings.
    """
    for name, value in (("num_pairs", num_pairs), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"[generate_pairs] {name}: expected at least 1, got {value}")
    if labels is not None and len(labels) == 0:
        raise ValueError("[generate_pairs] labels: expected at least one condition, got none")
    settings = {
        "num_pairs": num_pairs,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "labels": fingerprint(labels),
        "model": fingerprint(*model.state_dict().values()),
    }
    device = next(model.parameters()).device
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    chunks: list[dict[str, Tensor]] = []
    with progress_bar(description, num_pairs, enabled=progress) as update:
        for start in range(0, num_pairs, _CHUNK):
            path = None if folder is None else folder / f"{start:08d}.safetensors"
            if resume and path is not None and path.exists():
                chunks.append(_read_chunk(path, settings))
            else:
                generator = torch.Generator().manual_seed(seed + start)
                x_0 = source(min(_CHUNK, num_pairs - start), generator)
                chunk = {"x_0": x_0}
                if labels is not None:
                    draw = torch.randint(len(labels), (len(x_0),), generator=generator)
                    chunk["condition"] = labels.cpu()[draw]
                condition = chunk["condition"].to(device) if "condition" in chunk else None
                chunk["x_1"] = model.sample(x_0.to(device), num_steps, condition, guidance_scale=guidance_scale).cpu()
                chunks.append(chunk)
                if path is not None:
                    _write_chunk(path, chunk, settings)
            update(min(start + _CHUNK, num_pairs), "")
    x_0, x_1 = (torch.cat([chunk[name] for chunk in chunks]) for name in ("x_0", "x_1"))
    return x_0, x_1, torch.cat([chunk["condition"] for chunk in chunks]) if labels is not None else None


def _write_chunk(path: Path, chunk: dict[str, Tensor], settings: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: value.contiguous() for name, value in chunk.items()},
            temporary,
            metadata={"settings": json.dumps(settings, sort_keys=True)},
        )


def _read_chunk(path: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        saved = json.loads((file.metadata() or {}).get("settings", "{}"))
        different = [name for name in settings if saved.get(name) != settings[name]]
        if different:
            raise ValueError(
                f"[reflow] resume: {path} holds pairs made with another {', '.join(different)}; remove the folder or "
                "resume with the settings and the model that the run was started with"
            )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
