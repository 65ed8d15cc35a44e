"""Requests that a server cannot finish before their test lets them, on any machine.

A logits processor of vLLM's, for `--logits-processors`: a request that asks for it in
`vllm_xargs` holds up every step it is in,

    hold_after      once it has so many tokens
    hold_seconds    for so long a step
    hold_until      or until this file exists, if it is given; its folder gets an empty
                    file `held-PID` once a step of the worker PID is held

A long hold stops the engine in the middle of a step. A short one leaves it room for other
calls between its steps, and bounds the request's time from below.
"""

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

PROCESSOR = f"{__name__}:HeldSteps"
FOREVER = 3600.0


def held(until: Path, after: int = 5, seconds: float = FOREVER) -> dict[str, Any]:
    """`vllm_xargs` of a request that stops at its token `after`."""
    return {"hold_until": str(until), "hold_after": after, "hold_seconds": seconds}


def slow(after: int = 0, seconds: float = 0.2) -> dict[str, Any]:
    """`vllm_xargs` of a request whose tokens after the first ones take so long each."""
    return {"hold_after": after, "hold_seconds": seconds}


def holders(until: Path) -> list[int]:
    """Workers that a file holds, or has held."""
    return [int(path.name.removeprefix("held-")) for path in until.parent.glob("held-*")]


class _Hold:
    """One request's wish."""

    def __init__(self, wish: dict[str, Any], output: list[int]) -> None:
        self._after: int = wish["hold_after"]
        self._seconds: float = wish["hold_seconds"]
        self._until = Path(wish["hold_until"]) if "hold_until" in wish else None
        self._output = output

    def wait(self) -> None:
        if len(self._output) < self._after:
            return
        if self._until is None:
            time.sleep(self._seconds)
            return
        (self._until.parent / f"held-{os.getpid()}").touch()
        end = time.monotonic() + self._seconds
        while time.monotonic() < end and not self._until.exists():
            time.sleep(0.01)


class HeldSteps(LogitsProcessor):
    """Waits, and leaves the logits as they are."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._holds: dict[int, _Hold] = {}

    def is_argmax_invariant(self) -> bool:
        # vLLM passes those that are over where all requests are greedy.
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(
            self._holds,
            batch_update,
            lambda params, prompt, output: (
                _Hold(params.extra_args, output)
                if "hold_after" in (params.extra_args or {})
                else None
            ),
        )

    def apply(self, logits: Any) -> Any:
        for hold in self._holds.values():
            hold.wait()
        return logits
