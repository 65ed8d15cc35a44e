"""What clients send: conversations drawn from a seed, the same for every server.

A workload is a list of sessions. A session is one prompt to `/v1/completions`, or a chat
of some turns; a user takes the next session of the list once its last one is over, so
which sessions are asked for, and what they say, depends on the seed alone.

Prompts are prose of the needle language; their lengths are in tokens.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from models.needle.language import draw_prose, render

Route = Literal["chat", "completions"]
Range = tuple[int, int]

PATHS: dict[Route, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_TOO_MANY = 1 << 30
"""More tokens than any model has positions."""


class Turn(NamedTuple):
    """One request of a session.

    text: the prompt, or what the user says next. max_tokens: of the reply; the end token
    does not end it. cancel_after: the client closes the stream after so many chunks;
    cancel_seconds: after so many seconds, whatever has come. None where it does not.
    """

    text: str
    max_tokens: int
    cancel_after: int | None = None
    cancel_seconds: float | None = None

    @property
    def cancels(self) -> bool:
        return self.cancel_after is not None or self.cancel_seconds is not None


class Session(NamedTuple):
    """What one user asks, turn by turn.

    invalid: the server must refuse it (4xx). full: it opts out of the razor policy.
    """

    number: int
    route: Route
    turns: tuple[Turn, ...]
    invalid: bool = False
    full: bool = False


@dataclass(frozen=True)
class Workload:
    """How sessions are drawn; ranges are inclusive, shares are of the sessions.

    Raises:
        ValueError: a value outside what is accepted.
    """

    seed: int = 0
    sessions: int = 60
    """Sessions in all; 0 for as many as the time allows."""
    users: int = 12
    """Sessions under way at one time."""
    prompt_tokens: Range = (3072, 5120)
    """Of a first prompt, shared prefix included."""
    output_tokens: Range = (192, 384)
    turn_tokens: Range = (64, 256)
    """What each later turn of a chat adds."""
    turns: Range = (1, 3)
    """Of a chat."""
    chat_share: float = 0.5
    prefix_share: float = 0.25
    """Sessions that begin with one of the shared prefixes."""
    prefixes: int = 2
    prefix_tokens: int = 1024
    cancel_share: float = 0.0
    """Sessions whose client leaves in one of their turns: half of them after some chunks,
    half after some time, which may be before the first token."""
    cancel_seconds: float = 2.0
    """Longest of these times."""
    invalid_share: float = 0.0
    """Sessions that ask for more tokens than the model has positions."""
    full_share: float = 0.0
    """Sessions that opt out of the razor policy (`kv_policy` full); 0 for other servers."""
    words_per_token: float = 1.0
    """Words of the prose that make one token of the served model."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens", "turn_tokens", "turns"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} is {low} {high}; accepted is a range from 1 up")
        for name in ("chat_share", "prefix_share", "cancel_share", "invalid_share", "full_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted are 0 to 1")
        for name, least in (("users", 1), ("sessions", 0), ("prefixes", 1), ("prefix_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted are {least} and more")
        if self.words_per_token <= 0:
            raise ValueError(f"words_per_token is {self.words_per_token}; accepted are above 0")

    @property
    def most_tokens(self) -> int:
        """Positions that the longest session can need, chat marks included."""
        turns = self.turns[1] if self.chat_share else 1
        said = self.prompt_tokens[1] + (turns - 1) * self.turn_tokens[1]
        return said + turns * (self.output_tokens[1] + 16)

    def draw(self) -> Iterator[Session]:
        """The sessions, in order; without end where `sessions` is 0."""
        prefixes = [self._prose(self._rng("prefix", i), self.prefix_tokens) for i in self._prefixes]
        drawn = (self._session(index, prefixes) for index in count())
        return islice(drawn, self.sessions) if self.sessions else drawn

    @property
    def _prefixes(self) -> range:
        return range(self.prefixes)

    def _rng(self, *place: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *place))))

    def _prose(self, rng: random.Random, num_tokens: int) -> list[str]:
        words = draw_prose(rng, round(num_tokens * self.words_per_token))
        return [word for sentence in words for word in sentence]

    def _session(self, index: int, prefixes: list[list[str]]) -> Session:
        rng = self._rng("session", index)
        route: Route = "chat" if rng.random() < self.chat_share else "completions"
        num_turns = rng.randint(*self.turns) if route == "chat" else 1
        # A session ends with the request that its client leaves, or that is refused.
        cancelled = rng.random() < self.cancel_share
        invalid = rng.random() < self.invalid_share
        last = rng.randrange(num_turns) if cancelled else num_turns - 1
        prefix = rng.choice(prefixes) if rng.random() < self.prefix_share else []
        turns = []
        for turn in range(1 if invalid else last + 1):
            length = rng.randint(*(self.turn_tokens if turn else self.prompt_tokens))
            opening = [] if turn else prefix[: round(length * self.words_per_token)]
            own = max(length - round(len(opening) / self.words_per_token), 1)
            text = render([*opening, *self._prose(rng, own)])
            turns.append(self._turn(rng, text, cancelled and turn == last))
        full = rng.random() < self.full_share
        return Session(index, route, tuple(turns), invalid, full)

    def _turn(self, rng: random.Random, text: str, cancelled: bool) -> Turn:
        max_tokens = rng.randint(*self.output_tokens)
        if not cancelled:
            return Turn(text, max_tokens)
        if rng.random() < 0.5:
            return Turn(text, max_tokens, cancel_after=rng.randint(1, max_tokens))
        return Turn(text, max_tokens, cancel_seconds=rng.random() * self.cancel_seconds)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_workload(path: Path) -> Workload:
    """A workload as `to_json` writes it.

    Raises:
        ValueError: not such a file, an unknown field, or a value not accepted.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read workload {path}: {error}") from error
    known = [field.name for field in fields(Workload)]
    if not isinstance(values, dict) or values.keys() - set(known):
        raise ValueError(f"workload {path}: accepted is an object with keys of {', '.join(known)}")
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Workload(**kept)


def request_body(
    model: str, session: Session, said: list[dict[str, str]], turn: Turn
) -> dict[str, Any]:
    """Body of a streaming request.

    Args:
        said: the chat so far, with the turn's own text as the last message.
    """
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": _TOO_MANY if session.invalid else turn.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if session.route == "chat":
        body["messages"] = said
    else:
        body["prompt"] = said[-1]["content"]
    if session.full:
        body["vllm_xargs"] = {"kv_policy": "full"}
    return body
