"""The forms that run on a CPU, PyTorch's and the native one, against the oracle."""

import logging
import math
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from kernel_cases import (
    CASES,
    NUM_KV_HEADS,
    SHAPES,
    SINK_SHAPES,
    Case,
    Far,
    Feed,
    Request,
    Shape,
    check,
    params_of,
)

from razor_kernels import PageLayout, forms, native, paged, triton_form

FORMS = {"paged": paged.PagedForm, "native": native.NativeForm}
LONG = 600
"""Tokens of a case that is run at few shapes only: the oracle takes its time."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest):
    return FORMS[request.param]()


def is_long(case: Case) -> bool:
    return max(sum(request.chunks) for request in case.requests) > LONG


TABLE = [
    pytest.param(case, shape, id=f"{case.name}-{shape.name}")
    for number, shape in enumerate((*SHAPES, *SINK_SHAPES))
    for case in CASES
    if number < 1 or not is_long(case)
]


@pytest.mark.parametrize(("case", "shape"), TABLE)
def test_forms_equal_the_oracle(form, case: Case, shape: Shape) -> None:
    """Invariant 2: pages, chunks and batches change nothing but rounding."""
    check(form, case, shape)


@pytest.mark.parametrize("case", [c for c in CASES if not is_long(c)], ids=lambda case: case.name)
def test_forms_without_compensation(form, case: Case) -> None:
    """Without compensation, dropped tokens leave no trace."""
    check(form, case, SHAPES[0], compensation=False)


def test_a_slot_changes_the_output(form) -> None:
    """The compensation slot is really in the sum: without it the output differs."""
    torch.manual_seed(2)
    feed = Feed(Case("", (Request((200,), 0),), window=32), SHAPES[0])
    with_slot, without = (feed.run(form, params_of(SHAPES[0], c))[0][:, 1] for c in (True, False))
    assert (with_slot[:64] - without[:64]).abs().max() == 0
    assert (with_slot[150:] - without[150:]).abs().max() > 0.1


@pytest.mark.parametrize(("logit", "share"), [(-math.inf, 1.0), (-60.0, 1.0), (90.0, 0.0)])
def test_a_learned_sink_at_its_ends(form, logit: float, share: float) -> None:
    """A sink without weight changes nothing; one with all of it leaves zeros."""
    torch.manual_seed(2)
    feed = Feed(Case("", (Request((150, 1), 0),), window=32), SHAPES[0])
    params = params_of(SHAPES[0])
    plain = feed.run(form, params)[0]
    sinks = torch.full((NUM_KV_HEADS * 2,), logit)
    out = feed.run(form, replace(params, sink_logits=sinks))[0]
    torch.testing.assert_close(out, plain * share, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[6]], ids=lambda shape: shape.name)
def test_tails_are_running_sums_past_the_sinks(form, shape: Shape) -> None:
    """S(p) of a full page is the sum of what is stored from the sinks' end to the page's end."""
    torch.manual_seed(3)
    feed = Feed(Case("", (Request((20, 1, 49, 90), 0),), sinks=5), shape)
    feed.run(form, params_of(shape))
    pages, size = feed.pages[1], shape.local_block
    table = pages.table[0, : 160 // size].long()
    cache = pages.cache[table][:, 1:3].float()  # slots 1 and 2: [pages, 2, rows, 2D]
    rows = cache[:, :, :size].clone()
    rows[0, :, :5] = 0
    got = pages.layout.tails(pages.cache)[table][:, 1:3]
    torch.testing.assert_close(got, rows.sum(2).cumsum(0), rtol=1e-5, atol=1e-3)


def test_rejected_tokens_leave_the_sums(form) -> None:
    """Tokens that speculation wrote and took back are in no sum once others stand there."""
    torch.manual_seed(4)
    shape = SHAPES[0]
    params = params_of(shape)
    feed = Feed(Case("", (Request((60, 10, 130), 0),), window=32), shape)
    plain = feed.run(form, params)[0]
    # Rows 60 to 69 were written before, with other numbers.
    spans = [(0, 60, 70)]
    step = feed.step(spans)
    k, v = (feed._rows(spans, part) for part in (1, 2))
    form.write(-k, v * 3, feed.heads, step, params)
    assert torch.equal(feed.run(form, params)[0], plain)


def test_far_positions(form) -> None:
    """131,072 tokens: positions, page indices and sums of their size are no trouble."""
    far = Far()
    torch.testing.assert_close(far.run(form).double(), far.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learned_sinks", [False, True])
def test_threads_change_rounding_only(monkeypatch, learned_sinks: bool) -> None:
    """With more threads than one, long rows are cut and merged; a sink counts once."""
    far, found = Far(16_384, learned_sinks), []
    for num_threads in (1, 3):
        # `set_num_threads` does nothing once vLLM has bound a process's threads.
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        found.append(far.run(native.NativeForm()))
    one, three = found
    assert not torch.equal(one, three), "nothing was cut"
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(three.double(), far.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", native.BUILDS)
def test_every_build_that_runs_here_is_right(build: str, monkeypatch) -> None:
    """The builds for narrower vectors keep the contract too."""
    monkeypatch.setattr(native, "BUILDS", (build,))
    native.library.cache_clear()
    try:
        for shape in (SHAPES[0], SHAPES[3], SHAPES[6], SHAPES[7]):
            check(native.NativeForm(), CASES[12], shape)
    finally:
        native.library.cache_clear()


def test_a_copied_query_lives_through_the_call(monkeypatch) -> None:
    """The library is given addresses: what they point at must not be freed before it returns."""
    shape = Shape(torch.float32, 4, 64, head_major=True)
    form = native.NativeForm()
    copies: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    contiguous = torch.Tensor.contiguous

    def copying(self: torch.Tensor) -> torch.Tensor:
        copy = contiguous(self)
        copies.append(weakref.ref(copy))
        return copy

    class Spy:
        def __getattr__(self, name: str):
            def call(*args):
                alive.extend(copy() is not None for copy in copies)
                copies.clear()
                return getattr(native.library(), name)(*args)

            return call

    monkeypatch.setattr(form, "_library", Spy())
    torch.manual_seed(0)
    feed = Feed(Case("", (Request((40,), 0),), window=32), shape)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "contiguous", copying)
        feed.run(form, params_of(shape))
    assert len(alive) >= 3
    assert all(alive)


def test_a_stale_library_is_an_error(monkeypatch) -> None:
    """Structs of another size than this file's are refused, not written to; nothing else serves."""

    class Stale:
        def razor_struct_sizes(self, sizes) -> None:
            native.library().razor_struct_sizes(sizes)
            sizes[1] += 8

    for stale in (Stale(), object()):
        with pytest.raises(native.StaleBuildError, match="is of another version"):
            native._declared(stale, Path("_native.so"))  # type: ignore[arg-type]
    error = native.StaleBuildError("stale")
    monkeypatch.setattr(native, "NativeForm", mock.Mock(side_effect=error))
    with pytest.raises(native.StaleBuildError):
        forms.choose_form(setting(64, torch.float32))


