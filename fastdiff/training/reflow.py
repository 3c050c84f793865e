"""Reflow: straighten a flow by training on its own pairs (Liu, Gong & Liu, 2022, §2.2 and algorithm 1).

A trained flow carries each noise sample x_0 to *one* x_1. Trained again on exactly these pairs, the paths no longer
cross, become straight, and can be followed in few Euler steps. The pairing is the point: the same samples paired at
random would only be a second, worse data set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff._progress import progress_bar
from fastdiff.training._files import DamagedFileError, replacing
from fastdiff.training.rectified_flow import RectifiedFlowModel
from fastdiff.training.trainer import (
    Source,
    check_integer,
    check_labels,
    check_noise,
    check_options,
    fingerprint,
    fit,
    model_dtype,
)

__all__ = ["generate_pairs", "pair_files", "reflow"]

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
        source: ``source(n, generator) -> x_0 [n,...]``, the noise the flow was trained on; CPU generator. Converted to
            the type of the model's parameters.
        num_pairs: pairs per round.
        rounds: how often to generate and train.
        num_steps: Euler steps by which a pair is generated.
        steps: optimiser steps per round.
        batch_size, lr, ema_decay, weight_decay, lr_schedule, checkpoint_every, on_step, description: as in
            :func:`fastdiff.training.train_rectified_flow`.
        seed: the result is a function of it, of the arguments and of the model.
        out: folder; round k keeps ``round-k/pairs/*.safetensors``, ``checkpoint.pt`` and ``loss.csv`` in it. One that
            holds pairs or a checkpoint already is refused, unless ``resume``.
        progress: show progress bars on stderr.
        labels: [K,...], conditions; each pair is generated under one of them, drawn uniformly, and trained with it.
        guidance_scale: classifier-free guidance while generating; the result reproduces it at guidance 1.
        resume: continue from what ``out`` holds, bitwise; ``model`` must be the one that the run was started with.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source's shape is wrong, ``out`` holds a run and ``resume`` is
            False, or that run is damaged or had other settings.
        FloatingPointError: as in :func:`fastdiff.training.train_rectified_flow`.
    """
    check_integer("reflow", "rounds", rounds, at_least=1)
    check_options(
        "reflow",
        steps=steps,
        batch_size=batch_size,
        checkpoint_every=checkpoint_every,
        seed=seed,
        lr=lr,
        ema_decay=ema_decay,
        weight_decay=weight_decay,
        lr_schedule=lr_schedule,
        out=out,
        resume=resume,
    )
    if out is not None and not resume:
        _refuse_earlier_rounds(Path(out))
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
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source's shape is wrong, ``out`` holds pairs and ``resume`` is
            False, or these are damaged, of another model or made with other settings.
    """
    who = "generate_pairs"
    for name, value in (("num_pairs", num_pairs), ("num_steps", num_steps)):
        check_integer(who, name, value, at_least=1)
    check_integer(who, "seed", seed)
    if labels is not None:
        check_labels(who, labels)
        if len(labels) == 0:
            raise ValueError(f"[{who}] labels: expected at least one condition, got none")
    if out is not None and not resume and _holds_pairs(Path(out)):
        raise ValueError(
            f"[{who}] out: expected a folder without pairs, got {out}, which holds some; resume=True continues it"
        )
    settings = {
        "num_pairs": int(num_pairs),
        "num_steps": int(num_steps),
        "guidance_scale": float(guidance_scale),
        "seed": int(seed),
        "labels": fingerprint(labels),
        "model": fingerprint(*model.state_dict().values()),
    }
    device, dtype = next(model.parameters()).device, model_dtype(model)
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    files = [None] * -(-num_pairs // _CHUNK) if folder is None else pair_files(folder, num_pairs)
    chunks: list[dict[str, Tensor]] = []
    with progress_bar(description, num_pairs, enabled=progress) as update:
        for start, path in zip(range(0, num_pairs, _CHUNK), files, strict=True):
            if resume and path is not None and path.exists():
                chunks.append(_read_chunk(path, settings))
            else:
                generator = torch.Generator().manual_seed(int(seed) + start)
                n = min(_CHUNK, num_pairs - start)
                x_0 = source(n, generator)
                check_noise(who, x_0, (n, *chunks[0]["x_0"].shape[1:]) if chunks else (n,))
                x_0 = x_0.to(dtype)
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


def pair_files(folder: Path, num_pairs: int) -> list[Path]:
    """The files of :func:`generate_pairs`."""
    return [folder / f"{start:08d}.safetensors" for start in range(0, num_pairs, _CHUNK)]


def _holds_pairs(folder: Path) -> bool:
    return folder.is_dir() and any(re.fullmatch(r"\d{8,}\.safetensors", path.name) for path in folder.iterdir())


def _refuse_earlier_rounds(out: Path) -> None:
    for path in sorted(out.glob("round-*")):
        if (path / "checkpoint.pt").exists() or _holds_pairs(path / "pairs"):
            raise ValueError(
                f"[reflow] out: expected a folder without an earlier run, got {out}, which holds {path.name}; "
                "resume=True continues it"
            )


def _write_chunk(path: Path, chunk: dict[str, Tensor], settings: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: value.contiguous() for name, value in chunk.items()},
            temporary,
            metadata={"settings": json.dumps(settings, sort_keys=True)},
        )


def _read_chunk(path: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("settings", "{}"))
            chunk = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DamagedFileError(
            f"[generate_pairs] resume: {path} is damaged (cut short, or not pairs of this library); remove it to have "
            "it made again"
        ) from error
    different = [name for name in settings if saved.get(name) != settings[name]]
    if different:
        raise ValueError(
            f"[reflow] resume: {path} holds pairs made with another {', '.join(different)}; remove the folder or "
            "resume with the settings and the model that the run was started with"
        )
    return chunk
