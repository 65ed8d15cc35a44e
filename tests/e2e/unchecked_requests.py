"""Requests straight to an engine in a process of its own, past every check of the front end.

python unchecked_requests.py MODEL '{"razor": {...}, "bad": [extra_args, ...]}'
"""

import json
import sys
import time
from typing import Any

from engines import engine, prompts
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest


def request(name: str, extra_args: dict[str, Any]) -> EngineCoreRequest:
    (prompt,) = prompts([50])
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=prompt["prompt_token_ids"],
        mm_features=None,
        sampling_params=SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, extra_args=extra_args
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def main() -> None:
    model, job = sys.argv[1], json.loads(sys.argv[2])
    with engine(model, job["razor"], max_model_len=1024) as llm:
        client = llm.llm_engine.engine_core
        client.add_request(request("good", {}))
        for number, extra in enumerate(job["bad"]):
            client.add_request(request(f"bad-{number}", extra))
        reasons: dict[str, str] = {}
        while len(reasons) <= len(job["bad"]):
            for output in client.get_output().outputs:
                if output.finish_reason is not None:
                    reasons[output.request_id] = str(output.finish_reason)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        (later,) = llm.generate(prompts([20]), params, use_tqdm=False)
    print("RESULT " + json.dumps({"reasons": reasons, "later": len(later.outputs[0].token_ids)}))


if __name__ == "__main__":
    main()
