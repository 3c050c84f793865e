"""Mamba block and language model: against a plain recurrence, against transformers, along paths, in pieces."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff.models import MambaBlock, MambaLM, load_weights, mamba_lm

PATH = torch.tensor([3, 0, 6, 1, 5, 2, 4])


def plain(block: MambaBlock, x: Tensor) -> Tensor:
    """The block in float64, one step at a time."""
    p = {name: value.detach().double() for name, value in block.named_parameters()}
    rank, states = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    u, z = F.linear(x.double(), p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, dim=-1)
    taps = p["conv1d.weight"].shape[-1]
    u = F.conv1d(F.pad(u.mT, (taps - 1, 0)), p["conv1d.weight"], p.get("conv1d.bias"), groups=u.shape[-1])
    u = F.silu(u).mT
    dt, B, C = F.linear(u, p["x_proj.weight"]).split([rank, states, states], dim=-1)
    delta = F.softplus(F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"]))
    h, ys = u.new_zeros(*u[:, 0].shape, states), []
    for i in range(u.shape[1]):
        decay = (delta[:, i, :, None] * -p["A_log"].exp()).exp()
        h = decay * h + (delta[:, i] * u[:, i])[..., None] * B[:, i, None]
        ys.append((h * C[:, i, None]).sum(-1) + p["D"] * u[:, i])
    return F.linear(torch.stack(ys, 1) * F.silu(z), p["out_proj.weight"], p.get("out_proj.bias"))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within a share of the range of what is expected."""
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 3},
        {"conv_bias": False, "bias": True, "d_conv": 1, "dt_init": "constant"},
    ],
    ids=["default", "odd sizes", "biases"],
)
def test_a_block_is_the_plain_recurrence(options: dict[str, Any]) -> None:
    block, x = MambaBlock(24, **options), torch.randn(2, 11, 24)
    close(block(x), plain(block, x))
    with torch.no_grad():
        close(block(x), plain(block, x))
        with fastdiff.use_backend("reference"):
            close(block(x), plain(block, x))
        close(block.double()(x.double()), plain(block, x), 1e-12)


def test_step_sizes_start_in_their_range() -> None:
    block = MambaBlock(512, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(block.dt_proj.bias)
    assert 0.0019 < dt.min() < 0.003 and 0.04 < dt.max() < 0.0501


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", [None, PATH], ids=["rows", "path"])
def test_a_path_is_followed_by_convolution_and_scan(order: Tensor | None, reverse: bool) -> None:
    block, x = MambaBlock(16), torch.randn(2, 7, 16)
    path = torch.arange(7) if order is None else order
    path = path.flip(0) if reverse else path
    close(block(x, order=order, reverse=reverse)[:, path], plain(block, x[:, path]))

    at = x.clone().requires_grad_()
    for step in (0, 3, 6):  # what a step depends on: all before it, none after
        (grad,) = torch.autograd.grad(block(at, order=order, reverse=reverse)[:, path[step]].sum(), at)
        seen = grad.abs().sum((0, 2)) > 0
        assert seen[path[: step + 1]].all() and not seen[path[step + 1 :]].any()


@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (2, 1, 6), (5, 4)])
def test_a_sequence_in_pieces_gives_what_the_whole_gives(pieces: tuple[int, ...]) -> None:
    block, x = MambaBlock(16), torch.randn(2, 9, 16)
    whole, end = block(x, return_state=True)
    state, parts = None, []
    for part in x.split(pieces, dim=1):
        y, state = block(part, state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), whole, 1e-6)
    assert state is not None
    close(state.scan, end.scan, 1e-6)
    assert torch.allclose(state.conv, end.conv, rtol=1e-5, atol=1e-6)


def test_bad_arguments_name_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"\[MambaBlock\] d_state: expected an integer of at least 1, got 0"):
        MambaBlock(16, d_state=0)
    with pytest.raises(ValueError, match=r"\[MambaBlock\] dt_init: expected 'random' or 'constant', got 'zero'"):
        MambaBlock(16, dt_init="zero")
    with pytest.raises(ValueError, match=r"\[MambaBlock\] x: expected shape \[B,L,16\], got \[2, 7, 15\]"):
        MambaBlock(16)(torch.randn(2, 7, 15))
    with pytest.raises(ValueError, match=r"\[MambaBlock\] order: expected shape \[8\], got \[7\]"):
        MambaBlock(16)(torch.randn(2, 8, 16), order=PATH)
    with pytest.raises(ValueError, match=r"\[MambaLM\] tokens: expected shape \[B,L\], got \[3\]"):
        MambaLM(10, 16, 1)(torch.tensor([1, 2, 3]))


