"""HyFreeDP to the letter (arXiv:2503.00703, Algorithm 1; arXiv:2407.02772 for the fit): a reference, and no default.

It is here to be measured against: `discreet.train.tolerance` is what sets the rate. Signs are those of the papers:
``after`` is the loss at the stepped point ``w - eta m``, ``ahead`` that at ``w + eta m``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

FIRST_RATE, FIRST_BOUND, EVERY = 1e-4, 1.0, 5


@dataclass(frozen=True)
class Quadratic:
    """``L(w - eta m) = L(w) - slope eta + curvature eta^2 / 2``."""

    slope: float
    curvature: float

    @property
    def best_rate(self) -> float:
        """``slope / curvature``: where the parabola is lowest; NaN where it is no valley."""
        return self.slope / self.curvature if self.curvature > 0 else math.nan


def fit(*, after: float, here: float, ahead: float, rate: float) -> Quadratic:
    """The parabola through the losses at ``{w - eta m, w, w + eta m}``: exact, so no residual tells how good it is.

    Args:
        after, here, ahead: private mean losses. rate: eta, above 0.
    """
    return Quadratic(slope=(ahead - after) / (2 * rate), curvature=(after + ahead - 2 * here) / rate**2)


@dataclass(frozen=True)
class HyFree:
    """The state of Algorithm 1: the rate, and the bound at which losses are clipped."""

    rate: float = FIRST_RATE
    bound: float = FIRST_BOUND

    def observe(self, *, after: float, here: float, ahead: float) -> HyFree:
        """The next state: the fitted rate where slope and curvature are above 0, and ``R_l <- L(w)``.

        The bound is kept above 0, which the paper does not say, since noise can make the released loss negative.
        """
        found = fit(after=after, here=here, ahead=ahead, rate=self.rate)
        accepted = found.slope > 0 and found.curvature > 0
        rate = found.best_rate if accepted else self.rate
        return replace(self, rate=rate, bound=here if here > 0 else self.bound)
