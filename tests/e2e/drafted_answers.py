"""Run one engine with speculative decoding; print its answers to the same requests, asked thrice.

First with what the drafter proposes, then with drafts made from those answers: of a request's
drafts in a step the first few are right, and those after them wrong. The second round finds no
prefix cached, the third does. A process of its own: vLLM's drafters import what other engines
of a process cannot bear.

    python drafted_answers.py MODEL '{"razor": {...} or null, "options": {...}, ...}'
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from engines import answers, counted_drafts, engine, local_block_size, poison_pages, prompts

NUM_RIGHT = (3, 0, 2, 3, 1)
"""Drafts that are right after so many tokens, modulo the length of this."""


def made_drafts(tokens: Sequence[int], end: int, most: int) -> list[int]:
    """Drafts after the first `end` tokens of a request whose `tokens` are known."""
    right = NUM_RIGHT[end % len(NUM_RIGHT)]
    following = tokens[end : end + most]
    return [t if index < right else (t + 1) % 256 for index, t in enumerate(following)]


def force_drafts(known: dict[int, list[int]]) -> None:
    """Replace what vLLM's drafters propose, after they ran.

    Args:
        known: all tokens of each request, by the length of its prompt.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.propose_draft_token_ids

    def propose(self: Any, scheduled: Any, sampled: Any, *args: Any) -> Any:
        spec_decode, common = args[-3:-1]
        seq_lens = common.seq_lens.tolist()  # drafters change them
        drafts = original(self, scheduled, sampled, *args)
        verified = [0] * len(seq_lens) if spec_decode is None else spec_decode.num_draft_tokens
        for index, new in enumerate(sampled):
            new_tokens = [token for token in new if token >= 0]
            tokens = known[int(self.input_batch.num_prompt_tokens[index])]
            end = seq_lens[index] - verified[index] + len(new_tokens)
            made = made_drafts(tokens, end, scheduled.num_spec_tokens_to_schedule)
            if isinstance(drafts, torch.Tensor):
                drafts[index, : len(made)] = torch.tensor(made)
            elif new_tokens:
                drafts[index] = made
        return drafts

    GPUModelRunner.propose_draft_token_ids = propose


def main() -> None:
    model, job = sys.argv[1], json.loads(sys.argv[2])
    requests = prompts(job["lengths"])
    with engine(model, job["razor"], **job["options"]) as llm:
        if job["razor"] is not None:
            poison_pages(llm)
        rounds = [answers(llm, requests, job["max_tokens"])]
        known = {
            len(prompt["prompt_token_ids"]): [*prompt["prompt_token_ids"], *answer.tokens]
            for prompt, answer in zip(requests, rounds[0], strict=True)
        }
        force_drafts(known)
        accepted = counted_drafts()
        llm.reset_prefix_cache()
        rounds += [answers(llm, requests, job["max_tokens"]) for _ in range(2)]
        block_size = local_block_size(llm) if job["razor"] is not None else None
    result = {"rounds": rounds, "accepted": dict(accepted), "block_size": block_size}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
