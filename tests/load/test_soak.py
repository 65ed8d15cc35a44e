"""What a soak must find, each shown by a run that breaks it; and a short real one."""

from dataclasses import replace
from pathlib import Path

import pytest
from servers import free_port

from benchmarks.load import soak
from benchmarks.load.run import Measured
from benchmarks.load.sampler import Sample
from benchmarks.load.soak import Growth, Lap, judge, parse, wait_until_idle, whole_run
from benchmarks.load.streaming import Record
from benchmarks.load.workload import Session, Turn, Workload

MIB = 2**20


def record(outcome: str, invalid: bool = False, **values) -> Record:
    return Record(0, 0, "chat", 0.0, 3, invalid, outcome=outcome, **values)


def idle(num_checks: int, rss: int, **values) -> Sample:
    pools = {"local": {"held": 0.0, "cached": 5.0}, "any": {"free": 9.0}}
    sample = Sample(0.0, 0, 0, 0.0, 3, 0, 0, pools, num_checks, 0, rss)
    return replace(sample, **values)


def lap(number: int, rss: int = 1000 * MIB, **values) -> Lap:
    """A lap in which all is well."""
    records = [record("done"), record("cancelled"), record("refused", invalid=True)]
    samples = [Sample(1.0, 2, 1, 0.9, 0, 0, 0), Sample(9.0, 2, 1, 1.0, 4, 0, 0)]
    return Lap(Measured(records, samples), idle(number + 1, rss, **values), number)


GOOD = [lap(number) for number in range(4)]


def failing(laps: list[Lap], policy: str = "razor", log: str = "", alive: bool = True) -> set[str]:
    """Names of the findings that do not hold."""
    return {f.name for f in judge(laps, policy, log, alive, Growth()) if not f.holds}


def with_records(*records: Record) -> list[Lap]:
    measured = GOOD[0].measured
    changed = Measured([*measured.records, *records], measured.samples)
    return [GOOD[0]._replace(measured=changed), *GOOD[1:]]


def test_a_good_soak_holds() -> None:
    assert failing(GOOD) == set()
    assert len(judge(GOOD, "razor", "", True, Growth())) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        record("error", error="500"),
        record("cut"),
        record("refused"),
        record("done", invalid=True),
        record("cancelled", invalid=True),
    ],
)
def test_an_error_that_is_not_the_clients_fails(wrong: Record) -> None:
    """So does a refusal that was not due, and one that was and did not come."""
    assert failing(with_records(wrong)) == {"errors"}


def test_each_finding_can_fail() -> None:
    quiet = [
        one._replace(measured=Measured([record("done")], one.measured.samples)) for one in GOOD
    ]
    assert failing(quiet) == {"cancelled"}
    calm = [
        one._replace(measured=Measured(one.measured.records, one.measured.samples[:1]))
        for one in GOOD
    ]
    assert failing(calm) == {"preempted"}
    assert failing(GOOD, log="x\nTraceback (most recent call last):\n") == {"log"}
    assert failing(GOOD, alive=False) == {"alive"}


def test_leaks_and_checks_count_in_every_lap() -> None:
    """One page held after one lap is a leak; a lap without a check, or a violation, fails."""
    assert failing([*GOOD[:2], lap(2, kv_usage=0.01), GOOD[3]]) == {"leaks"}
    assert failing([*GOOD[:2], lap(2, pools={"local": {"held": 4096.0}}), GOOD[3]]) == {"leaks"}
    assert failing([*GOOD[:2], lap(2, checks=2), GOOD[3]]) == {"integrity"}
    assert failing([*GOOD[:3], lap(3, violations=1)]) == {"integrity"}
    assert failing([lap(n, checks=None, violations=None) for n in range(4)], "full") == set()
    assert failing([lap(n, checks=None) for n in range(4)], "razor") == {"integrity"}


def test_a_request_that_stays_fails() -> None:
    """A lap that never became idle; its integrity was not checked either."""
    assert failing([*GOOD[:3], GOOD[3]._replace(idle=None)]) == {"drained", "integrity"}


