"""The training loop of rectified flow, and the checkpoint from which it continues bitwise.

Everything random is drawn from two generators whose states are in the checkpoint: one of the loop (shuffling, noise,
times; on the CPU, so that every device sees the same draws) and torch's global one (label dropout inside the model).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastdiff.training._files import replacing
from fastdiff.training._progress import progress_bar
from fastdiff.training.couplings import COUPLINGS, couple
from fastdiff.training.rectified_flow import RectifiedFlowModel

__all__ = ["Source", "fingerprint", "fit", "train_rectified_flow"]

Source = Callable[[int, torch.Generator], Tensor]  # source(n, generator) -> x_0 [n,...]
Batch = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor, "Tensor | None"]]  # (index, g) -> x_0, x_1, condition


def train_rectified_flow(
    model: RectifiedFlowModel,
    data: Tensor,
    *,
    source: Source | None = None,
    steps: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    coupling: str = "independent",
    labels: Tensor | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    resume: bool = False,
    ema_decay: float = 0.0,
    weight_decay: float = 0.0,
    lr_schedule: str = "constant",
    checkpoint_every: int = 100,
    on_step: Callable[[int, float], None] | None = None,
    description: str = "training",
) -> RectifiedFlowModel:
    """Fits a velocity field to the straight paths between noise and data (Liu et al., 2022, eq. 1).

    Minimises E |v(x_t, t) - (x_1 - x_0)|^2 over t ~ U[0, 1], x_t = t x_1 + (1 - t) x_0, with AdamW.

    Args:
        model: trained in place, on the device that it is on.
        data: [N,...], samples x_1; on any device.
        source: ``source(n, generator) -> x_0 [n,...]``, drawn with the CPU generator it is given; default: standard
            normal noise in data's shape.
        steps: optimiser steps in all, those of earlier runs included when resuming.
        batch_size: pairs per step. An epoch visits every sample once; batches run across epochs, all of full size.
        lr: learning rate, after 1 % of the steps of linear warm-up.
        coupling: ``"independent"`` or ``"ot"``, see :func:`fastdiff.training.couple`; with labels, "ot" exchanges noise
            among equal labels only.
        labels: [N,...], conditions that go with the data.
        seed: the run is a function of it, of the arguments and of the initial weights.
        out: folder for ``checkpoint.pt`` and ``loss.csv``; None keeps nothing.
        progress: show a progress bar on stderr.
        resume: continue from ``out/checkpoint.pt`` if there is one; the result is bitwise that of an uninterrupted run.
        ema_decay: return the exponential moving average of the weights, in [0, 1); 0 returns the last ones.
        weight_decay: decoupled weight decay.
        lr_schedule: ``"constant"`` or ``"cosine"`` (to zero at the last step).
        checkpoint_every: steps between two checkpoints.
        on_step: called after every step with (steps done, loss).
        description: label of the progress bar.

    Returns:
        ``model``.

    Raises:
        ValueError: an argument is out of range, or the checkpoint belongs to a run with other settings.
    """
    who = "train_rectified_flow"
    _require(data.dim() >= 2 and len(data) > 0, who, "data", "shape [N,...] with N > 0", list(data.shape))
    _require(coupling in (*COUPLINGS, "sinkhorn"), who, "coupling", f"one of {', '.join(COUPLINGS)}", repr(coupling))
    if labels is not None:
        _require(len(labels) == len(data), who, "labels", f"{len(data)}, one for each sample of data", len(labels))
    couple(data[:0], data[:0], coupling)  # an unavailable coupling should fail before the first step
    draw = source if source is not None else normal_source(data)

    def batch(index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        index = index.to(data.device)
        x_1 = data[index]
        condition = None if labels is None else labels[index.to(labels.device)]
        x_0 = draw(len(index), generator).to(x_1)
        _require(x_0.shape == x_1.shape, who, "source", f"noise of shape {list(x_1.shape)}", list(x_0.shape))
        return x_0[couple(x_0, x_1, coupling, labels=condition)], x_1, condition

    fit(
        model,
        batch,
        len(data),
        settings={"coupling": coupling, "data": fingerprint(data, labels)},
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        out=out,
        progress=progress,
        resume=resume,
        ema_decay=ema_decay,
        weight_decay=weight_decay,
        lr_schedule=lr_schedule,
        checkpoint_every=checkpoint_every,
        on_step=on_step,
        description=description,
    )
    return model


def fit(
    model: RectifiedFlowModel,
    batch: Batch,
    num_items: int,
    *,
    settings: dict[str, Any],
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    out: str | os.PathLike[str] | None,
    progress: bool,
    resume: bool,
    ema_decay: float,
    weight_decay: float,
    lr_schedule: str,
    checkpoint_every: int,
    on_step: Callable[[int, float], None] | None,
    description: str,
) -> None:
    """The loop itself, on pairs from ``batch(index [B], generator)``; ``settings`` says what else defines the run."""
    who = "train_rectified_flow"
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        _require(value >= 1, who, name, "at least 1", value)
    _require(lr > 0, who, "lr", "above 0", lr)
    _require(0 <= ema_decay < 1, who, "ema_decay", "in [0, 1)", ema_decay)
    _require(weight_decay >= 0, who, "weight_decay", "0 or more", weight_decay)
    _require(lr_schedule in ("constant", "cosine"), who, "lr_schedule", "'constant' or 'cosine'", repr(lr_schedule))
    _require(not resume or out is not None, who, "out", "the folder to resume from", out)
    settings = {
        **settings,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "ema_decay": ema_decay,
        "weight_decay": weight_decay,
        "lr_schedule": lr_schedule,
        "model": {name: list(value.shape) for name, value in model.state_dict().items()},
    }
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    device = next(model.parameters()).device
    was_training = model.training
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # the caller's global generators are left as they were
        run = _Run(model, settings, num_items, seed, lr, weight_decay, ema_decay, device)
        if resume and folder is not None and (folder / "checkpoint.pt").exists():
            run.load(folder / "checkpoint.pt")
        model.train()
        try:
            with progress_bar(description, steps, start=run.step, enabled=progress) as update:
                while run.step < steps:
                    for group in run.optimiser.param_groups:
                        group["lr"] = lr * _lr_factor(run.step, steps, lr_schedule)
                    loss = run.train_step(batch, batch_size)
                    if folder is not None and (run.step % checkpoint_every == 0 or run.step == steps):
                        run.save(folder)
                    update(run.step, f"loss {loss:.4f}")
                    if on_step is not None:
                        on_step(run.step, loss)
            run.finish()
        finally:
            model.train(was_training)


class _Run:
    """All that a run is made of: it can be saved after any step and loaded into a fresh process."""

    def __init__(
        self,
        model: RectifiedFlowModel,
        settings: dict[str, Any],
        num_items: int,
        seed: int,
        lr: float,
        weight_decay: float,
        ema_decay: float,
        device: torch.device,
    ) -> None:
        self.model, self.settings, self.num_items, self.device = model, settings, num_items, device
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        average = get_ema_multi_avg_fn(ema_decay)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(model, multi_avg_fn=average) if ema_decay else None
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.step = 0
        self.losses: list[float] = []
        self.order = torch.empty(0, dtype=torch.long)  # what is left of the current epoch

    def train_step(self, batch: Batch, batch_size: int) -> float:
        while len(self.order) < batch_size:
            self.order = torch.cat([self.order, torch.randperm(self.num_items, generator=self.generator)])
        index, self.order = self.order[:batch_size], self.order[batch_size:]
        x_0, x_1, condition = batch(index, self.generator)
        t = torch.rand(batch_size, generator=self.generator)

        x_0, x_1 = x_0.to(self.device), x_1.to(self.device)
        condition = None if condition is None else condition.to(self.device)
        x_t, target = self.model.forward_flow(x_0, x_1, t)
        loss = (self.model(x_t, t.to(self.device), condition) - target).square().mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def finish(self) -> None:
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())

    def save(self, folder: Path) -> None:
        state = {
            "settings": self.settings,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "generator": self.generator.get_state(),
            "global_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "order": self.order.clone(),  # a view would drag the whole epoch along
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        with replacing(folder / "loss.csv") as path:
            rows = (f"{i},{loss:.9g}\n" for i, loss in enumerate(self.losses, start=1))
            path.write_text("step,loss\n" + "".join(rows))
        with replacing(folder / "checkpoint.pt") as path:
            torch.save(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
        different = [
            f"{name}: the run was started with {saved.get(name)!r}, now {self.settings.get(name)!r}"
            if name not in ("model", "data")
            else f"{name}: differs from the one the run was started with"
            for name in sorted(saved.keys() | self.settings.keys())
            if saved.get(name) != self.settings.get(name)
        ]
        if different:
            raise ValueError(f"[train_rectified_flow] resume: cannot continue {path}: " + "; ".join(different))
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.order, self.losses = state["step"], state["order"], state["losses"].tolist()


def normal_source(like: Tensor) -> Source:
    """Standard normal noise in the shape of ``like``'s samples."""
    return lambda n, generator: torch.randn(n, *like.shape[1:], generator=generator, dtype=like.dtype)


def fingerprint(*tensors: Tensor | None) -> str:
    """Identifies tensors by shape, type and up to about a million of their elements, evenly spaced."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 2**20)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _lr_factor(step: int, steps: int, schedule: str) -> float:
    warmup = max(1, steps // 100)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))


def _require(ok: bool, who: str, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"[{who}] {argument}: expected {expected}, got {got}")
