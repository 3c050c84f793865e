"""`fastdiff.accelerate` on diffusers' layers and models, against those themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerated
import pytest
import torch
from accelerated import apart, fast_copy
from torch import nn

import fastdiff

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
diffusers = pytest.importorskip("diffusers")
attention = pytest.importorskip("diffusers.models.attention")
processors = pytest.importorskip("diffusers.models.attention_processor")
norms = pytest.importorskip("diffusers.models.normalization")
flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")

D, HEADS, DIM = 32, 2, 16


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _rope(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = _x(tokens, DIM // 2).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def _dit() -> Any:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM, num_layers=2, sample_size=4, num_embeds_ada_norm=10
    )
    inputs = {"timestep": torch.tensor([1, 5]), "class_labels": torch.tensor([0, 3]), "hidden_states": _x(2, 4, 4, 4)}
    return _Wrapped(model), {"inputs": inputs}


class _Wrapped(nn.Module):
    """A model that returns an object, as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs, return_dict=False)


def _basic(**options: Any) -> Any:
    block = attention.BasicTransformerBlock(D, HEADS, DIM, dropout=0.2, attention_bias=True, **options)
    return block, {"hidden_states": _x(2, 9, D)}


def _dit_block() -> Any:
    block, inputs = _basic(norm_type="ada_norm_zero", num_embeds_ada_norm=10, activation_fn="gelu-approximate",
                           norm_elementwise_affine=False)  # fmt: skip
    return block, {**inputs, "timestep": torch.tensor([1, 5]), "class_labels": torch.tensor([0, 3])}


def _dit_block_with_context() -> Any:
    block, inputs = _basic(norm_type="ada_norm_zero", num_embeds_ada_norm=10, cross_attention_dim=24)
    mods = {"timestep": torch.tensor([1, 5]), "class_labels": torch.tensor([0, 3])}
    return block, {**inputs, **mods, "encoder_hidden_states": _x(2, 7, 24)}


def _pixart_block() -> Any:
    kind = {"norm_type": "ada_norm_single", "cross_attention_dim": 24, "norm_elementwise_affine": False}
    block, inputs = _basic(**kind, activation_fn="gelu-approximate", final_dropout=True)
    return block, {**inputs, "timestep": _x(2, 6 * D), "encoder_hidden_states": _x(2, 7, 24)}


def _pixart_masked() -> Any:
    block, inputs = _pixart_block()
    return block, {**inputs, "encoder_attention_mask": -5 * torch.rand(2, 1, 7)}


def _unet_block() -> Any:
    block, inputs = _basic(norm_type="layer_norm", cross_attention_dim=24, activation_fn="geglu")
    return block, {**inputs, "encoder_hidden_states": _x(2, 7, 24)}


def _sd3(**options: Any) -> Any:
    block = attention.JointTransformerBlock(D, HEADS, DIM, **options)
    return block, {"hidden_states": _x(2, 9, D), "encoder_hidden_states": _x(2, 5, D), "temb": _x(2, D)}


def _sd3_last() -> Any:
    return _sd3(context_pre_only=True, qk_norm="rms_norm")


def _sd3_dual() -> Any:
    return _sd3(use_dual_attention=True, qk_norm="rms_norm")


def _flux(kind: str) -> Any:
    block = getattr(flux, kind)(D, HEADS, DIM)
    for name, p in block.named_parameters():
        if "norm" in name and p.dim() == 1 and len(p) == DIM:
            nn.init.normal_(p, 1.0, 0.3)
    inputs = {"hidden_states": _x(2, 9, D), "encoder_hidden_states": _x(2, 5, D), "temb": _x(2, D)}
    return block, {**inputs, "image_rotary_emb": _rope(14)}


def _flux_joint() -> Any:
    return _flux("FluxTransformerBlock")


def _flux_fused() -> Any:
    block, inputs = _flux("FluxTransformerBlock")
    block.attn.fuse_projections()
    return block, inputs


def _flux_single() -> Any:
    return _flux("FluxSingleTransformerBlock")


def _flux_plain() -> Any:
    block, inputs = _flux("FluxTransformerBlock")
    return block, {**inputs, "image_rotary_emb": None}


def _picture_attention() -> Any:
    options = {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0, "bias": True}
    layer = processors.Attention(D, heads=HEADS, dim_head=DIM, processor=processors.AttnProcessor2_0(), **options)
    return layer, {"hidden_states": _x(2, D, 3, 4)}


