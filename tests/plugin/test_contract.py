"""vLLM as the packages know it: every name they rely on, in every tested series.

How names are found, and the table: `tests/series/contract.py`. What to do where one of these
fails: docs/series.md.
"""

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from series import contract
from series.contract import CALLED_BY_US, NOT_IN_ALL, Ours, Override, Tree, differences, not_taken
from series.make_env import SERIES, for_cpu

from razor_vllm.guard import VLLM_SERIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """The installed vLLM's side of the contract."""
    return contract.contract(contract.installed())


def test_vllm_is_as_its_table_says(found: dict[str, str | None]) -> None:
    """Every name, signature and new member of a subclassed class, for the installed series."""
    series = contract.series_of(version("vllm"))
    tables = contract.table()
    if series not in tables:
        pytest.fail(f"vLLM {series} has no table: see docs/series.md")
    lines = differences(tables[series], found)
    assert not lines, "\n".join(["`make contract` once this is answered:", *lines])


def test_names_that_a_series_lacks_are_accounted_for() -> None:
    """What is not in all series is asked for before it is used, and listed with a reason."""
    tables = contract.table().values()
    lacking = {name for names in tables for name, text in names.items() if text is None}
    assert lacking == NOT_IN_ALL.keys()


def test_ours_take_what_vllm_passes() -> None:
    """Every override and every wrapper takes the arguments of what it stands in for."""
    vllm = contract.installed()
    overrides = list(Ours(vllm).overrides())
    assert {o.name for o in overrides} > CALLED_BY_US | {
        "LocalManager.find_longest_cache_hit",
        "RazorModelState.prepare_attn",
        "what _admitting makes",
    }
    wrong = [
        f"{override.name}, for {override.replaced}: {problem}"
        for override in overrides
        if override.name not in CALLED_BY_US
        for problem in not_taken(override, vllm)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("ours", "problems"),
    [
        ("def f(self, a, b=1, *, c): ...", []),
        ("def f(self, *args, **kwargs): ...", []),
        ("def f(self, a, *rest, **named): ...", []),
        ("def f(self, a, b=1, *, c, d=2): ...", []),
        ("def f(self, a, *, c): ...", ["b is not taken"]),
        ("def f(self, a, b=1): ...", ["c is not taken"]),
        ("def f(self, b, a, **kwargs): ...", ["argument 1 is a there, b here"]),
    ],
)
def test_a_missing_argument_is_seen(tmp_path: Path, ours: str, problems: list[str]) -> None:
    """The comparison itself: `f(self, a, b=1, *, c)` against what may stand in for it."""
    (tmp_path / "vllm").mkdir()
    source = "class K:\n    def f(self, a, b=1, *, c): ..."
    (tmp_path / "vllm" / "__init__.py").write_text(source, encoding="utf-8")
    (function,) = ast.parse(ours).body
    assert isinstance(function, ast.FunctionDef)
    wrong = not_taken(Override("f", "vllm.K.f", function), Tree(tmp_path / "vllm"))
    assert wrong[: len(problems)] == problems
    assert bool(wrong) == bool(problems)


def test_a_changed_vllm_is_named(found: dict[str, str | None]) -> None:
    """A signature that changed, a name that went and a new member are each listed, alone."""
    changed = dict(found)
    lookup = "vllm.v1.core.kv_cache_manager.KVCacheManager.get_computed_blocks"
    changed[lookup] = "(self, request: Request, limit: int)"
    changed["vllm.logger.init_logger"] = None
    spec = "vllm.v1.kv_cache_interface.SlidingWindowSpec"
    changed[f"{spec}.*"] = f"{found[f'{spec}.*']} num_forgotten_tokens"
    lines = differences(found, changed)
    assert [line.split("\n")[0] for line in lines] == sorted(
        ["vllm.logger.init_logger", lookup, f"{spec}.num_forgotten_tokens: new"]
    )


def test_every_place_names_the_tested_series() -> None:
    """guard, the table, the environments, the extras and the CUDA image: the same series."""
    tested = list(VLLM_SERIES)
    assert list(contract.table()) == tested
    assert list(SERIES) == tested
    dockerfile = (ROOT / "docker" / "Dockerfile.cuda").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM vllm/vllm-openai:v(\S+) AS vllm-(\S+)$", dockerfile, re.M)
    assert [name for _, name in stages] == tested
    assert [contract.series_of(release) for release, _ in stages] == tested
    (extra,) = re.findall(r'"cuda": \["vllm(.*)"\]', (ROOT / "setup.py").read_text("utf-8"))
    minors = range(60)
    accepted = [f"0.{minor}" for minor in minors if f"0.{minor}.5" in SpecifierSet(extra)]
    assert accepted == tested


def test_the_command_says_what_differs(tmp_path: Path) -> None:
    """`contract.py` on a vLLM that has nothing: every name is listed, and it fails."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    command = [sys.executable, contract.__file__, "--vllm", tmp_path / "vllm", "--series", "9.9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"vLLM 9.9, compared with the table of {VLLM_SERIES[-1]}" in done.stdout
    assert "vllm.logger.init_logger" in done.stdout


def test_a_composed_wheel_asks_for_no_cuda() -> None:
    """Metadata of a CUDA wheel, made to fit a CPU: what needs CUDA goes, the rest stays."""
    before = "Name: vllm\nVersion: 0.33.0\nRequires-Dist: torch==2.14.0\nRequires-Dist: regex\n"
    before += "Requires-Dist: nvidia-cutlass-dsl[cu13]==4.8.0\nRequires-Dist: torchao; x\n\nText"
    lines = for_cpu(before, "0.33.0").splitlines()
    assert lines[:4] == [
        "Name: vllm",
        "Version: 0.33.0+cpu",
        "Requires-Dist: regex",
        "Requires-Dist: torchao; x",
    ]
    assert lines[4] == "Requires-Dist: torch==2.13.0+cpu"
    assert lines[-2:] == ["", "Text"]
