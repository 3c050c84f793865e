"""What the backbones have in common: modulation tables, guidance, gradient checkpointing, checks; all of them alike."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models import DiffusionMamba, DiT, HybridDiffusion, TextDiT, load_weights, save_weights, with_table
from fastdiff.models.checkpoints import CheckpointError
from fastdiff.models.modulation import Modulated, ModulationTable
from fastdiff.ops import _linear
from fastdiff.samplers import make_plan, sample, schedules
from fastdiff.training import RectifiedFlowModel

TIMES = torch.tensor([999.0, 500.5, 3.0, 0.0])
LABELS = torch.tensor([4, 1, 4])


def randomise(model: nn.Module) -> Any:
    """Nothing is zero, and sums keep their size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            std = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return model.eval()


def small_dit(**overrides: Any) -> DiT:
    settings = {"input_size": 4, "in_channels": 2, "hidden_size": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    model: DiT = randomise(DiT(**{**settings, **overrides}))
    return model


def small_text(**overrides: Any) -> TextDiT:
    settings = {"input_size": 4, "in_channels": 2, "hidden_size": 24, "depth": 3, "num_heads": 2, "caption_channels": 6}
    model: TextDiT = randomise(TextDiT(**{**settings, "caption_tokens": 5, **overrides}))
    return model


def small_mamba(kind: Any = DiffusionMamba, **overrides: Any) -> Any:
    settings = {"input_size": 4, "in_channels": 2, "hidden_size": 24, "depth": 3, "d_state": 2, "num_classes": 5}
    return randomise(kind(**{**settings, **overrides}))


small_hybrid = partial(small_mamba, HybridDiffusion, attention_every=2, num_heads=2)
# How many vectors of modulation there are: 3 of each branch of 3 blocks, and 2 of the final layer.
VECTORS = {small_dit: 20, small_mamba: 11, small_hybrid: 14}
OF_LABELS = pytest.mark.parametrize("make", VECTORS, ids=["dit", "mamba", "hybrid"])
ALL = pytest.mark.parametrize("make", [*VECTORS, small_text], ids=["dit", "mamba", "hybrid", "text_dit"])


def condition(model: Any) -> Tensor:
    return torch.randn(3, 4, 6) if isinstance(model, TextDiT) else LABELS


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    scale = expected.abs().max().item()
    assert got.shape == expected.shape and scale > 0.1
    assert (got - expected).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("make", "vectors"), [*VECTORS.items(), (partial(small_dit, shared_embedders=False), 20)])
def test_with_a_table_the_prediction_is_the_same(make: Any, vectors: int, dtype: torch.dtype) -> None:
    model, x = make().to(dtype), images(dtype)
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-6
    table = model.precompute_modulation(TIMES, LABELS, guidance=True)
    assert len(table) == 4 and table.values.shape == (4, 3, vectors * 24)  # labels 1, 4 and the null class
    assert table.nbytes == table.values.numel() * table.values.element_size()
    assert not table.values.requires_grad
    with torch.no_grad():
        for i in range(4):
            t = TIMES[i].expand(3)
            close(model(x, None, modulation=table.at(i)), model(x, t, LABELS), tolerance)
            guided = model.forward_with_cfg(x, None, None, 3.0, modulation=table.at(i))
            close(guided, model.forward_with_cfg(x, t, LABELS, 3.0), tolerance)
    assert torch.equal(table.at(-1).values, table.at(3).values)
    with pytest.raises(IndexError, match="one of 4, got 4"):
        table.at(4)


