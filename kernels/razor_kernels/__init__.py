"""Attention over per-head pages: the oracle, and the forms that serve.

This package knows tensors, never vLLM. A reader starts with `window` (which
tokens a local head sees), then `layout` (what a page looks like), then `oracle`
(the formula), then `step` (the contract of the forms) and `forms` (which one serves).
"""

from razor_kernels.layout import PageLayout
from razor_kernels.window import DENSE_FOREVER, Window

__all__ = ["DENSE_FOREVER", "PageLayout", "Window"]
