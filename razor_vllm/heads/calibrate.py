"""Find a model's retrieval heads: the probe, run by transformers, and the choice.

Works on any decoder with rotary embeddings that transformers loads: queries and keys are
read where transformers passes them to its attention function, after the rotary
embedding, so no model is known by name. Layers with a sliding window are left out,
because their heads cannot see far. ALiBi models need no probe: see `alibi`.
"""

import math
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import combinations
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_accelerate_available

from razor_kernels.scores import COPIES, repeat_scores, soft_capped
from razor_vllm.heads import alibi
from razor_vllm.heads.profile import HeadProfile

ATTENTION = "razor_probe"
"""Name of the probing attention in transformers' registry."""

COVERED = "decoder models with rotary embeddings, and ALiBi models of " + ", ".join(alibi.MODELS)
_REFUSED = {
    "s_aux": "learned attention sinks",
    "position_bias": "a position bias",
    "indices": "an index of keys",
    "block_indices": "an index of keys",
}
"""Arguments of transformers' attention functions that change the softmax."""


@dataclass(frozen=True)
class ProbeOptions:
    """How heads are found.

    Args:
        induction: share of the model's KV heads chosen by induction score.
        echo: share chosen by echo score, in addition.
        period: random tokens that are repeated; fewer for a model that is too short.
        seeds: of the random tokens; scores are means over them.

    Raises:
        ValueError: a share outside [0, 1], both zero, no seed or one out of range, or too short a
            period.
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
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise ValueError(f"seed is {seed}; accepted are whole numbers from 0 to 2^63 - 1")


class Layer(NamedTuple):
    """What the probe saw of a layer with full attention.

    echo, induction: of each KV head. head_size: of its keys.
    """

    echo: list[float]
    induction: list[float]
    head_size: int


class Probe:
    """Scores of every layer, filled while the model runs.

    Args:
        num_layers: of the model. max_positions: its length in tokens; a sliding window of at
            least that counts as none. period: of the probe.
    """

    def __init__(self, num_layers: int, max_positions: int, period: int, progress: tqdm) -> None:
        self.num_layers = num_layers
        self.max_positions = max_positions
        self.period = period
        self.progress = progress
        self.layers: dict[int, Layer | None] = {}
        """By layer; None where the layer has a sliding window."""

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
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function: causal attention, and the layer's scores.

        Args:
            query: `[1, num_heads, seq_len, head_dim]`; key, value: with KV heads.

        Raises:
            NotImplementedError: attention that the probe does not understand.
        """
        _check_attention(module, key, value, attention_mask, kwargs)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        window = sliding_window
        if window is not None and window >= self.max_positions:
            window = None
        self.layers[int(module.layer_idx)] = (  # type: ignore[arg-type]
            self.score(query[0], key[0], scale, softcap) if window is None else None
        )
        self.progress.update()
        out = causal_attention(query, key, value, scale, softcap, window)
        return out.transpose(1, 2).contiguous(), None

    def score(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, soft_cap: float | None
    ) -> Layer:
        """Scores of one layer; `query` and `key` are `[heads, seq_len, head_dim]`."""
        scores = repeat_scores(query, key, scale, self.period, soft_cap)
        # A KV head gets the best score of its query heads.
        echo, induction = (x.view(key.shape[0], -1).amax(1).tolist() for x in scores)
        return Layer(echo, induction, key.shape[-1])

    def take(self) -> dict[int, Layer]:
        """The layers with full attention that were seen; starts again with none.

        Raises:
            NotImplementedError: a layer did not pass through transformers' registry, all have
                sliding windows, or layers differ in KV heads or head size.
        """
        if sorted(self.layers) != list(range(self.num_layers)):
            raise _refuse(
                f"a model of which {len(self.layers)} of {self.num_layers} layers pass through "
                "transformers' attention interface"
            )
        full = {at: layer for at, layer in sorted(self.layers.items()) if layer is not None}
        if not full:
            raise _refuse(
                "a model whose layers all have a sliding window, so that no head sees far,"
            )
        if len({(len(layer.echo), layer.head_size) for layer in full.values()}) > 1:
            raise _refuse("a model whose layers differ in KV heads or head size")
        self.layers = {}
        return full


def _refuse(found: str) -> NotImplementedError:
    return NotImplementedError(f"razor calibrate: {found} is not covered; covered are {COVERED}")


