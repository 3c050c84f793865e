"""Mamba: Gu & Dao, "Linear-Time Sequence Modeling with Selective State Spaces", 2023 (arXiv:2312.00752), sec. 3.4.

A block widens its input to E = expand * D channels and a gate z, filters it with a short causal convolution, and scans:

    u, z = in_proj(x);  u = silu(conv1d(u));  dt, B, C = x_proj(u);  delta = softplus(dt_proj(dt))
    y = out_proj(selective_scan(u, delta, -exp(A_log), B, C, D) * silu(z))

Everything stays channel-last, as a linear layer leaves it. Parameters carry the names of mamba_ssm and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models._layers import require
from fastdiff.ops import _linear

__all__ = ["MambaBlock", "MambaLM", "MambaState", "mamba_lm", "project_and_scan"]


class MambaState(NamedTuple):
    """What a block knows of the past: the last inputs of the convolution [B, E, d_conv - 1], the scan's [B, E, N]."""

    conv: Tensor
    scan: Tensor


class MambaBlock(nn.Module):
    """Tokens [B,L,D] to tokens [B,L,D]: Mamba's mixer, without norm and residual.

    Args:
        d_model: width D.
        d_state: states N of each channel.
        d_conv: taps of the causal convolution.
        expand: E = expand * D channels inside.
        dt_rank: rank of the projection to step sizes; ``"auto"`` is D / 16, rounded up.
        dt_min: smallest step size at initialisation.
        dt_max: largest; step sizes are drawn log-uniformly between the two.
        dt_init: ``"random"`` or ``"constant"`` weights of ``dt_proj``.
        dt_scale: multiplies these.
        dt_init_floor: step sizes at initialisation are at least this.
        conv_bias: the convolution has a bias.
        bias: ``in_proj`` and ``out_proj`` have biases.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("dt_rank", rank)):
            ok = isinstance(value, int) and value >= 1
            require(ok, "MambaBlock", name, "an integer of at least 1", value)
        require(int(expand * d_model) >= 1, "MambaBlock", "expand", "at least 1 / d_model", expand)
        require(0 < dt_min <= dt_max, "MambaBlock", "dt_min, dt_max", "0 < dt_min <= dt_max", (dt_min, dt_max))
        require(dt_init in ("random", "constant"), "MambaBlock", "dt_init", "'random' or 'constant'", repr(dt_init))
        assert isinstance(rank, int)
        inner = int(expand * d_model)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        with torch.no_grad():
            bound = dt_scale * rank**-0.5
            self.dt_proj.weight.uniform_(-bound, bound) if dt_init == "random" else self.dt_proj.weight.fill_(bound)
            self.dt_proj.bias.copy_(initial_step_bias(inner, dt_min, dt_max, dt_init_floor))

    def forward(
        self,
        x: Tensor,
        *,
        order: Tensor | None = None,
        reverse: bool = False,
        state: MambaState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Mixes tokens along a path; output i depends on the tokens that the path visits before i, and on i.

        Convolution and scan both follow the path: tokens are gathered into its order and outputs scattered back, which
        moves D numbers a token twice (the convolution alone would need twice E).

        Args:
            x: [B,L,D].
            order: [L] int64, a permutation: step i visits position ``order[i]``; None for 0, 1, 2, ...
            reverse: walk the path from its end.
            state: of an earlier call, whose sequence this one continues; None for a new one.
            return_state: also return the state after the last step.

        Returns:
            [B,L,D]; with `return_state` also a `MambaState`. A sequence cut in pieces, of one token or more, gives what
            the whole gives.

        Raises:
            ValueError: a shape does not fit.
        """
        width = self.in_proj.in_features
        require(x.dim() == 3 and x.shape[-1] == width, "MambaBlock", "x", f"shape [B,L,{width}]", list(x.shape))
        path = order
        if reverse:
            path = torch.arange(x.shape[1], device=x.device) if order is None else order
            path = path.flip(0)
        if path is not None:
            require(path.shape == x.shape[1:2], "MambaBlock", "order", f"shape [{x.shape[1]}]", list(path.shape))
            x = x.index_select(1, path)
        u, z = _linear.call(self.in_proj, x).chunk(2, dim=-1)
        before = (None, None) if state is None else state
        convolved: Any = ops.causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            "silu",
            initial_state=before[0],
            layout="bld",
            return_final_state=return_state,
        )
        conv: Any
        last: Any
        u, conv = convolved if return_state else (convolved, None)
        y = project_and_scan(self, u, z, initial_state=before[1], return_last_state=return_state)
        y, last = y if return_state else (y, None)
        y = _linear.call(self.out_proj, y)
        y = y if path is None else y.index_select(1, path.argsort())
        return (y, MambaState(conv, last)) if return_state else y


