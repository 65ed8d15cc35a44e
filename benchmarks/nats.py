"""What a text costs under compression: nats a token, of plain and of repeated text.

    python -m benchmarks.nats --model MODEL --prefill windowed --text FILE [--output FILE]

Two texts of `--length` tokens, `--samples` of each: *plain* ones, pieces of the file one
after the other, and *repeated* ones, half as long and told twice, of which the second
copy counts. Two ways to read each:

    prefill  the text is a prompt; its second half counts (vLLM's prompt log-probabilities)
    decode   all but the last `--decoded` tokens are a prompt, and those are forced one by one

Both policies are measured in one engine, token by token the same text: the per-request
opt-out gives the full policy. Under `exact` prefill a prompt costs what it costs in full;
that its two figures agree is a check.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.residency import device
from benchmarks.served_model import EngineModel, open_engine, request_args, set_environment
from benchmarks.tasks.pairs import compare
from razor_vllm.heads.profile import locate_profile, read_profile

POLICIES = ("full", "razor")
WAYS = ("prefill", "decode")
Nats = dict[str, list[float]]
"""Name of a text to the nats of its counted tokens."""


def cut(ids: Sequence[int], length: int, samples: int) -> dict[str, dict[str, list[int]]]:
    """Plain and repeated texts of `length` tokens: kind to name to ids.

    Raises:
        ValueError: the text is shorter than what is asked for.
    """
    if len(ids) < samples * length:
        raise ValueError(
            f"the text has {len(ids)} tokens; {samples} samples of {length} tokens need "
            f"{samples * length}"
        )
    pieces = [list(ids[i * length : (i + 1) * length]) for i in range(samples)]
    half = length // 2
    return {
        "plain": {str(i): piece for i, piece in enumerate(pieces)},
        "repeated": {str(i): piece[:half] * 2 for i, piece in enumerate(pieces)},
    }


def in_prefill(
    model: EngineModel, texts: Sequence[list[int]], policy: str, done: Callable[[], object]
) -> list[list[float]]:
    """Nats of the second half of each text, as a prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args=request_args(policy))
    costs = []
    for text in texts:
        request = {"prompt_token_ids": text}
        output = model.llm.generate([request], params, use_tqdm=False)[0]
        begin = len(text) // 2
        told = zip(output.prompt_logprobs[begin:], text[begin:], strict=True)
        costs.append([-entries[token].logprob for entries, token in told])
        done()
    return costs


def in_decode(
    model: EngineModel,
    texts: Sequence[list[int]],
    policy: str,
    decoded: int,
    done: Callable[[], object],
) -> list[list[float]]:
    """Nats of the last `decoded` tokens of each text, forced one by one, in one batch."""
    from vllm import SamplingParams

    from benchmarks.forced_tokens import FORCED_KEY

    requests = [{"prompt_token_ids": text[:-decoded]} for text in texts]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=decoded,
            ignore_eos=True,
            logprobs=0,
            extra_args={**(request_args(policy) or {}), FORCED_KEY: text[-decoded:]},
        )
        for text in texts
    ]
    costs = []
    for text, output in zip(
        texts, model.llm.generate(requests, params, use_tqdm=False), strict=True
    ):
        said = output.outputs[0]
        if list(said.token_ids) != text[-decoded:]:
            raise RuntimeError("the engine did not decode the forced tokens")
        told = zip(said.logprobs, said.token_ids, strict=True)
        costs.append([-entries[token].logprob for entries, token in told])
        done()
    return costs


def measure(model: EngineModel, args: argparse.Namespace) -> dict[str, Any]:
    """Every kind of text, both ways, under both policies."""
    ids = model.tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False)
    kinds = cut(ids, args.length, args.samples)
    found: dict[str, Any] = {}
    total = len(kinds) * len(WAYS) * len(POLICIES) * args.samples
    with tqdm(total=total, desc="nats", unit="text") as bar:
        for kind, named in kinds.items():
            texts = list(named.values())
            for way in WAYS:
                costs = {}
                for policy in POLICIES:
                    if way == "prefill":
                        lists = in_prefill(model, texts, policy, bar.update)
                    else:
                        lists = in_decode(model, texts, policy, args.decoded, bar.update)
                    costs[policy] = dict(zip(named, lists, strict=True))
                found[f"{kind}, {way}"] = summary(costs["full"], costs["razor"])
    return found


def summary(full: Nats, razor: Nats) -> dict[str, Any]:
    """Mean nats a token of both, and the difference with its 95 % interval over texts."""
    pair = compare(full, razor)
    tokens = [cost for costs in full.values() for cost in costs]
    mean = sum(tokens) / len(tokens)
    return {
        "tokens": pair.questions,
        "texts": pair.contexts,
        "full": round(mean, 4),
        "razor": round(mean + pair.difference, 4),
        "difference": round(pair.difference, 4),
        "interval": [round(pair.low, 4), round(pair.high, 4)],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One engine, both policies."""
    set_environment()
    from benchmarks.forced_tokens import ForcedTokens

    path = locate_profile(args.head_profile, args.model)
    profile = read_profile(path)
    window = round(args.window * args.length) if args.window < 1 else int(args.window)
    razor = {
        "head_profile": str(path),
        "window": window,
        "sinks": args.sinks,
        "prefill": args.prefill,
        "compensation": not args.no_compensation,
    }
    options = {
        "dtype": args.dtype,
        "max_model_len": args.length + 1,
        "logits_processors": [ForcedTokens],
        "enforce_eager": args.enforce_eager,
        **json.loads(args.engine_options),
    }
    with open_engine(args.model, razor, **options) as model:
        found = measure(model, args)
        about = model.describe()
    about |= {
        "device": device(),
        "razor": razor,
        "retrieval_heads": profile.num_retrieval_heads,
        "heads": profile.num_heads,
        "profile_made_by": profile.made_by,
    }
    return {"about": about, "text": str(args.text), "nats": found}


def table(found: dict[str, Any]) -> str:
    """A row for each kind of text and way of reading: Markdown."""
    lines = ["| nats a token | full | razor | difference (95 %) |", "|---|---|---|---|"]
    for name, row in found.items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['full']:.3f} | {row['razor']:.3f} | "
            f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f}) |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--head-profile", help="by default the one beside the weights")
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--decoded", type=int, default=128, help="last tokens, forced one by one")
    parser.add_argument("--samples", type=int, default=4, help="texts of each kind")
    parser.add_argument("--window", type=float, default=0.2, help="tokens, or a share below 1")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--prefill", choices=["exact", "windowed"], default="windowed")
    parser.add_argument("--no-compensation", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--engine-options", default="{}", help="JSON of further vLLM options")
    parser.add_argument("--output", type=Path, default=Path("build/nats.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    options = shlex.join(sys.argv[1:] if argv is None else argv)
    results = {"command": f"python -m benchmarks.nats {options}", **run(args)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results["nats"]))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
