"""What only a GPU can settle, in one run: correctness there, kernel speed, the engine's slopes.

    python -m benchmarks.gpu_check --profile PROFILE --output FILE [--parts correct ... host]

    correct   the shared table of tests/kernel_cases.py, Triton form on the device
    kernels   decode of Llama-3.1-8B's shape, all 32 layers, as a share of copy bandwidth, and
              against vLLM's FlashAttention on the same contexts, dense
    engine    vLLM with that shape and dummy weights: inter-token latency over context, time to
              first token, output tokens/s of many long contexts, {stock, razor} x {bf16, fp8}
    host      a step of 256 short requests of a model of two such layers, where the device
              waits for the host

PROFILE is the head profile of a model of that shape (32 layers, 8 KV heads of 128), such as one
that `razor convert` made of a published pattern.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from razor_kernels import PageLayout, Window
from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step
from razor_kernels.triton_form import TritonForm
from razor_vllm.heads.profile import HeadProfile, read_profile

GROUP = 4
SINKS, WINDOW = 4, 4096
BLOCKS = (128, 32)
LOADS = ((64, 8_192), (8, 131_072), (1, 131_072), (1, 8_192))
CONTEXTS = (1_024, 8_192, 32_768, 65_536, 131_072)
HOST_LAYERS, HOST_REQUESTS, HOST_TOKENS, HOST_STEPS = 2, 256, 512, 64
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 262144,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def median_seconds(call: Callable[[], Any], rounds: int = 20) -> float:
    """Median time of a call on the device, by its events."""
    taken = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken[3:])


def copy_bandwidth() -> float:
    """Bytes a second that a plain copy moves, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source))


