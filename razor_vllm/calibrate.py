"""Find a model's retrieval heads: the probe, run by transformers, and the choice.

Works on any decoder with rotary embeddings that transformers loads: queries and keys are
read where transformers hands them to its attention function, after the rotary
embedding, so no model is known by name.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from razor_kernels.scores import COPIES, repeat_scores
from razor_vllm.profile import HeadProfile

ATTENTION = "razor_probe"
"""Name of the probing attention in transformers' registry."""


@dataclass(frozen=True)
class ProbeOptions:
    """How heads are found.

    Args:
        induction: share of the model's KV heads chosen by induction score.
        echo: share chosen by echo score, on top.
        period: random tokens that are repeated; shorter for a model that is shorter.
        seeds: of the random tokens; scores are means over them.

    Raises:
        ValueError: a share outside [0, 1], both zero, no seed, or too short a period.
    """

    induction: float = 0.14
    echo: float = 0.01
    period: int = 2500
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in ("induction", "echo"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted are 0 to 1")
        if self.induction + self.echo == 0:
            raise ValueError("induction and echo are both 0: no head would be chosen")
        if self.period < 2:
            raise ValueError(f"period is {self.period}; accepted are whole numbers >= 2")
        if not self.seeds:
            raise ValueError("no seed is given; at least one is needed")


class Probe:
    """Scores of every layer, filled while the model runs.

    Args:
        num_layers: of the model. period: of the probe.
    """

    def __init__(self, num_layers: int, period: int, progress: tqdm) -> None:
        self.period = period
        self.progress = progress
        self.rows: dict[int, tuple[list[float], list[float]]] = {}
        self.num_layers = num_layers

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function: causal attention, and the layer's scores.

        Args:
            query: `[1, num_heads, seq_len, head_dim]`; key, value: with KV heads.

        Raises:
            NotImplementedError: attention that the probe does not understand.
        """
        for name in ("softcap", "sliding_window"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"razor calibrate: attention with {name} is not covered")
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        scores = repeat_scores(query[0], key[0], scale, self.period)
        groups = key.shape[1]
        # A KV head scores the best of its query heads.
        echo, induction = (x.view(groups, -1).amax(1).tolist() for x in scores)
        self.rows[int(module.layer_idx)] = (echo, induction)  # type: ignore[arg-type]
        self.progress.update()
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def scores(self) -> dict[str, list[list[float]]]:
        """echo and induction, rows of layers by columns of KV heads.

        Raises:
            NotImplementedError: a layer did not pass through transformers' registry.
        """
        if sorted(self.rows) != list(range(self.num_layers)):
            raise NotImplementedError(
                f"razor calibrate: {len(self.rows)} of {self.num_layers} layers passed "
                "through transformers' attention interface; all must"
            )
        ordered = [self.rows[layer] for layer in range(self.num_layers)]
        return {"echo": [row[0] for row in ordered], "induction": [row[1] for row in ordered]}


def probe_ids(vocab: Sequence[int], bos: int | None, period: int, seed: int) -> torch.Tensor:
    """`[bos] + R * 4` as int64 `[1, 1 + 4 * period]`; R is drawn from `vocab`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(vocab), (period,), generator=generator)
    tokens = torch.tensor(vocab)[drawn].repeat(COPIES)
    first = tokens[-1:] if bos is None else torch.tensor([bos])
    return torch.cat([first, tokens]).unsqueeze(0)


def mean_scores(
    rounds: Sequence[dict[str, list[list[float]]]],
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Mean over seeds, rounded to six digits, so that files do not differ by noise."""
    names = rounds[0]
    return {
        name: tuple(
            tuple(round(sum(cell) / len(rounds), 6) for cell in zip(*rows, strict=True))
            for rows in zip(*(scores[name] for scores in rounds), strict=True)
        )
        for name in names
    }


def choose(scores: dict[str, Any], options: ProbeOptions) -> tuple[tuple[int, ...], ...]:
    """The top shares over the whole model, whole heads upward; ties go to the lower layer and head.

    Returns:
        Sorted KV heads, a tuple a layer.
    """
    chosen: set[tuple[int, int]] = set()
    for name in ("induction", "echo"):
        ranked = sorted(
            (-score, layer, head)
            for layer, row in enumerate(scores[name])
            for head, score in enumerate(row)
        )
        count = math.ceil(round(getattr(options, name) * len(ranked), 6))
        chosen |= {(layer, head) for _, layer, head in ranked[:count]}
    return tuple(
        tuple(sorted(head for at, head in chosen if at == layer))
        for layer in range(len(scores["echo"]))
    )


def stability(choices: Sequence[tuple[tuple[int, ...], ...]]) -> float:
    """Mean overlap (Jaccard index) of the choices of two seeds; 1 for a single seed."""
    sets = [{(at, head) for at, row in enumerate(c) for head in row} for c in choices]
    pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def fitting_period(options: ProbeOptions, max_positions: int) -> int:
    """The period, cut so that four copies fit the model.

    Raises:
        ValueError: the model is too short for any probe.
    """
    period = min(options.period, (max_positions - 1) // COPIES)
    if period < 2:
        raise ValueError(f"a model of {max_positions} positions is too short for the probe")
    return period


def check_rotary(config: Any) -> None:
    """Refuse a model whose positions are not rotary.

    Raises:
        NotImplementedError: naming what was found.
    """
    if getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None):
        return
    raise NotImplementedError(
        f"razor calibrate: a {config.model_type} model, without rotary embeddings, is "
        "not covered; covered are decoder models with rotary embeddings"
    )


def calibrate(
    model_name: str,
    options: ProbeOptions,
    device_map: str | None = None,
    dtype: str = "auto",
) -> HeadProfile:
    """Run the probe on a model and choose its retrieval heads.

    Args:
        model_name: folder or hub name. device_map, dtype: as transformers takes them.

    Raises:
        ValueError: the model is too short.
        NotImplementedError: a kind of model that is not covered.
    """
    config = AutoConfig.from_pretrained(model_name).get_text_config()
    check_rotary(config)
    period = fitting_period(options, config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    special = set(tokenizer.all_special_ids)
    vocab = [i for i in range(min(len(tokenizer), config.vocab_size)) if i not in special]
    rounds = []
    total = config.num_hidden_layers * len(options.seeds)
    with tqdm(total=total, desc="layers x seeds", unit="layer") as progress:
        probe = Probe(config.num_hidden_layers, period, progress)
        AttentionInterface.register(ATTENTION, probe.attend)
        model = AutoModelForCausalLM.from_pretrained(
            model_name, attn_implementation=ATTENTION, dtype=dtype, device_map=device_map
        ).eval()
        for seed in options.seeds:
            ids = probe_ids(vocab, tokenizer.bos_token_id, period, seed)
            with torch.no_grad():
                model.base_model(ids.to(model.device), use_cache=False)
            rounds.append(probe.scores())
            probe.rows = {}
    scores = mean_scores(rounds)
    head_size = getattr(config, "head_dim", None)
    return HeadProfile(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size or config.hidden_size // config.num_attention_heads,
        retrieval_heads=choose(scores, options),
        scores=scores,
        made_by={
            "method": "probe of four repeats, RazorAttention (arXiv 2407.15891)",
            "period": period,
            "seeds": list(options.seeds),
            "induction_share": options.induction,
            "echo_share": options.echo,
            "stability": round(stability([choose(s, options) for s in rounds]), 4),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    )
