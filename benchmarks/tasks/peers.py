"""The same questions under the methods of kvpress, at the same share of KV bytes.

    python3.11 -m venv .venv-kvpress
    .venv-kvpress/bin/pip install -r benchmarks/tasks/peers.txt
    .venv-kvpress/bin/python -m benchmarks.tasks.peers --model MODEL --press snapkv --keep 0.4

kvpress needs a transformers of its own, hence an environment of its own. One call runs one
press and writes one file, which `benchmarks.tasks.report` reads beside those of our engine:

    none       nothing is dropped: the base of the others, in transformers
    streaming  StreamingLLM, the first and the last tokens
    knorm      keys of small L2 norm
    snapkv     what the last 64 tokens attend to
    tova       what the last token attends to
    ada-snapkv SnapKV with a layer's budget spread over its heads (Ada-KV)
    duo        DuoAttention: heads of a razor profile keep all, the others sinks and a window

The protocol is kvpress's own: the context is read densely, then compressed without knowing
the question; the question and the answer are read over what is left. (Our exact prefill
reads the question densely too; our windowed prefill does not read the context densely.)
`--keep` is the share of a context's KV that is kept; the window of `duo` follows from it.
"""

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.residency import device
from benchmarks.tasks.__main__ import draw, parse_tasks, row_of, write
from benchmarks.tasks.contexts import Context, Question, chat_of, score
from razor_vllm.heads.profile import HeadProfile, read_profile

PRESSES = ("none", "streaming", "knorm", "snapkv", "tova", "ada-snapkv", "duo")


class Read(NamedTuple):
    """A context that was read.

    tokens: of the context. kept: entries of each head in the cache. masks: of each layer,
    (row, head, place) of the entries that a press masks instead of dropping them.
    """

    cache: Any
    tokens: int
    kept: int
    masks: list[Any]


class PressModel:
    """A model of transformers under one press of kvpress."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16
        ).eval()
        self.args = args

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def split(self, context: Context) -> tuple[list[int], list[list[int]]]:
        """Token ids of the context, and of each question with the begun answer.

        Together they are those of our engine; the context ends where questions differ.
        """
        prompts = [
            self.tokenizer.apply_chat_template(
                chat_of(context, q), tokenize=True, return_dict=False, continue_final_message=True
            )
            for q in context.questions
        ]
        columns = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
        same = sum(1 for _ in columns)
        return prompts[0][:same], [prompt[same:] for prompt in prompts]

    def press(self, num_tokens: int) -> Any:
        """The press for a context; None keeps all."""
        from kvpress import AdaKVPress, KnormPress, SnapKVPress, StreamingLLMPress, TOVAPress

        name, ratio = self.args.press, 1 - self.args.keep
        if name == "none":
            return None
        if name == "duo":
            return duo_press(read_profile(Path(self.args.head_profile)), self.args, num_tokens)
        if name == "ada-snapkv":
            return AdaKVPress(SnapKVPress(compression_ratio=ratio))
        kinds = {
            "streaming": StreamingLLMPress,
            "knorm": KnormPress,
            "snapkv": SnapKVPress,
            "tova": TOVAPress,
        }
        return kinds[name](compression_ratio=ratio)

    def read(self, ids: Sequence[int]) -> Read:
        """Read a context densely, then compress it."""
        press = self.press(len(ids))
        cache: Any = DynamicCache()
        with torch.no_grad(), press(self.model) if press else contextlib.nullcontext():
            self.model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
        layers = self.model.model.layers
        masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in layers]
        return Read(cache, len(ids), cache.get_seq_length(), masks)

    @torch.no_grad()
    def reply(
        self, read: Read, ids: Sequence[Sequence[int]], questions: Sequence[Question]
    ) -> list[str]:
        """Greedy replies to all questions at once; each ends when it is right, or too long."""
        cache = self._spread(read, len(ids))
        width = max(len(one) for one in ids)
        pads = torch.tensor([[width - len(one)] for one in ids])
        tokens = torch.tensor([[0] * (width - len(one)) + list(one) for one in ids])
        mask = torch.ones(len(ids), read.kept + width, dtype=torch.long)
        mask[:, read.kept :] -= (torch.arange(width) < pads).long()
        positions = (read.tokens + torch.arange(width) - pads).clamp(min=0)
        said: list[list[int]] = [[] for _ in ids]
        open_rows = set(range(len(ids)))
        for _ in range(max(question.max_tokens for question in questions)):
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
            tokens = logits[:, -1:].argmax(-1)
            for row in sorted(open_rows):
                said[row].append(int(tokens[row]))
                if self._ended(said[row], questions[row]):
                    open_rows.remove(row)
            if not open_rows:
                break
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in said]

    def _ended(self, said: Sequence[int], question: Question) -> bool:
        if said[-1] == self.tokenizer.eos_token_id or len(said) >= question.max_tokens:
            return True
        return score(question, self.tokenizer.decode(said)) == 1.0

    def _spread(self, read: Read, batch: int) -> Any:
        """The context's cache, and the presses' masks, for a batch of questions."""
        cache: Any = DynamicCache()
        for index, layer in enumerate(read.cache.layers):
            keys, values = (x.expand(batch, -1, -1, -1) for x in (layer.keys, layer.values))
            cache.update(keys, values, index)
            attention = self.model.model.layers[index].self_attn
            if read.masks[index] is not None:
                _, heads, places = read.masks[index]
                rows = torch.arange(batch).repeat_interleave(len(heads))
                attention.masked_key_indices = (rows, heads.repeat(batch), places.repeat(batch))
        return cache


def window_of(profile: HeadProfile, keep: float, sinks: int, num_tokens: int) -> int:
    """Window of the local heads that makes `keep` the kept share of all heads' tokens.

    Raises:
        ValueError: the retrieval heads and the sinks alone keep more.
    """
    heads = profile.num_retrieval_heads / profile.num_heads
    window = round((keep - heads) / (1 - heads) * num_tokens) - sinks
    if window <= 0:
        raise ValueError(f"--keep is {keep}; the profile's heads alone keep {heads:.2f}")
    return window


def duo_press(profile: HeadProfile, args: argparse.Namespace, num_tokens: int) -> Any:
    """DuoAttention's press with the heads of a profile."""
    from kvpress import DuoAttentionPress

    heads = np.zeros((profile.num_layers, profile.num_kv_heads))
    for layer, row in enumerate(profile.retrieval_heads):
        heads[layer, list(row)] = 1.0
    window = window_of(profile, args.keep, args.sinks, num_tokens)

    class RazorHeads(DuoAttentionPress):
        """Its heads and sizes are given, not downloaded."""

        @staticmethod
        def load_attention_pattern(model: Any) -> tuple[int, int, np.ndarray]:
            return args.sinks, window, heads

    return RazorHeads(head_compression_ratio=1 - heads.mean())


