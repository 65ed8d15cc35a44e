"""Which names of vLLM the packages rely on, and what vLLM makes of each: the contract.

    python tests/series/contract.py                     compare with the vLLM that is installed
    python tests/series/contract.py --write             take its series into contract.json
    python tests/series/contract.py --vllm FOLDER       the same of an unpacked wheel's `vllm`

Names are found in the source of `razor_vllm` and `razor_serving`:

    imported     from vllm.x import y
    reached      y.z, of an imported y; wrap(y, "z", ...); self.z and z of a subclass
    declared     attributes of objects that are handed to us: READ, and the classes of BASES
    y.*          all members of a class that is subclassed: a new one may want an answer

vLLM is read, not imported, so that a series needs no environment to be looked at.
"""

import argparse
import ast
import functools
import importlib.util
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("contract.json")
PACKAGES = {"razor_vllm": ROOT, "razor_serving": ROOT / "serving"}

BASES = {
    "RazorModelState": "vllm.v1.worker.gpu.model_states.default.DefaultModelState",
    "RazorEndpoints": "vllm.plugins.endpoint_plugins.interface.EndpointPlugin",
}
"""vLLM's classes that ours stand for without naming them as a base."""

READ = {
    "vllm.config.VllmConfig": "additional_config attention_config cache_config compilation_config "
    "device_config kv_transfer_config max_in_flight_tokens model_config parallel_config "
    "scheduler_config speculative_config use_v2_model_runner",
    "vllm.config.ModelConfig": "dtype get_head_size get_total_num_hidden_layers "
    "get_total_num_kv_heads hf_text_config is_attention_free is_encoder_decoder is_mm_prefix_lm "
    "max_model_len model revision runner_type served_model_name use_mla",
    "vllm.config.CacheConfig": "block_size cache_dtype mamba_block_size mamba_cache_mode "
    "user_specified_block_size",
    "vllm.config.ParallelConfig": "_api_process_rank decode_context_parallel_size enable_dbo "
    "pipeline_parallel_size prefill_context_parallel_size tensor_parallel_size",
    "vllm.config.SchedulerConfig": "disable_hybrid_kv_cache_manager max_num_seqs",
    "vllm.config.SpeculativeConfig": "method num_speculative_tokens use_eagle_block_drop",
    "vllm.config.AttentionConfig": "backend backend_per_kind use_non_causal",
    "vllm.config.CompilationConfig": "static_forward_context",
    "vllm.config.DeviceConfig": "device_type",
    "vllm.engine.arg_utils.EngineArgs": "additional_config",
    "vllm.forward_context.ForwardContext": "attn_metadata",
    "vllm.model_executor.layers.attention.Attention": "attn_backend attn_type head_size "
    "head_size_v impl kv_cache_dtype kv_cache_torch_dtype kv_sharing_target_layer_name layer_name "
    "num_heads num_kv_heads sliding_window",
    "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase": "bind_kv_cache "
    "get_attn_backend get_kv_cache_spec",
    "vllm.v1.attention.backend.AttentionLayer": "_k_scale_float _v_scale_float",
    "vllm.v1.attention.backend.CommonAttentionMetadata": "block_table_tensor max_query_len "
    "num_actual_tokens num_reqs query_start_loc seq_lens slot_mapping",
    "vllm.v1.core.block_pool.BlockPool": "blocks cached_block_hash_to_block free_block_queue "
    "get_cached_block get_num_free_blocks hash_block_size null_block num_gpu_blocks touch",
    "vllm.v1.core.block_pool.BlockHashToBlockMap": "contain",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue": "fake_free_list_head "
    "fake_free_list_tail num_free_blocks",
    "vllm.v1.core.kv_cache_utils.KVCacheBlock": "block_hash block_id is_null next_free_block "
    "ref_cnt",
    "vllm.v1.core.kv_cache_manager.KVCacheManager": "block_pool coordinator",
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": "single_type_managers",
    "vllm.v1.kv_cache_interface.KVCacheConfig": "has_mamba_layers kv_cache_groups num_blocks",
    "vllm.v1.kv_cache_interface.MambaSpec": "num_speculative_blocks",
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": "is_eagle_group kv_cache_spec layer_names",
    "vllm.v1.core.sched.scheduler.Scheduler": "get_request_counts has_requests kv_cache_config "
    "kv_cache_manager requests",
    "vllm.v1.engine.EngineCoreRequest": "cache_salt prompt_embeds prompt_token_ids "
    "request_id resumable sampling_params",
    "vllm.v1.engine.core.EngineCore": "model_executor scheduler vllm_config",
    "vllm.v1.executor.Executor": "get_kv_cache_specs",
    "vllm.v1.engine.core_client.AsyncMPClient": "_call_utility_async call_utility_all_async "
    "core_engines",
    "vllm.v1.engine.async_llm.AsyncLLM": "engine_core errored generate shutdown vllm_config",
    "vllm.v1.engine.input_processor.InputProcessor": "vllm_config",
    "vllm.v1.request.Request": "max_tokens num_computed_tokens num_preemptions "
    "num_prompt_tokens request_id sampling_params status",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "input_batch requests vllm_config",
    "vllm.v1.worker.gpu_input_batch.InputBatch": "req_ids",
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": "num_prompt_tokens sampling_params",
    "vllm.v1.worker.gpu.input_batch.InputBatch": "req_ids",
    "vllm.v1.core.sched.output.NewRequestData": "prompt_embeds prompt_token_ids req_id "
    "sampling_params",
    "vllm.sampling_params.SamplingParams": "extra_args",
}
"""Attributes that are read of vLLM's objects, by class."""

