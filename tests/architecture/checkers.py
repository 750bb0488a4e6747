"""The architecture's rules as functions from source text to findings. Each returns a list of ``line: what`` strings.

They read the syntax tree and import nothing, so that they hold for files that do not run here, and so that a test can
hand each of them a few bad lines and see them refused.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "discreet"

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

TORCH_DRAWS = frozenset(
    {
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "bernoulli",
        "multinomial",
        "poisson",
        "binomial",
        "rand_like",
        "randn_like",
        "randint_like",
        "manual_seed",
        "seed",
        "Generator",
        "default_generator",
        "distributions",
    }
)
TENSOR_DRAWS = frozenset(
    {
        "normal_",
        "uniform_",
        "bernoulli_",
        "exponential_",
        "random_",
        "cauchy_",
        "log_normal_",
        "geometric_",
        "bernoulli",
        "multinomial",
    }
)
RANDOM_MODULES = frozenset({"random", "secrets", "uuid", "numpy.random", "torch.random", "torch.distributions"})
TORCH_CONTRACTS = frozenset({"forward", "backward", "setup_context", "extra_repr", "vmap"})
"""Methods whose meaning PyTorch defines; a docstring that repeats it would be noise."""


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


def constructions(source: Source, name: str) -> list[str]:
    """Calls of ``name(...)``, ``x.name(...)``, and ``replace(...)`` aliases are not followed; import aliases are."""
    tree = source.tree
    aliases = {name} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == name and alias.asname
    }
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _last_name(node.func) in aliases:
            lines.append(f"{node.lineno}: constructs {name}")
    return lines


def random_draws(source: Source) -> list[str]:
    """Uses of any generator of random numbers: modules, torch functions, tensor methods, ``os.urandom``."""
    lines = [f"{line}: imports {name}" for line, name in imported(source) if _is_random_module(name)]
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Attribute):
            continue
        chain = _chain(node)
        if "init" in chain[:-1]:  # torch.nn.init: starting weights, before any example is seen
            continue
        drawn = (
            (chain[0] == "torch" and node.attr in TORCH_DRAWS)
            or (chain[0] in {"np", "numpy"} and chain[1:2] == ["random"])
            or (chain == ["os", "urandom"])
            or (chain[0] != "torch" and node.attr in TENSOR_DRAWS)
        )
        if drawn:
            lines.append(f"{node.lineno}: draws by {'.'.join(chain)}")
    return lines


def foreign_sets(source: Source) -> list[str]:
    """Attributes written on somebody else's object (not ``self``, ``cls`` or ``ctx``), also through setattr."""
    lines = []
    for node in ast.walk(source.tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and _last_name(node.func) in {"setattr", "__setattr__"}:
            owner = node.args[0] if node.args else node
            if not (isinstance(owner, ast.Name) and owner.id in {"self", "cls"}):
                lines.append(f"{node.lineno}: writes by setattr")
        for target in (leaf for item in targets for leaf in _leaves(item)):
            if isinstance(target, ast.Attribute) and _chain(target)[0] not in {"self", "cls", "ctx"}:
                lines.append(f"{node.lineno}: writes .{target.attr} on {'.'.join(_chain(target)[:-1])}")
    return lines


def grad_writes(source: Source) -> list[str]:
    """Writes to an attribute called ``grad``, on any object."""
    lines = []
    for node in ast.walk(source.tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and _last_name(node.func) == "setattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value == "grad":
                lines.append(f"{node.lineno}: sets grad by setattr")
        for target in (leaf for item in targets for leaf in _leaves(item)):
            if isinstance(target, ast.Attribute) and target.attr == "grad":
                lines.append(f"{node.lineno}: writes .grad")
    return lines


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
            if any(kind is None or _last_name(kind) in broad for kind in kinds):
                lines.append(f"{node.lineno}: catches everything")
        elif isinstance(node, ast.Call) and _last_name(node.func) == "suppress":
            lines += [f"{node.lineno}: suppresses everything" for kind in node.args if _last_name(kind) in broad]
    return lines


def calls_of(source: Source, *names: str) -> list[str]:
    """Calls of a bare name (``print``, ``eval``) or of a dotted one (``torch.load``)."""
    lines = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ".".join(_chain(node.func))
            if called in names:
                lines.append(f"{node.lineno}: calls {called}")
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


def _is_random_module(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[: k + 1]) in RANDOM_MODULES for k in range(len(parts))) or name == "os.urandom"


def _last_name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _chain(node: ast.expr) -> list[str]:
    """``a.b.c`` -> [a, b, c]; whatever is not a name in front becomes ``?``."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "?")
    return parts[::-1]


def _leaves(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for item in target.elts:
            yield from _leaves(item)
    elif isinstance(target, ast.Starred):
        yield from _leaves(target.value)
    else:
        yield target


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
