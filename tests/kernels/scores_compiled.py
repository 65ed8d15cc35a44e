"""Compile the score kernel for one device, without one, and print what its binary uses.

    python scores_compiled.py 90     {"bf16 128": {"REG": 80, "STACK": 0}, ...}

A process of its own: interpreting Triton is for the whole process, and nothing compiles then.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from razor_kernels.scores_triton import _repeat_mass_kernel, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = (
    ("bf16", 64),
    ("bf16", 80),
    ("bf16", 128),
    ("bf16", 256),
    ("fp16", 128),
    ("fp32", 64),
    ("fp32", 256),
)
"""Every tile there is, and a head dim that is no power of two; 256 with a soft cap."""
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def source(name: str, head_dim: int, soft_cap: bool) -> tuple[ASTSource, dict[str, int]]:
    """The kernel as `repeat_mass` launches it on contiguous heads, and the launch options."""
    block_m, block_n, num_warps, num_stages = tiles(DTYPES[name], head_dim)
    constants = {
        "GROUP": 4,
        "COPIES": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HAS_SOFT_CAP": soft_cap,
        "stride_query_dim": 1,
        "stride_key_dim": 1,
    }
    arguments = _repeat_mass_kernel.arg_names
    types = {"query_ptr": f"*{name}", "key_ptr": f"*{name}", "mass_ptr": "*fp32"}
    types |= {"inner": "fp32", "outer": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in arguments}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, argument in enumerate(arguments)
        if argument not in constants and argument.startswith(("query", "key", "mass", "stride"))
    }
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return ASTSource(_repeat_mass_kernel, signature, constants, aligned), options


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack: what the compiler spills lies there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    out = {}
    for name, head_dim in CASES:
        code, options = source(name, head_dim, soft_cap=head_dim == 256)
        kernel = triton.compile(code, target=target, options=options)
        used = usage(kernel.asm["cubin"])
        out[f"{name} {head_dim}"] = used | {"shared": kernel.metadata.shared}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
