"""Modulation tables: the same predictions without the weights, and errors where a table does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models import DiT, TextDiT, load_weights, save_weights, with_table
from fastdiff.models.checkpoints import CheckpointError
from fastdiff.models.modulation import Modulated, ModulationTable
from fastdiff.ops import _linear
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


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    scale = expected.abs().max().item()
    assert got.shape == expected.shape and scale > 0.1
    assert (got - expected).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_dit_with_a_table_predicts_the_same(dtype: torch.dtype, shared: bool) -> None:
    model, x = small_dit(shared_embedders=shared).to(dtype), images(dtype)
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-6
    table = model.precompute_modulation(TIMES, LABELS, guidance=True)
    assert len(table) == 4 and table.values.shape == (4, 3, 20 * 24)  # labels 1, 4 and the null class
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


def test_labels_that_are_equal_are_computed_once_and_serve_any_batch() -> None:
    model, x = small_dit(), images()
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


def test_every_weight_is_read_once_for_the_whole_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = _linear.call
    model = small_dit()
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


def test_a_table_is_without_label_dropout() -> None:
    model = small_dit(class_dropout_prob=1.0).train()
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
@pytest.mark.parametrize("make", [small_dit, small_text])
def test_weights_are_dropped_and_come_back(make: Any, way: Any, tmp_path: Path) -> None:
    model, x = make(), images()
    cond = LABELS if make is small_dit else torch.randn(3, 4, 6)
    expected = model(x, TIMES[1].expand(3), cond)
    table = model.precompute_modulation(TIMES, cond)
    names, before, total = list(model.state_dict()), model.modulation_bytes(), sum(p.nbytes for p in model.parameters())
    layer = model._modulation_layers()
    assert before == sum(p.nbytes for m in layer.values() for p in m.parameters())
    back = way(model, tmp_path)
    assert model.modulation_bytes() == 0
    assert sum(p.nbytes for p in model.parameters()) == total - before
    call: dict[str, Any] = {} if make is small_dit else {"cond": cond}
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


def test_a_table_that_does_not_fit_is_refused() -> None:
    model, x = small_dit(), images()
    table = model.precompute_modulation(TIMES, LABELS)
    with pytest.raises(ValueError, match="a table for a batch of 2, got one of 3"):
        model(x[:2], None, modulation=table.at(0))
    with pytest.raises(ValueError, match="guidance=True"):
        model.forward_with_cfg(x, None, None, 2.0, modulation=table.at(0))
    with pytest.raises(ValueError, match=r"rows of 480, got \[1, 336\]"):
        model(x, None, modulation=small_dit(depth=2).precompute_modulation(TIMES).at(0))
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
        small_dit(class_dropout_prob=0.0).precompute_modulation(TIMES, LABELS, guidance=True)


def test_samplers_find_the_step_by_its_time() -> None:
    model, x = small_dit(), images()
    table = model.precompute_modulation(TIMES, LABELS)
    predict = with_table(model, table)
    with torch.no_grad():
        close(predict(x, TIMES[2].expand(3), LABELS), model(x, TIMES[2].expand(3), LABELS))
    assert table.index(500.5) == 1
    with pytest.raises(ValueError, match=r"one of the 4 times of the table, got 7\.0"):
        predict(x, torch.full((3,), 7.0))
    with pytest.raises(ValueError, match="the same time"):
        predict(x, TIMES[:3])


def test_compiled_and_moved() -> None:
    model, x = small_dit(depth=1), images()
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
