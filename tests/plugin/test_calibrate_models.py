"""The probe on families of models, tiny and random, against transformers' eager attention."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from razor_kernels.scores import COPIES
from razor_vllm.heads import attribution
from razor_vllm.heads.attention import causal_attention
from razor_vllm.heads.attribution import Gated
from razor_vllm.heads.calibrate import ProbeOptions, calibrate, loaded, probe_ids
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.heads.prompts import Prompt

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, PERIOD, SEED = 4, 4, 2, 16, 12, 3
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
NO_HEAD_DIM = {"head_dim": None, "hidden_size": HEADS * HEAD_SIZE}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
REST = {"model.rotary_emb": "cpu", "lm_head": "cpu"}
EVERY_OTHER = ["sliding_attention", "full_attention"] * (LAYERS // 2)
# Learned sinks of about 0.3, as wide as what else is drawn.
GPT_OSS = {"sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1}


def save(folder: Path, tokenizer_dir: Path, model_type: str, change: dict[str, Any]) -> Path:
    """A random model of a family, with the bundled model's tokenizer."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in {**SIZES, **change}.items() if value is not None}
    config = AutoConfig.for_model(model_type, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_dir / name, folder / name)
    return folder


def eager_scores(model_dir: Path, kv_heads: int) -> list[tuple[list[float], list[float]]]:
    """Echo and induction of each KV head, a layer at a time, from whole attention matrices."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    vocab = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    vocab = [i for i in vocab if i < SIZES["vocab_size"]]
    ids = probe_ids(vocab, tokenizer.bos_token_id, PERIOD, SEED)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    out = []
    for weights in attentions:
        mass = torch.zeros(2, weights.shape[1])
        for i in range(1 + PERIOD, ids.shape[1]):
            for j in range(i - PERIOD, 0, -PERIOD):
                mass += torch.stack([weights[0, :, i, j], weights[0, :, i, j + 1]])
        best = (mass / ((COPIES - 1) * PERIOD)).view(2, kv_heads, -1).amax(-1)
        out.append((best[0].tolist(), best[1].tolist()))
    return out


@pytest.mark.parametrize(
    ("model_type", "change", "sliding"),
    [
        ("llama", {}, ()),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            (),
        ),
        ("qwen2", NO_HEAD_DIM, ()),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
            (2, 3),
        ),
        ("qwen3", {}, ()),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 512}, ()),  # as long as the model: no window
        ("phi", {**NO_HEAD_DIM, "partial_rotary_factor": 0.5}, ()),
        ("phi3", {**NO_HEAD_DIM, "pad_token_id": 0, "partial_rotary_factor": 0.75}, ()),
        ("gemma", {}, ()),
        (
            "gemma2",
            {
                "sliding_window": 9,
                "layer_types": EVERY_OTHER,
                "attn_logit_softcapping": 0.7,
                "query_pre_attn_scalar": 5,
            },
            (0, 2),
        ),
        ("gemma3_text", {"sliding_window": 9, "layer_types": EVERY_OTHER}, (0, 2)),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, ()),
        ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}, ()),
        ("qwen3_moe", {**MOE, "decoder_sparse_step": 1}, ()),
        ("gpt_neox", {**NO_HEAD_DIM, "num_key_value_heads": None}, ()),
        ("gpt_oss", GPT_OSS, (0, 2)),
    ],
)
def test_scores_are_those_of_the_models_attention(
    tmp_path: Path, model_dir: Path, model_type: str, change: dict[str, Any], sliding: tuple
) -> None:
    """Norms of queries, partial rotation, soft caps, windows and experts, all as in the model.

    Layers with a sliding window are left out, and marked.
    """
    folder = save(tmp_path, model_dir, model_type, change)
    profile = calibrate(str(folder), ProbeOptions(induction=0.5, period=PERIOD, seeds=(SEED,)))
    heads = HEADS if model_type == "gpt_neox" else KV_HEADS
    assert (profile.num_layers, profile.num_kv_heads, profile.head_size) == (LAYERS, heads, 16)
    assert profile.other_layers == sliding
    for layer, (echo, induction) in enumerate(eager_scores(folder, heads)):
        if layer in sliding:
            echo = induction = [0.0] * heads
            assert profile.retrieval_heads[layer] == ()
        assert profile.scores["echo"][layer] == pytest.approx(echo, abs=2e-5, rel=1e-3)
        assert profile.scores["induction"][layer] == pytest.approx(induction, abs=2e-5, rel=1e-3)
    counted = (LAYERS - len(sliding)) * heads
    assert counted // 2 <= profile.num_retrieval_heads <= counted // 2 + 1
    assert HeadProfile.from_json(profile.to_json()) == profile


def test_the_text_half_of_a_multimodal_model_is_probed(tmp_path: Path, model_dir: Path) -> None:
    """Gemma 3 with its vision tower has the text model's heads and layers."""
    change = {"sliding_window": 9, "layer_types": EVERY_OTHER}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    folder = tmp_path / "both"
    whole = AutoConfig.for_model(
        "gemma3", text_config={**SIZES, **change}, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(whole).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, folder / name)
    profile = calibrate(str(folder), ProbeOptions(period=PERIOD, seeds=(SEED,)))
    assert (profile.num_layers, profile.num_kv_heads) == (LAYERS, KV_HEADS)
    assert profile.other_layers == (0, 2)
    assert max(max(row) for row in profile.scores["induction"]) > 0


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gpt2", {}, "a gpt2 model, without rotary embeddings, is not covered"),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}, "a opt model, without rotary"),
        ("mistral", {"sliding_window": 9}, "whose layers all have a sliding window"),
        ("falcon", {"alibi": True}, "a falcon model with ALiBi"),
        (
            "deepseek_v3",
            {
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 12,
                "head_dim": 8,
                "num_key_value_heads": HEADS,
                "first_k_dense_replace": LAYERS,
            },
            "keys of 16 and values of 12",
        ),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 16}, "chunked_attention"),
        ("mamba", {"state_size": 4}, "a mamba model"),
        ("t5", {"d_model": 16, "num_layers": 1}, "a t5 model, an encoder-decoder,"),
    ],
)
def test_what_the_probe_would_misread_is_refused(
    tmp_path: Path, model_dir: Path, model_type: str, change: dict[str, Any], message: str
) -> None:
    """One line that names what was found; scores of another attention are never written."""
    if model_type in ("t5", "mamba", "falcon"):  # refused before weights are looked for
        AutoConfig.for_model(model_type, **change).save_pretrained(tmp_path)
    else:
        save(tmp_path, model_dir, model_type, change)
    with pytest.raises(NotImplementedError) as error:
        calibrate(str(tmp_path), ProbeOptions(period=PERIOD, seeds=(SEED,)))
    assert message in str(error.value)
    assert "covered are decoder models" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [None, 1, 7, 36, 64])
