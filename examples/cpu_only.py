"""Operators on a machine without a GPU: which kernel serves a call, why, and how it compares with plain PyTorch.

python examples/cpu_only.py [--tokens 256] [--width 768]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _measure import difference, report, speed

import fastdiff
from fastdiff import ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()

    info = fastdiff.build_info()
    print(f"fastdiff {info['version']}, instruction set {fastdiff.cpu_isa()}, {torch.get_num_threads()} threads")

    torch.manual_seed(0)
    x, branch = (torch.randn(4, args.tokens, args.width) for _ in range(2))
    gate, shift, scale = torch.randn(4, 3 * args.width).chunk(3, dim=-1)  # views of one product, as in a DiT
    call = (x, branch, gate, shift, scale)

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        r = x + gate[:, None] * branch
        return r, F.layer_norm(r, (args.width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    why = fastdiff.explain("gate_residual_adaln", *call)
    print("gate_residual_adaln:", "; ".join(why) or "served by the native kernel")
    ours = ops.gate_residual_adaln(*call)
    ratio = speed(eager, lambda: ops.gate_residual_adaln(*call), rounds=51)
    report("against eager PyTorch", max(map(difference, ours, eager())), 1e-5, ratio)

    # The reference is plain PyTorch: it serves what the kernels do not, float64 for instance, and can be asked for.
    wide = [t.double() for t in call]
    print("in float64:", "; ".join(fastdiff.explain("gate_residual_adaln", *wide)))
    report("against float64", difference(ours[1], ops.gate_residual_adaln(*wide)[1]), 1e-5)
    with fastdiff.use_backend("reference"):
        reference = ops.gate_residual_adaln(*call)
    report("against the reference", difference(ours[1], reference[1]), 1e-5)


if __name__ == "__main__":
    main()
