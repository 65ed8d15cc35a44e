"""The contract between a step and the kernels, which every form keeps.

A form (PyTorch, native, Triton) offers two operations on one layer:

    write(key, value, heads, step, params)      K and V into the pages, then the tails
    attention(query, heads, step, params, out)  every query head over its KV head's pages

    key, value  [num_tokens, num_kv_heads, head_dim], after the rotary embedding
    query, out  [num_tokens, num_kv_heads, group, head_dim]; out is written to

Rows of a request are consecutive, and so are requests. Rows from `query_start_loc[-1]` on
are padding, which no form reads or writes. A page holds what `layout` says, in stored
units: K is `stored * params.k_scale`. Pages that a block table does not name, and rows of a
page that were never written, may hold anything, NaN included.

The logit of a query at position t and a key at position j is

    l = scale * q.k_j;  l = soft_cap * tanh(l / soft_cap);  l += slope * (j - t)

each of the last two only where the model has it. A compensation slot's logit has k^ for
k_j, the mean position of the dropped tokens for j, and ln N added. A learned sink is one
more logit of each row, as it stands, whose value is zero: it adds weight alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from razor_kernels.layout import PageLayout
from razor_kernels.window import Window


class PoolPages(NamedTuple):
    """One pool's memory in one step: an engine may allocate it again between two steps.

    cache: `[num_pages, num_slots, rows, 2 * head_dim]`, the last two dimensions contiguous.
    window: of local heads; None for retrieval heads, which are always dense.
    """

    cache: torch.Tensor
    layout: PageLayout
    window: Window | None


class LayerHeads(NamedTuple):
    """Where one layer's KV heads live; the same in every step.

    pool_of: int32 `[num_kv_heads]`, 0 for the retrieval pool and 1 for the local one.
    slot_of: int32 `[num_kv_heads]`, slot in that pool.
    """

    pool_of: torch.Tensor
    slot_of: torch.Tensor


class PoolTables(NamedTuple):
    """One pool's pages of a step.

    block_table: int32 `[num_requests, max_pages]` page ids; page i of a request holds its
        positions from `i * block_size` on. Entries of freed pages may hold anything.
    slot_mapping: int64 `[num_tokens]`, page * block_size + offset; -1 where nothing is written.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor


@dataclass(frozen=True)
class Step:
    """A batch of requests, the same for every layer.

    query_start_loc: int32 `[num_requests + 1]`, the rows of each request's queries.
    seq_lens: int32 `[num_requests]`, tokens including the step's; the queries are the last ones.
    dense_until: int32 `[num_requests]`, see `oracle.attention`.
    max_query_len: most queries of any request.
    tables, pools: of the retrieval and of the local pool; None where there is none. `plan`
        needs no pools.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    dense_until: torch.Tensor
    max_query_len: int
    tables: tuple[PoolTables | None, PoolTables | None]
    pools: tuple[PoolPages | None, PoolPages | None] = (None, None)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of K and V in the pages; the same in both pools."""
        return next(pages.layout.dtype for pages in self.pools if pages is not None)


@dataclass(frozen=True)
class AttentionParams:
    """How logits and outputs are computed from what is stored.

    scale: factor on q.k. soft_cap: 0 for none. alibi_slopes: fp32 `[num_heads]`, or None.
    sink_logits: of learned sinks (gpt-oss), fp32 `[num_heads]`, or None.
    k_scale, v_scale: of a quantized cache, 1 otherwise. compensation: whether the mean of a
        local head's dropped tokens takes their place, or nothing does.
    """

    scale: float
    soft_cap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    compensation: bool = True
    sink_logits: torch.Tensor | None = None