CALLED_BY_US = {"KeyMiddleware.__init__"}
"""Overriding methods that vLLM itself does not call with the base's arguments."""

NOT_IN_ALL = {
    "vllm.v1.engine.core_client.AsyncMPClient.call_utility_all_async": "from 0.32 on",
    "vllm.v1.core.kv_cache_utils.get_kv_cache_groups": "a builder's method from 0.33 on",
    "vllm.v1.core.kv_cache_planning.DefaultKVCacheConfigBuilder": "from 0.33 on",
    "vllm.v1.core.kv_cache_planning.DefaultKVCacheConfigBuilder.get_kv_cache_groups": "from 0.33",
}
"""Names that a tested series lacks, and why that is no fault."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Found(NamedTuple):
    """Where a name is defined: its node, and the module around it."""

    node: ast.AST
    module: str


class Override(NamedTuple):
    """A function of ours in the place of one of vLLM's.

    name: of ours. replaced: of vLLM's.
    """

    name: str
    replaced: str
    function: Function


class Tree:
    """The source of a package, by dotted name.

    Args:
        folder: of the package, which gives its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """The module of that name, or None."""
        if name not in self._modules:
            path = self.folder.parent.joinpath(*name.split("."))
            files = [path.with_suffix(".py"), path / "__init__.py"]
            file = next((file for file in files if file.is_file()), None)
            self._modules[name] = file and ast.parse(file.read_text(encoding="utf-8"))
        return self._modules[name]

    def find(self, dotted: str) -> Found | None:
        """The definition of a dotted name, through re-exports and base classes."""
        parts = dotted.split(".")
        split = next(
            (i for i in range(len(parts), 0, -1) if self.module(".".join(parts[:i]))), None
        )
        if split is None:
            return None
        name = ".".join(parts[:split])
        found: Found | None = Found(self.module(name) or ast.Module([], []), name)
        for part in parts[split:]:
            found = self._member(found, part) if found else None
        return found

    def _member(self, owner: Found, name: str) -> Found | None:
        if isinstance(owner.node, ast.Module):
            return self._global(owner.module, name, frozenset())
        if isinstance(owner.node, ast.ClassDef):
            return self._attribute(owner, name)
        if isinstance(owner.node, ast.AnnAssign):
            kind = self._named(owner.module, owner.node.annotation)
            return self._member(kind, name) if kind else None
        return None

    def _named(self, module: str, expression: ast.expr) -> Found | None:
        """What an expression such as a base class names; subscripts are left out."""
        text = ast.unparse(expression).strip("'\"").partition("[")[0]
        first, *rest = text.split(".")
        found = self._global(module, first, frozenset())
        for part in rest:
            found = self._member(found, part) if found else None
        return found

    def _global(self, module: str, name: str, seen: frozenset[str]) -> Found | None:
        """A name of a module: defined there, imported, or a module below it."""
        tree = self.module(module)
        if tree is None or module in seen:
            return None
        candidates = [f for s in _statements(tree) if (f := self._bound(s, module, name, seen))]
        # `if TYPE_CHECKING:` stands beside a placeholder.
        ranked = sorted(candidates, key=lambda found: isinstance(found.node, ast.Assign))
        if ranked:
            return ranked[0]
        below = self.module(f"{module}.{name}")
        return Found(below, f"{module}.{name}") if below else None

    def _bound(
        self, statement: ast.stmt, module: str, name: str, seen: frozenset[str]
    ) -> Found | None:
        """What a statement of a module binds a name to."""
        if isinstance(statement, ast.ImportFrom):
            source = self._absolute(statement, module)
            for alias in statement.names:
                if alias.name == "*":
                    return self._global(source, name, seen | {module})
                if (alias.asname or alias.name) == name:
                    return self._global(source, alias.name, seen | {module})
        return Found(statement, module) if name in _bindings(statement) else None

    def _absolute(self, statement: ast.ImportFrom, module: str) -> str:
        if not statement.level:
            return statement.module or ""
        is_package = (self.folder.parent / Path(*module.split(".")) / "__init__.py").is_file()
        parts = module.split(".")
        parts = parts[: len(parts) - statement.level + is_package]
        return ".".join([*parts, *(statement.module or "").split(".")]).rstrip(".")

    def members(self, owner: Found) -> set[str]:
        """Names that a class and its bases define, special methods left out."""
        if not isinstance(owner.node, ast.ClassDef):
            return set()
        names = {name for statement in owner.node.body for name in _bindings(statement)}
        for base in owner.node.bases:
            kind = self._named(owner.module, base)
            names |= self.members(kind) if kind and kind.node is not owner.node else set()
        return {name for name in names if not name.startswith("__")}

    def _attribute(self, owner: Found, name: str) -> Found | None:
        """A member of a class: of its body, set on self, or of a base."""
        assert isinstance(owner.node, ast.ClassDef)
        for statement in owner.node.body:
            if name in _bindings(statement):
                return Found(statement, owner.module)
        for node in ast.walk(owner.node):
            if isinstance(node, ast.Assign | ast.AnnAssign) and f"self.{name}" in _targets(node):
                return Found(node, owner.module)
        for base in owner.node.bases:
            kind = self._named(owner.module, base)
            member = self._member(kind, name) if kind and kind.node is not owner.node else None
            if member:
                return member
        return None


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module, those within if, try and with included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(node)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [ast.unparse(target) for target in targets]


