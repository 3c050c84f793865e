"""A diffusers pipeline, accelerated in place: same pictures, less time, and back again.

    python examples/diffusers_dit.py                 a small network
    python examples/diffusers_dit.py --size S        DiT-S/2 on 32 x 32 latents

Weights are random; with real ones, `DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")` is used the same way.
"""

from __future__ import annotations

import argparse
import copy

import torch
from _measure import difference, report, speed
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import fastdiff

SIZES = {
    "tiny": {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "sample_size": 16},
    "S": {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "sample_size": 32},
}


def picture(pipe: DiTPipeline, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe([207, 360], num_inference_steps=steps, generator=generator, output_type="np").images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**SIZES[args.size], out_channels=8).eval()
    pipe = DiTPipeline(transformer, AutoencoderKL(norm_num_groups=8, block_out_channels=(16,)).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    before, plain = picture(pipe, args.steps), copy.deepcopy(transformer)

    _, found = fastdiff.accelerate(pipe, return_report=True)
    print(found)
    after = picture(pipe, args.steps)

    size = SIZES[args.size]["sample_size"]
    inputs = torch.randn(4, 4, size, size), torch.tensor([1, 250, 500, 999]), torch.tensor([0, 1, 2, 3])
    ratio = speed(lambda: plain(*inputs), lambda: transformer(*inputs))
    report("pictures of the pipeline", difference(after, before), 1e-3, ratio)

    fastdiff.restore(pipe)
    report("restored", difference(picture(pipe, args.steps), before), 0.0)


if __name__ == "__main__":
    main()
