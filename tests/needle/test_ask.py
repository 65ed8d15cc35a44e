"""The request that `curl` sends: as long as asked for, and with the answer in it."""

import json

import pytest

from models.needle import ask
from models.needle.language import render
from models.needle.tokenizer import make_tokenizer


@pytest.mark.parametrize(("num_tokens", "num_facts"), [(22, 1), (111, 3), (3000, 9)])
def test_request_has_the_length_and_the_fact_asked_for(num_tokens: int, num_facts: int) -> None:
    body, fact = ask.draw_request(num_tokens, num_facts, 1, "needle")
    tokenizer = make_tokenizer()
    ids = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, return_dict=False
    )
    assert len(ids) == num_tokens
    text = body["messages"][0]["content"]
    assert render(fact.sentence()) in text
    assert text.endswith(render(fact.question()))


def test_facts_that_do_not_fit_are_one_clear_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        ask.main(["--tokens", "100", "--facts", "9"])
    assert stopped.value.code == 2
    assert "9 facts need 102 tokens, found 100" in capsys.readouterr().err


def test_standard_output_is_the_request_alone(capsys: pytest.CaptureFixture) -> None:
    """So that it can be piped; the right answer stands on standard error."""
    ask.main(["--tokens", "200", "--seed", "3"])
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "needle"
    assert "Right:" in err
