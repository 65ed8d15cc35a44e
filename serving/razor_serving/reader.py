"""Reads the engines' memory figures, without letting readers slow the engines down."""

import asyncio
import time
from typing import Any, NamedTuple

from vllm.engine.protocol import EngineClient
from vllm.v1.engine.exceptions import EngineDeadError

from razor_vllm.compat import call_engines
from razor_vllm.core_memory import UTILITY

FRESH_SECONDS = 0.25
"""Age up to which a reading is used again."""
WAIT_SECONDS = 10.0
"""Longest wait for an engine that is in the middle of a step."""
_REFUSED = "Server shutting down"
"""What vLLM's engine answers to every utility call once it was told to end."""


class EngineStopping(Exception):
    """The engine was told to end, and takes no more calls."""


class Reading(NamedTuple):
    """Answers of all engines, in order, and when they came (monotonic seconds)."""

    engines: list[dict[str, Any]]
    at: float

    @property
    def age(self) -> float:
        return time.monotonic() - self.at


class MemoryReader:
    """One call to the engines at a time, shared by all callers."""

    def __init__(self, engine_client: EngineClient) -> None:
        self._client: Any = engine_client
        self._last: dict[bool, Reading] = {}
        self._under_way: dict[bool, asyncio.Task[Reading]] = {}

    async def read(self, list_requests: bool = False) -> Reading:
        """The engines' figures, at most a moment old; older ones while an engine is busy.

        Raises:
            TimeoutError: an engine did not answer, and never has.
            EngineStopping: an engine was told to end.
            EngineDeadError: an engine is gone.
        """
        if self._client.errored:
            raise EngineDeadError()
        last = self._last.get(list_requests)
        if last is not None and last.age < FRESH_SECONDS:
            return last
        task = self._under_way.get(list_requests)
        if task is None:
            task = asyncio.create_task(self._call(list_requests))
            self._under_way[list_requests] = task
            task.add_done_callback(lambda done: self._finish(list_requests, done))
        try:
            return await asyncio.wait_for(asyncio.shield(task), WAIT_SECONDS)
        except TimeoutError:
            # A call to an engine that died meanwhile is never answered.
            if self._client.errored:
                raise EngineDeadError() from None
            if last is None:
                raise
            return last

    async def _call(self, list_requests: bool) -> Reading:
        # The front end's own way to run a method between two steps of the engine.
        try:
            engines = await call_engines(self._client.engine_core, UTILITY, list_requests)
        except Exception as error:
            if str(error) == _REFUSED:
                raise EngineStopping(_REFUSED) from None
            raise
        return Reading(engines, time.monotonic())

    def _finish(self, list_requests: bool, task: asyncio.Task[Reading]) -> None:
        del self._under_way[list_requests]
        if not task.cancelled() and task.exception() is None:
            self._last[list_requests] = task.result()
