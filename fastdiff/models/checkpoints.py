"""Weights in files: read whichever way they were published, checked before anything in a model changes, and written.

    load_weights(dit("DiT-XL/2"), "DiT-XL-2-256x256.pt")         # names of the published code, or of diffusers
    save_weights(model, "mine.safetensors"); model = load_model("mine.safetensors")

A model that knows other names for its parameters has a method ``adapt_state_dict(state) -> state``; any module can be
loaded and saved. Nothing is unpickled but tensors, numbers, text and containers of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff._files import replacing
from fastdiff.models.modulation import dropped_shapes, set_weights

__all__ = ["CheckpointError", "LoadedKeys", "load_model", "load_state", "load_weights", "save_state", "save_weights"]

State = dict[str, Tensor]

# Where training scripts put the weights, the averaged ones first, as their own sampling scripts look for them.
_WRAPPERS = (
    *("ema", "state_dict_ema", "ema_state_dict", "model_ema", "params_ema"),
    *("state_dict", "model_state_dict", "model", "module", "params", "weights", "net"),
)
_IP_ADAPTER = {"image_proj", "ip_adapter"}  # the parts of its published files, which belong together
_LISTED = 8  # keys of one kind that an error names


class CheckpointError(ValueError):
    """A file that holds no weights, or others than the model has.

    Attributes:
        source: the file, or what was given in its place.
        missing: parameters of the model that are not in the file.
        unexpected: entries of the file that the model does not have.
        misshapen: {name: (shape in the model, shape in the file)}.
    """

    def __init__(
        self,
        source: str,
        reason: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        self.source = source
        self.missing, self.unexpected, self.misshapen = sorted(missing), sorted(unexpected), dict(misshapen or {})
        shapes = [f"{k}: expected {list(want)}, got {list(got)}" for k, (want, got) in sorted(self.misshapen.items())]
        parts = [f"{source}: {reason}"]
        parts += [_listed("missing", self.missing), _listed("unexpected", self.unexpected), _listed("shape", shapes)]
        super().__init__("\n".join(part for part in parts if part))

    def __reduce__(self) -> Any:
        return (_again, (self.source, str(self), self.missing, self.unexpected, self.misshapen))


def _again(source: str, text: str, missing: list[str], unexpected: list[str], misshapen: Any) -> CheckpointError:
    error = CheckpointError(source, "", missing=missing, unexpected=unexpected, misshapen=misshapen)
    error.args = (text,)
    return error


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"  {kind} ({len(names)}): {', '.join(names[:_LISTED])}{more}"


@dataclass(frozen=True)
class LoadedKeys:
    """What did not match, with ``strict=False``: names in the model without values, and entries without a place."""

    missing: list[str]
    unexpected: list[str]


# ------------------------------------------------------------------------------------------------------------ reading


def load_state(path: str | Path, *, key: str | None = None) -> State:
    """Reads the tensors of a file, on the CPU.

    Args:
        path: a ``.safetensors`` file (recognised by its content), a file of `torch.save` (``.pt``, ``.pth``, ``.bin``),
            the ``.index.json`` of a sharded one, or a folder that holds just one of these.
        key: for files that hold several sets of weights, e.g. ``"model"`` or ``"ema"``; by default the averaged ones
            are taken if there are any, as the published sampling scripts do.

    Returns:
        {name: tensor}; prefixes that wrappers add to every name (``module.``, ``_orig_mod.``) are removed.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is cut short, no checkpoint, or has no weights (under `key`).
    """
    path = Path(path)
    if path.is_dir():
        path = _only_checkpoint(path)
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.name.endswith(".index.json"):
        return _unprefixed(_read_shards(path, key))
    return _unprefixed(_read(path, key))


def _only_checkpoint(folder: Path) -> Path:
    for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(str(folder), f"expected one checkpoint in this folder, found {names}")
    raise CheckpointError(str(folder), "no checkpoint in this folder")


def _read(path: Path, key: str | None) -> State:
    with open(path, "rb") as handle:
        head = handle.read(9)
    if head[8:9] == b"{":  # eight bytes of length, then JSON
        if key is not None:
            raise CheckpointError(str(path), f"key: a safetensors file holds one set of weights, got key={key!r}")
        return _read_safetensors(path)
    return _select(_read_torch(path), key, str(path))


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: State = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(str(path), f"not a whole safetensors file ({error})") from error
    return found


def _read_torch(path: Path) -> Any:
    try:
        # Training scripts save their parsed arguments beside the weights; a namespace can do no harm.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        why = (str(error).strip().splitlines() or [""])[0]
        reason = f"no safetensors file, and torch.load cannot read it safely ({type(error).__name__}: {why})"
        raise CheckpointError(str(path), reason) from error


def _read_shards(index: Path, key: str | None) -> State:
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(index), f"not the index of a sharded checkpoint ({error})") from error
    state: State = {}
    for name in files:
        path = index.parent / name
        if Path(name).name != name or not path.exists():
            raise CheckpointError(str(index), f"a shard that it names is not beside it: {name}")
        state.update(_read(path, key))
    if places.keys() - state.keys():
        raise CheckpointError(str(index), "the shards do not hold what the index names", missing=places - state.keys())
    return state


def _select(loaded: Any, key: str | None, source: str) -> State:
    """The weights among what a training script saved."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(source, f"expected a state dict, found {type(loaded).__name__}")
    if key is not None:
        if not _is_state(loaded.get(key)):
            raise CheckpointError(source, f"no weights under key={key!r}; it has {', '.join(map(str, loaded))}")
        return _tensors(loaded[key])
    for wrapper in _WRAPPERS:
        if _is_state(loaded.get(wrapper)):
            return _tensors(loaded[wrapper])
    if loaded.keys() == _IP_ADAPTER and all(map(_is_state, loaded.values())):
        return {f"{part}.{name}": value for part in loaded for name, value in _tensors(loaded[part]).items()}
    if not _is_state(loaded):
        raise CheckpointError(source, f"no weights in it; it has {', '.join(map(str, loaded)) or 'no entries'}")
    return _tensors(loaded)


