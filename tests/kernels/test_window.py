"""Which tokens a local head sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from razor_kernels import Window

windows = st.builds(
    Window,
    sinks=st.integers(0, 70),
    window=st.integers(0, 300),
    window_ratio=st.sampled_from([0.0, 0.07, 0.2, 0.5, 1.0]),
    block_size=st.sampled_from([1, 16, 32, 48]),
)


@given(windows, st.integers(0, 5000))
def test_no_query_sees_less_than_its_window(window: Window, position: int) -> None:
    """The first window page starts at or before position - window(position) + 1."""
    start = window.first_window_page(position // window.block_size) * window.block_size
    promised = max(window.window, -(-round(position * window.window_ratio * 100) // 100))
    assert start <= max(position - promised + 1, 0)


@given(windows, st.integers(0, 300))
def test_frontier_never_goes_back(window: Window, page: int) -> None:
    """A page that has left the window never comes back, and leaves one at a time."""
    step = window.first_window_page(page + 1) - window.first_window_page(page)
    assert step in (0, 1)


@given(windows, st.integers(1, 5000))
def test_held_pages_are_those_needed(window: Window, num_tokens: int) -> None:
    """The formula counts sinks, the tail page and the window, each page once."""
    last = num_tokens - 1
    page = last // window.block_size
    first = window.first_window_page(page)
    needed = set(range(first, page + 1))
    needed |= {p for p in range(window.sink_pages) if p <= page}
    if first > 0:
        needed.add(first - 1)
    assert window.num_held_pages(num_tokens) == len(needed)


@given(windows, st.integers(1, 3000))
def test_held_pages_are_bounded_by_the_longest_request(window: Window, longest: int) -> None:
    """No shorter request holds more than the longest one."""
    bound = window.max_held_pages(longest)
    assert all(window.num_held_pages(n) <= bound for n in range(0, longest + 1, 37))


@given(windows)
def test_tensors_and_ints_agree(window: Window) -> None:
    """The block manager (ints) and the plans (tensors) see the same window."""
    pages = torch.arange(200)
    firsts = window.first_window_page(pages).tolist()
    dropped = window.num_dropped(pages).tolist()
    assert firsts == [window.first_window_page(p) for p in range(200)]
    assert dropped == [window.num_dropped(p) for p in range(200)]


def test_fixed_ring_is_p_plus_one_plus_sinks() -> None:
    """A long request holds P = ceil(window / B) + 1 pages, a tail page and the sinks."""
    window = Window(sinks=4, window=256, window_ratio=0.0, block_size=32)
    assert window.num_held_pages(100_000) == (256 // 32 + 1) + 1 + 1


@pytest.mark.parametrize(
    "options",
    [
        {"sinks": -1},
        {"window": -1},
        {"window_ratio": -0.1},
        {"window_ratio": 1.1},
        {"block_size": 0},
    ],
)
def test_impossible_windows_are_refused(options: dict) -> None:
    """A window that no page could serve is not built."""
    good = {"sinks": 4, "window": 64, "window_ratio": 0.0, "block_size": 32}
    with pytest.raises(ValueError, match="must"):
        Window(**{**good, **options})
