"""Greedy answers of two engines, compared.

Tokens must be equal and their log-probabilities close. Where rounding alone may change a
choice (bf16, other kernels), the first token that differs must have been a near-tie to
both engines. What follows it in that request has another context and is not compared.
"""

from collections.abc import Sequence
from typing import NamedTuple

MIN_SHARE = 0.5
"""Share of tokens that must have been compared: near-ties must not excuse everything."""


class Answer(NamedTuple):
    """One request's greedy tokens.

    logprobs: of each token. top: for each step, token to log-probability of the likeliest few.
    cached: tokens of the prompt that the prefix cache had.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[dict[str, float]]
    cached: int = 0


class Tolerance(NamedTuple):
    """logprob: most that log-probabilities may differ. ties: whether near-ties may differ."""

    logprob: float
    ties: bool = False


class Comparison(NamedTuple):
    """fault: what differed first, "" if nothing did. worst: largest difference seen."""

    fault: str
    compared: int
    turned: int
    worst: float

    def __str__(self) -> str:
        ties = f", {self.turned} near-ties turned" if self.turned else ""
        return f"{self.compared} tokens, log-probabilities within {self.worst:.1g}{ties}"


def compare(got: Sequence[Answer], want: Sequence[Answer], tolerance: Tolerance) -> Comparison:
    """Compare every request with its counterpart, up to the first fault."""
    compared = turned = 0
    worst = 0.0
    total = sum(len(answer.tokens) for answer in want)
    if len(got) != len(want) or not total:
        return Comparison(f"{len(got)} answers, {len(want)} expected", 0, 0, 0.0)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if len(one.tokens) != len(other.tokens):
            fault = f"request {index}: {len(one.tokens)} tokens, {len(other.tokens)} expected"
            return Comparison(fault, compared, turned, worst)
        for step in range(len(one.tokens)):
            where = f"request {index}, token {step}"
            if one.tokens[step] != other.tokens[step]:
                if not (tolerance.ties and _near_tie(one, other, step, tolerance.logprob)):
                    fault = f"{where}: {one.tokens[step]}, expected {other.tokens[step]}"
                    return Comparison(fault, compared, turned, worst)
                turned += 1
                break
            apart = abs(one.logprobs[step] - other.logprobs[step])
            # Not `apart > tolerance`: NaN is a fault.
            if not apart <= tolerance.logprob:
                fault = f"{where}: log-probabilities {apart:.3g} apart"
                return Comparison(fault, compared, turned, worst)
            compared, worst = compared + 1, max(worst, apart)
    share = compared / total
    fault = f"only {share:.0%} of the tokens could be compared" if share < MIN_SHARE else ""
    return Comparison(fault, compared, turned, worst)


def _near_tie(one: Answer, other: Answer, step: int, tolerance: float) -> bool:
    """Whether each engine found the other's token nearly as likely as its own."""
    tokens = one.tokens[step], other.tokens[step]
    for top in (one.top[step], other.top[step]):
        mine, theirs = (top.get(str(token)) for token in tokens)
        # Two log-probabilities, each moved by the tolerance.
        if mine is None or theirs is None or not abs(mine - theirs) <= 2 * tolerance:
            return False
    return True
