"""Attention kernels on a CPU, compared on the same numbers: native, PyTorch's form, vLLM's.

    python -m benchmarks.cpu_kernels --output FILE [--threads 1] [--rounds 15]

All heads are dense here, so that vLLM's own kernel can be compared: one layer of
Llama-3.1-8B's shape (32 query heads, 8 KV heads of 128). `decode` reads a context once, so its
speed is given as bytes of K and V per second; `prefill` as seconds.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.residency import device
from razor_kernels import DENSE_FOREVER, PageLayout
from razor_kernels.native import NativeForm
from razor_kernels.paged import PagedForm
from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step

NUM_KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
SCALE = HEAD_DIM**-0.5
VLLM_BLOCK = 32
RAZOR_BLOCK = 128


class Load(NamedTuple):
    """A batch of equal requests: queries are the last `queries` tokens of `length`."""

    name: str
    requests: int
    length: int
    queries: int


LOADS = (
    Load("decode", 1, 16_384, 1),
    Load("decode", 8, 4_096, 1),
    Load("decode", 32, 512, 1),
    Load("prefill", 1, 2_048, 2_048),
    Load("prefill", 1, 8_192, 512),
)


class Numbers(NamedTuple):
    """q `[tokens, heads, dim]`; k, v `[requests, length, kv heads, dim]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def draw(load: Load, dtype: torch.dtype) -> Numbers:
    shape = (load.requests, load.length, NUM_KV_HEADS, HEAD_DIM)
    q = torch.randn(load.requests * load.queries, NUM_KV_HEADS * GROUP, HEAD_DIM)
    return Numbers(q.to(dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


def batch_of(load: Load) -> dict[str, Any]:
    starts = torch.arange(load.requests + 1, dtype=torch.int32) * load.queries
    return {
        "query_start_loc": starts,
        "seq_lens": torch.full((load.requests,), load.length, dtype=torch.int32),
    }


def tables_of(load: Load, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffled pages: block table `[requests, pages]`, slot mapping `[requests, length]`."""
    pages = -(-load.length // block_size)
    table = torch.randperm(load.requests * pages).view(load.requests, pages).int()
    positions = torch.arange(load.length)
    mapping = table[:, positions // block_size].long() * block_size + positions % block_size
    return table, mapping


def razor_call(form: Any, load: Load, numbers: Numbers) -> Callable[[], torch.Tensor]:
    """Attention by one of our forms, all heads retrieving."""
    dtype = numbers.q.dtype
    table, mapping = tables_of(load, RAZOR_BLOCK)
    layout = PageLayout(RAZOR_BLOCK, HEAD_DIM, dtype, has_tail=False)
    cache = torch.zeros(table.numel(), NUM_KV_HEADS, RAZOR_BLOCK, 2 * HEAD_DIM, dtype=dtype)
    heads = LayerHeads(
        torch.zeros(NUM_KV_HEADS, dtype=torch.int32),
        torch.arange(NUM_KV_HEADS, dtype=torch.int32),
    )
    rows = torch.cat([numbers.k, numbers.v], dim=-1).flatten(0, 1)
    flat = mapping.flatten()
    cache[flat // RAZOR_BLOCK, :, flat % RAZOR_BLOCK] = rows
    until = torch.full((load.requests,), DENSE_FOREVER, dtype=torch.int32)
    queries = mapping[:, -load.queries :].flatten().contiguous()
    step = Step(
        **batch_of(load),
        dense_until=until,
        max_query_len=load.queries,
        tables=(PoolTables(table, queries), None),
        pools=(PoolPages(cache, layout, None), None),
    )
    params = AttentionParams(SCALE)
    q = numbers.q.view(-1, NUM_KV_HEADS, GROUP, HEAD_DIM)
    out = torch.empty_like(q)

    def call() -> torch.Tensor:
        form.attention(q, heads, step, params, out)
        return out.flatten(1, 2)

    return call


def vllm_call(load: Load, numbers: Numbers) -> Callable[[], torch.Tensor]:
    """vLLM's CPU kernel on the same numbers."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype = numbers.q.dtype
    table, mapping = tables_of(load, VLLM_BLOCK)
    isa = _get_attn_isa(dtype, VLLM_BLOCK, HEAD_DIM)
    shape = (table.numel(), NUM_KV_HEADS, 2 * VLLM_BLOCK, HEAD_DIM)
    key_cache, value_cache = torch.zeros(shape, dtype=dtype).chunk(2, dim=2)
    k, v = numbers.k.flatten(0, 1), numbers.v.flatten(0, 1)
    flat = mapping.flatten()
    ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, flat, isa)
    batch = batch_of(load)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=load.requests,
        num_heads=NUM_KV_HEADS * GROUP,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        **batch,
    )
    out = torch.empty_like(numbers.q)

    def call() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query=numbers.q,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
            **batch,
        )
        return out

    return call


def measure(load: Load, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median seconds of each form, in turn; they must agree."""
    numbers = draw(load, dtype)
    calls = {
        "native": razor_call(NativeForm(), load, numbers),
        "vllm": vllm_call(load, numbers),
        "paged": razor_call(PagedForm(), load, numbers),
    }
    outputs = {name: call().float() for name, call in calls.items()}
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["native"], rtol=0.05, atol=0.02, msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    read = 2 * load.requests * load.length * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    return {
        **load._asdict(),
        "dtype": str(dtype)[6:],
        "milliseconds": {name: round(x * 1e3, 3) for name, x in medians.items()},
        "gigabytes_per_second": {name: round(read / x / 1e9, 2) for name, x in medians.items()},
        "native_to_vllm": round(medians["vllm"] / medians["native"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    import vllm

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32)
    pairs = [*itertools.product(LOADS, dtypes)]
    table = [measure(load, dtype, args.rounds) for load, dtype in tqdm(pairs)]
    report = {
        "device": device(),
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
        "rounds": args.rounds,
        "rows": table,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in table:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
