"""The one configuration behind the flags and `additional_config["razor"]`.

It is part of vLLM's `additional_config`, which every process of an engine gets. The head
profile goes with it by value: after start-up no process reads the file again.
"""

import math
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from razor_vllm.heads.profile import HeadProfile

KVPolicy = Literal["full", "razor"]
PrefillMode = Literal["exact", "chat", "windowed"]

CONFIG_KEY = "razor"
"""Key of vLLM's `additional_config` that holds these options."""

PROFILE_KEY = "razor_profile"
"""Key that holds the head profile: its path, and its contents from `HeadProfile.to_dict`."""


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"razor: {name} is {value!r}; accepted are whole numbers of tokens from 0 up"
        )


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"razor: {name} is {value!r}; accepted are {', '.join(accepted)}")


def _help(sentence: str, flag: bool = True) -> dict[str, Any]:
    """The command line's help on an option, and whether it has a flag for it."""
    return {"help": sentence, "flag": flag}


@dataclass(frozen=True)
class RazorConfig:
    """Options of the policy, checked when built.

    Raises:
        ValueError: an option outside what is accepted.
    """

    policy: KVPolicy = field(
        default="razor",
        metadata=_help(
            "full: vLLM as it is. razor: retrieval heads keep the whole KV cache, local heads keep "
            "sinks, a window and one compensation slot"
        ),
    )
    head_profile: str | None = field(
        default=None,
        metadata=_help(
            "head profile of the model (default: razor_profile.json beside its weights, or in the "
            "user's cache)"
        ),
    )
    window: int = field(
        default=4096,
        metadata=_help(
            "latest tokens that a local head sees as written (default: 4096, or the model's length)"
        ),
    )
    window_ratio: float = field(
        default=0.0,
        metadata=_help(
            "window of at least this share of a token's position (default: 0; the paper: 0.2)"
        ),
    )
    sinks: int = field(
        default=4, metadata=_help("first tokens that a local head keeps for ever (default: 4)")
    )
    prefill: PrefillMode = field(
        default="exact",
        metadata=_help(
            "exact: a prompt is attended densely (default). chat: the first turn of a chat is. "
            "windowed: local heads window it all"
        ),
    )
    calibrate: bool = field(
        default=False, metadata=_help("find the heads first where the model has no profile yet")
    )
    compensation: bool = field(
        default=True,
        metadata=_help(
            "whether dropped tokens leave a compensation slot; off only to measure it", flag=False
        ),
    )
    allow_no_retrieval_heads: bool = field(
        default=False,
        metadata=_help(
            "whether a profile may name no retrieval head; on only to measure that", flag=False
        ),
    )

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
        known = [f.name for f in fields(cls)]
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
        defaults = {f.name: f.default for f in fields(self)}
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
    """Options of an engine, or None if it does not ask for the policy.

    Args:
        additional_config: `VllmConfig.additional_config`.
    """
    if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
        return None
    config = RazorConfig.from_dict(additional_config[CONFIG_KEY])
    return config if config.policy == "razor" else None


def profile_of(additional_config: object) -> HeadProfile:
    """Head profile of an engine under the policy, as it was read at start-up.

    Args:
        additional_config: `VllmConfig.additional_config`.

    Raises:
        ValueError: contents that do not fit.
        RuntimeError: there is none, because vLLM's EngineArgs did not make the configuration.
    """
    passed_on = additional_config.get(PROFILE_KEY) if isinstance(additional_config, dict) else None
    if passed_on is None:
        raise RuntimeError(
            f"razor: expected the head profile in additional_config[{PROFILE_KEY!r}], found none; "
            "EngineArgs.create_engine_config puts it there"
        )
    return HeadProfile.from_dict(passed_on["contents"])
