"""Reading the package's source, for the rules of the architecture: functions from source text to findings.

Each rule returns a list of ``line: what`` strings. Rules read the syntax tree and import nothing, so that they hold for
files that do not run here, and so that a test can hand each of them a few bad lines and see them refused.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "discreet"


@dataclass(frozen=True)
class Source:
    """One file: its path below ``src/discreet`` and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def module(self) -> str:
        parts = ["discreet", *self.path.removesuffix(".py").split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def folder(self) -> str:
        """``core``, ``privacy``, ...; ``errors`` for errors.py; empty for the public face."""
        head = self.path.split("/")[0].removesuffix(".py")
        return "" if head == "__init__" else head


def sources(*folders: str) -> list[Source]:
    """Every file of the package, or of the named folders."""
    files = sorted(SOURCE.rglob("*.py"))
    found = [Source(path=path.relative_to(SOURCE).as_posix(), text=path.read_text(encoding="utf-8")) for path in files]
    return [source for source in found if not folders or source.folder in folders]


def findings(check: Callable[[Source], list[str]], files: list[Source]) -> list[str]:
    """``path:line: what`` over all files."""
    return [f"{source.path}:{finding}" for source in files for finding in check(source)]


def imported(source: Source) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, also of those inside functions; ``from a import b`` gives ``a.b``."""
    names: list[tuple[int, str]] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".")
                package = package if source.path.endswith("__init__.py") else package[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return names


def calls_of(source: Source, *names: str) -> list[str]:
    """Calls of a bare name (``print``, ``eval``) or of a dotted one (``torch.load``)."""
    lines = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ".".join(dotted(node.func))
            if called in names:
                lines.append(f"{node.lineno}: calls {called}")
    return lines


def last_name(node: ast.expr | None) -> str:
    """``c`` of ``a.b.c``; empty for what has no name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def dotted(node: ast.expr) -> list[str]:
    """``a.b.c`` -> [a, b, c]; whatever is not a name in front becomes ``?``."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "?")
    return parts[::-1]
