"""Habits of the repository that a mistake would break in silence."""

import subprocess
import sys
from pathlib import Path

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


def test_dependencies_point_one_way() -> None:
    """razor_kernels knows no vLLM; razor_vllm knows no razor_serving."""
    code = (
        "import sys, razor_kernels, razor_kernels.oracle, razor_kernels.paged;"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('vllm', 'razor_vllm')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for path in (ROOT / "razor_vllm").rglob("*.py"):
        assert "razor_serving" not in path.read_text(encoding="utf-8"), path


def test_patches_of_vllm_live_in_one_file() -> None:
    """Attributes of vLLM are set in compat.py only."""
    for path in (ROOT / "razor_vllm").rglob("*.py"):
        if path.name != "compat.py":
            assert "setattr(" not in path.read_text(encoding="utf-8"), path
