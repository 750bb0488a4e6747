"""Private counts: how many rows fall into each bucket, and which names are common enough to be told.

One query on all rows at once. Every column lets each row count in at most one place: a bucket of a public list
(`Buckets`), or its own name, out of an open set that is not known beforehand (`Names`). So a row moves the stacked
vector of all counts by at most ``sqrt(number of columns)``, whatever it holds: the bound comes from the shape of the
input, and there is nothing to clip.

Shape legend: N = rows, K = buckets of a column.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from discreet.core.clipping import ClippedSum
from discreet.core.noise import Released, release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError

MAX_NAME_LENGTH = 100
"""A longer name counts nowhere, so that memory and released text stay bounded."""

_PRESENCE_FRACTION = 0.1
"""Names rarer than this fraction of the threshold get no draw: it saves time on columns of unique values."""


@dataclass(frozen=True)
class Buckets:
    """One column over a public list of buckets.

    Attributes:
        index_N: bucket of each row, integers in ``[-1, size)``; -1: the row counts nowhere in this column.
        size: number of buckets K, public.
    """

    index_N: np.ndarray
    size: int


@dataclass(frozen=True)
class Names:
    """One column over an open set of names.

    Attributes:
        value_N: name of each row; None (or longer than `MAX_NAME_LENGTH`): the row counts nowhere in this column.
    """

    value_N: Sequence[str | None]


@dataclass(frozen=True)
class Counts:
    """Released counts; post-processing of them costs nothing.

    Attributes:
        buckets: column -> noisy counts, float64, shape (K,); may be negative.
        names: column -> {name: noisy count}, the names at or above the threshold only, sorted by name.
        noise_std: standard deviation of the noise in every count, in rows.
        threshold: the noisy count from which on a name is told, in rows.
        private: False when there was no noise, or when the noise came from a test seed.
    """

    buckets: Mapping[str, np.ndarray]
    names: Mapping[str, Mapping[str, float]]
    noise_std: float
    threshold: float
    private: bool


@dataclass(frozen=True)
class Threshold:
    """A name is told when ``count >= presence`` before the noise, and ``count + noise >= value`` after it (in rows)."""

    presence: int
    value: float


def private_counts(
    *,
    buckets: Mapping[str, Buckets],
    names: Mapping[str, Names],
    examples: int,
    noise_multiplier: float,
    delta: float,
    source: NoiseSource,
) -> Counts:
    """Count all columns in one Gaussian query, and tell the names whose noisy count passes a threshold.

    **Guarantees.** One Gaussian query of noise multiplier sigma on the stacked counts (sensitivity ``sqrt(C)`` for C
    columns), plus ``delta`` for the names when one row is added or removed (twice that when one is replaced), under
    adaptive composition: account it as ``Gaussian(noise_multiplier)`` and ``Selection(delta)``. Noise is a function of
    the name and not of its place, so the order of rows or of a dictionary tells nothing.

    Why delta suffices: docs/proofs/private_counts.md (after Korolova et al., WWW 2009).

    Args:
        buckets: column -> buckets of its rows.
        names: column -> names of its rows.
        examples: number of rows N; every column must have exactly that many.
        noise_multiplier: sigma >= 0. Zero counts exactly, tells every name, and is marked not private.
        delta: probability given to the telling of names; needed when there are names and sigma > 0.
        source: the keyed stream; one position is claimed.

    Raises:
        ConfigError: a column has another length or an index outside its buckets, or sigma or delta is out of range.
    """
    sensitivity = math.sqrt(len(buckets) + len(names))
    threshold = selection_threshold(noise_std=noise_multiplier * sensitivity, names_per_row=len(names), delta=delta)
    total = _bounded_counts(buckets=buckets, names=names, examples=examples, presence=threshold.presence)
    assert total.sensitivity == sensitivity
    released = release(total, noise_multiplier=noise_multiplier, source=source)
    return Counts(
        buckets={column: released.tensors[_bucket_key(i)].numpy() for i, column in enumerate(buckets)},
        names={column: _told(released, column=i, threshold=threshold) for i, column in enumerate(names)},
        noise_std=released.noise_std,
        threshold=threshold.value,
        private=released.private,
    )


def selection_threshold(*, noise_std: float, names_per_row: int, delta: float) -> Threshold:
    """The threshold at which any of a row's own names is told with probability at most ``1 - exp(-delta)``.

    With m names per row, ``z = Q^-1((1 - exp(-delta)) / m)`` and ``s`` the noise: names need a true count of
    ``k = 1 + floor(s z / 10)`` to get a draw at all, and a noisy count of ``tau = k + s z`` to be told. Both numbers
    are public.

    Args:
        noise_std: s, in rows.
        names_per_row: m, the number of columns of names.
        delta: in (0, 1), or anything when m or s is 0.
    """
    if names_per_row == 0 or noise_std == 0:
        return Threshold(presence=1, value=1.0)
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta={delta} for telling names: must be in (0, 1); give a share of the total delta, e.g. 5%."
        )
    tail = -math.expm1(-delta) / names_per_row
    margin = noise_std * -NormalDist().inv_cdf(tail) * (1 + 1e-9)
    presence = 1 + math.floor(_PRESENCE_FRACTION * max(margin, 0.0))
    return Threshold(presence=presence, value=presence + max(margin, 0.0))


def _bounded_counts(
    *, buckets: Mapping[str, Buckets], names: Mapping[str, Names], examples: int, presence: int = 1
) -> ClippedSum:
    """Counts of all buckets, and of the names that at least ``presence`` rows hold (memory stays small)."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (column, dense) in enumerate(buckets.items()):
        _check_length(column, len(dense.index_N), examples)
        tensors[_bucket_key(i)] = torch.from_numpy(_bucket_counts(column, dense))
    for i, (column, named) in enumerate(names.items()):
        _check_length(column, len(named.value_N), examples)
        counter = Counter(value for value in named.value_N if value is not None and _is_countable(value))
        for name in sorted(name for name, count in counter.items() if count >= presence):
            tensors[_name_prefix(i) + name] = torch.tensor([counter[name]], dtype=torch.float64, device="cpu")
    columns = len(buckets) + len(names)
    if columns == 0:
        raise ConfigError("0 columns to count: needs at least 1; skip the query when the schema covers every column.")
    return ClippedSum(tensors=tensors, sensitivity=math.sqrt(columns))


