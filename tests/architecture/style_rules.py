"""House style that a machine can judge: signatures, exceptions, types, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from architecture.reading import Source, last_name

TORCH_CONTRACTS = frozenset({"forward", "backward", "setup_context", "extra_repr", "vmap"})
"""Methods whose meaning PyTorch defines; a docstring that repeats it would be noise."""


def keyword_sinks(source: Source) -> list[str]:
    """Signatures that take ``**anything``: a misspelt privacy argument would vanish in them."""
    return [
        f"{node.lineno}: {_name_of(node)} takes **{node.args.kwarg.arg}"
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and node.args.kwarg
    ]


def broad_excepts(source: Source) -> list[str]:
    """``except:``, ``except Exception``, ``except BaseException``, also inside a tuple; and ``suppress`` of them."""
    broad = {"Exception", "BaseException"}
    lines = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or last_name(kind) in broad for kind in kinds):
                lines.append(f"{node.lineno}: catches everything")
        elif isinstance(node, ast.Call) and last_name(node.func) == "suppress":
            lines += [f"{node.lineno}: suppresses everything" for kind in node.args if last_name(kind) in broad]
    return lines


def unannotated(source: Source) -> list[str]:
    """Public functions with an argument or a result that has no type."""
    lines = []
    for node, _ in _public_functions(source.tree):
        spec = node.args
        every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        bare = [arg.arg for arg in every if arg.annotation is None and arg.arg not in {"self", "cls"}]
        if node.returns is None:
            bare.append("return")
        if bare:
            lines.append(f"{node.lineno}: {node.name} lacks types of {', '.join(bare)}")
    return lines


def undocumented(source: Source) -> list[str]:
    """Public modules, classes and functions without a docstring.

    An empty ``__init__.py`` has nothing to say, and a method of a class that extends another keeps the base's promise.
    """
    lines = []
    tree = source.tree
    if tree.body and not ast.get_docstring(tree):
        lines.append("1: the module has no docstring")
    for node, owner in _public_functions(tree):
        exempt = node.name.startswith("__") or (owner is not None and (node.name in TORCH_CONTRACTS or owner.bases))
        if not exempt and not ast.get_docstring(node):
            lines.append(f"{node.lineno}: {node.name} has no docstring")
    for node in _public_classes(tree.body):
        if not ast.get_docstring(node):
            lines.append(f"{node.lineno}: class {node.name} has no docstring")
    return lines


def _name_of(node: ast.AST) -> str:
    return node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else "a lambda"


def _public_classes(body: list[ast.stmt]) -> Iterator[ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from _public_classes(node.body)


def _public_functions(
    tree: ast.Module,
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    """Functions of the module and methods of its public classes, with the class; dunder methods included."""
    owners: list[tuple[list[ast.stmt], ast.ClassDef | None]] = [(tree.body, None)]
    owners += [(node.body, node) for node in _public_classes(tree.body)]
    for body, owner in owners:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                dunder = node.name.startswith("__") and node.name.endswith("__")
                if dunder or not node.name.startswith("_"):
                    yield node, owner
