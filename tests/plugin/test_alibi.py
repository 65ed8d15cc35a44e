"""How far the heads of ALiBi models see, from their weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from razor_vllm.heads.alibi import (
    BoundOptions,
    calibrate,
    layer_weights,
    mpt_slopes,
    product_norms,
    reach,
    shape_of,
    slopes,
    weight_files,
)
from razor_vllm.heads.calibrate import ProbeOptions
from razor_vllm.heads.calibrate import calibrate as calibrate_any

LAYERS, HEADS, HIDDEN, LENGTH = 2, 6, 48, 400
EPSILON = 1e-3


def shaken(model: torch.nn.Module, folder: Path, weight_scale: float) -> Path:
    """Save a model whose norms and biases are not those of a new one."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name or name.endswith("bias"):
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.copy_(torch.randn_like(weight) * weight_scale)
    model.save_pretrained(folder)
    return folder


def bloom(folder: Path) -> Path:
    config = BloomConfig(hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=99)
    return shaken(BloomForCausalLM(config), folder, 0.05)


def mpt(folder: Path, **attention: object) -> Path:
    config = MptConfig(
        d_model=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        vocab_size=99,
        max_seq_len=LENGTH,
        attn_config={"attn_type": "multihead_attention", "alibi_bias_max": 4, **attention},
    )
    return shaken(MptForCausalLM(config), folder, 0.05)


