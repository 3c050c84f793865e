"""Products on a GPU: GELU in their epilogue, and who goes through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emu import harness
from torch._decomp import decomposition_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.models import DiT
from fastdiff.ops import _linear

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "_TANH", {})


def test_the_epilogue_is_told_apart_from_the_other_form_of_gelu() -> None:
    """On the CPU torch's operator is the erf form, and the question finds that out."""
    x = torch.randn(5, 6)
    got = torch._addmm_activation(torch.zeros(6), x, torch.eye(6), use_gelu=True)
    torch.testing.assert_close(got, F.gelu(x))
    assert not _linear._is_tanh(torch.device("cpu"))


def test_torch_says_that_the_epilogue_on_cuda_is_the_tanh_form() -> None:
    with FakeTensorMode():
        bias, x, weight = (torch.empty(s, device="cuda") for s in ((8,), (4, 6), (8, 6)))
        traced = make_fx(
            lambda b, x, w: torch._addmm_activation(b, x, w.t(), use_gelu=True), decomposition_table=decomposition_table
        )(bias, x, weight)
    forms = [n.kwargs for n in traced.graph.nodes if "gelu" in str(n.target)]
    tanh = [n for n in traced.graph.nodes if "tanh" in str(n.target)]
    assert tanh or forms == [{"approximate": "tanh"}]


def test_a_capture_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastdiff._native, "capturing", lambda device: True)
    assert not _linear._is_tanh(torch.device("cpu"))
    assert _linear._TANH == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_epilogue_adds_the_bias_and_keeps_the_shape(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(_linear, "_epilogue", lambda *_: True)
    monkeypatch.setattr(_linear, "_onednn", lambda *_: False)
    monkeypatch.setattr(_linear, "_product_type", lambda x, _: x.dtype)
    wide, weight, bias = torch.randn(3, 12, 4), torch.randn(7, 6), torch.randn(7)
    x = wide.mT[:, 1:, ::2].to(dtype)
    got = _linear.linear(x, weight, bias, gelu=True)
    assert got.shape == (3, 3, 7)
    assert got.dtype == dtype
    want = F.gelu(F.linear(x.double(), weight.to(dtype).double(), bias.to(dtype).double()))
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


class Called(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_the_mlp_of_a_dit_goes_through_the_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "_is_tanh", lambda device: True)
    monkeypatch.setattr(_linear, "_unobserved", lambda tensors: True)  # the mode that watches here
    mlp = DiT(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2).blocks[0].mlp
    with FakeTensorMode():
        for fc in (mlp.fc1, mlp.fc2):
            fc.weight, fc.bias = (torch.nn.Parameter(torch.empty(p.shape, device="cuda")) for p in fc.parameters())
        x = torch.empty(2, 4, 16, device="cuda")
        with torch.no_grad(), Called() as called:
            assert mlp(x).shape == x.shape
        assert [n for n in called.names if "addmm" in n] == ["aten._addmm_activation.default", "aten.addmm.default"]
        assert not _linear._epilogue(x, mlp.fc1.weight, mlp.fc1.bias)  # where a gradient is wanted
        with torch.no_grad(), fastdiff.use_backend("reference"):
            assert not _linear._epilogue(x, mlp.fc1.weight, mlp.fc1.bias)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        with torch.no_grad():
            assert not _linear._epilogue(x, mlp.fc1.weight, mlp.fc1.bias)


def test_fake_tensors_and_modes_see_a_product_and_a_gelu() -> None:
    with FakeTensorMode():
        x, weight, bias = (torch.empty(s, device="cuda") for s in ((4, 6), (8, 6), (8,)))
        with torch.no_grad(), Called() as called:
            assert _linear.linear(x, weight, bias, gelu=True).shape == (4, 8)
    assert "aten._addmm_activation.default" not in called.names
    assert "aten.addmm.default" in called.names


class Marked(torch.Tensor):
    """Somebody's own tensor."""


def test_a_subclass_and_a_profiler_are_observers() -> None:
    x = torch.ones(2, 2)
    assert _linear._unobserved((x, torch.nn.Parameter(x)))
    assert not _linear._unobserved((x, x.as_subclass(Marked)))
    with Called():
        assert not _linear._unobserved((x,))


@pytest.mark.parametrize("watch", ["forward", "hook", "pre-hook", "backward hook", "global hook", "subclass"])
def test_a_layer_that_somebody_watches_is_called(watch: str) -> None:
    layer: torch.nn.Module = torch.nn.Linear(2, 2)
    assert _linear.is_plain(layer)
    if watch == "forward":  # as accelerate hooks a module
        layer.forward = lambda x: x
    elif watch == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif watch == "pre-hook":
        layer.register_forward_pre_hook(lambda *_: None)
    elif watch == "backward hook":
        layer.register_full_backward_hook(lambda *_: None)
    elif watch == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert not _linear.is_plain(layer)
        handle.remove()
        assert _linear.is_plain(layer)
        return
    else:
        layer = torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    assert not _linear.is_plain(layer)


@pytest.mark.skipif(harness.why_not() is not None, reason="the CUDA emulator cannot be built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dit_on_the_cuda_kernels(dtype: torch.dtype) -> None:
    """The whole chain, packed attention included, against float64."""
    model = DiT(input_size=4, patch_size=2, in_channels=3, hidden_size=48, depth=2, num_heads=2, num_classes=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_().mul_(0.1)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([3.0, 400.0])
    with torch.no_grad():
        model = model.to(dtype)
        with harness.build().operators():
            got = model(x.to(dtype), t.to(dtype))
        want = model.double()(x.to(dtype).double(), t.to(dtype).double())
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < 64 * torch.finfo(dtype).eps  # some thirty roundings one after the other


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_epilogue_of_this_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert _linear._is_tanh(device)
    x, weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((3, 50, 72), (136, 72), (136,)))
    with torch.no_grad(), Called() as called:
        got = _linear.linear(x, weight, bias, gelu=True)
    assert "aten._addmm_activation.default" in called.names
    want = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=64 * eps)
