"""Rectified flow, couplings, reflow, and runs that survive an interruption bitwise."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff.models import DiT
from fastdiff.training import RectifiedFlowModel, couple, generate_pairs, reflow, train_rectified_flow
from fastdiff.training._files import replacing


class Mlp(nn.Module):
    """v(x, t) on [B,2]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


class LabelShift(nn.Module):
    """The flow x_1 = x_0 + label, whose pairs are known; the weight is there to have something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return self.weight * cond[:, None].to(x).expand_as(x)


class Recording(RectifiedFlowModel):
    """Keeps the pairs and conditions that it is trained on."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.conditions: list[Tensor | None] = []

    def forward_flow(self, x_0: Tensor, x_1: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        self.pairs.append((x_0.clone(), x_1.clone()))
        return super().forward_flow(x_0, x_1, t)

    def forward(self, x_t: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        self.conditions.append(condition)
        return super().forward(x_t, t, condition)


def mlp_flow(seed: int = 0) -> RectifiedFlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RectifiedFlowModel(Mlp())


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def corners(n: int) -> tuple[Tensor, Tensor]:
    """Points near (+-2, +-2) and which corner they are near."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % 4
    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    return centres[labels] + 0.1 * torch.randn(n, 2, generator=generator), labels


# --------------------------------------------------------------------------------------------------------- the flow


def test_forward_flow_is_the_straight_path_from_noise_to_data() -> None:
    flow = RectifiedFlowModel(Mlp())
    generator = torch.Generator().manual_seed(0)
    x_0, x_1 = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x_t, velocity = flow.forward_flow(x_0, x_1, t)
    torch.testing.assert_close(velocity, x_1 - x_0)
    torch.testing.assert_close(x_t[0], x_0[0])
    torch.testing.assert_close(x_t[1], 0.3 * x_1[1] + 0.7 * x_0[1])
    torch.testing.assert_close(x_t[2], x_1[2])
    torch.testing.assert_close(flow.forward_flow(x_0, x_1, 0.25)[0], 0.25 * x_1 + 0.75 * x_0)
    with pytest.raises(ValueError, match=r"x_1.*\[3, 2, 4\].*\[2, 2, 4\]"):
        flow.forward_flow(x_0, x_1[:2], t)
    with pytest.raises(ValueError, match=r"t: expected a number or shape \[3\], got \[2\]"):
        flow.forward_flow(x_0, x_1, t[:2])


def test_training_learns_a_distribution() -> None:
    data, _ = corners(512)
    flow = train_rectified_flow(mlp_flow(), data, steps=500, batch_size=128, lr=3e-3, progress=False)
    samples = flow.sample(normal(512, torch.Generator().manual_seed(1)), 30)
    centres = samples.sign() * 2
    assert ((samples - centres).norm(dim=1) < 1.0).float().mean() > 0.9
    assert all(
        60 < count < 200 for count in ((samples > 0).long() @ torch.tensor([1, 2])).bincount(minlength=4).tolist()
    )


# -------------------------------------------------------------------------------------------------------- couplings


def test_ot_is_the_best_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, x_1 = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    got = couple(x_0, x_1, "ot")
    costs = {p: (x_0[list(p)] - x_1).square().sum().item() for p in itertools.permutations(range(6))}
    assert tuple(got.tolist()) == min(costs, key=costs.__getitem__)
    assert costs[tuple(got.tolist())] < costs[tuple(range(6))]
    assert couple(x_0, x_1, "independent").tolist() == list(range(6))


def test_ot_exchanges_only_among_equal_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, x_1 = torch.randn(64, 1, 2, generator=generator), torch.randn(64, 1, 2, generator=generator)
    labels = torch.randint(0, 3, (64,), generator=generator)
    p = couple(x_0, x_1, "ot", labels=labels)
    assert p.sort().values.tolist() == list(range(64))
    assert torch.equal(labels[p], labels)
    for label in range(3):
        members = labels == label
        alone = couple(x_0[members], x_1[members], "ot")
        assert torch.equal(x_0[members][alone], x_0[p][members])
    assert not torch.equal(p, couple(x_0, x_1, "ot"))


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_training_uses_every_sample_once_an_epoch_and_carries_its_label(coupling: str) -> None:
    data, labels = corners(48)
    flow = Recording(LabelShift())
    train_rectified_flow(flow, data, labels=labels, coupling=coupling, steps=6, batch_size=24, progress=False, seed=3)
    for first in (0, 2, 4):
        epoch = torch.cat([pair[1] for pair in flow.pairs[first : first + 2]])
        assert torch.equal(epoch.sort(dim=0).values, data.sort(dim=0).values)
    for (_, x_1), condition in zip(flow.pairs, flow.conditions, strict=True):
        expected = torch.cdist(x_1, data).argmin(1)
        assert condition is not None
        assert torch.equal(condition, labels[expected])


def test_ot_training_gives_every_label_the_noise_that_was_drawn_for_it() -> None:
    data, labels = corners(64)
    drawn: list[Tensor] = []

    def source(n: int, generator: torch.Generator) -> Tensor:
        drawn.append(normal(n, generator))
        return drawn[-1]

    flow = Recording(LabelShift())
    train_rectified_flow(
        flow, data, labels=labels, coupling="ot", source=source, steps=2, batch_size=32, progress=False
    )
    for (x_0, _), condition, noise in zip(flow.pairs, flow.conditions, drawn, strict=True):
        assert condition is not None
        assert not torch.equal(x_0, noise)
        for label in range(4):
            got, expected = x_0[condition == label], noise[condition == label]
            assert torch.equal(got[got[:, 0].argsort()], expected[expected[:, 0].argsort()])


def test_ot_training_pairs_are_cheaper_than_independent_ones() -> None:
    data, _ = corners(256)
    costs = {}
    for coupling in ("independent", "ot"):
        flow = Recording(Mlp())
        train_rectified_flow(flow, data, coupling=coupling, steps=4, batch_size=64, progress=False, source=normal)
        costs[coupling] = sum((a - b).square().sum(1).mean().item() for a, b in flow.pairs) / 4
    assert costs["ot"] < 0.7 * costs["independent"]


def test_unavailable_couplings_say_so_before_training() -> None:
    flow, (data, _) = Recording(Mlp()), corners(8)
    with pytest.raises(NotImplementedError, match="independent, ot"):
        train_rectified_flow(flow, data, coupling="sinkhorn", steps=1, progress=False)
    with pytest.raises(ValueError, match=r"independent, ot.*'magic'"):
        train_rectified_flow(flow, data, coupling="magic", steps=1, progress=False)
    assert not flow.pairs


# ------------------------------------------------------------------------------------------------------------ resume


def small_dit() -> RectifiedFlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RectifiedFlowModel(DiT(4, 2, 1, 16, 2, 2, 2.0, 0.5, 3, False, time_scale=1000.0))


IMAGES = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3
RUN = {
    "labels": LABELS,
    "steps": 12,
    "batch_size": 8,
    "lr": 1e-2,
    "ema_decay": 0.8,
    "lr_schedule": "cosine",
    "checkpoint_every": 3,
    "progress": False,
}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def interrupt_at(step: int):
    def stop(done: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_an_interrupted_run_resumes_bitwise(tmp_path: Path, coupling: str) -> None:
    whole = train_rectified_flow(small_dit(), IMAGES, out=tmp_path / "whole", coupling=coupling, **RUN)
    out = tmp_path / "cut"
    for step in (2, 8, 10):  # before the first checkpoint, between two, and once more
        with pytest.raises(KeyboardInterrupt):
            train_rectified_flow(
                small_dit(), IMAGES, out=out, resume=True, on_step=interrupt_at(step), coupling=coupling, **RUN
            )
    assert len((out / "loss.csv").read_text().splitlines()) == 1 + 9
    torch.rand(5)  # the state of the process has no part in it
    done: list[int] = []
    resumed = train_rectified_flow(
        small_dit(), IMAGES, out=out, resume=True, on_step=lambda step, _: done.append(step), coupling=coupling, **RUN
    )
    assert done == [10, 11, 12]
    assert same(resumed, whole)
    assert (out / "loss.csv").read_bytes() == (tmp_path / "whole" / "loss.csv").read_bytes()
    finished = train_rectified_flow(small_dit(), IMAGES, out=out, resume=True, coupling=coupling, **RUN)
    assert same(finished, whole)
    other = train_rectified_flow(small_dit(), IMAGES, coupling=coupling, **{**RUN, "seed": 1})
    assert not same(other, whole)


def test_without_resume_an_earlier_run_is_refused_untouched(tmp_path: Path) -> None:
    first = train_rectified_flow(small_dit(), IMAGES, out=tmp_path / "a", **RUN)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match=r"\[train_rectified_flow\] out: .*/a, .*resume=True continues it"):
        train_rectified_flow(small_dit(), IMAGES, out=tmp_path / "a", **{**RUN, "seed": 1})
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()  # no run
    assert same(first, train_rectified_flow(small_dit(), IMAGES, out=tmp_path / "b", **RUN))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    train_rectified_flow(small_dit(), IMAGES, out=tmp_path, **RUN)
    path = tmp_path / "checkpoint.pt"
    if damage == "other":
        torch.save({"step": 1}, path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:3000], "empty": b"", "text": b"not a checkpoint"}[damage])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged") as error:
        train_rectified_flow(small_dit(), IMAGES, out=tmp_path, resume=True, **RUN)
    assert (error.value.__cause__ is None) == (damage == "other")
    assert "weights_only" not in str(error.value)
    assert path.read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    flow = small_dit()

    def spoil(step: int, loss: float) -> None:
        if step == 7:
            with torch.no_grad():
                next(flow.parameters()).fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="loss is nan after step 8"):
        train_rectified_flow(flow, IMAGES, out=tmp_path, on_step=spoil, **RUN)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6
    assert all(value.isfinite().all() for value in state["model"].values())
    assert same(
        train_rectified_flow(small_dit(), IMAGES, out=tmp_path, resume=True, **RUN),
        train_rectified_flow(small_dit(), IMAGES, **RUN),
    )


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    flow = small_dit()
    next(flow.parameters()).register_hook(lambda grad: grad * torch.inf)  # the loss of that step is still finite
    with pytest.raises(FloatingPointError, match=r"x_embedder.* is not finite after step 1"):
        train_rectified_flow(flow, IMAGES, out=tmp_path, **{**RUN, "checkpoint_every": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1e-3}, ["lr", "0.01", "0.001"]),
        ({"steps": 13}, ["steps", "12", "13"]),
        ({"coupling": "ot"}, ["coupling", "independent", "ot"]),
        ({"labels": None}, ["data"]),
    ],
)
def test_resume_refuses_other_settings(tmp_path: Path, change: dict[str, object], words: list[str]) -> None:
    train_rectified_flow(small_dit(), IMAGES, out=tmp_path, **RUN)
    with pytest.raises(ValueError, match="cannot continue") as error:
        train_rectified_flow(small_dit(), IMAGES, out=tmp_path, resume=True, **{**RUN, **change})
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(ValueError, match="data"):
        train_rectified_flow(small_dit(), IMAGES + 1, out=tmp_path, resume=True, **RUN)


def test_the_average_of_the_weights_is_returned() -> None:
    flow, history = mlp_flow(), []
    data, _ = corners(32)
    options = {"steps": 5, "batch_size": 8, "lr": 1e-2, "progress": False}
    train_rectified_flow(
        flow,
        data,
        ema_decay=0.7,
        on_step=lambda *_: history.append([p.detach().clone() for p in flow.parameters()]),
        **options,
    )
    expected = history[0]
    for weights in history[1:]:
        expected = [0.7 * e + 0.3 * w for e, w in zip(expected, weights, strict=True)]
    for e, parameter in zip(expected, flow.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), e)
    last = train_rectified_flow(mlp_flow(), data, **options)
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), history[-1], strict=True))


def test_training_leaves_the_callers_generator_and_the_models_mode_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    flow = small_dit().eval()
    train_rectified_flow(flow, IMAGES, **{**RUN, "steps": 2})
    assert torch.equal(torch.rand(3), expected)
    assert not flow.training


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_text("new, but")
            assert path.read_text() == "old"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half"):
        fail_half_way()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, ["steps", "at least 1", "0"]),
        ({"batch_size": 0}, ["batch_size", "at least 1"]),
        ({"lr": 0.0}, ["lr", "above 0"]),
        ({"lr": float("nan")}, ["lr", "finite", "nan"]),
        ({"lr": float("inf")}, ["lr", "finite", "inf"]),
        ({"weight_decay": float("inf")}, ["weight_decay", "finite", "inf"]),
        ({"checkpoint_every": 0}, ["checkpoint_every", "at least 1", "0"]),
        ({"ema_decay": 1.0}, ["ema_decay", "[0, 1)", "1.0"]),
        ({"lr_schedule": "step"}, ["lr_schedule", "cosine", "'step'"]),
        ({"labels": LABELS[:3]}, ["labels", "20", "3"]),
        ({"resume": True}, ["out", "None"]),
        ({"source": lambda n, generator: torch.zeros(n, 1, 4, 5)}, ["source", "[8, 1, 4, 4]", "[8, 1, 4, 5]"]),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        train_rectified_flow(small_dit(), IMAGES, **{**RUN, **change})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 2.5}, ["steps", "an integer", "2.5"]),
        ({"steps": True}, ["steps", "an integer", "True"]),
        ({"batch_size": 8.0}, ["batch_size", "an integer", "8.0"]),
        ({"checkpoint_every": "3"}, ["checkpoint_every", "an integer", "'3'"]),
        ({"seed": 0.5}, ["seed", "an integer", "0.5"]),
        ({"lr": "0.1"}, ["lr", "a number", "'0.1'"]),
        ({"labels": LABELS.tolist()}, ["labels", "a tensor", "list"]),
        ({"data": IMAGES.numpy()}, ["data", "floating-point", "ndarray"]),
        ({"data": IMAGES.to(torch.uint8)}, ["data", "floating-point", "torch.uint8"]),
        ({"source": lambda n, generator: [0.0] * n}, ["source", "floating-point", "list"]),
    ],
)
def test_arguments_of_the_wrong_type_are_named(tmp_path: Path, change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(TypeError) as error:
        train_rectified_flow(small_dit(), **{"data": IMAGES, **RUN, **change}, out=tmp_path / "out")
    assert all(word in str(error.value) for word in ["[train_rectified_flow] ", *words]), error.value
    assert not (tmp_path / "out").exists() or "source" in change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_data_that_is_not_finite_is_refused(dtype: torch.dtype, value: float) -> None:
    data = IMAGES.to(dtype, copy=True)
    data[7, 0, 1, 2] = value
    with pytest.raises(ValueError, match=r"\[train_rectified_flow\] data: expected finite values"):
        train_rectified_flow(small_dit(), data, **RUN)


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    given = {**RUN, "steps": np.int64(12), "seed": np.int32(0), "lr": np.float64(1e-2)}
    flow = train_rectified_flow(small_dit(), IMAGES, out=tmp_path, **given)
    assert same(train_rectified_flow(small_dit(), IMAGES, out=tmp_path, resume=True, **RUN), flow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_data_of_another_type_is_converted_to_the_models(dtype: torch.dtype) -> None:
    data = IMAGES.bfloat16().float() if dtype == torch.bfloat16 else IMAGES.half().float()  # exact in all
    expected = train_rectified_flow(small_dit(), data, **RUN)
    got = train_rectified_flow(small_dit(), data.to(dtype), **RUN)
    assert same(got, expected)
    double = RectifiedFlowModel(Mlp()).double()
    train_rectified_flow(double, corners(8)[0], steps=2, batch_size=4, source=normal, progress=False)
    assert next(double.parameters()).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------ reflow


def test_reflow_keeps_pairs_and_their_labels() -> None:
    flow = Recording(LabelShift())
    labels = torch.tensor([1, 5, 9])
    reflow(
        flow, source=normal, num_pairs=700, num_steps=3, labels=labels, steps=20, batch_size=64, lr=1e-9, progress=False
    )
    assert len(flow.pairs) == 20
    seen = set()
    for (x_0, x_1), condition in zip(flow.pairs, flow.conditions[-20:], strict=True):
        assert condition is not None
        torch.testing.assert_close(x_1 - x_0, condition[:, None].expand(64, 2).float())
        seen |= set(condition.tolist())
    assert seen == {1, 5, 9}
    assert torch.cat([x_0 for x_0, _ in flow.pairs[:10]]).unique(dim=0).shape[0] == 640  # an epoch repeats nothing


def test_reflow_straightens() -> None:
    data, _ = corners(1024)
    options = {"batch_size": 256, "lr": 3e-3, "progress": False}
    flow = train_rectified_flow(mlp_flow(), data, source=normal, steps=500, **options)

    def straightness() -> float:
        """E |(z_1 - z_0) - v(z_t, t)|^2 along the model's own paths (eq. 7 of the paper)."""
        z_0 = normal(512, torch.Generator().manual_seed(9))
        z, velocities = z_0, []
        for k in range(40):
            velocities.append(flow.get_velocity(z, k / 40).detach())
            z = z + velocities[-1] / 40
        return torch.stack([(z - z_0 - v).square().sum(1).mean() for v in velocities]).mean().item()

    before = straightness()
    reflow(flow, source=normal, num_pairs=2048, num_steps=40, steps=500, **options)
    assert straightness() < before / 5


def test_reflow_resumes_bitwise_over_rounds(tmp_path: Path) -> None:
    options = {
        "source": lambda n, generator: torch.randn(n, 1, 4, 4, generator=generator),
        "labels": LABELS,
        "num_pairs": 24,
        "num_steps": 2,
        "rounds": 2,
        "steps": 6,
        "batch_size": 8,
        "lr": 1e-2,
        "ema_decay": 0.5,
        "checkpoint_every": 2,
        "progress": False,
    }
    start = train_rectified_flow(small_dit(), IMAGES, **RUN).state_dict()

    def fresh() -> RectifiedFlowModel:
        flow = small_dit()
        flow.load_state_dict({k: v.clone() for k, v in start.items()})
        return flow

    whole = reflow(fresh(), **options)
    count = itertools.count(1)

    def stop(step: int, loss: float) -> None:
        if next(count) == 9:  # in the second round, after its first checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reflow(fresh(), out=tmp_path, on_step=stop, **options)
    done: list[int] = []
    resumed = reflow(fresh(), out=tmp_path, resume=True, on_step=lambda step, _: done.append(step), **options)
    assert done == [3, 4, 5, 6]
    assert same(resumed, whole)
    assert not same(whole, fresh())
    with pytest.raises(ValueError, match="another num_steps"):
        reflow(fresh(), out=tmp_path, resume=True, **{**options, "num_steps": 3})
    with pytest.raises(ValueError, match="model"):
        reflow(small_dit(), out=tmp_path, resume=True, **options)


def test_pairs_are_streamed_to_disk_and_not_made_twice(tmp_path: Path) -> None:
    calls: list[int] = []

    def source(n: int, generator: torch.Generator) -> Tensor:
        calls.append(n)
        if len(calls) == 3 and interrupted:
            raise KeyboardInterrupt
        return normal(n, generator)

    options = {"source": source, "num_pairs": 1100, "num_steps": 2, "progress": False}
    interrupted = False
    whole = generate_pairs(mlp_flow(), **options)
    assert calls == [512, 512, 76]
    calls.clear()
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        generate_pairs(mlp_flow(), out=tmp_path, **options)
    calls.clear()
    resumed = generate_pairs(mlp_flow(), out=tmp_path, resume=True, **options)
    assert calls == [76]
    assert torch.equal(resumed[0], whole[0])
    assert torch.equal(resumed[1], whole[1])
    assert len(whole[0].unique(dim=0)) == 1100  # no chunk repeats another's noise
    flow = mlp_flow()
    torch.testing.assert_close(flow.sample(whole[0], 2), whole[1])


def test_earlier_rounds_and_pairs_are_refused_untouched(tmp_path: Path) -> None:
    options = {"source": normal, "num_pairs": 8, "num_steps": 1, "progress": False}
    training = {"steps": 2, "batch_size": 4}
    reflow(mlp_flow(), out=tmp_path / "whole", **options, **training)
    generate_pairs(mlp_flow(), out=tmp_path / "pairs" / "round-2" / "pairs", **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 4
    for folder in ("whole", "pairs"):
        with pytest.raises(ValueError, match=rf"\[reflow\] out: .*/{folder}, .*resume=True continues it"):
            reflow(mlp_flow(1), out=tmp_path / folder, **options, **training)
    with pytest.raises(ValueError, match=r"\[generate_pairs\] out: .*/pairs, .*resume=True continues it"):
        generate_pairs(mlp_flow(1), out=tmp_path / "whole" / "round-1" / "pairs", **options)
    next((tmp_path / "whole").rglob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"\[reflow\] out: .*/whole"):  # the checkpoint alone
        reflow(mlp_flow(1), out=tmp_path / "whole", **options, **training)
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 3


def test_damaged_pairs_are_named(tmp_path: Path) -> None:
    options = {"source": normal, "num_pairs": 8, "num_steps": 1, "progress": False, "out": tmp_path}
    generate_pairs(mlp_flow(), **options)
    path = tmp_path / "00000000.safetensors"
    for content in (path.read_bytes()[:-20], path.read_bytes()[:4], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"00000000\.safetensors is damaged"):
            generate_pairs(mlp_flow(), resume=True, **options)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(511, 2)], ["[512,...]", "[511, 2]"]),
        ([(512,)], ["[512,...]", "[512]"]),
        ([()], ["[512,...]", "[]"]),
        ([(512, 2), (88, 3)], ["[88, 2]", "[88, 3]"]),
    ],
)
def test_noise_of_the_wrong_shape_is_named(shapes: list[tuple[int, ...]], words: list[str]) -> None:
    made = iter(shapes)
    with pytest.raises(ValueError, match="source") as error:
        reflow(
            mlp_flow(),
            source=lambda n, generator: torch.zeros(next(made)),
            num_pairs=600,
            num_steps=1,
            steps=1,
            progress=False,
        )
    assert all(word in str(error.value) for word in words), error.value


