"""vLLM's switch for HTTP routes of plugins.

vLLM serves a plugin's routes only if `VLLM_PLUGINS` names the plugin, and once that is set, it
loads no plugin that it does not name. `--kv-policy razor` on a server's command line asks for
the policy's read-only routes too, so the variable is then set to what vLLM would load anyway,
and ours.
"""

import os
from importlib.metadata import distributions

NAME = "razor"
"""Entry point of the plugin, and of its routes."""

_ENDPOINTS = "vllm.endpoint_plugins"


def turn_on_endpoints() -> None:
    """Name the plugin in `VLLM_PLUGINS`, together with all that vLLM loads without the variable.

    Routes of other plugins stay off unless the user named them.
    """
    chosen = os.environ.get("VLLM_PLUGINS")
    names = _loaded_by_default() if chosen is None else chosen.split(",")
    if NAME not in names:
        names = [*names, NAME]
    os.environ["VLLM_PLUGINS"] = ",".join(names)


def _loaded_by_default() -> list[str]:
    """Names that vLLM loads while the variable is not set."""
    return sorted(
        {
            point.name
            for installed in distributions()
            for point in installed.entry_points
            if point.group.startswith("vllm.") and point.group != _ENDPOINTS
        }
    )
