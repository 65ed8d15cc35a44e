"""One number per request: `dense_until`, and the channels that carry it.

Local heads treat a query at position t < dense_until as retrieval heads do. It
follows from the engine's prefill mode, the prompt's tokens and what the request asks for:

    request               exact prefill    chat prefill             windowed prefill
    razor (default)       prompt length    end of the first turn    0
    kv_dense_tokens: N    N                N                        N
    kv_policy: "full"     DENSE_FOREVER    DENSE_FOREVER            DENSE_FOREVER

In chat mode a prompt in which no turn ends is read as in exact mode. `turns` says what ends one.

The engine works it out once, where it lets a request in, and puts it with the request's sampling
parameters. Block managers, the prefix cache's keys and the workers read it from there.

vLLM does not tell its block managers whose prefix is looked up, nor its attention
whose tokens a batch holds. Two context variables do.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, get_args

from razor_kernels import DENSE_FOREVER
from razor_vllm.config import KVPolicy, RazorConfig
from razor_vllm.turns import first_turn_end

REQUEST_KEY = "kv_policy"
"""Key of a request's `vllm_xargs` (OpenAI routes) or `extra_args` (SamplingParams)."""

DENSE_TOKENS_KEY = "kv_dense_tokens"
"""Key beside it: tokens of the prompt that all heads attend to as written."""

_CARRIED = "razor_dense_part"


class DensePart(NamedTuple):
    """What of a request its local heads attend to as written.

    until: `dense_until`. goes_on: whether a later request may have the same one, so that
        pages past it are worth caching. A prompt that is dense to its end grows with each turn.
    """

    until: int
    goes_on: bool


NEVER_COMPRESSED = DensePart(DENSE_FOREVER, True)


class Lookup(NamedTuple):
    """The request whose prefix is looked up in the cache."""

    dense_until: int


current_lookup: ContextVar[Lookup | None] = ContextVar("razor_lookup", default=None)
"""Set while `KVCacheManager.get_computed_blocks` looks a request up."""

step_dense_until: ContextVar[tuple[int, ...]] = ContextVar("razor_dense_until", default=())
"""`dense_until` of each request of the step being prepared, in batch order."""


def admitted_lookup() -> Lookup:
    """The current look-up."""
    lookup = current_lookup.get()
    assert lookup is not None, "a prefix is looked up for a request that was not admitted"
    return lookup


def request_policy(extra_args: Mapping[str, Any] | None) -> KVPolicy:
    """Policy that a request asks for; razor if it does not say.

    Called where requests arrive: in the server, and in the engine.

    Raises:
        ValueError: neither full nor razor.
    """
    value = (extra_args or {}).get(REQUEST_KEY, "razor")
    accepted = get_args(KVPolicy)
    if value not in accepted:
        raise ValueError(f"{REQUEST_KEY} is {value!r}; accepted are {', '.join(accepted)}")
    return value


def dense_tokens(
    extra_args: Mapping[str, Any] | None, num_prompt_tokens: int | None = None
) -> int | None:
    """Tokens that a request asks to have attended as written; None if it does not say.

    Args:
        num_prompt_tokens: of its prompt; None where they are not counted yet.

    Raises:
        ValueError: not a whole number from 0 to the prompt's length, or beside the policy full.
    """
    if DENSE_TOKENS_KEY not in (extra_args or {}):
        return None
    value = (extra_args or {})[DENSE_TOKENS_KEY]
    limit = num_prompt_tokens
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0 or (limit is not None and value > limit):
        raise ValueError(
            f"{DENSE_TOKENS_KEY} is {value!r}; accepted are whole numbers from 0 to the prompt's "
            + ("length" if limit is None else f"{limit} tokens")
        )
    if opts_out(extra_args):
        raise ValueError(
            f"{DENSE_TOKENS_KEY} is {value} beside {REQUEST_KEY} 'full', which compresses nothing; "
            "accepted is one of the two"
        )
    return value


def opts_out(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether an accepted request is never compressed; raises nothing."""
    return (extra_args or {}).get(REQUEST_KEY) == "full"


def dense_part(
    config: RazorConfig,
    extra_args: Mapping[str, Any] | None,
    prompt: Sequence[int] | None,
    prompt_len: int,
    marker: Sequence[int] = (),
) -> DensePart:
    """Dense part of an accepted request; raises nothing.

    Args:
        extra_args: of the request's sampling parameters.
        prompt: its tokens; None where it is given as embeddings.
        prompt_len: tokens of the prompt, generated ones not counted.
        marker: `Turn.marker` of the model's chat template.
    """
    if opts_out(extra_args):
        return NEVER_COMPRESSED
    asked = (extra_args or {}).get(DENSE_TOKENS_KEY)
    if asked is not None:
        return DensePart(asked, True)
    if config.prefill == "windowed":
        return DensePart(0, True)
    end = first_turn_end(prompt or (), marker) if config.prefill == "chat" else None
    return DensePart(prompt_len, False) if end is None else DensePart(end, True)


def carrying(extra_args: Mapping[str, Any] | None, part: DensePart) -> dict[str, Any]:
    """`extra_args` with the dense part, for all that handles the request from here on."""
    return {**(extra_args or {}), _CARRIED: part}


def carried(sampling_params: Any) -> DensePart | None:
    """Dense part that the engine put with a request; None if no engine of ours let it in.

    Args:
        sampling_params: vLLM's SamplingParams, or None.
    """
    part = ((sampling_params and sampling_params.extra_args) or {}).get(_CARRIED)
    return part if isinstance(part, DensePart) else None


def cache_key(sampling_params: Any, start: int, end: int) -> tuple[str, int] | None:
    """What a request's tokens [start, end) add to the key of their cached pages.

    Tokens before `dense_until` are the same in all requests. From there on they are the same
    only where `dense_until` is, so the first tokens past it bring it into the chain of keys. vLLM
    tags each part of a key by its origin, and no part of a user's gets this tag.
    """
    part = carried(sampling_params)
    if part is None or not start <= part.until < end:
        return None
    return _CARRIED, part.until
