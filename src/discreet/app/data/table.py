"""Tables: every column becomes features by its public schema, or by counts that were released and charged.

A column that the schema does not know counts twice per row: in one bucket of a public list (not a number, or one of the
numeric intervals), and by its own text as a name. From the released counts follows whether it is a number or a
category, its range and ranks, and its list of names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from discreet.app.data.columns import (
    BUCKETS,
    NOTABLE,
    CategoryEncoding,
    Encoding,
    NumberEncoding,
    bucket_of,
    is_numeric,
    notable_numbers,
    parse_number,
    released_range,
)
from discreet.app.data.labels import ClassList, public_classes, released_classes
from discreet.app.data.records import Records
from discreet.app.data.schema import ColumnSchema, ColumnType, Schema
from discreet.app.data.source import (
    Examples,
    Prepared,
    Request,
    Source,
    SourceKind,
    Task,
    count_statement,
    digest_of,
    held_out_statement,
)
from discreet.app.data.table_encoding import TableEncoding, parse_numbers
from discreet.core.histogram import Buckets, Counts, Names, Threshold
from discreet.errors import DataError

_DISCRETE_SHARE = 0.8
"""A numeric column whose released names cover this share of its rows is encoded by name as well."""

_RARE = 0.001
"""Names and buckets of a smaller share of the rows are not used even without noise: too few to learn from."""


class TableSource(Source):
    """Rows of numbers and categories, with one target column."""

    def __init__(
        self,
        *,
        train: Records,
        test: Records | None,
        schema: Schema,
        target: str,
        classes: int | Sequence[str] | None,
        calibration: Records | None = None,
    ) -> None:
        self._train, self._test, self._schema, self._target = train, test, schema, target
        self._calibration = calibration
        self._classes = None if classes is None else public_classes(classes)
        self._columns = tuple(
            name for name in train.names if name != target and _type_of(schema, name) is not ColumnType.DROP
        )
        if not self._columns:
            raise DataError(
                f"{train.path}: no column beside the target; needs at least 1 that is not dropped by the schema."
            )
        for records in (train, test, calibration):
            if records is not None:
                _check_numbers(records, schema=schema, columns=self._columns)
        super().__init__(
            kind=SourceKind.TABLE,
            path=train.path,
            examples=len(train.rows),
            request=_request(
                train, schema=schema, columns=self._columns, target=None if self._classes is not None else target
            ),
            calibration_examples=None if calibration is None else len(calibration.rows),
        )

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        settings = repr((self._schema.facts(), self._target, self._classes)).encode()
        others = [part for rows in (self._test, self._calibration) if rows is not None for part in rows.parts()]
        return digest_of((settings, *self._train.parts(), *others))

    def _refuse_too_few(self, noise_std: float, threshold: Threshold) -> None:
        """Refuse also fewer rows than any column needs: not even equal values in all of them would stand out."""
        super()._refuse_too_few(noise_std, threshold)
        counted = {name for name in self._columns if name in self.statistics}
        ways = [threshold.value] * bool(counted & self._request.names.keys())
        ways += [NOTABLE * noise_std] * bool(counted & self._request.buckets.keys())
        if len(counted) == len(self._columns) and self.examples < min(ways):
            raise DataError(
                f"{self.path}: {self.examples} training rows; a column can be told from the noise from "
                f"{math.ceil(min(ways))} rows on; give types, bounds and values in a schema, or use a larger epsilon. "
                "Nothing was charged."
            )

    def _encode(self, counts: Counts | None) -> Prepared:
        classes = self._classes
        if classes is None:
            assert counts is not None
            classes = released_classes(counts, column=self._target, path=self.path)
        encoding = TableEncoding(
            columns={name: self._encodings(name, counts) for name in self._columns}, missing=self._schema.missing
        )
        if not encoding.used:
            raise DataError(
                f"{self.path}: no column could be told from the noise with {self.examples} rows; give types, bounds "
                "and values in a schema, or a larger epsilon, and name another run directory, since this count is "
                "charged."
            )

        def examples(records: Records) -> Examples:
            return Examples(features=encoding.encode(records), targets=classes.encode(records.column(self._target)))

        test = None if self._test is None else examples(self._test)
        return Prepared(
            train=examples(self._train),
            test=test,
            calibration=None if self._calibration is None else examples(self._calibration),
            task=Task.CLASSIFICATION,
            classes=classes.names,
            input=encoding.input,
            record=self._record(encoding, classes),
            statements=(
                *_unused_statement([name for name in self._columns if name not in encoding.used]),
                classes.statement,
                *count_statement(counts, columns=self.statistics),
                held_out_statement(test),
            ),
            private=counts is None or counts.private,
        )

    def _encodings(self, name: str, counts: Counts | None) -> tuple[Encoding, ...]:
        known = self._schema.column.get(name)
        if known is not None and known.bounds is not None:
            return (NumberEncoding(low=known.bounds[0], high=known.bounds[1]),)
        if known is not None and known.values is not None:
            return (CategoryEncoding(names=known.values),)
        assert counts is not None
        least = _RARE * self.examples
        told = {value: count for value, count in counts.names.get(name, {}).items() if count >= least}
        category = (CategoryEncoding(names=tuple(told)),) if told else ()
        if name not in counts.buckets:
            return category
        counts_K = counts.buckets[name]
        if known is None and not is_numeric(counts_K, noise_std=counts.noise_std, least=least):
            return category
        number = released_range(counts_K, noise_std=counts.noise_std, least=least)
        covered = sum(told.values()) >= _DISCRETE_SHARE * notable_numbers(
            counts_K, noise_std=counts.noise_std, least=least
        )
        return (*(() if number is None else (number,)), *(category if covered or number is None else ()))

    def _record(self, encoding: TableEncoding, classes: ClassList) -> dict[str, object]:
        columns = [
            {
                "name": name,
                "source": "released" if name in self.statistics else "public",
                "encodings": [one.to_json() for one in found],
            }
            for name, found in encoding.columns.items()
        ]
        return {
            "kind": self.kind.value,
            "columns": columns,
            "missing": sorted(encoding.missing),
            "target": {"name": self._target, **classes.to_json()},
        }


def _type_of(schema: Schema, name: str) -> ColumnType | None:
    known = schema.column.get(name)
    return None if known is None else known.type


def _request(train: Records, *, schema: Schema, columns: Sequence[str], target: str | None) -> Request:
    buckets: dict[str, Buckets] = {}
    names: dict[str, Names] = {}
    for name in columns:
        known = schema.column.get(name)
        values = train.column(name)
        if known is None or _wants(known, ColumnType.NUMBER):
            buckets[name] = Buckets(index_N=bucket_of(*parse_numbers(values, schema.missing)), size=BUCKETS)
        if known is None or _wants(known, ColumnType.CATEGORY):
            names[name] = _names(values, schema.missing)
    if target is not None:
        names[target] = _names(train.column(target), schema.missing)
    return Request(buckets=buckets, names=names, classes=target)


def _wants(known: ColumnSchema, kind: ColumnType) -> bool:
    return known.type is kind and known.bounds is None and known.values is None


def _names(values: Sequence[str], missing: frozenset[str]) -> Names:
    return Names([None if value in missing else value for value in values])


def _check_numbers(records: Records, *, schema: Schema, columns: Sequence[str]) -> None:
    """A column that the schema calls a number must hold finite numbers or missing values only."""
    for name in columns:
        if _type_of(schema, name) is not ColumnType.NUMBER:
            continue
        for value, place in zip(records.column(name), records.places, strict=True):
            if value not in schema.missing and math.isnan(parse_number(value)):
                raise DataError(
                    f"{records.path}, {place}, column '{name}': not a finite number, as its schema type says; correct "
                    "the row, or list the text under 'missing' in the schema."
                )


def _unused_statement(unused: Sequence[str]) -> tuple[str, ...]:
    if not unused:
        return ()
    return (f"Not used, for lack of anything that stands out of the noise: {', '.join(unused)}.",)
