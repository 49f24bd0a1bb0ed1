"""By hand: the kernels' tests on builds that show what an ordinary one hides, by `python tests/sanitize.py`.

    addresses    AddressSanitizer and UndefinedBehaviorSanitizer: what is read or written beside a buffer
    unwritten    every buffer of the kernels begins as NaN: what is read before it is written

Each with vectors of 16 bytes and of 64, which are AVX-512's sizes on any x86 with AVX2. The builds go to a temporary
copy of the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sources import ROOT, build, copy_sources, replace

NAMES = ("kernels", "kernels_decode", "near", "heavy", "reading", "conformance")
TESTS = [f"tests/ops/test_{name}.py" for name in NAMES]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]
WIDE = """#include "standard.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TARGET baseline
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#include "kernels.h"
#pragma GCC pop_options
"""
GOT = "    if (!data_) throw std::bad_alloc();\n"
POISON = "    if (count > 0) memset(static_cast<void*>(data_), 0xFF, round_up(count * sizeof(T), 64));\n"


def prepare(folder: Path, kind: str, width: int) -> dict[str, str]:
    """Compile a copy of the package; the environment to test it in."""
    package = copy_sources(folder, "*.so")
    kernels = package / "ops" / "kernels"
    if width == 64:
        (kernels / "baseline.cpp").write_text(WIDE, encoding="utf-8")
    if kind == "unwritten":
        replace(kernels / "simd.h", GOT, GOT + POISON)
    build(package, ["-O1", *(SANITIZERS if kind == "addresses" else [])])
    environment = {"PYTHONPATH": str(folder)}
    if kind == "addresses":
        runtimes = [
            subprocess.check_output(["g++", f"-print-file-name=lib{x}.so"], text=True) for x in ("asan", "ubsan")
        ]
        environment |= {"LD_PRELOAD": " ".join(x.strip() for x in runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    return environment


def main() -> int:
    """Build and test each; 0 if nothing was found."""
    failed = []
    for kind in ("addresses", "unwritten"):
        for width in (16, 64):
            print(f"== {kind}, vectors of {width} bytes", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, **prepare(Path(folder) / "src", kind, width)}
                command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-k", "cpu", "-p", "no:cacheprovider"]
                if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                    failed.append(f"{kind}, {width} bytes")
    print(f"failed: {'; '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
