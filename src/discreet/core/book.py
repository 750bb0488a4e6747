"""What one backward pass books, and how it is settled into a clipped sum.

Every use of a guarded parameter books the per-example gradient of the value it used, as a `Form`. When the backward is
over, the records of each parameter give its per-example norm, all norms give the factors, and the factors give each
parameter's weighted gradient. Norms belong to the parameter and not to the use: a parameter used twice gets one norm,
cross terms included.

Shape legend: B = examples of the microbatch.
"""

from __future__ import annotations

import enum
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from discreet.core.clipping import Clipping
from discreet.core.forms import Dense, Form, Lookup, Outer
from discreet.errors import UnsupportedUse

_CHUNK_NUMBERS = 1 << 24


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
        first = next(iter(self.parameters.values()))
        self.sink = torch.zeros(examples, device=first.device, requires_grad=True)

    def name_of(self, parameter: Tensor) -> str:
        """The name under which a parameter is guarded."""
        try:
            return self._names[id(parameter)]
        except KeyError:
            raise UnsupportedUse(
                f"a guarded parameter of shape {tuple(parameter.shape)} does not belong to this model: it was copied or "
                "added after guarding; make the copy before training starts."
            ) from None

    def record(self, derivation: Derivation, form: Form) -> None:
        """Book one use; called from inside the backward."""
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
        expected = self._layout.axes.get(key) if self._layout is not None else None
        found = [
            self._axis(operand, known=expected[index] if expected and index < len(expected) else None, key=key)
            for index, operand in enumerate(operands)
        ]
        self.axes[key] = tuple(found)
        return found

    def _axis(self, operand: Tensor, *, known: Axis | None, key: UseKey) -> Axis:
        rows = operand.shape[0] if operand.dim() else 0
        carries = operand.requires_grad
        folds = carries and rows > 0 and rows % self.examples == 0
        if known is Axis.SHARED and not carries:
            return Axis.SHARED
        if known is Axis.FOLDED and folds:
            return Axis.FOLDED
        if known in (None, Axis.BATCH) and rows == self.examples:
            return Axis.BATCH
        if known is None and not carries:
            return Axis.SHARED
        if folds and known is None and (self._trust_folds or self.examples == 1):
            return Axis.FOLDED
        raise UnsupportedUse(
            f"{key[1]} on {', '.join(key[0])}: an operand of shape {tuple(operand.shape)} does not carry the batch of "
            f"{self.examples} in dimension 0; reshape it to [batch, ...], or let the self-check verify its layout "
            "(discreet.check)."
        )

    def classify_size(self, names: tuple[str, ...], function: str, size: int) -> bool:
        """Whether the leading size of the use that was classified last (``expand``, ``repeat``) is the batch."""
        key = (names, function, self._meetings[names, function] - 1)
        known = self._layout.axes.get(key) if self._layout is not None else None
        if known and self.examples > 1 and known[0] is Axis.BATCH and size != self.examples:
            raise UnsupportedUse(
                f"{function} on {', '.join(names)}: a leading size of {size} where the self-check saw the batch, "
                f"{self.examples}; expand to the batch size."
            )
        found = known[0] if known else (Axis.BATCH if size == self.examples else Axis.SHARED)
        self.axes[key] = (found,)
        return found is Axis.BATCH

    def norms(self) -> Tensor:
        """Per-example gradient norms over all parameters, shape (B,), float64. Never leaves `core`."""
        norm2_B = torch.zeros(self.examples, dtype=torch.float64, device=self.sink.device)
        for records in self._by_parameter():
            norm2_B += _norm2(records, self.examples).to(torch.float64)
        return norm2_B.sqrt()

    def settle(self, clipping: Clipping) -> dict[str, Tensor]:
        """Clip and sum: name -> ``sum_b factor_b G_b``, at least float32; the records are freed.

        Parameters that this microbatch did not use get zeros: they are part of every sum.
        """
        norm_B = self.norms()
        factor_B = clipping.factor(norm_B)
        bad_B = ~torch.isfinite(norm_B)
        any_bad = bool(bad_B.any())
        sums = {
            name: torch.zeros(parameter.shape, dtype=sum_dtype(parameter), device=parameter.device)
            for name, parameter in self.parameters.items()
        }
        for record in self._records:
            form = record.form.without(bad_B) if any_bad else record.form
            pulled = record.derivation.pull(form.weighted_sum(factor_B))
            for name, gradient in zip(record.derivation.names, pulled, strict=True):
                sums[name] += gradient.reshape(sums[name].shape)
        self._records.clear()
        return sums

    def example_gradients(self) -> dict[str, Tensor]:
        """Unclipped per-example gradients, name -> (B, *shape). For the self-check and tests; never leaves `core`."""
        gradients = {
            name: torch.zeros((self.examples, *parameter.shape), dtype=sum_dtype(parameter), device=parameter.device)
            for name, parameter in self.parameters.items()
        }
        for record in self._records:
            pulled = record.derivation.pull_each(record.form.per_example())
            for name, gradient in zip(record.derivation.names, pulled, strict=True):
                gradients[name] += gradient.reshape(gradients[name].shape)
        return gradients

    def parameter_norms(self) -> dict[str, Tensor]:
        """Per-example norms of each used parameter by the fast route, name -> (B,). For the self-check."""
        return {
            name: _norm2(records, self.examples).sqrt()
            for name, records in zip(self._used_names(), self._by_parameter(), strict=True)
        }

    def _used_names(self) -> list[str]:
        used = {name for record in self._records for name in record.derivation.names}
        return [name for name in self.parameters if name in used]

    def _by_parameter(self) -> list[list[tuple[int, Record]]]:
        """For each used parameter, its records with the position that it has among their sources."""
        grouped: dict[str, list[tuple[int, Record]]] = defaultdict(list)
        for record in self._records:
            for position, name in enumerate(record.derivation.names):
                grouped[name].append((position, record))
        return [grouped[name] for name in self._used_names()]


