"""The routes under /v1/razor and what guards them, on a running server."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from held_steps import slow
from servers import KEY, MODEL, Server, until

from razor_serving.access import MAX_BODY_BYTES, OPEN_PATHS
from razor_serving.routes import preferred_form

pytestmark = pytest.mark.engine

MARK = "xyzzy-secret-of-the-user"


@contextmanager
def long_request(http: httpx.Client, prompt_tokens: int = 700, **extra: Any) -> Iterator[None]:
    """A request in decode, cancelled at the end; left to itself it takes ten minutes."""
    body = {"model": MODEL, "prompt": "a" * prompt_tokens, "max_tokens": 3000, "stream": True}
    body |= {"ignore_eos": True, "vllm_xargs": {**slow(after=30), **extra}}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # closed with the last reference
        next(lines)
        yield


def memory(http: httpx.Client, requests: bool = False) -> dict:
    answer = http.get("/v1/razor/memory", params={"requests": requests})
    assert answer.status_code == 200, answer.text
    return answer.json()["engines"][0]


def idle(http: httpx.Client) -> dict:
    """The memory once no request holds a page."""
    until(lambda: memory(http)["requests"]["holding_pages"] == 0)
    return memory(http)


def assert_error(answer: httpx.Response, status: int) -> dict:
    """An error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


def test_policy_is_what_the_server_was_started_with(http: httpx.Client) -> None:
    """Options, head profile, slots and pages."""
    policy = http.get("/v1/razor/policy").json()
    assert policy["model"] == MODEL
    assert policy["config"]["window"] == 64
    assert policy["config"]["prefill"] == "exact"
    assert policy["heads"]["num_retrieval_heads"] == 4
    assert policy["heads"]["retrieval_share"] == 0.25
    assert [(r["retrieval_slots"], r["local_slots"]) for r in policy["ranks"]] == [(4, 12)]
    assert policy["max_model_len"] == 4096
    assert policy["per_request"]["accepted"] == ["full", "razor"]


def test_memory_adds_up_and_names_requests(http: httpx.Client) -> None:
    """free + cached + held = total; the request's own pages; bytes below the full policy's."""
    idle(http)
    with long_request(http):
        until(lambda: (memory(http, True)["by_request"] or [{}])[0].get("num_tokens", 0) > 720)
        now = memory(http, True)
        states = sum(pool[state]["pages"] for pool in now["pools"] for state in ("held", "cached"))
        assert states + now["free"]["pages"] == now["total"]["pages"]
        (row,) = now["by_request"]
        assert row["policy"] == "razor"
        assert row["num_prompt_tokens"] == 700
        by_name = {pool["name"]: pool for pool in now["pools"]}
        assert row["retrieval_pages"] == by_name["retrieval"]["held"]["pages"]
        assert row["local_pages"] == by_name["local"]["held"]["pages"]
        assert row["bytes"] < row["full_policy_bytes"]
        shares = now["against_full"]
        assert shares["saved_bytes"] == row["full_policy_bytes"] - row["bytes"] > 0
        assert len(shares["kept_share_by_layer"]) == 4
        assert now["requests"]["dropped_tokens"] > 0
    assert idle(http)["against_full"]["kept_share"] is None


def test_an_opted_out_request_is_counted_as_full(http: httpx.Client) -> None:
    """Requests by policy, in the listing and in the count."""
    before = idle(http)["requests"]["by_policy"]
    with long_request(http, kv_policy="full"):
        until(lambda: [r["policy"] for r in memory(http, True)["by_request"]] == ["full"])

    def counted() -> tuple[int, int]:
        after = memory(http)["requests"]["by_policy"]
        return after["full"] - before["full"], after["razor"] - before["razor"]

    until(lambda: counted() == (1, 0))


def test_an_opted_out_request_that_never_fits_is_a_400(
    launch: Callable[..., Server],
) -> None:
    """Windowed and a small memory: refused before it begins, with what fits; compressed it runs."""
    options = ["--razor-prefill", "windowed", "--kv-cache-memory-bytes", "8000000"]
    server = launch(*options, "--max-num-batched-tokens", "512").wait()
    with server.client() as http:
        body = {"model": MODEL, "prompt": [5] * 3500, "max_tokens": 2}
        full = {"vllm_xargs": {"kv_policy": "full"}}
        error = assert_error(http.post("/v1/completions", json={**body, **full}), 400)
        assert "holds prompt and answer of up to" in error["message"]
        assert http.post("/v1/completions", json=body).status_code == 200
        short = {**body, **full, "prompt": [5] * 500}
        assert http.post("/v1/completions", json=short).status_code == 200


