"""Running a plan: one call of the model and one ``ops.linear_update`` for every stage.

Nothing is read back from the device, and the states live in a few buffers that are allocated before the first step.
Noise is drawn by the update itself, by counter (``ops.philox_normal``): it depends on the run's seed, not the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff._progress import progress_bar
from fastdiff.samplers._program import program
from fastdiff.samplers.adaptive import solve
from fastdiff.samplers.guidance import CFG, Guidance, _channels
from fastdiff.samplers.plan import Plan, make_plan
from fastdiff.samplers.schedules import Schedule
from fastdiff.samplers.solvers import conversion

__all__ = ["sample"]

Model = Callable[[Tensor, Tensor, Any], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], "Tensor | None"]
Generators = torch.Generator | Sequence[torch.Generator] | None


@torch.no_grad()
def sample(
    model: Model,
    noise: Tensor,
    *,
    solver: str = "dpmpp_2m",
    schedule: Schedule | None = None,
    steps: int = 20,
    plan: Plan | None = None,
    prediction: str = "epsilon",
    cond: Any = None,
    uncond: Any = None,
    guidance_scale: float = 1.0,
    guidance: Guidance | None = None,
    clip_sample: float | None = None,
    threshold: float | None = None,
    generator: Generators = None,
    seed: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Turns noise into samples.

    Args:
        model: ``model(x, t, cond) -> prediction`` with x [B, ...] and t [B], the times of the schedule in x's dtype
            (float32 at least). A module (and a weak one of guidance) is put into evaluation mode for the run. A
            prediction with twice the channels of x is cut to its first half (the rest are variances). x is a buffer of
            the run: who keeps it, clones it.
        noise: [B, ...], standard normal, any float dtype: the state is kept in it. For an inversion the data. It is
            not written to.
        solver: a name in ``SOLVERS``, or ``"adaptive"`` (see :func:`fastdiff.samplers.adaptive.solve`), which takes
            no clip_sample, threshold or callback and shows no progress.
        schedule: from ``fastdiff.samplers.schedules``.
        steps: number of steps; not used by ``"adaptive"``.
        plan: from :func:`make_plan`; replaces solver, schedule, steps and prediction, and allows no options.
        prediction: what the model predicts: ``"epsilon"``, ``"v"``, ``"sample"`` or ``"flow"``.
        cond: given to the model.
        uncond: given to the model in place of `cond` for the other prediction of guidance: None, or a negative
            condition.
        guidance_scale: ``other + guidance_scale (pred - other)``; at 1 the other prediction is not asked for.
        guidance: another form of guidance, from ``fastdiff.samplers.guidance``; not with the two before.
        clip_sample: clamp predicted data to [-clip_sample, clip_sample] at every evaluation; the noise is then the one
            that belongs to the clamped data.
        threshold: dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, §2.3): clamp predicted data to its own
            quantile of this order, e.g. 0.995, where that is above 1, and divide by it.
        generator: for solvers that draw noise: the run's seed is drawn from it, an int64 on its device. Or one for
            each sample, which makes a sample independent of its batch: it then draws what it would alone. None:
            torch's default generator of the device of `noise`.
        seed: the run's seed itself, in [-2^63, 2^63), in place of a generator. The noise of stage i (one for every
            evaluation of the model, from 0) is ``philox_normal(noise.shape, (seed, i))``, in float32, the same on every
            device: sample b's depends on its place b, so the first samples of a larger batch are those of a smaller.
        callback: ``callback(i, t, x, pred)`` after step i (from 0), with t the time reached, x the new state and
            pred the last prediction (the conditional one under plain guidance). What it returns replaces x, if not
            None.
        progress: show a bar.
        **options: of :func:`make_plan`.

    Returns:
        [B, ...], the last state, in noise's dtype.

    Raises:
        ValueError: an argument is out of range, two exclude each other, or the model's output has another shape or is
            in memory that another output still needs.
        TypeError: the solver has no such option, or options beside a plan.
    """
    _check(noise, guidance, guidance_scale, uncond, clip_sample, threshold)
    if seed is not None:
        if generator is not None:
            raise ValueError("[sample] seed: expected None beside generator, got both")
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"[sample] seed: expected an integer in [-2^63, 2^63), got {seed!r}")
    if plan is not None and options:
        raise TypeError(f"[sample] options: expected none beside a plan, which has its own, got {', '.join(options)}")
    if plan is None:
        if schedule is None:
            raise ValueError("[sample] schedule: expected a schedule, or a plan, got None")
        if solver == "adaptive":
            for name, value in (("clip_sample", clip_sample), ("threshold", threshold), ("callback", callback)):
                if value is not None:
                    raise ValueError(f"[sample] {name}: expected None with solver='adaptive', got {value!r}")
            return _sample_adaptively(
                model, noise, schedule, prediction, cond, guidance or _plain(guidance_scale, uncond), options
            )
        plan = make_plan(solver, schedule, steps, prediction=prediction, **options)
    form = guidance or _plain(guidance_scale, uncond)
    with (
        _evaluation_mode(model, getattr(form, "weak", None)),
        progress_bar("sampling", plan.steps, enabled=progress) as report,
    ):
        return _run(model, noise, plan, cond, form, clip_sample, threshold, generator, seed, callback, report)


