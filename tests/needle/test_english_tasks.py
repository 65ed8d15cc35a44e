"""Tasks in English: what is drawn, how it is scored, how policies are compared."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.served_model import Chat, HeldBytes, ending, joined
from benchmarks.tasks import __main__ as tasks
from benchmarks.tasks import peers, report
from benchmarks.tasks.contexts import KINDS, Question, chat_of, draw_context, score
from benchmarks.tasks.pairs import compare
from benchmarks.tasks.prose import Filler
from razor_vllm.heads.profile import HeadProfile

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2"


def count_words(text: str) -> int:
    return len(text.split())


class Reader:
    """A model that finds the answer if it stands in the last `share` of the context."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.batches: list[int] = []

    def count_tokens(self, text: str) -> int:
        return count_words(text)

    def reply(
        self, chats: Sequence[Chat], max_tokens: int, policy: str, done: Callable[[], Any]
    ) -> list[str]:
        self.batches.append(len(chats))
        return [self._reply(chat) for chat in chats]

    def _reply(self, chat: Chat) -> str:
        context = chat[0]["content"].rsplit("\n\n", 1)[0]
        lead = chat[1]["content"].replace("mentioned in the text is", "is")
        lead = lead.replace("The special magic number for", "of the special magic numbers for")
        found = context.rfind(lead)
        if found < len(context) * (1 - self.share):
            return "I do not know."
        return context[found + len(lead) :][:40]

    def held_bytes(self, chat: Chat, max_tokens: int, policy: str) -> HeldBytes:
        return HeldBytes(4096, 2048)

    def describe(self) -> dict[str, Any]:
        return {"model": "fake", "vllm": "none"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [700, 1111])
