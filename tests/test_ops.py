"""The laws that every operator obeys, generated from its `OpSpec`.

FASTDIFF_TEST_DEVICE=cuda runs the same laws on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdiff
from fastdiff import _native
from fastdiff.ops import SPECS, OpSpec
from fastdiff.ops import _registry as reg

DEVICE = torch.device(os.environ.get("FASTDIFF_TEST_DEVICE", "cpu"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ISAS = _native.isas() if DEVICE.type == "cpu" else ["gpu"]

pytestmark = pytest.mark.skipif(_native.extension is None, reason="no native extension: only the reference exists")
# An operator without a CUDA kernel is the reference itself on a GPU.
TESTED = {name: spec for name, spec in SPECS.items() if spec.cuda or DEVICE.type == "cpu"}
WITH_OUT = {name: spec for name, spec in TESTED.items() if spec.has_out}
every_op = pytest.mark.parametrize("spec", TESTED.values(), ids=TESTED)
every_op_with_out = pytest.mark.parametrize("spec", WITH_OUT.values(), ids=WITH_OUT)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_isa = pytest.mark.parametrize("isa", ISAS)
rngs = st.randoms(use_true_random=False)


@contextlib.contextmanager
def native(isa: str | None = None) -> Iterator[None]:
    """Only the native kernels will do, on this instruction set."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastdiff.use_backend("native"))
        if isa not in (None, "gpu"):
            stack.enter_context(_native.use_isa(str(isa)))
        yield


