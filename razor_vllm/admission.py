"""Which requests are accepted: the last check before the engine trusts one.

The server makes the same check first and answers with HTTP 400. Other front ends may not. A bad
request that reaches the engine ends there, and harms no other request.

A windowed engine is sized for requests that are compressed from their first token on. One that
opts out, or asks for a long dense part, may be too long for the pools even alone. If its prompt
is too long it is refused; if its answer would be, it ends by length.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from razor_vllm.policy import DENSE_TOKENS_KEY, REQUEST_KEY, dense_tokens, opts_out, request_policy


class DenseLimits(NamedTuple):
    """What an engine's pools hold without compression.

    request: tokens of the longest request that may opt out, its answer included.
    part: longest dense part, in tokens, of a request as long as the model allows.
    """

    request: int
    part: int

    def bind(self, extra_args: Mapping[str, Any] | None) -> bool:
        """Whether a request, checked by `check_request`, may be no longer than `request`."""
        return opts_out(extra_args) or (dense_tokens(extra_args) or 0) > self.part


def check_request(
    extra_args: Mapping[str, Any] | None,
    num_prompt_tokens: int | None = None,
    limits: DenseLimits | None = None,
) -> None:
    """Refuse a request that cannot be served.

    Args:
        extra_args: of its sampling parameters.
        num_prompt_tokens: of its prompt; None where they are not counted yet.
        limits: of the engine; None if not known.

    Raises:
        ValueError: an unknown policy, a dense part that the prompt does not have, or a prompt
            that does not fit without compression.
    """
    policy = request_policy(extra_args)
    asked = dense_tokens(extra_args, num_prompt_tokens)
    if num_prompt_tokens is None or limits is None or num_prompt_tokens < limits.request:
        return
    if limits.bind(extra_args):
        name, value = (DENSE_TOKENS_KEY, asked) if asked else (REQUEST_KEY, repr(policy))
        raise ValueError(
            f"{name} is {value} and the prompt has {num_prompt_tokens} tokens; uncompressed, "
            f"the KV memory holds prompt and answer of up to {limits.request} tokens"
        )
