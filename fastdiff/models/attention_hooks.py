"""Looking into attention: capture maps, inject maps captured elsewhere, or edit them, in the layers that are named.

Every attention module of ours has ``is_cross`` and ``processor``; a processor is called as ``processor(module, q, k, v)
-> out`` with q, k, v, out [B,N,H,d] in place of the fused kernel. Here processors are links of a chain, so that
contexts nest and an :class:`~fastdiff.models.ip_adapter.IPAdapter` may be attached as well: a link sees an
:class:`AttentionCall` and hands it on, changed or not, with ``attend``; behind the last link is the fused kernel, or
the product with the map that a link has put in. Layers that no link names never store a map.

Prompt-to-prompt (Hertz et al. 2022, arXiv:2208.01626) is then capture in one run and inject in the next; plug-and-play
features and joint-attention transformers inject q and k (``what="qk"``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fastdiff import ops

__all__ = [
    "AttentionCall",
    "attach_attention",
    "attention_layers",
    "capture_attention",
    "edit_attention",
    "inject_attention",
]

Layers = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
Captured = Tensor | tuple[Tensor, Tensor]
Source = Mapping[str, Sequence[Captured | None]] | Callable[[str, int], Captured | None]


@dataclass(frozen=True)
class AttentionCall:
    """One call of one attention layer, as a link of the chain gets it and hands it on.

    Args:
        name: of the layer in the model, e.g. ``"blocks.3.attn"``.
        module: the layer.
        q: [B,N,H,d], after norms and rotations of the layer.
        k: [B,M,H,d].
        v: [B,M,H,d].
        probs: [B,H,N,M], the map to use in place of ``softmax(q k^T / sqrt(d))``; None: not replaced.
    """

    name: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    probs: Tensor | None = None

    def map(self) -> Tensor:
        """The map [B,H,N,M] that this call stands for: the one put in, or that of q and k."""
        return ops.attention_probs(self.q, self.k, layout="bnhd") if self.probs is None else self.probs


Attend = Callable[[AttentionCall], Tensor]
Link = Callable[[AttentionCall, Attend], Tensor]


class _Processor:
    """A link in a module's chain, and what was there before it."""

    def __init__(self, name: str, link: Link, before: Any) -> None:
        self.name, self.link, self.before = name, link, before

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.run(AttentionCall(self.name, module, q, k, v))

    def run(self, call: AttentionCall) -> Tensor:
        return self.link(call, self._behind)

    def _behind(self, call: AttentionCall) -> Tensor:
        if isinstance(self.before, _Processor):
            return self.before.run(replace(call, name=self.before.name))
        if self.before is None:
            if call.probs is not None:
                return ops.attention_inject(call.probs, call.v, layout="bnhd")
            return ops.attention(call.q, call.k, call.v, layout="bnhd")
        if call.probs is not None:
            raise ValueError(
                f"[attention_hooks] {call.name}: expected no map to inject, got one: the layer has a processor of its "
                "own, which takes none"
            )
        out: Tensor = self.before(call.module, call.q, call.k, call.v)
        return out


def attention_layers(model: nn.Module, layers: Layers = None, *, cross: bool | None = None) -> dict[str, nn.Module]:
    """The attention modules of a model by name, in the order of ``named_modules``.

    Args:
        model: any module with attention modules of ours inside.
        layers: names or glob patterns (``"blocks.[0-3].attn"``, ``"input_blocks.*"``), or a predicate ``(name, module)
            -> bool``; None for all.
        cross: True for cross-attention only, False for self-attention only.

    Raises:
        ValueError: the model has no attention, or a name or pattern fits none of it.
    """
    found = {name: m for name, m in model.named_modules() if hasattr(m, "is_cross") and hasattr(m, "processor")}
    if not found:
        raise ValueError(f"[attention_hooks] model: expected attention layers inside, got {type(model).__name__}")
    if callable(layers):
        found = {name: m for name, m in found.items() if layers(name, m)}
    elif layers is not None:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ValueError(f"[attention_hooks] layers: expected some of {list(found)}, got {pattern!r}")
        found = {name: m for name, m in found.items() if any(fnmatchcase(name, p) for p in patterns)}
    return {name: m for name, m in found.items() if cross is None or m.is_cross is cross}


def attach_attention(
    model: nn.Module, link: Link, layers: Layers = None, *, cross: bool | None = None
) -> Callable[[], None]:
    """Puts a link in front of the chain of the layers named, until the function returned is called.

    Args:
        model: as in `attention_layers`.
        link: ``link(call, attend) -> out`` [B,N,H,d]; ``attend(call)`` is the rest of the chain and may be called any
            number of times. Change a call with ``dataclasses.replace``.
        layers: as in `attention_layers`.
        cross: likewise.

    Returns:
        a function that takes the link out again, wherever it stands by then; calling it twice does no harm.

    Raises:
        ValueError: as `attention_layers`.
    """
    attached: list[tuple[Any, _Processor]] = []
    for name, module in attention_layers(model, layers, cross=cross).items():
        target: Any = module
        target.processor = _Processor(name, link, target.processor)
        attached.append((target, target.processor))

    def detach() -> None:
        while attached:
            _take_out(*attached.pop())

    return detach


