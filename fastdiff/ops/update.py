"""Sampler updates: one kernel for every explicit solver step.

Every explicit step is ``sum_i c_i t_i`` with step-constant coefficients, after classifier-free guidance
``uncond + guidance_scale * (pred - uncond)`` and with an optional clamp of the predicted data. Coefficients are
resolved in float64, once per sample and on the device that holds them, so a step is one launch and reads nothing back.

Shapes: every tensor has the shape of x, [B, ...] with any trailing dimensions; a coefficient is a float or a tensor
[B] (also [B, 1, ..., 1], [1] or []), float32 or float64 for full precision. dtypes float32, float16, bfloat16 in any
mixture; arithmetic in float32; the result has the dtype of x. Tensors laid out like x (contiguous, or dense in any
order with the batch outermost, e.g. channels-last) are read in place; others are copied into that layout first.

A whole sampling loop as one CUDA graph: with ``step=``, a counter on the device, coefficients are tables with a row for
every step, and the kernel reads the row that the counter names; a ``seed=`` (seed, offset) on the device makes fresh
noise at every replay. One counter can be both::

    seed = torch.tensor([1234, 0], device="cuda")
    step = seed[1:]                                   # the offset of the noise is the number of the step
    with torch.cuda.graph(graph):                     # tables alpha_bar, alpha_bar_next: [steps]
        ddim_step(x, model(x, times[step]), alpha_bar, alpha_bar_next, eta=1.0, seed=seed, step=step, out=x)
        step.add_(1)
    for _ in range(steps):
        graph.replay()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdiff import _native
from fastdiff.ops import _philox
from fastdiff.ops import _registry as reg

Number = float | torch.Tensor
MAX_TERMS = 8  # kMaxTerms in csrc/fastdiff.h
PREDICTIONS = {"epsilon": 0, "v": 1, "sample": 2, "flow": 3}  # enum Prediction in csrc/fastdiff.h
_CODES = _native.DTYPES
_COEFFICIENT_CODES = {torch.float32: 0, torch.float64: _native.FLOAT64_CODE}


# ------------------------------------------------------------------------------------------------- public functions


def linear_update(
    coefficients: Sequence[Number] | torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    seed: int | torch.Tensor | None = None,
    noise_scale: Number = 1.0,
    step: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum_i coefficients[i] * tensors[i] + noise_scale * noise`` in one pass, differentiable in all but the seed.

    Args:
        coefficients: one float or tensor [B] per tensor; a tensor [n, ...] stands for its n rows.
        tensors: any number n of tensors [B, ...], all of one shape. More than 8 take several passes.
        seed: draw noise here and add it, that of ``philox_normal(shape, seed)``: an integer; or int64 on the device of
            the tensors, [1] (seed), [2] (seed, offset) or, a pair per sample, [B, 2], which is read on the device.
            None: no noise.
        noise_scale: of the noise, float or tensor [B]; used only with `seed`.
        step: int64 with one element, on the device of the tensors: every coefficient that is a tensor is a table
            [steps] or [steps, B], of which this row counts, and a tensor [steps, n, ...] stands for n tables. So is
            `noise_scale`. It is read on the device; below 0 it means the first row, beyond the table the last.
        out: shape and dtype of tensors[0]; written and returned. May be one of the tensors. Not differentiable.

    Returns:
        [B, ...], dtype of tensors[0].

    Raises:
        ValueError: shapes, devices or counts do not fit, or `out` overlaps an input.
        TypeError: an argument is not a floating-point tensor or number.
    """
    op = "linear_update"
    coefficients = _sequence(op, "coefficients", coefficients, 0 if step is None else 1)
    tensors = _sequence(op, "tensors", tensors)
    if not tensors:
        reg.fail(op, "tensors", "at least one tensor", "none")
    if len(coefficients) != len(tensors):
        reg.fail(op, "coefficients", f"one per tensor, {len(tensors)}", len(coefficients))
    if len(tensors) <= MAX_TERMS:
        if seed is not None:
            coefficients.append(noise_scale)
        return _serve(op, coefficients, tensors, None, out, _linear_reference, step, seed)
    drawn = [] if seed is None else [noise_scale]
    checked = _check(op, [*coefficients, *drawn], tensors, None, step, seed)
    if out is not None:
        read = [t for t in (*checked, step, seed) if isinstance(t, torch.Tensor)]
        reg.check_out(op, out, tensors[0], (*tensors, *read), tensors)
    first = [tensors[0].to(_wide(tensors[0])), *tensors[1 : MAX_TERMS - 1]]
    head = linear_update(coefficients[: MAX_TERMS - 1], first, step=step)
    rest = linear_update(
        [1.0, *coefficients[MAX_TERMS - 1 :]], [head, *tensors[MAX_TERMS - 1 :]],
        seed=seed, noise_scale=noise_scale, step=step,
    )  # fmt: skip
    rest = rest.to(tensors[0].dtype)
    return rest if out is None else out.copy_(rest)


