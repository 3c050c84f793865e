"""Selective scan: the recurrence of Mamba, one direction or several, over any order of the positions.

Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", eq. 2 and algorithm 2:

    t_l = softplus(delta_l + delta_bias)                      (softplus if asked for)
    h_l = exp(t_l A) h_{l-1} + t_l B_l u_l                    per channel d and state n
    y_l = <C_l, h_l> + D u_l,      out_l = y_l silu(z_l)

The positional part of `selective_scan` is that of mamba_ssm's `selective_scan_fn`. For a complex A, h is complex and
<C, h> counts twice its real part (the conjugate states are implied). The last state, and every gradient including that
of the initial and through the last state, are returned by the native kernels; nothing is expanded to the size of the
states of all steps.

Memory besides arguments, results and gradients, for K directions (1 in `selective_scan`), R = N floats of state per
channel (2 N for a complex A):
- the last states, K B D R floats; and a training call keeps every 32nd for its backward pass, K B D R ceil(L / 32);
- the backward pass sums dB and dC over channels in ceil(D / G / 64) parts each: K B G L R floats a part in float32, for
  each of B and C that depends on the step; and K B (R + 2) D floats for dA, dD and the gradient of the bias, another
  K B R D for each of B and C that is constant;
- on the CPU a thread (at most one per 64 channels of a group and sample) works in 320 R floats, backward in
  720 R + 35 648;
- B and C in different numbers of groups are repeated to the least common multiple G (B with one group beside C with D
  groups becomes [B, D, L, N]), and so is their gradient before it is summed; 16-bit ones in float32;
- several directions: out and du are summed in float32, B L D floats each for 16-bit types; the gradient of a delta
  shared by all of them is first a float32 [B, K, L, D], that of a shared A, D or delta_bias K times its size.
- on CUDA dB and dC are summed in parts of 32 channels (8 where R > 32) instead of 64, and several directions write an
  output each before these are added: K B L D floats, and again for du in the backward pass. A long call with few
  channels runs in up to 16 segments of L side by side: K B D (2 R + 1) floats for each (at most 17 MB for R = 16).

On CUDA nothing is read by the host, so a call can be captured in a graph. An `order` that is no permutation is not
noticed there: positions outside the sequence are moved to its nearest end, positions that come twice are written
twice, and what is never visited is left unset.

Accuracy (tests/test_selective_scan.py): on the CPU a decay is exact to 2.1e-7 relative besides the rounding of its
exponent, and exactly 1 where delta or A is 0; on CUDA to 2.4e-7, likewise, and decays below 2^-126 are 0, as are step
sizes that softplus makes smaller than that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastdiff import _native
from fastdiff.ops import _registry as reg

LAYOUTS = ("bdl", "bld")
MAX_STATES = 256  # kScanStates in csrc/fastdiff.h: floats of state per channel
MAX_STATES_CUDA = 128  # kScanCudaStates
_STEPS = 32  # kScanSteps
_CHANNELS = 64  # kScanChannels
_MOST_TASKS_APART = 256  # more than any GPU has multiprocessors: segments side by side would gain nothing
_FIELDS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")  # canonical operands, in order


# ------------------------------------------------------------------------------------------------- public functions


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    layout: str = "bdl",
    order: torch.Tensor | None = None,
    reverse: bool = False,
    resets: torch.Tensor | None = None,
) -> Any:
    """Selective scan with the arguments of mamba_ssm's `selective_scan_fn`, and more. Differentiable in every tensor.

    Sizes: batch B, channels D, length L, states N, groups G (G divides D; channel d uses group d // (D / G)).

    Args:
        u: (B, D, L), or [B, L, D] with ``layout="bld"``: the input.
        delta: like u: the step sizes, before bias and softplus.
        A: (D, N), real or complex. Stable where the real part is negative.
        B: constant (D, N), of the kind of A; or (B, N, L), or grouped (B, G, N, L), real; with ``layout="bld"``
            [B, L, N] or [B, L, G, N]. For a complex A real and imaginary parts alternate on the last axis, which is
            then 2 L long (``"bdl"``) or 2 N (``"bld"``).
        C: in any of the forms of B.
        D: (D,), the skip connection; None for none.
        z: like u: the gate, out = y silu(z); None for none.
        delta_bias: (D,), added to delta; None for none.
        delta_softplus: apply log(1 + exp(.)) to the step sizes (above 20, nothing).
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N), complex with A; None for zeros.
        layout: ``"bdl"`` (channels first, mamba_ssm's) or ``"bld"`` (channels last, faster: nothing is transposed).
        order: [L], int64, a permutation: step i visits position order[i]. Outputs stay at their positions.
        reverse: take the steps from the last to the first (of `order`, if given).
        resets: [B, L] or [L], bool or integer: the state restarts from zero before the step at a marked position, which
            is how several sequences are packed in one. At the first step it also drops the initial state.

    Returns:
        out, shape and dtype of u; with `return_last_state` also the state (B, D, N), float32 or complex64 (float64 or
        complex128 where an argument is of double precision).

    Raises:
        ValueError: a shape, device, layout or order does not fit. On a GPU and while tracing, the values of `order`
            are not looked at; the operator itself does so on the CPU.
        TypeError: an argument is not a tensor of the right kind.

    Native up to N = 256 (128 for a complex A), on a GPU 128 (64); longer states and float64 run on the reference.
    """
    op = "selective_scan"
    way = reg.route(op, _real_parts(u, delta, A, B, C), _real_parts(D, z, delta_bias, initial_state))
    call = _canonical(op, u, delta, A, B, C, D, z, delta_bias, initial_state, layout, order, resets)
    out, last = _serve(op, way, call, bool(delta_softplus), bool(reverse), layout == "bdl")
    out = out.transpose(1, 2) if layout == "bdl" else out
    if not return_last_state:
        return out
    last = last[:, 0]
    return out, torch.view_as_complex(last) if A.is_complex() else last


def selective_scan_multi(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    orders: torch.Tensor,
    layout: str = "bld",
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """The sum of K selective scans of one input, each along its own order: VMamba's cross-scan and merge in one launch.

    out = sum_k selective_scan(u, delta[:, :, k], A[k], B[:, :, k], C[:, :, k], D[k], order=orders[k], ...). Nothing is
    copied into the order of a direction, and the outputs are added where they stand. Differentiable in every tensor.

    Args:
        u: [B, L, D]; (B, D, L) with ``layout="bdl"``.
        delta: [B, L, K, D], or [B, L, D] shared by all directions; with ``"bdl"`` (B, K, D, L) or (B, D, L).
        A: [K, D, N], or [D, N] shared; real.
        B: [B, L, K, N]; with ``"bdl"`` (B, K, N, L).
        C: like B.
        D: [K, D], or [D] shared (each direction adds its skip); None for none.
        orders: [K, L], int64, each row a permutation.
        layout: ``"bld"`` or ``"bdl"``.
        delta_bias: [K, D], or [D] shared; None for none.
        delta_softplus: as in `selective_scan`.

    Returns:
        shape and dtype of u. The sum is taken in float32. Memory: see the head of this module; the partial sums and the
        states kept for the backward pass are K times those of one scan.

    Raises:
        ValueError: a shape, device, layout or order does not fit.
        TypeError: an argument is not a tensor of the right kind.
    """
    op = "selective_scan_multi"
    way = reg.route(op, (u, delta, A, B, C), (D, delta_bias))
    call = _canonical_multi(op, u, delta, A, B, C, D, delta_bias, orders, layout)
    out, _ = _serve(op, way, call, bool(delta_softplus), False, layout == "bdl")
    return out.transpose(1, 2) if layout == "bdl" else out


# ------------------------------------------------------------------------------------------------------- references


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    layout: str = "bdl",
    order: torch.Tensor | None = None,
    reverse: bool = False,
    resets: torch.Tensor | None = None,
) -> Any:
    """`selective_scan` in plain PyTorch, step by step: any device, float64 included, differentiable to any order."""
    call = _canonical("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state, layout, order, resets)
    out, last = _reference(*call, delta_softplus, reverse)
    out = out.transpose(1, 2) if layout == "bdl" else out
    if not return_last_state:
        return out
    return out, torch.view_as_complex(last[:, 0].contiguous()) if A.is_complex() else last[:, 0]


def selective_scan_multi_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    orders: torch.Tensor,
    layout: str = "bld",
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """`selective_scan_multi` in plain PyTorch: any device, float64 included, differentiable to any order."""
    call = _canonical_multi("selective_scan_multi", u, delta, A, B, C, D, delta_bias, orders, layout)
    out, _ = _reference(*call, delta_softplus, False)
    return out.transpose(1, 2) if layout == "bdl" else out


def _reference(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """On canonical operands (see `_canonical`), softplus, reverse: out [B, L, D], last states [B, K, D, N (, 2)]."""
    u, delta, A, B, C, D, z, delta_bias, initial, orders, resets, softplus, reverse = call
    dtypes = {t.dtype for t in (u, delta, A, B, C, D, z, delta_bias, initial) if t is not None}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    u_dtype, u = u.dtype, u.to(wide)
    batch, L, channels = u.shape
    is_complex = A.dim() == 4

    def numbers(t: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(t.to(wide).contiguous()) if is_complex else t.to(wide)

    def steps(t: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, ...]:
        """The slices of t along its steps, in the order in which they are visited."""
        if orders is not None:
            t = t.index_select(dim, orders[k].flip(0) if reverse else orders[k])
        elif reverse:
            t = t.flip(dim)
        return t.unbind(dim)

    total, last = None, []
    for k in range(A.shape[0]):
        dt = delta[:, k].to(wide)
        if delta_bias is not None:
            dt = dt + delta_bias[k].to(wide)
        if softplus:
            dt = F.softplus(dt)
        a = numbers(A[k])  # [D, N]

        def projected(t: torch.Tensor, k: int = k) -> tuple[torch.Tensor, ...]:
            """B or C for every step, as something that broadcasts with [B, D, N]."""
            constant = t.dim() == (4 if is_complex else 3)
            t = numbers(t[k] if constant else t[:, k])
            if constant:
                return (t,) * L
            groups = t.shape[1]
            if groups > 1:
                t = t.repeat_interleave(channels // groups, dim=1)
            return steps(t, k, 2)

        h = numbers(initial[:, k]) if initial is not None else a.new_zeros((batch, *a.shape))
        fresh = None if resets is None else steps(resets, k, 1)
        ys = []
        for i, (t, x, b, c) in enumerate(
            zip(steps(dt, k, 1), steps(dt * u, k, 1), projected(B), projected(C), strict=True)
        ):
            if fresh is not None:
                h = h.masked_fill(fresh[i].view(-1, 1, 1), 0)
            h = torch.exp(t.unsqueeze(-1) * a) * h + x.unsqueeze(-1) * b
            ys.append((h * c).sum(-1))
        y = torch.stack(ys, 1) if ys else u.clone()  # without steps both are empty, and this one has a gradient
        y = 2 * y.real if y.is_complex() else y
        if orders is not None:
            y = y.index_select(1, torch.argsort(orders[k].flip(0) if reverse else orders[k]))
        elif reverse:
            y = y.flip(1)
        if D is not None:
            y = y + D[k].to(wide) * u
        total = y if total is None else total + y
        last.append(torch.view_as_real(h) if is_complex else h)
    assert total is not None
    if z is not None:
        total = total * F.silu(z.to(wide))
    return total.to(u_dtype), torch.stack(last, 1)


# ------------------------------------------------------------------------------------------------------- validation
# Canonical operands, all views: u, z [B, L, D]; delta [B, K, L, D]; A [K, D, N (, 2)]; B, C [B, K, G, L, N (, 2)] or,
# constant, [K, D, N (, 2)]; D, delta_bias [K, D]; initial [B, K, D, N (, 2)]; orders [K, L] int64; resets [B, L] bool.
# The trailing 2 is there where A is complex.


def _real_parts(*tensors: Any) -> tuple[Any, ...]:
    """Complex tensors as what the kernels see of them, for the choice of a route. Sparse ones are refused later."""
    return tuple(
        torch.view_as_real(t.resolve_conj())
        if isinstance(t, torch.Tensor) and t.is_complex() and t.layout == torch.strided and not t.is_nested
        else t
        for t in tensors
    )


def _operand(op: str, argument: str, t: Any, like: Any, dims: tuple[int, ...], expected: str,
             is_complex: bool = False) -> torch.Tensor:  # fmt: skip
    if is_complex and isinstance(t, torch.Tensor) and t.is_complex():
        if t.layout != torch.strided or t.is_nested:
            reg.fail(op, argument, "a dense tensor", "a nested one" if t.is_nested else t.layout, TypeError)
        if t.device != like.device:
            reg.fail(op, argument, f"a tensor on {like.device}", t.device)
        if t.dtype not in (torch.complex64, torch.complex128):
            reg.fail(op, argument, "complex64 or complex128", t.dtype, TypeError)
    else:
        reg.check_tensor(op, argument, t, like)
        if is_complex:
            reg.fail(op, argument, "a complex tensor, because A is one", t.dtype, TypeError)
    if t.dim() not in dims:
        reg.fail(op, argument, expected, tuple(t.shape))
    return t


def _shaped(op: str, argument: str, t: torch.Tensor, shape: tuple[int, ...], expected: str) -> torch.Tensor:
    if tuple(t.shape) != shape:
        reg.fail(op, argument, f"{expected} = {shape}", tuple(t.shape))
    return t


def _pairs(t: torch.Tensor) -> torch.Tensor:
    """A complex tensor as a real one with an axis of 2."""
    if not torch.compiler.is_compiling() and t._is_zerotensor():  # which dynamo cannot look at, nor traces any
        t = torch.zeros_like(t) if not t.requires_grad else t.clone()
    return torch.view_as_real(t.resolve_conj().resolve_neg())


def _canonical(op: str, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, initial: Any,
               layout: Any, order: Any, resets: Any) -> tuple[Any, ...]:  # fmt: skip
    """Check everything but the values of `order`, and return the canonical operands."""
    if layout not in LAYOUTS:
        reg.fail(op, "layout", f"one of {LAYOUTS}", repr(layout))
    first = layout == "bdl"
    whole = "(B, D, L)" if first else "[B, L, D]"
    _operand(op, "u", u, None, (3,), whole)
    _operand(op, "delta", delta, u, (3,), whole)
    _shaped(op, "delta", delta, tuple(u.shape), "the shape of u")
    u = u.transpose(1, 2) if first else u
    delta = delta.transpose(1, 2) if first else delta
    batch, L, channels = u.shape
    if not isinstance(A, torch.Tensor):
        reg.fail(op, "A", "a torch.Tensor", type(A).__name__, TypeError)
    is_complex = A.is_complex()
    _operand(op, "A", A, u, (2,), "(D, N)", is_complex)
    if A.shape[0] != channels:
        reg.fail(op, "A", f"(D, N) with D = {channels}", tuple(A.shape))
    N = A.shape[1]
    projections = []
    for name, t in (("B", B), ("C", C)):
        forms = "(D, N), (B, N, L) or (B, G, N, L)" if first else "(D, N), [B, L, N] or [B, L, G, N]"
        forms += " with real and imaginary parts alternating on the last axis" if is_complex else ""
        constant = isinstance(t, torch.Tensor) and t.dim() == 2
        t = _operand(op, name, t, u, (2, 3, 4), forms, is_complex and constant)
        if constant:
            _shaped(op, name, t, (channels, N), "(D, N)")
            projections.append((_pairs(t) if is_complex else t).unsqueeze(0))
            continue
        if is_complex:
            if t.shape[-1] != 2 * (L if first else N):
                reg.fail(op, name, f"{forms}, the last axis {2 * (L if first else N)} long", tuple(t.shape))
            t = t.unflatten(-1, (L if first else N, 2))
        if t.dim() == (4 if is_complex else 3):
            t = t.unsqueeze(1 if first else 2)
        t = t.transpose(2, 3) if first else t.transpose(1, 2)  # [B, G, L, N (, 2)]
        G = t.shape[1]
        if tuple(t.shape[:1]) + tuple(t.shape[2:4]) != (batch, L, N) or G == 0 or channels % G:
            sizes = f"B = {batch}, L = {L}, N = {N}, G a divisor of D = {channels}"
            reg.fail(op, name, f"{forms} with {sizes}", tuple((B if name == "B" else C).shape))
        projections.append(t.unsqueeze(1))
    rows = []
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t is not None:
            _shaped(op, name, _operand(op, name, t, u, (1,), "(D,)"), (channels,), "(D,)")
        rows.append(None if t is None else t.unsqueeze(0))
    if z is not None:
        _operand(op, "z", z, u, (3,), whole)
        z = z.transpose(1, 2) if first else z
        if z.shape != u.shape:
            reg.fail(op, "z", "the shape of u", tuple((z.transpose(1, 2) if first else z).shape))
    if initial is not None:
        _operand(op, "initial_state", initial, u, (3,), "(B, D, N)", is_complex)
        _shaped(op, "initial_state", initial, (batch, channels, N), "(B, D, N)")
        initial = (_pairs(initial) if is_complex else initial).unsqueeze(1)
    orders = None if order is None else _check_order(op, "order", order, u, (L,)).unsqueeze(0)
    if resets is not None:
        resets = _check_resets(op, resets, u, batch, L)
    A = (_pairs(A) if is_complex else A).unsqueeze(0)
    B, C = projections
    return u, delta.unsqueeze(1), A, *_one_grouping(B, C, is_complex), rows[0], z, rows[1], initial, orders, resets


def _one_grouping(B: torch.Tensor, C: torch.Tensor, is_complex: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """B and C in the same number of groups, the least common multiple of both, by repeating groups."""
    five = 6 if is_complex else 5
    if B.dim() != five or C.dim() != five or B.shape[2] == C.shape[2]:
        return B, C
    G, rest = B.shape[2], C.shape[2]
    while rest:  # Euclid: math.lcm takes no symbolic sizes
        G, rest = rest, G % rest
    G = B.shape[2] // G * C.shape[2]

    def regroup(t: torch.Tensor) -> torch.Tensor:
        return t if t.shape[2] == G else _summable(t).repeat_interleave(G // t.shape[2], dim=2)

    return regroup(B), regroup(C)


def _summable(t: torch.Tensor) -> torch.Tensor:
    """A tensor about to be repeated: its gradient, a sum, is added in float32 and rounded once."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _canonical_multi(op: str, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, orders: Any,
                     layout: Any) -> tuple[Any, ...]:  # fmt: skip
    if layout not in LAYOUTS:
        reg.fail(op, "layout", f"one of {LAYOUTS}", repr(layout))
    first = layout == "bdl"
    _operand(op, "u", u, None, (3,), "(B, D, L)" if first else "[B, L, D]")
    u_ = u.transpose(1, 2) if first else u
    batch, L, channels = u_.shape
    if not isinstance(orders, torch.Tensor) or orders.dim() != 2:
        got = tuple(orders.shape) if isinstance(orders, torch.Tensor) else type(orders).__name__
        reg.fail(op, "orders", "an int64 tensor [K, L]", got, ValueError if isinstance(got, tuple) else TypeError)
    K = orders.shape[0]
    if K < 1:
        reg.fail(op, "orders", "[K, L] with K >= 1", tuple(orders.shape))
    _check_order(op, "orders", orders, u, (K, L))
    forms = "(B, K, D, L) or (B, D, L)" if first else "[B, L, K, D] or [B, L, D]"
    delta = _operand(op, "delta", delta, u, (3, 4), forms)
    if delta.dim() == 3:
        _shaped(op, "delta", delta, tuple(u.shape), "the shape of u")
        delta = _summable(delta.transpose(1, 2) if first else delta).unsqueeze(1).expand(batch, K, L, channels)
    else:
        _shaped(op, "delta", delta, (batch, K, channels, L) if first else (batch, L, K, channels), forms)
        delta = delta.transpose(2, 3) if first else delta.transpose(1, 2)
    A = _operand(op, "A", A, u, (2, 3), "[K, D, N] or [D, N], real")
    N = A.shape[-1]
    _shaped(op, "A", A, (channels, N) if A.dim() == 2 else (K, channels, N), "[K, D, N] or [D, N]")
    projections = []
    for name, t in (("B", B), ("C", C)):
        form = "(B, K, N, L)" if first else "[B, L, K, N]"
        t = _shaped(
            op, name, _operand(op, name, t, u, (4,), form), (batch, K, N, L) if first else (batch, L, K, N), form
        )
        projections.append((t.transpose(2, 3) if first else t.transpose(1, 2)).unsqueeze(2))
    rows = []
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t is not None:
            _operand(op, name, t, u, (1, 2), "[K, D] or [D]")
            _shaped(op, name, t, (channels,) if t.dim() == 1 else (K, channels), "[K, D] or [D]")
            t = _summable(t).expand(K, channels) if t.dim() == 1 else t
        rows.append(t)
    A = _summable(A).expand(K, channels, N) if A.dim() == 2 else A
    return u_, delta, A, *projections, rows[0], None, rows[1], None, orders, None


