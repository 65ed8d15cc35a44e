"""RazorAttention for vLLM: memory per KV head, by a plugin.

vLLM calls `register` in every process it starts (entry point
`vllm.general_plugins`). It adds the command-line flags and waits: nothing else of vLLM
changes until an engine asks for the policy with `--kv-policy razor` or
`additional_config={"razor": {...}}`. If the plugin is not tested with this vLLM, it leaves
vLLM unchanged (see `guard`).
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of `vllm.general_plugins`; may be called more than once."""
    from razor_vllm import guard

    guard.install()
