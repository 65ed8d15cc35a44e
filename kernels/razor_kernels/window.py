"""Which tokens a local head sees, and which pages hold them.

A local head's query at position t, in page p = t // block_size, sees

    positions                      seen as
    [0, sinks)                     their own keys and values
    [sinks, first(p) * block)      one compensation slot, weight N = their number
    [first(p) * block, t]          their own keys and values

`first(p)` depends only on the page and never goes back. So a page that has left
the window is never needed again, and the result at t does not depend on how the
sequence was split into chunks. The block manager (ints) and the attention plans
(tensors) call the same functions.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch

IntLike = TypeVar("IntLike", int, torch.Tensor)

DENSE_FOREVER = 2**31 - 1
"""`dense_until` of a request that is never compressed."""

_RATIO_SCALE = 1_000_000


def _at_least(x: IntLike, low: int) -> IntLike:
    if isinstance(x, torch.Tensor):
        return torch.clamp(x, min=low)
    return max(x, low)


def _ceil_div(x: IntLike, divisor: int) -> IntLike:
    return -(-x // divisor)


@dataclass(frozen=True)
class Window:
    """Window of a local head, in whole pages.

    Args:
        sinks: first tokens of the sequence, which are always visible.
        window: least number of latest tokens that a query sees uncompressed.
        window_ratio: the window at position t is at least `ceil(t * window_ratio)`
            (RazorAttention, arXiv 2407.15891, sec. 3.3: N/5); 0 for a fixed size.
        block_size: tokens per page.

    Raises:
        ValueError: a negative count, an empty page, a ratio outside [0, 1].
    """

    sinks: int
    window: int
    window_ratio: float
    block_size: int

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 0:
            raise ValueError(
                f"sinks ({self.sinks}) and window ({self.window}) must not be negative"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size ({self.block_size}) must be at least 1")
        if not 0.0 <= self.window_ratio <= 1.0:
            raise ValueError(f"window_ratio ({self.window_ratio}) must lie in [0, 1]")

    @property
    def sink_pages(self) -> int:
        """Pages that hold the sinks."""
        return _ceil_div(self.sinks, self.block_size)

    @property
    def ratio_millionths(self) -> int:
        """`window_ratio` in millionths, rounded up, as all forms use it."""
        return math.ceil(round(self.window_ratio * _RATIO_SCALE, 3))

    def first_window_page(self, page: IntLike) -> IntLike:
        """First page of the window of queries in `page`.

        The window of a page is taken at its last position, so no query sees less
        than its own window. One page adds at most `block_size` tokens to it
        (ratio <= 1), so the result is monotone in `page`.
        """
        pages = _ceil_div(self._window_of(page), self.block_size)
        return _at_least(page - pages, 0)

    def _window_of(self, page: IntLike) -> IntLike:
        ratio = self.ratio_millionths
        last_position = (page + 1) * self.block_size - 1
        return _at_least(_ceil_div(last_position * ratio, _RATIO_SCALE), self.window)

    def num_dropped(self, page: IntLike) -> IntLike:
        """Tokens that the compensation slot stands for: N of a query in `page`."""
        return _at_least(self.first_window_page(page) * self.block_size - self.sinks, 0)

    def first_kept_page(self, position: int) -> int:
        """First page beyond the sinks that a query at `position`, or later, needs.

        It is the page before the window: its tail is the compensation slot.
        """
        return max(self.first_window_page(position // self.block_size) - 1, 0)

    def num_held_pages(self, num_tokens: int) -> int:
        """Local pages of a compressed request whose last token is being computed."""
        if num_tokens <= 0:
            return 0
        last_page = (num_tokens - 1) // self.block_size
        kept = self.first_kept_page(num_tokens - 1)
        return min(self.sink_pages, kept) + last_page + 1 - kept

    def max_held_pages(self, max_tokens: int) -> int:
        """Largest `num_held_pages` of a request of up to `max_tokens` tokens."""
        # The window, and so the count, grows with the position.
        return self.num_held_pages(max_tokens) if max_tokens > 0 else 0