def only(context: Context, tasks: Sequence[str] | None) -> Context:
    """The questions of some tasks."""
    asked = [q for q in context.questions if tasks is None or q.task in tasks]
    return Context(context.text, tuple(asked))


def run_context(model: PressModel, context: Context) -> tuple[list[str], dict[str, float], int]:
    """Replies, seconds, and bytes that transformers' cache holds after compression."""
    ids, questions = model.split(context)
    begun = time.monotonic()
    read = model.read(ids)
    read_at = time.monotonic()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in read.cache.layers)
    replies = model.reply(read, questions, context.questions)
    seconds = {"read": round(read_at - begun, 2), "rest": round(time.monotonic() - read_at, 2)}
    return replies, seconds, held


def run_length(model: PressModel, length: int, args: argparse.Namespace, bar: tqdm) -> Any:
    """All contexts of one length."""
    rows = []
    for kind in args.kinds:
        for index in range(args.contexts):
            context = only(draw(kind, length, index, args, model), args.tasks)
            replies, seconds, held = run_context(model, context)
            rows.append(row_of(kind, length, index, context, replies) | {"seconds": seconds})
            bar.update()
    whole = bytes_of(model, length)
    kept = 1.0 if args.press == "none" else args.keep
    return {
        "contexts": rows,
        "kv_bytes": {"peak": whole, "decode": round(kept * whole), "held": held},
    }


def bytes_of(model: PressModel, length: int) -> int:
    """KV bytes of `length` tokens in bf16."""
    config = model.model.config
    per_token = 2 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return length * per_token


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--press", choices=PRESSES, required=True)
    parser.add_argument("--keep", type=float, default=0.4, help="share of the KV that is kept")
    parser.add_argument("--head-profile", help="of the press duo")
    parser.add_argument("--sinks", type=int, default=4, help="of the press duo")
    parser.add_argument("--tasks", nargs="+", help="all by default")
    parser.add_argument("--name", help="of the results; kvpress and the press by default")
    parse_tasks(parser)
    args = parser.parse_args(argv)
    args.name = args.name or f"kvpress-{args.press}"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    model = PressModel(args)
    about = {
        "model": args.model,
        "device": device(),
        **{name: version(name) for name in ("kvpress", "transformers", "torch")},
    }
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.tasks.peers {shlex.join(argv or sys.argv[1:])}",
        "policy": args.press,
        "keep": args.keep,
        "about": about,
        "lengths": {},
    }
    total = len(args.lengths) * len(args.kinds) * args.contexts
    with tqdm(total=total, desc=args.name, unit="context") as bar:
        for length in args.lengths:
            results["lengths"][str(length)] = run_length(model, length, args, bar)
    write(results, args.output / f"{args.name}.json")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
