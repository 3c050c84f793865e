"""Modulation tables: what adaLN computes from (time, condition), for a whole schedule at once.

In a model with adaptive layer norms (Peebles & Xie, 2022, arXiv:2212.09748, §3.2; Chen et al., 2023, arXiv:2310.00426,
§2.3) every shift, scale and gate depends on the time and the condition only, not on the image. Sampling visits the same
few times over and over, so

    table = model.precompute_modulation(timesteps, labels, guidance=True)
    with model.drop_modulation_weights(keep="modulation.safetensors"):
        for i, t in enumerate(timesteps):
            pred = model.forward_with_cfg(x, None, None, 4.0, modulation=table.at(i))

does those products once, for all steps and distinct labels together, each weight being read once, and then runs without
the weights, which are a third of a DiT. It is one product per layer: stacking the weights of all layers first, to make
one product of everything, took three times as long on a CPU, since the copy costs more than the product.

Memory: a table holds ``T * U * K`` numbers for T times and U distinct conditions (and the null class with
``guidance=True``). DiT: ``K = (6 depth + 2) D``, in float32 0.78 MB a row for DiT-XL, whose weights for it are 903 MB
(``(6 depth + 2) D (D + 1)`` numbers). DiffusionMamba: ``K = (3 depth + 2) D``, and 3 D more for each block of
attention. TextDiT: ``K = 7 D``, 32 kB a row; its one layer has 32 MB (``6 D (D + 1)`` numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models._layers import require

__all__ = ["DroppedWeights", "Modulated", "Modulation", "ModulationTable", "with_table"]


@dataclass(frozen=True)
class Modulation:
    """One step of a `ModulationTable`; what a model takes as ``modulation=``.

    Args:
        values: [U, K], a row for each distinct condition.
        rows: [B] int64, the row of each sample; None if all have the first, in a batch of any size.
        null_row: the row of the null class; None if there is none.
    """

    values: Tensor
    rows: Tensor | None = None
    null_row: int | None = None

    def guided(self, batch: int) -> Modulation:
        """The same for a batch followed by its unconditional copy.

        Raises:
            ValueError: the table was built without ``guidance=True``, or for another batch.
        """
        if self.null_row is None:
            raise ValueError("[Modulation] modulation: expected a table built with guidance=True, got one without")
        self._fits(batch)
        if self.rows is None and self.null_row == 0:
            return self
        rows = self.rows
        if rows is None:
            rows = torch.zeros(batch, dtype=torch.int64, device=self.values.device)
        return replace(self, rows=torch.cat([rows, torch.full_like(rows, self.null_row)]))

    def for_batch(self, batch: int) -> Tensor:
        """[B, K], or [1, K] if one row serves all samples."""
        self._fits(batch)
        return self.values[:1] if self.rows is None else self.values.index_select(0, self.rows)

    def _fits(self, batch: int) -> None:
        if self.rows is not None and len(self.rows) != batch:
            require(False, "Modulation", "modulation", f"a table for a batch of {batch}", f"one of {len(self.rows)}")


@dataclass(frozen=True)
class ModulationTable:
    """Modulations of a whole schedule.

    Args:
        values: [T, U, K].
        timesteps: [T], the times, as they were given.
        rows: see `Modulation`.
        null_row: likewise.
        labels: [U], the class label of each row; none at all for the unconditional prediction; None if the numbers do
            not depend on the condition.
    """

    values: Tensor
    timesteps: Tensor
    rows: Tensor | None = None
    null_row: int | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers held."""
        return self.values.numel() * self.values.element_size()

    def at(self, step: int) -> Modulation:
        """Of time number `step`; negative numbers count from the end.

        Raises:
            IndexError: there is no such step.
        """
        if not -len(self) <= step < len(self):
            raise IndexError(f"[ModulationTable.at] step: expected one of {len(self)}, got {step}")
        return Modulation(self.values[step], self.rows, self.null_row)

    def index(self, t: float | Tensor) -> int:
        """The step whose time is `t` (a tensor: all of its times), as it was given; reads device values.

        Of two floating-point types the narrower decides: a plan has its times in float64, a model gets them in float32.

        Raises:
            ValueError: the schedule has no such time, or `t` holds several or is too coarse to tell two of them apart.
        """
        times = torch.as_tensor(t, dtype=torch.float64 if isinstance(t, float) else None, device=self.timesteps.device)
        times, own = times.flatten(), self.timesteps
        if own.is_floating_point() and times.is_floating_point():
            kind = max(own.dtype, times.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            times, own = times.to(kind), own.to(kind)
        require(len(times) > 0, "ModulationTable", "t", "at least one time", "none")
        found = (own == times[0]).nonzero().flatten()
        require(bool((times == times[0]).all()), "ModulationTable", "t", "the same time for the whole batch", t)
        require(len(found) > 0, "ModulationTable", "t", f"one of the {len(self)} times of the table", times[0].item())
        alike = self.timesteps[found]
        require(bool((alike == alike[0]).all()), "ModulationTable", "t", "a type that tells its times apart", own.dtype)
        return int(found[0])

    def for_cond(self, step: int, cond: Any) -> Modulation:
        """Of time number `step` for labels cond [B] among those of the table (reads device values); None: no label.

        Raises:
            ValueError: the table is without one of these labels, or without the null class.
        """
        found = self.at(step)
        if self.labels is None:
            return found
        if cond is None:
            null = self.null_row if len(self.labels) else 0
            require(null is not None, "ModulationTable", "cond", "labels, or a table built with guidance=True", None)
            return Modulation(found.values[null : null + 1])  # type: ignore[operator]
        same = cond.to(self.labels.device)[:, None] == self.labels
        known = f"labels among those of the table, {self.labels.tolist()}"
        require(bool(same.any(1).all()), "ModulationTable", "cond", known, cond.tolist())
        return Modulation(found.values, same.int().argmax(1), self.null_row)

    def to(self, *args: Any, **kwargs: Any) -> ModulationTable:
        """As `torch.Tensor.to`, of the values; the rest follows to the device."""
        values = self.values.to(*args, **kwargs)
        rest = {"rows": self.rows, "timesteps": self.timesteps, "labels": self.labels}
        moved: dict[str, Any] = {name: t if t is None else t.to(values.device) for name, t in rest.items()}
        return replace(self, values=values, **moved)


def with_table(model: nn.Module, table: ModulationTable) -> Callable[..., Tensor]:
    """``f(x, t, cond=None)`` for samplers: the model with the step of `table` whose time is t.

    cond are labels among those of the table; None is the null class, which a table with ``guidance=True`` has: what
    guidance by the sampler needs. The caption of `TextDiT` goes to the model.

    Raises:
        ValueError: (from the function) the table has no time t, or not these labels.
    """

    def predict(x: Tensor, t: Tensor, cond: Any = None, **extra: Any) -> Tensor:
        prediction: Tensor = model(x, None, cond, modulation=table.for_cond(table.index(t), cond), **extra)
        return prediction

    return predict


class Modulated(nn.Module):
    """A model whose modulation can come from a table. Derived classes say which layers compute it."""

    def _modulation_layers(self) -> Mapping[str, nn.Linear]:
        """The linear layers that a table stands in for, by their names in the model."""
        raise NotImplementedError

    def drop_modulation_weights(self, *, keep: str | Path | torch.device | None = None) -> DroppedWeights:
        """Frees the weights that a table stands in for. Without a table the model then raises an error.

        They are gone from ``parameters()`` and ``state_dict()``, so drop them after an optimizer was made only if that
        is dropped as well: whoever else holds a parameter keeps its memory.

        Args:
            keep: where the values go meanwhile: a file (safetensors) that is written now and read by ``restore()``; a
                device, e.g. ``torch.device("cpu")`` for a model on a GPU; None: they are forgotten, and come back with
                `fastdiff.models.load_weights`.

        Returns:
            what restores them: by ``restore()``, or at the end of a ``with`` block (which needs `keep`).

        Raises:
            ValueError: they are dropped already, one of the layers is none of ours any more (LoRA, quantised), or
                `keep` is the name of a device as text.
        """
        return DroppedWeights(self, keep)

    def modulation_bytes(self) -> int:
        """Bytes of the weights that a table stands in for, as far as they are there."""
        layers = self._modulation_layers().values()
        return sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())

    def _dropped(self) -> list[str]:
        return [name for name, layer in self._modulation_layers().items() if layer.weight is None]

    def _require_modulation_weights(self) -> None:
        """An error that says what to do, in place of one from a product with nothing."""
        if self._dropped():
            expected = "table.at(i), since drop_modulation_weights() took the weights that compute it"
            require(False, type(self).__name__, "modulation", expected, None)

    def _check_table(self, modulation: Modulation, width: int) -> None:
        """A table of another model is refused as far as its shape tells."""
        name = type(self).__name__
        kind = type(modulation).__name__
        require(isinstance(modulation, Modulation), name, "modulation", "a step of a table: table.at(i)", kind)
        found = modulation.values
        require(found.dim() == 2 and found.shape[1] == width, name, "modulation", f"rows of {width}", list(found.shape))


