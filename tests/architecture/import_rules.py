"""Who imports what, what the public face holds, and what an import runs: one check a rule."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from architecture.reading import Source, imported

MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "errors": frozenset(),
    "core": frozenset({"errors", "core"}),
    "privacy": frozenset({"errors", "privacy"}),
    "train": frozenset({"errors", "core", "privacy", "train", "insight"}),
    "insight": frozenset({"errors", "core", "privacy", "train", "insight"}),
    "app": frozenset({"errors", "core", "privacy", "train", "insight", "app", "integrations", ""}),
    "integrations": frozenset({"errors", "core", "privacy", "train", "insight", "integrations", ""}),
    "": frozenset({"errors", "core", "privacy", "train", "insight"}),
}
"""Folder -> the folders that it may import. The empty name is ``discreet/__init__.py``, the public face."""


def layer_breaks(source: Source) -> list[str]:
    """Imports of a folder that stands above, or of a neighbour that must not be known."""
    allowed = MAY_IMPORT.get(source.folder)
    if allowed is None:
        return [f"1: folder {source.folder!r} is not on the map"]
    breaks = []
    for line, name in imported(source):
        parts = name.split(".")
        if parts[0] != "discreet":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""
        if target not in allowed:
            breaks.append(f"{line}: {source.folder or 'the public face'} imports {name}")
    return breaks


def import_graph(files: list[Source]) -> dict[str, set[str]]:
    """module -> modules of the package that it imports."""
    modules = {source.module for source in files}
    graph: dict[str, set[str]] = {}
    for source in files:
        targets = set()
        for _, name in imported(source):
            known = name if name in modules else name.rpartition(".")[0]
            if known in modules and known != source.module:
                targets.add(known)
        graph[source.module] = targets
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def imports_of(source: Source, package: str) -> list[str]:
    """Lines that import ``package`` or anything below it."""
    return [f"{line}: imports {name}" for line, name in imported(source) if name.split(".")[0] == package]


def export_breaks(source: Source) -> list[str]:
    """``__all__`` must name exactly what an ``__init__`` brings in under a public name."""
    declared: list[str] | None = None
    names: set[str] = set()
    for node in source.tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == "__all__":
                    declared = list(ast.literal_eval(node.value))
                elif isinstance(target, ast.Name):
                    names.add(target.id)
    if declared is None:
        return []
    public = {name for name in names if not name.startswith("_")} - {"annotations"}
    wanted = {name for name in declared if not name.startswith("__")}
    lines = [f"1: {name} is exported but not in __all__" for name in sorted(public - wanted)]
    lines += [f"1: __all__ names {name}, which is not there" for name in sorted(wanted - names)]
    if len(declared) != len(set(declared)):
        lines.append("1: __all__ names something twice")
    return lines


def executed_at_import(source: Source) -> list[str]:
    """Statements of the public face other than a docstring, imports and plain constants."""
    lines = []
    for node in source.tree.body:
        is_doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_constant = isinstance(node, (ast.Assign, ast.AnnAssign)) and not any(
            isinstance(part, ast.Call) for part in ast.walk(node)
        )
        if not (is_doc or is_constant or isinstance(node, (ast.Import, ast.ImportFrom))):
            lines.append(f"{node.lineno}: executes a {type(node).__name__}")
    return lines
