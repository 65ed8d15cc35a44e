"""Needle in a haystack: what each KV policy still finds, by length and depth.

    python -m benchmarks.needle --model MODEL [--head-profile PATH] [--output FOLDER]
    python -m benchmarks.needle --url http://localhost:8000/v1

Haystacks are prose of the needle language with facts ("The code of the amber door is
471 902 ."), and the model is asked for a code. Three kinds of trial:

    single   one fact in the haystack, one question
    multi    a fact at every depth of the grid, each asked for in its own request
    chat     the same, asked for one after the other in one chat, in random order; the
             model's own answers stay in it

An answer is right if its first digits are the code. All policies of a run get the same
haystacks. In an engine each policy is an engine of its own; at a URL there are the
server's own policy and, by the per-request opt-out, the full one.
"""

import argparse
import json
import random
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tqdm import tqdm

from benchmarks.heatmap import draw_heatmap
from benchmarks.served_model import Chat, EngineModel, ServedModel, ServerModel, open_engine
from models.needle.language import Fact, draw_facts, haystack, render
from razor_vllm.heads.profile import HeadProfile, locate_profile, read_profile

Kind = Literal["single", "multi", "chat"]
Heads = Literal["profile", "random", "none"]


class Policy(NamedTuple):
    """One column of the comparison.

    name: in results and file names. title: for people. options: of the razor config;
    None for stock vLLM. heads: which ones keep the whole context. request: policy that
    each request asks for.
    """

    name: str
    title: str
    options: dict[str, Any] | None
    heads: Heads = "profile"
    request: str = "razor"


POLICIES = (
    Policy("full", "full (stock vLLM)", None),
    Policy("razor", "razor, exact prefill", {}),
    Policy("razor-no-slot", "razor, exact prefill, no compensation", {"compensation": False}),
    Policy("razor-chat", "razor, chat prefill", {"prefill": "chat"}),
    Policy(
        "razor-chat-no-slot",
        "razor, chat prefill, no compensation",
        {"prefill": "chat", "compensation": False},
    ),
    Policy("razor-windowed", "razor, windowed prefill", {"prefill": "windowed"}),
    Policy(
        "razor-windowed-no-slot",
        "razor, windowed prefill, no compensation",
        {"prefill": "windowed", "compensation": False},
    ),
    Policy("random-heads", "as many random heads, exact prefill", {}, "random"),
    Policy(
        "no-heads",
        "no retrieval heads: sinks + window (StreamingLLM), exact prefill",
        {"compensation": False, "allow_no_retrieval_heads": True},
        "none",
    ),
    Policy(
        "no-heads-windowed",
        "no retrieval heads: sinks + window (StreamingLLM), windowed prefill",
        {"compensation": False, "allow_no_retrieval_heads": True, "prefill": "windowed"},
        "none",
    ),
)
SERVER_POLICIES = (
    Policy("full", "full (kv_policy of each request)", None, request="full"),
    Policy("server", "the server's own policy", None),
)


class Question(NamedTuple):
    """A fact to ask for, and its depth in the haystack, from 0 to 1."""

    fact: Fact
    depth: float


@dataclass(frozen=True)
class Trial:
    """A haystack and what is asked about it, turn by turn in one chat.

    kind, length: of the grid. text: the haystack. questions: in the order asked.
    """

    kind: Kind
    length: int
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answered:
    """How one question went. digits: which digits of the code were right."""

    kind: Kind
    length: int
    depth: float
    turn: int
    right: bool
    digits: tuple[bool, ...]


