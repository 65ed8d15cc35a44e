"""The one configuration behind the flags and `additional_config["razor"]`."""

import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

KVPolicy = Literal["full", "razor"]
PrefillMode = Literal["exact", "windowed"]

CONFIG_KEY = "razor"
"""Key of vLLM's `additional_config` that holds these options."""


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"razor: {name} is {value!r}; accepted are whole numbers of tokens from 0 up"
        )


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"razor: {name} is {value!r}; accepted are {', '.join(accepted)}")


@dataclass(frozen=True)
class RazorConfig:
    """Options of the policy, checked when built.

    Raises:
        ValueError: an option outside what is accepted.
    """

    policy: KVPolicy = "razor"
    """full: vLLM as it is. razor: local heads keep sinks, a window and one slot."""
    head_profile: str | None = None
    """Path of the head profile; by default `razor_profile.json` beside the weights."""
    window: int = 4096
    """Latest tokens that a local head sees as written; where it is not given, shorter
    models get their own length."""
    window_ratio: float = 0.0
    """A query at position t has window max(window, ceil(t * ratio)); the paper: 0.2."""
    sinks: int = 4
    """First tokens that a local head keeps for ever."""
    prefill: PrefillMode = "exact"
    """exact: the prompt is attended densely. windowed: local heads window it too."""
    calibrate: bool = False
    """Whether to find the heads first where no profile is found."""
    compensation: bool = True
    """Whether dropped tokens leave a compensation slot; off only to measure it."""
    allow_no_retrieval_heads: bool = False
    """Whether a profile may name no retrieval head; on only to measure that."""

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, get_args(KVPolicy))
        _one_of("prefill", self.prefill, get_args(PrefillMode))
        _whole("window", self.window)
        _whole("sinks", self.sinks)
        ratio = self.window_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise ValueError(f"razor: window_ratio is {ratio!r}; accepted are numbers from 0 to 1")
        if not (math.isfinite(ratio) and 0 <= ratio <= 1):
            raise ValueError(f"razor: window_ratio is {ratio!r}; accepted are numbers from 0 to 1")
        if self.head_profile is not None and not isinstance(self.head_profile, str | os.PathLike):
            raise ValueError(f"razor: head_profile is {self.head_profile!r}; accepted is a path")
        for name in ("calibrate", "compensation", "allow_no_retrieval_heads"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"razor: {name} is {getattr(self, name)!r}; accepted are true and false"
                )

    @classmethod
    def from_dict(cls, options: object) -> "RazorConfig":
        """Options as written in `additional_config["razor"]`.

        Raises:
            ValueError: not an object, an unknown key, or a value not accepted.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(options, dict):
            raise ValueError(
                f"razor: additional_config[{CONFIG_KEY!r}] is {options!r}; "
                f"accepted is an object with keys of {', '.join(known)}"
            )
        unknown = sorted(str(key) for key in options.keys() - set(known))
        if unknown:
            raise ValueError(
                f"razor: unknown option {', '.join(unknown)}; accepted are {', '.join(known)}"
            )
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Options that differ from the defaults, and the policy."""
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {
            name: value
            for name, value in asdict(self).items()
            if name == "policy" or value != defaults[name]
        }

    def check_lengths(self, max_model_len: int) -> None:
        """Refuse a window or sinks that the model can never fill.

        Raises:
            ValueError: `window` or `sinks` is above the model length, in tokens.
        """
        for name in ("window", "sinks"):
            if getattr(self, name) > max_model_len:
                raise ValueError(
                    f"razor: {name} is {getattr(self, name)}, above the model length "
                    f"of {max_model_len}; accepted are 0 to {max_model_len}"
                )


def config_of(additional_config: object) -> RazorConfig | None:
    """Options of an engine, or None where the policy is not asked for.

    Args:
        additional_config: `VllmConfig.additional_config`.
    """
    if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
        return None
    config = RazorConfig.from_dict(additional_config[CONFIG_KEY])
    return config if config.policy == "razor" else None
