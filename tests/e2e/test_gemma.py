"""A real hybrid, Gemma 3 270M: an extra, where `make model-gemma` has made the model.

Its terms of use are Gemma's own, so it is no part of the repository.
"""

from pathlib import Path
from typing import Any

import hybrids
import pytest
from engines import Answer, answers, engine

from razor_vllm.heads.prompts import read_text

GEMMA = Path(__file__).parents[2] / "build" / "models" / "gemma3"
LEDGER = (
    "Ledger of the harbour: Alma 7316 salt, Berta 2094 timber, Clara 5528 wool, Dora 8871 tar, "
    "Edda 4402 rope, Frida 6137 glass, Greta 9950 tin, Hilda 3683 wheat, Ines 1279 cork, "
    "Jutta 7745 oil."
)
NUM_TOKENS = 64
OPTIONS: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 512}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not GEMMA.is_dir(), reason="make model-gemma makes it"),
]


def asked(filler: int) -> list[dict[str, Any]]:
    """A list, prose of so many tokens, and the beginning of the list again."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GEMMA)
    ids = [
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (LEDGER + "\n\n", read_text(None), "\n\n" + LEDGER[:44])
    ]
    return [{"prompt_token_ids": [tokenizer.bos_token_id, *ids[0], *ids[1][:filler], *ids[2]]}]


def shared(got: list[Answer], want: list[Answer]) -> int:
    """First tokens that two answers have in common."""
    pairs = zip(got[0].tokens, want[0].tokens, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(want[0].tokens))


def test_all_heads_are_stock_and_one_local_head_is_near(tmp_path: Path) -> None:
    """All three full layers' heads retrieve: stock's tokens. One of them local: how far it goes.

    A model of one KV head a layer is the worst case: a third of what sees far is compressed.
    """
    requests = asked(2000)
    with engine(GEMMA, None, **OPTIONS) as llm:
        stock = answers(llm, requests, NUM_TOKENS)
        print("stock: " + llm.get_tokenizer().decode(stock[0].tokens))
    razor = {"head_profile": hybrids.write(hybrids.all_heads(GEMMA), tmp_path, "all")}
    with engine(GEMMA, {**razor, "window": 512}, **OPTIONS) as llm:
        for _ in ("cold", "hit"):
            got = answers(llm, requests, NUM_TOKENS)
            assert got[0].tokens == stock[0].tokens
            assert got[0].logprobs == pytest.approx(stock[0].logprobs, abs=1e-3)
    for local, layer in enumerate((5, 11, 17)):
        rows = [[] if at == local else [0] for at in range(3)]
        profile = hybrids.write(hybrids.profile_of_heads(GEMMA, rows), tmp_path, str(layer))
        with engine(GEMMA, {"head_profile": profile, "window": 512}, **OPTIONS) as llm:
            got = answers(llm, requests, NUM_TOKENS)
            print(f"layer {layer} local: " + llm.get_tokenizer().decode(got[0].tokens))
        same = shared(got, stock)
        pairs = list(zip(got[0].logprobs, stock[0].logprobs, strict=True))[: max(same, 1)]
        moved = max(abs(a - b) for a, b in pairs)
        print(f"{same} of {NUM_TOKENS} tokens as stock, log-probabilities moved by {moved:.3f}")
        assert moved > 1e-4, "a head that drops nothing shows nothing"
