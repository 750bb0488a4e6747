"""What one backward pass books, and how it is settled into a clipped sum.

Every use of a guarded parameter books the per-example gradient of the value it used, as a `Form`. When the backward is
over, the records of each parameter give its per-example norm, all norms give the factors, and the factors give each
parameter's weighted gradient. Norms belong to the parameter and not to the use: a parameter used twice gets one norm,
cross terms included.

Shape legend: B = examples of the microbatch.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from discreet.core.clipping import Clipping
from discreet.core.forms import CHUNK_NUMBERS, Dense, Form, Lookup, Outer, drop_vanishing
from discreet.core.precision import full_precision
from discreet.errors import UnsupportedUse


@dataclass(frozen=True)
class Derivation:
    """How a value was made from guarded parameters alone: ``value = rebuild(*sources)``.

    Attributes:
        names: the parameters it came from.
        sources: their plain values, detached, in the order of ``names``.
        rebuild: a pure function of plain tensors. Casts are left out of it, so that sums are pulled back in float32.
        isometric: a rearrangement of one parameter (view, transpose, cast), which keeps per-example norms.
        identity: the parameter itself.
    """

    names: tuple[str, ...]
    sources: tuple[Tensor, ...]
    rebuild: Callable[..., Tensor]
    isometric: bool
    identity: bool = False

    def pull(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradient of the value -> gradients of the parameters. Linear, so it also pulls back weighted sums."""
        if self.identity:
            return (gradient,)
        value, pullback = torch.func.vjp(self.rebuild, *(source.to(gradient.dtype) for source in self.sources))
        return pullback(gradient.reshape(value.shape))

    def pull_each(self, gradient_B: Tensor) -> tuple[Tensor, ...]:
        """The same for per-example gradients, shape (B, *shape)."""
        if self.identity:
            return (gradient_B,)
        return torch.func.vmap(self.pull)(gradient_B)


@dataclass(frozen=True)
class Record:
    """One use: the per-example gradients of a value, and how the value was made."""

    derivation: Derivation
    form: Form


class Axis(enum.Enum):
    """How a plain operand of a use carries the examples."""

    BATCH = "batch"
    FOLDED = "folded"
    SHARED = "shared"


UseKey = tuple[tuple[str, ...], str, int]
"""(parameters, function, how many times they met before in this forward)."""


@dataclass(frozen=True)
class Layout:
    """For every use, how its operands carry the examples; established by the self-check at two batch sizes."""

    axes: Mapping[UseKey, tuple[Axis, ...]]

    def of(self, key: UseKey, *, examples: int) -> tuple[Axis, ...] | None:
        """How this use carries the examples; one more of a kind is taken to be like all those that were seen.

        Raises:
            UnsupportedUse: nothing like it was seen, so that a size equal to B could be a coincidence.
        """
        if key in self.axes:
            return self.axes[key]
        names, function, _ = key
        alike = {axes for (n, f, _), axes in self.axes.items() if (n, f) == (names, function)}
        if len(alike) == 1:
            return alike.pop()
        if examples == 1:
            return None
        raise UnsupportedUse(
            f"{function} on {', '.join(names)}: the self-check never saw this use, so its layout is unknown; pass "
            "layout=discreet.check(...).layout of examples that take every path through the model."
        )

    def merged(self, other: Layout) -> Layout:
        """One layout from two batch sizes: what looked like the batch at one size only was a coincidence."""
        axes = dict(self.axes)
        for key, found in other.axes.items():
            known = axes.get(key, found)
            if len(known) == len(found):
                axes[key] = tuple(_weaker(one, two) for one, two in zip(known, found, strict=True))
        return Layout(axes)


def _weaker(one: Axis, other: Axis) -> Axis:
    if one is other:
        return one
    return Axis.SHARED if Axis.SHARED in (one, other) else Axis.FOLDED


