"""How far the heads of an ALiBi model can see, from its weights alone: no probe is run.

A head of slope m subtracts m from the score for each token of distance, and scores are bounded,
so nothing is seen past some distance (RazorAttention, arXiv 2407.15891, sec. 3.1):

    L_h = (2 * s * (||W_Q^T W_K||_2 * R^2 + ||W_K^T b_Q||_2 * R) - ln eps) / m
    R^2 = ||gamma||^2 + ||b||^2

with gamma and b of the norm before attention, s the factor on q.k, b_Q the query's bias (BLOOM;
the paper's models have none, and a key's bias cancels). A key further back than L_h gets a
weight of at most eps, all of them together at most eps / (1 - e^-m). As in the paper, R bounds
the norm's output if no coordinate is above its standard deviation; the strict supremum is
larger. Heads with L_h above the window are retrieval heads.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm

from razor_vllm.heads.profile import HeadProfile

MODELS = ("Baichuan-13B", "BLOOM", "MPT")


@dataclass(frozen=True)
class BoundOptions:
    """Which heads of an ALiBi model are retrieval heads.

    Args:
        window: tokens; heads that see further retrieve. Serve with the same window.
        epsilon: attention weight that counts as nothing.

    Raises:
        ValueError: a window below 0, or an epsilon outside (0, 1).
    """

    window: int = 4096
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window is {self.window}; accepted are whole numbers from 0 up")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}; accepted are numbers between 0 and 1")


@dataclass(frozen=True)
class AlibiShape:
    """Shape of an ALiBi model, in which every head has its own keys.

    Args:
        slopes: of each head. scale: factor on q.k.
        qkv, norm: names of a layer's fused projection and of the norm before it.
        by_head: whether the projection's rows are ordered by head, `[num_heads, 3, head_size]`,
            instead of `[3, num_heads, head_size]`.
        clip: bound of each coordinate of q and k, or None.
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    slopes: tuple[float, ...]
    scale: float
    qkv: str
    norm: str
    by_head: bool
    clip: float | None = None

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class LayerWeights(NamedTuple):
    """The weights of a layer that its bound needs, in fp32.

    query, key: `[num_heads, head_size, hidden_size]`. query_bias: `[num_heads, head_size]`.
    gamma, beta: `[hidden_size]`; zeros where the model has no such term.
    """

    query: torch.Tensor
    key: torch.Tensor
    query_bias: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor


def slopes(num_heads: int) -> tuple[float, ...]:
    """ALiBi's slopes as BLOOM and Baichuan have them (arXiv 2108.12409).

    Heads beyond a power of two get every other slope of twice as many heads.
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    first = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    rest = [2 ** (-4 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
    return tuple(first + rest)


def mpt_slopes(num_heads: int, bias_max: float) -> tuple[float, ...]:
    """MPT's slopes: of the next power of two, its second, fourth, ... first."""
    whole = 2 ** math.ceil(math.log2(num_heads))
    every = [2 ** (-bias_max * (i + 1) / whole) for i in range(whole)]
    return tuple(every if whole == num_heads else (every[1::2] + every[::2])[:num_heads])


def shape_of(config: dict[str, Any]) -> AlibiShape | None:
    """The shape of an ALiBi model that is covered, or None for any other model.

    Args:
        config: contents of `config.json`; no code of the model is run.

    Raises:
        ValueError: a size that is missing or makes no sense.
        NotImplementedError: an MPT model whose attention is not plain ALiBi.
    """
    read = {"bloom": _bloom, "mpt": _mpt, "baichuan": _baichuan}.get(str(config.get("model_type")))
    return read(config) if read else None


