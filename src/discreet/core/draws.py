"""Random numbers that stay with their example: the draws of one forward, given to another with other examples.

A seed gives a batch of one the numbers that the first of four examples had, and not those of the fourth. So dropout, a
noise level or a masked token would look as if examples depended on each other, and what depends on the size of the
batch in training mode alone would hide behind them. What a forward drew is therefore written down, and the same
example finds the same numbers again.

Only the generators that training seeds for each update are followed. What a forward draws under a seed of its own is
no secret of the run and belongs to the places of the batch: who leaves it moves all others to other places.

Shape legend: B = examples of the forward that drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from discreet.core.layout import SEED

_DROPOUT = torch.ops.aten.native_dropout
"""Dropout in one launch: returns what is left, and the mask that was drawn."""
_DRAWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "native_dropout",
        *("rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like", "randint_like", "bernoulli_"),
        *("normal_", "uniform_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_"),
    )
)
"""Functions whose numbers follow from the generator alone, as long as no argument but the one they fill is a tensor."""
_MADE: Mapping[str, Callable[..., Tensor]] = {
    "bernoulli": lambda u, chance, *same_for_all: u < (same_for_all or (chance,))[0],
    "normal": lambda u, mean, std=1.0: mean + std * torch.special.ndtri(u),
    "poisson": lambda u, rate: (2 * rate * u).floor(),
    "_standard_gamma": lambda u, shape: -shape * u.log(),
    "_sample_dirichlet": lambda u, shape: torch.nn.functional.normalize(-shape * u.log(), p=1, dim=-1),
    "multinomial": lambda u, weights, *_: (
        u[..., None] > (weights / weights.sum(-1, True)).cumsum(-1)[..., None, :-1]
    ).sum(-1),
}
"""Draws that follow from tensors as well, such as chances: made here of uniform numbers, which can be given again. Each
row follows from its own alone, as that of the function does; the distribution need not be the same to ask for that."""


class Draws:
    """What the forward of B examples drew, in order, from generators that were seeded with this seed.

    Attributes:
        followed: each later forward drew as many tensors, of the same shapes but for the number of examples; if not,
            some numbers were its own.
    """

    def __init__(self, examples: int, *, seed: int = SEED) -> None:
        self.followed = True
        self._examples, self._of = examples, seed
        self._drawn: list[_Draw] = []

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write down what is drawn inside."""
        with _Drawing(self._note, self._of):
            yield

    @contextmanager
    def given(self, rows: Sequence[int]) -> Iterator[None]:
        """Give what was drawn to a forward of these examples, named by their places; of B, each place has its own."""
        left = iter(self._drawn)
        with _Drawing(lambda now: self._instead(now, next(left, None), rows), self._of):
            yield
        self.followed &= next(left, None) is None

    def _note(self, now: _Draw | None) -> None:
        self.followed &= now is not None
        if now is not None:  # masks as small as they can be: those of a whole microbatch wait beside its forward
            masks = now.kind[0] is torch.ops.aten.bernoulli_.float
            self._drawn.append(replace(now, value=now.value.to(torch.bool if masks else now.value.dtype, copy=True)))

    def _instead(self, now: _Draw | None, drawn: _Draw | None, rows: Sequence[int]) -> Tensor | None:
        """What was drawn for these examples, of the shape of what would be drawn now; None when there is no such."""
        alike = now is not None and drawn is not None and now.kind == drawn.kind
        found = self._taken(drawn.value, now.value.shape, rows) if alike else None
        self.followed &= found is not None
        if found is None and alike and len(rows) == self._examples:
            # Padded to another length: what both have, in the order of the examples, stays.
            found = now.value.clone()
            both = tuple(slice(min(sizes)) for sizes in zip(found.shape, drawn.value.shape, strict=True))
            found[both] = drawn.value[both]
        return found

    def _taken(self, drawn: Tensor, shape: torch.Size, rows: Sequence[int]) -> Tensor | None:
        """The rows along the one axis that is as long as there are examples, or a multiple of that: (B, k) blocks."""
        axes = [axis for axis, size in enumerate(shape) if size != drawn.shape[axis]]
        if not axes:
            return drawn
        folds, rest = divmod(drawn.shape[axes[0]], self._examples)
        if len(axes) > 1 or rest or shape[axes[0]] != folds * len(rows):
            return None
        index = torch.as_tensor(list(rows), device=drawn.device)
        return drawn.unflatten(axes[0], (self._examples, folds)).index_select(axes[0], index).reshape(shape)


@dataclass(frozen=True)
class _Draw:
    """A tensor that was drawn, and by what: its numbers may be an index, which must not come out of range elsewhere.

    Attributes:
        kind: the function, its numbers (a rate, a range), and the type and axes of the tensor.
    """

    value: Tensor
    kind: tuple[object, ...]


class _Drawing(TorchDispatchMode):
    """Shows every draw, and puts the answer in its place, if any; of what follows from data as well, it shows None."""

    def __init__(self, show: Callable[[_Draw | None], Tensor | None], seed: int) -> None:
        super().__init__()
        self._show, self._of = show, seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if torch.Tag.nondeterministic_seeded not in func.tags or _drops_nothing(func, args, named):
            return result
        drawn = result[1] if func.overloadpacket is _DROPOUT else result
        if named.get("generator") is not None or _seed(args, drawn) != self._of:
            return result
        filled = 1 if func.overloadpacket.__name__.endswith(("_", "_like", "dropout")) else 0
        own = func.overloadpacket in _DRAWS and not any(isinstance(leaf, Tensor) for leaf in args[filled:])
        made = None if own else _MADE.get(func.overloadpacket.__name__)
        value = drawn if made is None else torch.rand(drawn.shape, device=drawn.device).clamp_(1e-6, 1 - 1e-6)
        numbers = [leaf for leaf in args if isinstance(leaf, (int, float))]
        instead = self._show(_Draw(value, (func, *numbers, drawn.dtype, drawn.dim())) if own or made else None)
        if made is not None:
            drawn.copy_(made(value if instead is None else instead, *args))
        elif instead is not None:
            drawn.copy_(instead)
            if func.overloadpacket is _DROPOUT:
                result[0].copy_(args[0] * drawn / (1 - args[1]))
        return result


def _seed(args: Sequence[Any], drawn: object) -> int:
    """What the global generator of a draw's device was seeded with."""
    device = next((leaf.device for leaf in (drawn, *args) if isinstance(leaf, Tensor)), torch.device("cpu"))
    return torch.cuda.default_generators[device.index].initial_seed() if device.type == "cuda" else torch.initial_seed()


def _drops_nothing(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether this is a dropout, alone or in an attention, that drops nothing, or all."""
    if func.overloadpacket is _DROPOUT:
        return args[1] in (0, 1)
    for at, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return named.get("dropout_p", args[at] if at < len(args) else argument.default_value) == 0
    return False
