"""What a ledger's records add up to: which queries have to be considered released.

A (key id, step) pair is one draw of noise on one batch. Replaying it under the same key gives the same bits, and counts
once; under another key it is another draw, and counts again. So spent = union of the reserved (key, step) intervals,
times their noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from discreet.errors import ConfigError, LedgerError
from discreet.privacy.accounting import Query, SampledGaussian, query_from_json
from discreet.privacy.chain import Record
from discreet.privacy.plan import Plan
from discreet.privacy.records import Fields

Interval = tuple[int, int]

BODIES: Mapping[str, tuple[str, ...]] = {
    "open": ("plan", "plan_fingerprint", "key_id", "test_mode", "facts"),
    "query": ("key_id", "name", "query"),
    "steps": ("key_id", "first", "count", "sample_rate", "noise_multiplier"),
    "resume": ("key_id", "same_key", "facts"),
    "note": ("note", "facts"),
    "close": ("facts",),
}
"""The kinds of records, and exactly the fields of each."""


class Spending:
    """The running total of a ledger. Starts from the "open" record; `apply` adds the others in order.

    **Guarantees.** Every reservation is in `queries`; nothing ever leaves it.
    """

    def __init__(self, opening: Record) -> None:
        fields = _fields(opening)
        if opening.kind != "open":
            raise LedgerError(
                f"ledger line 1: kind {opening.kind!r}: a ledger begins with 'open'; restore the file from a copy."
            )
        try:
            self.plan = Plan.from_json(fields.mapping("plan"))
            fingerprint = fields.text("plan_fingerprint")
            self.key_id = fields.text("key_id")
            self.test_mode = fields.flag("test_mode")
            self.facts = fields.mapping("facts")
        except ConfigError as error:
            raise LedgerError(f"ledger line 1: holds no valid plan or run ({error})") from None
        if self.plan.fingerprint() != fingerprint:
            raise LedgerError("ledger line 1: plan and plan_fingerprint differ; restore the file from a copy.")
        self.key_ids = [self.key_id]
        self.finished = False
        self._named: dict[tuple[str, str], Query] = {}
        self._intervals: dict[tuple[str, float, float], tuple[Interval, ...]] = {}

    def apply(self, record: Record) -> None:
        """Take in one record after the first.

        Raises:
            LedgerError: it says something that cannot follow what came before. The line is named.
        """
        where = f"ledger line {record.seq + 1}"
        try:
            fields = _fields(record)
            if self.finished:
                raise LedgerError(
                    f"{where}: {record.kind!r} after 'close'; a finished run spends nothing; restore the file."
                )
            if record.kind == "open":
                raise LedgerError(f"{where}: a second 'open'; one ledger holds one run; restore the file from a copy.")
            if record.kind == "query":
                self._apply_query(fields, where=where)
            elif record.kind == "steps":
                self._apply_steps(fields, where=where)
            elif record.kind == "resume":
                self._apply_resume(fields, where=where)
            elif record.kind == "close":
                self.finished = True
        except ConfigError as error:
            raise LedgerError(f"{where}: {error}") from None

    def _apply_query(self, fields: Fields, *, where: str) -> None:
        name, query = (fields.text("key_id"), fields.text("name")), query_from_json(fields.mapping("query"))
        if name in self._named:
            raise LedgerError(
                f"{where}: query {name[1]!r} is reserved twice under one key; restore the file from a copy."
            )
        self._named[name] = query

    def _apply_steps(self, fields: Fields, *, where: str) -> None:
        first, count = fields.integer("first"), fields.integer("count")
        if first < 0 or count < 1:
            raise LedgerError(
                f"{where}: steps first={first}, count={count}: must be at least 0 and 1; restore the file."
            )
        kind = (fields.text("key_id"), fields.number("sample_rate"), fields.number("noise_multiplier"))
        SampledGaussian(kind[1], kind[2], count)
        self._intervals[kind] = union((*self._intervals.get(kind, ()), (first, first + count)))

    def _apply_resume(self, fields: Fields, *, where: str) -> None:
        key_id, same = fields.text("key_id"), fields.flag("same_key")
        if same != (key_id == self.key_id) or (not same and key_id in self.key_ids):
            raise LedgerError(f"{where}: resume under key {key_id!r} contradicts the keys before it; restore the file.")
        if not same:
            self.key_ids.append(key_id)
        self.key_id = key_id

    def named(self, name: str) -> Query | None:
        """The query reserved under this name and the current key."""
        return self._named.get((self.key_id, name))

    def covers(self, first: int, count: int) -> bool:
        """Whether the plan's steps [first, first + count) are all reserved under the current key."""
        before = self._intervals.get(self._plan_kind(), ())
        return union((*before, (first, first + count))) == before

    def steps_reserved(self) -> int:
        """Distinct (key, step) pairs."""
        return sum(end - start for intervals in self._intervals.values() for start, end in intervals)

    def queries(self, *, query: Query | None = None, steps: Interval | None = None) -> tuple[Query, ...]:
        """Everything reserved, as if ``query`` and the plan's ``steps`` (start, end) were reserved too."""
        counts: Counter[tuple[float, float]] = Counter()
        intervals = dict(self._intervals)
        if steps is not None:
            kind = self._plan_kind()
            intervals[kind] = union((*intervals.get(kind, ()), steps))
        for (_, sample_rate, noise_multiplier), spans in intervals.items():
            counts[sample_rate, noise_multiplier] += sum(end - start for start, end in spans)
        sampled = tuple(SampledGaussian(rate, sigma, count) for (rate, sigma), count in sorted(counts.items()))
        return (*self._named.values(), *(() if query is None else (query,)), *sampled)

    def _plan_kind(self) -> tuple[str, float, float]:
        return (self.key_id, self.plan.sample_rate, self.plan.noise_multiplier)


def is_part_of(queries: tuple[Query, ...], plan: Plan) -> bool:
    """Whether ``queries`` are some of `Plan.queries`: at most its steps, in whatever order and under whatever keys.

    Such a set cannot spend more than the plan, so it needs no composition.
    """
    if plan.search is not None:
        return Counter(queries) <= Counter(plan.queries())
    kind = (plan.sample_rate, plan.noise_multiplier)
    steps = sum(
        q.count for q in queries if isinstance(q, SampledGaussian) and (q.sample_rate, q.noise_multiplier) == kind
    )
    others = [
        q for q in queries if not (isinstance(q, SampledGaussian) and (q.sample_rate, q.noise_multiplier) == kind)
    ]
    return steps <= plan.steps and Counter(others) <= Counter(_planned_besides(plan))


def _planned_besides(plan: Plan) -> tuple[Query, ...]:
    """What a plan of one run foresees beside its steps."""
    return (*plan.before, *(() if plan.calibration is None else (plan.calibration.query(),)))


def union(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Disjoint, sorted half-open intervals with the same members."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _fields(record: Record) -> Fields:
    where = f"ledger line {record.seq + 1}"
    if record.kind not in BODIES:
        raise LedgerError(f"{where}: kind {record.kind!r} is unknown; use the version of Discreet that wrote it.")
    try:
        return Fields(record.body, where=where, names=BODIES[record.kind])
    except ConfigError as error:
        raise LedgerError(str(error)) from None
