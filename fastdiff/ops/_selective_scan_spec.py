"""What tests, `fastdiff verify` and `fastdiff bench` know of the selective scan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff.ops import _registry as reg
from fastdiff.ops import selective_scan as page
from fastdiff.ops._examples import dense, nbytes, randn

# ---------------------------------------------------------------------------------------------------------- examples


def _parameter_type(rng: random.Random, dtype: torch.dtype) -> torch.dtype:
    """Parameters are often float32 beside 16-bit activations."""
    return rng.choice([dtype, torch.float32]) if dtype in (torch.float16, torch.bfloat16) else dtype


def _complex_randn(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    parts = randn(rng, (*shape, 2), torch.float64 if dtype == torch.float64 else torch.float32, device, layout="plain")
    t = torch.view_as_complex(parts)
    return t.t().contiguous().t() if len(shape) == 2 and rng.random() < 0.5 else t


def _positive(t: torch.Tensor, scale: float) -> torch.Tensor:
    """In place, so that the layout stays."""
    return t.abs_().mul_(scale)


def _example(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, D = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 6, 16, 17, 33, 70])
    L, N = rng.choice([1, 2, 3, 5, 8, 16, 33, 40, 70]), rng.choice([1, 2, 3, 4, 7, 16, 21])
    layout = rng.choice(page.LAYOUTS)
    first, is_complex = layout == "bdl", rng.random() < 0.3
    parts = 2 if is_complex else 1

    def whole() -> torch.Tensor:
        return randn(rng, (B, D, L) if first else (B, L, D), dtype, device)

    def projection() -> torch.Tensor:
        kind = rng.choice(["plain", "plain", "grouped", "constant"])
        if kind == "constant":
            if is_complex:
                return _complex_randn(rng, (D, N), dtype, device)
            return randn(rng, (D, N), _parameter_type(rng, dtype), device)
        groups = [rng.choice([g for g in range(1, D + 1) if D % g == 0])] if kind == "grouped" else []
        last = (N, L * parts) if first else (L, *groups, N * parts)
        return randn(rng, (B, *groups, *last) if first else (B, *last), dtype, device)

    softplus = rng.random() < 0.5
    u, delta = whole(), whole()
    if softplus:
        delta.mul_(2).sub_(1)
    else:
        _positive(delta, rng.choice([0.1, 1.0]))
    if is_complex:
        A = _complex_randn(rng, (D, N), dtype, device)
        torch.view_as_real(A)[..., 0].abs_().neg_()
    else:
        A = _positive(randn(rng, (D, N), _parameter_type(rng, dtype), device), rng.choice([0.05, 1.0, 4.0])).neg_()
    args = (u, delta, A, projection(), projection())
    kwargs: dict[str, Any] = {"layout": layout, "delta_softplus": softplus}
    if rng.random() < 0.5:
        kwargs["D"] = randn(rng, (D,), _parameter_type(rng, dtype), device)
    if rng.random() < 0.5:
        kwargs["z"] = whole()
    if rng.random() < 0.5:
        bias = randn(rng, (D,), _parameter_type(rng, dtype), device)
        kwargs["delta_bias"] = bias if softplus else _positive(bias, 0.2)
    if rng.random() < 0.5:
        kwargs["return_last_state"] = True
    if rng.random() < 0.4:
        kwargs["initial_state"] = (
            _complex_randn(rng, (B, D, N), dtype, device) if is_complex
            else randn(rng, (B, D, N), _parameter_type(rng, dtype), device)
        )  # fmt: skip
    if rng.random() < 0.3:
        kwargs["order"] = torch.randperm(L, generator=torch.Generator().manual_seed(rng.getrandbits(31))).to(device)
    if rng.random() < 0.3:
        kwargs["reverse"] = True
    if rng.random() < 0.3:
        g = torch.Generator().manual_seed(rng.getrandbits(31))
        marks = torch.rand(rng.choice([(L,), (B, L)]), generator=g) < 0.3
        kwargs["resets"] = (marks if rng.random() < 0.5 else marks.long()).to(device)
    return args, kwargs


def _take(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    def one(t: Any) -> Any:
        return t[b : b + 1] if isinstance(t, torch.Tensor) and t.dim() > 2 else t

    u, delta, A, B, C, *rest = args
    options = {k: one(v) for k, v in kwargs.items()}
    if "resets" in options and options["resets"].dim() == 2:
        options["resets"] = options["resets"][b : b + 1]
    return (one(u), one(delta), A, one(B), one(C), *rest), options


def _example_multi(rng: random.Random, dtype: torch.dtype, device: torch.device) -> reg.Call:
    B, D, K = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5, 17, 40, 65]), rng.choice([1, 2, 3, 4])
    L, N = rng.choice([1, 2, 3, 6, 16, 33, 40]), rng.choice([1, 2, 3, 5, 16])
    layout = rng.choice(page.LAYOUTS)
    first = layout == "bdl"
    per = rng.random() < 0.6

    def parameter(*shape: int) -> torch.Tensor:
        return randn(rng, (K, *shape) if rng.random() < 0.6 else shape, _parameter_type(rng, dtype), device)

    u = randn(rng, (B, D, L) if first else (B, L, D), dtype, device)
    size = ((B, K, D, L) if first else (B, L, K, D)) if per else u.shape
    delta = randn(rng, tuple(size), dtype, device)
    softplus = rng.random() < 0.5
    if not softplus:
        _positive(delta, 0.5)
    A = _positive(parameter(D, N), rng.choice([0.1, 2.0])).neg_()
    Bm, C = (randn(rng, (B, K, N, L) if first else (B, L, K, N), dtype, device) for _ in range(2))
    g = torch.Generator().manual_seed(rng.getrandbits(31))
    orders = torch.stack([torch.randperm(L, generator=g) for _ in range(K)]).to(device)
    kwargs: dict[str, Any] = {"orders": orders, "layout": layout, "delta_softplus": softplus}
    if rng.random() < 0.5:
        kwargs["D"] = parameter(D)
    if rng.random() < 0.5:
        kwargs["delta_bias"] = parameter(D) if softplus else _positive(parameter(D), 0.2)
    return (u, delta, A, Bm, C), kwargs


def _take_multi(b: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
    u, delta, A, B, C, *rest = args
    return (u[b : b + 1], delta[b : b + 1], A, B[b : b + 1], C[b : b + 1], *rest), kwargs


# ------------------------------------------------------------------------------------------------------------ bounds
# The recurrence on absolute values in float64. H bounds the state and M the roundings behind it, in units of 2^-24:
# a step multiplies both by a, and adds to M what a's own error (1 + |t A| and the error of t times |A|) makes of H, so
# that roundings pile up over the memory of the recurrence and no further. E and ME are likewise of the gradient of h.


class _Bounds:
    def __init__(self, call: tuple[Any, ...], softplus: bool, reverse: bool) -> None:
        u, delta, A, B, C, D, z, bias, initial, orders, resets = call
        self.call, self.K, self.softplus = call, A.shape[0], softplus
        self.is_complex = A.dim() == 4
        self.u, self.L = u.abs(), u.shape[1]
        self.twice = 2.0 if self.is_complex else 1.0
        self.raw = delta if bias is None else delta + bias[None, :, None]
        self.raw_magnitude = delta.abs() if bias is None else delta.abs() + bias.abs()[None, :, None]
        self.dt = F.softplus(self.raw) if softplus else self.raw
        self.slope = torch.where(self.raw > 20, 1.0, torch.sigmoid(self.raw)) if softplus else torch.ones_like(self.raw)
        self.dt_error = 2 * self.dt.abs() + self.raw_magnitude * self.slope
        self.resets = resets
        # exp(-|z|) carries the rounding of its argument.
        self.gate_magnitude = torch.ones_like(u) if z is None else F.silu(z).abs() * (1 + z.abs() / 8)
        self.real = A[..., 0] if self.is_complex else A
        self.A, self.B, self.C = (_size(t) if self.is_complex else t.abs() for t in (A, B, C))
        steps = torch.arange(self.L)
        rows = [steps if orders is None else orders[k].cpu() for k in range(self.K)]
        self.path = [(r.flip(0) if reverse else r).tolist() for r in rows]
        groups = [t.shape[2] for t in (self.B, self.C) if t.dim() == 5]
        self.repeat = u.shape[2] // groups[0] if groups and groups[0] else 1
        self.y = torch.zeros_like(u)
        self.trail: list[list[Any]] = []
        self.last = []
        for k in range(self.K):
            H = (
                u.new_zeros((u.shape[0], *self.A.shape[1:])) if initial is None
                else (_size(initial) if self.is_complex else initial.abs())[:, k]
            )  # fmt: skip
            M, trail = torch.zeros_like(H), []
            for p in self.path[k]:
                if resets is not None:
                    fresh = resets[:, p].view(-1, 1, 1)
                    H, M = H.masked_fill(fresh, 0), M.masked_fill(fresh, 0)
                before, (a, a_error) = (H, M), self.decay(k, p)
                x = (self.u[:, p]).unsqueeze(-1) * self.of(self.B, k, p)
                dt, dt_error = self.dt[:, k, p].abs().unsqueeze(-1), self.dt_error[:, k, p].unsqueeze(-1)
                M = a * M + a_error * H + x * (dt_error + 2 * dt)
                H = a * H + x * dt
                M = M + H
                trail.append((before, (H, M)))
                self.y[:, p] += self.twice * (self.of(self.C, k, p) * (M + H)).sum(-1)
            self.last.append(M + H)
            self.trail.append(trail)
            if D is not None:
                self.y += D[k].abs() * self.u

    def decay(self, k: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
        dt, dt_error = self.dt[:, k, p].unsqueeze(-1), self.dt_error[:, k, p].unsqueeze(-1)
        a = torch.exp(dt * self.real[k])
        return a, a * (2 + self.A[k] * (dt_error + dt.abs()))

    def of(self, t: torch.Tensor, k: int, p: int) -> torch.Tensor:
        """B or C at a position, against [B, D, N]."""
        if t.dim() == 3:
            return t[k]
        return t[:, k, :, p].repeat_interleave(self.repeat, dim=1)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.y * self.gate_magnitude, torch.stack(self.last, 1)

    def gradients(self, grad_out: Any, grad_last: Any) -> list[Any]:
        """Of the canonical operands u, delta, A, B, C, D, z, delta_bias, initial."""
        u, _, _, _, _, D, z, bias, initial, _, _ = self.call
        gy = grad_out.abs() * self.gate_magnitude
        du, ddt, dA = torch.zeros_like(self.u), torch.zeros_like(self.raw), torch.zeros_like(self.A)
        dB, dC = torch.zeros_like(self.B), torch.zeros_like(self.C)
        first = []
        for k in range(self.K):
            E = torch.zeros_like(self.last[k])
            if grad_last is not None:
                E = (_size(grad_last) if self.is_complex else grad_last.abs())[:, k]
            ME = E.clone()
            for i in range(self.L - 1, -1, -1):
                p = self.path[k][i]
                (H0, M0), (H, M) = self.trail[k][i]
                a, a_error = self.decay(k, p)
                dt, dt_error = self.dt[:, k, p].abs().unsqueeze(-1), self.dt_error[:, k, p].unsqueeze(-1)
                g, x = self.twice * gy[:, p].unsqueeze(-1), self.u[:, p].unsqueeze(-1)
                b, c = self.of(self.B, k, p), self.of(self.C, k, p)
                E, ME = E + c * g, ME + 3 * c * g
                self.add(dC, k, p, g * (H + M))
                self.add(dB, k, p, x * (ME * dt + E * (dt_error + dt)))
                du[:, p] += (b * (ME * dt + E * (dt_error + dt))).sum(-1)
                q = E * a * H0
                q_error = ME * a * H0 + E * (a_error * H0 + a * M0) + q
                if self.resets is not None:
                    fresh = self.resets[:, p].view(-1, 1, 1)
                    q, q_error, a, a_error = (t.masked_fill(fresh, 0) for t in (q, q_error, a, a_error))
                ddt[:, k, p] += (b * (ME + E) * x + self.A[k] * (q_error + q)).sum(-1)
                dA[k] += (q_error * dt + q * dt_error).sum(0)
                E, ME = E * a, ME * a + E * (a_error + a)
            first.append(ME + E)
        if D is not None:
            du = du + 2 * (gy.unsqueeze(1) * D.abs()[None, :, None]).sum(1)
        ddelta = ddt * self.slope * (2 + (self.raw_magnitude if self.softplus else 0))
        n = 1 + math.sqrt(u.shape[0] * max(self.L, 1)) / 8
        dz = None
        if z is not None:
            s = torch.sigmoid(z)
            dz = 2 * grad_out.abs() * self.y * s * (1 + z.abs() * (1 - s) * 2)
        wide = 1 + math.sqrt(self.repeat) / 8
        return [
            du, ddelta, dA * n, dB * (n if dB.dim() == 3 else wide), dC * (n if dC.dim() == 3 else wide),
            None if D is None else (2 * gy * self.u).sum((0, 1)).expand(self.K, -1) * n, dz,
            None if bias is None else ddelta.sum((0, 2)) * n, None if initial is None else torch.stack(first, 1),
        ]  # fmt: skip

    def add(self, total: torch.Tensor, k: int, p: int, m: torch.Tensor) -> None:
        if total.dim() == 3:
            total[k] += m.sum(0)
        elif total.shape[2]:
            total[:, k, :, p] += m.unflatten(1, (total.shape[2], self.repeat)).sum(2)


def _size(t: torch.Tensor) -> torch.Tensor:
    return t.square().sum(-1).sqrt()


def _unpack(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, delta_bias: Any = None,
            delta_softplus: bool = False, return_last_state: bool = False, *, initial_state: Any = None,
            layout: str = "bdl", order: Any = None, reverse: bool = False, resets: Any = None,
            ) -> tuple[_Bounds, bool, bool]:  # fmt: skip
    call = page._canonical("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state, layout, order, resets)
    return _Bounds(call, delta_softplus, reverse), layout == "bdl", return_last_state


def _bound(dtype: torch.dtype, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    bounds, first, both = _unpack(*args, **kwargs)
    out, last = bounds.outputs()
    out = out.transpose(1, 2) if first else out
    return (out, last[:, 0]) if both else (out,)


def _grad_bound(dtype: torch.dtype, grads: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    bounds, first, _ = _unpack(*args, **kwargs)
    g_last = None
    if len(grads) > 1:
        g_last = (torch.view_as_real(grads[1]) if bounds.is_complex else grads[1]).unsqueeze(1)
    found = bounds.gradients(grads[0].transpose(1, 2) if first else grads[0], g_last)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = found

    def whole(t: Any) -> Any:
        return t.transpose(1, 2) if first and t is not None else t

    def projection(m: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 2:
            return m[0]
        groups = t.shape[1 if first else 2] if t.dim() == 4 else 1
        m = m[:, 0].unflatten(1, (groups, -1)).sum(2)  # [B, G, L, N]
        m = m.transpose(2, 3) if first else m.transpose(1, 2)
        return (m.repeat_interleave(2, -1) if bounds.is_complex else m).reshape(t.shape)

    return {
        "u": whole(du), "delta": whole(ddelta[:, 0]), "A": dA[0], "B": projection(dB, args[3]),
        "C": projection(dC, args[4]), "D": None if dD is None else dD[0], "z": whole(dz),
        "delta_bias": None if dbias is None else dbias[0],
        "initial_state": None if dinitial is None else dinitial[:, 0],
    }  # fmt: skip


def _growth(u: Any, delta: Any, A: Any, *_: Any, **__: Any) -> float:
    return 4.0 + math.sqrt(A.shape[-1])


def _unpack_multi(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, *, orders: Any, layout: str = "bld",
                  delta_bias: Any = None, delta_softplus: bool = False) -> tuple[_Bounds, bool]:  # fmt: skip
    call = page._canonical_multi("selective_scan_multi", u, delta, A, B, C, D, delta_bias, orders, layout)
    return _Bounds(call, delta_softplus, False), layout == "bdl"


def _bound_multi(dtype: torch.dtype, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    bounds, first = _unpack_multi(*args, **kwargs)
    out = bounds.outputs()[0]
    return (out.transpose(1, 2) if first else out,)


def _grad_bound_multi(dtype: torch.dtype, grads: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    bounds, first = _unpack_multi(*args, **kwargs)
    du, ddelta, dA, dB, dC, dD, _, dbias, _ = bounds.gradients(grads[0].transpose(1, 2) if first else grads[0], None)

    def shared(m: Any, t: Any, dims: int) -> Any:
        """Summed over the directions where one tensor serves all."""
        return m if m is None or t is None or t.dim() == dims else m.sum(0) * 2

    delta = ddelta  # [B, K, L, D]
    if args[1].dim() == 3:
        delta = delta.sum(1) * 2
        delta = delta.transpose(1, 2) if first else delta
    else:
        delta = delta.transpose(2, 3) if first else delta.transpose(1, 2)
    return {
        "u": du.transpose(1, 2) if first else du, "delta": delta, "A": shared(dA, args[2], 3),
        "B": dB[:, :, 0].transpose(2, 3) if first else dB[:, :, 0].transpose(1, 2),
        "C": dC[:, :, 0].transpose(2, 3) if first else dC[:, :, 0].transpose(1, 2),
        "D": shared(dD, kwargs.get("D"), 2), "delta_bias": shared(dbias, kwargs.get("delta_bias"), 2),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- bad calls


def _replace(index: int, change: Callable[[Any], Any]) -> Callable[..., reg.Call]:
    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> reg.Call:
        return tuple(change(a) if i == index else a for i, a in enumerate(args)), kwargs

    return make


def _option(**changes: Any) -> Callable[..., reg.Call]:
    return lambda args, kwargs: (args, {**kwargs, **changes})


def _longer(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[..., :1]], dim=-1)


def _twice_zero(L: int) -> torch.Tensor:
    order = torch.arange(L)
    order[-1] = 0
    return order


def _bad(whole: int) -> list[Any]:
    """Common to both: whole tensors by their dimensions."""
    return [
        ("u of two dimensions", _replace(0, lambda t: t[0]), ValueError,
         ("u: ", "[B, L, D]" if whole else "(B, D, L)")),
        ("u is a list", _replace(0, lambda t: [1.0]), TypeError, ("u: ", "Tensor", "list")),
        ("u of an integer type", _replace(0, lambda t: t.long()), TypeError, ("u: ", "int64")),
        ("delta of another shape", _replace(1, _longer), ValueError, ("delta: ",)),
        ("delta on another device", _replace(1, lambda t: t.to("meta")), ValueError, ("delta: ", "meta")),
        ("A is None", _replace(2, lambda t: None), TypeError, ("A: ", "Tensor", "NoneType")),
        ("A of other channels", _replace(2, lambda t: t[..., 1:, :]), ValueError, ("A: ", "D")),
        ("B of other states", _replace(3, lambda t: _longer(t.transpose(-1, -2)).transpose(-1, -2)), ValueError,
         ("B: ",)),
        ("C of another length", _replace(4, _longer), ValueError, ("C: ",)),
        ("C is a number", _replace(4, lambda t: 1.0), TypeError, ("C: ", "float")),
        ("D of another width", _option(D=torch.ones(7)), ValueError, ("D: ", "(7,)")),
        ("delta_bias of an integer type", lambda a, k: (a, {**k, "delta_bias": torch.ones(4).long()}), TypeError,
         ("delta_bias: ", "int64")),
        ("unknown layout", _option(layout="dbl"), ValueError, ("layout: ", "'dbl'")),
    ]  # fmt: skip


_BAD_SINGLE = [
    *_bad(0),
    ("groups that do not divide D", _replace(3, lambda t: t.unsqueeze(1).expand(-1, 5, -1, -1)), ValueError,
     ("B: ", "divisor")),
    ("no groups", _replace(3, lambda t: t.unsqueeze(1)[:, :0]), ValueError, ("B: ", "divisor")),
    ("complex B without complex A", _replace(3, lambda t: t.to(torch.complex64)), TypeError, ("B: ", "complex64")),
    ("real B of a complex A", lambda a, k: ((a[0], a[1], a[2].to(torch.complex64), *a[3:]), k), ValueError,
     ("B: ", "alternating")),
    ("z of another shape", lambda a, k: (a, {**k, "z": a[0][:, :, 1:]}), ValueError, ("z: ", "shape of u")),
    ("initial_state of another shape", lambda a, k: (a, {**k, "initial_state": a[2]}), ValueError,
     ("initial_state: ", "(B, D, N)")),
    ("order of floats", lambda a, k: (a, {**k, "order": torch.arange(a[0].shape[2]).float()}), TypeError,
     ("order: ", "float32")),
    ("order too short", lambda a, k: (a, {**k, "order": torch.arange(a[0].shape[2] - 1)}), ValueError, ("order: ",)),
    ("order below zero", lambda a, k: (a, {**k, "order": torch.arange(a[0].shape[2]) - 1}), ValueError,
     ("order: ", "permutation", "-1")),
    ("order beyond the end", lambda a, k: (a, {**k, "order": torch.arange(a[0].shape[2]) + 1}), ValueError,
     ("order: ", "permutation")),
    ("order that repeats", lambda a, k: (a, {**k, "order": _twice_zero(a[0].shape[2])}), ValueError,
     ("order: ", "permutation", "0 more than once")),
    ("order is a list", _option(order=[0, 1]), TypeError, ("order: ", "list")),
    ("resets of floats", lambda a, k: (a, {**k, "resets": torch.zeros(a[0].shape[2])}), TypeError,
     ("resets: ", "float32")),
    ("resets of another shape", _option(resets=torch.zeros(3, dtype=torch.bool)), ValueError, ("resets: ", "(3,)")),
]  # fmt: skip

_BAD_MULTI = [
    *_bad(1),
    ("orders is None", _option(orders=None), TypeError, ("orders: ", "NoneType")),
    ("orders of one dimension", lambda a, k: (a, {**k, "orders": k["orders"][0]}), ValueError, ("orders: ", "[K, L]")),
    ("no direction", lambda a, k: (a, {**k, "orders": k["orders"][:0]}), ValueError, ("orders: ", "K >= 1")),
    ("an order that repeats",
     lambda a, k: (a, {**k, "orders": torch.stack([k["orders"][0], *[_twice_zero(a[0].shape[1])] * 3])}), ValueError,
     ("orders: ", "permutation", "0 more than once")),
]  # fmt: skip

# -------------------------------------------------------------------------------------------------- benchmark shapes


def _mamba(B: int, D: int, L: int, N: int, layout: str, full: bool) -> Callable[..., reg.Call]:
    """As in a Mamba layer: A = -(1 .. N), steps of 0.001 to 0.1 after softplus and bias; `full`: with D, z and bias."""

    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        first = layout == "bdl"
        u, delta, z = (dense((B, D, L) if first else (B, L, D), dtype, device, i) for i in range(3))
        Bm, C = (dense((B, N, L) if first else (B, L, N), dtype, device, i) for i in (3, 4))
        A = -torch.arange(1.0, N + 1, device=device).repeat(D, 1)
        kwargs: dict[str, Any] = {"layout": layout}
        if not full:
            return (u, (delta.float().abs() * 0.05).to(dtype), A, Bm, C), kwargs
        generator = torch.Generator().manual_seed(5)
        steps = torch.exp(torch.rand(D, generator=generator) * math.log(100.0) + math.log(0.001)).to(device)
        kwargs.update(D=torch.ones(D, device=device), z=z, delta_bias=steps.expm1().log(), delta_softplus=True)
        return (u, delta, A, Bm, C), kwargs

    return make


_SHAPES = {
    "[2,64,48,16]": _mamba(2, 64, 48, 16, "bdl", True),
    "[2,768,1024,16]": _mamba(2, 768, 1024, 16, "bdl", False),
    "[2,768,1024,16] layer": _mamba(2, 768, 1024, 16, "bdl", True),
    "[2,768,1024,16] layer, channels last": _mamba(2, 768, 1024, 16, "bld", True),
}


def _cross(B: int, side: int, D: int, N: int) -> Callable[..., reg.Call]:
    """The four scans of VMamba over a square of side x side: rows, columns, and both reversed."""

    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        L, K = side * side, 4
        rows = torch.arange(L)
        columns = rows.view(side, side).t().reshape(-1)
        orders = torch.stack([rows, columns, rows.flip(0), columns.flip(0)]).to(device)
        u, delta = dense((B, L, D), dtype, device), dense((B, L, K, D), dtype, device, 1) - 3
        Bm, C = (dense((B, L, K, N), dtype, device, i) for i in (2, 3))
        A = -torch.arange(1.0, N + 1, device=device).repeat(K, D, 1)
        return (u, delta, A, Bm, C), {"orders": orders, "delta_softplus": True, "D": torch.ones(K, D, device=device)}

    return make


_SHAPES_MULTI = {"[2,6x6,48,16]": _cross(2, 6, 48, 16), "[2,32x32,192,16]": _cross(2, 32, 192, 16)}


def _empty(**sizes: int) -> Callable[..., reg.Call]:
    """A call with some sizes zero."""
    n = {"B": 2, "D": 5, "L": 6, "N": 3, **sizes}

    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        B, D, L, N = n["B"], n["D"], n["L"], n["N"]
        whole = [dense((B, D, L), dtype, device, i) for i in range(2)]
        pair = [dense((B, N, L), dtype, device, i) for i in range(2)]
        state = dense((B, D, N), dtype, device)
        kwargs = {"D": dense((D,), dtype, device), "initial_state": state, "return_last_state": True}
        return (*whole, -dense((D, N), dtype, device).abs(), *pair), kwargs

    return make


def _empty_multi(**sizes: int) -> Callable[..., reg.Call]:
    n = {"B": 2, "D": 5, "L": 6, "N": 3, **sizes}

    def make(dtype: torch.dtype, device: torch.device) -> reg.Call:
        B, D, L, N = n["B"], n["D"], n["L"], n["N"]
        pair = [dense((B, L, 2, N), dtype, device, i) for i in range(2)]
        orders = torch.arange(L, device=device).repeat(2, 1)
        A = -dense((2, D, N), dtype, device).abs()
        return (dense((B, L, D), dtype, device), dense((B, L, 2, D), dtype, device), A, *pair), {"orders": orders}

    return make


def _ops(u: Any, delta: Any, A: Any, *_: Any, orders: Any = (None,), **__: Any) -> int:
    """Per direction, step and state: t A, exp, times h, (t u) B, two additions, times C."""
    return int(7 * u.numel() * A.shape[-1] * len(orders))


def _lower(*args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state")
    k = {**dict(zip(names, args, strict=False)), **kwargs}
    layout = k.get("layout", "bdl")
    call = page._canonical(
        "selective_scan", k["u"], k["delta"], k["A"], k["B"], k["C"], k.get("D"), k.get("z"), k.get("delta_bias"),
        k.get("initial_state"), layout, k.get("order"), k.get("resets"),
    )  # fmt: skip
    options = (bool(k.get("delta_softplus")), bool(k.get("reverse")), layout == "bdl", False)
    return torch.ops.fastdiff.selective_scan.default, (*call, *options)


def _lower_multi(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, *, orders: Any, layout: str = "bld",
                 delta_bias: Any = None, delta_softplus: bool = False) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
    call = page._canonical_multi("selective_scan_multi", u, delta, A, B, C, D, delta_bias, orders, layout)
    return torch.ops.fastdiff.selective_scan.default, (*call, delta_softplus, False, layout == "bdl", False)


# ------------------------------------------------------------------------------------------------------------- peers


def _prepared(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, delta_bias: Any = None,
              delta_softplus: bool = False, *, layout: str = "bdl") -> tuple[Any, ...]:  # fmt: skip
    """u, delta, A, B, C, D, z channels last, in float32, with delta's bias and softplus applied. Real A, one group."""
    if layout == "bdl":
        u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
        z = None if z is None else z.transpose(1, 2)
    dt = delta.float() if delta_bias is None else delta.float() + delta_bias.float()
    dt = F.softplus(dt) if delta_softplus else dt
    return u.float(), dt, A.float(), B.float(), C.float(), D, z