def outputs(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


double = reg.widen


def arguments(spec: OpSpec, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    """The differentiable tensors of a call by name: positional in the order of the signature, lists by index."""
    import inspect

    bound = inspect.signature(spec.function).bind(*args, **kwargs).arguments
    named = {}
    for name, value in bound.items():
        if isinstance(value, (list, tuple)):
            named.update({f"{name}[{i}]": v for i, v in enumerate(value)})
        else:
            named[name] = value
    return {n: named[n] for n in spec.differentiable if isinstance(named.get(n), torch.Tensor)}


def with_grad(args: Any, kwargs: Any, wanted: dict[str, torch.Tensor]) -> Any:
    """The same call with every wanted tensor requiring a gradient (layouts kept)."""
    ids = {id(t) for t in wanted.values()}
    return reg.map_tensors(lambda t: t.detach().requires_grad_() if id(t) in ids else t, (args, kwargs))


def upstream(results: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(r.shape, generator=g).to(r.device, r.dtype) for r in results]


def assert_within(spec: OpSpec, what: str, got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor,
                  growth: float) -> None:  # fmt: skip
    limit = reg.tolerance(want, magnitude, growth, got.dtype)
    error = (double(got) - want).abs()
    finite = want.abs() < torch.finfo(got.dtype).max  # float64 does not overflow where the type does
    assert torch.isfinite(got[finite]).all(), f"{spec.name}: {what} is not finite where the reference is"
    worst = ((error - limit)[finite]).max() if finite.any() else torch.tensor(0.0)
    assert worst <= 0, f"{spec.name}: {what} is off by {(error / limit)[finite].max():.2f} tolerances"


@every_isa
@every_dtype
@every_op
@given(rng=rngs)
def test_equals_the_float64_reference(spec: OpSpec, dtype: torch.dtype, isa: str, rng: random.Random) -> None:
    args, kwargs = spec.example(rng, dtype, DEVICE)
    with native(isa):
        got = outputs(spec.function(*args, **kwargs))
    args64, kwargs64 = double((args, kwargs))
    want = outputs(spec.reference(*args64, **kwargs64))
    bounds = spec.bound(dtype, *args64, **kwargs64)
    dtypes = [t.dtype for t in outputs(spec.reference(*args, **kwargs))]
    assert dtypes[0] == dtype
    for i, (g, w, b, kind) in enumerate(zip(got, want, bounds, dtypes, strict=True)):
        assert g.shape == w.shape
        assert g.dtype == kind
        assert_within(spec, f"output {i}", g, w, b, spec.growth(*args64, **kwargs64))


@every_isa
@every_dtype
@every_op
@given(rng=rngs)
def test_gradients_equal_those_of_the_float64_reference(
    spec: OpSpec, dtype: torch.dtype, isa: str, rng: random.Random
) -> None:
    args, kwargs = spec.example(rng, dtype, DEVICE)
    args, kwargs = with_grad(args, kwargs, arguments(spec, args, kwargs))
    wanted = arguments(spec, args, kwargs)
    with native(isa):
        results = outputs(spec.function(*args, **kwargs))
        ups = upstream(results, rng.getrandbits(31))
        got = torch.autograd.grad(results, list(wanted.values()), ups, allow_unused=True)
    args64, kwargs64 = double((args, kwargs))
    args64, kwargs64 = with_grad(args64, kwargs64, arguments(spec, args64, kwargs64))
    leaves = arguments(spec, args64, kwargs64)
    ups64 = double(ups)
    want = torch.autograd.grad(
        outputs(spec.reference(*args64, **kwargs64)), list(leaves.values()), ups64, allow_unused=True
    )
    args64, kwargs64 = double((args, kwargs))
    bounds = spec.grad_bound(dtype, ups64, *args64, **kwargs64)
    for name, g, w in zip(wanted, got, want, strict=True):
        if w is None:
            assert g is None or not g.any(), f"{spec.name}: a gradient of {name} where there is none"
            continue
        assert g is not None, f"{spec.name}: no gradient of {name}"
        assert g.shape == w.shape
        assert_within(spec, f"gradient of {name}", g, w, bounds[name], spec.growth(*args64, **kwargs64))


@every_dtype
@every_op
@given(rng=rngs)
def test_strided_views_equal_contiguous_tensors(spec: OpSpec, dtype: torch.dtype, rng: random.Random) -> None:
    args, kwargs = spec.example(rng, dtype, DEVICE)
    args_c, kwargs_c = reg.map_tensors(lambda t: t.contiguous(), (args, kwargs))
    with native():
        strided, plain = outputs(spec.function(*args, **kwargs)), outputs(spec.function(*args_c, **kwargs_c))
    if DEVICE.type == "cpu" and not (spec.products and dtype is not torch.float32):
        for a, b in zip(strided, plain, strict=True):
            assert torch.equal(a, b)
        return
    # A GPU reads rows without 16-byte alignment one element at a time, and sums them in another order. Products of 16
    # bits are torch's, in an order that may follow the layout on a CPU that has units for them.
    args64, kwargs64 = double((args, kwargs))
    bounds = spec.bound(dtype, *args64, **kwargs64)
    for a, b, bound in zip(strided, plain, bounds, strict=True):
        assert_within(spec, "the strided call", a, double(b), bound, spec.growth(*args64, **kwargs64))


@every_isa
@every_dtype
@every_op
@given(rng=rngs)
def test_a_sample_does_not_depend_on_its_batch(spec: OpSpec, dtype: torch.dtype, isa: str, rng: random.Random) -> None:
    if spec.products:
        pytest.skip("matrix products of another library")
    args, kwargs = spec.example(rng, dtype, DEVICE)
    x = reg.tensors_in(args)[0] if not isinstance(args[0], list) else args[1][0]
    batch = x.shape[0]

    def run(call: Any) -> list[torch.Tensor]:
        wanted = arguments(spec, *call)
        call = with_grad(*call, wanted)
        wanted = arguments(spec, *call)
        first = next(iter(wanted.values()))
        results = outputs(spec.function(*call[0], **call[1]))
        ups = [torch.ones_like(r) for r in results]
        return [*results, torch.autograd.grad(results, [first], ups)[0]]

    with native(isa):
        whole = run((args, kwargs))
        for b in range(batch):
            alone = run(spec.take(b, args, kwargs))
            for w, a in zip(whole, alone, strict=True):
                assert torch.equal(w[b : b + 1], a)


@every_dtype
@every_op
def test_same_bits_on_every_run_and_any_number_of_threads(spec: OpSpec, dtype: torch.dtype) -> None:
    if spec.products:
        pytest.skip("matrix products of another library")
    args, kwargs = spec.shapes[spec.large](dtype, DEVICE)
    args, kwargs = with_grad(args, kwargs, arguments(spec, args, kwargs))
    leaves = list(arguments(spec, args, kwargs).values())

    def run() -> list[torch.Tensor]:
        results = outputs(spec.function(*args, **kwargs))
        return [*results, *torch.autograd.grad(results, leaves, upstream(results, 0))]

    threads = torch.get_num_threads()
    with native():
        try:
            torch.set_num_threads(1)
            first = run()
            for n in (2, 3, 2):
                torch.set_num_threads(n)
                for a, b in zip(first, run(), strict=True):
                    assert torch.equal(a, b), f"{spec.name} with {n} threads"
        finally:
            torch.set_num_threads(threads)


@every_isa
@pytest.mark.parametrize("name", [n for n in ("adaln_modulate", "gate_residual", "gate_residual_adaln", "linear_update",
                                              "euler_step", "ddim_step") if n in TESTED])  # fmt: skip
def test_a_large_output_has_the_bits_of_a_small_one(name: str, isa: str) -> None:
    """Large float32 outputs are written around the caches on the CPU, which must not show."""
    spec = SPECS[name]
    if "[8,256,1152]" in spec.shapes:
        args, kwargs = spec.shapes["[8,256,1152]"](torch.float32, DEVICE)
    else:
        args, kwargs = spec.shapes["(8,4,128,128)"](torch.float32, DEVICE)
        args, kwargs = reg.map_tensors(lambda t: t.repeat(1, 1, 2, 2), (args, kwargs))
    with native(isa):
        whole = outputs(spec.function(*args, **kwargs))
        assert whole[0].numel() * 4 > 4 << 20
        one_args, one_kwargs = spec.take(3, args, kwargs)
        for w, a in zip(whole, outputs(spec.function(*one_args, **one_kwargs)), strict=True):
            assert torch.equal(w[3:4], a)


@every_op
@given(rng=rngs)
def test_the_reference_passes_gradcheck(spec: OpSpec, rng: random.Random) -> None:
    args, kwargs = spec.example(rng, torch.float64, torch.device("cpu"))
    while sum(t.numel() for t in reg.tensors_in((args, kwargs))) > 400:
        args, kwargs = spec.example(random.Random(rng.getrandbits(31)), torch.float64, torch.device("cpu"))
    kwargs = {k: 10.0 if k == "clip_sample" else v for k, v in kwargs.items()}  # no kinks within a difference step
    call = double((args, kwargs))
    wanted = arguments(spec, *call)
    names = list(wanted)
    ids = [id(t) for t in wanted.values()]

    def f(*leaves: torch.Tensor) -> Any:
        table = dict(zip(ids, leaves, strict=True))
        a, k = reg.map_tensors(lambda t: table.get(id(t), t), call)
        return spec.reference(*a, **k)

    leaves = [t.detach().clone().requires_grad_() for t in wanted.values()]
    assert names
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True, check_forward_ad=True, atol=1e-4, rtol=1e-3)


@every_dtype
@every_op
def test_opcheck(spec: OpSpec, dtype: torch.dtype) -> None:
    if spec.lower is None:
        pytest.skip("made of other operators")
    for seed in range(3):
        args, kwargs = spec.example(random.Random(seed), dtype, DEVICE)
        if spec.name == "linear_update":  # the operator itself takes up to eight terms
            args = (args[0][:8], args[1][:8])
        overload, lowered = spec.lower(*args, **kwargs)
        torch.library.opcheck(overload, lowered)


@pytest.mark.parametrize("name", ["adaln_modulate_stats", "gate_residual_adaln_stats", "adaln_modulate_out",
                                  "gate_residual_out", "gate_residual_adaln_out", "adaln_backward", "update_out",
                                  "update_backward"])  # fmt: skip
def test_opcheck_of_the_operators_behind(name: str) -> None:
    x, b, s = torch.randn(2, 17, 24), torch.randn(2, 17, 24), torch.randn(2, 24)
    norm = (x, s, s.clone(), None, None, False, 1e-6)
    fused = (x, b, s, s.clone(), s.clone(), False, 1e-6)
    stats = (torch.zeros(2, 17), torch.ones(2, 17))
    linear = ([0.5, 2.0], [None, torch.rand(2)], -1, 0.0, 1.0, False, False, -1.0, None)
    calls: dict[str, tuple[Any, ...]] = {
        "adaln_modulate_stats": norm,
        "gate_residual_adaln_stats": fused,
        "adaln_modulate_out": (*norm, torch.empty_like(x)),
        "gate_residual_out": (x, b, s, torch.empty_like(x)),
        "gate_residual_adaln_out": (*fused, torch.empty_like(x), torch.empty_like(x)),
        "adaln_backward": (x, b, x, b, s, s, s, None, None, *stats, False, [bool(i) for i in (1, 0, 1, 1, 1, 0, 0)]),
        "update_out": ([x, b], *linear, None, None, torch.empty_like(x)),
        "update_backward": (x, [], *linear, [0, 2]),
    }
    call = reg.map_tensors(lambda t: t.to(DEVICE), calls[name])
    torch.library.opcheck(getattr(torch.ops.fastdiff, name).default, call)


@every_op
def test_compiled_whole_equals_eager(spec: OpSpec) -> None:
    for seed, dtype in ((1, torch.float32), (5, torch.bfloat16)):
        torch.compiler.reset()
        args, kwargs = spec.example(random.Random(seed), dtype, DEVICE)
        args, kwargs = with_grad(args, kwargs, arguments(spec, args, kwargs))
        leaves = list(arguments(spec, args, kwargs).values())
        compiled = torch.compile(spec.function, fullgraph=True)
        results = []
        with native():
            for f in (spec.function, compiled):
                out = outputs(f(*args, **kwargs))
                grads = torch.autograd.grad(out, leaves, upstream(out, 0))
                with torch.no_grad():
                    results.append([*out, *grads, *outputs(f(*args, **kwargs))])
        for a, b in zip(*results, strict=True):
            assert_compiled(spec, a, b)


def assert_compiled(spec: OpSpec, eager: torch.Tensor, compiled: torch.Tensor) -> None:
    """The same bits, unless there are products, which the compiler may take from another library."""
    if spec.products:
        limit = 16 * torch.finfo(eager.dtype).eps * eager.abs().max().item()
        torch.testing.assert_close(eager, compiled, rtol=0, atol=limit)
    else:
        assert torch.equal(eager, compiled)


@every_op_with_out
def test_compiled_with_out_writes_it(spec: OpSpec) -> None:
    args, kwargs = spec.example(random.Random(2), torch.float32, DEVICE)
    want = outputs(spec.function(*args, **kwargs))
    out: Any = [torch.full_like(w, float("nan")) for w in want]
    torch.compile(spec.function, fullgraph=True)(*args, **kwargs, out=out[0] if len(out) == 1 else tuple(out))
    for w, o in zip(want, out, strict=True):
        assert_compiled(spec, w, o)


@every_dtype
@every_op
def test_empty_tensors(spec: OpSpec, dtype: torch.dtype) -> None:
    def cut(t: torch.Tensor, dim: int) -> torch.Tensor:
        return t.narrow(dim, 0, 0) if t.dim() > dim else t

    args, kwargs = spec.shapes[next(iter(spec.shapes))](dtype, DEVICE)
    calls = [make(dtype, DEVICE) for make in spec.empty or ()]
    for dim in () if spec.empty is not None else (0, 1, 2):
        # Cutting a modulation [B, D] along N would cut its D; only tensors with that dimension are cut.
        calls.append(reg.map_tensors(
            lambda t, dim=dim: cut(t, dim) if t.dim() > 2 or dim == 0 else (t if dim == 1 else t[:, :0]),
            (args, kwargs),
        ))  # fmt: skip
    assert calls
    for a, k in calls:
        a, k = with_grad(a, k, arguments(spec, a, k))
        leaves = list(arguments(spec, a, k).values())
        found = []
        for function, backend in ((spec.function, "native"), (spec.reference, "reference")):
            with fastdiff.use_backend(backend):
                results = outputs(function(*a, **k))
                ups = [torch.ones_like(r) for r in results]
                grads = torch.autograd.grad(results, leaves, ups, allow_unused=True, materialize_grads=True)
            found.append([*results, *grads])
        for got, want in zip(*found, strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, equal_nan=True)


@every_op
@given(rng=rngs)
def test_forward_mode_derivative(spec: OpSpec, rng: random.Random) -> None:
    args, kwargs = spec.example(rng, torch.float32, DEVICE)
    args, kwargs = reg.map_tensors(lambda t: t.contiguous(), (args, kwargs))  # a dual tensor cannot be an expanded view
    wanted = arguments(spec, args, kwargs)
    ids = [id(t) for t in wanted.values()]
    primals = tuple(t.detach() for t in wanted.values())
    tangents = tuple(upstream(list(primals), rng.getrandbits(31)))

    def call(function: Any, wide: bool) -> Any:
        def f(*leaves: torch.Tensor) -> Any:
            table = dict(zip(ids, leaves, strict=True))
            a, k = reg.map_tensors(lambda t: table.get(id(t), double(t) if wide else t), (args, kwargs))
            return function(*a, **k)

        return f

    _, got = torch.func.jvp(call(spec.function, False), primals, tangents)
    _, want = torch.func.jvp(call(spec.reference, True), double(primals), double(tangents))
    for g, w in zip(outputs(got), outputs(want), strict=True):
        scale = max(w.abs().max().item(), 1e-3)  # the derivative of a norm with tiny variance is huge
        torch.testing.assert_close(double(g) / scale, w / scale, atol=3e-4, rtol=3e-3)


@every_op
def test_second_derivatives_equal_those_of_the_reference(spec: OpSpec) -> None:
    checked = 0
    for seed in range(30):
        args, kwargs = spec.example(random.Random(seed), torch.float32, DEVICE)
        if "norm" in kwargs and args[0].shape[-1] < 16:
            continue  # normalising a handful of values: their second derivative is a difference of large numbers
        found = []
        for function, call in ((spec.function, (args, kwargs)), (spec.reference, double((args, kwargs)))):
            a, k = with_grad(*call, arguments(spec, *call))
            leaves = list(arguments(spec, a, k).values())
            results = outputs(function(*a, **k))
            first = torch.autograd.grad(sum(r.abs().square().sum() for r in results), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.abs().square().sum() for g in first), leaves, allow_unused=True))
        for g, w in zip(*found, strict=True):
            assert (g is None) == (w is None)
            if w is not None:
                scale = max(w.abs().max().item(), 1e-6)
                torch.testing.assert_close(double(g) / scale, w / scale, atol=1e-3, rtol=1e-3)
        checked += 1
    assert checked >= 8


