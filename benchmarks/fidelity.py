"""How far the compressed model's next-token distributions are from the full one's.

    python -m benchmarks.fidelity --model MODEL [--head-profile PATH] [--prompts FILE]
    python -m benchmarks.fidelity --url http://localhost:8000/v1 --prompts FILE

Both sides run in one engine: the per-request opt-out gives the full policy. Under the
default `exact` prefill a prompt is attended densely and compression starts with the first
generated token, so scoring a continuation as part of the prompt would compare nothing.
What is compared must be *decoded*:

    forced    (engine)  the full policy continues the prompt greedily; then both policies decode
                        that same continuation, each token forced by a logits processor.
                        The log-probabilities compared are those before it.
    parting   (server)  both policies continue greedily on their own, and positions are
                        compared up to and including the first one where they differ:
                        up to there both have the same context.

KL(full || compressed) in nats is computed over the tokens that both sides report, and one
bucket for the rest. With all log-probabilities (the default in an engine) that is the KL
divergence itself; with the top k it is a lower bound.
"""

import argparse
import json
import math
import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.served_model import (
    EngineModel,
    ServerModel,
    open_engine,
    request_args,
    set_environment,
)
from models.needle.language import FACT_WORDS, draw_facts, haystack, render
from razor_vllm.heads.profile import locate_profile, read_profile

Distribution = Mapping[int | str, float]
"""Token to log-probability, of one position."""

_TINY = 1e-12


class Step(NamedTuple):
    """One decoded position: what was chosen, and what was likely."""

    token: int | str
    logprobs: Distribution


class Compared(NamedTuple):
    """One position of both policies. kl: in nats. same: whether their first guesses agree."""

    position: int
    kl: float
    same: bool


def kl_divergence(full: Distribution, compressed: Distribution) -> float:
    """KL(full || compressed) over the tokens of both and a bucket for the rest, in nats."""
    shared = full.keys() & compressed.keys()
    total, rest_full, rest_compressed = 0.0, 1.0, 1.0
    for token in shared:
        p = math.exp(full[token])
        total += p * (full[token] - compressed[token]) if p > 0 else 0.0
        rest_full -= p
        rest_compressed -= math.exp(compressed[token])
    if rest_full > 1e-6:
        total += rest_full * math.log(rest_full / max(rest_compressed, _TINY))
    return max(total, 0.0)


def compare(full: Sequence[Step], compressed: Sequence[Step]) -> list[Compared]:
    """Compare decoded steps up to and including the first where the tokens differ."""
    compared = []
    for position, (one, other) in enumerate(zip(full, compressed, strict=False)):
        best = max(one.logprobs, key=one.logprobs.__getitem__)
        other_best = max(other.logprobs, key=other.logprobs.__getitem__)
        kl = kl_divergence(one.logprobs, other.logprobs)
        compared.append(Compared(position, kl, best == other_best))
        if one.token != other.token:
            break
    return compared


def decode(
    model: EngineModel,
    prompts: Sequence[list[int]],
    policy: str,
    args: argparse.Namespace,
    forced: Sequence[list[int]] | None,
    done: Callable[[], object],
) -> list[list[Step]]:
    """Greedy steps of each prompt, or those of given continuations."""
    from vllm import SamplingParams

    from benchmarks.forced_tokens import FORCED_KEY

    results = []
    for index, prompt in enumerate(prompts):
        extra: dict[str, Any] = dict(request_args(policy) or {})
        if forced is not None:
            extra[FORCED_KEY] = forced[index]
        params = SamplingParams(
            temperature=0,
            max_tokens=args.tokens,
            ignore_eos=True,
            logprobs=args.logprobs,
            extra_args=extra,
        )
        request = {"prompt_token_ids": prompt}
        output = model.llm.generate([request], params, use_tqdm=False)[0].outputs[0]
        results.append(
            [
                Step(token, {t: entry.logprob for t, entry in entries.items()})
                for token, entries in zip(output.token_ids, output.logprobs, strict=True)
            ]
        )
        done()
    return results