def _is_state(found: Any) -> bool:
    return isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values())


def _tensors(found: Mapping[Any, Any]) -> State:
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _unprefixed(state: State) -> State:
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


# ------------------------------------------------------------------------------------------------------------ loading


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Tensor], *, strict: bool = True, key: str | None = None
) -> LoadedKeys:
    """Puts weights into a model, in the type and on the device that it has; all of them or, on an error, none.

    Names are translated by the model where it knows others than its own: `DiT` those of diffusers (the published DiT
    and SiT files carry its own), `TextDiT` likewise. Weights that `drop_modulation_weights` took come back as well.

    Args:
        model: any module, also behind `torch.compile` or data parallelism; one built on the "meta" device gets its
            memory here.
        source: what `load_state` reads, or a state dict.
        strict: refuse missing and unexpected names. Shapes must fit either way.
        key: see `load_state`.

    Returns:
        the names that did not match.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read or does not fit; the model is unchanged.
    """
    model = _bare(model)
    given = isinstance(source, Mapping)
    where = "state dict" if given else str(source)
    state = _unprefixed(_select(source, key, where)) if isinstance(source, Mapping) else load_state(source, key=key)
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is not None:
        try:
            state = adapt(state)
        except CheckpointError as error:
            raise CheckpointError(where, error.args[0]) from error
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    shapes = {name: tuple(value.shape) for name, value in own.items()} | dropped_shapes(model)
    derived = {name for name in getattr(model, "derived_buffers", ()) if name in own and not own[name].is_meta}
    missing, unexpected = sorted(shapes.keys() - state.keys() - derived), sorted(state.keys() - shapes.keys())
    common = shapes.keys() & state.keys()
    misshapen = {
        name: (shapes[name], tuple(state[name].shape)) for name in common if shapes[name] != tuple(state[name].shape)
    }
    if misshapen or (strict and (missing or unexpected)):
        reason = f"does not fit this {type(model).__name__}"
        raise CheckpointError(where, reason, missing=missing, unexpected=unexpected, misshapen=misshapen)
    for name in sorted(common & own.keys()):
        if own[name].is_floating_point() and not state[name].is_floating_point():
            reason = f"{name}: expected floating-point numbers, got {state[name].dtype} (quantised weights?)"
            raise CheckpointError(where, reason)
    with torch.no_grad():
        for name in sorted(common & own.keys()):
            if own[name].is_meta:
                _give_memory(model, name, state[name])
            else:
                own[name].copy_(state[name])
    set_weights(model, {name: state[name] for name in common - own.keys()})
    return LoadedKeys(missing, unexpected)


