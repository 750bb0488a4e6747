"""Predictions of any model from a file: CSV, TSV or Parquet with a label column, or an npz of arrays.

label,p_cat,p_dog,p_eel          one column for each class, in the order of the classes or under their names
cat,0.7,0.2,0.1
dog,0.1,0.8,0.1

prediction,label,probability of cat,...      or as `discreet predict` writes it: its probabilities are taken

label,score                      or one column, for the second of two classes

np.savez("predictions.npz", logits=..., labels=..., groups=...)     or probabilities= instead of logits=
"""

from __future__ import annotations

import enum
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from discreet.app.data import Schema
from discreet.app.data.columns import parse_number
from discreet.app.data.records import Records, read_bytes, read_records
from discreet.errors import ConfigError, DataError

_LABELS = ("label", "labels", "target", "targets", "y", "y_true", "class")
PREDICTION, LABEL, PROBABILITY_OF = "prediction", "label", "probability of "
"""What `discreet predict` calls its columns: the answer, the class that the file gave, and before each class's name."""

_PREFIXES = (PROBABILITY_OF, "p_", "prob_", "proba_", "probability_", "logit_", "score_")


class Scale(enum.Enum):
    """What the numbers of a file are; AUTO tells probabilities by their range and their sums."""

    AUTO = "auto"
    LOGITS = "logits"
    PROBABILITIES = "probabilities"


class Faults(enum.Enum):
    """What becomes of a row without numbers, without a distribution, or without a class.

    REFUSED ends with an error that names the place. HARMLESS lets it count as "all classes alike", or as a wrong
    answer: within a budget, no row may decide what becomes of the others, or whether there is a report.
    """

    REFUSED = "refused"
    HARMLESS = "harmless"


@dataclass(frozen=True)
class Loaded:
    """Numbers and labels of a file.

    Attributes:
        scores_NK: logits, or log-probabilities, float64, as the file has them; NaN in a harmless row without any.
        target_N: class indices, int64; -1 in a harmless row without one.
        classes: names of the classes.
        groups: the group of each row, or None.
        scale: what the numbers were taken for.
    """

    scores_NK: Tensor
    target_N: Tensor
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None
    scale: Scale


