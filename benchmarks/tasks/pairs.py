"""Two policies on the same questions: where they differ, with an interval.

Questions about one context are not independent, so the interval is a bootstrap over
contexts (a percentile interval; clusters are drawn with replacement).
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

DRAWS = 4000

Scores = Mapping[str, Sequence[float]]
"""Name of a context to the scores of its questions, in order."""


class Comparison(NamedTuple):
    """One policy (`other`) against another (`base`).

    lost, gained: questions where other has less, or more, than base. difference: mean score
    of other less that of base; low, high: its 95 % interval. kept: sum of other's scores as
    a share of base's, with its interval; None where base has none.
    """

    questions: int
    contexts: int
    lost: int
    gained: int
    difference: float
    low: float
    high: float
    kept: float | None
    kept_low: float | None
    kept_high: float | None


def compare(base: Scores, other: Scores, seed: int = 0) -> Comparison:
    """Compare scores of the same questions.

    Raises:
        ValueError: the questions are not the same, or there are none.
    """
    if not base or {k: len(v) for k, v in base.items()} != {k: len(v) for k, v in other.items()}:
        raise ValueError("policies can be compared only on the same questions")
    pairs = [(a, b) for name in base for a, b in zip(base[name], other[name], strict=True)]
    # [contexts] of (questions, sum of base, sum of other)
    sums = [(len(base[name]), sum(base[name]), sum(other[name])) for name in sorted(base)]
    rng = random.Random(seed)
    drawn = [_total(rng.choices(sums, k=len(sums))) for _ in range(DRAWS)]
    differences = sorted((other_sum - base_sum) / n for n, base_sum, other_sum in drawn)
    n, base_sum, other_sum = _total(sums)
    kept: tuple[float | None, ...] = (None, None, None)
    if all(total[1] for total in drawn):
        ratios = sorted(other_sum / base_sum for _, base_sum, other_sum in drawn)
        kept = (other_sum / base_sum, *_interval(ratios))
    return Comparison(
        len(pairs),
        len(sums),
        sum(b < a for a, b in pairs),
        sum(b > a for a, b in pairs),
        (other_sum - base_sum) / n,
        *_interval(differences),
        *kept,
    )


def _total(sums: Sequence[tuple[int, float, float]]) -> tuple[int, float, float]:
    questions, base, other = zip(*sums, strict=True)
    return sum(questions), sum(base), sum(other)


def _interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of sorted draws."""
    edge = round(0.025 * len(ordered))
    return ordered[edge], ordered[-1 - edge]
