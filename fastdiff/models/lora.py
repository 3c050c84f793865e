"""LoRA (Hu et al. 2021, arXiv:2106.09685) on our models, through the library ``peft`` and in its own file formats.

``W x`` becomes ``W x + (alpha / rank) B A x`` with A, B of rank `rank`, B zero at first, and only A and B learn. Our
products go around plain linear layers only (`fastdiff.ops._linear.call`); one that peft has replaced is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.models.checkpoints import CheckpointError, load_state

__all__ = ["add_lora", "default_targets", "load_lora", "merge_lora", "save_lora"]


def default_targets(model: nn.Module) -> list[str]:
    """What LoRA adapts unless told otherwise: linear layers of attention, and the outer projections of Mamba blocks.

    Raises:
        ValueError: the model has neither.
    """
    found = []
    for name, module in model.named_modules():
        attention = hasattr(module, "is_cross") and hasattr(module, "processor")
        for inner, layer in module.named_modules() if attention else module.named_children():
            if isinstance(layer, nn.Linear) and (attention or inner in ("in_proj", "out_proj")):
                found.append(f"{name}.{inner}" if name else inner)
    if not found:
        raise ValueError(f"[add_lora] model: expected attention or Mamba layers inside, got {type(model).__name__}")
    return sorted(set(found))


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: str | Sequence[str] | None = None,
    dropout: float = 0.0,
) -> Any:
    """The model as a ``peft.PeftModel`` in which only the LoRA matrices learn. The model is changed in place.

    Args:
        model: any model of ours; ``model(x, t, cond)`` is what the result takes, too.
        rank: of the update, at least 1.
        alpha: the update is multiplied by ``alpha / rank``; `rank` if None.
        targets: the layers, as peft's ``target_modules``: names, ends of names, or a regular expression as one string.
            None: `default_targets`.
        dropout: of what the LoRA matrices see, in [0, 1).

    Raises:
        ImportError: peft is not there.
        ValueError: an argument is out of range, or no layer is a target.
    """
    peft = _peft()
    if rank < 1:
        raise ValueError(f"[add_lora] rank: expected at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"[add_lora] dropout: expected a value in [0, 1), got {dropout}")
    chosen = default_targets(model) if targets is None else targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=chosen, lora_dropout=dropout
    )
    return peft.get_peft_model(model, config)


def merge_lora(model: Any) -> nn.Module:
    """The model itself again, with the updates added to its weights; for what `add_lora` or `load_lora` returned.

    Raises:
        TypeError: the model has no LoRA.
    """
    if not isinstance(model, _peft().PeftModel):
        raise TypeError(f"[merge_lora] model: expected what add_lora or load_lora returned, got {type(model).__name__}")
    merged: nn.Module = model.merge_and_unload()
    return merged


def save_lora(model: Any, folder: str | Path) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into `folder`, which is made if need be."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_lora(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Any:
    """The model with the LoRA that `save_lora`, or peft, wrote into `folder`.

    Args:
        model: as it was when the LoRA was added to it.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: whether the matrices go on learning.

    Raises:
        ImportError: peft is not there.
        FileNotFoundError: a file is missing (peft would look for the folder's name on the internet).
        CheckpointError: the file is damaged, or has updates of layers that the model does not have (peft would leave
            them out); the model is unchanged.
    """
    peft = _peft()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"[load_lora] folder: expected {name} in {folder}")
    path = Path(folder) / "adapter_model.safetensors"
    updates = [name for name in load_state(path) if ".lora_" in name]
    layers = {name for name, _ in model.named_modules()}
    unexpected = [n for n in updates if n.split(".lora_")[0].removeprefix("base_model.model.") not in layers]
    if unexpected or not updates:
        reason = f"no LoRA of this {type(model).__name__}"
        raise CheckpointError(str(path), reason, unexpected=unexpected)
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'fastdiff[models]'") from error
    return peft
