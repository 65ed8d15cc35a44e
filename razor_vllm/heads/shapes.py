"""What a model's configuration says of its layers: which have full attention, and their heads."""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

FULL, LINEAR = "full_attention", "linear_attention"


class ModelShape(NamedTuple):
    """Shape of a model, as far as heads go.

    num_heads, num_kv_heads, head_size: of each layer with full attention.
    other_layers: those without.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    other_layers: tuple[int, ...] = ()


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """transformers' name for the kind of each layer.

    Args:
        config: of the model's text part.
    """
    kinds = getattr(config, "layer_types", None)
    return tuple(kinds) if kinds else (FULL,) * config.num_hidden_layers


def heads_of(config: PreTrainedConfig, layer: int) -> tuple[int, int, int]:
    """Query heads, KV heads and head size of a layer with attention; layers may differ."""
    per_layer: Any = getattr(config, "per_layer_config", None)
    own: Any = config if per_layer is None else per_layer[layer]
    num_heads = own.num_attention_heads
    return (
        num_heads,
        getattr(own, "num_key_value_heads", None) or num_heads,
        getattr(own, "head_dim", None) or own.hidden_size // num_heads,
    )


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The shape of a model.

    Args:
        config: of the model's text part.

    Raises:
        NotImplementedError: no layer has full attention, or such layers differ in heads.
    """
    kinds = layer_kinds(config)
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    heads = {heads_of(config, layer) for layer in full}
    if len(heads) != 1:
        found = "layers of unequal heads" if heads else f"no full attention, only {set(kinds)},"
        raise NotImplementedError(
            f"a {config.model_type} model with {found} is not covered; covered are models whose "
            "full-attention layers have as many heads of one size"
        )
    others = tuple(layer for layer, kind in enumerate(kinds) if kind != FULL)
    return ModelShape(len(kinds), *heads.pop(), others)
