"""The path from an example to the outside: who makes private types, draws, and writes on what is not its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from architecture.reading import Source, dotted, imported, last_name

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
        if isinstance(node, ast.Call) and last_name(node.func) in aliases:
            lines.append(f"{node.lineno}: constructs {name}")
    return lines


def random_draws(source: Source) -> list[str]:
    """Uses of any generator of random numbers: modules, torch functions, tensor methods, ``os.urandom``."""
    lines = [f"{line}: imports {name}" for line, name in imported(source) if _is_random_module(name)]
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Attribute):
            continue
        chain = dotted(node)
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
        if isinstance(node, ast.Call) and last_name(node.func) in {"setattr", "__setattr__"}:
            owner = node.args[0] if node.args else node
            if not (isinstance(owner, ast.Name) and owner.id in {"self", "cls"}):
                lines.append(f"{node.lineno}: writes by setattr")
        for target in _written(node):
            if isinstance(target, ast.Attribute) and dotted(target)[0] not in {"self", "cls", "ctx"}:
                lines.append(f"{node.lineno}: writes .{target.attr} on {'.'.join(dotted(target)[:-1])}")
    return lines


def grad_writes(source: Source) -> list[str]:
    """Writes to an attribute called ``grad``, on any object."""
    lines = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and last_name(node.func) == "setattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value == "grad":
                lines.append(f"{node.lineno}: sets grad by setattr")
        for target in _written(node):
            if isinstance(target, ast.Attribute) and target.attr == "grad":
                lines.append(f"{node.lineno}: writes .grad")
    return lines


def _is_random_module(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[: k + 1]) in RANDOM_MODULES for k in range(len(parts))) or name == "os.urandom"


def _written(node: ast.AST) -> Iterator[ast.expr]:
    """What an assignment writes to, one by one; nothing for any other node."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    return (leaf for item in targets for leaf in _leaves(item))


def _leaves(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for item in target.elts:
            yield from _leaves(item)
    elif isinstance(target, ast.Starred):
        yield from _leaves(target.value)
    else:
        yield target
