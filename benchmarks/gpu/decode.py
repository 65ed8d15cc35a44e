"""Decode of Llama-3.1-8B's shape, all 32 layers: time, and share of what a plain copy moves.

Ours under a head map, and vLLM's FlashAttention over the same contexts, dense.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from razor_kernels import PageLayout, Window
from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step
from razor_kernels.triton_form import TritonForm
from razor_vllm.heads.profile import HeadProfile, read_profile

GROUP = 4
SINKS, WINDOW = 4, 4096
BLOCKS = (128, 32)
LOADS = ((64, 8_192), (8, 131_072), (1, 131_072), (1, 8_192))
"""Requests, and tokens of each."""


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
    """Bytes per second that a plain copy moves, read and written."""
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
        # Pages outside the window are not read: they are a request's first page again.
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
    """Which pool each KV head is in: int32 `[num_kv_heads]` per layer."""
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


def measure(profile: str, requests: int, length: int) -> dict[str, Any]:
    """Both kernels at one load, replayed as CUDA graphs; None where memory is too small."""
    heads = read_profile(Path(profile))
    copied = copy_bandwidth()
    row: dict[str, Any] = {"copy_bytes_s": copied}
    model: Model | None = None
    for name, make in (("razor", razor_model), ("flash", flash_model)):
        model = None  # its pages are needed for the next
        torch.cuda.empty_cache()
        try:
            model = make(heads, requests, length)
            seconds = median_seconds(as_graph(model.call))
            row[f"{name}_ms"] = seconds * 1e3
            row[f"{name}_share_of_copy"] = model.num_bytes / seconds / copied
        except torch.OutOfMemoryError:
            row[f"{name}_ms"] = None
    return row
