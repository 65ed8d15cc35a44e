"""Every place where vLLM is patched rather than extended through a registry.

Checked against vLLM 0.32. What would end a patch stands with it.

    where                                    why
    EngineArgs                               flags; early checks
    SamplingParams.from_optional             a bad per-request policy: HTTP 400
    InputProcessor.process_inputs            the same for other front ends; cache salt
    get_kv_cache_configs                     stop if not attached; start-up report
    KVCacheManager.get_computed_blocks       tell the managers whose prefix is looked up
    GPUModelRunner._build_attention_metadata `dense_until` of a batch (V1 runner)
    model_states.resolve_model_state_cls     `dense_until` of a batch (V2 runner)
    EngineCore, Scheduler                    figures for the routes: see core_memory

The engine's and the workers' patches are made when the policy is on, and do nothing
for an engine in the same process that did not ask for it.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from packaging.version import Version

from razor_vllm.config import CONFIG_KEY, RazorConfig, config_of
from razor_vllm.endpoints import turn_on_endpoints

VLLM_SERIES = "0.32"
"""Series of vLLM that the patches below were written against."""

_FLAGS: dict[str, dict[str, Any]] = {
    "head_profile": {
        "metavar": "PATH",
        "help": "head profile of the model; by default razor_profile.json beside its weights",
    },
    "window": {
        "type": int,
        "help": "latest tokens that a local head sees as written (default 4096, or the "
        "model's length)",
    },
    "window_ratio": {
        "type": float,
        "help": "window of at least this share of the position (default 0; the paper: 0.2)",
    },
    "sinks": {"type": int, "help": "first tokens that a local head keeps for ever (default 4)"},
    "calibrate": {
        "action": "store_true",
        "help": "find the heads first where the model has no profile yet",
    },
    "prefill": {
        "choices": ["exact", "windowed"],
        "help": "exact: attend the prompt densely (default); windowed: window it too",
    },
}

F = TypeVar("F", bound=Callable[..., Any])


def check_version() -> None:
    """Refuse a vLLM that the patches were not written against.

    Raises:
        RuntimeError: naming the version found and the series expected.
    """
    import vllm

    found = Version(vllm.__version__)
    if f"{found.major}.{found.minor}" != VLLM_SERIES:
        raise RuntimeError(f"razor: expected vLLM {VLLM_SERIES}.x, found {vllm.__version__}")


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], F]) -> None:
    """Replace owner.name by make(owner.name), once; static and class methods stay so."""
    raw = vars(owner)[name]
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    original = raw.__func__ if kind else raw
    if getattr(original, "_razor", False):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper._razor = True
    setattr(owner, name, kind(wrapper) if kind else wrapper)


def install() -> None:
    """Add the flags and the early checks: what every process needs."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.core import kv_cache_utils

    from razor_vllm import selection

    # Ends with a vLLM that lets plugins add arguments to EngineArgs.
    _wrap(EngineArgs, "add_cli_args", _adding_flags)
    _wrap(EngineArgs, "from_cli_args", _folding_flags)
    _wrap(EngineArgs, "create_engine_config", _checking_config)

    register_backend(AttentionBackendEnum.CPU_ATTN, selection.PATH)
    register_backend(AttentionBackendEnum.CUSTOM, "razor_vllm.backend.RazorAttentionBackend")

    _wrap(kv_cache_utils, "get_kv_cache_configs", _checking_attachment)
    core: Any = sys.modules.get("vllm.v1.engine.core")
    if core is not None:
        core.get_kv_cache_configs = kv_cache_utils.get_kv_cache_configs


# --- Front end: flags, checks, requests -----------------------------------------------


def _adding_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        group = parser.add_argument_group(
            title="RazorAttention", description="KV memory per head (razor-vllm)."
        )
        group.add_argument(
            "--kv-policy",
            default="full",
            metavar="{full,razor}",
            help="full: vLLM as it is (default). razor: retrieval heads keep the whole "
            "KV cache, local heads keep sinks, a window and one compensation slot",
        )
        for name, options in _FLAGS.items():
            group.add_argument(f"--razor-{name.replace('_', '-')}", default=None, **options)
        return parser

    return add_cli_args


