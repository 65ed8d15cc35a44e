"""Published head patterns into profiles, and profiles into DuoAttention's format.

format       file                               what it holds
duo          full_attention_heads.tsv, folder   gates, rows of layers (DuoAttention, LServe)
tsv          *.tsv                              the same with 0 and 1 only: a set
msmodelslim  *.pt                               {"prefix_matching": {layer: [KV heads]}, ...}
goldenstick  *.json                             {layer: [KV heads]}
headkv       *.json                             {"layer-head": [scores]} of query heads: a ranking

Gates and rankings need a share or a threshold; sets are taken unchanged.
"""

import json
import math
import pickle
from collections.abc import Container, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from razor_vllm.heads.profile import HeadProfile, read_bounded, write_whole
from razor_vllm.heads.shapes import ModelShape

DUO_FILE = "full_attention_heads.tsv"
DUO_SIZES = "config.json"
Rows = tuple[tuple[float, ...], ...]
_SLACK = 0.01
"""Published gates leave 0..1 by up to 0.0014 (DuoAttention's Llama-2-7B); they are clipped."""


class Selection(NamedTuple):
    """How heads are chosen from gates or a ranking: by one of the two.

    share: of the model's KV heads, rounded up. threshold: least gate.
    """

    share: float | None = None
    threshold: float | None = None


def parse_tsv(text: str) -> Rows:
    """Rows of gates in 0..1, separated by tabs.

    Raises:
        ValueError: empty, a BOM, another separator, uneven rows, or no number in 0..1.
    """
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte-order mark; accepted is plain UTF-8")
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = tuple(float(cell) for cell in line.split("\t"))
        except ValueError:
            raise ValueError(
                f"line {number}: {line[:40]!r} is not numbers with tabs between"
            ) from None
        if not all(math.isfinite(x) and -_SLACK <= x <= 1 + _SLACK for x in row):
            raise ValueError(f"line {number}: gates lie in 0 to 1")
        rows.append(tuple(min(max(x, 0.0), 1.0) for x in row))
    if not rows:
        raise ValueError("holds no rows")
    if len({len(row) for row in rows}) > 1:
        raise ValueError("rows differ in length")
    return tuple(rows)


def _json(raw: bytes) -> dict[str, Any]:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not a number that is accepted")

    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(data, dict) or not data:
        raise ValueError("is not an object with entries")
    return data


def _index(value: object, what: str) -> int:
    """A whole number, also where it is written as a string or an array's element."""
    try:
        number = int(str(value))
    except ValueError:
        raise ValueError(f"{what} {value!r} is not a whole number") from None
    if number < 0:
        raise ValueError(f"{what} {value!r} is negative")
    return number


def heads_of_sets(sets: Sequence[dict[Any, Any]], shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    """The union of `{layer: [KV heads]}` mappings.

    Raises:
        ValueError: a layer or head that the model does not have.
    """
    chosen: list[set[int]] = [set() for _ in range(shape.num_layers)]
    for heads_by_layer in sets:
        if not isinstance(heads_by_layer, dict):
            raise ValueError("is not a mapping of layers to KV heads")
        for key, heads in heads_by_layer.items():
            layer = _index(key, "layer")
            if layer >= shape.num_layers:
                raise ValueError(f"layer {layer} is outside 0..{shape.num_layers - 1}")
            if not isinstance(heads, list | tuple):
                raise ValueError(f"layer {layer}: {heads!r} is not a list of KV heads")
            for value in heads:
                head = _index(value, f"layer {layer}: head")
                if head >= shape.num_kv_heads:
                    raise ValueError(
                        f"layer {layer}: head {head} is outside 0..{shape.num_kv_heads - 1}"
                    )
                chosen[layer].add(head)
    return tuple(tuple(sorted(heads)) for heads in chosen)


def scores_of_ranking(data: dict[str, Any], shape: ModelShape) -> Rows:
    """HeadKV's scores as `[layers][KV heads]`: the mean of each query head, the best of a group.

    Raises:
        ValueError: a head that is missing or unknown, or scores that are not numbers.
    """
    group = shape.num_heads // shape.num_kv_heads
    rows = [[-1.0] * shape.num_heads for _ in range(shape.num_layers)]
    for key, values in data.items():
        layer, _, head = key.partition("-")
        at, query_head = _index(layer, "layer"), _index(head, "head")
        if at >= shape.num_layers or query_head >= shape.num_heads:
            raise ValueError(f"head {key!r} is not one of the model's")
        numbers = values if isinstance(values, list) else [values]
        if not numbers or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x >= 0
            for x in numbers
        ):
            raise ValueError(f"head {key!r}: scores are finite and not negative")
        rows[at][query_head] = sum(numbers) / len(numbers)
    missing = [f"{at}-{h}" for at, row in enumerate(rows) for h, x in enumerate(row) if x < 0]
    if missing:
        raise ValueError(f"scores of {len(missing)} heads are missing, {missing[0]} first")
    return tuple(
        tuple(max(row[i : i + group]) for i in range(0, shape.num_heads, group)) for row in rows
    )


def _without(rows: Rows, shape: ModelShape) -> Rows:
    """Gates or scores with nothing in layers that have no full attention."""
    nothing = (0.0,) * shape.num_kv_heads
    return tuple(nothing if at in shape.other_layers else row for at, row in enumerate(rows))


