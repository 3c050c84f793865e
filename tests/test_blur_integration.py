"""`fastdiff.accelerate` on Gaussian blur layers: kornia's own, and torchvision's by a stand-in of its structure."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerated import apart
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations._swap import handler_of


def _blur(img: Tensor, kernel_size: Any, sigma: Any) -> Tensor:
    """What torchvision documents: horizontal axis first, reflected borders."""

    def taps(size: int, sigma: float) -> Tensor:
        x = torch.arange(size, dtype=torch.float64) - size // 2
        w = torch.exp(-0.5 * (x / sigma) ** 2)
        return w / w.sum()

    (kx, ky), (sx, sy) = kernel_size, sigma
    weight = (taps(ky, sy)[:, None] * taps(kx, sx)).to(torch.float32 if img.dtype == torch.uint8 else img.dtype)
    x = F.pad(img.to(weight.dtype).reshape(-1, 1, *img.shape[-2:]), [kx // 2] * 2 + [ky // 2] * 2, mode="reflect")
    out = F.conv2d(x, weight[None, None]).reshape(img.shape)
    return out.round().to(torch.uint8) if img.dtype == torch.uint8 else out


class _First(nn.Module):
    """torchvision.transforms.GaussianBlur, as documented."""

    def __init__(self, kernel_size: Any, sigma: Any = (0.1, 2.0)) -> None:
        super().__init__()
        self.kernel_size = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        self.sigma = sigma if isinstance(sigma, (tuple, list)) else (sigma, sigma)

    @staticmethod
    def get_params(sigma_min: float, sigma_max: float) -> float:
        return float(torch.empty(1).uniform_(sigma_min, sigma_max).item())

    def forward(self, img: Any) -> Any:
        sigma = self.get_params(self.sigma[0], self.sigma[1])
        return _blur(img, self.kernel_size, [sigma, sigma])


class _Transform(nn.Module):
    """torchvision.transforms.v2.Transform, for one input."""

    def forward(self, *inputs: Any) -> Any:
        params = self.make_params(list(inputs))
        found = [self.transform(x, params) for x in inputs]
        return found[0] if len(found) == 1 else tuple(found)


class _Second(_Transform):
    """torchvision.transforms.v2.GaussianBlur."""

    def __init__(self, kernel_size: Any, sigma: Any = (0.1, 2.0)) -> None:
        super().__init__()
        self.kernel_size = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        self.sigma = sigma if isinstance(sigma, (tuple, list)) else (sigma, sigma)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sigma = torch.empty(1).uniform_(self.sigma[0], self.sigma[1]).item()
        return {"sigma": [sigma, sigma]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _blur(inpt, self.kernel_size, **params)


class _Compose:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, x: Any) -> Any:
        for transform in self.transforms:
            x = transform(x)
        return x


class _Compose2(nn.Module):
    def __init__(self, transforms: list[Any]) -> None:
        super().__init__()
        self.transforms = transforms

    def forward(self, x: Any) -> Any:
        for transform in self.transforms:
            x = transform(x)
        return x


@pytest.fixture(params=["v1", "v2"])
def vision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The names of torchvision.transforms or its v2, whether or not it is installed."""
    place = {"v1": "torchvision.transforms.transforms", "v2": "torchvision.transforms.v2._misc"}[request.param]
    blur: Any = {"v1": _First, "v2": _Second}[request.param]
    compose: Any = {"v1": _Compose, "v2": _Compose2}[request.param]
    made = types.SimpleNamespace()
    fake: Any = types.ModuleType(place)
    made.GaussianBlur = type("GaussianBlur", blur.__mro__[1:-1] and (blur.__mro__[1],), {
        k: v for k, v in vars(blur).items() if k not in ("__dict__", "__weakref__", "__init__")
    } | {"__module__": place, "__init__": _initialise(blur)})  # fmt: skip
    made.Compose = compose
    fake.GaussianBlur = made.GaussianBlur
    parts = place.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, place, fake)
    return made


def _initialise(blur: Any) -> Any:
    def __init__(self: Any, kernel_size: Any, sigma: Any = (0.1, 2.0)) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in vars(blur(kernel_size, sigma)).items() if k in ("kernel_size", "sigma")})

    return __init__


