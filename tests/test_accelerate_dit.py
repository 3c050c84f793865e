"""`fastdiff.accelerate` on DiT-like projects that no import names: usual blocks are replaced, twisted ones are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerated
import pytest
import torch
import torch.nn.functional as F
from accelerated import apart, fast_copy
from torch import Tensor, nn

import fastdiff

D, HEADS = 32, 4


class Attention(nn.Module):
    """As in timm."""

    def __init__(self, dim: int = D, qk_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, dim // HEADS
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(dropout), nn.Linear(dim, dim), nn.Dropout(dropout)

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.rotate(self.q_norm(q), self.k_norm(k))
        p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, d)))


class Rotary(Attention):
    """Rotates queries and keys by position, which no attribute tells."""

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None]
        half = q.shape[-1] // 2

        def turn(x: Tensor) -> Tensor:
            a, b = x[..., :half], x[..., half:]
            return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

        return turn(q), turn(k)


class Mlp(nn.Module):
    def __init__(self, dim: int = D, act: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, 4 * dim), act or nn.GELU(approximate="tanh")
        self.drop1, self.norm = nn.Dropout(dropout), nn.Identity()
        self.fc2, self.drop2 = nn.Linear(4 * dim, dim), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Of the published code, but for its words."""

    def __init__(self, attn: nn.Module | None = None, mlp: nn.Module | None = None, norm: Any = None) -> None:
        super().__init__()
        norm = norm or (lambda: nn.LayerNorm(D, elementwise_affine=False, eps=1e-6))
        self.norm1, self.attn, self.norm2, self.mlp = norm(), attn or Attention(), norm(), mlp or Mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, a1, g1, s2, a2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, a1))
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, a2))


class Final(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6), nn.Linear(D, 12)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.final_layer = nn.ModuleList(blocks or [Block(), Block()]), Final()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class SwappedChunks(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a1, s1, g1, a2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, a1))
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, a2))


class SwappedGates(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, a1, g2, s2, a2, g1 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, a1))
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, a2))


class PlainScale(Block):
    """Scales by `scale`, not by 1 + scale, in one place."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, a1, g1, s2, a2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, a1))
        return x + g2.unsqueeze(1) * self.mlp(self.norm2(x) * a2.unsqueeze(1) + s2.unsqueeze(1))


class Pair(Block):
    def forward(self, x: Tensor, c: Tensor) -> Any:
        return super().forward(x, c), c


class NewestGelu(Mlp):
    """Applies another activation than the one it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropsByFunction(Mlp):
    """Its dropout is no layer, and off in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.3, self.training)


class DropsByNumber(Attention):
    """Keeps the probability of its dropout under another name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.3, self.training)


class DropsOnce(Mlp):
    """The same parts as usual, and dropout at the end only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.act(self.fc1(x))))


class Keeps(Attention):
    """For somebody who looks at it afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)


class Collects(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class Clamps(Mlp):
    """Which small numbers do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-5, 5)


class Windows(Attention):
    """Of 32 tokens, where there are more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Windows, self).forward(part) for part in x.split(32, dim=1)], dim=1)


class Positions(Block):
    """Has a table of its own, though what it does with 16 tokens is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x + self.table[: x.shape[1]], c)


class RootMeanSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 9, D), "c": torch.randn(2, D)}


class Called(nn.Module):
    """Gives the model its arguments by position, as these projects do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, c: Tensor) -> Any:
        return self.model(x, c)


USUAL: dict[str, Callable[[], nn.Module]] = {
    "dit": Model,
    "query and key norms": lambda: Model(Block(Attention(qk_norm=True))),
    "exact gelu": lambda: Model(Block(mlp=Mlp(act=nn.GELU()))),
    "norms with weights": lambda: Model(Block(norm=lambda: nn.LayerNorm(D, eps=1e-5))),
    "torch's rms norms": lambda: Model(Block(norm=lambda: nn.RMSNorm(D, eps=1e-6))),
    "norms of their own": lambda: Model(Block(norm=RootMeanSquare)),
    "dropout": lambda: Model(Block(Attention(dropout=0.3), Mlp(dropout=0.2))),
}