@OF_LABELS
def test_labels_that_are_equal_are_computed_once_and_serve_any_batch(make: Any) -> None:
    model, x = make(), images()
    one = model.precompute_modulation(TIMES, torch.tensor([2, 2, 2]))
    none = model.precompute_modulation(TIMES)
    assert one.values.shape[1] == none.values.shape[1] == 1
    both = model.precompute_modulation(TIMES, torch.tensor([2]), guidance=True)
    null = model.precompute_modulation(TIMES, torch.tensor([5]), guidance=True)
    assert both.values.shape[1] == 2 and null.values.shape[1] == 1
    with torch.no_grad():
        t = TIMES[1].expand(2)
        close(model(x[:2], None, modulation=one.at(1)), model(x[:2], t, torch.tensor([2, 2])))
        close(model(x[:2], None, modulation=none.at(1)), model(x[:2], t, None))
        guided = model.forward_with_cfg(x[:2], t, torch.tensor([2, 2]), 3.0)
        close(model.forward_with_cfg(x[:2], None, None, 3.0, modulation=both.at(1)), guided)
        close(model.forward_with_cfg(x[:2], None, None, 3.0, modulation=null.at(1)), model(x[:2], t, None))


@OF_LABELS
def test_every_weight_is_read_once_for_the_whole_schedule(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = _linear.call
    model = make()
    layers = list(model._modulation_layers().values())

    def counted(layer: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        if any(layer is other for other in layers):
            rows.append(len(x))
        return original(layer, x, **kwargs)

    monkeypatch.setattr(_linear, "call", counted)
    table = model.precompute_modulation(TIMES, LABELS)
    assert rows == [8] * 4  # four times, two labels
    rows.clear()
    model(images(), None, modulation=table.at(0))
    assert not rows


@OF_LABELS
def test_a_table_is_without_label_dropout(make: Any) -> None:
    model = make(class_dropout_prob=1.0).train()
    table = model.precompute_modulation(TIMES, LABELS)
    close(model(images(), None, modulation=table.at(1)), model.eval()(images(), TIMES[1].expand(3), LABELS))


def test_text_dit_with_a_table_predicts_the_same() -> None:
    model, x, caption = small_text(), images(), torch.randn(3, 4, 6)
    table = model.precompute_modulation(TIMES)
    assert table.values.shape == (4, 1, 7 * 24)
    with torch.no_grad():
        t = TIMES[1].expand(3)
        close(model(x, None, caption, modulation=table.at(1)), model(x, t, caption))
        guided = model.forward_with_cfg(x, None, caption, 3.0, modulation=table.at(1))
        close(guided, model.forward_with_cfg(x, t, caption, 3.0))
        sized = small_text(micro_conditions=True)
        resolution, ratio = torch.tensor([40.0, 30.0]), torch.tensor(0.75)
        table = sized.precompute_modulation(TIMES, resolution=resolution, aspect_ratio=ratio)
        expected = sized(x, t, caption, resolution=resolution.expand(3, 2), aspect_ratio=ratio.expand(3))
        close(sized(x, None, caption, modulation=table.at(1)), expected)


def forget(model: Modulated, tmp_path: Path) -> Callable[[], None]:
    """The weights are dropped, and come back from a checkpoint of all weights."""
    file = tmp_path / "all.safetensors"
    save_weights(model, file)
    model.drop_modulation_weights()
    return lambda: load_weights(model, file) and None


def in_a_file(model: Modulated, tmp_path: Path) -> Callable[[], None]:
    return model.drop_modulation_weights(keep=tmp_path / "modulation.safetensors").restore


def on_a_device(model: Modulated, tmp_path: Path) -> Callable[[], None]:
    return model.drop_modulation_weights(keep=torch.device("cpu")).restore


@pytest.mark.parametrize("way", [forget, in_a_file, on_a_device])
@ALL
def test_weights_are_dropped_and_come_back(make: Any, way: Any, tmp_path: Path) -> None:
    model, x = make(), images()
    cond = condition(model)
    expected = model(x, TIMES[1].expand(3), cond)
    table = model.precompute_modulation(TIMES, cond)
    names, before, total = list(model.state_dict()), model.modulation_bytes(), sum(p.nbytes for p in model.parameters())
    layer = model._modulation_layers()
    assert before == sum(p.nbytes for m in layer.values() for p in m.parameters())
    back = way(model, tmp_path)
    assert model.modulation_bytes() == 0
    assert sum(p.nbytes for p in model.parameters()) == total - before
    call: dict[str, Any] = {"cond": cond} if make is small_text else {}
    close(model(x, None, modulation=table.at(1), **call), expected)
    close(copy.deepcopy(model)(x, None, modulation=table.at(1), **call), expected)
    for refused in (lambda: model(x, TIMES[1].expand(3), cond), lambda: model.precompute_modulation(TIMES, cond)):
        with pytest.raises(ValueError, match=r"drop_modulation_weights\(\) took the weights"):
            refused()
    with pytest.raises(ValueError, match="weights that are there"):
        model.drop_modulation_weights()
    with pytest.raises(ValueError, match="expected all its weights"):
        save_weights(model, tmp_path / "part.safetensors")
    back()
    back()  # harmless
    assert sorted(model.state_dict()) == sorted(names)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x, TIMES[1].expand(3), cond), expected)


