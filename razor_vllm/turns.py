"""Where the first turn of a chat ends: the tokens with which an answer begins.

A chat template renders an answer that is to come (its generation prompt) and one of the past.
The *marker* is what both begin with. The first place where it stands in a prompt ends the chat's
first turn, in that turn's own prompt and in those of all later turns:

    <user> A long text, and a question <assistant>
    <user> A long text, and a question <assistant> Its answer <eos> <user> Why? <assistant>
                                                  ^ end of the first turn

No vLLM import.
"""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

TURN_KEY = "razor_turn"
"""Key of vLLM's `additional_config` that holds `Turn` as a dict, where the mode is chat."""

Messages = list[dict[str, str]]
Render = Callable[[Messages, bool], list[int]]
"""Tokens of a chat, with or without a generation prompt. Raises what templates raise."""

_QUESTIONS = ("Hello", "1. A list:\n\n- one\n- two\n")
_ANSWER = {"role": "assistant", "content": "Yes"}


class Turn(NamedTuple):
    """What ends a chat's first turn.

    marker: its tokens; none where prompts are read as in exact mode. note: a line for the log.
    """

    marker: Sequence[int]
    note: str


def turn_of(additional_config: Any) -> Turn:
    """The turn that was learned at start-up; without a marker where the mode is not chat."""
    passed_on = additional_config.get(TURN_KEY) if isinstance(additional_config, dict) else None
    return Turn(**passed_on) if passed_on else Turn([], "")


def first_turn_end(tokens: Sequence[int], marker: Sequence[int]) -> int | None:
    """Number of tokens up to the end of the marker's first place; None if there is none.

    Args:
        tokens, marker: of the same type, of which slices compare.
    """
    if not marker:
        return None
    start = 0
    while True:
        try:
            start = tokens.index(marker[0], start)
        except ValueError:
            return None
        if list(tokens[start : start + len(marker)]) == list(marker):
            return start + len(marker)
        start += 1


def learn_marker(render: Render) -> list[int]:
    """The marker of a chat template.

    Raises:
        ValueError: there is none, and why.
    """
    chats = [[{"role": "user", "content": question}] for question in _QUESTIONS]
    try:
        prompts = [_generation_prompt(render, chat) for chat in chats]
    except Exception as error:  # templates raise what they like
        raise ValueError(f"the chat template renders no chat ({error})") from error
    if not all(prompts):
        raise ValueError("the chat template has no generation prompt")
    if prompts[0] != prompts[1]:
        raise ValueError("the tokens of the chat template's generation prompt differ by question")
    # A template may refuse a system prompt.
    chats += [[{"role": "system", "content": "You are helpful."}, *chat] for chat in chats]
    for length in range(len(prompts[0]), 0, -1):
        marker = prompts[0][:length]
        if all(_ends_first_turn(render, chat, marker, prompts[0]) for chat in chats):
            return marker
    if not all(_stands_last(render, chat, prompts[0]) for chat in chats):
        raise ValueError("the chat template's generation prompt stands before the first question")
    raise ValueError("the chat template begins past answers unlike its generation prompt")


def _generation_prompt(render: Render, chat: Messages) -> list[int]:
    """What the generation prompt adds to a chat."""
    asked = render(chat, True)
    return asked[len(commonprefix([asked, render(chat, False)])) :]


def _stands_last(render: Render, chat: Messages, prompt: list[int]) -> bool:
    """Whether the generation prompt has no earlier place in a chat of one question."""
    tokens = _rendered(render, chat)
    return tokens is None or first_turn_end(tokens, prompt) == len(tokens)


def _ends_first_turn(render: Render, chat: Messages, marker: list[int], prompt: list[int]) -> bool:
    """Whether the marker ends a question's turn, in its own prompt and in the next turn's."""
    first = _rendered(render, chat)
    if first is None:
        return True
    end = len(first) - len(prompt) + len(marker)
    later = _rendered(render, [*chat, _ANSWER, {"role": "user", "content": _QUESTIONS[0]}])
    return later is not None and end == first_turn_end(first, marker) == first_turn_end(
        later, marker
    )


def _rendered(render: Render, chat: Messages) -> list[int] | None:
    try:
        return render(chat, True)
    except Exception:  # templates raise what they like
        return None
