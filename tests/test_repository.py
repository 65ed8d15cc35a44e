"""Habits of the repository that a mistake would break in silence."""

import ast
import subprocess
import sys
from collections.abc import Container
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"razor_kernels": "kernels", "razor_vllm": ".", "razor_serving": "serving"}


@pytest.mark.parametrize("folder", ["kernels", "serving", "tests", "benchmarks"])
def test_no_top_level_package_shadows_another(folder: str) -> None:
    """A package called `kernels` would hide the one that transformers imports."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()
    below = list((ROOT / folder).rglob("__init__.py"))
    assert folder != "tests" or all("stubs" in path.parts for path in below)


def test_importing_from_the_root_finds_the_real_kernels_package() -> None:
    """A Llama model imports with the repository as the working directory."""
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "LlamaForCausalLM"


class Source(NamedTuple):
    """One module of ours. name: dotted."""

    name: str
    tree: ast.Module


def sources() -> list[Source]:
    """Every module of the packages."""
    found = []
    for package, folder in PACKAGES.items():
        root = ROOT / folder
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports_of(tree: ast.Module, modules: Container[str] = ()) -> set[str]:
    """Modules that a module imports, within functions too; for `from a import b`, a.b or a."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else node.module)
    return found


def import_circle(sources: list[Source]) -> list[str] | None:
    """Modules that import one another in a circle; None where there is none."""
    modules = {source.name for source in sources}
    graph = {s.name: imports_of(s.tree, modules) & modules - {s.name} for s in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not even by an import within a function."""
    assert import_circle(sources()) is None
    bad = [
        Source("a", ast.parse("import b")),
        Source("b", ast.parse("def f():\n    from c import x")),
        Source("c", ast.parse("from a import y")),
    ]
    assert set(import_circle(bad) or ()) == {"a", "b", "c"}


def is_below(module: str, *packages: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def wrong_way(source: Source) -> set[str]:
    """Imports of a module that its floor may not know."""
    floors = {
        "razor_kernels": ("vllm", "razor_vllm", "razor_serving"),
        "razor_vllm.heads": ("vllm", "razor_serving"),
        "razor_vllm": ("razor_serving",),
    }
    above = next((names for floor, names in floors.items() if is_below(source.name, floor)), ())
    wrong = {name for name in imports_of(source.tree) if is_below(name, *above)}
    if is_below(source.name, "razor_vllm.heads"):
        wrong |= {
            name
            for name in imports_of(source.tree, {source.name for source in sources()})
            if is_below(name, "razor_vllm") and not is_below(name, "razor_vllm.heads")
        }
    return wrong


def test_dependencies_point_one_way() -> None:
    """razor_kernels knows no vLLM, nor does razor_vllm.heads; razor_vllm knows no razor_serving."""
    assert not [(source.name, wrong) for source in sources() if (wrong := wrong_way(source))]
    for name, text in (
        ("razor_kernels.x", "def f():\n    import vllm.config"),
        ("razor_kernels.x", "from razor_vllm.plan import y"),
        ("razor_vllm.heads.x", "from vllm import LLM"),
        ("razor_vllm.heads.x", "from razor_vllm.plan import y"),
        ("razor_vllm.x", "import razor_serving"),
    ):
        assert wrong_way(Source(name, ast.parse(text))), text


PATCHING = {"razor_vllm.compat", "razor_vllm.patching"}
"""Modules that may set what is not theirs."""
OPEN_TO_ALL = {"state", "record", "sys"}
"""Starlette's `app.state`, a log record in a filter, `sys.argv`: made for others to set."""


def foreign_assignments(tree: ast.Module) -> list[str]:
    """Attributes that a module sets on what is not its own.

    Its own are those of `self` and `cls` in a method of a class of its own.
    """
    found = []

    def visit(node: ast.AST, in_class: bool) -> None:
        if isinstance(node, ast.ClassDef):
            in_class = True
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A function within a method, or within none, has a `self` of somebody else's.
            methods = {id(child) for child in getattr(node, "body", ())}
            for child in ast.iter_child_nodes(node):
                nested = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                visit(child, in_class and not (nested and id(child) in methods))
            return
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            found.extend(
                ast.unparse(part) for part in parts_of(target) if is_foreign(part, in_class)
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            found.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            visit(child, in_class)

    visit(tree, False)
    return found


def parts_of(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        return [part for element in target.elts for part in parts_of(element)]
    return [target]


def is_foreign(target: ast.expr, in_class: bool) -> bool:
    if isinstance(target, ast.Subscript):
        text = ast.unparse(target.value)
        return text.endswith("__dict__") or text.startswith("vars(")
    if not isinstance(target, ast.Attribute):
        return False
    owner = ast.unparse(target.value)
    own = in_class and (owner in ("self", "cls") or owner.startswith("self."))
    return not own and owner.split(".")[-1] not in OPEN_TO_ALL


def test_patches_of_vllm_live_in_one_file() -> None:
    """What belongs to others is set in compat.py only."""
    found = {
        source.name: foreign
        for source in sources()
        if is_below(source.name, "razor_vllm", "razor_serving") and source.name not in PATCHING
        if (foreign := foreign_assignments(source.tree))
    }
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "layer.kv_cache = x",
        "core.counter += 1",
        "setattr(owner, name, x)",
        "core.__dict__['watch'] = x",
        "a, engine.shutdown = f, g",
        "def wrap(original):\n    def add(self):\n        self.count = 1\n    return add",
        "class A:\n    def f(self):\n        def g(self):\n            self.count = 1",
    ],
)
def test_a_foreign_assignment_is_seen(text: str) -> None:
    assert foreign_assignments(ast.parse(text))


def test_an_own_assignment_is_none() -> None:
    text = "class A:\n    def f(self):\n        self.a = self.b.c = 1\n        x[0] = 1"
    assert not foreign_assignments(ast.parse(text))
