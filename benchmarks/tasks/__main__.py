"""Tasks in English for real models: what a KV policy loses, question by question.

    python -m benchmarks.tasks --model MODEL --policy full --lengths 2048 4096 --output FOLDER
    python -m benchmarks.tasks --model MODEL --policy windowed --window 0.2 --head-profile PATH \
      --lengths 2048 4096 --output FOLDER
    python -m benchmarks.tasks --url http://localhost:8000/v1 --policy full --output FOLDER
    python -m benchmarks.tasks.report FOLDER

One call runs one policy and writes one file, `FOLDER/NAME.json`; the report compares the
files of a folder in pairs, on the same questions. `contexts` says which tasks there are.
Contexts come from a seed, the filler and the model's tokenizer, so policies get the same.
An engine reads a context once: its other questions find it in the prefix cache.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import needle
from benchmarks.residency import device
from benchmarks.served_model import ServedModel, ServerModel
from benchmarks.tasks.contexts import KINDS, Context, Question, chat_of, draw_context, score
from benchmarks.tasks.prose import Filler
from razor_vllm.heads.profile import HeadProfile, locate_profile, read_profile

POLICIES = {
    "full": "full",
    "exact": "razor",
    "chat": "razor-chat",
    "windowed": "razor-windowed",
    "exact-no-slot": "razor-no-slot",
    "chat-no-slot": "razor-chat-no-slot",
    "windowed-no-slot": "razor-windowed-no-slot",
    "no-heads": "no-heads",
    "no-heads-windowed": "no-heads-windowed",
}
"""Names here, and those of `benchmarks.needle`."""


def draw(kind: str, length: int, index: int, args: argparse.Namespace, model: Any) -> Context:
    """Context `index` of a kind and length, the same under every policy."""
    filler = Filler(args.text)
    seed = f"{args.seed}/{kind}/{length}/{index}"
    return draw_context(kind, seed, length, filler, model.count_tokens)


def answer(
    model: ServedModel, context: Context, policy: str, later: bool = False
) -> tuple[list[str], dict[str, float]]:
    """Replies to a context's questions in order, and seconds: to read it, and to answer.

    The first question is asked alone and puts the context into the prefix cache.

    Args:
        later: see `chat_of`.
    """
    replies: dict[int, str] = {}
    begun = time.monotonic()
    first = context.questions[0]
    replies[0] = model.reply([chat_of(context, first, later)], first.max_tokens, policy, _nothing)[
        0
    ]
    read = time.monotonic()
    for max_tokens in sorted({q.max_tokens for q in context.questions}):
        rest = [i for i, q in enumerate(context.questions) if i > 0 and q.max_tokens == max_tokens]
        chats = [chat_of(context, context.questions[i], later) for i in rest]
        said = model.reply(chats, max_tokens, policy, _nothing)
        replies |= dict(zip(rest, said, strict=True))
    seconds = {"first": round(read - begun, 2), "rest": round(time.monotonic() - read, 2)}
    return [replies[i] for i in range(len(context.questions))], seconds


def _nothing() -> None:
    """No progress by the question: the bar counts contexts."""


def run_length(
    model: ServedModel, policy: str, length: int, args: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """All contexts of one length: scores by context, and the bytes that one request holds."""
    rows = []
    held = None
    for kind in args.kinds:
        for index in range(args.contexts):
            context = draw(kind, length, index, args, model)
            replies, seconds = answer(model, context, policy, args.later_turns)
            rows.append(row_of(kind, length, index, context, replies) | {"seconds": seconds})
            if held is None:
                chat = chat_of(context, context.questions[0], args.later_turns)
                held = model.held_bytes(chat, context.questions[0].max_tokens, policy)
            bar.set_postfix(length=length, kind=kind)
            bar.update()
            if args.show:
                show(context.questions, replies)
    return {"contexts": rows, "kv_bytes": held._asdict() if held else None}


def row_of(
    kind: str, length: int, index: int, context: Context, replies: Sequence[str]
) -> dict[str, Any]:
    """A context's results. text: a digest, by which the report sees that contexts agree."""
    pairs = zip(context.questions, replies, strict=True)
    return {
        "kind": kind,
        "length": length,
        "index": index,
        "text": hashlib.sha256(context.text.encode()).hexdigest()[:12],
        "questions": [[q.task, q.depth, round(score(q, reply), 4)] for q, reply in pairs],
    }