class Grid(NamedTuple):
    """What is tried: every length with every depth, `samples` times, for each kind."""

    kinds: tuple[Kind, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int


class Sizing(NamedTuple):
    """Words of haystack for a prompt of given tokens: (tokens - overhead) / per_word."""

    per_word: float
    overhead: float

    def num_words(self, num_tokens: int) -> int:
        return int((num_tokens - self.overhead) / self.per_word)


def measure_sizing(model: ServedModel) -> Sizing:
    """Fit `Sizing` to a model's tokenizer, by two prompts."""
    rng = random.Random(0)
    fact = draw_facts(rng, 1)[0]
    counts = []
    for num_words in (200, 1000):
        text = render(haystack(rng, [fact], num_words))
        counts.append(model.num_tokens([opening(text, fact)]))
    per_word = (counts[1] - counts[0]) / 800
    return Sizing(per_word, counts[0] - 200 * per_word)


def opening(text: str, fact: Fact) -> dict[str, str]:
    """First message of a chat: the haystack and the first question."""
    return {"role": "user", "content": f"{text} {render(fact.question())}"}


def draw_trials(grid: Grid, sizing: Sizing) -> list[Trial]:
    """All trials of a grid, the same for the same seed."""
    return [
        trial
        for kind in grid.kinds
        for length in grid.lengths
        for sample in range(grid.samples)
        for trial in _sample_trials(grid, kind, length, sample, sizing.num_words(length))
    ]


def _sample_trials(
    grid: Grid, kind: Kind, length: int, sample: int, num_words: int
) -> Iterator[Trial]:
    rng = random.Random(f"{grid.seed}/{kind}/{length}/{sample}")
    if kind == "single":
        for depth in grid.depths:
            facts = draw_facts(rng, 1)
            text = render(haystack(rng, facts, num_words, [depth]))
            yield Trial(kind, length, text, (Question(facts[0], depth),))
        return
    facts = draw_facts(rng, len(grid.depths))
    text = render(haystack(rng, facts, num_words, grid.depths))
    questions = [Question(*pair) for pair in zip(facts, grid.depths, strict=True)]
    if kind == "chat":
        rng.shuffle(questions)
        yield Trial(kind, length, text, tuple(questions))
        return
    for question in questions:
        yield Trial(kind, length, text, (question,))


def judge(trial: Trial, turn: int, reply: str) -> Answered:
    """Compare a reply's first digits with the code."""
    question = trial.questions[turn]
    said = re.findall(r"\d", reply)
    code = "".join(question.fact.code)
    said += [""] * len(code)
    digits = tuple(a == b for a, b in zip(said, code, strict=False))
    return Answered(trial.kind, trial.length, question.depth, turn, all(digits), digits)


def ask(
    model: ServedModel, trials: Sequence[Trial], max_tokens: int, policy: str, bar: tqdm
) -> list[Answered]:
    """Ask all questions of trials of one kind and length: a batch per turn."""
    chats: list[Chat] = [[opening(t.text, t.questions[0].fact)] for t in trials]
    answered = []
    for turn in range(len(trials[0].questions)):
        replies = model.reply(chats, max_tokens, policy, bar.update)
        for trial, chat, reply in zip(trials, chats, replies, strict=True):
            answered.append(judge(trial, turn, reply))
            chat.append({"role": "assistant", "content": reply.strip()})
            if turn + 1 < len(trial.questions):
                question = render(trial.questions[turn + 1].fact.question())
                chat.append({"role": "user", "content": question})
    return answered


def run_policy(
    model: ServedModel, policy: Policy, grid: Grid, trials: Sequence[Trial], max_tokens: int
) -> dict[str, Any]:
    """All trials under one policy: accuracy, KV bytes, and each cell of the grid."""
    answered: list[Answered] = []
    bytes_held: dict[str, dict[str, int]] = {}
    total = sum(len(trial.questions) for trial in trials)
    with tqdm(total=total, desc=policy.name, unit="question") as bar:
        for kind in grid.kinds:
            for length in grid.lengths:
                batch = [t for t in trials if (t.kind, t.length) == (kind, length)]
                bar.set_postfix(kind=kind, length=length)
                answered += ask(model, batch, max_tokens, policy.request, bar)
                if str(length) not in bytes_held:
                    chat = [opening(batch[0].text, batch[0].questions[0].fact)]
                    held = model.held_bytes(chat, max_tokens, policy.request)
                    if held is not None:
                        bytes_held[str(length)] = held._asdict()
    return {
        "title": policy.title,
        "accuracy": {kind: accuracies(answered, kind) for kind in grid.kinds},
        "kv_bytes": bytes_held,
        "cells": cells(answered),
    }


def accuracies(answered: Sequence[Answered], kind: Kind) -> dict[str, Any]:
    """Share of questions right, in all, by length, and by digit of the code."""
    chosen = [a for a in answered if a.kind == kind]
    lengths = sorted({a.length for a in chosen})
    return {
        "all": share([a.right for a in chosen]),
        "by_length": {str(n): share([a.right for a in chosen if a.length == n]) for n in lengths},
        "by_digit": [share(column) for column in zip(*(a.digits for a in chosen), strict=True)],
        "questions": len(chosen),
    }


def cells(answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """Questions and right answers of each kind, length and depth."""
    grouped: dict[tuple[Kind, int, float], list[bool]] = {}
    for a in answered:
        grouped.setdefault((a.kind, a.length, a.depth), []).append(a.right)
    return [
        {"kind": kind, "length": length, "depth": depth, "questions": len(r), "right": sum(r)}
        for (kind, length, depth), r in sorted(grouped.items())
    ]


def share(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)


def random_profile(profile: HeadProfile, seed: int) -> HeadProfile:
    """As many retrieval heads as a profile has, drawn over the whole model."""
    rng = random.Random(seed)
    drawn = rng.sample(range(profile.num_heads), profile.num_retrieval_heads)
    return with_heads(profile, drawn, f"{len(drawn)} random heads, seed {seed}")


def with_heads(profile: HeadProfile, heads: Sequence[int], method: str) -> HeadProfile:
    """A profile of the same model with other retrieval heads, counted through its layers."""
    per_layer = profile.num_kv_heads
    rows = tuple(
        tuple(sorted(h % per_layer for h in heads if h // per_layer == layer))
        for layer in range(profile.num_layers)
    )
    return HeadProfile(
        profile.num_layers, per_layer, profile.head_size, rows, made_by={"method": method}
    )


def profile_for(policy: Policy, profile: HeadProfile, seed: int) -> HeadProfile:
    """Heads that keep the whole context under a policy."""
    if policy.heads == "random":
        return random_profile(profile, seed)
    if policy.heads == "none":
        return with_heads(profile, [], "none")
    return profile


@contextmanager
def engine_for(
    policy: Policy, profile: HeadProfile, args: argparse.Namespace
) -> Iterator[EngineModel]:
    """An engine under one policy."""
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "max_model_len": args.max_model_len or max(args.lengths) + 512,
        "enforce_eager": args.enforce_eager,
        "completion": getattr(args, "completion", False),
        **json.loads(args.engine_options),
    }
    if policy.options is None:
        with open_engine(args.model, None, **options) as model:
            yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(profile.to_json(), encoding="utf-8")
        razor = {
            "head_profile": str(path),
            "window": args.window,
            "sinks": args.sinks,
            **policy.options,
        }
        with open_engine(args.model, razor, **options) as model:
            yield model


def expand(policies: Sequence[Policy], draws: int) -> Iterator[tuple[Policy, int]]:
    """Policies with a seed each; random heads are drawn several times."""
    for policy in policies:
        if policy.heads != "random":
            yield policy, 0
            continue
        for seed in range(draws):
            yield policy._replace(name=f"{policy.name}-{seed}"), seed


def run_engines(args: argparse.Namespace, grid: Grid) -> dict[str, Any]:
    """Every policy in an engine of its own."""
    path = locate_profile(args.head_profile, args.model)
    profile = read_profile(path)
    results: dict[str, Any] = {}
    about: dict[str, Any] = {}
    trials: list[Trial] = []
    for policy, seed in expand(chosen_policies(args), args.random_draws):
        heads = profile_for(policy, profile, seed)
        with engine_for(policy, heads, args) as model:
            about = about or model.describe()
            trials = trials or draw_trials(grid, measure_sizing(model))
            result = run_policy(model, policy, grid, trials, args.max_tokens)
        result["options"] = policy.options
        if policy.options is not None:
            result["retrieval_heads"] = heads.retrieval_heads
        results[policy.name] = result
    about |= {
        "head_profile": str(path),
        "profile_made_by": profile.made_by,
        "retrieval_heads": profile.retrieval_heads,
        "window": args.window,
        "sinks": args.sinks,
    }
    return {"about": about, "policies": results}


def run_server(args: argparse.Namespace, grid: Grid) -> dict[str, Any]:
    """A server's own policy and the opt-out."""
    model = ServerModel(args.url, args.model)
    trials = draw_trials(grid, measure_sizing(model))
    results = {
        policy.name: run_policy(model, policy, grid, trials, args.max_tokens)
        for policy in chosen_policies(args)
    }
    return {"about": model.describe(), "policies": results}


def chosen_policies(args: argparse.Namespace) -> list[Policy]:
    """Policies named on the command line; all if none is named.

    Raises:
        ValueError: an unknown name.
    """
    known = {policy.name: policy for policy in (SERVER_POLICIES if args.url else POLICIES)}
    names = args.policies or list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"policies are {', '.join(known)}; found {', '.join(unknown)}")
    return [known[name] for name in names]


def table(results: dict[str, Any]) -> str:
    """Accuracy of each policy at each length, and the KV bytes it held: Markdown."""
    lengths = [str(length) for length in results["grid"]["lengths"]]
    blocks = []
    for kind in results["grid"]["kinds"]:
        lines = ["| " + " | ".join([kind, *(f"{int(n):,}" for n in lengths)]) + " |"]
        lines.append("|---" * (1 + len(lengths)) + "|")
        for name, result in results["policies"].items():
            row = [table_cell(result, kind, n) for n in lengths]
            lines.append("| " + " | ".join([name, *row]) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def table_cell(result: dict[str, Any], kind: str, length: str) -> str:
    """One policy's accuracy, and KiB held in the last decode step where that is known."""
    share_right = f"{result['accuracy'][kind]['by_length'][length]:.1%}"
    held = result["kv_bytes"].get(length)
    return f"{share_right}, {held['decode'] / 1024:,.0f} KiB" if held else share_right


def write_results(results: dict[str, Any], folder: Path) -> None:
    """`needle.json`, and a heat-map for each policy and kind."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    (folder / "needle.json").write_text(text + "\n", encoding="utf-8")
    for name, result in results["policies"].items():
        draw_heatmap(result, results["grid"], results["about"], folder / f"{name}.png")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name; at a URL, the served name")
    parser.add_argument("--url", help="a running server, up to and with /v1")
    parser.add_argument("--head-profile", help="by default the one beside the weights")
    parser.add_argument("--output", type=Path, default=Path("needle-results"))
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=["single", "multi"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--depths", type=int, default=9, help="how many, evenly from 0 to 1")
    parser.add_argument("--samples", type=int, default=1, help="haystacks a cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", help="names; all by default")
    parser.add_argument("--random-draws", type=int, default=3, help="draws of random heads")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=16, help="of a reply")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--engine-options", default="{}", help="JSON of further vLLM options")
    args = parser.parse_args(argv)
    if args.model is None and args.url is None:
        parser.error("--model or --url is needed")
    if args.depths < 2:
        parser.error("--depths must be at least 2")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    depths = tuple(round(i / (args.depths - 1), 4) for i in range(args.depths))
    grid = Grid(tuple(args.kinds), tuple(args.lengths), depths, args.samples, args.seed)
    results = run_server(args, grid) if args.url else run_engines(args, grid)
    options = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m benchmarks.needle {options}"
    results = {"command": command, "grid": grid._asdict(), **results}
    write_results(results, args.output)
    print(json.dumps(results["about"], indent=1))
    print(table(results))
    print(f"wrote {args.output}/needle.json and {len(results['policies'])} heat-maps")


if __name__ == "__main__":
    main()