BAD = [(spec, *bad) for spec in TESTED.values() for bad in spec.bad]


@pytest.mark.parametrize(("spec", "what", "make", "kind", "words"), BAD, ids=[f"{b[0].name}-{b[1]}" for b in BAD])
def test_bad_input_is_named(spec: OpSpec, what: str, make: Any, kind: type[Exception], words: tuple[str, ...]) -> None:
    args, kwargs = make(*spec.shapes[next(iter(spec.shapes))](torch.float32, DEVICE))
    for backend in ("auto", "reference"):
        with fastdiff.use_backend(backend), pytest.raises(kind) as caught:
            spec.function(*args, **kwargs)
        for word in (f"{spec.name}: ", "expected ", "got ", *words):
            assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


@every_dtype
@every_op_with_out
@given(rng=rngs)
def test_out_is_written_and_may_be_the_input(spec: OpSpec, dtype: torch.dtype, rng: random.Random) -> None:
    args, kwargs = spec.example(rng, dtype, DEVICE)
    want = outputs(spec.function(*args, **kwargs))
    # A view into a larger tensor whose surroundings must survive.
    frames = [torch.full([n + 2 for n in w.shape], 7.0, dtype=dtype, device=DEVICE) for w in want]
    outs = []
    for f, w in zip(frames, want, strict=True):
        for d, n in enumerate(w.shape):
            f = f.narrow(d, 1, n)
        outs.append(f)
    with native():
        result = spec.function(*args, **kwargs, out=outs[0] if len(outs) == 1 else tuple(outs))
    for r, o, w, f in zip(outputs(result), outs, want, frames, strict=True):
        assert r.data_ptr() == o.data_ptr()
        assert torch.equal(o, w)
        o.fill_(7.0)
        assert (f == 7.0).all(), "out= wrote outside its tensor"
    if spec.inplace is not None:
        x = args[spec.inplace].clone(memory_format=torch.contiguous_format)
        rest = [x if i == spec.inplace else a for i, a in enumerate(args)]
        with native():
            spec.function(*rest, **kwargs, out=x)
        assert torch.equal(x, want[0])


