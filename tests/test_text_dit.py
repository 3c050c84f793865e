"""TextDiT against a formulation of its own from the published names, and beside diffusers' PixArt model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.models import TEXT_DIT_PRESETS, TextDiT, load_weights, text_dit
from fastdiff.models._layers import CrossAttention

SMALL: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "caption_channels": 10,
    "caption_tokens": 6,
}


def randomise(model: nn.Module, seed: int = 1) -> Any:
    """Nothing is zero, and sums keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return model.eval()


def small(dtype: torch.dtype = torch.float32, **overrides: Any) -> TextDiT:
    model: TextDiT = randomise(TextDiT(**{**SMALL, **overrides}).to(dtype))
    model.y_embedder.y_embedding = torch.randn(6, 10, generator=torch.Generator().manual_seed(5)).to(dtype)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randn(3, 5, 10, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])  # the last token is nobody's
    return x, torch.tensor([0, 437, 999], dtype=dtype), tokens, mask


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the range, as the tolerance of the project is."""
    assert got.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0.1
    assert (got - expected).abs().max().item() <= tolerance * scale


def plain_pixart(
    weights: dict[str, Tensor],
    x: Tensor,
    t: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    size: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The paper's model, site by site, from a published state dict."""
    heads, patch = 4, 2

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(h: Tensor) -> Tensor:
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    def sinusoids(name: str, value: Tensor) -> Tensor:
        frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
        angles = value.flatten()[:, None] * frequencies
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if seen is not None:
            scores = scores.masked_fill(seen[:, None, None] == 0, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    h = F.conv2d(x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=patch)
    grid = h.shape[-1]
    h = h.flatten(2).transpose(1, 2) + weights["pos_embed"]
    time = sinusoids("t_embedder", t)
    if size is not None:
        time = time + torch.cat(
            [sinusoids("csize_embedder", size[0]).reshape(len(x), -1), sinusoids("ar_embedder", size[1])], 1
        )
    six = linear("t_block.1", F.silu(time)).unflatten(1, (6, -1))
    text = linear("y_embedder.y_proj.fc2", gelu(linear("y_embedder.y_proj.fc1", tokens)))
    for i in range(2):
        block = f"blocks.{i}"
        mods = [m.unsqueeze(1) for m in (weights[f"{block}.scale_shift_table"] + six).unbind(1)]
        q, k, v = linear(f"{block}.attn.qkv", norm(h) * (1 + mods[1]) + mods[0]).chunk(3, -1)
        h = h + mods[2] * linear(f"{block}.attn.proj", attend(q, k, v, None))
        k, v = linear(f"{block}.cross_attn.kv_linear", text).chunk(2, -1)
        mixed = attend(linear(f"{block}.cross_attn.q_linear", h), k, v, mask)
        h = h + linear(f"{block}.cross_attn.proj", mixed)
        inner = gelu(linear(f"{block}.mlp.fc1", norm(h) * (1 + mods[4]) + mods[3]))
        h = h + mods[5] * linear(f"{block}.mlp.fc2", inner)
    shift, scale = (weights["final_layer.scale_shift_table"] + time.unsqueeze(1)).chunk(2, 1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    h = h.reshape(len(x), grid, grid, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, grid * patch, grid * patch)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_plain_formulation_of_the_published_names(dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    model = small(dtype)
    x, t, tokens, mask = inputs(dtype)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    expected = plain_pixart(weights, x.double(), t.double(), tokens.double(), mask if masked else None)
    with torch.no_grad():
        close(model(x, t, (tokens, mask) if masked else tokens).double(), expected, tolerance)
        if masked:
            whole = [model(x[i : i + 1], t[i : i + 1], tokens[i : i + 1, mask[i] > 0]) for i in range(3)]
            close(torch.cat(whole).double(), expected, tolerance)


def test_micro_conditions() -> None:
    model = small(torch.float64, micro_conditions=True)
    x, t, tokens, mask = inputs(torch.float64)
    size, ratio = torch.tensor([[512.0, 768.0], [64.0, 64.0], [1024.0, 1024.0]]), torch.tensor([0.667, 1.0, 1.5])
    size, ratio = size.double(), ratio.double()
    expected = plain_pixart(model.state_dict(), x, t.double(), tokens, mask, (size, ratio))
    close(model(x, t, (tokens, mask), resolution=size, aspect_ratio=ratio), expected, 1e-12)
    default = plain_pixart(
        model.state_dict(), x, t.double(), tokens, mask, (torch.full((3, 2), 64.0).double(), torch.ones(3).double())
    )
    close(model(x, t, (tokens, mask)), default, 1e-12)
    assert not torch.allclose(default, expected)
    with pytest.raises(ValueError, match="resolution: expected None"):
        small()(x.float(), t, tokens.float(), resolution=size)
    with pytest.raises(ValueError, match=r"resolution: expected shape \[3,2\]"):
        model(x, t, tokens, resolution=size[:2])


def test_every_parameter_gets_the_gradient_of_the_plain_formulation() -> None:
    model = small(torch.float64)
    x, t, tokens, mask = inputs(torch.float64)
    leaves = {k: v.clone().requires_grad_(k != "pos_embed") for k, v in model.state_dict().items()}
    plain_pixart(leaves, x, t.double(), tokens, mask).square().sum().backward()
    for saving in (False, True):
        model.zero_grad()
        model.gradient_checkpointing = saving
        runs: list[int] = []
        handle = model.blocks[0].cross_attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(x, t, (tokens, mask)).square().sum().backward()
        handle.remove()
        assert len(runs) == 1 + saving
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-8, atol=1e-8, msg=name)


# ---------------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize(
    ("overrides", "micro"),
    [({}, False), ({"use_additional_conditions": True, "interpolation_scale": 2, "out_channels": 3}, True)],
)
def test_diffusers_weights_both_ways(overrides: dict[str, Any], micro: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    settings = {
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "in_channels": 3,
        "out_channels": 6,
        "num_layers": 2,
    }
    more = {"sample_size": 8, "cross_attention_dim": 48, "caption_channels": 10}
    theirs = randomise(diffusers.PixArtTransformer2DModel(**{**settings, **more, **overrides}))
    ours = TextDiT.from_diffusers(theirs).eval()
    x, t, tokens, mask = inputs()
    size = torch.tensor([[64.0, 64.0]]).expand(3, 2), torch.ones(3, 1)
    added = {"resolution": size[0], "aspect_ratio": size[1]} if micro else {"resolution": None, "aspect_ratio": None}

    def predict(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(
                x, encoder_hidden_states=tokens, timestep=t, added_cond_kwargs=added, encoder_attention_mask=mask
            ).sample
        return found

    expected = predict(theirs)
    with torch.no_grad():
        close(ours(x, t, (tokens, mask)), expected)
    back = type(theirs)(**ours.diffusers_config()).eval()
    assert not any(back.load_state_dict(ours.to_diffusers_state_dict()))
    close(predict(back), expected)
    with pytest.raises(ValueError, match="no unconditional"):
        ours(x, t)
    null = torch.randn(6, 10)
    guided = TextDiT.from_diffusers(theirs, null_caption=null).eval()
    with torch.no_grad():
        close(guided(x, t), ours(x, t, null.expand(3, 6, 10)), 1e-6)
    loaded = small(**({"micro_conditions": True, "position_scale": 2.0, "learn_sigma": False} if micro else {}))
    report = load_weights(loaded, theirs.state_dict(), strict=False)
    assert report.missing == ["y_embedder.y_embedding"] and not report.unexpected
    with torch.no_grad():
        close(loaded(x, t, (tokens, mask)), expected)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"caption_channels": None}, "caption_channels"),
        ({"cross_attention_dim": 40}, "cross_attention_dim"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"attention_type": "gated"}, "attention_type"),
    ],
)
def test_options_that_we_do_not_have_are_refused(change: dict[str, Any], word: str) -> None:
    model = small(caption_dropout_prob=0.0)
    with pytest.raises(ValueError, match=word):
        TextDiT.from_diffusers(model.to_diffusers_state_dict(), {**model.diffusers_config(), **change})