def test_copies_and_compiled_blocks_agree() -> None:
    block, x = MambaBlock(16), torch.randn(2, 7, 16)
    expected = block(x)
    assert torch.equal(copy.deepcopy(block)(x), expected)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    close(compiled(x), expected, 1e-6)
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    block(x).square().sum().backward()
    for mine, theirs in zip(got, [p.grad for p in block.parameters()], strict=True):
        close(mine, theirs, 1e-5)


def test_bfloat16_is_near_float32() -> None:
    block, x = MambaBlock(32), torch.randn(1, 40, 32)
    half = copy.deepcopy(block).bfloat16()
    got = half(x.bfloat16())
    assert got.dtype == torch.bfloat16
    close(got, plain(half, x.bfloat16()), 0.03)


# ------------------------------------------------------------------------------------------------------ transformers


def theirs(**options: Any) -> Any:
    """transformers' model with weights at which every part counts."""
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 50, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3, "use_cache": False}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**{**settings, **options})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "A_log" not in name and "dt_proj.bias" not in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 1}])
def test_transformers_weights_give_transformers_outputs(options: dict[str, Any]) -> None:
    model, tokens = theirs(**options), torch.randint(0, 50, (2, 13))
    for source in (model, model.backbone):  # saved with and without the head
        ours = mamba_lm(source.state_dict())
        close(ours(tokens), model(tokens).logits)
    hidden = model.backbone(tokens).last_hidden_state
    close(mamba_lm(model.state_dict()).hidden(tokens)[0], hidden)


def test_gradients_are_those_of_transformers() -> None:
    model, tokens = theirs(), torch.randint(0, 50, (2, 13))
    ours = mamba_lm(model.state_dict())
    for logits in (model(tokens).logits, ours(tokens)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name.removeprefix("backbone."): p.grad for name, p in model.named_parameters()}
    got = {name: p.grad for name, p in ours.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        close(grad, expected[name], 2e-5)


def test_names_of_mamba_ssm_load_and_are_found_again() -> None:
    model, tokens = MambaLM(50, 16, 2, d_state=4), torch.randint(0, 50, (1, 9))
    published = {f"backbone.{name}": value.clone() for name, value in model.state_dict().items()}
    published["backbone.embedding.weight"] = published.pop("backbone.embeddings.weight")
    published["lm_head.weight"] = published["backbone.embedding.weight"]
    other = MambaLM(50, 16, 2, d_state=4)
    other.load_state_dict(published)
    assert torch.equal(other(tokens), model(tokens)) and torch.equal(mamba_lm(published)(tokens), model(tokens))
    assert "lm_head.weight" in published  # the caller's own dict is as it was


def test_wrong_weights_are_named() -> None:
    state = MambaLM(50, 16, 2).state_dict()
    lacking = {name: value for name, value in state.items() if name != "layers.1.mixer.D"}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.mixer\.D"):
        mamba_lm(lacking)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.mixer\.E"):
        mamba_lm({**state, "layers.0.mixer.E": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"\[mamba_lm\] state_dict: expected weights of a Mamba, with embeddings.weight"
    ):
        mamba_lm({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match=r"\[MambaLM\] lm_head.weight: expected the embeddings"):
        mamba_lm({**state, "lm_head.weight": torch.zeros(50, 16)})


def test_text_continues_where_the_state_was_left() -> None:
    model, tokens = MambaLM(50, 16, 3), torch.randint(0, 50, (2, 10))
    whole = model(tokens)
    first, state = model(tokens[:, :4], return_state=True)
    rest = []
    for i in range(4, 10):
        logits, state = model(tokens[:, i : i + 1], state=state, return_state=True)
        rest.append(logits)
    close(torch.cat([first, *rest], 1), whole, 1e-6)


def test_weights_of_others_load_with_load_weights() -> None:
    model, other = MambaLM(11, 16, 2), MambaLM(11, 16, 2)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    load_weights(other, {**state, "lm_head.weight": state["backbone.embeddings.weight"]})
    tokens = torch.tensor([[1, 5, 3]])
    torch.testing.assert_close(other(tokens), model(tokens), rtol=0, atol=0)


def test_states_of_another_model_are_refused() -> None:
    model, tokens = MambaLM(11, 16, 2), torch.tensor([[1, 5, 3]])
    _, state = model(tokens, return_state=True)
    for wrong in (state[:1], state + state):
        with pytest.raises(ValueError, match=r"\[MambaLM\] state: expected 2"):
            model(tokens, state=wrong)