@pytest.mark.parametrize(
    ("sizes", "holds"),
    [
        ([1000, 1000, 1001, 1002], True),
        ([1000, 1040, 1045, 1048], True),
        ([1000, 1020, 1040, 1060], False),
        ([4000, 4070, 4075, 4080], True),
        ([4000, 4070, 4080, 4090], False),
        ([900, 1100, 1050, 901], True),
        ([1000], False),
    ],
)
def test_memory_may_not_grow(sizes: list[int], holds: bool) -> None:
    """48 MiB, or 2 % of more than 2,400, from the first quarter to the last lap."""
    laps = [lap(number, size * MIB) for number, size in enumerate(sizes)]
    assert failing(laps) == (set() if holds else {"memory"})


class Readings:
    """A sampler with samples to give, the last one for ever."""

    def __init__(self, *samples: Sample | None) -> None:
        self.left = list(samples)

    def sample(self) -> Sample | None:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on when it is slept, and not else."""
    now = [0.0]
    monkeypatch.setattr(soak.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(soak.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))


@pytest.mark.usefixtures("no_wait")
def test_idle_waits_for_the_engines_check() -> None:
    """Not running, nothing held, and a check more than before."""
    busy, held, unchecked = idle(1, 1, running=1), idle(1, 1, kv_usage=0.1), idle(1, 1)
    done = idle(2, 1)
    assert wait_until_idle(Readings(None, busy, held, unchecked, done), 1) is done
    assert wait_until_idle(Readings(busy), 1) is None
    assert wait_until_idle(Readings(held), 1) is held
    assert wait_until_idle(Readings(unchecked), 1) is unchecked
    stock = idle(0, 1, checks=None)
    assert wait_until_idle(Readings(busy, stock), 0) is stock


def test_laps_become_one_run() -> None:
    """Time and preemptions go on from lap to lap."""
    whole = whole_run(GOOD[:2])
    assert [s.time for s in whole.samples] == [1, 9, 10, 18]
    assert [s.preemptions for s in whole.samples] == [0, 4, 4, 8]
    assert [r.start for r in whole.records] == [0, 0, 0, 9, 9, 9]


def test_a_lap_without_end_is_refused() -> None:
    """Neither minutes nor sessions: said before a server starts."""
    args, options = parse(["model", "--minutes", "0"])
    with pytest.raises(ValueError, match="minutes is 0 and sessions is 0"):
        soak.soak(args, soak.workload_of(args), options)


LAPS = 2
SHORT = ["--minutes", "0", "--sessions", "16", "--laps", str(LAPS), "--users", "12"]
SHORT += ["--growth-mib", "200", "--invalid-share", "0.1"]
# A prompt takes few pages and the reply many: the server admits all twelve users, and has not
# half of the pages that their replies need. It runs out whatever its speed.
SHORT += ["--prompt-tokens", "16", "256", "--output-tokens", "256", "384"]
SHORT += ["--turns", "1", "3", "--turn-tokens", "8", "64", "--prefix-tokens", "128"]
SHORT += ["--kv-bytes", str(6 * MIB)]


def turns_of(workload: Workload) -> list[tuple[Session, Turn]]:
    """Every request of all laps."""
    laps = [replace(workload, seed=workload.seed + lap) for lap in range(LAPS)]
    return [(one, turn) for lap in laps for one in lap.draw() for turn in one.turns]


@pytest.mark.engine
def test_short_soak(model_dir: Path, tmp_path: Path) -> None:
    """Two laps of everything on a real server under the policy: all findings hold.

    The load is a number of sessions, not of seconds, so what becomes of each request is known,
    but of those that their client leaves after some time. The server's memory still grows while
    each step is of a new size: only a gross leak shows.
    """
    own = ["--output", str(tmp_path), "--port", str(free_port()), *SHORT]
    args, options = parse([str(model_dir), *own, "--enforce-eager", "--razor-window", "256"])
    workload = soak.workload_of(args)
    turns = turns_of(workload)
    results = soak.soak(args, workload, options)
    assert results["holds"], soak.text_table(results["findings"])
    ended = results["runs"]["razor"]["summary"]["requests"]
    refused = sum(session.invalid for session, _ in turns)
    whole = sum(not turn.cancels for session, turn in turns if not session.invalid)
    assert min(refused, whole) > 0, "the draw has both"
    assert sum(ended.values()) == len(turns)
    assert ended["refused"] == refused
    # On a busy machine a chunk has several tokens, and the answer may end before its client leaves.
    assert ended["cancelled"] + ended["done"] == len(turns) - refused
    assert ended["done"] >= whole
