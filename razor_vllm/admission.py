"""Which requests are accepted: the last check before the engine trusts one.

The server makes the same check first and answers with HTTP 400. Other front ends may not. A bad
request that reaches the engine ends there, and harms no other request.

A request that opts out of a windowed engine is never compressed, but the engine was sized for
requests that are, so even alone it may be too long for the pools. If its prompt is too long it
is refused; if its answer would be, it ends by length.
"""

from collections.abc import Mapping
from typing import Any

from razor_vllm.policy import REQUEST_KEY, request_policy


def check_request(
    extra_args: Mapping[str, Any] | None,
    num_prompt_tokens: int = 0,
    longest_dense: int | None = None,
) -> None:
    """Refuse a request that cannot be served.

    Args:
        extra_args: of its sampling parameters.
        longest_dense: tokens of the longest request that may opt out; None if not known.

    Raises:
        ValueError: an unknown policy, or a prompt that does not fit without compression.
    """
    policy = request_policy(extra_args)
    if policy == "full" and longest_dense is not None and num_prompt_tokens >= longest_dense:
        raise ValueError(
            f"{REQUEST_KEY} is 'full' and the prompt has {num_prompt_tokens} tokens; uncompressed, "
            f"the KV memory holds prompt and answer of up to {longest_dense} tokens"
        )