def run_engine(args: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """Forced continuations in one engine."""
    set_environment()
    from benchmarks.forced_tokens import ForcedTokens

    path = locate_profile(args.head_profile, args.model)
    razor = {
        "head_profile": str(path),
        "window": args.window,
        "sinks": args.sinks,
        "prefill": args.prefill,
        "compensation": not args.no_compensation,
    }
    options = {
        "dtype": args.dtype,
        "max_logprobs": args.logprobs,
        "logits_processors": [ForcedTokens],
        "enforce_eager": args.enforce_eager,
        **json.loads(args.engine_options),
    }
    if args.max_model_len:
        options["max_model_len"] = args.max_model_len
    with open_engine(args.model, razor, **options) as model:
        prompts = [model.tokenizer.encode(text) for text in texts]
        with tqdm(total=3 * len(prompts), desc="fidelity", unit="decode") as bar:
            greedy = decode(model, prompts, "full", args, None, bar.update)
            forced = [[int(step.token) for step in steps] for steps in greedy]
            full = decode(model, prompts, "full", args, forced, bar.update)
            compressed = decode(model, prompts, "razor", args, forced, bar.update)
        for one, other, tokens in zip(full, compressed, forced, strict=True):
            for steps in (one, other):
                if [step.token for step in steps] != tokens:
                    raise RuntimeError(
                        "the engine did not decode the forced continuation: found "
                        f"{[step.token for step in steps]}, expected {tokens}"
                    )
        about = model.describe()
    about |= {"head_profile": str(path), "razor": razor}
    about["retrieval_heads"] = read_profile(path).retrieval_heads
    compared = [compare(*pair) for pair in zip(full, compressed, strict=True)]
    return report(compared, "forced", [len(prompt) for prompt in prompts], about)


def decode_on_server(
    model: ServerModel, text: str, policy: str, args: argparse.Namespace
) -> tuple[list[Step], int]:
    """Greedy steps of a server, and the prompt's tokens."""
    body: dict[str, Any] = {
        "max_tokens": args.tokens,
        "temperature": 0,
        "logprobs": args.logprobs,
    }
    if extra := request_args(policy):
        body["vllm_xargs"] = extra
    answer = model.complete(text, **body)
    said = answer["choices"][0]["logprobs"]
    steps = [
        Step(token, entries)
        for token, entries in zip(said["tokens"], said["top_logprobs"], strict=True)
    ]
    return steps, answer["usage"]["prompt_tokens"]


def run_server(args: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """Greedy continuations until they part."""
    model = ServerModel(args.url, args.model)
    compared, lengths = [], []
    for text in tqdm(texts, desc="fidelity", unit="prompt"):
        full, length = decode_on_server(model, text, "full", args)
        compressed, _ = decode_on_server(model, text, "razor", args)
        compared.append(compare(full, compressed))
        lengths.append(length)
    return report(compared, "parting", lengths, model.describe())


def report(
    compared: Sequence[Sequence[Compared]],
    method: str,
    prompt_tokens: Sequence[int],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Means over prompts, in all and by position of the continuation."""
    rows = [entry for entries in compared for entry in entries]
    positions = range(max((row.position for row in rows), default=-1) + 1)
    return {
        "about": about,
        "method": method,
        "prompt_tokens": list(prompt_tokens),
        **summary(rows),
        "by_position": [
            {"position": p, **summary([row for row in rows if row.position == p])}
            for p in positions
        ],
    }


def summary(rows: Sequence[Compared]) -> dict[str, Any]:
    """Mean and largest KL, share of equal first guesses, and how many positions."""
    return {
        "kl_mean": round(sum(row.kl for row in rows) / len(rows), 6),
        "kl_max": round(max(row.kl for row in rows), 6),
        "top1_agreement": round(sum(row.same for row in rows) / len(rows), 4),
        "positions": len(rows),
    }


def generated_prompts(count: int, num_words: int, seed: int) -> list[str]:
    """Haystacks of the needle language that end in a question and half a new sentence."""
    texts = []
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        facts = draw_facts(rng, max(min(8, num_words // (2 * FACT_WORDS)), 1))
        words = haystack(rng, facts, num_words)
        asked = rng.choice(facts)
        texts.append(render([*words, *asked.sentence()[:7]]))
    return texts


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one per paragraph: blank lines separate them.

    Raises:
        ValueError: there is none.
    """
    texts = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n")]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"{path} holds no prompt; prompts are divided by blank lines")
    return texts


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; at a URL, the served name")
    parser.add_argument("--url", help="a running server, up to and with /v1")
    parser.add_argument("--head-profile", help="by default the one beside the weights")
    parser.add_argument("--prompts", type=Path, help="text file; generated by default")
    parser.add_argument("--num-prompts", type=int, default=8, help="to generate")
    parser.add_argument("--words", type=int, default=2000, help="of a generated prompt")
    parser.add_argument("--tokens", type=int, default=64, help="to decode after a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--prefill", choices=["exact", "windowed"], default="exact")
    parser.add_argument("--no-compensation", action="store_true")
    parser.add_argument("--logprobs", type=int, help="k most likely tokens; -1: all")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--engine-options", default="{}", help="JSON of further vLLM options")
    parser.add_argument("--output", type=Path, default=Path("fidelity.json"))
    args = parser.parse_args(argv)
    if args.model is None and args.url is None:
        parser.error("--model or --url is needed")
    if args.logprobs is None:
        args.logprobs = 5 if args.url else -1
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    texts = (
        read_prompts(args.prompts)
        if args.prompts
        else generated_prompts(args.num_prompts, args.words, args.seed)
    )
    results = run_server(args, texts) if args.url else run_engine(args, texts)
    options = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m benchmarks.fidelity {options}"
    text = json.dumps({"command": command, **results}, indent=1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(results["about"], indent=1))
    for row in results["by_position"]:
        print(
            f"{row['position']:>5}  KL {row['kl_mean']:.5f} (max {row['kl_max']:.5f})  "
            f"top-1 {row['top1_agreement']:.1%} of {row['positions']}"
        )
    print(f"all    KL {results['kl_mean']:.5f}  top-1 {results['top1_agreement']:.1%}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
