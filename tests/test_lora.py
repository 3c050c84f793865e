"""LoRA through peft: only its matrices learn, our products do not go around it, merged weights give the same."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models import CheckpointError, DiT, TextDiT, UNet
from fastdiff.models.lora import add_lora, default_targets, load_lora, merge_lora, save_lora

peft = pytest.importorskip("peft", exc_type=ImportError)


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.numel() / max(parameter.shape[:1].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape) / fan**0.5)
    return model.eval()


def dit_case() -> tuple[Any, tuple[Tensor, ...]]:
    args = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 50.0]), torch.tensor([0, 3])
    return randomised(DiT(8, 2, 3, 16, 2, 2, 2.0, 0.1, 5)), args


def text_dit_case() -> tuple[Any, tuple[Any, ...]]:
    model = TextDiT(8, 2, 3, 16, 3, 2, 2.0, caption_channels=6, caption_tokens=4)
    args = (
        torch.randn(2, 3, 8, 8),
        torch.tensor([1.0, 50.0]),
        (torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()),
    )
    return randomised(model), args


def unet_case() -> tuple[Any, tuple[Tensor, ...]]:
    model = UNet(3, 8, None, 1, (1, 2), (1, 2), num_heads=2, context_dim=6, norm_groups=4)
    return randomised(model), (torch.randn(2, 3, 6, 5), torch.tensor([1.0, 50.0]), torch.randn(2, 4, 6))


def adm_case() -> tuple[Any, tuple[Tensor, ...]]:
    model = UNet(3, 8, None, 1, (2,), (1, 2), num_heads=2, num_classes=4, norm_groups=4)
    return randomised(model), (torch.randn(2, 3, 6, 6), torch.tensor([1.0, 50.0]), torch.tensor([0, 3]))


CASES = {"dit": dit_case, "text_dit": text_dit_case, "unet": unet_case, "adm": adm_case}


def learn(model: Any, args: tuple[Tensor, ...], steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    target = torch.randn_like(model(*args))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(*args) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_trains_merges_saves_and_loads(name: str, tmp_path: Path) -> None:
    plain, args = CASES[name]()
    with torch.no_grad():
        before = plain(*args)
    model = add_lora(copy.deepcopy(plain), rank=3, alpha=6)
    with torch.no_grad():
        assert (model(*args) - before).abs().max() <= 1e-5 * before.abs().max()  # B is zero at first
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in n for n in learning)
    assert len(learning) == 2 * len(default_targets(plain))
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_B")]
    assert all(layer.scaling["default"] == 2.0 and layer.r["default"] == 3 for layer in layers)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in learning}
    learn(model, args)
    for n, p in model.named_parameters():
        if n in learning:
            assert p.grad is not None and p.grad.abs().sum() > 0, n
        else:
            assert p.grad is None and torch.equal(p, frozen[n]), n

    save_lora(model, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    with torch.no_grad():
        after = model(*args)
        assert (after - before).abs().max() > 1e-3 * before.abs().max()
        # What is adapted counts, without gradients too: our products go around plain layers only.
        for layer in layers[:: max(len(layers) // 8, 1)]:
            layer.scaling["default"] *= 3
            assert not torch.equal(model(*args), after)
            layer.scaling["default"] /= 3
        loaded = load_lora(copy.deepcopy(plain), tmp_path)
        assert (loaded(*args) - after).abs().max() <= 1e-5 * after.abs().max()
        assert not any(p.requires_grad for p in loaded.parameters())
        merged = merge_lora(model)
        assert type(merged) is type(plain) and set(merged.state_dict()) == set(plain.state_dict())
        assert (merged(*args) - after).abs().max() <= 1e-5 * after.abs().max()


def test_default_targets() -> None:
    assert default_targets(dit_case()[0]) == [f"blocks.{i}.attn.{n}" for i in range(2) for n in ("proj", "qkv")]
    unet = default_targets(unet_case()[0])
    assert "middle_block.1.transformer_blocks.0.attn2.to_k" in unet
    assert "middle_block.1.transformer_blocks.0.attn1.to_out.0" in unet
    assert not any(".ff." in n or "emb" in n for n in unet)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj, self.x_proj, self.out_proj = (nn.Linear(4, 4) for _ in range(3))

    assert default_targets(nn.Sequential(Mixer())) == ["0.in_proj", "0.out_proj"]
    with pytest.raises(ValueError, match="expected attention or Mamba layers inside, got Linear"):
        default_targets(nn.Linear(2, 2))


def test_targets_of_the_callers_choice() -> None:
    model, args = dit_case()
    with torch.no_grad():
        before = model(*args)
    adapted = add_lora(model, 2, targets=["fc1", "fc2"])
    assert {n.split(".lora_")[0].split(".")[-1] for n, p in adapted.named_parameters() if p.requires_grad} == {
        "fc1",
        "fc2",
    }
    learn(adapted, args)
    with torch.no_grad():
        assert (adapted(*args) - before).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"(?i)target modules"):
        add_lora(dit_case()[0], targets=["nothing"])


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = dit_case()
    with pytest.raises(ValueError, match=r"\[add_lora\] rank: expected at least 1, got 0"):
        add_lora(model, 0)
    with pytest.raises(ValueError, match=r"dropout: expected a value in \[0, 1\), got 1"):
        add_lora(model, dropout=1.0)
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config\.json in"):
        load_lora(model, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff\[models\]'"):
        add_lora(model)


def test_a_lora_of_another_model_or_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """peft leaves out, without a word, what it finds no layer for."""
    deep = randomised(DiT(8, 2, 3, 16, 3, 2, 2.0, 0.1, 5))
    save_lora(add_lora(deep, 2), tmp_path)
    model, _ = dit_case()
    before = list(model.state_dict())
    with pytest.raises(CheckpointError, match=r"no LoRA of this DiT\n.*blocks\.2\.attn\.proj\.lora_A"):
        load_lora(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_lora(model, tmp_path)
    assert list(model.state_dict()) == before
    with pytest.raises(TypeError, match=r"\[merge_lora\] model: .*got DiT"):
        merge_lora(model)


def test_modulation_weights_under_a_lora_are_not_dropped() -> None:
    model = add_lora(dit_case()[0], 2, targets=["adaLN_modulation.1"])
    with pytest.raises(ValueError, match=r"expected layers of torch.nn.Linear, got peft\.\S*Linear"):
        model.base_model.model.drop_modulation_weights()
