"""DiT beside diffusers' model, its gradient checkpointing, and what may be put inside it."""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.models import DiT, load_weights
from fastdiff.models._layers import Attention, CrossAttention, sincos_position_embedding
from fastdiff.models.checkpoints import CheckpointError
from fastdiff.ops import _linear

SMALL: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 5,
}


def randomise(model: nn.Module, seed: int = 1) -> Any:
    """Nothing is zero, and sums keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return model.eval()


def small(dtype: torch.dtype = torch.float32, **overrides: Any) -> DiT:
    model: DiT = randomise(DiT(**{**SMALL, **overrides}).to(dtype))
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 437, 999]), torch.tensor([4, 0, 5])


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the range, as the tolerance of the project is."""
    assert got.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0.1
    assert (got - expected).abs().max().item() <= tolerance * scale


# ---------------------------------------------------------------------------------------------------------- diffusers


def diffusers_dit(shared: bool, **overrides: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    settings = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 3}
    more = {"sample_size": 8, "num_embeds_ada_norm": 5}
    model = randomise(diffusers.DiTTransformer2DModel(**{**settings, **more, **overrides}))
    if shared:  # as in the published weights
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.mark.parametrize(
    ("shared", "overrides"),
    [
        (True, {}),
        (False, {"out_channels": 3}),
        (True, {"norm_eps": 1e-2, "attention_bias": False, "out_channels": None}),
    ],
)
def test_diffusers_weights_both_ways(shared: bool, overrides: dict[str, Any]) -> None:
    theirs = diffusers_dit(shared, **overrides)
    ours = DiT.from_diffusers(theirs).eval()
    assert ours.config["shared_embedders"] is shared
    x, t, y = inputs()
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        close(ours(x, t, y), expected)
    back = type(theirs)(**ours.diffusers_config()).eval()
    assert not any(back.load_state_dict(ours.to_diffusers_state_dict()))
    with torch.no_grad():
        close(back(x, timestep=t, class_labels=y).sample, expected)
    if "attention_bias" not in overrides:
        exported = ours.to_diffusers_state_dict()
        assert all(torch.equal(exported[name], value) for name, value in theirs.state_dict().items())


def test_a_state_dict_of_diffusers_needs_its_config_and_keeps_its_type() -> None:
    theirs = diffusers_dit(True).to(torch.bfloat16)
    ours = DiT.from_diffusers(theirs.state_dict(), theirs.config)
    assert next(ours.parameters()).dtype is torch.bfloat16
    assert DiT.from_diffusers(theirs, frequency_shift=0.0).config["frequency_shift"] == 0
    with pytest.raises(ValueError, match="config: expected the settings"):
        DiT.from_diffusers(theirs.state_dict())


