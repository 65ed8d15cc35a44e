"""Does a third kind of head pay? Kinds of heads at equal bytes, in transformers with masks.

    python -m benchmarks.head_kinds MODEL --text FILES --fit-text OTHERS --profile razor_heads.json

A study, not a server: every head attends what its kind would have kept, token by token, and
no memory is saved. Each variant keeps as many bytes as the first one, which has the two kinds of
RazorAttention: heads with everything, and heads with sinks, a window and the mean of the
rest. What the others change, and whose idea it is:

    no slot        the mean is left out                                 (StreamingLLM's heads)
    slot by head   left out of the heads that lose by it on other texts
    tiers          windows of three sizes by the heads' scores          (HeadKV, EMS)
    fewer full     half as many full heads, twice as many with wide windows
    punctuation    some heads keep punctuation as well as a window      (FastGen)
    state          a fitted low-rank state in the mean's place          (LESS)

Measured are questions about facts in a text, answered greedily (a teacher-forced answer whose
every token is the most likely one is the greedy answer), and nats a token of a text and of
the second copy of a repeated text. A variant is compared with the first one in pairs.
"""

import argparse
import json
import math
import platform
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from razor_vllm.heads.profile import read_profile

ATTENTION = "razor_kinds"
SINKS = 4
ROWS = 256
"""Queries attended at a time."""
HEADS_FITTED_ON = 2
"""Passages that states are fitted on, and that tell which heads lose by the mean."""
PAGE = 32
"""Tokens of a local page. Each page has sums of what lies before it, in fp32 where keys and values
are bf16: so a request can go on from any page that the prefix cache holds."""

FIRST, SECOND, WORDS = (
    words.split()
    for words in (
        "amber azure brittle copper crimson distant early frozen gentle golden hidden hollow",
        "anchor bridge cellar compass falcon garden harbor kettle ladder lantern meadow mirror",
        "barley candle dragon engine feather glacier hammer island jungle kitten lemon marble",
    )
)
TEMPLATES = (
    ("The code of the {key} is {value}.", "The code of the {key} is", "digits"),
    ("The {key} opens only with the word {value}.", "The {key} opens only with the word", "word"),
    ("Line {key}: the register holds {value}.", "Line {key}: the register holds", "digits"),
)
"""Sentence, the beginning of its answer, and what the answer is."""


VARIANTS = ("no slot", "slot by head", "tiers", "fewer full", "punctuation", "state")


class Kind(NamedTuple):
    """What a local KV head keeps beside its sinks.

    window: tokens, the newest one included. slot: the mean of what was dropped. marks: all
    punctuation. rank: of a fitted state, 0 for none.
    """

    window: int
    slot: bool = True
    marks: bool = False
    rank: int = 0

    def tokens(self, length: int, marks: int, head_dim: int) -> float:
        """Tokens' worth of keys and values, for a text of `length` tokens."""
        sums = 2 * self.slot + self.rank * (head_dim + 1) / head_dim
        kept = (SINKS + self.window) * (1 + sums / PAGE)
        return min(length, kept + self.marks * marks * max(1 - kept / length, 0))


Kinds = dict[tuple[int, int], Kind]
"""By layer and KV head; a head that is not named keeps everything."""


