"""What every kind of data has in common: a `Source` reads, says what must be counted privately, and becomes `Prepared`.

    source = open_source(path, target=...)          # reads and validates everything; draws nothing, writes nothing
    queries = source.queries(preprocessing)         # what preparing will cost: reserve it in the ledger FIRST
    prepared = source.prepare(noise_source=..., preprocessing=preprocessing)

Shape legend: N = training rows, B = rows of a batch.
"""

from __future__ import annotations

import abc
import enum
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from discreet.core.histogram import Buckets, Counts, Names, Threshold, private_counts, selection_threshold
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError, DataError
from discreet.privacy.accounting import Gaussian, Query, Selection
from discreet.privacy.gdp import gdp_mu

IGNORED = -100
"""Label of a row whose class is not in the class list: its loss is exactly 0, so no gradient holds anything of it."""


class SourceKind(enum.Enum):
    """The kinds of data that `open_source` reads."""

    TABLE = "table"
    IMAGES = "images"
    TEXT = "text"


class Task(enum.Enum):
    """What is learned from the data."""

    CLASSIFICATION = "classification"


@dataclass(frozen=True)
class TableInput:
    """Rows of ``features`` numbers, float32, most of them in [-1, 1]."""

    features: int

    def to_json(self) -> dict[str, str | int]:
        """The record of this input in a saved run."""
        return {"kind": SourceKind.TABLE.value, "features": self.features}


@dataclass(frozen=True)
class ImageInput:
    """Images of shape (channels, height, width), float32 in [-1, 1]."""

    channels: int
    height: int
    width: int

    def to_json(self) -> dict[str, str | int]:
        """The record of this input in a saved run."""
        return {"kind": SourceKind.IMAGES.value, "channels": self.channels, "height": self.height, "width": self.width}


@dataclass(frozen=True)
class TextInput:
    """Token ids in ``[0, vocabulary)``, int64, padded with 0 to ``length``."""

    vocabulary: int
    length: int

    def to_json(self) -> dict[str, str | int]:
        """The record of this input in a saved run."""
        return {"kind": SourceKind.TEXT.value, "vocabulary": self.vocabulary, "length": self.length}


InputSpec = TableInput | ImageInput | TextInput


def input_from_json(record: Mapping[str, str | int]) -> InputSpec:
    """The inverse of ``to_json`` of the three input kinds."""
    numbers = {key: int(value) for key, value in record.items() if key != "kind"}
    if record["kind"] == SourceKind.TABLE.value:
        return TableInput(features=numbers["features"])
    if record["kind"] == SourceKind.IMAGES.value:
        return ImageInput(channels=numbers["channels"], height=numbers["height"], width=numbers["width"])
    return TextInput(vocabulary=numbers["vocabulary"], length=numbers["length"])


