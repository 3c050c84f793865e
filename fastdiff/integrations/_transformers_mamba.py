"""transformers' Mamba and FalconMamba mixers: convolution and scan by our operators, cache and mask as before.

Served: calls without a cache; and with the cache of transformers 5 (``get_conv_state`` and its like), reading a prompt
and generating token by token. Everything else is left to the original, call by call: packed sequences, several tokens
after a cached past (the original starts these from a zero state), and the caches and masks of earlier versions.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fastdiff import ops
from fastdiff.integrations._swap import Handler, defines, original_class
from fastdiff.models.mamba import project_and_scan
from fastdiff.ops import _linear

__all__ = ["HANDLER"]

_NAMES = ("MambaMixer", "FalconMambaMixer")
_LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")  # of dt, B and C
_CACHE = ("get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state", "is_recording_past")
_SIGNATURES = (  # after hidden_states
    ("cache", "attention_mask", "kwargs"),
    ("cache_params", "attention_mask", "kwargs"),
    ("cache_params", "attention_mask"),
    ("cache_params", "cache_position", "attention_mask"),  # transformers 4
)


def _claims(obj: Any) -> bool:
    return isinstance(obj, nn.Module) and any(defines(obj, "transformers", name) for name in _NAMES)


def _refuses(mixer: Any) -> str | None:
    missing = [name for name in (*_LAYERS, "A_log", "D", "layer_idx", "activation") if not hasattr(mixer, name)]
    if missing:
        return f"an unknown version of {type(mixer).__name__}: no {', '.join(missing)}"
    names = _parameters(original_class(mixer))
    if names[:1] != ("hidden_states",) or names[1:] not in _SIGNATURES:
        return f"an unknown version of {type(mixer).__name__}.forward, with arguments {names}"
    if mixer.activation not in ("silu", "swish"):
        return f"activation {mixer.activation!r}: ours is silu"
    if hasattr(mixer, "rms_eps") and not all(hasattr(mixer, name) for name in _NORMS):
        return f"an unknown version of {type(mixer).__name__}: norms of dt, B and C that are not layers"
    if getattr(mixer.config, "_is_quantized", False) or not mixer.dt_proj.weight.is_floating_point():
        return "quantised weights"
    if any(hasattr(getattr(mixer, name), "_hf_hook") for name in ("conv1d", "dt_proj")):
        return "weights that are moved in when they are used (offloading)"
    return None


def _parameters(cls: Any) -> tuple[str, ...]:
    """The arguments of its forward after self."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _mixin(original: type) -> type:
    """The methods of a fast mixer of this class; how its forward is called is looked up once."""
    names = _parameters(original)[1:]
    earlier = "cache_position" in names

    class FastMixer:
        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            cache, mask = given.pop("cache", None), given.pop("attention_mask", None)
            cache = given.pop("cache_params", None) if cache is None else cache
            if earlier:
                given.pop("cache_position", None)
                served = cache is None and mask is None
            else:
                served = _serves(self, hidden_states, cache, mask)
            if not served or any(value is not None for value in given.values()):
                out: Tensor = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
                return out
            return _forward(self, hidden_states, cache, mask)

    return FastMixer


def _serves(mixer: Any, x: Tensor, cache: Any, mask: Tensor | None) -> bool:
    if mask is not None and mask.shape != x.shape[:2]:
        return False
    if cache is None:
        return True
    if not all(hasattr(cache, name) for name in _CACHE):
        return False
    return x.shape[1] == 1 or cache.get_recurrent_state(mixer.layer_idx, state_idx=0) is None


def _forward(mixer: Any, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    dtype, layer = x.dtype, mixer.layer_idx
    taps = mixer.conv1d.weight.squeeze(1)
    u, z = _linear.call(mixer.in_proj, _masked(x, mask)).chunk(2, dim=-1)
    before = state = None
    if cache is not None:
        before, state = cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0)
    # The cache holds one input more than the convolution looks back to, and more still where it records the past.
    head = None if before is None else before[..., before.shape[-1] - taps.shape[1] + 1 :]
    convolved = ops.causal_conv1d(u, taps, mixer.conv1d.bias, "silu", initial_state=head, layout="bld")
    assert isinstance(convolved, Tensor)
    if cache is not None:
        cache.update_conv_state(u.transpose(1, 2), layer, conv_kernel_size=taps.shape[1])
    norms = [getattr(mixer, name) for name in _NORMS] if hasattr(mixer, "rms_eps") else None
    y = project_and_scan(
        mixer, _masked(convolved, mask), z, norms=norms, initial_state=state, return_last_state=cache is not None
    )
    if cache is not None:
        y, state = y
        cache.update_recurrent_state(state, layer)
    return _linear.call(mixer.out_proj, y.to(dtype))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Padding is zero before the convolution and after it."""
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)


HANDLER = Handler("transformers Mamba mixer", _claims, _refuses, _mixin)