@every_isa
@every_dtype
@every_op
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_propagate_like_the_reference(
    spec: OpSpec, dtype: torch.dtype, isa: str, value: float
) -> None:
    for seed in range(6):
        args, kwargs = spec.example(random.Random(seed), dtype, DEVICE)
        args, kwargs = reg.map_tensors(lambda t: t.clone(), (args, kwargs))
        victims = list(arguments(spec, args, kwargs).values())
        # An infinity in x only: guidance is one coefficient per term here, u + g (c - u) there, and inf - inf is NaN.
        victim = victims[seed % len(victims)] if value != value else victims[0]
        victim[tuple(n // 2 for n in victim.shape)] = value
        with native(isa):
            got = outputs(spec.function(*args, **kwargs))
        for g, w in zip(got, outputs(spec.reference(*args, **kwargs)), strict=True):
            assert torch.equal(torch.isfinite(g), torch.isfinite(w))
            if value != value or spec.exact_infinity:
                assert torch.equal(torch.isinf(g), torch.isinf(w))


@every_op
def test_float64_runs_on_the_reference_and_native_says_why_not(spec: OpSpec) -> None:
    args, kwargs = double(spec.example(random.Random(0), torch.float32, DEVICE))
    for a, b in zip(outputs(spec.function(*args, **kwargs)), outputs(spec.reference(*args, **kwargs)), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert any("float64" in why for why in fastdiff.explain(spec.name, *args, **kwargs))
    with fastdiff.use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        spec.function(*args, **kwargs)


@every_op
def test_the_profiler_sees_the_operator(spec: OpSpec) -> None:
    args, kwargs = spec.example(random.Random(0), torch.float32, DEVICE)
    # acc_events: torch 2.11 warns about a profile without it.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        spec.function(*args, **kwargs)
    assert any(event.key.startswith("fastdiff::") for event in profile.key_averages())


@every_op
def test_lazily_negated_and_zero_tensors_are_what_they_stand_for(spec: OpSpec) -> None:
    for seed in range(8):
        args, kwargs = spec.example(random.Random(seed), torch.float32, DEVICE)
        for lazy in (torch._neg_view, lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device)):
            victims = list(arguments(spec, args, kwargs).values())
            victim = victims[seed % len(victims)]
            call = reg.map_tensors(lambda t, v=victim, f=lazy: f(t) if t is v else t, (args, kwargs))
            plain = reg.map_tensors(lambda t: t.clone() if t._is_zerotensor() else t.resolve_neg(), call)
            for a, b in zip(outputs(spec.function(*call[0], **call[1])), outputs(spec.function(*plain[0], **plain[1])),
                            strict=True):  # fmt: skip
                assert torch.equal(a, b)


@every_op_with_out
def test_writing_into_a_tensor_that_a_backward_pass_needs_is_noticed(spec: OpSpec) -> None:
    for view in (False, True):  # the fast way in, and the ordinary one
        args, kwargs = spec.example(random.Random(3), torch.float32, DEVICE)
        want = outputs(spec.function(*args, **kwargs))
        outs = [torch.empty([*w.shape[:-1], 2 * w.shape[-1]], device=DEVICE)[..., ::2] if view else torch.empty_like(w)
                for w in want]  # fmt: skip
        for o in outs:
            o.zero_()
            leaf = torch.ones_like(o, requires_grad=True)
            needs_o = (leaf * o).sum()
            with torch.no_grad():
                spec.function(*args, **kwargs, out=outs[0] if len(outs) == 1 else tuple(outs))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                needs_o.backward()


@every_op
def test_a_vectorised_backward_pass(spec: OpSpec) -> None:
    args, kwargs = spec.example(random.Random(1), torch.float32, DEVICE)
    args, kwargs = with_grad(args, kwargs, arguments(spec, args, kwargs))
    leaf = next(iter(arguments(spec, args, kwargs).values()))
    result = outputs(spec.function(*args, **kwargs))[0]
    directions = torch.randn(3, *result.shape, device=DEVICE)
    (got,) = torch.autograd.grad(result, leaf, directions, is_grads_batched=True, retain_graph=True)
    for d, g in zip(directions, got, strict=True):
        (want,) = torch.autograd.grad(result, leaf, d, retain_graph=True)
        torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-4)


def test_compiled_samplers_take_a_new_step_size_every_step() -> None:
    x, v = torch.randn(2, 3, 4, 4, device=DEVICE), torch.randn(2, 3, 4, 4, device=DEVICE)

    def steps(x: torch.Tensor, v: torch.Tensor, a: float) -> list[torch.Tensor]:
        return [
            fastdiff.ops.euler_step(x, v, a),
            fastdiff.ops.euler_step(x, v, a, uncond=x, guidance_scale=2.0 * a),
            fastdiff.ops.linear_update([1.0, a], [x, v]),
            fastdiff.ops.ddim_step(x, v, a, 0.5 + a),
        ]

    compiled = torch.compile(steps, fullgraph=True)
    for a in (0.1, 0.2, 0.3, 0.45):
        for got, want in zip(compiled(x, v, a), steps(x, v, a), strict=True):
            assert torch.equal(got, want)


def test_one_tensor_may_be_two_arguments_while_compiling_with_gradients() -> None:
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)
    ops = fastdiff.ops
    weight = torch.randn(24, 8, device=DEVICE)
    calls = {
        "euler_step": lambda x: ops.euler_step(x, x, 0.5, uncond=x, guidance_scale=2.0),
        "gate_residual": lambda x: ops.gate_residual(x, x, x),
        "adaln_mlp": lambda x: ops.adaln_mlp(x, x, x, x, weight, None, weight.mT, None),
    }
    for name, call in calls.items():
        results = []
        for function in (call, torch.compile(call, fullgraph=True)):
            y = function(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(eager, compiled, msg=name)


def test_a_coefficient_that_is_learned_is_the_references_and_native_says_so() -> None:
    x = torch.randn(2, 5, device=DEVICE)
    dt = torch.full((2,), 0.1, device=DEVICE, requires_grad=True)
    fastdiff.ops.euler_step(x, x, dt).sum().backward()
    torch.testing.assert_close(dt.grad, x.sum(1))
    assert any("coefficient" in why for why in fastdiff.explain("euler_step", x, x, dt))
    assert fastdiff.explain("euler_step", x, x, dt.detach().double()) == []
    with fastdiff.use_backend("native"), pytest.raises(RuntimeError, match="coefficient"):
        fastdiff.ops.euler_step(x, x, dt)


def test_a_half_precision_step_size_is_not_rounded_again() -> None:
    x, v, u = (torch.randn(2, 50, device=DEVICE) for _ in range(3))
    dt = torch.tensor([0.1, 0.2], device=DEVICE).half()
    got = fastdiff.ops.euler_step(x, v, dt, uncond=u, guidance_scale=7.5)
    want = fastdiff.ops.euler_step(x, v, dt.double(), uncond=u, guidance_scale=7.5)
    assert torch.equal(got, want)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_the_right_gradients(used: int) -> None:
    fused = SPECS["gate_residual_adaln"]
    args, _ = fused.shapes["[1,16,1152]"](torch.float32, DEVICE)
    found = []
    for function in (fused.function, fused.reference):
        leaves = [t.detach().requires_grad_() for t in args]
        result = function(*leaves)[used]
        found.append(torch.autograd.grad(result, leaves, torch.ones_like(result) * result.detach(), allow_unused=True))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_fused_is_bitwise_its_two_parts() -> None:
    fused, parts = SPECS["gate_residual_adaln"], SPECS["gate_residual"]
    for dtype in DTYPES:
        for seed in range(10):
            (x, branch, gate, shift, scale), kwargs = fused.example(random.Random(seed), dtype, DEVICE)
            r, y = fused.function(x, branch, gate, shift, scale, **kwargs)
            r2 = parts.function(x, branch, gate)
            assert torch.equal(r, r2)
            assert torch.equal(y, fastdiff.ops.adaln_modulate(r2, shift, scale, **kwargs))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bit_types_are_read_and_rounded_as_torch_does(dtype: torch.dtype, isa: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(dtype)
    values = every.float()
    between = torch.nextafter(values, torch.full_like(values, float("inf")))
    ulp = (values.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(torch.float32)  # ties
    low_nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32, device=DEVICE).view(torch.float32)
    wide = torch.cat([values, between, ulp, low_nan])
    with native(isa):
        assert torch.equal(fastdiff.ops.linear_update([1.0], [every]).view(torch.int16)[values == values],
                           every.view(torch.int16)[values == values])  # fmt: skip
        got = fastdiff.ops.linear_update([1.0, 1.0], [torch.zeros_like(wide, dtype=dtype), wide])
    want = wide.to(dtype)
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    assert torch.equal(got[~torch.isnan(want)], want[~torch.isnan(want)])