def _take_out(module: Any, processor: _Processor) -> None:
    if module.processor is processor:
        module.processor = processor.before
        return
    link = module.processor
    while isinstance(link, _Processor):
        if link.before is processor:
            link.before = processor.before
            return
        link = link.before


@contextmanager
def edit_attention(
    model: nn.Module, fn: Link, *, layers: Layers = None, cross: bool | None = None
) -> Iterator[dict[str, nn.Module]]:
    """Within the context, ``fn(call, attend) -> out`` computes attention in the layers named; see `attach_attention`.

    E.g. attention that is sharper by half::

        def sharper(call, attend):
            return attend(replace(call, q=1.5 * call.q))

    Yields the layers. They are as before when the context ends, after exceptions too; contexts nest, the inner one
    seeing the call first.
    """
    with ExitStack() as stack:
        stack.callback(attach_attention(model, fn, layers, cross=cross))
        yield attention_layers(model, layers, cross=cross)


@contextmanager
def capture_attention(
    model: nn.Module,
    *,
    layers: Layers = None,
    cross: bool | None = None,
    what: str = "probs",
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[dict[str, list[Any]]]:
    """Within the context, records the attention of the layers named: ``{name: [one entry per call]}``, detached.

    Args:
        model: as in `attention_layers`.
        layers: likewise.
        cross: likewise.
        what: ``"probs"``: maps [B,H,N,M]; ``"qk"``: pairs (q [B,N,H,d], k [B,M,H,d]); ``"output"``: [B,N,H,d]. The
            layer's own result comes from the fused kernel whatever is captured, so that capturing changes no number.
            (Up to rounding in `TextDiT`, which shows hooks the masks and padding of captions that it skips otherwise.)
        transform: applied to each tensor before it is kept, e.g. ``lambda p: p.mean(1).cpu()``: a map takes
            ``4 B H N M`` bytes for every call.

    Raises:
        ValueError: as `attention_layers`, or `what` is none of the three.
    """
    _check_what("capture_attention", what, ("probs", "qk", "output"))
    records: dict[str, list[Any]] = {name: [] for name in attention_layers(model, layers, cross=cross)}

    def keep(tensor: Tensor) -> Tensor:
        return tensor.detach() if transform is None else transform(tensor.detach())

    def link(call: AttentionCall, attend: Attend) -> Tensor:
        if what == "output":
            out = attend(call)
            records[call.name].append(keep(out))
            return out
        if what == "qk":
            records[call.name].append((keep(call.q), keep(call.k)))
            return attend(call)
        records[call.name].append(keep(call.map()))
        return attend(call)

    with edit_attention(model, link, layers=list(records), cross=cross):
        yield records


@contextmanager
def inject_attention(
    model: nn.Module, source: Source, *, layers: Layers = None, cross: bool | None = None, what: str = "probs"
) -> Iterator[dict[str, int]]:
    """Within the context, the layers named use maps (or q and k) from `source` in place of their own.

    Args:
        model: as in `attention_layers`.
        source: what `capture_attention` recorded, or a function ``(name, call) -> map`` with calls counted from 0. An
            entry of None leaves that call alone.
        layers: as in `attention_layers`; None for all that `source` has (a function: for all).
        cross: likewise.
        what: ``"probs"`` or ``"qk"``, as captured.

    Yields:
        the calls so far by layer; at most as many as `source` has of a layer may be made.

    Raises:
        ValueError: as `attention_layers`; `source` lacks a layer named or has too few entries; a map that does not fit
            (from ``ops.attention_inject``).
    """
    _check_what("inject_attention", what, ("probs", "qk"))
    if layers is None and not callable(source):
        layers = list(source)
    names = list(attention_layers(model, layers, cross=cross))
    counts = dict.fromkeys(names, 0)
    if not callable(source):
        for name in names:
            if name not in source:
                raise ValueError(f"[inject_attention] source: expected an entry for {name!r}, got {list(source)}")

    def entry(name: str) -> Any:
        index = counts[name]
        counts[name] += 1
        if callable(source):
            return source(name, index)
        if index >= len(source[name]):
            raise ValueError(f"[inject_attention] source[{name!r}]: expected an entry for call {index}, got {index}")
        return source[name][index]

    def link(call: AttentionCall, attend: Attend) -> Tensor:
        given = entry(call.name)
        if given is None:
            return attend(call)
        if what == "probs":
            return attend(replace(call, probs=given))
        q, k = given
        return attend(replace(call, q=q.to(call.q), k=k.to(call.k)))

    with edit_attention(model, link, layers=names):
        yield counts


def _check_what(owner: str, what: str, known: tuple[str, ...]) -> None:
    if what not in known:
        raise ValueError(f"[{owner}] what: expected one of {known}, got {what!r}")