class DroppedWeights:
    """Weights that a model does without for now; see `Modulated.drop_modulation_weights`.

    Attributes:
        nbytes: bytes that were freed.
    """

    def __init__(self, model: Modulated, keep: str | Path | torch.device | None) -> None:
        self._model, self._keep = model, keep
        layers, owner = model._modulation_layers(), type(model).__name__
        device = isinstance(keep, str) and keep.split(":")[0] in ("cpu", "cuda")
        require(not device, owner, "keep", f"a file, or torch.device({str(keep)!r})", repr(keep))
        kinds = [type(layer) for layer in layers.values()]
        other = next((f"{kind.__module__}.{kind.__name__}" for kind in kinds if kind is not nn.Linear), None)
        require(other is None, owner, "drop_modulation_weights", "layers of torch.nn.Linear", other)
        require(not model._dropped(), owner, "drop_modulation_weights", "weights that are there", "none")
        values = {f"{n}.{k}": p.detach() for n, layer in layers.items() for k, p in layer.named_parameters()}
        self.nbytes = sum(v.numel() * v.element_size() for v in values.values())
        self._wanted = {f"{n}.{k}": p.requires_grad for n, layer in layers.items() for k, p in layer.named_parameters()}
        self._values: dict[str, Tensor] | None = None
        if isinstance(keep, torch.device):
            # A view of the same memory would free nothing, but then nobody asked for more.
            self._values = {name: value.to(keep) for name, value in values.items()}
        elif keep is not None:
            from fastdiff.models.checkpoints import save_state

            save_state(values, keep)
        for layer in layers.values():
            layer.weight = None  # type: ignore[assignment]
            layer.bias = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Gives the model its weights back, where it is now and in the type it has now; harmless when they are there.

        Raises:
            ValueError: the values were forgotten (``keep=None``), or their file does not hold them any more.
        """
        missing = set(self._model._dropped())
        if not missing:
            return
        require(self._keep is not None, "DroppedWeights", "keep", "a file or device to restore from", None)
        values = self._values
        if values is None:
            values = self._read()
        set_weights(self._model, {name: values[name] for name in self._wanted})
        for name, wanted in self._wanted.items():
            self._model.get_parameter(name).requires_grad_(wanted)
        self._values = None

    def _read(self) -> dict[str, Tensor]:
        from fastdiff.models.checkpoints import CheckpointError, load_state

        values = load_state(str(self._keep))
        shapes = dropped_shapes(self._model)
        missing = shapes.keys() - values.keys()
        found = {name: tuple(values[name].shape) for name in shapes.keys() - missing}
        misshapen = {name: (shapes[name], got) for name, got in found.items() if shapes[name] != got}
        if missing or misshapen:
            reason = "does not hold the weights that were dropped"
            raise CheckpointError(str(self._keep), reason, missing=missing, misshapen=misshapen)
        return values

    def __enter__(self) -> DroppedWeights:
        expected = "keep=file or keep=device: a with block restores what it dropped"
        require(self._keep is not None, "DroppedWeights", "keep", expected, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restore()


def dropped_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the weights that a model, or one inside it, does without for now."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Modulated):
            layers, prefix = module._modulation_layers(), f"{path}." if path else ""
            for name in module._dropped():
                shapes[f"{prefix}{name}.weight"] = (layers[name].out_features, layers[name].in_features)
                shapes[f"{prefix}{name}.bias"] = (layers[name].out_features,)
    return shapes


def set_weights(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Makes parameters of layers that have none, in the type and place of the rest of the model."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for name, value in values.items():
        owner, _, kind = name.rpartition(".")
        made = torch.empty(value.shape, dtype=like.dtype, device=like.device)
        made.copy_(value)
        setattr(model.get_submodule(owner), kind, nn.Parameter(made))


def rows_of_labels(labels: Tensor, null: int | None) -> tuple[Tensor, Tensor | None, int | None]:
    """(distinct labels [U], row of each sample or None if there is one, row of the label `null`)."""
    distinct, rows = torch.unique(labels, return_inverse=True)
    same = len(distinct) == 1
    if null is not None and not bool((distinct == null).any()):
        distinct = torch.cat([distinct, distinct.new_tensor([null])])
    null_row = None if null is None else int((distinct == null).nonzero()[0])
    return distinct, None if same else rows, null_row


def check_times(owner: str, timesteps: Tensor) -> None:
    """A schedule is a vector.

    Raises:
        ValueError: it is not, or has no times.
    """
    shape = list(timesteps.shape)
    require(
        timesteps.dim() == 1 and math.prod(shape) > 0, owner, "timesteps", "shape [T] with at least one time", shape
    )
