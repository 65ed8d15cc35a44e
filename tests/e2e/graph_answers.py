"""Live through vLLM's start-up on CUDA, graphs included, and print the answers.

Started by test_graphs.py in a process of its own: what makes vLLM take Triton is read from
the environment when vLLM is imported, and graphs are stood in for before that.

    python graph_answers.py MODEL '{"razor": {...}, "max_tokens": 4, "runs": [...]}'

A run, of an engine of its own: {"options": {...}, "rounds": [...], "fault": null or a name}.
A round: ["serve" | "reinitialize" | "sleep", lengths of its prompts].
"""

import collections
import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from graph_standin import GraphStandIn


def main() -> None:
    model, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    standin = GraphStandIn()
    with standin.installed():
        from graph_worker import take_graphs

        take_graphs(standin)
        results = [
            serve(model, {**job, **run}, standin)
            if run["fault"] is None
            else serve_with_fault(model, {**job, **run}, standin)
            for run in job["runs"]
        ]
    print("RESULT " + json.dumps(results))


def serve(model: Path, run: dict[str, Any], standin: GraphStandIn) -> dict[str, Any]:
    """Rounds of answers; before each of them, what its first word says."""
    from engines import answers, engine, prompts

    options = {"worker_cls": "graph_worker.GraphWorker", "enforce_eager": False, **run["options"]}
    captures, replays, rounds = standin.captures, standin.replays, []
    with watched_batches() as batches, engine(model, run["razor"], **options) as llm:
        for before, lengths in run["rounds"]:
            BEFORE[before](llm)
            rounds.append(answers(llm, prompts(lengths), run["max_tokens"]))
        return {
            "rounds": rounds,
            "captures": standin.captures - captures,
            "replays": standin.replays - replays,
            "batches": [[*batch, count] for batch, count in batches.items()],
            "still_held": standin.still_held(),
        }


def serve_with_fault(model: Path, run: dict[str, Any], standin: GraphStandIn) -> dict[str, Any]:
    """The same with the run's fault seeded, or the error that it ended in."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with FAULTS[run["fault"]]():
        try:
            return serve(model, run, standin)
        except Exception as error:
            found = repr(error)
    cleanup_dist_env_and_memory()
    gc.collect()
    return {"error": found}


@contextlib.contextmanager
def watched_batches() -> Iterator["collections.Counter[tuple[str, int, int]]"]:
    """A counter of (kind of graph, tokens, tokens with padding) of batches."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    seen: collections.Counter[tuple[str, int, int]] = collections.Counter()
    original = CudaGraphManager.dispatch

    def dispatch(self: Any, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        found = original(self, num_reqs, num_tokens, *args, **kwargs)
        seen[found.cg_mode.name, num_tokens, found.num_tokens] += 1
        return found

    with patch.object(CudaGraphManager, "dispatch", dispatch):
        yield seen


# --- What happens between rounds --------------------------------------------------------


def _reinitialize(llm: Any) -> None:
    """A second cache, and graphs captured anew."""
    llm.reset_prefix_cache()
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    worker.initialize_from_config(worker.model_runner.kv_cache_config)
    worker.model_runner.capture_model()


def _sleep(llm: Any) -> None:
    llm.sleep(level=1)
    llm.wake_up()


BEFORE: dict[str, Callable[[Any], None]] = {
    "serve": lambda llm: None,
    "reinitialize": _reinitialize,
    "sleep": _sleep,
}


# --- Faults that a test must catch ------------------------------------------------------


def _stale_cache() -> Any:
    """A pool hands out the first memory that it was given, for ever."""
    from razor_vllm.pools import Pool

    def read(pool: Any) -> Any:
        return pool.__dict__["kept"]

    def write(pool: Any, cache: Any) -> None:
        if "kept" not in pool.__dict__ or pool.__dict__["kept"].numel() == 0:
            pool.__dict__["kept"] = cache

    return patch.object(Pool, "kv_cache", property(read, write), create=True)


@contextlib.contextmanager
def _grid_by_content() -> Iterator[None]:
    """Decode's grid is as large as the lengths of the step that it is made in ask for."""
    from razor_kernels.triton_form import TritonForm

    plan, attention = TritonForm.plan, TritonForm.attention

    def planning(self: Any, step: Any) -> None:
        self.is_short = int(step.seq_lens.max()) <= 16
        plan(self, step)

    def attending(self: Any, *args: Any) -> None:
        if not self.is_short:
            return attention(self, *args)
        with patch.object(TritonForm, "max_units", lambda form, num_requests: 0):
            return attention(self, *args)

    with (
        patch.object(TritonForm, "plan", planning),
        patch.object(TritonForm, "attention", attending),
    ):
        yield


def _buffer_of_a_step() -> Any:
    """`dense_until` lies in a new buffer each step."""
    from razor_vllm.backend import RazorMetadataBuilder

    original = RazorMetadataBuilder._dense_until

    def fresh(self: Any, num_requests: int) -> Any:
        return original(self, num_requests).clone()

    return patch.object(RazorMetadataBuilder, "_dense_until", fresh)


def _converted_buffer() -> Any:
    """The runner's slot mapping is converted, which copies it."""
    from razor_vllm.backend import RazorMetadataBuilder

    original = RazorMetadataBuilder.build

    def build(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        mapping = common_attn_metadata.slot_mapping.int().long()
        common = replace(common_attn_metadata, slot_mapping=mapping)
        return original(self, common_prefix_len, common, fast_build)

    return patch.object(RazorMetadataBuilder, "build", build)


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "stale cache": _stale_cache,
    "grid by content": _grid_by_content,
    "buffer of a step": _buffer_of_a_step,
    "converted buffer": _converted_buffer,
}


if __name__ == "__main__":
    main()
