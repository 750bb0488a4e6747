"""How the uses of parameters in one microbatch are brought together: norms first, weighted sums once factors are known.

A part is one parameter with all its uses (`Uses`), many small parameters at once (`SmallUses`), the weights that meet
one position (`ProductUses`), or the parameters of linear maps that share an operand (`Crossed`). Parts give squared
norms, which add up, and one weighted sum a parameter.

Shape legend: B = examples of the microbatch, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import abc
import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from discreet.core.forms import CHUNK_NUMBERS, Dense, Form, Lookup, examples_at_a_time, wide, wide_dtype
from discreet.core.kernels import dispatch
from discreet.core.kernels.results import HARMLESS
from discreet.core.outer import Outer, going_over, gram_norm2, norm2_of_products
from discreet.core.route import Choice, Route
from discreet.core.tied import Tied

_SMALL, _SMALL_TOGETHER, _SMALL_AWAY = 4096, 1 << 16, 1 << 22
"""Numbers of a parameter that is settled together with others of its kind, and of as many per-example gradients as
there may be; on an accelerator, where a dozen launches for each take longer than a copy."""

Records = Sequence[tuple[int, "Record"]]
"""Records of one parameter, each with the position that the parameter has among the record's sources."""


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

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> Derivation:
        """The parameter itself."""
        return cls(names=(name,), sources=(parameter.detach(),), rebuild=_same, isometric=True, identity=True)

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


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Record:
    """One use: the per-example gradients of a value, how the value was made, and which route its norm takes.

    Attributes:
        versions: how often each tensor of the form had been changed in place when it was booked; none of joined uses.
    """

    derivation: Derivation
    form: Form
    choice: Choice | None
    versions: tuple[int, ...] = ()

    @classmethod
    def of(cls, derivation: Derivation, form: Form, choice: Choice | None) -> Record:
        """A use as it is booked."""
        return cls(derivation, form, choice, _versions(form))

    @property
    def changed(self) -> bool:
        """Whether what was booked is no longer what it was."""
        return self.versions != () and self.versions != _versions(self.form)


def _versions(form: Form) -> tuple[int, ...]:
    return tuple(map(operator.attrgetter("_version"), form.tensors))


class Part(abc.ABC):
    """One or more parameters whose norms are taken together."""

    @abc.abstractmethod
    def quick_norm2(self) -> Tensor:
        """Squared norms where a faster way is sure of them, NaN elsewhere; shape (B,), float64."""

    @abc.abstractmethod
    def norm2(self) -> Tensor:
        """Squared norms, shape (B,), float64."""

    def doubted_norm2(self) -> Tensor:
        """Squared norms for where that way is not, as of a `Form`."""
        return self.norm2()

    @abc.abstractmethod
    def summands(self) -> Sequence[Summand]:
        """What is summed one after the other, so that the tensors of each are freed before the next sum is made."""


