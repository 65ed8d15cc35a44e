"""Layers that are not split by heads: sliding windows, Mamba and DeltaNet states, drafts.

vLLM keeps their specs, managers, backends and kernels. Their pages lie in the block pool of the
two pools, and a page there is as long as a page of ours, so several layers share one:

    a page of a pool     | retrieval heads of all full layers, B_r tokens        | padding |
    a page of a group    | layer 0, 16 tokens | layer 1 | ... | layer k - 1      | padding |
    a page of a draft    | its layers, as many tokens as fit                     | padding |

Layers that share pages share a block table: a *group*. This module imports no vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ForeignLayers:
    """Layers of a model that vLLM keeps in the same way.

    Args:
        num_layers: of the model.
        page_bytes: of one layer's page.
        block_size: tokens per page; for a state, tokens between two that may be cached.
        window: tokens of a sliding window; None for a state, or for full attention of a draft.
        num_states: states that a decoding request holds; 0 where pages hold tokens.
        num_moving: states that it holds beside them for one step, when its state moves on to
            the next page.
    """

    num_layers: int
    page_bytes: int
    block_size: int
    window: int | None = None
    num_states: int = 0
    num_moving: int = 0

    @property
    def is_state(self) -> bool:
        return self.num_states > 0

    @property
    def kind(self) -> str:
        """In a few words, for people."""
        if self.is_state:
            return "state"
        return "full attention" if self.window is None else f"window of {self.window}"

    @property
    def is_draft(self) -> bool:
        """Full attention that is not split is a draft's."""
        return self.window is None and not self.is_state

    @property
    def num_together(self) -> int:
        """Layers that a page must hold at least: all of a draft's."""
        return self.num_layers if self.is_draft else 1

    def with_block_size(self, block_size: int) -> "ForeignLayers":
        """The same layers with other pages; a state's page has no tokens, and stays."""
        if self.is_state:
            return self
        page_bytes = self.page_bytes // self.block_size * block_size
        return replace(self, page_bytes=page_bytes, block_size=block_size)

    def num_groups(self, page_bytes: int) -> int:
        """Groups of these layers when a page of the block pool has `page_bytes`."""
        return -(-self.num_layers // max(page_bytes // self.page_bytes, 1))

    def held_pages(self, num_tokens: int) -> int:
        """Pages that one group holds for a request while it computes its last token."""
        if self.is_state:
            return self.num_states
        pages = -(-num_tokens // self.block_size)
        if self.window is None:
            return pages
        return pages - max(num_tokens - self.window, 0) // self.block_size

    def layer_bytes(self, num_tokens: int) -> int:
        """Bytes that all layers need for a request, each in pages of its own."""
        return self.num_layers * self.held_pages(num_tokens) * self.page_bytes


def grouped(names: Sequence[str], layer_bytes: int, page_bytes: int) -> list[list[str]]:
    """Layers of one spec as groups of near-equal size, each of at most what fits a page.

    Args:
        layer_bytes: of one layer's page. page_bytes: of a page of the block pool.
    """
    count = -(-len(names) // max(page_bytes // layer_bytes, 1))
    return [list(names[first::count]) for first in range(count)]