def sum_dtype(parameter: Tensor) -> torch.dtype:
    """Sums are float32 even for half-precision parameters."""
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32


def _norm2(records: list[tuple[int, Record]], examples: int) -> Tensor:
    """Squared norm of one parameter's per-example gradient, over all its uses together, shape (B,)."""
    joined = _joined(records)
    if joined is not None:
        return joined.norm2()
    chunk = max(1, _CHUNK_NUMBERS // max(math.prod(source_shape(records)), 1))
    parts = []
    for start in range(0, examples, chunk):
        stop = min(start + chunk, examples)
        total: Tensor | None = None
        for position, record in records:
            part = record.derivation.pull_each(record.form.rows(start, stop).per_example())[position]
            total = part if total is None else total + part
        assert total is not None
        parts.append(Dense(total).norm2())
    return torch.cat(parts)


def source_shape(records: list[tuple[int, Record]]) -> torch.Size:
    """Shape of the parameter that these records are about."""
    position, record = records[0]
    return record.derivation.sources[position].shape


def _joined(records: list[tuple[int, Record]]) -> Form | None:
    """The records as one form whose norm is the parameter's norm, or None when they must be instantiated and added."""
    if len(records) == 1:
        record = records[0][1]
        return record.form if record.derivation.isometric else None
    if not all(record.derivation.identity for _, record in records):
        return None
    forms = [record.form for _, record in records]
    head = forms[0]
    for form in forms[1:]:
        if isinstance(head, Outer) and isinstance(form, Outer) and head.transposed == form.transposed:
            head = head.joined(form)
        elif isinstance(head, Lookup) and isinstance(form, Lookup):
            head = head.joined(form)
        elif isinstance(head, Dense) and isinstance(form, Dense):
            head = Dense(head.grad + form.grad)
        else:
            return None
    return head
