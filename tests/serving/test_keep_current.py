"""What the loop that updates the metrics does with each kind of failure."""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from razor_serving import metrics
from razor_serving.metrics import keep_current
from razor_serving.reader import EngineStopping, Reading

READING = Reading([{"seconds": 0.0}], time.monotonic())
Step = Reading | Exception


class Script:
    """A reader, and the metrics that it feeds: plays its steps, one a reading."""

    def __init__(self, *steps: Step) -> None:
        self.left = list(steps)
        self.updates = 0

    async def read(self) -> Reading:
        step = self.left.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def update(self, reading: Reading) -> None:
        self.updates += 1


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the errors that were warned of; the loop does not pause."""
    monkeypatch.setattr(metrics, "INTERVAL_SECONDS", 0.0)
    names: list[str] = []

    def note(text: str, *args: Any, exc_info: bool = False) -> None:
        assert exc_info
        names.append(repr(sys.exc_info()[1]))

    monkeypatch.setattr(metrics.logger, "warning", note)
    return names


def play(script: Script, stopping: Callable[[], bool] = lambda: False) -> None:
    asyncio.run(keep_current(script, script, stopping))  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [EngineDeadError(), EngineStopping("x")])
def test_it_ends_with_the_engine(warnings: list[str], end: Exception) -> None:
    """Dead or told to end: no further reading, no word."""
    script = Script(READING, end, READING)
    play(script)
    assert (script.updates, len(script.left), warnings) == (1, 1, [])


def test_it_ends_where_the_server_is_told_to() -> None:
    """A server that is stopping does not ask its engine."""
    script = Script(READING)
    play(script, lambda: True)
    assert (script.updates, len(script.left)) == (0, 1)


def test_a_long_step_is_no_failure(warnings: list[str]) -> None:
    """The figures stay, and the next reading is taken."""
    script = Script(TimeoutError(), READING, EngineDeadError())
    play(script)
    assert (script.updates, warnings) == (1, [])


def test_a_failure_is_told_once_until_it_changes(warnings: list[str]) -> None:
    """And again once it has passed; the loop goes on."""
    same, other = KeyError("pools"), ValueError("seven")
    script = Script(same, same, other, other, READING, other, READING, EngineDeadError())
    play(script)
    assert warnings == [repr(same), repr(other), repr(other)]
    assert script.updates == 2
