"""The log-probabilities that the formula gives to served tokens, by the fp64 oracle.

A plain transformers model runs prompt and answer with the oracle in place of its
attention: no pages, no chunks, no cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from razor_kernels import Window, oracle


class Formula:
    """The model under one head map.

    Args:
        heads: retrieval heads of each layer.
        window: of local heads.
        stored: dtype of K and V in the cache.
    """

    def __init__(
        self,
        model: Path,
        heads: Sequence[Sequence[int]],
        window: Window,
        stored: torch.dtype,
        device: str,
    ) -> None:
        from transformers import AttentionInterface, LlamaForCausalLM

        self.heads, self.window, self.stored = heads, window, stored
        self.device = device
        self.dense_until = 0
        AttentionInterface.register("razor_oracle", self._attend)
        loaded: Any = LlamaForCausalLM.from_pretrained(
            model, attn_implementation="razor_oracle", dtype=torch.float32
        )
        self.model = loaded.to(device)

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int], exact: bool) -> list[float]:
        """Of each token of the answer. exact: whether the prompt is attended densely."""
        self.dense_until = len(prompt) if exact else 0
        tokens = [*prompt, *answer]
        with torch.no_grad(), torch.device(self.device):
            logits = self.model(torch.tensor([tokens[:-1]])).logits[0]
            chosen = torch.tensor(answer).unsqueeze(1)
            found = logits[len(prompt) - 1 :].double().log_softmax(-1).gather(1, chosen)
        return found.squeeze(1).tolist()

    def _attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        is_retrieval = torch.zeros(key.shape[1], dtype=torch.bool)
        is_retrieval[list(self.heads[module.layer_idx])] = True
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        k, v = (x.to(self.stored) for x in (k, v))
        out = oracle.attention(q, k, v, is_retrieval, self.window, scaling, self.dense_until)
        return out.to(query.dtype).unsqueeze(0), None
