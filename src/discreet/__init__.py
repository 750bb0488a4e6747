"""Discreet: train any PyTorch model with differential privacy, at nearly the cost of ordinary training.

    result = discreet.train(model, dataset, loss=loss, epsilon=3.0)

See docs/quickstart.md. Everything below is re-exported from the modules that define it; nothing else is public.
"""

from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.noise import Released, release
from discreet.core.register import register_rule
from discreet.core.rng import NoiseSource
from discreet.core.rulecheck import check_rule
from discreet.core.style import Style
from discreet.errors import (
    BudgetExceeded,
    CheckFailed,
    ConfigError,
    DataError,
    DiscreetError,
    LedgerError,
    NotWritten,
    UnsupportedUse,
)
from discreet.insight.calibration import (
    BudgetedReport,
    CalibrationReport,
    NonPrivateCalibrationReport,
    Predictions,
    PrivateRows,
    PrivateTemperature,
    PublicRows,
    Temperature,
    budgeted_report,
    calibration_report,
    fit_temperature,
)
from discreet.insight.curves import measure_curves
from discreet.insight.origin import Origin
from discreet.insight.proxy_table import Curves, choose_under_compute
from discreet.insight.simulated_run import Candidate, Proxy
from discreet.insight.simulation import Simulation, simulate
from discreet.privacy.accounting import Relation
from discreet.privacy.compute import Machine
from discreet.privacy.ledger import Ledger
from discreet.privacy.options import Proposal
from discreet.privacy.plan import Plan
from discreet.privacy.planning import plan
from discreet.privacy.verification import verify
from discreet.train.auto_lr import AutoLR
from discreet.train.check import CheckReport, check
from discreet.train.contest import Choice, PrivateScore, PublicScore
from discreet.train.loop import Private
from discreet.train.make_private import Result, make_private, train
from discreet.train.tempered import Tempered, tempered_cross_entropy
from discreet.train.throughput import measure
from discreet.train.trial import Recipe
from discreet.train.tune import Tuned, tune
from discreet.train.updates import Step

__all__ = [
    "AutoLR",
    "BudgetExceeded",
    "BudgetedReport",
    "CalibrationReport",
    "Candidate",
    "CheckFailed",
    "CheckReport",
    "Choice",
    "ClippedSum",
    "Clipping",
    "ConfigError",
    "Curves",
    "DataError",
    "DiscreetError",
    "Ledger",
    "LedgerError",
    "Machine",
    "NoiseSource",
    "NonPrivateCalibrationReport",
    "NotWritten",
    "Origin",
    "Plan",
    "Predictions",
    "Private",
    "PrivateRows",
    "PrivateScore",
    "PrivateTemperature",
    "Proposal",
    "Proxy",
    "PublicRows",
    "PublicScore",
    "Recipe",
    "Relation",
    "Released",
    "Result",
    "Simulation",
    "Step",
    "Style",
    "Temperature",
    "Tempered",
    "Tuned",
    "UnsupportedUse",
    "budgeted_report",
    "calibration_report",
    "check",
    "check_rule",
    "choose_under_compute",
    "clipped_gradient",
    "fit_temperature",
    "make_private",
    "measure",
    "measure_curves",
    "plan",
    "register_rule",
    "release",
    "simulate",
    "tempered_cross_entropy",
    "train",
    "tune",
    "verify",
]