def baichuan(folder: Path, num_files: int = 1) -> Path:
    """As the hub has them: code of their own, RMS norm, q, k and v packed one after another."""
    torch.manual_seed(3)
    config = {
        "model_type": "baichuan",
        "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights[f"{name}.self_attn.W_pack.weight"] = torch.randn(3 * HIDDEN, HIDDEN) * 0.05
        weights[f"{name}.input_layernorm.weight"] = torch.randn(HIDDEN)
        weights[f"{name}.post_attention_layernorm.weight"] = torch.randn(HIDDEN)
    names = sorted(weights)
    for number in range(num_files):
        part = {name: weights[name].bfloat16() for name in names[number::num_files]}
        save_file(part, folder / f"model-{number:05}.safetensors")
    return folder


MODELS: list[Callable[[Path], Path]] = [bloom, mpt, baichuan]


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("num_heads", [1, 4, 6, 12, 32, 40, 112])
def test_slopes_are_those_of_the_models(num_heads: int) -> None:
    """transformers' own slopes, also of head counts that are no power of two."""
    ones = torch.ones(1, 2)
    bias = build_alibi_tensor(ones, num_heads, torch.float32)[:, 0, 1]
    assert slopes(num_heads) == pytest.approx(bias.tolist())
    for bias_max in (8, 4):
        bias = build_mpt_alibi_tensor(num_heads, 2, bias_max)[:, 0, 0]
        assert mpt_slopes(num_heads, bias_max) == pytest.approx((-bias).tolist())


@pytest.mark.parametrize("size", [(1, 8, 8), (5, 8, 40), (3, 16, 100)])
def test_norms_are_those_of_the_whole_product(size: tuple[int, int, int]) -> None:
    """Small factors give the spectral norm of the hidden x hidden product."""
    torch.manual_seed(0)
    query, key = torch.randn(size), torch.randn(size)
    want = torch.linalg.matrix_norm(query.transpose(1, 2) @ key, 2)
    torch.testing.assert_close(product_norms(query, key), want)


def attention_inputs(model_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of layer 0 on random input, by transformers' own projection and norm."""
    torch.manual_seed(11)
    hidden = torch.randn(LENGTH, HIDDEN)
    config = config_of(model_dir)
    if config["model_type"] == "bloom":
        block = BloomForCausalLM.from_pretrained(model_dir).transformer.h[0]
        fused = block.self_attention.query_key_value(block.input_layernorm(hidden))
        query, key, _ = block.self_attention._reshape(fused[None])
        return query[0], key[0]
    if config["model_type"] == "mpt":
        block = MptForCausalLM.from_pretrained(model_dir).transformer.blocks[0]
        fused = block.attn.Wqkv(block.norm_1(hidden))
        if block.attn.clip_qkv:
            fused = fused.clamp(-block.attn.clip_qkv, block.attn.clip_qkv)
    else:
        weights = load_file(model_dir / "model-00000.safetensors")
        normed = hidden * hidden.square().mean(-1, keepdim=True).rsqrt()
        normed = normed * weights["model.layers.0.input_layernorm.weight"].float()
        fused = normed @ weights["model.layers.0.self_attn.W_pack.weight"].float().T
    parts = fused.view(LENGTH, 3, HEADS, -1).permute(1, 2, 0, 3)
    return parts[0], parts[1]


@torch.no_grad()
@pytest.mark.parametrize("make", [*MODELS, lambda folder: mpt(folder, clip_qkv=0.2)])
def test_nothing_is_seen_past_the_reach(tmp_path: Path, make) -> None:
    """On random inputs: no weight past L_h is above epsilon, nor is their sum.

    The bound's score difference is checked too, since random inputs come nowhere near it.
    """
    model_dir = make(tmp_path)
    shape = shape_of(config_of(model_dir))
    assert shape is not None
    weights = next(layer_weights(weight_files(str(model_dir)), shape))
    tokens = reach(weights, shape, EPSILON)
    query, key = attention_inputs(model_dir)
    slope = torch.tensor(shape.slopes)[:, None, None]
    back = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).float()
    scores = query @ key.transpose(1, 2) * shape.scale
    attention = (scores - slope * back).masked_fill(back < 0, -torch.inf).softmax(-1)
    past = back > tokens[:, None, None]
    assert past.any(), "no head's reach is inside the sequence: nothing is checked"
    beyond = attention.masked_fill(~past, 0)
    assert beyond.max() <= EPSILON
    assert beyond.sum(-1).max() <= EPSILON
    own = scores.diagonal(dim1=1, dim2=2)[:, :, None]
    limit = tokens[:, None, None] * slope + math.log(EPSILON)
    assert ((scores - own).abs() <= limit + 1e-4).all()


@pytest.mark.parametrize("make", MODELS)
def test_the_bound_by_hand(tmp_path: Path, make) -> None:
    """Each head's L_h from its own rows, with whole matrices."""
    model_dir = make(tmp_path)
    profile = calibrate_any(
        str(model_dir), ProbeOptions(), bound=BoundOptions(window=100, epsilon=EPSILON)
    )
    files = {}
    for path in model_dir.glob("*.safetensors"):
        files |= load_file(path)
    size = HIDDEN // HEADS
    kind = config_of(model_dir)["model_type"]
    names = {
        "bloom": (
            "transformer.h.1.self_attention.query_key_value",
            "transformer.h.1.input_layernorm",
        ),
        "mpt": ("transformer.blocks.1.attn.Wqkv", "transformer.blocks.1.norm_1"),
        "baichuan": ("model.layers.1.self_attn.W_pack", "model.layers.1.input_layernorm"),
    }[kind]
    weight = files[f"{names[0]}.weight"].double()
    gamma = files[f"{names[1]}.weight"].double()
    squares = gamma.square().sum()
    slope = mpt_slopes(HEADS, 4) if kind == "mpt" else slopes(HEADS)
    for head in range(HEADS):
        at = head * 3 * size if kind == "bloom" else head * size
        step = size if kind == "bloom" else HIDDEN
        query, key = weight[at : at + size], weight[at + step : at + step + size]
        norm = torch.linalg.matrix_norm(query.T @ key, 2)
        radius, extra = squares, 0.0
        if kind == "bloom":
            radius = squares + files[f"{names[1]}.bias"].double().square().sum()
            bias = files[f"{names[0]}.bias"].double()[at : at + size]
            extra = (key.T @ bias).norm() * radius.sqrt()
        want = (2 * size**-0.5 * (norm * radius + extra) - math.log(EPSILON)) / slope[head]
        assert profile.scores["reach"][1][head] == pytest.approx(want.item(), abs=0.1, rel=1e-4)
        assert (head in profile.retrieval_heads[1]) == (want > 100)
    assert (profile.num_layers, profile.num_kv_heads) == (LAYERS, HEADS)
    assert 0 < profile.num_retrieval_heads < profile.num_heads


def test_files_in_parts_are_one_model(tmp_path: Path) -> None:
    """Weights of a layer may lie in different files."""
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    models = [baichuan(tmp_path / "one"), baichuan(tmp_path / "many", num_files=3)]
    shape = shape_of(config_of(models[0]))
    assert shape is not None
    one, many = (calibrate(str(model), shape, BoundOptions()) for model in models)
    assert one == many


def test_only_one_layer_is_in_memory(tmp_path: Path, monkeypatch) -> None:
    """Weights that the bound does not need are never read, and layers come one by one."""
    from razor_vllm.heads import alibi

    seen: list[str] = []
    plain = alibi._tensor
    monkeypatch.setattr(
        alibi, "_tensor", lambda o, n, *a, **k: seen.append(n) or plain(o, n, *a, **k)
    )
    model = baichuan(tmp_path)
    shape = shape_of(config_of(model))
    assert shape is not None
    layers = layer_weights(weight_files(str(model)), shape)
    next(layers)
    assert seen
    assert all("layers.0." in name for name in seen)
    next(layers)
    assert not any("post_attention" in name for name in seen)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_config": {"alibi": False}}, NotImplementedError, "an mpt model with alibi False"),
        ({"attn_config": {"qk_ln": True}}, NotImplementedError, "an mpt model with qk_ln True"),
        ({"attn_config": {"attn_type": "x"}}, NotImplementedError, "an mpt model with x"),
        ({"attn_config": [1]}, ValueError, "attn_config is not an object"),
        ({"n_heads": 0}, ValueError, "n_heads is 0"),
        ({"n_layers": "2"}, ValueError, "n_layers is '2'"),
        ({"n_heads": 7}, ValueError, "do not divide over 7 heads"),
        ({"d_model": 54}, ValueError, r"expected are floats of \(162, 54\)"),
        ({"n_layers": 3}, ValueError, r"0 weights called blocks.2.attn.Wqkv.weight"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, change, error, message: str) -> None:
    """Sizes that are missing, make no sense or are not the weights'."""
    model = mpt(tmp_path)
    config = {**config_of(model), **change}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(error, match=message):
        calibrate_any(str(model), ProbeOptions())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """No safetensors, a cut file, numbers that are none."""
    model = baichuan(tmp_path)
    path = model / "model-00000.safetensors"
    whole = path.read_bytes()
    shape = shape_of(config_of(model))
    assert shape is not None
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=str(path)):
        calibrate(str(model), shape, BoundOptions())
    path.write_bytes(whole)
    weights = load_file(path)
    weights["model.layers.1.input_layernorm.weight"][3] = math.nan
    save_file(weights, path)
    with pytest.raises(ValueError, match="layers.1.input_layernorm.weight holds numbers"):
        calibrate(str(model), shape, BoundOptions())
    path.rename(model / "model.bin")
    with pytest.raises(ValueError, match="has no safetensors files"):
        calibrate(str(model), shape, BoundOptions())


def test_bad_options_are_refused() -> None:
    """Each refusal names the value."""
    with pytest.raises(ValueError, match="window is -1"):
        BoundOptions(window=-1)
    for epsilon in (0, 1, math.nan):
        with pytest.raises(ValueError, match="epsilon is"):
            BoundOptions(epsilon=epsilon)
