"""Plan: a frozen record of every number that determines the guarantee, before any example is touched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    HeldOut,
    Query,
    Relation,
    Repeated,
    SampledGaussian,
    query_from_json,
    query_to_json,
    solve_noise_multiplier,
)
from discreet.privacy.accounting import epsilon as compose_epsilon
from discreet.privacy.files import write_atomically
from discreet.privacy.records import Fields, canonical_json, json_number, parse_json
from discreet.privacy.repetitions import Repetitions
from discreet.privacy.sampling import PoissonSampling

FORMAT = 1
DEFAULT_CLIPPING: Mapping[str, str | float] = {"kind": "automatic", "style": "flat", "clip_bound": 1.0, "gamma": 0.01}
CURVE_POINTS = 64
CALIBRATION_PART = "calibration"


def default_delta(examples: int) -> float:
    """``1 / N^1.1``: below 1 / N, the delta at which publishing one random row would pass."""
    if examples < 2:
        raise ConfigError(f"examples={examples}: must be at least 2 for a default delta; pass delta.")
    return float(examples) ** -1.1


@dataclass(frozen=True)
class Search:
    """The steps of a plan are one run of a search, which releases its best run alone; see `discreet.train.tune`.

    Attributes:
        repetitions: distribution of the number of runs.
        score_noise: noise multiplier of the score of each run, a sum over all examples of one number in [0, 1] each;
            None when scores come from data outside the guarantee.
    """

    repetitions: Repetitions
    score_noise: float | None = None

    def __post_init__(self) -> None:
        if self.score_noise is not None:
            object.__setattr__(self, "score_noise", float(self.score_noise))

    def query(self, steps: SampledGaussian) -> Repeated:
        """The whole search as one query: however many runs there are, this is what they cost together."""
        score = () if self.score_noise is None else (Gaussian(noise_multiplier=self.score_noise),)
        return Repeated(run=(steps, *score), repetitions=self.repetitions)


@dataclass(frozen=True)
class Calibration:
    """A temperature that is fitted after the last step, on examples that were set apart by a public hash of each.

    Attributes:
        examples: how many were set apart, public. They are not among the plan's ``examples``.
        share: of all examples, expected: what the hash was compared with.
        noise_multiplier: of each query. queries: how many. bound: what one example adds to a sum at most, in nats.
    """

    examples: int
    share: float
    noise_multiplier: float
    queries: int
    bound: float

    def __post_init__(self) -> None:
        for name in ("share", "noise_multiplier", "bound"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 < self.share < 1 or self.examples < 0 or not self.bound > 0:
            raise ConfigError(
                f"calibration share={self.share}, examples={self.examples}, bound={self.bound}: must be in (0, 1), at "
                "least 0 and above 0; restore the plan."
            )

    def query(self) -> HeldOut:
        """All its queries as the ledger has them."""
        return HeldOut(part=CALIBRATION_PART, noise_multiplier=self.noise_multiplier, count=self.queries)


@dataclass(frozen=True)
class Plan:
    """Every public number of one private training run.

    One step is one Gaussian query with noise multiplier sigma on one Poisson batch of rate ``batch_size / examples``.

    **Guarantees.** `queries` is what the run will have released; `spent` composes it and never under-states. `to_json`
    and `from_json` are exact inverses, and `fingerprint` names the record.

    Attributes:
        examples: N, public. batch_size: expected batch B, 1 to N. steps: S, at least 1.
        noise_multiplier: sigma; 0 exactly when ``epsilon`` is infinite (training without a guarantee).
        epsilon: the target, never passed. delta: in (0, 1).
        relation, accountant: what neighbours are, and how queries are composed.
        clipping: the public record of the clipping rule, ``Clipping.describe()``.
        before: private preprocessing on all examples, charged to the same epsilon.
        search: None for one training run; else the steps are repeated, and the best run is released.
        calibration: None, or a private temperature that is fitted after the last step.
        notes: public remarks of whoever made the plan. versions: package -> version at planning time.
    """

    examples: int
    batch_size: int
    steps: int
    noise_multiplier: float
    epsilon: float
    delta: float
    relation: Relation = Relation.ADD_REMOVE
    accountant: Accountant = Accountant.PLD
    clipping: Mapping[str, str | float] = field(default_factory=lambda: dict(DEFAULT_CLIPPING), hash=False)
    before: tuple[Query, ...] = ()
    search: Search | None = None
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: current_versions(), hash=False)

    def __post_init__(self) -> None:
        PoissonSampling(examples=self.examples, batch_size=self.batch_size)
        for name in ("noise_multiplier", "epsilon", "delta"):
            # An int here would print as 1 and read back as 1.0: another fingerprint for the same plan.
            object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ConfigError(f"steps={self.steps!r}: must be an integer of at least 1; pass the number of updates.")
        if not (0 <= self.noise_multiplier < math.inf):
            raise ConfigError(
                f"noise_multiplier={self.noise_multiplier}: must be finite and at least 0; use Plan.solve()."
            )
        if self.search is not None and self.calibration is not None:
            raise ConfigError("a search with a calibration: is not supported; calibrate the model of a single run.")
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon={self.epsilon}: must be above 0; ask for e.g. epsilon=3.")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta={self.delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")
        if (self.noise_multiplier == 0) != math.isinf(self.epsilon):
            raise ConfigError(
                f"noise_multiplier={self.noise_multiplier} with epsilon={self.epsilon}: "
                "no noise means epsilon=inf and the reverse; use Plan.solve()."
            )

    @classmethod
    def solve(
        cls,
        *,
        examples: int,
        batch_size: int,
        steps: int,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        delta: float | None = None,
        relation: Relation = Relation.ADD_REMOVE,
        accountant: Accountant = Accountant.PLD,
        clipping: Mapping[str, str | float] = DEFAULT_CLIPPING,
        before: tuple[Query, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> Plan:
        """A plan from its sizes and exactly one of ``epsilon`` (the noise is solved) and ``noise_multiplier``.

        Args:
            examples: N. batch_size: expected batch. steps: number of updates.
            epsilon: target; ``math.inf`` plans a run without noise.
            noise_multiplier: sigma; the plan's epsilon is then what the whole run spends. 0 means epsilon infinite.
            delta: None is `default_delta`.

        Raises:
            ConfigError: an argument is outside its range, or both or none of the two were given.
            BudgetExceeded: ``before`` alone spends ``epsilon`` or more.
        """
        if (epsilon is None) == (noise_multiplier is None):
            raise ConfigError(f"epsilon={epsilon}, noise_multiplier={noise_multiplier}: pass exactly one of the two.")
        sampling = PoissonSampling(examples=examples, batch_size=batch_size)
        delta = default_delta(examples) if delta is None else delta
        if noise_multiplier is not None:
            step = SampledGaussian(sampling.rate, noise_multiplier, steps)
            epsilon = compose_epsilon([*before, step], delta=delta, relation=relation, accountant=accountant)
        elif math.isinf(epsilon) and epsilon > 0:
            noise_multiplier = 0.0
        else:
            noise_multiplier = solve_noise_multiplier(
                sample_rate=sampling.rate,
                steps=steps,
                epsilon=epsilon,
                delta=delta,
                before=before,
                relation=relation,
                accountant=accountant,
            )
        return cls(
            examples=examples,
            batch_size=batch_size,
            steps=steps,
            noise_multiplier=float(noise_multiplier),
            epsilon=float(epsilon),
            delta=float(delta),
            relation=relation,
            accountant=accountant,
            clipping=dict(clipping),
            before=tuple(before),
            notes=tuple(notes),
        )

    @property
    def sampling(self) -> PoissonSampling:
        """The sampler whose rate the accountant is told."""
        return PoissonSampling(examples=self.examples, batch_size=self.batch_size)

    @property
    def sample_rate(self) -> float:
        """q, exactly ``batch_size / examples``."""
        return self.sampling.rate

    def queries(self, steps: int | None = None) -> tuple[Query, ...]:
        """What has been released after ``steps`` updates (None: after all of them), preprocessing included.

        A search releases once, at its end, and is charged whole before its first update.
        """
        count = self.steps if steps is None else steps
        if self.search is not None:
            whole = SampledGaussian(self.sample_rate, self.noise_multiplier, self.steps)
            return (*self.before, *((self.search.query(whole),) if count else ()))
        after = () if self.calibration is None or count < self.steps else (self.calibration.query(),)
        return (*self.before, SampledGaussian(self.sample_rate, self.noise_multiplier, count), *after)

    def spent(self, steps: int | None = None) -> float:
        """Epsilon after ``steps`` updates, composed exactly (tens of milliseconds; results are cached)."""
        return compose_epsilon(
            self.queries(steps), delta=self.delta, relation=self.relation, accountant=self.accountant
        )

    def spent_at_most(self, steps: int) -> float:
        """An upper bound on `spent`, cheap enough to show at every step, and equal to it at 0 and at the last step.

        ``steps`` is rounded up to one of 64 points, evenly spaced in sqrt(steps) because epsilon grows like it, so a
        whole run composes at most 64 times, and the figure is at most about 1/64 of the final epsilon too high.
        """
        if not 0 < steps < self.steps:
            return self.spent(steps)
        index = math.ceil(CURVE_POINTS * math.sqrt(steps / self.steps))
        return self.spent(min(self.steps, max(steps, math.ceil(self.steps * (index / CURVE_POINTS) ** 2))))

    def charged_at_most(self, steps: int, *, besides: tuple[Query, ...] = ()) -> float:
        """`spent_at_most`, together with queries that the plan did not foresee: those of keys that were replaced."""
        if not besides:
            return self.spent_at_most(steps)
        queries = (*self.queries(steps), *besides)
        return compose_epsilon(queries, delta=self.delta, relation=self.relation, accountant=self.accountant)

    def curve(self, points: int = CURVE_POINTS) -> tuple[tuple[int, float], ...]:
        """(steps, epsilon) at up to ``points`` + 1 places from 0 to the end, evenly spaced in sqrt(steps)."""
        places = sorted({math.ceil(self.steps * (index / points) ** 2) for index in range(points + 1)})
        return tuple((place, self.spent(place)) for place in places)

    def check(self) -> None:
        """Compose the whole schedule once, and refuse a plan whose noise does not keep its promise.

        Raises:
            BudgetExceeded: ``spent(steps) > epsilon``; the record was edited, or planned by another accountant version.
        """
        total = self.spent()
        if not total <= self.epsilon:
            raise BudgetExceeded(
                f"noise_multiplier={self.noise_multiplier}: the planned {self.steps} steps spend epsilon {total:.6g}, "
                f"above the target {self.epsilon}; make the plan again with Plan.solve()."
            )

    def to_json(self) -> dict[str, object]:
        """The plan as JSON values. Floats survive exactly; an infinite epsilon is the string "inf"."""
        record: dict[str, object] = {"format": FORMAT}
        for item in dataclasses.fields(self):
            record[item.name] = getattr(self, item.name)
        del record["search"], record["calibration"]
        if self.calibration is not None:
            record["calibration"] = dataclasses.asdict(self.calibration)
        if self.search is not None:
            whole = SampledGaussian(self.sample_rate, self.noise_multiplier, self.steps)
            record["search"] = query_to_json(self.search.query(whole))
        record["epsilon"] = json_number(self.epsilon)
        record["relation"] = self.relation.value
        record["accountant"] = self.accountant.value
        record["clipping"] = dict(self.clipping)
        record["before"] = [query_to_json(query) for query in self.before]
        record["notes"] = list(self.notes)
        record["versions"] = dict(self.versions)
        return record

    @classmethod
    def from_json(cls, record: object) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: a field is unknown, missing or ill-typed, or a number is outside its range. The field is named.
        """
        optional = {"search", "calibration"}
        names = {item.name for item in dataclasses.fields(cls)} - optional | {"format"}
        if isinstance(record, Mapping):
            names |= optional & set(record)
        fields = Fields(record, where="plan", names=names)
        if fields.integer("format") != FORMAT:
            raise ConfigError(
                f"plan: format {fields.integer('format')}: this version reads {FORMAT}; use the version that wrote it."
            )
        plan = cls(
            examples=fields.integer("examples"),
            batch_size=fields.integer("batch_size"),
            steps=fields.integer("steps"),
            noise_multiplier=fields.number("noise_multiplier"),
            epsilon=fields.number_or_inf("epsilon"),
            delta=fields.number("delta"),
            relation=_member(Relation, fields.text("relation"), name="relation"),
            accountant=_member(Accountant, fields.text("accountant"), name="accountant"),
            clipping=fields.scalars("clipping"),
            before=tuple(query_from_json(query) for query in fields.items("before")),
            search=_search(fields.mapping("search")) if "search" in names else None,
            calibration=_calibration(fields.mapping("calibration")) if "calibration" in names else None,
            notes=fields.texts("notes"),
            versions=fields.text_mapping("versions"),
        )
        if plan.search is not None and query_to_json(plan.queries()[-1]) != fields.mapping("search"):
            raise ConfigError("plan: field 'search' contradicts batch, steps or noise; restore the file.")
        return plan

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON: the name of exactly this plan."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the plan as indented JSON, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ConfigError: the file is missing, not JSON, or not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}.") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is no plan, as it is not UTF-8 text; {_REMEDY}.") from None
        return cls.from_json(parse_json(text, where=str(path)))