def _bloom(config: dict[str, Any]) -> AlibiShape:
    heads, hidden = _sizes(config, ("n_head", "num_attention_heads"), ("hidden_size", "n_embed"))
    return AlibiShape(
        num_layers=_whole(config, "n_layer", "num_hidden_layers"),
        num_heads=heads,
        hidden_size=hidden,
        slopes=slopes(heads),
        scale=(hidden // heads) ** -0.5,
        qkv="h.{}.self_attention.query_key_value",
        norm="h.{}.input_layernorm",
        by_head=True,
    )


def _mpt(config: dict[str, Any]) -> AlibiShape:
    attention = config.get("attn_config") or {}
    if not isinstance(attention, dict):
        raise ValueError("config.json: attn_config is not an object")
    heads, hidden = _sizes(config, ("n_heads",), ("d_model",))
    for name, plain in (("alibi", True), ("qk_ln", False), ("prefix_lm", False)):
        if bool(attention.get(name, plain)) != plain:
            raise NotImplementedError(
                f"razor calibrate: an mpt model with {name} {attention[name]} is not covered"
            )
    kind = attention.get("attn_type", "multihead_attention")
    if kind != "multihead_attention":
        raise NotImplementedError(f"razor calibrate: an mpt model with {kind} is not covered")
    return AlibiShape(
        num_layers=_whole(config, "n_layers"),
        num_heads=heads,
        hidden_size=hidden,
        slopes=mpt_slopes(heads, attention.get("alibi_bias_max", 8)),
        scale=attention.get("softmax_scale") or (hidden // heads) ** -0.5,
        qkv="blocks.{}.attn.Wqkv",
        norm="blocks.{}.norm_1",
        by_head=False,
        clip=attention.get("clip_qkv"),
    )


def _baichuan(config: dict[str, Any]) -> AlibiShape | None:
    heads, hidden = _sizes(config, ("num_attention_heads",), ("hidden_size",))
    if hidden == 4096:  # the 7B models, with rotary embeddings, bear the same model_type
        return None
    return AlibiShape(
        num_layers=_whole(config, "num_hidden_layers"),
        num_heads=heads,
        hidden_size=hidden,
        slopes=slopes(heads),
        scale=(hidden // heads) ** -0.5,
        qkv="layers.{}.self_attn.W_pack",
        norm="layers.{}.input_layernorm",
        by_head=False,
    )


def _whole(config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ValueError(f"config.json: {names[0]} is {config.get(names[0])!r}; accepted are 1 and up")


def _sizes(
    config: dict[str, Any], heads_names: Sequence[str], hidden_names: Sequence[str]
) -> tuple[int, int]:
    heads, hidden = _whole(config, *heads_names), _whole(config, *hidden_names)
    if hidden % heads:
        raise ValueError(f"config.json: {hidden} hidden units do not divide over {heads} heads")
    return heads, hidden


def product_norms(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`||W_Q^T W_K||_2` of each head, from `head_size x head_size` factors.

    Args:
        query, key: `[num_heads, head_size, hidden_size]`.

    Returns:
        `[num_heads]`. With W^T = Q R, the product is Q_q (R_q R_k^T) Q_k^T, and orthogonal
        factors keep the norm.
    """
    left, right = (torch.linalg.qr(x.transpose(1, 2), mode="r").R for x in (query, key))
    return torch.linalg.matrix_norm(left @ right.transpose(1, 2), 2)


def reach(weights: LayerWeights, shape: AlibiShape, epsilon: float) -> torch.Tensor:
    """L_h of the module's docstring, in tokens, `[num_heads]`.

    With `shape.clip` q and k are clipped, which only shortens them. Then the product of norms
    takes the place of the norm of the product, and `head_size * clip^2` bounds it.
    """
    radius = (weights.gamma.square().sum() + weights.beta.square().sum()).sqrt()
    if shape.clip is None:
        bias = torch.einsum("hd,hdn->hn", weights.query_bias, weights.key).norm(dim=-1)
        top = product_norms(weights.query, weights.key) * radius**2 + bias * radius
    else:
        query, key = (torch.linalg.matrix_norm(x, 2) for x in (weights.query, weights.key))
        top = (query * key * radius**2).clamp_max(shape.head_size * shape.clip**2)
    slope = torch.tensor(shape.slopes, dtype=top.dtype)
    return (2 * shape.scale * top - math.log(epsilon)) / slope


def weight_files(model_name: str, revision: str | None = None) -> list[Path]:
    """The model's safetensors files; those of a hub model are downloaded.

    Raises:
        ValueError: there are none.
    """
    folder = Path(model_name)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.json"]
        folder = Path(snapshot_download(model_name, revision=revision, allow_patterns=patterns))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{model_name} has no safetensors files; other formats are not read: convert it first"
        )
    return files


def layer_weights(files: Sequence[Path], shape: AlibiShape) -> Iterator[LayerWeights]:
    """Weights of one layer after another; only one layer's are in memory at a time.

    Raises:
        ValueError: a file that is not safetensors, or a weight that is missing, of another
            shape or not finite.
    """
    with ExitStack() as stack:
        owner: dict[str, Any] = {}
        for path in files:
            try:
                file = stack.enter_context(safetensors.safe_open(path, "pt"))  # type: ignore[no-untyped-call]
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path}: {error}") from error
            owner |= dict.fromkeys(file.keys(), file)
        for layer in range(shape.num_layers):
            yield _layer(owner, shape, layer)


def _layer(owner: dict[str, Any], shape: AlibiShape, layer: int) -> LayerWeights:
    hidden, heads, size = shape.hidden_size, shape.num_heads, shape.head_size
    qkv, norm = shape.qkv.format(layer), shape.norm.format(layer)
    weight = _tensor(owner, f"{qkv}.weight", (3 * hidden, hidden))
    bias = _tensor(owner, f"{qkv}.bias", (3 * hidden,), optional=True)
    gamma = _tensor(owner, f"{norm}.weight", (hidden,))
    beta = _tensor(owner, f"{norm}.bias", (hidden,), optional=True)
    order = (heads, 3, size) if shape.by_head else (3, heads, size)
    query, key, _ = weight.view(*order, hidden).unbind(int(shape.by_head))
    query_bias, _, _ = bias.view(*order).unbind(int(shape.by_head))
    return LayerWeights(query, key, query_bias, gamma, beta)


def _tensor(
    owner: dict[str, Any], name: str, shape: tuple[int, ...], optional: bool = False
) -> torch.Tensor:
    """A weight in fp32, whatever its name is prefixed with; zeros if it may be missing."""
    found = [key for key in owner if key == name or key.endswith(f".{name}")]
    if not found and optional:
        return torch.zeros(shape)
    if len(found) != 1:
        raise ValueError(f"the model's files have {len(found)} weights called {name}, not one")
    tensor = owner[found[0]].get_tensor(found[0])
    if tensor.shape != shape or not tensor.is_floating_point():
        raise ValueError(
            f"{found[0]} is {tensor.dtype} of {tuple(tensor.shape)}; expected are floats of {shape}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{found[0]} holds numbers that are not finite")
    return tensor.float()


def calibrate(
    model_name: str, shape: AlibiShape, options: BoundOptions, revision: str | None = None
) -> HeadProfile:
    """Choose the retrieval heads of an ALiBi model: those that see past the window.

    Raises:
        ValueError: files that are missing or do not fit.
    """
    rows = []
    layers = layer_weights(weight_files(model_name, revision), shape)
    for weights in tqdm(layers, desc="layers", unit="layer", total=shape.num_layers):
        rows.append(tuple(round(x, 1) for x in reach(weights, shape, options.epsilon).tolist()))
    return HeadProfile(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_heads,
        head_size=shape.head_size,
        retrieval_heads=tuple(
            tuple(head for head, tokens in enumerate(row) if tokens > options.window)
            for row in rows
        ),
        scores={"reach": tuple(rows)},
        made_by={
            "method": "bound of ALiBi heads, RazorAttention (arXiv 2407.15891)",
            "window": options.window,
            "epsilon": options.epsilon,
            "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
        },
    )
