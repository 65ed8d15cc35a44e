"""A Ray Serve application of vLLM engines under the razor policy.

    client -- HTTP --> ingress -- prefix-aware router --> replica 1: vLLM engine
                       (OpenAI routes)                    replica 2: vLLM engine
                                                          ...

Ray's own LLM server (`ray.serve.llm`) does the work: ingress, routing, autoscaling,
restarts. This file turns one set of options into its configuration:

    serve run razor_serving.ray_app:app model=MODEL replicas=2

or the same options under `args:` of a Serve configuration file. Ray refuses engine
options that it does not know, so the policy's go in by `additional_config`.

Limits: written for Ray 2.60, whose engine class fits vLLM 0.32. Ray runs engines on
CPUs in one process group per replica, so tensor and pipeline parallelism over nodes
needs GPUs.
"""

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

from razor_vllm.config import CONFIG_KEY, RazorConfig

Routing = Literal["prefix", "balanced"]

# Threads of vLLM's CPU workers are bound to cores from the first one on: engines of one
# node would share those.
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class AppOptions(BaseModel):
    """Options of the application, checked when built; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    """Folder, the same on every node, or hub name."""
    name: str | None = None
    """Name that requests ask for; the model by default."""
    razor: dict[str, Any] = Field(default_factory=dict)
    """The policy's options, as in `additional_config["razor"]`."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's options by their Python names, such as `tensor_parallel_size`."""
    accelerator: Literal["cpu", "gpu"] = "gpu"
    """What an engine's workers run on; one GPU, or `worker_cpus` cores, for each."""
    accelerator_type: str | None = None
    """Ray's name of a GPU, such as H100, where the cluster has several kinds."""
    worker_cpus: float = Field(1, ge=0)
    """Cores that Ray reserves for each of an engine's workers."""
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """How Ray places an engine's workers on nodes."""
    replicas: int | None = Field(None, ge=1)
    """A fixed number of engines; without it Ray scales between the next two."""
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)
    target_ongoing_requests: int = Field(32, ge=1)
    """Requests per engine that autoscaling aims at."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Most requests in an engine at a time; more of them wait at the ingress."""
    routing: Routing = "prefix"
    """prefix: to the engine that has seen the prompt's beginning, as long as queues are
    about even. balanced: to the shorter of two queues."""
    imbalance: int = Field(8, ge=0)
    """Difference of queues, in requests, above which `prefix` balances instead."""
    ingress_replicas: int = Field(2, ge=1)
    """Copies of the HTTP side."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the engines."""

    @field_validator("razor")
    @classmethod
    def _check_razor(cls, options: dict[str, Any]) -> dict[str, Any]:
        return RazorConfig.from_dict(options).to_dict()

    @field_validator("model")
    @classmethod
    def _find_folder(cls, model: str) -> str:
        # Replicas run in other working directories.
        return str(Path(model).resolve()) if Path(model).is_dir() else model

    @model_validator(mode="after")
    def _check_scaling(self) -> "AppOptions":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, above max_replicas {self.max_replicas}"
            )
        return self


def engine_options(options: AppOptions) -> dict[str, Any]:
    """vLLM's options, with the policy's among them.

    Raises:
        ValueError: the policy's options are in both places.
    """
    additional = dict(options.engine.get("additional_config") or {})
    if CONFIG_KEY in additional:
        raise ValueError(f"razor: give the policy's options as {CONFIG_KEY!r}, not in 'engine'")
    return {**options.engine, "additional_config": {**additional, CONFIG_KEY: options.razor}}


def _scaling(options: AppOptions) -> dict[str, Any]:
    if options.replicas is not None:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
        }
    }


def _router(options: AppOptions) -> dict[str, Any]:
    if options.routing == "balanced":
        return {}
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class=cast(Any, PrefixCacheAffinityRouter),
            # Without eviction the router never forgets a prompt's text.
            request_router_kwargs={
                "imbalanced_threshold": options.imbalance,
                "do_eviction": True,
            },
        )
    }


def _worker_bundle(options: AppOptions) -> dict[str, float]:
    gpus = {"GPU": 1.0} if options.accelerator == "gpu" else {}
    return {"CPU": options.worker_cpus, **gpus}


def llm_config(options: AppOptions) -> LLMConfig:
    """Ray's configuration of the engines.

    Raises:
        ValueError: an option that Ray or vLLM does not know, or an accelerator type
            without GPUs.
    """
    defaults = CPU_ENVIRONMENT if options.accelerator == "cpu" else {}
    return LLMConfig(
        model_loading_config={
            "model_id": options.name or options.model,
            "model_source": options.model,
        },
        engine_kwargs=engine_options(options),
        accelerator_type=options.accelerator_type,
        accelerator_config=cast(Any, {"kind": options.accelerator}),
        placement_group_config={
            "bundle_per_worker": _worker_bundle(options),
            "strategy": options.placement,
        },
        deployment_config={
            **_scaling(options),
            **_router(options),
            "max_ongoing_requests": options.max_ongoing_requests,
        },
        runtime_env={"env_vars": {**defaults, **options.environment}},
    )


def app(options: AppOptions) -> Application:
    """The application, as `serve run` and Serve configuration files import it."""
    return build_openai_app(
        {
            "llm_configs": [llm_config(options)],
            "ingress_deployment_config": {
                "num_replicas": options.ingress_replicas,
                "autoscaling_config": None,
            },
        }
    )
