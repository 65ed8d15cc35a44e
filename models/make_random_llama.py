"""Make the bundled model: a small Llama with random weights, a tokenizer, a chat template.

    python models/make_random_llama.py FOLDER

It knows nothing, but it is a complete model: vLLM serves it and transformers loads it. Its
weights are large, so that attention is peaked and a wrong key shows in the output. Its
head profile is made by hand: one KV head in four, in a different place in each layer.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from razor_vllm.heads.profile import FILE_NAME, HeadProfile

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 8, 4, 32
MAX_POSITIONS = 32768
SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>", "<system>")
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


class Shape(NamedTuple):
    """Shape of the model; the tests rely on the defaults."""

    num_layers: int = NUM_LAYERS
    num_heads: int = NUM_HEADS
    num_kv_heads: int = NUM_KV_HEADS
    head_size: int = HEAD_SIZE


def make_model(vocab_size: int, seed: int, shape: Shape) -> LlamaForCausalLM:
    """Random weights, the same for the same seed."""
    torch.manual_seed(seed)
    width = shape.num_heads * shape.head_size
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.08,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def make_profile(shape: Shape) -> HeadProfile:
    """One KV head per layer, a different one in each."""
    heads = shape.num_kv_heads
    return HeadProfile(
        num_layers=shape.num_layers,
        num_kv_heads=heads,
        head_size=shape.head_size,
        retrieval_heads=tuple((layer % heads,) for layer in range(shape.num_layers)),
        made_by={"method": "by hand: the model is random, no head retrieves"},
    )


def save(folder: Path, seed: int = 0, shape: Shape | None = None) -> None:
    """Write model, tokenizer, chat template and head profile to a folder."""
    tokenizer, shape = make_tokenizer(), shape or Shape()
    make_model(len(tokenizer), seed, shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / FILE_NAME).write_text(make_profile(shape).to_json(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in Shape()._asdict().items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    args = parser.parse_args()
    shape = Shape(args.num_layers, args.num_heads, args.num_kv_heads, args.head_size)
    save(args.folder, args.seed, shape)
    print(f"made {args.folder}")


if __name__ == "__main__":
    main()