def euler_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    dt: Number,
    *,
    uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    step: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x + dt * v`` with ``v = uncond + guidance_scale * (velocity - uncond)``, differentiable in every tensor.

    Args:
        x: [B, ...], the state.
        velocity: shape of x, the (conditional) velocity.
        dt: the step, float or [B].
        uncond: shape of x, the unconditional velocity; None for no guidance.
        guidance_scale: 1 keeps the conditional velocity; used only with `uncond`.
        step: int64 with one element, on the device of x: `dt`, if a tensor, is a table [steps] or [steps, B], of which
            this row counts; read on the device, beyond the table its first or last row.
        out: shape and dtype of x; written and returned. May be one of the tensors. Not differentiable.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: a shape or device does not fit, or `out` overlaps an input.
        TypeError: an argument is not a floating-point tensor or number.
    """
    if type(dt) is int:
        dt = float(dt)
    if uncond is None:
        return _serve("euler_step", [1.0, dt], [x, velocity], None, out, _linear_reference, step)
    # Finite floats, the usual case, need no more looking at; x - x is 0 for these alone.
    guidance = guidance_scale
    if type(guidance) is not float or guidance - guidance != 0.0:
        guidance = reg.number("euler_step", "guidance_scale", guidance_scale)
    if not isinstance(dt, torch.Tensor):
        if type(dt) is not float or dt - dt != 0.0:
            dt = reg.number("euler_step", "dt", dt)
    elif not dt.is_floating_point():  # times the guidance it would become one, unnoticed
        reg.fail("euler_step", "dt", "a floating-point tensor or a number", dt.dtype, TypeError)
    else:
        dt = dt.double()  # the product is rounded once, whatever type dt came in
    coefficients = [1.0, dt * guidance, dt * (1.0 - guidance)]
    return _serve("euler_step", coefficients, [x, velocity, uncond], None, out, _linear_reference, step)


def ddim_step(
    x: torch.Tensor,
    pred: torch.Tensor,
    alpha_bar: Number,
    alpha_bar_next: Number,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    clip_sample: float | None = None,
    step: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One DDIM step from `alpha_bar` to `alpha_bar_next`, differentiable in every tensor.

    Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models", eq. 12 and 16: with data x0 and noise e as implied
    by the (guided) prediction,

        out = sqrt(alpha_bar_next) x0 + sqrt(1 - alpha_bar_next - sigma^2) e + sigma noise
        sigma = eta sqrt((1 - alpha_bar_next) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_next)

    eta = 0 is deterministic and, run with alpha_bar_next < alpha_bar, the inversion; eta = 1 is DDPM's posterior.

    Args:
        x: [B, ...], sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) e.
        pred: shape of x, the model's output.
        alpha_bar: cumulative signal power at x, in [0, 1]; float or [B].
        alpha_bar_next: likewise where the step goes.
        prediction: what `pred` is: ``"epsilon"`` e; ``"v"`` sqrt(alpha_bar) e - sqrt(1 - alpha_bar) x0; ``"sample"``
            x0; ``"flow"`` x0 - e.
        eta: stochasticity, >= 0.
        noise: shape of x, standard normal; this or `seed` is needed when eta > 0, and ignored otherwise.
        seed: draw the noise here, as `philox_normal` does: an integer; or int64 on the device of x, [1] (seed), [2]
            (seed, offset) or, a pair per sample, [B, 2], which is read on the device. A step's noise should not be that
            of another: give every step a seed or an offset of its own.
        uncond: shape of x, the unconditional output; the guided one is uncond + guidance_scale (pred - uncond).
        guidance_scale: used only with `uncond`.
        clip_sample: clamp x0 to [-clip_sample, clip_sample]; e stays as predicted. None: no clamp.
        step: int64 with one element, on the device of x: levels that are tensors are tables [steps] or [steps, B], of
            which this row counts; read on the device, beyond the table its first or last row.
        out: shape and dtype of x; written and returned. May be one of the tensors. Not differentiable.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: a shape, device, range or option does not fit. Ranges of per-sample tensors are not checked (that
            would read the device): outside [0, 1], or where the formula divides by zero, those samples are not finite.
        TypeError: an argument is not a floating-point tensor or number.
    """
    op = "ddim_step"
    if prediction not in PREDICTIONS:
        reg.fail(op, "prediction", f"one of {tuple(PREDICTIONS)}", repr(prediction))
    if type(eta) is not float or not 0 <= eta < 1e30:
        eta = reg.number(op, "eta", eta, low=0.0)
    if noise is not None and seed is not None:
        reg.fail(op, "seed", "None beside noise", type(seed).__name__)
    if eta > 0 and noise is None and seed is None:
        reg.fail(op, "noise", "a tensor of the shape of x, or a seed, because eta > 0", "None")
    guidance = 1.0 if uncond is None else reg.number(op, "guidance_scale", guidance_scale)
    clip = -1.0 if clip_sample is None else reg.number(op, "clip_sample", clip_sample, low=0.0)
    terms = [x, pred]
    if uncond is not None:
        terms.append(uncond)
    if eta > 0 and noise is not None:
        terms.append(noise)
    plain = not torch.compiler.is_compiling() and type(alpha_bar) is type(alpha_bar_next) is float
    if not (plain and 0.0 < alpha_bar < 1.0 and 0.0 < alpha_bar_next <= 1.0):
        _check_levels(alpha_bar, alpha_bar_next, prediction, eta)
    rule = (PREDICTIONS[prediction], eta, guidance, uncond is not None, eta > 0 and noise is not None, clip)
    return _serve(op, [alpha_bar, alpha_bar_next], terms, rule, out, _ddim_reference, step, seed)