def _bindings(statement: ast.stmt) -> list[str]:
    """Names that a statement of a module or a class defines."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    return _targets(statement) if isinstance(statement, ast.Assign | ast.AnnAssign) else []


def signature(found: Found | None) -> str | None:
    """One line of what a definition promises; None where there is none."""
    if found is None:
        return None
    node = found.node
    if isinstance(node, _FUNCTIONS):
        marks = "".join(f"@{ast.unparse(d).partition('(')[0]} " for d in node.decorator_list)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        start = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        return f"{marks}{start}({ast.unparse(node.args)}){returns}"
    if isinstance(node, ast.ClassDef):
        return f"class({', '.join(map(ast.unparse, node.bases))})"
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.annotation)
    if isinstance(node, ast.Assign):
        return _short(ast.unparse(node.value)) if node.targets[0:1] else ""
    return "module"


def _short(value: str) -> str:
    """A value, without what stands in its brackets where it is long."""
    return f"= {value}" if len(value) < 80 else f"= {value.partition('[')[0].partition('(')[0]}..."


class Source:
    """What one file of ours takes from vLLM.

    Args:
        module: its dotted name. vllm: to tell classes and modules from other objects.
    """

    def __init__(self, module: str, tree: ast.Module, vllm: Tree) -> None:
        self.module, self.tree, self.vllm = module, tree, vllm
        self.imports: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if "." not in alias.name:
                        self.imports[alias.name] = alias.name

    def imported(self) -> set[str]:
        return {name for name in self.imports.values() if name.split(".")[0] == "vllm"}

    def dotted(self, expression: ast.expr) -> str | None:
        """The name of vLLM's that an expression stands for."""
        if isinstance(expression, ast.Name):
            name = self.imports.get(expression.id)
            return name if name in self.imported() else None
        if isinstance(expression, ast.Attribute):
            owner = self.dotted(expression.value)
            return f"{owner}.{expression.attr}" if owner and self._has_members(owner) else None
        return None

    def _has_members(self, name: str) -> bool:
        found = self.vllm.find(name)
        return found is None or isinstance(found.node, ast.Module | ast.ClassDef | ast.AnnAssign)

    def reached(self) -> set[str]:
        """Members of imported names, written out or given as a string beside them."""
        nodes = list(ast.walk(self.tree))
        plain = {self.dotted(node) for node in nodes if isinstance(node, ast.Attribute)}
        return {name for name in plain if name} | {name for name, _ in self._named_in_calls(nodes)}

    def _named_in_calls(self, nodes: list[ast.AST]) -> Iterator[tuple[str, ast.Call]]:
        for node in nodes:
            if isinstance(node, ast.Call) and len(node.args) > 1:
                owner, name = self.dotted(node.args[0]), node.args[1]
                if owner and isinstance(name, ast.Constant) and str(name.value).isidentifier():
                    yield f"{owner}.{name.value}", node

    def wrappers(self) -> Iterator[tuple[str, str]]:
        """Functions that are replaced, and ours that makes what replaces each."""
        for name, call in self._named_in_calls(list(ast.walk(self.tree))):
            if len(call.args) > 2 and ast.unparse(call.func).endswith("wrap"):
                yield name, ast.unparse(call.args[2]).rpartition(".")[2]


