"""The Triton form: the host side of the kernels that serve on a GPU.

    step    plan: one small launch, before a CUDA graph is replayed
    layer   write: one launch; attention: decode and merge, and prefill where a request
            of the step has more queries than a decode takes

All buffers are allocated once, and nothing here waits for the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from razor_kernels import triton_decode, triton_prefill, triton_write
from razor_kernels.layout import PageLayout
from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step
from razor_kernels.triton_interpreter import patch_interpreter
from razor_kernels.triton_tile import Batch, Heads, LogitParams, Pool
from razor_kernels.window import Window

HEAD_DIMS = range(16, 513, 16)
GROUPS = range(1, 17)

_DECODE_TILE_BYTES = 32 * 1024
"""Bytes of K and V per tile: two units run on an SM, see `triton_decode.WAVE`. Derived, not
measured."""


MAX_DECODE_ROWS = 32
"""Most rows (queries times group) of a decode: 64 spill 32 bytes at head_dim 128, bf16, sm_80."""

MAX_WIDE_FP32_ROWS = 16
"""The same for fp32 with a head_dim over 256: 32 need 192 KiB of shared memory; sm_80 has 163."""

CONVERTS_FP8 = 89
"""First compute capability on which Triton converts e4m3 with the device's instructions."""


class Device(NamedTuple):
    """What launches depend on. capability: 10 * major + minor of the compute capability."""

    num_sms: int
    capability: int

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        """Those of `device`; for the interpreter, those of a small GPU of the latest kind."""
        if device.type != "cuda":
            return cls(num_sms=4, capability=100)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, 10 * properties.major + properties.minor)

    @property
    def converts_fp8(self) -> bool:
        """Whether Triton converts e4m3 with the device's instructions."""
        return self.capability >= CONVERTS_FP8


