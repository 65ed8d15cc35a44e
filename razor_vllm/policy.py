"""One number per request: `dense_until`.

Local heads treat a query at position t < dense_until as retrieval heads do. It
follows from the engine's prefill mode and the request's own wish:

    request            exact prefill      windowed prefill
    razor (default)    prompt length      0
    "full"             DENSE_FOREVER      DENSE_FOREVER
"""

from collections.abc import Mapping
from typing import Any, get_args

from razor_kernels import DENSE_FOREVER
from razor_vllm.config import KVPolicy, RazorConfig

REQUEST_KEY = "kv_policy"
"""Key of a request's `vllm_xargs` (OpenAI routes) or `extra_args` (SamplingParams)."""


def request_policy(extra_args: Mapping[str, Any] | None) -> KVPolicy:
    """Policy that a request asks for; razor where it does not say.

    Raises:
        ValueError: neither full nor razor.
    """
    value = (extra_args or {}).get(REQUEST_KEY, "razor")
    accepted = get_args(KVPolicy)
    if value not in accepted:
        raise ValueError(f"{REQUEST_KEY} is {value!r}; accepted are {', '.join(accepted)}")
    return value


def dense_until(config: RazorConfig, extra_args: Mapping[str, Any] | None, prompt_len: int) -> int:
    """First position at which a request's local heads are compressed.

    Args:
        extra_args: of the request's sampling parameters.
        prompt_len: tokens of the prompt, generated ones not counted.
    """
    if request_policy(extra_args) == "full":
        return DENSE_FOREVER
    return prompt_len if config.prefill == "exact" else 0
