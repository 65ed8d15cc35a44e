"""Run one engine and print its answers to the same requests, asked twice.

Started in a process of its own: for engines with worker processes, and for those that import
what other engines of a process cannot bear.

    python engine_answers.py MODEL '{"razor": {...}, "options": {...}, ...}'
"""

import json
import sys

from engines import answers, engine, prompts


def main() -> None:
    model, job = sys.argv[1], json.loads(sys.argv[2])
    with engine(model, job["razor"], **job["options"]) as llm:
        requests = [
            {"prompt_token_ids": prompt["prompt_token_ids"] * job.get("repeat", 1)}
            for prompt in prompts(job["lengths"])
        ]
        rounds = [answers(llm, requests, job["max_tokens"]) for _ in range(2)]
    print("RESULT " + json.dumps(rounds))


if __name__ == "__main__":
    main()
