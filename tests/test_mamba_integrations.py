"""transformers' mixers after `accelerate`, and code written for mamba_ssm and causal_conv1d on our operators."""

import copy
import importlib
import importlib.util
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.integrations import mamba_ssm as shim
from fastdiff.integrations.accelerate import accelerate, acceleration_report, restore

transformers = pytest.importorskip("transformers")
KINDS = ("Mamba", "FalconMamba")


def build(kind: str = "Mamba", **options: Any) -> Any:
    settings = {"vocab_size": 50, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}
    settings |= {"bos_token_id": 1, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**{**settings, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "A_log" not in name and "dt_proj.bias" not in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, 50, (batch, length))


# -------------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}, {"conv_kernel": 1, "expand": 1}]
)
def test_outputs_agree_and_restore_is_exact(kind: str, options: dict[str, Any]) -> None:
    model, x = build(kind, **options), tokens()
    keys, expected = list(model.state_dict()), model(x).logits
    fast, report = accelerate(model, return_report=True)
    assert fast is model and len(report.replaced) == 2 and not report.refused
    close(model(x).logits, expected)
    with torch.no_grad():
        close(model(x, use_cache=False).logits, expected)
    assert list(model.state_dict()) == keys and not torch.equal(model(x).logits, expected)  # it was ours
    assert torch.equal(restore(model)(x).logits, expected)
    assert not acceleration_report(model).replaced


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_generation_gives_the_same_tokens(kind: str, length: int) -> None:
    model, x = build(kind), tokens(length=length)
    mask = torch.ones_like(x)
    mask[0, : length // 3] = 0  # padded on the left
    for options in ({}, {"num_beams": 2}):
        settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, **options}
        expected = restore(model).generate(x, **settings)
        assert torch.equal(accelerate(model).generate(x, **settings), expected)


def logits_in_pieces(model: Any, x: Tensor, pieces: tuple[int, ...]) -> Tensor:
    cache, found = None, []
    for part in x.split(pieces, dim=1):
        out = model(part, use_cache=True, cache=cache)
        cache = out.cache
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(4, 1, 1, 3), (2, 1, 1, 1, 1, 1, 1, 1), (6, 3)])
def test_a_cache_is_read_and_left_as_the_original_does(kind: str, pieces: tuple[int, ...]) -> None:
    model, x = build(kind), tokens()
    expected = logits_in_pieces(model, x, pieces)
    close(logits_in_pieces(accelerate(model), x, pieces), expected)


