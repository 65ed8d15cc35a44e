"""Find a model's retrieval heads: models loaded by transformers, the probe, and the choice.

Works on any decoder with rotary embeddings that transformers loads: queries and keys are
read where transformers passes them to its attention function, after the rotary
embedding, so no model is known by name. Layers with a sliding window are left out,
because their heads cannot see far. ALiBi models need no probe: see `alibi`. The other way to
choose, gradients by gates, is in `attribution`.
"""

import math
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_accelerate_available

from razor_kernels.scores import COPIES, repeat_scores
from razor_vllm.heads import alibi, attribution
from razor_vllm.heads.attention import causal_attention, check_attention, refuse
from razor_vllm.heads.attribution import AttributionOptions, check_seeds
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.heads.shapes import FULL, LINEAR, layer_kinds

Method = Literal["probe", "attribution"]
ATTENTION = "razor_probe"
"""Name of the probing attention in transformers' registry."""


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
        check_seeds(self.seeds)

    @property
    def memory_advice(self) -> str:
        """What was run, and what to try where it does not fit a device."""
        return (
            f"a probe of {1 + COPIES * self.period:,} tokens do not fit the device: try "
            "--device-map auto, or a shorter --period"
        )


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
        without: layers that have no attention.
    """

    def __init__(
        self,
        num_layers: int,
        max_positions: int,
        period: int,
        progress: tqdm,
        without: Container[int] = (),
    ) -> None:
        self.num_layers = num_layers
        self.attending = [layer for layer in range(num_layers) if layer not in without]
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
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function: causal attention, and the layer's scores.

        Args:
            query: `[1, num_heads, seq_len, head_dim]`; key, value: with KV heads.
            s_aux: learned sinks, `[num_heads]`.

        Raises:
            NotImplementedError: attention that the probe does not understand.
        """
        check_attention(module, key, value, attention_mask, kwargs)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        window = sliding_window
        if window is not None and window >= self.max_positions:
            window = None
        self.layers[int(module.layer_idx)] = (  # type: ignore[arg-type]
            self.score(query[0], key[0], scale, softcap, s_aux) if window is None else None
        )
        self.progress.update()
        out = causal_attention(query, key, value, scale, softcap, window, learned_sinks=s_aux)
        return out.transpose(1, 2).contiguous(), None

    def score(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        soft_cap: float | None,
        learned_sinks: torch.Tensor | None,
    ) -> Layer:
        """Scores of one layer; `query` and `key` are `[heads, seq_len, head_dim]`."""
        scores = repeat_scores(query, key, scale, self.period, soft_cap, learned_sinks)
        # A KV head gets the best score of its query heads.
        echo, induction = (x.view(key.shape[0], -1).amax(1).tolist() for x in scores)
        return Layer(echo, induction, key.shape[-1])

    def take(self) -> dict[int, Layer]:
        """The layers with full attention that were seen; starts again with none.

        Raises:
            NotImplementedError: a layer did not pass through transformers' registry, all have
                sliding windows, or layers differ in KV heads or head size.
        """
        if sorted(self.layers) != self.attending:
            raise refuse(
                f"a model of which {len(self.layers)} of {len(self.attending)} layers pass through "
                "transformers' attention interface"
            )
        full = {at: layer for at, layer in sorted(self.layers.items()) if layer is not None}
        if not full:
            raise refuse(
                "a model whose layers all have a sliding window, so that no head sees far,"
            )
        if len({(len(layer.echo), layer.head_size) for layer in full.values()}) > 1:
            raise refuse("a model whose layers differ in KV heads or head size")
        self.layers = {}
        return full


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
        raise refuse(f"a {config.model_type} model, an encoder-decoder,")
    if getattr(config, "alibi", False):
        raise refuse(f"a {config.model_type} model with ALiBi")
    if not (getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)):
        raise refuse(f"a {config.model_type} model, without rotary embeddings,")
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {FULL, "sliding_attention", LINEAR})
    if others:
        raise refuse(f"a {config.model_type} model with layers of {', '.join(others)}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse(f"a {config.model_type} model whose layers share keys and values")


def default_method(model_name: str, revision: str | None = None) -> Method:
    """Attribution; the probe where it alone can be run.

    That is a model that gives no gradients, has no tokenizer or one whose tokens are so short
    that prompts do not fit, or fewer positions than a prompt.
    """
    options = AttributionOptions()
    try:
        config, _ = PreTrainedConfig.get_config_dict(model_name, revision=revision)
        if config.get("quantization_config"):
            return "probe"
        if config.get("max_position_embeddings", options.length) < options.length:
            return "probe"
        attribution.prompts_of(_tokenizer(model_name, revision), options)
    except OSError:
        pass  # not a model: either method says so
    except ValueError:
        return "probe"
    return "attribution"


def calibrate(
    model_name: str,
    options: ProbeOptions | AttributionOptions,
    device_map: str | dict[str, Any] | None = None,
    dtype: str = "auto",
    bound: alibi.BoundOptions = alibi.BoundOptions(),  # noqa: B008, it is frozen
    revision: str | None = None,
) -> HeadProfile:
    """Choose a model's retrieval heads, or an ALiBi model's by the bound.

    Args:
        model_name: folder or hub name.
        options: of the method: probe or attribution.
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
        if isinstance(options, AttributionOptions):
            return attribute_model(model_name, options, device_map, dtype, revision)
        return probe_model(model_name, options, device_map, dtype, revision)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(f"{model_name} and {options.memory_advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # a CPU has no error of its own for it
            raise
        raise ValueError(f"{model_name} and {options.memory_advice}") from error
    except UnpicklingError as error:
        raise ValueError(
            f"{model_name}: its weights are not plain tensors; nothing was run"
        ) from error
    except (OSError, SafetensorError) as error:
        # transformers' own message, which does not always name the model.
        raise ValueError(f"{model_name}: {' '.join(str(error).split())}") from error
    finally:
        # An engine may start next, and needs the GPU memory that PyTorch keeps.
        torch.cuda.empty_cache()


def _device_map(asked: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """The map to load with: what was asked for, or all GPUs where there are any."""
    if str(asked).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device map {asked}: no CUDA device is here")
    chosen = "auto" if asked is None and torch.cuda.is_available() else asked
    if chosen is not None and not is_accelerate_available():
        raise ValueError(f"device map {chosen} needs accelerate: pip install accelerate")
    return chosen


@contextmanager
def loaded(
    model_name: str,
    attend: Callable[..., Any],
    device_map: str | dict[str, Any] | None,
    dtype: str,
    revision: str | None,
) -> Iterator[PreTrainedModel]:
    """A model that runs with `attend` as its attention; arguments and errors as `calibrate`."""
    AttentionInterface.register(ATTENTION, attend)
    # Weights that a device map puts on disk go into this folder.
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            model_name,
            revision=revision,
            attn_implementation=ATTENTION,
            dtype=dtype,
            device_map=device_map,
            offload_folder=folder if device_map is not None else None,
        ).eval()
        yield model


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
    linear = [at for at, kind in enumerate(layer_kinds(config)) if kind == LINEAR]
    with tqdm(total=layers * len(options.seeds), desc="layers x seeds", unit="layer") as progress:
        probe = Probe(layers, max_positions, period, progress, linear)
        with loaded(model_name, probe.attend, device_map, dtype, revision) as model:
            for seed in options.seeds:
                heads = run_probe(model, probe, probe_ids(vocab, bos_token, period, seed))
                rounds.append(score_rows(heads, layers))
    return _profile(rounds, heads, options, period)


def attribute_model(
    model_name: str,
    options: AttributionOptions,
    device_map: str | dict[str, Any] | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> HeadProfile:
    """Attribute losses to heads; arguments and errors as `calibrate`.

    Raises:
        ValueError: besides, no tokenizer, or no gradients because the model is quantised.
    """
    device_map = _device_map(device_map)
    whole = AutoConfig.from_pretrained(model_name, revision=revision)
    config = whole.get_text_config()
    check_config(config)
    if getattr(whole, "quantization_config", None):
        raise ValueError(
            f"{model_name} is quantised and gives no gradients: calibrate the model it was made "
            "from, whose profile fits, or use --method probe"
        )
    max_positions = getattr(config, "max_position_embeddings", options.length)
    if options.length > max_positions:
        raise ValueError(
            f"a prompt of {options.length:,} tokens is longer than the model's {max_positions:,} "
            "positions: give a shorter --length"
        )
    rounds = attribution.prompts_of(_tokenizer(model_name, revision), options)
    gated = attribution.Gated(max_positions, options.window, options.sinks)
    with loaded(model_name, gated.attend, device_map, dtype, revision) as model:
        found = attribution.attribute(model, gated, rounds)
    return _attributed(found, options)


def _tokenizer(model_name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model_name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model_name} has no tokenizer that transformers reads, and attribution needs one; "
            "--method probe needs none"
        ) from error


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
        other_layers=sliding,
    )


def _attributed(found: attribution.Found, options: AttributionOptions) -> HeadProfile:
    mixed = [attribution.mix(kinds) for kinds in found.rounds]
    scores = torch.stack(mixed).mean(0)
    choices = [attribution.choose(one, found.full_layers, options) for one in mixed]
    num_layers, num_kv_heads = scores.shape
    return HeadProfile(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_size=found.head_size,
        retrieval_heads=attribution.choose(scores, found.full_layers, options),
        scores={"attribution": tuple(tuple(round(x, 6) for x in row) for row in scores.tolist())},
        made_by={
            "method": "attribution: gradients by gates between full attention and sinks and window",
            "rule": options.rule,
            "text": str(options.text) if options.text is not None else "razor_vllm's own",
            "length": options.length,
            "window": options.window,
            "sinks": options.sinks,
            "prompts": options.prompts,
            "seeds": list(options.seeds),
            "gates": list(attribution.GATES),
            "weights": attribution.WEIGHTS,
            "losses": {k: [round(x, 4) for x in row] for k, row in found.losses.items()},
            "stability": round(stability(choices), 4),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
        other_layers=tuple(at for at in range(num_layers) if at not in found.full_layers),
    )


def joined(profiles: Sequence[HeadProfile]) -> HeadProfile:
    """One model's profiles by several methods: the last one's choice, and everyone's scores."""
    *others, last = profiles
    if not others:
        return last
    scores = {name: rows for profile in profiles for name, rows in profile.scores.items()}
    made_by = {**last.made_by, "scores_by": [profile.made_by for profile in others]}
    return replace(last, scores=scores, made_by=made_by)


def rechosen(profile: HeadProfile, options: ProbeOptions | AttributionOptions) -> HeadProfile:
    """Other heads by the scores that a profile has; no model is run.

    Args:
        options: of the method whose scores decide; only how it chooses counts.

    Raises:
        ValueError: the profile lacks those scores, or more heads are asked for than there are.
    """
    by_probe = isinstance(options, ProbeOptions)
    needed = ("induction", "echo") if by_probe else ("attribution",)
    if not set(needed) <= profile.scores.keys():
        has = ", ".join(profile.scores) or "none"
        raise ValueError(f"the profile has no scores of {' and '.join(needed)} (it has: {has})")
    rule: dict[str, float]
    if isinstance(options, ProbeOptions):
        rule = {"induction_share": options.induction, "echo_share": options.echo}
        heads = choose(dict(profile.scores), options, profile.other_layers)
    else:
        rule = options.rule
        scores = torch.tensor(profile.scores["attribution"], dtype=torch.float64)
        heads = attribution.choose(scores, profile.full_layers, options)
    # How far seeds agree was said of another choice.
    made_by = {name: value for name, value in profile.made_by.items() if name != "stability"}
    chosen_by = {"scores": list(needed), "rule": rule}
    return replace(profile, retrieval_heads=heads, made_by={**made_by, "chosen_by": chosen_by})
