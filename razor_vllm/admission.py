"""What a request must be to come in; the last check before the engine trusts it.

The server checks the same first and answers with HTTP 400. Other front ends may not: what
comes through to the engine and does not hold ends alone, and harms no other request.

A request that opts out of a windowed engine is never compressed, while the engine was sized for
those that are: it may be too long for the pools, alone. It is refused where its prompt is,
and ends by length where its answer would be.
"""

from collections.abc import Mapping
from typing import Any

from razor_vllm.policy import REQUEST_KEY, request_policy


def check_request(
    extra_args: Mapping[str, Any] | None,
    num_prompt_tokens: int = 0,
    longest_dense: int | None = None,
) -> None:
    """Refuse a request that asks for what there is not.

    Args:
        extra_args: of its sampling parameters.
        longest_dense: tokens of the longest request that may opt out; None where not known.

    Raises:
        ValueError: an unknown policy, or a prompt that never fits without compression.
    """
    policy = request_policy(extra_args)
    if policy == "full" and longest_dense is not None and num_prompt_tokens >= longest_dense:
        raise ValueError(
            f"{REQUEST_KEY} is 'full' and the prompt has {num_prompt_tokens} tokens; uncompressed, "
            f"the KV memory holds prompt and answer of up to {longest_dense} tokens"
        )
