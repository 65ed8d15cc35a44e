"""The real locust against a small server whose every answer is known."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from servers import until

from benchmarks.load.run import Measured, run_load
from benchmarks.load.server import Server
from benchmarks.load.workload import Workload

METRICS = 'vllm:num_requests_running{engine="0"} 2.0\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'
PAUSE = 0.005


def asked(body: dict) -> str:
    """The text of a request, of its last turn where it is a chat."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


class Answers(BaseHTTPRequestHandler):
    """Streams as many tokens as asked for; counts what its clients do.

    stay_for: texts of requests whose stream stays open after its last token until the client
    goes. hold: requests after so many are answered `hold_seconds` after the first one, or later.
    """

    protocol_version = "HTTP/1.1"
    bodies: list[dict] = []
    left: list[str] = []
    stay_for: frozenset[str] = frozenset()
    hold: int | None = None
    hold_seconds = 0.0
    first = 0.0
    break_after: int | None = None
    die_after: int | None = None

    def log_message(self, *args) -> None:
        """Silent."""

    def do_GET(self) -> None:
        pages = {"/v1/models": json.dumps({"data": [{"id": "m"}]}), "/metrics": METRICS}
        self._send(200 if self.path in pages else 404, pages.get(self.path, "{}"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.bodies:
            type(self).first = time.monotonic()
        self.bodies.append(body)
        if self.hold is not None and len(self.bodies) > self.hold:
            time.sleep(max(self.first + self.hold_seconds - time.monotonic(), 0.0))
        if body["max_tokens"] > 1000:
            self._send(400, '{"error": {"message": "too many tokens"}}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(body)
        except OSError:
            self.left.append(asked(body))
            self.close_connection = True

    def _stream(self, body: dict) -> None:
        chat, count = "messages" in body, body["max_tokens"]
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for index in range(count):
            time.sleep(PAUSE)
            if index == self.die_after:
                raise OSError
            if index == self.break_after:
                self._event({"error": {"message": "broken"}})
                break
            reason = "length" if index == count - 1 else None
            part = {"delta": {"content": "w "}} if chat else {"text": "w "}
            self._event({"choices": [{**part, "finish_reason": reason}]})
        if asked(body) in self.stay_for:
            self.rfile.read(1)
            raise OSError("the client has gone")
        usage = {"prompt_tokens": 7, "completion_tokens": count}
        self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, data: dict) -> None:
        self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, type[Answers]]]:
    """A server of its own for each test, and the class that remembers what it was asked."""
    handler = type("Handler", (Answers,), {"bodies": [], "left": []})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield Server(f"http://127.0.0.1:{http.server_port}", "m", 0, tmp_path / "none.log"), handler
    http.shutdown()
    http.server_close()


BASE = Workload(
    sessions=10,
    users=3,
    prompt_tokens=(5, 9),
    output_tokens=(4, 6),
    turn_tokens=(2, 3),
    turns=(1, 3),
    prefix_tokens=3,
)


def load(server: Server, folder: Path, **changes) -> Measured:
    return run_load(server, replace(BASE, **changes), folder, "test", sample_seconds=0.05)


