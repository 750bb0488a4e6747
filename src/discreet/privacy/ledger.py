"""The ledger: an append-only, hash-chained file, written and synced ahead of every release. The truth about what was
spent.

**Order of things.** Reserve, then release: a reservation is on disk before the noise of its step exists, so that a
crash can over-count by one reservation and never under-count. See `discreet.privacy.chain` for the format,
`discreet.privacy.spending` for what the records add up to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from discreet.errors import BudgetExceeded, ConfigError, LedgerError
from discreet.privacy.accounting import Query, query_to_json
from discreet.privacy.accounting import epsilon as compose_epsilon
from discreet.privacy.chain import Chain, Record, parse_chain
from discreet.privacy.files import AppendOnlyFile
from discreet.privacy.plan import Plan
from discreet.privacy.spending import Spending, is_part_of

_KEY_ID_DIGITS = 32


def key_id(key: bytes) -> str:
    """The public name of a secret key: the first 128 bits of a hash, which says nothing about a 256-bit key."""
    return hashlib.sha256(b"discreet key id|" + key).hexdigest()[:_KEY_ID_DIGITS]


class LedgerView:
    """A ledger as it was read: its records and what they add up to. Opens nothing, locks nothing."""

    def __init__(self, chain: Chain, *, path: Path) -> None:
        if not chain.records:
            raise LedgerError(
                f"{path}: a ledger without a whole first record: nothing was ever reserved; delete the file and start "
                "again."
            )
        self._records = list(chain.records)
        self._spending = Spending(self._records[0])
        for record in self._records[1:]:
            self._spending.apply(record)
        self.torn = chain.torn

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, oldest first."""
        return tuple(self._records)

    @property
    def head(self) -> str:
        """The hash of the last record."""
        return self._records[-1].hash

    @property
    def plan(self) -> Plan:
        """The plan under which the ledger was opened."""
        return self._spending.plan

    @property
    def key_id(self) -> str:
        """The public name of the current key."""
        return self._spending.key_id

    @property
    def key_ids(self) -> tuple[str, ...]:
        """All keys that the run has used, oldest first."""
        return tuple(self._spending.key_ids)

    @property
    def test_mode(self) -> bool:
        """True when noise came from a seed that somebody knows: NOT PRIVATE."""
        return self._spending.test_mode

    @property
    def facts(self) -> Mapping[str, object]:
        """Public facts given when the ledger was opened."""
        return dict(self._spending.facts)

    @property
    def finished(self) -> bool:
        """Whether the run was closed for good."""
        return self._spending.finished

    @property
    def steps_reserved(self) -> int:
        """Distinct (key, step) pairs reserved."""
        return self._spending.steps_reserved()

    def queries(self) -> tuple[Query, ...]:
        """Everything that has to be considered released."""
        return self._spending.queries()

    def epsilon(self) -> float:
        """What the reservations spend, at the plan's delta, relation and accountant."""
        return self._compose(self.queries())

    def within_budget(self) -> bool:
        """Whether what is reserved composes to at most the plan's epsilon, or is a part of a plan that does."""
        if self.epsilon() <= self.plan.epsilon:
            return True
        return is_part_of(self.queries(), self.plan) and self.plan.spent() <= self.plan.epsilon

    def _compose(self, queries: tuple[Query, ...]) -> float:
        return compose_epsilon(
            queries, delta=self.plan.delta, relation=self.plan.relation, accountant=self.plan.accountant
        )


