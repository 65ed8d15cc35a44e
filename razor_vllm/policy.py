"""One number per request: `dense_until`, and the channels that carry it.

Local heads treat a query at position t < dense_until as retrieval heads do. It
follows from the engine's prefill mode and the policy that the request asks for:

    request            exact prefill      windowed prefill
    razor (default)    prompt length      0
    "full"             DENSE_FOREVER      DENSE_FOREVER

vLLM does not tell its block managers whose prefix is looked up, nor its attention
whose tokens a batch holds. Two context variables do.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, get_args

from razor_kernels import DENSE_FOREVER
from razor_vllm.config import KVPolicy, RazorConfig

REQUEST_KEY = "kv_policy"
"""Key of a request's `vllm_xargs` (OpenAI routes) or `extra_args` (SamplingParams)."""


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


def opts_out(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether an accepted request is never compressed; raises nothing."""
    return (extra_args or {}).get(REQUEST_KEY) == "full"


def dense_until(config: RazorConfig, extra_args: Mapping[str, Any] | None, prompt_len: int) -> int:
    """First position at which a request's local heads are compressed; raises nothing.

    Args:
        extra_args: of the request's sampling parameters.
        prompt_len: tokens of the prompt, generated ones not counted.
    """
    if opts_out(extra_args):
        return DENSE_FOREVER
    return prompt_len if config.prefill == "exact" else 0


def policy_salt(
    config: RazorConfig, extra_args: Mapping[str, Any] | None, salt: str | None
) -> str | None:
    """Cache salt of a request under its policy.

    In windowed mode the same tokens have other K and V in a request that opts out, so the two
    kinds must not share pages. The user's salt comes after a word of ours, so it cannot equal
    the other kind's.
    """
    if config.prefill != "windowed":
        return salt
    if opts_out(extra_args):
        return "full" if salt is None else f"full:{salt}"
    return None if salt is None else f"razor:{salt}"