def show(questions: Sequence[Question], replies: Sequence[str]) -> None:
    """Print what was said, to see how a model takes a task."""
    for question, reply in zip(questions, replies, strict=True):
        right = score(question, reply)
        tqdm.write(f"{question.task} {right:.2f} {question.answers} | {question.lead} ->{reply!r}")


def open_model(
    args: argparse.Namespace, length: int, profile: HeadProfile | None
) -> AbstractContextManager[ServedModel]:
    """The server, or an engine of one length: a window may be a share of it."""
    if args.url:
        return nullcontext(ServerModel(args.url, args.model, completion=args.completion))
    policy = policy_of(args)
    window = round(args.window * length) if args.window < 1 else int(args.window)
    engine_args = argparse.Namespace(**{**vars(args), "window": window, "lengths": [length]})
    if profile is None:
        profile = HeadProfile(1, 1, 1, ((0,),))
    return needle.engine_for(policy, profile, engine_args)


def policy_of(args: argparse.Namespace) -> needle.Policy:
    name = POLICIES[args.policy]
    return next(policy for policy in needle.POLICIES if policy.name == name)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One policy over all lengths."""
    policy = None if args.url else policy_of(args)
    profile = None
    results: dict[str, Any] = {"about": {"device": device()}, "lengths": {}}
    if policy is not None and policy.options is not None:
        path = locate_profile(args.head_profile, args.model)
        profile = read_profile(path)
        profile = needle.profile_for(policy, profile, 0)
        results["about"] |= {
            "head_profile": str(path),
            "profile_made_by": profile.made_by,
            "retrieval_heads": profile.num_retrieval_heads,
            "heads": profile.num_heads,
        }
    request = "full" if args.policy == "full" else "razor"
    total = len(args.lengths) * len(args.kinds) * args.contexts
    with tqdm(total=total, desc=args.name, unit="context") as bar:
        for length in args.lengths:
            with open_model(args, length, profile) as model:
                results["about"] = model.describe() | results["about"]
                results["lengths"][str(length)] = run_length(model, request, length, args, bar)
    return results


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; at a URL, the served name")
    parser.add_argument("--url", help="a running server, up to and with /v1")
    parser.add_argument("--policy", choices=[*POLICIES, "server"], required=True)
    parser.add_argument("--name", help="of the results; the policy's by default")
    parser.add_argument("--head-profile", help="by default the one beside the weights")
    parser.add_argument("--window", type=float, default=0.2, help="tokens, or a share below 1")
    parser.add_argument("--sinks", type=int, default=4)
    parse_tasks(parser)
    parser.add_argument(
        "--later-turns", action="store_true", help="the text in the first turn, questions after it"
    )
    parser.add_argument("--completion", action="store_true", help="plain text, no chat template")
    parser.add_argument("--show", action="store_true", help="print every reply")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--engine-options", default="{}", help="JSON of further vLLM options")
    args = parser.parse_args(argv)
    if args.model is None and args.url is None:
        parser.error("--model or --url is needed")
    if args.policy not in (("full", "server") if args.url else POLICIES):
        parser.error("a server runs --policy full or server, an engine every policy but server")
    args.name = args.name or args.policy
    return args


def parse_tasks(parser: argparse.ArgumentParser) -> None:
    """Options that say which questions there are, and where results go."""
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["needles"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--contexts", type=int, default=8, help="of each kind and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="English prose; our own sentences by default")
    parser.add_argument("--output", type=Path, default=Path("build/tasks"))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    options = shlex.join(sys.argv[1:] if argv is None else argv)
    results = {
        "command": f"python -m benchmarks.tasks {options}",
        "policy": args.policy,
        "window": args.window,
        "sinks": args.sinks,
        "text": str(args.text) if args.text else None,
        "completion": args.completion,
        **run(args),
    }
    write(results, args.output / f"{args.name}.json")


def write(results: dict[str, Any], path: Path) -> None:
    """JSON with a line for each context."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    for found in results["lengths"].values():
        for row in found["contexts"]:
            long = json.dumps(row, indent=1)
            text = text.replace("\n".join(_indented(long)), json.dumps(row))
    path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _indented(block: str) -> list[str]:
    first, *rest = block.splitlines()
    return [first, *("    " + line for line in rest)]


if __name__ == "__main__":
    main()
