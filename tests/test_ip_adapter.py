"""IP-Adapter: against a plain decoupled cross-attention and against diffusers; the model itself when it is off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models import DiT, TextDiT, UNet, load_weights
from fastdiff.models._unet_blocks import CrossAttention
from fastdiff.models.attention_hooks import attention_layers, capture_attention, inject_attention
from fastdiff.models.ip_adapter import ImageProjection, IPAdapter, Resampler


def text_unet() -> Any:
    model = UNet(3, 8, None, 1, (1, 2), (1, 2), num_heads=2, context_dim=6, norm_groups=4)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.numel() / max(parameter.shape[:1].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape) / fan**0.5)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 6, 5), torch.tensor([1.0, 50.0]), torch.randn(2, 4, 6), torch.randn(2, 10)


class PlainDecoupled(nn.Module):
    """Equation 5 written out, in place of a cross-attention layer of a copy of the model."""

    def __init__(self, layer: Any, keys: Any, tokens: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.keys, self.tokens, self.scale = layer, keys, tokens, scale

    def forward(self, x: Tensor, context: Any) -> Tensor:
        text, mask = context

        def heads(value: Tensor) -> Tensor:
            return value.unflatten(-1, (self.layer.num_heads, -1)).transpose(1, 2)

        q = heads(x @ self.layer.to_q.weight.T)

        def attend(tokens: Tensor, to_k: Any, to_v: Any, mask: Tensor | None) -> Tensor:
            scores = q @ heads(tokens @ to_k.weight.T).transpose(-1, -2) / q.shape[-1] ** 0.5
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
            return scores.softmax(-1) @ heads(tokens @ to_v.weight.T)

        out = attend(text, self.layer.to_k, self.layer.to_v, mask)
        out = out + self.scale * attend(self.tokens, self.keys.to_k_ip, self.keys.to_v_ip, None)
        return self.layer.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_plain_formulation(masked: bool) -> None:
    model = text_unet()
    x, t, text, image = inputs()
    cond = (text, torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]]).bool()) if masked else text
    plain, before = copy.deepcopy(model), model(x, t, cond)
    adapter = IPAdapter(model, 10, 3, 0.6)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.5)
    tokens = F.layer_norm(
        (image @ adapter.image_proj.proj.weight.T + adapter.image_proj.proj.bias).view(2, 3, 6),
        (6,),
        adapter.image_proj.norm.weight,
        adapter.image_proj.norm.bias,
    )
    names = list(attention_layers(plain, cross=True))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        keys = adapter.ip_adapter[adapter._keys_of[name]]
        setattr(plain.get_submodule(parent), leaf, PlainDecoupled(plain.get_submodule(name), keys, tokens, 0.6))
    expected = plain(x, t, cond)
    found = adapter(x, t, cond, image=image)
    assert (expected - before).abs().max() > 0.01 * before.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with adapter.image(image):
        assert torch.equal(model(x, t, cond), found)

    # Off in every way: exactly the model.
    assert torch.equal(model(x, t, cond), before)
    adapter.scale = 0.0
    assert torch.equal(adapter(x, t, cond, image=image), before)
    adapter.scale = 1.0
    adapter.remove()
    assert torch.equal(adapter(x, t, cond, image=image), before)
    assert all(m.processor is None for m in attention_layers(model).values())


@torch.no_grad()
def test_on_a_transformer_equals_its_own_attention_to_the_image() -> None:
    """At first keys are those of the text: the image's tokens as the caption give the same attention."""
    model = TextDiT(8, 2, 3, 16, 1, 2, 2.0, caption_channels=6, caption_tokens=4)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) / (parameter.numel() / len(parameter)) ** 0.5)
    model.blocks[0].cross_attn.kv_linear.bias.zero_()
    adapter = IPAdapter(model.eval(), 10, 3, 1.0)
    layer, x = model.blocks[0].cross_attn, torch.randn(2, 16, 16)
    text, image, mask = torch.randn(2, 4, 16), torch.randn(2, 10), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    off = layer(x, text, mask)
    with adapter.image(image):
        on = layer(x, text, mask)
    expected = layer(x, adapter.image_proj(image)) - layer.proj.bias
    assert (on - off - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_works_with_hooks_and_one_image_for_a_batch() -> None:
    model = text_unet()
    x, t, text, image = inputs()
    adapter = IPAdapter(model, 10)
    expected = adapter(x, t, text, image=image)
    with capture_attention(model, cross=True) as maps:
        assert torch.equal(adapter(x, t, text, image=image), expected)
    assert all(m[0].shape[-1] == 4 for m in maps.values())  # the text's map
    with inject_attention(model, maps):
        found = adapter(x, t, text, image=image)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    twice = adapter(x, t, text, image=image[:1].repeat(2, 1))
    assert (adapter(x, t, text, image=image[:1]) - twice).abs().max() <= 1e-6 * twice.abs().max()
    with pytest.raises(ValueError, match=r"\[IPAdapter\] image: expected a batch that divides the model's, 2, got 3"):
        adapter(x, t, text, image=torch.randn(3, 10))


def test_only_the_adapter_learns() -> None:
    model = text_unet()
    x, t, text, image = inputs()
    frozen = copy.deepcopy(model.state_dict())
    adapter = IPAdapter(model, 10)
    # At first keys and values are those of the text.
    name = next(iter(attention_layers(model, cross=True)))
    assert torch.equal(adapter.ip_adapter[adapter._keys_of[name]].to_k_ip.weight, model.get_submodule(name).to_k.weight)
    assert not any(key.startswith("_model") for key in adapter.state_dict())
    before = adapter(x, t, text, image=image)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    before.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert (adapter(x, t, text, image=image) - before).abs().max() > 1e-4
    assert set(model.state_dict()) == set(frozen)
    assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_published_files_load_and_equal_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    from fastdiff.models import unet_from_diffusers

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
    ).eval()
    ours = unet_from_diffusers(unet)
    widths = {1: 32, 3: 32, 5: 32, 7: 64}  # down, up, up, middle: the order of diffusers' attention processors
    keys = {
        f"{i}.{name}.weight": torch.randn(w, 24) * 0.2 for i, w in widths.items() for name in ("to_k_ip", "to_v_ip")
    }
    projection = {k: torch.randn(v.shape) * 0.3 for k, v in ImageProjection(10, 24, 4).state_dict().items()}
    published = {"image_proj": projection, "ip_adapter": keys}
    adapter = IPAdapter(ours, 10)
    adapter.load_state_dict(published)
    assert {"image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"} <= set(adapter.state_dict())
    unet._load_ip_adapter_weights([copy.deepcopy(published)], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    adapter.scale = 0.7
    x, t, text, image = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 24), torch.randn(2, 1, 10)
    expected = unet(x, t, text, added_cond_kwargs={"image_embeds": [image]}).sample
    found = adapter(x, t, text, image=image[:, 0])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(RuntimeError, match=r"Missing key.*ip_adapter\.7\.to_v_ip"):
        adapter.load_state_dict({k: v for k, v in adapter.state_dict().items() if "7.to_v" not in k})


