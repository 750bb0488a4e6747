"""`open_source`: from a path and public options to a validated `Source`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from discreet.app.data.images import check_image_size, open_images
from discreet.app.data.labels import public_classes
from discreet.app.data.records import Records, read_records
from discreet.app.data.schema import ColumnType, Schema, nearest, read_schema
from discreet.app.data.source import IGNORED, Source, SourceKind
from discreet.app.data.split import PublicCalibration, SetApart
from discreet.app.data.table import TableSource
from discreet.app.data.text import TextSource, TextUnits
from discreet.errors import ConfigError, DataError

_TEXT_NAMES = frozenset(
    {"text", "message", "sentence", "review", "body", "sms", "comment", "content", "utterance", "tweet"}
)


def open_source(
    path: str | Path,
    *,
    target: str | None = None,
    test: str | Path | None = None,
    columns: Sequence[str] | None = None,
    schema: str | Path | Schema | None = None,
    classes: int | Sequence[str] | None = None,
    kind: SourceKind | None = None,
    text_column: str | None = None,
    text_units: TextUnits = TextUnits.NGRAMS,
    image_size: tuple[int, int] | None = None,
    calibration: SetApart | PublicCalibration | None = None,
) -> Source:
    """Read and validate data. Draws nothing, writes nothing, and counts nothing.

    What it is follows from public facts: a folder is images; a file is text when ``kind``, ``text_column`` or the
    schema says so, or when it has two columns of which the one beside the target is called text, message, review or
    the like; else it is a table. Without ``test`` (and without a test part of its own), one row in five is held out by
    a public hash.

    Args:
        path: CSV, TSV, Parquet or labelled text file; or a folder of IDX files, or of one folder of images per class.
        target: name of the label column; may come from the schema. Not used for images.
        test: held-out data of the same form.
        columns: names of the columns of a file without a header.
        schema: public facts (see `discreet.app.data.schema`), or the path of a TOML file with them.
        classes: public class list, or number of classes 0, 1, ...; overrides the schema's.
        kind: table, images or text, when it should not be told from the path.
        text_column: the column that holds the text.
        text_units: what a text is cut into; the model decides.
        image_size: (height, width) in pixels to which images of a folder are resized.
        calibration: rows for a temperature: a part of the training rows, or public data of the same form.

    Raises:
        ConfigError: an argument or the schema is wrong, or an optional package is missing.
        DataError: the data cannot be read, or is malformed; names file, line and column, and no value.
    """
    path = Path(path)
    test = None if test is None else Path(test)
    facts = schema if isinstance(schema, Schema) else Schema() if schema is None else read_schema(schema)
    listed = classes if classes is not None else facts.classes
    public = calibration.path if isinstance(calibration, PublicCalibration) else None
    for place in (path, test, public):
        if place is not None and not place.exists():
            raise DataError(f"{place}: no such file or folder; check the path.")
    if path.is_dir():
        _check_folder_options(path, test=test, columns=columns, kind=kind)
        check_image_size(image_size)
        return open_images(path, test=test, classes=listed, image_size=image_size, calibration=calibration)
    if kind is SourceKind.IMAGES or image_size is not None:
        raise ConfigError(f"{path}: a file, but images are asked for; give the folder that holds them.")
    train, held_out = _read_both(path, test, schema=facts, columns=None if columns is None else tuple(columns))
    apart = None
    if public is not None:
        apart = _read_like(train, public, schema=facts, columns=None if columns is None else tuple(columns))
    elif isinstance(calibration, SetApart):
        train, apart = train.set_apart(calibration)
    target = _target(train, target if target is not None else facts.target)
    _check_schema_columns(train, facts, target=target)
    _check_labels(train, target=target, schema=facts, classes=listed)
    if kind is SourceKind.TEXT or (kind is None and _is_text(train, facts, target=target, text_column=text_column)):
        text = _text_column(train, facts, target=target, text_column=text_column)
        return TextSource(
            train=train,
            test=held_out,
            schema=facts,
            target=target,
            text_column=text,
            classes=listed,
            units=text_units,
            calibration=apart,
        )
    return TableSource(train=train, test=held_out, schema=facts, target=target, classes=listed, calibration=apart)


def _check_folder_options(
    path: Path, *, test: Path | None, columns: Sequence[str] | None, kind: SourceKind | None
) -> None:
    if kind not in (None, SourceKind.IMAGES):
        raise ConfigError(f"{path}: a folder, but kind {kind.value} needs a file; give the file itself.")
    if columns is not None:
        raise ConfigError(f"{path}: a folder has no columns; leave out --columns, or give a file.")
    if test is not None and not test.is_dir():
        raise ConfigError(f"{test}: a file, but the training data is a folder; give a folder of the same form.")


def _read_both(
    path: Path, test: Path | None, *, schema: Schema, columns: tuple[str, ...] | None
) -> tuple[Records, Records | None]:
    train = read_records(path, schema=schema, columns=columns)
    if test is None:
        train, held_out = train.split()
        return train, held_out if held_out.rows else None
    return train, _read_like(train, test, schema=schema, columns=columns)


def _read_like(train: Records, path: Path, *, schema: Schema, columns: tuple[str, ...] | None) -> Records:
    """Other rows of the form of the training rows."""
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, but the training data is a file; give a file of the same form.")
    found = read_records(path, schema=schema, columns=columns)
    if found.names != train.names:
        raise DataError(f"{path}: its columns are not those of {train.path}, in the same order; align the two files.")
    return found


def _target(train: Records, target: str | None) -> str:
    if target is None:
        raise ConfigError(f"{train.path}: no target given; name the column to predict with --target NAME.")
    if target not in train.names:
        # The columns are not listed: where a header is missing, they are a row of private values.
        alone = len(train.names) == 1
        raise ConfigError(
            f"target '{target}': not a column of {train.path}"
            f"{', which has one column' if alone else ''}; correct the name, or name them all with --columns a,b,c if "
            f"the file has no header{', or set delimiter = in a schema' if alone else ''}."
        )
    return target


def _check_schema_columns(train: Records, schema: Schema, *, target: str) -> None:
    for name in schema.column:
        if name not in train.names:
            hint = (
                nearest(name, schema.columns)
                if schema.columns is not None
                else "correct the name or the header setting."
            )
            raise ConfigError(f"schema column '{name}': not a column of {train.path}; {hint}")
        if name == target:
            raise ConfigError(
                f"schema column '{name}': is the target; describe it under [target] with classes = [...]."
            )


def _check_labels(train: Records, *, target: str, schema: Schema, classes: int | Sequence[str] | None) -> None:
    """Refuse a target that nothing can be learned from. The refusal tells one bit, to whoever has the rows."""
    where = f"{train.path}, column '{target}'"
    found = {label for label in train.column(target) if label not in schema.missing}
    if not found:
        raise DataError(f"{where}: no row has a label; the target must be filled in.")
    if classes is None and len(found) < 2:
        raise DataError(f"{where}: one class only; needs at least 2; is it the right column?")
    if classes is not None and (public_classes(classes).encode(sorted(found)) == IGNORED).all():
        if isinstance(classes, int):
            raise DataError(
                f"{where}: --classes {classes} means the labels 0 to {classes - 1}, and no row has one of them; list "
                "the classes by name, spelled as in the file: --classes A,B."
            )
        raise DataError(f"{where}: no label is in the given class list; correct the list, spelled as in the file.")


def _text_columns(train: Records, schema: Schema) -> list[str]:
    return [name for name in train.names if name in schema.column and schema.column[name].type is ColumnType.TEXT]


def _is_text(train: Records, schema: Schema, *, target: str, text_column: str | None) -> bool:
    others = [name for name in train.names if name != target]
    named = len(others) == 1 and others[0].lower() in _TEXT_NAMES and others[0] not in schema.column
    return text_column is not None or named or bool(_text_columns(train, schema))


def _text_column(train: Records, schema: Schema, *, target: str, text_column: str | None) -> str:
    if text_column is not None and (text_column not in train.names or text_column == target):
        raise ConfigError(f"text column '{text_column}': must be a column beside the target; correct the name.")
    found = [text_column] if text_column is not None else _text_columns(train, schema)
    if not found:
        found = [name for name in train.names if name != target]
    if len(found) != 1:
        raise ConfigError(
            f"{train.path}: {len(found)} columns could be the text; must be 1; name it with --text-column."
        )
    return found[0]
