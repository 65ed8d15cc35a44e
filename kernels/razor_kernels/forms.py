"""Which form of the kernels serves: the choice, and what a form is.

device   first choice   where that cannot be had
cpu      native         PyTorch, with a warning that says what is lost
other    PyTorch
"""

import logging
from typing import Literal, Protocol

import torch

from razor_kernels import native
from razor_kernels.paged import PagedForm
from razor_kernels.step import LayerHeads, Rule, Step

logger = logging.getLogger(__name__)

FormName = Literal["native", "paged"]


class Form(Protocol):
    """Write and attention of one layer (the contract is `step`'s)."""

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        rule: Rule,
    ) -> None: ...

    def attention(
        self,
        query: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        rule: Rule,
        out: torch.Tensor,
    ) -> None: ...


def choose_form(device: torch.device, head_dim: int, group: int, stored: torch.dtype) -> Form:
    """The fastest form for heads of this kind.

    Args:
        group: query heads a KV head. stored: dtype of the cache.
    """
    if device.type != "cpu":
        return PagedForm()
    if not native.covers(head_dim, group, stored):
        logger.warning(
            "razor: no native kernels for heads of %d (group %d, %s): attention runs in "
            "PyTorch, several times slower",
            head_dim,
            group,
            stored,
        )
        return PagedForm()
    try:
        return native.NativeForm()
    except RuntimeError as error:
        logger.warning("%s. Attention runs in PyTorch, several times slower", error)
        return PagedForm()
