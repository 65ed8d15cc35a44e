"""One engine of the correctness part: how it is made, and what it is asked.

Every cell answers the same prompts, all at once, in chunks: prefill of odd lengths, decode and
mixes of both. Its result is plain JSON:

    rounds      name -> answers: `first` (nothing cached), `again` (the same prompts, cached),
                `full` (requests that opt out), `repeats` (prompts that repeat themselves)
    formula     request index -> the oracle's log-probabilities of `first`'s tokens
    compiled    kernels that Triton made ready after start-up
    replays     CUDA graphs replayed;  drafted: tokens drafted;  free: no page is held at the end
"""

import gc
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.gpu.compilations import Compilations, Replays
from benchmarks.gpu.formula import Formula
from benchmarks.gpu.scale import SOME_HEADS, Scale
from razor_kernels import Window

SINKS = 4
TOP = 5
"""Likeliest tokens that are reported at each step, for near-ties."""


@dataclass(frozen=True)
class Cell:
    """heads: retrieval heads, or stock vLLM. graphs: as served by default, or eager.

    rounds: what is asked. formula: whether the oracle recomputes the first round.
    """

    name: str
    heads: Literal["stock", "all", "some"]
    prefill: Literal["exact", "windowed"] = "exact"
    dtype: Literal["float32", "bfloat16"] = "float32"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    graphs: bool = True
    drafts: bool = False
    rounds: tuple[str, ...] = ("first",)
    formula: bool = False

    @property
    def env(self) -> dict[str, str]:
        """Environment of the process that serves it; stock vLLM's does not load the plugin."""
        if self.heads != "stock":
            return {}
        # vLLM's Triton attention would multiply fp32 as tf32.
        return {"VLLM_PLUGINS": "", "TRITON_F32_DEFAULT": "ieee"}


def engine_options(cell: Cell, scale: Scale, model: Path, device: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    options: dict[str, Any] = {
        "model": str(model),
        "dtype": cell.dtype,
        "kv_cache_dtype": cell.kv_cache_dtype,
        "max_model_len": scale.max_model_len,
        "max_num_seqs": 16,
        "max_num_batched_tokens": scale.chunk,
        "enforce_eager": not cell.graphs or device == "cpu",
        "disable_log_stats": True,
    }
    if device == "cpu":
        options["kv_cache_memory_bytes"] = 128 * 1024**2
    else:
        # Not kv_cache_memory_bytes: vLLM would not capture graphs on a cache that it drops.
        options["gpu_memory_utilization"] = 0.25
        if cell.heads == "stock" and cell.dtype == "float32":
            # FlashAttention takes no fp32.
            options["attention_backend"] = "TRITON_ATTN"
        if cell.graphs and not cell.drafts:
            options["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    if cell.heads != "stock":
        razor = {
            "head_profile": str(model / f"{cell.heads}.json"),
            "window": scale.window,
            "sinks": SINKS,
            "prefill": cell.prefill,
        }
        options["additional_config"] = {"razor": razor}
    if cell.drafts:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 2,
        }
    return options


def prompts(scale: Scale, name: str) -> list[list[int]]:
    """Token ids of a round's prompts: random bytes after the model's first token."""
    draw = random.Random(11)
    if name == "repeats":
        return [[0, *[draw.randrange(5, 261) for _ in range(n - 1)]] * 5 for n in scale.repeated]
    return [[0, *[draw.randrange(5, 261) for _ in range(n - 1)]] for n in scale.lengths]


def serve(cell: Cell, scale: Scale, model: Path, device: str) -> dict[str, Any]:
    """Start the cell's engine in this process, ask it, and end it."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm: Any = LLM(**engine_options(cell, scale, model, device))
    core = llm.llm_engine.engine_core.engine_core
    if cell.heads == "stock" and cell.kv_cache_dtype == "fp8":
        _keep_queries(llm)
    drafted = _counted_drafts(core.scheduler)
    compilations, replays = Compilations(), Replays()
    try:
        found: dict[str, Any] = {"rounds": {name: _ask(llm, scale, name) for name in cell.rounds}}
        pool = core.scheduler.kv_cache_manager.block_pool
        found |= {
            "compiled": compilations.names,
            "replays": replays.count,
            "drafted": sum(drafted),
            "free": pool.get_num_free_blocks() == pool.num_gpu_blocks - 1,
            "runner": type(core.model_executor.driver_worker.worker.model_runner).__module__,
            "backends": _backends(llm),
        }
        local_block = _local_block(llm)
    finally:
        compilations.stop()
        replays.stop()
        llm.llm_engine.engine_core.shutdown()
        del llm, core
        cleanup_dist_env_and_memory()
        gc.collect()
    if cell.formula:
        window = Window(SINKS, scale.window, 0.0, local_block)
        found["formula"] = _formula(cell, scale, model, device, window, found["rounds"]["first"])
    return found


def _ask(llm: Any, scale: Scale, name: str) -> list[Any]:
    """A round's answers, see `answers.Answer`."""
    from vllm import SamplingParams

    if name == "repeats":
        llm.reset_prefix_cache()
    params = SamplingParams(
        temperature=0,
        max_tokens=scale.max_tokens * (3 if name == "repeats" else 1),
        ignore_eos=True,
        logprobs=TOP,
        extra_args={"kv_policy": "full"} if name == "full" else None,
    )
    requests = [{"prompt_token_ids": tokens} for tokens in prompts(scale, name)]
    answers = []
    for result in llm.generate(requests, params, use_tqdm=False):
        out = result.outputs[0]
        steps = [{str(t): x.logprob for t, x in step.items()} for step in out.logprobs]
        chosen = [step[str(t)] for step, t in zip(steps, out.token_ids, strict=True)]
        answers.append([list(out.token_ids), chosen, steps, result.num_cached_tokens or 0])
    return answers


def _counted_drafts(scheduler: Any) -> list[int]:
    """A list that gets, at each step from now on, how many drafted tokens it checks."""
    counts: list[int] = []
    schedule = scheduler.schedule

    def counting(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        counts.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
        return output

    scheduler.schedule = counting
    return counts


def _layers(llm: Any) -> dict[str, Any]:
    return llm.llm_engine.vllm_config.compilation_config.static_forward_context


def _keep_queries(llm: Any) -> None:
    """With an fp8 cache vLLM on CUDA rounds queries to fp8 too; we do not, so switch that off."""
    for layer in _layers(llm).values():
        layer.query_quant = None


def _backends(llm: Any) -> list[str]:
    """Attention backends of the model's layers."""
    found = [getattr(layer, "attn_backend", None) for layer in _layers(llm).values()]
    return sorted({backend.__name__ for backend in found if backend is not None})


def _local_block(llm: Any) -> int:
    """Tokens per page of the local pool; 0 if there is none."""
    local = _layers(llm).get("razor.layers.1.local")
    return local.get_kv_cache_spec(llm.llm_engine.vllm_config).block_size if local else 0


def _formula(
    cell: Cell, scale: Scale, model: Path, device: str, window: Window, answers: list[Any]
) -> dict[str, list[float]]:
    """The oracle's log-probabilities of the shorter requests' tokens, by request index."""
    stored = torch.float8_e4m3fn if cell.kv_cache_dtype == "fp8" else torch.float32
    formula = Formula(model, SOME_HEADS, window, stored, device)
    return {
        str(index): formula.logprobs(prompt, answers[index][0], cell.prefill == "exact")
        for index, prompt in enumerate(prompts(scale, "first"))
        if len(prompt) <= scale.formula
    }