_REMEDY = "pass a plan that `discreet plan --out` saved, or the release/plan.json of a run"


def _search(record: Mapping[str, object]) -> Search:
    query = query_from_json(record)
    if not isinstance(query, Repeated) or not 1 <= len(query.run) <= 2:
        raise ConfigError("plan: field 'search' must be a repeated run of steps, with or without a score; restore it.")
    scores = [part.noise_multiplier for part in query.run if isinstance(part, Gaussian)]
    return Search(repetitions=query.repetitions, score_noise=scores[0] if scores else None)


def _calibration(record: Mapping[str, object]) -> Calibration:
    fields = Fields(record, where="plan calibration", names={item.name for item in dataclasses.fields(Calibration)})
    return Calibration(
        examples=fields.integer("examples"),
        share=fields.number("share"),
        noise_multiplier=fields.number("noise_multiplier"),
        queries=fields.integer("queries"),
        bound=fields.number("bound"),
    )


_Member = TypeVar("_Member", Relation, Accountant)


def _member(kind: type[_Member], value: str, *, name: str) -> _Member:
    for member in kind:
        if member.value == value:
            return member
    raise ConfigError(f"plan: field {name!r} is {value!r}, but must be one of {[member.value for member in kind]}.")


def current_versions() -> dict[str, str]:
    """Versions of what the guarantee rests on, without importing any of it."""
    versions = {"python": platform.python_version()}
    for package in ("discreet", "torch", "dp-accounting", "numpy", "scipy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions
