"""Imports point one way, and importing the package loads PyTorch and nothing optional."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

from layering import DEPENDENCIES, find_cycle, find_violations

PACKAGE = Path(__file__).parents[1] / "src" / "taylor_attention"


def test_imports_point_one_way():
    assert list(PACKAGE.rglob("*.py")), f"no sources in {PACKAGE}"
    assert find_violations(PACKAGE) == []


def test_modules_do_not_import_each_other_in_a_circle():
    assert find_cycle(PACKAGE) == []


PLANTED = {
    "upwards": ("core/a.py", "from ..ops import attention", "core imports ops, which does not stand below it"),
    "upwards, whole module": ("ops/a.py", "from .. import nn", "ops imports nn, which does not stand below it"),
    "upwards, absolute": ("nn/a.py", "import taylor_attention.lm.data", "nn imports lm, which does not"),
    "upwards, in a function": (
        "lm/a.py",
        "def f():\n    from ..bench.demo import run",
        "lm imports bench, which does not",
    ),
    "upwards, by name": ("ops/a.py", "import_module('taylor_attention.cli')", "ops imports cli, which does not"),
    "upwards, for types": ("errors.py", "if TYPE_CHECKING:\n    from .core import State", "errors imports core, which"),
    "from a deeper folder": ("core/deep/a.py", "from ...nn import attention", "core imports nn, which does not stand"),
    "the package from inside": (
        "nn/a.py",
        "from .. import attention",
        "nn imports __init__, which does not stand below",
    ),
    "the package from inside, absolute": ("core/a.py", "import taylor_attention as ta", "core imports __init__, which"),
    "the public names' source": (
        "__init__.py",
        "from .lm import data",
        "__init__ imports lm, which does not stand below",
    ),
    "lm to hf": ("lm/a.py", "from ..hf import cache", "lm imports hf, which does not stand below it"),
    "bench to transformers": ("bench/a.py", "import transformers", "bench may not import transformers"),
    "nn to hf": ("nn/a.py", "from ..hf import cache", "nn imports hf, which does not stand below it"),
    "hf to lm": ("hf/a.py", "from ..lm import data", "hf imports lm, which does not stand below it"),
    "optional at module level": ("core/a.py", "import safetensors.torch", "safetensors is optional: import it in"),
    "optional, guarded": ("core/a.py", "try:\n    import numpy\nexcept ImportError:\n    pass", "numpy is optional"),
    "optional in the wrong layer": ("nn/a.py", "def f():\n    import transformers", "nn may not import transformers"),
    "optional, by name": ("nn/a.py", "def f():\n    require('click', 'lm', 'this')", "nn may not import click"),
    "unknown": ("bench/a.py", "import pandas", "bench may not import pandas"),
    "no layer": ("utils.py", "", "utils is no layer"),
}


@pytest.mark.parametrize(("path", "source", "complaint"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(tmp_path, path, source, complaint):
    found = find_violations(_plant(tmp_path, {path: source}))
    assert len(found) == 1
    assert found[0].startswith(path)
    assert complaint in found[0]


ALLOWED = {
    "downwards": ("nn/a.py", "import math, torch\nfrom ..core.state import State\nfrom ..errors import expect"),
    "sideways": ("core/a.py", "from .basis import rows\nfrom . import cost"),
    "optional in a function": ("core/a.py", "def f():\n    from safetensors.torch import save_file"),
    "optional for types": ("core/a.py", "if TYPE_CHECKING:\n    import numpy"),
    "what hf is for": ("hf/a.py", "from transformers import Cache\nfrom ..nn.cache import KeyValueCache"),
    "a kernel's compiler": ("ops/triton_kernels.py", "import triton"),
    "the public names from above": ("lm/a.py", "import taylor_attention as ta\nfrom .. import attention"),
}


@pytest.mark.parametrize(("path", "source"), ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_passes(tmp_path, path, source):
    assert find_violations(_plant(tmp_path, {path: source})) == []


def test_a_planted_cycle_is_found(tmp_path):
    package = _plant(
        tmp_path, {"core/a.py": "from .b import x", "core/b.py": "from . import c", "core/c.py": "import math"}
    )
    assert find_cycle(package) == []
    (package / "core/c.py").write_text("import taylor_attention.core.a")
    assert set(find_cycle(package)) == {"core/a.py", "core/b.py", "core/c.py"}


def _plant(folder: Path, sources: dict[str, str]) -> Path:
    package = folder / "taylor_attention"
    for name, source in sources.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    return package


def test_importing_the_package_loads_nothing_optional():
    # Against PyTorch alone, which may load numpy or triton by itself where they are installed.
    code = "import sys, torch; old = {*sys.modules}; import taylor_attention; print(*{*sys.modules} - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "taylor_attention" in loaded
    assert loaded & (set(DEPENDENCIES) - {"torch"}) == set()


def test_the_layer_of_transformers_says_what_it_needs():
    code = "import sys; sys.modules['transformers'] = None; import taylor_attention.hf"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    last = run.stderr.strip().splitlines()[-1]
    assert last.endswith(": taylor_attention.hf needs transformers: pip install 'taylor-attention[hf]'")
    assert "MissingDependencyError" in last


def test_every_extra_that_an_error_names_exists():
    named = {(path.name, extra) for path in PACKAGE.rglob("*.py") for extra in find_extras(path.read_text("utf-8"))}
    assert named, "no source names an extra: is `require` still called that?"
    extras = set(metadata("taylor-attention").get_all("Provides-Extra") or [])
    assert {(file, extra) for file, extra in named if extra not in extras} == set()


def find_extras(source: str) -> set[str]:
    """Return the extras that a source names, in calls of `require` or written out in its messages."""
    written = re.findall(r"taylor-attention\[([\w-]+)\]", source)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    passed = [call.args[1] for call in calls if getattr(call.func, "id", "") == "require" and len(call.args) > 1]
    return {*written, *(str(node.value) for node in passed if isinstance(node, ast.Constant))}


def test_extras_are_found_where_errors_name_them():
    assert find_extras("require('click', 'cli', 'this')\nprint('pip install taylor-attention[io]')") == {"cli", "io"}
