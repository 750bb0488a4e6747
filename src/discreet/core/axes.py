"""How operands carry the examples, use by use: what the self-check establishes, and training relies on."""

from __future__ import annotations

import enum
import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from discreet.errors import UnsupportedUse


class Axis(enum.Enum):
    """How a plain operand of a use carries the examples, from the most to the least particular.

    BATCH: dimension 0 is B. SECOND: dimension 1 is B, as in (time, B, ...). GIVEN: dimension 0 is a multiple of B, and
    its rows lie in the memory of the batch's own tensors. FOLDED: dimension 0 is a multiple of B by the check's word.
    ROUTED: rows were picked from such an operand, and the graph tells which. SHARED: the same for all examples; nothing
    is split by its rows.
    """

    BATCH = "batch"
    SECOND = "second"
    GIVEN = "given"
    FOLDED = "folded"
    ROUTED = "routed"
    SHARED = "shared"


UseKey = tuple[tuple[str, ...], str, int]
"""(parameters, function, how many times they met before in this forward)."""


@dataclass(frozen=True)
class Layout:
    """For every use, how its operands carry the examples; established by the self-check at two batch sizes."""

    axes: Mapping[UseKey, tuple[Axis, ...]]

    @functools.cached_property
    def _seen(self) -> Mapping[tuple[tuple[str, ...], str], list[tuple[Axis, ...]]]:
        seen: dict[tuple[tuple[str, ...], str], list[tuple[Axis, ...]]] = defaultdict(list)
        for (names, function, _), axes in self.axes.items():
            seen[names, function].append(axes)
        return seen

    def of(self, key: UseKey, *, examples: int) -> tuple[Axis, ...] | None:
        """How this use carries the examples; one more of a kind is taken to be like all those that were seen.

        Raises:
            UnsupportedUse: nothing like it was seen, so that a size equal to B could be a coincidence.
        """
        if key in self.axes:
            return self.axes[key]
        names, function, _ = key
        alike = set(self._seen.get((names, function), ()))
        if len(alike) == 1:
            return alike.pop()
        if examples == 1:
            return None
        raise UnsupportedUse(
            f"{function} on {', '.join(names)}: the self-check never saw this use, so its layout is unknown; pass "
            "layout=discreet.check(...).layout of examples that take every path through the model."
        )

    def _is_mixed(self, names: tuple[str, ...], function: str) -> bool:
        """Whether such uses met the batch at one time and a constant at another: only their order tells them apart."""
        seen = self._seen.get((names, function), [])
        return len({len(axes) for axes in seen}) > 1 or any(
            Axis.SHARED in column and set(column) != {Axis.SHARED} for column in zip(*seen, strict=False)
        )

    def check_counts(self, met: Mapping[tuple[tuple[str, ...], str], int]) -> None:
        """Refuse mixed uses that met another number of times than they were seen to: a constant may have B rows.

        Raises:
            UnsupportedUse: there are some.
        """
        for (names, function), seen in self._seen.items():
            count = met.get((names, function), 0)
            if count not in (0, len(seen)) and self._is_mixed(names, function):
                raise UnsupportedUse(
                    f"{function} on {', '.join(names)}: met {count} times, and {len(seen)} times in the self-check, "
                    "which told the batch from a constant by their order; meet them equally often in every step."
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
    return max(one, other, key=list(Axis).index)