def test_reflow_converts_the_noise_to_the_models_type() -> None:
    pairs = generate_pairs(
        mlp_flow(),
        source=lambda n, g: normal(n, g).double(),
        seed=np.int64(0),
        num_pairs=8,
        num_steps=2,
        progress=False,
    )
    expected = generate_pairs(mlp_flow(), source=normal, num_pairs=8, num_steps=2, progress=False)
    assert torch.equal(pairs[0], expected[0])
    assert torch.equal(pairs[1], expected[1])


def test_bad_reflow_arguments_are_named() -> None:
    options = {"source": normal, "steps": 1, "progress": False}
    with pytest.raises(ValueError, match="num_pairs: expected at least 1, got 0"):
        reflow(mlp_flow(), num_pairs=0, **options)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        reflow(mlp_flow(), num_pairs=1, rounds=0, **options)
    with pytest.raises(ValueError, match="num_steps"):
        reflow(mlp_flow(), num_pairs=1, num_steps=0, **options)
    for change in ({"num_pairs": 1.5}, {"num_steps": True}, {"rounds": 1.0}, {"steps": 2.5}, {"labels": [1, 2]}):
        with pytest.raises(TypeError, match=f"{next(iter(change))}: expected"):
            reflow(mlp_flow(), **{"num_pairs": 1, **options, **change})

    def never(n: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("pairs were generated before the options were checked")

    with pytest.raises(ValueError, match=r"\[reflow\] lr"):
        reflow(mlp_flow(), num_pairs=1, **{**options, "source": never}, lr=-1.0)
