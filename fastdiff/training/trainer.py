"""The training loop of rectified flow, and the checkpoint from which it continues bitwise.

Everything random is drawn from two generators whose states are in the checkpoint: one of the loop (shuffling, noise,
times; on the CPU, so that every device sees the same draws) and torch's global one (label dropout inside the model).
"""

from __future__ import annotations

import hashlib
import math
import numbers
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastdiff._progress import progress_bar
from fastdiff.training._files import DamagedFileError, replacing
from fastdiff.training.couplings import COUPLINGS, couple
from fastdiff.training.rectified_flow import RectifiedFlowModel

__all__ = [
    "RUN_FILES",
    "Source",
    "check_integer",
    "check_labels",
    "check_noise",
    "check_options",
    "fingerprint",
    "fit",
    "model_dtype",
    "train_rectified_flow",
]

RUN_FILES = ("checkpoint.pt", "loss.csv")  # what a run keeps in its folder

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
        data: [N,...], samples x_1, finite and of a floating-point type; on any device. A batch is converted to the type
            of the model's parameters when it is used.
        source: ``source(n, generator) -> x_0 [n,...]``, drawn with the CPU generator it is given; default: standard
            normal noise in data's shape. Converted like data.
        steps: optimiser steps in all, those of earlier runs included when resuming.
        batch_size: pairs per step. An epoch visits every sample once; batches run across epochs, all of full size.
        lr: learning rate, after 1 % of the steps of linear warm-up.
        coupling: ``"independent"`` or ``"ot"``, see :func:`fastdiff.training.couple`; with labels, "ot" exchanges noise
            among equal labels only.
        labels: [N,...], conditions that go with the data.
        seed: the run is a function of it, of the arguments and of the initial weights.
        out: folder for ``checkpoint.pt`` and ``loss.csv``; None keeps nothing. One that holds a checkpoint already is
            refused, unless ``resume``.
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
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, data is not finite, ``out`` holds a checkpoint and ``resume`` is False,
            or the checkpoint is damaged or belongs to a run with other settings.
        FloatingPointError: the loss or the weights are no longer finite. The last checkpoint is from before that; the
            model's weights in memory are of no use.
    """
    who = "train_rectified_flow"
    _check_data(who, data)
    _require(coupling in (*COUPLINGS, "sinkhorn"), who, "coupling", f"one of {', '.join(COUPLINGS)}", repr(coupling))
    if labels is not None:
        check_labels(who, labels)
        _require(len(labels) == len(data), who, "labels", f"{len(data)}, one for each sample of data", len(labels))
    check_options(
        who,
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
    if out is not None and not resume and (Path(out) / "checkpoint.pt").exists():
        raise ValueError(
            f"[{who}] out: expected a folder without an earlier run, got {out}, which holds a checkpoint.pt; "
            "resume=True continues it"
        )
    couple(data[:0], data[:0], coupling)  # an unavailable coupling should fail before the first step
    dtype = model_dtype(model)
    draw = source if source is not None else normal_source(data, dtype)

    def batch(index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        index = index.to(data.device)
        x_1 = data[index].to(dtype)
        condition = None if labels is None else labels[index.to(labels.device)]
        x_0 = draw(len(index), generator)
        check_noise(who, x_0, tuple(x_1.shape))
        x_0 = x_0.to(x_1)
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
    """The loop itself, on pairs from ``batch(index [B], generator)``; ``settings`` says what else defines the run.

    The options are those of :func:`check_options`, checked by the caller.
    """
    # Plain numbers: a checkpoint with NumPy's among them could not be read again.
    steps, batch_size, seed = int(steps), int(batch_size), int(seed)
    lr, ema_decay, weight_decay = float(lr), float(ema_decay), float(weight_decay)
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
                    if not math.isfinite(loss):
                        raise FloatingPointError(_diverged(f"the loss is {loss}", run.step, lr))
                    if run.step == steps or (folder is not None and run.step % checkpoint_every == 0):
                        run.check_weights(lr)
                        if folder is not None:
                            run.save(folder)
                    update(run.step, f"loss {loss:.4f}")
                    if on_step is not None:
                        on_step(run.step, loss)
            run.finish()
        finally:
            model.train(was_training)


_STATE = frozenset(("settings", "step", "model", "optimiser", "ema", "generator", "global_rng", "cuda_rng"))
_STATE |= {"order", "losses"}


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

    def check_weights(self, lr: float) -> None:
        """A gradient may overflow where the loss did not; such weights must not replace the last good checkpoint."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(_diverged(f"{name} is not finite", self.step, lr))

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
        state = _read_checkpoint(path)
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


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = _STATE - state.keys()
    except (OSError, MemoryError):  # of the machine, not of the content
        raise
    except Exception as error:  # a damaged archive or pickle may fail in any way
        raise DamagedFileError(_damaged(path)) from error
    if missing:
        raise DamagedFileError(_damaged(path))
    return dict(state)


