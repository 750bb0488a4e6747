"""A set of queries in one canonical form, which is what is composed: counts merged, order forgotten.

Symbols as in `discreet.privacy.queries`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from discreet.errors import ConfigError
from discreet.privacy.gdp import step_mu
from discreet.privacy.queries import (
    SMALLEST_NOISE,
    Gaussian,
    HeldOut,
    Query,
    Repeated,
    SampledGaussian,
    Selection,
    TruncatedGaussian,
)
from discreet.privacy.repetitions import Repetitions


@dataclass(frozen=True)
class Summary:
    """A set of queries in one canonical form, so that equal sets give equal bits.

    Attributes:
        sampled: distinct (q, sigma) with q < 1 and count > 0, sorted.
        gaussian_mu: ``sqrt(sum n / sigma^2)`` over all queries that are not sampled (their composition is exact).
        selection_delta: sum of the `Selection` deltas.
        noiseless: some query has sigma 0, or less than `SMALLEST_NOISE`.
        truncated: distinct queries on truncated batches, count > 0, sorted.
        repeated: searches, each with its run in canonical form, sorted.
        held_out: (part, mu) of the queries on parts of their own, sorted.
    """

    sampled: tuple[SampledGaussian, ...]
    gaussian_mu: float
    selection_delta: float
    noiseless: bool
    truncated: tuple[TruncatedGaussian, ...] = ()
    repeated: tuple[tuple[Summary, Repetitions], ...] = ()
    held_out: tuple[tuple[str, float], ...] = ()

    @property
    def empty(self) -> bool:
        """No noisy query at all."""
        return not (self.steps or self.gaussian_mu or self.noiseless or self.repeated or self.held_out)

    @property
    def steps(self) -> tuple[SampledGaussian | TruncatedGaussian, ...]:
        """All queries on random batches."""
        return (*self.sampled, *self.truncated)

    @property
    def limit_mu(self) -> float:
        """GDP parameter in the central limit; see `step_mu`. Cuts, searches and parts of their own are left out."""
        steps = (q.count * step_mu(q.sample_rate, noise_multiplier=q.noise_multiplier) ** 2 for q in self.steps)
        return math.sqrt(self.gaussian_mu**2 + math.fsum(steps))

    @property
    def rest(self) -> Summary:
        """Without the queries on parts of their own."""
        return replace(self, held_out=())

    @property
    def parts(self) -> tuple[Summary, ...]:
        """The queries of each part of its own, as if they were all there is."""
        return tuple(
            Summary(sampled=(), gaussian_mu=mu, selection_delta=0.0, noiseless=False) for _, mu in self.held_out
        )

    def joined(self, part: Summary) -> Summary:
        """With the queries of a part as if they were made on all examples."""
        return replace(self.rest, gaussian_mu=math.hypot(self.gaussian_mu, part.gaussian_mu))


def summarise(queries: Sequence[Query]) -> Summary:
    """Bring a set of queries to canonical form: counts merged, order forgotten, q = 1 taken as not sampled."""
    counts: Counter[tuple[float, float]] = Counter()
    truncated: Counter[tuple[int, float, int, float]] = Counter()
    selections: list[float] = []
    repeated: list[tuple[Summary, Repetitions]] = []
    held_out: Counter[tuple[str, float]] = Counter()
    for query in queries:
        if isinstance(query, Selection):
            selections.append(query.delta)
        elif isinstance(query, Repeated):
            repeated.append((summarise(query.run), query.repetitions))
        elif isinstance(query, TruncatedGaussian):
            kind = (query.examples, float(query.sample_rate), query.largest_batch, float(query.noise_multiplier))
            truncated[kind] += query.count
        elif isinstance(query, HeldOut):
            held_out[query.part, float(query.noise_multiplier)] += query.count
        elif isinstance(query, Gaussian):
            counts[1.0, float(query.noise_multiplier)] += query.count
        elif isinstance(query, SampledGaussian):
            counts[float(query.sample_rate), float(query.noise_multiplier)] += query.count
        else:
            raise ConfigError(f"query of type {type(query).__name__}: must be one of {_names()}.")
    present = sorted((rate, sigma, count) for (rate, sigma), count in counts.items() if count > 0)
    cut = [TruncatedGaussian(*kind, count) for kind, count in sorted(truncated.items()) if count > 0]
    noiseless = (
        any(sigma < SMALLEST_NOISE for _, sigma, _ in present)
        or any(query.noise_multiplier < SMALLEST_NOISE for query in cut)
        or any(run.noiseless for run, _ in repeated)
        or any(sigma < SMALLEST_NOISE for (_, sigma), count in held_out.items() if count > 0)
    )
    noisy = [entry for entry in present if entry[1] >= SMALLEST_NOISE]
    return Summary(
        sampled=tuple(SampledGaussian(rate, sigma, count) for rate, sigma, count in noisy if rate < 1),
        gaussian_mu=math.sqrt(math.fsum(count / sigma**2 for rate, sigma, count in noisy if rate == 1)),
        selection_delta=math.fsum(sorted(selections)),
        noiseless=noiseless,
        truncated=tuple(query for query in cut if query.noise_multiplier >= SMALLEST_NOISE),
        repeated=tuple(sorted((entry for entry in repeated if not entry[0].empty), key=repr)),
        held_out=_part_mus(held_out),
    )


def _part_mus(counts: Counter[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """``sqrt(sum n / sigma^2)`` of each part that has a noisy query."""
    noisy = sorted((part, sigma, count) for (part, sigma), count in counts.items() if count > 0 and sigma > 0)
    parts = dict.fromkeys(part for part, _, _ in noisy)
    return tuple(
        (part, math.sqrt(math.fsum(count / sigma**2 for name, sigma, count in noisy if name == part))) for part in parts
    )


def _names() -> str:
    return ", ".join(kind.__name__ for kind in get_args(Query))
