"""What can be asked of private data, as records: each query with the numbers that its privacy cost depends on.

A query here is data, not code: the ledger stores it, the plan lists it, and `discreet.privacy.accounting` composes it.
Symbols: q = sample rate, sigma = noise multiplier (noise standard deviation over the clip bound, that is over the
change that *adding or removing* one example can make), n = count.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

from discreet.errors import ConfigError
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
