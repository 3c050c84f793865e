"""diffusers' blocks over image and text tokens (Stable Diffusion 3, Flux): gate, residual and norm are one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations._sites import gate, gate_modulate, unwatched
from fastdiff.integrations._swap import Handler, OfClass, Takes
from fastdiff.ops import _linear

__all__ = ["HANDLERS"]


def _joint(original: Any) -> type:
    class Fast:
        def forward(
            self: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            temb: Tensor,
            joint_attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[Tensor | None, Tensor]:
            x, context, how = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
            if self._chunk_size is not None:
                return original.forward(self, x, context, temb, how)  # type: ignore[no-any-return]
            h, *mods = self.norm1(x, emb=temb)
            if self.context_pre_only:
                hc, mods_c = self.norm1_context(context, temb), None
            else:
                hc, *mods_c = self.norm1_context(context, emb=temb)
            branch, branch_c = self.attn(hidden_states=h, encoder_hidden_states=hc, **how)
            gate_1, shift_2, scale_2, gate_2 = mods[:4]
            if self.use_dual_attention:
                h2, gate_dual = mods[4:]
                x = gate(x, branch, gate_1)
                branch, gate_1 = self.attn2(hidden_states=h2, **how), gate_dual
            x, h = gate_modulate(self.norm2, x, branch, gate_1, shift_2, scale_2)
            x = gate(x, self.ff(h), gate_2)
            if mods_c is None:
                return None, x
            context, h = gate_modulate(self.norm2_context, context, branch_c, *mods_c[:3])
            return gate(context, self.ff_context(h), mods_c[3]), x

    return Fast


def _flux(original: Any) -> type:
    class Fast:
        def forward(
            self: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            temb: Tensor,
            image_rotary_emb: Any = None,
            joint_attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[Tensor, Tensor]:
            x, context = hidden_states, encoder_hidden_states
            h, *mods = self.norm1(x, emb=temb)
            hc, *mods_c = self.norm1_context(context, emb=temb)
            branch, branch_c, *adapter = self.attn(
                hidden_states=h,
                encoder_hidden_states=hc,
                image_rotary_emb=image_rotary_emb,
                **(joint_attention_kwargs or {}),
            )
            x, h = gate_modulate(self.norm2, x, branch, *mods[:3])
            x = gate(x, self.ff(h), mods[3])
            if adapter:
                x = x + adapter[0]
            context, h = gate_modulate(self.norm2_context, context, branch_c, *mods_c[:3])
            return _finite(gate(context, self.ff_context(h), mods_c[3])), x

    return Fast


def _flux_single(original: Any) -> type:
    class Fast:
        def forward(
            self: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            temb: Tensor,
            image_rotary_emb: Any = None,
            joint_attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[Tensor, Tensor]:
            n = encoder_hidden_states.shape[1]
            x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            h, gate_ = self.norm(x, emb=temb)
            if unwatched(self.act_mlp):
                mlp = _linear.call(self.proj_mlp, h, gelu=True)
            else:
                mlp = self.act_mlp(self.proj_mlp(h))
            branch = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
            x = _finite(gate(x, _linear.call(self.proj_out, torch.cat([branch, mlp], dim=2)), gate_))
            return x[:, :n], x[:, n:]

    return Fast


def _finite(x: Tensor) -> Tensor:
    """Half precision ends at 65504."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _tanh(obj: Any) -> str | None:
    act = obj.act_mlp
    if type(act) is nn.GELU and act.approximate == "tanh":
        return None
    return f"expected act_mlp to be the tanh form of GELU, got {act}"


_FLUX = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs")
_SD3 = ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs")
HANDLERS = [
    Handler("diffusers SD3 block", OfClass("diffusers", "JointTransformerBlock"), Takes(_SD3), _joint),
    Handler("diffusers Flux block", OfClass("diffusers", "FluxTransformerBlock"), Takes(_FLUX), _flux),
    Handler(
        "diffusers Flux block", OfClass("diffusers", "FluxSingleTransformerBlock"), Takes(_FLUX, besides=_tanh),
        _flux_single,
    ),
]  # fmt: skip