def _folding_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        options = _options_of(args)
        if options is not None:
            merged = dict(engine_args.additional_config or {})
            merged[CONFIG_KEY] = {**merged.get(CONFIG_KEY, {}), **options}
            engine_args.additional_config = merged
            # Other API servers get the namespace, and read it before plugins are loaded.
            args.additional_config = merged
            turn_on_endpoints()
        return engine_args

    return from_cli_args


def _options_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Options that the flags ask for; None where they ask for none.

    Raises:
        ValueError: an unknown policy, or options of a policy that is not on.
    """
    policy: Any = getattr(args, "kv_policy", "full")
    options = {
        name: value
        for name in _FLAGS
        if (value := getattr(args, f"razor_{name}", None)) is not None
    }
    RazorConfig(policy=policy)
    if policy == "razor":
        return {"policy": policy, **options}
    if options:
        flags = ", ".join(f"--razor-{name.replace('_', '-')}" for name in options)
        raise ValueError(f"razor: {flags} has no effect without --kv-policy razor")
    return None


def _checking_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.attention import selector

        vllm_config = original(self, *args, **kwargs)
        # vLLM remembers the backend by arguments that do not name the policy.
        selector._cached_get_attn_backend.cache_clear()
        config = config_of(vllm_config.additional_config)
        if config is not None:
            _prepare(vllm_config, config)
        return vllm_config

    return create_engine_config


def _prepare(vllm_config: Any, config: RazorConfig) -> None:
    """Check what can be checked before a model is loaded, and ask for our backend."""
    from vllm import SamplingParams
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.engine.input_processor import InputProcessor

    from razor_vllm.profile import read_profile
    from razor_vllm.support import check_engine

    check_version()
    check_engine(vllm_config)
    model = vllm_config.model_config
    if "window" not in vllm_config.additional_config[CONFIG_KEY]:
        config = replace(config, window=min(config.window, model.max_model_len))
    config.check_lengths(model.max_model_len)
    path = _profile_path(config, model.model).absolute()
    profile = read_profile(path)
    profile.check_model(
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
    )
    if profile.num_retrieval_heads == 0 and not config.allow_no_retrieval_heads:
        raise ValueError(f"razor: head profile {path} names no retrieval head")
    # Workers may run elsewhere on this machine: they get the path, not the wish.
    vllm_config.additional_config[CONFIG_KEY] = {
        **config.to_dict(),
        "head_profile": str(path),
    }
    if not current_platform.is_cpu():
        backend = vllm_config.attention_config.backend
        if backend not in (None, AttentionBackendEnum.CUSTOM):
            raise ValueError(
                f"razor: --attention-backend {backend.name} and --kv-policy razor "
                "exclude each other: the policy brings its own"
            )
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    # These end with a vLLM that lets plugins check a request's extra arguments. The
    # OpenAI routes make sampling parameters before a stream begins: a 400 is possible.
    _wrap(SamplingParams, "from_optional", _checking_params)
    _wrap(InputProcessor, "process_inputs", _checking_request)


def _profile_path(config: RazorConfig, model: str) -> Path:
    """Path of the profile; made first where there is none and the config says so."""
    from razor_vllm.profile import cache_path, locate_profile, write_profile

    try:
        return locate_profile(config.head_profile, model)
    except ValueError:
        if not config.calibrate:
            raise
    from razor_vllm.calibrate import ProbeOptions, calibrate

    path = cache_path(model)
    write_profile(calibrate(model, ProbeOptions()), path)
    return path


def _checking_params(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_optional(*args: Any, **kwargs: Any) -> Any:
        _valid_policy(kwargs.get("extra_args"))
        return original(*args, **kwargs)

    return from_optional


def _checking_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm.exceptions import VLLMValidationError

        config = config_of(self.vllm_config.additional_config)
        if config is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        policy = _valid_policy(getattr(params, "extra_args", None))
        if kwargs.get("resumable"):
            # Its prompt grows while it runs, and with it the end of its dense part.
            raise VLLMValidationError("streamed input is not covered by --kv-policy razor")
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if policy == "full" and config.prefill == "windowed":
            # Same tokens, other values: such requests share pages among themselves only.
            request.cache_salt = f"{request.cache_salt or ''}razor-full"
        return request

    return process_inputs


def _valid_policy(extra_args: dict[str, Any] | None) -> str:
    """A request's policy, or the error that vLLM's front ends answer with."""
    from vllm.exceptions import VLLMValidationError

    from razor_vllm.policy import REQUEST_KEY, request_policy

    try:
        return request_policy(extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=REQUEST_KEY) from error


# --- Engine: attachment, block managers -----------------------------------------------


def _checking_attachment(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_configs(
        vllm_config: Any, kv_cache_specs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from razor_vllm.report import check_attached, log_report

        config = config_of(vllm_config.additional_config)
        if config is None:
            return original(vllm_config, kv_cache_specs, *args, **kwargs)
        check_attached(kv_cache_specs)
        configs = original(vllm_config, kv_cache_specs, *args, **kwargs)
        log_report(vllm_config, configs[0])
        return configs

    return get_kv_cache_configs


def install_engine_patches() -> None:
    """Tell block managers the request of a look-up; made by the first of them.

    Ends with a vLLM whose `find_longest_cache_hit` is given the request.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    _wrap(KVCacheManager, "get_computed_blocks", _admitting)
    _install_figures()


