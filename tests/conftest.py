"""Set-up of the whole suite: a small engine in this process, the bundled model."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# An example may take as long as the machine needs.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# Two engines' worth of threads on a shared core wait for each other; one is faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# It would overrule the tests' own pool sizes.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, made by its script."""
    import make_random_llama

    folder = tmp_path_factory.mktemp("models") / "random-llama"
    make_random_llama.save(folder)
    return folder
