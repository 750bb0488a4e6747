"""Are predicted probabilities what they say? Figures with floor and interval, and a temperature that mends."""

from __future__ import annotations

from discreet.insight.calibration.bins import Bins, expected_calibration_error
from discreet.insight.calibration.floor import Floor
from discreet.insight.calibration.predictions import Predictions
from discreet.insight.calibration.report import (
    CalibrationReport,
    NonPrivateCalibrationReport,
    calibration_report,
)
from discreet.insight.calibration.temperature import Temperature, fit_public_temperature

__all__ = [
    "Bins",
    "CalibrationReport",
    "Floor",
    "NonPrivateCalibrationReport",
    "Predictions",
    "Temperature",
    "calibration_report",
    "expected_calibration_error",
    "fit_public_temperature",
]
