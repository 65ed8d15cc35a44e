"""Repairs of Triton's interpreter, where its results differ from a GPU's.

Under `TRITON_INTERPRET=1` a kernel runs on the CPU, statement by statement. Triton 3.9's
interpreter truncates where a GPU rounds to nearest (bf16, fp8), multiplies the bit patterns
of bf16 in a dot (triton-lang/triton issue 11584), and broadcasts the outcome of a scalar
comparison as an integer, which no mask may be. `patch_interpreter` repairs all three, so
that kernels need no branch for it. A no-op without the variable. This file goes once Triton
needs no repair.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

_TORCH = {
    "fp8e4nv": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
"""Floating-point types that torch converts as a GPU does: to nearest, ties to even."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Values of `data`, an array of `source`'s bit patterns, as `target`'s bit patterns."""
    raw = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.itemsize}").copy())
    if data.itemsize == 1:
        raw = raw.view(torch.uint8)
    values = raw.view(_TORCH[str(source)]).to(_TORCH[str(target)])
    width = values.element_size()
    return values.view(_BITS[width]).numpy().view(f"u{width}")


def patch_interpreter() -> None:
    """Make the interpreter round as a GPU does; further calls in a process do nothing."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_to_nearest", False):
        return
    truncate, dot, splat = interpreter._convert_float, builder.create_dot, builder.create_splat

    def convert(data, source, target, rounding_mode):
        if str(source) in _TORCH and str(target) in _TORCH:
            return _convert(data, source, target)
        return truncate(data, source, target, rounding_mode)

    def create_dot(self, a, b, d, *options):
        wide = [
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        ]
        return dot(self, *wide, d, *options)

    def create_splat(self, shape, scalar):
        if scalar.data.dtype == np.bool_:
            scalar = interpreter.TensorHandle(scalar.data, tl.int1)
        return splat(self, shape, scalar)

    interpreter._convert_float = convert
    builder.create_dot = create_dot
    builder.create_splat = create_splat
    builder.rounds_to_nearest = True