def test_contexts_fill_their_length(kind: str, length: int) -> None:
    """The longest that fits: as many tokens as asked for, or hardly fewer, never more."""
    context = draw_context(kind, "0", length, Filler(), count_words)
    assert length - 40 <= count_words(context.text) <= length
    assert context == draw_context(kind, "0", length, Filler(), count_words)
    assert context != draw_context(kind, "1", length, Filler(), count_words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_holds_its_answers(kind: str) -> None:
    """Every expected answer can be read in the text, and a reply with all of them is right."""
    context = draw_context(kind, "0", 900, Filler(), count_words)
    for question in context.questions:
        assert all(answer in context.text for answer in question.answers)
        assert score(question, " and ".join(question.answers).upper()) == 1.0
        assert score(question, "I do not know.") == 0.0


@pytest.mark.parametrize("kind", ["needles", "lines"])
def test_a_fact_stands_once_and_at_its_depth(kind: str) -> None:
    """No answer can be found elsewhere, and depths cover the context."""
    context = draw_context(kind, "0", 900, Filler(), count_words)
    placed = [q for q in context.questions if q.depth is not None]
    for question in placed:
        lead = question.lead.replace(" mentioned in the text is:", " is:")
        lead = lead.replace("The special magic number for", "One of the special magic numbers for")
        assert context.text.count(lead) == 1
        at = context.text.index(lead) / len(context.text)
        assert at == pytest.approx(question.depth, abs=0.02)
    assert min(q.depth for q in placed) < 0.2
    assert max(q.depth for q in placed) > 0.8


def test_too_short_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a context of 50 tokens is too short"):
        draw_context("needles", "0", 50, Filler(), count_words)


def test_filler_is_a_users_text(tmp_path: Path) -> None:
    """Sentences follow each other as in the text; a short text is repeated; none is refused."""
    path = tmp_path / "text.txt"
    path.write_text("One is here.\nTwo are there! Are three\nmissing? Four.")
    taken = Filler(path).take(random.Random(0), 6)
    order = ["One is here.", "Two are there!", "Are three missing?", "Four."]
    first = order.index(taken[0])
    assert taken == [order[(first + i) % 4] for i in range(6)]
    path.write_text(" \n")
    with pytest.raises(ValueError, match="holds no sentence"):
        Filler(path)


def test_own_filler_has_no_digits() -> None:
    assert not any(c.isdigit() for s in Filler().take(random.Random(1), 500) for c in s)


@pytest.mark.parametrize(
    ("reply", "right"),
    [("12, 34", 1.0), ("the 34", 0.5), ("", 0.0), ("1 2 3 4", 0.0)],
)
def test_a_score_is_the_share_of_answers(reply: str, right: float) -> None:
    assert score(Question("t", None, "?", "A:", ("12", "34")), reply) == right


def run(folder: Path, name: str, model: Reader, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results of a fake model, as the command writes them."""
    from contextlib import nullcontext

    monkeypatch.setattr(tasks, "open_model", lambda args, length, profile: nullcontext(model))
    options = ["--model", "m", "--policy", "full", "--name", name, "--output", str(folder)]
    tasks.main([*options, "--kinds", "needles", "--lengths", "700", "900", "--contexts", "3"])
    return json.loads((folder / f"{name}.json").read_text())


def test_a_context_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first question goes alone and fills the prefix cache; all others share batches."""
    model = Reader()
    run(tmp_path, "full", model, monkeypatch)
    assert model.batches[::3] == [1] * 6
    assert sum(model.batches) == 6 * 30


def test_a_report_compares_in_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy that forgets the first half loses those facts, gains none, and the table says so."""
    pytest.importorskip("matplotlib")
    run(tmp_path, "full", Reader(), monkeypatch)
    half = run(tmp_path, "half", Reader(0.5), monkeypatch)
    capsys.readouterr()
    report.main([str(tmp_path), "--tasks", "single", "--pictures", str(tmp_path / "pictures")])
    printed = capsys.readouterr().out
    rows = [row for found in half["lengths"].values() for row in found["contexts"]]
    kept = [s for row in rows[:3] for task, _, s in row["questions"] if task == "single"]
    lost = len(kept) - int(sum(kept))
    assert 0 < lost < len(kept) == 72
    assert "| full | 2 KiB (100%) | 100.0% of 72 | 100.0% of 72 |" in printed
    assert f"| half vs full | 72 (3) | {lost} | 0 | {-100 * lost / 72:+.1f} (" in printed
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["full.png", "half.png"]


def test_an_interval_holds_what_contexts_vary() -> None:
    """Equal contexts: no width. One context that differs: the interval reaches to none lost."""
    base = {str(i): [1.0] * 10 for i in range(10)}
    same = compare(base, {name: [1.0] * 9 + [0.0] for name in base})
    assert (same.difference, same.low, same.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert (same.lost, same.gained, same.kept) == (10, 0, 0.9)
    one = compare(base, {name: [float(name != "3")] * 10 for name in base})
    assert one.difference == pytest.approx(-0.1)
    assert one.low < -0.2
    assert one.high == 0.0


def test_an_interval_covers_the_truth() -> None:
    """Of 200 draws of contexts with a true loss of a tenth, about 95 % are covered."""
    covered = 0
    for seed in range(200):
        rng = random.Random(seed)
        base = {str(i): [1.0] * 8 for i in range(20)}
        rates = {name: rng.choice([0.0, 0.2]) for name in base}
        other = {name: [float(rng.random() >= rates[name]) for _ in range(8)] for name in base}
        found = compare(base, other, seed)
        covered += found.low <= -0.1 <= found.high
    assert 175 <= covered <= 199


def test_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="only on the same questions"):
        compare({"a": [1.0, 0.0]}, {"b": [1.0, 0.0]})
    with pytest.raises(ValueError, match="only on the same questions"):
        compare({"a": [1.0, 0.0]}, {"a": [1.0]})


def test_a_chat_ends_in_the_begun_answer() -> None:
    """A template continues it; plain text ends in it."""
    context = draw_context("needles", "0", 900, Filler(), count_words)
    chat = chat_of(context, context.questions[0])
    assert ending(chat) == {"add_generation_prompt": False, "continue_final_message": True}
    assert ending(chat[:1]) == {"add_generation_prompt": True, "continue_final_message": False}
    assert joined(chat).endswith("What is the pass key?\nThe pass key is")


def test_a_question_in_a_later_turn() -> None:
    """The first turn has the text and no question, and is the same for all questions."""
    context = draw_context("needles", "0", 900, Filler(), count_words)
    chats = [chat_of(context, question, later=True) for question in context.questions]
    assert all(chat[:2] == chats[0][:2] for chat in chats)
    assert [message["role"] for message in chats[0]] == ["user", "assistant"] * 2
    for question, chat in zip(context.questions, chats, strict=True):
        assert context.text in chat[0]["content"]
        assert question.ask not in chat[0]["content"]
        assert (chat[2]["content"], chat[3]["content"]) == (question.ask, question.lead)


@pytest.mark.parametrize("keep", [0.3, 0.4, 0.9])
def test_peers_keep_equal_bytes(keep: float) -> None:
    """With the window found, retrieval and local heads together keep the share asked for."""
    profile = HeadProfile(2, 5, 8, ((0, 3), ()))
    window = peers.window_of(profile, keep, 4, 2000)
    assert (2 * 2000 + 8 * (4 + window)) / (10 * 2000) == pytest.approx(keep, abs=1e-3)
    with pytest.raises(ValueError, match="heads alone keep 0.20"):
        peers.window_of(profile, 0.2, 4, 2000)


class CharTokenizer:
    """A token a character."""

    def apply_chat_template(self, chat: Chat, **options: Any) -> list[int]:
        assert options["continue_final_message"]
        return [ord(c) for c in joined(chat)]


def test_peers_share_the_context_alone() -> None:
    """Context and question together are the prompt, and no question's own token is shared."""
    context = draw_context("needles", "0", 900, Filler(), count_words)
    model = object.__new__(peers.PressModel)
    model.tokenizer = CharTokenizer()
    shared, asked = model.split(context)
    for question, ids in zip(context.questions, asked, strict=True):
        assert "".join(map(chr, [*shared, *ids])) == joined(chat_of(context, question))
    assert len(shared) >= len(context.text)
    assert len({ids[0] for ids in asked}) > 1


@pytest.mark.parametrize(
    "folder",
    [*sorted(RESULTS.glob("needles-*")), RESULTS / "later-turns", RESULTS / "peers-2048"],
    ids=lambda path: path.name,
)
def test_tables_of_the_docs_are_the_results(folder: Path) -> None:
    """Each table of a committed folder is in the docs, and the pairs of which it has both."""
    policies = report.read(folder)
    pairs = [(f"{mode}-probe-30", f"{mode}-attribution-30") for mode in ("exact", "windowed")]
    pairs += [("exact-probe-10", "exact-attribution-10")]
    pairs += [("windowed", "chat"), ("windowed-fifth", "chat-fifth")]
    pairs += [("chat-fifth-no-slot", "chat-fifth")]
    known = [pair for pair in pairs if set(pair) <= set(policies)]
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    base = "full" if "full" in policies else "kvpress-none"
    tasks = report.tasks_of(policies[base])
    for table in report.tables(policies, tasks, base, known):
        assert table in text
