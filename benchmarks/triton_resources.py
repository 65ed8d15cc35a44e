"""What the Triton kernels need on a GPU (registers, shared memory, spills), found without one.

    python -m benchmarks.triton_resources [--capabilities 80 90 100] [--models NAME ...]
        [--output FILE]

Every launch that a form makes is compiled ahead of time, for a decode and for a prompt. The
exit status is 1 if a kernel spills or needs more shared memory than a block may have.
"""

import argparse
import hashlib
import itertools
import json
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from razor_kernels import PageLayout, Window, triton_form
from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step
from razor_kernels.triton_form import Device, TritonForm

CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
CAPABILITIES = (80, 90, 100)
SOURCES = (
    "triton_decode.py",
    "triton_form.py",
    "triton_prefill.py",
    "triton_tile.py",
    "triton_write.py",
)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that a thread block may use (CUDA C++ programming guide, compute capabilities)."""

NUM_KV_HEADS = 8
BLOCKS = (64, 32)
"""Tokens per page, of retrieval and local heads."""

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}


class Model(NamedTuple):
    """The properties of a model and its serving that kernels are compiled for.

    dtype: of queries. stored: of the cache. max_queries: of a request in decode.
    """

    dtype: str
    stored: str
    head_dim: int
    group: int
    max_queries: int = 1
    soft_cap: float = 0.0
    alibi: bool = False
    sinks: bool = False

    @property
    def name(self) -> str:
        dtypes = self.dtype if self.dtype == self.stored else f"{self.dtype}/{self.stored}"
        parts = [dtypes, f"d{self.head_dim}", f"g{self.group}"]
        parts += [f"q{self.max_queries}"] * (self.max_queries > 1)
        parts += ["cap"] * (self.soft_cap > 0) + ["alibi"] * self.alibi
        return "-".join(parts + ["sinks"] * self.sinks)


PAIRS = (
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("fp32", "fp32"),
    ("bf16", "fp8"),
    ("fp16", "fp8"),
    ("fp32", "fp8"),
)
MODELS = (
    *(
        Model(*pair, dim, 4)
        for pair in PAIRS
        for dim in (64, 96, 128, 256)
        if (*pair, dim) != ("fp32", "fp8", 256)  # refused
    ),
    *(Model("bf16", "bf16", 128, group) for group in (1, 7, 8, 16)),
    *(Model("bf16", stored, 128, 8, 4) for stored in ("bf16", "fp8")),
    *(Model("bf16", stored, 256, 16, 2) for stored in ("bf16", "fp8")),
    Model("fp32", "fp32", 128, 8, 4),
    *(Model("fp32", stored, dim, 4) for stored in ("bf16", "fp16") for dim in (64, 128)),
    Model("fp32", "fp32", 64, 1),
    Model("bf16", "bf16", 80, 7, soft_cap=50.0),
    Model("bf16", "fp8", 256, 2, soft_cap=50.0),
    Model("fp32", "fp32", 256, 2, soft_cap=50.0),
    Model("bf16", "bf16", 128, 1, alibi=True),
    *(Model("bf16", stored, 64, 8, sinks=True) for stored in ("bf16", "fp8")),
    *(Model(*pair, 512, 8) for pair in PAIRS if pair != ("fp32", "fp8")),  # refused
    *(Model("bf16", stored, 512, 8, 4) for stored in ("bf16", "fp8")),
)


class Usage(NamedTuple):
    """Of one compiled kernel. registers: a thread. spilled: stack, bytes a thread.

    shared: bytes a block.
    """

    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    seconds: float

    def fits(self, capability: int) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_BYTES[capability]


class _Driver:
    """A device that is not here, with the properties that a compilation needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _usage(kernel: Any, seconds: float) -> Usage:
    """Of a compiled kernel, from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.check_output(command, text=True)
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    meta = kernel.metadata
    spilled = found["STACK"] + found["LOCAL"]
    return Usage(meta.name, meta.num_warps, found["REG"], spilled, meta.shared, round(seconds, 1))


class Compiler:
    """Replaces launches by compilations for a device that is not here, until `end`.

    found: what is launched, by the hash of what was compiled.
    """

    def __init__(self, capability: int, kernels: tuple[str, ...] = ()) -> None:
        self.found: dict[str, Usage] = {}
        self.kernels = kernels
        driver: Any = _Driver(capability)
        triton.runtime.driver.set_active(driver)
        self.run = run = JITFunction.run

        def compile_only(function: Any, *args: Any, **options: Any) -> None:
            if self.kernels and function.__name__ not in self.kernels:
                return
            begin = time.process_time() + _children()
            kernel = run(function, *args, **{**options, "warmup": True})
            if kernel.hash not in self.found:
                seconds = time.process_time() + _children() - begin
                self.found[kernel.hash] = _usage(kernel, seconds)

        setattr(JITFunction, "run", compile_only)  # noqa: B010 - mypy knows it as a method

    def end(self) -> None:
        """Make launches launch again; the driver stays replaced."""
        setattr(JITFunction, "run", self.run)  # noqa: B010


def _children() -> float:
    """CPU seconds of child processes that ended: the assembler's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _step(lens: tuple[int, int]) -> Step:
    """Two requests' last tokens, the same number of each."""
    stop, num_queries = lens
    tokens = 2 * num_queries
    tables = [
        PoolTables(torch.zeros(2, 64, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int64))
        for _ in BLOCKS
    ]
    return Step(
        query_start_loc=torch.tensor([0, num_queries, tokens], dtype=torch.int32),
        seq_lens=torch.tensor([stop, stop], dtype=torch.int32),
        dense_until=torch.zeros(2, dtype=torch.int32),
        max_query_len=num_queries,
        tables=(tables[0], tables[1]),
    )


