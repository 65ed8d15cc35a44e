"""A real hybrid, Gemma 3 270M: an extra, where `make model-gemma` has made the model.

Its terms of use are Gemma's own, so it is no part of the repository.
"""

from pathlib import Path
from typing import Any

import hybrids
import pytest
from engines import Answer, answers, engine

GEMMA = Path(__file__).parents[2] / "build" / "models" / "gemma3"
TEXT = (
    "The harbour master writes down each ship that comes in. On Monday the Alma brought salt, on "
    "Tuesday the Berta brought timber, on Wednesday the Clara brought wool and tar. "
)
OPTIONS: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 512}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not GEMMA.is_dir(), reason="make model-gemma makes it"),
]


def asked(copies: int) -> list[dict[str, Any]]:
    """A text, repeated, whose end the model has to go on with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GEMMA)
    ids = tokenizer(TEXT * copies + "On Monday the", add_special_tokens=False).input_ids
    return [{"prompt_token_ids": [tokenizer.bos_token_id, *ids]}]


def shared(got: list[Answer], want: list[Answer]) -> int:
    """First tokens that two answers have in common."""
    pairs = zip(got[0].tokens, want[0].tokens, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(want[0].tokens))


def test_all_heads_are_stock_and_one_local_head_is_near(tmp_path: Path) -> None:
    """All three full layers' heads retrieve: stock's tokens. One of them local: how far it goes.

    A model of one KV head a layer is the worst case: a third of what sees far is compressed.
    """
    requests = asked(40)
    with engine(GEMMA, None, **OPTIONS) as llm:
        stock = answers(llm, requests, 48)
    razor = {"head_profile": hybrids.write(hybrids.all_heads(GEMMA), tmp_path, "all")}
    with engine(GEMMA, {**razor, "window": 512}, **OPTIONS) as llm:
        for _ in ("cold", "hit"):
            got = answers(llm, requests, 48)
            assert got[0].tokens == stock[0].tokens
            assert got[0].logprobs == pytest.approx(stock[0].logprobs, abs=1e-3)
    for name, rows in (("first", [[], [0], [0]]), ("last", [[0], [0], []])):
        profile = hybrids.write(hybrids.profile_of_heads(GEMMA, rows), tmp_path, name)
        with engine(GEMMA, {"head_profile": profile, "window": 512}, **OPTIONS) as llm:
            got = answers(llm, requests, 48)
        moved = max(abs(a - b) for a, b in zip(got[0].logprobs, stock[0].logprobs, strict=True))
        print(f"{name} head local: {shared(got, stock)} of 48 tokens as stock, dlogp {moved:.3f}")
        assert moved > 1e-4, "a head that drops nothing shows nothing"