class Features(nn.Module):
    """Positive features of queries and keys, whose products stand for exp(q k)."""

    def __init__(self, head_dim: int, rank: int) -> None:
        super().__init__()
        self.query = nn.Linear(head_dim, rank)
        self.key = nn.Linear(head_dim, rank)

    def weights(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """`[rows, keys]` of queries `[rows, head_dim]` and keys `[keys, head_dim]`."""
        return self.query(query).clamp(max=15).exp() @ self.key(key).clamp(max=15).exp().transpose(
            -1, -2
        )


class KindsAttention:
    """transformers' attention function, every head by its kind.

    Attributes to set before a forward pass: kinds; compressed, the queries that see what is
    kept only, bool `[seq_len]`; marks, the punctuation, bool `[seq_len]`; record, called with
    each layer's query, key and value.
    """

    def __init__(self) -> None:
        self.kinds: Kinds = {}
        self.states: dict[tuple[int, int], Features] = {}
        self.compressed = torch.zeros(0, dtype=torch.bool)
        self.marks = torch.zeros(0, dtype=torch.bool)
        self.record: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query: `[1, num_heads, seq_len, head_dim]`; key, value: with KV heads."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        dtype = query.dtype
        query, key, value = query.float(), key.float(), value.float()
        if self.record is not None:
            self.record(layer, query[0], key[0], value[0])
        group = query.shape[1] // key.shape[1]
        local = [h for h in range(key.shape[1]) if (layer, h) in self.kinds]
        out = torch.empty_like(query)
        dense = [h for h in range(key.shape[1]) if h not in local or not self.compressed.all()]
        if dense:
            rows = [h * group + g for h in dense for g in range(group)]
            out[:, rows] = F.scaled_dot_product_attention(
                query[:, rows],
                key[:, dense],
                value[:, dense],
                is_causal=True,
                scale=scaling,
                enable_gqa=True,
            )
        for head in local:
            heads = slice(head * group, (head + 1) * group)
            for rows in self.compressed.nonzero()[:, 0].split(ROWS):
                out[0, heads, rows] = attend(
                    query[0, heads, rows] * scaling,
                    key[0, head],
                    value[0, head],
                    rows,
                    self.kinds[layer, head],
                    self.marks,
                    self.states.get((layer, head)),
                )
        return out.transpose(1, 2).to(dtype), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    kind: Kind,
    marks: torch.Tensor,
    state: Features | None,
) -> torch.Tensor:
    """Attention of one KV head's queries over what the head keeps.

    Args:
        query: `[group, rows, head_dim]`, scaled. key, value: `[seq_len, head_dim]`.
        rows: positions of the queries, ascending. marks: bool `[seq_len]`.
    """
    positions = torch.arange(int(rows[-1]) + 1)
    in_window = positions > rows[:, None] - kind.window
    kept = (in_window | (positions < SINKS)) & (positions <= rows[:, None])
    if kind.marks:
        kept |= marks[: len(positions)] & (positions <= rows[:, None])
    dropped = (positions <= rows[:, None]) & ~kept
    seen = kept.any(0).nonzero()[:, 0]
    logits = query @ key[seen].T
    logits.masked_fill_(~kept[:, seen], -math.inf)
    values = value[seen]
    count = dropped.sum(1)
    if kind.slot:
        share = dropped.to(key.dtype) / count.clamp(min=1)[:, None]
        mean_key, mean_value = share @ key[: len(positions)], share @ value[: len(positions)]
        slot = (query * mean_key).sum(-1) + count.log()
        weights = torch.cat([logits, slot[..., None]], -1).softmax(-1)
        return weights[..., :-1] @ values + weights[..., -1:] * mean_value
    if not kind.rank:
        return logits.softmax(-1) @ values
    assert state is not None, "a state is fitted before it is used"
    peak = logits.amax(-1, keepdim=True)
    near = (logits - peak).exp()
    far = state.weights(query, key[: len(positions)]) * dropped * (-peak).exp()
    total = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
    return (near @ values + far @ value[: len(positions)]) / total


class Passage(NamedTuple):
    """A text and where its answers are.

    tokens: int64 `[seq_len]`. answers: first and one past the last position of each. scored:
    positions whose loss counts where nothing is asked.
    """

    tokens: torch.Tensor
    answers: list[tuple[int, int]]
    scored: slice


class Result(NamedTuple):
    """right: for every question. losses: of every passage, in nats. scored: tokens in it."""

    right: list[bool]
    losses: list[float]
    scored: list[int]

    @property
    def nats(self) -> float:
        """A token."""
        return sum(self.losses) / sum(self.scored)


