"""The head profile: which KV heads of a model retrieve, and how that was found.

`razor_profile.json` is plain JSON:

    {"format": "razor-head-profile", "version": 1,
     "model": {"num_layers": 4, "num_kv_heads": 4, "head_size": 32},
     "retrieval_heads": [[0], [], [1, 3], []],       KV heads, a list per layer
     "scores": {"induction": [[0.9, ...], ...]},     a row per layer, a column per KV head
     "made_by": {"method": "..."},
     "other_layers": [1]}                            optional: layers of no full attention
"""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

FILE_NAME = "razor_profile.json"
FORMAT = "razor-head-profile"
VERSION = 1
MAX_BYTES = 16 * 1024 * 1024
_KEYS = {"format", "version", "model", "retrieval_heads", "scores", "made_by", "other_layers"}
_OLD_OTHER_LAYERS = "sliding_layers"
"""The name of `other_layers` in files of razor-vllm 0.1."""
_MODEL_KEYS = ("num_layers", "num_kv_heads", "head_size")


@dataclass(frozen=True)
class HeadProfile:
    """Choice of retrieval heads for one model.

    Args:
        num_layers: of the model. num_kv_heads, head_size: of its layers with full attention.
            The three are the model's fingerprint.
        retrieval_heads: sorted KV heads, a tuple per layer.
        scores: name to rows of layers by columns of KV heads, all finite and >= 0.
        made_by: how the profile was found, in any form.
        other_layers: layers without full attention, which a hybrid model has: sliding windows,
            Mamba. They have neither retrieval nor local heads here, and score 0.

    Raises:
        ValueError: a shape, a head or a score that does not fit.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    retrieval_heads: tuple[tuple[int, ...], ...]
    scores: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    other_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _MODEL_KEYS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; accepted are whole numbers >= 1")
        if len(self.retrieval_heads) != self.num_layers:
            raise ValueError(
                f"retrieval_heads has {len(self.retrieval_heads)} layers, "
                f"the model has {self.num_layers}"
            )
        for layer, heads in enumerate(self.retrieval_heads):
            self._check_heads(layer, heads)
        for name, rows in self.scores.items():
            self._check_scores(name, rows)
        self._check_other_layers()

    def _check_heads(self, layer: int, heads: tuple[int, ...]) -> None:
        for head in heads:
            if isinstance(head, bool) or not isinstance(head, int):
                raise ValueError(f"layer {layer}: head {head!r} is not a whole number")
            if not 0 <= head < self.num_kv_heads:
                raise ValueError(
                    f"layer {layer}: head {head} is outside 0..{self.num_kv_heads - 1}"
                )
        if list(heads) != sorted(set(heads)):
            raise ValueError(f"layer {layer}: heads {list(heads)} are not sorted and unique")

    def _check_scores(self, name: str, rows: tuple[tuple[float, ...], ...]) -> None:
        if len(rows) != self.num_layers or any(len(row) != self.num_kv_heads for row in rows):
            raise ValueError(
                f"scores {name!r} are not {self.num_layers} rows of {self.num_kv_heads}"
            )
        for layer, row in enumerate(rows):
            for value in row:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"scores {name!r}, layer {layer}: {value!r}")
                if not math.isfinite(value) or value < 0:
                    raise ValueError(
                        f"scores {name!r}, layer {layer}: {value!r} is not finite and >= 0"
                    )

    def _check_other_layers(self) -> None:
        layers = list(self.other_layers)
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"other layer {layer!r} is not a whole number")
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"other layer {layer} is outside 0..{self.num_layers - 1}")
            if self.retrieval_heads[layer]:
                raise ValueError(f"layer {layer} is no full attention, and has retrieval heads")
        if layers != sorted(set(layers)):
            raise ValueError(f"other_layers {layers} are not sorted and unique")
        if len(layers) == self.num_layers:
            raise ValueError("other_layers are all layers; none has heads to choose from")

    @property
    def num_retrieval_heads(self) -> int:
        return sum(len(heads) for heads in self.retrieval_heads)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers with full attention, whose heads are retrieval or local heads."""
        others = set(self.other_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in others)

    @property
    def num_heads(self) -> int:
        """KV heads of all layers with full attention."""
        return (self.num_layers - len(self.other_layers)) * self.num_kv_heads

    @property
    def kept_share(self) -> float:
        """Share of the KV heads that keep the whole context."""
        return self.num_retrieval_heads / self.num_heads

    @property
    def kept_shares(self) -> tuple[float, ...]:
        """Share of each layer's KV heads that keep the whole context."""
        return tuple(len(heads) / self.num_kv_heads for heads in self.retrieval_heads)

    def local_heads(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer with full attention that are not retrieval heads."""
        chosen = set(self.retrieval_heads[layer])
        return tuple(h for h in range(self.num_kv_heads) if h not in chosen)

    def check_model(
        self, num_layers: int, num_kv_heads: int, head_size: int, full_layers: Sequence[int]
    ) -> None:
        """Refuse a profile of another model.

        Args:
            full_layers: the model's layers with full attention, whose heads the others describe.

        Raises:
            ValueError: layers, KV heads or head size differ.
        """
        found = (self.num_layers, self.num_kv_heads, self.head_size)
        expected = (num_layers, num_kv_heads, head_size)
        if found != expected:
            raise ValueError(
                "razor: the head profile is for a model of {} layers, {} KV heads and "
                "head size {}; this model has {}, {} and {}".format(*found, *expected)
            )
        if self.full_layers != tuple(full_layers):
            raise ValueError(
                "razor: the head profile is for a model whose full-attention layers are "
                f"{_listed(self.full_layers)}; this model's are {_listed(full_layers)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON types."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": {name: getattr(self, name) for name in _MODEL_KEYS},
            "retrieval_heads": [list(heads) for heads in self.retrieval_heads],
            "scores": {name: [list(row) for row in rows] for name, rows in self.scores.items()},
            "made_by": self.made_by,
        }
        if self.other_layers:
            data["other_layers"] = list(self.other_layers)
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "HeadProfile":
        """Parse and check a profile.

        Raises:
            ValueError: not JSON, or as `from_dict`.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> "HeadProfile":
        """Check a parsed profile.

        Raises:
            ValueError: another format or version, or contents that do not fit.
        """
        if not isinstance(data, dict):
            raise ValueError("not an object")
        if data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')!r}; accepted is {FORMAT!r}")
        if data.get("version") != VERSION or isinstance(data["version"], bool):
            raise ValueError(f"version is {data.get('version')!r}; accepted is {VERSION}")
        if _OLD_OTHER_LAYERS in data and "other_layers" not in data:
            data = {**data, "other_layers": data[_OLD_OTHER_LAYERS]}
            del data[_OLD_OTHER_LAYERS]
        unknown = sorted(data.keys() - _KEYS)
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        model = _object(data, "model")
        missing = [name for name in _MODEL_KEYS if name not in model]
        if missing:
            raise ValueError(f"model lacks {', '.join(missing)}")
        return cls(
            **{name: model[name] for name in _MODEL_KEYS},
            retrieval_heads=_rows(data, "retrieval_heads"),
            scores={name: _rows(_object(data, "scores"), name) for name in data.get("scores", {})},
            made_by=_object(data, "made_by"),
            other_layers=_row(data, "other_layers"),
        )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a profile may hold")


def _object(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")
    return value


def _row(data: dict[str, Any], key: str) -> tuple[Any, ...]:
    row = data.get(key, [])
    if not isinstance(row, list):
        raise ValueError(f"{key} is not a list")
    return tuple(row)


def _rows(data: dict[str, Any], key: str) -> tuple[tuple[Any, ...], ...]:
    rows = data.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{key} is not a list of lists")
    return tuple(tuple(row) for row in rows)


def read_bounded(path: Path, what: str) -> bytes:
    """Contents of a file of at most 16 MB.

    Args:
        what: what the file is, for the refusal.

    Raises:
        ValueError: the file is missing, unreadable or larger.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"razor: cannot read {what} {path}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise ValueError(f"razor: {what} {path} is over {MAX_BYTES // 1024**2} MB")
    return raw


def read_profile(path: str | os.PathLike[str]) -> HeadProfile:
    """Read and check a head profile.

    Raises:
        ValueError: the file is missing, unreadable, over 16 MB or does not fit.
    """
    path = Path(path)
    raw = read_bounded(path, "head profile")
    try:
        return HeadProfile.from_json(raw.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"razor: head profile {path}: {error}") from error


def cache_path(model: str, revision: str | None = None) -> Path:
    """Where the user's cache keeps the profile of a model, by name or absolute path.

    Each revision of a hub model has its own profile.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = str(Path(model).absolute()) if Path(model).is_dir() else model
    if revision is not None and not Path(model).is_dir():
        name = f"{name}@{revision}"
    return Path(base) / "razor-vllm" / name.strip("/").replace("/", "--") / FILE_NAME


def places(model: str, revision: str | None = None) -> list[Path]:
    """Where a model's profile is looked for: beside the weights, then the user's cache.

    Args:
        revision: of a hub model; None is its main branch.
    """
    beside = [Path(model) / FILE_NAME] if Path(model).is_dir() else []
    if not beside:
        snapshot = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(snapshot, str):
            beside.append(Path(snapshot).with_name(FILE_NAME))
    return [*beside, cache_path(model, revision)]


def locate_profile(head_profile: str | None, model: str, revision: str | None = None) -> Path:
    """Path of the profile to use: the one given, or the first that is found.

    Args:
        model: a local folder, or a hub name with a local snapshot. revision: of a hub model.

    Raises:
        ValueError: none was given and none is found; names the command that makes one.
    """
    if head_profile is not None:
        return Path(head_profile)
    looked = places(model, revision)
    for path in looked:
        if path.is_file():
            return path
    at = "" if revision is None or Path(model).is_dir() else f" --revision {revision}"
    raise ValueError(
        f"razor: no head profile of {model} in {', '.join(map(str, looked))}. Make one: "
        f"razor calibrate {model}{at} (or start with --razor-calibrate, or name one with "
        "--razor-head-profile PATH)"
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part of it."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_profile(profile: HeadProfile, path: Path) -> None:
    """Write atomically, making the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, profile.to_json().encode())