def test_the_accounting_is_checked_when_idle(http: httpx.Client) -> None:
    """After the last request ends, a new check finds nothing."""
    checks = idle(http)["integrity"]["checks"]
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 2}
    assert http.post("/v1/completions", json=body).status_code == 200
    until(lambda: idle(http)["integrity"]["checks"] > checks)
    assert idle(http)["integrity"] | {"checks": 0, "checked_at": 0} == {
        "intact": True,
        "checks": 0,
        "violations": 0,
        "checked_at": 0,
        "found": [],
    }


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("image/png", "image/png"),
        ("image/*;q=0.9, application/json;q=0.5", "image/png"),
        ("text/html", None),
    ],
)
def test_heads_by_content_type(http: httpx.Client, accept: str | None, kind: str | None) -> None:
    """The map as JSON, or as a picture; anything else is a 406."""
    answer = http.get("/v1/razor/heads", headers={"Accept": accept} if accept else {})
    if kind is None:
        assert_error(answer, 406)
        return
    assert answer.headers["content-type"] == kind
    if kind == "image/png":
        assert answer.content.startswith(b"\x89PNG")
    else:
        assert answer.json()["retrieval_heads"] == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", None),
        ("image/png;q=0", None),
        ("image/png;q=nonsense", None),
        ("*/*;q=0.1, image/png;q=0.2", "image/png"),
        ("IMAGE/PNG", "image/png"),
        ("image/png, application/json", "application/json"),
        (",;=q,,*/*;q=2", "application/json"),
    ],
)
def test_preferred_form(accept: str, form: str | None) -> None:
    """The most specific range counts, then its quality; JSON of two alike."""
    assert preferred_form(accept) == form


