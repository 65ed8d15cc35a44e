"""A stand-in for CUDA graphs on a CPU: what a capture records, a replay does again.

    capture   every ATen and custom operation and every launch of an interpreted Triton
              kernel is run, and noted down with its tensors
    replay    the notes are run on the same memory, and nothing of the Python that made them

It fails where a GPU fails, or would be wrong in silence:

| what                                           | here                                      |
|------------------------------------------------|-------------------------------------------|
| Python scalars, grids, addresses               | stay as they were at capture              |
| memory allocated in a capture                  | the graph's; NaN when a replay begins     |
| other memory that nobody holds at a replay     | `FreedMemory`                             |
| memory that its owner gave back (`give_back`)  | `FreedMemory`, in a replay or an eager use |
| a wait for the device in a capture             | `HostSync`                                |
| a kernel outside of its own tensors            | `OutOfBounds`                             |

What it does not show: two graphs of one pool that overwrite each other's dropped tensors,
streams, and `.to("cpu")`, which a CPU cannot tell from `.to(device)`.

    standin = GraphStandIn()
    with standin.installed():       # before vLLM is imported: see `_python_ops`
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ...
        graph.replay()
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from triton.runtime import interpreter


class HostSync(RuntimeError):
    """A capture asked for a value on the device, or brought one from the host."""


class FreedMemory(RuntimeError):
    """Memory was used that its owner no longer holds."""


class OutOfBounds(RuntimeError):
    """A kernel used memory that is no part of its tensors."""


_POISON = 0xFF
"""Every byte of it: NaN as a float, -1 as an integer."""

_HOST_METHODS = ("cpu", "numpy", "tolist", "__array__")
"""Of a tensor: they read its values without an operation that a mode sees."""


class _Memory:
    """A storage as a graph knows it: held where the graph allocated it, else only watched."""

    def __init__(self, storage: torch.UntypedStorage, owned: bool) -> None:
        self.address, self.nbytes = storage.data_ptr(), storage.nbytes()
        self.held = storage if owned else None
        self.watched = weakref.ref(storage)

    def storage(self) -> torch.UntypedStorage:
        """The storage.

        Raises:
            FreedMemory: nobody holds it any more, or it has moved.
        """
        found = self.watched()
        if found is None:
            raise FreedMemory(f"a graph reads {self.nbytes} bytes that were freed after capture")
        if found.data_ptr() != self.address:
            raise FreedMemory(f"a graph reads {self.nbytes} bytes that moved after capture")
        return found


class _TensorNote(NamedTuple):
    """A tensor of a record: where it lies, and its form."""

    memory: _Memory
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype).set_(
            self.memory.storage(), self.offset, self.shape, self.stride
        )


def _fill_in(tree: Any) -> Any:
    """The tree with tensors for their notes."""
    return _map(lambda leaf: leaf.tensor() if isinstance(leaf, _TensorNote) else leaf, tree)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    return tree_map(change, tree, is_leaf=lambda leaf: isinstance(leaf, _TensorNote))


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class _Operation(NamedTuple):
    """An operation; `fresh` outputs are copied to where the capture's own lie."""

    func: Any
    args: Any
    kwargs: Any
    fresh: tuple[tuple[int, _TensorNote], ...]

    def run(self) -> None:
        outputs, _ = tree_flatten(self.func(*_fill_in(self.args), **_fill_in(self.kwargs)))
        for index, note in self.fresh:
            note.tensor().copy_(outputs[index])


class _Launch(NamedTuple):
    """A launch of a kernel over a grid of numbers."""

    standin: "GraphStandIn"
    executor: Any
    args: Any
    kwargs: Any

    def run(self) -> None:
        self.standin.run_kernel(self.executor, _fill_in(self.args), _fill_in(self.kwargs))


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
"""Of operations made of others: in inference mode a dispatch mode sees them whole."""

_launch = interpreter.GridExecutor.__call__
_load = interpreter.InterpreterBuilder.create_masked_load
_store = interpreter.InterpreterBuilder.create_masked_store
_register = torch.library.Library.impl


