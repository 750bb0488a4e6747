"""Whose data something reads that no ledger accounts for, and the stamp on what it says about private ones."""

from __future__ import annotations

import enum

NON_PRIVATE_STAMP = "NON-PRIVATE"


class Origin(enum.Enum):
    """Whose data is read; nobody but the caller can know."""

    PUBLIC = "public"
    PRIVATE = "private"

    @property
    def stamp(self) -> str:
        """What exact figures of such data carry; nothing where they are public."""
        return NON_PRIVATE_STAMP if self is Origin.PRIVATE else ""