class Book:
    """Records of one microbatch, from its forward to its settlement.

    Args:
        parameters: name -> guarded parameter; each object once.
        examples: B.
        layout: what the self-check established. Without it an operand whose dimension 0 is a multiple of B is refused.
        trust_folds: accept such operands as (B, k) rows; only the self-check may, because it then compares the norms.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        examples: int,
        layout: Layout | None = None,
        trust_folds: bool = False,
    ) -> None:
        self.parameters = dict(parameters)
        self.examples = examples
        self.axes: dict[UseKey, tuple[Axis, ...]] = {}
        self._layout = layout
        self._trust_folds = trust_folds
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._meetings: dict[tuple[tuple[str, ...], str], int] = defaultdict(int)
        self._records: list[Record] = []
        self._collecting = False
        first = next(iter(self.parameters.values()))
        self.sink = torch.zeros(examples, device=first.device, requires_grad=True)

    def name_of(self, parameter: Tensor) -> str:
        """The name under which a parameter is guarded."""
        try:
            return self._names[id(parameter)]
        except KeyError:
            raise UnsupportedUse(
                f"a guarded parameter of shape {tuple(parameter.shape)} does not belong to this model: it was copied "
                "or added after guarding; make the copy before training starts."
            ) from None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Book what backward passes inside report; others (``autograd.grad`` within a forward) train nothing."""
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False

    def record(self, derivation: Derivation, form: Form) -> None:
        """Book one use; called from inside the backward."""
        if self._collecting:
            with full_precision():
                self._records.append(Record(derivation, form.reduced()))

    def classify(self, names: tuple[str, ...], function: str, operands: list[Tensor]) -> list[Axis]:
        """How each plain operand of this use carries the examples: dimension 0 is never just assumed.

        Raises:
            UnsupportedUse: an activation whose dimension 0 is neither B nor a verified multiple of B, or a use that
                the self-check saw in another layout.
        """
        ordinal = self._meetings[names, function]
        self._meetings[names, function] += 1
        key = (names, function, ordinal)
        expected = self._layout.of(key, examples=self.examples) if self._layout is not None else None
        found = [
            self._axis(operand, known=expected[index] if expected and index < len(expected) else None, key=key)
            for index, operand in enumerate(operands)
        ]
        self.axes[key] = tuple(found)
        return found

    def _axis(self, operand: Tensor, *, known: Axis | None, key: UseKey) -> Axis:
        rows = operand.shape[0] if operand.dim() else 0
        if not operand.requires_grad and (known is Axis.SHARED or rows != self.examples):
            return Axis.SHARED  # always exact: nothing is split by its rows
        if known in (None, Axis.BATCH) and rows == self.examples:
            return Axis.BATCH
        may_fold = known is Axis.FOLDED or (known is None and (self._trust_folds or self.examples == 1))
        if may_fold and rows > 0 and rows % self.examples == 0:
            return Axis.FOLDED
        raise UnsupportedUse(
            f"{key[1]} on {', '.join(key[0])}: an operand of shape {tuple(operand.shape)} does not carry the batch of "
            f"{self.examples} in dimension 0; reshape it to [batch, ...], or let the self-check verify its layout "
            "(layout=discreet.check(...).layout)."
        )

    def classify_size(self, names: tuple[str, ...], function: str, size: int) -> bool:
        """Whether the leading size of the use that was classified last (``expand``, ``repeat``) is the batch."""
        key = (names, function, self._meetings[names, function] - 1)
        known = self._layout.of(key, examples=self.examples) if self._layout is not None else None
        is_batch = size == self.examples and (known is None or known[0] is Axis.BATCH)
        found = Axis.BATCH if is_batch else Axis.SHARED
        self.axes[key] = (found,)
        return is_batch

    def settle(self, clipping: Clipping) -> dict[str, Tensor]:
        """Clip and sum: name -> ``sum_b factor_b G_b``, at least float32; the records are freed.

        Parameters that this microbatch did not use get zeros: they are part of every sum.
        """
        with full_precision():
            uses = self._uses()
            zeros_B = torch.zeros(self.examples, dtype=torch.float64, device=self.sink.device)
            norm_B = sum((use.norm2() for use in uses), zeros_B).sqrt()
            factor_B = drop_vanishing(clipping.factor(norm_B))
            bad_B = ~torch.isfinite(norm_B)
            bad = bad_B if bool(bad_B.any()) else None
            sums = zeros_like_sums(self.parameters)
            for use in uses:
                sums[use.name] += use.weighted_sum(factor_B, bad)
        self._records.clear()
        return sums

    def parameter_norms(self) -> dict[str, Tensor]:
        """Per-example norms of each used parameter by the fast route, name -> (B,). For the self-check."""
        with full_precision():
            return {use.name: use.norm2().sqrt() for use in self._uses()}

    def _uses(self) -> list[Uses]:
        """For each used parameter, its records with the position that it has among their sources."""
        grouped: dict[str, list[tuple[int, Record]]] = defaultdict(list)
        for record in self._records:
            for position, name in enumerate(record.derivation.names):
                grouped[name].append((position, record))
        return [Uses.of(name, grouped[name], self.examples) for name in self.parameters if name in grouped]


