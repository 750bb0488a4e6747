"""Values made of parameters alone: what they are, and how they are made again from other values of the parameters.

``1 + w``, ``w.t()`` and ``table[index]`` involve no example. Their gradients are pulled back to the parameters later,
by running the same functions again (`discreet.core.uses.Derivation`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from discreet.core.parameter import DerivedParameter, Guarded, PrivateParameter, Use, plain
from discreet.core.uses import Derivation
from discreet.errors import UnsupportedUse


@dataclass(frozen=True)
class Rebuild:
    """A function of parameters alone, as it is run again on other values of them: the ``rebuild`` of a `Derivation`.

    Attributes:
        use: the meeting at which it ran first.
        names: the parameters whose values a call takes, in order.
        parts: for each argument, how it is made from parameters, or None.
        constants: for each argument, itself or the parameter's memory, with the version that a tensor had.
        piece: of a result in pieces, which one.
    """

    use: Use
    names: tuple[str, ...]
    parts: tuple[Derivation | None, ...]
    constants: tuple[tuple[Any, int], ...]
    spec: TreeSpec
    piece: int | None = None

    def __call__(self, *sources: Tensor) -> Any:
        if any(isinstance(leaf, Tensor) and leaf._version != version for leaf, version in self.constants):
            raise self.use.refuse("a tensor that it read was changed in place since", "change a copy of it.")
        known = dict(zip(self.names, sources, strict=True))
        filled = [
            constant if part is None else part.rebuild(*(known[name] for name in part.names))
            for part, (constant, _) in zip(self.parts, self.constants, strict=True)
        ]
        args, kwargs = tree_unflatten(filled, self.spec)
        result = self.use.function(*args, **kwargs)
        return result if self.piece is None else result[self.piece]


def derive(use: Use, args: tuple[Any, ...], kwargs: dict[str, Any], *, isometric: bool) -> Any:
    """Apply a function to parameters alone, and remember how each result was made."""
    leaves, spec = tree_flatten((args, kwargs))
    if use.function is Tensor.view and any(isinstance(leaf, torch.dtype) for leaf in leaves):
        raise use.refuse("bits that are read as another type have no gradient", "cast it instead: .to(dtype).")
    parts = tuple(use.origin(leaf) if isinstance(leaf, Guarded) else None for leaf in leaves)
    origins = [part for part in parts if part is not None]
    names = tuple(dict.fromkeys(name for part in origins for name in part.names))
    values = {name: source for part in origins for name, source in zip(part.names, part.sources, strict=True)}
    kept = [
        use.book.kept(leaf) if part is None else leaf.detach() if isinstance(leaf, PrivateParameter) else None
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    constants = tuple((leaf, leaf._version if isinstance(leaf, Tensor) else 0) for leaf in kept)
    call = Rebuild(replace(use, origins={}), names, parts, constants, spec)
    keeps_norm = isometric and len(origins) == 1 and origins[0].isometric
    plain_leaves = [plain(leaf) for leaf in leaves]
    versions = [leaf._version for leaf in plain_leaves if isinstance(leaf, Tensor)]
    plain_args, plain_kwargs = tree_unflatten(plain_leaves, spec)
    with torch.no_grad():
        result = use.function(*plain_args, **plain_kwargs)
    if versions != [leaf._version for leaf in plain_leaves if isinstance(leaf, Tensor)]:
        raise use.refuse(f"it changes {', '.join(names)} in place", "write it out of place (no inplace=, max_norm=).")
    sources = tuple(values[name] for name in names)
    head = next(leaf for leaf in leaves if isinstance(leaf, Guarded))
    if isinstance(result, Tensor):
        return _wrap(result, Derivation(names, sources, call, keeps_norm), like=head)
    pieces = [
        _wrap(piece, Derivation(names, sources, replace(call, piece=index), False), like=head)
        for index, piece in enumerate(result)
    ]
    return type(result)(pieces) if type(result) in (tuple, list) else tuple(pieces)


def cast(use: Use, guarded: Tensor, result: Tensor) -> Tensor:
    """A guarded value in another dtype or memory order: the same value, so the same derivation."""
    use.book.casts.add(result.dtype)
    return _wrap(result, replace(use.origin(guarded)), like=guarded)


def _wrap(value: Tensor, derivation: Derivation, *, like: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise UnsupportedUse(
            f"{', '.join(derivation.names)} as {value.dtype}: no real gradient comes back; keep it floating point."
        )
    if isinstance(like, DerivedParameter):
        return like.another(value, derivation)
    return DerivedParameter.of(value, derivation)
