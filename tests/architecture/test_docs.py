"""What the documents name exists, and what exists is in the documents."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from architecture.reading import SOURCE

ROOT = SOURCE.parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def missing_names(text: str) -> list[str]:
    """Dotted names in backticks that cannot be imported."""
    return [name for name in re.findall(r"`(discreet(?:\.\w+)+)`", text) if not _exists(name)]


def missing_tests(text: str, root: Path) -> list[str]:
    """``tests/file.py::name`` references without such a function."""
    lost = []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        path = root / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module(body=[], type_ignores=[])
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            lost.append(f"{file}::{name}")
    return lost


def broken_links(page: Path) -> list[str]:
    """Relative links that lead nowhere."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


def _exists(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if part not in dir(found):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_tests_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    assert missing_names(text) == []
    assert missing_tests(text, ROOT) == []
    assert broken_links(page) == []


def test_what_is_missing_is_found(tmp_path):
    assert missing_names("`discreet.core.noise.release` `discreet.core.noise.relase`") == ["discreet.core.noise.relase"]
    assert missing_names("`discreet.nowhere`") == ["discreet.nowhere"]
    assert missing_tests("`tests/architecture/test_docs.py::test_nothing`", ROOT)
    assert missing_tests("`tests/nowhere.py::test_nothing`", ROOT)
    page = tmp_path / "page.md"
    page.write_text("[here](page.md) [there](lost.md)")
    assert broken_links(page) == ["lost.md"]


def test_every_public_name_is_in_the_api_page():
    exported = importlib.import_module("discreet").__all__
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in exported if f"`discreet.{name}`" not in page] == []


def test_make_and_constraints_pin_the_same_torch():
    pins = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pins == ["2.13.0"]
    assert f"torch=={pins[0]}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_continuous_integration_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text(encoding="utf-8")
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