class PrefillTile(NamedTuple):
    """Rows and keys of a tile, and its launch options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_tile(
    head_dim: int, dtype: torch.dtype, stored: torch.dtype, capability: int
) -> PrefillTile:
    """Tile of the prefill; chosen so that nothing spills (`benchmarks.triton_resources`).

    Speed was not measured. An accumulator of 128 x 128 fp32 takes 64 registers of each of 256
    threads, K and V of 64 keys in two stages take 64 KiB; head_dim 256 halves the keys. Before
    sm_90 a dot's operands are in registers as well: at head_dim 128, bf16, 64 keys spill 104
    bytes on sm_80, 32 keys 8, 16 none. At 256 each warp holds all queries: 64 of them spill 272
    bytes, 32 none. Dots of fp32 run without tensor cores: 32 x 32 spill 8 bytes at 64, 16 at 128.
    With learned sinks, four warps spill 8 bytes at 64 on sm_100, eight none.
    At head_dim 512 on sm_90, 64 queries spill 152 bytes or more, 32 x 16 in two stages 16, 32 x 32
    in one none; on sm_80, 16 queries in four warps 16 bytes, in eight none.
    """
    wide = triton.next_power_of_2(head_dim)
    if wide == 512:
        small = dtype == torch.float32 or capability < 90
        return PrefillTile(16, 16, 8, 2) if small else PrefillTile(32, 32, 8, 1)
    if dtype == torch.float32:
        return PrefillTile(32, 32, 8, 2) if wide < 64 else PrefillTile(16, 16, 8, 2)
    if capability < 90:
        if wide < 128:
            return PrefillTile(128, 32, 8, 2)
        # fp8 is converted by hand there: 32 x 16 in two stages spill 16 bytes at 256.
        stages = 1 if wide == 256 and stored == torch.float8_e4m3fn else 2
        return PrefillTile(128, 16, 8, 2) if wide < 256 else PrefillTile(32, 16, 8, stages)
    if wide < 128:
        return PrefillTile(128, 64, 4 if capability < 100 else 8, 3)
    return PrefillTile(128, 64 if wide < 256 else 32, 8, 2)


class DecodeTile(NamedTuple):
    """Keys of a tile, and its launch options."""

    block_n: int
    num_warps: int
    num_stages: int


def decode_tile(head_dim: int, dtype: torch.dtype, stored: torch.dtype, rows: int) -> DecodeTile:
    """Tile of the decode, which has `rows` queries times group; chosen so that nothing spills.

    Half as many keys where registers are short: for a cache that is converted in registers, and
    for more than 16 rows. Dots of fp32 run without tensor cores and hold both operands in
    registers: on sm_80, at head_dim 128, 32 rows in three stages spill 24 bytes, and a converted
    cache 192. At 512, 32 rows of bf16 in eight warps spill 8 bytes on sm_80, in four none; those
    of fp8 in four 40 bytes on sm_90, in eight none.
    """
    is_fp32 = dtype == torch.float32
    converted = stored == torch.float8_e4m3fn or (is_fp32 and stored != dtype)
    halved = converted or rows > 16
    most = _DECODE_TILE_BYTES // 2 if halved else _DECODE_TILE_BYTES
    itemsize = dtype.itemsize if is_fp32 else stored.itemsize
    keys = min(128, max(16, most // (2 * triton.next_power_of_2(head_dim) * itemsize)))
    is_wide = head_dim > 256
    if is_fp32 and (halved or is_wide):
        return DecodeTile(keys, 8, 2)
    if is_wide and rows > 16:
        return DecodeTile(keys, 8 if converted else 4, 2)
    return DecodeTile(keys, 4, 3)


class TritonForm:
    """Write, plan and attention by Triton (the contract is `step`'s).

    Args:
        layouts: of the retrieval and the local pool; None where the model has no such heads.
        window: of the local heads.
        num_kv_heads: of a layer. group: query heads per KV head, 1 to 16.
        max_requests: of a step, padding included.
        max_queries: a request with at most this many queries is decoded, one with more is
            prefilled. 1, or with speculation 1 + the drafted tokens. Where that makes more
            rows than `MAX_DECODE_ROWS` (`MAX_WIDE_FP32_ROWS`), 1 is used, and prefill serves
            drafted tokens.
        dtype: of queries and outputs.
        traits: of the device; by default its own.

    Raises:
        NotImplementedError: heads that the kernels do not cover.
    """

    def __init__(
        self,
        device: torch.device,
        layouts: tuple[PageLayout | None, PageLayout | None],
        window: Window | None,
        num_kv_heads: int,
        group: int,
        max_requests: int,
        dtype: torch.dtype,
        max_queries: int = 1,
        traits: Device | None = None,
    ) -> None:
        patch_interpreter()
        layout = layouts[0] or layouts[1]
        assert layout is not None, "a model has heads of some kind"
        if layout.head_dim not in HEAD_DIMS or group not in GROUPS:
            raise NotImplementedError(
                f"head_dim {layout.head_dim} with {group} query heads a KV head: the Triton "
                "kernels cover multiples of 16 up to 512, and 1 to 16 query heads"
            )
        if dtype == torch.float32 and layout.dtype != dtype and layout.head_dim > 128:
            raise NotImplementedError(
                f"head_dim {layout.head_dim} of fp32 over a cache of {layout.dtype}: the Triton "
                "kernels cover it up to 128, for no tile of it fits the registers; serve in "
                "bf16 or fp16"
            )
        self.traits = traits or Device.of(device)
        self.group, self.num_kv_heads, self.max_requests = group, num_kv_heads, max_requests
        is_wide_fp32 = dtype == torch.float32 and layout.head_dim > 256
        most = MAX_WIDE_FP32_ROWS if is_wide_fp32 else MAX_DECODE_ROWS
        self.max_queries = max_queries if max_queries * group <= most else 1
        self._shapes = (_pool_shape(layouts[0], None), _pool_shape(layouts[1], window))
        capability = self.traits.capability
        self._tile = prefill_tile(layout.head_dim, dtype, layout.dtype, capability)
        rows = self.max_queries * group
        self._decode_tile = decode_tile(layout.head_dim, dtype, layout.dtype, rows)
        self._plan = self._allocate_plan(device, self._decode_tile.block_n)
        self._partials = self._allocate_partials(device, layout.head_dim)

    def max_units(self, num_requests: int) -> int:
        """Most units that a plan divides a layer's keys into, on top of one per request and head.

        A single request needs only as many as fill the device.
        """
        most = min(triton_decode.MAX_UNITS, 4 + num_requests)
        return most * self.traits.num_sms

    def _allocate_plan(self, device: torch.device, block_n: int) -> triton_decode.Plan:
        heads, requests = self.num_kv_heads, self.max_requests
        max_items = self.max_units(requests) + requests
        kinds = (heads + 1, 2)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return triton_decode.Plan(
            zeros(heads + 1),
            zeros(*kinds, max_items),
            zeros(*kinds, requests + 1),
            MAX_ITEMS=tl.constexpr(max_items),
            MAX_REQUESTS=tl.constexpr(requests),
            NUM_KV_HEADS=tl.constexpr(heads),
            BLOCK_H=tl.constexpr(triton.next_power_of_2(heads)),
            BLOCK_N=tl.constexpr(block_n),
            MAX_QUERIES=tl.constexpr(self.max_queries),
        )

    def _allocate_partials(self, device: torch.device, head_dim: int) -> triton_decode.Partials:
        requests = self.max_requests
        units = self.max_units(requests) + requests * self.num_kv_heads
        rows = units * self.max_queries * self.group
        return triton_decode.Partials(
            torch.empty(rows, head_dim, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )

    def plan(self, step: Step) -> None:
        """Plan a step's decode on the device from its tensors; call it before `attention`.

        It reads only lengths and `dense_until`, so a step with one pool's tables is enough. A
        CUDA graph that reads the same tensors is replayed after it.
        """
        num_requests = len(step.seq_lens)
        if num_requests > self.max_requests:
            raise ValueError(f"{num_requests} requests; this form was made for {self.max_requests}")
        triton_decode.plan(
            *self._shapes,
            _batch(step),
            self._plan,
            self.max_units(num_requests),
            self.traits.num_sms,
        )

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
    ) -> None:
        """Write K and V into the pages; a local page that is now full gets its running sums."""
        triton_write.write(
            triton_write.Tokens.of(key, params.k_scale),
            triton_write.Tokens.of(value, params.v_scale),
            *self._pools(step),
            Heads(heads.pool_of, heads.slot_of),
            _batch(step),
            step.max_query_len,
        )

    def attention(
        self,
        query: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None:
        """Attention of every query head over its KV head's pages."""
        q, o = triton_decode.Queries.of(query), triton_decode.Queries.of(out)
        pools, batch = self._pools(step), _batch(step)
        where = Heads(heads.pool_of, heads.slot_of)
        precision = "ieee" if query.dtype == torch.float32 else "tf32"
        logit_params = LogitParams(
            params.scale * params.k_scale,
            params.alibi_slopes,
            params.sink_logits,
            tl.constexpr(params.soft_cap),
            tl.constexpr(precision),
        )
        triton_decode.decode(
            q,
            o,
            *pools,
            where,
            batch,
            self._plan,
            self._partials,
            logit_params,
            params.v_scale,
            params.compensation,
            self.max_units(len(step.seq_lens)),
            self._decode_tile.num_warps,
            self._decode_tile.num_stages,
        )
        if step.max_query_len > self.max_queries:
            triton_prefill.prefill(
                q,
                o,
                *pools,
                where,
                batch,
                logit_params,
                params.v_scale,
                params.compensation,
                self.max_queries + 1,
                *self._tile,
            )

    def _pools(self, step: Step) -> tuple[Pool | None, Pool | None]:
        both = zip(self._shapes, step.pools, step.tables, strict=True)
        retrieval, local = (
            self._pool(shape, pages, tables) if shape and pages and tables else None
            for shape, pages, tables in both
        )
        return retrieval, local

    def _pool(self, shape: Pool, pages: PoolPages, tables: PoolTables) -> Pool:
        cache = pages.cache
        if cache.dtype == torch.float8_e4m3fn and not self.traits.converts_fp8:
            cache = cache.view(torch.uint8)
        return shape._replace(
            cache_ptr=cache,
            stride_cache_page=cache.stride(0),
            stride_cache_slot=cache.stride(1),
            block_table_ptr=tables.block_table,
            stride_block_table=tables.block_table.stride(0),
            slot_mapping_ptr=tables.slot_mapping,
        )


def _batch(step: Step) -> Batch:
    return Batch(step.query_start_loc, step.seq_lens, step.dense_until)


def _pool_shape(layout: PageLayout | None, window: Window | None) -> Pool | None:
    """The constants of a pool that kernels are compiled for; `plan` needs nothing else."""
    if layout is None:
        return None
    sinks, least, ratio = 0, 0, 0
    if window is not None:
        sinks, least, ratio = window.sinks, window.window, window.ratio_millionths
    return Pool(
        cache_ptr=None,
        stride_cache_page=0,
        stride_cache_slot=0,
        block_table_ptr=None,
        stride_block_table=0,
        slot_mapping_ptr=None,
        HEAD_DIM=tl.constexpr(layout.head_dim),
        BLOCK_SIZE=tl.constexpr(layout.block_size),
        LOCAL=tl.constexpr(window is not None),
        SINKS=tl.constexpr(sinks),
        WINDOW=tl.constexpr(least),
        RATIO=tl.constexpr(ratio),
    )
