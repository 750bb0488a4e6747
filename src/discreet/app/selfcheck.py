"""`discreet check`: the self-check of a model on random examples that have the public shape of the data.

The data file is read and validated, and its public shape is used; no private value reaches the model or the output, so
checking costs no budget.
"""

from __future__ import annotations

from discreet.app import models
from discreet.app.options import DataOptions, open_data, stand_in
from discreet.app.stand_ins import random_examples
from discreet.train.check import CheckReport, check
from discreet.train.tempered import tempered_clipping

_EXAMPLES = 4


def check_data(data: DataOptions, *, kind: models.ModelKind) -> CheckReport:
    """Check the model that `discreet train` would build for this data."""
    source = open_data(data, kind=kind)
    rule = tempered_clipping(source.examples)
    spec = stand_in(source, kind=kind, clipping=rule)
    return check(models.build(spec), models.loss, random_examples(spec, count=_EXAMPLES), clipping=rule)