def _check_order(op: str, argument: str, order: Any, u: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(order, torch.Tensor):
        reg.fail(op, argument, "an int64 tensor", type(order).__name__, TypeError)
    if order.dtype != torch.int64:
        reg.fail(op, argument, "an int64 tensor", order.dtype, TypeError)
    if order.device != u.device:
        reg.fail(op, argument, f"a tensor on {u.device}", order.device)
    _shaped(op, argument, order, shape, "[K, L]" if len(shape) == 2 else "[L]")
    if not torch.compiler.is_compiling() and order.is_cpu and not reg.transforms_active():
        _check_permutations(op, argument, order)
    return order


def _check_permutations(op: str, argument: str, order: torch.Tensor) -> None:
    """Every row of `order` holds 0 .. L-1, each once."""
    rows = order if order.dim() == 2 else order.unsqueeze(0)
    L = rows.shape[1]
    if rows.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < 0 or high >= L:
        reg.fail(op, argument, f"a permutation of 0 .. {L - 1}", f"{low if low < 0 else high}")
    seen = torch.zeros(rows.shape, dtype=torch.bool)
    if not bool(seen.scatter_(1, rows, True).all()):
        values, counts = torch.unique(rows[int((~seen.all(1)).nonzero()[0])], return_counts=True)
        reg.fail(op, argument, f"a permutation of 0 .. {L - 1}", f"{int(values[counts > 1][0])} more than once")


def _check_resets(op: str, resets: Any, u: torch.Tensor, batch: int, L: int) -> torch.Tensor:
    if not isinstance(resets, torch.Tensor):
        reg.fail(op, "resets", "a bool or integer tensor", type(resets).__name__, TypeError)
    if resets.is_floating_point() or resets.is_complex():
        reg.fail(op, "resets", "a bool or integer tensor", resets.dtype, TypeError)
    if resets.device != u.device:
        reg.fail(op, "resets", f"a tensor on {u.device}", resets.device)
    if tuple(resets.shape) not in ((L,), (batch, L)):
        reg.fail(op, "resets", f"[B, L] = {(batch, L)} or [L]", tuple(resets.shape))
    return (resets != 0).expand(batch, L).contiguous()


# -------------------------------------------------------------------------------------------------- native functions


def limits(A: torch.Tensor) -> list[str]:
    """Why the native kernels cannot hold these states (A canonical); empty if they can."""
    states = A[0, 0].numel() if A.dim() and A.shape[0] and A.shape[1] else A.shape[2] * (2 if A.dim() == 4 else 1)
    on_cuda = A.is_cuda or _native._emulated
    most = MAX_STATES_CUDA if on_cuda else MAX_STATES
    if states <= most:
        return []
    where = " on CUDA" if on_cuda else ""
    return [f"{states} floats of state per channel (native{where}: up to {most}) are served by the reference only"]


def _serve(op: str, way: str, call: tuple[Any, ...], softplus: bool, reverse: bool, first: bool) -> Any:
    way = reg.within_limits(op, way, limits(call[2]))
    if way is reg.REFERENCE:
        return _reference(*call, softplus, reverse)
    if way is reg.GRAD:
        out, last = _Scan.apply(*_apart(call), softplus, reverse, first)
    else:
        out, last, _ = reg.call(_scan_op, _scan, *call, softplus, reverse, first, False)
    return (out if out.dtype == call[0].dtype else out.to(call[0].dtype)), last


def _apart(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """While compiling, a view of its own for an argument given twice: dynamo takes no tensor twice."""
    if not torch.compiler.is_compiling():
        return call
    return tuple(
        t.view_as(t) if isinstance(t, torch.Tensor) and any(t is other for other in call[:i]) else t
        for i, t in enumerate(call)
    )


def _sizes(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, int]:
    is_complex = A.dim() == 4
    constant = 4 if is_complex else 3
    G = next((t.shape[2] for t in (B, C) if t.dim() != constant), 1)
    batch, L, channels = u.shape
    return {
        "B": batch, "K": A.shape[0], "G": G, "L": L, "D": channels, "N": A.shape[2], "complex": int(is_complex),
        "constant_b": int(B.dim() == constant), "constant_c": int(C.dim() == constant),
    }  # fmt: skip


def _new_whole(u: torch.Tensor, K: int, first: bool) -> torch.Tensor:
    """[B, L, D], channels outermost in memory for "bdl"; float32 where K scans are summed in it."""
    batch, L, channels = u.shape
    strides = (L * channels, 1, L) if first else (L * channels, channels, 1)
    return u.new_empty_strided((batch, L, channels), strides, dtype=u.dtype if K == 1 else torch.float32)


def _new_outputs(u, A, first, keep):  # type: ignore[no-untyped-def]
    batch, L, channels = u.shape
    K, _, N = A.shape[:3]
    parts = tuple(A.shape[3:])
    rows = N * (2 if parts else 1)
    chunks = -(-L // _STEPS) if keep else 0
    return (
        _new_whole(u, K, first),
        u.new_empty((batch, K, channels, N, *parts), dtype=torch.float32),
        u.new_empty((batch, K, chunks, rows, channels), dtype=torch.float32),
    )


def _scratch(u: torch.Tensor, s: dict[str, int], backward: bool) -> torch.Tensor:
    """What the threads of a CPU work in, [threads, floats]: no more threads than there are tasks."""
    if _native.place(u)[0] >= 0:
        return u.new_empty((1, 0), dtype=torch.float32)
    rows = s["N"] * (1 + s["complex"])
    extension: Any = _native.extension
    size = extension.scan_backward_scratch(rows) if backward else extension.scan_scratch(rows)
    tasks = s["B"] * s["G"] * -(-(s["D"] // s["G"]) // _CHANNELS)
    return u.new_empty((max(1, min(torch.get_num_threads(), tasks)), size), dtype=torch.float32)


def _parts(whole: torch.Tensor, K: int) -> torch.Tensor | None:
    """On CUDA, where K scans write an output each, in the order of the memory of their sum."""
    if K == 1 or _native.place(whole)[0] < 0:
        return None
    return whole.new_empty((K, whole.numel()), dtype=torch.float32)


def _carries(s: dict[str, int], u: torch.Tensor) -> torch.Tensor | None:
    """On CUDA, where a call is cut along L so that its few tasks become many: what each segment hands on."""
    if _native.place(u)[0] < 0:
        return None
    extension: Any = _native.extension
    rows = s["N"] * (1 + s["complex"])
    tasks = s["K"] * s["G"] * -(-(s["D"] // s["G"]) // extension.scan_cuda_channels(rows))
    segments = extension.scan_cuda_segments(s["L"], tasks)
    if segments == 1 or s["B"] * tasks > _MOST_TASKS_APART:
        return None
    return u.new_empty((s["B"], s["K"], segments, 2 * rows + 1, s["D"]), dtype=torch.float32)


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _values(
    s: dict[str, int], softplus: bool, reverse: bool, scratch: torch.Tensor, operands: Any, orders: Any, resets: Any
) -> Any:
    return (
        *(s[name] for name in ("B", "K", "G", "L", "D", "N", "complex")), int(softplus), int(reverse),
        s["constant_b"], s["constant_c"], *scratch.shape, scratch.data_ptr(), *(reg.operand(t) for t in operands),
        0 if orders is None else orders.data_ptr(), 0 if resets is None else resets.data_ptr(),
    )  # fmt: skip


def _inner(u, delta, A, B, C, D, z, delta_bias, initial, orders, resets):  # type: ignore[no-untyped-def]
    """The operands in the order of struct Scan, and the tables as the kernel reads them. Checks what would crash it:
    the operator can be called without the public function, and a traced order has not been looked at yet."""
    op = "selective_scan"
    if u.dim() != 3 or A.dim() not in (3, 4) or limits(A):
        reg.fail(op, "u, A", "[B, L, D] and [K, D, N (, 2)] within the kernels' limits", (u.shape, A.shape))
    (batch, L, channels), (K, _, N), parts = u.shape, A.shape[:3], tuple(A.shape[3:])
    constant = (K, channels, N, *parts)
    expected = {
        "delta": (delta, (batch, K, L, channels)), "A": (A, constant), "D": (D, (K, channels)), "z": (z, u.shape),
        "delta_bias": (delta_bias, (K, channels)), "initial_state": (initial, (batch, K, channels, N, *parts)),
        "order": (orders, (K, L)), "resets": (resets, (batch, L)),
    }  # fmt: skip
    for name, t in (("B", B), ("C", C)):
        G = _sizes(u, A, B, C)["G"]
        expected[name] = (t, constant if t.dim() == len(constant) else (batch, K, G, L, N, *parts))
        if G < 1 or channels % G:
            reg.fail(op, name, "a number of groups that divides D", G)
    for name, (t, shape) in expected.items():
        if t is not None and tuple(t.shape) != tuple(shape):
            reg.fail(op, name, f"shape {tuple(shape)}", tuple(t.shape))
    for name, t, dtype in (("order", orders, torch.int64), ("resets", resets, torch.bool)):
        if t is not None and t.dtype != dtype:
            reg.fail(op, name, f"dtype {dtype}", t.dtype, TypeError)
    if orders is not None:
        orders = orders.contiguous()
        if orders.is_cpu:  # the kernels on CUDA look for themselves that no position lies outside
            _check_permutations("selective_scan", "order", orders)
    if resets is not None:
        resets = resets.contiguous()
    return (u, delta, A, B, C, D, delta_bias, z, initial), orders, resets


def _scan(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, initial, orders, resets, softplus, reverse, first, keep
):
    s = _sizes(u, A, B, C)
    outputs = _new_outputs(u, A, first, keep)
    out, last, states = outputs
    operands, orders, resets = _inner(u, delta, A, B, C, D, z, delta_bias, initial, orders, resets)
    if out.numel() == 0 and last.numel() == 0:
        return outputs
    scratch = _scratch(u, s, False)
    values = _values(s, softplus, reverse, scratch, operands, orders, resets)
    parts = _parts(out, s["K"])
    carries = _carries(s, u)
    results = (reg.operand(out), last.data_ptr(), states.data_ptr() if keep else 0, _address(parts), _address(carries))
    _native.extension.selective_scan(*_native.place(u), (*values, *results))  # type: ignore[union-attr]
    return outputs


def _scan_fake(u, delta, A, B, C, D, z, delta_bias, initial, orders, resets, softplus, reverse, first, keep):  # type: ignore[no-untyped-def]
    return _new_outputs(u, A, first, keep)


# ---------------------------------------------------------------------------------------------------------- gradient


def _new_gradients(u, delta, A, B, C, D, z, delta_bias, initial, need):  # type: ignore[no-untyped-def]
    """Empty gradients of the canonical operands where `need` says so, in their order; du and ddelta always."""
    K = A.shape[0]
    wanted = [True, True, *need[2:]]
    return [
        None if t is None or not w
        else torch.empty_like(t, dtype=torch.float32 if i == 0 and K > 1 else t.dtype) if _dense(t)
        else t.new_empty(t.shape, dtype=torch.float32 if i == 0 and K > 1 else t.dtype)
        for i, (t, w) in enumerate(zip((u, delta, A, B, C, D, z, delta_bias, initial), wanted, strict=True))
    ]  # fmt: skip


def _dense(t: torch.Tensor) -> bool:
    """No two elements share memory and none is left out, so that empty_like keeps the strides."""
    expected = 1
    for stride, size in sorted((st, n) for n, st in zip(t.shape, t.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _backward(  # type: ignore[no-untyped-def]
    grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, initial, orders, resets, states, softplus, reverse, need
):
    s = _sizes(u, A, B, C)
    grads = _new_gradients(u, delta, A, B, C, D, z, delta_bias, initial, need)
    operands, orders, resets = _inner(u, delta, A, B, C, D, z, delta_bias, initial, orders, resets)
    batch, L, channels = u.shape
    K, rows = A.shape[0], A.shape[2] * (2 if A.dim() == 4 else 1)
    height = rows * (1 + s["constant_b"] + s["constant_c"]) + 2
    partial = u.new_empty((batch, K, height, channels), dtype=torch.float32)
    extension: Any = _native.extension
    together = extension.scan_cuda_channels(rows) if _native.place(u)[0] >= 0 else _CHANNELS
    blocks = -(-(channels // s["G"]) // together)
    sums = [
        None if s[constant] else u.new_empty((batch, K, s["G"], blocks, L, rows), dtype=torch.float32)
        for constant in ("constant_b", "constant_c")
    ]
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
    chunks = -(-L // _STEPS)
    for name, t, shape in (("grad_out", grad_out, (batch, L, channels)),
                           ("states", states, (batch, K, chunks, rows, channels)),
                           ("grad_last", grad_last, (batch, K, channels, *A.shape[2:]))):  # fmt: skip
        if t is not None and (tuple(t.shape) != shape or (t is states and t.dtype != torch.float32)):
            reg.fail("selective_scan_backward", name, f"shape {shape}", (tuple(t.shape), t.dtype))
    states = states.contiguous()
    scratch = _scratch(u, s, True)
    values = _values(s, softplus, reverse, scratch, operands, orders, resets)
    results = (states.data_ptr(), *(reg.operand(t) for t in (grad_out, grad_last, du, ddelta, dz, dA, dB, dC, dD, dbias,
                                                            dinitial)))  # fmt: skip
    parts = _parts(du, K)
    workspaces = (partial.data_ptr(), *(_address(t) for t in sums), _address(parts))
    extension.selective_scan_backward(*_native.place(u), (*values, *results, *workspaces))
    return [g for g in grads if g is not None]


def _backward_fake(grad_out, grad_last, *rest):  # type: ignore[no-untyped-def]
    (u, delta, A, B, C, D, z, delta_bias, initial), need = rest[:9], rest[-1]
    return [g for g in _new_gradients(u, delta, A, B, C, D, z, delta_bias, initial, need) if g is not None]


class _Scan(torch.autograd.Function):
    """Canonical operands in, (out, last states) out."""

    @staticmethod
    def forward(ctx, *call):  # type: ignore[no-untyped-def,override]
        *tensors, softplus, reverse, first = call
        out, last, states = reg.call(_scan_op, _scan, *tensors, softplus, reverse, first, True)
        ctx.save_for_backward(*tensors, states)
        ctx.options = (softplus, reverse)
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    def backward(ctx, grad_out, grad_last):  # type: ignore[no-untyped-def,override]
        *tensors, states = ctx.saved_tensors
        if grad_out is None and grad_last is None:
            return (None,) * 14
        need = list(ctx.needs_input_grad[: len(_FIELDS)])
        if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or reg.vectorised((grad_out, grad_last)):
            return (*_reference_gradients(tensors, ctx.options, (grad_out, grad_last), need), *[None] * 5)
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[0])
        found = iter(reg.call(_backward_op, _backward, grad_out, grad_last, *tensors, states, *ctx.options, need))
        grads = [None if t is None or not (n or i < 2) else next(found)
                 for i, (t, n) in enumerate(zip(tensors[: len(_FIELDS)], need, strict=True))]  # fmt: skip
        if grads[0] is not None and grads[0].dtype != tensors[0].dtype:
            grads[0] = grads[0].to(tensors[0].dtype)
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), *[None] * 5)


def _reference_gradients(tensors: Any, options: Any, upstream: Any, need: Any) -> list[torch.Tensor | None]:
    """Through the reference: differentiable themselves (create_graph=True), and for a vectorised backward pass."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of its own per argument, since one tensor may be given for two.
        leaves = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_(n)
            for t, n in zip(tensors[: len(_FIELDS)], need, strict=True)
        ]
        results = _reference(*leaves, *tensors[len(_FIELDS) :], *options)
        if tensors[2].shape[0] > 1:
            results = (results[0].float(), results[1])
        pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if g is not None]
        found = iter(torch.autograd.grad(
            [r for r, _ in pairs], [t for t, n in zip(leaves, need, strict=True) if n and t is not None],
            [g for _, g in pairs],
            create_graph=differentiable, allow_unused=True,
        ))  # fmt: skip
    return [next(found) if n else None for n in need]


# ------------------------------------------------------------------------------------------------------ registration

_ARGS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? orders, Tensor? resets"
)


def _floats(*args: Any) -> Any:
    return [t for t in args if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())]


_scan_op = reg.define(
    "selective_scan",
    f"{_ARGS}, bool softplus, bool reverse, bool channels_first, bool keep_states",
    "(Tensor, Tensor, Tensor)",
    _scan,
    _scan_fake,
    operands=_floats,
)
_backward_op = reg.define(
    "selective_scan_backward",
    f"Tensor grad_out, Tensor? grad_last, {_ARGS}, Tensor states, bool softplus, bool reverse, bool[] need",
    "Tensor[]",
    _backward,
    _backward_fake,
    operands=_floats,
)
