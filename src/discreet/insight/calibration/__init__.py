"""Are predicted probabilities what they say? Figures with floor and interval, and a temperature that mends."""

from __future__ import annotations

from discreet.insight.calibration.bins import Bins, expected_calibration_error
from discreet.insight.calibration.budgeted import BudgetedReport, budgeted_report
from discreet.insight.calibration.fitting import PublicRows, fit_temperature
from discreet.insight.calibration.floor import Floor
from discreet.insight.calibration.predictions import Predictions
from discreet.insight.calibration.private import PrivateRows, PrivateTemperature
from discreet.insight.calibration.report import (
    CalibrationReport,
    NonPrivateCalibrationReport,
    calibration_report,
)
from discreet.insight.calibration.temperature import Temperature, fit_public_temperature

__all__ = [
    "Bins",
    "BudgetedReport",
    "CalibrationReport",
    "Floor",
    "NonPrivateCalibrationReport",
    "Predictions",
    "PrivateRows",
    "PrivateTemperature",
    "PublicRows",
    "Temperature",
    "budgeted_report",
    "calibration_report",
    "expected_calibration_error",
    "fit_public_temperature",
    "fit_temperature",
]