def _first_attention() -> Any:
    layer = processors.Attention(D, heads=HEADS, dim_head=DIM, cross_attention_dim=24, scale_qk=False,
                                 processor=processors.AttnProcessor())  # fmt: skip
    return layer, {"hidden_states": _x(2, 9, D), "encoder_hidden_states": _x(2, 7, 24)}


def _fused_attention(**options: Any) -> Any:
    layer = processors.Attention(D, heads=HEADS, dim_head=DIM, qk_norm="layer_norm", **options)
    layer.fuse_projections()
    layer.set_processor(processors.FusedAttnProcessor2_0())
    return layer, {"hidden_states": _x(2, 9, D)}


def _fused_cross_attention() -> Any:
    layer, inputs = _fused_attention(cross_attention_dim=24)
    return layer, {**inputs, "encoder_hidden_states": _x(2, 7, 24)}


def _continuous() -> Any:
    layer = norms.AdaLayerNormContinuous(D, 24)
    nn.init.normal_(layer.norm.weight), nn.init.normal_(layer.norm.bias)
    return layer, {"x": _x(2, 9, D), "conditioning_embedding": _x(2, 24)}


def _continuous_rms() -> Any:
    layer = norms.AdaLayerNormContinuous(D, 24, norm_type="rms_norm")
    return layer, {"x": _x(2, 9, D), "conditioning_embedding": _x(2, 24)}


def _zero_float32() -> Any:
    return norms.AdaLayerNormZero(D, norm_type="fp32_layer_norm"), {"x": _x(2, 9, D), "emb": _x(2, D)}


def _ada() -> Any:
    return norms.AdaLayerNorm(D, 10), {"x": _x(2, 9, D), "timestep": torch.tensor(3)}


def _ada_per_sample() -> Any:
    return norms.AdaLayerNorm(D, chunk_dim=1), {"x": _x(2, 9, D), "temb": _x(2, D)}


CASES: list[Callable[[], Any]] = [
    _dit, _dit_block, _dit_block_with_context, _pixart_block, _pixart_masked, _unet_block, _sd3, _sd3_last, _sd3_dual,
    _flux_joint, _flux_fused, _flux_single, _flux_plain, _picture_attention, _first_attention, _fused_attention,
    _fused_cross_attention, _continuous, _continuous_rms, _zero_float32, _ada, _ada_per_sample,
]  # fmt: skip
COMPILED = [_dit, _pixart_block, _sd3_dual, _flux_joint, _flux_single, _picture_attention]


@pytest.mark.parametrize("law", accelerated.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
def test_law(case: Callable[[], Any], law: Callable[..., None]) -> None:
    module, inputs = case()
    law(module, inputs)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.__name__.strip("_"))
def test_compiles_as_one_graph(case: Callable[[], Any]) -> None:
    accelerated.compiles(*case())


def test_what_is_replaced() -> None:
    """Every part that has a replacement has one, and the report counts them."""
    model, _ = _dit()
    _, report = fastdiff.accelerate(model, return_report=True)
    kinds = {"BasicTransformerBlock": 2, "AdaLayerNormZero": 2, "AttnProcessor2_0": 2, "FeedForward": 2}
    assert {kind: sum(e.kind == kind for e in report.replaced) for kind in kinds} == kinds
    assert len(report.replaced) == 8 and not report.refused
    assert report.unknown == {"Conv2d": 1, "Linear": 2}  # outside of the blocks
    assert report.replaced[0].path == "model.transformer_blocks.0"
    assert "8 replaced, 0 refused" in str(report)


def _unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def test_unet() -> None:
    """Stable Diffusion's network, and the choice of processors by class that diffusers makes afterwards."""
    model = _unet()
    inputs = (_x(2, 4, 8, 8), torch.tensor([3, 7]), _x(2, 5, 24))
    with torch.no_grad():
        theirs = model(*inputs).sample
        fastdiff.accelerate(model)
        assert apart(model(*inputs).sample, theirs) < 1e-5
        model.set_default_attn_processor()
        assert apart(model(*inputs).sample, theirs) < 1e-5
        _, report = fastdiff.accelerate(model, return_report=True)
        assert not report.refused
        model.fuse_qkv_projections()
        fastdiff.accelerate(model)
        assert apart(model(*inputs).sample, theirs) < 1e-5
        model.unfuse_qkv_projections()
        assert apart(model(*inputs).sample, theirs) < 1e-5


def test_chunked_feed_forward() -> None:
    block, inputs = _dit_block()
    block.eval()
    fast = fast_copy(block)
    fast.set_chunk_feed_forward(3, dim=1)
    with torch.no_grad():
        assert apart(fast(**inputs), block(**inputs)) < 1e-5


