"""What is written of a run once it has ended: its figures and its page.

Model, ledger and certificate are durable by then, and the budget is spent. So nothing that fails here may look like a
run that failed: whoever repeated it would pay for it a second time.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from discreet.app.report import PAGE, read_run, render_report
from discreet.errors import DataError, NotWritten
from discreet.privacy.files import write_atomically

RESULT, CALIBRATION = "result.json", "calibration.json"
WHOLE = "the run has ended and is whole: its model, its certificate and its ledger are safe, do not train again"
"""What whoever sees a run fail after its end must know first."""


@dataclass(frozen=True)
class Written:
    """What became of the figures and the page of a run.

    Attributes:
        run_dir: the directory of the run.
        missing: names of the files in ``release/`` that could not be written, in the order tried.
        why: what the system said; empty when nothing is missing.
    """

    run_dir: Path
    missing: tuple[str, ...] = ()
    why: str = ""

    @property
    def page(self) -> Path | None:
        """The page; None when it could not be written."""
        return None if PAGE.name in self.missing else self.run_dir / PAGE

    def raise_if_missing(self) -> None:
        """Say what is missing, that the run is whole, and what to do.

        Raises:
            NotWritten: a file could not be written.
        """
        if not self.missing:
            return
        remedies = []
        if set(self.missing) != {PAGE.name}:
            remedies.append("keep what is printed here, which is all there is of the figures")
        if self.page is None:
            remedies.append(f"free some space, then `discreet report {shlex.quote(str(self.run_dir))}` writes the page")
        raise NotWritten(
            f"{self.run_dir / PAGE.parent}: {' and '.join(self.missing)} cannot be written ({self.why}); {WHOLE}; "
            f"{'; '.join(remedies)}."
        )


def write_results(run_dir: Path, records: Mapping[str, Mapping[str, object]]) -> Written:
    """Write files of ``release/``, and the page after them, as far as the system lets.

    Args:
        run_dir: of a run that has ended.
        records: name -> JSON object.
    """
    release = run_dir / PAGE.parent
    texts: dict[str, Callable[[], str]] = {name: partial(_as_text, record) for name, record in records.items()}
    texts[PAGE.name] = lambda: render_report(read_run(run_dir))
    with suppress(OSError):
        # One that was made while the run went on says other things.
        (run_dir / PAGE).unlink(missing_ok=True)
    missing, why = [], ""
    for name, text in texts.items():
        try:
            write_atomically(release / name, text())
        except OSError as error:
            missing.append(name)
            why = error.strerror or type(error).__name__
        except DataError as error:
            missing.append(name)
            why = str(error)
    return Written(run_dir, tuple(missing), why)


def _as_text(record: Mapping[str, object]) -> str:
    return json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"
