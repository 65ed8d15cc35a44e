"""The Triton form as tests make it, and what runs in an interpreted process."""

from typing import NamedTuple

import torch
from kernel_cases import NUM_KV_HEADS, Case, Feed, Shape, check

from razor_kernels.triton_form import Device, TritonForm

FEW_SMS = 4
"""Of the interpreted device: enough to cut a sequence, few enough to walk them all."""


class Variant(NamedTuple):
    """How a form is made. max_queries: of a decode. capability: of the device."""

    max_queries: int = 1
    capability: int = 100

    @property
    def name(self) -> str:
        return f"decodes{self.max_queries}-sm{self.capability}"


def make_form(feed: Feed, variant: Variant, num_sms: int = FEW_SMS) -> TritonForm:
    """A form for a feed's pools and heads."""
    return TritonForm(
        torch.device("cpu"),
        (feed.pages[0].layout, feed.pages[1].layout),
        feed.window,
        NUM_KV_HEADS,
        feed.shape.group,
        max_requests=8,
        dtype=feed.shape.dtype,
        max_queries=variant.max_queries,
        traits=Device(num_sms, variant.capability),
    )


def check_variant(case: Case, shape: Shape, variant: Variant, compensation: bool) -> None:
    """The form's outputs are the oracle's; what a failure says is raised here."""
    torch.set_num_threads(1)
    check(make_form(Feed(case, shape), variant), case, shape, compensation)
