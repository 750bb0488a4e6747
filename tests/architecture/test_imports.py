"""Imports go one way, in no circle, and `import discreet` needs no optional extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

from architecture.import_rules import (
    MAY_IMPORT,
    cycles,
    executed_at_import,
    export_breaks,
    import_graph,
    imports_of,
    layer_breaks,
)
from architecture.reading import Source, findings, sources

OPTIONAL = (
    "matplotlib",
    "pyarrow",
    "PIL",
    "tqdm",
    "sklearn",
    "transformers",
    "peft",
    "lightning",
    "opacus",
    "triton",
)


BLOCKED_IMPORT = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ImportError(f"{{name}} is not installed")

sys.meta_path.insert(0, Blocked())
import discreet
print([name for name in {OPTIONAL!r} if name in sys.modules])
"""
"""Imports the package where no extra can be found. Blocked, not looked up: torch itself takes tqdm when it is there."""


def test_there_is_something_to_check():
    assert len(sources()) >= 10
    assert {source.folder for source in sources()} <= set(MAY_IMPORT)


def test_imports_go_one_way():
    assert findings(layer_breaks, sources()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/noise.py", "from discreet.privacy.plan import Plan"),
        ("core/noise.py", "import discreet.train.loop"),
        ("privacy/plan.py", "from discreet.core import clipping"),
        ("privacy/plan.py", "from ..core import clipping"),
        ("train/loop.py", "def f():\n    from discreet.app import cli"),
        ("errors.py", "from discreet.core import rng"),
        ("core/rules/linear.py", "import discreet"),
        ("__init__.py", "from discreet.app.cli import main"),
        ("helpers/x.py", "import math"),
    ],
)
def test_a_wrong_import_is_found(path, line):
    assert layer_breaks(Source(path=path, text=line))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/rules/linear.py", "from . import forms\nfrom ..clipping import Clipping\nimport torch"),
        ("train/loop.py", "from discreet.core.noise import release\nfrom discreet.privacy.plan import Plan"),
        ("app/cli.py", "import discreet\nfrom discreet.app.report import write_report"),
    ],
)
def test_a_right_import_is_not(path, line):
    assert layer_breaks(Source(path=path, text=line)) == []


def test_no_module_imports_itself_through_others():
    assert cycles(import_graph(sources())) == []


def test_a_cycle_is_found():
    first = Source(path="core/a.py", text="from discreet.core.b import f")
    second = Source(path="core/b.py", text="def f():\n    from discreet.core import c")
    third = Source(path="core/c.py", text="from discreet.core.a import g")
    assert cycles(import_graph([first, second, third])) == [["discreet.core.a", "discreet.core.b", "discreet.core.c"]]


def test_the_accounting_library_has_one_importer():
    others = [source for source in sources() if source.path != "privacy/referee.py"]
    assert findings(lambda source: imports_of(source, "dp_accounting"), others) == []


@pytest.mark.parametrize(
    "line", ["import dp_accounting", "from dp_accounting.pld import common", "import dp_accounting as d"]
)
def test_a_second_importer_is_found(line):
    assert imports_of(Source(path="privacy/plan.py", text=line), "dp_accounting")


def test_import_discreet_needs_no_extra(repository):
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT],
        env={"PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.stderr == ""
    assert run.stdout.strip() == "[]"


def test_all_is_what_is_exported():
    faces = [source for source in sources() if source.path.endswith("__init__.py")]
    assert findings(export_breaks, faces) == []


@pytest.mark.parametrize(
    "text",
    [
        "from discreet.core.noise import release\n__all__ = []",
        "__all__ = ['release']",
        "from discreet.core.noise import release\n__all__ = ['release', 'release']",
    ],
)
def test_a_wrong_all_is_found(text):
    assert export_breaks(Source(path="__init__.py", text=text))


def test_the_public_face_executes_nothing():
    assert findings(executed_at_import, [source for source in sources() if source.path == "__init__.py"]) == []


@pytest.mark.parametrize("text", ["print(1)", "if True:\n    x = 1", "x = open('f')"])
def test_a_public_face_that_executes_is_found(text):
    assert executed_at_import(Source(path="__init__.py", text=text))
