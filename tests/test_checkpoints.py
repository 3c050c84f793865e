"""Weights in files: whichever way they were saved; and files that are damaged, foreign or of another model."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.models import CheckpointError, DiT, TextDiT, load_model, load_state, load_weights, save_weights

SETTINGS: dict[str, Any] = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def randomise(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    return randomise(DiT(**SETTINGS))  # type: ignore[no-any-return]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def predict(model: nn.Module) -> Tensor:
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(x, torch.tensor([3, 700]), torch.tensor([0, 2]))
    return found


# ------------------------------------------------------------------------------------------------------------ reading


def as_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "m.safetensors")
    return folder / "m.safetensors"


def as_misnamed_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    return as_safetensors(state, folder).rename(folder / "m.bin")


def as_torch(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "m.pt")
    return folder / "m.pt"


def as_old_torch(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "m.pth", _use_new_zipfile_serialization=False)
    return folder / "m.pth"


def as_training_run(state: dict[str, Tensor], folder: Path) -> Path:
    """What the published training script writes: plain weights, averaged ones, optimizer, arguments."""
    other = {name: value + 1 for name, value in state.items()}
    run = {"model": other, "ema": state, "opt": {"state": {}, "step": 3}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(run, folder / "0050000.pt")
    return folder / "0050000.pt"


def as_distributed(state: dict[str, Tensor], folder: Path) -> Path:
    return as_torch({"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}}, folder)  # type: ignore[dict-item]


def as_shards(state: dict[str, Tensor], folder: Path) -> Path:
    names = sorted(state)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == part}, folder / part)
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def as_folder(state: dict[str, Tensor], folder: Path) -> Path:
    return as_shards(state, folder).parent


@pytest.mark.parametrize(
    "write",
    [
        *(as_safetensors, as_misnamed_safetensors, as_torch, as_old_torch),
        *(as_training_run, as_distributed, as_shards, as_folder),
    ],
)
def test_whichever_way_it_was_saved(write: Callable[..., Path], model: DiT, tmp_path: Path) -> None:
    expected = model.state_dict()
    path = write(expected, tmp_path)
    same(load_state(path), expected)
    fresh = randomise(DiT(**SETTINGS))
    report = load_weights(fresh, path)
    assert not report.missing and not report.unexpected
    assert torch.equal(predict(fresh), predict(model))


def test_a_set_of_weights_is_chosen_by_its_key(model: DiT, tmp_path: Path) -> None:
    path = as_training_run(model.state_dict(), tmp_path)
    plain = load_state(path, key="model")
    assert torch.equal(plain["final_layer.linear.bias"], model.final_layer.linear.bias + 1)
    with pytest.raises(CheckpointError, match="no weights under key='opt'; it has model, ema, opt, args"):
        load_state(path, key="opt")
    with pytest.raises(CheckpointError, match="one set of weights"):
        load_state(as_safetensors(model.state_dict(), tmp_path), key="ema")


class Trojan:
    def __reduce__(self) -> Any:
        return os.system, ("echo harm",)


def garbage(path: Path, state: dict[str, Tensor]) -> None:
    path.write_bytes(b"<html>404: not found</html>" * 9)


def cut_short(path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-2000])


def cut_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-20])


def cut_header(path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:50])


def empty(path: Path, state: dict[str, Tensor]) -> None:
    path.write_bytes(b"")


def no_state(path: Path, state: dict[str, Tensor]) -> None:
    torch.save([1, 2], path)


def no_weights(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"epoch": 3, "opt": {"lr": 0.1}}, path)


def a_trojan(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"model": state, "extra": Trojan()}, path)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (garbage, "cannot read it safely"),
        (cut_short, "cannot read it safely"),
        (cut_safetensors, "not a whole safetensors file"),
        (cut_header, "not a whole safetensors file"),
        (empty, "cannot read it safely"),
        (no_state, "expected a state dict, found list"),
        (no_weights, "no weights in it; it has epoch, opt"),
        (a_trojan, "cannot read it safely"),
    ],
)
def test_a_damaged_or_foreign_file_changes_nothing(
    damage: Callable[..., None], word: str, model: DiT, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    damage(path, randomise(DiT(**SETTINGS)).state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=word) as error:
        load_weights(model, path)
    assert str(path) in str(error.value) and error.value.source == str(path)
    assert isinstance(error.value, ValueError)
    same(dict(model.state_dict()), before)
    assert "harm" not in capfd.readouterr().out


def test_incomplete_shards_and_folders(model: DiT, tmp_path: Path) -> None:
    index = as_shards(model.state_dict(), tmp_path)
    places = json.loads(index.read_text())
    (tmp_path / "part-1.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"not beside it: part-1\.safetensors"):
        load_state(index)
    (tmp_path / "part-1.safetensors").write_bytes((tmp_path / "part-0.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="do not hold") as error:
        load_state(index)
    assert error.value.missing
    places["weight_map"]["pos_embed"] = "../secret.safetensors"
    index.write_text(json.dumps(places))
    with pytest.raises(CheckpointError, match="not beside it"):
        load_state(index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not the index"):
        load_state(index)
    index.unlink()
    with pytest.raises(CheckpointError, match="expected one checkpoint in this folder, found part-0"):
        load_state(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        load_state(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_state(tmp_path / "nowhere.pt")


# ------------------------------------------------------------------------------------------------------------ loading


def test_what_does_not_fit_is_listed_and_changes_nothing(model: DiT) -> None:
    state = dict(randomise(DiT(**SETTINGS)).state_dict())
    for i in range(12):
        state[f"blocks.9.extra.{i}"] = torch.zeros(1)
    del state["blocks.1.attn.qkv.bias"]
    state["final_layer.linear.bias"] = torch.zeros(7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, state)
    text = str(error.value)
    for words in (
        "state dict: does not fit this DiT",
        "missing (1): blocks.1.attn.qkv.bias",
        "unexpected (12): blocks.9.extra.0, ",
        "and 4 more",
        "shape (1): final_layer.linear.bias: expected [32], got [7]",
    ):
        assert words in text
    assert error.value.missing == ["blocks.1.attn.qkv.bias"] and len(error.value.unexpected) == 12
    assert error.value.misshapen == {"final_layer.linear.bias": ((32,), (7,))}
    copied = pickle.loads(pickle.dumps(error.value))
    assert str(copied) == text and copied.unexpected == error.value.unexpected
    with pytest.raises(CheckpointError, match="shape"):
        load_weights(model, state, strict=False)
    same(dict(model.state_dict()), before)
    del state["final_layer.linear.bias"]
    report = load_weights(model, state, strict=False)
    assert report.missing == ["blocks.1.attn.qkv.bias", "final_layer.linear.bias"] and len(report.unexpected) == 12
    assert torch.equal(model.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    assert torch.equal(model.blocks[1].attn.qkv.bias, before["blocks.1.attn.qkv.bias"])


def test_type_and_place_are_those_of_the_model(model: DiT) -> None:
    state = {name: value.half() for name, value in model.state_dict().items() if name != "pos_embed"}
    wide = randomise(DiT(**SETTINGS)).double()
    weight, positions = wide.blocks[0].mlp.fc1.weight, wide.pos_embed.clone()
    load_weights(wide, state)  # positions are computed, so a file need not have them
    assert wide.blocks[0].mlp.fc1.weight is weight and weight.dtype is torch.float64
    assert torch.equal(weight, state["blocks.0.mlp.fc1.weight"].double())
    assert torch.equal(wide.pos_embed, positions)


def test_a_model_without_memory_gets_it_from_the_file(model: DiT) -> None:
    with torch.device("meta"):
        hollow = DiT(**SETTINGS).eval()
    without = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    with pytest.raises(CheckpointError, match=r"missing \(1\): pos_embed"):
        load_weights(hollow, without)
    load_weights(hollow, model.state_dict())
    assert torch.equal(predict(hollow), predict(model))
    assert all(p.requires_grad for p in hollow.parameters())


def test_any_module_can_be_loaded_and_saved(tmp_path: Path) -> None:
    tied = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    tied[1].weight = tied[0].weight  # safetensors alone refuses memory that is shared
    save_weights(tied, tmp_path / "m.safetensors")
    fresh = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    load_weights(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh[1].weight, tied[0].weight)
    with pytest.raises(CheckpointError, match="does not say which model"):
        load_model(tmp_path / "m.safetensors")


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_built_anew(dtype: torch.dtype, model: DiT, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    model.to(dtype).train()
    save_weights(model, path)
    found = load_model(path)
    assert type(found) is DiT and found.config == model.config and not found.training
    same(found.state_dict(), model.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.safetensors"]  # no temporary file is left
    text = randomise(TextDiT(4, 2, 4, 16, 1, 2, caption_channels=5, caption_tokens=3))
    save_weights(text, path)  # over the old one
    same(load_model(path).state_dict(), text.state_dict())


def test_a_failed_write_leaves_the_old_file(model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.safetensors"
    save_weights(model, path)
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_weights(model, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "kind", ["os.system", "fastdiff.models.dit.nobody", "fastdiff.models.no_such.DiT", "torch.nn.Linear"]
)
def test_a_header_names_only_our_models(kind: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", {"class": kind, "config": "{}"})
    with pytest.raises(CheckpointError, match="which model of fastdiff"):
        load_model(tmp_path / "m.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="which model"):
        load_model(tmp_path / "m.pt")


def test_folders_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4}
    theirs = randomise(diffusers.DiTTransformer2DModel(**settings, num_embeds_ada_norm=3))
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0, 2])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        for name in ("whole", "parts"):
            torch.testing.assert_close(load_model(tmp_path / name)(x, t, y), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "whole" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="got 'UNet2DModel'"):
        load_model(tmp_path / "whole")
    (tmp_path / "whole" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs a config\.json"):
        load_model(tmp_path / "whole")


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "dp"])
def test_wrappers_are_left_out(model: DiT, wrap: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    save_weights(wrap(model), tmp_path / "m.safetensors")
    same(load_model(tmp_path / "m.safetensors").state_dict(), model.state_dict())
    for source in (tmp_path / "m.safetensors", wrap(model).state_dict()):
        other = DiT(**SETTINGS)
        load_weights(wrap(other), source)
        same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_numbers_of_another_kind_are_refused(model: DiT, dtype: torch.dtype) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].to(dtype)
    with pytest.raises(
        CheckpointError, match=r"x_embedder\.proj\.weight: expected floating-point numbers, got torch\."
    ):
        load_weights(model, state)
    same(model.state_dict(), before)


def test_settings_that_build_nothing_and_folders_that_are_not_there(model: DiT, tmp_path: Path) -> None:
    model.config["no_such_setting"] = 1
    save_weights(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"DiT is not built from the settings in it .*no_such_setting"):
        load_model(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no such folder to write m\.safetensors into: .*absent"):
        save_weights(model, tmp_path / "absent" / "m.safetensors")
