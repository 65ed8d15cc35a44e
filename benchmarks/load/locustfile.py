"""Locust users for the OpenAI streaming routes of a language model's server.

    locust -f benchmarks/load/locustfile.py --headless --host http://localhost:8000 \
      [--workload FILE] [--output FOLDER] [--users N]

Each user takes sessions of the workload, one after the other, and reads the replies as
they stream. Locust's own statistics get, for each route,

    type          name                      response time
    chat          end to end                to the last token
    chat          time to first token
    chat          time per output token     mean of the gaps between tokens

with the output tokens as the response length; cancelled and refused requests have their
own rows. Every request also fires the event `generated` with its `Record`. The folder
gets `records.jsonl` (a line per request) and `samples.jsonl` (the server's memory).
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError
from locust import User, events, task
from locust.env import Environment
from locust.event import EventHook
from locust.exception import StopTest, StopUser
from locust.runners import LocalRunner
from tqdm import tqdm

from benchmarks.load.sampler import Sampler
from benchmarks.load.streaming import Record, StreamReader
from benchmarks.load.workload import (
    PATHS,
    Session,
    Turn,
    Workload,
    read_workload,
    request_body,
)

logger = logging.getLogger(__name__)

PATIENCE = 900.0
"""Seconds without a byte after which a request counts as failed."""

ERROR_PAUSE = 1.0
"""Seconds that a user waits after an error: a dead server would get requests by the thousand."""

generated = EventHook()
"""Fired once per request, with its `record`."""


class Feed:
    """Hands out sessions until they, or the time, run out.

    Args:
        clock: seconds of the run. seconds: after which no session begins; None for all.
    """

    def __init__(
        self, sessions: Iterator[Session], clock: Callable[[], float], seconds: float | None
    ) -> None:
        self._sessions = sessions
        self._clock = clock
        self._seconds = seconds
        self.under_way = 0

    def take(self) -> Session | None:
        """The next session, which then counts as running."""
        if self._seconds is not None and self._clock() >= self._seconds:
            return None
        session = next(self._sessions, None)
        self.under_way += session is not None
        return session

    def over(self) -> None:
        """Note that a session is over."""
        self.under_way -= 1


class Run(NamedTuple):
    """What the users of one run share. start: `time.perf_counter()` at its zero."""

    feed: Feed
    model: str
    start: float
    headers: dict[str, str]

    def clock(self) -> float:
        return time.perf_counter() - self.start


class StreamingUser(User):
    """Runs one session after the other, and notes when tokens arrive."""

    shared: Run

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.http = http_client(environment.host or "")

    def on_stop(self) -> None:
        self.http.close()

    @task
    def session(self) -> None:
        """The next session of the workload; the run ends with the last one."""
        session = self.shared.feed.take()
        if session is None:
            if self.shared.feed.under_way == 0:
                # In a greenlet of its own: quitting ends this one.
                gevent.spawn(self.environment.runner.quit)
            raise StopUser
        try:
            self.talk(session)
        finally:
            self.shared.feed.over()

    def talk(self, session: Session) -> None:
        """A session's requests, until one of them does not finish."""
        said: list[dict[str, str]] = []
        for index, turn in enumerate(session.turns):
            said.append({"role": "user", "content": turn.text})
            reply = self.ask(session, index, turn, said)
            if reply is None:
                return
            said.append({"role": "assistant", "content": reply})

    def ask(
        self, session: Session, index: int, turn: Turn, said: list[dict[str, str]]
    ) -> str | None:
        """One request; its text, or None if the session cannot continue."""
        run = self.shared
        body = request_body(run.model, session, said, turn)
        record = Record(
            session.number, index, session.route, run.clock(), turn.max_tokens, session.invalid
        )
        reader = StreamReader(record, time.perf_counter)
        try:
            self.read(json.dumps(body), turn, reader)
        except gevent.GreenletExit:
            reader.finish("cut")
            raise
        finally:
            report(self.environment, record)
        if record.outcome == "error":
            gevent.sleep(ERROR_PAUSE)
        return "".join(reader.text).strip() if record.outcome == "done" else None

    def read(self, body: str, turn: Turn, reader: StreamReader) -> None:
        """Send a request, and read until the stream or the client's patience ends."""
        path, response = PATHS[reader.record.route], None
        deadline = gevent.Timeout(turn.cancel_seconds)
        try:
            with deadline:
                response = self.http.post(path, body=body, headers=self.shared.headers)
                reader.record.status = response.status_code
                if response.status_code != 200:
                    refused = 400 <= response.status_code < 500
                    text = response.read().decode(errors="replace")
                    reader.finish("refused" if refused else "error", text)
                    return
                while event := response.readline(b"\n\n"):
                    reader.take(event)
                    if reader.chunks == turn.cancel_after:
                        reader.finish("cancelled")
                        return
                reader.finish()
        except gevent.Timeout as timeout:
            if timeout is not deadline:
                raise
            reader.finish("cancelled")
        except (OSError, ValueError, HTTPParseError) as error:
            reader.finish("error", f"{type(error).__name__}: {error}")
        finally:
            if response is not None:
                # A stream that was not read to its end is closed here.
                response.release()


def http_client(host: str) -> HTTPClient:
    """A client of one server, with a connection of its own.

    Raises:
        ValueError: no host.
    """
    if not host.startswith(("http://", "https://")):
        raise ValueError(f"--host is {host!r}; accepted is http://HOST:PORT")
    return HTTPClient.from_url(
        host, concurrency=1, network_timeout=PATIENCE, connection_timeout=60.0
    )


