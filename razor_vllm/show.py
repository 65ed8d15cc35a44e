"""Look at a head profile: in the terminal, and as a picture."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch

from razor_vllm.config import RazorConfig
from razor_vllm.foreign import ForeignLayers
from razor_vllm.heads.mass import chosen_mass, kept_mass, windowed_note
from razor_vllm.heads.profile import HeadProfile, write_whole
from razor_vllm.partition import partition, pipeline_stages, whole
from razor_vllm.plan import plan_memory
from razor_vllm.report import foreign_lines
from razor_vllm.support import check_stages

_SHADES = " .:-=+*#"
_FULL_BLOCK_SIZE = 16
"""Tokens per page of vLLM on CUDA, for the full policy's bytes."""


def text(profile: HeadProfile, window: int, lengths: Sequence[int]) -> str:
    """Heads as a grid, the kept share per layer, and KV bytes at context lengths (bf16).

    Raises:
        ValueError: a window or a length, in tokens, that makes no sense.
    """
    lines = [
        f"{profile.num_retrieval_heads} of {profile.num_heads} KV heads retrieve "
        f"({profile.kept_share:.1%})",
        "layer  heads (# retrieves)  kept"
        + "".join(f"  {name}, {_SHADES!r} of its maximum" for name in profile.scores),
    ]
    tops = {n: max(max(row) for row in rows) or 1.0 for n, rows in profile.scores.items()}
    for layer, share in enumerate(profile.kept_shares):
        shades = [
            "".join(_shade(x / tops[name]) for x in rows[layer])
            for name, rows in profile.scores.items()
        ]
        cells = [f"{layer:>5}", _grid(profile, layer), f"{share:>4.0%}", *shades]
        lines.append("  ".join(cells).rstrip())
    lines += [
        f"score mass that the chosen heads hold, {n}: {m:.1%}" for n, m in chosen_mass(profile)
    ]
    if note := windowed_note(profile):
        lines.append(note)
    if profile.other_layers:
        lines.append("~ a layer without full attention: its memory is not counted below")
    return "\n".join(lines + _bytes_lines(profile, window, lengths))


def _grid(profile: HeadProfile, layer: int) -> str:
    other = "~" if layer in profile.other_layers else "."
    heads = profile.retrieval_heads[layer]
    return "".join("#" if h in heads else other for h in range(profile.num_kv_heads))


def _bytes_lines(profile: HeadProfile, window: int, lengths: Sequence[int]) -> list[str]:
    if min(lengths) < 1:
        raise ValueError(f"a length is {min(lengths)}; accepted are whole numbers of tokens from 1")
    lines = [f"KV bytes a decoding request, bf16, window {window:,}:"]
    for length in lengths:
        config = RazorConfig(window=min(window, length), allow_no_retrieval_heads=True)
        plan = plan_memory(config, whole(profile), torch.bfloat16, max(lengths), _FULL_BLOCK_SIZE)
        held = plan.request_bytes(length)
        full = plan.full_request_bytes(length)
        lines.append(f"  {length:>9,} tokens {held:>16,} of {full:>16,} ({held / full:.1%})")
    return lines


