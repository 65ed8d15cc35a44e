"""What follow-up turns find in the prefix cache, under each policy at equal bytes.

    python -m benchmarks.chat_hits MODEL [--kv-bytes 40e6 60e6 80e6] [--output FILE]

Chats take their turns in rounds, all at once. A turn's prompt is the chat so far, the model's own
answer included, as many new random tokens, and the tokens with which the chat template begins an
answer. What is counted are vLLM's cached tokens of all prompts. Each engine runs in a process of
its own.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.residency import device
from razor_vllm.turns import Messages, learn_marker

ANSWER = 32
WAITING_ANSWER = 128
MOST_STEP = 512
"""Hits come in no larger steps, in tokens."""
POLICIES = {
    "full": None,
    "razor, exact": {"prefill": "exact"},
    "razor, chat": {"prefill": "chat"},
    "razor, windowed": {"prefill": "windowed"},
}


class Load(NamedTuple):
    """chats, turns: numbers of them. tokens: that a turn adds, the answer before it included.

    again: whether each turn asks anew about a text as long as a whole chat, the same in all its
        turns, instead of going on.
    waiting: whether chats of one turn come one after the other, and each is then asked on, the
        latest first.
    """

    chats: int
    turns: int
    tokens: int
    window: int
    again: bool = False
    waiting: bool = False


def hits(model: str, job: dict[str, Any]) -> dict[str, int]:
    """Prompt tokens and cached ones of a whole run; in the engine's process."""
    from vllm import LLM, SamplingParams

    razor, load = job["razor"], Load(**job["load"])
    config = {} if razor is None else {"razor": {"window": load.window, **razor}}
    llm = LLM(
        model,
        additional_config=config,
        dtype="float32",
        enforce_eager=True,
        max_model_len=load.turns * load.tokens + 2 * ANSWER,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=int(job["kv_bytes"]),
        disable_log_stats=True,
    )
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    tokenizer: Any = llm.get_tokenizer()

    def render(messages: Messages, asks: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        return tokenizer.encode(text, add_special_tokens=False)

    asking = learn_marker(render)
    draw = random.Random(0)
    chats: list[list[int]] = [[] for _ in range(load.chats)]
    if load.waiting:
        return waiting(llm, params, load, chats, asking)
    prompt_tokens = cached = 0
    for turn in range(1, load.turns + 1):
        for chat in chats:
            if load.again:
                long = (load.turns - 1) * load.tokens
                chat[long:] = []
                chat += [draw.randrange(5, 200) for _ in range(long - len(chat))]
                chat += [draw.randrange(5, 200) for _ in range(load.tokens)]
            new = turn * load.tokens - len(asking) - len(chat)
            chat += [draw.randrange(5, 200) for _ in range(new)]
            chat += asking
        prompts: Any = [{"prompt_token_ids": chat} for chat in chats]
        for chat, result in zip(chats, llm.generate(prompts, params, use_tqdm=False), strict=True):
            prompt_tokens += len(chat)
            cached += result.num_cached_tokens or 0
            chat += result.outputs[0].token_ids
    return {"prompt_tokens": prompt_tokens, "cached_tokens": cached}


def waiting(
    llm: Any, params: Any, load: Load, chats: list[list[int]], asking: list[int]
) -> dict[str, int]:
    """Next turns' prompt tokens and cached ones, and `chats` that were there to the last step.

    A next turn adds 8 tokens. What it takes from the oldest chats, which are asked last, counts
    against their policy. An answer is longer than a step of hits: a chat that waits nearer to the
    end of its first turn needs all of its pages.
    """
    draw = random.Random(0)
    params.max_tokens = WAITING_ANSWER
    for chat in chats:
        chat += [draw.randrange(5, 200) for _ in range(load.tokens - WAITING_ANSWER - len(asking))]
        chat += asking
        (result,) = llm.generate([{"prompt_token_ids": chat}], params, use_tqdm=False)
        chat += result.outputs[0].token_ids
    counts = {"prompt_tokens": 0, "cached_tokens": 0, "chats": 0}
    params.max_tokens = 1
    for chat in reversed(chats):
        prompt = [*chat, *[draw.randrange(5, 200) for _ in range(8)], *asking]
        (result,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        cached = result.num_cached_tokens or 0
        counts["prompt_tokens"] += len(prompt)
        counts["cached_tokens"] += cached
        counts["chats"] += cached >= load.tokens - WAITING_ANSWER - MOST_STEP
    return counts


def run(model: str, job: dict[str, Any]) -> dict[str, int]:
    """One engine in a process of its own."""
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule kv_bytes
    command = [sys.executable, "-m", "benchmarks.chat_hits", model, "--job", json.dumps(job)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]], policies: list[str]) -> str:
    """Cached tokens, or chats that were there, a row a memory, a column a policy."""
    lines = ["| KV memory | " + " | ".join(policies) + " |", "|---" * (1 + len(policies)) + "|"]
    for row in rows:
        cells = [_cell(row[name]) for name in policies]
        lines.append(f"| {row['kv_bytes'] / 1e6:g} MB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: dict[str, int]) -> str:
    if "chats" in found:
        return f"{found['chats']} chats"
    return f"{found['cached_tokens']:,} ({found['cached_tokens'] / found['prompt_tokens']:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kv-bytes", type=float, nargs="+", default=[40e6, 60e6, 80e6])
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--chats", type=int, default=6)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=495, help="that a turn adds")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--again", action="store_true", help="questions about one long text")
    parser.add_argument("--waiting", action="store_true", help="chats of one turn that wait")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        print(json.dumps(hits(args.model, json.loads(args.job))))
        return
    load = Load(args.chats, args.turns, args.tokens, args.window, args.again, args.waiting)
    rows = []
    for kv_bytes in args.kv_bytes:
        row: dict[str, Any] = {"kv_bytes": kv_bytes}
        for name in args.policies:
            job = {"razor": POLICIES[name], "kv_bytes": kv_bytes, "load": load._asdict()}
            row[name] = run(args.model, job)
        rows.append(row)
    print(table(rows, args.policies))
    if args.output is not None:
        command = f"python -m benchmarks.chat_hits {shlex.join(sys.argv[1:])}"
        results = {"command": command, "device": device(), "load": load._asdict(), "rows": rows}
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
