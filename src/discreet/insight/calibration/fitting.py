"""fit_temperature(): what logits are divided by, from public rows exactly or from private ones with noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from discreet.insight.calibration.predictions import Predictions
from discreet.insight.calibration.private import PrivateRows, PrivateTemperature, fit_private_temperature
from discreet.insight.calibration.temperature import Temperature, fit_public_temperature


@dataclass(frozen=True)
class PublicRows:
    """The rows are outside every guarantee: their temperature is exact, and costs nothing."""


def fit_temperature(
    logits_NK: Tensor, target_N: Tensor, *, rows: PublicRows | PrivateRows
) -> Temperature | PrivateTemperature:
    """The temperature T with the least negative log-likelihood of ``softmax(z / T)``.

    Fit it on rows that the model was not trained on: on its training rows a model looks surer than it may be. The most
    probable class never changes.

    **Guarantees.** For `PrivateRows`, those of `fit_private_temperature`. For `PublicRows`, none.

    Args:
        logits_NK: scores before the softmax. target_N: class indices, int64.
        rows: whose they are. There is no default.

    Raises:
        DataError: public rows that hold no finite logits or other labels than 0 to K - 1.
        ConfigError: private rows of a wrong shape.
    """
    if isinstance(rows, PrivateRows):
        return fit_private_temperature(logits_NK, target_N, rows=rows)
    return fit_public_temperature(Predictions.from_logits(logits_NK, target_N))