def test_a_cache_can_be_handed_between_fast_and_original() -> None:
    model, x = build(), tokens()
    expected = logits_in_pieces(model, x, (5, 1, 1, 1, 1))
    for first, second in ((accelerate, restore), (restore, accelerate)):
        start = first(model)(x[:, :5], use_cache=True)
        second(model)
        rest, cache = [start.logits], start.cache
        for i in range(5, 9):
            out = model(x[:, i : i + 1], use_cache=True, cache=cache)
            rest.append(out.logits)
        close(torch.cat(rest, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_as_by_the_original(kind: str, side: str) -> None:
    model, x = build(kind), tokens()
    mask = torch.ones_like(x)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    expected = model(x, attention_mask=mask).logits
    assert not torch.allclose(model(x).logits, expected)
    close(accelerate(model)(x, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_original(kind: str) -> None:
    model, x = build(kind).train(), tokens()
    mask = torch.ones_like(x)
    mask[0, :2] = 0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(x, attention_mask=mask, labels=x).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    accelerate(model)
    plain = gradients()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

    for got in (plain, gradients()):
        assert got.keys() == expected.keys()
        for name, grad in got.items():
            close(grad, expected[name], 2e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_after_it(backend: str) -> None:
    model, x = build(), tokens()
    expected = model(x).logits
    compiled = torch.compile(accelerate(model.backbone), backend=backend, fullgraph=True)
    close(model.lm_head(compiled(x, use_cache=False).last_hidden_state), expected)


def test_copies_and_pickles_are_fast_and_twice_is_harmless() -> None:
    model, x = accelerate(accelerate(build())), tokens()
    expected = model(x).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(acceleration_report(copied).replaced) == 2
        assert torch.equal(copied(x).logits, expected)
    assert type(model.backbone.layers[0].mixer).__name__ == "MambaMixer"


def test_low_precision_is_near_the_original() -> None:
    model, x = build(), tokens()
    expected = model(x).logits
    close(accelerate(model).bfloat16()(x).logits, expected, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        close(model.float()(x).logits, expected, 0.1)


def test_hooks_and_other_kinds_of_layers_take_part() -> None:
    model, x, seen = build(), tokens(), []
    mixer = model.backbone.layers[0].mixer
    mixer.x_proj.register_forward_hook(lambda *_: seen.append(1))
    mixer.in_proj = nn.Sequential(mixer.in_proj)  # a layer that is not nn.Linear itself
    expected = model(x).logits
    close(accelerate(model)(x).logits, expected)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "activation", "gelu"), "activation 'gelu'"),
        (lambda m: delattr(m, "x_proj"), "unknown version of MambaMixer: no x_proj"),
        (lambda m: setattr(m.conv1d, "_hf_hook", object()), "offloading"),
        (lambda m: setattr(m.config, "_is_quantized", True), "quantised"),
        (lambda m: setattr(m, "rms_eps", 1e-6), "norms of dt, B and C"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(change: Any, reason: str) -> None:
    mixer = build(num_hidden_layers=1).backbone.layers[0].mixer
    change(mixer)
    _, report = accelerate(mixer, return_report=True)
    assert not report.replaced and reason in str(report.refused[0].why_not)


def test_an_unknown_signature_is_refused_and_the_earlier_one_serves_what_it_can() -> None:
    mixer = build(num_hidden_layers=1).backbone.layers[0].mixer
    original, calls = type(mixer), []

    def earlier(self: Any, hidden_states: Any, cache_params: Any = None, cache_position: Any = None,
                attention_mask: Any = None) -> Any:  # fmt: skip
        calls.append(1)
        return original.forward(self, hidden_states, cache_params, attention_mask)

    def unknown(self: Any, hidden_states: Any, seqlens: Any = None) -> Any:
        raise AssertionError

    x = torch.randn(2, 5, 32)
    expected = mixer(x)
    for forward in (earlier, unknown):
        kind = type("MambaMixer", (original,), {"forward": forward, "__module__": "transformers.models.mamba"})
        mixer.__class__ = kind
        _, report = accelerate(mixer, return_report=True)
        if forward is unknown:
            assert "unknown version of MambaMixer.forward" in str(report.refused[0].why_not)
            continue
        close(mixer(x), expected)
        close(mixer(x, None, torch.arange(5)), expected)
        assert not calls
        close(mixer(x, attention_mask=torch.ones(2, 5)), expected)  # masks were applied elsewhere in that version
        assert calls == [1]


# -------------------------------------------------------------------------------------------------------------- shim


@pytest.fixture
def installed() -> Iterator[None]:
    with shim.install():
        yield


def scan_inputs(**kind: Any) -> dict[str, Tensor]:
    b, d, n, length = 2, 6, 4, 11
    made = {
        "u": torch.randn(b, d, length, **kind), "delta": torch.rand(b, d, length, **kind),
        "A": -torch.rand(d, n, **kind), "B": torch.randn(b, n, length, **kind), "C": torch.randn(b, n, length, **kind),
        "D": torch.randn(d, **kind), "z": torch.randn(b, d, length, **kind), "delta_bias": torch.randn(d, **kind),
    }  # fmt: skip
    return {name: t.requires_grad_() for name, t in made.items()}


def plain_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    dt, h, ys = F.softplus(delta + delta_bias[:, None]), 0, []
    for i in range(u.shape[-1]):
        h = (dt[..., i, None] * A).exp() * h + (dt * u)[..., i, None] * B[:, None, :, i]
        ys.append((h * C[:, None, :, i]).sum(-1))
    return (torch.stack(ys, -1) + D[:, None] * u) * F.silu(z), h


@pytest.mark.usefixtures("installed")
def test_the_interface_is_the_recurrence_with_its_gradients() -> None:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref  # type: ignore

    inputs = scan_inputs()
    doubles = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected, state = plain_scan(**doubles)
    weights = torch.randn_like(expected)
    ((expected * weights).sum() + state.sum()).backward()
    for function in (selective_scan_fn, selective_scan_ref):
        out, last = function(**inputs, delta_softplus=True, return_last_state=True)
        close(out, expected)
        close(last, state)
        for t in inputs.values():
            t.grad = None
        ((out * weights.float()).sum() + last.sum()).backward()
        for name, t in inputs.items():
            close(t.grad, doubles[name].grad, 2e-5)
        alone = function(*inputs.values(), True)
        assert torch.equal(alone, out)
    assert torch.equal(
        selective_scan_fn(**inputs, delta_softplus=True), ops.selective_scan(**inputs, delta_softplus=True)
    )


@pytest.mark.usefixtures("installed")
def test_the_inner_function_is_a_block_after_its_projection() -> None:
    from mamba_ssm import mamba_inner_fn

    b, e, n, r, k, width, length = 2, 6, 4, 3, 4, 5, 9
    xz, conv, conv_bias = torch.randn(b, 2 * e, length), torch.randn(e, 1, k), torch.randn(e)
    x_proj, dt_proj, out_proj, bias = (
        torch.randn(r + 2 * n, e),
        torch.randn(e, r),
        torch.randn(width, e),
        torch.randn(5),
    )
    A, D, dt_bias = -torch.rand(e, n), torch.randn(e), torch.randn(e)
    norms = {"b_rms_weight": torch.rand(n), "c_rms_weight": torch.rand(n), "dt_rms_weight": torch.rand(e)}
    added = {"B_proj_bias": torch.randn(n), "C_proj_bias": torch.randn(n)}

    def plain(b_rms_weight: Any = None, c_rms_weight: Any = None, dt_rms_weight: Any = None,
              B_proj_bias: Any = 0.0, C_proj_bias: Any = 0.0) -> Tensor:  # fmt: skip
        x, z = xz.double().chunk(2, dim=1)
        u = F.silu(F.conv1d(F.pad(x, (k - 1, 0)), conv.double(), conv_bias.double(), groups=e))
        dt, B, C = (x_proj.double() @ u).split([r, n, n], dim=1)
        norm = lambda t, w: t if w is None else t * (t.square().mean(1, True) + 1e-6).rsqrt() * w.double()[:, None]  # noqa: E731
        B = norm((B.mT + B_proj_bias).mT, b_rms_weight)
        C = norm((C.mT + C_proj_bias).mT, c_rms_weight)
        dt = norm(dt_proj.double() @ dt, dt_rms_weight)
        y, _ = plain_scan(u, dt, A.double(), B, C, D.double(), z, dt_bias.double())
        return y.mT @ out_proj.double().mT + bias.double()

    args = (xz, conv, conv_bias, x_proj, dt_proj, out_proj, bias, A)
    for options in ({}, norms, added, norms | added):
        close(mamba_inner_fn(*args, D=D, delta_bias=dt_bias, **options), plain(**options))
    B, C = torch.randn(b, n, length), torch.randn(b, n, length)  # given instead of projected
    got = mamba_inner_fn(xz, conv, conv_bias, x_proj[:r], dt_proj, out_proj, bias, A, B, C, D, dt_bias)
    x, z = xz.chunk(2, dim=1)
    u = F.silu(F.conv1d(F.pad(x, (k - 1, 0)), conv, conv_bias, groups=e))
    y, _ = plain_scan(u, dt_proj @ (x_proj[:r] @ u), A, B, C, D, z, dt_bias)
    close(got, y.mT @ out_proj.mT + bias)
    with pytest.raises(ValueError, match=r"\[mamba_inner_fn\] A: expected a real tensor"):
        mamba_inner_fn(*args[:-1], torch.complex(A, A))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("heads", [None, 4])
def test_a_single_step_continues_a_scan_in_place(heads: int | None) -> None:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # type: ignore

    b, d, n, groups = 2, 3, 5, 2
    shape = (d,) if heads is None else (heads, d)
    x, dt, z = (torch.randn(b, *shape) for _ in range(3))
    A, D, bias = -torch.rand(*shape, n), torch.randn(*shape), torch.randn(*shape)
    B, C = (torch.randn(b, n) if heads is None else torch.randn(b, groups, n) for _ in range(2))
    state = torch.randn(b, *shape, n)
    wide = [t if heads is None else t.repeat_interleave(heads // groups, 1)[:, :, None] for t in (B, C)]
    wide = [t[:, None] if heads is None else t for t in wide]
    step = F.softplus(dt + bias)
    after = (step[..., None] * A).exp() * state + (step * x)[..., None] * wide[0]
    expected = ((after * wide[1]).sum(-1) + D * x) * F.silu(z)
    pointer = state.data_ptr()
    close(selective_state_update(state, x, dt, A, B, C, D, z, bias, True), expected)
    close(state, after)
    assert state.data_ptr() == pointer


@pytest.mark.usefixtures("installed")
def test_the_convolution_and_its_update() -> None:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # type: ignore

    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=6))
    close(causal_conv1d_fn(x, weight, bias, activation="silu"), expected)
    out, final = causal_conv1d_fn(x[..., :5], weight, bias, activation="silu", return_final_states=True)
    close(out, expected[..., :5])
    kept = torch.zeros(2, 6, 3)
    causal_conv1d_fn(x[..., :5], weight, bias, activation="silu", final_states_out=kept)
    assert torch.equal(final, x[..., 2:5]) and torch.equal(kept, final)
    close(causal_conv1d_fn(x[..., 5:], weight, bias, initial_states=final, activation="silu"), expected[..., 5:])
    for size in (3, 4, 6):  # of the state: K - 1 or more
        state = torch.zeros(2, 6, size)
        parts = [causal_conv1d_update(x[..., :4], state, weight, bias, "silu")]
        parts += [causal_conv1d_update(x[..., i], state, weight, bias, "silu")[..., None] for i in range(4, 9)]
        close(torch.cat(parts, -1), expected)
        assert torch.equal(state, x[..., -size:])
    with pytest.raises(ValueError, match=r"\[causal_conv1d_fn\] seq_idx: expected None"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 9, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[causal_conv1d_update\] cache_seqlens: expected None"):
        causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(2, dtype=torch.int32))


def test_install_is_opt_in_reversible_and_harmless_twice() -> None:
    names = ("mamba_ssm", "causal_conv1d")
    assert not any(name in sys.modules for name in names)
    with shim.install():
        assert all(importlib.util.find_spec(name) is not None for name in names)
        shim.install()
        with shim.install():
            pass
        assert "mamba_ssm" in sys.modules  # the inner ones change nothing
        assert importlib.util.find_spec("mamba_ssm.ops.selective_scan_interface") is not None
        assert importlib.util.find_spec("mamba_ssm.ops.triton.ssd_combined") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    assert not any(name.split(".")[0] in names for name in sys.modules)
    assert all(importlib.util.find_spec(name) is None for name in names)
    shim.uninstall()


def test_an_installed_package_is_left_alone_unless_forced(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("real = True\n")
    (tmp_path / "causal_conv1d.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="mamba_ssm is installed"):
        shim.install()
    real = importlib.import_module("mamba_ssm")
    assert real.real
    with shim.install(force=True):
        assert not hasattr(importlib.import_module("mamba_ssm"), "real")
        assert not hasattr(importlib.import_module("causal_conv1d"), "real")
    assert importlib.import_module("mamba_ssm") is real
    for name in ("mamba_ssm", "causal_conv1d"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("installed")
def test_availability_checks_of_libraries_do_not_break() -> None:
    from transformers.utils import import_utils

    for name in [n for n in dir(import_utils) if "mamba" in n or "causal_conv1d" in n]:
        check = getattr(import_utils, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(check, "__wrapped__", check)()
    exists, version = import_utils._is_package_available("mamba_ssm", return_version=True)
    assert exists and torch.torch_version.TorchVersion(version) < "2.0.4"  # no Mamba-2


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from fastdiff.integrations import mamba_ssm as shim
shim.install()
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
from transformers import Mamba2Config, Mamba2ForCausalLM
from fastdiff import ops
calls, scan = [], ops.selective_scan
ops.selective_scan = lambda *args, **options: (calls.append(1), scan(*args, **options))[1]
torch.manual_seed(0)
small = dict(vocab_size=50, hidden_size=32, state_size=8, num_hidden_layers=2)
model = MambaForCausalLM(MambaConfig(**small)).eval()
x = torch.randint(2, 50, (2, 9))
torch.save(model.state_dict(), sys.argv[1])
out = model(x).logits
tokens = model.generate(x, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(x))
loss = model.train()(x, labels=x).loss
loss.backward()
grads = {name: p.grad for name, p in model.named_parameters()}
assert len(calls) == 2 + 2 * 6 + 2, len(calls)
FalconMambaForCausalLM(FalconMambaConfig(**small)).eval()(x)
Mamba2ForCausalLM(Mamba2Config(num_heads=4, head_dim=16, n_groups=2, expand=2, **small)).eval()(x)
torch.save([x, out.detach(), tokens, loss.detach(), grads], sys.argv[2])
"""


def test_transformers_imported_afterwards_runs_on_it(tmp_path: Any) -> None:
    weights, results = tmp_path / "weights.pt", tmp_path / "results.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, weights, results], check=True)
    x, logits, generated, loss, grads = torch.load(results, weights_only=True)
    model = build()
    model.load_state_dict(torch.load(weights, weights_only=True))
    close(logits, model(x).logits)
    assert torch.equal(
        generated, model.generate(x, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(x))
    )
    expected = model.train()(x, labels=x).loss
    expected.backward()
    close(loss, expected)
    for name, p in model.named_parameters():
        close(grads[name], p.grad, 2e-5)
