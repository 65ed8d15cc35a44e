"""The stand-in for CUDA graphs keeps each of its promises, on small functions."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from graph_standin import FreedMemory, GraphStandIn, HostSync, OutOfBounds
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction


def _add_kernel(x_ptr, y_ptr, amount, length, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < length
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=mask, other=0.0) + amount, mask=mask)


add_kernel = InterpretedFunction(_add_kernel)


@pytest.fixture(params=[True, False], ids=["inference", "plain"])
def standin(request: pytest.FixtureRequest) -> Iterator[GraphStandIn]:
    """Installed, in inference mode as vLLM runs, and without."""
    device = GraphStandIn(checked=(__name__,))
    with device.installed(), torch.inference_mode(request.param):
        yield device


def capture(body: Callable[[], Any]) -> tuple[Any, Any]:
    """A graph of what the body does, and what it returned."""
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
        result = body()
    return graph, result


def test_a_replay_works_on_the_same_memory(standin: GraphStandIn) -> None:
    """Inputs are read anew, outputs lie where the capture's lay; views and in-place alike."""
    x, total = torch.arange(6.0), torch.zeros(3)

    def body() -> torch.Tensor:
        total.add_(x.view(2, 3).sum(0))
        total[1:].mul_(2)
        return torch.cat([total, x.view(2, 3).t().reshape(-1)]).view(3, 3).t()

    graph, result = capture(body)
    x.copy_(torch.arange(6.0) * 10)
    total.zero_()
    graph.replay()
    assert total.tolist() == [30, 100, 140]
    assert result.t().reshape(-1).tolist() == [30, 100, 140, 0, 30, 10, 40, 20, 50]
    assert (standin.captures, standin.replays) == (1, 1)


def test_python_does_not_run_again(standin: GraphStandIn) -> None:
    """What Python decided and counted stays as it was at capture."""
    x, y, calls = torch.ones(2), torch.zeros(2), []

    def body() -> None:
        calls.append(len(calls))
        y.copy_(x * (5 if len(calls) == 1 else 7))

    graph, _ = capture(body)
    calls.append(9)
    graph.replay()
    assert calls == [0, 9]
    assert y.tolist() == [5, 5]


def test_a_launch_keeps_its_grid_and_its_scalars(standin: GraphStandIn) -> None:
    """One step a launch: the interpreter's own operations are no part of the graph."""
    x, y, blocks, amount = torch.zeros(8), torch.zeros(8), 2, 3.0
    graph, _ = capture(lambda: add_kernel[lambda meta: (blocks,)](x, y, amount, 8, BLOCK=2))
    assert y.tolist() == [3, 3, 3, 3, 0, 0, 0, 0]
    assert len(graph.steps) == 1
    blocks, amount = 4, 30.0
    x.fill_(1)
    y.zero_()
    graph.replay()
    assert y.tolist() == [4, 4, 4, 4, 0, 0, 0, 0]


def test_an_operation_in_python_is_recorded_by_its_parts(standin: GraphStandIn) -> None:
    """As a GPU sees it: kernels, not the Python that launched them."""
    calls = []

    def double(x: torch.Tensor, out: torch.Tensor) -> None:
        calls.append(1)
        out.copy_(x * 2)

    library = torch.library.Library("razor_standin_test", "FRAGMENT")
    with contextlib.closing(_Closing(library)):
        library.define("double(Tensor x, Tensor(a!) out) -> ()")
        library.impl("double", double, dispatch_key="CPU")
        x, out = torch.ones(2), torch.zeros(2)
        graph, _ = capture(lambda: torch.ops.razor_standin_test.double(x, out))
        x.fill_(4)
        graph.replay()
    assert out.tolist() == [8, 8]
    assert len(calls) == 1


class _Closing:
    def __init__(self, library: torch.library.Library) -> None:
        self.library = library

    def close(self) -> None:
        self.library._destroy()


def test_a_capture_may_be_interrupted_within_an_operation(standin: GraphStandIn) -> None:
    """vLLM's piecewise graphs: one ends where attention begins, another begins after it."""
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    x, y, eager = torch.ones(2), torch.zeros(2), []

    def attention(hidden: torch.Tensor) -> None:
        graphs[0].capture_end()
        eager.append(hidden)
        hidden.add_(100)
        graphs[1].capture_begin()

    library = torch.library.Library("razor_standin_test", "FRAGMENT")
    with contextlib.closing(_Closing(library)):
        library.define("attention(Tensor(a!) hidden) -> ()")
        library.impl("attention", attention, dispatch_key="CPU")
        graphs[0].capture_begin()
        hidden = x * 2
        torch.ops.razor_standin_test.attention(hidden)
        y.copy_(hidden * 3)
        graphs[1].capture_end()
    assert y.tolist() == [306, 306]
    x.fill_(2)
    graphs[0].replay()
    eager[0].add_(1)
    graphs[1].replay()
    assert y.tolist() == [15, 15]