class Ours:
    """All files of our packages, and what they take from vLLM."""

    def __init__(self, vllm: Tree) -> None:
        self.vllm = vllm
        self.sources = [
            Source(_module_name(file, folder), ast.parse(file.read_text(encoding="utf-8")), vllm)
            for package, folder in PACKAGES.items()
            for file in sorted((folder / package).rglob("*.py"))
        ]
        self.classes = {
            f"{source.module}.{node.name}": (source, node)
            for source in self.sources
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ClassDef)
        }

    def bases(self, source: Source, node: ast.ClassDef) -> list[str]:
        """vLLM's classes that one of ours inherits from, nearest first."""
        found = [BASES[node.name]] if node.name in BASES else []
        for base in node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            name = source.dotted(expression)
            if name:
                found.append(name)
                continue
            text = ast.unparse(expression)
            for full in (f"{source.module}.{text}", source.imports.get(text, "")):
                if full in self.classes:
                    found += self.bases(*self.classes[full])
        return list(dict.fromkeys(found))

    def overrides(self) -> Iterator[Override]:
        """Functions of ours that stand in for vLLM's: methods, and what wrappers return."""
        for source, node in self.classes.values():
            for base in self.bases(source, node):
                for method in node.body:
                    name = f"{base}.{getattr(method, 'name', '')}"
                    if isinstance(method, _FUNCTIONS) and self.vllm.find(name):
                        yield Override(f"{node.name}.{method.name}", name, method)
        made = {
            maker.name: function
            for source in self.sources
            for maker in ast.walk(source.tree)
            if isinstance(maker, ast.FunctionDef)
            for function in maker.body
            if isinstance(function, _FUNCTIONS)
        }
        for source in self.sources:
            for name, maker in source.wrappers():
                if maker in made:
                    yield Override(f"what {maker} makes", name, made[maker])

    def inherited(self) -> Iterator[str]:
        """Members of vLLM's classes that ours override, set, or use through self."""
        for source, node in self.classes.values():
            used = {
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("self", "cls")
            }
            body = {name for statement in node.body for name in _bindings(statement)}
            for base in self.bases(source, node):
                names = sorted(used | body)
                yield from (f"{base}.{n}" for n in names if self.vllm.find(f"{base}.{n}"))

    def subclassed(self) -> set[str]:
        """vLLM's classes that ours inherit from."""
        return {base for pair in self.classes.values() for base in self.bases(*pair)}

    def names(self) -> set[str]:
        """Every name of vLLM's that the packages rely on."""
        names = {f"{owner}.{name}" for owner, read in READ.items() for name in read.split()}
        names |= {*BASES.values(), *READ, *self.inherited()}
        for source in self.sources:
            names |= source.imported() | source.reached()
        return names - {"vllm"}


