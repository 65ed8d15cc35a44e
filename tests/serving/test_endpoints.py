"""How the routes come into vLLM's application, without an engine."""

import os
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from razor_serving.endpoints import RazorEndpoints
from razor_vllm.config import config_of
from razor_vllm.endpoints import turn_on_endpoints


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