def as_graph(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph: what an engine replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Model(NamedTuple):
    """Decode of all layers of one batch: a call, and the bytes of K and V that it must read."""

    call: Callable[[], None]
    num_bytes: int


def razor_model(profile: HeadProfile, requests: int, length: int) -> Model:
    """Every layer's heads in their pools; layers share pages of random numbers."""
    num_heads, head_dim, dtype = profile.num_kv_heads, profile.head_size, torch.bfloat16
    window = Window(SINKS, WINDOW, 0.0, BLOCKS[1])
    layouts = tuple(
        PageLayout(size, head_dim, dtype, has_tail=local)
        for size, local in zip(BLOCKS, (False, True), strict=True)
    )
    held = (length, min(length, WINDOW + 4 * BLOCKS[1]))
    tables, pools = [], []
    for index, layout in enumerate(layouts):
        pages = -(-length // layout.block_size)
        stored = requests * -(-held[index] // layout.block_size)
        # Pages out of the window, which nobody reads, are a request's first one again.
        own = stored // requests
        within = (torch.arange(pages, device="cuda") - (pages - own)).clamp(min=0)
        table = torch.arange(requests, device="cuda")[:, None] * own + within
        shape = (stored, num_heads, layout.rows, 2 * head_dim)
        cache = torch.randn(shape, device="cuda", dtype=dtype)
        nowhere = torch.full((requests,), -1, device="cuda")
        tables.append(PoolTables(table.int(), nowhere))
        pools.append(PoolPages(cache, layout, window if index else None))
    step = Step(
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32, device="cuda"),
        seq_lens=torch.full((requests,), length, dtype=torch.int32, device="cuda"),
        dense_until=torch.zeros(requests, dtype=torch.int32, device="cuda"),
        max_query_len=1,
        tables=(tables[0], tables[1]),
        pools=(pools[0], pools[1]),
    )
    form = TritonForm(
        torch.device("cuda"),
        (layouts[0], layouts[1]),
        window,
        num_heads,
        GROUP,
        requests,
        dtype,
    )
    query = torch.randn(requests, num_heads, GROUP, head_dim, device="cuda", dtype=dtype)
    out, params = torch.empty_like(query), AttentionParams(head_dim**-0.5)
    layers = [_layer_heads(row) for row in _rows(profile)]

    def call() -> None:
        form.plan(step)
        for heads in layers:
            form.attention(query, heads, step, params, out)

    row_bytes = 2 * head_dim * dtype.itemsize
    retrieval = sum(len(row) for row in profile.retrieval_heads)
    local = profile.num_layers * num_heads - retrieval
    first = window.first_window_page((length - 1) // BLOCKS[1]) * BLOCKS[1]
    seen = length - first + min(SINKS, first)
    return Model(call, requests * row_bytes * (retrieval * length + local * seen))


def _rows(profile: HeadProfile) -> list[torch.Tensor]:
    """Which pool each KV head of a layer is in: int32 `[num_kv_heads]` a layer."""
    rows = []
    for chosen in profile.retrieval_heads:
        pool = torch.ones(profile.num_kv_heads, dtype=torch.int32, device="cuda")
        pool[list(chosen)] = 0
        rows.append(pool)
    return rows


def _layer_heads(pool_of: torch.Tensor) -> LayerHeads:
    slots = torch.arange(len(pool_of), dtype=torch.int32, device="cuda")
    return LayerHeads(pool_of, slots)


def flash_model(profile: HeadProfile, requests: int, length: int) -> Model:
    """vLLM's FlashAttention over dense pages of the same contexts."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    size, dtype, head_dim = 16, torch.bfloat16, profile.head_size
    pages = -(-length // size)
    shape = (2, requests * pages, size, profile.num_kv_heads, head_dim)
    key, value = torch.randn(shape, device="cuda", dtype=dtype).unbind(0)
    table = torch.arange(requests * pages, device="cuda", dtype=torch.int32).view(requests, pages)
    num_heads = profile.num_kv_heads * GROUP
    query = torch.randn(requests, num_heads, head_dim, device="cuda", dtype=dtype)
    options = {
        "max_seqlen_q": 1,
        "cu_seqlens_q": torch.arange(requests + 1, device="cuda", dtype=torch.int32),
        "max_seqlen_k": length,
        "seqused_k": torch.full((requests,), length, device="cuda", dtype=torch.int32),
        "softmax_scale": head_dim**-0.5,
        "causal": True,
        "block_table": table,
        "fa_version": 3,
    }

    def call() -> None:
        for _ in range(profile.num_layers):
            flash_attn_varlen_func(query, key, value, **options)

    num_bytes = 2 * head_dim * dtype.itemsize * requests * length
    return Model(call, num_bytes * profile.num_layers * profile.num_kv_heads)


def check_correct() -> dict[str, Any]:
    """The shared table on the device; what fails is listed by name."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from kernel_cases import CASES, NUM_KV_HEADS, SHAPES, Feed, check

    failed, count = {}, 0
    with torch.device("cuda"):
        for shape in SHAPES:
            for case in tqdm(CASES, desc=shape.name):
                feed = Feed(case, shape)
                form = TritonForm(
                    torch.device("cuda"),
                    (feed.pages[0].layout, feed.pages[1].layout),
                    feed.window,
                    NUM_KV_HEADS,
                    shape.group,
                    8,
                    shape.dtype,
                )
                count += 1
                try:
                    check(form, case, shape)
                except Exception as error:
                    failed[f"{case.name}, {shape.name}"] = repr(error)[:300]
    return {"checked": count, "failed": failed}


def measure_kernels(profile: HeadProfile) -> list[dict[str, Any]]:
    """Decode of all layers, and its share of what a copy moves."""
    copied, rows = copy_bandwidth(), []
    for requests, length in tqdm(LOADS, desc="kernels"):
        row: dict[str, Any] = {"requests": requests, "length": length, "copy_bytes_s": copied}
        for name, make in (("razor", razor_model), ("flash", flash_model)):
            try:
                model = make(profile, requests, length)
                seconds = median_seconds(as_graph(model.call))
                row[f"{name}_ms"] = seconds * 1e3
                row[f"{name}_share_of_copy"] = model.num_bytes / seconds / copied
            except torch.OutOfMemoryError:
                row[f"{name}_ms"] = None
            torch.cuda.empty_cache()
        rows.append(row)
    return rows


class Engine:
    """vLLM in this process, under one policy and cache type, and requests of random tokens."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        razor = {"head_profile": job["profile"], "window": WINDOW, "prefill": job["prefill"]}
        llm = LLM(
            job["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max(CONTEXTS) + 256,
            max_num_seqs=HOST_REQUESTS,
            kv_cache_dtype=job["kv_cache_dtype"],
            enable_prefix_caching=False,
            additional_config={"razor": razor} if job["policy"] == "razor" else {},
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


def measure_engine(job: dict[str, Any]) -> dict[str, Any]:
    """Latencies over context, then output tokens/s of 400k live tokens."""
    engine = Engine(job)
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
    engine.add(16, 25_600, 128)
    engine.drain()
    return {"by_context": rows, "output_tokens_s": 16 * 128 / (time.perf_counter() - begin)}


def measure_host(job: dict[str, Any]) -> dict[str, Any]:
    """Median step of many short requests, all decoding: host time, for the device has little."""
    engine = Engine(job)
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


CELLS = {
    "engine": (
        ("stock", "exact", "auto"),
        ("razor", "exact", "auto"),
        ("razor", "windowed", "auto"),
        ("stock", "exact", "fp8"),
        ("razor", "exact", "fp8"),
    ),
    "host": (("stock", "exact", "auto"), ("razor", "exact", "auto")),
}
"""Policy, prefill and cache type of each engine of a part."""


def run_engines(part: str, profile: HeadProfile) -> dict[str, Any]:
    """Each policy in a process of its own."""
    found: dict[str, Any] = {}
    layers = HOST_LAYERS if part == "host" else profile.num_layers
    kept = replace(
        profile,
        num_layers=layers,
        retrieval_heads=profile.retrieval_heads[:layers],
        scores={name: rows[:layers] for name, rows in profile.scores.items()},
    )
    with tempfile.TemporaryDirectory() as folder:
        config = {**LLAMA_8B, "num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        heads = Path(folder) / "heads.json"
        heads.write_text(kept.to_json(), encoding="utf-8")
        for policy, prefill, dtype in tqdm(CELLS[part], desc=part):
            job = {
                "part": part,
                "policy": policy,
                "prefill": prefill,
                "kv_cache_dtype": dtype,
                "profile": str(heads),
                "model": folder,
            }
            env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            if policy == "stock":
                env["VLLM_PLUGINS"] = ""
            command = [sys.executable, "-m", "benchmarks.gpu_check", "--job", json.dumps(job)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            name = f"{policy} {prefill} {dtype}"
            if lines:
                found[name] = json.loads(lines[-1].removeprefix("RESULT "))
            else:
                found[name] = {"error": (done.stdout + done.stderr)[-3000:]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", nargs="+", default=["correct", "kernels", "engine", "host"])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        measure = measure_host if job["part"] == "host" else measure_engine
        print("RESULT " + json.dumps(measure(job)))
        return
    if not args.profile or not args.output:
        parser.error("--profile and --output are needed")
    if not torch.cuda.is_available():
        sys.exit("razor: no CUDA device here; nothing was measured")
    import triton
    import vllm

    profile = read_profile(Path(args.profile))
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu_check", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
    }
    parts: dict[str, Callable[[], Any]] = {
        "correct": check_correct,
        "kernels": lambda: measure_kernels(profile),
        "engine": lambda: run_engines("engine", profile),
        "host": lambda: run_engines("host", profile),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        report[part] = parts[part]()
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(report[part])[:2000], flush=True)


if __name__ == "__main__":
    main()