def _bare(model: nn.Module) -> Any:
    """The model behind the wrappers that prefix every name of its parameters."""
    while True:
        if "_orig_mod" in model._modules:  # torch.compile
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _give_memory(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter or buffer of a model built on the "meta" device."""
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, kind)
    made = value.detach().to(old.dtype).clone()
    setattr(module, kind, nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made)


# ------------------------------------------------------------------------------------------------------------ writing


def save_state(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as a safetensors file: under a temporary name, then renamed.

    Args:
        state: {name: tensor}; tensors that share memory are written one by one.
        path: the file; its folder must exist.
        metadata: text kept in the header.
    """
    from safetensors.torch import save_file

    whole = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    with replacing(Path(path)) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes the weights of a model as a safetensors file, with its class and ``config`` in the header.

    Args:
        model: any module; `load_model` builds those of fastdiff.models anew. What `torch.compile` or data parallelism
            wrap around one is left out.
        path: the file; its folder must exist.

    Raises:
        ValueError: the model's modulation weights were dropped, so the file would not be whole.
    """
    model = _bare(model)
    if dropped_shapes(model):
        raise ValueError("[save_weights] model: expected all its weights, got one after drop_modulation_weights()")
    kind = type(model)
    metadata = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if isinstance(getattr(model, "config", None), dict):
        metadata["config"] = json.dumps(model.config)
    save_state(model.state_dict(), path, metadata)


def load_model(path: str | Path) -> Any:
    """Builds the model that a file or folder describes, with its weights, in evaluation mode.

    Args:
        path: a file of `save_weights` from a model of fastdiff.models; or a folder as diffusers' ``save_pretrained``
            writes it for ``DiTTransformer2DModel`` and ``PixArtTransformer2DModel`` (``config.json`` and weights).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or does not say which model it is of.
    """
    path = Path(path)
    if path.is_dir():
        return _from_diffusers(path).eval()
    state = load_state(path)
    kind, config = _described(path)
    try:
        model = kind(**config)
    except TypeError as error:
        reason = f"{kind.__name__} is not built from the settings in it ({error}); build one and use load_weights"
        raise CheckpointError(str(path), reason) from error
    first = next((name for name, _ in model.named_parameters()), "")
    if first in state:  # a file in half precision makes a model in half precision
        model.to(state[first].dtype)
    load_weights(model, state)
    return model.eval()


def _described(path: Path) -> tuple[Any, dict[str, Any]]:
    """The class and settings that `save_weights` wrote; only classes of fastdiff.models are ever looked up."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
    except SafetensorError as error:
        reason = "does not say which model it is of; build one and use load_weights"
        raise CheckpointError(str(path), reason) from error
    module, _, name = metadata.get("class", "").rpartition(".")
    kind = None
    if module.startswith("fastdiff.models.") and name.isidentifier():
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ImportError:
            kind = None
    if "config" not in metadata or not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CheckpointError(str(path), "does not say which model of fastdiff.models it is of; use load_weights")
    return kind, json.loads(metadata["config"])


def _from_diffusers(folder: Path) -> Any:
    from fastdiff.models.dit import DiT
    from fastdiff.models.text_dit import TextDiT

    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(str(folder), "a folder needs a config.json that says which model it is of") from None
    except ValueError as error:
        raise CheckpointError(str(folder), f"its config.json is no JSON ({error})") from error
    known: dict[str, Any] = {"DiTTransformer2DModel": DiT, "PixArtTransformer2DModel": TextDiT}
    found = config.get("_class_name")
    if found not in known:
        raise CheckpointError(str(folder), f"expected a config of {' or '.join(known)}, got {found!r}")
    return known[found].from_diffusers(load_state(folder), config)
