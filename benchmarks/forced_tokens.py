"""A logits processor that makes a request say a given continuation.

The tokens are given in `SamplingParams.extra_args["forced_tokens"]`. Reported
log-probabilities are those before the processor (`logprobs_mode` raw), so a request
can be scored on tokens that it would not have chosen.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_KEY = "forced_tokens"


class ForcedTokens(AdapterLogitsProcessor):
    """Forces `extra_args["forced_tokens"]` where a request has them."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        tokens = (params.extra_args or {}).get(FORCED_KEY)
        return None if tokens is None else ForcedContinuation(tokens)


class ForcedContinuation:
    """Leaves one token possible: the next of a list."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Mask logits [vocab] of the position after `output_ids`."""
        if len(output_ids) < len(self.tokens):
            forced = torch.full_like(logits, float("-inf"))
            forced[self.tokens[len(output_ids)]] = 0.0
            return forced
        return logits