def test_every_request_of_the_workload_is_made_once(server, tmp_path: Path) -> None:
    """All sessions to their end; a chat's later turns carry what was said before."""
    url, handler = server
    measured = load(url, tmp_path)
    wanted = [(s.number, i) for s in BASE.draw() for i in range(len(s.turns))]
    assert [(r.session, r.turn) for r in measured.records] == wanted
    for record in measured.records:
        assert (record.outcome, record.error, record.status) == ("done", "", 200)
        assert record.output_tokens == record.asked_tokens
        assert len(record.gaps) == record.asked_tokens - 1
        assert record.prompt_tokens == 7
        # Each token came a pause after the one before.
        assert record.ttft >= PAUSE
        assert record.seconds >= PAUSE * record.asked_tokens
    chats = [body["messages"] for body in handler.bodies if "messages" in body]
    longest = max(chats, key=len)
    assert [m["role"] for m in longest] == ["user", "assistant"] * (len(longest) // 2) + ["user"]
    assert len(longest) > 1
    assert set(longest[1]["content"].split()) == {"w"}


def test_the_server_is_sampled_meanwhile(server, tmp_path: Path) -> None:
    measured = load(server[0], tmp_path)
    assert len(measured.samples) > 1
    assert {(s.running, s.kv_usage) for s in measured.samples} == {(2.0, 0.5)}
    assert [s.time for s in measured.samples] == sorted(s.time for s in measured.samples)


def test_cancelled_streams_are_closed_midway(server, tmp_path: Path) -> None:
    """The server sees its clients go; what they got until then is what was asked for.

    A stream that is to be left does not end by itself.
    """
    url, handler = server
    changes = {"cancel_share": 1.0, "cancel_seconds": 0.01, "output_tokens": (40, 60)}
    drawn = {s.number: s.turns[-1] for s in replace(BASE, **changes).draw()}
    handler.stay_for = frozenset(turn.text for turn in drawn.values())
    measured = load(url, tmp_path, **changes)
    left = [record for record in measured.records if record.outcome == "cancelled"]
    assert {record.session for record in left} == set(range(10))
    by_chunks = {n: turn.cancel_after for n, turn in drawn.items() if turn.cancel_after is not None}
    assert 0 < len(by_chunks) < 10
    got = {r.session: r.output_tokens for r in left if r.session in by_chunks}
    assert got == by_chunks
    assert all(record.output_tokens <= record.asked_tokens for record in left)
    # A client that leaves after some time may do so before the server has its request.
    until(lambda: {drawn[number].text for number in by_chunks} <= set(handler.left))


def test_refused_requests_are_no_errors(server, tmp_path: Path) -> None:
    """4xx to requests that had to be refused; nothing of a session follows."""
    measured = load(server[0], tmp_path, invalid_share=1.0)
    assert [(r.outcome, r.status, r.invalid) for r in measured.records] == [
        ("refused", 400, True)
    ] * 10
    assert "too many tokens" in measured.records[0].error


@pytest.mark.parametrize(
    ("trouble", "message"), [("break_after", "broken"), ("die_after", "HTTPParseError")]
)
def test_broken_streams_are_errors(server, tmp_path: Path, trouble: str, message: str) -> None:
    """An error in the stream, and a connection that ends in it."""
    url, handler = server
    setattr(handler, trouble, 2)
    measured = load(url, tmp_path, sessions=2, users=2, chat_share=1.0)
    assert {record.outcome for record in measured.records} == {"error"}
    assert all(message in record.error for record in measured.records)
    # Neither session goes on after its error.
    assert len(measured.records) == 2


def test_time_ends_a_run_without_end(server, tmp_path: Path) -> None:
    """`sessions` 0: no session begins after the seconds; those under way come to their end.

    After six quick requests the server answers none before the seconds are over, so that each
    user is in the middle of a session then.
    """
    url, handler = server
    seconds = 5.0

    handler.hold, handler.hold_seconds = 6, seconds
    measured = run_load(url, replace(BASE, sessions=0), tmp_path, "test", seconds=seconds)
    assert {record.outcome for record in measured.records} == {"done"}
    assert all(record.start < seconds for record in measured.records if record.turn == 0)
    assert any(r.start + r.seconds > seconds for r in measured.records)
    assert len({record.session for record in measured.records}) > BASE.users


def test_locust_counts_too(server, tmp_path: Path) -> None:
    """Locust's own statistics have a row a route and latency."""
    measured = load(server[0], tmp_path)
    (path,) = tmp_path.glob("locust*.json")
    rows = {(row["method"], row["name"]): row for row in json.loads(path.read_text())}
    for route in ("chat", "completions"):
        count = sum(record.route == route for record in measured.records)
        for name in ("end to end", "time to first token", "time per output token"):
            assert rows[route, name]["num_requests"] == count
            assert rows[route, name]["num_failures"] == 0


def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Not one request: said with locust's log."""
    nowhere = Server("http://127.0.0.1:9", "m", 0, tmp_path / "none.log")
    with pytest.raises(RuntimeError, match="locust ended|not one request"):
        load(nowhere, tmp_path)