@pytest.mark.parametrize("law", accelerated.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", USUAL)
def test_law(name: str, law: Callable[..., None]) -> None:
    law(Called(USUAL[name]()), _inputs())


def test_compiles_as_one_graph() -> None:
    accelerated.compiles(Called(Model()), _inputs())


def test_what_is_replaced() -> None:
    _, report = fastdiff.accelerate(Model(), return_report=True)
    assert {e.kind: e.handler for e in report.replaced} == {
        "Block": "DiT block",
        "Final": "DiT final layer",
        "Attention": "attention of vision transformers",
        "Mlp": "MLP of vision transformers",
    }
    assert len(report.replaced) == 7 and not report.refused and not report.unknown


TWISTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "chunks in another order": (SwappedChunks, "SwappedChunks outputs differ"),
    "gates exchanged": (SwappedGates, "SwappedGates outputs differ"),
    "no one plus scale": (PlainScale, "PlainScale outputs differ"),
    "two results": (Pair, "Pair something else than one tensor"),
    "positions": (Positions, "Positions parts that the usual one has not: table"),
    "rotation": (lambda: Block(Rotary()), "Rotary outputs differ"),
    "dropout by a function": (lambda: Block(mlp=DropsByFunction()), "DropsByFunction in training"),
    "dropout by a function in attention": (lambda: Block(DropsByNumber()), "DropsByNumber in training"),
    "dropout once": (lambda: Block(mlp=DropsOnce(dropout=0.3)), "DropsOnce in training"),
    "outputs clamped": (lambda: Block(mlp=Clamps()), "Clamps outputs differ"),
    "windows": (lambda: Block(Windows()), "Windows outputs differ"),
    "something kept": (lambda: Block(Keeps()), "Keeps sets attributes: seen"),
    "something collected": (lambda: Block(Collects()), "Collects sets attributes: seen"),
    "another activation": (lambda: Block(mlp=NewestGelu()), "NewestGelu outputs differ"),
}


@pytest.mark.parametrize("name", TWISTED)
def test_twisted_is_refused(name: str) -> None:
    """Even when its modulation is zero, as in a fresh model, where every block is the identity."""
    make, reason = TWISTED[name]
    block = make()
    nn.init.zeros_(block.adaLN_modulation[1].weight), nn.init.zeros_(block.adaLN_modulation[1].bias)
    state = torch.get_rng_state()
    _, report = fastdiff.accelerate(block, return_report=True)
    assert torch.equal(torch.get_rng_state(), state)
    kind, _, why = reason.partition(" ")
    refused = [e for e in report.refused if e.kind == kind]
    assert len(refused) == 1 and why in str(refused[0].why_not)
    x, c = _inputs().values()
    nn.init.normal_(block.adaLN_modulation[1].weight)
    theirs = fastdiff.restore(copy.deepcopy(block.eval()))
    with torch.no_grad():
        assert apart(block(x, c), theirs(x, c)) < 1e-5


def test_a_layer_that_cannot_be_tried_is_refused() -> None:
    class Picky(Block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            if x.shape[1] != 9:
                raise ValueError("nine tokens, please")
            return super().forward(x, c)

    _, report = fastdiff.accelerate(Picky(), return_report=True)
    assert "could not be tried out: ValueError: nine tokens, please" in str(report)


def test_trying_out_runs_no_hook_and_leaves_buffers() -> None:
    model, calls = Model(), []
    for part in model.modules():
        part.register_forward_hook(lambda *_: calls.append(1))
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fastdiff.accelerate(model)
    assert not calls
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_arguments_go_to_the_original() -> None:
    """A condition per token, keywords, more arguments: what the block itself makes of them."""

    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            out = super().forward(x)
            return out if mask is None else out * mask

    layer = Masked()
    fast = fast_copy(layer)
    x, mask = torch.randn(2, 9, D), torch.rand(2, 9, 1)
    with torch.no_grad():
        assert apart(fast(x, mask), layer(x, mask)) < 1e-6
        assert apart(fast(x, mask=mask), layer(x, mask)) < 1e-6
        block = Block()
        assert apart(fast_copy(block)(x, c=mask[:, 0].expand(2, D)), block(x, mask[:, 0].expand(2, D))) < 1e-6
        for samples, conditions in ((2, 1), (1, 2)):
            given = x[:samples], torch.randn(conditions, D)
            assert apart(fast_copy(block)(*given), block(*given)) < 1e-5


def test_our_own_models_are_left_alone() -> None:
    from fastdiff.models import DiT

    model = DiT(8, 2, 3, hidden_size=32, depth=1, num_heads=2, num_classes=4)
    assert not fastdiff.accelerate(model, return_report=True)[1].replaced