# ------------------------------------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("masked", [False, True])
def test_guidance_formula(masked: bool) -> None:
    model = small(torch.float64)
    x, t, tokens, mask = inputs(torch.float64)
    cond = (tokens, mask) if masked else tokens
    null = model.y_embedder.y_embedding[:5].expand(3, 5, 10)
    pred, uncond = model(x, t, cond), model(x, t, (null, mask) if masked else null)
    for scale in (0.0, 4.0):
        guided = model.forward_with_cfg(x, t, cond, scale)
        close(guided[:, :3], uncond[:, :3] + scale * (pred[:, :3] - uncond[:, :3]), 1e-12)
        close(guided[:, 3:], pred[:, 3:], 1e-12)  # variances are not guided
    negative = torch.randn(3, 8, 10, dtype=torch.float64)
    other = model(x, t, negative)
    guided = model.forward_with_cfg(x, t, cond, 2.0, negative=negative)
    close(guided[:, :3], other[:, :3] + 2.0 * (pred[:, :3] - other[:, :3]), 1e-12)


def test_caption_dropout_is_the_null_caption_and_only_in_training() -> None:
    model = small(torch.float64, caption_dropout_prob=1.0)
    x, t, tokens, _ = inputs(torch.float64)
    null = model.y_embedder.y_embedding
    unconditional = model(x, t, null[:5].expand(3, 5, 10))
    assert not torch.allclose(model(x, t, tokens), unconditional)
    close(model.train()(x, t, tokens), unconditional, 1e-12)
    close(model.eval()(x, t), model(x, t, null.expand(3, 6, 10)), 1e-12)
    model.y_embedder.dropout_prob = 0.25
    torch.manual_seed(0)
    dropped = (model.y_embedder.drop(torch.zeros(20000, 1, 10, dtype=torch.float64)) == null[:1]).all(-1).float().mean()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20000)