@pytest.mark.parametrize(("soft_cap", "learned"), [(None, False), (2.0, False), (None, True)])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_attention_without_a_matrix(
    head_dim: int, soft_cap: float | None, learned: bool, window: int | None, sinks: int
) -> None:
    """Any tile or block gives what whole matrices give, and so does its backward pass."""
    torch.manual_seed(1)
    length = 37
    query = torch.randn(1, 4, length, head_dim, requires_grad=True)
    key, value = (x.requires_grad_() for x in torch.randn(2, 1, 2, length, head_dim).unbind())
    logit = torch.tensor([-30.0, 0.0, 1.5, 30.0]) if learned else None
    got = causal_attention(query, key, value, 0.4, soft_cap, window, sinks, 8, logit)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.4
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    back = torch.arange(length)[:, None] - torch.arange(length)
    unseen = (back < 0) | ((back >= (window or length)) & (torch.arange(length) >= sinks))
    logits = logits.masked_fill(unseen, -torch.inf)
    if logit is not None:
        column = logit[None, :, None, None].expand(-1, -1, length, 1)
        logits = torch.cat([column, logits], -1)
    weights = logits.softmax(-1)[..., -length:]
    want = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=5e-4)


def gates_of(folder: Path, device_map: Any = None, dtype: str = "float32") -> dict:
    """Gradients by the gates of a model, for one prompt of random tokens."""
    ids = torch.randint(5, 250, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    gated = Gated(512, 8, 2)
    with loaded(str(folder), gated.attend, device_map, dtype, None) as model:
        found = attribution.attribute(model, gated, [[Prompt("repeat", ids, list(range(40, 60)))]])
    return found.rounds[0]


@pytest.mark.parametrize(
    ("model_type", "change", "sliding"),
    [
        ("llama", {}, ()),
        (
            "gemma2",
            {
                "sliding_window": 9,
                "layer_types": EVERY_OTHER,
                "attn_logit_softcapping": 0.7,
                "query_pre_attn_scalar": 5,
            },
            (0, 2),
        ),
        ("gemma3_text", {"sliding_window": 9, "layer_types": EVERY_OTHER}, (0, 2)),
        ("phi", {**NO_HEAD_DIM, "partial_rotary_factor": 0.5}, ()),
        ("qwen3_moe", {**MOE, "decoder_sparse_step": 1}, ()),
        ("gpt_neox", {**NO_HEAD_DIM, "num_key_value_heads": None}, ()),
        ("gpt_oss", GPT_OSS, (0, 2)),
    ],
)
def test_gates_of_a_family_have_gradients(
    tmp_path: Path, model_dir: Path, model_type: str, change: dict[str, Any], sliding: tuple
) -> None:
    """Every KV head of a layer with full attention, and no other."""
    scores = gates_of(save(tmp_path, model_dir, model_type, change))["repeat"]
    heads = HEADS if model_type == "gpt_neox" else KV_HEADS
    assert scores.shape == (LAYERS, heads)
    for layer, row in enumerate(scores):
        assert bool((row != 0).all()) == (layer not in sliding)


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", **REST},
        {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", **REST},
        {
            "model.embed_tokens": "cpu",
            **{f"model.layers.{at}": ("cpu", "disk")[at % 2] for at in range(LAYERS)},
            "model.norm": "disk",
            **REST,
        },
    ],
    ids=["cpu", "auto", "layers on disk", "embedding on disk", "every other layer on disk"],
)
def test_a_device_map_changes_no_score(tmp_path: Path, model_dir: Path, device_map) -> None:
    """Layers that accelerate moves in from elsewhere score the same, and nothing is left behind."""
    folder = save(tmp_path, model_dir, "llama", {})
    before = sorted(path.name for path in folder.iterdir())
    options = ProbeOptions(period=PERIOD, seeds=(0, 1))
    plain = calibrate(str(folder), options)
    assert calibrate(str(folder), options, device_map) == plain
    torch.testing.assert_close(gates_of(folder, device_map), gates_of(folder))
    assert sorted(path.name for path in folder.iterdir()) == before
