"""The attention backend that vLLM finds under its CPU backend's name.

vLLM's CPU platform has no choice of backend: it always asks for `CPU_ATTN`, by the path that
is registered. That path leads here. The name is looked up when an engine makes its first
attention layer, so an engine without the policy gets vLLM's own backend.
"""

from typing import Any

from vllm.config import get_current_vllm_config_or_none

from razor_vllm.config import config_of

PATH = f"{__name__}.CPUBackend"


def __getattr__(name: str) -> Any:
    if name != "CPUBackend":
        raise AttributeError(name)
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None and config_of(vllm_config.additional_config) is not None:
        from razor_vllm.backend import RazorAttentionBackend

        return RazorAttentionBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
