"""Reads a package's imports, from its sources alone, and says which of them break the layering."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

# A layer imports only from layers of a smaller rank; lm and hf share one, so neither imports the other.
RANK = {"errors": 0, "core": 1, "ops": 2, "nn": 3, "__init__": 4, "lm": 5, "hf": 5, "bench": 6, "cli": 7, "__main__": 8}

# The layers that `import taylor_attention` loads: there the function that needs an optional dependency imports it.
LOADED_AT_ONCE = {"errors", "core", "ops", "nn", "__init__"}

# Which layers may use which dependency. What stands in no row here, and is not the standard library, is a violation.
DEPENDENCIES = {
    "torch": set(RANK),
    "typing_extensions": set(RANK),  # PyTorch's own dependency; for annotations
    "numpy": {"core", "ops", "lm", "hf", "bench"},
    "safetensors": {"core", "hf"},
    "numba": {"ops"},
    "triton": {"ops"},
    "transformers": {"hf"},
    "tokenizers": {"hf"},
    "matplotlib": {"bench"},
    "rich": {"lm", "bench", "cli"},
    "click": {"cli"},
}
# Their decorators are needed when a kernel's module is loaded; that those modules load late is tested by running it.
KERNEL_COMPILERS = {"numba", "triton"}


class Import(NamedTuple):
    """One imported module: its dotted name, the line, and whether the import waits until a function is called."""

    target: str
    line: int
    in_function: bool


def find_violations(package: Path) -> list[str]:
    """Return one line for each import in `package` (a directory) that breaks the layering."""
    found = []
    for path in sorted(package.rglob("*.py")):
        layer = layer_of(path, package)
        if layer not in RANK:
            found.append(f"{path.relative_to(package)}: {layer} is no layer")
            continue
        for item in read_imports(path, package):
            complaint = _judge(item, layer, package)
            if complaint:
                found.append(f"{path.relative_to(package)}:{item.line}: {complaint}")
    return found


def find_cycle(package: Path) -> list[str]:
    """Return the modules of one cycle of module-level imports, or nothing."""
    graph = {}
    for path in package.rglob("*.py"):
        targets = {_module_file(item.target, package) for item in read_imports(path, package) if not item.in_function}
        graph[path] = targets - {None, path}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(path.relative_to(package)) for path in error.args[1]]
    return []


def layer_of(path: Path, package: Path) -> str:
    """Return the layer of a source file: the first part of its path below the package."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def read_imports(path: Path, package: Path) -> list[Import]:
    """Return what a source file imports, relative names resolved; those for type checkers alone count as late."""
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), path, package, in_function=False))


def _walk(node: ast.AST, path: Path, package: Path, in_function: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, in_function) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, path, package)
        yield from (Import(f"{base}.{alias.name}", node.lineno, in_function) for alias in node.names)
    elif isinstance(node, ast.Call) and _called_name(node) in {"import_module", "__import__", "require"}:
        argument = node.args[0] if node.args else None
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield Import(argument.value, node.lineno, in_function)
    late = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_for_types(node)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, path, package, late)


def _absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    if not node.level:
        return node.module or ""
    parents = (package.name, *path.relative_to(package).parent.parts)
    parts = parents[: len(parents) - node.level + 1]
    return ".".join((*parts, node.module) if node.module else parts)


def _called_name(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"


def _judge(item: Import, layer: str, package: Path) -> str | None:
    top, *rest = item.target.split(".")
    if top == package.name:
        target = rest[0] if rest and rest[0] in RANK else "__init__"
        if target == layer or RANK[target] < RANK[layer]:
            return None
        return f"{layer} imports {target}, which does not stand below it"
    if top in sys.stdlib_module_names:
        return None
    if layer not in DEPENDENCIES.get(top, set()):
        return f"{layer} may not import {top}"
    if top != "torch" and top not in KERNEL_COMPILERS and layer in LOADED_AT_ONCE and not item.in_function:
        return f"{top} is optional: import it in the function that uses it"
    return None


def _module_file(target: str, package: Path) -> Path | None:
    """Return the file behind a dotted name, which may end in a name defined in that file; None outside the package."""
    top, *rest = target.split(".")
    if top != package.name:
        return None
    for parts in (rest, rest[:-1]):
        inside = package.joinpath(*parts)
        for candidate in (inside.with_suffix(".py"), inside / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
