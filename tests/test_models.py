"""The DiT against a formulation of its own, and the sampler against flows with known solutions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models import DIT_PRESETS, DiT, dit
from fastdiff.samplers import sample, schedules
from fastdiff.training import RectifiedFlowModel

SMALL = {
    "input_size": 6,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.5,
    "class_dropout_prob": 0.1,
    "num_classes": 5,
}


def random_dit(dtype: torch.dtype = torch.float64, **overrides: object) -> DiT:
    """A DiT in which nothing is zero: as it is initialised, most of the network has no effect on the output."""
    model = DiT(**{**SMALL, **overrides}).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    return model


def inputs(dtype: torch.dtype = torch.float64, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, 6, 6, generator=generator, dtype=dtype)
    return x, torch.tensor([0.0, 1.0, 37.25, 61.5], dtype=dtype)[:batch], torch.tensor([0, 4, 2, 5])[:batch]


def plain_dit(weights: dict[str, Tensor], config: dict[str, object], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The paper's model, site by site, from a published state dict: convolution, explicit softmax, per-block norms."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    patch, heads = config["patch_size"], config["num_heads"]
    tokens = F.conv2d(x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=patch)
    grid, width = tokens.shape[-1], tokens.shape[1]
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"]
    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    angles = t[:, None] * frequencies * config["time_scale"]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + weights["y_embedder.embedding_table.weight"][labels])
    for i in range(config["depth"]):
        mods = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, 1)
        h = linear(f"blocks.{i}.attn.qkv", norm(tokens, mods[0], mods[1]))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in h.chunk(3, -1))
        maps = (q @ k.transpose(-1, -2) / math.sqrt(width / heads)).softmax(-1)
        h = linear(f"blocks.{i}.attn.proj", (maps @ v).transpose(1, 2).flatten(2))
        tokens = tokens + mods[2].unsqueeze(1) * h
        h = linear(f"blocks.{i}.mlp.fc1", norm(tokens, mods[3], mods[4]))
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        tokens = tokens + mods[5].unsqueeze(1) * linear(f"blocks.{i}.mlp.fc2", h)
    mods = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    h = linear("final_layer.linear", norm(tokens, *mods))
    h = h.reshape(len(x), grid, grid, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, grid * patch, grid * patch)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("learn_sigma", "time_scale"), [(True, 1.0), (False, 1000.0)])
def test_dit_equals_a_plain_formulation(
    dtype: torch.dtype, tolerance: float, learn_sigma: bool, time_scale: float
) -> None:
    model = random_dit(dtype, learn_sigma=learn_sigma, time_scale=time_scale)
    x, t, labels = inputs(dtype)
    t = t / time_scale
    expected = plain_dit(
        {k: v.double() for k, v in model.state_dict().items()}, model.config, x.double(), t.double(), labels
    )
    got = model(x, t, labels)
    assert got.shape == (4, 6 if learn_sigma else 3, 6, 6)
    # float32: the angles reach 61 rad, where one ULP is 4e-6, and the weights are large.
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_every_parameter_gets_the_gradient_of_the_plain_formulation() -> None:
    model = random_dit()
    x, t, labels = inputs()
    leaves = {k: v.clone().requires_grad_(k != "pos_embed") for k, v in model.state_dict().items()}
    probe = torch.randn(4, 6, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (plain_dit(leaves, model.config, x, t, labels) * probe).sum().backward()
    (model(x, t, labels) * probe).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-8, atol=1e-9, msg=name)


def test_a_new_model_is_adaln_zero() -> None:
    model = DiT(**SMALL)
    x, t, labels = inputs(torch.float32)
    assert torch.equal(model(x, t, labels), torch.zeros(4, 6, 6, 6))
    with torch.no_grad():  # with an output, every block is still the identity
        model.final_layer.linear.weight.normal_()
        before = model.eval()(x, t, labels)
        for block in model.blocks:
            block.attn.proj.weight.normal_()
            block.mlp.fc2.weight.normal_()
    assert before.abs().max() > 0.1
    assert torch.equal(model(x, t, labels), before)
    assert model.blocks[0].attn.qkv.weight.abs().max() > 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_formula(scale: float) -> None:
    model = random_dit()
    x, t, labels = inputs()
    pred, uncond = model(x, t, labels), model(x, t, None)
    assert (pred - uncond).abs().max() > 0.05
    guided = model.forward_with_cfg(x, t, labels, scale)
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + scale * (pred[:, :3] - uncond[:, :3]))
    torch.testing.assert_close(guided[:, 3:], pred[:, 3:])  # learned variances are not guided


def test_label_dropout_is_the_unconditional_prediction_and_only_in_training() -> None:
    model = random_dit(class_dropout_prob=1.0)
    x, t, labels = inputs()
    conditional, unconditional = model(x, t, labels), model(x, t, None)
    assert not torch.allclose(conditional[:3], unconditional[:3])
    assert torch.equal(conditional[3], unconditional[3])  # label 5 is the null class
    assert torch.equal(model.train()(x, t, labels), unconditional)


def test_label_dropout_rate() -> None:
    model = random_dit(torch.float32, class_dropout_prob=0.25).train()
    torch.manual_seed(0)
    labels = torch.zeros(20000, dtype=torch.long)
    dropped = (model.y_embedder.drop(labels) == 5).float().mean()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20000)
    assert torch.equal(model.eval().y_embedder.drop(labels), labels)


def test_time_scale_multiplies_the_times() -> None:
    x, _, labels = inputs()
    flow, steps = random_dit(time_scale=1000.0), random_dit(time_scale=1.0)
    t = torch.tensor([0.0, 0.25, 0.5, 0.999], dtype=torch.float64)
    torch.testing.assert_close(flow(x, t, labels), steps(x, 1000 * t, labels))
    assert not torch.allclose(flow(x, t, labels), steps(x, t, labels))


def test_position_embedding_is_the_published_one() -> None:
    embedding = DiT(**SMALL).pos_embed
    row, column, quarter = 2, 1, 4
    omega = [10000 ** (-i / quarter) for i in range(quarter)]
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
    torch.testing.assert_close(embedding[0, row * 3 + column], torch.tensor(expected))


def test_parameters_carry_the_published_names_and_numbers() -> None:
    with torch.device("meta"):
        models = {name: dit(name) for name in ("DiT-S/2", "DiT-L/2", "DiT-XL/2")}
    names = set(models["DiT-S/2"].state_dict())
    parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    linears = [f"blocks.{i}.{part}" for i in range(12) for part in parts]
    linears += ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    linears += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    assert names == {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")} | {
        "y_embedder.embedding_table.weight",
        "pos_embed",
    }
    # Millions, table 4 of the paper.
    counts = {name: sum(value.numel() for value in model.state_dict().values()) for name, model in models.items()}
    assert [round(counts[name] / 1e6) for name in models] == [33, 458, 675]
    assert len(DIT_PRESETS) == 12
    assert dit("DiT-S/8", input_size=8, depth=1, num_classes=0, in_channels=1).config["patch_size"] == 8


def test_a_batch_of_one_and_an_unconditional_model() -> None:
    model = random_dit(num_classes=0)
    x, t, _ = inputs()
    whole = model(x, t)
    torch.testing.assert_close(model(x[2:3], t[2:3]), whole[2:3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": 7}, ["input_size", "multiple of patch_size=2", "7"]),
        ({"num_heads": 3}, ["hidden_size", "num_heads=3", "16"]),
        ({"hidden_size": 18, "num_heads": 1}, ["hidden_size", "multiple of 4", "18"]),
        ({"depth": 0}, ["depth", "at least 1", "0"]),
        ({"class_dropout_prob": 1.5}, ["class_dropout_prob", "[0, 1]", "1.5"]),
        ({"time_scale": 0.0}, ["time_scale", "above 0"]),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        DiT(**{**SMALL, **change})
    assert all(word in str(error.value) for word in words), error.value


def test_bad_calls_are_named() -> None:
    model, (x, t, labels) = random_dit(), inputs()
    for arguments, words in (
        ((x[:, :2], t, labels), ["x", "[B,3,6,6]", "[4, 2, 6, 6]"]),
        ((x, t[:3], labels), ["t", "[4]", "[3]"]),
        ((x, t, labels[:2]), ["cond", "[4]", "[2]"]),
        ((x, t, labels.double()), ["cond", "integer", "float64"]),
    ):
        with pytest.raises(ValueError) as error:
            model(*arguments)
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(ValueError, match="class_dropout_prob=0 leaves no unconditional"):
        random_dit(class_dropout_prob=0.0)(x, t)
    with pytest.raises(ValueError, match="num_classes=0"):
        random_dit(num_classes=0)(x, t, labels)
    with pytest.raises(ValueError, match=r"DiT-XL/2.*got 'DiT-M/2'"):
        dit("DiT-M/2")


# ---------------------------------------------------------------------------------------------------------- sampling


def flow_euler(
    velocity: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x_0: Tensor,
    steps: int,
    cond: Tensor | None = None,
    **options: float,
) -> Tensor:
    schedule = schedules.flow()
    return sample(
        velocity, x_0, solver="euler", schedule=schedule, steps=steps, prediction="flow", cond=cond, **options
    )


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_on_flows_with_known_euler_solutions(steps: int) -> None:
    x_0 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    original = x_0.clone()
    constant = flow_euler(lambda x, t, cond: cond[:, None].expand_as(x), x_0, steps, torch.tensor([1.0, -2.0, 0.5]))
    torch.testing.assert_close(constant, x_0 + torch.tensor([[1.0], [-2.0], [0.5]]))
    decay = flow_euler(lambda x, t, cond: -x, x_0, steps)
    torch.testing.assert_close(decay, x_0 * (1 - 1 / steps) ** steps)
    # dx/dt = 2t on t_k = k/n, k = 0..n-1: sum 2k/n^2 = (n - 1)/n. A grid off by one gives (n + 1)/n.
    ramp = flow_euler(lambda x, t, cond: (2 * t)[:, None].expand_as(x), x_0, steps)
    torch.testing.assert_close(ramp, x_0 + (steps - 1) / steps)
    assert torch.equal(x_0, original)


def test_euler_guides_and_asks_for_the_unconditional_velocity_only_then() -> None:
    asked: list[bool] = []

    def velocity(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        asked.append(cond is None)
        return torch.full_like(x, 0.5) if cond is None else cond[:, None].expand_as(x)

    x_0, cond = torch.zeros(2, 3), torch.tensor([1.0, 2.0])
    guided = flow_euler(velocity, x_0, 4, cond, guidance_scale=3.0)
    torch.testing.assert_close(guided, torch.tensor([[2.0], [5.0]]).expand(2, 3))  # 0.5 + 3 (c - 0.5)
    assert asked.count(True) == 4
    asked.clear()
    flow_euler(velocity, x_0, 4, cond)
    assert asked == [False] * 4


def test_euler_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"steps: expected an integer of at least 1, got 0"):
        flow_euler(lambda x, t, cond: x, torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="cond"):
        flow_euler(lambda x, t, cond: x, torch.zeros(1, 2), 1, guidance_scale=2.0)


def test_flow_model_samples_its_backbone_in_evaluation_mode() -> None:
    flow = RectifiedFlowModel(random_dit(torch.float32, learn_sigma=False, class_dropout_prob=1.0)).train()
    x, _, labels = inputs(torch.float32)
    got = flow.sample(x, 2, labels)
    assert flow.training
    assert flow.backbone.training
    flow.eval()
    with torch.no_grad():  # as sample() is: products with gradients are another library's
        middle = x + flow.backbone(x, torch.zeros(4), labels) / 2
        expected = middle + flow.backbone(middle, torch.full((4,), 0.5), labels) / 2
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(flow.get_velocity(x, 0.5, labels), flow.backbone(x, torch.full((4,), 0.5), labels))
    with pytest.raises(ValueError, match="learn_sigma=False"):
        RectifiedFlowModel(random_dit(torch.float32)).sample(x, 1, labels)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_an_empty_batch_gives_an_empty_result(learn_sigma: bool, guidance_scale: float) -> None:
    model = random_dit(learn_sigma=learn_sigma)
    x, t, labels = (value[:0] for value in inputs())
    channels = x.shape[1] * (2 if learn_sigma else 1)
    assert model(x, t, labels).shape == (0, channels, *x.shape[2:])
    assert model.forward_with_cfg(x, t, labels, guidance_scale).shape == (0, channels, *x.shape[2:])
    if not learn_sigma:
        samples = RectifiedFlowModel(model).sample(x, 2, labels, guidance_scale=guidance_scale)
        assert samples.shape == x.shape
        assert samples.dtype == x.dtype
