"""What a page looks like.

A pool is one tensor `[num_pages, num_slots, rows, 2 * head_dim]`; a slot is one KV
head of one layer. Within a page, a slot is contiguous:

    row 0              | k_0 .......... | v_0 .......... |
    row 1              | k_1 .......... | v_1 .......... |
    ...
    row block_size - 1 | k .......      | v .......      |
    tail (local pages) | sum k (fp32) ....... sum v (fp32) |

The tail of page p is S(p): the fp32 sum of (k_j, v_j) over every token j from the
end of the sinks to the end of page p. S(p) / N is the compensation slot of queries
whose window starts at page p + 1, so eviction copies nothing, and a cached page
serves requests with any window.
"""

from dataclasses import dataclass

import torch

_TAIL_BYTES = torch.finfo(torch.float32).bits // 8


@dataclass(frozen=True)
class PageLayout:
    """Layout of one pool's pages.

    Args:
        block_size: tokens per page.
        head_dim: width of k and of v.
        dtype: of the stored k and v; 1, 2 or 4 bytes wide.
        has_tail: whether a page ends with running sums (local pages do).
    """

    block_size: int
    head_dim: int
    dtype: torch.dtype
    has_tail: bool

    @property
    def tail_rows(self) -> int:
        """Rows that the tail takes: 1 of fp32, 2 of bf16, 4 of fp8."""
        return _TAIL_BYTES // self.dtype.itemsize if self.has_tail else 0

    @property
    def rows(self) -> int:
        return self.block_size + self.tail_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one slot."""
        return 2 * self.head_dim * self.dtype.itemsize

    def page_bytes(self, num_slots: int) -> int:
        """Bytes of a page of `num_slots` slots, without padding."""
        return num_slots * self.rows * self.row_bytes

    def tokens(self, cache: torch.Tensor) -> torch.Tensor:
        """K and V of `[..., rows, 2 * head_dim]` pages as `[..., block_size, 2 * head_dim]`."""
        return cache[..., : self.block_size, :]

    def tails(self, cache: torch.Tensor) -> torch.Tensor:
        """Running sums of `[..., rows, 2 * head_dim]` pages as fp32 `[..., 2 * head_dim]`.

        A view: writing to it writes to the pages.
        """
        assert self.has_tail, "only local pages carry running sums"
        return cache[..., self.block_size :, :].flatten(-2).view(torch.float32)
