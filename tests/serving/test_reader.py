"""Reading the engines: one call for all who wait, an old answer where an engine is busy."""

import asyncio
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from razor_serving import reader
from razor_serving.reader import MemoryReader


class Engine:
    """An engine client whose engine answers when `step` is set."""

    def __init__(self) -> None:
        self.engine_core = self
        self.errored = False
        self.calls = 0
        self.step = asyncio.Event()

    async def call_utility_all_async(self, method: str, list_requests: bool) -> list[Any]:
        assert method == "razor_memory"
        self.calls += 1
        number = self.calls
        if self.errored:
            raise EngineDeadError()
        await self.step.wait()
        return [{"call": number, "listed": list_requests}]


def test_all_who_wait_share_a_call() -> None:
    """Ten readers, one call; with the requests listed, another one."""

    async def run() -> None:
        engine = Engine()
        memory = MemoryReader(engine)
        tasks = [asyncio.create_task(memory.read(i == 0)) for i in range(10)]
        await asyncio.sleep(0)
        engine.step.set()
        readings = await asyncio.gather(*tasks)
        assert engine.calls == 2
        assert [r.engines[0]["listed"] for r in readings] == [True] + 9 * [False]

    asyncio.run(run())


def test_a_fresh_reading_is_used_again_an_old_one_is_not(monkeypatch) -> None:
    """Within FRESH_SECONDS no new call is made."""

    async def run() -> None:
        engine = Engine()
        engine.step.set()
        memory = MemoryReader(engine)
        monkeypatch.setattr(reader, "FRESH_SECONDS", 1000.0)
        first = await memory.read()
        assert (await memory.read()) is first
        monkeypatch.setattr(reader, "FRESH_SECONDS", 0.0)
        assert (await memory.read()).engines[0]["call"] == 2

    asyncio.run(run())


def test_a_busy_engine_gives_its_last_reading(monkeypatch) -> None:
    """In a long step: the last reading and its age; a TimeoutError where there is none yet."""

    async def run() -> None:
        engine = Engine()
        memory = MemoryReader(engine)
        monkeypatch.setattr(reader, "WAIT_SECONDS", 0.01)
        monkeypatch.setattr(reader, "FRESH_SECONDS", 0.0)
        with pytest.raises(TimeoutError):
            await memory.read()
        engine.step.set()
        first = await memory.read()
        assert engine.calls == 1, "the call that was waited for is still the one under way"
        engine.step.clear()
        again = await memory.read()
        assert again is first
        assert again.age > 0

    asyncio.run(run())


def test_a_dead_engine_is_an_error_at_once() -> None:
    """Even where a reading is fresh."""

    async def run() -> None:
        engine = Engine()
        engine.step.set()
        memory = MemoryReader(engine)
        await memory.read()
        engine.errored = True
        with pytest.raises(EngineDeadError):
            await memory.read()

    asyncio.run(run())
