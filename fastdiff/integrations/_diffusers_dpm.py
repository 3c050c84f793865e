"""The DPM-Solver scheduler of diffusers, in place; see `_diffusers_schedulers`.

A step is one kernel for what the solver extrapolates, which its history keeps, and one for the next state.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.integrations import _scheduler_base as base
from fastdiff.integrations import _scheduler_coefficients as rows
from fastdiff.integrations._swap import Handler

__all__ = ["HANDLER"]

_DPM = ("model_output", "timestep", "sample", "generator", "variance_noise", "return_dict")
_DPM_PARTS = (
    "convert_model_output", "dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update",
    "multistep_dpm_solver_third_order_update", "_sigma_to_alpha_sigma_t",
)  # fmt: skip


class _Dpm(base.IndexedScheduler):
    num_inference_steps: int | None
    model_outputs: list[torch.Tensor | None]
    lower_order_nums: int

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        found = None
        if self.num_inference_steps is not None:
            found = self._fast_step(model_output, timestep, sample, generator, variance_noise)
        if found is None:
            slow: Any = super()
            return slow.step(model_output, timestep, sample, generator, variance_noise, return_dict)
        return base.library().dpm(prev_sample=found) if return_dict else (found,)

    def _fast_step(self, output: Any, timestep: Any, sample: Any, generator: Any, noise: Any) -> torch.Tensor | None:
        traced, fast = base.entry(sample)
        place, config = None if traced else self._place(timestep), self.config
        if place is None or config.thresholding or config.variance_type is not None:
            return None
        index, sigmas = place
        algorithm, flow = config.algorithm_type, bool(config.use_flow_sigmas)
        target = output
        if config.prediction_type != ("sample" if algorithm in ("dpmsolver++", "sde-dpmsolver++") else "epsilon"):
            row = rows.solver_target(algorithm, config.prediction_type, flow, sigmas[index])
            target = None if row is None else base.linear(fast, row, [base.wide_enough(sample, output), output])
            if target is None:
                return None
        order, past = self._order(index), self.model_outputs
        levels = [sigmas[index - i] for i in range(order)]
        row = rows.solver_step(algorithm, config.solver_type, flow, order, sigmas[index + 1], *levels)
        if row is None or len(past) != config.solver_order:
            return None
        terms = [target, sample, *past[:-order:-1]]  # the newest target of the past comes last
        if algorithm in ("sde-dpmsolver", "sde-dpmsolver++"):
            if not base.served(terms):
                return None
            if noise is None:
                noise = base.library().randn(
                    target.shape, generator=generator, device=target.device, dtype=torch.float32
                )
            terms.append(noise.to(device=target.device, dtype=torch.float32))
        elif any(t is None for t in terms):
            return None
        found = base.linear(fast, row, terms)
        if found is None:
            return None
        past[:] = [*past[1:], target]
        self.lower_order_nums += self.lower_order_nums < config.solver_order
        self._step_index = index + 1
        return found

    def _order(self, index: int) -> int:
        """Of this step: what the history allows, less at the end of a short schedule."""
        config, steps = self.config, len(self.timesteps)
        short = config.lower_order_final and steps < 15
        last = index == steps - 1 and (config.euler_at_final or short or config.final_sigmas_type == "zero")
        if config.solver_order == 1 or self.lower_order_nums < 1 or last:
            return 1
        if config.solver_order == 2 or self.lower_order_nums < 2 or (index == steps - 2 and short):
            return 2
        return 3


def _is_dpm(part: Any) -> bool:
    return base.is_scheduler(part, "DPMSolverMultistepScheduler", *_DPM_PARTS)


def _refuses_dpm(part: Any) -> str | None:
    return base.why_not(part, "DPMSolverMultistepScheduler", _Dpm, *_DPM)


def _dpm(kind: type) -> type:
    return base.with_schedule(_Dpm, kind)


HANDLER = Handler("diffusers DPM-Solver scheduler", _is_dpm, _refuses_dpm, _dpm)
