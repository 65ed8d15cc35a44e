"""Which heads a model's answers need: gradients by a gate on each KV head.

A head's output is mixed from two attentions,

    out = gate * full(q, k, v) + (1 - gate) * local(q, k, v)        local: sinks and window

and the loss of what is asked (`prompts`) is differentiated by all gates at once. At a few gates
between 1 (nothing is compressed) and 0, common to all heads, the mean of -dloss/dgate is what
a head's share of the way adds to the loss: the path integral of integrated gradients (Sundararajan
et al., arXiv 1703.01365), in nats a token. Nothing is trained. Gates on KV heads are DuoAttention's
(arXiv 2410.10819), which trains them.

Each kind of prompt is scaled to sum to 1 before kinds are mixed, so that none counts for more
because its loss is larger. Memory is linear in the sequence: two fused attentions a layer, and
layers are computed again in the backward pass.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from razor_vllm.heads.attention import causal_attention, check_attention, refuse
from razor_vllm.heads.prompts import Kind, Prompt, PromptMaker, read_text

GATES = (1.0, 0.6, 0.2)
"""Where the path is sampled."""
WEIGHTS: dict[Kind, float] = {"retrieval": 1.0, "repeat": 1.0}
"""Of the kinds of prompt in the mixture (docs/heads.md has what was tried)."""
PROMPTS: dict[Kind, int] = {"retrieval": 2, "repeat": 1}
"""Prompts of each kind in a seed's smallest set."""

MASS = 0.98
"""Share of the score that the chosen heads hold by default."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that PyTorch does not take.

    Raises:
        ValueError: none, or one out of range.
    """
    if not seeds:
        raise ValueError("no seed is given; at least one is needed")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; accepted are whole numbers from 0 to 2^63 - 1")