# ---------------------------------------------------------------------------------------------------------- the inside


def test_a_new_model_ignores_image_and_caption() -> None:
    model = TextDiT(**SMALL)
    x, t, tokens, mask = inputs()
    assert torch.equal(model(x, t, (tokens, mask)), torch.zeros(3, 6, 8, 8))
    with torch.no_grad():
        model.eval().final_layer.linear.weight.normal_()
        assert torch.equal(model(x, t, tokens), model(x, t, 2 * tokens))


def test_a_processor_sees_every_token_and_the_mask() -> None:
    model = small(torch.float64)
    x, t, tokens, mask = inputs(torch.float64)
    expected = model(x, t, (tokens, mask))
    maps: list[Tensor] = []

    def capture(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert isinstance(layer, CrossAttention) and layer.is_cross
        out, probs = fastdiff.ops.attention_with_probs(q, k, v, layout="bnhd")
        maps.append(probs)
        return out

    model.blocks[1].cross_attn.processor = capture
    close(model(x, t, (tokens, mask)), expected, 1e-12)
    assert maps[0].shape == (3, 4, 16, 5)  # tokens that nobody has are there as well
    assert torch.equal(maps[0] > 0, (mask > 0)[:, None, None].expand_as(maps[0]))


def test_padding_is_left_out_without_changing_a_prediction() -> None:
    model = small()
    x, t, tokens, mask = inputs()
    seen: list[int] = []
    model.y_embedder.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    with torch.no_grad():
        short = model(x, t, (tokens, mask))
        one = model(x, t, (tokens, torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])))
    assert seen == [3, 5]  # columns 0, 1 and 3; all, since one sample has no token of its own
    expected = model(x[1:2], t[1:2], tokens[1:2])
    close(one[1:2], expected, 1e-3)  # scores beside a mask of thousands lose digits
    close(short[:1], model(x[:1], t[:1], tokens[:1, :2]))


