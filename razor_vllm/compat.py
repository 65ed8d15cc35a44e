"""Every place where vLLM is patched rather than extended through a registry.

A comment at each patch says which vLLM would end it.

    where                                    why
    EngineArgs                               flags; early checks
    SamplingParams.from_optional             a bad per-request policy: HTTP 400
    InputProcessor.process_inputs            the same for other front ends; what can never fit
    selector._cached_get_attn_backend        our backend on a CPU, and never for a draft
    Platform._align_hybrid_block_size        Mamba states are not padded to pages of ours
    EngineCore._initialize_kv_caches         specs; stop if not attached; start-up report
    get_kv_cache_groups                      few block tables for layers that are not split
    KVCacheConfig.has_mixed_precision_...    pages of local heads are zeroed before others get them
    CPUModelRunner._zero_block_ids           so are those of sliding windows on a CPU
    engine.core.resolve_kv_cache_block_sizes chunks end where Mamba states may be cached
    EngineCore.preprocess_add_request        the last check of a request: see admission; its
                                             `dense_until`
    EngineCore, Scheduler                    figures for the routes: see core_memory
    KVCacheManager.get_computed_blocks       tell the managers whose prefix is looked up
    KVCacheCoordinator.cache_blocks          no layer caches what no later request may find
    generate_block_hash_extra_keys           `dense_until` in the keys of cached pages
    GPUModelRunner._build_attention_metadata `dense_until` of a batch (V1 runner)
    model_states.resolve_model_state_cls     `dense_until` of a batch (V2 runner)
    Attention                                layers share the first pool's cache: see pools

The engine's and the workers' patches are made when the policy is on, and do nothing
for an engine in the same process that did not ask for it.
"""

import argparse
import asyncio
import copy
import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from razor_kernels import DENSE_FOREVER
from razor_vllm import admission, core_memory
from razor_vllm.admission import DenseLimits
from razor_vllm.config import CONFIG_KEY, PROFILE_KEY, RazorConfig, config_of, profile_of
from razor_vllm.endpoints import turn_on_endpoints
from razor_vllm.flags import add_flags, options_of
from razor_vllm.heads.profile import (
    HeadProfile,
    cache_path,
    locate_profile,
    read_profile,
    write_profile,
)
from razor_vllm.managers import LocalManager, RetrievalManager, register_specs
from razor_vllm.patching import wrap
from razor_vllm.policy import (
    NEVER_COMPRESSED,
    cache_key,
    carried,
    carrying,
    current_lookup,
    dense_part,
    step_dense_until,
)
from razor_vllm.report import check_attached, log_report
from razor_vllm.specs import kv_cache_groups, needs_zeroed_pages
from razor_vllm.support import LAYOUT, check_backend, check_engine, check_profile
from razor_vllm.turns import TURN_KEY, Messages, Turn, learn_marker, turn_of

_BACKEND = "razor_vllm.backend.RazorAttentionBackend"
"""What vLLM finds under the name CUSTOM."""

DENSE_LIMITS_KEY = "razor_dense_limits"
"""Key of `additional_config` in the server's process: see `tell_dense_limits`."""


def install() -> None:
    """Add the flags and the early checks: what every process needs.

    Raises:
        AttributeError, ImportError: vLLM lacks a name; what was wrapped by then stays wrapped.
    """
    # Ends with a vLLM that lets plugins add arguments to EngineArgs.
    wrap(EngineArgs, "add_cli_args", _adding_flags)
    wrap(EngineArgs, "from_cli_args", _folding_flags)
    wrap(EngineArgs, "create_engine_config", _checking_config)
    # Ends with a vLLM whose CPU platform heeds a wish, and that lets a draft have another.
    wrap(selector, "_cached_get_attn_backend", _choosing_backend)
    # An engine in its own process loads plugins while it is being made.
    if "vllm.v1.engine.core" in sys.modules:
        _wrap_engine()
    if not AttentionBackendEnum.CUSTOM.is_overridden():  # else another plugin's, or ours already
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)