def test_pipeline_end_to_end(tmp_path: Path) -> None:
    """The same picture; and a saved pipeline is an ordinary one."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM, num_layers=2, sample_size=4, num_embeds_ada_norm=1000,
        out_channels=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def picture(pipe: Any) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(3)
        found = pipe([1, 2], generator=generator, num_inference_steps=3, output_type="np").images
        return torch.from_numpy(found)

    theirs = picture(pipe)
    same, report = fastdiff.accelerate(pipe, return_report=True)
    assert same is pipe
    places = {e.path.split(".")[0] for e in report.replaced}
    assert {"transformer", "vae"} <= places
    assert apart(picture(pipe), theirs) < 1e-4
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer) is diffusers.DiTTransformer2DModel
    assert torch.equal(picture(again), theirs)
    fastdiff.restore(pipe)
    assert torch.equal(picture(pipe), theirs)


def test_lora_on_top_still_counts() -> None:
    """Adapters of peft, put on before or after, do what they do without us; and can be trained."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_v", "to_out.0", "proj", "linear"], init_lora_weights=False
    )
    wrapped, inputs = _dit()
    model, inputs = wrapped.model.eval(), inputs["inputs"]
    plain = model(**inputs).sample
    after = fastdiff.accelerate(copy.deepcopy(model))
    torch.manual_seed(5)
    peft.inject_adapter_in_model(config, after)
    torch.manual_seed(5)
    peft.inject_adapter_in_model(config, model)
    theirs = model(**inputs).sample
    before = fast_copy(model)
    assert apart(theirs, plain) > 1e-2
    for fast in (after, before):
        ours = fast(**inputs).sample
        assert apart(ours, theirs) < 1e-5
        ours.square().mean().backward()
        assert all(p.grad is not None for n, p in fast.named_parameters() if "lora" in n and "emb" not in n)


def test_forward_of_a_subclass_is_left_alone() -> None:
    class Mine(attention.FeedForward):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    class Named(attention.FeedForward):
        """The same but for its name."""

    inputs = _x(2, 9, D)
    with torch.no_grad():
        module = Mine(D, activation_fn="gelu-approximate")
        theirs = module(inputs)
        assert not fastdiff.acceleration_report(fastdiff.accelerate(module)).replaced
        assert torch.equal(module(inputs), theirs)
        module = fast_copy(Named(D, activation_fn="gelu-approximate"))
        assert isinstance(module, Named)


def test_another_version_is_refused() -> None:
    """A forward with arguments that are not known is not replaced, and the reason is given."""
    cls = type("AdaLayerNormZero", (norms.AdaLayerNormZero,), {"__module__": "diffusers.models.normalization"})
    cls.forward = lambda self, x, temb, emb=None: x  # type: ignore[attr-defined]
    _, report = fastdiff.accelerate(cls(D), return_report=True)
    assert not report.replaced and "unknown version" in str(report.refused[0].why_not)


def test_positions_inside_the_block_are_refused() -> None:
    block, _ = _basic(norm_type="ada_norm_single", positional_embeddings="sinusoidal", num_positional_embeddings=16)
    _, report = fastdiff.accelerate(block, return_report=True)
    assert [e.path for e in report.refused] == [""] and "positional_embeddings" in str(report)
    assert report.replaced  # its parts


def test_a_chosen_attention_backend_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _flux_single()[0].attn
    fastdiff.accelerate(layer)
    x, asked = _x(2, 9, D), []

    def record(query: torch.Tensor, *args: Any, backend: Any = None, **kwargs: Any) -> torch.Tensor:
        asked.append(backend)
        return query

    monkeypatch.setattr(flux, "dispatch_attention_fn", record)
    with torch.no_grad():
        layer(x)
        assert not asked
        layer.set_attention_backend("_native_math")
        layer(x)
    assert len(asked) == 1 and asked[0].value == "_native_math"


def test_wider_modulation_keeps_its_type() -> None:
    """float32 modulation of 16-bit tokens is float32 in diffusers, and stays so."""
    layer, inputs = _zero_float32()
    fast, inputs["x"] = fast_copy(layer), inputs["x"].bfloat16()
    with torch.no_grad():
        ours, theirs = fast(**inputs)[0], layer(**inputs)[0]
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # the block's own
@pytest.mark.parametrize("case", [_dit_block, _sd3_dual, _flux_joint], ids=lambda case: case.__name__.strip("_"))
def test_autocast(case: Callable[[], Any]) -> None:
    """Types are those of the block itself, and numbers those of its 16-bit products."""
    block, inputs = case()
    fast = fast_copy(block.eval())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert apart(fast(**inputs), block(**inputs)) < 0.02