def _bucket_counts(column: str, dense: Buckets) -> np.ndarray:
    index_N = np.asarray(dense.index_N)
    if index_N.dtype.kind not in "iu" or index_N.ndim != 1 or dense.size < 1:
        raise ConfigError(f"column '{column}': bucket indices must be one row of integers with size >= 1; see Buckets.")
    if len(index_N) and (index_N.min() < -1 or index_N.max() >= dense.size):
        raise ConfigError(f"column '{column}': a bucket index is outside [-1, {dense.size}); clamp the indices first.")
    return np.bincount(index_N[index_N >= 0], minlength=dense.size).astype(np.float64)


def _check_length(column: str, length: int, examples: int) -> None:
    if length != examples:
        raise ConfigError(
            f"column '{column}' has {length} rows: must be {examples}, one per example; use None or -1 for gaps."
        )


def _is_countable(value: str) -> bool:
    """Short enough, and valid Unicode: a lone surrogate has no bytes to label its noise with."""
    return len(value) <= MAX_NAME_LENGTH and not any("\ud800" <= character <= "\udfff" for character in value)


def _bucket_key(column: int) -> str:
    return f"buckets|{column}"


def _name_prefix(column: int) -> str:
    return f"names|{column}|"


def _told(released: Released, *, column: int, threshold: Threshold) -> dict[str, float]:
    prefix = _name_prefix(column)
    noisy = {key[len(prefix) :]: float(value) for key, value in released.tensors.items() if key.startswith(prefix)}
    return {name: noisy[name] for name in sorted(noisy) if noisy[name] >= threshold.value}
