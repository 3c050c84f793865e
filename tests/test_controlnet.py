"""ControlNet: starts as the backbone, learns in the branch alone, and equals diffusers' with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models import DiT, HybridDiffusion, TextDiT, UNet
from fastdiff.models.controlnet import ControlledModel, ControlNet, controlnet_from_diffusers

Args = tuple[Tensor, Tensor, Any]


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.numel() / max(parameter.shape[:1].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape) / fan**0.5)
    return model.eval()


def dit_case() -> tuple[Any, Args, Tensor]:
    model = DiT(8, 2, 3, 16, 3, 2, 2.0, 0.1, 5)
    args = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 50.0]), torch.tensor([0, 3])
    return randomised(model), args, torch.rand(2, 3, 8, 8)


def hybrid_case() -> tuple[Any, Args, Tensor]:
    model = HybridDiffusion(8, 2, 3, 16, 3, attention_every=2, d_state=2, num_heads=2, num_classes=5)
    _, args, image = dit_case()
    return randomised(model), args, image


def text_dit_case() -> tuple[Any, Args, Tensor]:
    model = TextDiT(8, 2, 3, 16, 3, 2, 2.0, caption_channels=6, caption_tokens=4)
    args = (
        torch.randn(2, 3, 8, 8),
        torch.tensor([1.0, 50.0]),
        (torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()),
    )
    return randomised(model), args, torch.rand(2, 3, 8, 8)


def unet_case() -> tuple[Any, Args, Tensor]:
    model = UNet(4, 8, None, 1, (2,), (1, 2), num_heads=2, context_dim=6, norm_groups=4)
    args = torch.randn(2, 4, 5, 6), torch.tensor([1.0, 50.0]), torch.randn(2, 4, 6)
    return randomised(model), args, torch.rand(2, 3, 5, 6)


def wide(cond: Any) -> Any:
    if isinstance(cond, tuple):
        return tuple(map(wide, cond))
    return cond.double() if cond.is_floating_point() else cond


def doubled(cond: Any) -> Any:
    return tuple(map(doubled, cond)) if isinstance(cond, tuple) else torch.cat([cond, cond])


CASES = {"dit": dit_case, "text_dit": text_dit_case, "hybrid": hybrid_case, "unet": unet_case}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Args, Tensor]:
    return CASES[request.param]()


def test_at_first_it_is_the_backbone_and_only_the_branch_learns(case: Any) -> None:
    # In float32 products without gradients are another library's, and what that changes grows with depth.
    backbone, args, image = case[0].double(), tuple(wide(a) for a in case[1]), case[2].double()
    frozen = copy.deepcopy(backbone.state_dict())
    expected = backbone(*args).detach()
    model = ControlledModel(backbone, ControlNet(backbone)).train()
    net = model.controlnets[0]
    assert (model(*args, images=image) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert not net.input_hint_block(image).any()

    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    target = torch.randn_like(expected)
    zeros = [(n, p) for n, p in net.named_parameters() if n.startswith(("zero_", "middle_block_out"))]
    for step in range(3):
        optimizer.zero_grad()
        (model(*args, images=image) - target).square().mean().backward()
        assert all(p.grad is None for p in backbone.parameters())
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
        copied = sum(p.grad.abs().sum() for p in net.branch.parameters() if p.requires_grad)
        hint = net.input_hint_block[-1].weight.grad.abs().sum()
        # The zero layers move first; only then do the copy and the layers of the image see a gradient (§3.1).
        assert all(p.grad.abs().sum() > 0 for n, p in zeros), step
        assert (copied > 0) == (hint > 0) == (step > 0)
        optimizer.step()
    assert all(torch.equal(backbone.state_dict()[k], v) for k, v in frozen.items())
    assert (model(*args, images=image) - expected).abs().max() > 1e-3
    other = model(*args, images=1 - image)
    assert (model(*args, images=image) - other).abs().max() > 0
    # Learning goes down to the image's first layer.
    assert net.input_hint_block[0].weight.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit", "text_dit", "hybrid"])
def test_residuals_reach_the_tokens_behind_the_block_that_was_copied(name: str) -> None:
    backbone, args, image = CASES[name]()
    net = randomised(ControlNet(backbone))
    assert len(net.branch.blocks) == 2 and len(net.zero_linears) == 2
    control = net(*args, image)
    assert control[0] is None and [c.shape for c in control[1:]] == [(2, 16, 16)] * 2
    double = copy.deepcopy(backbone).double()
    args = (args[0].double(), args[1].double(), wide(args[2]))
    taps: list[Tensor] = []
    plain = double(*args, taps=taps)
    assert len(taps) == 3
    changed: list[Tensor] = []
    double(*args, control=[None, control[1].double()], taps=changed)
    assert (changed[0] - taps[0] - control[1]).abs().max() < 1e-9
    assert (changed[1] - taps[1] - control[1]).abs().max() > 1e-3
    changed = []
    moved = double(*args, control=[None, None, None, torch.ones(1, 16, 16, dtype=torch.float64)], taps=changed)
    assert (changed[2] - taps[2] - 1).abs().max() < 1e-9
    assert (moved - plain).abs().max() < 1e-9 * plain.abs().max()  # a constant: the last norm drops it
    with pytest.raises(ValueError, match=r"control: expected at most 4 entries.*got 5"):
        double(*args, control=[None] * 5)


@torch.no_grad()
def test_scales_several_branches_and_images_that_are_set(case: Any) -> None:
    backbone, args, image = case
    nets = [randomised(ControlNet(backbone)), randomised(ControlNet(backbone))]
    model = ControlledModel(backbone, nets, [0.5, 2.0])
    controls = [net(*args, picture) for net, picture in zip(nets, (image, 1 - image), strict=True)]
    total = [None if a is None else 0.5 * a + 2.0 * b for a, b in zip(*controls, strict=True)]
    expected = backbone(*args, control=total)
    assert (model(*args, images=[image, 1 - image]) - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.set_images(image, None)
    one = backbone(*args, control=[None if a is None else 0.5 * a for a in controls[0]])
    assert (model(*args) - one).abs().max() <= 1e-5 * one.abs().max()
    model.scales = [0.0, 0.0]
    assert torch.equal(model(*args, images=[image, image]), backbone(*args))
    # Guidance: the images of a batch of several, in turn.
    model = ControlledModel(backbone, nets[0])
    twice = (torch.cat([args[0], -args[0]]), args[1].repeat(2), doubled(args[2]))
    expected = model(*twice, images=torch.cat([image, image]))
    assert (model(*twice, images=image) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_published_names_load() -> None:
    backbone, _, _ = unet_case()
    net = randomised(ControlNet(backbone, hint_scale=8))
    published = {k.removeprefix("branch."): v for k, v in net.state_dict().items()}
    assert {
        "input_hint_block.14.weight",
        "zero_convs.3.0.weight",
        "middle_block_out.0.bias",
        "time_embed.0.weight",
    } <= set(published)
    other = ControlNet(backbone, hint_scale=8)
    other.load_state_dict(published)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    del published["zero_convs.0.0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*zero_convs\.0\.0\.bias"):
        other.load_state_dict(published)


@torch.no_grad()
def test_equal_to_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    from fastdiff.models import unet_from_diffusers

    common: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
    }
    unet = diffusers.UNet2DConditionModel(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **common).eval()
    net = diffusers.ControlNetModel(**common).eval()
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        nn.init.normal_(layer.weight, std=0.05)
    backbone = unet_from_diffusers(unet)
    ours = ControlledModel(backbone, controlnet_from_diffusers(net, backbone), [0.7])
    x, t, text, image = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 24), torch.rand(2, 3, 64, 64)
    down, middle = net(x, t, text, image, conditioning_scale=0.7, return_dict=False)
    expected = unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    assert (expected - unet(x, t, text).sample).abs().max() > 0.01
    assert (ours(x, t, text, images=image) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bad_arguments() -> None:
    backbone, args, image = unet_case()
    net = ControlNet(backbone)
    for call, message in (
        (lambda: ControlNet(backbone, hint_scale=3), "hint_scale: expected 1, 2, 4 or 8, got 3"),
        (lambda: ControlNet(backbone, num_blocks=1), "num_blocks: expected None for a UNet"),
        (lambda: ControlNet(dit_case()[0], num_blocks=4), "num_blocks: expected 1 to 3, got 4"),
        (lambda: net(*args, image[..., :3]), r"image: expected shape \[B,3,5,6\], got \[2, 3, 5, 3\]"),
        (lambda: net(*args, image.repeat(2, 1, 1, 1)), "image: expected shape"),
        (lambda: ControlledModel(backbone, net)(*args), "images: expected control images"),
        (lambda: ControlledModel(backbone, net).set_images(image, image), "images: expected 1 of them"),
        (lambda: ControlledModel(backbone, net, [1.0, 2.0]), "scales: expected 1 of them, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return x

    with pytest.raises(TypeError, match=r"forward takes `control` and `taps`, got Chain \(missing: control, taps\)"):
        ControlNet(Chain())
