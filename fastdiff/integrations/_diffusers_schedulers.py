"""Schedulers of diffusers, in place: DDIM, Euler, flow matching and DPM-Solver; same numbers, state and results.

A step finds its coefficients by the number of the step, on the host, and is one kernel for the next state and one for
what else the original hands out or keeps (the predicted data, the history of a multistep solver). Nothing is read from
the device but once for every schedule. All that is not served here (dynamic thresholding, learned variances, float64,
tensors that broadcast, per-token timesteps, tracing by `torch.compile`) is the original's step.

The predicted data is computed at once and not when it is asked for: by then a caller may have written over the state.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fastdiff.integrations import _diffusers_dpm
from fastdiff.integrations import _scheduler_base as base
from fastdiff.integrations import _scheduler_coefficients as rows
from fastdiff.integrations._swap import Handler

__all__ = ["HANDLERS"]


def _is_level(timestep: Any) -> bool:
    """A timestep as Euler schedulers take it; whole numbers they refuse."""
    return type(timestep) is float or (isinstance(timestep, torch.Tensor) and timestep.is_floating_point())


# -------------------------------------------------------------------------------------------------------------- DDIM

_DDIM = (
    "model_output", "timestep", "sample", "eta", "use_clipped_model_output", "generator", "variance_noise",
    "return_dict",
)  # fmt: skip
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


class _Ddim(base.FastScheduler):
    timesteps: torch.Tensor
    num_inference_steps: int | None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        found = self._fast_step(
            model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise
        )
        if found is None:
            slow: Any = super()
            return slow.step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        return base.library().ddim(prev_sample=found[0], pred_original_sample=found[1]) if return_dict else found

    def _fast_step(
        self, output: Any, timestep: Any, sample: Any, eta: Any, reclip: bool, generator: Any, noise: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        traced, fast = base.entry(sample)
        if traced:
            return None
        config, levels = self.config, self._levels(timestep)
        prediction = _PREDICTIONS.get(config.prediction_type)
        if levels is None or prediction is None or config.thresholding or type(eta) not in (float, int):
            return None
        level, after = levels
        # Elsewhere the original divides by zero or takes the root of a negative number.
        if not (0 < after <= 1 and (level > 0 or prediction == "v") and 0 <= level < 1 and level <= after):
            return None
        if not 0 <= eta <= 1 or (eta > 0 and generator is not None and noise is not None):
            return None
        x = base.wide_enough(sample, output)
        clip = float(config.clip_sample_range) if config.clip_sample else None
        data: torch.Tensor | None = output
        if prediction != "sample" or clip is not None:
            data = base.ddim(fast, [x, output], level, 1.0, prediction, 0.0, clip)
            if data is None:
                return None
        terms = [x, output]
        if reclip and clip is not None:  # the noise that the clamped data implies
            terms, prediction, clip = [x, data], "sample", None
        if eta > 0:
            if noise is None:
                if not base.served(terms):
                    return None
                noise = base.library().randn(
                    output.shape, generator=generator, device=output.device, dtype=output.dtype
                )
            terms.append(noise)
        before = base.ddim(fast, terms, level, after, prediction, float(eta), clip)
        return None if before is None or data is None else (before, data)

    def _levels(self, timestep: Any) -> tuple[float, float] | None:
        """Powers of the signal at a timestep and at the one before, or None where that is not simply two numbers."""
        if isinstance(timestep, torch.Tensor) and timestep.dim() == 0:
            numbers = None if timestep.is_cpu else self._numbers("timesteps")
            timestep = base.element(timestep, self.timesteps, numbers)
        if type(timestep) is not int or not self.num_inference_steps:
            return None
        known = self._numbers("alphas_cumprod")
        before = timestep - self.config.num_train_timesteps // self.num_inference_steps
        if known is None or not 0 <= timestep < len(known):
            return None
        after = known[before] if before >= 0 else self._numbers("final_alpha_cumprod")
        return None if after is None else (known[timestep], after)


# ------------------------------------------------------------------------------------------------------------- Euler

_EULER = (
    "model_output", "timestep", "sample", "s_churn", "s_tmin", "s_tmax", "s_noise", "generator", "return_dict",
)  # fmt: skip


@functools.lru_cache(maxsize=8192)
def _input_scale(sigma: float) -> float:
    """sqrt(sigma^2 + 1) as the original rounds it: models see the same bits."""
    return float((torch.tensor(sigma, dtype=torch.float32, device="cpu") ** 2 + 1) ** 0.5)


class _Euler(base.IndexedScheduler):
    is_scale_input_called: bool

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        place = None if torch.compiler.is_compiling() else self._place(timestep)
        if place is None:
            slow: Any = super()
            return slow.scale_model_input(sample, timestep)
        self.is_scale_input_called = True
        return sample / _input_scale(place[1][place[0]])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        found = self._fast_step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator)
        if found is None:
            slow: Any = super()
            return slow.step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)
        return base.library().euler(prev_sample=found[0], pred_original_sample=found[1]) if return_dict else found

    def _fast_step(
        self, output: Any, timestep: Any, sample: Any, churn: Any, low: Any, high: Any, scale: Any, generator: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        traced, fast = base.entry(sample)
        if traced or not _is_level(timestep) or not self.is_scale_input_called:
            return None
        place = self._place(timestep)
        if place is None or type(churn) not in (float, int) or not churn >= 0:
            return None
        index, sigmas = place
        sigma, after, gamma = sigmas[index], sigmas[index + 1], 0.0
        if churn > 0 and low <= self.sigmas[index] <= high:
            gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1)
        hat, prediction = sigma * (gamma + 1), self.config.prediction_type
        data_row = rows.euler_data(prediction, sigma, hat)
        row = rows.euler_move(prediction, sigma, hat, after)
        if data_row is None or row is None:
            return None
        x = sample if sample.dtype is torch.float32 else sample.to(torch.float32)
        if gamma > 0:
            if not base.served([x, output]):
                return None
            noise = base.library().randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
            spread = float(scale) * (hat**2 - sigma**2) ** 0.5
            x = base.linear(fast, [1.0, spread], [x, noise])
            assert x is not None
        data = output if prediction in ("sample", "original_sample") else base.linear(fast, data_row, [x, output])
        before = None if data is None else base.linear(fast, row, [output, x])
        if before is None or data is None:
            return None
        self._step_index = index + 1
        return before, data


# ----------------------------------------------------------------------------------------------------- flow matching

_FLOW = (
    "model_output", "timestep", "sample", "s_churn", "s_tmin", "s_tmax", "s_noise", "generator", "per_token_timesteps",
    "return_dict",
)  # fmt: skip


class _Flow(base.IndexedScheduler):
    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        found = None
        if per_token_timesteps is None and _is_level(timestep):
            found = self._fast_step(model_output, timestep, sample, generator)
        if found is None:
            slow: Any = super()
            return slow.step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, per_token_timesteps,
                return_dict,
            )  # fmt: skip
        return base.library().flow(prev_sample=found) if return_dict else (found,)

    def _fast_step(self, output: Any, timestep: Any, sample: Any, generator: Any) -> torch.Tensor | None:
        traced, fast = base.entry(sample)
        place = None if traced else self._place(timestep)
        if place is None:
            return None
        index, sigmas = place
        sigma, after = sigmas[index], sigmas[index + 1]
        if not math.isfinite(after - sigma):
            return None
        if self.config.stochastic_sampling:
            if not base.served([output, sample]):
                return None
            noise = base.library().randn(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            found = base.linear(fast, [(after - 1) * sigma, 1 - after, after], [output, sample, noise])
        else:
            found = base.linear(fast, [after - sigma, 1.0], [output, sample])
        if found is not None:
            self._step_index = index + 1
        return found


# ---------------------------------------------------------------------------------------------------------- handlers


def _is_ddim(part: Any) -> bool:
    return base.is_scheduler(part, "DDIMScheduler", "_get_variance")


def _refuses_ddim(part: Any) -> str | None:
    return base.why_not(part, "DDIMScheduler", _Ddim, *_DDIM)


def _ddim(kind: type) -> type:
    return base.with_schedule(_Ddim, kind)


def _is_euler(part: Any) -> bool:
    return base.is_scheduler(part, "EulerDiscreteScheduler", "scale_model_input")


def _refuses_euler(part: Any) -> str | None:
    return base.why_not(part, "EulerDiscreteScheduler", _Euler, *_EULER)


def _euler(kind: type) -> type:
    return base.with_schedule(_Euler, kind)


def _is_flow(part: Any) -> bool:
    return base.is_scheduler(part, "FlowMatchEulerDiscreteScheduler")


def _refuses_flow(part: Any) -> str | None:
    return base.why_not(part, "FlowMatchEulerDiscreteScheduler", _Flow, *_FLOW)


def _flow(kind: type) -> type:
    return base.with_schedule(_Flow, kind)


HANDLERS = [
    Handler("diffusers DDIM scheduler", _is_ddim, _refuses_ddim, _ddim),
    Handler("diffusers Euler scheduler", _is_euler, _refuses_euler, _euler),
    Handler("diffusers flow-matching scheduler", _is_flow, _refuses_flow, _flow),
    _diffusers_dpm.HANDLER,
]
