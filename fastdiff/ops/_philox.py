"""Normal noise by counter in PyTorch's integer operators: bit for bit what the kernels draw (csrc/common/philox.h)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastdiff.ops import _cache
from fastdiff.ops import _registry as reg
from fastdiff.ops._normal_table import ROWS

MAX_ELEMENTS = 1 << 34  # of one sample: a counter word, four elements each
_WORD = 0xFFFFFFFF


def philox_normal(
    shape: Sequence[int],
    seed: int | torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normal noise that depends on the seed and the position alone: not on the device, nor on the batch size.

    What `ddim_step` and `linear_update` draw inside their kernels, given `seed`, as a tensor. Philox4x32-10 (Salmon et
    al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and inversion in integer arithmetic: element i of sample b
    is made of word i % 4 of counter (i // 4, b, offset) under the key `seed`. Errors of the quantile are below 2e-8;
    |z| <= 6.34.

    Args:
        shape: [B, ...], the first dimension being the samples, at most 2^34 elements each.
        seed: an integer in [-2^63, 2^63); or int64 on the device of the result: [1] (seed), [2] (seed, offset), or
            [B, 2], one pair per sample, each of which then draws what sample 0 would. A tensor's values are not read
            by the host: advance the offset on the device and replay a CUDA graph. The first call on a device copies a
            table there and must come before the capture.
        dtype: of the result: float32 values, rounded to it.
        device: where; None: that of `seed`, or the CPU.

    Returns:
        [B, ...].

    Raises:
        ValueError: the seed is out of range, of another shape or on another device; a size is negative or too large.
        TypeError: the seed is neither an integer nor int64, or the shape no sequence of integers.
    """
    if device is None:
        device = seed.device if isinstance(seed, torch.Tensor) else torch.device("cpu")
    sizes = isinstance(shape, (tuple, list)) and all(isinstance(n, (int, torch.SymInt)) for n in shape)
    if not sizes or (not torch.compiler.is_compiling() and any(n < 0 for n in shape)):
        reg.fail("philox_normal", "shape", "a sequence of integers >= 0", shape, ValueError if sizes else TypeError)
    shape, device = tuple(shape), torch.device(device)
    batch = shape[0] if shape else 1
    elements = 1
    for n in shape[1:]:
        elements *= n
    seed = check_seed("philox_normal", seed, batch, elements, device)
    return draw(shape, seed, device).to(dtype)


def check_seed(op: str, seed: object, batch: int, elements: int, device: torch.device | None) -> int | torch.Tensor:
    """An integer as it is, or a contiguous int64 tensor [1], [2] or [B, 2]."""
    if elements > MAX_ELEMENTS:
        reg.fail(op, "seed", f"samples of at most {MAX_ELEMENTS} elements", elements)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            reg.fail(op, "seed", "an int64 tensor or an integer", seed.dtype, TypeError)
        if tuple(seed.shape) not in ((1,), (2,), (batch, 2)):
            reg.fail(op, "seed", f"shape (1,), (2,) or ({batch}, 2)", tuple(seed.shape))
        whole = device is not None and device.index is not None
        if device is not None and (seed.device != device if whole else seed.device.type != device.type):
            reg.fail(op, "seed", f"a tensor on {device}", seed.device)
        return seed.contiguous()
    if isinstance(seed, np.integer):
        seed = int(seed)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        reg.fail(op, "seed", "an integer or an int64 tensor", type(seed).__name__, TypeError)
    if not -(1 << 63) <= seed < 1 << 63:
        reg.fail(op, "seed", "an integer in [-2^63, 2^63)", seed)
    return seed  # type: ignore[return-value]  # while tracing, perhaps a symbol


def draw(shape: Sequence[int], seed: Any, device: torch.device) -> torch.Tensor:
    """`philox_normal` of a checked seed, float32."""
    batch = shape[0] if shape else 1
    elements = 1
    for n in shape[1:]:
        elements *= n

    def column(value: Any) -> torch.Tensor:
        """A number or [B] as [1 or B, 1]."""
        if isinstance(value, torch.Tensor):
            return value.reshape(-1, 1)
        return torch.full((1, 1), value, dtype=torch.int64, device=device)

    key, offset, sample = column(seed), column(0), torch.arange(batch, device=device).reshape(-1, 1)
    if isinstance(seed, torch.Tensor):
        key = column(seed[..., 0])
        if seed.shape[-1] == 2:
            offset = column(seed[..., 1])
        if seed.dim() == 2:
            sample = torch.zeros_like(sample)
    block = torch.arange((elements + 3) // 4, device=device).reshape(1, -1)
    words = philox((block, sample, offset & _WORD, _high(offset)), key & _WORD, _high(key))
    z = normal(torch.stack(torch.broadcast_tensors(*words), -1)).flatten(1)
    return z[:, :elements].reshape(shape)


def philox(counter: Sequence[torch.Tensor], k0: torch.Tensor, k1: torch.Tensor) -> list[torch.Tensor]:
    """Philox4x32-10 of four counter words and two of a key: int64 tensors with values below 2^32."""
    c = list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # modulo 2^64, whose upper word is still right
        c = [_high(b) ^ c[1] ^ k0, b & _WORD, _high(a) ^ c[3] ^ k1, a & _WORD]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c


def normal(word: torch.Tensor) -> torch.Tensor:
    """float32 standard normals of random words: int64, values below 2^32."""
    if (
        torch.compiler.is_compiling()
        or type(word) is not torch.Tensor
        or word.is_meta
        or torch._C._len_torch_dispatch_stack()
    ):
        return _normal_op(word)  # type: ignore[no-any-return]  # the table is no part of what is traced
    return _normal(word)


def _normal(word: torch.Tensor) -> torch.Tensor:
    v = (word << 1 & _WORD) | 1
    octave = 31 - ((v.double().view(torch.int64) >> 52) - 1023)  # leading zeros, from the exponent
    m = v << octave + 1 & _WORD
    rows = _table(word.device)[octave * 16 + (m >> 28)]
    t = (m << 4 & _WORD) - (1 << 31)
    z = rows[..., 3].long()
    for i in (2, 1, 0):
        z = rows[..., i] + (t * z >> 32)
    return torch.where(word >> 31 > 0, -z, z).float() * 2.0**-28


def _high(word: torch.Tensor) -> torch.Tensor:
    return word >> 32 & _WORD


@_cache.on_device("the table of normal quantiles", lambda table: (table,))
def _table(device: torch.device) -> torch.Tensor:
    rows = torch.frombuffer(bytearray(base64.b85decode(ROWS)), dtype=torch.int32)
    return rows.reshape(512, 4).to(device)


# PyTorch's own operators are all it is made of, so it needs no native extension and serves any device.
reg.library.define("philox_words_to_normal(Tensor word) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
reg.library.impl("philox_words_to_normal", _normal, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastdiff::philox_words_to_normal", lambda word: torch.empty_like(word, dtype=torch.float32), lib=reg.library
)
_normal_op = torch.ops.fastdiff.philox_words_to_normal.default