def launch(model: Model, capability: int) -> None:
    """A decode and a prompt of one layer, half of its heads local."""
    dtype, stored = DTYPES[model.dtype], DTYPES[model.stored]
    layouts = (
        PageLayout(BLOCKS[0], model.head_dim, stored, has_tail=False),
        PageLayout(BLOCKS[1], model.head_dim, stored, has_tail=True),
    )
    window = Window(4, 1024, 0.2, BLOCKS[1])
    form = TritonForm(
        torch.device("cpu"),
        layouts,
        window,
        NUM_KV_HEADS,
        model.group,
        max_requests=256,
        dtype=dtype,
        max_queries=model.max_queries,
        traits=Device(132, capability),
    )
    caches = [torch.zeros(4, 8, x.rows, 2 * x.head_dim, dtype=stored) for x in layouts]
    pools = (PoolPages(caches[0], layouts[0], None), PoolPages(caches[1], layouts[1], window))
    index = torch.arange(NUM_KV_HEADS, dtype=torch.int32)
    heads = LayerHeads(index % 2, index // 2)
    ones = torch.ones(NUM_KV_HEADS * model.group)
    params = AttentionParams(
        model.head_dim**-0.5,
        model.soft_cap,
        alibi_slopes=ones if model.alibi else None,
        k_scale=0.5,
        v_scale=0.5,
        sink_logits=ones if model.sinks else None,
    )
    for num_queries in (1, 64):
        step = replace(_step((1000, num_queries)), pools=pools)
        rows = torch.zeros(2 * num_queries, NUM_KV_HEADS, model.group + 2, model.head_dim)
        query, key, value = rows.to(dtype).split([model.group, 1, 1], dim=2)
        form.plan(step)
        form.write(key.squeeze(2), value.squeeze(2), heads, step, params)
        form.attention(query, heads, step, params, torch.zeros_like(query))


def measure(
    models: list[Model], capability: int, kernels: tuple[str, ...] = ()
) -> Iterator[tuple[Model, Usage]]:
    """Each launch's use, once."""
    compiler = Compiler(capability, kernels)
    try:
        for model in models:
            before = len(compiler.found)
            launch(model, capability)
            for usage in itertools.islice(compiler.found.values(), before, None):
                yield model, usage
    finally:
        compiler.end()


def sources_digest() -> str:
    """SHA-256 of the kernels' sources: a table with a different one is out of date."""
    folder = Path(triton_form.__file__).parent
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def main() -> None:
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--kernels", nargs="+", default=[], help="these alone")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    chosen = [model for model in MODELS if model.name in args.models]
    rows = []
    for capability in args.capabilities:
        for model, usage in measure(chosen, capability, tuple(args.kernels)):
            row = {"capability": capability, "model": model.name, **usage._asdict()}
            row["fits"] = usage.fits(capability)
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
    if args.output:
        report = {
            "command": shlex.join(["python", "-m", "benchmarks.triton_resources", *sys.argv[1:]]),
            "versions": {"triton": triton.__version__, "torch": torch.__version__},
            "sources": sources_digest(),
            "rows": rows,
        }
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(row["fits"] for row in rows) else 1)


if __name__ == "__main__":
    main()
