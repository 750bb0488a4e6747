"""Whose data something reads that no ledger accounts for, and the stamp on what it says about private ones."""

from __future__ import annotations

import enum

NON_PRIVATE_STAMP = "NON-PRIVATE"


class Origin(enum.Enum):
    """Whose data is read; nobody but the caller can know."""

    PUBLIC = "public"
    PRIVATE = "private"
