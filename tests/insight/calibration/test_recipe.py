"""Clipping, and not noise, decides how sure a model is: small reproductions of arXiv:2106.07830, and of its limits.

The curve over R is no line but a U: below the norms of the gradients a model is too sure, far above them it has learned
too little at the same noise, and is not sure enough. The accuracy says nothing of it.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discreet.app.data import digits
from discreet.core.clipping import Clipping
from discreet.insight.calibration import CalibrationReport, Predictions, calibration_report
from discreet.insight.calibration.bins import equal_width
from discreet.privacy.sampling import PoissonSampling
from discreet.train.examples import Examples
from discreet.train.trial import Optimiser, Recipe, Schedule, fresh_model, run_trial
from insight.calibration.recipe import descended, drawn, logits_of


def _seen(weights: Tensor) -> tuple[float, float, float]:
    """(ECE, confidence minus accuracy, accuracy) on 20,000 other rows."""
    features, label = drawn(20_000, seed=2)
    found = Predictions.from_logits(logits_of(weights, features), label)
    accuracy = float(found.correct_N.mean())
    return equal_width(found).ece, float(found.confidence_N.mean()) - accuracy, accuracy


def test_the_calibration_error_is_u_shaped_in_the_bound_and_the_accuracy_flat() -> None:
    """Recipe A: too sure at R = .03, right at 3, not sure enough at 30. Expected: .102, .008, .192 (and +, 0, -)."""
    small, right, large = (_seen(descended(clip_bound=bound)) for bound in (0.03, 3.0, 30.0))
    assert small[0] > 0.08
    assert right[0] < 0.02
    assert large[0] > 0.15
    assert small[1] > 0.08
    assert abs(right[1]) < 0.02
    assert large[1] < -0.15
    accuracies = [seen[2] for seen in (small, right, large)]
    assert max(accuracies) - min(accuracies) < 0.005


def test_without_noise_clipping_miscalibrates_as_much() -> None:
    noisy, quiet = (_seen(descended(clip_bound=0.03, sigma=sigma)) for sigma in (1.729, 0.0))
    assert quiet[0] == pytest.approx(noisy[0], abs=0.01)
    assert quiet[1] == pytest.approx(noisy[1], abs=0.01)


def _noisy_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training and test; a fifth of all labels is drawn anew."""
    found, generator = digits(), torch.Generator().manual_seed(0)
    assert found.test is not None
    parts: list[Tensor] = []
    for rows in (found.train, found.test):
        anew = torch.rand(len(rows), generator=generator) < 0.2
        drawn_anew = torch.randint(10, (len(rows),), generator=generator)
        parts += [rows.features.flatten(1), torch.where(anew, drawn_anew, rows.targets)]
    return parts[0], parts[1], parts[2], parts[3]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _digits(clip_bound: float, *, progress: float) -> CalibrationReport:
    """A small network at epsilon 8 (sigma 2.67 at q = .25 and 300 steps), plain descent at ``progress / R``."""
    features, label, test_features, test_label = _noisy_digits()
    key = hashlib.sha256(b"digits under clipping").digest()
    model = fresh_model(lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), key=key)
    run_trial(
        model,
        Examples(torch.utils.data.TensorDataset(features, label)),
        loss=_loss,
        schedule=Schedule(PoissonSampling(examples=len(label), batch_size=len(label) // 4), 2.67, 300),
        recipe=Recipe(progress / clip_bound, optimiser=Optimiser.SGD, decay=False),
        clipping=Clipping.abadi(clip_bound),
        layout=None,
        key=key,
        private=False,
    )
    with torch.no_grad():
        return calibration_report(Predictions.from_logits(model(test_features), test_label))


def test_the_loss_of_noisy_digits_doubles_where_the_accuracy_stays() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    small, right = _digits(0.03, progress=1.0), _digits(3.0, progress=1.0)
    assert abs(small.accuracy - right.accuracy) < 0.02
    assert small.nll > 1.5 * right.nll
    assert small.temperature.value > 1.5 * right.temperature.value