def test_memory_of_a_capture_is_the_graphs(standin: GraphStandIn) -> None:
    """It stays, though nobody else holds it; what a replay does not write is NaN."""
    x, y = torch.ones(2), torch.zeros(4)

    def body() -> None:
        scratch = torch.empty(4)
        scratch[:2] = x
        y.copy_(scratch)

    graph, _ = capture(body)
    gc.collect()
    x.fill_(3)
    graph.replay()
    assert y[:2].tolist() == [3, 3]
    assert y[2:].isnan().all()


def test_a_graph_does_not_hold_memory_of_others(standin: GraphStandIn) -> None:
    """Its owner gone, memory is freed, and a replay says so instead of reading it."""
    y, step = torch.zeros(2), {"buffer": torch.ones(2)}
    graph, _ = capture(lambda: y.copy_(step["buffer"]))
    graph.replay()
    watched = weakref.ref(step["buffer"].untyped_storage())
    step.clear()
    gc.collect()
    assert watched() is None
    with pytest.raises(FreedMemory):
        graph.replay()


def test_memory_that_moved_is_told(standin: GraphStandIn) -> None:
    """A buffer that grew lies elsewhere: the graph has the old address."""
    y, buffer = torch.zeros(2), torch.ones(2)
    graph, _ = capture(lambda: y.copy_(buffer))
    buffer.untyped_storage().resize_(1 << 20)
    with pytest.raises(FreedMemory):
        graph.replay()


@pytest.mark.parametrize(("dtype", "copied"), [(torch.int64, False), (torch.int32, True)])
def test_a_conversion_that_copies_is_told(
    standin: GraphStandIn, dtype: torch.dtype, copied: bool
) -> None:
    """A step's `.long()` of a buffer: the buffer itself, or a copy that ends with the step."""
    buffer, y = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    step = {"slot_mapping": buffer.long()}
    graph, _ = capture(lambda: y.copy_(step["slot_mapping"]))
    step = {"slot_mapping": buffer.long()}
    buffer.fill_(5)
    with pytest.raises(FreedMemory) if copied else contextlib.nullcontext():
        graph.replay()
    assert y.tolist() == ([1, 1] if copied else [5, 5])


def test_a_constant_of_a_step_is_told(standin: GraphStandIn) -> None:
    """Memory that the host filled in is the host's, not the graph's."""
    y = torch.zeros(2)
    graph, _ = capture(lambda: y.copy_(torch.frombuffer(bytearray(8), dtype=torch.float32)))
    with pytest.raises(FreedMemory):
        graph.replay()


def test_memory_that_was_given_back_is_not_to_be_used(standin: GraphStandIn) -> None:
    """In a replay, an operation or a launch, though somebody still holds it."""
    pool, y = {"cache": torch.zeros(4)}, torch.zeros(4)
    graph, _ = capture(lambda: y.copy_(pool["cache"]))
    standin.give_back([pool["cache"][2:]])
    assert standin.still_held() == 16
    for use in (
        graph.replay,
        lambda: pool["cache"].add_(1),
        lambda: y.copy_(pool["cache"]),
        lambda: add_kernel[(1,)](pool["cache"], y, 1.0, 4, BLOCK=4),
    ):
        with pytest.raises(FreedMemory):
            use()
    pool.clear()
    gc.collect()
    assert standin.still_held() == 0
    y.add_(torch.zeros(4))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x + 1),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: torch.tensor([1.0]),
    ],
)
def test_a_capture_does_not_wait_for_the_device(
    standin: GraphStandIn, wait: Callable[[torch.Tensor], Any]
) -> None:
    x = torch.ones(3)
    with pytest.raises(HostSync):
        capture(lambda: wait(x))
    wait(x)


def test_a_kernel_uses_its_own_tensors_alone(standin: GraphStandIn) -> None:
    """At capture, at replay and eagerly; masked lanes may point anywhere."""
    x, y, more = torch.zeros(8), torch.zeros(4), torch.zeros(4)
    add_kernel[(1,)](x, y, 1.0, 4, BLOCK=8)
    with pytest.raises(InterpreterError, match=OutOfBounds.__name__):
        add_kernel[(1,)](x, y, 1.0, 8, BLOCK=8)
    with pytest.raises(InterpreterError, match=OutOfBounds.__name__):
        capture(lambda: add_kernel[(1,)](x, y, 1.0, 8, BLOCK=8))
    index = torch.zeros(1, dtype=torch.int64)
    graph, _ = capture(lambda: offset_kernel[(1,)](y, index))
    graph.replay()
    index.fill_(4)
    with pytest.raises(InterpreterError, match=OutOfBounds.__name__):
        graph.replay()
    assert more.tolist() == [0, 0, 0, 0]


def _offset_kernel(y_ptr, index_ptr):
    tl.store(y_ptr + tl.load(index_ptr), 1.0)


offset_kernel = InterpretedFunction(_offset_kernel)


def test_torch_is_as_before_afterwards() -> None:
    before = torch.cuda.CUDAGraph, torch.cuda.graph, torch.Tensor.cpu, torch.library.Library.impl
    with GraphStandIn().installed():
        assert torch.cuda.CUDAGraph is not before[0]
        assert not torch.cuda.is_current_stream_capturing()
        capture(lambda: None)
    after = torch.cuda.CUDAGraph, torch.cuda.graph, torch.Tensor.cpu, torch.library.Library.impl
    assert after == before
