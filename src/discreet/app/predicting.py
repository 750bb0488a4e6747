"""`discreet predict`: a trained model applied to a file of rows.

Only ``release/`` is opened. What comes out is a function of the released model and of the row alone.

Shape legend: N = rows, K = classes.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from discreet.app.data import Examples, Schema, read_schema
from discreet.app.data.labels import clean
from discreet.app.data.recorded import Recorded, Rows, read_recorded
from discreet.app.data.source import IGNORED
from discreet.app.evaluation import logits_of
from discreet.app.models import build, spec_from_json
from discreet.app.predictions import LABEL, PREDICTION, PROBABILITY_OF
from discreet.app.report import read_run
from discreet.app.report.record import RunRecord, Stamp, number
from discreet.errors import ConfigError, DataError
from discreet.privacy.certificate import MODEL_NAME, TEMPERATURE_NAME
from discreet.privacy.files import file_digest, write_atomically
from discreet.train.tempered import Tempered

ROWS_AT_ONCE = 8192
"""Rows that are encoded, and answered, together."""


@dataclass(frozen=True)
class PredictOptions:
    """What a user may say about predictions.

    Attributes:
        run: directory of a run that has ended. data: the rows.
        columns: names of the columns of a file without a header. schema: how the file is written.
        out: a file to write; None: standard output.
    """

    run: Path
    data: Path
    columns: tuple[str, ...] | None = None
    schema: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class ReleasedModel:
    """What ``release/`` holds of a model.

    Attributes:
        model: with its weights. recorded: the encoding of its rows.
        temperature: what its logits are divided by; None where the run has none beside the model.
        private: whether the run kept a promise.
    """

    model: nn.Module
    recorded: Recorded
    temperature: float | None
    private: bool


@dataclass(frozen=True)
class Predicted:
    """Rows and the model that answers them; nothing is computed before `blocks` is asked.

    Attributes:
        options: as asked. released: the model. rows: the file.
    """

    options: PredictOptions
    released: ReleasedModel
    rows: Rows

    def blocks(self) -> Iterator[str]:
        """The CSV file in parts: a header, then the rows in their order, `ROWS_AT_ONCE` at a time.

        Raises:
            DataError: the weights overflow, so that there are no probabilities.
        """
        names = self.released.recorded.classes.names
        labelled = [] if self.rows.labels is None else [LABEL]
        yield _csv([[PREDICTION, *labelled, *(f"{PROBABILITY_OF}{name}" for name in names)]])
        for start in range(0, self.rows.count, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, self.rows.count)
            probabilities_NK = self.probabilities(start, stop)
            answers = [names[index] for index in probabilities_NK.argmax(1).tolist()]
            labels = [[label] for label in self._labels(start, stop)] if labelled else [[]] * len(answers)
            yield _csv(
                [answer, *label, *(f"{share:.8g}" for share in shares)]
                for answer, label, shares in zip(answers, labels, probabilities_NK.tolist(), strict=True)
            )

    def probabilities(self, start: int, stop: int) -> Tensor:
        """Probabilities of the rows from ``start`` up to ``stop``, float64, shape (N, K), as test figures take them."""
        features = self.rows.features(start, stop)
        rows = Examples(features=features, targets=torch.full((len(features),), IGNORED))
        logits_NK = logits_of(self.released.model, rows) / (self.released.temperature or 1.0)
        if not bool(torch.isfinite(logits_NK).all()):
            raise DataError(
                f"{self.options.run / MODEL_NAME}: gives numbers that are not finite, so its weights have overflowed; "
                "train again with a lower learning rate."
            )
        return logits_NK.softmax(1)

    def _labels(self, start: int, stop: int) -> list[str]:
        """The file's own classes: the name in the class list, where one is meant."""
        assert self.rows.labels is not None
        classes, own = self.released.recorded.classes, self.rows.labels[start:stop]
        found = zip(own, classes.encode(own).tolist(), strict=True)
        return [label if index == IGNORED else classes.names[index] for label, index in found]

    def notes(self) -> tuple[str, ...]:
        """What is said beside the predictions: how many, by which temperature, and what they promise."""
        unread = (
            f"column '{clean(name)}': no finite number in {cells} cells that hold something; they count as missing."
            for name, cells in self.rows.unread.items()
        )
        promise = (
            "nothing is charged: a prediction follows from the released model and its row, also for rows that were "
            "trained on; a file of people is private itself, and so are predictions about them."
            if self.released.private
            else "NOT PRIVATE: the model was trained in test mode or without noise, and may give its rows away."
        )
        return (f"{self.rows.count} rows; {self._divided()}.", *unread, promise)

    def _divided(self) -> str:
        if self.released.temperature is not None:
            return (
                f"logits are divided by the released temperature {self.released.temperature:.6g} ({TEMPERATURE_NAME})"
            )
        if isinstance(self.released.model, Tempered):
            return "probabilities are those of the model, whose temperature was trained with it"
        return "probabilities are those of the model, and there is no temperature"

    def write(self, out: Path) -> None:
        """Write the whole file, or nothing.

        Raises:
            ConfigError: it cannot be written.
        """
        text = "".join(self.blocks())
        try:
            write_atomically(out, text)
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written ({error.strerror}); name a file that can.") from None

    def to_json(self) -> dict[str, object]:
        """The object that ``--json`` prints."""
        return {
            "run_dir": str(self.options.run),
            "out": str(self.options.out),
            "rows": self.rows.count,
            "classes": list(self.released.recorded.classes.names),
            "temperature": self.released.temperature,
            "private": self.released.private,
            "notes": list(self.notes()),
        }


