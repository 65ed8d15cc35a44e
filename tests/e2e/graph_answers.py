"""Live through vLLM's start-up on CUDA, graphs included, and print the answers.

Started by test_graphs.py in a process of its own: what makes vLLM take Triton is read from
the environment when vLLM is imported, and graphs are stood in for before that.

    python graph_answers.py MODEL '{"razor": {...}, "options": {...}, "rounds": [...], ...}'
"""

import collections
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from graph_standin import GraphStandIn


def main() -> None:
    model, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    standin = GraphStandIn()
    with standin.installed():
        try:
            result = serve(model, job, standin)
        except Exception as error:
            if job["fault"] is None:
                raise
            result = {"error": repr(error)}
    print("RESULT " + json.dumps(result))


def serve(model: Path, job: dict[str, Any], standin: GraphStandIn) -> dict[str, Any]:
    """Rounds of answers; before each of them, what its first word says.

    A round: ["serve" | "reinitialize" | "sleep", lengths of its prompts].
    """
    from engines import answers, engine, prompts
    from graph_worker import take_graphs

    take_graphs(standin)
    batches = watched_batches()
    if job["fault"] is not None:
        FAULTS[job["fault"]]()
    options = {"worker_cls": "graph_worker.GraphWorker", "enforce_eager": False, **job["options"]}
    with engine(model, job["razor"], **options) as llm:
        captures, rounds = standin.captures, []
        for before, lengths in job["rounds"]:
            BEFORE[before](llm)
            rounds.append(answers(llm, prompts(lengths), job["max_tokens"]))
        return {
            "rounds": rounds,
            "captures": captures,
            "replays": standin.replays,
            "batches": [[*batch, count] for batch, count in batches.items()],
            "still_held": standin.still_held(),
        }


def watched_batches() -> "collections.Counter[tuple[str, int, int]]":
    """A counter of (kind of graph, tokens, tokens with padding) of batches from now on."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    seen: collections.Counter[tuple[str, int, int]] = collections.Counter()
    original = CudaGraphManager.dispatch

    def dispatch(self: Any, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        found = original(self, num_reqs, num_tokens, *args, **kwargs)
        seen[found.cg_mode.name, num_tokens, found.num_tokens] += 1
        return found

    CudaGraphManager.dispatch = dispatch
    return seen


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


def _stale_cache() -> None:
    """A pool hands out the first memory that it was given, for ever."""
    from razor_vllm.pools import Pool

    def read(pool: Any) -> Any:
        return pool.__dict__["kept"]

    def write(pool: Any, cache: Any) -> None:
        if "kept" not in pool.__dict__ or pool.__dict__["kept"].numel() == 0:
            pool.__dict__["kept"] = cache

    Pool.kv_cache = property(read, write)


def _grid_by_content() -> None:
    """Decode's grid is as large as the lengths of the step that it is made in ask for."""
    from razor_kernels.triton_form import TritonForm

    plan, attention, max_units = TritonForm.plan, TritonForm.attention, TritonForm.max_units

    def planning(self: Any, step: Any) -> None:
        self.is_short = int(step.seq_lens.max()) <= 16
        plan(self, step)

    def attending(self: Any, *args: Any) -> None:
        units = 0 if self.is_short else None
        with patch.object(
            TritonForm, "max_units", lambda form, n: max_units(form, n) if units is None else units
        ):
            attention(self, *args)

    TritonForm.plan, TritonForm.attention = planning, attending


def _buffer_of_a_step() -> None:
    """`dense_until` lies in a new buffer each step."""
    from razor_vllm.backend import RazorMetadataBuilder

    original = RazorMetadataBuilder._dense_until

    def fresh(self: Any, num_requests: int) -> Any:
        return original(self, num_requests).clone()

    RazorMetadataBuilder._dense_until = fresh


def _converted_buffer() -> None:
    """The runner's slot mapping is converted, which copies it."""
    from razor_vllm.backend import RazorMetadataBuilder

    original = RazorMetadataBuilder.build

    def build(
        self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        mapping = common_attn_metadata.slot_mapping.int().long()
        common = replace(common_attn_metadata, slot_mapping=mapping)
        return original(self, common_prefix_len, common, fast_build)

    RazorMetadataBuilder.build = build


FAULTS: dict[str, Callable[[], None]] = {
    "stale cache": _stale_cache,
    "grid by content": _grid_by_content,
    "buffer of a step": _buffer_of_a_step,
    "converted buffer": _converted_buffer,
}


if __name__ == "__main__":
    main()
