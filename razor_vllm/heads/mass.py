"""What share of the heads' scores a choice of heads holds, and what that tells."""

from razor_vllm.heads.profile import HeadProfile

CARRYING_MASS = 0.9
"""Least share of the attribution score that carried windowed prefill: 20 of SmolLM2's heads."""
_MASSES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def kept_mass(profile: HeadProfile, name: str) -> list[float]:
    """Share of a score's sum that the best n heads hold, for n = 1 .. all."""
    scores = sorted((x for row in profile.scores[name] for x in row), reverse=True)
    total = sum(scores) or 1.0
    mass, out = 0.0, []
    for score in scores:
        mass += score
        out.append(mass / total)
    return out


def chosen_mass(profile: HeadProfile) -> list[tuple[str, float]]:
    """Share of each score's sum that the retrieval heads hold."""
    chosen = [(layer, head) for layer, row in enumerate(profile.retrieval_heads) for head in row]
    sums = {name: sum(map(sum, rows)) or 1.0 for name, rows in profile.scores.items()}
    return [
        (name, sum(rows[layer][head] for layer, head in chosen) / sums[name])
        for name, rows in profile.scores.items()
    ]


def curve_text(profile: HeadProfile, name: str) -> str:
    """How many heads hold which share of a score, a line for each share."""
    curve = kept_mass(profile, name)
    counts = [(mass, sum(held < mass - 1e-9 for held in curve) + 1) for mass in _MASSES]
    lines = [f"  {mass:>4.0%}  {n:>5} ({n / profile.num_heads:.1%})" for mass, n in counts]
    return "\n".join([f"KV heads that hold a share of the {name} score:", *lines])


def windowed_note(profile: HeadProfile) -> str | None:
    """What the scores say against reading text through windows; None if they say nothing."""
    held = dict(chosen_mass(profile)).get("attribution")
    if held is None and "induction" in profile.scores:
        return (
            "note: the probe alone does not tell whether these heads carry windowed prefill; "
            "razor calibrate --method probe attribution does"
        )
    if held is None or held >= CARRYING_MASS:
        return None
    return (
        f"warning: heads that hold {held:.1%} of the attribution score lose much of what is read "
        f"through windows; {CARRYING_MASS:.0%} carried it (razor calibrate --method attribution)"
    )
