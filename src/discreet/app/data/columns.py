"""How one column of a table becomes numbers: encodings made of public and released values only.

Shape legend: N = rows, F = features of this column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

_SUBDIVISIONS = 4
_OCTAVES = range(-20, 41)

_POSITIVE_EDGES = [2.0**octave * (1 + step / _SUBDIVISIONS) for octave in _OCTAVES for step in range(_SUBDIVISIONS)]
EDGES = np.array([-edge for edge in reversed(_POSITIVE_EDGES)] + _POSITIVE_EDGES)
"""Edges of the numeric buckets, public: four per octave, from 2**-20 to 2**41, on both sides of a bucket for zero."""

NOT_A_NUMBER = 0
_FIRST_NUMERIC = 1
BUCKETS = _FIRST_NUMERIC + len(EDGES) - 1
"""Buckets of a column: one for texts that are not numbers, then one per interval of `EDGES`."""

_WIDTHS = (1, 4, 16, 64)

NOTABLE = 5.0
"""Noisy counts below this many standard deviations of the noise are taken as empty (post-processing).

Among the 487 numeric buckets of a column, all empty, one passes 5 with probability 1.4e-4 (3.5: 0.11), and a single one
far out would stretch the range, and with it every value's scale, by orders of magnitude.
"""


def parse_number(text: str) -> float:
    """The finite number that a text stands for; NaN when it is none."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def bucket_of(numbers_N: np.ndarray, missing_N: np.ndarray) -> np.ndarray:
    """Bucket of each value, int64 in ``[-1, BUCKETS)``: -1 where missing, `NOT_A_NUMBER` where NaN."""
    inside_N = np.clip(np.nan_to_num(numbers_N), EDGES[0], np.nextafter(EDGES[-1], 0))
    index_N = _FIRST_NUMERIC + np.searchsorted(EDGES, inside_N, side="right") - 1
    index_N = np.where(np.isnan(numbers_N), NOT_A_NUMBER, index_N)
    return np.where(missing_N, -1, index_N).astype(np.int64)


