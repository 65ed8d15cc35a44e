"""Malformed requests: 4xx in OpenAI's form, and the server lives on."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from servers import KEY, MODEL, Server

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "malformed.py"


def test_malformed_requests_are_refused_and_the_server_lives(keyed: Server) -> None:
    """300 of the 10,000 that benchmarks/malformed.py sends in full."""
    command = [sys.executable, str(SCRIPT), keyed.url, "--model", MODEL, "--api-key", KEY]
    done = subprocess.run(
        [*command, "--requests", "300", "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "300 malformed requests" in done.stdout
    assert "0 answered wrongly; server well afterwards" in done.stdout


@pytest.mark.parametrize("name", ["policy", "memory", "heads", "estimate"])
def test_answers_are_as_documented(keyed: Server, name: str) -> None:
    """schemathesis, on each route: no 5xx; every status, type and body as OpenAPI says.

    What it calls good may be refused: lengths above the model's, and types that `Accept` lacks.
    """
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{keyed.url}/openapi.json", headers=headers)
    (found,) = schema.include(path=f"/v1/razor/{name}").get_all_operations()

    @given(case=found.ok().as_strategy())
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

    check()


def test_the_server_is_well_afterwards(http: httpx.Client) -> None:
    """It answers, and its page accounting is intact."""
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 2}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert http.get("/v1/razor/memory").json()["engines"][0]["integrity"]["violations"] == 0
