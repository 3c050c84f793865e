"""What an H200 can do, and what a kernel can have of it."""

from __future__ import annotations

from dataclasses import dataclass

MULTIPROCESSORS = 132
COPY = 4.3e12  # bytes per second, read and written, measured
TENSOR = 790e12  # bf16 matrix products, measured
FMA = 60e12  # float32 multiplications and additions
EXPONENTIALS = 16 * MULTIPROCESSORS * 1.755e9  # per second: 16 per clock and multiprocessor

_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32  # of a multiprocessor
_SHARED, _RESERVED = 228 << 10, 1 << 10  # bytes of a multiprocessor; of them, for every block besides its own
_QUADRANTS = 4


@dataclass(frozen=True)
class Residence:
    """How many blocks of a kernel a multiprocessor holds, their warps, and how often the card fills with the grid."""

    blocks: int
    warps: int
    waves: float


def residence(registers: int, shared: int, threads: int, grid: int) -> Residence:
    """From registers per thread, bytes of shared memory per block (static and dynamic), threads and blocks."""
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // _QUADRANTS // of_a_warp * _QUADRANTS // warps
    by_shared = _SHARED // (-(-(shared + _RESERVED) // 128) * 128)
    blocks = min(by_registers, by_shared, _WARPS // warps, _BLOCKS)
    return Residence(blocks, blocks * warps, grid / (blocks * MULTIPROCESSORS) if blocks else float("inf"))


def floor_us(size: int, flops: int, exponentials: int, *, tensor: bool) -> tuple[float, str]:
    """The least time in microseconds, and which limit it is. `tensor`: the operations are products of 16-bit types."""
    limits = {
        "bytes": size / COPY,
        "products" if tensor else "FMA": flops / (TENSOR if tensor else FMA),
        "exp": exponentials / EXPONENTIALS,
    }
    limit = max(limits, key=lambda name: limits[name])
    return limits[limit] * 1e6, limit
