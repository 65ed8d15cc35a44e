"""How the routes come into vLLM's application, without an engine."""

import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.exceptions import EngineDeadError

from razor_serving.endpoints import CleanStop, RazorEndpoints
from razor_serving.reader import EngineStopping
from razor_vllm.config import config_of
from razor_vllm.endpoints import turn_on_endpoints

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # before vLLM 0.33
    from vllm.entrypoints.launchers.cli_args import make_arg_parser


@pytest.fixture
def flags() -> None:
    """vLLM with the plugin's flags."""
    import razor_vllm

    razor_vllm.register()


def application(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FastAPI:
    """An application that vLLM attached the plugin to."""
    monkeypatch.setenv("VLLM_PLUGINS", "razor")
    app = FastAPI()
    defaults = {"kv_policy": "full", "additional_config": {}, "api_key": None, "middleware": []}
    app.state.args = Namespace(**{**defaults, **options})
    attach_endpoint_plugins(app, ("generate",))
    return app


def paths(app: FastAPI) -> set[str]:
    return {getattr(route, "path", "") for route in app.routes}


def test_it_is_vllms_kind_of_plugin() -> None:
    """It satisfies vLLM's protocol, and is found by its entry point."""
    assert isinstance(RazorEndpoints(), EndpointPlugin)
    (found,) = entry_points(group="vllm.endpoint_plugins", name="razor")
    assert found.load() is RazorEndpoints


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({}, False),
        ({"additional_config": {"razor": {"policy": "full"}}}, False),
        ({"kv_policy": "razor"}, True),
        ({"additional_config": {"razor": {}}}, True),
    ],
)
def test_routes_come_with_the_policy_only(monkeypatch, options: dict[str, Any], on: bool) -> None:
    """The policy full is vLLM as it is: no route, no error form, no middleware of ours."""
    app = application(monkeypatch, **options)
    assert ("/v1/razor/memory" in paths(app)) == on
    assert ("/razor" in paths(app)) == on
    assert bool(app.user_middleware) == on
    assert app.state.args.middleware == []


def test_without_an_engine_the_routes_say_so(monkeypatch) -> None:
    """A server that renders only has no engine: 503 in OpenAI's form."""
    client = TestClient(application(monkeypatch, kv_policy="razor"))
    answer = client.get("/v1/razor/memory")
    assert answer.status_code == 503
    assert "no engine under the policy razor" in answer.text


@pytest.fixture
def complaints() -> Iterator[list[logging.LogRecord]]:
    """What our logger is told."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("vllm.razor").addHandler(handler)
    yield records
    logging.getLogger("vllm.razor").removeHandler(handler)


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (EngineDeadError(), 503, "The engine is not running"),
        (EngineStopping("x"), 503, "The server is shutting down"),
        (TimeoutError(), 503, "The engine is in a step that takes more than 10 s"),
        (ValueError("seven"), 500, "ValueError in the server; its log has the traceback"),
        (KeyError("pools"), 500, "KeyError in the server; its log has the traceback"),
    ],
)
def test_each_fault_is_called_by_its_name(
    monkeypatch, complaints, fault: Exception, status: int, message: str
) -> None:
    """An engine that is gone, stopping or in a step, and a fault of ours, which is logged."""

    async def memory(list_requests: bool = False) -> None:
        raise fault

    app = application(monkeypatch, kv_policy="razor")
    app.state.razor = SimpleNamespace(memory=memory)
    answer = TestClient(app).get("/v1/razor/memory")
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == message
    assert [record.exc_info[1] for record in complaints] == ([fault] if status == 500 else [])


def test_what_the_client_did_wrong_stays_its_own(monkeypatch, complaints) -> None:
    """A refusal is neither a 500 nor logged."""
    app = application(monkeypatch, kv_policy="razor")
    app.state.razor = SimpleNamespace()
    client = TestClient(app)
    assert client.get("/v1/razor/heads", headers={"Accept": "text/html"}).status_code == 406
    assert client.get("/v1/razor/memory", params={"requests": "perhaps"}).status_code == 422
    deep = client.post("/v1/razor/estimate", content=b"[" * 60000)
    assert deep.status_code in (400, 422)
    assert complaints == []


@pytest.mark.parametrize(
    ("stopping", "unfinished", "error", "logged"),
    [
        (True, 0, EngineDeadError(), False),
        (True, 1, EngineDeadError(), True),
        (False, 0, EngineDeadError(), True),
        (True, 0, ValueError("x"), True),
        (True, 0, None, True),
    ],
)
def test_a_dead_engine_is_no_news_at_a_clean_stop(
    stopping: bool, unfinished: int, error: Exception | None, logged: bool
) -> None:
    """It is at any other time, with a request that is lost by it, and so is any other error."""
    client = SimpleNamespace(get_num_unfinished_requests=lambda: unfinished)
    state: Any = SimpleNamespace(razor_draining=True) if stopping else SimpleNamespace()
    info = None if error is None else (type(error), error, None)
    record = logging.LogRecord("vllm", logging.ERROR, "f", 1, "failed", (), info)
    assert CleanStop(client, state).filter(record) == logged


@pytest.mark.parametrize(
    ("before", "after"), [("", ["", "razor"]), ("mine", ["mine", "razor"]), ("razor", ["razor"])]
)
def test_a_users_own_list_is_added_to(monkeypatch, before: str, after: list[str]) -> None:
    """What the user named stays, and nothing but ours is added."""
    monkeypatch.setenv("VLLM_PLUGINS", before)
    turn_on_endpoints()
    turn_on_endpoints()
    assert os.environ["VLLM_PLUGINS"].split(",") == after


def test_without_a_list_all_but_others_routes_are_named(monkeypatch) -> None:
    """What vLLM loads by default is still loaded; routes of other plugins stay off."""
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that it is put back
    monkeypatch.delenv("VLLM_PLUGINS")
    turn_on_endpoints()
    names = set(os.environ["VLLM_PLUGINS"].split(","))
    default = {point.name for point in entry_points(group="vllm.general_plugins")}
    assert default | {"razor"} <= names


@pytest.mark.usefixtures("flags")
def test_every_api_server_is_told_of_the_policy(model_dir: Path, monkeypatch) -> None:
    """vLLM hands the namespace to its other API servers, which read it without our flags.

    One that did not know of the policy would let bad requests through to the engine.
    """
    monkeypatch.setenv("VLLM_PLUGINS", "razor")
    parser = make_arg_parser(FlexibleArgumentParser())
    options = ["--model", str(model_dir), "--kv-policy", "razor", "--razor-window", "64"]
    args = parser.parse_args(options)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    assert config_of(engine_args.additional_config).window == 64
    assert args.additional_config == engine_args.additional_config
