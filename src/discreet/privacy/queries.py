"""What can be asked of private data, as records: each query with the numbers that its privacy cost depends on.

A query here is data, not code: the ledger stores it, the plan lists it, and `discreet.privacy.accounting` composes it.
Symbols: q = sample rate, sigma = noise multiplier (noise standard deviation over the clip bound, that is over the
change that *adding or removing* one example can make), n = count.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from scipy import stats

from discreet.errors import ConfigError
from discreet.privacy.gdp import step_mu
from discreet.privacy.repetitions import Repetitions, Stopping

SMALLEST_NOISE = 0.01
"""A noise multiplier below this counts as none: its epsilon would be in the thousands, and is said to be infinite."""

LARGEST_NOISE = 1e12
"""No search looks at a larger noise multiplier: what cannot be reached with it cannot be reached."""


class Relation(enum.Enum):
    """When two data sets are neighbours."""

    ADD_REMOVE = "add_remove"
    REPLACE_ONE = "replace_one"


class Accountant(enum.Enum):
    """How queries are composed."""

    PLD = "pld"
    RDP = "rdp"


@dataclass(frozen=True)
class SampledGaussian:
    """``count`` Gaussian queries, each on its own Poisson batch.

    Attributes:
        sample_rate: q in (0, 1], the probability that one example is in one batch.
        noise_multiplier: sigma >= 0.
        count: number of steps, >= 0.
    """

    sample_rate: float
    noise_multiplier: float
    count: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"sample_rate={self.sample_rate}: must be in (0, 1]; pass batch_size / examples.")
        _check_query(self.noise_multiplier, count=self.count)


@dataclass(frozen=True)
class TruncatedGaussian:
    """``count`` Gaussian queries on Poisson batches of bounded size: a larger sample is cut to a random part of it.

    Attributes:
        examples: N.
        sample_rate: q in (0, 1], before the cut.
        largest_batch: the most examples that a batch can hold, at least 1.
        noise_multiplier: sigma >= 0.
        count: number of steps, >= 0.
    """

    examples: int
    sample_rate: float
    largest_batch: int
    noise_multiplier: float
    count: int

    def __post_init__(self) -> None:
        for name, value in (("examples", self.examples), ("largest_batch", self.largest_batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be an integer of at least 1; pass a count of examples.")
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"sample_rate={self.sample_rate}: must be in (0, 1]; pass batch_size / examples.")
        _check_query(self.noise_multiplier, count=self.count)

    @property
    def cut_probability(self) -> float:
        """How likely the cut is, given that one certain example was drawn: ``P[Binomial(N - 1, q) >= largest]``."""
        return float(stats.binom.sf(self.largest_batch - 1, self.examples - 1, self.sample_rate))

    @property
    def cut_rate(self) -> float:
        """Probability that one certain example is in the batch, given that it was cut (as dp_accounting has it).

        At most ``largest_batch / examples``, which is taken where the cut is too unlikely for float64.
        """
        cut = float(stats.binom.sf(self.largest_batch, self.examples, self.sample_rate))
        share = cut / self.cut_probability if cut > 0 else 1.0
        return min(1.0, share) * min(1.0, self.largest_batch / self.examples)


@dataclass(frozen=True)
class Gaussian:
    """``count`` Gaussian queries on all examples, as private preprocessing makes them."""

    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        _check_query(self.noise_multiplier, count=self.count)


@dataclass(frozen=True)
class HeldOut:
    """``count`` Gaussian queries on a part of the examples that no query outside the part touches.

    Which examples are in the part must be a public function of each example alone, such as a hash. One example then is
    either in the part or among all others, so its privacy loss is that of one side and not the sum of both (parallel
    composition): of parts and the rest, the largest counts. It may depend on what the rest has released.

    Attributes:
        part: name of the part, e.g. "calibration". Queries of one part compose with each other.
        noise_multiplier: sigma >= 0. count: how many queries.
    """

    part: str
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        if not self.part:
            raise ConfigError("part '': must have a name; e.g. calibration.")
        _check_query(self.noise_multiplier, count=self.count)


@dataclass(frozen=True)
class Selection:
    """Names that were released because a noisy count passed a threshold: adds ``delta``, and nothing to epsilon.

    The noisy counts themselves are a `Gaussian` query, declared apart. ``delta`` is for adding or removing one example;
    under replace-one it is charged twice.
    """

    delta: float

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise ConfigError(f"Selection delta={self.delta}: must be in [0, 1); raise the release threshold.")


@dataclass(frozen=True)
class Repeated:
    """A whole training run, repeated a random number of times, of which the best one alone is released.

    The choice itself must not read private data, unless by a query that is listed in ``run``.

    Attributes:
        run: the queries of one run, noise and steps included.
        repetitions: the distribution of the number of runs.
    """

    run: tuple[SampledGaussian | TruncatedGaussian | Gaussian, ...]
    repetitions: Repetitions

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", tuple(self.run))
        for query in self.run:
            if isinstance(query, (Selection, Repeated, HeldOut)):
                raise ConfigError(
                    f"repeated query of type {type(query).__name__}: must be a Gaussian one; "
                    "make the others once, before the runs."
                )


Query = SampledGaussian | TruncatedGaussian | Gaussian | Selection | Repeated | HeldOut


def query_to_json(query: Query) -> dict[str, object]:
    """The record of one query, as it stands in plan and ledger."""
    if isinstance(query, Repeated):
        return {
            "type": "repeated",
            "run": [query_to_json(part) for part in query.run],
            "stopping": query.repetitions.stopping.value,
            "mean_runs": query.repetitions.mean,
        }
    if isinstance(query, SampledGaussian):
        return {
            "type": "sampled_gaussian",
            "sample_rate": float(query.sample_rate),
            "noise_multiplier": float(query.noise_multiplier),
            "count": query.count,
        }
    if isinstance(query, TruncatedGaussian):
        return {
            "type": "truncated_gaussian",
            "examples": query.examples,
            "sample_rate": float(query.sample_rate),
            "largest_batch": query.largest_batch,
            "noise_multiplier": float(query.noise_multiplier),
            "count": query.count,
        }
    if isinstance(query, HeldOut):
        return {
            "type": "held_out",
            "part": query.part,
            "noise_multiplier": float(query.noise_multiplier),
            "count": query.count,
        }
    if isinstance(query, Gaussian):
        return {"type": "gaussian", "noise_multiplier": float(query.noise_multiplier), "count": query.count}
    return {"type": "selection", "delta": float(query.delta)}


_QUERY_FIELDS = {
    "sampled_gaussian": {"sample_rate", "noise_multiplier", "count"},
    "truncated_gaussian": {"examples", "sample_rate", "largest_batch", "noise_multiplier", "count"},
    "gaussian": {"noise_multiplier", "count"},
    "held_out": {"part", "noise_multiplier", "count"},
    "selection": {"delta"},
    "repeated": {"run", "stopping", "mean_runs"},
}


def query_from_json(record: Mapping[str, object]) -> Query:
    """Read what `query_to_json` wrote.

    Raises:
        ConfigError: the type is unknown, or a field is missing, unknown or ill-typed.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f"query {record!r}: must be an object; write it with query_to_json().")
    kind = record.get("type")
    if not isinstance(kind, str) or kind not in _QUERY_FIELDS:
        raise ConfigError(
            f"query type {kind!r}: must be one of {sorted(_QUERY_FIELDS)}; write it with query_to_json()."
        )
    if set(record) != _QUERY_FIELDS[kind] | {"type"}:
        raise ConfigError(
            f"query fields {sorted(record)}: must be type and {sorted(_QUERY_FIELDS[kind])}; use query_to_json()."
        )
    if kind == "repeated":
        return _repeated(record)
    whole, words = {"count", "examples", "largest_batch"}, {"part"}
    numbers = {name: _number(record[name], name=name) for name in _QUERY_FIELDS[kind] - whole - words}
    if kind == "selection":
        return Selection(delta=numbers["delta"])
    counts = {name: _integer(record[name], name=name) for name in _QUERY_FIELDS[kind] & whole}
    if kind == "held_out":
        part = record["part"]
        if not isinstance(part, str):
            raise ConfigError("query part: must be a name; write it with query_to_json().")
        return HeldOut(part=part, noise_multiplier=numbers["noise_multiplier"], count=counts["count"])
    if kind == "gaussian":
        return Gaussian(noise_multiplier=numbers["noise_multiplier"], count=counts["count"])
    sampled = {"sample_rate": numbers["sample_rate"], "noise_multiplier": numbers["noise_multiplier"], **counts}
    return TruncatedGaussian(**sampled) if kind == "truncated_gaussian" else SampledGaussian(**sampled)


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


def _repeated(record: Mapping[str, object]) -> Repeated:
    run, stopping = record["run"], record["stopping"]
    if not isinstance(run, list):
        raise ConfigError(f"query run={run!r}: must be a list of queries; write it with query_to_json().")
    kinds = {kind.value: kind for kind in Stopping}
    if not isinstance(stopping, str) or stopping not in kinds:
        raise ConfigError(f"query stopping={stopping!r}: must be one of {sorted(kinds)}; use query_to_json().")
    repetitions = Repetitions(kinds[stopping], _number(record["mean_runs"], name="mean_runs"))
    return Repeated(run=tuple(query_from_json(part) for part in run), repetitions=repetitions)


def _check_query(noise_multiplier: float, *, count: int) -> None:
    if not (0 <= noise_multiplier < math.inf):
        raise ConfigError(
            f"noise_multiplier={noise_multiplier}: must be finite and at least 0; solve it with Plan.solve()."
        )
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ConfigError(f"count={count!r}: must be an integer of at least 0; pass the number of queries.")


def _integer(value: object, *, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"query {name}={value!r}: must be an integer; write it with query_to_json().")
    return value


def _number(value: object, *, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"query {name}={value!r}: must be a number; write it with query_to_json().")
    return float(value)