def test_estimate_is_the_start_up_report(keyed: Server, http: httpx.Client) -> None:
    """Requests of the model's length: the figures that the log gave; a mix lies between."""
    line = r" 4,096 +([\d,]+) +[\d.]+% +([\d,]+) \(([\d,]+)\) +([\d,]+) \(([\d,]+)\)"
    found = re.search(line, keyed.log.read_text()).groups()
    held, fit, fit_full, *waiting = (int(group.replace(",", "")) for group in found)
    answer = http.post("/v1/razor/estimate", json={"mix": [{"tokens": 4096}]}).json()
    assert (answer["lengths"][0]["bytes"], answer["fit"]) == (held, fit)
    assert answer["fit_full_policy"] == fit_full
    (longest,) = answer["lengths"]
    assert [longest["fit_waiting"], longest["fit_waiting_full_policy"]] == waiting
    assert http.get("/v1/razor/policy").json()["longest"] == longest
    mix = [{"tokens": 4096, "weight": 1}, {"tokens": 128, "weight": 3}]
    mixed = http.post("/v1/razor/estimate", json={"mix": mix}).json()
    assert fit < mixed["fit"] < mixed["lengths"][0]["fit"]
    twice = {"mix": mix, "kv_memory_bytes": 2 * mixed["kv_memory_bytes"]}
    assert http.post("/v1/razor/estimate", json=twice).json()["fit"] >= 2 * mixed["fit"] - 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "body.mix"),
        ({"mix": []}, "body.mix"),
        ({"mix": [{"tokens": 0}]}, "body.mix.0.tokens"),
        ({"mix": [{"tokens": "64"}]}, "body.mix.0.tokens"),
        ({"mix": [{"tokens": 4097}]}, "mix.0.tokens"),
        ({"mix": [{"tokens": 64, "weight": 0}]}, "body.mix.0.weight"),
        ({"mix": [{"tokens": 64, "weight": 1e300}]}, "body.mix.0.weight"),
        ({"mix": [{"tokens": 64}] * 65}, "body.mix"),
        ({"mix": [{"tokens": 64, "path": "/etc/passwd"}]}, "body.mix.0.path"),
        ({"mix": [{"tokens": 64}], "kv_memory_bytes": 2**60}, "body.kv_memory_bytes"),
        ([], "body"),
    ],
)
def test_a_bad_estimate_is_a_400(http: httpx.Client, body, param: str) -> None:
    """Out of bounds, of the wrong type, unknown: 400, naming the field."""
    assert assert_error(http.post("/v1/razor/estimate", json=body), 400)["param"] == param


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 60000, b'{"mix": [{"tokens": 1e999}]}', b'{"mix": NaN}'],
)
def test_what_is_not_json_is_a_400(http: httpx.Client, content: bytes) -> None:
    """No body, half a body, bad UTF-8, deep nesting, numbers that JSON has not."""
    headers = {"Content-Type": "application/json"}
    assert_error(http.post("/v1/razor/estimate", content=content, headers=headers), 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(http: httpx.Client, chunked: bool) -> None:
    """Above the bound: 413, whether its length was announced or not."""
    part = b" " * 1024
    content = (part for _ in range(MAX_BODY_BYTES // 1024 + 1)) if chunked else part * 65
    headers = {"Content-Type": "application/json"}
    assert_error(http.post("/v1/razor/estimate", content=content, headers=headers), 413)


def test_unknown_paths_and_methods_are_errors_in_openais_form(http: httpx.Client) -> None:
    """404 and 405; the latter says what is allowed."""
    assert_error(http.get("/v1/razor/nothing"), 404)
    answer = http.delete("/v1/razor/memory")
    assert_error(answer, 405)
    assert answer.headers["allow"] == "GET"
    assert_error(http.get("/v1/razor/memory", params={"requests": "perhaps"}), 400)


def route_table(server: Server) -> list[tuple[str, str]]:
    """Method and path of every HTTP route, as the running application lists them."""
    lines = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", server.log.read_text())
    table = [(m.strip(), path) for path, methods in lines for m in methods.split(",")]
    return [*table, ("GET", "/metrics")]  # a mount, which the list leaves out


def test_every_route_but_liveness_and_the_page_needs_the_key(keyed: Server) -> None:
    """Over the application's own route table: 401 without the key, and with a wrong one."""
    table = route_table(keyed)
    paths = {path for _, path in table}
    assert {"/v1/chat/completions", "/v1/razor/memory", "/tokenize", "/health"} <= paths
    assert len(table) > 30
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        with keyed.client(key=False) as client:
            for method, path in table:
                url = re.sub(r"\{[^}]*\}", "x", path)
                answer = client.request(method, url, headers=headers)
                if path in OPEN_PATHS:
                    assert answer.status_code in (200, 405), (method, path)
                else:
                    assert answer.status_code == 401, (method, path)
                    if method != "HEAD":
                        assert_error(answer, 401)
    # The path is compared as it is routed: no spelling goes round the key.
    with keyed.client(key=False) as client:
        for spelling in ("/health/../metrics", "//metrics", "/razor/../version", "/razor/x"):
            assert client.get(spelling).status_code in (401, 404), spelling


def test_the_page_has_no_figures_and_runs_nothing_foreign(keyed: Server) -> None:
    """Static, without the key; its policy lets its own script run and nothing else."""
    with keyed.client(key=False) as client:
        page = client.get("/razor")
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=", page.text), "a resource from elsewhere"
    assert MODEL not in page.text
    assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "")


def test_openapi_documents_the_routes(http: httpx.Client) -> None:
    """Every route of ours, with its models."""
    paths = http.get("/openapi.json").json()["paths"]
    ours = {path for path in paths if path.startswith("/v1/razor")}
    assert ours == {f"/v1/razor/{name}" for name in ("policy", "memory", "heads", "estimate")}
    answer = paths["/v1/razor/memory"]["get"]["responses"]["200"]
    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Memory")


def test_readers_share_one_call(http: httpx.Client, keyed: Server) -> None:
    """Twenty readers at a time all get an answer, of one or two readings of the engine."""
    answers: list[dict] = []

    def read() -> None:
        with keyed.client() as client:
            answers.append(client.get("/v1/razor/memory").json())

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    assert all(answer["engines"][0]["total"]["pages"] for answer in answers)


def test_the_log_holds_no_text_of_requests(keyed: Server, http: httpx.Client) -> None:
    """Neither of good requests nor of bad ones; nor the key."""
    good = {"model": MODEL, "prompt": MARK, "max_tokens": 2}
    assert http.post("/v1/completions", json=good).status_code == 200
    for bad in ({**good, "max_tokens": MARK}, {**good, "vllm_xargs": {"kv_policy": MARK}}):
        assert 400 <= http.post("/v1/completions", json=bad).status_code < 500
    text = json.dumps({"mix": MARK})
    assert_error(http.post("/v1/razor/estimate", content=text), 400)
    unknown = {**good, "model": "m" * 100_000}
    assert_error(http.post("/v1/completions", json=unknown), 404)
    log = keyed.log.read_text()
    assert "POST /v1/completions" in log
    assert "m" * 3000 not in log, "vLLM logs a model name that it does not know"
    assert MARK not in log
    assert KEY not in log
