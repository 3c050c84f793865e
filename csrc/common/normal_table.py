"""Writes the table of csrc/common/philox.h, as C++ (normal_table.h) and as Python (fastdiff/ops/_normal_table.py).

    python csrc/common/normal_table.py

Row 16 o + s holds a cubic that gives the normal quantile z(p), P(Z > z) = p, in units of 2^-28 for
p = (1 + (s + 1/2 + t) / 16) 2^-(o + 2), t in [-1/2, 1/2): c0 + t (c1 + t (c2 + t c3)), through the Chebyshev nodes.
"""

from __future__ import annotations

import base64
import math
import struct
from pathlib import Path
from statistics import NormalDist

OCTAVES, SEGMENTS, UNIT = 32, 16, 2.0**28
ROOT = Path(__file__).resolve().parents[2]


def row(octave: int, segment: int) -> list[int]:
    """The four coefficients of one segment."""
    nodes = [math.cos((2 * i + 1) * math.pi / 8) / 2 for i in range(4)]
    z = [-NormalDist().inv_cdf((1 + (segment + 0.5 + t) / SEGMENTS) * 2.0 ** -(octave + 2)) for t in nodes]
    total = [0.0] * 4
    for i, t in enumerate(nodes):  # Lagrange's formula, multiplied out
        weight, product = z[i], [1.0, 0.0, 0.0, 0.0]
        for j, other in enumerate(nodes):
            if j != i:
                weight /= t - other
                product = [(product[k - 1] if k else 0.0) - other * product[k] for k in range(4)]
        total = [a + weight * b for a, b in zip(total, product, strict=True)]
    return [round(c * UNIT) for c in total]


def table() -> list[list[int]]:
    """All 512 rows."""
    return [row(o, s) for o in range(OCTAVES) for s in range(SEGMENTS)]


def main() -> None:
    """Write both files."""
    rows = table()
    lines = [", ".join("{{" + ", ".join(map(str, r)) + "}}" for r in rows[i : i + 2]) for i in range(0, len(rows), 2)]
    cpp = "// Written by csrc/common/normal_table.py, which says what the numbers are.\n// clang-format off\n"
    (ROOT / "csrc/common/normal_table.h").write_text(cpp + "".join(f"{line},\n" for line in lines))
    text = base64.b85encode(b"".join(struct.pack("<4i", *r) for r in rows)).decode()
    pieces = "".join(f'    b"{text[i : i + 110]}"\n' for i in range(0, len(text), 110))
    python = '"""Written by csrc/common/normal_table.py: 512 rows of four int32, little-endian."""\n\n'
    (ROOT / "fastdiff/ops/_normal_table.py").write_text(f"{python}ROWS = (\n{pieces})\n")


if __name__ == "__main__":
    main()