def test_a_with_block_restores_in_the_type_and_state_of_the_model(tmp_path: Path) -> None:
    model = small_dit().requires_grad_(False)
    expected = copy.deepcopy(model).bfloat16().state_dict()
    with model.drop_modulation_weights(keep=tmp_path / "m.safetensors") as dropped:
        assert dropped.nbytes == 20 * 24 * 25 * 4  # (6 depth + 2) D (D + 1) numbers
        model.bfloat16()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="keep"), model.drop_modulation_weights():
        pass


def test_restoring_from_a_file_that_changed_is_an_error(tmp_path: Path) -> None:
    model = small_dit()
    dropped = model.drop_modulation_weights(keep=tmp_path / "m.safetensors")
    save_weights(nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(8\): blocks.0.adaLN_modulation.1.bias"):
        dropped.restore()
    with pytest.raises(ValueError, match="keep"):
        small_dit().drop_modulation_weights().restore()


def test_inside_another_model_the_weights_come_back_as_well(tmp_path: Path) -> None:
    model = RectifiedFlowModel(small_dit(learn_sigma=False))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.backbone.drop_modulation_weights()
    load_weights(model, state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@OF_LABELS
def test_a_table_that_does_not_fit_is_refused(make: Any) -> None:
    model, x = make(), images()
    table = model.precompute_modulation(TIMES, LABELS)
    found, expected = small_dit(depth=2).precompute_modulation(TIMES), VECTORS[make] * 24
    with pytest.raises(ValueError, match="a table for a batch of 2, got one of 3"):
        model(x[:2], None, modulation=table.at(0))
    with pytest.raises(ValueError, match="guidance=True"):
        model.forward_with_cfg(x, None, None, 2.0, modulation=table.at(0))
    if make is not small_hybrid:  # which has as many rows as that DiT
        with pytest.raises(ValueError, match=rf"rows of {expected}, got \[1, 336\]"):
            model(x, None, modulation=found.at(0))
    with pytest.raises(ValueError, match=r"table.at\(i\), got ModulationTable"):
        model(x, None, modulation=table)
    with pytest.raises(ValueError, match=r"t: expected shape \[3\], got None"):
        model(x, None, LABELS)
    for times in (torch.tensor(3.0), torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="timesteps: expected shape"):
            model.precompute_modulation(times, LABELS)
    with pytest.raises(ValueError, match="integer labels"):
        model.precompute_modulation(TIMES, LABELS.double())
    with pytest.raises(ValueError, match="labels"):
        model.precompute_modulation(TIMES, guidance=True)
    with pytest.raises(ValueError, match="no unconditional"):
        make(class_dropout_prob=0.0).precompute_modulation(TIMES, LABELS, guidance=True)


@ALL
def test_samplers_find_the_step_by_its_time(make: Any) -> None:
    model, x = make(), images()
    cond = condition(model)
    table = model.precompute_modulation(TIMES, cond)
    predict = with_table(model, table)
    with torch.no_grad():
        close(predict(x, TIMES[2].expand(3), cond), model(x, TIMES[2].expand(3), cond))
    assert table.index(500.5) == 1
    with pytest.raises(ValueError, match=r"one of the 4 times of the table, got 7\.0"):
        predict(x, torch.full((3,), 7.0))
    with pytest.raises(ValueError, match="the same time"):
        predict(x, TIMES[:3])


@ALL
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_plan_with_times_in_float64_makes_a_table_for_sampling(make: Any, given: torch.dtype) -> None:
    model = make(learn_sigma=False).to(given)
    x, cond = images(given), condition(model)
    cond = cond.to(given) if make is small_text else cond
    plan = make_plan("heun", schedules.flow(), 7, prediction="flow")  # sevenths; the model gets them in float32
    predict = with_table(model, model.precompute_modulation(plan.times, cond))
    with torch.no_grad():
        expected = sample(model, x, plan=plan, cond=cond)
        close(sample(predict, x, plan=plan, cond=cond), expected, 1e-5 if given is torch.float32 else 0.02)


def test_a_time_is_found_in_the_narrower_type_if_that_tells_it_apart() -> None:
    table = small_dit().precompute_modulation(torch.tensor([0.1, 1 / 3], dtype=torch.float64))
    for times in (table.timesteps, table.timesteps.float()):
        for kind in (torch.float64, torch.float32, torch.bfloat16):
            assert replace(table, timesteps=times).index(torch.tensor([1 / 3] * 2, dtype=torch.float64).to(kind)) == 1
        assert replace(table, timesteps=times).index(0.1) == 0
    whole = replace(table, timesteps=torch.tensor([998, 999]))
    assert whole.index(999.0) == 1
    with pytest.raises(ValueError, match=r"one of the 2 times of the table, got 999\.5"):
        whole.index(999.5)
    close_by = replace(table, timesteps=torch.tensor([998.0, 999.0]))
    with pytest.raises(ValueError, match="t: expected a type that tells its times apart, got torch"):
        close_by.index(torch.tensor(1000.0, dtype=torch.bfloat16))
    assert replace(close_by, timesteps=torch.tensor([5.0, 5.0])).index(5.0) == 0


@OF_LABELS
@pytest.mark.parametrize("labels", [LABELS, torch.tensor([2, 2, 2])])
@pytest.mark.parametrize("stacked", [True, False])
def test_a_sampler_guides_with_a_table(make: Any, labels: Tensor, stacked: bool) -> None:
    model, x = make(learn_sigma=False), images()
    plan = make_plan("ddim", schedules.vp("linear"), 4, prediction="epsilon")
    guided = {"plan": plan, "cond": labels, "uncond": torch.full((3,), 5) if stacked else None, "guidance_scale": 3.0}
    table = model.precompute_modulation(plan.times, labels, guidance=True)
    with torch.no_grad():
        expected, plain = sample(model, x, **guided), sample(model, x, plan=plan, cond=labels)
        close(sample(with_table(model, table), x, **guided), expected, 1e-5)
        assert (expected - plain).abs().max() > 0.01 * plain.abs().max()
        close(sample(with_table(model, table), x, plan=plan, cond=labels), plain, 1e-5)
    lacking = with_table(model, model.precompute_modulation(plan.times, labels))
    match = r"labels among those of the table, \[.*\], got" if stacked else "a table built with guidance=True, got None"
    with pytest.raises(ValueError, match=match):
        sample(lacking, x, **guided)


@OF_LABELS
def test_labels_are_found_among_those_of_the_table(make: Any) -> None:
    model, x, t = make(), images(), TIMES[1].expand(3)
    table = model.precompute_modulation(TIMES, LABELS, guidance=True).to(torch.float64).to(torch.float32)
    never = model.precompute_modulation(TIMES)
    with torch.no_grad():
        other = torch.tensor([4, 4, 1], dtype=torch.int32)
        close(with_table(model, table)(x, t, other), model(x, t, other))
        close(with_table(model, table)(x[:2], t[:2], other[:2]), model(x[:2], t[:2], other[:2]))
        close(with_table(model, table)(x, t), model(x, t))
        close(with_table(model, never)(x, t), model(x, t))
    for held, found in ((table, r"\[1, 4, 5\]"), (never, r"\[\]")):
        with pytest.raises(
            ValueError, match=rf"cond: expected labels among those of the table, {found}, got \[1, 2, 3\]"
        ):
            with_table(model, held)(x, t, torch.tensor([1, 2, 3]))


@OF_LABELS
def test_compiled_and_moved(make: Any) -> None:
    model, x = make(depth=1 if make is not small_hybrid else 2), images()
    table = model.precompute_modulation(TIMES, LABELS)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for i in (0, 2):
            close(compiled(x, None, modulation=table.at(i)), model(x, TIMES[i].expand(3), LABELS))
    moved: ModulationTable = table.to(torch.float64)
    assert moved.values.dtype is torch.float64 and len(moved) == 4


def test_a_device_as_text_is_not_taken_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = small_dit()
    with pytest.raises(ValueError, match=r"keep: expected a file, or torch\.device\('cpu'\), got 'cpu'"):
        model.drop_modulation_weights(keep="cpu")
    assert not list(tmp_path.iterdir()) and not model._dropped()


# ----------------------------------------------------------------------------------------- what else is common


def test_one_signature_for_all() -> None:
    for method in ("forward", "forward_with_cfg", "precompute_modulation"):
        for kind in (DiffusionMamba, HybridDiffusion, TextDiT):
            theirs = inspect.signature(getattr(DiT, method)).parameters
            ours = inspect.signature(getattr(kind, method)).parameters
            for name, parameter in theirs.items():
                assert ours[name].kind == parameter.kind, (kind, method, name)
            assert [n for n in ours if n in theirs] == list(theirs)
            if kind is not TextDiT:
                assert str(ours) == str(theirs)


@pytest.mark.parametrize("make", [*VECTORS, partial(small_dit, shared_embedders=False), small_text])
def test_the_condition_of_a_sample_is_dropped_everywhere_or_nowhere(make: Any) -> None:
    model = make(class_dropout_prob=0.5) if make is not small_text else make(caption_dropout_prob=0.5)
    x, cond = images()[:1].expand(32, -1, -1, -1), condition(model)[:1]
    t, cond = TIMES[:1].expand(32), cond.expand(32, *cond.shape[1:])
    null = model.y_embedder.y_embedding[: cond.shape[1]].expand(32, -1, -1) if make is small_text else None
    with torch.no_grad():
        kept, without = model(x, t, cond)[0], model(x, t, null)[0]
        off = [min(float((got - one).abs().max()) for one in (kept, without)) for got in model.train()(x, t, cond)]
    assert max(off) <= 1e-5 * float(kept.abs().max()) < 1e-3 * float((kept - without).abs().max())


@ALL
def test_exported_with_a_batch_of_any_size(make: Any) -> None:
    model, rows = make(), torch.export.Dim("rows", min=2, max=64)
    call = (images(), TIMES[:3], condition(model))
    with torch.no_grad():
        exported = torch.export.export(model, call, dynamic_shapes=({0: rows},) * 3).module()
        twice = tuple(torch.cat([value, value.flip(0)]) for value in call)
        close(exported(*twice), model(*twice), 1e-5)


@ALL
@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(make: Any, training: bool) -> None:
    plain = make().train(training)
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing = True
    x, t, cond = images(), TIMES[:3], condition(plain)
    runs: list[int] = []
    for block in saving.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    kept: list[int] = []
    for model in (plain, saving):
        torch.manual_seed(0)  # dropout of the condition
        held: dict[int, int] = {}

        def keep(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x, t, cond).square().sum()
        kept.append(sum(held.values()))
        loss.backward()
    assert len(runs) == 6  # three blocks, forward and again in the backward pass
    assert kept[1] < 0.6 * kept[0]
    for (name, p), q in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert p.grad is not None and p.grad.abs().max() > 0, name
        assert torch.equal(p.grad, q[1].grad), name
    runs.clear()
    with torch.no_grad():
        saving(x, t, cond)
    assert len(runs) == 3


@ALL
@torch.no_grad()
@pytest.mark.parametrize("place", range(4))
def test_control_is_added_to_the_tokens_behind_a_block(make: Any, place: int) -> None:
    model = make().double()
    x, t, cond = images(torch.float64), TIMES[:3], condition(model)
    cond = cond.double() if cond.is_floating_point() else cond
    added, plain, changed = torch.randn(3, 4, 24, dtype=torch.float64), list[Tensor](), list[Tensor]()
    expected = model(x, t, cond, taps=plain)
    got = model(x, t, cond, control=[None] * place + [added], taps=changed)
    assert len(plain) == len(changed) == 3 and (got - expected).abs().max() > 0.01
    assert all(map(torch.equal, plain[: max(place - 1, 0)], changed))
    if place:
        close(changed[place - 1] - plain[place - 1], added, 1e-12)


@OF_LABELS
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_mixes_two_predictions(make: Any, scale: float) -> None:
    model, x, t = make().double(), images(torch.float64), TIMES[:3]
    pred, uncond = model(x, t, LABELS), model(x, t)
    assert (pred - uncond).abs().max() > 0.01
    guided = model.forward_with_cfg(x, t, LABELS, scale)
    close(guided[:, :2], uncond[:, :2] + scale * (pred[:, :2] - uncond[:, :2]), 1e-12)
    close(guided[:, 2:], pred[:, 2:], 1e-12)  # variances are not guided
    name = type(model).__name__
    with pytest.raises(ValueError, match=rf"\[{name}.forward_with_cfg\] cond: expected labels \[B\], got None"):
        model.forward_with_cfg(x, t, None, scale)
    with pytest.raises(ValueError, match="no unconditional"):
        make(class_dropout_prob=0.0).forward_with_cfg(images(), t, LABELS, scale)


@ALL
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        ({"input_size": 5}, "input_size: expected a multiple of patch_size=2, got 5"),
        ({"hidden_size": 26}, "hidden_size: expected a multiple of 4, got 26"),
        ({"time_scale": 0.0}, "time_scale: expected above 0, got 0.0"),
        ({"_dropout_prob": 1.5}, r"_dropout_prob: expected in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_named(make: Any, change: dict[str, Any], message: str) -> None:
    name = type(make()).__name__
    kind = "caption" if make is small_text else "class"
    settings = {kind + key if key.startswith("_") else key: value for key, value in change.items()}
    with pytest.raises(ValueError, match=rf"\[{name}\] \w*{message}"):
        make(**settings)


@ALL
def test_bad_calls_are_named(make: Any) -> None:
    model, x, t = make(), images(), TIMES[:3]
    cond, name = condition(model), type(model).__name__
    for arguments, message in (
        ((x[:, :1], t, cond), r"x: expected shape \[B,2,4,4\], got \[3, 1, 4, 4\]"),
        ((x, t[:1], cond), r"t: expected shape \[3\], got \[1\]"),
        ((x, None, cond), r"t: expected shape \[3\], got None"),
        ((x, t, cond[:1]), r"cond: expected .*\[3.*\], got \[1"),
    ):
        with pytest.raises(ValueError, match=rf"\[{name}\] {message}"):
            model(*arguments)
    with pytest.raises(ValueError, match=rf"\[{name}\] control: expected at most 4 entries, got 5"):
        model(x, t, cond, control=[None] * 5)
    with pytest.raises(ValueError, match=rf"\[{name}\] control: expected tensors of shape .3, 4, 24., got .2, 4, 24."):
        model(x, t, cond, control=[None, torch.zeros(2, 4, 24)])
    with pytest.raises(ValueError, match=rf"\[{name}\] control: expected tensors of shape .3, 4, 24., got .4, 24."):
        model(x, t, cond, control=torch.zeros(3, 4, 24))