def _check_attention(
    module: nn.Module,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse attention whose weights are not the softmax of causal scores."""
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _refuse("attention that is not causal")
    if attention_mask is not None:
        raise _refuse("attention with a mask of the model's own")
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise _refuse(f"attention with {what}")
    if key.shape[-1] != value.shape[-1]:
        raise _refuse(f"attention with keys of {key.shape[-1]} and values of {value.shape[-1]}")


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    tile: int = 256,
) -> torch.Tensor:
    """Attention with memory linear in the sequence: its matrix is never formed.

    Args:
        query: `[1, num_heads, seq_len, head_dim]`; key, value: with KV heads.
        soft_cap: of logits. window: latest tokens that a query sees, itself included.
        tile: queries at a time, where PyTorch has no fused form.

    Returns:
        `[1, num_heads, seq_len, head_dim]`.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    if soft_cap is None and window is None:
        # PyTorch's third form, MATH, would form the matrix.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    out = torch.empty_like(query)
    for start in range(0, query.shape[2], tile):
        rows = torch.arange(start, min(start + tile, query.shape[2]), device=query.device)
        begin = max(0, start - window + 1) if window is not None else 0
        cols = torch.arange(begin, int(rows[-1]) + 1, device=query.device)
        logits = query[:, :, rows].float() @ key[:, :, cols].float().transpose(2, 3) * scale
        back = rows[:, None] - cols
        unseen = (back < 0) if window is None else (back < 0) | (back >= window)
        weights = soft_capped(logits, soft_cap).masked_fill(unseen, -torch.inf).softmax(-1)
        out[:, :, rows] = weights.to(value.dtype) @ value[:, :, cols]
    return out


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
    """Mean over seeds, rounded to six digits, so that noise does not make files differ."""
    names = rounds[0]
    return {
        name: tuple(
            tuple(round(sum(cell) / len(rounds), 6) for cell in zip(*rows, strict=True))
            for rows in zip(*(scores[name] for scores in rounds), strict=True)
        )
        for name in names
    }


def score_rows(layers: dict[int, Layer], num_layers: int) -> dict[str, list[list[float]]]:
    """echo and induction, rows of layers by columns of KV heads; 0 in a layer left out."""
    none = [0.0] * len(next(iter(layers.values())).echo)
    rows = [layers.get(at) for at in range(num_layers)]
    return {
        "echo": [layer.echo if layer else none for layer in rows],
        "induction": [layer.induction if layer else none for layer in rows],
    }


def choose(
    scores: dict[str, Any], options: ProbeOptions, left_out: Container[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """The top shares of the whole model, rounded up; ties go to the lower layer and head.

    Args:
        left_out: layers whose heads are neither chosen nor counted.

    Returns:
        Sorted KV heads, a tuple per layer.
    """
    chosen: set[tuple[int, int]] = set()
    for name in ("induction", "echo"):
        ranked = sorted(
            (-score, layer, head)
            for layer, row in enumerate(scores[name])
            for head, score in enumerate(row)
            if layer not in left_out
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
    """The period, shortened so that four copies fit the model.

    Raises:
        ValueError: the model is too short for any probe.
    """
    period = min(options.period, (max_positions - 1) // COPIES)
    if period < 2:
        raise ValueError(f"a model of {max_positions} positions is too short for the probe")
    return period


def check_config(config: Any) -> None:
    """Refuse a model that the probe would misread, before its weights are loaded.

    Raises:
        NotImplementedError: naming what was found.
    """
    if config.is_encoder_decoder:
        raise _refuse(f"a {config.model_type} model, an encoder-decoder,")
    if getattr(config, "alibi", False):
        raise _refuse(f"a {config.model_type} model with ALiBi")
    if not (getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)):
        raise _refuse(f"a {config.model_type} model, without rotary embeddings,")
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise _refuse(f"a {config.model_type} model with layers of {', '.join(others)}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _refuse(f"a {config.model_type} model whose layers share keys and values")


def calibrate(
    model_name: str,
    options: ProbeOptions,
    device_map: str | dict[str, Any] | None = None,
    dtype: str = "auto",
    bound: alibi.BoundOptions = alibi.BoundOptions(),  # noqa: B008, it is frozen
    revision: str | None = None,
) -> HeadProfile:
    """Choose a model's retrieval heads: by the probe, or for an ALiBi model by the bound.

    Args:
        model_name: folder or hub name.
        device_map: as in transformers; by default all GPUs, or the CPU where there is none.
        dtype: as in transformers.
        bound: for ALiBi models, which are not run.
        revision: branch, tag or commit of a hub model; its main branch by default.

    Raises:
        ValueError: the model is too short, or its files do not fit.
        NotImplementedError: a kind of model that is not covered.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(model_name, revision=revision)
        shape = alibi.shape_of(raw)
        if shape is not None:
            return alibi.calibrate(model_name, shape, bound, revision)
        return probe_model(model_name, options, device_map, dtype, revision)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{model_name} and a probe of {1 + COPIES * options.period:,} tokens do not fit the "
            "device: try --device-map auto, or a shorter --period"
        ) from error
    except UnpicklingError as error:
        raise ValueError(
            f"{model_name}: its weights are not plain tensors; nothing was run"
        ) from error
    except (OSError, SafetensorError) as error:
        # transformers' own message, which does not always name the model.
        raise ValueError(f"{model_name}: {' '.join(str(error).split())}") from error


def _device_map(asked: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """The map to load with: what was asked for, or all GPUs where there are any."""
    if str(asked).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device map {asked}: no CUDA device is here")
    chosen = "auto" if asked is None and torch.cuda.is_available() else asked
    if chosen is not None and not is_accelerate_available():
        raise ValueError(f"device map {chosen} needs accelerate: pip install accelerate")
    return chosen


def probe_model(
    model_name: str,
    options: ProbeOptions,
    device_map: str | dict[str, Any] | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> HeadProfile:
    """Run the probe on a model with rotary embeddings; arguments and errors as `calibrate`."""
    device_map = _device_map(device_map)
    config = AutoConfig.from_pretrained(model_name, revision=revision).get_text_config()
    check_config(config)
    max_positions = getattr(config, "max_position_embeddings", 1 + COPIES * options.period)
    period = fitting_period(options, max_positions)
    vocab, bos_token = probe_vocabulary(model_name, config, revision)
    layers, heads = config.num_hidden_layers, {}
    rounds = []
    with (
        tqdm(total=layers * len(options.seeds), desc="layers x seeds", unit="layer") as progress,
        # Weights that a device map puts on disk go into this folder.
        tempfile.TemporaryDirectory() as folder,
    ):
        probe = Probe(layers, max_positions, period, progress)
        AttentionInterface.register(ATTENTION, probe.attend)
        model = AutoModelForCausalLM.from_pretrained(
            model_name,
            revision=revision,
            attn_implementation=ATTENTION,
            dtype=dtype,
            device_map=device_map,
            offload_folder=folder if device_map is not None else None,
        ).eval()
        for seed in options.seeds:
            heads = run_probe(model, probe, probe_ids(vocab, bos_token, period, seed))
            rounds.append(score_rows(heads, layers))
        # An engine may start next, and needs the GPU memory that PyTorch keeps.
        del model
        torch.cuda.empty_cache()
    return _profile(rounds, heads, options, period)


def probe_vocabulary(
    model_name: str, config: PreTrainedConfig, revision: str | None = None
) -> tuple[list[int], int | None]:
    """Token ids that the probe draws from, and the one that begins a sequence, if any.

    Special tokens are left out. A model without a tokenizer gives all of its vocabulary but the
    special tokens that its config names.

    Args:
        config: of the model's text part.
    """
    size = config.vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, revision=revision)
        num_tokens = min(len(tokenizer), size)
    except (OSError, ValueError):
        num_tokens = 0
    if num_tokens > 0:
        special, bos_token = set(tokenizer.all_special_ids), tokenizer.bos_token_id
    else:
        num_tokens, bos_token = size, getattr(config, "bos_token_id", None)
        named = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        special = {i for ids in named for i in (ids if isinstance(ids, list) else [ids])}
    return [i for i in range(num_tokens) if i not in special], bos_token


def run_probe(model: PreTrainedModel, probe: Probe, ids: torch.Tensor) -> dict[int, Layer]:
    """Run one sequence through a model that was loaded with `probe.attend` as its attention."""
    # Offloaded weights are on `meta`; accelerate then moves the ids itself.
    on = ids if model.device.type == "meta" else ids.to(model.device)
    with torch.no_grad():
        # The decoder alone: logits over a vocabulary are not needed, and large.
        model.base_model(on, use_cache=False)
    return probe.take()


def _profile(
    rounds: list[dict[str, list[list[float]]]],
    layers: dict[int, Layer],
    options: ProbeOptions,
    period: int,
) -> HeadProfile:
    scores = mean_scores(rounds)
    num_layers = len(scores["echo"])
    sliding = tuple(at for at in range(num_layers) if at not in layers)
    choices = [choose(scores, options, sliding) for scores in rounds]
    return HeadProfile(
        num_layers=num_layers,
        num_kv_heads=len(scores["echo"][0]),
        head_size=next(iter(layers.values())).head_size,
        retrieval_heads=choose(scores, options, sliding),
        scores=scores,
        made_by={
            "method": "probe of four repeats, RazorAttention (arXiv 2407.15891)",
            "period": period,
            "seeds": list(options.seeds),
            "induction_share": options.induction,
            "echo_share": options.echo,
            "stability": round(stability(choices), 4),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
        sliding_layers=sliding,
    )
