"""Somebody's own DiT, which imports nothing of ours: accelerated as it is, trained a step, and our operators by hand.

    python examples/plain_torch.py [--tokens 256] [--width 256]

`accelerate` knows such blocks by their attribute names and tries out whether they compute what the names promise; a
block that does something else is left alone and named in the report.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from _measure import difference, report, speed
from torch import Tensor, nn

import fastdiff
from fastdiff import ops


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_1 * self.attn(self.norm1(x) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(self.norm2(x) * (1 + scale_2) + shift_2)


class Network(nn.Module):
    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(dim, dim // 64) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    args = parser.parse_args()

    torch.manual_seed(0)
    network = Network(args.width, depth=2)
    x, c = torch.randn(4, args.tokens, args.width), torch.randn(4, args.width)
    fast, found = fastdiff.accelerate(copy.deepcopy(network), return_report=True)
    print(found)
    report("output", difference(fast(x, c), network(x, c)), 2e-5, speed(lambda: network(x, c), lambda: fast(x, c)))

    # A training step of both: the same loss before and after.
    losses = []
    for model in (network, fast):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x, c).square().mean().backward()
        optimiser.step()
        losses.append(model(x, c).square().mean())
    report("loss after a step", difference(losses[1], losses[0]), 1e-4)

    # The same operators by hand: the norm site between two branches, in one pass.
    gate, shift, scale = torch.randn(4, 3 * args.width).chunk(3, dim=-1)
    r, h = ops.gate_residual_adaln(x, 2 * x, gate, shift, scale)
    by_hand = F.layer_norm(x + gate[:, None] * 2 * x, (args.width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    report("operator by hand", max(difference(h, by_hand), difference(r, x + gate[:, None] * 2 * x)), 1e-5)


if __name__ == "__main__":
    main()