def prose(files: Sequence[Path]) -> str:
    """The files' text; of Markdown the paragraphs, without headings, tables and code."""
    parts = []
    for file in sorted(files):
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".md":
            parts.append(text)
            continue
        for paragraph in re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n\n"):
            if paragraph.lstrip().startswith(("|", "#", "    ", "![")):
                continue
            plain = re.sub(r"\s+", " ", re.sub(r"[`*]", "", paragraph)).strip()
            if len(plain) > 80:
                parts.append(plain.lstrip("- "))
    return "\n\n".join(parts)


def passages_of_facts(
    sentences: Sequence[str], tokenizer: Any, length: int, count: int, facts: int, seed: int
) -> Iterator[Passage]:
    """Texts with facts strewn in, and a question about each, answered, at the end."""
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        keys = rng.sample([f"{a} {b}" for a in FIRST for b in SECOND], facts)
        told = []
        for index, key in enumerate(keys):
            sentence, begin, sort = TEMPLATES[index % len(TEMPLATES)]
            value = str(rng.randrange(10000, 100000)) if sort == "digits" else rng.choice(WORDS)
            told.append((sentence.format(key=key, value=value), begin.format(key=key), value))
        questions: list[tuple[list[int], list[int]]] = [
            (
                tokenizer.encode(
                    f"\nQuestion: what was said of the {key}?\nAnswer: {begin}",
                    add_special_tokens=False,
                ),
                tokenizer.encode(f" {value}.", add_special_tokens=False),
            )
            for key, (_, begin, value) in zip(keys, told, strict=True)
        ]
        rng.shuffle(questions)
        room = length - sum(len(q) + len(a) for q, a in questions)
        parts = [sentence for sentence, _, _ in told]
        start = rng.randrange(len(sentences))
        used = sum(len(tokenizer.encode(" " + part, add_special_tokens=False)) for part in parts)
        filler: list[str] = []
        while True:
            sentence = sentences[(start + len(filler)) % len(sentences)]
            used += len(tokenizer.encode(" " + sentence, add_special_tokens=False))
            if used > room:
                break
            filler.append(sentence)
        places = sorted(rng.sample(range(len(filler)), facts), reverse=True)
        for place, part in zip(places, parts, strict=True):
            filler.insert(place, part)
        tokens = tokenizer.encode(" ".join(filler))
        answers = []
        for question, answer in questions:
            tokens += question
            answers.append((len(tokens), len(tokens) + len(answer)))
            tokens += answer
        yield Passage(torch.tensor(tokens), answers, slice(0, 0))