@dataclass(frozen=True)
class Uses:
    """All uses of one parameter in one microbatch: norm and sum of the per-example gradients that they add up to.

    Both are taken from the same numbers. An example whose uses cancel each other has a small norm, so no small factor;
    were its uses scaled and summed one by one, their rounding errors would pass the bound.

    Attributes:
        joined: one record that stands for all of them, when there is one; its derivation keeps norms.
    """

    name: str
    records: tuple[tuple[int, Record], ...]
    examples: int
    joined: Record | None

    @classmethod
    def of(cls, name: str, records: list[tuple[int, Record]], examples: int) -> Uses:
        """The uses of a parameter, joined when their forms allow it."""
        return cls(name, tuple(records), examples, _joined([record for _, record in records]))

    def norm2(self) -> Tensor:
        """Squared norms, shape (B,), float64."""
        if self.joined is not None:
            return self.joined.form.norm2()
        return torch.cat([total.norm2() for _, total in self._totals(None)])

    def weighted_sum(self, factor_B: Tensor, bad_B: Tensor | None) -> Tensor:
        """``sum_b factor_b G_b``, shaped as the parameter; marked examples are left out, whatever they hold."""
        if self.joined is not None:
            form = self.joined.form if bad_B is None else self.joined.form.without(bad_B)
            return self.joined.derivation.pull(form.weighted_sum(factor_B))[0]
        parts = (total.weighted_sum(factor_B[rows]) for rows, total in self._totals(bad_B))
        return functools.reduce(torch.add, parts)

    def _totals(self, bad_B: Tensor | None) -> Iterator[tuple[slice, Dense]]:
        """Instantiated gradients, all uses added, a few examples at a time."""
        largest = max(max(math.prod(r.form.shape), r.derivation.sources[at].numel()) for at, r in self.records)
        chunk = max(1, CHUNK_NUMBERS // max(1, largest))
        for start in range(0, self.examples, chunk):
            rows = slice(start, min(start + chunk, self.examples))
            pulled = (
                record.derivation.pull_each(record.form.rows(rows.start, rows.stop).per_example())[position]
                for position, record in self.records
            )
            total = Dense(functools.reduce(torch.add, pulled))
            yield rows, total if bad_B is None else total.without(bad_B[rows])


def sum_dtype(parameter: Tensor) -> torch.dtype:
    """Sums are float32 even for half-precision parameters."""
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32


def zeros_like_sums(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The clipped sum of no example."""
    return {name: torch.zeros(p.shape, dtype=sum_dtype(p), device=p.device) for name, p in parameters.items()}


def _joined(records: list[Record]) -> Record | None:
    """One record whose norm is the parameter's norm, or None when the uses must be instantiated and added."""
    head, *rest = records
    if not rest:
        return head if head.derivation.isometric else None
    if not all(record.derivation.identity for record in records):
        return None
    form = head.form
    for other in (record.form for record in rest):
        if isinstance(form, Dense) and isinstance(other, Dense):
            form = Dense(form.grad + other.grad)
        elif isinstance(form, Lookup) and isinstance(other, Lookup):  # noqa: SIM114 - each branch has its own type
            form = form.joined(other)
        elif isinstance(form, Outer) and isinstance(other, Outer) and form.transposed == other.transposed:
            form = form.joined(other)
        else:
            return None
    return Record(head.derivation, form.reduced())