def plan_text(
    profile: HeadProfile,
    config: RazorConfig,
    tp_size: int,
    pp_size: int,
    max_model_len: int,
    kv_bytes: int,
    dtype: torch.dtype,
    foreign: Sequence[ForeignLayers] = (),
) -> str:
    """Slots of each rank, the cost of equal slots on all ranks, and requests that fit.

    Args:
        max_model_len: tokens of a request. kv_bytes: KV memory of one rank.
        foreign: the layers without full attention, on each rank.

    Raises:
        ValueError: heads or layers that do not divide, or sizes that make no sense.
        NotImplementedError: pipeline stages of a hybrid.
    """
    check_stages(profile, pp_size)
    for name, value in (("tp", tp_size), ("kv-memory", kv_bytes), ("max-model-len", max_model_len)):
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted are numbers above 0")
    ranks = partition(profile, tp_size, pipeline_stages(profile.num_layers, pp_size))
    first = plan_memory(config, ranks[0], dtype, max_model_len, _FULL_BLOCK_SIZE, foreign)
    lines = [
        f"{len(ranks)} ranks (tp {tp_size}, pp {pp_size}): {ranks[0].retrieval_quota} retrieval "
        f"and {ranks[0].local_quota} local slots each"
    ]
    for number, rank in enumerate(ranks):
        own = rank.profile
        promoted = ", ".join(f"{layer}.{head}" for layer, head in rank.promoted) or "none"
        lines.append(
            f"  rank {number}: layers {_ranges(rank.layers)}, KV heads "
            f"{rank.first_head}-{rank.first_head + own.num_kv_heads - 1}, "
            f"{own.num_retrieval_heads} retrieve, promoted (layer.head): {promoted}"
        )
    held = first.request_bytes(max_model_len)
    # Of the two pools alone: other layers have no heads to even out.
    pools, ideal = (
        plan_memory(config, heads, dtype, max_model_len, _FULL_BLOCK_SIZE).request_bytes(
            max_model_len
        )
        for heads in (ranks[0], whole(profile))
    )
    ideal *= max(tp_size // profile.num_kv_heads, 1)
    full = first.full_request_bytes(max_model_len)
    pages = kv_bytes // first.page_bytes - 1  # vLLM keeps one for itself
    fit = max(pages, 0) // first.request_pages(max_model_len)
    waiting = max(first.waiting_pages(max_model_len), 1)
    lines += foreign_lines(first)
    lines += [
        f"a decoding request of {max_model_len:,} tokens holds {held:,} bytes a rank "
        f"({held / full:.1%} of the full policy's {full:,})",
        f"evening-out costs {pools * len(ranks) / ideal - 1:.1%} over one device's layout",
        f"{fit} such requests fit {kv_bytes:,} bytes a rank (full policy: {kv_bytes // full})",
        f"a chat of that length that waits for its next turn keeps {waiting * first.page_bytes:,} "
        f"bytes ({config.prefill} prefill): {max(pages, 0) // waiting} such chats fit",
    ]
    return "\n".join(lines)


def _ranges(layers: Sequence[int]) -> str:
    """Layers in order, runs of them as first-last."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _shade(share: float) -> str:
    return _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]


def draw(profile: HeadProfile, path: Path) -> None:
    """Write the `picture` of a profile to a file, atomically."""
    write_whole(path, picture(profile))


def picture(profile: HeadProfile) -> bytes:
    """The choice, each score, and the curve of kept share against score mass, as PNG."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    panels = 1 + len(profile.scores) + bool(profile.scores)
    height = max(3.0, 0.16 * profile.num_layers + 1.2)
    figure: Figure
    figure, axes = plt.subplots(1, panels, figsize=(3.4 * panels, height), squeeze=False)
    choice = [
        [float(h in heads) for h in range(profile.num_kv_heads)]
        for heads in profile.retrieval_heads
    ]
    share = profile.kept_share
    grids = {f"retrieval heads ({share:.1%})": choice, **profile.scores}
    for axis, (name, rows) in zip(axes[0], grids.items(), strict=False):
        image = axis.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set(title=name, xlabel="KV head", ylabel="layer")
        if name in profile.scores:
            figure.colorbar(image, ax=axis)
    if profile.scores:
        axis = axes[0][-1]
        heads = [(n + 1) / profile.num_heads for n in range(profile.num_heads)]
        for name in profile.scores:
            axis.plot(heads, kept_mass(profile, name), label=name)
        axis.axvline(share, linestyle=":", color="grey", label="chosen")
        axis.set(title="score mass kept", xlabel="share of KV heads", ylim=(0, 1.02))
        axis.legend()
    figure.tight_layout()
    png = BytesIO()
    figure.savefig(png, format="png", dpi=120)
    plt.close(figure)
    return png.getvalue()