@dataclass(frozen=True)
class AttributionOptions:
    """How heads are found.

    Args:
        share, count, mass: choose by a share of the model's KV heads, by their number, or the
            fewest that hold this share of the score. By mass, `MASS`, where none is given.
        text: file that prompts are made from; the package's own by default.
        length: tokens of a prompt. window, sinks: of local heads.
        prompts: sets of `PROMPTS`, a seed. seeds: scores are means over them.

    Raises:
        ValueError: a value out of range, or more than one way to choose.
    """

    share: float | None = None
    count: int | None = None
    mass: float | None = None
    text: Path | None = None
    length: int = 1024
    window: int = 128
    sinks: int = 4
    prompts: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if len(self.rule) > 1:
            raise ValueError(f"heads are chosen by one of {', '.join(self.rule)}, not by all")
        for name in ("share", "mass"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; accepted are numbers above 0, to 1")
        for name, least in (
            ("count", 1),
            ("length", 2),
            ("window", 1),
            ("sinks", 0),
            ("prompts", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; accepted are whole numbers >= {least}")
        if self.sinks + self.window >= self.length:
            raise ValueError(
                f"sinks {self.sinks} and window {self.window} hold a whole prompt of "
                f"{self.length} tokens: nothing would be compressed"
            )
        check_seeds(self.seeds)

    @property
    def memory_advice(self) -> str:
        """What was run, and what to try where it does not fit a device."""
        return (
            f"prompts of {self.length:,} tokens, with gradients, do not fit the device: try "
            "--device-map auto, a shorter --length, or --method probe"
        )

    @property
    def rule(self) -> dict[str, float]:
        """The way to choose, by its name."""
        named = {"share": self.share, "count": self.count, "mass": self.mass}
        return {n: value for n, value in named.items() if value is not None} or {"mass": MASS}


class Found(NamedTuple):
    """What the passes of a model gave.

    rounds: of each seed and kind, `[num_layers, num_kv_heads]` fp64 in nats a token; rows of
    layers that are not full attention are 0. losses: of each kind, means at each of `GATES`.
    full_layers: with full attention. head_size: of their keys.
    """

    rounds: list[dict[Kind, torch.Tensor]]
    losses: dict[Kind, list[float]]
    full_layers: list[int]
    head_size: int


class Gated:
    """transformers' attention function with a gate for each KV head.

    Args:
        max_positions: of the model; a sliding window of at least that counts as none.
        window, sinks: of the local attention.
    """

    def __init__(self, max_positions: int, window: int, sinks: int) -> None:
        self.max_positions, self.window, self.sinks = max_positions, window, sinks
        self.value = 1.0
        self.gates: dict[int, torch.Tensor] = {}
        """By layer with full attention: `[num_kv_heads]` fp32 on its device, leaves."""
        self.head_size = 0

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Mix both attentions.

        Args:
            query: `[1, num_heads, seq_len, head_dim]`; key, value: with KV heads.
            s_aux: learned sinks, `[num_heads]`.

        Raises:
            NotImplementedError: attention that is not understood.
        """
        check_attention(module, key, value, attention_mask, kwargs)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5

        def attention(window: int | None = None, sinks: int = 0) -> torch.Tensor:
            return causal_attention(
                query, key, value, scale, softcap, window, sinks, learned_sinks=s_aux
            )

        if sliding_window is not None and sliding_window < self.max_positions:
            out = attention(sliding_window)
        else:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            full, local = attention(), attention(self.window, self.sinks)
            gate = self._gate(layer, key).repeat_interleave(query.shape[1] // key.shape[1])
            out = local + gate.to(full.dtype)[:, None, None] * (full - local)
        return out.transpose(1, 2).contiguous(), None

    def _gate(self, layer: int, key: torch.Tensor) -> torch.Tensor:
        # A layer that is computed again in the backward pass must meet the same leaf.
        if layer not in self.gates:
            values = torch.full((key.shape[1],), self.value, device=key.device)
            self.gates[layer] = values.requires_grad_()
            self.head_size = key.shape[-1]
        return self.gates[layer]

    def take(self) -> dict[int, torch.Tensor]:
        """-dloss/dgate of each layer, `[num_kv_heads]` fp64 on the CPU; starts again with none.

        Raises:
            NotImplementedError: no gradient came back.
        """
        gates, self.gates = self.gates, {}
        if not gates:
            raise refuse(
                "a model whose layers all have a sliding window, so that no head sees far,"
            )
        if any(gate.grad is None or not gate.grad.isfinite().all() for gate in gates.values()):
            raise NotImplementedError(
                "razor calibrate: this model gives no gradients, as quantised ones do; calibrate "
                "the model it was made from, or use --method probe"
            )
        return {at: -gate.grad.double().cpu() for at, gate in gates.items()}  # type: ignore[union-attr]


def loss_of(model: PreTrainedModel, prompt: Prompt) -> torch.Tensor:
    """Mean loss of what a prompt asks, in nats a token."""
    # Offloaded weights are on `meta`; accelerate then moves the ids itself.
    ids = torch.tensor([prompt.ids])
    on = ids if model.device.type == "meta" else ids.to(model.device)
    asked = torch.tensor(prompt.asked)
    # Logits of what is asked alone: over a vocabulary they are large.
    logits = model(on, use_cache=False, logits_to_keep=asked - 1).logits[0].float()
    return F.cross_entropy(logits, ids[0, asked].to(logits.device))


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Layers keep nothing but their input; weights take no gradients; no dropout."""
    model.eval().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.train()  # this module alone: what is in it shall not drop out
        for child in layer.children():
            child.eval()
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, options: AttributionOptions
) -> list[list[Prompt]]:
    """The prompts of each seed, of every kind.

    Raises:
        ValueError: a text or a tokenizer that gives none.
    """
    maker = PromptMaker(tokenizer, read_text(options.text), options.length)
    return [
        [
            maker.make(kind, seed * 1000 + number)
            for kind, count in PROMPTS.items()
            for number in range(count * options.prompts)
        ]
        for seed in options.seeds
    ]


def attribute(model: PreTrainedModel, gated: Gated, rounds: Sequence[Sequence[Prompt]]) -> Found:
    """Differentiate the loss of every prompt by every gate.

    Args:
        model: loaded with `gated.attend` as its attention. rounds: prompts of each seed.

    Raises:
        NotImplementedError: a model that is not covered, or gives no gradients.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    counts = Counter(prompt.kind for prompts in rounds for prompt in prompts)
    losses = {kind: [0.0] * len(GATES) for kind in counts}
    scores: list[dict[Kind, torch.Tensor]] = []
    layers: list[int] = []
    passes = counts.total() * len(GATES)
    with tqdm(total=passes, desc="passes", unit="pass") as progress, checkpointed(model):
        for prompts in rounds:
            found: dict[Kind, torch.Tensor] = {}
            for prompt, (at, gated.value) in product(prompts, enumerate(GATES)):
                loss = loss_of(model, prompt)
                loss.backward()
                rows = gated.take()
                layers = sorted(rows)
                found[prompt.kind] = found.get(prompt.kind, 0) + _stacked(rows, num_layers)
                losses[prompt.kind][at] += loss.item() / counts[prompt.kind]
                progress.update()
            scores.append({k: s * len(rounds) / (counts[k] * len(GATES)) for k, s in found.items()})
    return Found(scores, losses, layers, gated.head_size)


def _stacked(rows: dict[int, torch.Tensor], num_layers: int) -> torch.Tensor:
    none = torch.zeros_like(next(iter(rows.values())))
    return torch.stack([rows.get(at, none) for at in range(num_layers)])


def mix(found: dict[Kind, torch.Tensor]) -> torch.Tensor:
    """One score for each head: kinds at equal sums of what helps, weighted; at least 0."""
    total = torch.zeros_like(next(iter(found.values())))
    weights = sum(WEIGHTS[kind] for kind in found)
    for kind, rows in found.items():
        helps = rows.clamp(min=0).sum()
        if helps > 0:
            total += WEIGHTS[kind] / weights * rows / helps
    return total.clamp(min=0)


def choose(
    scores: torch.Tensor, full_layers: Sequence[int], options: AttributionOptions
) -> tuple[tuple[int, ...], ...]:
    """The best heads by the rule; ties go to the lower layer and head.

    Args:
        scores: `[num_layers, num_kv_heads]`.

    Returns:
        Sorted KV heads, a tuple per layer.

    Raises:
        ValueError: more heads are asked for than there are.
    """
    ranked = sorted(
        (-scores[layer, head].item(), layer, head)
        for layer in full_layers
        for head in range(scores.shape[1])
    )
    count = num_chosen([-score for score, _, _ in ranked], options)
    chosen = {(layer, head) for _, layer, head in ranked[:count]}
    return tuple(
        tuple(head for head in range(scores.shape[1]) if (layer, head) in chosen)
        for layer in range(scores.shape[0])
    )


def num_chosen(ranked: Sequence[float], options: AttributionOptions) -> int:
    """How many of the heads, best first, the rule takes."""
    if options.count is not None:
        if options.count > len(ranked):
            raise ValueError(f"count is {options.count}; the model has {len(ranked)} KV heads")
        return options.count
    if options.share is not None:
        return math.ceil(round(options.share * len(ranked), 6))
    return heads_for_mass(ranked, options.rule["mass"])


def heads_for_mass(ranked: Sequence[float], mass: float) -> int:
    """The fewest heads, best first, that hold this share of the sum."""
    total, held = sum(ranked), 0.0
    for count, score in enumerate(ranked, 1):
        held += score
        if held >= mass * total - 1e-9:
            return count
    return len(ranked)