def project_and_scan(
    mixer: Any,
    u: Tensor,
    z: Tensor | None,
    *,
    norms: Sequence[Any] | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Any:
    """From the convolved input to the gated output of the scan.

    Args:
        mixer: a module with ``x_proj``, ``dt_proj``, ``A_log`` and ``D``: ours, mamba_ssm's or transformers'.
        u: [B,L,E].
        z: [B,L,E], the gate.
        norms: of dt, B and C, as FalconMamba has them.
        initial_state: [B,E,N].
        return_last_state: also return the state after the last step.

    Returns:
        [B,L,E], dtype of u; with `return_last_state` also [B,E,N].
    """
    rank, states = mixer.dt_proj.weight.shape[1], mixer.A_log.shape[1]
    parts = _linear.call(mixer.x_proj, u).split([rank, states, states], dim=-1)
    dt, B, C = parts if norms is None else (norm(part) for norm, part in zip(norms, parts, strict=True))
    # The bias enters with softplus inside the scan, in float32.
    if torch.is_autocast_enabled(u.device.type):
        delta = torch.nn.functional.linear(dt, mixer.dt_proj.weight)
    else:
        delta = _linear.linear(dt, mixer.dt_proj.weight, None)
    return ops.selective_scan(
        u,
        delta,
        -torch.exp(_wide(mixer.A_log)),
        B,
        C,
        _wide(mixer.D),
        z,
        None if mixer.dt_proj.bias is None else _wide(mixer.dt_proj.bias),
        True,
        return_last_state,
        initial_state=initial_state,
        layout="bld",
    )


def initial_step_bias(channels: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """[channels], such that softplus of it is log-uniform in [dt_min, dt_max] and at least `floor` (sec. 3.6)."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.empty(channels).uniform_(low, high).exp().clamp(min=floor)
    return dt + (-(-dt).expm1()).log()  # the inverse of softplus


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


class _Norm(nn.Module):
    """The weight of an RMS norm; `MambaLM.forward` applies it together with the residual before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class _Layer(nn.Module):
    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__()
        self.norm, self.mixer = _Norm(d_model), MambaBlock(d_model, **options)


class MambaLM(nn.Module):
    """Mamba as a language model: embeddings, layers ``x + mixer(RMSNorm(x))``, a norm, logits by the embeddings.

    Loads what transformers' MambaModel and MambaForCausalLM and mamba_ssm's MambaLMHeadModel save.

    Args:
        vocab_size: rows of the embedding.
        d_model: width D.
        n_layer: layers.
        norm_eps: added to the mean square.
        **options: of `MambaBlock`.
    """

    def __init__(self, vocab_size: int, d_model: int, n_layer: int, *, norm_eps: float = 1e-5, **options: Any) -> None:
        super().__init__()
        self.config = {"vocab_size": vocab_size, "d_model": d_model, "n_layer": n_layer, "norm_eps": norm_eps}
        self.config |= options
        for name in ("vocab_size", "d_model", "n_layer"):
            require(self.config[name] >= 1, "MambaLM", name, "at least 1", self.config[name])
        self.embeddings = nn.Embedding(vocab_size, d_model)
        self.layers: Sequence[_Layer] = nn.ModuleList(  # type: ignore[assignment]
            _Layer(d_model, **options) for _ in range(n_layer)
        )
        self.norm_f = _Norm(d_model)
        self._register_load_state_dict_pre_hook(_use_our_names)

    def forward(self, tokens: Tensor, *, state: Sequence[MambaState] | None = None, return_state: bool = False) -> Any:
        """Logits of the next token at every position.

        Args:
            tokens: [B,L] int64.
            state: of an earlier call, whose text this one continues.
            return_state: also return the states of all layers.

        Returns:
            [B,L,vocab_size], at least float32; with `return_state` also a list of `MambaState`.
        """
        h, states = self.hidden(tokens, state=state)
        logits = _linear.linear(h, self.embeddings.weight, None)
        logits = _wide(logits)
        return (logits, states) if return_state else logits

    def hidden(self, tokens: Tensor, *, state: Sequence[MambaState] | None = None) -> tuple[Tensor, list[MambaState]]:
        """What the logits are made from, [B,L,D], and the states of all layers."""
        require(tokens.dim() == 2, "MambaLM", "tokens", "shape [B,L]", list(tokens.shape))
        if state is not None:
            require(len(state) == len(self.layers), "MambaLM", "state", f"{len(self.layers)} of them", len(state))
        dtype, eps = self.embeddings.weight.dtype, self.config["norm_eps"]
        x = _wide(self.embeddings(tokens))
        # An RMS norm with weights is a modulation with shift 0 and scale w - 1; the residual before it has gate 1.
        scales = [_wide(norm.weight) - 1 for norm in (*(layer.norm for layer in self.layers), self.norm_f)]
        zero, one = torch.zeros_like(scales[0]), torch.ones_like(scales[0])
        h = ops.adaln_modulate(x, zero, scales[0], norm="rms", eps=eps)
        states = []
        for i, layer in enumerate(self.layers):
            before = None if state is None else state[i]
            y, after = layer.mixer(h.to(dtype), state=before, return_state=True)
            states.append(after)
            x, h = ops.gate_residual_adaln(x, y, one, zero, scales[i + 1], norm="rms", eps=eps)
        return h.to(dtype), states

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by our names, from the models named above; `load_state_dict` renames by itself."""
        renamed = dict(state)
        _use_our_names(renamed, "")
        return renamed


def mamba_lm(state_dict: Mapping[str, Tensor], *, norm_eps: float = 1e-5) -> MambaLM:
    """The model whose weights these are: sizes are read from the shapes.

    Args:
        state_dict: of transformers' MambaModel or MambaForCausalLM or mamba_ssm's MambaLMHeadModel.
        norm_eps: is not saved with the weights.

    Raises:
        ValueError: these are not the weights of a Mamba.
        RuntimeError: weights are missing or left over; the message names them.
    """
    found = dict(state_dict)
    _use_our_names(found, "")
    first = "layers.0.mixer."
    needed = [
        "embeddings.weight",
        *(f"{first}{n}" for n in ("in_proj.weight", "conv1d.weight", "A_log", "dt_proj.weight")),
    ]
    missing = [name for name in needed if name not in found]
    require(not missing, "mamba_lm", "state_dict", f"weights of a Mamba, with {', '.join(missing)}", list(found)[:8])
    layers = {name.split(".")[1] for name in found if name.startswith("layers.")}
    (vocabulary, width), (inner, states) = found["embeddings.weight"].shape, found[f"{first}A_log"].shape
    with torch.device(found["embeddings.weight"].device):
        model = MambaLM(
            vocabulary,
            width,
            len(layers),
            norm_eps=norm_eps,
            d_state=states,
            d_conv=found[f"{first}conv1d.weight"].shape[-1],
            expand=inner / width,
            dt_rank=found[f"{first}dt_proj.weight"].shape[1],
            conv_bias=f"{first}conv1d.bias" in found,
            bias=f"{first}in_proj.bias" in found,
        ).to(found[f"{first}in_proj.weight"].dtype)
    model.load_state_dict(found)
    return model


def _use_our_names(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Renames, in place, what comes from a model with a ``backbone`` or (mamba_ssm) one ``embedding``."""
    for name in [n for n in state_dict if n.startswith(prefix)]:
        ours = name[len(prefix) :].removeprefix("backbone.")
        ours = "embeddings." + ours.removeprefix("embedding.") if ours.startswith("embedding.") else ours
        state_dict[prefix + ours] = state_dict.pop(name)
    head, embeddings = state_dict.pop(f"{prefix}lm_head.weight", None), state_dict.get(f"{prefix}embeddings.weight")
    if head is not None and embeddings is not None and not torch.equal(head, embeddings):
        require(False, "MambaLM", "lm_head.weight", "the embeddings (tied weights)", "another matrix")
