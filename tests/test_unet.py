"""The U-Net against diffusers' and against a plain ADM written here from the published key names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.models import UNet, unet_from_diffusers
from fastdiff.models._unet_blocks import CrossAttention

ADM: dict[str, Any] = {
    "in_channels": 3,
    "model_channels": 8,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "head_dim": 4,
    "num_classes": 5,
    "class_dropout_prob": 0.1,
    "norm_groups": 4,
}
TEXT: dict[str, Any] = {**ADM, "num_classes": 0, "class_dropout_prob": 0.0, "context_dim": 6}


def random_unet(dtype: torch.dtype = torch.float64, **settings: Any) -> UNet:
    """A U-Net in which nothing is zero."""
    model = UNet(**settings).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = max(parameter[0].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / math.sqrt(fan))
    return model


def inputs(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, *size, dtype=dtype), torch.tensor([1.0, 37.25], dtype=dtype), torch.tensor([0, 5])


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape and a.isfinite().all()
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def plain_adm(w: dict[str, Tensor], c: dict[str, Any], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """ADM as its state dict describes it: modules are recognised by their key names alone."""

    def conv(name: str, value: Tensor, stride: int = 1) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(value, weight, w[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def norm(name: str, value: Tensor) -> Tensor:
        groups = value.unflatten(1, (c["norm_groups"], -1)).flatten(2)
        unit = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return unit.reshape(value.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def resized(value: Tensor, name: str) -> Tensor:
        if not c["resblock_updown"] or name not in moved:
            return value
        if moved[name] == "down":
            return (value[..., ::2, ::2] + value[..., 1::2, ::2] + value[..., ::2, 1::2] + value[..., 1::2, 1::2]) / 4
        return value.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def res(name: str, value: Tensor) -> Tensor:
        h = conv(f"{name}.in_layers.2", resized(F.silu(norm(f"{name}.in_layers.0", value)), name))
        mods = linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if c["use_scale_shift_norm"]:
            scale, shift = mods.chunk(2, 1)
            h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm(f"{name}.out_layers.0", h + mods)
        h, skip = conv(f"{name}.out_layers.3", F.silu(h)), resized(value, name)
        return h + (conv(f"{name}.skip_connection", skip) if f"{name}.skip_connection.weight" in w else skip)

    def attention(name: str, value: Tensor) -> Tensor:
        b, channels, height, width = value.shape
        heads = channels // c["head_dim"]
        qkv = linear(f"{name}.qkv", norm(f"{name}.norm", value).flatten(2).transpose(1, 2)).transpose(1, 2)
        if c["use_new_attention_order"]:
            q, k, v = (part.reshape(b * heads, -1, height * width) for part in qkv.chunk(3, 1))
        else:
            q, k, v = qkv.reshape(b * heads, -1, height * width).chunk(3, 1)
        maps = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(c["head_dim"])).softmax(-1)
        h = torch.einsum("bts,bcs->bct", maps, v).reshape(b, channels, -1).transpose(1, 2)
        return value + linear(f"{name}.proj_out", h).transpose(1, 2).reshape(value.shape)

    def stage(name: str, value: Tensor) -> Tensor:
        for i in range(3):
            one = f"{name}.{i}"
            if f"{one}.in_layers.0.weight" in w:
                value = res(one, value)
            elif f"{one}.qkv.weight" in w:
                value = attention(one, value)
            elif f"{one}.op.weight" in w:
                value = conv(f"{one}.op", value, 2)
            elif f"{one}.conv.weight" in w:
                value = conv(f"{one}.conv", value.repeat_interleave(2, 2).repeat_interleave(2, 3))
            elif f"{one}.weight" in w:
                value = conv(one, value)
        return value

    moved = {"input_blocks.2.0": "down", "output_blocks.1.2": "up"}
    frequencies = torch.tensor([10000 ** (-i / 4) for i in range(4)], dtype=x.dtype)
    angles = t[:, None] * c["time_scale"] * frequencies
    emb = linear("time_embed.2", F.silu(linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))))
    emb = emb + w["label_emb.weight"][labels]
    skips = []
    for i in range(4):
        x = stage(f"input_blocks.{i}", x)
        skips.append(x)
    x = stage("middle_block", x)
    for i in range(4):
        x = stage(f"output_blocks.{i}", torch.cat([x, skips.pop()], 1))
    return conv("out.2", F.silu(norm("out.0", x)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "flags", [(False, False, False), (True, True, False), (True, False, True), (False, True, True)]
)
def test_adm_equals_a_plain_formulation(dtype: torch.dtype, tolerance: float, flags: tuple[bool, ...]) -> None:
    names = ("use_scale_shift_norm", "resblock_updown", "use_new_attention_order")
    model = random_unet(dtype, **ADM, **dict(zip(names, flags, strict=True)), learn_sigma=True, time_scale=10.0)
    x, t, labels = inputs(dtype)
    weights = {k: v.double() for k, v in model.state_dict().items()}
    expected = plain_adm(weights, model.config, x.double(), t.double() / 10.0, labels)
    with torch.no_grad():
        found = model(x, t / 10.0, labels)
        unconditional = model(x, t / 10.0)
    assert found.shape == (2, 6, 8, 8)
    close(found.double(), expected, tolerance)
    close(unconditional[1], found[1], 1e-5)  # label 5 is the null class
    assert (unconditional[0] - found[0]).abs().max() > 1e-3


def test_published_weights_with_1x1_convolutions_load() -> None:
    """qkv and proj_out of ADM are Conv1d, proj_in and proj_out of Stable Diffusion Conv2d: trailing ones."""
    for settings, ones in ((ADM, 1), (TEXT, 2)):
        model = random_unet(**settings)
        names = ("qkv.weight", "proj_out.weight", "proj_in.weight")
        stored = {
            k: v.unflatten(1, (-1, *[1] * ones)) if k.endswith(names) else v for k, v in model.state_dict().items()
        }
        assert any(v.dim() > 2 and k.endswith("proj_out.weight") for k, v in stored.items())
        other = UNet(**settings).double()
        other.load_state_dict(stored)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        with pytest.raises(RuntimeError, match=r"Missing key.*out\.2\.bias"):
            other.load_state_dict({k: v for k, v in stored.items() if k != "out.2.bias"})
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict(
                {
                    k: v[..., None].repeat(1, 1, 1, 3) if k.endswith("qkv.weight") or "attn1.to_q" in k else v
                    for k, v in model.state_dict().items()
                }
            )


def test_files_of_whole_models_and_of_diffusers(tmp_path: Path, diffusers: Any) -> None:
    from fastdiff.models import CheckpointError, load_weights

    theirs = diffusers_unet(diffusers, attention_head_dim=2)
    ours = unet_from_diffusers(theirs)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(theirs.state_dict(), str(tmp_path / "diffusers.safetensors"))
    convolutions = ("proj_in.weight", "proj_out.weight")
    whole = {
        f"model.diffusion_model.{k}": v[:, :, None, None] if k.endswith(convolutions) else v
        for k, v in ours.state_dict().items()
    }
    torch.save({"state_dict": {**whole, "first_stage_model.decoder.bias": torch.zeros(3)}}, tmp_path / "sd.ckpt")
    for name in ("diffusers.safetensors", "sd.ckpt"):
        other = UNet(**ours.config)
        load_weights(other, tmp_path / name)
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in other.state_dict().items())
    del whole["model.diffusion_model.out.2.bias"]
    torch.save(whole, tmp_path / "sd.ckpt")
    with pytest.raises(CheckpointError, match=r"missing \(1\): out\.2\.bias"):
        load_weights(UNet(**ours.config), tmp_path / "sd.ckpt")


def test_stable_diffusion_key_names() -> None:
    """What tools look for in a checkpoint of Stable Diffusion 1.x, at its real depth."""
    with torch.device("meta"):
        keys = UNet(num_heads=8, context_dim=768).state_dict()
    assert len(keys) == 686
    assert sum(v.numel() for v in keys.values()) == 859_520_964
    for name, shape in {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.proj_out.bias": (320,),
        "out.2.weight": (4, 320, 3, 3),
    }.items():
        assert keys[name].shape == shape, name


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers", exc_type=ImportError)


def diffusers_unet(diffusers: Any, **settings: Any) -> Any:
    arguments: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
    }
    return diffusers.UNet2DConditionModel(**{**arguments, **settings}).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_head_dim": 2},
        {"attention_head_dim": (2, 4), "use_linear_projection": True},
        {
            "attention_head_dim": 4,
            "resnet_time_scale_shift": "scale_shift",
            "norm_num_groups": 16,
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        },
    ],
)
def test_equal_to_diffusers(diffusers: Any, settings: dict[str, Any]) -> None:
    theirs = diffusers_unet(diffusers, **settings)
    ours = unet_from_diffusers(theirs)
    t, text = torch.tensor([3, 500]), torch.randn(2, 5, 24)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    with torch.no_grad():
        for size in ((8, 8), (9, 7)):
            x = torch.randn(2, 4, *size)
            close(ours(x, t, text), theirs(x, t, text).sample, 1e-5)
            nhwc = ours.to(memory_format=torch.channels_last)
            close(nhwc(x.to(memory_format=torch.channels_last), t, text), theirs(x, t, text).sample, 1e-5)
        close(ours(x, t, (text, mask)), theirs(x, t, text, encoder_attention_mask=mask).sample, 1e-5)


def test_gradients_equal_diffusers(diffusers: Any) -> None:
    from fastdiff.models._unet_keys import rename_unet_keys

    theirs = diffusers_unet(diffusers, attention_head_dim=2)
    ours = unet_from_diffusers(theirs)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 24)
    theirs(x, t, text).sample.square().mean().backward()
    ours(x, t, text).square().mean().backward()
    expected = rename_unet_keys({k: p.grad for k, p in theirs.named_parameters()})
    largest = max(g.abs().max() for g in expected.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        found = parameter.grad.reshape(expected[name].shape)
        assert (found - expected[name]).abs().max() <= 1e-4 * largest, name


def test_options_that_the_unet_lacks_are_refused_by_name(diffusers: Any) -> None:
    theirs = diffusers_unet(diffusers, attention_head_dim=2, class_embed_type="timestep", upcast_attention=True)
    with pytest.raises(ValueError, match=r"class_embed_type='timestep'.*upcast_attention=True"):
        unet_from_diffusers(theirs)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_head_dims_of_stable_diffusion_and_masks(width: int) -> None:
    layer = CrossAttention(2 * width, 24, 2)
    x, text = torch.randn(2, 9, 2 * width), torch.randn(2, 7, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1, 1]]).bool()
    with torch.no_grad():
        found = layer(x, (text, mask))
        for i in range(2):  # a masked token is as one that is not there
            close(found[i : i + 1], layer(x[i : i + 1], (text[i : i + 1, mask[i]], None)), 1e-5)
        assert torch.equal(layer(x, (text + 9 * ~mask[:, :, None], mask)), found)


def test_backends_types_and_gradients() -> None:
    model = random_unet(torch.float32, **TEXT)
    x, t, _ = inputs(torch.float32, (6, 5))
    text = torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = model(x, t, text)
        with fastdiff.use_backend("reference"):
            close(model(x, t, text), expected, 1e-5)
        close(model.double()(x.double(), t.double(), text.double()).float(), expected, 1e-5)
        half = model.bfloat16()(x.bfloat16(), t, text.bfloat16())
        assert half.dtype is torch.bfloat16
        close(half.float(), expected, 0.1)
        close(model.float()(x[:1], t[:1], text[:1]), model(x, t, text)[:1], 1e-5)
    double = random_unet(**{**TEXT, "channel_mult": (1,), "attention_resolutions": (1,)})
    text = text.double().requires_grad_()
    image = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: double(a, t[:1].double(), b), (image, text[:1].detach().requires_grad_())
    )


def test_compiles_whole() -> None:
    model = random_unet(torch.float32, **{**TEXT, "channel_mult": (1,), "attention_resolutions": (1,)})
    x, t, _ = inputs(torch.float32)
    text = torch.randn(2, 3, 6)
    with torch.no_grad():
        close(torch.compile(model, backend="eager", fullgraph=True)(x, t, text), model(x, t, text), 1e-6)


def test_residuals_of_control_are_added_to_skips_and_middle() -> None:
    model = random_unet(**ADM)
    x, t, labels = inputs()
    emb, _, skips, middle = model.encode(x, t, labels)
    control = [None, *(torch.randn_like(s) for s in skips[1:]), torch.randn_like(middle)]
    h = middle + control[-1]
    for i, stage in enumerate(model.output_blocks):
        skip = skips[-1 - i] if control[-2 - i] is None else skips[-1 - i] + control[-2 - i]
        h = stage(torch.cat([h, skip], 1), emb, None)
    close(model(x, t, labels, control=control), model.out(h), 1e-12)
    assert torch.equal(model(x, t, labels, control=[None] * 5), model(x, t, labels))
    with pytest.raises(ValueError, match=r"control: expected 5 entries.*got 2"):
        model(x, t, labels, control=[None, None])


def test_starts_as_zero_and_drops_classes_in_training() -> None:
    model = UNet(**{**ADM, "class_dropout_prob": 1.0})
    x, t, labels = inputs(torch.float32)
    assert not model(x, t, labels).any()
    model = random_unet(**{**ADM, "class_dropout_prob": 1.0})
    x, t, labels = inputs()
    assert torch.equal(model.train()(x, t, labels), model.eval()(x, t))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": None}, r"\[UNet\] num_heads, head_dim: expected exactly one"),
        ({"head_dim": 3}, r"num_heads: expected a divisor of 16 channels, got 5|head_dim: expected a divisor of 16"),
        ({"attention_resolutions": (8,)}, r"attention_resolutions: expected some of \[1, 2\], got \(8,\)"),
        ({"model_channels": 10}, "model_channels: expected a multiple of 4, got 10"),
        ({"context_dim": 4}, "num_classes: expected 0 with a context_dim"),
        ({"channel_mult": ()}, "channel_mult: expected factors"),
        ({"num_res_blocks": 0}, "num_res_blocks: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{**ADM, **settings})


def test_bad_calls() -> None:
    adm, text = UNet(**{**ADM, "class_dropout_prob": 0.0}), UNet(**TEXT)
    x, t, labels = inputs(torch.float32)
    tokens = torch.randn(2, 4, 6)
    for call, message in (
        (lambda: adm(x[:, :2], t, labels), r"x: expected shape \[B,3,H,W\]"),
        (lambda: adm(x, t[:1], labels), r"t: expected shape \[2\]"),
        (lambda: adm(x, t), "no unconditional prediction"),
        (lambda: adm(x, t, labels.float()), "integer labels"),
        (lambda: adm(x, t, tokens), "integer labels"),
        (lambda: text(x, t), r"cond: expected tokens of shape \[2,S,6\], got None"),
        (lambda: text(x, t, tokens[:, :, :4]), "cond: expected tokens"),
        (lambda: text(x, t, (tokens, torch.ones(2, 4))), "a mask of bools"),
        (lambda: UNet(**{**ADM, "num_classes": 0})(x, t, labels), "neither classes nor a context"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
