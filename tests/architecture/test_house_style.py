"""House style that a machine can judge: sizes, signatures, exceptions, types, docstrings."""

from __future__ import annotations

import pytest

from architecture.reading import Source, calls_of, findings, sources
from architecture.style_rules import broad_excepts, keyword_sinks, unannotated, undocumented

CORE_LINES = 8_200
RULE_LINES = 2200
KERNEL_LINES = 1_975
"""The engine, clipping, noise, sums and self-check; apart from them the rules, which are many small texts read one at a
time, and the kernels, each of which says again, and is tested against, what the engine says in PyTorch's words.
The last lines of the self-check are those that see what a forward writes, also into a buffer of another size, a score
behind zeros, and a parameter that no loss depends on; the last hundred, what hooks and Functions do inside the
backward, and a gradient that depends on others where no loss does; then 350 by which sums are recorded and replayed,
and 350 by which random numbers stay with their example and choose paths, and views of the batch say whose they are;
and 100 by which draws follow from chances, and an accelerator's streams, older settings of precision and memory that
drivers miss are minded; 60 by which no rule of clipping jumps; 30 for the heads of two files of their own, on how
operands are classified and on ties; and 90, with 15 of the kernels, by which a norm in doubt goes over."""
FILE_LINES = 600

MAY_CATCH_ALL = {
    "app/cli.py": "the edge of the program withholds messages that may quote an example, and exits with 1",
    "core/compiled.py": "whatever stops a compiler, the graph that it was given is run instead, with a warning",
    "core/team.py": "what a thread raises is carried over and raised in the one that asked",
}
"""File -> why it may catch every exception."""

_STANDS_IN = "a rule stands in for a torch function and hands its keywords on unchanged"
MAY_FORWARD = dict.fromkeys(("core/rules/elementwise.py", "core/rules/experts.py", "core/register.py"), _STANDS_IN)
MAY_FORWARD |= {"core/lowering.py": "the compiler's own settings for one graph are handed on unchanged"}
"""File -> why its signatures may take ``**named``."""


def test_the_trusted_core_is_small_enough_to_read():
    lines = {source.path: source.text.count("\n") for source in sources("core")}
    rules, kernels = (
        sum(count for path, count in lines.items() if path.startswith(folder))
        for folder in ("core/rules/", "core/kernels/")
    )
    assert rules <= RULE_LINES
    assert kernels <= KERNEL_LINES
    assert sum(lines.values()) - rules - kernels <= CORE_LINES


def test_no_file_is_a_burden():
    assert {source.path: n for source in sources() if (n := source.text.count("\n")) > FILE_LINES} == {}


def test_no_signature_swallows_keywords_near_privacy():
    watched = [source for source in sources("core", "privacy", "train") if source.path not in MAY_FORWARD]
    assert findings(keyword_sinks, watched) == []


@pytest.mark.parametrize(
    "text", ["def f(**kwargs): ...", "class A:\n    async def g(self, *, a, **rest): ...", "f = lambda **k: k"]
)
def test_a_swallowed_keyword_is_found(text):
    assert keyword_sinks(Source(path="privacy/plan.py", text=text))


def test_passing_keywords_on_is_no_finding():
    assert keyword_sinks(Source(path="privacy/plan.py", text="def f(a): return g(**a)")) == []


def test_nothing_asks_whether_an_attribute_exists():
    assert findings(lambda source: calls_of(source, "hasattr"), sources()) == []


def test_hasattr_is_found():
    assert calls_of(Source(path="core/book.py", text="if hasattr(p, 'grad'): ..."), "hasattr")


def test_no_exception_is_caught_unseen():
    assert findings(broad_excepts, [source for source in sources() if source.path not in MAY_CATCH_ALL]) == []


@pytest.mark.parametrize(
    "text",
    [
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (ValueError, BaseException) as e: raise",
        "with contextlib.suppress(Exception): f()",
    ],
)
def test_a_broad_except_is_found(text):
    assert broad_excepts(Source(path="train/loop.py", text=text))


def test_a_narrow_except_is_no_finding():
    assert broad_excepts(Source(path="train/loop.py", text="try: f()\nexcept (OSError, ValueError): pass")) == []


def test_only_the_program_prints():
    library = [source for source in sources() if source.folder != "app"]
    assert findings(lambda source: calls_of(source, "print"), library) == []


def test_a_print_is_found():
    assert calls_of(Source(path="train/loop.py", text="print(loss)"), "print")


def test_every_public_function_has_types():
    assert findings(unannotated, sources()) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(a) -> int: ...",
        "def f(a: int): ...",
        "class A:\n    def g(self, *, b) -> int: ...",
        "class A:\n    def __init__(self, b) -> None: ...",
    ],
)
def test_a_missing_type_is_found(text):
    assert unannotated(Source(path="train/loop.py", text=text))


def test_private_functions_are_judged_by_their_callers():
    assert unannotated(Source(path="train/loop.py", text="def _f(a): ...\nclass _A:\n    def g(self, b): ...")) == []


def test_everything_public_is_documented():
    assert findings(undocumented, sources()) == []


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        '"""M."""\ndef f() -> int: ...',
        '"""M."""\nclass A: ...',
        '"""M."""\nclass A:\n    """A."""\n    def g(self): ...',
    ],
)
def test_a_missing_docstring_is_found(text):
    assert undocumented(Source(path="train/loop.py", text=text))


def test_an_implementation_keeps_the_promise_of_its_base():
    text = '"""M."""\nclass A(Base):\n    """A."""\n    def norm2(self) -> int: ...'
    assert undocumented(Source(path="core/forms.py", text=text)) == []


def test_what_torch_defines_needs_no_docstring():
    text = (
        '"""M."""\nclass A:\n    """A."""\n    def forward(self, x: int) -> int: ...\n    def __len__(self) -> int: ...'
    )
    assert undocumented(Source(path="app/models.py", text=text)) == []