class Ledger(LedgerView):
    """The one writer of a ledger file. Use as a context manager; `close` releases the lock.

    **Guarantees.**

    - When a ``reserve_*`` call returns, the reservation is on disk (write, fsync). When it raises, nothing may be
      released.
    - A second writer, in this or another process, is refused while this one is open.
    - No reservation is made that would spend more than the plan's epsilon (tolerance 0).
    - The same step or query under the same key is charged once, under a new key again.
    - After a write or sync that failed or was interrupted, this object refuses every further write: only `resume` can
      tell what is on disk.
    """

    def __init__(self, file: AppendOnlyFile, chain: Chain) -> None:
        super().__init__(chain, path=file.path)
        self._file = file
        self._in_doubt = False

    @classmethod
    def create(
        cls, path: Path | str, *, plan: Plan, key_id: str, test_mode: bool, facts: Mapping[str, object] | None = None
    ) -> Ledger:
        """Start the ledger of a new run.

        Args:
            path: a file that does not exist yet, in a folder that does.
            plan: what the run may spend; composed once here, and refused if it would pass its own epsilon.
            key_id: the public name of the key, see `key_id`.
            test_mode: True when the noise comes from a seed; every artefact is then stamped NOT PRIVATE.
            facts: public facts, JSON values, for instance the unit of privacy or the device.

        Raises:
            LedgerError: the file exists, or cannot be written.
            BudgetExceeded: the plan's noise does not keep its epsilon.
        """
        plan.check()
        body = {
            "plan": plan.to_json(),
            "plan_fingerprint": plan.fingerprint(),
            "key_id": key_id,
            "test_mode": test_mode,
            "facts": dict(facts or {}),
        }
        line = Record.after(None, kind="open", body=body).line()
        # Parsed before it is written: what cannot be read back must not become a file.
        chain = parse_chain(line)
        Spending(chain.records[0])
        return cls(AppendOnlyFile.create(Path(path), first=line), chain)

    @classmethod
    def resume(
        cls, path: Path | str, *, key_id: str, known_head: str | None = None, facts: Mapping[str, object] | None = None
    ) -> Ledger:
        """Continue a run after a stop or a crash.

        An unfinished last line is cut off and recorded as a note. The same ``key_id`` replays steps free of charge;
        that is sound only if data, code and layout are unchanged. A new ``key_id`` charges every step again.

        Args:
            path: the ledger.
            key_id: of the key that will be used from now on. A key that was replaced earlier is refused.
            known_head: a hash that the chain must contain, e.g. from the checkpoint: shows that records were cut off.
            facts: public facts about the resumption.

        Raises:
            LedgerError: damaged, locked, finished, or without ``known_head``.
            BudgetExceeded: the plan in the ledger does not keep its epsilon.
        """
        file, content = AppendOnlyFile.hold(Path(path))
        with ExitStack() as on_failure:
            on_failure.callback(file.close)
            chain = parse_chain(content)
            ledger = cls(file, chain)
            ledger.plan.check()
            ledger._continue(chain, key_id=key_id, known_head=known_head, facts=facts)
            on_failure.pop_all()
        return ledger

    @classmethod
    def read(cls, path: Path | str) -> LedgerView:
        """Read without locking or changing anything.

        Raises:
            LedgerError: missing or damaged; the line is named.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise LedgerError(
                f"{path}: cannot be read ({error.strerror or type(error).__name__}); pass the ledger.jsonl of a run."
            ) from None
        return LedgerView(parse_chain(content), path=Path(path))

    def reserve_query(self, name: str, query: Query) -> bool:
        """Reserve one query on all examples, before it is made.

        Args:
            name: which one, e.g. "bounds of numeric columns". Under one key, a name stands for one draw of noise.
            query: its public numbers.

        Returns:
            False when exactly this was reserved before under this key, and nothing was written.

        Raises:
            BudgetExceeded: it would pass the plan's epsilon. Nothing was written.
            LedgerError: the name stands for another query, or the write failed. Nothing may be released.
        """
        self._check_writable()
        known = self._spending.named(name)
        if known == query:
            return False
        if known is not None:
            raise LedgerError(
                f"query {name!r}: is reserved with other numbers under this key; give each query its own name."
            )
        self._check_budget(self._spending.queries(query=query), what=f"query {name!r}")
        self._append("query", {"key_id": self.key_id, "name": name, "query": query_to_json(query)})
        return True

    def reserve_steps(self, *, first: int, count: int) -> bool:
        """Reserve the plan's steps ``first`` to ``first + count - 1`` under the current key, before any is released.

        Reserving a block of steps costs one sync for all of them; a crash then over-counts by at most the block.

        Returns:
            False when all of them were reserved before under this key, and nothing was written.

        Raises:
            BudgetExceeded: they would pass the plan's epsilon. Nothing was written.
            LedgerError: the write failed. Nothing may be released.
        """
        self._check_writable()
        if first < 0 or count < 1:
            raise ConfigError(f"steps first={first}, count={count}: must be at least 0 and 1; steps count from 0.")
        if self._spending.covers(first, count):
            return False
        what = f"steps {first} to {first + count - 1}"
        self._check_budget(self._spending.queries(steps=(first, first + count)), what=what)
        body = {
            "key_id": self.key_id,
            "first": first,
            "count": count,
            "sample_rate": self.plan.sample_rate,
            "noise_multiplier": self.plan.noise_multiplier,
        }
        self._append("steps", body)
        return True

    def note(self, kind: str, facts: Mapping[str, object] | None = None) -> None:
        """Record something public that spends nothing."""
        self._append("note", {"note": kind, "facts": dict(facts or {})})

    def finish(self, facts: Mapping[str, object] | None = None) -> None:
        """Record that the run is over: nothing can be reserved any more. Then `close`."""
        self._append("close", {"facts": dict(facts or {})})
        self.close()

    def close(self) -> None:
        """Release the file and its lock. The run can be resumed. Safe to call twice."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_budget(self, queries: tuple[Query, ...], *, what: str) -> None:
        # A part of the plan cannot spend more than the plan, which was composed when this ledger was opened.
        if is_part_of(queries, self.plan):
            return
        total = self._compose(queries)
        if not total <= self.plan.epsilon:
            raise BudgetExceeded(
                f"{what}: epsilon would become {total:.6g}, above the budget of {self.plan.epsilon}; "
                "nothing was released; stop here, or plan a new run with a larger epsilon."
            )

    def _continue(
        self, chain: Chain, *, key_id: str, known_head: str | None, facts: Mapping[str, object] | None
    ) -> None:
        if self.finished:
            raise LedgerError(f"{self._file.path}: the run was finished; start a new run in another directory.")
        if known_head is not None and all(record.hash != known_head for record in self._records):
            raise LedgerError(
                f"{self._file.path}: lacks the record {known_head[:12]}... that the run has seen; restore that ledger."
            )
        if key_id != self.key_id and key_id in self.key_ids:
            raise LedgerError(
                f"key {key_id}: was replaced earlier in this ledger; continue with the newest key or a fresh one."
            )
        if chain.missing_newline:
            self._file.append(b"\n")
        if chain.torn:
            self._file.cut(chain.complete_bytes)
            digest = hashlib.sha256(chain.torn).hexdigest()
            self.note("unfinished line set aside", {"bytes": len(chain.torn), "sha256": digest})
            self.torn = b""
        self._append("resume", {"key_id": key_id, "same_key": key_id == self.key_id, "facts": dict(facts or {})})

    def _append(self, kind: str, body: Mapping[str, object]) -> None:
        self._check_writable()
        record = Record.after(self._records[-1], kind=kind, body=body)
        # An interrupt may come between any two of these; whoever goes on then would write a record of the same number.
        self._in_doubt = True
        self._file.append(record.line())
        self._spending.apply(record)
        self._records.append(record)
        self._in_doubt = False

    def _check_writable(self) -> None:
        self._file.check_writable()
        if self._in_doubt:
            raise LedgerError(
                f"{self._file.path}: a write was interrupted, so it is in doubt; close the run, then resume it."
            )
        if self.finished:
            raise LedgerError(f"{self._file.path}: the run was finished; start a new run in another directory.")
