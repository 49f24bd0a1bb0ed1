"""Copies of the package with something changed in them, for checks that run the tests on other builds."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"]


def replace(path: Path, old: str, new: str) -> None:
    """Change a source; a source that has changed itself is an error."""
    text = path.read_text(encoding="utf-8")
    if old not in text:
        raise SystemExit(f"{path}: expected to find {old!r}")
    path.write_text(text.replace(old, new), encoding="utf-8")


def copy_sources(folder: Path, *ignore: str) -> Path:
    """Copy src/ to a new folder, without files of the names to ignore; the package in it."""
    shutil.copytree(ROOT / "src", folder, ignore=shutil.ignore_patterns("__pycache__", *ignore))
    return folder / "taylor_attention"


def build(package: Path, flags: Sequence[str]) -> None:
    """Compile the kernels of a copy for one instruction set, the baseline."""
    kernels = package / "ops" / "kernels"
    replace(kernels / "module.cpp", "#if defined(__x86_64__)", "#if 0")
    sources = [kernels / f"{name}.cpp" for name in ("module", "baseline")]
    command = ["g++", *FLAGS, *flags, f"-I{sysconfig.get_paths()['include']}", "-shared", *map(str, sources)]
    subprocess.run([*command, "-o", str(package / "ops" / "_kernels.abi3.so"), "-ldl"], check=True)