def _run(
    model: Model,
    noise: Tensor,
    plan: Plan,
    cond: Any,
    form: Guidance | None,
    clip_sample: float | None,
    threshold: float | None,
    generator: Generators,
    seed: int | None,
    callback: Callback | None,
    report: Callable[[int, str], object],
) -> Tensor:
    corrected = clip_sample is not None or threshold is not None
    asked = plan
    if corrected and plan.prediction != "sample":
        # The model's output becomes data, is clamped, and serves a plan for predicted data.
        if ("corrected",) not in plan.cache:
            plan.cache["corrected",] = plan.with_prediction("sample")
        plan = plan.cache["corrected",]
    stages = plan.stages  # an inversion for predicted data may start at a later time than the plan asked for
    levels: list[float] = []
    scales: tuple[float | None, ...] = (1.0,) * len(stages)
    if form is not None:
        levels = [stage.sigma / stage.alpha if stage.alpha else float("inf") for stage in stages]
        scales = tuple(form.scale(level) for level in levels)
    run = program(plan, (1.0,) * len(scales) if corrected else scales)
    fold = run.folded and not corrected
    times = time_rows(plan, noise)
    store: list[Tensor] = [noise if plan.initial_scale == 1.0 else noise * plan.initial_scale]
    store += [torch.empty_like(noise) for _ in range(run.states - 1)]
    store += store[:1] * (run.places - run.states)  # outputs, as they come
    seeds = noise_seeds(noise, len(stages), generator, seed) if plan.stochastic else ()
    update_state = ops.linear_update
    shape = noise.shape
    ends = plan.step_times
    x = store[0]
    for i, update in enumerate(run.updates):
        x, t, scale = store[update.x], times[i], scales[i]
        if scale == 1.0:
            m = model(x, t, cond)
            if not isinstance(m, Tensor):
                _channels(m, x)
        elif scale is None:
            m = form.predict(model, x, t, cond, levels[i])  # type: ignore[union-attr]
        else:
            m, u = form.pair(model, x, t, cond)  # type: ignore[union-attr]
            m, u = _channels(m, x), _channels(u, x)
            if fold:
                store[update.u] = u.clone() if u.data_ptr() == x.data_ptr() else u
            else:
                m = update_state((scale, 1.0 - scale), (m, u))
        if m.shape != shape:
            m = _channels(m, x)
        if corrected:
            (a, b), _ = conversion(asked.prediction, stages[i].alpha, stages[i].sigma)
            m = _clamped(update_state((a, b), (x, m)), clip_sample, threshold)
        address = m.data_ptr()
        if address == x.data_ptr():
            m = m.clone()  # the model gave back its input, which is about to be overwritten
        for place in update.held:
            if store[place].data_ptr() == address and address:
                raise ValueError(
                    "[sample] model: expected a prediction in memory of its own at every call, got that of an earlier "
                    "one, which the solver still needs (clone the output of a model that reuses its buffers)"
                )
        store[update.m] = m
        terms = [store[place] for place in update.sources]
        if update.noise:
            x = update_state(update.coefficients, terms, seed=seeds[i], noise_scale=update.noise, out=store[update.out])
        else:
            x = update_state(update.coefficients, terms, out=store[update.out])
        if update.step >= 0:
            if callback is not None:
                replacement = callback(update.step, ends[update.step + 1], x, m)
                if replacement is not None and replacement is not x:
                    if replacement.shape != shape:
                        raise ValueError(
                            f"[sample] callback: expected a tensor of shape {[*shape]}, got {[*replacement.shape]}"
                        )
                    x.copy_(replacement)
            report(update.step + 1, "")
    return x