def select(
    gates: Rows, selection: Selection, left_out: Container[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """KV heads by gate; ties go to the lower layer and head.

    Args:
        left_out: layers whose heads are neither chosen nor counted.

    Raises:
        ValueError: neither or both of share and threshold, a share outside (0, 1].
    """
    if (selection.share is None) == (selection.threshold is None):
        raise ValueError("gates and rankings need one of --share and --threshold")
    if selection.threshold is not None:
        limit = selection.threshold
        if limit < 0 or not any(x >= limit for row in gates for x in row):
            raise ValueError(f"threshold is {limit}: no gate reaches it, or every gate would")
        return tuple(
            tuple(h for h, x in enumerate(row) if x >= limit and at not in left_out)
            for at, row in enumerate(gates)
        )
    assert selection.share is not None
    if not 0 < selection.share <= 1:
        raise ValueError(f"share is {selection.share}; accepted are numbers above 0 up to 1")
    ranked = sorted(
        (-x, at, h) for at, row in enumerate(gates) for h, x in enumerate(row) if at not in left_out
    )
    count = math.ceil(round(selection.share * len(ranked), 6))
    chosen = {(at, h) for _, at, h in ranked[:count]}
    return tuple(
        tuple(h for h in range(len(row)) if (at, h) in chosen) for at, row in enumerate(gates)
    )


def duo_sizes(folder: Path) -> dict[str, int]:
    """Sinks and window, in tokens, that a DuoAttention pattern was made for; {} if not said.

    Raises:
        ValueError: a `config.json` that is not JSON, or a size that is not a whole number.
    """
    path = folder / DUO_SIZES
    if not path.is_file():
        return {}
    try:
        data = _json(read_bounded(path, "pattern's sizes"))
        names = {"sinks": "sink_size", "window": "recent_size"}
        return {name: _index(data[key], key) for name, key in names.items() if key in data}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_tsv(
    raw: bytes, shape: ModelShape, selection: Selection
) -> tuple[tuple[tuple[int, ...], ...], dict[str, Rows]]:
    gates = parse_tsv(raw.decode("utf-8"))
    found = (len(gates), len(gates[0]))
    if found != (shape.num_layers, shape.num_kv_heads):
        raise ValueError(
            f"has {found[0]} layers of {found[1]} KV heads; the model has "
            f"{shape.num_layers} of {shape.num_kv_heads}"
        )
    if selection == Selection() and all(x in (0.0, 1.0) for row in gates for x in row):
        return tuple(tuple(h for h, x in enumerate(row) if x) for row in gates), {}
    gates = _without(gates, shape)
    return select(gates, selection, shape.other_layers), {"gate": gates}


def _from_pt(raw: bytes, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    try:
        data = torch.load(BytesIO(raw), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise ValueError("is not a file of plain lists and numbers; it was not run") from error
    names = ("prefix_matching", "copying")
    if not isinstance(data, dict) or not set(data) & set(names) or set(data) - set(names):
        raise ValueError(f"holds other keys than {' and '.join(names)}")
    return heads_of_sets([data[name] for name in names if name in data], shape)


def convert(path: Path, shape: ModelShape, selection: Selection) -> HeadProfile:
    """Read a published pattern; its name and content tell its format.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    source = path / DUO_FILE if path.is_dir() else path
    sizes = duo_sizes(path) if path.is_dir() else {}
    scores: dict[str, Rows] = {}
    raw = read_bounded(source, "pattern")
    try:
        if source.suffix == ".tsv":
            heads, scores = _from_tsv(raw, shape, selection)
        elif source.suffix == ".pt":
            heads = _from_pt(raw, shape)
        elif source.suffix == ".json":
            data = _json(raw)
            if all("-" in key for key in data):
                scores = {"importance": _without(scores_of_ranking(data, shape), shape)}
                heads = select(scores["importance"], selection, shape.other_layers)
            else:
                heads = heads_of_sets([data], shape)
        else:
            raise ValueError("accepted are .tsv, .pt, .json and folders of DuoAttention's form")
        return HeadProfile(
            shape.num_layers,
            shape.num_kv_heads,
            shape.head_size,
            heads,
            scores,
            {
                "method": "converted",
                "file": source.name,
                "selection": selection._asdict(),
                **({"made_for": sizes} if sizes else {}),
            },
            shape.other_layers,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def write_duo(profile: HeadProfile, folder: Path, sinks: int, window: int) -> None:
    """Write a profile in DuoAttention's format: a gate of 0 or 1 per head, sinks and window.

    Args:
        sinks, window: tokens.

    Raises:
        ValueError: a size below 0.
    """
    for name, value in (("sinks", sinks), ("window", window)):
        if value < 0:
            raise ValueError(f"{name} is {value}; accepted are whole numbers from 0 up")
    rows = []
    for heads in profile.retrieval_heads:
        gates = [str(float(head in heads)) for head in range(profile.num_kv_heads)]
        rows.append("\t".join(gates) + "\n")
    sizes = {"sink_size": sinks, "recent_size": window}
    write_whole(folder / DUO_FILE, "".join(rows).encode())
    write_whole(folder / DUO_SIZES, (json.dumps(sizes) + "\n").encode())
