"""One streamed reply, as its client sees it: what arrived, and when.

    sent .... first token . token . token . ... . last token   [usage, DONE]
    |  ttft  |  gap  |  gap |                     |
    |                 seconds                     |

A gap (inter-token latency) is the time between two chunks with a choice, as
`vllm bench serve` counts it; a chat's opening chunk that only names the role is none.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.load.workload import Route

Outcome = Literal["done", "cancelled", "refused", "error", "cut"]
"""done: came to its end. cancelled: by the client, as the workload says. refused: 4xx.
error: any other end. cut: by the end of the run."""

_DONE = b"[DONE]"
_SHOWN_ERROR = 500


@dataclass
class Record:
    """One request. Times are seconds; `start` counts from the start of the run.

    invalid: the server had to refuse it. status: of HTTP; 0 without an answer.
    output_tokens: by the server's count; of a stream that was not read to its end, the
    chunks that came. cached_tokens: of the prompt, where the server tells.
    """

    session: int
    turn: int
    route: Route
    start: float
    asked_tokens: int
    invalid: bool = False
    status: int = 0
    outcome: Outcome = "cut"
    error: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """One line, times to the tenth of a millisecond."""
        values = asdict(self)
        values["gaps"] = [round(gap, 5) for gap in self.gaps]
        for name in ("start", "ttft", "seconds"):
            values[name] = values[name] if values[name] is None else round(values[name], 4)
        return json.dumps(values)

    @property
    def chunk_times(self) -> list[float]:
        """When each chunk with a token came, in seconds of the run."""
        if self.ttft is None:
            return []
        times = [self.start + self.ttft]
        for gap in self.gaps:
            times.append(times[-1] + gap)
        return times


class StreamReader:
    """Takes the server-sent events of one reply and writes into its record.

    Args:
        clock: seconds; called once a chunk.
    """

    def __init__(self, record: Record, clock: Callable[[], float]) -> None:
        self.record = record
        self.text: list[str] = []
        self.chunks = 0
        self.ended = False
        self._finish_reason: str | None = None
        self._counted = False
        self._clock = clock
        self._begin = self._last = clock()

    def take(self, event: bytes) -> None:
        """One event, including its blank line; comments are skipped."""
        for line in event.splitlines():
            if not line.startswith(b"data:"):
                continue
            data = line[len(b"data:") :].strip()
            if data == _DONE:
                self.ended = True
            else:
                self._take_object(json.loads(data))

    def finish(self, outcome: Outcome | None = None, error: str = "") -> Record:
        """Close the record; without an outcome, judge how the stream ended."""
        record = self.record
        record.seconds = (self._last if self.chunks else self._clock()) - self._begin
        if not self._counted:
            record.output_tokens = self.chunks
        error = error or record.error or ("" if outcome else self._judge())
        record.error = error[:_SHOWN_ERROR]
        record.outcome = outcome or ("error" if error else "done")
        return record

    def _judge(self) -> str:
        """What is wrong with a stream that was read to its end; empty where nothing is."""
        record = self.record
        if not self.ended:
            return "the stream ended without [DONE]"
        if self._finish_reason != "length" or record.output_tokens != record.asked_tokens:
            return (
                f"{record.output_tokens} of {record.asked_tokens} tokens came, "
                f"finish reason {self._finish_reason}"
            )
        return ""

    def _take_object(self, data: dict[str, Any]) -> None:
        if "error" in data:
            self.record.error = f"in the stream: {json.dumps(data['error'])}"
        for choice in data.get("choices", ()):
            self._take_choice(choice)
        if usage := data.get("usage"):
            self._counted = True
            self.record.output_tokens = usage["completion_tokens"]
            self.record.prompt_tokens = usage["prompt_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            self.record.cached_tokens = details.get("cached_tokens")

    def _take_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta", {})
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        text = delta.get("content") if "delta" in choice else choice.get("text")
        if "role" in delta and not text:
            return
        now = self._clock()
        if self.record.ttft is None:
            self.record.ttft = now - self._begin
        else:
            self.record.gaps.append(now - self._last)
        self._last = now
        self.chunks += 1
        self.text.append(text or "")
