"""Run one engine with worker processes and print its answers.

Started by test_parallel.py in a process of its own, which vLLM's workers need to be.

    python parallel_answers.py MODEL '{"razor": {...}, "options": {...}, ...}'
"""

import json
import sys

from engines import answers, engine, prompts


def main() -> None:
    model, job = sys.argv[1], json.loads(sys.argv[2])
    with engine(model, job["razor"], **job["options"]) as llm:
        requests = prompts(job["lengths"])
        rounds = [answers(llm, requests, job["max_tokens"]) for _ in range(2)]
    print("RESULT " + json.dumps(rounds))


if __name__ == "__main__":
    main()
