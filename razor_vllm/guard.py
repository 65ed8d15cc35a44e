"""Whether the plugin may patch this vLLM at all.

Only a tested series is patched. With any other, or if something of ours cannot be installed, the
plugin stands aside: it logs one line, vLLM runs as if it were not installed, and an engine that
asks for the policy is refused.
"""

import argparse
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

from packaging.version import InvalidVersion, Version

from razor_vllm import patching
from razor_vllm.config import CONFIG_KEY
from razor_vllm.flags import add_flags, options_of

VLLM_SERIES = ("0.31", "0.32", "0.33")
"""Series of vLLM that the plugin is tested with (`make test-series`)."""

logger = logging.getLogger("vllm.razor")


def check_version() -> None:
    """Refuse a vLLM that the plugin is not tested with.

    Raises:
        RuntimeError: naming the version found and the series expected.
    """
    import vllm

    try:
        found = Version(vllm.__version__)
    except InvalidVersion:
        found = Version("0")
    if f"{found.major}.{found.minor}" not in VLLM_SERIES:
        raise RuntimeError(
            f"expected vLLM {', '.join(f'{series}.x' for series in VLLM_SERIES)}, "
            f"found {vllm.__version__}"
        )


def install() -> None:
    """Install the plugin in this process, or stand aside."""
    try:
        check_version()
        from razor_vllm import compat

        compat.install()
    except Exception as error:
        patching.undo()
        stand_aside(f"{type(error).__name__}: {error}")


def stand_aside(reason: str) -> None:
    """Leave vLLM unchanged, except that it refuses the policy.

    Args:
        reason: what was found, and what was expected.
    """
    if multiprocessing.parent_process() is None:
        logger.warning("razor stands aside, --kv-policy razor is refused: %s", reason)
    try:
        from vllm.engine.arg_utils import EngineArgs

        patching.wrap(EngineArgs, "add_cli_args", _adding_flags)
        patching.wrap(
            EngineArgs, "from_cli_args", lambda original: _refusing_flags(original, reason)
        )
        patching.wrap(
            EngineArgs, "create_engine_config", lambda original: _refusing(original, reason)
        )
    except Exception:
        patching.undo()


def _adding_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        add_flags(parser)
        return parser

    return add_cli_args


def _refusal(reason: str) -> RuntimeError:
    return RuntimeError(f"razor: --kv-policy razor cannot be served here: {reason}")


def _refusing_flags(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: argparse.Namespace, *more: Any, **kwargs: Any) -> Any:
        options = options_of(args)
        if options is not None and options["policy"] == "razor":
            raise _refusal(reason)
        engine_args = original(cls, args, *more, **kwargs)
        if options is not None and isinstance(engine_args.additional_config, dict):
            engine_args.additional_config.pop(CONFIG_KEY, None)  # an explicit full wins
        return engine_args

    return from_cli_args


def _refusing(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(self, "additional_config", None)
        options = asked.get(CONFIG_KEY) if isinstance(asked, dict) else None
        if options is not None and not (
            isinstance(options, dict) and options.get("policy") == "full"
        ):
            raise _refusal(reason)
        return original(self, *args, **kwargs)

    return create_engine_config