@dataclass(frozen=True)
class NumberEncoding:
    """A number as its place in a range: linear, in signed logarithm, and by rank; then "is not zero" and "is missing".

    Values outside the range are clipped to it. A missing value is zero everywhere but in its flag.

    Attributes:
        low: lower end of the range, public or released.
        high: upper end; above ``low``.
        knots: (value, rank in [0, 1]) pairs of the released distribution, ascending; empty when the range is public.
    """

    low: float
    high: float
    knots: tuple[tuple[float, float], ...] = ()

    def encode(self, numbers_N: np.ndarray, missing_N: np.ndarray) -> np.ndarray:
        """Features, float32, shape (N, F), each in [-1, 1]."""
        absent_N = missing_N | np.isnan(numbers_N)
        value_N = np.clip(np.where(absent_N, self.low, numbers_N), self.low, self.high)
        places = [_place(value_N, self.low, self.high)]
        places.append(_place(_signed_log(value_N), _signed_log(np.array(self.low)), _signed_log(np.array(self.high))))
        if self.knots:
            values, ranks = zip(*self.knots, strict=True)
            places.append(2.0 * np.interp(value_N, values, ranks) - 1.0)
        places.append((value_N != 0).astype(np.float64))
        features = [np.where(absent_N, 0.0, place_N) for place_N in places]
        return np.stack([*features, absent_N.astype(np.float64)], axis=1).astype(np.float32)

    def to_json(self) -> dict[str, object]:
        """The record of this encoding in a saved run."""
        return {"as": "number", "min": self.low, "max": self.high, "knots": [list(knot) for knot in self.knots]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> NumberEncoding:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, of another type, or no finite ascending range.
        """
        low, high = float(record["min"]), float(record["max"])
        knots = tuple((float(value), float(rank)) for value, rank in record["knots"])
        places = [value for value, _ in knots]
        finite = all(math.isfinite(number) for knot in ((low, high), *knots) for number in knot)
        if not (finite and low < high and all(first < second for first, second in pairwise(places))):
            raise ValueError("a range must be finite and ascend")
        return cls(low=low, high=high, knots=knots)


@dataclass(frozen=True)
class CategoryEncoding:
    """One-hot over a list of names; then "another name" and "is missing".

    Attributes:
        names: public or released, distinct.
    """

    names: tuple[str, ...]

    def encode(self, values: Sequence[str], missing_N: np.ndarray) -> np.ndarray:
        """Features, float32, shape (N, F), 0 or 1."""
        index = {name: i for i, name in enumerate(self.names)}
        other, missing = len(self.names), len(self.names) + 1
        hot_N = np.fromiter((index.get(value, other) for value in values), dtype=np.int64, count=len(values))
        features_NF = np.zeros((len(values), missing + 1), dtype=np.float32)
        features_NF[np.arange(len(values)), np.where(missing_N, missing, hot_N)] = 1.0
        return features_NF

    def to_json(self) -> dict[str, object]:
        """The record of this encoding in a saved run."""
        return {"as": "category", "values": list(self.names)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> CategoryEncoding:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: the list is missing, or not of distinct texts.
        """
        names = tuple(record["values"])
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError("names must be distinct texts")
        return cls(names=names)


Encoding = NumberEncoding | CategoryEncoding
"""One way in which a column becomes features; a column may have both."""


def encoding_from_json(record: Mapping[str, Any]) -> Encoding:
    """The inverse of ``to_json`` of the two encodings.

    Raises:
        KeyError, TypeError, ValueError: not such a record.
    """
    kinds: Mapping[str, type[Encoding]] = {"number": NumberEncoding, "category": CategoryEncoding}
    return kinds[record["as"]].from_json(record)


def released_range(counts_K: np.ndarray, *, noise_std: float, least: float) -> NumberEncoding | None:
    """Range and ranks of a column from its noisy bucket counts; None when no bucket stands out of the noise.

    The range goes from the lowest to the highest bucket with rows in it, and ranks come from the share of each, as told
    by `_rows_per_bucket`. Post-processing of released counts.

    Args:
        counts_K: noisy counts, shape (BUCKETS,).
        noise_std: standard deviation of their noise, in rows.
        least: buckets of fewer rows are left out in any case; public.
    """
    rows_K = _rows_per_bucket(counts_K, noise_std=noise_std, least=least)
    kept = np.flatnonzero(rows_K)
    if len(kept) == 0:
        return None
    tiny = _POSITIVE_EDGES[0]
    low, high = float(EDGES[kept[0]]), float(EDGES[kept[-1] + 1])
    low, high = (0.0 if low == -tiny else low), (0.0 if high == tiny else high)
    if not low < high:
        return None
    knots: list[tuple[float, float]] = []
    rank = 0.0
    for bucket in kept:
        knots.append((float(EDGES[bucket]), rank))
        rank += float(rows_K[bucket] / rows_K.sum())
        knots.append((float(EDGES[bucket + 1]), rank))
    return NumberEncoding(low=low, high=high, knots=_strictly_ascending(knots))


def notable_numbers(counts_K: np.ndarray, *, noise_std: float, least: float) -> float:
    """Rows in the numeric buckets that stand out of the noise."""
    return float(_rows_per_bucket(counts_K, noise_std=noise_std, least=least).sum())


def is_numeric(counts_K: np.ndarray, *, noise_std: float, least: float) -> bool:
    """Whether more rows are told to be numbers than texts."""
    return notable_numbers(counts_K, noise_std=noise_std, least=least) > max(float(counts_K[NOT_A_NUMBER]), 0.0)


def _rows_per_bucket(counts_K: np.ndarray, *, noise_std: float, least: float) -> np.ndarray:
    """Rows of each numeric bucket as far as they stand out of the noise, 0 elsewhere; shape (BUCKETS - 1,).

    From fine to coarse: a window is taken when the rows in those of its buckets that no finer window explains stand
    out; they are then spread evenly over these. So thin tails join coarse windows, and a coarse window that is notable
    only because of a fine one inside it does not stretch the range.
    """
    numeric = counts_K[_FIRST_NUMERIC:]
    rows, explained = np.zeros(len(numeric)), np.zeros(len(numeric), dtype=bool)
    for width in _WIDTHS:
        for start, stop in _windows(width):
            free = start + np.flatnonzero(~explained[start:stop])
            if not len(free):
                continue
            found = float(numeric[free].sum())
            if found >= max(NOTABLE * noise_std * math.sqrt(len(free)), least, 1.0):
                rows[free] = found / len(free)
                explained[start:stop] = True
    return rows


def _windows(width: int) -> list[tuple[int, int]]:
    """Windows of ``width`` numeric buckets, aligned outward from the bucket of zero, which is always alone."""
    zero = len(_POSITIVE_EDGES) - 1
    above = [(start, min(start + width, 2 * zero + 1)) for start in range(zero + 1, 2 * zero + 1, width)]
    below = [(2 * zero + 1 - stop, 2 * zero + 1 - start) for start, stop in above]
    return [*below, (zero, zero + 1), *above]


def _strictly_ascending(knots: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Where two buckets touch, one knot is enough."""
    return tuple(knot for i, knot in enumerate(knots) if i == 0 or knot[0] > knots[i - 1][0])


def _place(value_N: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    return 2.0 * (value_N - low) / (high - low) - 1.0


def _signed_log(value_N: np.ndarray) -> np.ndarray:
    return np.sign(value_N) * np.log1p(np.abs(value_N))
