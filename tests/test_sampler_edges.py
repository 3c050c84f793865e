"""Sampling with models, arguments and plans at the edge of what is allowed: the right numbers, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.samplers import guidance, make_plan, sample, schedules

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
