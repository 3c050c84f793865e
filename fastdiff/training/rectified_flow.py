"""Rectified flow: Liu, Gong & Liu, "Flow Straight and Fast", 2022 (arXiv:2209.03003)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.samplers import sample, schedules

__all__ = ["RectifiedFlowModel"]


class RectifiedFlowModel(nn.Module):
    """A network read as the velocity of a flow from noise x_0 (t = 0) to data x_1 (t = 1).

    Args:
        backbone: ``backbone(x, t, cond) -> velocity`` of x's shape, with t [B] in [0, 1]. A DiT for flow time wants
            ``time_scale=1000`` and ``learn_sigma=False``.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def get_velocity(self, x_t: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        """Predicted velocity, in x_t's shape.

        Args:
            x_t: [B,...].
            t: flow time in [0, 1], a number or [B].
            condition: whatever the backbone takes, e.g. labels [B]; None for the unconditional velocity.

        Raises:
            ValueError: t is neither a number nor [B], or the backbone's output has another shape than x_t.
        """
        velocity: Tensor = self.backbone(x_t, _per_sample(t, x_t), condition)
        if velocity.shape != x_t.shape:
            raise ValueError(
                f"[RectifiedFlowModel] backbone: expected an output of x_t's shape {list(x_t.shape)}, got "
                f"{list(velocity.shape)} (a DiT needs learn_sigma=False)"
            )
        return velocity

    def forward(self, x_t: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        """The same as :meth:`get_velocity`, so that hooks and wrappers see the call."""
        return self.get_velocity(x_t, t, condition)

    def forward_flow(self, x_0: Tensor, x_1: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The straight path between a pair and its velocity (eq. 1): x_t = t x_1 + (1 - t) x_0 and x_1 - x_0.

        Args:
            x_0: [B,...], noise.
            x_1: [B,...], data.
            t: flow time in [0, 1], a number or [B].

        Returns:
            (x_t [B,...], velocity [B,...]); the velocity is the regression target at x_t.

        Raises:
            ValueError: x_0 and x_1 differ in shape, or t is neither a number nor [B].
        """
        if x_0.shape != x_1.shape:
            raise ValueError(f"[forward_flow] x_1: expected x_0's shape {list(x_0.shape)}, got {list(x_1.shape)}")
        t = _per_sample(t, x_0)
        return ops.linear_update((t, 1 - t), (x_1, x_0)), x_1 - x_0

    def sample(
        self,
        x_0: Tensor,
        num_steps: int = 1,
        condition: Tensor | None = None,
        *,
        guidance_scale: float = 1.0,
        solver: str = "euler",
    ) -> Tensor:
        """Carries noise to data; in evaluation mode, whatever the mode of the model is, and without gradients.

        It is ``fastdiff.samplers.sample`` on ``schedules.flow()``, which has more options.

        Args:
            x_0: [B,...], noise.
            num_steps: steps, at least 1; an evaluation each for Euler.
            condition: labels [B] or what the backbone takes.
            guidance_scale: classifier-free guidance; 1 is none, and costs half of any other value.
            solver: any of ``fastdiff.samplers.SOLVERS``.

        Returns:
            [B,...], samples.
        """
        return sample(
            self, x_0, solver=solver, schedule=schedules.flow(), steps=num_steps, prediction="flow", cond=condition,
            guidance_scale=guidance_scale,
        )  # fmt: skip


def _per_sample(t: Tensor | float, x: Tensor) -> Tensor:
    """Flow time as [B], in float32 at least (bfloat16 has only 256 times between 1/2 and 1)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    t = torch.as_tensor(t, device=x.device, dtype=dtype)
    if t.dim() == 0:
        t = t.expand(len(x))
    if t.shape != x.shape[:1]:
        raise ValueError(f"[RectifiedFlowModel] t: expected a number or shape [{len(x)}], got {list(t.shape)}")
    return t