def _install_figures() -> None:
    """The utility method and the counters of `core_memory`."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    from razor_vllm import core_memory

    setattr(EngineCore, core_memory.UTILITY, core_memory.razor_memory)
    _wrap(EngineCore, "add_request", core_memory.counting_requests)
    _wrap(Scheduler, "_preempt_request", core_memory.counting_preemptions)


def _admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_computed_blocks(self: Any, request: Any) -> Any:
        from razor_vllm.managers import LocalManager, RetrievalManager, current_lookup

        lookup = None
        for manager in self.coordinator.single_type_managers:
            if isinstance(manager, LocalManager | RetrievalManager):
                lookup = manager.admit(request)
        token = current_lookup.set(lookup)
        try:
            return original(self, request)
        finally:
            current_lookup.reset(token)

    return get_computed_blocks


# --- Worker: dense_until of a batch ---------------------------------------------------


def install_worker_patches(v2_model_runner: bool) -> None:
    """Give the metadata builders each request's `dense_until`.

    Ends with a vLLM whose CommonAttentionMetadata carries the requests' extra arguments.
    """
    if v2_model_runner:
        from vllm.v1.worker.gpu import model_states

        _wrap(model_states, "resolve_model_state_cls", _razor_state)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "_build_attention_metadata", _building_v1)


def _building_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        from razor_vllm.backend import step_dense_until
        from razor_vllm.policy import dense_until

        config = config_of(self.vllm_config.additional_config)
        if config is None:
            return original(self, *args, **kwargs)
        states = [self.requests[req_id] for req_id in self.input_batch.req_ids]
        for state in states:
            if not hasattr(state, "razor_dense_until"):
                extra = state.sampling_params.extra_args if state.sampling_params else None
                state.razor_dense_until = dense_until(config, extra, state.num_prompt_tokens)
        token = step_dense_until.set(tuple(state.razor_dense_until for state in states))
        try:
            return original(self, *args, **kwargs)
        finally:
            step_dense_until.reset(token)

    return _build_attention_metadata


def _razor_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> type:
        base = original(vllm_config, model)
        config = config_of(vllm_config.additional_config)
        return base if config is None else _model_state(base, config)

    return resolve_model_state_cls


def _model_state(base: type, config: RazorConfig) -> type:
    """The V2 runner's per-model state, with each request's `dense_until` in it."""
    from vllm.utils import length_from_prompt_token_ids_or_embeds

    from razor_kernels import DENSE_FOREVER
    from razor_vllm.backend import step_dense_until
    from razor_vllm.policy import dense_until

    class RazorModelState(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.razor_dense_until: dict[str, int] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            sampling = new_req_data.sampling_params
            prompt_len = length_from_prompt_token_ids_or_embeds(
                new_req_data.prompt_token_ids, new_req_data.prompt_embeds
            )
            self.razor_dense_until[new_req_data.req_id] = dense_until(
                config, sampling.extra_args if sampling else None, prompt_len
            )

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.razor_dense_until.pop(req_id, None)

        def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            # A dummy run's requests were never added.
            batch = [
                self.razor_dense_until.get(req_id, DENSE_FOREVER) for req_id in input_batch.req_ids
            ]
            token = step_dense_until.set(tuple(batch))
            try:
                return super().prepare_attn(input_batch, *args, **kwargs)
            finally:
                step_dense_until.reset(token)

    return RazorModelState
