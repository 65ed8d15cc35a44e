"""Drafts of tiny random models: heads and layers whose proposals are next to never right.

What they propose does not matter: tests replace it, after it was computed (see
tests/e2e/drafted_answers.py). That they have layers of their own, in pages of the pool, does.
"""

import json
import shutil
from pathlib import Path

import torch
from make_random_llama import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

WEIGHTS = "model.safetensors"


def make_llama(folder: Path, width: int) -> Path:
    """A small Llama with the hybrids' tokens: a draft model, or what an EAGLE head is made of."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=32,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def the_model_itself(model: Path, folder: Path) -> Path:
    return model


def make_eagle(model: Path, folder: Path) -> Path:
    """An EAGLE head of one layer, the first of a Llama."""
    weights = _layer(model, 0, "layers.0.")
    # An EAGLE head has no norm before its layer.
    weights.pop("layers.0.input_layernorm.weight")
    width = weights["layers.0.self_attn.q_proj.weight"].shape[1]
    weights["fc.weight"] = torch.eye(width, 2 * width)
    return _save(model, folder, weights, architectures=["EagleLlamaForCausalLM"])


def make_eagle3(model: Path, folder: Path) -> Path:
    """An EAGLE 3 head of one layer: it reads hidden states of three layers of its target."""
    weights = _layer(model, 0, "midlayer.")
    for name in "qkv":
        narrow = weights[f"midlayer.self_attn.{name}_proj.weight"]
        weights[f"midlayer.self_attn.{name}_proj.weight"] = torch.cat([narrow, narrow], 1)
    width = weights["midlayer.input_layernorm.weight"].shape[0]
    weights["midlayer.hidden_norm.weight"] = torch.ones(width)
    weights["norm.weight"] = torch.ones(width)
    weights["fc.weight"] = torch.eye(width, 3 * width)
    weights["lm_head.weight"] = load_file(model / WEIGHTS)["lm_head.weight"]
    changes = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    return _save(model, folder, weights, architectures=["LlamaForCausalLMEagle3"], **changes)


def make_mimo(folder: Path) -> Path:
    """A model of full attention with an MTP layer: MiMo is Qwen 2 with one more layer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=NUM_HEADS * HEAD_SIZE,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=4096,
        initializer_range=0.08,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    width = config.hidden_size
    added = _layer(folder, 0, "model.mtp_layers.0.")
    added["model.mtp_layers.0.input_proj.weight"] = torch.eye(width, 2 * width)
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        added[f"model.mtp_layers.0.{norm}.weight"] = torch.ones(width)
    return _add(folder, added, architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)


def add_mtp(model: Path) -> Path:
    """Give a Qwen3-Next an MTP layer: attention of its first full layer, experts of its first."""
    added = _layer(model, 3, "mtp.layers.0.")
    added = {name: weight for name, weight in added.items() if ".mlp." not in name}
    added |= {n: w for n, w in _layer(model, 0, "mtp.layers.0.").items() if ".mlp." in n}
    width = added["mtp.layers.0.input_layernorm.weight"].shape[0]
    added["mtp.fc.weight"] = torch.eye(width, 2 * width)
    for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        added[f"mtp.{norm}.weight"] = torch.zeros(width)  # one is added to it
    return _add(model, added, num_nextn_predict_layers=1)


def _layer(model: Path, layer: int, prefix: str) -> dict[str, torch.Tensor]:
    """Weights of a layer under other names."""
    found = f"model.layers.{layer}."
    return {
        prefix + name.removeprefix(found): weight
        for name, weight in load_file(model / WEIGHTS).items()
        if name.startswith(found)
    }


def _save(model: Path, folder: Path, weights: dict[str, torch.Tensor], **changes: object) -> Path:
    """A model of one layer with these weights alone, otherwise like `model`."""
    shutil.copytree(model, folder)
    (folder / WEIGHTS).unlink()
    return _add(folder, weights, num_hidden_layers=1, **changes)


def _add(folder: Path, weights: dict[str, torch.Tensor], **changes: object) -> Path:
    """Add weights to those of a model, and entries to its configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    old = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {}
    new = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(old | new, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
