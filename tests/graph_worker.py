"""vLLM's CPU worker, started as its CUDA worker is: with CUDA graphs (see `graph_standin`).

CUDA (`vllm/v1/worker/gpu_worker.py`)       here
profile_run                                 the same
profile_cudagraph_memory                    the same, on a throw-away cache
initialize_from_config                      the same
kernel warm-up, capture_model               CUDA's own `compile_or_warm_up_model`
sleep                                       what was in the cache is lost, all else is kept
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from graph_standin import GraphStandIn
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.workspace import init_workspace_manager


class GraphWorker(CPUWorker):
    """A CPU worker that captures graphs."""

    def init_device(self) -> None:
        super().init_device()
        init_workspace_manager(self.device)

    def determine_available_memory(self) -> int:
        """As on CUDA without `--kv-cache-memory-bytes`, which is only what it returns."""
        self.model_runner.profile_run()
        self.model_runner.profile_cudagraph_memory()
        size = self.cache_config.kv_cache_memory_bytes
        assert size is not None, "kv_cache_memory_bytes is to be set"
        return size

    def compile_or_warm_up_model(self) -> Any:
        """As on CUDA, without the warm-up of kernels that are CUDA's."""
        with patch.object(gpu_worker, "kernel_warmup", lambda worker: None):
            return Worker.compile_or_warm_up_model(self)

    def sleep(self, level: int = 1) -> None:
        for cache in self.model_runner.kv_caches:
            cache.untyped_storage().fill_(0xFF)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Memory is where it was."""


def take_graphs(standin: GraphStandIn) -> None:
    """Make vLLM's CPU platform one that takes CUDA graphs; in this process, for good.

    A cache that vLLM drops is given back: whoever uses it later is at fault.
    """
    _wrap(cudagraph_utils, "_teardown_profiling_state", _giving_back(standin))
    _wrap(GPUModelRunner, "initialize_kv_cache", _giving_back(standin))
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        sizes = compilation.cudagraph_capture_sizes
        original(cls, vllm_config)
        compilation.cudagraph_capture_sizes = sizes

    platform: Any = CpuPlatform
    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.support_static_graph_mode = classmethod(lambda cls: True)
    platform.graph_pool_handle = staticmethod(torch.cuda.graph_pool_handle)
    # Triton's does not run interpreted, and CUDA's warm-up of kernels samples by it.
    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch
    # An alias will do: graphs keep their memory here.
    torch.ops._C.weak_ref_tensor = lambda tensor: tensor


def _wrap(owner: Any, name: str, make: Callable[..., Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _giving_back(standin: GraphStandIn) -> Callable[..., Any]:
    """Before what is wrapped, the runner's cache is given back."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def giving_back(runner: Any, *args: Any, **kwargs: Any) -> Any:
            standin.give_back(getattr(runner, "kv_caches", ()))
            return original(runner, *args, **kwargs)

        return giving_back

    return make