def _module_name(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def installed() -> Tree:
    """The vLLM of this environment."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "no vLLM is installed"
    assert spec.origin is not None, "vLLM is a namespace package"
    return Tree(Path(spec.origin).parent)


def series_of(release: str) -> str:
    """The series that a release belongs to: 0.32 of 0.32.0+cpu."""
    return ".".join(release.split(".")[:2])


def contract(vllm: Tree) -> dict[str, str | None]:
    """What a vLLM makes of every name; None where it has none."""
    ours = Ours(vllm)
    found = {name: signature(vllm.find(name)) for name in ours.names()}
    for name in ours.subclassed():
        owner = vllm.find(name)
        found[f"{name}.*"] = " ".join(sorted(vllm.members(owner))) if owner else None
    return dict(sorted(found.items()))


def table() -> dict[str, dict[str, str | None]]:
    """The contract of each tested series."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def differences(expected: dict[str, str | None], found: dict[str, str | None]) -> list[str]:
    """What differs, a name at a time; names that are no longer used do not count."""
    lines = []
    for name, after in found.items():
        before = expected.get(name, "not in the table")
        if before == after:
            continue
        if name.endswith(".*") and before and after:
            old, new = set(before.split()), set(after.split())
            lines += [f"{name[:-1]}{member}: new" for member in sorted(new - old)]
            lines += [f"{name[:-1]}{member}: gone" for member in sorted(old - new)]
        else:
            lines.append(f"{name}\n    expected {before}\n    found    {after}")
    return lines


def not_taken(override: Override, vllm: Tree) -> list[str]:
    """What a caller of vLLM's function may pass that ours does not take."""
    found = vllm.find(override.replaced)
    if found is None or not isinstance(found.node, _FUNCTIONS):
        return []
    ours, theirs = override.function.args, found.node.args
    mine = [arg.arg for arg in (*ours.posonlyargs, *ours.args)]
    by_name = {*mine, *(arg.arg for arg in ours.kwonlyargs)}
    # Constructors are called by keyword.
    any_position = ours.vararg or override.function.name == "__init__"
    wrong = []
    for index, arg in enumerate([*theirs.posonlyargs, *theirs.args]):
        if arg.arg in ("self", "cls") or mine[index : index + 1] == [arg.arg]:
            continue
        if index < len(mine) and not (any_position and arg.arg in by_name):
            wrong.append(f"argument {index} is {arg.arg} there, {mine[index]} here")
        elif not (any_position and (ours.kwarg or arg.arg in by_name)):
            wrong.append(f"{arg.arg} is not taken")
    named = [arg.arg for arg in theirs.kwonlyargs]
    wrong += [f"{name} is not taken" for name in named if name not in by_name and not ours.kwarg]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="folder of a vLLM that is not installed")
    parser.add_argument("--series", help="of that one, such as 0.34")
    parser.add_argument("--write", action="store_true", help="take it into contract.json")
    args = parser.parse_args()
    if (args.vllm is None) != (args.series is None):
        parser.error("--vllm and --series go together")
    vllm = Tree(args.vllm.resolve()) if args.vllm else installed()
    series, tables = args.series or series_of(version("vllm")), table()
    found = contract(vllm)
    nearest = series if series in tables else max(tables, default=series)
    lines = differences(tables.get(nearest, {}), found)
    lines += [
        f"{override.name} stands in for {override.replaced}: {problem}"
        for override in Ours(vllm).overrides()
        if override.name not in CALLED_BY_US
        for problem in not_taken(override, vllm)
    ]
    if nearest in tables:
        print("\n".join([f"vLLM {series}, compared with the table of {nearest}:", *lines]))
    if args.write:
        tables[series] = found
        text = json.dumps(dict(sorted(tables.items())), indent=1)
        TABLE.write_text(text + "\n", encoding="utf-8")
        print(f"{TABLE}: {len(found)} names of {series}")
    elif lines:
        sys.exit(1)


if __name__ == "__main__":
    main()
