"""EDM2's layers keep magnitudes, force weight norms, and have the gradients that go with it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.models.edm2 import (
    EDM2UNet,
    MPAttention,
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights,
)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def small_unet(**settings: Any) -> EDM2UNet:
    arguments: dict[str, Any] = {
        "in_channels": 3,
        "model_channels": 16,
        "num_blocks": 1,
        "channel_mult": (1, 2),
        "attention_resolutions": (2,),
        "head_dim": 8,
        "num_classes": 5,
    }
    model = EDM2UNet(**{**arguments, **settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)
    return model.eval()


def test_unit_in_unit_out() -> None:
    x, y = torch.randn(2, 64, 16, 16), torch.randn(2, 32, 16, 16)
    for kernel in ((1, 1), (3, 3)):
        # Zeros beyond the border lower the magnitude of 3x3 there alone.
        out = MPConv(64, 128, kernel)(x)[..., 1:-1, 1:-1]
        assert rms(out) == pytest.approx(1, abs=0.05), kernel
    assert rms(MPConv(64, 256)(torch.randn(512, 64))) == pytest.approx(1, abs=0.05)
    assert rms(MPConv(64, 256)(torch.randn(512, 64), gain=torch.tensor(2.5))) == pytest.approx(2.5, abs=0.1)
    assert rms(mp_silu(torch.randn(10**6))) == pytest.approx(1, abs=0.01)
    assert rms(MPFourier(512)(torch.randn(512))) == pytest.approx(1, abs=0.02)
    for t in (0.0, 0.3, 0.5, 1.0):
        a, b = torch.randn(10**6), torch.randn(10**6)
        assert rms(mp_sum(a, b, t)) == pytest.approx(1, abs=0.01)
        joined = mp_cat(x, y, t=t)
        assert rms(joined) == pytest.approx(1, abs=0.02)
        # Each part contributes its share, whatever its width.
        assert joined[:, 64:].square().sum() / joined.square().sum() == pytest.approx(
            t**2 / (t**2 + (1 - t) ** 2), abs=0.02
        )
    assert rms(MPAttention(64, 4)(torch.randn(2, 64, 1, 1))) == pytest.approx(1, abs=0.1)  # one token: the map is 1


def test_magnitudes_through_the_whole_network() -> None:
    """No norm on the main path of the decoder, and still no drift: the claim of config G."""
    model = small_unet(model_channels=32, num_blocks=3, channel_mult=(1, 2, 2))
    seen: list[float] = []
    for block in [*model.enc, *model.middle, *model.dec]:
        block.register_forward_hook(lambda module, args, out: seen.append(rms(out)))
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16), torch.randn(2), torch.tensor([0, 4]))
    assert len(seen) == len(model.enc) + len(model.middle) + len(model.dec)
    assert min(seen) > 0.5 and max(seen) < 1.5


def test_normalize() -> None:
    x = 7 * torch.randn(4, 8, 5, 3, dtype=torch.float64)
    pixel = normalize(x, dim=1)
    assert (pixel.square().mean(1) - 1).abs().max() < 1e-3
    assert (pixel / x).std(1).max() < 1e-12  # one factor for a pixel
    whole = normalize(x)
    assert (whole.square().mean((1, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.equal(normalize(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert normalize(torch.full((1, 64), 300.0, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_forced_weight_normalization(kernel: tuple[int, ...]) -> None:
    layer = MPConv(6, 5, kernel)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([3.0, 0.5, 1.0, 40.0, 7.0]).view(-1, *[1] * (1 + len(kernel))))
    x = torch.randn(4, 6, *([8, 8] if kernel else []))
    stored = layer.weight.detach().clone()
    before = layer.eval()(x)
    assert torch.equal(layer.weight, stored)
    trained = layer.train()(x)
    norms = layer.weight.detach().flatten(1).square().mean(1)
    assert (norms - 1).abs().max() < 1e-3
    assert (trained - before).abs().max() <= 2e-3 * before.abs().max()  # the scale of the weight has no effect
    # The gradient is orthogonal to the weight, so that a step cannot shrink it, and does not depend on its scale.
    trained.sin().sum().backward()
    grad = layer.weight.grad
    assert grad is not None
    along = (grad * layer.weight).flatten(1).sum(1).abs()
    assert (along <= 1e-3 * grad.flatten(1).norm(dim=1) * layer.weight.flatten(1).norm(dim=1)).all()
    normalize_weights(layer)
    assert (layer.weight.flatten(1).square().mean(1) - 1).abs().max() < 1e-3


def test_two_calls_before_one_backward_pass() -> None:
    """Forced normalization writes to the weights in forward: an earlier call must still be differentiable."""
    layer = MPConv(4, 3).train()
    x = torch.randn(5, 4)
    (layer(x) + layer(2 * x)).square().sum().backward()
    both = layer.weight.grad.clone()
    layer.weight.grad = None
    (3 * layer(x)).square().sum().backward()
    assert (layer.weight.grad - both).abs().max() <= 1e-4 * both.abs().max()


def test_gradients() -> None:
    layer = MPConv(3, 2, (3, 3)).double().eval()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, w, g: torch.func.functional_call(layer, {"weight": w}, (a, g)), (x, layer.weight, gain)
    )
    attention = MPAttention(4, 2).double().eval()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, x)
    model = small_unet().train()
    out = model(torch.randn(2, 3, 8, 8), torch.randn(2), torch.tensor([0, 4]))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_attention_is_cosine_attention() -> None:
    layer = MPAttention(8, 2).double().eval()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    w = {k: v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True) for k, v in layer.state_dict().items()}
    tokens = x.flatten(2)
    qkv = torch.einsum("oc,bcn->bon", w["attn_qkv.weight"], tokens).view(2, 3, 2, 4, 6)
    qkv = qkv / qkv.square().mean(3, keepdim=True).sqrt()
    q, k, v = qkv.unbind(1)
    maps = (torch.einsum("bhcn,bhcm->bhnm", q, k) / math.sqrt(4)).softmax(-1)
    y = torch.einsum("bhnm,bhcm->bhcn", maps, v).reshape(2, 8, 6)
    y = torch.einsum("oc,bcn->bon", w["attn_proj.weight"], y)
    expected = ((0.7 * tokens + 0.3 * y) / math.hypot(0.7, 0.3)).view(x.shape)
    assert (layer(x) - expected).abs().max() < 2e-3  # the small number that is added to norms
    assert (layer(x) - x).abs().max() > 0.1


@torch.no_grad()
def test_unet_as_a_model() -> None:
    x, t, labels = torch.randn(2, 3, 8, 6), torch.tensor([0.1, -0.4]), torch.tensor([0, 4])
    fresh = EDM2UNet(3, 8, 1, (1, 2), (2,), head_dim=8)
    assert not fresh(x, t).any()
    model = small_unet()
    out = model(x, t, labels)
    assert out.shape == x.shape
    assert not torch.equal(out, model(x, t)) and not torch.equal(out, model(x, t, labels.flip(0)))
    assert (model(x[:1], t[:1], labels[:1]) - out[:1]).abs().max() <= 1e-5 * out.abs().max()
    half = copy.deepcopy(model).bfloat16()(x.bfloat16(), t.bfloat16(), labels)
    assert half.dtype is torch.bfloat16
    assert (half - out).abs().max() <= 0.1 * out.abs().max()
    wide = copy.deepcopy(model).double()(x.double(), t.double(), labels)
    assert (wide - out).abs().max() <= 1e-4 * out.abs().max()


def test_training_compiles() -> None:
    layer = MPConv(4, 3, (3, 3)).train()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 4, 5, 5)
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    out.sin().sum().backward()
    expected = twin(x)
    expected.sin().sum().backward()
    assert (out - expected).abs().max() < 1e-5
    assert (layer.weight - twin.weight).abs().max() < 1e-6
    assert (layer.weight.grad - twin.weight.grad).abs().max() < 1e-4


def test_bad_arguments() -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.zeros(2)
    model = small_unet()
    for call, message in (
        (lambda: small_unet(head_dim=5), "head_dim: expected a divisor of 32 channels, got 5"),
        (lambda: small_unet(channel_mult=()), "channel_mult: expected factors"),
        (lambda: small_unet(num_blocks=0), "num_blocks: expected at least 1, got 0"),
        (lambda: model(x[..., :7], t), r"x: expected shape \[B,3,H,W\], H and W multiples of 2"),
        (lambda: model(x, t[:1]), r"t: expected shape \[2\]"),
        (lambda: model(x, t, t), "int64 labels"),
        (lambda: small_unet(num_classes=0)(x, t, t.long()), "num_classes=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_half_precision_keeps_the_noise_level() -> None:
    """``log(sigma) / 4`` rounded to bfloat16 would be another noise level."""
    model, t = small_unet(num_classes=0).bfloat16(), torch.tensor([-0.7313])
    seen: list[Tensor] = []
    model.emb_fourier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(torch.randn(1, 3, 8, 8).bfloat16(), t)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(seen[0], t, rtol=0, atol=0)
