"""How many drafted tokens a compressed target accepts, beside an uncompressed one.

    python -m benchmarks.acceptance --model MODEL --prefill exact \
      --drafts '{"method": "ngram", "prompt_lookup_max": 4}' [--output FILE]

Two kinds of chat, `--samples` of each: an *open* question about a long text, and a text that is
*repeated* word for word, of which the answer has begun. Text and question are turns of their own,
so `--prefill chat` compresses from the question on. Both policies answer greedily in one engine,
the full policy by the per-request opt-out; figures are vLLM's own metrics of speculative decoding,
read after each answer.

The model itself as its own draft (`{"method": "draft_model", "model": MODEL}`) is never
compressed: under full it is a perfect draft, and what it loses under razor is where a compressed
target's tokens differ from those of the uncompressed model.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.residency import device
from benchmarks.served_model import Chat, EngineModel, open_engine
from benchmarks.tasks.contexts import Question, chat_of, draw_context
from benchmarks.tasks.pairs import compare
from benchmarks.tasks.prose import Filler
from razor_vllm.heads.profile import locate_profile, read_profile

POLICIES = ("full", "razor")
_PREFIX = "vllm:spec_decode_num_"
_OPEN = Question("open", None, "What is this text about? Answer in one long paragraph.", "", ())
_BEGUN = 0.5
"""Share of a text that has been repeated where the answer goes on."""


class Drafts(NamedTuple):
    """vLLM's counters: drafts, their tokens, those accepted, and those accepted by position."""

    drafts: int
    tokens: int
    accepted: int
    by_position: tuple[int, ...]

    def less(self, other: "Drafts") -> "Drafts":
        pairs = zip(self.by_position, other.by_position, strict=True)
        return Drafts(
            self.drafts - other.drafts,
            self.tokens - other.tokens,
            self.accepted - other.accepted,
            tuple(mine - theirs for mine, theirs in pairs),
        )


def counted(model: EngineModel) -> Drafts:
    """The engine's counters so far.

    Raises:
        KeyError: it does not draft.
    """
    found: dict[str, Any] = {metric.name: metric for metric in model.llm.get_metrics()}
    drafts, tokens, accepted = (
        found[_PREFIX + name].value for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    by_position = found[f"{_PREFIX}accepted_tokens_per_pos"].values
    return Drafts(drafts, tokens, accepted, tuple(by_position))


def chats(model: EngineModel, args: argparse.Namespace) -> dict[str, list[Chat]]:
    """Kind to chats of about `--length` tokens."""
    filler = Filler(args.text)
    made: dict[str, list[Chat]] = {"open": [], "repeated": []}
    for index in range(args.samples):
        seed = f"{args.seed}/acceptance/{index}"
        text = draw_context("needles", seed, args.length, filler, model.count_tokens)
        made["open"].append(chat_of(text, _OPEN, later=True)[:-1])
        once = round(args.length / (1 + _BEGUN))
        text = draw_context("needles", seed, once, filler, model.count_tokens)
        words = text.text.split(" ")
        begun = " ".join(words[: round(_BEGUN * len(words))])
        ask = Question("repeated", None, "Repeat the text word for word.", begun, ())
        made["repeated"].append(chat_of(text, ask, later=True))
    return made


def answered(
    model: EngineModel, kinds: dict[str, list[Chat]], args: argparse.Namespace
) -> dict[str, dict[str, list[Drafts]]]:
    """Kind to policy to what was drafted for each chat, one chat at a time."""
    found: dict[str, dict[str, list[Drafts]]] = {
        kind: {policy: [] for policy in POLICIES} for kind in kinds
    }
    total = len(POLICIES) * sum(map(len, kinds.values()))
    with tqdm(total=total, desc="acceptance", unit="answer") as bar:
        for kind, asked in kinds.items():
            for chat in asked:
                for policy in POLICIES:
                    before = counted(model)
                    reply = model.reply([chat], args.tokens, policy, bar.update)
                    found[kind][policy].append(counted(model).less(before))
                    if args.show:
                        tqdm.write(f"{kind}, {policy}: {reply[0]!r} {found[kind][policy][-1]}")
    return found


def summary(drafted: dict[str, list[Drafts]]) -> dict[str, Any]:
    """Figures of both policies, and the difference of shares with its 95 % interval over chats."""
    rows: dict[str, Any] = {}
    shares = {}
    for policy, chats in drafted.items():
        drafts, tokens, accepted = (
            sum(getattr(chat, name) for chat in chats) for name in ("drafts", "tokens", "accepted")
        )
        by_position = [sum(column) for column in zip(*(c.by_position for c in chats), strict=True)]
        rows[policy] = {
            "drafts": drafts,
            "tokens": tokens,
            "accepted": accepted,
            "by_position": by_position,
            "share": round(accepted / max(tokens, 1), 4),
            "tokens_a_step": round(1 + accepted / max(drafts, 1), 3),
        }
        shares[policy] = {str(i): [c.accepted / max(c.tokens, 1)] for i, c in enumerate(chats)}
    pair = compare(shares["full"], shares["razor"])
    rows["difference"] = round(pair.difference, 4)
    rows["interval"] = [round(pair.low, 4), round(pair.high, 4)]
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One engine, both policies."""
    path = locate_profile(args.head_profile, args.model)
    profile = read_profile(path)
    window = round(args.window * args.length) if args.window < 1 else int(args.window)
    razor = {
        "head_profile": str(path),
        "window": window,
        "sinks": args.sinks,
        "prefill": args.prefill,
    }
    drafts = {"num_speculative_tokens": 3, **json.loads(args.drafts)}
    options = {
        "dtype": args.dtype,
        "max_model_len": args.length + args.tokens + 256,
        "speculative_config": drafts,
        "disable_log_stats": False,
        "enforce_eager": args.enforce_eager,
        **json.loads(args.engine_options),
    }
    with open_engine(args.model, razor, **options) as model:
        found = answered(model, chats(model, args), args)
        about = model.describe()
    about |= {
        "device": device(),
        "razor": razor,
        "drafts": drafts,
        "retrieval_heads": profile.num_retrieval_heads,
        "heads": profile.num_heads,
        "profile_made_by": profile.made_by,
    }
    return {"about": about, "kinds": {kind: summary(rows) for kind, rows in found.items()}}


def table(kinds: dict[str, Any]) -> str:
    """A row for each kind of chat: Markdown."""
    lines = [
        "| share accepted (tokens a step) | full | razor | difference (95 %) |",
        "|---|---|---|---|",
    ]
    for kind, row in kinds.items():
        cells = [f"{row[p]['share']:.1%} ({row[p]['tokens_a_step']:.2f})" for p in POLICIES]
        low, high = row["interval"]
        lines.append(
            f"| {kind} | {' | '.join(cells)} | {row['difference']:+.1%} ({low:+.1%}, {high:+.1%}) |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafts", required=True, help="JSON of vLLM's --speculative-config")
    parser.add_argument("--head-profile", help="by default the one beside the weights")
    parser.add_argument("--prefill", choices=["exact", "chat", "windowed"], default="exact")
    parser.add_argument("--window", type=float, default=0.2, help="tokens, or a share below 1")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a chat")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--samples", type=int, default=6, help="chats of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="English prose; our own sentences by default")
    parser.add_argument("--show", action="store_true", help="print every answer")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--engine-options", default="{}", help="JSON of further vLLM options")
    parser.add_argument("--output", type=Path, default=Path("build/acceptance.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    options = shlex.join(sys.argv[1:] if argv is None else argv)
    results = {"command": f"python -m benchmarks.acceptance {options}", **run(args)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results["kinds"]))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