def test_load_weights_reads_the_names_of_diffusers() -> None:
    shared, own = diffusers_dit(True), diffusers_dit(False)
    model = small(frequency_shift=1.0, mlp_norm_eps=1e-5)
    load_weights(model, shared.state_dict())
    x, t, y = inputs()
    with torch.no_grad():
        close(model(x, t, y), shared(x, timestep=t, class_labels=y).sample)
    with pytest.raises(CheckpointError, match="shared_embedders=False"):
        load_weights(model, own.state_dict())
    broken = dict(shared.state_dict())
    del broken["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(CheckpointError, match="missing") as error:
        load_weights(model, broken)
    assert error.value.missing == ["blocks.1.attn.qkv.weight"]
    assert "transformer_blocks.1.attn1.to_q.weight" in error.value.unexpected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_fn": "gelu"}, ["activation_fn", "gelu-approximate"]),
        ({"norm_type": "ada_norm"}, ["norm_type", "ada_norm_zero"]),
        ({"norm_elementwise_affine": True}, ["norm_elementwise_affine"]),
        ({"dropout": 0.1}, ["dropout", "0.1"]),
        ({"out_channels": 4}, ["out_channels", "3 or 6"]),
    ],
)
def test_options_that_we_do_not_have_are_refused(change: dict[str, Any], words: list[str]) -> None:
    theirs = diffusers_dit(True)
    with pytest.raises(ValueError) as error:
        DiT.from_diffusers(theirs.state_dict(), {**theirs.config, **change})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "change", [{"frequency_shift": 0.0}, {"time_scale": 2.0}, {"mlp_ratio": 2.0}, {"num_classes": 0}]
)
def test_what_diffusers_would_compute_otherwise_is_not_exported(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        small(**{"frequency_shift": 1.0, **change}).to_diffusers_state_dict()


def test_a_model_without_null_class_is_exported_with_a_row_that_nobody_asks_for() -> None:
    pytest.importorskip("diffusers")
    model = small(frequency_shift=1.0, class_dropout_prob=0.0)
    table = model.to_diffusers_state_dict()["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"]
    assert torch.equal(table[:5], model.y_embedder.embedding_table.weight)
    assert torch.equal(table[5:], torch.zeros(1, 32))


def test_a_model_that_learns_variances_loads_into_one_that_does_not() -> None:
    """SiT's published weights have the second half of the channels, and its code drops that half."""
    both, mean = small(learn_sigma=True), small(learn_sigma=False)
    x, t, y = inputs()
    load_weights(mean, both.state_dict())
    close(mean(x, t, y), both(x, t, y)[:, :3], 1e-6)


# ------------------------------------------------------------------------------------------------------ published


class PublishedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def adaln(width: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(32, width * 32))


class PublishedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = PublishedAttention(), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(32, 128), nn.Linear(128, 32)
        self.adaLN_modulation = adaln(6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, gate, d, e, last = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate * self.attn(F.layer_norm(x, (32,), eps=1e-6) * (1 + b) + a)
        h = F.gelu(self.mlp.fc1(F.layer_norm(x, (32,), eps=1e-6) * (1 + e) + d), approximate="tanh")
        return x + last * self.mlp.fc2(h)


class Published(nn.Module):
    """Names and arithmetic of the published DiT; of SiT, which drops its variances, with ``sit=True``."""

    def __init__(self, sit: bool) -> None:
        super().__init__()
        self.sit = sit
        self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer = (nn.Module() for _ in range(4))
        self.x_embedder.proj = nn.Conv2d(3, 32, 2, stride=2)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, 32), nn.SiLU(), nn.Linear(32, 32))
        self.y_embedder.embedding_table = nn.Embedding(6, 32)
        self.pos_embed = nn.Parameter(sincos_position_embedding(32, 4)[None], requires_grad=False)
        self.blocks = nn.ModuleList(PublishedBlock() for _ in range(3))
        self.final_layer.linear, self.final_layer.adaLN_modulation = nn.Linear(32, 24), adaln(2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None].float() * 10000 ** (-torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        h = self.final_layer.linear(F.layer_norm(h, (32,), eps=1e-6) * (1 + scale) + shift)
        image = torch.einsum("nhwpqc->nchpwq", h.reshape(-1, 4, 4, 2, 2, 6)).reshape(-1, 6, 8, 8)
        return image[:, :3] if self.sit else image


@pytest.mark.parametrize("sit", [False, True])
def test_a_published_file_loads_and_computes_the_same(sit: bool, tmp_path: Path) -> None:
    published = randomise(Published(sit))
    published.pos_embed.copy_(sincos_position_embedding(32, 4)[None])
    torch.save({"ema": published.state_dict(), "args": argparse.Namespace(model="DiT-S/2")}, tmp_path / "0400000.pt")
    model = DiT(**SMALL, learn_sigma=not sit).eval()
    load_weights(model, tmp_path / "0400000.pt")
    x, t, y = inputs()
    t = torch.tensor([0.0, 0.37, 1.0]) if sit else t  # a flow's times
    with torch.no_grad():
        close(model(x, t, y), published(x, t, y))


# ---------------------------------------------------------------------------------------------------------- the inside


def test_a_processor_stands_in_for_the_fused_attention() -> None:
    model, (x, t, y) = small(torch.float64), inputs(torch.float64)
    expected = model(x, t, y)
    maps: list[Tensor] = []

    def capture(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert isinstance(layer, Attention) and not layer.is_cross
        assert q.shape == k.shape == v.shape == (3, 16, 4, 8)
        out, probs = fastdiff.ops.attention_with_probs(q, k, v, layout="bnhd")
        maps.append(probs)
        return out

    for block in model.blocks:
        block.attn.processor = capture
    close(model(x, t, y), expected, 1e-12)
    assert [m.shape for m in maps] == [(3, 4, 16, 16)] * 3
    assert not set(model.state_dict()) ^ set(small().state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_attention_and_its_mask(dtype: torch.dtype) -> None:
    layer = randomise(CrossAttention(24, 3)).to(dtype)
    x, text = torch.randn(3, 5, 24).to(dtype), torch.randn(3, 7, 24).to(dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0], [1] * 7]).bool()
    text[~mask] = 50.0  # would be seen
    wide = copy.deepcopy(layer).double()
    q = wide.q_linear(x.double()).unflatten(-1, (3, 8)).transpose(1, 2)
    k, v = (p.transpose(1, 2) for p in wide.kv_linear(text.double()).unflatten(-1, (2, 3, 8)).unbind(2))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask[:, None, None], float("-inf"))
    expected = wide.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    close(layer(x, text, mask).double(), expected, tolerance)
    layer.processor = lambda _, q, k, v: fastdiff.ops.attention_with_probs(q, k, v, layout="bnhd")[0]
    close(layer(x, text, mask).double(), expected, tolerance)
    assert not torch.allclose(layer(x, text).double(), expected, rtol=0.1)


