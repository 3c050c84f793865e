"""Gaussian blurs as layers: torchvision's transform (both versions) and kornia's filter.

Floating-point tensors are blurred by our operator. Pictures of PIL, integer tensors (torchvision rounds them in its own
way), sizes that the libraries refuse and a sigma that only the device knows are left to the layer. A random sigma is
still drawn by torchvision's code from torch's generator, so the same seed blurs alike. The *functions* of the libraries
(``torchvision.transforms.functional.gaussian_blur``, ``kornia.filters.gaussian_blur2d``) stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdiff import ops
from fastdiff.integrations._swap import Handler, OfClass, Takes

__all__ = ["HANDLERS"]

_KORNIA_BORDERS = ("constant", "reflect", "replicate", "circular")


def _torchvision(original: Any) -> type:
    class Fast:
        def forward(self: Any, img: Any) -> Any:
            size = _pair(self.kernel_size)
            if not _blurs(img, size):
                return original.forward(self, img)
            sigma = self.get_params(self.sigma[0], self.sigma[1])
            return _torchvision_blur(img, size, (sigma, sigma))

    return Fast


def _torchvision_v2(original: Any) -> type:
    class Fast:
        def transform(self: Any, inpt: Any, params: dict[str, Any]) -> Any:
            size = _pair(self.kernel_size)
            if not _blurs(inpt, size):
                return original.transform(self, inpt, params)
            return _torchvision_blur(inpt, size, _pair(params["sigma"]))

    return Fast


def _kornia(original: Any) -> type:
    class Fast:
        def forward(self: Any, input: Any) -> Any:
            size, sigma = _pair(self.kernel_size), _numbers(self.sigma)
            border = str(self.border_type).lower()
            if sigma is None or border not in _KORNIA_BORDERS or not _blurs(input, size[::-1]) or input.dim() != 4:
                return original.forward(self, input)
            return ops.gaussian_blur(input, sigma, kernel_size=size, border=border)

    return Fast


def _torchvision_blur(img: torch.Tensor, size: Any, sigma: Any) -> torch.Tensor:
    """torchvision names the horizontal axis first."""
    return ops.gaussian_blur(img, (float(sigma[1]), float(sigma[0])), kernel_size=(size[1], size[0]))


def _blurs(x: Any, size: Any) -> bool:
    """An image [..., C, H, W] of a plain type that is larger than half the support; `size` is (K_x, K_y)."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or not x.is_floating_point() or x.dim() < 3:
        return False
    if not all(isinstance(k, int) and k > 0 and k % 2 for k in size):
        return False
    return bool(x.shape[-1] > size[0] // 2 and x.shape[-2] > size[1] // 2)


def _pair(value: Any) -> Any:
    """What stands for both axes, or for each: as two."""
    if not isinstance(value, (tuple, list)):
        return value, value
    return (value[0], value[-1]) if len(value) in (1, 2) else value


def _numbers(sigma: Any) -> tuple[float, float] | None:
    """(sigma_y, sigma_x) above 0, if they can be had without waiting for a device and nobody differentiates them."""
    if isinstance(sigma, torch.Tensor):
        if sigma.shape != (1, 2) or not sigma.is_cpu or sigma.requires_grad or torch.compiler.is_compiling():
            return None
        sigma = sigma[0].tolist()
    if not isinstance(sigma, (tuple, list)) or len(sigma) != 2:
        return None
    if not all(isinstance(s, (int, float)) and s > 0 for s in sigma):
        return None
    return float(sigma[0]), float(sigma[1])


HANDLERS = [
    Handler("Gaussian blur", OfClass("torchvision", "GaussianBlur"), Takes(("img",)), _torchvision),
    Handler(
        "Gaussian blur", OfClass("torchvision", "GaussianBlur", "transform"), Takes(("inpt", "params"), "transform"),
        _torchvision_v2,
    ),
    Handler("Gaussian blur", OfClass("kornia", "GaussianBlur2d"), Takes(("input",)), _kornia),
]  # fmt: skip
