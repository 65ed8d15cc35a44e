"""The native form: `native.cpp`, compiled when the package is built, called through ctypes.

`setup.py` compiles it for several instruction sets, and the widest that this CPU has is
loaded. If none was built, `NativeForm` raises RuntimeError, and `paged` serves.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step

BUILDS = ("_native_avx512_bf16", "_native_avx512", "_native_avx2", "_native")
"""Libraries in this file's folder, the fastest first."""

MAX_HEAD_DIM = 512
MAX_GROUP = 64
HEAD_DIM_MULTIPLE = 16
_KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
}
_RATIO_SCALE = 1_000_000


class StaleBuildError(RuntimeError):
    """A library that was built from another version of `native.cpp`."""


class _Pool(ctypes.Structure):
    _fields_ = [
        ("cache", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("slot_mapping", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        ("ratio", ctypes.c_int64),
        ("sinks", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("local", ctypes.c_int32),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("dense_until", ctypes.c_void_p),
        ("num_requests", ctypes.c_int32),
        ("item_size", ctypes.c_int32),
        ("pools", _Pool * 2),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("pool_of", ctypes.c_void_p),
        ("slot_of", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("num_kv_heads", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("cache_kind", ctypes.c_int32),
        ("query_kind", ctypes.c_int32),
        ("compensation", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("k_scale", ctypes.c_float),
        ("v_scale", ctypes.c_float),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The widest build that runs here.

    Raises:
        RuntimeError: none was built.
        StaleBuildError: the one found is of another version than this file.
    """
    folder = Path(__file__).parent
    for build in BUILDS:
        for path in sorted(folder.glob(f"{build}.*so")):
            found = ctypes.CDLL(str(path))
            if found.razor_runs_here():
                return _declared(found, path)
    raise RuntimeError(
        f"razor: no native kernels in {folder}: found none of {', '.join(BUILDS)}; "
        "install razor-vllm again where a C++ compiler (g++) is"
    )


def _declared(found: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    """The library with its functions declared, if its structs are those of this file.

    Raises:
        StaleBuildError: they are not.
    """
    expected = (ctypes.sizeof(_Pool), ctypes.sizeof(_Step), ctypes.sizeof(_Layer))
    sizes = (ctypes.c_int32 * 3)()
    if hasattr(found, "razor_struct_sizes"):
        found.razor_struct_sizes(sizes)
    if tuple(sizes) != expected:
        raise StaleBuildError(
            f"razor: {path} is of another version: expected structs of {expected} bytes, found "
            f"{tuple(sizes)}; install razor-vllm again"
        )
    arguments: list[Any] = [ctypes.POINTER(_Step), ctypes.POINTER(_Layer)]
    arguments += [ctypes.c_void_p, ctypes.c_int64] * 2 + [ctypes.c_int]
    found.razor_write.argtypes = found.razor_attention.argtypes = arguments
    found.razor_write.restype = found.razor_attention.restype = None
    return found


def covers(head_dim: int, group: int, dtype: torch.dtype) -> bool:
    """Whether heads of this kind have a native form: `head_dim` a multiple of 16 up to 512."""
    return (
        head_dim % HEAD_DIM_MULTIPLE == 0
        and head_dim <= MAX_HEAD_DIM
        and (group <= MAX_GROUP and dtype in _KINDS)
    )


class NativeForm:
    """Write and attention on a CPU (the contract is `step`'s).

    Steps, layers and their tensors must not move while in use: their addresses are taken
    once.

    Raises:
        RuntimeError: no library was built.
    """

    def __init__(self) -> None:
        self._library = library()
        self._step: tuple[Step, _Step] | None = None
        # By id; the object is held too, so that its id is not used again.
        self._layers: dict[
            tuple[int, int, torch.dtype], tuple[LayerHeads, AttentionParams, _Layer]
        ] = {}

    def plan(self, step: Step) -> None:
        """Nothing: the first layer of a step prepares it."""

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
    ) -> None:
        """Write K and V into the pages; a page that is now full gets its running sums.

        Args:
            key, value: `[num_tokens, num_kv_heads, head_dim]`, rows contiguous.
        """
        dtype = step.stored_dtype
        key, value = _stored(key, dtype, params.k_scale), _stored(value, dtype, params.v_scale)
        self._library.razor_write(
            self._step_of(step),
            self._layer_of(heads, params, key, dtype, 1),
            *_rows(key),
            *_rows(value),
            torch.get_num_threads(),
        )

    def attention(
        self,
        query: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None:
        """Attention of every query head over its KV head's pages.

        Args:
            query: `[num_tokens, num_kv_heads, group, head_dim]` of fp32, bf16 or fp16.
            out: like query, rows contiguous; written to.
        """
        # Held by this name until the call returns: the library gets only its address.
        query = _with_rows(query)
        self._library.razor_attention(
            self._step_of(step),
            self._layer_of(heads, params, query, step.stored_dtype, query.shape[2]),
            *_rows(query),
            *_rows(out),
            torch.get_num_threads(),
        )

    def _step_of(self, step: Step) -> _Step:
        if self._step is None or self._step[0] is not step:
            self._step = (step, _step(step))
        return self._step[1]

    def _layer_of(
        self,
        heads: LayerHeads,
        params: AttentionParams,
        rows: torch.Tensor,
        stored: torch.dtype,
        group: int,
    ) -> _Layer:
        """The struct of heads whose keys or queries are `rows`, with a cache of type `stored`."""
        key = (id(heads), group, rows.dtype)
        known = self._layers.get(key)
        if known is None or known[1] is not params:
            layer = _layer(heads, params, rows.shape[-1], rows.dtype, stored, group)
            known = self._layers[key] = (heads, params, layer)
        return known[2]


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """x in the cache's type and units, with contiguous rows."""
    if dtype == torch.float8_e4m3fn:
        limit = torch.finfo(dtype).max
        x = (x.float() / scale).clamp(-limit, limit)
    return _with_rows(x if x.dtype == dtype else x.to(dtype))


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself if its rows are contiguous, else a copy; the caller holds it while in use."""
    return x if _has_rows(x) else x.contiguous()


def _has_rows(x: torch.Tensor) -> bool:
    """Whether all dimensions but the first are contiguous."""
    return _are_contiguous(x.shape[1:], x.stride()[1:])


@functools.lru_cache
def _are_contiguous(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Of all but the first dimension; every layer of every step asks it."""
    stride = 1
    for size, found in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and found != stride:
            return False
        stride *= size
    return True


def _rows(x: torch.Tensor) -> tuple[int, int]:
    """Address, and bytes from row to row."""
    assert _has_rows(x), f"rows of strides {x.stride()} are not contiguous"
    return x.data_ptr(), x.stride(0) * x.element_size()


def _check_row(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    assert tensor.dtype == dtype, f"expected {dtype}, got {tensor.dtype}"
    assert tensor.is_contiguous(), f"expected numbers in a row, got strides {tensor.stride()}"


def _step(step: Step) -> _Step:
    for tensor in (step.query_start_loc, step.seq_lens, step.dense_until):
        _check_row(tensor, torch.int32)
    made = _Step(
        query_start_loc=step.query_start_loc.data_ptr(),
        seq_lens=step.seq_lens.data_ptr(),
        dense_until=step.dense_until.data_ptr(),
        num_requests=len(step.seq_lens),
    )
    for index, (pages, tables) in enumerate(zip(step.pools, step.tables, strict=True)):
        if pages is not None and tables is not None:
            made.item_size = pages.layout.dtype.itemsize
            made.pools[index] = _pool(pages, tables)
    return made


def _pool(pages: PoolPages, tables: PoolTables) -> _Pool:
    cache, window = pages.cache, pages.window
    _check_row(tables.slot_mapping, torch.int64)
    for row in tables.block_table[:1]:
        _check_row(row, torch.int32)
    assert cache.stride()[2:] == (2 * pages.layout.head_dim, 1), "pages are not in a row"
    return _Pool(
        cache=cache.data_ptr(),
        page_stride=cache.stride(0) * cache.element_size(),
        slot_stride=cache.stride(1) * cache.element_size(),
        table=tables.block_table.data_ptr(),
        table_stride=tables.block_table.stride(0),
        slot_mapping=tables.slot_mapping.data_ptr(),
        window=window.window if window else 0,
        ratio=window.ratio_millionths if window else 0,
        sinks=window.sinks if window else 0,
        block_size=pages.layout.block_size,
        local=int(window is not None),
    )


def _by_head(numbers: torch.Tensor | None) -> int | None:
    """Address of one fp32 a query head."""
    if numbers is None:
        return None
    _check_row(numbers, torch.float32)
    return numbers.data_ptr()


def _layer(
    heads: LayerHeads,
    params: AttentionParams,
    head_dim: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    group: int,
) -> _Layer:
    for tensor in (heads.pool_of, heads.slot_of):
        _check_row(tensor, torch.int32)
    return _Layer(
        pool_of=heads.pool_of.data_ptr(),
        slot_of=heads.slot_of.data_ptr(),
        slopes=_by_head(params.alibi_slopes),
        sinks=_by_head(params.sink_logits),
        num_kv_heads=len(heads.pool_of),
        group=group,
        head_dim=head_dim,
        cache_kind=_KINDS[stored],
        query_kind=_KINDS[dtype],
        compensation=int(params.compensation),
        scale=params.scale,
        soft_cap=params.soft_cap,
        k_scale=params.k_scale,
        v_scale=params.v_scale,
    )
