"""A chat request about a haystack, to send to a server.

    python -m models.needle.ask --tokens 3000 | curl -s http://127.0.0.1:8000/v1/chat/completions \\
        -H 'Content-Type: application/json' -d @-

Standard output is the request's JSON; the question and the right answer go to standard error.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

from models.needle.language import (
    CODE_NUMBERS,
    FACT_WORDS,
    QUESTION_WORDS,
    Fact,
    draw_facts,
    haystack,
    render,
)

CHAT_TOKENS = 3 + QUESTION_WORDS
"""Tokens of a chat besides its haystack: <bos>, <user>, the question, <assistant>."""


def draw_request(
    num_tokens: int, num_facts: int, seed: int, model: str
) -> tuple[dict[str, Any], Fact]:
    """Body of a chat completion whose prompt has `num_tokens` tokens, and the fact asked for.

    Raises:
        ValueError: the facts do not fit.
    """
    least = CHAT_TOKENS + FACT_WORDS * num_facts
    if num_tokens < least:
        raise ValueError(f"{num_facts} facts need {least} tokens, found {num_tokens}")
    rng = random.Random(seed)
    facts = draw_facts(rng, num_facts)
    words = haystack(rng, facts, num_tokens - CHAT_TOKENS)
    asked = rng.choice(facts)
    text = f"{render(words)} {render(asked.question())}"
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": CODE_NUMBERS + 1,
        "temperature": 0,
    }
    return body, asked


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3000, help="of the prompt")
    parser.add_argument("--facts", type=int, default=9, help="in the haystack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="needle", help="the name it is served by")
    args = parser.parse_args(argv)
    try:
        body, asked = draw_request(args.tokens, args.facts, args.seed, args.model)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(body))
    print(f"{render(asked.question())} Right: {' '.join(asked.code)}", file=sys.stderr)


if __name__ == "__main__":
    main()
