"""vLLM's endpoint plugin `razor`: our routes, page and metrics in vLLM's own application.

Loaded by entry point (`vllm.endpoint_plugins`) if `VLLM_PLUGINS` names it, which
`--kv-policy razor` makes sure of. An engine without the policy gets neither routes nor metrics.
"""

import argparse
import asyncio
import contextlib
import logging
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.tasks import SupportedTask
from vllm.v1.engine import async_llm
from vllm.v1.engine.exceptions import EngineDeadError

from razor_serving import access, page
from razor_serving.metrics import PoolMetrics, keep_current
from razor_serving.routes import Service, router
from razor_vllm import compat
from razor_vllm.admission import DenseLimits
from razor_vllm.config import config_of

_ended_badly = False


def engine_died() -> bool:
    """Whether this process served an engine that ended before it was told to."""
    return _ended_badly


def _watch_end(engine_client: Any, state: State) -> None:
    """Note when the engine is told to end, and whether it was dead by then: vLLM exits with 0."""

    def note() -> None:
        global _ended_badly
        _ended_badly = _ended_badly or engine_client.errored
        state.razor_draining = True

    compat.before_shutdown(engine_client, note)


def _is_stopping(state: State) -> bool:
    return getattr(state, "razor_draining", False)


class CleanStop(logging.Filter):
    """Drops the traceback that vLLM logs at most stops, if no request was left.

    To stop, vLLM's client closes its sockets, and only then ends the task that waits for
    the engine's outputs. If that task runs in between, it takes the engine for dead.
    """

    def __init__(self, engine_client: Any, state: State) -> None:
        super().__init__()
        self._client = engine_client
        self._state = state

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, EngineDeadError) or not _is_stopping(self._state):
            return True
        return self._client.get_num_unfinished_requests() > 0


class RazorEndpoints:
    """What vLLM asks of an endpoint plugin (`EndpointPlugin`)."""

    name = "razor"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._attached = False
        self._task: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, if the server was asked for the policy."""
        args = app.state.args
        by_flag = getattr(args, "kv_policy", "full") == "razor"
        if not by_flag and config_of(args.additional_config) is None:
            return
        app.include_router(router)
        app.include_router(page.router)
        access.install(app)
        self._attached = True

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: argparse.Namespace
    ) -> None:
        """Give the routes their engine, and start the metrics."""
        if not self._attached or engine_client is None:
            return
        vllm_config = engine_client.vllm_config
        config = config_of(vllm_config.additional_config)
        if config is None:
            return
        service = state.razor = Service(engine_client)
        # Where an engine is in a long step, it alone checks what the server would have.
        with contextlib.suppress(TimeoutError):
            engines = (await service.reader.read()).engines
            limits = DenseLimits(*map(min, zip(*(e["dense_limits"] for e in engines), strict=True)))
            compat.tell_dense_limits(vllm_config, limits)
        compat.check_before_streams(engine_client)
        _watch_end(engine_client, state)
        async_llm.logger.addFilter(CleanStop(engine_client, state))
        if vllm_config.parallel_config._api_process_rank <= 0 and state.log_stats:
            # One process of several: they would all report the same engines.
            metrics = PoolMetrics(vllm_config, config)
            self._task = asyncio.create_task(
                keep_current(metrics, service.reader, lambda: _is_stopping(state))
            )
