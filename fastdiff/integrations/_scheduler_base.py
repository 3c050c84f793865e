"""What the fast schedulers have in common: their numbers on the host, sums of tensors, and who may be replaced."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from fastdiff import ops
from fastdiff.integrations._swap import defines, original_class, takes
from fastdiff.ops import _registry as reg
from fastdiff.ops.update import PREDICTIONS

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def library() -> SimpleNamespace:
    """What the originals return, and draw their noise with."""
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor

    return SimpleNamespace(
        ddim=DDIMSchedulerOutput,
        euler=EulerDiscreteSchedulerOutput,
        flow=FlowMatchEulerDiscreteSchedulerOutput,
        dpm=SchedulerOutput,
        randn=randn_tensor,
    )


class _Read(dict[str, tuple[torch.Tensor, int, Any]]):
    """Tensors of a scheduler by name, with their version and what was in them. Copies of a scheduler begin empty."""

    def __reduce__(self) -> Any:
        return (_Read, ())


class FastScheduler:
    """Comes before a scheduler of diffusers. State and results are the original's; so is `step` wherever it returns
    None from `_fast_step`, which happens before anything is changed or drawn."""

    config: Any

    def _numbers(self, name: str) -> Any:
        """What the tensor of that name holds, read once for every tensor put there and every write into it.

        None where that is not known: writes into a tensor made in inference mode leave no trace.
        """
        tensor = self.__dict__[name]
        cache = self.__dict__.get("_fastdiff_numbers")
        if cache is None:
            cache = self.__dict__["_fastdiff_numbers"] = _Read()
        held = cache.get(name)
        if held is not None and held[0] is tensor and held[1] == tensor._version:
            return held[2]
        if type(tensor) is not torch.Tensor:
            return None
        if tensor.is_inference():
            return tensor.tolist() if tensor.is_cpu else None
        cache[name] = (tensor, tensor._version, tensor.tolist())
        return cache[name][2]


class IndexedScheduler(FastScheduler):
    """Schedulers that count their steps."""

    _step_index: int | None
    sigmas: torch.Tensor
    timesteps: torch.Tensor

    def _place(self, timestep: Any) -> tuple[int, list[float]] | None:
        """The number of this step, and all levels; None where there is no such step."""
        if self._step_index is None:
            searches: Any = self
            searches._init_step_index(timestep)
        index, sigmas = self._step_index, self._numbers("sigmas")
        if type(index) is not int or type(sigmas) is not list or not 0 <= index < len(sigmas) - 1:
            return None
        return index, sigmas


def element(view: torch.Tensor, whole: torch.Tensor, numbers: Sequence[Any] | None) -> Any:
    """The number in `view`, of one element. It is not read if it lies in `whole`, which holds `numbers`: timesteps on
    a device come from a loop over them."""
    if numbers is not None and view.device == whole.device and view.dtype is whole.dtype and whole.is_contiguous():
        offset = view.data_ptr() - whole.data_ptr()
        if 0 <= offset < whole.numel() * whole.element_size():
            return numbers[offset // whole.element_size()]
    return view.item()


# ---------------------------------------------------------------------------------------------------- sums of tensors


def linear(fast: Any, coefficients: list[float], terms: list[torch.Tensor]) -> torch.Tensor | None:
    """`ops.linear_update`, or None for what the original should see to: its type is that of the first term.

    `fast` is the answer of `entry`: what it asks holds for the whole of a step. The rest is seen to natively.
    """
    if fast is not None:
        out = torch.empty_like(terms[0])
        if fast.fast_update(torch.is_grad_enabled(), True, terms, coefficients, None, None, out):
            return out
    return ops.linear_update(coefficients, terms) if served(terms) else None


def ddim(
    fast: Any, terms: list[torch.Tensor], level: float, after: float, prediction: str, eta: float, clip: float | None
) -> torch.Tensor | None:
    """`ops.ddim_step` of terms (x, prediction), perhaps (x, prediction, noise); None as in `linear`."""
    noise = terms[2] if len(terms) == 3 else None
    if fast is not None:
        out = torch.empty_like(terms[0])
        rule = (PREDICTIONS[prediction], eta, 1.0, False, noise is not None, -1.0 if clip is None else clip)
        if fast.fast_update(torch.is_grad_enabled(), True, terms, [level, after], rule, None, out):
            return out
    if not served(terms):
        return None
    return ops.ddim_step(
        terms[0], terms[1], level, after, prediction=prediction, eta=eta, noise=noise, clip_sample=clip
    )


def entry(x: torch.Tensor) -> tuple[bool, Any]:
    """Whether a step is being traced, which we leave to the original; and the extension, where it can be called."""
    fast = reg.fast(x)
    return fast is None and torch.compiler.is_compiling(), fast


def served(terms: Sequence[Any]) -> bool:
    """Plain tensors of one shape, on one CPU or GPU, of types that the kernels have."""
    first = terms[0]
    return all(
        type(t) in _PLAIN
        and t.dtype in _DTYPES
        and (t.is_cpu or t.is_cuda)
        and t.shape == first.shape
        and t.device == first.device
        for t in terms
    )


def wide_enough(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x, in the type that a sum of both has (of the types that `served` knows)."""
    return x.float() if x.dtype in _DTYPES[1:] and x.dtype is not other.dtype else x


# ------------------------------------------------------------------------------------------------- who may be replaced


def with_schedule(mixin: type, kind: type) -> type:
    """`mixin`, whose schedules are ordinary tensors in inference mode too: writes into them are seen (`_numbers`)."""
    original: Any = vars(kind).get("set_timesteps") or cast(Any, kind).set_timesteps

    @functools.wraps(original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return original(self, *args, **kwargs)

    return type(mixin.__name__, (mixin,), {"set_timesteps": set_timesteps})


def is_scheduler(part: Any, name: str, *methods: str) -> bool:
    """A scheduler of diffusers of that name, or one derived from it that keeps its `step` and these methods."""
    return all(defines(part, "diffusers", name, method) for method in ("step", *methods))


def why_not(part: Any, name: str, mixin: type, *parameters: str) -> str | None:
    """Why a scheduler must stay as it is, or None.

    Args:
        part: the scheduler.
        name: of the class of diffusers that defines its `step`.
        mixin: what would come before it.
        parameters: of `step`, as we know it.
    """
    if "step" in vars(part):
        return "its step was replaced by somebody else's"
    if part.config.get("thresholding"):
        return "dynamic thresholding needs a quantile of every image"
    if part.config.get("variance_type") in ("learned", "learned_range"):
        return f"variance_type={part.config['variance_type']!r}: outputs with a variance are taken apart"
    kind = next(cls for cls in original_class(part).__mro__ if cls.__name__ == name)
    return takes(cast(Any, kind).step, *parameters) or _differs(kind, mixin)


@functools.cache
def _differs(kind: type, mixin: type) -> str | None:
    """Whether a few steps with the defaults give other numbers than ours: a version that we do not know."""
    results = []
    with torch.device("cpu"), torch.no_grad():
        for cls in (kind, type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})):
            scheduler: Any = cls()
            scheduler.set_timesteps(6)
            scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
            x = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
            for t in scheduler.timesteps:
                x = scheduler.step(0.3 * scale(x, t).sin(), t, x)[0]
            results.append(x)
    off, size = (results[1] - results[0]).abs().max().item(), results[0].abs().max().item()
    if math.isfinite(off) and off <= 1e-4 * size:
        return None
    return f"an unknown version of {kind.__qualname__}: its numbers differ from ours by {off / size:.1g} of their range"
