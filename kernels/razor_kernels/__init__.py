"""Attention over per-head pages: the oracle, and the forms that serve.

This package works on tensors and never imports vLLM. Start reading with `window` (which
tokens a local head sees), then `layout` (what a page looks like), `oracle` (the
formula), `step` (the contract of the forms) and `forms` (which one serves).
"""

from razor_kernels.layout import PageLayout
from razor_kernels.window import DENSE_FOREVER, Window

__all__ = ["DENSE_FOREVER", "PageLayout", "Window"]
