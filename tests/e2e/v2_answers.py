"""Run one engine on the V2 model runner, interpreted on a CPU, and print its answers.

Started by test_v2_runner.py in a process of its own: what makes vLLM take Triton is
read from the environment when vLLM is imported.

    python v2_answers.py MODEL '{"razor": {...} or null, "lengths": [...], ...}'
"""

import json
import sys

from engines import (
    answers,
    counted_drafts,
    counted_preemptions,
    engine,
    hold_chats,
    local_block_size,
    manager_of,
    poison_pages,
    prompts,
)

from razor_vllm.pools import attachment_of


def main() -> None:
    model, job = sys.argv[1], json.loads(sys.argv[2])
    preemptions, accepted = counted_preemptions(), counted_drafts()
    with engine(model, job["razor"], **job["options"]) as llm:
        if job.get("poison"):
            poison_pages(llm)
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        module = type(runner.model_runner).__module__
        rounds = [
            answers(llm, prompts(job["lengths"]), job["max_tokens"], **sampling)
            for sampling in job["rounds"]
        ]
        chats = hold_chats(llm, job["chats"], 3, job["max_tokens"]) if "chats" in job else []
        pool = manager_of(llm).block_pool
        attached = attachment_of(llm.llm_engine.vllm_config)
        form = type(attached.form).__name__
        block_size = local_block_size(llm)
        free = pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    print(
        "RESULT "
        + json.dumps(
            {
                "runner": module,
                "form": form,
                "free": free,
                "rounds": rounds,
                "chats": chats,
                "preemptions": len(preemptions),
                "accepted": dict(accepted),
                "block_size": block_size,
            }
        )
    )


if __name__ == "__main__":
    main()
