"""State-space diffusion backbones: against a plain model, what an output depends on, conditioning, training."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.models import (
    DIFFUSION_MAMBA_PRESETS,
    DiffusionMamba,
    HybridDiffusion,
    diffusion_mamba,
    load_weights,
    scan_orders,
)
from fastdiff.models.diffusion_mamba import GridScan

ORDERS = scan_orders.NAMES
SIDE = 4  # patches


def build(order: str = "bidirectional", kind: Any = DiffusionMamba, **options: Any) -> Any:
    """A small model with weights at which every part counts."""
    settings = {"input_size": 2 * SIDE, "in_channels": 3, "hidden_size": 16, "depth": 2, "d_state": 4, "num_classes": 5}
    settings |= {"num_heads": 2} if kind is HybridDiffusion else {}
    model = kind(**{**settings, "order": order, **options}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
                p.add_(torch.randn_like(p) * 0.1)
    return model


def inputs(model: Any, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    side = model.config["input_size"]
    return torch.randn(batch, 3, side, side), torch.linspace(3, 700, batch), torch.arange(batch) % 5


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


def plain_grid_scan(m: GridScan, x: Tensor) -> Tensor:
    """The mixer one path and one step at a time, tokens gathered into the order of the path."""
    b, length, _ = x.shape
    u, z = m.in_proj(x).chunk(2, dim=-1)
    u = F.silu(m.conv2d(u.mT.reshape(b, -1, *m.grid))).flatten(2).mT
    total = torch.zeros_like(u)
    for k, path in enumerate(m.orders):
        there, width = u[:, path], m.rank + 2 * m.d_state
        dt, B, C = F.linear(there, m.x_proj.weight[k * width : (k + 1) * width]).split(
            [m.rank, m.d_state, m.d_state], dim=-1
        )
        delta, h = F.softplus(dt @ m.dt_weight[k] + m.dt_bias[k]), 0
        for i in range(length):
            h = (delta[:, i, :, None] * -m.A_log[k].exp()).exp() * h + (delta * there)[:, i, :, None] * B[:, i, None]
            total[:, path[i]] += (h * C[:, i, None]).sum(-1) + m.D[k] * there[:, i]
    return m.out_proj(total * F.silu(z))


def plain_forward(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The model as published: norm, modulation, branch and gate apart."""
    c = model.t_embedder(t) + model.y_embedder(y)
    x = model.x_embedder(x) + model.pos_embed
    norm = lambda h, shift, scale: F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]  # noqa: E731
    for block in model.blocks:
        vectors = block.adaLN_modulation(c).chunk(3 * len(block.names), dim=-1)
        for i, name in enumerate(block.names):
            branch, (shift, scale, gate) = getattr(block, name), vectors[3 * i : 3 * i + 3]
            h = norm(x, shift, scale)
            x = x + gate[:, None] * (plain_grid_scan(branch, h) if isinstance(branch, GridScan) else branch(h))
    h = model.final_layer.linear(norm(x, *model.final_layer.adaLN_modulation(c).chunk(2, dim=-1)))
    h = h.view(len(x), SIDE, SIDE, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(len(x), -1, 2 * SIDE, 2 * SIDE)


@pytest.mark.parametrize("kind", [DiffusionMamba, HybridDiffusion])
@pytest.mark.parametrize("order", ORDERS)
def test_the_model_is_the_plain_one(order: str, kind: Any) -> None:
    model = build(order, kind, depth=3, **({"attention_every": 2} if kind is HybridDiffusion else {}))
    args = inputs(model)
    double = copy.deepcopy(model).double()
    expected = plain_forward(double, args[0].double(), args[1].double(), args[2])
    close(model(*args), expected)
    with torch.no_grad():
        close(model(*args), expected)
        with fastdiff.use_backend("reference"):
            close(model(*args), expected)
        close(double(args[0].double(), args[1].double(), args[2]), expected, 1e-11)


def depends(model: Any, row: int, column: int) -> Tensor:
    """Which patches [SIDE,SIDE] of the input the patch (row, column) of the output depends on."""
    x, t, y = inputs(model, 1)
    x.requires_grad_()
    out = model(x, t, y)[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    return F.max_pool2d(grad.abs().sum(1), 2)[0] > 0


@pytest.mark.parametrize(("order", "depth"), [("bidirectional", 1), ("cross", 1), ("zigzag", 2), ("hilbert", 2)])
def test_every_output_depends_on_every_input(order: str, depth: int) -> None:
    model = build(order, depth=depth)
    for row in range(SIDE):
        for column in range(SIDE):
            assert depends(model, row, column).all(), (row, column)


def test_a_raster_model_is_causal() -> None:
    model = build("raster")
    for i in range(SIDE * SIDE):
        seen = depends(model, i // SIDE, i % SIDE).flatten()
        assert seen[: i + 1].all() and not seen[i + 1 :].any()


def test_attention_gives_a_raster_model_the_whole_picture() -> None:
    model = build("raster", HybridDiffusion, attention_every=2)
    assert [block.names for block in model.blocks] == [("mixer",), ("attn", "mlp")]
    assert depends(model, 0, 0).all()


@pytest.mark.parametrize(("order", "several"), [("zigzag", 8), ("hilbert", 4), ("cross", 1)])
def test_paths_alternate_over_the_blocks(order: str, several: int) -> None:
    model = build(order, depth=9)
    paths = scan_orders.block_orders(order, SIDE, SIDE)
    for i, block in enumerate(model.blocks):
        assert torch.equal(block.mixer.orders, paths[i % several])
    assert not [name for name in model.state_dict() if "orders" in name]


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = HybridDiffusion(
        8, hidden_size=16, depth=2, attention_every=2, num_heads=2, num_classes=0, in_channels=3, learn_sigma=False
    )
    assert model(torch.randn(1, 3, 8, 8), torch.ones(1)).abs().max() == 0
    assert all(p.abs().max() == 0 for b in model.blocks for p in b.adaLN_modulation.parameters())
    dt = F.softplus(model.blocks[0].mixer.dt_bias)
    assert dt.min() > 0.0009 and dt.max() < 0.101  # step sizes keep their own initialisation


@pytest.mark.parametrize("order", ["raster", "cross", "hilbert"])
def test_checkpointing_changes_memory_not_gradients(order: str) -> None:
    model = build(order, HybridDiffusion, depth=2, attention_every=2, class_dropout_prob=0.0).train()
    args, kept = inputs(model), []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        saved = []

        def keep(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(*args).square().mean()
        loss.backward()
        kept.append((sum(saved), [p.grad.clone() for p in model.parameters()]))
    assert kept[1][0] < 0.7 * kept[0][0]
    for got, expected in zip(kept[1][1], kept[0][1], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("order", ["bidirectional", "zigzag"])
def test_gradients_are_those_of_the_plain_model(order: str) -> None:
    model = build(order)
    double, args = copy.deepcopy(model).double(), inputs(model)
    model(*args).square().mean().backward()
    plain_forward(double, args[0].double(), args[1].double(), args[2]).square().mean().backward()
    wanted = dict(double.named_parameters())
    for name, p in model.named_parameters():
        if wanted[name].grad is not None and p.grad is not None:
            close(p.grad, wanted[name].grad, 1e-4)
        assert (p.grad is None) == (wanted[name].grad is None), name


def test_labels_are_dropped_only_in_training() -> None:
    model = build(class_dropout_prob=1.0)
    x, t, y = inputs(model)
    assert not torch.equal(model(x, t, y), model(x, t))
    assert torch.equal(model.train()(x, t, y), model(x, t))


def test_compiled_models_agree() -> None:
    model = build("cross", HybridDiffusion, attention_every=2)
    args = inputs(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(*args), model(*args), 1e-6)


def test_bfloat16_is_near_float32() -> None:
    model = build("cross")
    x, t, y = inputs(model)
    expected = model(x, t, y)
    got = model.bfloat16()(x.bfloat16(), t, y)
    assert got.dtype == torch.bfloat16
    close(got, expected, 0.05)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = build("cross")
    x, t, y = inputs(model, 3)
    close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), 1e-6)


def test_presets_and_bad_arguments() -> None:
    assert len(DIFFUSION_MAMBA_PRESETS) == 12
    model = diffusion_mamba("Mamba-S/8", depth=1, input_size=16)
    assert model.config["hidden_size"] == 384 and model.config["patch_size"] == 8
    with pytest.raises(ValueError, match=r"\[diffusion_mamba\] name: expected one of Mamba-S/2.*got Mamba-S/3"):
        diffusion_mamba("Mamba-S/3")
    with pytest.raises(ValueError, match=r"\[DiffusionMamba\] order: expected one of raster.*got 'spiral'"):
        build("spiral")
    with pytest.raises(ValueError, match=r"\[HybridDiffusion\] num_heads: expected a divisor of hidden_size=16, got 3"):
        build(kind=HybridDiffusion, num_heads=3)
    with pytest.raises(ValueError, match=r"\[HybridDiffusion\] attention_every: expected at least 1, got 0"):
        HybridDiffusion(attention_every=0)
    model = build()
    x, t, y = inputs(model)
    for bad, match in (
        ((x[:, :2], t, y), r"x: expected shape \[B,3,8,8\], got \[2, 2, 8, 8\]"),
        ((x, t[:1], y), r"t: expected shape \[2\], got \[1\]"),
        ((x, t, y[:1]), r"cond: expected shape \[2\], got \[1\]"),
        ((x, t, y.float()), r"cond: expected integer labels, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            model(*bad)
    with pytest.raises(ValueError, match=r"modulation: expected a step of a table: table.at\(i\), got Tensor"):
        model(x, t, y, modulation=torch.zeros(2, 3))


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_batch(order: str) -> None:
    model = build(order)
    assert model(*inputs(model, 0)).shape == (0, 6, 8, 8)


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_without_memory_gets_it_with_its_weights(order: str) -> None:
    model = build(order)
    with torch.device("meta"):
        other = DiffusionMamba(**model.config)
    load_weights(other.eval(), model.state_dict())
    args = inputs(model)
    torch.testing.assert_close(other(*args), model(*args), rtol=0, atol=0)


def test_positions_need_not_be_in_the_file() -> None:
    model = build()
    state = model.state_dict()
    del state["pos_embed"]
    load_weights(model, state)
