"""What Triton compiles, and which CUDA graphs are replayed, while an engine serves."""

from collections.abc import Callable
from typing import Any

import torch

OURS = "razor_kernels"
_GRAPH: Any = torch.cuda.CUDAGraph


class Compilations:
    """Names of kernels that Triton made ready from now on, as `module:function`.

    Triton calls the hook whenever a process needs a kernel for the first time: what its disk
    cache holds counts too, since loading it makes a request wait as well.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        from triton import knobs

        self._before: Callable[..., Any] | None = knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_post_compile_hook = self._note

    def _note(self, **event: Any) -> Any:
        fn = event.get("fn")
        self.names.append(f"{getattr(fn, 'module', '?')}:{getattr(fn, 'name', '?')}")
        return self._before(**event) if self._before else None

    def stop(self) -> None:
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = self._before


class Replays:
    """Counts the CUDA graphs replayed from now on."""

    def __init__(self) -> None:
        self.count = 0
        self._replay = replay = _GRAPH.replay

        def counting(graph: torch.cuda.CUDAGraph) -> None:
            self.count += 1
            replay(graph)

        _GRAPH.replay = counting

    def stop(self) -> None:
        _GRAPH.replay = self._replay
