"""Attention kernels on a CPU, compared on the same numbers: native, PyTorch's form, vLLM's.

    python -m benchmarks.cpu_kernels --output FILE [--models NAME ...] [--threads 1] [--rounds 15]

All heads are dense here, so that vLLM's own kernel can be compared: one layer's heads of a
model. `decode` reads a context once, so its speed is given as bytes of K and V per second;
`prefill` as seconds. Layers of a decode take turns until no cache holds their K and V, as
between two steps of a model.
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

VLLM_BLOCK = 32
RAZOR_BLOCK = 128
COLD_BYTES = 96 * 1024**2
"""Of K and V that are read in turn: three times the last cache of the CPU in the docs."""


class Load(NamedTuple):
    """A batch of equal requests: queries are the last `queries` tokens of `length`."""

    name: str
    requests: int
    length: int
    queries: int


class Heads(NamedTuple):
    """One layer's. group: query heads a KV head."""

    num_kv_heads: int
    group: int
    head_dim: int


SMALL_LOADS = (Load("decode", 4, 512, 1), Load("decode", 4, 4_096, 1))
MODELS = {
    "llama-3.1-8b": (
        Heads(8, 4, 128),
        (
            Load("decode", 1, 16_384, 1),
            Load("decode", 8, 4_096, 1),
            Load("decode", 32, 512, 1),
            Load("prefill", 1, 2_048, 2_048),
            Load("prefill", 1, 8_192, 512),
        ),
    ),
    "smollm2-135m": (Heads(3, 3, 64), (*SMALL_LOADS, Load("prefill", 1, 4_096, 4_096))),
    "random-llama": (Heads(4, 2, 32), SMALL_LOADS),
}


class Numbers(NamedTuple):
    """q `[tokens, heads, dim]`; k, v `[requests, length, kv heads, dim]`."""

    heads: Heads
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def draw(heads: Heads, load: Load, dtype: torch.dtype) -> Numbers:
    shape = (load.requests, load.length, heads.num_kv_heads, heads.head_dim)
    num_heads = heads.num_kv_heads * heads.group
    q = torch.randn(load.requests * load.queries, num_heads, heads.head_dim)
    return Numbers(heads, q.to(dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


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
    dtype, (num_kv_heads, group, head_dim) = numbers.q.dtype, numbers.heads
    table, mapping = tables_of(load, RAZOR_BLOCK)
    layout = PageLayout(RAZOR_BLOCK, head_dim, dtype, has_tail=False)
    cache = torch.zeros(table.numel(), num_kv_heads, RAZOR_BLOCK, 2 * head_dim, dtype=dtype)
    heads = LayerHeads(
        torch.zeros(num_kv_heads, dtype=torch.int32),
        torch.arange(num_kv_heads, dtype=torch.int32),
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
    params = AttentionParams(head_dim**-0.5)
    q = numbers.q.view(-1, num_kv_heads, group, head_dim)
    out = torch.empty_like(q)

    def call() -> torch.Tensor:
        form.attention(q, heads, step, params, out)
        return out.flatten(1, 2)

    return call


def vllm_call(load: Load, numbers: Numbers) -> Callable[[], torch.Tensor]:
    """vLLM's CPU kernel on the same numbers."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype, (num_kv_heads, group, head_dim) = numbers.q.dtype, numbers.heads
    table, mapping = tables_of(load, VLLM_BLOCK)
    isa = _get_attn_isa(dtype, VLLM_BLOCK, head_dim)
    shape = (table.numel(), num_kv_heads, 2 * VLLM_BLOCK, head_dim)
    key_cache, value_cache = torch.zeros(shape, dtype=dtype).chunk(2, dim=2)
    k, v = numbers.k.flatten(0, 1), numbers.v.flatten(0, 1)
    flat = mapping.flatten()
    ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, flat, isa)
    batch = batch_of(load)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=load.requests,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
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
            scale=head_dim**-0.5,
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


def measure(model: str, load: Load, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median seconds of each form, in turn; they must agree."""
    heads = MODELS[model][0]
    width = heads.num_kv_heads * heads.head_dim
    read = 2 * load.requests * load.length * width * dtype.itemsize
    layers = 1 if load.queries > 1 else -(-COLD_BYTES // read)
    native, paged = NativeForm(), PagedForm()
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {"native": [], "vllm": [], "paged": []}
    for _ in range(layers):
        numbers = draw(heads, load, dtype)
        calls["native"].append(razor_call(native, load, numbers))
        calls["vllm"].append(vllm_call(load, numbers))
        calls["paged"].append(razor_call(paged, load, numbers))
    outputs = {name: made[0]().float() for name, made in calls.items()}
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["native"], rtol=0.05, atol=0.02, msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, made in calls.items():
            begin = time.perf_counter()
            for call in made:
                call()
            seconds[name].append((time.perf_counter() - begin) / layers)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "model": model,
        **load._asdict(),
        "dtype": str(dtype)[6:],
        "milliseconds": {name: round(x * 1e3, 3) for name, x in medians.items()},
        "gigabytes_per_second": {name: round(read / x / 1e9, 2) for name, x in medians.items()},
        "native_to_vllm": round(medians["vllm"] / medians["native"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    import vllm

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32)
    loads = [(model, load) for model in args.models for load in MODELS[model][1]]
    pairs = [*itertools.product(loads, dtypes)]
    table = [measure(model, load, dtype, args.rounds) for (model, load), dtype in tqdm(pairs)]
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