def report(environment: Environment, record: Record) -> None:
    """Report to locust's statistics, and to listeners of `generated`."""
    failed = record.outcome == "error"
    ended = {"cancelled": "cancelled by the client", "refused": "refused (4xx)", "cut": "cut"}
    rows = [(ended.get(record.outcome, "end to end"), record.seconds)]
    if record.ttft is not None:
        rows.append(("time to first token", record.ttft))
    if record.gaps:
        rows.append(("time per output token", sum(record.gaps) / len(record.gaps)))
    for name, seconds in rows:
        environment.events.request.fire(
            request_type=record.route,
            name=name,
            response_time=seconds * 1e3,
            response_length=record.output_tokens,
            exception=RuntimeError(record.error) if failed and name == "end to end" else None,
            context={},
        )
    generated.fire(record=record)


class Watch:
    """Writes records and samples as they come, and shows how far the run is."""

    def __init__(self, folder: Path, sampler: Sampler, bar: tqdm, interval: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._records: IO[str] = (folder / "records.jsonl").open("w", encoding="utf-8")
        self._samples: IO[str] = (folder / "samples.jsonl").open("w", encoding="utf-8")
        self._sampler = sampler
        self._bar = bar
        self._interval = interval
        self._tokens = 0
        self._errors = 0

    def on_generated(self, record: Record, **_: Any) -> None:
        print(record.to_json(), file=self._records, flush=True)
        self._tokens += record.output_tokens
        self._errors += record.outcome == "error"
        if self._bar.total:
            self._bar.update()

    def keep_sampling(self) -> None:
        """Until killed."""
        while True:
            self.take_sample()
            gevent.sleep(self._interval)

    def take_sample(self) -> None:
        sample = self._sampler.sample()
        if sample is None:
            return
        print(sample.to_json(), file=self._samples, flush=True)
        if not self._bar.total:
            self._bar.update(int(sample.time) - self._bar.n)
        self._bar.set_postfix(
            running=int(sample.running),
            waiting=int(sample.waiting),
            kv=f"{sample.kv_usage:.0%}",
            preempted=int(sample.preemptions),
            tokens=self._tokens,
            errors=self._errors,
        )

    def close(self) -> None:
        self.take_sample()
        self._bar.close()
        self._records.close()
        self._samples.close()


def authorization() -> dict[str, str]:
    """Header with the API key of the environment variable OPENAI_API_KEY, if it is set."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def getter(host: str) -> Callable[[str], tuple[int, str]]:
    """GET of a path: HTTP status and body.

    Raises:
        OSError: from the function, where the server does not answer.
    """
    client = http_client(host)

    def get(path: str) -> tuple[int, str]:
        try:
            response = client.get(path, headers=authorization())
            return response.status_code, response.read().decode()
        except HTTPParseError as error:
            raise OSError(f"GET {path}: {error}") from error

    return get


def first_model(get: Callable[[str], tuple[int, str]]) -> str:
    """Name of the first model that the server lists.

    Raises:
        RuntimeError: it does not answer.
    """
    status, text = get("/v1/models")
    if status != 200:
        raise RuntimeError(f"GET /v1/models: {status} {text[:200]}")
    return json.loads(text)["data"][0]["id"]


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument("--workload", default="", help="JSON file; default: the built-in workload")
    parser.add_argument("--output", default="build/load/locust", help="folder for what came")
    parser.add_argument("--seconds", type=float, default=0, help="no session begins after these")
    parser.add_argument("--sample-seconds", type=float, default=1.0, help="between two samples")
    parser.add_argument("--server-pid", type=int, default=0, help="to sample its resident memory")
    parser.add_argument("--title", default="load", help="of the progress bar")


@events.init.add_listener
def refuse_workers(environment: Environment, **_: Any) -> None:
    """One process draws the sessions: more would each ask for all of them."""
    if not isinstance(environment.runner, LocalRunner):
        logger.error("this locustfile runs in one process: no --master, --worker, --processes")
        sys.exit(2)


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Prepare a run; where that fails, say why and end with status 1."""
    try:
        prepare(environment)
    except (OSError, RuntimeError, ValueError) as error:
        logger.error("%s", error)
        environment.process_exit_code = 1
        assert environment.runner is not None
        gevent.spawn(environment.runner.quit)
        raise StopTest from error


def prepare(environment: Environment) -> None:
    """The run that the users share, its records and its samples.

    Raises:
        ValueError: a bad workload or host.
        OSError, RuntimeError: the server does not answer.
    """
    options: Any = environment.parsed_options
    workload = read_workload(Path(options.workload)) if options.workload else Workload()
    get = getter(environment.host or "")
    model = first_model(get)
    sessions = workload.draw()
    if workload.sessions:
        # Drawn in advance: drawing delays users that read a stream.
        sessions = iter(list(sessions))
    start = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start

    headers = {"Content-Type": "application/json", **authorization()}
    feed = Feed(sessions, clock, options.seconds or None)
    StreamingUser.shared = Run(feed, model, start, headers)
    sampler = Sampler(get, clock, options.server_pid or None)
    bar = progress_bar(workload, options.title)
    watch = Watch(Path(options.output), sampler, bar, options.sample_seconds)
    generated.add_listener(watch.on_generated)
    sampling = gevent.spawn(watch.keep_sampling)

    def end(**_: Any) -> None:
        sampling.kill()
        watch.close()
        # Another run may begin in this process, from locust's page.
        generated.remove_listener(watch.on_generated)
        environment.events.test_stop.remove_listener(end)

    environment.events.test_stop.add_listener(end)


def progress_bar(workload: Workload, title: str) -> tqdm:
    """Of requests where their number is known, of seconds where it is not."""
    total = sum(len(session.turns) for session in workload.draw()) if workload.sessions else None
    return tqdm(total=total, desc=title, unit="request" if total else "s", dynamic_ncols=True)