@torch.no_grad()
def test_resampler_equals_diffusers() -> None:
    pytest.importorskip("diffusers", exc_type=ImportError)
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    ours = Resampler(10, 6, 5, width=12, depth=2, num_heads=3, head_dim=4)
    for parameter in ours.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    theirs = IPAdapterPlusImageProjection(10, 6, 12, depth=2, dim_head=4, heads=3, num_queries=5, ffn_ratio=4)
    state = {}
    for key, value in ours.state_dict().items():  # the names of the published files, as diffusers renames them
        key = key.replace(".0.to", ".attn.to").replace("to_out", "to_out.0")
        key = key.replace("0.norm1", "ln0").replace("0.norm2", "ln1")
        for place, name in (("1.0.", "ff.0."), ("1.1.", "ff.1.net.0.proj."), ("1.3.", "ff.1.net.2.")):
            head, _, tail = key.partition(".")
            if head == "layers" and tail[2:].startswith(place):
                key = f"{head}.{tail[:2]}{name}{tail[2:].removeprefix(place)}"
        if "to_kv" in key:
            to_k, to_v = value.chunk(2)
            state[key.replace("to_kv", "to_k")], state[key.replace("to_kv", "to_v")] = to_k, to_v
        else:
            state[key] = value
    theirs.load_state_dict(state)
    features = torch.randn(2, 7, 10)
    assert (ours(features) - theirs(features)).abs().max() < 1e-5
    adapter = IPAdapter(text_unet(), 10, image_proj=ours)
    x, t, text, _ = inputs()
    assert adapter(x, t, text, image=features).isfinite().all()


def test_bad_models() -> None:
    with pytest.raises(ValueError, match=r"\[IPAdapter\] model: expected cross-attention layers inside, got DiT"):
        IPAdapter(DiT(8, 2, 3, 16, 1, 2), 10)
    layer = nn.Module()
    layer.is_cross, layer.processor = True, None
    with pytest.raises(ValueError, match="to_k, to_v or kv_linear"):
        IPAdapter(nn.Sequential(layer), 10)
    with pytest.raises(ValueError, match="tokens of one width, got"):
        IPAdapter(nn.Sequential(CrossAttention(8, 4, 2), CrossAttention(8, 5, 2)), 10)


def test_trains_under_gradient_checkpointing() -> None:
    """The image is put away again before the backward pass."""
    model = TextDiT(4, 2, 3, 16, 2, 2, 2.0, caption_channels=6, caption_tokens=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    adapter = IPAdapter(model.eval(), 10)
    args, image = (torch.randn(2, 3, 4, 4), torch.tensor([1.0, 50.0]), torch.randn(2, 4, 6)), torch.randn(2, 10)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        adapter.zero_grad()
        adapter(*args, image=image).square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_published_file_loads_with_load_weights(tmp_path: Path) -> None:
    adapter, other = IPAdapter(text_unet(), 10), IPAdapter(text_unet(), 10)
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, _, name = key.partition(".")
        nested[part][name] = value
    torch.save(nested, tmp_path / "ip-adapter.bin")
    load_weights(other, tmp_path / "ip-adapter.bin")
    torch.testing.assert_close(other.state_dict(), adapter.state_dict(), rtol=0, atol=0)
