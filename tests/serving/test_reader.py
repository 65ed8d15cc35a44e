"""Reading the engines: one call for all who wait, an old answer where an engine is busy."""

import asyncio
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from razor_serving import reader
from razor_serving.reader import EngineStopping, MemoryReader


class Engine:
    """An engine client whose engine answers when `step` is set."""

    def __init__(self) -> None:
        self.engine_core = self
        self.errored = False
        self.fault: Exception | None = None
        self.calls = 0
        self.step = asyncio.Event()

    async def call_utility_all_async(self, method: str, list_requests: bool) -> list[Any]:
        assert method == "razor_memory"
        self.calls += 1
        number = self.calls
        if self.errored:
            raise EngineDeadError()
        if self.fault is not None:
            raise self.fault
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
        patient = reader.WAIT_SECONDS
        monkeypatch.setattr(reader, "FRESH_SECONDS", 0.0)
        monkeypatch.setattr(reader, "WAIT_SECONDS", 0.01)
        with pytest.raises(TimeoutError):
            await memory.read()
        engine.step.set()
        monkeypatch.setattr(reader, "WAIT_SECONDS", 60 * patient)
        first = await memory.read()
        assert engine.calls == 1, "the call that was waited for is still the one under way"
        engine.step.clear()
        monkeypatch.setattr(reader, "WAIT_SECONDS", 0.01)
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


def test_an_engine_that_dies_in_a_call_is_dead(monkeypatch) -> None:
    """Its call is never answered: an old reading is not passed off as a slow step's."""

    async def run() -> None:
        engine = Engine()
        memory = MemoryReader(engine)
        engine.step.set()
        await memory.read()
        engine.step.clear()
        monkeypatch.setattr(reader, "FRESH_SECONDS", 0.0)
        monkeypatch.setattr(reader, "WAIT_SECONDS", 0.01)
        asyncio.get_running_loop().call_soon(setattr, engine, "errored", True)
        with pytest.raises(EngineDeadError):
            await memory.read()
        assert engine.calls == 2, "a call was under way"

    asyncio.run(run())


def test_an_engine_that_was_told_to_end_says_so() -> None:
    """vLLM's refusal of calls is told from other failures, which stay what they are."""

    async def run(message: str, kind: type[Exception]) -> None:
        engine = Engine()
        engine.fault = Exception(message)
        with pytest.raises(kind, match=message) as raised:
            await MemoryReader(engine).read()
        assert type(raised.value) is kind

    asyncio.run(run("Server shutting down", EngineStopping))
    asyncio.run(run("Call to razor_memory method failed: 'x'", Exception))
