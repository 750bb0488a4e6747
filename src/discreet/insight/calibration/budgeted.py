"""The calibration report of private examples within a budget: one Gaussian query, and figures that say what noise adds.

Shape legend: N = examples, K = classes, M = bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from discreet.core.calibration import (
    BRIER,
    COUNT,
    GAP,
    NLL,
    RIGHT,
    Neighbours,
    Reliability,
    summed_reliability,
    unit_of,
    unweighted,
)
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError
from discreet.insight.calibration.bins import BINS
from discreet.privacy.accounting import Gaussian, Relation, SampledGaussian, solve_step_noise

NLL_BOUND = 5.0
"""Nats that one example's loss counts as at most: a true class of probability .0067."""

_NEIGHBOURS = {Relation.ADD_REMOVE: Neighbours.ADD_REMOVE, Relation.REPLACE_ONE: Neighbours.REPLACE_ONE}


@dataclass(frozen=True)
class BudgetedReport:
    """A calibration report that carries its noise: released, all of it.

    There is no largest gap, no bins of equal mass and no optimal temperature here: a maximum of noisy gaps is noise,
    equal mass needs private quantiles, and a temperature is a question of its own (`fit_temperature`).

    Attributes:
        examples: N, public.
        accuracy, brier: as in the exact report. nll: with each example's loss cut at ``nll_bound``.
        gap: mean confidence minus accuracy.
        ece: ``sum_m |S_m + noise| / N``. Noise can only add to it.
        ece_noise: ``M s sqrt(2 / pi) / N``, s the noise of one bin: what noise alone makes of a perfect model on
            infinitely many examples, on average; on average it adds no more to any model.
        ece_floor: what a perfectly calibrated model would show on so many examples with this noise.
        stds: standard deviations of accuracy, nll, brier and gap from the noise.
        edges, count_M, gap_M: the noisy reliability table: ``S_m = sum (right - confidence)`` in each bin.
        count_std, gap_std: noise of one entry of it.
        nll_bound, noise_multiplier: public numbers of the query. private: False with a test seed, or without noise.
    """

    examples: int
    accuracy: float
    brier: float
    nll: float
    gap: float
    ece: float
    ece_noise: float
    ece_floor: float
    stds: dict[str, float]
    edges: tuple[float, ...]
    count_M: tuple[float, ...]
    gap_M: tuple[float, ...]
    count_std: float
    gap_std: float
    nll_bound: float
    noise_multiplier: float
    private: bool

    @property
    def ece_without_noise(self) -> float:
        """The ECE less what noise adds on average at most: a cautious figure, never below 0."""
        return max(0.0, self.ece - self.ece_noise)

    @property
    def notable(self) -> bool:
        """Whether the ECE is more than half above what a perfect model would show."""
        return self.ece > 1.5 * self.ece_floor

    def to_json(self) -> dict[str, object]:
        """JSON values."""
        return {
            "private": self.private,
            "examples": self.examples,
            "accuracy": self.accuracy,
            "brier": self.brier,
            "nll": self.nll,
            "nll_bound": self.nll_bound,
            "gap": self.gap,
            "ece": self.ece,
            "ece_noise": self.ece_noise,
            "ece_without_noise": self.ece_without_noise,
            "ece_floor": self.ece_floor,
            "stds": dict(self.stds),
            "reliability": {
                "edges": list(self.edges),
                "count": list(self.count_M),
                "gap": list(self.gap_M),
                "count_std": self.count_std,
                "gap_std": self.gap_std,
            },
            "noise_multiplier": self.noise_multiplier,
        }


def report_noise(*, epsilon: float, delta: float, relation: Relation = Relation.ADD_REMOVE) -> float:
    """The noise multiplier with which the one query is (epsilon, delta)-DP, certified by the accountant."""
    one = SampledGaussian(sample_rate=1.0, noise_multiplier=1.0, count=1)
    return solve_step_noise(one, epsilon=epsilon, delta=delta, relation=relation).noise_multiplier


def budgeted_report(
    logits_NK: Tensor,
    target_N: Tensor,
    *,
    examples: int,
    noise_multiplier: float,
    source: NoiseSource,
    charge: Callable[[Gaussian], object],
    relation: Relation = Relation.ADD_REMOVE,
    bins: int = BINS,
) -> BudgetedReport:
    """Measure calibration on private examples in one Gaussian query.

    **Guarantees.** One query of ``noise_multiplier`` with the exact sensitivity of `Reliability.sensitivity` under
    ``relation``, charged before it is made. One row moves it by no more, whatever it holds. Everything else is
    arithmetic on the answer; N is public. Logits must not depend on other private rows.

    Args:
        logits_NK: scores before the softmax. target_N: class indices; any other label is a wrong answer.
        examples: N as it is public; all means are over it.
        noise_multiplier: see `report_noise`. source: the noise; one position is claimed.
        charge: called with the query before it is made: reserve it in a ledger here.
        relation: what neighbours are. bins: M, at least 3.

    Raises:
        ConfigError: N is below 1, or shapes do not fit.
    """
    if examples < 1:
        raise ConfigError(f"examples={examples}: must be at least 1; pass the public number of examples.")
    asked = Reliability(bins=bins, nll_bound=NLL_BOUND)
    charge(Gaussian(noise_multiplier=noise_multiplier))
    total = summed_reliability(logits_NK, target_N, asked=asked, neighbours=_NEIGHBOURS[relation])
    released = release(total, noise_multiplier=noise_multiplier, source=source)
    found = {name: unweighted(name, value, examples=examples, asked=asked) for name, value in released.tensors.items()}
    std = {name: unit_of(name, examples=examples, asked=asked) * released.noise_std for name in found}
    gap_M, count_M = found[GAP], found[COUNT]
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device="cpu")
    return BudgetedReport(
        examples=examples,
        accuracy=_within(float(found[RIGHT]), 1.0),
        brier=_within(float(found[BRIER]), 2.0),
        nll=_within(float(found[NLL]), NLL_BOUND),
        gap=-float(gap_M.sum()) / examples,
        ece=float(gap_M.abs().sum()) / examples,
        ece_noise=noise_share(std[GAP], examples=examples, bins=bins),
        ece_floor=_floor(count_M, edges, std[GAP], examples=examples),
        stds={
            "accuracy": std[RIGHT],
            "nll": std[NLL],
            "brier": std[BRIER],
            "gap": math.sqrt(bins) * std[GAP] / examples,
        },
        edges=tuple(edges.tolist()),
        count_M=tuple(count_M.tolist()),
        gap_M=tuple(gap_M.tolist()),
        count_std=std[COUNT],
        gap_std=std[GAP],
        nll_bound=NLL_BOUND,
        noise_multiplier=float(noise_multiplier),
        private=released.private,
    )


def noise_share(gap_std: float, *, examples: int, bins: int) -> float:
    """``M s sqrt(2 / pi) / N``: the mean of ``sum_m |noise_m| / N``."""
    return bins * gap_std * math.sqrt(2 / math.pi) / examples


def _floor(count_M: Tensor, edges: Tensor, gap_std: float, *, examples: int) -> float:
    """``sum_m sqrt(2 (v_m + s^2) / pi) / N`` with ``v_m = n_m c_m (1 - c_m)``, c_m the middle of the bin."""
    middle_M = (edges[1:] + edges[:-1]) / 2
    variance_M = count_M.clamp(min=0) * middle_M * (1 - middle_M)
    return float((2 * (variance_M + gap_std**2) / math.pi).sqrt().sum()) / examples


def _within(value: float, most: float) -> float:
    return min(max(value, 0.0), most)
