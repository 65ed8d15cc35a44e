"""What a form of the kernels is, and which one serves.

device   first choice   if it is not available
cuda     Triton         an error
cpu      native         PyTorch, with a warning that it is slower
other    PyTorch
"""

import logging
import os
from typing import NamedTuple, Protocol

import torch

from razor_kernels import native
from razor_kernels.layout import PageLayout
from razor_kernels.paged import PagedForm
from razor_kernels.step import AttentionParams, LayerHeads, Step
from razor_kernels.window import Window

logger = logging.getLogger(__name__)

OVERRIDE = "RAZOR_KERNELS"
"""Environment variable that names the form, for debugging: native, paged or triton."""


class Form(Protocol):
    """Plan of a step, then write and attention of each layer (the contract is `step`'s)."""

    def plan(self, step: Step) -> None: ...

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
    ) -> None: ...

    def attention(
        self,
        query: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None: ...


class Setting(NamedTuple):
    """What a form is made for; the same for all layers.

    layouts: of the retrieval and the local pool, None where there is none. window: of local
    heads. group: query heads per KV head. dtype: of queries. max_requests: of a step.
    max_queries: of a request in decode: 1, or 1 + the drafted tokens with speculation.
    """

    device: torch.device
    layouts: tuple[PageLayout | None, PageLayout | None]
    window: Window | None
    num_kv_heads: int
    group: int
    dtype: torch.dtype
    max_requests: int
    max_queries: int

    @property
    def layout(self) -> PageLayout:
        found = self.layouts[0] or self.layouts[1]
        assert found is not None, "a model has heads of some kind"
        return found


def choose_form(setting: Setting) -> Form:
    """The fastest form.

    Raises:
        NotImplementedError: heads that the Triton kernels do not cover, on a GPU.
        RuntimeError: the form that `RAZOR_KERNELS` names cannot serve here, or the native
            library is of another version.
        ValueError: it does not name a form.
    """
    wish = os.environ.get(OVERRIDE, "")
    if wish not in ("", "native", "paged", "triton"):
        raise ValueError(f"{OVERRIDE} is {wish!r}; accepted are native, paged and triton")
    if wish == "triton" or (not wish and setting.device.type == "cuda"):
        return _triton(setting)
    if wish == "native":
        return _native(setting)
    if wish == "paged" or setting.device.type != "cpu":
        return PagedForm()
    return _on_cpu(setting)


def _triton(setting: Setting) -> Form:
    from razor_kernels.triton_form import TritonForm

    form = TritonForm(
        setting.device,
        setting.layouts,
        setting.window,
        setting.num_kv_heads,
        setting.group,
        setting.max_requests,
        setting.dtype,
        setting.max_queries,
    )
    if form.max_queries < setting.max_queries:
        logger.warning(
            "razor: %d drafted tokens times %d query heads a KV head are too many rows for the "
            "decode kernel: the prefill kernel answers them, slower on long contexts",
            setting.max_queries - 1,
            setting.group,
        )
    return form


def _native(setting: Setting) -> Form:
    layout = setting.layout
    if setting.device.type != "cpu":
        raise RuntimeError(f"razor: native kernels run on a CPU, not on {setting.device.type}")
    if not native.covers(layout.head_dim, setting.group, layout.dtype):
        raise RuntimeError(
            f"razor: no native kernels for heads of {layout.head_dim} "
            f"(group {setting.group}, {layout.dtype})"
        )
    return native.NativeForm()


def _on_cpu(setting: Setting) -> Form:
    try:
        return _native(setting)
    except native.StaleBuildError:
        raise
    except RuntimeError as error:
        logger.warning("%s. Attention runs in PyTorch, several times slower", error)
        return PagedForm()