def test_types_backends_copies_and_compilation() -> None:
    model = small()
    x, t, tokens, mask = inputs()
    with torch.no_grad():
        expected = model(x, t, (tokens, mask))
        exact = copy.deepcopy(model).double()(x.double(), t, (tokens.double(), mask))
        close(expected.double(), exact)
        with fastdiff.use_backend("reference"):
            close(model(x, t, (tokens, mask)), expected)
        half = copy.deepcopy(model).bfloat16()
        close(half(x.bfloat16(), t, (tokens, mask)).double(), exact, 0.05)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(x, t, (tokens, mask)), expected)
        assert model(x[:0], t[:0], (tokens[:0], mask[:0])).shape == (0, 6, 8, 8)


def test_presets_carry_the_published_names_and_numbers() -> None:
    with torch.device("meta"):
        model, large = text_dit("PixArt-XL/2-256"), text_dit("PixArt-XL/2-1024")
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6) == 611  # the paper says 0.6 B
    assert len(TEXT_DIT_PRESETS) == 4
    extra = set(large.state_dict()) - set(model.state_dict())
    layers = [
        f"{name}.mlp.{i}.{kind}"
        for name in ("csize_embedder", "ar_embedder")
        for i in (0, 2)
        for kind in ("weight", "bias")
    ]
    assert extra == set(layers)
    assert set(small().state_dict()) == {
        *("pos_embed", "y_embedder.y_embedding", "final_layer.scale_shift_table"),
        *(f"blocks.{i}.scale_shift_table" for i in (0, 1)),
        *(
            f"{name}.{kind}"
            for kind in ("weight", "bias")
            for name in (
                *("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "final_layer.linear"),
                *("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"),
                *(
                    f"blocks.{i}.{part}"
                    for i in (0, 1)
                    for part in (
                        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
                        *("cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
                    )
                ),
            )
        ),
    }
    with pytest.raises(ValueError, match="got 'PixArt-M'"):
        text_dit("PixArt-M")


def test_bad_calls_and_settings_are_named() -> None:
    model, (x, t, tokens, mask) = small(), inputs()
    for arguments, words in (
        ((x[:, :2], t, tokens), ["x", "[B,3,8,8]", "[3, 2, 8, 8]"]),
        ((x, t[:2], tokens), ["t", "[3]", "[2]"]),
        ((x, None, tokens), ["t", "[3]", "None"]),
        ((x, t, tokens[:2]), ["cond", "[3,S,10]", "[2, 5, 10]"]),
        ((x, t, tokens[:, :, :4]), ["cond", "[3,S,10]", "[3, 5, 4]"]),
        ((x, t, (tokens, mask[:, :4])), ["cond", "mask [3, 5]", "[3, 4]"]),
        ((x, t, "a cat"), ["cond", "tokens", "str"]),
    ):
        with pytest.raises(ValueError) as error:
            model(*arguments)
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(ValueError, match="at most 6 tokens"):
        model.forward_with_cfg(x, t, torch.randn(3, 7, 10), 2.0)
    with pytest.raises(ValueError, match="expected a caption, got None"):
        model.forward_with_cfg(x, t, None, 2.0)
    for change, word in (
        ({"hidden_size": 44, "micro_conditions": True}, "multiple of 3"),
        ({"caption_tokens": 0}, "caption_tokens"),
        ({"position_scale": 0.0}, "position_scale"),
        ({"caption_dropout_prob": 2.0}, "caption_dropout_prob"),
    ):
        with pytest.raises(ValueError, match=word):
            TextDiT(**{**SMALL, **change})
