"""Schedulers of diffusers under `accelerate`: the numbers, state and results of the original, which is run beside."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.integrations import _diffusers_schedulers as fast_schedulers
from fastdiff.integrations import _scheduler_base as base
from fastdiff.integrations._swap import handler_of
from fastdiff.integrations.accelerate import accelerate, acceleration_report, restore

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
diffusers = pytest.importorskip("diffusers")

DDIM, EULER = "DDIMScheduler", "EulerDiscreteScheduler"
FLOW, DPM = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"
NAMES = (DDIM, EULER, FLOW, DPM)

# (class, configuration, options of step, number of steps)
CASES: list[tuple[str, dict[str, Any], dict[str, Any], int]] = [
    (DDIM, {}, {}, 6),
    (DDIM, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}, 5),
    (DDIM, {"clip_sample": False, "beta_schedule": "scaled_linear"}, {}, 5),
    (DDIM, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}, 5),
    (DDIM, {"prediction_type": "sample", "clip_sample_range": 0.5}, {"eta": 0.3}, 4),
    (DDIM, {"prediction_type": "sample", "clip_sample": False}, {}, 4),
    (DDIM, {"clip_sample": False}, {"eta": 1}, 4),
    (DDIM, {"beta_schedule": "squaredcos_cap_v2"}, {"eta": 0.5, "use_clipped_model_output": True}, 4),
    (DDIM, {"prediction_type": "v_prediction", "clip_sample": False}, {"use_clipped_model_output": True}, 4),
    (EULER, {}, {}, 6),
    (EULER, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}, {}, 5),
    (EULER, {"prediction_type": "sample", "timestep_spacing": "leading"}, {}, 4),
    (EULER, {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}, {"s_churn": 1.0, "s_noise": 1.01}, 5),
    (EULER, {"prediction_type": "v_prediction"}, {"s_churn": 9.0, "s_tmin": 0.5, "s_tmax": 20.0}, 5),
    (EULER, {"use_exponential_sigmas": True, "beta_schedule": "scaled_linear"}, {}, 4),
    (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0,
             "use_karras_sigmas": True}, {}, 4),
    (FLOW, {}, {}, 5),
    (FLOW, {"shift": 3.0, "stochastic_sampling": True}, {}, 5),
    (FLOW, {"invert_sigmas": True, "use_karras_sigmas": True}, {}, 4),
    (FLOW, {"use_dynamic_shifting": True}, {}, 4),
    (DPM, {"use_karras_sigmas": True}, {}, 16),
    (DPM, {"solver_order": 3, "prediction_type": "v_prediction"}, {}, 16),
    (DPM, {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False}, {}, 5),
    (DPM, {"solver_type": "heun", "euler_at_final": True, "prediction_type": "sample"}, {}, 6),
    (DPM, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {}, 6),
    (DPM, {"use_lu_lambdas": True, "solver_order": 1}, {}, 4),
    *((DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": order,
             "solver_type": kind, "prediction_type": prediction}, {}, 6)
      for order, kind, prediction in (
          (2, "midpoint", "epsilon"), (2, "heun", "sample"), (3, "midpoint", "v_prediction"))),
    *((DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": kind}, {}, 6)
      for order, kind in ((2, "midpoint"), (2, "heun"), (3, "midpoint"))),
    *((DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": kind}, {}, 6)
      for kind in ("midpoint", "heun")),
]  # fmt: skip
IDS = [
    f"{i}-{case[0][:5]}-" + ",".join(f"{k}={v}" for k, v in {**case[1], **case[2]}.items())
    for i, case in enumerate(CASES)
]


def make(name: str, steps: int = 0, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(**config)
    if steps:
        schedule(scheduler, steps)
    return scheduler


def schedule(scheduler: Any, steps: int) -> None:
    extra = {"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **extra)


def both(name: str, steps: int, **config: Any) -> tuple[Any, Any]:
    """The original and ours."""
    return make(name, steps, **config), accelerate(make(name, steps, **config))


def model(scheduler: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    """Some function of the state, of size 1 and of its type."""
    if hasattr(scheduler, "scale_model_input"):
        x = scheduler.scale_model_input(x, t)
    return (1.3 * x + 0.2).sin()


def tensors(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else list(result.to_tuple())


@contextmanager
def originals_fail(name: str) -> Iterator[None]:
    """What is ours must not come down to the original's step here."""
    cls = getattr(diffusers, name)
    step = cls.step
    cls.step = lambda *_, **__: pytest.fail("the original's step was called")
    try:
        yield
    finally:
        cls.step = step


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Makes a scheduler's original code work in float64, on the same schedule and noise."""

    def widen(scheduler: Any) -> Any:
        module = sys.modules[type(scheduler).__module__]

        class Wide:
            float32 = torch.float64

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

        def draw(shape: Any, *, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
            from diffusers.utils.torch_utils import randn_tensor

            return randn_tensor(shape, dtype=torch.float32, **kwargs).double()

        monkeypatch.setattr(module, "torch", Wide())
        monkeypatch.setattr(module, "randn_tensor", draw, raising=False)
        for key in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if key in vars(scheduler):
                setattr(scheduler, key, getattr(scheduler, key).double())
        return scheduler

    return widen


@pytest.mark.parametrize(("name", "config", "options", "steps"), CASES, ids=IDS)
def test_every_step_is_the_originals(
    name: str, config: Any, options: Any, steps: int, in_double: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, linear = [1.0], base.linear

    def watched(fast: Any, coefficients: list[float], terms: Any) -> Any:
        largest[0] = max(largest[0], *(abs(c) for c in coefficients))
        return linear(fast, coefficients, terms)

    monkeypatch.setattr(base, "linear", watched)
    slow, ours = both(name, steps, **config)
    draws = bool(options) or config.get("stochastic_sampling") or "sde" in config.get("algorithm_type", "")
    x = torch.randn(2, 3, 8, 8) * float(getattr(slow, "init_noise_sigma", 1.0))
    trajectory = []
    seeds = [torch.Generator().manual_seed(3) for _ in range(3)]

    def step(scheduler: Any, output: Any, t: Any, x: Any, seed: torch.Generator, **how: Any) -> Any:
        return scheduler.step(output, t, x, **options, **({"generator": seed} if draws else {}), **how)

    for i, t in enumerate(slow.timesteps):
        output = model(slow, x, t)
        if name == EULER:
            assert torch.equal(ours.scale_model_input(x, t), slow.scale_model_input(x, t))
        expected = step(slow, output, t, x, seeds[0], return_dict=i % 2 == 0)
        kept, largest[0] = (output.clone(), x.clone()), 1.0
        with originals_fail(name):
            got = step(ours, output, t, x, seeds[1], return_dict=i % 2 == 0)
        assert torch.equal(output, kept[0]) and torch.equal(x, kept[1])
        assert type(got) is type(expected) and len(tensors(got)) == len(tensors(expected))
        assert [r is output for r in tensors(got)] == [r is output for r in tensors(expected)]
        trajectory.append((output, t, x, tensors(expected), tensors(got), largest[0]))
        x = tensors(expected)[0]
    assert torch.equal(seeds[0].get_state(), seeds[1].get_state())
    assert slow.__dict__.get("_step_index") == ours.__dict__.get("_step_index")

    exact = in_double(make(name, steps, **config))
    if name == EULER:
        exact.is_scale_input_called = True
    for output, t, x, expected, got, factor in trajectory:
        true = tensors(step(exact, output.double(), t, x.double(), seeds[2], return_dict=False))
        size = factor * sum(v.abs().max().item() for v in (x, output, *true))
        for e, g, r in zip(expected, got, true, strict=True):
            assert g.dtype is e.dtype and g.shape == e.shape
            # A sum of at most five products in float32, of data that was rounded before: each at most half a unit.
            assert (g - r).abs().max().item() <= 8 * 2**-24 * size
            # The original rounds coefficients too: differences of logarithms, to a step's length.
            assert (g - e).abs().max().item() <= 1e-5 * size


@pytest.mark.parametrize(
    "dtypes", [("bfloat16",) * 2, ("float16",) * 2, ("bfloat16", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize("name", NAMES)
def test_types_of_results_and_errors_no_larger_than_the_originals(
    name: str, dtypes: tuple[str, str], in_double: Callable[[Any], Any]
) -> None:
    sample_dtype, output_dtype = (getattr(torch, d) for d in dtypes)
    config = {"clip_sample": False} if name == DDIM else {}
    slow, ours = both(name, 5, **config)
    x, trajectory = torch.randn(2, 3, 8, 8, dtype=sample_dtype), []
    for t in slow.timesteps:
        output = model(slow, x, t).to(output_dtype)
        model(ours, x, t)
        expected = tensors(slow.step(output, t, x))
        with originals_fail(name):
            got = tensors(ours.step(output, t, x))
        trajectory.append((output, t, x, expected, got))
        x = expected[0].to(sample_dtype)
    exact = in_double(make(name, 5, **config))
    exact.is_scale_input_called = True
    for output, t, x, expected, got in trajectory:
        true = tensors(exact.step(output.double(), t, x.double()))
        for e, g, r in zip(expected, got, true, strict=True):
            assert g.dtype is e.dtype
            unit = torch.finfo(g.dtype).eps * r.abs() + 2**-22 * (x.abs().max() + r.abs().max())
            worst = max((e - r).abs().max().item(), unit.max().item())
            assert (g - r).abs().max().item() <= worst


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        (DDIM, {"clip_sample": False}, {"eta": 1.0}),
        (EULER, {}, {"s_churn": 2.0}),
        (FLOW, {"stochastic_sampling": True}, {}),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, {}),
    ],
)
def test_noise_of_16_bit_types_is_the_originals(
    name: str, config: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, output = (torch.randn(2, 3, 8, 8, dtype=torch.bfloat16) for _ in range(2))
    results, states, drawn = [], [], []
    pair, draw = both(name, 8, **config), base.library().randn

    def watched(shape: Any, **how: Any) -> torch.Tensor:
        drawn.append((shape, how["dtype"], how["device"]))
        return draw(shape, **how)

    monkeypatch.setattr(base.library(), "randn", watched)
    monkeypatch.setattr(sys.modules[type(pair[0]).__module__], "randn_tensor", watched)
    for s in pair:
        seed = torch.Generator().manual_seed(5)
        s._step_index = 3
        model(s, x, s.timesteps[3])
        results.append(s.step(output, s.timesteps[3], x, generator=seed, **options)[0])
        states.append(seed.get_state())
    assert torch.equal(*states) and len(drawn) == 2 and drawn[0] == drawn[1]
    size = results[0].abs().max().item()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2**-6 * size)  # two roundings of the original


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_loop_restored_and_made_fast_in_the_middle(name: str) -> None:
    slow, ours = both(name, 12)
    x = y = torch.randn(2, 3, 8, 8)
    for i, (t, u) in enumerate(zip(slow.timesteps, ours.timesteps, strict=True)):
        if i in (3, 8):
            restore(ours)
            assert type(ours) is getattr(diffusers, name)
        elif i == 5:
            accelerate(ours)
        elif i == 10:
            ours = copy.deepcopy(accelerate(ours))
        x, y = slow.step(model(slow, x, t), t, x)[0], ours.step(model(ours, y, u), u, y)[0]
    torch.testing.assert_close(y, x, rtol=0, atol=1e-4 * x.abs().max().item())
    for key in ("_step_index", "lower_order_nums", "num_inference_steps", "is_scale_input_called"):
        assert vars(slow).get(key) == vars(ours).get(key)
    for a, b in zip(vars(slow).get("model_outputs", []), vars(ours).get("model_outputs", []), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_caller_may_change_between_steps(name: str) -> None:
    """The number of the step, tables, the configuration, the schedule: whatever it is, the original sees it too."""
    slow, ours = both(name, 20)

    def compare(at: int) -> None:
        x, output = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
        results = []
        for s in (slow, ours):
            model(s, x, s.timesteps[at])
            results.append(tensors(s.step(output, s.timesteps[at], x)))
        for e, g in zip(*results, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-4 * (1 + e.abs().max().item()))

    def change(function: Callable[[Any], Any]) -> None:
        for s in (slow, ours):
            function(s)

    tables = "alphas_cumprod" if name == DDIM else "sigmas"
    compare(0)
    change(lambda s: vars(s).update(_step_index=7))
    compare(7)
    compare(2)  # out of order: those with a counter go on from it
    change(lambda s: getattr(s, tables).mul_(0.9))
    compare(9)
    change(lambda s: setattr(s, tables, getattr(s, tables) * 0.9))
    compare(10)
    change(lambda s: schedule(s, 7))
    compare(0)
    compare(1)
    if name != FLOW:
        change(lambda s: s.register_to_config(prediction_type="v_prediction"))
        compare(2)
        change(lambda s: schedule(s, 9))
        compare(0)
    change(lambda s: schedule(s, 9))
    if name != DDIM:
        change(lambda s: s.set_begin_index(4))
        compare(4)
        assert ours.step_index == slow.step_index == 5 and ours.begin_index == 4
    change(lambda s: vars(s).update(_step_index=8))
    compare(8)
    if name == DDIM:
        change(lambda s: s.timesteps.mul_(2).clamp_(max=900))
        compare(3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_ours_is_the_originals(name: str) -> None:
    """float64, tensors that broadcast, subclasses, errors: the very results and errors of the original."""
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (output.double(), x.double(), {}),
        (output[:1], x, {}),
        (output, x[:1], {}),
        (output, x[:, :2], {}),
        (output.as_subclass(type("Odd", (torch.Tensor,), {})), x, {}),
    ]
    if name == DDIM:
        noise = torch.randn(2, 3, 4, 4)
        calls += [(output, x, {"eta": 1.0, "variance_noise": noise[:1]}), (output, x, {"eta": 1.5})]
        calls += [(output, x, {"eta": 1.0, "variance_noise": noise, "generator": torch.Generator()})]
    if name == FLOW:
        calls.append((output[0], x[0], {"per_token_timesteps": torch.full((3, 4), 900.0)}))
    for out, state, options in calls:
        results = []
        for s in both(name, 5):
            t = s.timesteps[1]
            if name == EULER:
                s.scale_model_input(state, t)
            try:
                results.append(s.step(out, t, state, **options, return_dict=False)[0])
            except (RuntimeError, ValueError) as error:
                results.append(error)
        if isinstance(results[0], Exception):
            assert type(results[0]) is type(results[1]) and str(results[0]) == str(results[1])
        else:
            assert results[0].dtype is results[1].dtype and type(results[0]) is type(results[1])
            assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


def test_errors_are_the_originals() -> None:
    x = torch.zeros(1, 1, 2, 2)
    for name in (EULER, FLOW):
        with pytest.raises(ValueError, match="integer indices"):
            accelerate(make(name, 4)).step(x, 3, x)
    for name in (DDIM, DPM):
        with pytest.raises(ValueError, match="set_timesteps"):
            accelerate(make(name)).step(x, 3, x)
    with pytest.raises(IndexError):
        accelerate(make(DDIM, 4)).step(x, 1000, x)
    late = accelerate(make(FLOW, 2))
    for t in late.timesteps:
        late.step(x, t, x)
    with pytest.raises(IndexError):
        late.step(x, late.timesteps[0], x)


def settings(scheduler: Any) -> dict[str, Any]:
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_copied(name: str, tmp_path: Path) -> None:
    slow, ours = make(name), accelerate(make(name))
    assert type(ours).__name__ == name and type(ours).__module__ == type(slow).__module__
    ours.save_pretrained(tmp_path)
    assert settings(type(slow).from_pretrained(tmp_path)) == settings(slow)
    again = type(ours).from_config(ours.config)
    assert handler_of(again) is not None and settings(again) == settings(slow)
    assert [c.__name__ for c in ours.compatibles] == [c.__name__ for c in slow.compatibles]
    for method in ("step", "set_timesteps"):  # pipelines look for parameters
        theirs = inspect.signature(getattr(slow, method)).parameters
        assert list(inspect.signature(getattr(ours, method)).parameters) == list(theirs)
    schedule(ours, 5)
    x = torch.randn(1, 2, 4, 4)
    ours.step(model(ours, x, ours.timesteps[0]), ours.timesteps[0], x)
    table = "alphas_cumprod" if name == DDIM else "sigmas"
    for copied in (copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        getattr(ours, table).mul_(0.5)  # seen by the original from now on; the copy's table has versions of its own
        other = copied(ours)
        assert type(other) is type(ours)
        results = [s.step(model(s, x, s.timesteps[1]), s.timesteps[1], x)[0] for s in (other, ours)]
        assert torch.equal(*results)


def test_reports_and_refusals() -> None:
    scheduler = make(DPM)
    _, report = accelerate(scheduler, return_report=True)
    assert [e.kind for e in report.replaced] == [DPM] and not report.refused
    first = type(scheduler)
    assert type(accelerate(scheduler)) is first
    assert type(restore(restore(scheduler))) is getattr(diffusers, DPM)

    def reason(part: Any) -> str:
        before = type(part)
        [entry] = accelerate(part, return_report=True)[1].refused
        assert type(part) is before
        return entry.why_not or ""

    assert "thresholding" in reason(make(DDIM, thresholding=True))
    assert "learned" in reason(make(DPM, variance_type="learned"))
    wrapped = make(FLOW)
    wrapped.step = lambda *_: None
    assert "somebody else's" in reason(wrapped)
    original = getattr(diffusers, EULER)

    class Other(original):  # type: ignore[misc, valid-type]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    class OtherPart(getattr(diffusers, DPM)):  # type: ignore[misc]
        def convert_model_output(self, *args: Any, **kwargs: Any) -> Any:
            return super().convert_model_output(*args, **kwargs)

    for cls in (Other, OtherPart):
        with pytest.raises(TypeError):  # nothing that we know
            accelerate(cls())


def test_versions_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = getattr(diffusers, DDIM)
    step = cls.step
    with monkeypatch.context() as patch:
        patch.setattr(cls, "step", lambda self, model_output, timestep, sample, return_dict=True: None)
        assert "unknown version" in (acceleration_report(make(DDIM)).refused[0].why_not or "")

    class Newer(cls):  # type: ignore[misc, valid-type]
        """The same arguments, other numbers."""

        @staticmethod
        def half(result: Any) -> Any:
            return (0.5 * result[0], *result[1:])

    def slightly_other(
        self: Any, model_output: Any, timestep: Any, sample: Any, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Any = None, variance_noise: Any = None,
        return_dict: bool = True,
    ) -> Any:  # fmt: skip
        return Newer.half(step(self, model_output, timestep, sample, return_dict=False))

    monkeypatch.setattr(cls, "step", slightly_other)
    base._differs.cache_clear()
    try:
        assert "numbers differ" in (acceleration_report(make(DDIM)).refused[0].why_not or "")
    finally:
        base._differs.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_layouts_modes(name: str) -> None:
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def once(s: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        t = s.timesteps[1]
        if name == EULER:
            s.scale_model_input(x, t)
        return s.step(output, t, x)[0]

    def fresh() -> tuple[Any, Any]:
        return both(name, 5, **({"clip_sample": False} if name == DDIM else {}))

    grads = []
    for s in fresh():
        leaves = x.clone().requires_grad_(), output.clone().requires_grad_()
        once(s, *leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)

    slow, ours = fresh()
    expected = once(slow, x, output)
    last = x.contiguous(memory_format=torch.channels_last)
    with originals_fail(name):
        torch.testing.assert_close(once(ours, last, output), expected, rtol=1e-4, atol=1e-4)

    def written_over(s: Any) -> torch.Tensor:
        schedule(s, 5)
        assert not s.timesteps.is_inference()  # or nobody could tell that it was written over
        once(s, x, output)
        s._step_index = 1
        for key in {"sigmas", "alphas_cumprod"} & set(vars(s)):
            getattr(s, key).mul_(0.8)
        return once(s, x, output)

    for mode in (torch.inference_mode, torch.no_grad):
        slow, ours = fresh()
        with mode(), originals_fail(name):
            got = written_over(ours)
        torch.testing.assert_close(got, written_over(slow), rtol=1e-4, atol=1e-4)
    with fastdiff.use_backend("reference"):
        torch.testing.assert_close(once(fresh()[1], x, output), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [DDIM, FLOW])
def test_compiled(name: str) -> None:
    slow, ours = both(name, 5)
    x, t = torch.randn(1, 2, 4, 4), slow.timesteps[1]
    results = []
    for s in (slow, ours):
        s._step_index = 1
        results.append(torch.compile(lambda x, s=s: s.step(x.sin(), t, x, return_dict=False)[0], backend="eager")(x))
    assert torch.equal(*results)


def test_timesteps_on_a_device_are_not_read() -> None:
    whole = torch.arange(10, 0, -1)
    numbers = whole.tolist()
    for i, t in enumerate(whole):
        assert base.element(t, whole, numbers) == numbers[i]
    known = [-n for n in numbers]  # shows that nothing is read
    assert base.element(whole[3:][2], whole, known) == -numbers[5]
    assert base.element(whole[4].clone(), whole, known) == numbers[4]
    assert base.element(whole[4].int(), whole, known) == numbers[4]


def test_a_pipeline_and_the_handlers_of_its_schedulers() -> None:
    pytest.importorskip("transformers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = diffusers.DDIMPipeline(unet.eval(), make(DDIM))
    pipeline.set_progress_bar_config(disable=True)

    def pictures() -> Any:
        seed = torch.Generator().manual_seed(1)
        return pipeline(batch_size=2, generator=seed, num_inference_steps=4, eta=0.5, output_type="np").images

    expected = pictures()
    _, report = accelerate(pipeline, return_report=True)
    assert "scheduler" in [e.path for e in report.replaced]
    assert abs(pictures() - expected).max() <= 1e-4
    restore(pipeline)
    assert abs(pictures() - expected).max() == 0
    assert len({h.name for h in fast_schedulers.HANDLERS}) == len(fast_schedulers.HANDLERS)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_a_schedule_that_is_not_finite_is_the_originals() -> None:
    """One step of Karras's levels ends in a division of zero by zero once it is stretched."""
    theirs, ours = both(FLOW, 1, use_karras_sigmas=True, shift_terminal=0.1)
    x = torch.ones(1, 1, 2, 2)
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(0)
        assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.isnan().all()