def predict(options: PredictOptions) -> Predicted:
    """Read a released model and a file of rows for it.

    **Guarantees.** No file below ``private/`` is opened, and the ledger is not written: predictions are
    post-processing of the released model.

    Raises:
        ConfigError: the run has not ended or is not one of the program's own, or options contradict each other.
        DataError: a file of the run is damaged, or the rows cannot be read or lack a column.
    """
    _check_out(options)
    released = read_released(options.run)
    schema = Schema() if options.schema is None else read_schema(options.schema)
    if not options.data.exists():
        raise DataError(f"{options.data}: no such file; check the path.")
    rows = released.recorded.read(options.data, schema=schema, columns=options.columns)
    return Predicted(options=options, released=released, rows=rows)


def read_released(run_dir: Path) -> ReleasedModel:
    """The model of a run that has ended, and how its rows are encoded; all of it from ``release/``.

    Raises:
        ConfigError: the run has not ended, or does not say how its rows are encoded or how its model is built.
        DataError: a file is damaged, or is not of this run.
    """
    run, release = read_run(run_dir), run_dir / "release"
    if not run.certificate:
        raise ConfigError(
            f"{run_dir}: a run that has not ended, so it has no model to apply; go on with --resume --out "
            f"{shlex.quote(str(run_dir))} first."
        )
    if not run.schema:
        raise ConfigError(
            f"{release / 'schema.json'}: missing; only runs of `discreet train` and `discreet tune` say how rows are "
            "encoded; apply a model of your own as docs/recipes.md says."
        )
    recorded = read_recorded(run.schema, where=release / "schema.json")
    record = run.result.get("model")
    if not isinstance(record, Mapping):
        raise ConfigError(
            f"{release / 'result.json'}: missing or without a model; the run could not write it at its end, so that "
            "the shape of its model is not known; rebuild the model as docs/recipes.md says."
        )
    return ReleasedModel(
        model=_model(run, run_dir, record, recorded),
        recorded=recorded,
        temperature=_temperature(run, run_dir),
        private=run.stamp is not Stamp.NOT_PRIVATE,
    )


def _model(run: RunRecord, run_dir: Path, record: Mapping[str, Any], recorded: Recorded) -> nn.Module:
    path = run_dir / MODEL_NAME
    spec = spec_from_json(record)
    if spec.input != recorded.input or spec.classes != len(recorded.classes.names):
        raise DataError(
            f"{path.parent}: schema.json encodes {recorded.input} into {len(recorded.classes.names)} classes, and "
            f"result.json has a model of {spec.input} and {spec.classes}; restore both from the run."
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file, though the run has ended; restore it from the run.")
    certified = run.certificate.get("model_sha256")
    if certified is not None and certified != file_digest(path):
        raise DataError(f"{path}: is not the model that certificate.json names; restore it, or distrust it.")
    model = build(spec)
    try:
        load_model(model, path)
    except (SafetensorError, RuntimeError):
        raise DataError(f"{path}: does not hold the weights of the model in result.json; restore both.") from None
    return model


def _temperature(run: RunRecord, run_dir: Path) -> float | None:
    """What test figures divided logits by; the file and the result must agree on it."""
    stated, used = number(run.temperature, "temperature"), number(run.result, "temperature")
    if stated != used or (stated is not None and not 0 < stated < float("inf")):
        raise DataError(
            f"{run_dir / TEMPERATURE_NAME}: says {stated} and result.json {used}; both must hold the same number above "
            "0, or none; restore them from the run."
        )
    return stated


def _check_out(options: PredictOptions) -> None:
    out = options.out
    if out is None:
        return
    if out.is_dir():
        raise ConfigError(f"{out}: is a directory; name a file, e.g. predictions.csv.")
    place = out.resolve()
    if place == options.data.resolve():
        raise ConfigError(f"--out {out}: is the file of rows itself, which would be lost; name another file.")
    if place.is_relative_to(options.run.resolve() / "release"):
        raise ConfigError(
            f"--out {out}: lies in release/, which may leave the building, and predictions about a private file may "
            "not; name a file elsewhere."
        )


def _csv(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