def _damaged(path: Path) -> str:
    return (
        f"[train_rectified_flow] resume: {path} is damaged (cut short, or not a checkpoint of this library) and cannot "
        "be continued; remove it to start anew"
    )


def _diverged(what: str, step: int, lr: float) -> str:
    return f"[train_rectified_flow] {what} after step {step}: training has diverged (lr={lr:g}; try a lower one)"


def normal_source(like: Tensor, dtype: torch.dtype) -> Source:
    """Standard normal noise in the shape of ``like``'s samples."""
    return lambda n, generator: torch.randn(n, *like.shape[1:], generator=generator, dtype=dtype)


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """What samples are converted to: the type of the first floating-point parameter."""
    types = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(types, torch.get_default_dtype())


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


# ---------------------------------------------------------------------------------------------------------- arguments


def check_options(
    who: str,
    *,
    steps: object,
    batch_size: object,
    checkpoint_every: object,
    seed: object,
    lr: object,
    ema_decay: object,
    weight_decay: object,
    lr_schedule: object,
    out: object,
    resume: bool,
) -> None:
    """What every training run is asked for, before anything is written or drawn."""
    for name, value in (("steps", steps), ("batch_size", batch_size), ("checkpoint_every", checkpoint_every)):
        check_integer(who, name, value, at_least=1)
    check_integer(who, "seed", seed)
    for name, value in (("lr", lr), ("ema_decay", ema_decay), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"[{who}] {name}: expected a number, got {value!r}")
        number = float(value)
        if name == "lr":
            _require(math.isfinite(number) and number > 0, who, name, "a finite number above 0", value)
        elif name == "ema_decay":
            _require(0 <= number < 1, who, name, "in [0, 1)", value)
        else:
            _require(math.isfinite(number) and number >= 0, who, name, "a finite number, 0 or more", value)
    _require(lr_schedule in ("constant", "cosine"), who, "lr_schedule", "'constant' or 'cosine'", repr(lr_schedule))
    _require(not resume or out is not None, who, "out", "the folder to resume from", out)


def check_integer(who: str, name: str, value: object, *, at_least: int | None = None) -> None:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"[{who}] {name}: expected an integer, got {value!r}") from None
    if at_least is not None:
        _require(number >= at_least, who, name, f"at least {at_least}", number)


def check_labels(who: str, labels: object) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"[{who}] labels: expected a tensor, got {_kind(labels)}")
    _require(labels.dim() >= 1, who, "labels", "shape [N,...]", list(labels.shape))


def check_noise(who: str, noise: object, shape: tuple[int, ...]) -> None:
    """``noise``, drawn from a source, is a floating-point tensor of ``shape``; with only [n], [n,...] will do."""
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"[{who}] source: expected a floating-point tensor, got {_kind(noise)}")
    fits = tuple(noise.shape) == shape if len(shape) > 1 else noise.dim() >= 2 and len(noise) == shape[0]
    expected = f"[{shape[0]},...]" if len(shape) == 1 else str(list(shape))
    _require(fits, who, "source", f"noise of shape {expected}", list(noise.shape))


def _check_data(who: str, data: object) -> None:
    if not isinstance(data, Tensor) or not data.is_floating_point():
        raise TypeError(f"[{who}] data: expected a floating-point tensor, got {_kind(data)}")
    _require(data.dim() >= 2 and data.numel() > 0, who, "data", "shape [N,...] with N > 0", list(data.shape))
    low, high = data.detach().aminmax()  # unlike isfinite() it allocates nothing; NaN comes through
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"[{who}] data: expected finite values, got NaN or infinity among them")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _require(ok: bool, who: str, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"[{who}] {argument}: expected {expected}, got {got}")