class Summand(Part):
    """A part whose sums are taken together too."""

    def summands(self) -> Sequence[Summand]:
        return [self]

    @abc.abstractmethod
    def weighted_sums(self, factor_B: Tensor, bad_B: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """For each parameter its name and ``sum_b factor_b G_b``; marked examples are left out, whatever they hold."""


def arranged(names: Sequence[str], records: Mapping[str, Records], examples: int, at_most: int) -> list[Part]:
    """The parts that these parameters make; those without a record are left out."""
    every = [Uses.of(name, records[name], examples, at_most) for name in names if name in records]
    small: dict[torch.dtype, list[tuple[Uses, Tensor]]] = defaultdict(list)
    products: dict[torch.dtype, list[Uses]] = defaultdict(list)
    by_input: dict[object, list[Uses]] = defaultdict(list)
    by_grad: dict[object, list[Uses]] = defaultdict(list)
    rest: list[Part] = []
    for use in every:
        if (grad := use.small) is not None:
            small[wide_dtype(grad)].append((use, grad))
        elif (outer := use.by_product) is not None:
            products[wide_dtype(outer.grad)].append(use)
        elif (outer := use.by_gram) is not None:
            by_input[identity_of(outer.input)].append(use)
        else:
            rest.append(use)
    for group in [group for group in by_input.values() if len(group) == 1]:
        outer = group[0].by_gram
        assert outer is not None
        del by_input[identity_of(outer.input)]
        by_grad[identity_of(outer.grad)] += group
    shared = [*by_input.values(), *by_grad.values()]
    for kind, groups in ((Crossed, shared), (ProductUses, products.values())):
        rest += [kind(tuple(group)) if len(group) > 1 else group[0] for group in groups]
    return rest + [SmallUses(*zip(*group, strict=True)) if len(group) > 1 else group[0][0] for group in small.values()]


def identity_of(operand: Tensor) -> tuple[object, ...]:
    """Where the numbers of a tensor lie, and how: equal for two tensors that are the same numbers while both live."""
    return (operand.data_ptr(), operand.shape, operand.stride(), operand.dtype)


@dataclass(frozen=True)
class Uses(Summand):
    """All uses of one parameter in one microbatch: norm and sum of the per-example gradients that they add up to.

    Both are taken from the same numbers. An example whose uses cancel each other has a small norm, so no small factor;
    were its uses scaled and summed one by one, their rounding errors would pass the bound.

    Attributes:
        at_most: the most examples that there may be: how norms are taken must not hang on how many there are.
        joined: one record that stands for all of them, when there is one; its derivation keeps norms.
    """

    name: str
    records: tuple[tuple[int, Record], ...]
    examples: int
    at_most: int
    joined: Record | None

    @classmethod
    def of(cls, name: str, records: Records, examples: int, at_most: int) -> Uses:
        """The uses of a parameter, joined when their forms allow it, or when what they add up to is small."""
        uses = cls(name, tuple(records), examples, at_most, _joined([record for _, record in records]))
        if uses.joined is None and at_most <= uses._chunk():
            ((_, total),) = uses._totals(None)
            return replace(uses, joined=Record(Derivation.of(name, records[0][1].derivation.sources[0]), total, None))
        return uses

    @property
    def by_gram(self) -> Outer | None:
        """The operands, when the norm of this parameter alone would be taken from two Gram matrices."""
        outer = self._outer
        return outer if outer is not None and outer.choice.route is Route.GRAM and outer.input.shape[1] == 1 else None

    @property
    def by_product(self) -> Outer | None:
        """The operands, when there is one position: the norm is a product of norms."""
        outer = self._outer
        return outer if outer is not None and outer.choice.route is Route.PRODUCT else None

    @property
    def _outer(self) -> Outer | None:
        joined = self.joined
        if joined is None or not joined.derivation.identity or not isinstance(joined.form, Outer):
            return None
        return joined.form

    def quick_norm2(self) -> Tensor:
        return self.norm2() if self.joined is None else self.joined.form.quick_norm2()

    def doubted_norm2(self) -> Tensor:
        return self.norm2() if self.joined is None else self.joined.form.doubted_norm2()

    def norm2(self) -> Tensor:
        if self.joined is not None:
            return self.joined.form.norm2()
        return torch.cat([total.norm2() for _, total in self._totals(None)])

    def gram(self) -> Tensor:
        """Inner products between the gradients of the examples, (B, B)."""
        if self.joined is not None:
            return self.joined.form.gram()
        return Dense(torch.cat([total.per_example() for _, total in self._totals(None)])).gram()

    @property
    def small(self) -> Tensor | None:
        """The gradients, (B, *shape), where this is a vector or a scalar as it stands: a bias, a scale, a token."""
        joined = self.joined
        if joined is None or not joined.derivation.identity or not isinstance(joined.form, Dense):
            return None
        grad = joined.form.grad
        most = _SMALL_TOGETHER if grad.device.type == "cpu" else _SMALL_AWAY
        return grad if math.prod(grad.shape[1:]) <= min(_SMALL, most // self.at_most) else None

    def weighted_sums(self, factor_B: Tensor, bad_B: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        yield self.name, self._weighted_sum(factor_B, bad_B)

    def _weighted_sum(self, factor_B: Tensor, bad_B: Tensor | None) -> Tensor:
        if self.joined is not None:
            form = self.joined.form if bad_B is None else self.joined.form.without(bad_B)
            return self.joined.derivation.pull(form.weighted_sum(factor_B))[0]
        parts = (total.weighted_sum(factor_B[rows]) for rows, total in self._totals(bad_B))
        return functools.reduce(torch.add, parts)

    def _totals(self, bad_B: Tensor | None) -> Iterator[tuple[slice, Dense]]:
        """Instantiated gradients, all uses added, a few examples at a time."""
        chunk = self._chunk()
        for start in range(0, self.examples, chunk):
            rows = slice(start, min(start + chunk, self.examples))
            pulled = (
                record.derivation.pull_each(record.form.rows(rows.start, rows.stop).per_example())[position]
                for position, record in self.records
            )
            total = Dense(functools.reduce(torch.add, pulled))
            yield rows, total if bad_B is None else total.without(bad_B[rows])

    def _chunk(self) -> int:
        """How many examples may be instantiated at once."""
        largest = max(max(math.prod(r.form.shape), r.derivation.sources[at].numel()) for at, r in self.records)
        return max(1, CHUNK_NUMBERS // max(1, largest))


@dataclass(frozen=True)
class SmallUses(Summand):
    """Many small parameters as one: a few large operations instead of many small ones.

    Attributes:
        grads: of each, its `Uses.small`.
    """

    uses: tuple[Uses, ...]
    grads: tuple[Tensor, ...]

    @functools.cached_property
    def _together(self) -> Dense:
        return Dense(torch.cat([wide(grad).reshape(grad.shape[0], -1) for grad in self.grads], 1))

    def quick_norm2(self) -> Tensor:
        return self._together.norm2()

    def norm2(self) -> Tensor:
        return self._together.norm2()

    def weighted_sums(self, factor_B: Tensor, bad_B: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        form = self._together if bad_B is None else self._together.without(bad_B)
        sums = form.weighted_sum(factor_B).split([grad[0].numel() for grad in self.grads])
        for use, grad, total in zip(self.uses, self.grads, sums, strict=True):
            yield use.name, total.reshape(grad.shape[1:])


@dataclass(frozen=True)
class ProductUses(Part):
    """Many linear maps with one position each: the numbers of all their norms at once."""

    uses: tuple[Uses, ...]

    def quick_norm2(self) -> Tensor:
        return self._norm2(wide)

    def norm2(self) -> Tensor:
        """Together too: what is out of reach together would come back into it, each by itself."""
        return self._norm2(torch.Tensor.double)

    def _norm2(self, convert: Callable[[Tensor], Tensor]) -> Tensor:
        outers = [outer for use in self.uses if (outer := use.by_product) is not None]
        inputs = [convert(outer.input.squeeze(2)) for outer in outers]
        grads = [convert(outer.grad.squeeze(2)) for outer in outers]
        return norm2_of_products(inputs, grads, summed=wide_dtype(outers[0].grad))

    def summands(self) -> Sequence[Summand]:
        return self.uses


@dataclass(frozen=True)
class Crossed(Part):
    """Linear maps of one input, such as query, key and value, or with one output gradient, such as an LSTM's two.

    ``sum_p <X X^T, G_p G_p^T> = <X X^T, sum_p G_p G_p^T>``: the Gram matrix of what they share is computed once.
    """

    uses: tuple[Uses, ...]

    def _operands(self) -> tuple[list[Tensor], list[Tensor]]:
        outers = [outer for use in self.uses if (outer := use.by_gram) is not None]
        if len({identity_of(outer.input) for outer in outers}) == 1:
            return [outers[0].input], [outer.grad for outer in outers]  # one for each use: two may share both operands
        assert len({identity_of(outer.grad) for outer in outers}) == 1
        return [outer.input for outer in outers], [outers[0].grad]

    def quick_norm2(self) -> Tensor:
        return self._quick_norm2(HARMLESS)

    def doubted_norm2(self) -> Tensor:
        hidden_B = functools.reduce(torch.add, (outer.hidden2() for use in self.uses if (outer := use.by_gram)))
        return going_over(self._quick_norm2(math.inf), self.norm2(), hidden_B)

    def _quick_norm2(self, harmless: float) -> Tensor:
        inputs, grads = self._operands()
        if dispatch.suit(*inputs, *grads):
            return dispatch.gram_norm2(inputs, grads, harmless=harmless)
        return self.norm2() if inputs[0].is_cpu else self._norm2(wide, harmless)

    def norm2(self) -> Tensor:
        return self._norm2(torch.Tensor.double, HARMLESS)

    def _norm2(self, convert: Callable[[Tensor], Tensor], harmless: float) -> Tensor:
        inputs, grads = self._operands()
        summed = wide_dtype(grads[0])
        examples, _, positions, _ = inputs[0].shape
        chunk = examples_at_a_time(2 * positions**2)
        parts = []
        for start in range(0, examples, chunk):
            some = slice(start, start + chunk)
            operands = ([convert(value[some]) for value in values] for values in (inputs, grads))
            parts.append(gram_norm2(*operands, summed=summed, harmless=harmless))
        return torch.cat(parts)

    def summands(self) -> Sequence[Summand]:
        return self.uses


def zeros_like_sums(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The clipped sum of no example: float32 even for half-precision parameters."""
    return {name: torch.zeros(p.shape, dtype=wide_dtype(p), device=p.device) for name, p in parameters.items()}


def _joined(records: list[Record]) -> Record | None:
    """One record whose norm is the parameter's norm, or None when the uses must be instantiated and added."""
    head, *rest = records
    if not rest:
        return head if head.derivation.isometric else None
    if not all(record.derivation.identity for record in records):
        return None
    merged: dict[type[Form], Form] = {}
    for form in (record.form for record in records):
        kind = type(form)
        together = merged[kind].joined(form) if kind in merged else form
        if together is None:
            return None
        merged[kind] = together
    form = _added(list(merged.values()))
    return None if form is None else Record(head.derivation, form.reduced(), head.choice)


def _added(forms: list[Form]) -> Form | None:
    """One form for the sum of two or more of different kinds, or None when only instantiating would tell."""
    if len(forms) == 1:
        return forms[0]
    by_kind = {type(form): form for form in forms}
    dense = by_kind.pop(Dense, None)
    if isinstance(dense, Dense):
        total = wide(dense.grad) if dense.scratch else wide(dense.grad).clone()
        for form in by_kind.values():
            form.add_per_example(total)
        return Dense(total, scratch=True)
    lookup, outer = by_kind.get(Lookup), by_kind.get(Outer)
    if len(forms) == 2 and isinstance(lookup, Lookup) and isinstance(outer, Outer) and outer.input.shape[1] == 1:
        return Tied(lookup, outer)
    return None
