"""The one tree of exceptions that Discreet raises on purpose.

    DiscreetError                 anything below
    ├── ConfigError               an argument or a file of settings is wrong                      (exit code 2)
    ├── DataError                 a data file or an example is wrong; never holds a data value    (exit code 2)
    ├── UnsupportedUse            a guarded parameter was used in a way that no rule covers       (exit code 2)
    ├── CheckFailed               the self-check found that the claim would not hold              (exit code 2)
    ├── BudgetExceeded            the next release would pass the privacy budget                  (exit code 3)
    ├── LedgerError               the ledger is damaged, locked, or contradicts the run           (exit code 1)
    └── NotWritten                a page or figures could not be written; the run itself is whole (exit code 4)

Messages say three things, in this order: the value, the rule that it breaks, and the remedy.
"""

from __future__ import annotations


class DiscreetError(Exception):
    """Base of every error that Discreet raises on purpose."""


class ConfigError(DiscreetError, ValueError):
    """An argument or a settings file is wrong. The message names the value, the rule and the remedy."""


class DataError(DiscreetError, ValueError):
    """A data file is wrong. The message names file, line and column, and never a value from the data."""


class UnsupportedUse(DiscreetError, RuntimeError):
    """A guarded parameter met a function for which no exact rule exists. Training stops: fail closed.

    No TypeError: torch's operators would turn one into NotImplemented, and its message would be lost.
    """


class CheckFailed(DiscreetError, RuntimeError):
    """The self-check before step 0 found a coverage, norm or isolation failure."""


class BudgetExceeded(DiscreetError, RuntimeError):
    """The next release would pass the privacy budget; nothing was released."""


class LedgerError(DiscreetError, RuntimeError):
    """The ledger is damaged, locked by another process, or contradicts the run it describes."""


class NotWritten(DiscreetError, RuntimeError):
    """The page or the figures of a run could not be written. Nothing else is wrong: what was released is whole."""