def _closed(y: torch.Tensor, u: torch.Tensor, D: Any, z: Any, layout: str, dtype: torch.dtype) -> torch.Tensor:
    y = y if D is None else y + D.float() * u
    y = y if z is None else y * F.silu(z.float())
    return (y.transpose(1, 2) if layout == "bdl" else y).to(dtype)


def _chunked(*args: Any, layout: str = "bdl", **kwargs: Any) -> torch.Tensor:
    """What `torch.compile` does best with on a CPU, of what was tried: steps one after the other within chunks of up to
    16, all chunks at once, then the states carried from chunk to chunk. Inductor fuses the steps of a chunk. Measured
    at (2, 768, 1024, 16), two threads, in one run: 117 ms, 32 steps a chunk 130 ms, `associative_scan` 551 ms."""
    u, dt, A, B, C, D, z = _prepared(*args, layout=layout, **kwargs)
    batch, L, channels = u.shape
    T = max(t for t in range(1, 17) if L % t == 0)
    x, dt = ((t.reshape(batch, L // T, T, channels, 1)) for t in (dt * u, dt))
    B, C = (t.reshape(batch, L // T, T, 1, -1) for t in (B, C))
    h, p = x[:, :, 0] * B[:, :, 0], torch.exp(dt[:, :, 0] * A)
    states, decays = [h], [p]
    for t in range(1, T):
        a = torch.exp(dt[:, :, t] * A)
        h, p = a * h + x[:, :, t] * B[:, :, t], a * p
        states.append(h)
        decays.append(p)
    carry, carries = torch.zeros_like(h[:, 0]), []
    for s in range(L // T):
        carries.append(carry)
        carry = p[:, s] * carry + h[:, s]
    before = torch.stack(carries, 1)
    y = torch.stack([((states[t] + decays[t] * before) * C[:, :, t]).sum(-1) for t in range(T)], 2)
    return _closed(y.reshape(batch, L, channels), u, D, z, layout, args[0].dtype)


def _associative(*args: Any, layout: str = "bdl", **kwargs: Any) -> torch.Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    u, dt, A, B, C, D, z = _prepared(*args, layout=layout, **kwargs)

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    pairs = (torch.exp(dt.unsqueeze(-1) * A), (dt * u).unsqueeze(-1) * B.unsqueeze(2))
    _, h = associative_scan(combine, pairs, dim=1, combine_mode="generic")
    return _closed((h * C.unsqueeze(2)).sum(-1), u, D, z, layout, args[0].dtype)


def _chunked_multi(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, *, orders: Any,
                   delta_softplus: bool = False) -> torch.Tensor:  # fmt: skip
    """Copies of everything in the order of every direction, one chunked scan of them all, and the copies merged."""
    total = torch.zeros_like(u, dtype=torch.float32)
    for k in range(orders.shape[0]):
        x, dt, b, c = (t.index_select(1, orders[k]) for t in (u, delta[:, :, k], B[:, :, k], C[:, :, k]))
        y = _chunked(
            x.float(), dt, A[k], b, c, None if D is None else D[k], delta_softplus=delta_softplus, layout="bld"
        )
        total = total + y.index_select(1, torch.argsort(orders[k]))
    return total.to(u.dtype)


def _peer_sequential(*args: Any, layout: str = "bdl", **kwargs: Any) -> Callable[[], Any]:
    """The loop that Mamba packages fall back to: decays and inputs of all steps as whole [B, D, L, N] tensors first,
    then one step after the other. (The reference here forms each step's when it is due, which is several times faster.)
    """

    def run() -> torch.Tensor:
        u, dt, A, B, C, D, z = _prepared(*args, layout=layout, **kwargs)
        decay = torch.exp(torch.einsum("bld,dn->bdln", dt, A))
        entering = torch.einsum("bld,bln,bld->bdln", dt, B, u)
        h, found = torch.zeros_like(decay[:, :, 0]), []
        for t in range(u.shape[1]):
            h = decay[:, :, t] * h + entering[:, :, t]
            found.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
        return _closed(torch.stack(found, 1), u, D, z, layout, args[0].dtype)

    return run


_compiled_associative: list[Any] = []


def _peer_associative(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    """PyTorch's `associative_scan` under `torch.compile`, over decays and inputs expanded to [B, L, D, N]."""
    if not _compiled_associative:
        _compiled_associative.append(torch.compile(_associative, fullgraph=True, dynamic=False))
    return lambda: _compiled_associative[0](*args, **kwargs)


def _peer_transformers(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    """The recurrence of transformers' MambaMixer where mamba_ssm is not installed; a function of its own there."""
    from transformers.models.mamba import modeling_mamba

    scan = getattr(modeling_mamba, "mamba_selective_scan", None)
    if scan is None:
        raise ImportError("this transformers has no mamba_selective_scan")
    layout = kwargs.pop("layout", "bdl")
    if layout != "bdl":
        raise ValueError('layout "bdl" only')
    u, delta, A, B, C = args
    options = [kwargs.get(name) for name in ("D", "z", "delta_bias")]
    return lambda: scan(u, delta, A, B, C, *options, kwargs.get("delta_softplus", False))


def _peer_vmamba(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, *, orders: Any, **options: Any) -> Any:
    """K calls of our own single scan over copies in the order of each direction, merged: what VMamba's code does."""
    inverse = [torch.argsort(o) for o in orders]
    if delta.dim() != 4 or A.dim() != 3:
        raise ValueError("a delta and an A per direction")

    def run() -> torch.Tensor:
        total = None
        for k, (o, back) in enumerate(zip(orders, inverse, strict=True)):
            x, dt, b, c = (t.index_select(1, o) for t in (u, delta[:, :, k], B[:, :, k], C[:, :, k]))
            skip, softplus = None if D is None else D[k], options.get("delta_softplus", False)
            y = page.selective_scan(x, dt, A[k], b, c, skip, layout="bld", delta_softplus=softplus)
            y = y.index_select(1, back)
            total = y if total is None else total + y
        assert total is not None
        return total

    return run


reg.add(
    reg.OpSpec(
        name="selective_scan",
        function=page.selective_scan,
        reference=page.selective_scan_reference,
        example=_example,
        lower=_lower,
        bound=_bound,
        grad_bound=_grad_bound,
        differentiable=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"),
        growth=_growth,
        limits=lambda u, delta, A, *_: page.limits(A),
        bad=_BAD_SINGLE,
        bytes=lambda u, delta, A, B, C, **k: 2 * nbytes(u) + nbytes(delta, A, B, C, k.get("z")),
        flops=_ops,
        shapes=_SHAPES,
        scaling={
            "length L, 768 channels, 16 states": (
                1.0,
                {n: _mamba(1, 768, n, 16, "bld", False) for n in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)},
            ),
            "states N, 768 channels, length 1024": (
                1.0,
                {n: _mamba(1, 768, 1024, n, "bld", False) for n in (4, 8, 16, 32, 64, 128)},
            ),
        },
        take=_take,
        large="[2,768,1024,16] layer",
        empty=[_empty(B=0), _empty(D=0), _empty(L=0), _empty(N=0), _empty(L=0, N=0)],
        exact_infinity=False,
        compiled=_chunked,
        peers={
            "sequential": _peer_sequential,
            "transformers": _peer_transformers,
            "associative_scan": _peer_associative,
        },
    )
)

reg.add(
    reg.OpSpec(
        name="selective_scan_multi",
        function=page.selective_scan_multi,
        reference=page.selective_scan_multi_reference,
        example=_example_multi,
        lower=_lower_multi,
        bound=_bound_multi,
        grad_bound=_grad_bound_multi,
        differentiable=("u", "delta", "A", "B", "C", "D", "delta_bias"),
        growth=_growth,
        limits=lambda u, delta, A, *_: page.limits(A),
        bad=_BAD_MULTI,
        bytes=lambda u, delta, A, B, C, **k: 2 * nbytes(u) + nbytes(delta, A, B, C),
        flops=_ops,
        shapes=_SHAPES_MULTI,
        take=_take_multi,
        large="[2,32x32,192,16]",
        overhead=_empty_multi(),
        empty=[_empty_multi(B=0), _empty_multi(D=0), _empty_multi(L=0), _empty_multi(N=0)],
        exact_infinity=False,
        compiled=_chunked_multi,
        peers={"copies + scans": _peer_vmamba},
    )
)
