"""What tests, `fastdiff verify` and `fastdiff bench` know of the sampler updates."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch

from fastdiff.ops import _philox, update
from fastdiff.ops import _registry as reg
from fastdiff.ops._adaln_spec import _BAD_OUT, _option, _replace
from fastdiff.ops._examples import dense, nbytes, randn

# ---------------------------------------------------------------------------------------------------------- examples


def _shape(rng: random.Random) -> tuple[int, ...]:
    return rng.choice([(1,), (3,), (2, 5), (3, 1, 7), (2, 4, 8, 8), (1, 3, 5, 17), (2, 1030), (3, 2, 33, 33)])


def _terms(rng: random.Random, shape: tuple[int, ...], count: int, dtype: torch.dtype, device: torch.device) -> Any:
    terms = []
    for i in range(count):
        kind = torch.float32 if i and rng.random() < 0.2 else dtype
        t = randn(rng, shape, kind, device)
        if len(shape) == 4 and rng.random() < 0.2:
            t = t.contiguous(memory_format=torch.channels_last)
        terms.append(t)
    return terms


def _step(rng: random.Random, device: torch.device) -> torch.Tensor | None:
    """Sometimes a counter, perhaps beyond the table."""
    if rng.random() < 0.6:
        return None
    return torch.tensor(rng.choice([0, 1, _STEPS - 1, _STEPS + 3, -2]), device=device).reshape(rng.choice([(), (1,)]))


_STEPS = 4


def _number(
    rng: random.Random, low: float, high: float, batch: int, device: torch.device, step: torch.Tensor | None = None
) -> Any:
    """A float, or the same kind of number per sample, or a table of such with a row for every step."""
    if step is not None and rng.random() < 0.8:
        shape = rng.choice([(_STEPS,), (_STEPS, batch), (batch, _STEPS)])
        g = torch.Generator().manual_seed(rng.getrandbits(31))
        table = low + (high - low) * torch.rand(shape, generator=g, dtype=rng.choice([torch.float32, torch.float64]))
        return (table.mT if shape == (batch, _STEPS) and table.dim() == 2 else table).to(device)
    kind = rng.choice(["float", "f32", "f64", "scalar"] if step is None else ["float", "scalar"])
    if kind == "float":
        return low + (high - low) * rng.random()
    count = () if kind == "scalar" else (batch,)
    values = torch.tensor([low + (high - low) * rng.random() for _ in range(batch)][: 1 if count == () else batch])
    return values.reshape(count).to(device=device, dtype=torch.float64 if kind == "f64" else torch.float32)


def _example_linear(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    shape, count = _shape(rng), rng.choice([1, 2, 3, 4, 5, 8, 11])
    terms, step = _terms(rng, shape, count, dtype, device), _step(rng, device)
    kwargs: dict[str, Any] = {} if step is None else {"step": step}
    if rng.random() < 0.4:
        kwargs["seed"] = _seed(rng, shape[0], device)
        if rng.random() < 0.8:
            kwargs["noise_scale"] = _number(rng, -2, 2, shape[0], device, step)
    if step is not None and rng.random() < 0.3:
        return (torch.rand(_STEPS, count, device=device, dtype=torch.float64), terms), kwargs
    return ([_number(rng, -2, 2, shape[0], device, step) for _ in range(count)], terms), kwargs


def _example_euler(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    shape = _shape(rng)
    x, v, u = _terms(rng, shape, 3, dtype, device)
    kwargs: dict[str, Any] = {}
    if rng.random() < 0.5:
        kwargs.update(uncond=u, guidance_scale=rng.choice([1.0, 4.0, -0.5]))
    if (step := _step(rng, device)) is not None:
        kwargs["step"] = step
    return (x, v, _number(rng, -0.5, 0.5, shape[0], device, step)), kwargs


def _example_ddim(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    shape = _shape(rng)
    x, pred, uncond, noise = _terms(rng, shape, 4, dtype, device)
    eta = rng.choice([0.0, 0.0, 0.5, 1.0])
    step = _step(rng, device)
    levels = (_number(rng, 0.02, 0.6, shape[0], device, step), _number(rng, 0.65, 0.99, shape[0], device, step))
    kwargs: dict[str, Any] = {"prediction": rng.choice(list(update.PREDICTIONS)), "eta": eta}
    if step is not None:
        kwargs["step"] = step
    if eta > 0 and rng.random() < 0.5:
        kwargs["seed"] = _seed(rng, shape[0], device)
    elif eta > 0:
        kwargs["noise"] = noise
    elif rng.random() < 0.3:
        levels = levels[::-1]  # inversion
    if rng.random() < 0.5:
        kwargs.update(uncond=uncond, guidance_scale=rng.choice([1.0, 4.0, -0.5]))
    if rng.random() < 0.5:
        kwargs["clip_sample"] = rng.choice([1.0, 0.3])
    return (x, pred, *levels), kwargs


def _seed(rng: random.Random, batch: int, device: torch.device) -> int | torch.Tensor:
    value = rng.randrange(-(1 << 63), 1 << 63)
    kinds: list[tuple[int, ...]] = [(), (1,), (2,), (batch, 2)]
    kind = rng.choice(kinds)
    if not kind:
        return value
    count = math.prod(kind)
    return torch.tensor([value, *(rng.randrange(1 << 62) for _ in range(count - 1))]).reshape(kind).to(device)


def _take_update(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    """One sample: its columns of the tables, and its noise: from its own seed, or, where all share one, as a tensor."""
    terms = args[1] if isinstance(args[0], (list, torch.Tensor)) and isinstance(args[1], list) else args[:2]
    B, step = terms[0].shape[0], kwargs.get("step")

    def coefficient(c: Any) -> Any:
        if not isinstance(c, torch.Tensor) or c.dim() == 0:
            return c
        if step is not None:
            return c[:, b : b + 1] if c.dim() == 2 and c.shape[1] == B else c
        return c[b : b + 1] if c.shape[0] == B else c

    kwargs = {k: v[b : b + 1] if k in ("noise", "uncond") else v for k, v in kwargs.items()}
    if "noise_scale" in kwargs:
        kwargs["noise_scale"] = coefficient(kwargs["noise_scale"])
    seed, drawn = kwargs.pop("seed", None), []
    if isinstance(seed, torch.Tensor) and seed.dim() == 2:
        kwargs["seed"] = seed[b : b + 1]
    elif seed is not None:
        drawn = [_philox.philox_normal(terms[0].shape, seed, device=terms[0].device)[b : b + 1]]
    if terms is args[1]:
        coefficients = update._sequence("linear_update", "coefficients", args[0], 0 if step is None else 1)
        coefficients = [coefficient(c) for c in coefficients]
        if drawn:
            coefficients.append(kwargs.pop("noise_scale", 1.0))
        return (coefficients, [*(t[b : b + 1] for t in terms), *drawn]), kwargs
    if drawn:
        kwargs["noise"] = drawn[0]
    return (*(t[b : b + 1] for t in terms), *map(coefficient, args[2:])), kwargs


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    B = max(t.shape[0] for t in reg.tensors_in(args) if t.dim())

    def one(t: torch.Tensor) -> torch.Tensor:
        return t[b : b + 1] if t.dim() and t.shape[0] == B else t

    return reg.map_tensors(one, args), reg.map_tensors(one, kwargs)


# ------------------------------------------------------------------------------------------------------------ bounds


def _columns(coefficients: Any, x: Any, step: Any) -> list[torch.Tensor]:
    coefficients = update._sequence("", "coefficients", coefficients, 0 if step is None else 1)
    return [update._column(update._row(c, step), x, x.dtype) for c in coefficients]


def _bound_linear(dtype: torch.dtype, coefficients: Any, tensors: Any, *, seed: Any = None, noise_scale: Any = 1.0,
                  step: Any = None) -> tuple[torch.Tensor, ...]:  # fmt: skip
    x = tensors[0]
    columns = _columns(coefficients, x, step)
    if seed is not None:
        columns = [*columns, update._column(update._row(noise_scale, step), x, x.dtype)]
        tensors = [*tensors, _philox.draw(x.shape, seed, x.device)]
    return (sum((c * t).abs() for c, t in zip(columns, tensors, strict=True)),)  # type: ignore[return-value]


def _grad_bound_linear(
    dtype: torch.dtype, grads: Any, coefficients: Any, tensors: Any, *, step: Any = None, **_: Any
) -> dict[str, Any]:
    return {f"tensors[{i}]": (c * grads[0]).abs() for i, c in enumerate(_columns(coefficients, tensors[0], step))}


def _bound_euler(dtype: torch.dtype, x: Any, velocity: Any, dt: Any, *, uncond: Any = None,
                 guidance_scale: float = 1.0, step: Any = None) -> tuple[torch.Tensor, ...]:  # fmt: skip
    v = velocity.abs() if uncond is None else abs(guidance_scale) * velocity.abs()
    v = v if uncond is None else v + (1 + abs(guidance_scale)) * uncond.abs()
    return (x.abs() + update._column(update._row(dt, step), x, x.dtype).abs() * v,)


def _grad_bound_euler(dtype: torch.dtype, grads: Any, x: Any, velocity: Any, dt: Any, *, uncond: Any = None,
                      guidance_scale: float = 1.0, step: Any = None) -> dict[str, Any]:  # fmt: skip
    g = grads[0].abs()
    part = g * update._column(update._row(dt, step), x, x.dtype).abs() * (1 + abs(guidance_scale))
    return {"x": g, "velocity": part, "uncond": part}


def _ddim_weights(
    x: Any, alpha_bar: Any, alpha_bar_next: Any, prediction: str, guidance: float, step: Any
) -> tuple[Any, ...]:
    """How strongly x and the prediction enter, bounded by the sum over both ways (data and noise)."""
    ab, ab_next = (update._column(update._row(v, step), x, torch.float64) for v in (alpha_bar, alpha_bar_next))
    a, s = ab.sqrt(), (1 - ab).sqrt()
    of_x, of_pred = {
        "epsilon": (1 / a, 1 + s / a),
        "v": (a + s, a + s),
        "sample": (1 / s, 1 + a / s),
        "flow": (2 / (a + s), torch.ones_like(a)),
    }[prediction]
    # A level given in float32 carries its own rounding: d sqrt(1 - ab) ~ u / s.
    condition = 1 + 1 / s.clamp(min=1e-8) + 1 / (1 - ab_next).sqrt().clamp(min=1e-8)
    return of_x * condition, of_pred * condition * (1 + abs(guidance)), condition


def _bound_ddim(dtype: torch.dtype, x: Any, pred: Any, alpha_bar: Any, alpha_bar_next: Any, *,
                prediction: str = "epsilon", eta: float = 0.0, noise: Any = None, seed: Any = None,
                uncond: Any = None, guidance_scale: float = 1.0, clip_sample: Any = None,
                step: Any = None) -> tuple[torch.Tensor, ...]:  # fmt: skip
    guidance = 0.0 if uncond is None else guidance_scale
    wx, wp, condition = _ddim_weights(x, alpha_bar, alpha_bar_next, prediction, guidance, step)
    if seed is not None:
        noise = _philox.draw(x.shape, seed, x.device)
    total = wx * x.abs() + wp * (pred.abs() if uncond is None else pred.abs() + uncond.abs())
    return (total if noise is None else total + condition * noise.abs(),)


def _grad_bound_ddim(dtype: torch.dtype, grads: Any, x: Any, pred: Any, alpha_bar: Any, alpha_bar_next: Any, *,
                     prediction: str = "epsilon", eta: float = 0.0, noise: Any = None, seed: Any = None,
                     uncond: Any = None, guidance_scale: float = 1.0, clip_sample: Any = None,
                     step: Any = None) -> dict[str, Any]:  # fmt: skip
    guidance = 0.0 if uncond is None else guidance_scale
    wx, wp, condition = _ddim_weights(x, alpha_bar, alpha_bar_next, prediction, guidance, step)
    g = grads[0].abs()
    return {"x": wx * g, "pred": wp * g, "uncond": wp * g, "noise": condition * g}


# --------------------------------------------------------------------------------------------------------- bad calls


def _other_shape(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros((*t.shape, 2), dtype=t.dtype, device=t.device)


def _bad_number(make: Callable[[Any], Callable[..., reg.Call]], name: str) -> list[Any]:
    return [
        (f"{name} of a wrong length", make(torch.rand(7)), ValueError, (name, "(7,)")),
        (f"{name} is text", make("0.5"), TypeError, (name, "str")),
        (f"{name} is NaN", make(float("nan")), ValueError, (name, "nan")),
        (f"{name} of an integer type", make(torch.tensor(1)), TypeError, (name, "int64")),
    ]


def _set(index: int) -> Callable[[Any], Callable[..., reg.Call]]:
    return lambda value: _replace(index, lambda _: value)


_BAD_STEP = [
    ("step is a number", _option(step=3), TypeError, ("step", "int64", "int")),
    ("step of another type", _option(step=torch.tensor([1.0])), TypeError, ("step", "int64", "float32")),
    ("step of two elements", _option(step=torch.tensor([0, 1])), ValueError, ("step", "one element", "(2,)")),
    ("step on another device", _option(step=torch.zeros(1, dtype=torch.int64, device="meta")), ValueError,
     ("step", "meta")),
]  # fmt: skip


def _bad_table(call: Callable[[Any, Any, Any], tuple[Any, ...]], name: str) -> list[Any]:
    """`call(arguments, table, another)`: the arguments with these two coefficients."""

    def make(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[..., reg.Call]:
        return lambda a, k: (
            call(a, first(), second()),
            {**k, "step": torch.zeros(1, dtype=torch.int64, device=reg.tensors_in(a)[0].device)},
        )

    table = torch.full((5,), 0.5)
    return [
        (f"{name}: a table without steps", make(lambda: table[:0], lambda: 0.5), ValueError, (name, "at least 1")),
        (f"{name}: a table for another batch", make(lambda: torch.rand(5, 7), lambda: 0.5), ValueError,
         (name, "[steps, B]", "(5, 7)")),
        (f"{name}: a table of three dimensions", make(lambda: torch.rand(5, 1, 1), lambda: 0.5), ValueError,
         (name, "[steps, B]")),
    ]  # fmt: skip


def _bad_seed(**options: Any) -> list[Any]:
    def make(seed: Any) -> Callable[..., reg.Call]:
        return _option(**options, seed=seed)

    return [
        ("a seed too large", make(1 << 63), ValueError, ("seed", "2^63", str(1 << 63))),
        ("a seed that is a float", make(0.5), TypeError, ("seed", "integer", "float")),
        ("a seed that is true", make(True), TypeError, ("seed", "integer", "bool")),
        ("a seed of another type", make(torch.zeros(1)), TypeError, ("seed", "int64", "float32")),
        ("a seed of another shape", make(torch.zeros(3, dtype=torch.int64)), ValueError, ("seed", "(2,)", "(3,)")),
        ("a seed on another device", make(torch.zeros(1, dtype=torch.int64, device="meta")), ValueError,
         ("seed", "meta")),
    ]  # fmt: skip


def _over(name: str, count: int) -> Callable[..., reg.Call]:
    """`out` in the memory of an int64 argument."""

    def call(args: Any, kwargs: Any) -> reg.Call:
        number = torch.ones(1, dtype=torch.int64)
        x = torch.ones(1, 2)
        return ([1.0] * count, [x] * count), {"seed": 1, name: number, "out": number.view(torch.float32).reshape(1, 2)}

    return call


_BAD_LINEAR = [
    *_BAD_STEP, *_bad_seed(),
    *_bad_number(lambda v: lambda a, k: (a, {**k, "seed": 1, "noise_scale": v}), "noise_scale"),
    ("a bad seed, many terms", lambda a, k: (([1.0] * 10, [a[1][0]] * 10), {"seed": "1"}), TypeError, ("seed", "str")),
    ("a bad noise_scale, many terms",
     lambda a, k: (([1.0] * 10, [a[1][0]] * 10), {"seed": 1, "noise_scale": "1"}), TypeError, ("noise_scale", "str")),
    ("out over the seed", _over("seed", 2), ValueError, ("out", "overlap")),
    ("out over the seed, many terms", _over("seed", 10), ValueError, ("out", "overlap")),
    ("out over the step", _over("step", 2), ValueError, ("out", "overlap")),
    *_bad_table(lambda a, t, other: ([t, other], [a[1][0], a[1][0]]), "coefficients[0]"),
    ("tables of different lengths",
     lambda a, k: (([torch.rand(5), torch.rand(4)], [a[1][0], a[1][0]]), {"step": torch.tensor([0])}), ValueError,
     ("coefficients[1]", "steps 5", "(4,)")),
    ("out of another shape, many terms", lambda a, k: (([1.0] * 10, [a[1][0]] * 10), {"out": a[1][0][:0]}), ValueError,
     ("out", "shape")),
    ("a bad tensor far back", lambda a, k: (([1.0] * 10, [*[a[1][0]] * 9, None]), k), TypeError, ("tensors[9]",)),
    ("no tensors", lambda a, k: (([], []), k), ValueError, ("tensors", "at least one")),
    ("too few coefficients", lambda a, k: ((a[0][1:], a[1]), k), ValueError, ("coefficients", "one per tensor")),
    ("tensors is no list", lambda a, k: ((a[0], 3), k), TypeError, ("tensors", "list")),
    ("a tensor of another shape", lambda a, k: (([*a[0], 1.0], [*a[1], _other_shape(a[1][0])]), k), ValueError,
     ("tensors[", "shape")),
    *_bad_number(lambda v: lambda a, k: (([v, 1.0], [a[1][0], a[1][0]]), k), "coefficients[0]"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------- benchmark shapes and peers

_SIZES = {"(1,4,64,64)": (1, 4, 64, 64), "(8,4,128,128)": (8, 4, 128, 128), "(16,16,256,256)": (16, 16, 256, 256)}


def _shapes(make: Callable[..., reg.Call], count: int) -> dict[str, Any]:
    def call(size: tuple[int, ...]) -> Callable[..., reg.Call]:
        return lambda dtype, device: make(*(dense(size, dtype, device, i) for i in range(count)))

    return {name: call(size) for name, size in _SIZES.items()}


def _scaling(make: Callable[..., reg.Call], count: int) -> dict[str, Any]:
    def call(side: int) -> Callable[..., reg.Call]:
        return lambda dtype, device: make(*(dense((1, 4, side, side), dtype, device, i) for i in range(count)))

    return {"side of the latent": (2.0, {side: call(side) for side in (32, 64, 128, 256, 512, 1024)})}


def _diffusers_ddim(x: Any, pred: Any, alpha_bar: float, alpha_bar_next: float, **options: Any) -> Callable[[], Any]:
    """`DDIMScheduler.step` of diffusers over one step between these levels; no guidance, no flow type."""
    from diffusers import DDIMScheduler

    if isinstance(alpha_bar, torch.Tensor) or "uncond" in options or options.get("prediction") == "flow":
        raise ValueError("one level for the whole batch, no guidance, no flow prediction")
    kind = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}[options.get("prediction", "epsilon")]
    # Two training steps whose cumulative products are exactly the two levels, and one inference step between them.
    betas = [1 - alpha_bar_next, 1 - alpha_bar / alpha_bar_next]
    clip = options.get("clip_sample")
    scheduler = DDIMScheduler(
        num_train_timesteps=2, trained_betas=betas, prediction_type=kind, clip_sample=clip is not None,
        clip_sample_range=clip or 1.0, set_alpha_to_one=False,
    )  # fmt: skip
    scheduler.set_timesteps(2)
    if options.get("eta", 0.0) > 0:
        return lambda: scheduler.step(pred, 1, x, eta=options["eta"], variance_noise=options["noise"]).prev_sample
    return lambda: scheduler.step(pred, 1, x).prev_sample


reg.add(
    reg.OpSpec(
        name="linear_update",
        function=update.linear_update,
        reference=update.linear_update_reference,
        example=_example_linear,
        lower=lambda coefficients, tensors, *, seed=None, noise_scale=1.0, step=None: _lower(
            "linear_update",
            update._sequence("linear_update", "coefficients", coefficients, 0 if step is None else 1)[: len(tensors)]
            + ([] if seed is None else [noise_scale]),
            tensors,
            None,
            step,
            seed,
        ),
        bound=_bound_linear,
        grad_bound=_grad_bound_linear,
        differentiable=tuple(f"tensors[{i}]" for i in range(11)),
        growth=lambda coefficients, tensors, **_: float(len(tensors)),
        bad=_BAD_LINEAR,
        bytes=lambda coefficients, tensors, **_: nbytes(*tensors) + nbytes(tensors[0]),
        flops=lambda coefficients, tensors, **_: 2 * len(tensors) * tensors[0].numel(),
        shapes=_shapes(lambda *t: (([0.7, 0.5, -0.2, 0.1], list(t)), {}), 4),
        scaling=_scaling(lambda *t: (([0.7, 0.5, -0.2, 0.1], list(t)), {}), 4),
        take=_take_update,
        large="(8,4,128,128)",
        inplace=None,  # tensors come as a list
    )
)

reg.add(
    reg.OpSpec(
        name="euler_step",
        function=update.euler_step,
        reference=update.euler_step_reference,
        example=_example_euler,
        lower=lambda x, velocity, dt, *, uncond=None, guidance_scale=1.0, step=None: _lower(
            "euler_step",
            [1.0, dt] if uncond is None else [1.0, dt * guidance_scale, dt * (1.0 - guidance_scale)],
            [x, velocity] if uncond is None else [x, velocity, uncond],
            None,
            step,
        ),
        bound=_bound_euler,
        grad_bound=_grad_bound_euler,
        differentiable=("x", "velocity", "uncond"),
        growth=lambda *_, **__: 4.0,
        bad=[
            ("velocity of another shape", _replace(1, _other_shape), ValueError, ("velocity", "shape")),
            ("velocity on another device", _replace(1, lambda t: t.to("meta")), ValueError, ("velocity", "meta")),
            ("x is None", _replace(0, lambda t: None), TypeError, ("x", "Tensor")),
            *_bad_number(_set(2), "dt"), *_BAD_STEP, *_bad_table(lambda a, t, _: (*a[:2], t), "dt"),
            *_BAD_OUT,
        ],
        bytes=lambda x, velocity, dt, *, uncond=None, **_: nbytes(x, velocity, uncond) + nbytes(x),
        flops=lambda x, *_, uncond=None, **__: (2 if uncond is None else 4) * x.numel(),
        shapes=_shapes(lambda x, v, u: ((x, v, 0.02), {"uncond": u, "guidance_scale": 4.0}), 3),
        scaling=_scaling(lambda x, v, u: ((x, v, 0.02), {"uncond": u, "guidance_scale": 4.0}), 3),
        take=_take_update,
        large="(8,4,128,128)",
    )
)  # fmt: skip

reg.add(
    reg.OpSpec(
        name="ddim_step",
        function=update.ddim_step,
        reference=update.ddim_step_reference,
        example=_example_ddim,
        lower=lambda x, pred, ab, ab_next, *, prediction="epsilon", eta=0.0, noise=None, seed=None, uncond=None,
        guidance_scale=1.0, clip_sample=None, step=None: _lower(
            "ddim_step", [ab, ab_next], [t for t in (x, pred, uncond, noise if eta > 0 else None) if t is not None],
            (update.PREDICTIONS[prediction], eta, 1.0 if uncond is None else guidance_scale, uncond is not None,
             eta > 0 and noise is not None, -1.0 if clip_sample is None else clip_sample),
            step, seed if eta > 0 else None,
        ),
        bound=_bound_ddim,
        grad_bound=_grad_bound_ddim,
        differentiable=("x", "pred", "noise", "uncond"),
        growth=lambda *_, **__: 8.0,
        bad=[
            ("pred of another shape", _replace(1, _other_shape), ValueError, ("pred", "shape")),
            ("pred is a list", _replace(1, lambda t: [1.0]), TypeError, ("pred", "Tensor", "list")),
            ("alpha_bar above 1", _set(2)(1.5), ValueError, ("alpha_bar", "[0, 1]", "1.5")),
            ("alpha_bar 0 with epsilon",
             lambda a, k: ((*a[:2], 0.0, 0.5), {**k, "prediction": "epsilon"}), ValueError, ("alpha_bar", "> 0")),
            ("alpha_bar 1 with sample",
             lambda a, k: ((*a[:2], 1.0, 0.5), {**k, "prediction": "sample"}), ValueError, ("alpha_bar", "< 1")),
            *_bad_number(_set(2), "alpha_bar"), *_bad_number(_set(3), "alpha_bar_next"),
            ("unknown prediction", _option(prediction="score"), ValueError, ("prediction", "'score'")),
            ("negative eta", _option(eta=-0.1), ValueError, ("eta", "-0.1")),
            ("eta without noise", _option(eta=0.5, noise=None), ValueError, ("noise", "seed", "eta > 0")),
            ("noise and a seed", lambda a, k: (a, {**k, "eta": 0.5, "noise": a[0], "seed": 1}), ValueError,
             ("seed", "None beside noise", "int")),
            *_bad_seed(eta=0.5), *_BAD_STEP, *_bad_table(lambda a, t, other: (*a[:2], t, other), "alpha_bar"),
            ("negative clip_sample", _option(clip_sample=-1.0), ValueError, ("clip_sample", "-1")),
            *_BAD_OUT,
        ],
        bytes=lambda x, pred, *_, uncond=None, noise=None, **__: nbytes(x, pred, uncond, noise) + nbytes(x),
        flops=lambda x, *_, **__: 6 * x.numel(),
        shapes={
            **_shapes(lambda x, e: ((x, e, 0.3, 0.5), {}), 2),
            "(8,4,128,128) guided, clipped": lambda dtype, device: (
                (*(dense((8, 4, 128, 128), dtype, device, i) for i in range(2)), 0.3, 0.5),
                {"uncond": dense((8, 4, 128, 128), dtype, device, 2), "guidance_scale": 4.0, "clip_sample": 1.0},
            ),
        },
        scaling=_scaling(lambda x, e: ((x, e, 0.3, 0.5), {}), 2),
        peers={"diffusers": _diffusers_ddim},
        take=_take_update,
        large="(8,4,128,128)",
    )
)  # fmt: skip


def _lower(
    op: str, coefficients: Any, terms: Any, rule: Any, step: Any, seed: Any = None
) -> tuple[Any, tuple[Any, ...]]:
    checked = update._check(op, coefficients, terms, rule, step, seed)
    values = [0.0 if isinstance(c, torch.Tensor) else c for c in checked]
    tables = [c if isinstance(c, torch.Tensor) else None for c in checked]
    source = update._source(step, seed)
    return torch.ops.fastdiff.update.default, (terms, values, tables, *(rule or update._LINEAR), *source)
