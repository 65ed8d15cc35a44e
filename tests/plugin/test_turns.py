"""What ends a chat's first turn: learned from chat templates of every kind, found in prompts."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from razor_vllm.compat import _turn
from razor_vllm.turns import Messages, first_turn_end, learn_marker


def rendered(message: str, prompt: str, opening: str = "") -> Callable[[Messages, bool], list[int]]:
    """A template over characters; `{role}`, `{ROLE}` and `{content}` stand in a message."""

    def render(messages: Messages, add_generation_prompt: bool) -> list[int]:
        parts = [
            message.format(ROLE=m["role"].upper(), role=m["role"], content=m["content"])
            for m in messages
        ]
        return list(map(ord, opening + "".join(parts) + prompt * add_generation_prompt))

    return render


BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"


@pytest.mark.parametrize(
    ("message", "prompt", "marker"),
    [
        (CHATML, "<|im_start|>assistant\n", "<|im_start|>assistant\n"),
        # An answer that is to come begins with a thought, one of the past has lost its own.
        (CHATML, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
        ("{ROLE}: {content}\n", "ASSISTANT:", "ASSISTANT:"),
        ("<{role}>{content}", "<assistant>", "<assistant>"),
    ],
)
def test_what_answers_begin_with(message: str, prompt: str, marker: str) -> None:
    """The marker ends the first turn in its own prompt, and at the same place in the next."""
    render = rendered(message, prompt)
    found = learn_marker(render)
    assert "".join(map(chr, found)) == marker
    chat = [{"role": "user", "content": "A text.\n\nA question?"}]
    first = render(chat, True)
    end = first_turn_end(first, found)
    assert end == len(first) - len(prompt) + len(marker)
    for _ in range(3):
        chat += [{"role": "assistant", "content": "Aha"}, {"role": "user", "content": "Why?"}]
        assert first_turn_end(render(chat, True), found) == end


@pytest.mark.parametrize(
    ("render", "reason"),
    [
        (rendered("[INST] {content} [/INST]", ""), "has no generation prompt"),
        (
            rendered("{ROLE}: {content}\n", "ASSISTANT:", "Begin with ASSISTANT: always.\n"),
            "stands before the first question",
        ),
        (rendered("[{role}] {content}\n", "{ask}"), "begins past answers unlike"),
        (lambda messages, add: 1 / 0, "renders no chat"),
    ],
)
def test_a_template_without_a_marker(render: Callable, reason: str) -> None:
    """It is refused with its reason; the caller then reads prompts as exact mode does."""
    with pytest.raises(ValueError, match=reason):
        learn_marker(render)


def test_a_template_that_refuses_system_prompts() -> None:
    """Only what it renders is asked of it."""
    render = rendered(CHATML, "<|im_start|>assistant\n")

    def strict(messages: Messages, add: bool) -> list[int]:
        if messages[0]["role"] == "system":
            raise TypeError("no system prompt")
        return render(messages, add)

    assert learn_marker(strict) == learn_marker(render)


@given(
    st.lists(st.integers(0, 2), max_size=30),
    st.lists(st.integers(0, 2), max_size=4),
)
def test_the_first_place(tokens: list[int], marker: list[int]) -> None:
    """As a search through all places finds it."""
    places = range(len(marker), len(tokens) + 1)
    found = (end for end in places if marker and tokens[end - len(marker) : end] == marker)
    assert first_turn_end(tokens, marker) == next(found, None)


@pytest.mark.parametrize(
    ("template", "as_file", "marker", "note"),
    [
        (None, False, [3], "'<assistant>' ends the first turn"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            False,
            [],
            "no generation prompt",
        ),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", True, [], "no generation prompt"),
        ("{{ bad(", False, [], "renders no chat"),
    ],
)
def test_the_template_that_the_server_is_given(
    model_dir: Path, tmp_path: Path, template: str | None, as_file: bool, marker: list, note: str
) -> None:
    """`--chat-template` as text or file, else the tokenizer's; the note says if it has no turns."""
    if template is not None and as_file:
        path = tmp_path / "template.jinja"
        path.write_text(template, encoding="utf-8")
        template = str(path)
    turn = _turn(model_config(model_dir), Namespace(chat_template=template))
    assert list(turn.marker) == marker
    assert note in turn.note
    assert ("as in exact mode" in turn.note) == (not marker)


def model_config(model_dir: Path, **options: object) -> SimpleNamespace:
    """What vLLM reads of its ModelConfig to find tokenizer and template."""
    defaults = {
        "model": str(model_dir),
        "tokenizer": str(model_dir),
        "tokenizer_mode": "auto",
        "tokenizer_revision": None,
        "runner_type": "generate",
        "trust_remote_code": False,
        "code_revision": None,
        "skip_tokenizer_init": False,
        "hf_config": SimpleNamespace(model_type="llama"),
        "is_multimodal_model": False,
    }
    return SimpleNamespace(**{**defaults, **options})


def test_no_tokenizer(model_dir: Path) -> None:
    """`--skip-tokenizer-init`: no template, no turns."""
    turn = _turn(model_config(model_dir, skip_tokenizer_init=True), None)
    assert turn.marker == []
    assert "there is no tokenizer" in turn.note
