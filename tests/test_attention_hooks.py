"""Attention captured, injected and edited: against plain maps, in the layers named, and gone afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models import DiT, TextDiT, UNet
from fastdiff.models.attention_hooks import (
    AttentionCall,
    attach_attention,
    attention_layers,
    capture_attention,
    edit_attention,
    inject_attention,
)
from fastdiff.models.edm2 import EDM2UNet

Run = Callable[[], Tensor]


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) / (parameter.numel() / max(parameter.shape[:1].numel(), 1)) ** 0.5
            )
    return model.eval()


def dit_case() -> tuple[nn.Module, tuple[Any, ...]]:
    model = DiT(8, 2, 3, 16, 3, 2, 2.0, 0.1, 5)
    return randomised(model), (torch.randn(2, 3, 8, 8), torch.tensor([1.0, 50.0]), torch.tensor([0, 3]))


def text_dit_case() -> tuple[nn.Module, tuple[Any, ...]]:
    model = TextDiT(8, 2, 3, 16, 3, 2, 2.0, caption_channels=6, caption_tokens=4)
    args = (
        torch.randn(2, 3, 8, 8),
        torch.tensor([1.0, 50.0]),
        (torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1]]).bool()),
    )
    return randomised(model), args


def unet_case() -> tuple[nn.Module, tuple[Any, ...]]:
    model = UNet(3, 8, None, 1, (1, 2), (1, 2), num_heads=2, context_dim=6, norm_groups=4)
    return randomised(model), (torch.randn(2, 3, 6, 5), torch.tensor([1.0, 50.0]), torch.randn(2, 4, 6))


def adm_case() -> tuple[nn.Module, tuple[Any, ...]]:
    model = UNet(3, 8, None, 1, (2,), (1, 2), num_heads=2, num_classes=4, norm_groups=4)
    return randomised(model), (torch.randn(2, 3, 6, 6), torch.tensor([1.0, 50.0]), torch.tensor([0, 3]))


def edm2_case() -> tuple[nn.Module, tuple[Any, ...]]:
    model = EDM2UNet(3, 8, 1, (1, 2), (2,), head_dim=4, num_classes=3)
    return randomised(model), (torch.randn(2, 3, 6, 6), torch.tensor([0.1, 0.5]), torch.tensor([0, 2]))


CASES = {"dit": dit_case, "text_dit": text_dit_case, "unet": unet_case, "adm": adm_case, "edm2": edm2_case}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Any, ...]]:
    return CASES[request.param]()


def processors(model: nn.Module) -> list[Any]:
    return [m.processor for m in attention_layers(model).values()]


@torch.no_grad()
def test_captured_maps_are_those_of_q_and_k_and_change_nothing(case: Any) -> None:
    model, args = case
    before = model(*args)
    with capture_attention(model) as maps, capture_attention(model, what="qk") as qk:
        with capture_attention(model, what="output") as outputs:
            # The same bits: the fused kernel still makes the output. (Masks of `TextDiT` are scaled in another place.)
            found = model(*args)
            exact = torch.equal(found, before) or isinstance(model, TextDiT)
            assert exact and (found - before).abs().max() <= 1e-5 * before.abs().max()
        model(*args)
    assert set(maps) == set(qk) == set(outputs) == set(attention_layers(model))
    for name in maps:
        assert [len(r[name]) for r in (maps, qk, outputs)] == [2, 2, 1]
        q, k = qk[name][0]
        scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
        assert (maps[name][0] - scores.softmax(-1)).abs().max() < 1e-5
        assert maps[name][0].sum(-1).sub(1).abs().max() < 1e-5
        assert outputs[name][0].shape[:3] == q.shape[:3]
        assert torch.equal(maps[name][0], maps[name][1])
    assert processors(model) == [None] * len(maps)
    assert torch.equal(model(*args), before)


@torch.no_grad()
@pytest.mark.parametrize("what", ["probs", "qk"])
def test_injecting_what_was_captured(case: Any, what: str) -> None:
    """A model's own attention injected changes nothing; another run's makes it depend on that run."""
    model, args = case
    others = (args[0].flip(0), *args[1:])
    before, other = model(*args), model(*others)
    with capture_attention(model, what=what) as own:
        model(*args)
    with inject_attention(model, own, what=what) as counts:
        assert (model(*args) - before).abs().max() <= 1e-5 * before.abs().max()
        assert set(counts.values()) == {1}
        with pytest.raises(ValueError, match="expected an entry for call 1"):
            model(*args)
    with inject_attention(model, own, what=what):
        mixed = model(*others)
    assert (mixed - other).abs().max() > 1e-3 * other.abs().max()
    assert torch.equal(model(*others), other)


@torch.no_grad()
def test_an_injected_map_is_what_the_output_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = dit_case()
    layer = model.blocks[1].attn
    seen: dict[str, Tensor] = {}
    chosen = torch.rand(2, 2, 16, 16)

    def spy(call: AttentionCall, attend: Any) -> Tensor:
        seen.update(v=call.v, probs=call.map(), out=attend(call))
        return seen["out"]

    with edit_attention(model, spy, layers="blocks.1.attn"):
        with inject_attention(model, lambda name, i: chosen if i == 0 else None, layers=["blocks.1.attn"]):
            model(*args)
            assert torch.equal(seen["probs"], chosen)
            expected = torch.einsum("bhnm,bmhd->bnhd", chosen, seen["v"])
            assert (seen["out"] - expected).abs().max() < 1e-5
            model(*args)
            assert not torch.equal(seen["probs"], chosen)  # None left the second call alone
        assert layer.processor is not None
    assert layer.processor is None


@torch.no_grad()
def test_layers_not_named_stay_on_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = unet_case()
    cross = attention_layers(model, cross=True)
    assert set(cross) | set(attention_layers(model, cross=False)) == set(attention_layers(model))
    assert all(name.endswith("attn2") for name in cross)
    made: list[int] = []
    plain = ops.attention_probs
    monkeypatch.setattr(ops, "attention_probs", lambda *a, **k: made.append(1) or plain(*a, **k))
    with capture_attention(model, layers="middle_block.*", cross=True) as maps:
        model(*args)
    assert len(made) == 1 and list(maps) == ["middle_block.1.transformer_blocks.0.attn2"]
    assert maps["middle_block.1.transformer_blocks.0.attn2"][0].shape == (2, 2, 9, 4)
    with capture_attention(
        model, layers=lambda name, m: m.is_cross and "input" in name, transform=lambda p: p.mean(1)
    ) as maps:
        model(*args)
    assert len(maps) == 2 and all(m[0].dim() == 3 for m in maps.values())
    assert len(made) == 3


@torch.no_grad()
def test_contexts_nest_in_any_order_and_restore_after_exceptions() -> None:
    model, args = dit_case()
    before = model(*args)

    def doubled(call: AttentionCall, attend: Any) -> Tensor:
        return 2 * attend(call)

    def zero(call: AttentionCall, attend: Any) -> Tensor:
        return torch.zeros_like(call.q)

    with edit_attention(model, doubled):
        once = model(*args)
        with edit_attention(model, zero, layers="blocks.0.*"):
            with pytest.raises(RuntimeError, match="in the middle"), edit_attention(model, doubled):
                raise RuntimeError("in the middle")
            assert (model(*args) - once).abs().max() > 1e-4
        assert torch.equal(model(*args), once)
    assert torch.equal(model(*args), before)

    first = attach_attention(model, doubled)
    second = attach_attention(model, zero)
    first()  # from under the second
    first()
    none = model(*args)
    second()
    assert processors(model) == [None] * 3
    assert torch.equal(model(*args), before)
    with edit_attention(model, zero):
        assert torch.equal(model(*args), none)


@torch.no_grad()
def test_a_processor_of_the_users_own_stays_behind_ours() -> None:
    model, args = dit_case()
    layer = model.blocks[0].attn
    layer.processor = lambda module, q, k, v: torch.zeros_like(q)
    expected = model(*args)
    with capture_attention(model) as maps:
        assert torch.equal(model(*args), expected)
    assert len(maps["blocks.0.attn"]) == 1
    with inject_attention(model, maps, layers="blocks.0.attn"), pytest.raises(ValueError, match="processor of its own"):
        model(*args)
    assert layer.processor is not None


def test_gradients_and_copies() -> None:
    model, args = unet_case()
    text = args[2].requires_grad_()

    def sharper(call: AttentionCall, attend: Any) -> Tensor:
        return attend(replace(call, q=1.5 * call.q))

    model(*args).sum().backward()
    plain, text.grad = text.grad, None
    with capture_attention(model, cross=True) as maps:
        model(*args).sum().backward()
    assert (text.grad - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert not any(m[0].requires_grad for m in maps.values())
    with edit_attention(model, sharper):
        twin = copy.deepcopy(model)
        edited = model(*args)
    assert torch.equal(twin(*args), edited)
    assert not torch.equal(model(*args), edited)


def test_bad_arguments() -> None:
    model, args = dit_case()
    with pytest.raises(ValueError, match=r"layers: expected some of .*blocks\.0\.attn.*got 'block"):
        attention_layers(model, ["block.0.attn"])
    with pytest.raises(ValueError, match="expected attention layers inside, got Linear"):
        attention_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="what: expected one of"), capture_attention(model, what="map"):
        pass
    with pytest.raises(ValueError, match="what: expected one of"), inject_attention(model, {}, what="output"):
        pass
    message = r"source: expected an entry for 'blocks\.0\.attn'"
    with pytest.raises(ValueError, match=message), inject_attention(model, {}, layers="blocks.0.attn"):
        pass
    wrong = {"blocks.0.attn": [torch.rand(2, 2, 16, 15)]}
    with inject_attention(model, wrong), pytest.raises(ValueError, match=r"attention_inject.*probs"):
        model(*args)
    assert processors(model) == [None] * 3


@pytest.mark.parametrize("case", [dit_case, text_dit_case], ids=["dit", "text_dit"])
def test_hooks_act_once_under_gradient_checkpointing(case: Callable[[], tuple[Any, tuple[Any, ...]]]) -> None:
    """The backward pass may come after the context, and must not run a block without its hook, or a hook twice."""
    model, args = case()
    with capture_attention(model) as maps:
        model(torch.randn_like(args[0]), *args[1:])
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        with inject_attention(model, maps), capture_attention(model) as seen:
            loss = model(*args).square().sum()
        loss.backward()
        assert all(len(calls) == 1 for calls in seen.values())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(gradients[1], gradients[0])