class StandInGraph:
    """In the place of `torch.cuda.CUDAGraph`; subclassed with its device."""

    standin: "GraphStandIn"

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps: list[_Operation | _Launch] = []
        self.memory: dict[int, _Memory] = {}
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, **options: Any) -> None:
        """Note down what is done from here on."""
        assert self.standin.graph is None, "one capture at a time"
        self._pool = pool
        self.standin.graph = self

    def capture_end(self) -> None:
        self.standin.graph = None
        self.standin.captures += 1

    def pool(self) -> Any:
        return self._pool

    def reset(self) -> None:
        self.steps.clear()
        self.memory.clear()

    def replay(self) -> None:
        """Do again what was noted.

        Raises:
            FreedMemory: something that it uses is gone.
        """
        assert self.standin.graph is None, "a replay within a capture"
        self.standin.replays += 1
        with _disable_current_modes(), torch.inference_mode():
            for memory in self.memory.values():
                if memory.held is not None:
                    _bytes_of(memory.held).fill_(_POISON)
            for step in self.steps:
                self.standin.check_use(note.memory.storage() for note in _notes(step))
                step.run()

    def note_operation(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        given = {t.untyped_storage()._cdata for t in _tensors(args, kwargs)}
        noted = self.note(args), self.note(kwargs)
        fresh = []
        for index, output in enumerate(tree_leaves(outputs)):
            if isinstance(output, torch.Tensor):
                own = output.untyped_storage()._cdata not in given
                note = self._note_tensor(output, own)
                if own:
                    fresh.append((index, note))
        # To allocate is no work of the device's.
        if "empty" not in func._schema.name and (fresh or func._schema.is_mutable):
            self.steps.append(_Operation(func, *noted, tuple(fresh)))

    def note(self, tree: Any) -> Any:
        """The tree with notes for its tensors."""
        return _map(
            lambda leaf: self._note_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree
        )

    def _note_tensor(self, tensor: torch.Tensor, own: bool = False) -> _TensorNote:
        storage = tensor.untyped_storage()
        memory = self.memory.get(storage._cdata)
        if memory is None or memory.watched() is not storage:
            memory = self.memory[storage._cdata] = _Memory(storage, own)
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return _TensorNote(memory, tensor.dtype, *place)


def _notes(step: _Operation | _Launch) -> list[_TensorNote]:
    leaves = tree_leaves((step.args, step.kwargs), is_leaf=lambda x: isinstance(x, _TensorNote))
    return [leaf for leaf in leaves if isinstance(leaf, _TensorNote)]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Capture:
    """In the place of `torch.cuda.graph`."""

    def __init__(self, cuda_graph: StandInGraph, pool: Any = None, **options: Any) -> None:
        self.graph, self.pool = cuda_graph, pool

    def __enter__(self) -> None:
        self.graph.capture_begin(self.pool)

    def __exit__(self, *error: object) -> None:
        self.graph.capture_end()


class GraphStandIn(TorchDispatchMode):
    """The device that captures and replays.

    Args:
        checked: packages whose kernels may use nothing but their own tensors; others may
            be given addresses.

    captures, replays: how many there were.
    """

    def __init__(self, checked: Sequence[str] = ("razor_kernels",)) -> None:
        super().__init__()
        self.checked = tuple(checked)
        self.graph: StandInGraph | None = None
        self.captures = self.replays = 0
        self._given_back: list[weakref.ref[torch.UntypedStorage]] = []
        self._python_ops: dict[str, Callable[..., Any]] = {}
        self._bounds: tuple[np.ndarray, np.ndarray] | None = None

    # --- Memory that was given back ---------------------------------------------------

    def give_back(self, tensors: Iterable[torch.Tensor]) -> None:
        """Their owner is done with them: whoever uses them from here on is at fault."""
        self._given_back += [weakref.ref(tensor.untyped_storage()) for tensor in tensors]

    def still_held(self) -> int:
        """Bytes that were given back and are held by somebody all the same."""
        live = {ref() for ref in self._given_back} - {None}
        return sum(storage.nbytes() for storage in live if storage is not None)

    def check_use(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """See that none of them was given back.

        Raises:
            FreedMemory: one was.
        """
        gone = {storage._cdata for ref in self._given_back if (storage := ref()) is not None}
        if gone and any(storage._cdata in gone for storage in storages):
            raise FreedMemory("memory is used that its owner has given back")

    # --- What a capture sees ----------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.check_use(t.untyped_storage() for t in _tensors(args, kwargs))
        if self.graph is None:
            return func(*args, **kwargs)
        name = func._schema.name
        if name in self._python_ops:
            with self:
                return self._python_ops[name](*args, **kwargs)
        if func.has_kernel_for_dispatch_key(_COMPOSITE):
            with self:
                return func.decompose(*args, **kwargs)
        _check_sync(func, args)
        outputs = func(*args, **kwargs)
        self.graph.note_operation(func, args, kwargs, outputs)
        return outputs

    def launch(self, executor: Any, args: Any, kwargs: Any) -> None:
        """A launch of an interpreted kernel: noted in a capture, then run."""
        tensors = _tensors(args, kwargs)
        self.check_use(t.untyped_storage() for t in tensors)
        if self.graph is not None:
            executor.grid = _grid_of(executor, args, kwargs)
            noted = self.graph.note(args), self.graph.note(kwargs)
            self.graph.steps.append(_Launch(self, executor, *noted))
        self.run_kernel(executor, args, kwargs)

    def run_kernel(self, executor: Any, args: Any, kwargs: Any) -> None:
        """Interpret a kernel; what the interpreter itself does is no part of a capture."""
        module = executor.fn.__globals__["__name__"]
        graph, self.graph = self.graph, None
        if module.startswith(self.checked):
            self._bounds = _bounds_of(_tensors(args, kwargs))
        try:
            with _disable_current_modes():
                _launch(executor, *args, **kwargs)
        finally:
            self.graph, self._bounds = graph, None

    def check_bounds(self, ptrs: Any, mask: Any) -> None:
        """Whether a kernel's pointers lie in its tensors, where its package is checked.

        Raises:
            OutOfBounds: one does not.
        """
        if self._bounds is None:
            return
        starts, ends = self._bounds
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data].astype(np.int64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        index = np.searchsorted(starts, addresses, side="right") - 1
        inside = (index >= 0) & (addresses + size <= ends[index])
        if not inside.all():
            raise OutOfBounds(f"{(~inside).sum()} pointers of a kernel lie outside its tensors")

    # --- Patches ----------------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self) -> Iterator["GraphStandIn"]:
        """Stand in for CUDA graphs in this thread."""
        with contextlib.ExitStack() as stack:
            for owner, name, value in self._patches():
                stack.enter_context(patch.object(owner, name, value, create=True))
            stack.enter_context(self)
            yield self

    def _patches(self) -> list[tuple[Any, str, Any]]:
        standin, builder = self, interpreter.InterpreterBuilder

        def call(executor: Any, *args: Any, **kwargs: Any) -> None:
            standin.launch(executor, args, kwargs)

        def load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            standin.check_bounds(ptrs, mask)
            return _load(builder, ptrs, mask, *rest)

        def store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            standin.check_bounds(ptrs, mask)
            return _store(builder, ptrs, value, mask, *rest)

        def register(
            library: Any, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any
        ) -> Any:
            if dispatch_key in ("CPU", "CompositeExplicitAutograd"):
                plain = op_name if isinstance(op_name, str) else op_name._schema.name
                name = plain if "::" in plain else f"{library.ns}::{plain}"
                standin._python_ops[name] = fn
            return _register(library, op_name, fn, dispatch_key, **options)

        return [
            (torch.cuda, "CUDAGraph", type("CUDAGraph", (StandInGraph,), {"standin": self})),
            (torch.cuda, "graph", _Capture),
            (torch.cuda, "graph_pool_handle", lambda: (0, id(object()))),
            (torch.cuda, "is_current_stream_capturing", lambda: standin.graph is not None),
            (torch.library.Library, "impl", register),
            (interpreter.GridExecutor, "__call__", call),
            (builder, "create_masked_load", load),
            (builder, "create_masked_store", store),
            *((torch.Tensor, name, self._refusing(name)) for name in _HOST_METHODS),
        ]

    def _refusing(self, name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.graph is not None:
                raise HostSync(f"Tensor.{name} in a capture")
            return original(tensor, *args, **kwargs)

        return method


def _check_sync(func: Any, args: Any) -> None:
    """Refuse what waits for the device, or copies from pageable memory of the host.

    Raises:
        HostSync: naming the operation.
    """
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
        masks = [t for t in args[1] if t is not None]
        waits = any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
    if waits or func._schema.name == "aten::lift_fresh":
        raise HostSync(f"{func} in a capture")


def _grid_of(executor: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """The launch's grid in numbers: a grid of a graph is not computed again."""
    if not callable(executor.grid):
        return tuple(executor.grid)
    known = {name: value for name, value in kwargs.items() if name in executor.arg_names}
    return tuple(executor.grid(inspect.getcallargs(executor.fn, *args, **known)))


def _bounds_of(tensors: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Where the tensors' memory begins and ends, in order."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    starts = np.array(sorted(storages), dtype=np.int64)
    return starts, starts + np.array([storages[start] for start in starts], dtype=np.int64)
