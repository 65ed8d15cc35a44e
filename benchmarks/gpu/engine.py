"""vLLM with dummy weights of Llama-3.1-8B's shape, timed: stock and under the policy.

slopes   inter-token latency over context, time to first token, output tokens/s of many
         long contexts
host     a step of 256 short requests of a model of two such layers, where the device waits
         for the host
"""

import itertools
import json
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.compilations import OURS, Compilations
from benchmarks.gpu.decode import WINDOW
from razor_vllm.heads.profile import HeadProfile, read_profile

CONTEXTS = (1_024, 8_192, 32_768, 131_072)
HOST_LAYERS, HOST_REQUESTS, HOST_TOKENS, HOST_STEPS = 2, 256, 512, 64
LIVE_REQUESTS, LIVE_TOKENS, LIVE_GENERATED = 16, 25_600, 128
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 128256,
    "max_position_embeddings": 262144,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Served:
    """How an engine serves. kv_cache_dtype: auto is the model's bf16."""

    policy: Literal["stock", "razor"]
    prefill: Literal["exact", "windowed"] = "exact"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"

    @property
    def name(self) -> str:
        prefill = [self.prefill] if self.policy == "razor" else []
        return " ".join([self.policy, *prefill, self.kv_cache_dtype.replace("auto", "bf16")])

    @property
    def env(self) -> dict[str, str]:
        return {"VLLM_PLUGINS": ""} if self.policy == "stock" else {}


def make_model(folder: Path, profile: str | None, num_layers: int) -> None:
    """A configuration without weights, and a profile of its layers.

    Args:
        profile: of 32 layers of 8 KV heads of 128; by default `made_profile`.
    """
    config = {**LLAMA_8B, "num_hidden_layers": num_layers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = read_profile(Path(profile)) if profile else made_profile()
    kept = replace(
        whole,
        num_layers=num_layers,
        retrieval_heads=whole.retrieval_heads[:num_layers],
        scores={name: rows[:num_layers] for name, rows in whole.scores.items()},
    )
    (folder / "heads.json").write_text(kept.to_json(), encoding="utf-8")


def made_profile() -> HeadProfile:
    """Two heads of eight in each layer, others in each."""
    rows = (
        sorted((layer % NUM_KV_HEADS, (layer + 3) % NUM_KV_HEADS)) for layer in range(NUM_LAYERS)
    )
    return HeadProfile(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, tuple(tuple(row) for row in rows))


class Engine:
    """vLLM in this process, and requests of random tokens."""

    def __init__(self, served: Served, model: Path) -> None:
        from vllm import LLM

        razor = {
            "head_profile": str(model / "heads.json"),
            "window": WINDOW,
            "prefill": served.prefill,
        }
        llm = LLM(
            str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max(CONTEXTS) + 256,
            max_num_seqs=HOST_REQUESTS,
            kv_cache_dtype=served.kv_cache_dtype,
            enable_prefix_caching=False,
            additional_config={"razor": razor} if served.policy == "razor" else {},
        )
        self.engine: Any = llm.llm_engine
        self.draw = random.Random(0)

    def add(self, count: int, length: int, generated: int) -> None:
        """Requests of `length` tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False
        )
        for _ in range(count):
            tokens = [self.draw.randrange(3, 100_000) for _ in range(length)]
            name = str(self.draw.random())
            self.engine.add_request(name, {"prompt_token_ids": tokens}, params)

    def drain(self) -> list[float]:
        """Times at which steps with output ended."""
        times = []
        while self.engine.has_unfinished_requests():
            if self.engine.step():
                times.append(time.perf_counter())
        return times


def measure_slopes(served: Served, model: Path) -> dict[str, Any]:
    """Latencies over context, then output tokens/s of 400k live tokens.

    compiled: kernels of ours that Triton made ready meanwhile; they are part of the times.
    """
    engine = Engine(served, model)
    compilations = Compilations()
    engine.add(1, 1024, 8)
    engine.drain()
    rows = {}
    for length in CONTEXTS:
        begin = time.perf_counter()
        engine.add(1, length, 64)
        times = engine.drain()
        steps = [b - a for a, b in itertools.pairwise(times[1:])]
        rows[length] = {"ttft_s": times[0] - begin, "itl_ms": statistics.median(steps) * 1e3}
    begin = time.perf_counter()
    engine.add(LIVE_REQUESTS, LIVE_TOKENS, LIVE_GENERATED)
    engine.drain()
    generated = LIVE_REQUESTS * LIVE_GENERATED
    return {
        "by_context": rows,
        "output_tokens_s": generated / (time.perf_counter() - begin),
        "compiled": [name for name in compilations.names if name.startswith(OURS)],
    }


def measure_host(served: Served, model: Path) -> dict[str, Any]:
    """Median step of many short requests, all decoding: host time, for the device has little."""
    engine = Engine(served, model)
    engine.add(HOST_REQUESTS, HOST_TOKENS, 256)
    scheduler = engine.engine.engine_core.engine_core.scheduler

    def num_decoding() -> int:
        return sum(request.num_output_tokens > 1 for request in scheduler.running)

    # The first ones read are still decoding when the last one is.
    while num_decoding() < HOST_REQUESTS and engine.engine.has_unfinished_requests():
        engine.engine.step()
    steps = []
    for _ in range(HOST_STEPS):
        begin = time.perf_counter()
        engine.engine.step()
        steps.append(time.perf_counter() - begin)
    if num_decoding() < HOST_REQUESTS:
        raise RuntimeError(f"only {num_decoding()} of {HOST_REQUESTS} requests decoded together")
    return {"step_ms": statistics.median(steps) * 1e3}