def passages_of_text(text: list[int], length: int, count: int, repeated: bool) -> Iterator[Passage]:
    """Consecutive texts, or the first halves of them twice; the second half is scored."""
    for number in range(count):
        tokens = torch.tensor(text[number * length : (number + 1) * length])
        if len(tokens) < length:
            raise ValueError(f"the text has {len(text)} tokens; needed are {count * length}")
        if repeated:
            tokens = tokens[: length // 2].repeat(2)
        yield Passage(tokens, [], slice(length // 2 + 1, length))


class Study:
    """A model whose heads can be changed in kind."""

    def __init__(self, path: str, exact: bool) -> None:
        self.attention = KindsAttention()
        AttentionInterface.register(ATTENTION, self.attention)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, attn_implementation=ATTENTION
        ).eval()
        self.exact = exact
        config = self.model.config
        self.head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.heads = [
            (layer, head)
            for layer in range(config.num_hidden_layers)
            for head in range(config.num_key_value_heads)
        ]
        words = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.is_mark = torch.tensor(
            [bool(w) and not any(c.isalnum() for c in w.lstrip("Ġ▁")) for w in words]
        )

    @torch.no_grad()
    def logits(self, passage: Passage) -> torch.Tensor:
        """Logits `[seq_len, vocabulary]` of a passage under the current kinds."""
        compressed = torch.ones(len(passage.tokens), dtype=torch.bool)
        if self.exact and passage.answers:
            compressed[:] = False
            for first, end in passage.answers:
                # The prompt's last token is attended densely and gives the answer's first one.
                compressed[first : end - 1] = True
        self.attention.compressed = compressed
        self.attention.marks = self.is_mark[passage.tokens]
        return self.model(passage.tokens[None]).logits[0].float()

    def measure(
        self, passages: Sequence[Passage], kinds: Kinds, done: Callable[[], object]
    ) -> Result:
        """Answers and losses under some kinds."""
        self.attention.kinds = kinds
        right: list[bool] = []
        losses, scored = [0.0] * len(passages), [0] * len(passages)
        for number, passage in enumerate(passages):
            logits = self.logits(passage)
            best = logits.argmax(-1)
            spans = passage.answers or [(passage.scored.start, passage.scored.stop)]
            for first, end in spans:
                target = passage.tokens[first:end]
                if passage.answers:
                    right.append(bool((best[first - 1 : end - 1] == target).all()))
                losses[number] += float(
                    F.cross_entropy(logits[first - 1 : end - 1], target, reduction="sum")
                )
                scored[number] += end - first
            done()
        return Result(right, losses, scored)

    def qkv(self, passage: Passage) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Queries, keys and values by layer, of the full model."""
        seen = {}

        def record(layer: int, *tensors: torch.Tensor) -> None:
            seen[layer] = tuple(t.clone() for t in tensors)

        self.attention.kinds, self.attention.record = {}, record
        self.logits(passage)
        self.attention.record = None
        return seen  # type: ignore[return-value]


def fit_states(study: Study, passages: Sequence[Passage], kinds: Kinds, steps: int) -> None:
    """Fit the features of every head that has a state to the full head's output."""
    seen = [study.qkv(passage) for passage in passages]
    lengths = [len(passage.tokens) for passage in passages]
    no_marks = torch.zeros(max(lengths), dtype=torch.bool)
    for (layer, head), kind in tqdm(kinds.items(), desc="fit", unit="head"):
        torch.manual_seed(0)
        state = Features(study.head_dim, kind.rank)
        optimiser = torch.optim.Adam(state.parameters(), lr=1e-2)
        for step in range(steps):
            query, key, value = seen[step % len(seen)][layer]
            group = query.shape[0] // key.shape[0]
            queries = query[head * group : (head + 1) * group]
            rows = torch.randperm(lengths[step % len(seen)])[:64].sort().values
            rows = rows[rows > kind.window + SINKS]
            scaled = queries[:, rows] * study.head_dim**-0.5
            wanted = attend(
                scaled, key[head], value[head], rows, Kind(10**9, False), no_marks, None
            )
            found = attend(scaled, key[head], value[head], rows, kind, no_marks, state)
            loss = F.mse_loss(found, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        study.attention.states[layer, head] = state.requires_grad_(False)


def heads_without_slot(study: Study, passages: Sequence[Passage], kinds: Kinds) -> Kinds:
    """Kinds with the mean left out of heads whose output it takes further from the full head's."""
    errors: dict[tuple[int, int], float] = dict.fromkeys(kinds, 0.0)
    for passage in passages:
        seen = study.qkv(passage)
        rows = torch.arange(len(passage.tokens) // 2, len(passage.tokens), 7)
        none = torch.zeros(len(passage.tokens), dtype=torch.bool)
        for (layer, head), kind in kinds.items():
            query, key, value = seen[layer]
            group = query.shape[0] // key.shape[0]
            scaled = query[head * group : (head + 1) * group, rows] * study.head_dim**-0.5
            full, on, off = (
                attend(scaled, key[head], value[head], rows, k, none, None)
                for k in (Kind(10**9, False), kind._replace(slot=True), kind._replace(slot=False))
            )
            errors[layer, head] += float((on - full).square().sum() - (off - full).square().sum())
    return {where: kind._replace(slot=errors[where] <= 0) for where, kind in kinds.items()}


def held(kinds: Kinds, study: Study, length: int, marks: int) -> float:
    """Share of the full cache that is kept of a text."""
    kept = sum(
        kinds[where].tokens(length, marks, study.head_dim) if where in kinds else length
        for where in study.heads
    )
    return kept / (len(study.heads) * length)


def equal_window(
    make: Callable[[int], Kinds], budget: float, study: Study, length: int, marks: int
) -> Kinds:
    """The kinds with the largest window that stay within a share of the cache."""
    low, high = 1, length
    while low < high:
        middle = (low + high + 1) // 2
        if held(make(middle), study, length, marks) <= budget + 1e-9:
            low = middle
        else:
            high = middle - 1
    return make(low)


def variants(
    study: Study,
    ranked: list[tuple[int, int]],
    keep: int,
    args: argparse.Namespace,
    marks: int,
    tuning: Sequence[Passage],
) -> dict[str, Kinds]:
    """Kinds by name, those asked for, all within the first one's bytes.

    ranked: heads, best first. marks: punctuation in a text, in tokens.
    """
    local = ranked[keep:]
    base: Kinds = {where: Kind(args.window) for where in local}
    budget = held(base, study, args.length, marks)

    def fill(make: Callable[[int], Kinds]) -> Kinds:
        return equal_window(make, budget, study, args.length, marks)

    def tiers(window: int) -> Kinds:
        third = len(local) // 3
        sizes = [window] * third + [window // 2] * third + [window // 8] * (len(local) - 2 * third)
        return {where: Kind(max(size, 16)) for where, size in zip(local, sizes, strict=True)}

    def fewer_full(window: int) -> Kinds:
        # Half as many heads with everything; the next ones get windows of eight times the rest's.
        wide = ranked[keep // 2 : 2 * keep]
        return {
            where: Kind(min(8 * window, args.length) if where in wide else window)
            for where in ranked[keep // 2 :]
        }

    def punctuation(window: int) -> Kinds:
        third = len(local) // 3
        return {where: Kind(window, marks=index < third) for index, where in enumerate(local)}

    def state(window: int) -> Kinds:
        return {where: Kind(window, slot=False, rank=args.rank) for where in local}

    def no_slot(window: int) -> Kinds:
        return {where: Kind(window, slot=False) for where in local}

    kinds = {"two kinds": base}
    for name in args.variants:
        if name == "slot by head":
            kinds[name] = heads_without_slot(study, tuning, base)
            continue
        made = {
            "no slot": no_slot,
            "tiers": tiers,
            "fewer full": fewer_full,
            "punctuation": punctuation,
            "state": state,
        }
        kinds[name] = fill(made[name])
        if name == "state":
            fit_states(study, tuning, kinds[name], args.steps)
    return kinds


def pairs(base: Sequence[Result], other: Sequence[Result], seed: int = 0) -> dict[str, Any]:
    """How two variants differ on the same passages, with 95 % intervals.

    The intervals are a bootstrap over passages, since what is asked of one is not independent.

    Args:
        base, other: of the questions, the plain texts and the repeated ones.

    Returns:
        gained, lost: questions that only the other, only the first one answers. interval: of the
        difference of shares. Of `answer`, `text` and `copy`, the interval of the difference in
        nats a token.
    """
    asked, told = base[0].right, other[0].right
    per_passage = len(asked) // len(base[0].losses)
    points = [
        sum(told[at : at + per_passage]) - sum(asked[at : at + per_passage])
        for at in range(0, len(asked), per_passage)
    ]
    return {
        "gained": sum(t and not a for a, t in zip(asked, told, strict=True)),
        "lost": sum(a and not t for a, t in zip(asked, told, strict=True)),
        "interval": interval(points, [per_passage] * len(points), seed),
        **{
            f"{name}_nats": interval(
                [o - b for b, o in zip(first.losses, second.losses, strict=True)],
                first.scored,
                seed,
            )
            for name, first, second in zip(("answer", "text", "copy"), base, other, strict=True)
        },
    }


def interval(differences: Sequence[float], counts: Sequence[int], seed: int) -> list[float]:
    """95 % of the mean difference, by a bootstrap over passages."""
    rng = random.Random(seed)
    means = sorted(
        sum(differences[i] for i in drawn) / sum(counts[i] for i in drawn)
        for drawn in (rng.choices(range(len(counts)), k=len(counts)) for _ in range(2000))
    )
    return [round(means[49], 4), round(means[1949], 4)]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All variants on the same passages."""
    study = Study(args.model, args.prefill == "exact")
    profile = read_profile(args.profile)
    ranked = rank(profile, args.scores)
    text = prose(args.text)
    sentences = [s.strip() + "." for s in text.replace("\n", " ").split(". ") if s.strip()]
    tokens = study.tokenizer.encode(text)
    facts = list(
        passages_of_facts(
            sentences, study.tokenizer, args.length, args.passages, args.facts, args.seed
        )
    )
    fitted_on = study.tokenizer.encode(prose(args.fit_text))
    tuning = list(passages_of_text(fitted_on, args.fit_length, HEADS_FITTED_ON, False))
    texts = list(passages_of_text(tokens, args.length, args.texts, False))
    copies = list(passages_of_text(tokens, args.length, args.texts, True))
    marks = int(sum(study.is_mark[p.tokens].sum() for p in facts) / len(facts))
    chosen = variants(study, ranked, args.keep, args, marks, tuning)
    rows: list[dict[str, Any]] = []
    baseline: list[Result] = []
    everything = {"full": {}, **chosen}
    with tqdm(total=len(everything) * (len(facts) + len(texts) + len(copies)), unit="pass") as bar:
        for name, kinds in everything.items():
            start = time.monotonic()
            answers = study.measure(facts, kinds, bar.update)
            plain = study.measure(texts, kinds, bar.update)
            second = study.measure(copies, kinds, bar.update)
            if name == "two kinds":
                baseline = [answers, plain, second]
            rows.append(
                {
                    "variant": name,
                    "kept": round(held(kinds, study, args.length, marks), 4),
                    "windows": sorted({kind.window for kind in kinds.values()}),
                    "slots": sum(kind.slot for kind in kinds.values()),
                    "right": sum(answers.right),
                    "questions": len(answers.right),
                    "answer_nats": round(answers.nats, 4),
                    "text_nats": round(plain.nats, 4),
                    "copy_nats": round(second.nats, 4),
                    "seconds": round(time.monotonic() - start, 1),
                }
            )
            if name not in ("full", "two kinds"):
                rows[-1]["against_two_kinds"] = pairs(baseline, [answers, plain, second])
            tqdm.write(json.dumps(rows[-1]))
    return {
        "device": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }


def rank(profile: Any, scores: str) -> list[tuple[int, int]]:
    """The model's KV heads by a profile's scores, best first; `a+b` sums two."""
    tables = [profile.scores[name] for name in scores.split("+")]
    total = {
        (layer, head): sum(table[layer][head] for table in tables)
        for layer in range(profile.num_layers)
        for head in range(profile.num_kv_heads)
    }
    return sorted(total, key=total.__getitem__, reverse=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model with plain attention")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="prose to strew facts into"
    )
    parser.add_argument(
        "--fit-text", type=Path, nargs="+", required=True, help="other prose, to fit states to"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--profile", type=Path, required=True, help="whose scores rank the heads")
    parser.add_argument("--scores", default="attribution", help="which of the profile's scores")
    parser.add_argument("--keep", type=int, default=23, help="heads that keep everything")
    parser.add_argument("--prefill", choices=["exact", "windowed"], default="windowed")
    parser.add_argument("--window", type=int, default=170)
    parser.add_argument("--length", type=int, default=2048, help="of a passage, in tokens")
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--facts", type=int, default=18, help="of a passage, each asked")
    parser.add_argument("--texts", type=int, default=4, help="plain and repeated texts, each")
    parser.add_argument("--rank", type=int, default=8, help="of the low-rank state")
    parser.add_argument("--steps", type=int, default=200, help="to fit a state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/head-kinds.json"))
    parser.add_argument("--fit-length", type=int, help="of what states are fitted on (--length)")
    args = parser.parse_args(argv)
    args.fit_length = args.fit_length or args.length
    command = (
        f"python -m benchmarks.head_kinds {shlex.join(sys.argv[1:] if argv is None else argv)}"
    )
    results = {"command": command, **run(args)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