def setting(head_dim: int, dtype: torch.dtype) -> forms.Setting:
    """Of a model with retrieval heads alone."""
    layout = PageLayout(32, head_dim, dtype, has_tail=False)
    return forms.Setting(torch.device("cpu"), (layout, None), None, 4, 2, dtype, 8, 1)


def test_without_a_build_pytorch_serves(monkeypatch, caplog) -> None:
    """What is lost is said; and the choice is the native form where it is built."""
    chosen = forms.choose_form(setting(64, torch.bfloat16))
    assert isinstance(chosen, native.NativeForm)
    monkeypatch.setattr(native, "BUILDS", ("_not_built",))
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            chosen = forms.choose_form(setting(64, torch.bfloat16))
    finally:
        native.library.cache_clear()
    assert isinstance(chosen, paged.PagedForm)
    assert "several times slower" in caplog.text


def test_odd_head_dims_fall_back_loudly(caplog) -> None:
    """A head_dim that is no multiple of 16 has no native form."""
    with caplog.at_level(logging.WARNING):
        chosen = forms.choose_form(setting(72, torch.float32))
    assert isinstance(chosen, paged.PagedForm)
    assert "heads of 72" in caplog.text


def test_slots_with_gaps_are_refused_by_the_pytorch_form() -> None:
    """It reads a layer's slots as one slice."""
    feed = Feed(CASES[0], SHAPES[0])
    heads = feed.heads._replace(slot_of=torch.tensor([0, 0, 2, 2], dtype=torch.int32))
    step = feed.step([(0, 0, 1)])
    q = torch.zeros(1, NUM_KV_HEADS, 2, 32)
    with pytest.raises(AssertionError, match="gaps"):
        paged.PagedForm().attention(q, heads, step, params_of(SHAPES[0]), q.clone())


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float8_e4m3fn, 4)]
)
def test_tail_takes_whole_rows(dtype: torch.dtype, rows: int) -> None:
    """A tail is 2 * head_dim fp32 numbers, in rows of 2 * head_dim stored ones."""
    layout = PageLayout(32, 64, dtype, has_tail=True)
    assert layout.tail_rows == rows
    assert layout.tails(torch.zeros(2, 3, layout.rows, 128, dtype=dtype)).shape == (2, 3, 128)


@pytest.mark.parametrize(("wish", "error"), [("trition", ValueError), ("native", RuntimeError)])
def test_a_wished_form_that_cannot_serve_is_refused(monkeypatch, wish, error) -> None:
    """`RAZOR_KERNELS` is never passed over in silence."""
    monkeypatch.setenv(forms.OVERRIDE, wish)
    with pytest.raises(error):
        forms.choose_form(setting(72, torch.float32))


@pytest.mark.parametrize(("group", "expected"), [(4, 4), (8, 1)])
def test_wide_fp32_drafts_are_prefilled(group: int, expected: int) -> None:
    """32 rows of 512 fp32 numbers need more shared memory than some devices have."""
    layout = PageLayout(64, 512, torch.float32, has_tail=False)
    form = triton_form.TritonForm(
        *(torch.device("cpu"), (layout, None), None, 4, group, 8, torch.float32),
        max_queries=4,
        traits=triton_form.Device(132, 80),
    )
    assert form.max_queries == expected


def test_a_spilling_prefill_is_refused() -> None:
    """fp32 over an fp8 cache at wide heads: one line, not a kernel that runs from memory."""
    layout = PageLayout(64, 256, torch.float8_e4m3fn, has_tail=False)
    traits = triton_form.Device(132, 90)
    with pytest.raises(NotImplementedError, match="head_dim 256 of fp32 over a cache"):
        triton_form.TritonForm(
            torch.device("cpu"), (layout, None), None, 4, 2, 8, torch.float32, traits=traits
        )
