"""The command line: `--kv-policy` and the options of the policy, made from RazorConfig."""

import argparse
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from razor_vllm.config import RazorConfig

_KINDS: dict[Any, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "R"},
    bool: {"action": "store_true"},
    str | None: {"metavar": "PATH"},
}


def _options() -> dict[str, Field]:
    """Fields that are flags: all except the policy, and those that only measurements need."""
    return {
        field.name: field
        for field in fields(RazorConfig)
        if field.name != "policy" and field.metadata["flag"]
    }


def _flag(name: str) -> str:
    return f"--razor-{name.replace('_', '-')}"


def _kind(hint: Any) -> dict[str, Any]:
    return {"choices": get_args(hint)} if get_origin(hint) is Literal else _KINDS[hint]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to vLLM's parser; where one is not given, its value is None."""
    hints = get_type_hints(RazorConfig)
    group = parser.add_argument_group(
        title="RazorAttention", description="KV memory per head (razor-vllm)."
    )
    group.add_argument(
        "--kv-policy",
        default=None,
        metavar="{full,razor}",
        help=f"{_field('policy').metadata['help']} (default: full)",
    )
    for name, field in _options().items():
        group.add_argument(
            _flag(name), default=None, help=field.metadata["help"], **_kind(hints[name])
        )


def _field(name: str) -> Field:
    return next(field for field in fields(RazorConfig) if field.name == name)


def options_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Options that the flags ask for; None where they do not name the policy.

    Raises:
        ValueError: an unknown policy, or options of a policy that is not on.
    """
    policy: Any = getattr(args, "kv_policy", None)
    options = {
        name: value
        for name in _options()
        if (value := getattr(args, f"razor_{name}", None)) is not None
    }
    if policy is not None:
        RazorConfig(policy=policy)
    if options and policy != "razor":
        flags = ", ".join(map(_flag, options))
        raise ValueError(f"razor: {flags} has no effect without --kv-policy razor")
    return None if policy is None else {"policy": policy, **options}