# --- Front end: flags, checks, requests -----------------------------------------------


def _adding_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def _folding_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        options = options_of(args)
        if options is None:
            return engine_args
        merged = dict(engine_args.additional_config or {})
        if options["policy"] == "full":
            # The flag wins over --additional-config.
            merged.pop(CONFIG_KEY, None)
        else:
            given = merged.get(CONFIG_KEY, {})
            RazorConfig.from_dict(given)
            merged[CONFIG_KEY] = {**given, **options}
            turn_on_endpoints()
        engine_args.additional_config = merged
        # Other API servers get the namespace, and read it before plugins are loaded.
        args.additional_config = merged
        engine_args.razor_namespace = args
        return engine_args

    return from_cli_args


def _checking_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        config = config_of(vllm_config.additional_config)
        if config is not None:
            namespace = getattr(self, "razor_namespace", None)
            _prepare(vllm_config, config, namespace)
            if namespace is not None:
                # With what was read: other API servers need no file.
                namespace.additional_config = vllm_config.additional_config
        return vllm_config

    return create_engine_config


def _prepare(vllm_config: Any, config: RazorConfig, namespace: Any) -> None:
    """Check what can be checked before a model is loaded, and ask for our backend.

    Args:
        namespace: of the server's command line, or None.
    """
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    check_engine(vllm_config)
    model = vllm_config.model_config
    if "window" not in vllm_config.additional_config[CONFIG_KEY]:
        config = replace(config, window=min(config.window, model.max_model_len))
    config.check_lengths(model.max_model_len)
    config, profile = _with_profile(vllm_config, config)
    check_profile(vllm_config, profile)
    if profile.num_retrieval_heads == 0 and not config.allow_no_retrieval_heads:
        raise ValueError(f"razor: head profile {config.head_profile} names no retrieval head")
    # All processes get the options and the profile by value. The caller's own dict stays.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        CONFIG_KEY: config.to_dict(),
        PROFILE_KEY: {"path": config.head_profile, "contents": profile.to_dict()},
    }
    if config.prefill == "chat" and TURN_KEY not in vllm_config.additional_config:
        vllm_config.additional_config[TURN_KEY] = _turn(model, namespace)._asdict()
    own = AttentionBackendEnum.CUSTOM
    if own.get_path() != _BACKEND:
        raise RuntimeError(
            f"razor: expected its own attention backend under the name {own.name}, found "
            f"{own.get_path()}, of another plugin"
        )
    check_backend(vllm_config, profile)
    attention = vllm_config.attention_config
    attention.backend_per_kind = {**attention.backend_per_kind, "full_attention": own}
    # These end with a vLLM that lets plugins check a request's extra arguments. The
    # OpenAI routes make sampling parameters before a stream begins: a 400 is possible.
    wrap(SamplingParams, "from_optional", _checking_params)
    wrap(InputProcessor, "process_inputs", _checking_request)
    _wrap_engine()


def _with_profile(vllm_config: Any, config: RazorConfig) -> tuple[RazorConfig, HeadProfile]:
    """The options with the profile's path, and its contents: those passed on, or the file's."""
    passed_on = vllm_config.additional_config.get(PROFILE_KEY, {})
    if config.head_profile is not None:
        # A flag may name it by a relative path.
        config = replace(config, head_profile=str(Path(config.head_profile).absolute()))
        if passed_on.get("path") == config.head_profile:
            return config, profile_of(vllm_config.additional_config)
    model = vllm_config.model_config
    path = _profile_path(config, model.model, model.revision).absolute()
    return replace(config, head_profile=str(path)), read_profile(path)


