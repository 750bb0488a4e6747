"""The split into training, test and calibration rows: a public function of each row alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from discreet.errors import ConfigError

TEST_FRACTION = 0.2
"""Expected share of test rows when no test file is given."""

_SALT = b"discreet split 1"
_CALIBRATION_SALT = b"discreet calibration 1"
_LIMIT = int(TEST_FRACTION * 2**64)


@dataclass(frozen=True)
class SetApart:
    """A part of the private training rows is kept for a private temperature, and for nothing else.

    Attributes:
        share: of the training rows, expected; public, in (0, 1/2]. None: `usual_share` of their number.
    """

    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 0.5:
            raise ConfigError(f"calibration share {self.share}: must be above 0 and at most 0.5; the usual one is 0.1.")

    def of(self, rows: int) -> SetApart:
        """With a definite share for so many rows."""
        return SetApart(usual_share(rows)) if self.share is None else self

    def holds(self, fields: Iterable[bytes]) -> bool:
        """Whether a training row is in the part; as `is_test`, under another salt, so that the two say nothing of each
        other."""
        assert self.share is not None
        return _hash(_CALIBRATION_SALT, fields) < int(self.share * 2**64)

    def holds_row(self, values: Iterable[str]) -> bool:
        """`holds` of a row of text."""
        return self.holds(value.encode("utf-8") for value in values)


@dataclass(frozen=True)
class PublicCalibration:
    """Public data of the form of the training data, for an exact temperature."""

    path: Path


def usual_share(rows: int) -> float:
    """A fifth of fewer than 20,000 rows, a tenth of fewer than 45,000, a twentieth of more.

    ``rows`` is public. In three levels, and not in proportion, so that one row more or less moves no other row.
    """
    return 0.2 if rows < 20_000 else 0.1 if rows < 45_000 else 0.05


def is_test(fields: Iterable[bytes]) -> bool:
    """Whether a row belongs to the test set: SHA-256 of its length-prefixed fields, under a fixed public salt.

    **Guarantees.** Depends on the row alone: adding or removing a row never moves another one, and equal rows fall on
    the same side, so no test row is a copy of a training row.
    """
    return _hash(_SALT, fields) < _LIMIT


def _hash(salt: bytes, fields: Iterable[bytes]) -> int:
    """64 bits of a row."""
    digest = hashlib.sha256(salt)
    for field in fields:
        digest.update(len(field).to_bytes(8, "big"))
        digest.update(field)
    return int.from_bytes(digest.digest()[:8], "big")


def is_test_row(values: Iterable[str]) -> bool:
    """`is_test` of a row of text."""
    return is_test(value.encode("utf-8") for value in values)
