"""Send malformed requests to a running server, which must survive them.

    python benchmarks/malformed.py http://127.0.0.1:8000 --model NAME --requests 10000

Each request is one of vLLM's or of ours with something wrong: huge fields, wrong types,
unknown policies, bodies that are not JSON, paths and methods that do not exist. The server
is wrong if it answers with a 5xx, with an error that is not in OpenAI's form, or not at
all, or if it is unhealthy afterwards or then answers a good request differently. The exit
status is 1 in any of these cases.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
from tqdm import tqdm

_AT_A_TIME = 8


class Bad(NamedTuple):
    """A malformed request, and what is wrong with it."""

    kind: str
    method: str
    path: str
    content: bytes
    headers: dict[str, str]


class Outcome(NamedTuple):
    """kind of the request, path, status (0: no answer), and what is wrong with the answer."""

    kind: str
    path: str
    status: int
    fault: str | None


def _good(model: str) -> dict[str, dict[str, Any]]:
    """A small good body for each route."""
    return {
        "/v1/completions": {"model": model, "prompt": "abc", "max_tokens": 1},
        "/v1/chat/completions": {
            "model": model,
            "messages": [{"role": "user", "content": "abc"}],
            "max_tokens": 1,
        },
        "/v1/responses": {"model": model, "input": "abc", "max_output_tokens": 1},
        "/tokenize": {"model": model, "prompt": "abc"},
        "/detokenize": {"model": model, "tokens": [1, 2]},
        "/v1/razor/estimate": {"mix": [{"tokens": 64, "weight": 1.0}]},
    }


def _junk(draw: random.Random) -> Any:
    """A value that hardly any field accepts."""
    values: list[Any] = [
        None,
        True,
        -1,
        2**63,
        -(2**70),
        1e308,
        -0.5,
        "",
        "\x00",
        "\ud83d\ude00" * draw.randint(1, 50),
        "x" * draw.choice([10, 1000, 30_000]),
        [],
        [[]],
        [None] * draw.randint(1, 500),
        {},
        {"a": {"b": {"c": []}}},
        {"": None},
        "../../etc/passwd",
        "{{ 7 * 7 }}",
        "__import__('os')",
    ]
    return draw.choice(values)


def _wrong_type(body: dict[str, Any], draw: random.Random) -> bytes:
    """One field of the good body replaced by junk of another type."""
    name = draw.choice([name for name in body if name != "max_tokens"])
    value = _junk(draw)
    while type(value) is type(body[name]):
        value = _junk(draw)
    return json.dumps({**body, name: value}).encode()


def _missing(body: dict[str, Any], draw: random.Random) -> bytes:
    """Without one field that is needed."""
    needed = [n for n in body if n in ("prompt", "messages", "input", "tokens", "mix")]
    return json.dumps({n: v for n, v in body.items() if n != draw.choice(needed)}).encode()


def _bad_policy(body: dict[str, Any], draw: random.Random) -> bytes:
    """A policy that does not exist, or is not a name at all."""
    policy = draw.choice(["half", "h2o", "FULL", "razor ", 7, 0.5, ["razor"], "x" * 10_000])
    if "mix" in body:
        return json.dumps({**body, "kv_policy": policy}).encode()
    return json.dumps({**body, "vllm_xargs": {"kv_policy": policy}}).encode()


def _bad_sampling(body: dict[str, Any], draw: random.Random) -> bytes:
    """Sampling options that are out of bounds or of the wrong type."""
    options: list[tuple[str, list[Any]]] = [
        ("temperature", [-1, "hot", 1e400, [], {}]),
        ("top_p", [0, 1.5, -1, "x"]),
        ("n", [0, -1, 2**40, "many"]),
        ("max_tokens", [-5, "all", 2**70, 1.5, []]),
        ("logprobs", [10_000, -7, "yes"]),
        ("stop", [{"a": 1}, 7, [7], [["x"]]]),
        ("min_tokens", [-1, 2**40]),
        ("seed", ["x", 2**70, []]),
        ("logit_bias", [[], "x", {"a": "b"}, {"999999999": 1}]),
        ("stream", ["perhaps", [], 7]),
        ("response_format", ["x", {"type": "nothing"}, {"type": "json_schema"}, 7]),
        ("tools", ["x", [1], [{"type": "nothing"}], {"a": 1}]),
    ]
    name, values = draw.choice(options)
    return json.dumps({**body, name: draw.choice(values)}).encode()


def _huge(body: dict[str, Any], draw: random.Random) -> bytes:
    """A field of 0.1 to 2 MB, or thousands of fields."""
    size = draw.choice([100_000, 500_000, 2_000_000])
    if draw.random() < 0.3:
        return json.dumps({**body, **{f"field{i}": i for i in range(size // 200)}}).encode()
    name = draw.choice([name for name in body if name != "max_tokens"])
    return json.dumps({**body, name: "y" * size}).encode()


def _no_json(body: dict[str, Any], draw: random.Random) -> bytes:
    """Cut, garbled, nested too deep, or no text at all."""
    text = json.dumps(body).encode()
    return draw.choice(
        [
            text[: draw.randrange(len(text))],
            b"",
            b"\xff\xfe\x00" + text,
            b"[" * draw.choice([100, 50_000]),
            b'{"a":' * draw.choice([100, 20_000]),
            bytes(draw.randrange(256) for _ in range(draw.randrange(1, 400))),
            b"null",
            b'"text"',
            b"NaN",
            text.replace(b"{", b"(", 1),
        ]
    )


_BODIES: dict[str, Callable[[dict[str, Any], random.Random], bytes]] = {
    "wrong type": _wrong_type,
    "missing field": _missing,
    "unknown policy": _bad_policy,
    "bad option": _bad_sampling,
    "huge field": _huge,
    "no JSON": _no_json,
}


def draw_request(model: str, draw: random.Random) -> Bad:
    """One malformed request."""
    routes = _good(model)
    json_type = {"Content-Type": "application/json"}
    kind = draw.choice([*_BODIES, "query", "method", "path"])
    if kind in _BODIES:
        path = draw.choice(list(routes))
        if kind == "unknown policy":
            path = draw.choice(["/v1/completions", "/v1/chat/completions", "/v1/razor/estimate"])
        if kind == "bad option":
            path = draw.choice(["/v1/completions", "/v1/chat/completions"])
        return Bad(kind, "POST", path, _BODIES[kind](routes[path], draw), json_type)
    if kind == "query":
        value = draw.choice(["perhaps", "2", "%00", "x" * 5000, "..%2f", "%ff", "[]"])
        return Bad(kind, "GET", f"/v1/razor/memory?requests={value}", b"", {})
    if kind == "method":
        method = draw.choice(["PUT", "DELETE", "PATCH", "PROPFIND"])
        path = draw.choice(["/v1/razor/memory", "/v1/razor/estimate", "/v1/completions", "/razor"])
        return Bad(kind, method, path, b"", {})
    tail = "".join(draw.choice("abc/.%{}~0") for _ in range(draw.randrange(1, 40)))
    return Bad(kind, "GET", "/v1/razor/" + tail.replace("%", "%25"), b"", {"Accept": tail})


def judge(status: int, body: bytes) -> str | None:
    """What is wrong with an answer; None where nothing is."""
    if status >= 500:
        return f"{status}: {body[:200].decode(errors='replace')}"
    if status < 400:
        return None  # the server accepted it
    try:
        error = json.loads(body)["error"]
        good = {"message", "type", "param", "code"} <= set(error) and error["code"] == status
    except (ValueError, KeyError, TypeError):
        good = False
    return None if good else f"{status} is not in OpenAI's form: {body[:200]!r}"


async def send(client: httpx.AsyncClient, bad: Bad) -> Outcome:
    """Send one request and judge the answer."""
    try:
        answer = await client.request(
            bad.method, bad.path, content=bad.content or None, headers=bad.headers
        )
    except httpx.HTTPError as error:
        return Outcome(bad.kind, bad.path, 0, f"no answer: {error!r}")
    return Outcome(
        bad.kind, bad.path, answer.status_code, judge(answer.status_code, answer.content)
    )


async def control(client: httpx.AsyncClient, model: str) -> str:
    """The text that a good request gets."""
    body = {"model": model, "prompt": "abc" * 20, "max_tokens": 8, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


async def run(args: argparse.Namespace) -> tuple[list[Outcome], list[str]]:
    """Send all requests; outcomes, and what is wrong with the server as a whole."""
    draw = random.Random(args.seed)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    outcomes: list[Outcome] = []
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=120) as client:
        before = await control(client, args.model)
        with tqdm(total=args.requests, disable=None) as progress:
            while len(outcomes) < args.requests:
                count = min(_AT_A_TIME, args.requests - len(outcomes))
                bad = [draw_request(args.model, draw) for _ in range(count)]
                outcomes += await asyncio.gather(*(send(client, one) for one in bad))
                progress.update(count)
        faults = []
        if (await client.get("/health")).status_code != 200:
            faults.append("the server is unhealthy")
        elif await control(client, args.model) != before:
            faults.append("a good request is answered otherwise than before")
    return outcomes, faults


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", required=True, help="the served model's name")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key", default="")
    args = parser.parse_args()
    begin = time.monotonic()
    outcomes, faults = asyncio.run(run(args))
    seconds = time.monotonic() - begin
    statuses = Counter(outcome.status for outcome in outcomes)
    faulty = [outcome for outcome in outcomes if outcome.fault]
    for (kind, path, fault), count in Counter(
        (o.kind, o.path.split("?")[0][:60], o.fault) for o in faulty
    ).most_common(20):
        print(f"{count} x {kind} {path}: {fault}")
    for fault in faults:
        print(fault)
    print(
        f"{len(outcomes)} malformed requests in {seconds:.0f} s, seed {args.seed}: "
        + ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items()))
        + f"; {len(faulty)} answered wrongly; server {'ill' if faults else 'well'} afterwards"
    )
    sys.exit(1 if faulty or faults else 0)


if __name__ == "__main__":
    main()