def _profile_path(config: RazorConfig, model: str, revision: str | None) -> Path:
    """Path of the profile; made first where there is none and the config says so."""
    try:
        return locate_profile(config.head_profile, model, revision)
    except ValueError:
        if not config.calibrate:
            raise
    from razor_vllm.heads.attribution import AttributionOptions
    from razor_vllm.heads.calibrate import ProbeOptions, calibrate, default_method

    path, is_probe = cache_path(model, revision), default_method(model, revision) == "probe"
    options = ProbeOptions() if is_probe else AttributionOptions()
    write_profile(calibrate(model, options, revision=revision), path)
    return path


def _turn(model_config: Any, namespace: Any) -> Turn:
    """What ends a chat's first turn under the server's chat template.

    Args:
        namespace: of the server's command line, or None: then the template is the tokenizer's.
    """
    from vllm.renderers.hf import resolve_chat_template
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        return Turn([], _no_turns("there is no tokenizer"))
    given = getattr(namespace, "chat_template", None)
    if given is not None and not any(sign in given for sign in "{}\n"):
        given = Path(given).read_text(encoding="utf-8")
    options = dict(getattr(namespace, "default_chat_template_kwargs", None) or {})
    if getattr(tokenizer, "is_fast", None) is not None:  # others bring their own templates
        options["chat_template"] = resolve_chat_template(
            tokenizer, given, None, model_config=model_config
        )
        if options["chat_template"] is None:
            return Turn([], _no_turns("the model has no chat template"))

    def render(messages: Messages, add_generation_prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        return list(tokenizer.encode(text, add_special_tokens=False))

    try:
        marker = learn_marker(render)
    except ValueError as error:
        return Turn([], _no_turns(str(error)))
    return Turn(marker, f"chat prefill: {tokenizer.decode(marker)!r} ends the first turn")


def _no_turns(reason: str) -> str:
    return f"chat prefill: {reason}; every prompt is attended densely, as in exact mode"


def _checking_params(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_optional(*args: Any, **kwargs: Any) -> Any:
        _refuse_badly_asked(kwargs.get("extra_args"))
        return original(*args, **kwargs)

    return from_optional


def _checking_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        additional = self.vllm_config.additional_config
        if config_of(additional) is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        extra = getattr(params, "extra_args", None)
        _refuse_badly_asked(extra)
        if kwargs.get("resumable"):
            # Its prompt grows while it runs, and with it the end of its dense part.
            raise VLLMValidationError("streamed input is not covered by --kv-policy razor")
        request = original(self, request_id, prompt, params, *args, **kwargs)
        _refuse_badly_asked(extra, _prompt_len(request), additional.get(DENSE_LIMITS_KEY))
        return request

    return process_inputs


def _prompt_len(request: Any) -> int:
    """Tokens of the prompt of a request, as engines and workers get it."""
    return length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)


def _refuse_badly_asked(
    extra_args: dict[str, Any] | None,
    num_prompt_tokens: int | None = None,
    limits: DenseLimits | None = None,
) -> None:
    """`admission.check_request`, with the error that vLLM's front ends answer with."""
    try:
        admission.check_request(extra_args, num_prompt_tokens, limits)
    except ValueError as error:
        parameter = str(error).split(maxsplit=1)[0]
        raise VLLMValidationError(str(error), parameter=parameter) from error


def tell_dense_limits(vllm_config: VllmConfig, limits: DenseLimits) -> None:
    """Tell the server's process what only its engines know: see `admission`."""
    vllm_config.additional_config = {
        **vllm_config.additional_config,  # type: ignore[dict-item]
        DENSE_LIMITS_KEY: limits,
    }


def add_middleware(args: argparse.Namespace, path: str) -> None:
    """Have vLLM's server add a middleware of ours after the user's own, which it asks first."""
    args.middleware = [*args.middleware, path]


def check_before_streams(engine_client: Any) -> None:
    """Check a request with its prompt's length while the answer can still be an HTTP 400.

    vLLM's routes call `generate` before a stream begins, and what it returns only after.
    """
    generate = engine_client.generate

    @functools.wraps(generate)
    def checking(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if tokens is not None:
            limits = engine_client.vllm_config.additional_config.get(DENSE_LIMITS_KEY)
            _refuse_badly_asked(sampling_params.extra_args, len(tokens), limits)
        return generate(prompt, sampling_params, *args, **kwargs)

    engine_client.generate = checking


def before_shutdown(engine_client: Any, note: Callable[[], None]) -> None:
    """Call `note` when vLLM's server tells its engine to end, and before it does."""
    shutdown = engine_client.shutdown

    @functools.wraps(shutdown)
    def noting(*args: Any, **kwargs: Any) -> Any:
        note()
        engine_client.shutdown = shutdown
        return shutdown(*args, **kwargs)

    engine_client.shutdown = noting


# --- Engine: attachment, requests, block managers -------------------------------------


def _wrap_engine() -> None:
    """Wrap an engine's start: the patches of the engine that are made without the policy."""
    from vllm.v1.engine import core

    wrap(core.EngineCore, "_initialize_kv_caches", _checking_attachment)
    wrap(core, "resolve_kv_cache_block_sizes", _resolving)


def _checking_attachment(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: VllmConfig) -> Any:
        if config_of(vllm_config.additional_config) is None:
            return original(self, vllm_config)
        register_specs()
        check_attached(self.model_executor.get_kv_cache_specs())
        install_engine_patches()
        kv_cache_config = original(self, vllm_config)
        watch = core_memory.watch(self, vllm_config, kv_cache_config)
        # A front end in this process has the same configuration; others learn it by a call.
        tell_dense_limits(vllm_config, watch.limits)
        log_report(vllm_config, watch.plan, kv_cache_config.num_blocks)
        return kv_cache_config

    return _initialize_kv_caches


def _resolving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba: vLLM ends chunks where states are cached, by a size that it makes the least of all
    groups'. Ends with a vLLM that asks the Mamba groups."""

    def resolve_kv_cache_block_sizes(kv_cache_config: Any, vllm_config: VllmConfig) -> Any:
        sizes = original(kv_cache_config, vllm_config)
        cache = vllm_config.cache_config
        if config_of(vllm_config.additional_config) is None or cache.mamba_cache_mode != "align":
            return sizes
        if kv_cache_config.has_mamba_layers:
            cache.block_size = sizes[0]
            # Else vLLM's CPU platform puts its default back when the configuration is checked
            # again, as it is in the engine's own process.
            cache.user_specified_block_size = True
        return sizes

    return resolve_kv_cache_block_sizes


def _choosing_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def _cached_get_attn_backend(backend: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or config_of(vllm_config.additional_config) is None:
            return original(backend, *args, **kwargs)
        from vllm.compilation import backends

        if backend is AttentionBackendEnum.CUSTOM:
            if backends.model_tag == "backbone":
                return backend.get_class()
            # A draft's layers are not split: it gets what it wishes, or vLLM's choice.
            backend = vllm_config.attention_config.backend
        found = original(backend, *args, **kwargs)
        return cpu_backend() if found.get_name() == "CPU_ATTN" else found

    return _cached_get_attn_backend


@functools.cache
def cpu_backend() -> type:
    """vLLM's own CPU attention with pages as ours lie: its kernels go by strides."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    class ForeignCPUBackend(CPUAttentionBackend):
        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            return (LAYOUT,)

    return ForeignCPUBackend


def _aligning(
    original: Callable[..., Any], hit_tokens_of: Callable[[VllmConfig], int]
) -> Callable[..., Any]:
    def _align_hybrid_block_size(cls: Any, vllm_config: VllmConfig, backend_cls: Any) -> None:
        if config_of(vllm_config.additional_config) is None:
            return original(cls, vllm_config, backend_cls)
        cache = vllm_config.cache_config
        hit_tokens = hit_tokens_of(vllm_config)
        if cache.mamba_cache_mode == "align":
            cache.block_size = cache.mamba_block_size = hit_tokens

    return _align_hybrid_block_size


def _grouping(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_groups(*args: Any, **kwargs: Any) -> Any:
        vllm_config, specs = args[-2:]
        if config_of(vllm_config.additional_config) is None:
            return original(*args, **kwargs)
        drafts = vllm_config.speculative_config
        return kv_cache_groups(specs, drafts is not None and drafts.use_eagle_block_drop())

    return get_kv_cache_groups


def _mixing(original: Callable[..., Any]) -> Callable[..., Any]:
    def has_mixed_precision_kv_cache(self: Any) -> bool:
        return original(self) or needs_zeroed_pages(g.kv_cache_spec for g in self.kv_cache_groups)

    return has_mixed_precision_kv_cache


def _zeroing(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's CPU runner zeroes pages as far as layers with full attention use them."""

    def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
        original(self, block_ids)
        if config_of(self.vllm_config.additional_config) is None:
            return
        layers = self.compilation_config.static_forward_context
        for group in self.kv_cache_config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, SlidingWindowSpec):
                for name in group.layer_names:
                    layers[name].kv_cache[block_ids] = 0

    return _zero_block_ids


def install_grouping() -> None:
    """Group layers as `specs.kv_cache_groups` says, in an engine and in its workers."""
    from vllm.v1.core import kv_cache_utils

    # Ends with a vLLM that takes a spec's word for what is stored.
    wrap(KVCacheConfig, "has_mixed_precision_kv_cache", _mixing)
    if "get_kv_cache_groups" in vars(kv_cache_utils):
        wrap(kv_cache_utils, "get_kv_cache_groups", _grouping)
    else:  # vLLM 0.33
        from vllm.v1.core.kv_cache_planning import DefaultKVCacheConfigBuilder

        wrap(DefaultKVCacheConfigBuilder, "get_kv_cache_groups", _grouping)


def _clamping(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tokens past the dense part were computed under compression, in every layer."""

    def cache_blocks(self: Any, request: Any, num_computed_tokens: int) -> None:
        for manager in self.single_type_managers:
            if isinstance(manager, LocalManager | RetrievalManager):
                num_computed_tokens = manager.num_cacheable_tokens(request, num_computed_tokens)
                break
        return original(self, request, num_computed_tokens)

    return cache_blocks


def install_engine_patches() -> None:
    """What an engine under the policy needs of vLLM's classes."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    # Ends with a vLLM whose `find_longest_cache_hit` is given the request.
    wrap(KVCacheManager, "get_computed_blocks", _admitting)
    # Ends with a vLLM that takes parts of a page's key from the request.
    wrap(kv_cache_utils, "generate_block_hash_extra_keys", _keying)
    install_grouping()
    for coordinator in (KVCacheCoordinator, HybridKVCacheCoordinator):
        if "cache_blocks" in vars(coordinator):  # vLLM 0.31 has a second one
            wrap(coordinator, "cache_blocks", _clamping)
    wrap(EngineCore, "preprocess_add_request", _letting_in)
    wrap(EngineCore, "add_request", core_memory.counting_requests)
    wrap(Scheduler, "_preempt_request", core_memory.counting_preemptions)
    setattr(EngineCore, core_memory.UTILITY, core_memory.razor_memory)


def _letting_in(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM answers what is raised here to that request alone."""

    def preprocess_add_request(self: Any, request: Any) -> Any:
        config = config_of(self.vllm_config.additional_config)
        if config is None:
            return original(self, request)
        if request.resumable:
            raise VLLMValidationError("streamed input is not covered by --kv-policy razor")
        sampling = request.sampling_params
        extra = sampling.extra_args if sampling else None
        limits, prompt_len = core_memory.watch_of(self).limits, _prompt_len(request)
        _refuse_badly_asked(extra, prompt_len, limits)
        if sampling is not None:
            marker = turn_of(self.vllm_config.additional_config).marker
            part = dense_part(config, extra, request.prompt_token_ids, prompt_len, marker)
            # A front end in this process, and other samples of the prompt, have the same object.
            request.sampling_params = copy.copy(sampling)
            request.sampling_params.extra_args = carrying(extra, part)
        made, wave = original(self, request)
        if limits.bind(extra):
            made.max_tokens = min(made.max_tokens, limits.request - made.num_prompt_tokens)
        return made, wave

    return preprocess_add_request


def _keying(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        keys, index = original(request, start_token_idx, end_token_idx, *args, **kwargs)
        ours = cache_key(request.sampling_params, start_token_idx, end_token_idx)
        return (keys if ours is None else (*(keys or ()), ours)), index

    return generate_block_hash_extra_keys


def _admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        lookup = None
        for manager in self.coordinator.single_type_managers:
            if isinstance(manager, LocalManager | RetrievalManager):
                lookup = manager.admit(request)
        token = current_lookup.set(lookup)
        try:
            return original(self, request, *args, **kwargs)
        finally:
            current_lookup.reset(token)

    return get_computed_blocks


def share_cache(layers: Iterable[Any], pool_name: str) -> None:
    """Tell attention layers that they share a pool's cache, so that vLLM gives them none."""
    for layer in layers:
        layer.kv_sharing_target_layer_name = pool_name


async def call_engines(engine_core: Any, method: str, *args: Any) -> list[Any]:
    """Run a utility method in the process of every engine; their answers, in order.

    Args:
        engine_core: the front end's client of its engines.
    """
    call_all = getattr(engine_core, "call_utility_all_async", None)
    if call_all is not None:
        return await call_all(method, *args)
    # vLLM 0.31 has only its parts.
    call = engine_core._call_utility_async
    engines = engine_core.core_engines
    return await asyncio.gather(*(call(method, *args, engine=engine) for engine in engines))


# --- Worker: dense_until of a batch ---------------------------------------------------


def install_worker_patches(
    v2_model_runner: bool, hit_tokens_of: Callable[[VllmConfig], int]
) -> None:
    """Give the metadata builders each request's `dense_until`, and Mamba states our pages.

    The first ends with a vLLM whose CommonAttentionMetadata carries the requests' extra
    arguments.

    Args:
        hit_tokens_of: tokens in which an attached engine's pages all end.
    """
    from vllm.platforms.interface import Platform

    # Ends with a vLLM that does not pad states where pages may differ.
    wrap(
        Platform,
        "_align_hybrid_block_size",
        lambda original: _aligning(original, hit_tokens_of),
    )
    install_grouping()  # a GPU's worker groups layers too, to measure its graphs
    if v2_model_runner:
        from vllm.v1.worker.gpu import model_states

        wrap(model_states, "resolve_model_state_cls", _razor_state)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        wrap(GPUModelRunner, "_build_attention_metadata", _building_v1)
        if current_platform.is_cpu():
            from vllm.v1.worker.cpu_model_runner import CPUModelRunner

            # Ends with a vLLM whose CPU runner zeroes whole pages.
            wrap(CPUModelRunner, "_zero_block_ids", _zeroing)


def _building_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = config_of(self.vllm_config.additional_config)
        if config is None:
            return original(self, *args, **kwargs)
        states = [self.requests[req_id] for req_id in self.input_batch.req_ids]
        token = step_dense_until.set(tuple(_dense_until(s.sampling_params) for s in states))
        try:
            return original(self, *args, **kwargs)
        finally:
            step_dense_until.reset(token)

    return _build_attention_metadata


def _dense_until(sampling_params: Any) -> int:
    return (carried(sampling_params) or NEVER_COMPRESSED).until


def _razor_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_model_state_cls(vllm_config: Any, model: Any) -> type:
        base = original(vllm_config, model)
        config = config_of(vllm_config.additional_config)
        return base if config is None else _model_state(base)

    return resolve_model_state_cls


def _model_state(base: type) -> type:
    """The V2 runner's per-model state, with each request's `dense_until` in it."""

    class RazorModelState(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.razor_dense_until: dict[str, int] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            until = _dense_until(new_req_data.sampling_params)
            self.razor_dense_until[new_req_data.req_id] = until

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