def test_hooks_on_the_patch_embedding_and_embedders_are_called() -> None:
    model, (x, t, y) = small(), inputs()
    expected = model(x, t, y)
    seen: list[str] = []
    for name in ("x_embedder.proj", "t_embedder.mlp.0", "final_layer.linear", "blocks.1.adaLN_modulation.1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    close(model(x, t, y), expected)
    assert len(seen) == 4


def test_without_gradients_all_products_go_where_they_are_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, t, y) = small(), inputs()
    count = [0]
    original = _linear.linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        count[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(_linear, "linear", counted)
    with torch.no_grad():
        model(x, t, y)
    assert count[0] == 1 + 2 + 3 * 5 + 2  # patches, time, blocks (modulation, qkv, proj, fc1, fc2), final layer


def test_types_backends_copies_and_compilation() -> None:
    model, (x, t, y) = small(), inputs()
    with torch.no_grad():
        expected = model(x, t, y)
        exact = copy.deepcopy(model).double()(x.double(), t, y)
        close(expected.double(), exact)
        with fastdiff.use_backend("reference"):
            close(model(x, t, y), expected)
        # bfloat16 keeps 8 bits; errors of a dozen roundings add up.
        close(copy.deepcopy(model).bfloat16()(x.bfloat16(), t, y).double(), exact, 0.05)
        close(torch.compile(model, backend="eager", fullgraph=True)(x, t, y), expected)
        with torch.autocast("cpu", torch.bfloat16):
            close(model(x, t, y).double(), exact, 0.05)
    saving = copy.deepcopy(model)
    saving.gradient_checkpointing = True
    compiled = torch.compile(saving, backend="aot_eager")
    close(compiled(x, t, y), expected)
    compiled(x, t, y).sum().backward()
    model(x, t, y).sum().backward()
    for p, q in zip(model.parameters(), saving.parameters(), strict=True):
        close(q.grad, p.grad, 1e-4)


def test_positions_can_be_closer() -> None:
    whole, half = sincos_position_embedding(16, 3), sincos_position_embedding(16, 5, 2.0)
    grid = half.unflatten(0, (5, 5))[::2, ::2].flatten(0, 1)
    torch.testing.assert_close(grid, whole)


@pytest.mark.parametrize(
    ("change", "word"), [({"frequency_shift": 128.0}, "frequency_shift"), ({"mlp_norm_eps": -1.0}, "eps")]
)
def test_bad_settings_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        DiT(**{**SMALL, **change})
