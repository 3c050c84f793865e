"""One transformer block of PixArt (diffusers), accelerated: forward and gradients agree.

    python examples/pixart_block.py [--tokens 256] [--width 1152]

The block is PixArt-alpha's: self-attention, cross-attention to text tokens, and six modulation vectors per sample.
"""

from __future__ import annotations

import argparse
import copy

import torch
from _measure import difference, report, speed
from diffusers.models.attention import BasicTransformerBlock

import fastdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=288, help="a multiple of 72; PixArt-alpha has 1152")
    args = parser.parse_args()

    torch.manual_seed(0)
    block = BasicTransformerBlock(
        args.width,
        num_attention_heads=args.width // 72,
        attention_head_dim=72,
        cross_attention_dim=args.width,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    inputs = {
        "hidden_states": torch.randn(2, args.tokens, args.width),
        "encoder_hidden_states": torch.randn(2, 77, args.width),
        "timestep": torch.randn(2, 6 * args.width),
    }
    fast, found = fastdiff.accelerate(copy.deepcopy(block), return_report=True)
    print(found)

    theirs, ours = block(**inputs), fast(**inputs)
    report("output", difference(ours, theirs), 1e-5, speed(lambda: block(**inputs), lambda: fast(**inputs)))

    for output in (theirs, ours):
        output.square().mean().backward()
    theirs, ours = (torch.cat([p.grad.flatten() for p in module.parameters()]) for module in (block, fast))

    def step(module: torch.nn.Module) -> None:
        with torch.enable_grad():
            module(**inputs).square().mean().backward()

    report("gradients", difference(ours, theirs), 1e-5, speed(lambda: step(block), lambda: step(fast)))


if __name__ == "__main__":
    main()