def time_rows(plan: Plan, like: Tensor) -> Sequence[Tensor]:
    """The time of every stage as [B], in at least float32; kept with the plan, so that only its first run copies."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    key = ("times", dtype, like.device, len(like))
    rows: Sequence[Tensor] | None = plan.cache.get(key)
    # A model may write into the times it is given (which counts their version up): the next run makes them anew.
    if not rows or rows[0]._version != plan.cache["version", key]:
        with torch.inference_mode(False):  # the rows also serve runs outside of inference mode
            times = plan.tables().times.to(dtype).to(like.device)
            rows = times[:, None].repeat(1, len(like)).unbind(0)
        plan.cache["version", key] = rows[0]._version
        plan.cache[key] = rows
    return rows


def _plain(scale: float, uncond: Any) -> Guidance | None:
    return None if scale == 1.0 else CFG(scale, uncond)


def _check(
    noise: Tensor,
    guidance: Guidance | None,
    scale: float,
    uncond: Any,
    clip_sample: float | None,
    threshold: float | None,
) -> None:
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.dim() < 1:
        got = f"{noise.dtype} {[*noise.shape]}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"[sample] noise: expected a floating-point tensor [B, ...], got {got}")
    if guidance is not None and (scale != 1.0 or uncond is not None):
        raise ValueError("[sample] guidance: expected None beside guidance_scale or uncond, got both")
    if clip_sample is not None and not clip_sample > 0:
        raise ValueError(f"[sample] clip_sample: expected a number above 0, got {clip_sample!r}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"[sample] threshold: expected a number in (0, 1], got {threshold!r}")


def _clamped(data: Tensor, clip: float | None, threshold: float | None) -> Tensor:
    if threshold is not None:
        flat = data.reshape(len(data), -1).to(torch.promote_types(data.dtype, torch.float32)).abs()
        bound = torch.quantile(flat, threshold, dim=1).clamp(min=1.0).to(data.dtype)
        bound = bound.reshape(-1, *[1] * (data.dim() - 1))
        data = data.clamp(-bound, bound) / bound
    return data if clip is None else data.clamp_(-clip, clip)


def noise_seeds(like: Tensor, stages: int, generator: Generators, seed: int | None) -> Sequence[Tensor]:
    """(seed, stage) of every stage's noise, int64 on the device of the state: [2], or [B, 2] for a generator each."""
    several = isinstance(generator, Sequence)
    for one in generator if several else (generator,):  # type: ignore[union-attr]
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(f"[sample] generator: expected torch.Generator, one or a sequence, got {one!r}")
    if several and len(generator) != len(like):  # type: ignore[arg-type]
        raise ValueError(f"[sample] generator: expected one, or {len(like)}, got {len(generator)}")  # type: ignore[arg-type]
    pairs = torch.empty((stages, len(like), 2) if several else (stages, 2), dtype=torch.int64, device=like.device)
    keys, offsets = pairs.unbind(-1)
    offsets.copy_(torch.arange(stages, device=like.device).view(-1, *[1] * several))
    if seed is not None:
        keys.fill_(int(seed))
    elif several:
        for b, one in enumerate(generator):  # type: ignore[arg-type]
            keys[:, b] = _drawn_seed(one, like.device)
    else:
        keys.copy_(_drawn_seed(generator, like.device))  # type: ignore[arg-type]
    return pairs.unbind(0)


def _drawn_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Any int64 [], drawn where the generator is. In a CUDA graph every replay draws another."""
    where = device if generator is None else generator.device
    return torch.empty((), dtype=torch.int64, device=where).random_(-(1 << 63), None, generator=generator).to(device)


@contextmanager
def _evaluation_mode(*models: object) -> Iterator[None]:
    """Parts of modules that train are put into evaluation mode, and these alone back."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _sample_adaptively(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    prediction: str,
    cond: Any,
    form: Guidance | None,
    options: dict[str, Any],
) -> Tensor:
    def guided(x: Tensor, t: Tensor, level: float) -> Tensor:
        scale = 1.0 if form is None else form.scale(level)
        if scale == 1.0:
            return _channels(model(x, t, cond), x)
        if scale is None:
            return form.predict(model, x, t, cond, level)  # type: ignore[union-attr]
        pred, other = (_channels(p, x) for p in form.pair(model, x, t, cond))  # type: ignore[union-attr]
        return ops.linear_update((scale, 1.0 - scale), (pred, other))

    with _evaluation_mode(model, getattr(form, "weak", None)):
        return solve(guided, noise, schedule, prediction=prediction, **options).final