# ------------------------------------------------------------------------------------------------------- references


def linear_update_reference(
    coefficients: Sequence[Number] | torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    seed: int | torch.Tensor | None = None,
    noise_scale: Number = 1.0,
    step: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_update` in plain PyTorch: any device, float64 included, differentiable to any order."""
    coefficients = _sequence("linear_update", "coefficients", coefficients, 0 if step is None else 1)
    if seed is not None:
        coefficients.append(noise_scale)
    return _linear_reference([_row(c, step) for c in coefficients], tensors, None, seed)


def euler_step_reference(
    x: torch.Tensor,
    velocity: torch.Tensor,
    dt: Number,
    *,
    uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    step: torch.Tensor | None = None,
) -> torch.Tensor:
    """`euler_step` in plain PyTorch: any device, float64 included, differentiable to any order."""
    wide = _wide(x)
    v = velocity.to(wide)
    if uncond is not None:
        v = uncond.to(wide) + guidance_scale * (v - uncond.to(wide))
    return (x.to(wide) + _column(_row(dt, step), x, wide) * v).to(x.dtype)


def ddim_step_reference(
    x: torch.Tensor,
    pred: torch.Tensor,
    alpha_bar: Number,
    alpha_bar_next: Number,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    clip_sample: float | None = None,
    step: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ddim_step` in plain PyTorch: any device, float64 included, differentiable to any order."""
    wide = _wide(x)
    ab, ab_next = (_column(_row(level, step), x, torch.float64) for level in (alpha_bar, alpha_bar_next))
    a, s = ab.sqrt(), (1 - ab).clamp(min=0).sqrt()
    h, g = x.to(wide), pred.to(wide)
    if uncond is not None:
        g = uncond.to(wide) + guidance_scale * (g - uncond.to(wide))
    # Coefficients are rounded once, from float64, to the type of the arithmetic.
    if prediction == "epsilon":
        data, e = (1 / a).to(wide) * h - (s / a).to(wide) * g, g
    elif prediction == "v":
        data, e = a.to(wide) * h - s.to(wide) * g, s.to(wide) * h + a.to(wide) * g
    elif prediction == "sample":
        data, e = g, (1 / s).to(wide) * h - (a / s).to(wide) * g
    else:
        data = (1 / (a + s)).to(wide) * h + (s / (a + s)).to(wide) * g
        e = (1 / (a + s)).to(wide) * h - (a / (a + s)).to(wide) * g
    if clip_sample is not None:
        data = data.clamp(-clip_sample, clip_sample)
    sigma = torch.zeros_like(ab)
    if eta > 0:
        sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).clamp(min=0).sqrt()
    result = ab_next.sqrt().to(wide) * data + (1 - ab_next - sigma**2).clamp(min=0).sqrt().to(wide) * e
    if eta > 0:
        if noise is None:
            assert seed is not None
            noise = _philox.draw(x.shape, seed, x.device)
        result = result + sigma.to(wide) * noise.to(wide)
    return result.to(x.dtype)


def _linear_reference(
    coefficients: Sequence[Number],
    terms: Sequence[torch.Tensor],
    rule: object,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """With a seed, the last coefficient is that of the noise."""
    x = terms[0]
    wide = _wide(x)
    total = _column(coefficients[0], x, wide) * x.to(wide)
    drawn = [] if seed is None else [_philox.draw(x.shape, seed, x.device)]
    for c, t in zip(coefficients[1:], [*terms[1:], *drawn], strict=True):
        total = total + _column(c, x, wide) * t.to(wide)
    return total.to(x.dtype)


def _ddim_reference(
    coefficients: Sequence[Number], terms: Sequence[torch.Tensor], rule: Any, seed: int | torch.Tensor | None = None
) -> torch.Tensor:
    code, eta, guidance, has_uncond, has_noise, clip = rule
    rest = list(terms[2:])
    return ddim_step_reference(
        terms[0],
        terms[1],
        coefficients[0],
        coefficients[1],
        prediction=_PREDICTION_NAMES[code],
        eta=eta,
        uncond=rest.pop(0) if has_uncond else None,
        noise=rest.pop(0) if has_noise else None,
        seed=seed,
        guidance_scale=guidance,
        clip_sample=None if clip < 0 else clip,
    )


_PREDICTION_NAMES = {code: name for name, code in PREDICTIONS.items()}


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row(c: Number, step: torch.Tensor | None) -> Number:
    """What a coefficient is in this step: a row of a table, or what it always is."""
    if step is None or not isinstance(c, torch.Tensor) or c.dim() == 0:
        return c
    return c.index_select(0, step.reshape(1).clamp(0, c.shape[0] - 1))[0]


def _column(c: Number, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A coefficient as a tensor that broadcasts against x: [] or [B, 1, ..., 1]."""
    if not isinstance(c, torch.Tensor):
        return torch.full((), c, dtype=torch.float64, device=x.device).to(dtype)
    c = c.to(device=x.device, dtype=dtype)
    return c.reshape(()) if c.numel() == 1 else c.reshape(-1, *[1] * (x.dim() - 1))


# ------------------------------------------------------------------------------------------------------- validation


def _sequence(op: str, argument: str, value: Any, dim: int = 0) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, torch.Tensor) and argument == "coefficients" and value.dim() > dim:
        return list(value.unbind(dim))
    reg.fail(op, argument, "a list or tuple", type(value).__name__, TypeError)