@dataclass(frozen=True)
class Examples:
    """A map-style data set over tensors, quick for whole batches.

    Attributes:
        features: shape (N, ...). uint8 images are stored as they are and scaled to [-1, 1] when a batch is taken.
        targets: class indices, int64, shape (N,); `IGNORED` where the label is not in the class list.
    """

    features: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        features, targets = self.batch(np.asarray([range(len(self))[index]]))
        return features[0], targets[0]

    def batch(self, indices: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Features and targets of the given rows, in that order; an empty batch keeps its shape."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        features = self.features[rows]
        if features.dtype == torch.uint8:
            features = features.to(torch.float32).mul_(2.0 / 255.0).sub_(1.0)
        elif features.dtype == torch.int32:
            features = features.to(torch.int64)
        return features, self.targets[rows]


@dataclass(frozen=True)
class Prepared:
    """Data as tensors, and what may be said about how they came to be.

    Attributes:
        train: the training examples, private.
        test: held-out examples; None when there are none. Figures computed on them are about these rows, and are not
            covered by the guarantee of the training rows.
        task: what is learned.
        classes: names of the classes, public or released.
        input: what a model is fed.
        record: JSON-able account of the encoding; released and public values only.
        statements: sentences for the report, released and public values only.
        private: False when counts were made without noise or with a test seed.
        calibration: rows for a temperature: set apart from the training rows by a public hash, or public ones; None
            when there are none.
    """

    train: Examples
    test: Examples | None
    task: Task
    classes: tuple[str, ...]
    input: InputSpec
    record: Mapping[str, object]
    statements: tuple[str, ...]
    private: bool
    calibration: Examples | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How much the private counts may cost.

    Attributes:
        noise_multiplier: sigma of the one Gaussian query on all training rows; 0 only for training without a guarantee.
        delta: probability given to telling the names of categories and classes.
    """

    noise_multiplier: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"preprocessing noise_multiplier {self.noise_multiplier}: must be finite, >= 0; see share()."
            )
        if not 0 <= self.delta < 1:
            raise ConfigError(f"preprocessing delta {self.delta}: must be in [0, 1); the usual share is 5% of delta.")

    @classmethod
    def share(cls, *, epsilon: float, delta: float) -> Preprocessing:
        """The usual share: 2 % of the Gaussian budget (the training noise grows by 1 %), and 5 % of delta.

        In Gaussian differential privacy the mu of a joint release adds in quadrature, so
        ``sigma = 1 / (gdp_mu(epsilon, delta) * sqrt(0.02))`` (Corollary 3.3, arXiv:1905.02383).
        """
        if math.isinf(epsilon):
            return cls(noise_multiplier=0.0, delta=0.0)
        mu = gdp_mu(epsilon, delta=delta)
        return cls(noise_multiplier=1.0 / (mu * math.sqrt(_GAUSSIAN_SHARE)), delta=_DELTA_SHARE * delta)


_GAUSSIAN_SHARE = 0.02
_DELTA_SHARE = 0.05


@dataclass(frozen=True)
class Request:
    """The private counts that an encoding needs: columns with public buckets, and columns of open names.

    Attributes:
        buckets, names: column -> what is counted of its rows.
        classes: the column of names whose names are the classes; None when the classes are public.
    """

    buckets: Mapping[str, Buckets]
    names: Mapping[str, Names]
    classes: str | None = None

    def __len__(self) -> int:
        return len(self.buckets) + len(self.names)


class Source(abc.ABC):
    """Validated data that has not been turned into tensors yet.

    Attributes:
        kind: table, images or text.
        path: where the data lies.
        examples: number of training rows N, a public constant of the guarantee.
        input: what a model will be fed, where that is public before any count: for images and text. None for tables.
        calibration_examples: rows for a temperature, public; None when there are none. Not among ``examples``.
    """

    def __init__(
        self,
        *,
        kind: SourceKind,
        path: Path,
        examples: int,
        request: Request,
        input_spec: InputSpec | None = None,
        calibration_examples: int | None = None,
    ) -> None:
        if examples < 2:
            raise DataError(
                f"{path}: {examples} training rows; needs at least 2; check the path and the header setting."
            )
        self.kind = kind
        self.path = path
        self.examples = examples
        self.input = input_spec
        self.calibration_examples = calibration_examples
        self._request = request

    @property
    def statistics(self) -> tuple[str, ...]:
        """The columns that are counted privately, by public name; empty when the schema covers everything."""
        return tuple(dict.fromkeys((*self._request.buckets, *self._request.names)))

    def queries(self, preprocessing: Preprocessing) -> tuple[Query, ...]:
        """What `prepare` will spend on the training rows, for the ledger and the accountant.

        Raises:
            DataError: so few training rows that `prepare` would find nothing in them: their number, the noise and the
                threshold are public, so this is said before anything is charged.
        """
        if not len(self._request):
            return ()
        noise_std = preprocessing.noise_multiplier * math.sqrt(len(self._request))
        self._refuse_too_few(
            noise_std,
            selection_threshold(noise_std=noise_std, names_per_row=len(self._request.names), delta=preprocessing.delta),
        )
        counted: tuple[Query, ...] = (Gaussian(noise_multiplier=preprocessing.noise_multiplier),)
        if self._request.names and preprocessing.noise_multiplier > 0:
            counted += (Selection(delta=preprocessing.delta),)
        return counted

    def prepare(self, *, noise_source: NoiseSource, preprocessing: Preprocessing) -> Prepared:
        """Make the private counts, and encode all rows by them.

        **Guarantees.** Training rows are touched by one private count (charged as `queries` says) and by an encoding
        that is a function of public and released values only. Test and calibration rows are counted nowhere.

        Raises:
            ConfigError: sigma > 0 with names to tell and delta 0.
            DataError: fewer than two classes could be told apart from the noise.
        """
        if not len(self._request):
            return self._encode(None)
        counts = private_counts(
            buckets=self._request.buckets,
            names=self._request.names,
            examples=self.examples,
            noise_multiplier=preprocessing.noise_multiplier,
            delta=preprocessing.delta,
            source=noise_source,
        )
        return self._encode(counts)

    def _refuse_too_few(self, noise_std: float, threshold: Threshold) -> None:
        """Refuse fewer rows than two classes need to be told; by public numbers alone.

        Args:
            noise_std: of each count, in rows.
            threshold: from which noisy count on a name is told.
        """
        least = math.ceil(threshold.value)
        if self._request.classes is not None and self.examples < 2 * least:
            raise DataError(
                f"{self.path}: {self.examples} training rows; two classes of at least {least} rows each, the least "
                f"that can be told privately, need {2 * least}; list the classes with --classes A,B, or in a schema "
                "([target] classes = [...]), or use a larger epsilon. Nothing was charged."
            )

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all rows and of every setting that shapes them, in hex: equal only for the very same data.

        It lets whoever has a guess at the whole data confirm it, so it belongs in the private half of a run.
        """

    @abc.abstractmethod
    def _encode(self, counts: Counts | None) -> Prepared:
        """All rows as tensors, by public values and by the released counts."""


def count_statement(counts: Counts | None, *, columns: Sequence[str]) -> tuple[str, ...]:
    """The sentence about how the private counts were made; nothing when there were none."""
    if counts is None:
        return ("No statistic was computed from the data: types, bounds, categories and classes are public.",)
    listed = ", ".join(columns)
    if counts.noise_std == 0:
        return (f"Statistics of {listed} were computed WITHOUT noise: not private.",)
    return (
        f"Statistics of {listed} were computed privately in one Gaussian query (noise of {counts.noise_std:.1f} rows "
        f"per count, names told from {counts.threshold:.0f} rows on) and are charged to the ledger.",
    )


def held_out_statement(test: Examples | None) -> str:
    """The sentence about what the test figures stand for."""
    if test is None:
        return "There are no test rows."
    return f"Test figures are computed on {len(test)} held-out rows; the guarantee covers the training rows only."


def digest_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of length-prefixed parts, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
