"""The score kernel: interpreted against the quadratic form, and compiled for devices not here."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from razor_kernels import scores
from razor_kernels.scores import COPIES, HeadScores, repeat_scores
from razor_kernels.scores_triton import repeat_mass
from razor_kernels.triton_interpreter import patch_interpreter

COMPILED = Path(__file__).with_name("scores_compiled.py")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that a thread block may use (CUDA C++ programming guide, compute capabilities)."""
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton is interpreted: the flag is read once, on import."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, get_context("spawn"), initializer=patch_interpreter) as pool,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(os.getpid).result()
        patch.undo()
        yield pool


def quadratic(query, key, scale: float, period: int, soft_cap: float | None) -> torch.Tensor:
    """Mass of each head from whole attention matrices, fp64 `[2, num_heads]`."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0).double()
    logits = scores.soft_capped(query.double() @ key.transpose(1, 2) * scale, soft_cap)
    length = query.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    mass = torch.zeros(2, query.shape[0], dtype=torch.float64)
    for i in range(1 + period, length):
        for j in range(i - period, 0, -period):
            mass[:, :] += torch.stack([weights[:, i, j], weights[:, i, j + 1]])
    return mass


def heads(
    num_kv_heads: int, group: int, period: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of the probe's length in which copies of a token are alike, as in a model."""
    torch.manual_seed(period + head_dim)
    length = 1 + COPIES * period
    token = torch.arange(length - 1) % period
    shapes = ((group * num_kv_heads, head_dim), (num_kv_heads, head_dim))
    out = []
    for count, dim in shapes:
        noise = torch.randn(count, length, dim)
        noise[:, 1:] += torch.randn(count, period, dim)[:, token]
        out.append(noise.to(dtype))
    return out[0], out[1]


def check(
    interpreter,
    query,
    key,
    period: int,
    soft_cap: float | None = None,
    tolerance: float | None = None,
) -> None:
    """Compare with the quadratic form; the tolerance is of the type by default."""
    scale = query.shape[-1] ** -0.5
    got = interpreter.submit(repeat_mass, query, key, scale, period, COPIES, soft_cap).result()
    want = quadratic(query, key, scale, period, soft_cap)
    tolerance = tolerance or ERROR[query.dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * period * 1e-2)


@pytest.mark.parametrize(
    ("period", "group"), [(2, 1), (2, 8), (21, 4), (42, 1), (63, 7), (63, 8), (111, 4)]
)
def test_mass_is_the_quadratic_forms(interpreter, period: int, group: int) -> None:
    """Any length and any query heads a KV head, in tiles that they do not fill."""
    query, key = heads(2, group, period, 64, torch.float32)
    check(interpreter, query, key, period)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_any_head_dim_and_type(interpreter, head_dim: int, dtype: torch.dtype) -> None:
    """fp32 sums of bf16, fp16 and fp32 heads; dimensions that are no power of two."""
    check(interpreter, *heads(1, 2, 37, head_dim, dtype), 37)


@pytest.mark.parametrize("soft_cap", [0.5, 50.0])
def test_soft_cap(interpreter, soft_cap: float) -> None:
    """Logits are capped before the softmax, in the row's sum and in the diagonals alike."""
    check(interpreter, *heads(2, 2, 40, 64, torch.float32), 40, soft_cap)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_strided_heads(interpreter, order: tuple[int, int, int]) -> None:
    """Views of other layouts, as models hand them over, are read where they lie."""
    query, key = heads(2, 4, 33, 64, torch.float32)
    inverse = tuple(order.index(axis) for axis in range(3))
    query, key = (x.permute(order).contiguous().permute(inverse) for x in (query, key))
    assert not query.is_contiguous()
    check(interpreter, query, key, 33)


def test_large_logits_do_not_overflow(interpreter) -> None:
    """A row whose logits reach thousands, to fp32's 1e-3: the maximum carries it."""
    query, key = heads(1, 1, 50, 64, torch.float32)
    check(interpreter, query * 40, key * 40, 50, tolerance=1e-3)


def test_it_is_what_pytorch_computes(interpreter) -> None:
    """On the CPU and on CUDA a profile holds the same scores."""
    query, key = heads(2, 4, 90, 64, torch.float32)
    mass = interpreter.submit(repeat_mass, query, key, 0.125, 90, COPIES).result()
    want = repeat_scores(query, key, 0.125, 90)
    got = HeadScores(*(mass / (3 * 90)))
    torch.testing.assert_close(got.echo, want.echo, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.induction, want.induction, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_without_spills(capability: int) -> None:
    """For Ampere, Hopper and Blackwell, every type and tile: no stack, shared memory fits."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, COMPILED, str(capability)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used = json.loads(done.stdout)
    assert len(used) == 7
    for case, resources in used.items():
        assert resources["STACK"] == resources["LOCAL"] == 0, (case, resources)
        assert 0 < resources["REG"] <= 255
        assert resources["shared"] <= SHARED_BYTES[capability], (case, resources)