def _check_levels(alpha_bar: Number, alpha_bar_next: Number, prediction: str, eta: float) -> None:
    """Ranges of levels that are given as numbers; those on a device are not read, nor any while tracing."""
    if torch.compiler.is_compiling():
        return
    for name, level in (("alpha_bar", alpha_bar), ("alpha_bar_next", alpha_bar_next)):
        if not isinstance(level, torch.Tensor) and not 0 <= reg.number("ddim_step", name, level) <= 1:
            reg.fail("ddim_step", name, "a number in [0, 1]", repr(level))
    if prediction == "epsilon" and not isinstance(alpha_bar, torch.Tensor) and alpha_bar == 0:
        reg.fail("ddim_step", "alpha_bar", "a number > 0 (x holds no data that epsilon could reveal)", alpha_bar)
    if not isinstance(alpha_bar, torch.Tensor) and alpha_bar == 1 and (prediction == "sample" or eta > 0):
        reg.fail("ddim_step", "alpha_bar", "a number < 1 for prediction='sample' or eta > 0", alpha_bar)
    if eta > 0 and not isinstance(alpha_bar_next, torch.Tensor) and alpha_bar_next == 0:
        reg.fail("ddim_step", "alpha_bar_next", "a number > 0 for eta > 0", alpha_bar_next)