def load_predictions(
    path: Path,
    *,
    label: str | None,
    group: str | None,
    scale: Scale,
    columns: tuple[str, ...] | None = None,
    faults: Faults = Faults.REFUSED,
) -> Loaded:
    """Read predictions with their labels.

    **Guarantees.** With harmless faults every row is read by itself: what it holds changes nothing about another row,
    and raises nothing unless not a single row can be read. What the numbers are is then never told from the rows.

    Args:
        path: a ``.npz`` file, or a table. label: name of the label column; None: one of the usual names.
        group: name of a column of groups. scale: what the numbers are.
        columns: those of the classes, in order; None: those of `discreet predict`, or else all but label and group.
        faults: what becomes of rows that cannot be read.

    Raises:
        ConfigError: a column is missing or cannot be told.
        DataError: the file cannot be read, or a cell is no number or no class; names the place and no value.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path.")
    if path.suffix.lower() == ".npz":
        if columns is not None:
            raise ConfigError("--columns with npz: its arrays have no columns with names; leave it out.")
        return _from_arrays(path, label=label, group=group, scale=scale, faults=faults)
    if faults is Faults.HARMLESS and scale is Scale.AUTO:
        raise ConfigError(
            "--epsilon without --logits or --probabilities: one private row would decide what the numbers of all "
            "others are taken for; say which they are."
        )
    records = read_records(path, schema=Schema(), columns=None)
    name = _label_column(records, label)
    if group is not None and group not in records.names:
        raise ConfigError(f"--group {group}: not a column of {path}; correct the name.")
    scored = _score_columns(records, besides=(name, group)) if columns is None else list(columns)
    unknown = [column for column in scored if column not in records.names or column in (name, group)]
    if unknown:
        raise ConfigError(f"--columns: '{unknown[0]}' is no column of scores in {path}; correct the name.")
    if not scored:
        raise ConfigError(f"{path}: no column beside label and group; it needs one for each class.")
    numbers = np.stack([_numbers(records, column, faults) for column in scored], 1)
    taken, scores = _scores(path, numbers, scale, faults)
    classes = _class_names(scored) if len(scored) > 1 else ("0", "1")
    target = _targets(records, name, classes, faults)
    groups = None if group is None else tuple(records.column(group))
    _check_some_row(path, scores, target)
    return Loaded(scores_NK=scores, target_N=target, classes=classes, groups=groups, scale=taken)


def _score_columns(records: Records, *, besides: tuple[str, str | None]) -> list[str]:
    others = [column for column in records.names if column not in besides]
    return [column for column in others if column.startswith(PROBABILITY_OF)] or others


def _check_some_row(path: Path, scores_NK: Tensor, target_N: Tensor) -> None:
    """Refuse a file of which nothing can be read. The refusal tells one bit, to whoever has the rows."""
    if not bool((~torch.isnan(scores_NK).any(1) & (target_N >= 0)).any()):
        raise DataError(f"{path}: no row has numbers and a class that can be read; see --columns and --label.")


def _from_arrays(path: Path, *, label: str | None, group: str | None, scale: Scale, faults: Faults) -> Loaded:
    raw = read_bytes(path)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError):
        raise DataError(f"{path}: not a readable npz of plain arrays; write it with numpy.savez.") from None
    given = [name for name in ("logits", "probabilities") if name in arrays]
    if len(given) != 1:
        raise ConfigError(f"{path}: {len(given)} of the arrays 'logits' and 'probabilities'; it needs one of them.")
    named = label if label is not None else next((name for name in _LABELS if name in arrays), None)
    if named is None or named not in arrays:
        raise ConfigError(f"{path}: no array of labels; call it 'labels', or name it with --label.")
    if scale not in (Scale.AUTO, Scale(given[0])):
        raise ConfigError(f"--{scale.value}: the file says {given[0]}; leave it out.")
    numbers, target = arrays[given[0]], arrays[named]
    if numbers.ndim == 1:
        numbers = numbers[:, None]
    if numbers.dtype.kind not in "fiu" or numbers.ndim != 2 or target.dtype.kind not in "iu" or target.ndim != 1:
        raise DataError(
            f"{path}: must hold numbers of shape (rows, classes) and labels that are whole numbers, (rows,)."
        )
    if len(numbers) != len(target):
        raise DataError(f"{path}: {len(numbers)} rows of numbers for {len(target)} labels; they must be as many.")
    groups = None
    if group is not None or "groups" in arrays:
        column = arrays.get(group or "groups")
        if column is None or column.shape != target.shape or column.dtype.kind not in "iuUS":
            raise ConfigError(f"{path}: no array of {len(target)} group names '{group or 'groups'}'; write one.")
        groups = tuple(str(name) for name in column)
    taken, scores = _scores(path, numbers.astype(np.float64), Scale(given[0]), faults)
    names = tuple(str(index) for index in range(scores.shape[1]))
    return Loaded(
        scores_NK=scores,
        target_N=torch.from_numpy(target.astype(np.int64)),
        classes=names,
        groups=groups,
        scale=taken,
    )


def _label_column(records: Records, label: str | None) -> str:
    if label is not None:
        if label not in records.names:
            raise ConfigError(f"--label {label}: not a column of {records.path}; correct the name.")
        return label
    found = [name for name in records.names if name.lower() in _LABELS]
    if len(found) != 1:
        raise ConfigError(f"{records.path}: {len(found)} columns are called label or the like; name it with --label.")
    return found[0]


def _numbers(records: Records, column: str, faults: Faults) -> np.ndarray:
    values = np.array([parse_number(value) for value in records.column(column)])
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken) and faults is Faults.REFUSED:
        raise DataError(
            f"{records.path}, {records.places[broken[0]]}, column '{column}': not a finite number; correct the row, or "
            "list the columns of the classes with --columns."
        )
    return values


def _scores(path: Path, numbers_NK: np.ndarray, scale: Scale, faults: Faults) -> tuple[Scale, Tensor]:
    """What the numbers are, and logits or log-probabilities of at least two classes."""
    single = numbers_NK.shape[1] == 1
    if scale is Scale.AUTO:
        inside = bool(((numbers_NK >= 0) & (numbers_NK <= 1)).all())
        whole = single or bool((np.abs(numbers_NK.sum(1) - 1) <= 1e-2).all())
        scale = Scale.PROBABILITIES if inside and whole else Scale.LOGITS
    if scale is Scale.LOGITS:
        both = np.concatenate([np.zeros_like(numbers_NK), numbers_NK], 1) if single else numbers_NK
        return scale, torch.from_numpy(both)
    both = np.concatenate([1 - numbers_NK, numbers_NK], 1) if single else numbers_NK
    with np.errstate(invalid="ignore"):
        good_N = (both >= 0).all(1) & (np.abs(both.sum(1) - 1) <= 1e-2)
    if not good_N.all():
        if faults is Faults.REFUSED:
            raise DataError(
                f"{path}: rows that are no probabilities (negative, or not 1 in sum); if logits, say --logits."
            )
        both = np.where(good_N[:, None], both, np.nan)
    with np.errstate(divide="ignore"):
        return scale, torch.from_numpy(np.log(both / both.sum(1, keepdims=True)))


def _class_names(columns: list[str]) -> tuple[str, ...]:
    """Names of the classes: those of the columns, less a prefix that all of them share."""
    for prefix in _PREFIXES:
        if all(name.lower().startswith(prefix) and len(name) > len(prefix) for name in columns):
            return tuple(name[len(prefix) :] for name in columns)
    return tuple(columns)


def _targets(records: Records, name: str, classes: tuple[str, ...], faults: Faults) -> Tensor:
    """Class indices: a label is the name of a column, or a number from 0. Each is read by itself, and so the same
    whatever the others are; where columns have numbers for names, a number is a name."""
    index = {known: position for position, known in enumerate(classes)}
    numbered = any(_whole(known).isdecimal() for known in classes)
    if not numbered:
        index |= {str(position): position for position in range(len(classes))}
    found = [index.get(label, index.get(_whole(label), _NO_CLASS)) for label in records.column(name)]
    broken = next((place for each, place in zip(found, records.places, strict=True) if each == _NO_CLASS), None)
    if broken is not None and faults is Faults.REFUSED:
        named = "not the name of a class's column"
        said = named if numbered else f"neither the name of a class's column nor a number from 0 to {len(classes) - 1}"
        raise DataError(f"{records.path}, {broken}, column '{name}': {said}; correct the row or the header.")
    return torch.tensor(found)


_NO_CLASS = -1


def _whole(label: str) -> str:
    """ "1.0" as pandas writes it for 1."""
    value = parse_number(label)
    return str(int(value)) if math.isfinite(value) and value == int(value) else label
