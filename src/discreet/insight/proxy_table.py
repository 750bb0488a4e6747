"""Choice under a bound on compute, from a table of losses measured once on public data (after arXiv:2501.18914).

The loss of a private run depends on the model, the number of steps T and the noise-batch ratio nu = sigma / B, and
hardly on batch and noise apart. So one table of curves over T at a few nu, measured at a small batch, answers for every
(batch, steps) and every budget: smooth it, interpolate F(log T, log nu), enumerate what the compute allows. Numbers
only; nothing here sees an example.

Differs from the paper: the table of one model is a grid and models are not interpolated between; between the curves the
interpolation is linear in the logarithms; both monotonicities are made to hold at once by alternating projections.

Shape legend: T = numbers of steps, V = noise-batch ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from discreet.errors import ConfigError
from discreet.privacy.accounting import Accountant
from discreet.privacy.gdp import gdp_mu, seed_noise_multiplier
from discreet.privacy.plan import Plan, default_delta

WINDOW = 5
"""Rolling mean over so many neighbouring points of a curve. The paper has 10, of points that lie evenly in T; these lie
evenly in log T, where 10 of them would span a bend and lift it by 3 %."""

REACH = 4.0
"""How far beyond its longest run a curve is continued, by ``E + A / T^alpha``."""

BAND = 0.01
"""Settings within 1 % of the best loss are as good as it."""

_PROJECTIONS = 200
_PER_DOUBLING = 4


@dataclass(frozen=True)
class Curves:
    """The measurements of one model: losses along T at several noise-batch ratios.

    Attributes:
        steps_T: where the loss was measured, ascending, at least 4. ratios_V: nu = sigma / B, ascending, above 0, at
            least 2.
        loss_VT: any figure that falls as the model gets better (1 - accuracy will do), of constant learning rate; with
            several rates the best of each place.
        cost: compute of one example of one step, in the unit of the bound.
    """

    steps_T: tuple[int, ...]
    ratios_V: tuple[float, ...]
    loss_VT: tuple[tuple[float, ...], ...]
    cost: float

    def __post_init__(self) -> None:
        shape = (len(self.ratios_V), len(self.steps_T))
        loss = np.asarray(self.loss_VT, dtype=np.float64)
        if shape[0] < 2 or shape[1] < 4 or loss.shape != shape or not np.isfinite(loss).all():
            raise ConfigError(
                f"curves of shape {loss.shape} for {shape[0]} ratios and {shape[1]} numbers of steps: needs a finite "
                "loss at each place, at least 2 ratios and 4 numbers of steps."
            )
        ascending = all(np.diff(axis).min() > 0 and axis[0] > 0 for axis in (self.steps_T, self.ratios_V))
        if not ascending or not 0 < self.cost < math.inf:
            raise ConfigError("curves: steps, ratios and cost must be above 0, steps and ratios ascending; sort them.")


@dataclass(frozen=True)
class Setting:
    """One way to spend the compute.

    Attributes:
        model: name. batch_size, steps, noise_multiplier: of the private run.
        loss: what the table says. compute: ``cost * B * S``.
        continued: whether the loss lies beyond the longest measured run.
    """

    model: str
    batch_size: int
    steps: int
    noise_multiplier: float
    loss: float
    compute: float
    continued: bool


class LossSurface:
    """F(T, nu) of one model: smoothed, monotone, continued in T, interpolated.

    **Guarantees.** Never rises with T, never falls with nu, within the table and its continuation.

    Args:
        curves: what was measured.
    """

    def __init__(self, curves: Curves) -> None:
        smooth_VT = monotone(rolling_mean(np.asarray(curves.loss_VT, dtype=np.float64)))
        further_T = [round(curves.steps_T[-1] * 2**step) for step in range(1, int(math.log2(REACH)) + 1)]
        beyond_VT = np.asarray([_continued(curves.steps_T, row, further_T) for row in smooth_VT])
        loss_VT = monotone(np.concatenate([smooth_VT, beyond_VT], axis=1))
        self.cost = curves.cost
        self.fewest, self.most = curves.steps_T[0], further_T[-1]
        self.measured = curves.steps_T[-1]
        self.noisiest = curves.ratios_V[-1]
        self._quietest = curves.ratios_V[0]
        self._log_ratios, self._log_steps = np.log(curves.ratios_V), np.log([*curves.steps_T, *further_T])
        self._loss_VT = loss_VT

    def at(self, *, steps: int, ratio: float) -> float:
        """The loss after ``steps`` at nu = ``ratio``; infinite outside the table.

        Less noise than was ever measured counts as the least measured one: the true loss is at most that.
        """
        if not self.fewest <= steps <= self.most or not ratio <= self.noisiest:
            return math.inf
        row, up = _place(self._log_ratios, math.log(max(ratio, self._quietest)))
        column, along = _place(self._log_steps, math.log(steps))
        corner = self._loss_VT[row : row + 2, column : column + 2]
        return float(np.array([1 - up, up]) @ corner @ np.array([1 - along, along]))

    def setting(self, model: str, *, batch: int, steps: int, sigma: float) -> Setting:
        """The record of one way to spend the compute."""
        return Setting(
            model=model,
            batch_size=batch,
            steps=steps,
            noise_multiplier=sigma,
            loss=self.at(steps=steps, ratio=sigma / batch),
            compute=self.cost * batch * steps,
            continued=steps > self.measured,
        )


@dataclass(frozen=True)
class CappedChoice:
    """What a bound on compute allows.

    Attributes:
        best: lowest loss. recommended: the cheapest of the band.
        band: every enumerated setting within 1 % of the best, cheapest first; noise from the closed form.
    """

    best: Setting
    recommended: Setting
    band: tuple[Setting, ...]


def choose_under_compute(
    tables: Mapping[str, Curves],
    *,
    examples: int,
    epsilon: float,
    compute: float,
    delta: float | None = None,
    accountant: Accountant = Accountant.PLD,
) -> CappedChoice:
    """Enumerate (model, B, S) with ``cost * B * S <= compute`` at one budget, and read the loss of each off the tables.

    The grid has four sizes per doubling. Noise is the closed form of `discreet.privacy.gdp` while enumerating; the best
    and the recommended setting are then solved by the accountant, which below sigma = 1 moves the figure by several per
    cent.

    Args:
        tables: model -> its curves.
        examples: N. epsilon, delta: the budget; None is 1 / N^1.1.
        compute: the bound, in the unit of `Curves.cost`.
        accountant: of the noise that is reported; below sigma = 1 the rdp accountant asks for up to twice as much.

    Raises:
        ConfigError: nothing inside the tables fits the bound and the budget.
    """
    delta = default_delta(examples) if delta is None else delta
    mu = gdp_mu(epsilon, delta=delta)
    surfaces = {model: LossSurface(curves) for model, curves in tables.items()}
    found: list[Setting] = []
    for model, surface in surfaces.items():
        for steps in _grid(surface.fewest, min(surface.most, compute / surface.cost)):
            for batch in _grid(1, min(examples, compute / (surface.cost * steps))):
                sigma = seed_noise_multiplier(batch / examples, steps=steps, mu=mu)
                setting = surface.setting(model, batch=batch, steps=steps, sigma=sigma)
                if math.isfinite(setting.loss):
                    found.append(setting)
    if not found:
        raise ConfigError(
            f"compute={compute:g} at epsilon={epsilon:g}: no batch and steps inside the tables fit; allow more "
            "compute, or measure noisier and shorter curves."
        )

    def solved(setting: Setting) -> Setting:
        sizes = {"batch_size": setting.batch_size, "steps": setting.steps}
        plan = Plan.solve(examples=examples, epsilon=epsilon, delta=delta, accountant=accountant, **sizes)
        surface = surfaces[setting.model]
        sigma = plan.noise_multiplier
        return surface.setting(setting.model, batch=setting.batch_size, steps=setting.steps, sigma=sigma)

    best = min(found, key=lambda setting: (setting.loss, setting.compute))
    limit = best.loss + BAND * abs(best.loss)
    band = tuple(sorted((s for s in found if s.loss <= limit), key=lambda setting: setting.compute))
    return CappedChoice(best=solved(best), recommended=solved(band[0]), band=band)


def _place(axis: np.ndarray, value: float) -> tuple[int, float]:
    """The cell of an ascending axis that holds a value, and how far into it: 0 to 1."""
    left = min(max(int(np.searchsorted(axis, value, side="right")) - 1, 0), len(axis) - 2)
    return left, float(np.clip((value - axis[left]) / (axis[left + 1] - axis[left]), 0.0, 1.0))


def _grid(low: float, high: float) -> list[int]:
    """Whole numbers from low to high, four per doubling, both ends included; empty when high < low."""
    if high < low:
        return []
    count = math.floor(_PER_DOUBLING * math.log2(high / low) + 1e-9)
    return sorted({*(round(low * 2 ** (step / _PER_DOUBLING)) for step in range(count + 1)), math.floor(high)})


def rolling_mean(loss_VT: np.ndarray) -> np.ndarray:
    """Mean over a window of 5 places along T, cut at the ends so that it stays centred; same shape."""
    places = loss_VT.shape[1]
    half = WINDOW // 2
    columns = []
    for place in range(places):
        reach = min(half, place, places - 1 - place)
        columns.append(loss_VT[:, place - reach : place + reach + 1].mean(1))
    return np.stack(columns, axis=1)


def monotone(loss_VT: np.ndarray) -> np.ndarray:
    """The nearest table, up to alternating projections, that never rises along T and never falls along V."""
    table = loss_VT.copy()
    for _ in range(_PROJECTIONS):
        table = np.stack([-isotonic(-row) for row in table])
        table = np.stack([isotonic(column) for column in table.T], axis=1)
        if (np.diff(table, axis=1) <= 1e-12).all():
            break
    # What is left of a rise is rounding, or too slow to converge: running minima keep both orders.
    return np.minimum.accumulate(table, axis=1)


def isotonic(values: np.ndarray) -> np.ndarray:
    """Least-squares non-decreasing fit by pooling adjacent violators; shape (n,)."""
    means: list[float] = []
    sizes: list[int] = []
    for value in values:
        means.append(float(value))
        sizes.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            size = sizes[-2] + sizes[-1]
            means[-2:] = [(means[-2] * sizes[-2] + means[-1] * sizes[-1]) / size]
            sizes[-2:] = [size]
    return np.repeat(means, sizes)


def _continued(steps_T: Sequence[int], loss_T: np.ndarray, further: Sequence[int]) -> list[float]:
    """``E + A / T^alpha`` through one curve, shifted to join its end. A flat curve stays where it is."""
    if loss_T[0] - loss_T[-1] <= 1e-12:
        return [float(loss_T[-1])] * len(further)
    scale = float(steps_T[-1])
    t = np.asarray(steps_T, dtype=np.float64) / scale

    def law(x: np.ndarray, floor: float, gain: float, alpha: float) -> np.ndarray:
        return floor + gain * x**-alpha

    drop = float(loss_T[0] - loss_T[-1])
    try:
        (floor, gain, alpha), _ = optimize.curve_fit(
            law,
            t,
            loss_T,
            p0=(float(loss_T[-1]) - 0.1 * drop, 0.1 * drop, 0.5),
            bounds=([float(loss_T[-1]) - 2 * drop, 0.0, 0.05], [np.inf, np.inf, 3.0]),
            maxfev=5000,
        )
    except RuntimeError:
        return [float(loss_T[-1])] * len(further)
    shift = float(loss_T[-1]) - (floor + gain)
    return [float(floor + shift + gain * (steps / scale) ** -alpha) for steps in further]