def _names(op: str, count: int, rule: Any) -> list[str]:
    if op == "linear_update":
        return [f"tensors[{i}]" for i in range(count)]
    if op == "euler_step":
        return ["x", "velocity", "uncond"][:count]
    return ["x", "pred"] + ["uncond"] * rule[3] + ["noise"] * rule[4]


def _coefficient_names(op: str, terms: int) -> list[str]:
    if op == "linear_update":
        return [*(f"coefficients[{i}]" for i in range(terms)), "noise_scale"]
    return ["", "dt", "dt"] if op == "euler_step" else ["alpha_bar", "alpha_bar_next"]


def _check(
    op: str,
    coefficients: Sequence[Any],
    terms: Sequence[Any],
    rule: Any,
    step: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
) -> list[Number]:
    """The whole contract; returns the coefficients as floats and as tensors [B] or, where there is a step,
    [steps, B], float32 or float64."""
    names = _names(op, len(terms), rule)
    x = terms[0]
    for name, t in zip(names, terms, strict=True):
        reg.check_tensor(op, name, t, x if isinstance(x, torch.Tensor) else None)
        if t.shape != x.shape:
            reg.fail(op, name, f"the shape of {names[0]}, {tuple(x.shape)}", tuple(t.shape))
    batch = x.shape[0] if x.dim() else 1
    if seed is not None:
        _philox.check_seed(op, seed, batch, x.numel() // max(batch, 1), x.device)
    if step is not None:
        _check_step(op, step, x)
    checked: list[Number] = []
    steps = 0  # rows of every table; 0: none seen yet
    for name, c in zip(_coefficient_names(op, len(terms)), coefficients, strict=False):
        if not isinstance(c, torch.Tensor):
            checked.append(reg.number(op, name, c))
            continue
        if not c.is_floating_point():
            reg.fail(op, name, "a floating-point tensor or a number", c.dtype, TypeError)
        table = step is not None and c.dim() > 0
        if table:
            steps = steps or c.shape[0]
            if c.dim() > 2 or c.shape[0] != steps or steps == 0 or (c.dim() == 2 and c.shape[1] not in (1, batch)):
                expected = steps or "at least 1"
                reg.fail(op, name, f"a table [steps] or [steps, B], steps {expected}, B {batch}", tuple(c.shape))
        elif c.numel() != 1 and not (c.numel() == batch and c.dim() >= 1 and c.shape[0] == batch):
            reg.fail(op, name, f"a number or a tensor of shape [B] = ({batch},)", tuple(c.shape))
        if c.device != x.device and not (c.dim() == 0 and c.device.type == "cpu"):
            reg.fail(op, name, f"a tensor on {x.device}", c.device)
        host = c.device != x.device and not reg.learned((c,))
        if host and not torch.compiler.is_compiling() and not reg.transforms_active():
            checked.append(float(c))  # nothing is copied, so a graph can be captured
            continue
        c = c.resolve_neg()
        c = c.to(x.device) if c.dtype in _COEFFICIENT_CODES else c.to(x.device, torch.float32)
        if table:
            checked.append(c.reshape(steps, -1).expand(steps, batch))
        elif step is not None:
            checked.append(c.reshape(1, 1).expand(steps or 1, batch))
        else:
            checked.append(c.reshape(-1).expand(batch).contiguous() if x.dim() else c.reshape(1))
    if step is not None:  # a constant may have come before the first table
        checked = [c.expand(steps or 1, batch) if isinstance(c, torch.Tensor) else c for c in checked]
    return checked


def _check_step(op: str, step: object, x: torch.Tensor) -> None:
    if not isinstance(step, torch.Tensor):
        reg.fail(op, "step", "an int64 tensor", type(step).__name__, TypeError)
    if step.dtype != torch.int64:
        reg.fail(op, "step", "an int64 tensor", step.dtype, TypeError)
    if step.numel() != 1:
        reg.fail(op, "step", "one element", tuple(step.shape))
    if step.device != x.device:
        reg.fail(op, "step", f"a tensor on {x.device}", step.device)


# -------------------------------------------------------------------------------------------------- native functions


def _serve(
    op: str,
    coefficients: list[Any],
    terms: list[Any],
    rule: Any,
    out: torch.Tensor | None,
    reference: Any,
    step: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear update that draws noise has one coefficient more than terms."""
    if step is None and (fast := reg.fast(terms[0])):
        result = torch.empty_like(terms[0]) if out is None else out
        if fast.fast_update(torch.is_grad_enabled(), out is None, terms, coefficients, rule, seed, result):
            reg.written(out)
            return result
    way = reg.route(op, terms)
    checked = _check(op, coefficients, terms, rule, step, seed)
    if rule and rule[1] <= 0:
        seed = None
    way = reg.within_limits(op, way, [reg.LEARNED] if reg.learned(checked) else [])
    if out is not None:
        read = [t for t in (*checked, step, seed) if isinstance(t, torch.Tensor)]
        reg.check_out(op, out, terms[0], (*terms, *read), terms)
    if way is reg.REFERENCE:
        result = reference([_row(c, step) for c in checked], terms, rule, seed)
        return result if out is None else out.copy_(result)
    values = [0.0 if isinstance(c, torch.Tensor) else c for c in checked]
    tables = [c if isinstance(c, torch.Tensor) else None for c in checked]
    source = _source(step, seed)
    if out is not None:
        reg.call(_update_out_op, _update_out, terms, values, tables, *(rule or _LINEAR), *source, out)
        reg.written(out)
        return out
    if way is reg.GRAD:
        tensors = reg.distinct(*terms, *tables, *source[:2])
        return _Update.apply(len(terms), values, rule or _LINEAR, source[2], reference, *tensors)
    return reg.call(_update_op, _update, terms, values, tables, *(rule or _LINEAR), *source)


# The rule of a linear update, in the place of DDIM's (prediction, eta, guidance, has_uncond, has_noise, clip).
_LINEAR = (-1, 0.0, 1.0, False, False, -1.0)


def _source(step: torch.Tensor | None, seed: int | torch.Tensor | None) -> tuple[Any, Any, int | None]:
    """(step, seed tensor, seed value): of the last two one at most is not None."""
    if seed is None or isinstance(seed, torch.Tensor):
        return step, seed, None
    return step, None, seed


def _update(  # type: ignore[no-untyped-def]
    terms, values, tables, prediction, eta, guidance, has_uncond, has_noise, clip, step, seed, seed_value
) -> torch.Tensor:
    out = _new_out(terms[0], seed, seed_value)
    rule = (prediction, eta, guidance, has_uncond, has_noise, clip)
    _launch(terms, values, tables, rule, (step, seed, seed_value), out)
    return out


def _update_out(  # type: ignore[no-untyped-def]
    terms, values, tables, prediction, eta, guidance, has_uncond, has_noise, clip, step, seed, seed_value, out
) -> None:
    rule, source = (prediction, eta, guidance, has_uncond, has_noise, clip), (step, seed, seed_value)
    if out.is_contiguous() or (_is_dense(out) and seed is None and seed_value is None):
        _launch(terms, values, tables, rule, source, out)
    else:
        out.copy_(_update(terms, values, tables, *rule, *source))


def _launch(terms: Any, values: Any, tables: Any, rule: Any, source: Any, out: torch.Tensor) -> None:
    step, seed, seed_value = source
    seed = None if seed is None else seed.contiguous()  # the kernel reads pairs that lie side by side
    B, M, operands, arguments, native_source = _operands(terms, values, tables, rule, (step, seed, seed_value), out)
    device, stream = _native.place(out)
    if M:
        ext = _native.extension
        ext.update(  # type: ignore[union-attr]
            device,
            stream,
            B,
            M,
            tuple([(t.data_ptr(), _CODES[t.dtype]) for t in operands]),
            arguments,
            native_source,
            rule[0] >= 0,
            out.data_ptr(),
            _CODES[out.dtype],
        )


def _operands(
    terms: Any, values: Any, tables: Any, rule: Any, source: Any, like: torch.Tensor
) -> tuple[int, int, Any, tuple[Any, ...], Any]:
    """B, M, the terms laid out like `like`, the coefficients and where rows and noise come from, as the native side
    takes them."""
    B, coefficients, native_source = 1, tuple(values), None
    given = [t for t in tables if t is not None]
    if given:
        B = like.shape[0] if like.dim() else 1
        coefficients = tuple(
            v
            if t is None
            else (t.data_ptr(), _COEFFICIENT_CODES[t.dtype], t.stride(0) if t.dim() == 2 else 0, t.stride(-1))
            for v, t in zip(values, tables, strict=True)
        )
    step, seed, seed_value = source
    draws = seed is not None or seed_value is not None
    if draws:
        B = like.shape[0] if like.dim() else 1
    if draws or step is not None:
        native_source = (
            0 if step is None else step.data_ptr(),
            given[0].shape[0] if step is not None and given else 1,
            draws,
            seed_value or 0,
            0 if seed is None else seed.data_ptr(),
            seed is not None and seed.shape[-1] == 2,
            seed is not None and seed.dim() == 2,
        )
    if like.is_contiguous():
        for t in terms:
            if not t.is_contiguous():
                terms = [t.contiguous() for t in terms]
                break
    else:
        strides = like.stride()
        terms = [t if t.stride() == strides else torch.empty_like(like, dtype=t.dtype).copy_(t) for t in terms]
    size = like.numel()
    return B, size // B if size else 0, terms, coefficients if rule[0] < 0 else (*coefficients, *rule), native_source


def _is_dense(t: torch.Tensor) -> bool:
    """Elements fill one range of memory with the batch outermost, as the kernel walks them."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return t.shape[0] == 1 or t.stride(0) * t.shape[0] == expected


def _new_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised, laid out like x where the kernel can walk that, else contiguous."""
    layout = torch.preserve_format if _is_dense(x) else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)


def _new_out(x: torch.Tensor, seed: torch.Tensor | None, seed_value: int | None) -> torch.Tensor:
    """The output of an update. Noise that is drawn counts elements in their logical order."""
    if seed is None and seed_value is None:
        return _new_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------- gradient


def _backward(  # type: ignore[no-untyped-def]
    grad, terms, values, tables, prediction, eta, guidance, has_uncond, has_noise, clip, step, wanted
) -> list[torch.Tensor]:
    """Gradients of the terms: `wanted` holds each one's dtype code, or -1 where no gradient is wanted.

    `terms` is empty when nothing is clamped: the step is linear.
    """
    rule = (prediction, eta, guidance, has_uncond, has_noise, clip)
    like = _new_like(grad)
    if prediction < 0:  # noise takes no part
        values, tables = values[: len(wanted)], tables[: len(wanted)]
    operands = _operands([grad, *terms], values, tables, rule, (step, None, None), like)
    B, M, (grad, *terms), arguments, native_source = operands
    grads = [None if code < 0 else torch.empty_like(like, dtype=_DTYPES[code]) for code in wanted]
    device, stream = _native.place(grad)
    if M:
        ext = _native.extension
        ext.update_backward(  # type: ignore[union-attr]
            device,
            stream,
            B,
            M,
            tuple((t.data_ptr(), _CODES[t.dtype]) for t in terms) or tuple((0, max(code, 0)) for code in wanted),
            arguments,
            native_source,
            prediction >= 0,
            grad.data_ptr(),
            _CODES[grad.dtype],
            tuple(0 if g is None else g.data_ptr() for g in grads),
        )
    return [g for g in grads if g is not None]


_DTYPES = list(_CODES)  # by code


def _backward_fake(  # type: ignore[no-untyped-def]
    grad, terms, values, tables, prediction, eta, guidance, has_uncond, has_noise, clip, step, wanted
) -> list[torch.Tensor]:
    return [_new_like(grad, _DTYPES[code]) for code in wanted if code >= 0]


class _Update(torch.autograd.Function):
    """out is linear in the terms (up to the clamp), so nothing is saved unless there is a clamp."""

    @staticmethod
    def forward(ctx, count, values, rule, seed_value, reference, *tensors):  # type: ignore[no-untyped-def,override]
        terms, tables, (step, seed) = list(tensors[:count]), list(tensors[count:-2]), tensors[-2:]
        ctx.values, ctx.rule, ctx.reference, ctx.count = values, rule, reference, count
        ctx.clamped = rule[5] >= 0
        ctx.shape = terms[0].shape
        ctx.codes = [_CODES[t.dtype] for t in terms]
        ctx.draws = seed is not None or seed_value is not None
        ctx.save_for_backward(step, *tables, *(terms if ctx.clamped else []))
        return reg.call(_update_op, _update, terms, values, tables, *rule, step, seed, seed_value)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        coefficients = len(ctx.values)
        step, *saved = ctx.saved_tensors
        tables, terms = saved[:coefficients], saved[coefficients:]
        need = list(ctx.needs_input_grad[5 : 5 + ctx.count])
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised([grad]):
            # create_graph=True, or a backward pass that is itself vectorised
            full: list[torch.Tensor] = _reference_gradient(ctx, grad, step, tables, terms)
        else:
            wanted = [code if n else -1 for code, n in zip(ctx.codes, need, strict=True)]
            full = reg.call(_backward_op, _backward, grad, terms, ctx.values, tables, *ctx.rule, step, wanted)
        found = iter(full)
        grads = [next(found) if n else None for n in need]
        return (*[None] * 5, *grads, *[None] * (len(tables) + 2))


def _reference_gradient(
    ctx: Any, grad: torch.Tensor, step: torch.Tensor | None, tables: Any, terms: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The same gradients as a differentiable expression. Without a clamp any point will do, so zero it is."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = terms or [
            torch.zeros(ctx.shape, dtype=_DTYPES[c], device=grad.device, requires_grad=True) for c in ctx.codes
        ]
        coefficients = [v if t is None else _row(t, step) for v, t in zip(ctx.values, tables, strict=True)]
        wanted = [t for t, n in zip(at, ctx.needs_input_grad[5:], strict=False) if n]
        result = ctx.reference(coefficients, at, ctx.rule, 0 if ctx.draws else None)  # any noise will do
    found = torch.autograd.grad(result, wanted, grad, create_graph=create_graph, materialize_grads=True)
    return list(found)


# ------------------------------------------------------------------------------------------------------ registration

_RULE = (
    "float[] values, Tensor?[] tables, int prediction, float eta, float guidance, bool has_uncond, bool has_noise, "
    "float clip, Tensor? step"
)
_SEED = "Tensor? seed, int? seed_value"

_update_op = reg.define(
    "update",
    f"Tensor[] terms, {_RULE}, {_SEED}",
    "Tensor",
    _update,
    lambda terms, *rest: _new_out(terms[0], *rest[-2:]),
    lambda terms, *_: terms,  # the tables may be float64
)
_update_out_op = reg.define(
    "update_out",
    f"Tensor[] terms, {_RULE}, {_SEED}, Tensor(a!) out",
    "()",
    _update_out,
    lambda *_: None,
    lambda terms, *rest: (terms, rest[-1]),
)
_backward_op = reg.define(
    "update_backward",
    f"Tensor grad, Tensor[] terms, {_RULE}, int[] wanted",
    "Tensor[]",
    _backward,
    _backward_fake,
    lambda grad, terms, *_: (grad, terms),
)
