"""ControlNet: Zhang, Rao & Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (2302.05543).

A trainable copy of the first half of a backbone reads the control image besides the noisy one; what its blocks find
goes through layers that start at zero (eq. 2: y = F(x; frozen) + Z(F(x + Z(c; 0); copy); 0)) and is added

* to the skip connections and the middle of a :class:`~fastdiff.models.UNet`, copied up to its middle, or
* for transformers and state-space models, which are a chain of `blocks`, to the tokens behind the block that was copied
  (as in PixArt-delta, Chen et al. 2024, arXiv:2401.05252, §4).

So the controlled model starts as the backbone, exactly, and the copy starts to learn once the zero layers have moved.

With a U-Net, parameters load under the names of the published ControlNets (``input_hint_block``, ``zero_convs``,
``middle_block_out``, and those of the U-Net); `controlnet_from_diffusers` reads ``diffusers.ControlNetModel``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.models._layers import require
from fastdiff.models._unet_keys import controlnet_keys, matrices_of
from fastdiff.models.attention_hooks import attention_layers
from fastdiff.models.unet import UNet

__all__ = ["ControlNet", "ControlledModel", "controlnet_from_diffusers"]

_HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)  # of the published networks; the 3rd, 5th and 7th layers halve the image


class ControlNet(nn.Module):
    """The control branch of one backbone.

    Args:
        backbone: a :class:`~fastdiff.models.UNet`, or a model with `blocks` whose ``forward`` takes ``control`` and
            ``taps`` (:class:`~fastdiff.models.DiT` and its kin). It is copied and stays as it is.
        hint_channels: channels of the control image.
        hint_scale: side of the control image over that of x: 1, 2, 4, or 8 (pixels beside latents).
        num_blocks: blocks to copy, of a model with `blocks`; half of them, rounded up, if None.

    Raises:
        TypeError: the backbone is of neither kind.
        ValueError: an argument is out of range.
    """

    def __init__(
        self, backbone: nn.Module, *, hint_channels: int = 3, hint_scale: int = 1, num_blocks: int | None = None
    ) -> None:
        super().__init__()
        require(hint_scale in (1, 2, 4, 8), "ControlNet", "hint_scale", "1, 2, 4 or 8", hint_scale)
        require(hint_channels >= 1, "ControlNet", "hint_channels", "at least 1", hint_channels)
        self.hint_channels, self.hint_scale = hint_channels, hint_scale
        branch: Any = copy.deepcopy(backbone).requires_grad_(True)
        config: dict[str, Any] = branch.config if hasattr(branch, "config") else {}
        if isinstance(backbone, UNet):
            require(num_blocks is None, "ControlNet", "num_blocks", "None for a UNet", num_blocks)
            del branch.output_blocks, branch.out
            self.input_hint_block = _hint_block(hint_channels, hint_scale, backbone.config["model_channels"])
            convs = (nn.Sequential(_zero(nn.Conv2d(c, c, 1))) for c in backbone.skip_channels)
            self.zero_convs = nn.ModuleList(convs)
            last = backbone.config["model_channels"] * backbone.config["channel_mult"][-1]
            self.middle_block_out = nn.Sequential(_zero(nn.Conv2d(last, last, 1)))
        else:
            missing = {"control", "taps"} - set(inspect.signature(backbone.forward).parameters)
            if not hasattr(backbone, "blocks") or missing:
                name = type(backbone).__name__
                raise TypeError(
                    "[ControlNet] backbone: expected a UNet, or a model with `blocks` whose forward takes `control` "
                    f"and `taps`, got {name} (missing: {', '.join(sorted(missing)) or 'blocks'})"
                )
            depth = len(branch.blocks)
            count = (depth + 1) // 2 if num_blocks is None else num_blocks
            require(1 <= count <= depth, "ControlNet", "num_blocks", f"1 to {depth}", num_blocks)
            branch.blocks = nn.ModuleList(list(branch.blocks)[:count])
            if hasattr(branch, "final_layer"):
                branch.final_layer.requires_grad_(False)  # its output is not used
            width, patch = config["hidden_size"], config["patch_size"]
            self.input_hint_block = _hint_block(hint_channels, hint_scale, width, patch)
            self.zero_linears = nn.ModuleList(_zero(nn.Linear(width, width)) for _ in range(count))
        if any(hasattr(m, "processor") for m in branch.modules()):
            for layer in attention_layers(branch).values():
                layer.processor = None  # type: ignore[assignment]  # adapters of the backbone are not ours
        self.branch = branch
        first = next(backbone.parameters())
        self.to(device=first.device, dtype=first.dtype)

    def forward(self, x: Tensor, t: Tensor, cond: Any, image: Tensor, **extras: Any) -> list[Tensor | None]:
        """What to give the backbone as ``control``.

        Args:
            x: as for the backbone, [B,C,H,W].
            t: likewise, [B].
            cond: likewise.
            image: [B, hint_channels, hint_scale * H, hint_scale * W], values as in training (0..1 in published ones).
                Its batch may also divide B (guidance): the images are then used in turn.
            **extras: for the copy of the backbone.

        Raises:
            ValueError: `image` does not fit x.
        """
        h, w = (self.hint_scale * side for side in x.shape[2:])
        expected, got = f"shape [B,{self.hint_channels},{h},{w}]", list(image.shape)
        good = image.dim() == 4 and tuple(image.shape[1:]) == (self.hint_channels, h, w)
        require(good and len(image) > 0 and len(x) % len(image) == 0, "ControlNet", "image", expected, got)
        hint = self.input_hint_block(image)
        hint = hint.repeat(len(x) // len(image), 1, 1, 1)
        if isinstance(self.branch, UNet):
            _, _, skips, middle = self.branch.encode(x, t, cond, hint=hint, **extras)
            found = [zero(skip) for zero, skip in zip(self.zero_convs, skips, strict=True)]
            return [*found, self.middle_block_out(middle)]
        taps: list[Tensor] = []
        self.branch(x, t, cond, control=[hint.flatten(2).transpose(1, 2)], taps=taps, **extras)
        return [None, *(zero(tokens) for zero, tokens in zip(self.zero_linears, taps, strict=True))]

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as ``load_state_dict`` takes them, from a published ControlNet or by diffusers' names."""
        return matrices_of(self, controlnet_keys(state, len(_HINT_WIDTHS)))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As always; published names, with a U-Net, load as well."""
        return super().load_state_dict(self.adapt_state_dict(state_dict), *args, **kwargs)


class ControlledModel(nn.Module):
    """A backbone with control branches: ``model(x, t, cond)`` again.

    Train it as any model; only the branches learn, of which each may be trained alone. Labels are not dropped in
    training mode (backbone and branches would draw differently): pass the null class.

    Args:
        backbone: the model; its parameters are frozen.
        controlnets: one branch or several.
        scales: weight of each branch; may be set at any time. 1 if None.

    Raises:
        ValueError: another number of scales than branches.
    """

    def __init__(
        self, backbone: nn.Module, controlnets: ControlNet | Sequence[ControlNet], scales: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        branches = [controlnets] if isinstance(controlnets, ControlNet) else list(controlnets)
        self.backbone = backbone.requires_grad_(False)
        self.controlnets = nn.ModuleList(branches)
        self.scales = [1.0] * len(branches) if scales is None else list(scales)
        require(
            len(self.scales) == len(branches), "ControlledModel", "scales", f"{len(branches)} of them", len(self.scales)
        )
        self.images: list[Tensor | None] | None = None
        if hasattr(backbone, "config"):
            self.config = backbone.config
        self.train(self.training)

    def train(self, mode: bool = True) -> ControlledModel:
        """The mode is kept for form: backbone and branches are deterministic in both."""
        super().train(mode)
        for module in (self.backbone, *self.controlnets):
            module.eval()
        return self

    def set_images(self, *images: Tensor | None) -> ControlledModel:
        """The control images for calls that name none: one for each branch, or None to leave that one out."""
        self.images = self._checked(images)
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Any = None,
        *,
        images: Tensor | Sequence[Tensor | None] | None = None,
        **extras: Any,
    ) -> Tensor:
        """Predicts as the backbone does, controlled by `images`.

        Args:
            x: as for the backbone.
            t: likewise.
            cond: likewise.
            images: control images, as for `set_images` (a tensor for a single branch); those set there if None.
            **extras: for the backbone and the copies of it.

        Raises:
            ValueError: there are no images, or another number of them than branches.
        """
        given = self.images if images is None else self._checked([images] if isinstance(images, Tensor) else images)
        if given is None:
            raise ValueError("[ControlledModel] images: expected control images here or by set_images, got None")
        total: list[Tensor | None] | None = None
        for net, image, scale in zip(self.controlnets, given, self.scales, strict=True):
            if image is None or scale == 0:
                continue
            found = [None if r is None else scale * r for r in net(x, t, cond, image, **extras)]
            total = found if total is None else _sum(total, found)
        out: Tensor = self.backbone(x, t, cond, control=total, **extras)
        return out

    def _checked(self, images: Sequence[Tensor | None]) -> list[Tensor | None]:
        count = len(self.controlnets)
        require(len(images) == count, "ControlledModel", "images", f"{count} of them, one for each branch", len(images))
        return list(images)


def controlnet_from_diffusers(source: Any, backbone: UNet) -> ControlNet:
    """The :class:`ControlNet` of `backbone` with the weights of a ``diffusers.ControlNetModel`` made for it.

    Raises:
        RuntimeError: missing or unexpected keys, or shapes that differ (from ``load_state_dict``).
    """
    weights = source.state_dict()
    channels = weights["controlnet_cond_embedding.conv_in.weight"].shape[1]
    net = ControlNet(backbone, hint_channels=channels, hint_scale=8)
    net.load_state_dict(weights)
    return net.eval()


def _hint_block(channels: int, scale: int, width: int, patch: int = 1) -> nn.Sequential:
    """Control image [B,channels,scale*H,scale*W] -> [B,width,H/patch,W/patch], zero at first."""
    layers: list[nn.Module] = []
    for i, out in enumerate(_HINT_WIDTHS):
        stride = 2 if i in (2, 4, 6) and 2 ** (i // 2) <= scale else 1
        layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1), nn.SiLU()]
        channels = out
    kernel = (3, 1, 1) if patch == 1 else (patch, patch, 0)
    last = nn.Conv2d(channels, width, kernel[0], stride=kernel[1], padding=kernel[2])
    return nn.Sequential(*layers, _zero(last))


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _sum(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sum by entries; None is nothing, and so is what a shorter list lacks."""
    length = max(len(a), len(b))
    pairs = zip([*a, *[None] * (length - len(a))], [*b, *[None] * (length - len(b))], strict=True)
    return [y if x is None else x if y is None else x + y for x, y in pairs]
