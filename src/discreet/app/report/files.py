"""Writing a page: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text beside its place and move it there, readable for all; a link of that name is replaced, not followed.

    Raises:
        OSError: it cannot be written there.
    """
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    Path(draft).chmod(0o644)
    Path(draft).replace(path)
