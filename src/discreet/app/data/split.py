"""The split into training and test rows: a public function of each row alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

TEST_FRACTION = 0.2
"""Expected share of test rows when no test file is given."""

_SALT = b"discreet split 1"
_LIMIT = int(TEST_FRACTION * 2**64)


def is_test(fields: Iterable[bytes]) -> bool:
    """Whether a row belongs to the test set: SHA-256 of its length-prefixed fields, under a fixed public salt.

    **Guarantees.** Depends on the row alone: adding or removing a row never moves another one, and equal rows fall on
    the same side, so no test row is a copy of a training row.
    """
    digest = hashlib.sha256(_SALT)
    for field in fields:
        digest.update(len(field).to_bytes(8, "big"))
        digest.update(field)
    return int.from_bytes(digest.digest()[:8], "big") < _LIMIT


def is_test_row(values: Iterable[str]) -> bool:
    """`is_test` of a row of text."""
    return is_test(value.encode("utf-8") for value in values)
