"""Sampling with models, arguments and plans at the edge of what is allowed: the right numbers, or an error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.samplers import guidance, log_likelihood, make_plan, sample, schedules, solve

SCHEDULE = schedules.vp("scaled_linear", spacing="trailing")


def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
    shift = 0.0 if cond is None else 0.1 * cond.view(-1, *[1] * (x.dim() - 1))
    return 0.3 * x + shift


def noise(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 2, 4, 4)), generator=torch.Generator().manual_seed(0))


def conditions() -> Tensor:
    return torch.arange(3.0) + 1


@pytest.mark.parametrize("solver", ["ddim", "adaptive"])
@pytest.mark.parametrize("form", ["CFG", "AutoGuidance", "Composed"])
def test_a_reused_buffer_is_not_taken_for_two_predictions(solver: str, form: str) -> None:
    buffer = torch.empty(3, 2, 4, 4)

    def reusing(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return buffer.copy_(model(x, t, cond))

    how = {
        "CFG": guidance.CFG(3.0),
        "AutoGuidance": guidance.AutoGuidance(reusing, conditional=False),
        "Composed": guidance.Composed([conditions(), None], [2.0, -1.0]),
    }[form]
    with pytest.raises(ValueError, match="memory of its own"):
        sample(reusing, noise(), solver=solver, schedule=SCHEDULE, steps=3, cond=conditions(), guidance=how)


def test_a_model_may_give_back_its_input_for_each_prediction_of_guidance() -> None:
    options: dict[str, Any] = {"schedule": SCHEDULE, "steps": 4, "cond": conditions(), "guidance_scale": 3.0}
    for solver in ("ddim", "dpmpp_2m", "rk4"):
        expected = sample(lambda x, t, c: x.clone(), noise(), solver=solver, **options)
        assert torch.equal(sample(lambda x, t, c: x, noise(), solver=solver, **options), expected)


def test_conditions_without_a_row_for_every_sample_are_asked_one_by_one() -> None:
    for c, u in ((torch.ones(1), torch.zeros(1)), (torch.tensor(1.0), torch.tensor(0.0))):
        got = sample(model, noise(), schedule=SCHEDULE, steps=2, cond=c, uncond=u, guidance_scale=2.0)
        rows = {"cond": torch.ones(3), "uncond": torch.zeros(3)}
        torch.testing.assert_close(got, sample(model, noise(), schedule=SCHEDULE, steps=2, guidance_scale=2.0, **rows))


def test_a_model_that_writes_into_its_times_changes_no_later_run() -> None:
    def writing(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return 0.3 * x * t.mul_(0.001).view(-1, 1, 1, 1)

    plan = make_plan("ddim", SCHEDULE, 4)
    assert torch.equal(sample(writing, noise(), plan=plan), sample(writing, noise(), plan=plan))


def test_a_plan_first_run_in_inference_mode_serves_models_that_need_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)

    def guided(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad((x.square() * t.view(-1, 1, 1, 1) * weight).sum() / 1000, x)
        return gradient

    plan = make_plan("ddim", SCHEDULE, 2)
    with torch.inference_mode():
        sample(model, noise(), plan=plan)
    assert sample(guided, noise(), plan=plan).isfinite().all()


def test_the_weak_model_of_autoguidance_is_evaluated_too() -> None:
    class Weak(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            assert not self.training
            return 0.5 * x

    weak = Weak()
    for solver in ("ddim", "adaptive"):
        sample(model, noise(), solver=solver, schedule=SCHEDULE, steps=2, guidance=guidance.AutoGuidance(weak))
    assert weak.training


def test_an_inversion_may_be_clipped() -> None:
    plan = make_plan("ddim", SCHEDULE, 5).reversed()  # starts where sigma = 0, which a plan for data cannot
    clipped = sample(model, noise(), plan=plan, clip_sample=1e9)
    torch.testing.assert_close(clipped, sample(model, noise(), plan=plan), rtol=1e-3, atol=1e-3)


def test_thresholds_of_single_numbers() -> None:
    x = noise(3)
    got = sample(model, x, solver="ddim", schedule=SCHEDULE, steps=2, threshold=0.9)
    torch.testing.assert_close(got, sample(model, x[:, None], solver="ddim", schedule=SCHEDULE, steps=2,
                                           threshold=0.9)[:, 0])  # fmt: skip


def test_arguments_that_would_be_ignored_are_refused() -> None:
    run: Callable[..., Tensor] = lambda **options: sample(model, noise(), schedule=SCHEDULE, **options)  # noqa: E731
    for options, kind, word in (
        ({"solver": "adaptive", "clip_sample": 1.0}, ValueError, "clip_sample"),
        ({"solver": "adaptive", "threshold": 0.9}, ValueError, "threshold"),
        ({"solver": "adaptive", "callback": print}, ValueError, "callback"),
        ({"plan": make_plan("ddim", SCHEDULE, 2), "eta": 1.0}, TypeError, "eta"),
    ):
        with pytest.raises(kind, match=word):
            run(**options)
    with pytest.raises(ValueError, match="rescale"):
        sample(model, noise(3, 1), schedule=SCHEDULE, cond=conditions(), guidance=guidance.CFG(rescale=0.5))
    with pytest.raises(ValueError, match="a tensor, got tuple"):
        sample(lambda x, t, c: (x,), noise(), schedule=SCHEDULE)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "schedule",
    [schedules.vp("cosine", 100, "karras", "min"), schedules.vp(torch.linspace(1e-4, 0.2, 50), 50, rho=3.0),
     schedules.vp("scaled_linear", beta_end=0.02, zero_terminal_snr=True), schedules.edm(0.01, 20.0, 5.0, final="min"),
     schedules.flow(3.0), schedules.from_times(schedules.flow(), [0.0, 0.3, 1.0])],
    ids=repr,
)  # fmt: skip
def test_plans_are_copied_and_pickled(schedule: schedules.Schedule) -> None:
    plan = make_plan("restart", schedule, 7, intervals=((0.06, 0.3, 2, 3),), prediction="v")
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other.stages == plan.stages and other.step_times == plan.step_times
        assert other.options == plan.options and other.nfe == plan.nfe and other.initial_scale == plan.initial_scale
        assert repr(other.schedule) == repr(schedule)
        assert torch.equal(other.schedule.times(9), schedule.times(9))
        assert make_plan("rk4", other.schedule, 3, prediction="v").stages == make_plan(
            "rk4", schedule, 3, prediction="v"
        ).stages  # fmt: skip


def test_nothing_of_a_plan_can_be_written_to() -> None:
    plan = make_plan("ddim", SCHEDULE, 4, eta=0.0)
    plan.times.mul_(0.5)
    assert torch.equal(plan.times, SCHEDULE.times(4)) and torch.equal(plan.reversed().times, SCHEDULE.times(4).flip(0))
    with pytest.raises(TypeError):
        plan.options["eta"] = 1.0  # type: ignore[index]


def test_times_may_be_numbers_but_only_of_the_schedule() -> None:
    times = [999.0, 500.5, -1.0]
    assert make_plan("ddim", SCHEDULE, None, times=times).step_times == (999.0, 500.5, -1.0)
    for schedule, wrong in (
        (SCHEDULE, [5000.0, 500.0, -1.0]),
        (SCHEDULE, [999.0, -2.0]),
        (schedules.flow(), [0.0, 1.5]),
        (schedules.flow(), [0.0, float("nan")]),
        (schedules.edm(), [80.0, -1.0]),
    ):
        for call in (lambda s, t: make_plan("ddim", s, None, times=t), schedules.from_times):
            with pytest.raises(ValueError, match="times"):
                call(schedule, wrong)
    # More noise than a run of the schedule starts from is a time of it all the same.
    assert make_plan("ddim", schedules.edm(), None, times=[100.0, 0.0]).initial_scale == 100.0
    short = schedules.from_times(SCHEDULE, [500.0, -1.0])
    assert make_plan("ddim", short, None, times=times).step_times[0] == 999.0


def test_options_out_of_range_are_refused() -> None:
    rising = SCHEDULE.times(4).flip(0)
    for call, word in (
        (lambda: make_plan("ddim", SCHEDULE, 4, eta=-0.5), "eta"),
        (lambda: make_plan("ddim", SCHEDULE, 4, eta=2.0), "eta"),
        (lambda: make_plan("euler_ancestral", SCHEDULE, 4, eta=float("nan")), "eta"),
        (lambda: make_plan("ddim", SCHEDULE, None, times=rising, eta=1.0), "eta"),
        (lambda: make_plan("restart", SCHEDULE, 8, intervals=((0.3, 0.06, 2, 3),)), "intervals"),
        (lambda: make_plan("restart", SCHEDULE, 8, intervals=((0.06, 0.3, 2, -3),)), "intervals"),
        (lambda: make_plan("restart", SCHEDULE, 8, rho=0.0), "rho"),
        (lambda: schedules.vp("cosine", beta_end=0.3), "beta_end"),
        (lambda: schedules.vp([0.1] * 10, 10, beta_start=0.3), "beta_start"),
        (lambda: schedules.vp(beta_end=2.0), "beta_end"),
        (lambda: schedules.vp(num_train_timesteps=10.5), "num_train_timesteps"),  # type: ignore[arg-type]
        (lambda: schedules.vp(spacing="karras", rho=-3.0), "rho"),
        (lambda: schedules.flow(float("inf")), "shift"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_likelihood_of_models_of_every_habit(trace: str) -> None:
    def run(model: Callable[[Tensor, Tensor, Any], Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = noise(2, 1, 2, 2)
        return log_likelihood(model, x, SCHEDULE, trace=trace, rtol=1e-3, atol=1e-3, generator=generator).log_prob

    expected = run(lambda x, t, c: 0.5 * x)
    assert torch.equal(run(lambda x, t, c: torch.cat([0.5 * x, x], 1)), expected)  # predicts variances too
    torch.testing.assert_close(run(lambda x, t, c: (0.5 * x).bfloat16()), expected, rtol=0.05, atol=0.05)
    weight = torch.zeros(1, requires_grad=True)  # a prediction that does not depend on x has no divergence
    assert run(lambda x, t, c: weight.expand_as(x)).isfinite().all()
    with pytest.raises(ValueError, match="gradients"):  # and one whose dependence is hidden has an unknown one
        run(torch.no_grad()(lambda x, t, c: 0.5 * x))
    with pytest.raises(ValueError, match="prediction of shape"):
        run(lambda x, t, c: x[:1])


def test_the_adaptive_solver_may_keep_gradients() -> None:
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = noise(2, 3).double()
    end = lambda w: solve(lambda x, t, level: w * x, x, SCHEDULE, rtol=1e-8, atol=1e-8).final.sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(end(weight), weight)
    difference = (end(weight.detach() + 1e-4) - end(weight.detach() - 1e-4)) / 2e-4
    torch.testing.assert_close(gradient, difference, rtol=1e-4, atol=1e-6)
