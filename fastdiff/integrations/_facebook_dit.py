"""Blocks of the DiT of Facebook Research, of SiT and of their many forks; attention and MLPs in timm's form.

They are recognised by attribute names, since each project has a class of its own, and by their numbers: see `_probe`.
A fork that does something else (another order of the chunks, a rotation of queries and keys, another norm that it
applies in its forward) stays as it is and is named in the report with the measured difference.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.integrations._probe import disagreement, extra_parts
from fastdiff.integrations._sites import attend, drop, gate, gate_modulate, modulate, normalise_heads, rms_of, unwatched
from fastdiff.integrations._swap import Handler, original_class
from fastdiff.ops import _linear

__all__ = ["HANDLERS"]


# --------------------------------------------------------------------------------------------------- what we compute


def _run_block(self: Any, x: Tensor, c: Tensor) -> Tensor:
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
    h = modulate(self.norm1, x, shift_1, scale_1)
    x, h = gate_modulate(self.norm2, x, self.attn(h), gate_1, shift_2, scale_2)
    return gate(x, self.mlp(h), gate_2)


def _run_final(self: Any, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
    return _linear.call(self.linear, modulate(self.norm_final, x, shift, scale))


def _run_attention(self: Any, x: Tensor) -> Tensor:
    qkv = _linear.call(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
    norm_q, norm_k = _norm(self, "q_norm"), _norm(self, "k_norm")
    scale = getattr(self, "scale", None)
    weight_q, weight_k = rms_of(norm_q, qkv), rms_of(norm_k, qkv)
    if norm_q is None and norm_k is None:
        out = ops.attention_qkvpacked(qkv, scale=scale).flatten(2)
    elif weight_q is not None and weight_k is not None and norm_q.eps == norm_k.eps:
        out = ops.attention_qkvpacked(qkv, scale=scale, q_norm=weight_q, k_norm=weight_k, eps=norm_q.eps).flatten(2)
    else:
        q, k, v = qkv.unbind(2)
        out = attend(normalise_heads(norm_q, q), normalise_heads(norm_k, k), v, scale)
    out = drop(getattr(self, "norm", None), out)
    return drop(getattr(self, "proj_drop", None), _linear.call(self.proj, out))


def _run_mlp(self: Any, x: Tensor) -> Tensor:
    act = self.act
    if type(act) is nn.GELU and act.approximate == "tanh" and unwatched(act):
        x = _linear.call(self.fc1, x, gelu=True)
    else:
        x = act(_linear.call(self.fc1, x))
    x = drop(getattr(self, "drop1", None) or getattr(self, "drop", None), x)
    x = _linear.call(self.fc2, drop(getattr(self, "norm", None), x))
    return drop(getattr(self, "drop2", None) or getattr(self, "drop", None), x)


def _norm(self: Any, name: str) -> Any:
    norm = getattr(self, name, None)
    return None if type(norm) is nn.Identity and unwatched(norm) else norm


# ------------------------------------------------------------------------------------------------------------ mixins


def _block(original: Any) -> type:
    class Fast:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs or not _is_conditioned(args):
                return original.forward(self, *args, **kwargs)
            return _run_block(self, *args)

    return Fast


def _final(original: Any) -> type:
    class Fast:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs or not _is_conditioned(args):
                return original.forward(self, *args, **kwargs)
            return _run_final(self, *args)

    return Fast


def _is_conditioned(args: tuple[Any, ...]) -> bool:
    """Tokens [B,N,D] and a condition [B,D], or [1,D] for all."""
    return len(args) == 2 and args[0].dim() == 3 and args[1].dim() == 2 and len(args[1]) in (1, len(args[0]))


def _attention(original: Any) -> type:
    class Fast:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) != 1 or args[0].dim() != 3 or _drops_weights(self):
                return original.forward(self, *args, **kwargs)
            return _run_attention(self, *args)

    return Fast


def _serve_attention(self: Any, x: Tensor) -> Tensor:
    """What the fast layer computes."""
    if self.training and _drops_weights(self):
        return original_class(self).forward(self, x)  # type: ignore[attr-defined, no-any-return]
    return _run_attention(self, x)


def _mlp(original: Any) -> type:
    class Fast:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) != 1:
                return original.forward(self, *args, **kwargs)
            return _run_mlp(self, *args)

    return Fast


def _drops_weights(self: Any) -> bool:
    """Dropout of attention weights is on, or would be noticed if it were not called."""
    dropout = getattr(self, "attn_drop", 0.0)
    if not isinstance(dropout, nn.Module):
        return bool(dropout) and self.training
    return not unwatched(dropout) or (self.training and getattr(dropout, "p", 0) > 0)


# -------------------------------------------------------------------------------------------------- who is recognised


def _foreign(obj: Any, *names: str) -> bool:
    """A module with these children that is not ours, and that no library handled above."""
    if not isinstance(obj, nn.Module) or original_class(obj).__module__.split(".")[0] in ("fastdiff", "diffusers"):
        return False
    children = dict(obj.named_children())
    return all(name in children for name in names)


def _is_adaptive(obj: Any, times: int) -> bool:
    layers = obj.adaLN_modulation
    if not (isinstance(layers, nn.Sequential) and len(layers) == 2 and type(layers[0]) is nn.SiLU):
        return False
    last = layers[1]
    return isinstance(last, nn.Linear) and last.out_features == times * last.in_features


def _is_block(obj: Any) -> bool:
    return _foreign(obj, "norm1", "attn", "norm2", "mlp", "adaLN_modulation") and _is_adaptive(obj, 6)


def _is_final(obj: Any) -> bool:
    return _foreign(obj, "norm_final", "linear", "adaLN_modulation") and _is_adaptive(obj, 2)


def _is_attention(obj: Any) -> bool:
    if not (_foreign(obj, "qkv", "proj") and isinstance(getattr(obj, "num_heads", None), int)):
        return False
    qkv: Any = obj.qkv
    return isinstance(qkv, nn.Linear) and qkv.out_features == 3 * qkv.in_features


def _is_mlp(obj: Any) -> bool:
    if not (_foreign(obj, "fc1", "act", "fc2") and isinstance(obj.fc1, nn.Linear) and isinstance(obj.fc2, nn.Linear)):
        return False
    return obj.fc1.out_features == obj.fc2.in_features  # otherwise it is gated


def _why_block(obj: Any) -> str | None:
    known = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
    return extra_parts(obj, known) or disagreement(obj, obj.adaLN_modulation[1].in_features, 2, _run_block)


def _why_final(obj: Any) -> str | None:
    known = ("norm_final", "linear", "adaLN_modulation")
    return extra_parts(obj, known) or disagreement(obj, obj.adaLN_modulation[1].in_features, 2, _run_final)


def _why_attention(obj: Any) -> str | None:
    known = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
    # Loud tokens have a softmax of zeros and ones, in which the roundings of large logits show.
    return extra_parts(obj, known) or disagreement(obj, obj.qkv.in_features, 1, _serve_attention, loudness=1.0)


def _why_mlp(obj: Any) -> str | None:
    known = ("fc1", "act", "drop", "drop1", "norm", "fc2", "drop2")
    return extra_parts(obj, known) or disagreement(obj, obj.fc1.in_features, 1, _run_mlp)


HANDLERS = [
    Handler("DiT block", _is_block, _why_block, _block, tolerance=2e-5),
    Handler("DiT final layer", _is_final, _why_final, _final, tolerance=2e-5),
    Handler("attention of vision transformers", _is_attention, _why_attention, _attention, tolerance=2e-5),
    Handler("MLP of vision transformers", _is_mlp, _why_mlp, _mlp, tolerance=2e-5),
]