@pytest.mark.parametrize("shape", [(3, 12, 17), (2, 3, 9, 10), (2, 2, 3, 9, 10), (1, 11, 12)])
def test_torchvision(vision: Any, shape: tuple[int, ...]) -> None:
    """The same seed draws the same sigma; the first size is the horizontal one."""
    layer = vision.GaussianBlur((5, 9), (0.4, 2.0))
    fast, report = fastdiff.accelerate(copy.deepcopy(layer), return_report=True)
    assert [e.handler for e in report.replaced] == ["Gaussian blur"]
    x = torch.rand(shape)
    for seed in range(3):
        torch.manual_seed(seed)
        theirs = layer(x)
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert apart(fast(x), theirs) < 1e-5
        assert torch.equal(torch.rand(1), after)
    assert not torch.equal(fast(x), fast(x))
    again = pickle.loads(pickle.dumps(fast))
    assert handler_of(again) is not None
    torch.manual_seed(1)
    theirs = fast(x)
    torch.manual_seed(1)
    assert torch.equal(again(x), theirs)
    assert type(fastdiff.restore(fast)) is vision.GaussianBlur


def test_torchvision_gradient(vision: Any) -> None:
    layer = vision.GaussianBlur(5, 1.3)
    fast = fastdiff.accelerate(copy.deepcopy(layer))
    found = []
    for blur in (fast, layer):
        x = torch.rand(3, 8, 8, generator=torch.Generator("cpu").manual_seed(0)).requires_grad_()
        blur(x).square().sum().backward()
        found.append(x.grad)
    assert apart(*found) < 1e-5


def test_torchvision_leaves_what_is_not_a_float_tensor(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are rounded by torchvision itself; an image smaller than the support is its error to raise, and so is one
    without channels."""
    monkeypatch.setattr(fastdiff.ops, "gaussian_blur", lambda *_, **__: pytest.fail("ours was called"))
    layer = vision.GaussianBlur(5, 1.3)
    fast = fastdiff.accelerate(copy.deepcopy(layer))
    x = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    assert torch.equal(fast(x), layer(x))
    x = torch.rand(9, 9)
    assert torch.equal(fast(x), layer(x))
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        fast(torch.rand(3, 2, 2))
    with pytest.raises(AttributeError):
        fast("a picture of another library")


def test_torchvision_compose(vision: Any) -> None:
    """Found in a list of transforms, and in lists of lists."""
    made = vision.Compose([vision.GaussianBlur(3, 0.7), vision.Compose([vision.GaussianBlur(5, 1.1)])])
    x = torch.rand(3, 9, 9)
    theirs = made(x)
    same, report = fastdiff.accelerate(made, return_report=True)
    assert same is made
    assert [e.path for e in report.replaced] == ["transforms.0", "transforms.1.transforms.0"]
    assert apart(made(x), theirs) < 1e-5
    assert not fastdiff.acceleration_report(fastdiff.restore(made)).replaced


def _kornia() -> Any:
    return pytest.importorskip("kornia").filters.GaussianBlur2d


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("border", ["reflect", "replicate", "circular", "constant", "Reflect"])
def test_kornia(border: str, separable: bool) -> None:
    for sigma in ((1.5, 0.7), torch.tensor([[1.5, 0.7]])):
        layer = _kornia()((7, 3), sigma, border, separable)
        fast, report = fastdiff.accelerate(copy.deepcopy(layer), return_report=True)
        assert len(report.replaced) == 1
        x = torch.rand(2, 3, 8, 11)
        assert apart(fast(x), layer(x)) < 1e-5
        low = x.bfloat16()
        assert fast(low).dtype == low.dtype and apart(fast(low), layer(low)) < 1e-2
        assert apart(fast(x.double()), layer(x.double())) < 1e-5
        assert torch.equal(fastdiff.restore(fast)(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_kornia_runs_on_our_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it does not take goes to kornia: a sigma per sample, one that is differentiated, other types, errors."""
    from fastdiff.integrations import _blur as ours

    calls = []
    real = ours.ops.gaussian_blur
    monkeypatch.setattr(ours.ops, "gaussian_blur", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    make, x = _kornia(), torch.rand(2, 3, 8, 11)
    fastdiff.accelerate(make(3, (1.0, 1.0)))(x)
    assert len(calls) == 1
    each = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    learned = torch.tensor([[1.0, 2.0]], requires_grad=True)
    for sigma in (each, learned):
        layer = make(3, sigma)
        assert torch.equal(fastdiff.accelerate(copy.deepcopy(layer))(x), layer(x))
    fastdiff.accelerate(make(3, learned))(x).sum().backward()
    assert learned.grad is not None
    layer = make(3, (1.0, 1.0))
    whole = (9 * x).to(torch.int32)
    assert torch.equal(fastdiff.accelerate(copy.deepcopy(layer))(whole), layer(whole))
    for bad in (torch.rand(3, 8, 8), torch.rand(1, 1, 1, 1)):
        with pytest.raises(Exception) as theirs:
            layer(bad)
        with pytest.raises(type(theirs.value)):
            fastdiff.accelerate(copy.deepcopy(layer))(bad)
    assert len(calls) == 1
