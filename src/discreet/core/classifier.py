"""How each operand of a use carries the examples: told when it is met, by what the self-check saw, or refused."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from discreet.core.axes import Axis, Layout, UseKey
from discreet.core.routing import Given, Picking
from discreet.errors import UnsupportedUse


class Classifier:
    """Counts the uses of one forward, and classifies their operands.

    Args:
        examples: B.
        layout: what the self-check established. Without it an operand whose dimension 0 is a multiple of B is refused.
        trust_folds: accept such operands as (B, k) rows; only the self-check may, because it then compares the norms.
        batch: what the data set gave; views of its tensors need nobody's word for whose their rows are.
    """

    def __init__(self, *, examples: int, layout: Layout | None, trust_folds: bool, batch: Any) -> None:
        self.examples = examples
        self.axes: dict[UseKey, tuple[Axis, ...]] = {}
        self.kind = ""
        self.verified = layout
        self.trusts = trust_folds
        self._given = Given(batch, examples)
        self._meetings: dict[tuple[tuple[str, ...], str], int] = defaultdict(int)

    def layout(self) -> Layout:
        """How the uses so far carry the examples."""
        return Layout(dict(self.axes))

    def classify(
        self,
        names: tuple[str, ...],
        function: str,
        operands: list[Tensor],
        *,
        may_be_second: bool = False,
        pickings: Mapping[int, Picking] | None = None,
        may_be_routed: bool = False,
    ) -> list[Axis]:
        """How each plain operand of this use carries the examples; dimension 1 only once the self-check compared norms.

        Raises:
            UnsupportedUse: an activation whose dimension 0 is neither B nor a verified multiple of B, or a use that
                the self-check saw in another layout.
        """
        key, expected = self.next_use(names, function)
        found = []
        for index, operand in enumerate(operands):
            known = expected[index] if expected and index < len(expected) else None
            picking = (pickings or {}).get(id(operand))
            allowed = may_be_routed and operand.dim() == 2
            if picking is not None and self._is_routed(picking, known=known, key=key, allowed=allowed):
                found.append(Axis.ROUTED)
            else:
                found.append(self._axis(operand, known=known, key=key, may_be_second=may_be_second))
        self.axes[key] = tuple(found)
        return found

    def next_use(self, names: tuple[str, ...], function: str) -> tuple[UseKey, tuple[Axis, ...] | None]:
        """The key of the use that comes now, and how the self-check saw it. Compiled uses are counted by themselves."""
        function = self.kind + function
        ordinal = self._meetings[names, function]
        self._meetings[names, function] += 1
        key = (names, function, ordinal)
        return key, self.verified.of(key, examples=self.examples) if self.verified is not None else None

    @contextlib.contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """Count the uses inside under keys of their own."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def meets_again(
        self, uses: Sequence[tuple[tuple[str, ...], str, tuple[Axis, ...] | None, tuple[Axis, ...]]]
    ) -> bool:
        """Count uses that were classified before, in a trace, if the layout sees each of them as it did then.

        Args:
            uses: of each, the parameters, the function, how the layout saw it in the trace, and how it was taken.
        """
        ordinals = self._meetings.copy()
        found = {}
        for names, function, known, taken in uses:
            key, now = self.next_use(names, function)
            if now != known:
                self._meetings = ordinals
                return False
            found[key] = taken
        self.axes.update(found)
        return True

    def _is_routed(self, picking: Picking, *, known: Axis | None, key: UseKey, allowed: bool) -> bool:
        """Whether picked rows are to be met by their owners; rows picked in the batch's own order need not be.

        Raises:
            UnsupportedUse: the function has no rule for picked rows, or whose they are is not known or not verified.
        """
        from_batch = picking.source_rows == self.examples
        in_order = picking.in_order(self.examples)
        if in_order and known is not Axis.ROUTED and (from_batch or not allowed):
            return False
        verified = known in (Axis.ROUTED, Axis.FOLDED) or (from_batch and known in (None, Axis.BATCH))
        guessed = known is None and (self.trusts or self.examples == 1)
        if allowed and picking.owner is not None and (verified or guessed):
            return True
        raise UnsupportedUse(
            f"{key[1]} on {', '.join(key[0])}: its rows were picked from the batch, and whose they are is not certain; "
            "pick them from [batch * positions, features] right before linear or grouped_mm, and pass "
            "layout=discreet.check(...).layout."
        )

    def _axis(self, operand: Tensor, *, known: Axis | None, key: UseKey, may_be_second: bool) -> Axis:
        rows = operand.shape[0] if operand.dim() else 0
        if may_be_second and operand.dim() >= 2 + operand.is_floating_point() and operand.shape[1] == self.examples:
            guessed = known is None and self.trusts and self.examples not in (1, rows)
            if known is Axis.SECOND or guessed:
                return Axis.SECOND
        strange = rows != self.examples and (known is not Axis.BATCH or self.trusts or self.examples == 1)
        if not operand.requires_grad and strange and known in (None, Axis.GIVEN) and self._given.in_order(operand):
            return Axis.GIVEN
        if not operand.requires_grad and (known is Axis.SHARED or strange):
            return Axis.SHARED  # always exact: nothing is split by its rows
        if known in (None, Axis.BATCH) and rows == self.examples:
            return Axis.BATCH
        may_fold = known is Axis.FOLDED or (known is None and (self.trusts or self.examples == 1))
        if may_fold and rows > 0 and rows % self.examples == 0:
            return Axis.FOLDED
        raise UnsupportedUse(
            f"{key[1]} on {', '.join(key[0])}: an operand of shape {tuple(operand.shape)} does not carry the batch of "
            f"{self.examples} in dimension 0; reshape it to [batch, ...], or let the self-check verify its layout "
            "(layout=discreet.check(...).layout)."
        )

    def classify_size(self, names: tuple[str, ...], function: str, size: int) -> bool:
        """Whether the leading size of the use that was classified last (``expand``, ``repeat``) is the batch."""
        function = self.kind + function
        key = (names, function, self._meetings[names, function] - 1)
        known = self.verified.of(key, examples=self.examples) if self.verified is not None else None
        is_batch = size == self.examples and (known is None or known[0] is Axis.BATCH)
        self.axes[key] = (Axis.BATCH if is_batch else Axis.SHARED,)
        return is_batch
