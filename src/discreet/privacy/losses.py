"""A fast second composition of privacy losses: it proposes, and `discreet.privacy.accounting` decides.

The same discretisation as dp_accounting's (connect-the-dots, arXiv:2207.04380) on the same grid, but vectorised, and
composed under an exponential tilt: a step's distribution p becomes ``p(l) e^(theta l) / M(theta)``, its n-fold power is
taken by a Fourier transform around the epsilon that is asked for, and the tilt is taken back. Rounding is then relative
to the tail and not to the whole mass, so that even a delta of 1e-14 over a million steps is smooth in every argument: a
root search needs that. It agrees with the referee to about 1e-6 and takes a tenth to a hundredth of its time; still
nothing here is ever reported.

Pairs of distributions, for x = the noisy sum along one example's gradient (Zhu, Dong & Wang, arXiv:2106.08567):

    remove   (1 - q) N(0, s^2) + q N(1, s^2)   against   N(0, s^2)
    add      N(0, s^2)                         against   (1 - q) N(0, s^2) + q N(1, s^2)
    replace  (1 - q) N(0, s^2) + q N(1, s^2)   against   (1 - q) N(0, s^2) + q N(-1, s^2)

Symbols: q = rate; s = sigma; l = privacy loss; h = grid; K = log of the moment generating function of the total loss.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft, special

_TAIL_SIGMAS = 10.0
_TAIL_LOG_MASS = math.log(1e13)
_CHERNOFF_SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 5.5, 7.0, 9.0)
_NEWTON_STEPS = 60
_LARGEST_TILT = 1e5


class Direction(enum.Enum):
    """Which pair of distributions."""

    REMOVE = "remove"
    ADD = "add"
    REPLACE = "replace"


@dataclass(frozen=True)
class Part:
    """One component of a step: with probability ``weight``, and known to everybody, the step is this pair."""

    weight: float
    rate: float
    sigma: float
    direction: Direction


@dataclass(frozen=True)
class Steps:
    """``count`` equal steps, each a mixture of parts (one part, unless batches are truncated)."""

    parts: tuple[Part, ...]
    count: int


def step_delta(part: Part, epsilons: np.ndarray) -> np.ndarray:
    """Hockey-stick divergence of one step, exactly; negative epsilons too. Shape (n,) -> (n,).

    The losses are monotone in x, so each divergence is ``P(tail) - e^eps Q(tail)`` of the tail in which the loss is
    above epsilon.
    """
    rate, sigma = part.rate, part.sigma
    epsilons = np.asarray(epsilons, dtype=np.float64)
    if part.direction is Direction.REPLACE:
        cut = sigma**2 * (epsilons / 2 + _asinh_scaled(epsilons / 2, _log_odds_against(rate) + 0.5 / sigma**2))
        upper = _mixture_tail(cut, rate, sigma, 1.0)
        lower = _mixture_tail(cut, rate, sigma, -1.0)
        return np.clip(upper - _times_exp(epsilons, lower), 0.0, 1.0)
    sign = 1.0 if part.direction is Direction.REMOVE else -1.0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        cut = 0.5 + sigma**2 * np.log1p(np.expm1(sign * epsilons) / rate)
    inside = sign * epsilons > (math.log1p(-rate) if rate < 1 else -math.inf)
    cut = np.where(inside, cut, 0.0)
    if part.direction is Direction.REMOVE:
        inner = _mixture_tail(cut, rate, sigma, 1.0) - _times_exp(epsilons, special.ndtr(-cut / sigma))
        outer = -np.expm1(np.minimum(epsilons, 0.0))
    else:
        below = (1 - rate) * special.ndtr(cut / sigma) + rate * special.ndtr((cut - 1) / sigma)
        inner, outer = special.ndtr(cut / sigma) - _times_exp(epsilons, below), 0.0
    return np.clip(np.where(inside, inner, outer), 0.0, 1.0)


def loss_range(part: Part) -> tuple[float, float]:
    """Smallest and largest loss within ten standard deviations of the noise on both sides."""
    rate, sigma = part.rate, part.sigma

    def ratio(x: float) -> float:
        """``ln((1 - q) + q e^((2x - 1) / 2 s^2))``"""
        far = math.log(rate) + (x - 0.5) / sigma / sigma  # the square of a huge sigma would overflow
        return float(np.logaddexp(math.log1p(-rate) if rate < 1 else -math.inf, far))

    tail = _TAIL_SIGMAS * sigma
    if part.direction is Direction.REPLACE:
        furthest = ratio(1 + tail) - ratio(-1 - tail)
        return -furthest, furthest
    low, high = ratio(-tail), ratio(1 + tail)
    return (low, high) if part.direction is Direction.REMOVE else (-high, -low)


def composed_epsilon(steps: Sequence[Steps], *, delta: float, grid: float) -> float:
    """Epsilon of all steps together, one direction, on a grid of spacing h. Not negative; no bound is claimed.

    Args:
        steps: at least one, each of count >= 1.
        delta: in (0, 1).
        grid: h > 0.
    """
    laws = [_Law.of(item, grid) for item in steps]
    budget = delta - sum(law.count * law.lost for law in laws)
    if budget <= 0:
        return math.inf
    theta = _tilt(laws, log_delta=math.log(budget))
    low, probabilities = _tilted_power(laws, theta=theta, grid=grid)
    losses = grid * (low + np.arange(len(probabilities)))
    return max(0.0, _epsilon(losses, probabilities, log_scale=_cumulants(laws, theta)[0], theta=theta, delta=budget))


@dataclass(frozen=True)
class _Law:
    """One step's loss on the grid: probabilities of ``h (first + k)``, and the mass ``lost`` to infinity."""

    first: int
    losses: np.ndarray
    log_mass: np.ndarray
    lost: float
    count: int

    @classmethod
    def of(cls, steps: Steps, grid: float) -> _Law:
        ends = [loss_range(part) for part in steps.parts]
        first = math.floor(min(low for low, _ in ends) / grid)
        last = math.ceil(max(high for _, high in ends) / grid)
        losses = grid * np.arange(first, last + 1)
        deltas = np.minimum.accumulate(sum(part.weight * step_delta(part, losses) for part in steps.parts))
        with np.errstate(divide="ignore"):
            log_mass = np.log(_connect_dots(deltas, grid))
        return cls(first=first, losses=losses, log_mass=log_mass, lost=float(deltas[-1]), count=steps.count)

    def tilted(self, theta: float) -> tuple[float, np.ndarray]:
        """``(K(theta), tilted probabilities)`` of one step."""
        exponents = self.log_mass + theta * self.losses
        top = float(exponents.max())
        weights = np.exp(exponents - top)
        total = float(weights.sum())
        return top + math.log(total), weights / total


def _connect_dots(deltas: np.ndarray, grid: float) -> np.ndarray:
    """Probabilities on the grid whose divergence meets ``deltas`` at every point, and lies above between (Algorithm 1,
    arXiv:2207.04380). The last entry of ``deltas`` is the mass at infinity.
    """
    if len(deltas) == 1:
        return 1 - deltas
    drops = np.diff(deltas)
    inner = (drops[1:] - drops[:-1] * math.exp(grid)) / math.expm1(grid)
    ends = 1 - deltas[0] + drops[0] / math.expm1(grid), drops[-1] / math.expm1(-grid)
    return np.maximum(0.0, np.concatenate([[ends[0]], inner, [ends[1]]]))


def _cumulants(laws: Sequence[_Law], theta: float) -> tuple[float, float, float]:
    """K, K' and K'' of the total at theta."""
    value = slope = curvature = 0.0
    for law in laws:
        log_mean, weights = law.tilted(theta)
        mean = float(weights @ law.losses)
        value += law.count * log_mean
        slope += law.count * mean
        curvature += law.count * float(weights @ (law.losses - mean) ** 2)
    return value, slope, curvature


def _tilt(laws: Sequence[_Law], *, log_delta: float) -> float:
    """The theta at which Chernoff's bound reaches delta: ``theta K'(theta) - K(theta) = -ln delta``.

    Only speed and rounding depend on it. Newton steps in the logarithm of theta, kept inside a bracket.
    """
    low, high, theta = 0.0, _LARGEST_TILT, 1.0
    for _ in range(_NEWTON_STEPS):
        value, slope, curvature = _cumulants(laws, theta)
        excess = theta * slope - value + log_delta
        low, high = (theta, high) if excess < 0 else (low, theta)
        if abs(excess) < 0.05 * -log_delta or high - low < 1e-3 * high:
            break
        growth = theta * theta * curvature
        step = math.exp(max(-3.0, min(3.0, -excess / growth))) if growth > 0 else math.inf
        proposal = theta * step
        theta = proposal if low < proposal < high else (math.sqrt(low * high) if low > 0 else high / 8)
    return theta


def _tilted_power(laws: Sequence[_Law], *, theta: float, grid: float) -> tuple[int, np.ndarray]:
    """Index of the first point, and the tilted distribution of the total from there on."""
    low, high = _window(laws, theta)
    first, points = math.floor(low / grid), math.ceil(high / grid) - math.floor(low / grid) + 1
    size = fft.next_fast_len(max(points, 16), real=True)
    spectrum, offset = np.ones(size // 2 + 1, dtype=np.complex128), 0
    for law in laws:
        weights = law.tilted(theta)[1]
        folded = np.pad(weights, (0, -len(weights) % size)).reshape(-1, size).sum(axis=0)
        spectrum *= fft.rfft(folded) ** law.count
        offset += law.count * law.first
    probabilities = fft.irfft(spectrum, size)
    return first, np.roll(probabilities, (offset - first) % size)[:points]


def _window(laws: Sequence[_Law], theta: float) -> tuple[float, float]:
    """Losses outside of which the tilted total has at most 1e-13 of its mass on either side (Chernoff)."""
    value, slope, curvature = _cumulants(laws, theta)
    spread = math.sqrt(max(curvature, 1e-300))
    reach = max(float(law.losses[-1] - law.losses[0]) for law in laws) * sum(law.count for law in laws)
    low, high = slope - reach, slope + reach
    for scale in _CHERNOFF_SCALES:
        order = scale / spread
        high = min(high, (_value(laws, theta + order) - value + _TAIL_LOG_MASS) / order)
        low = max(low, -(_value(laws, theta - order) - value + _TAIL_LOG_MASS) / order)
    return min(low, slope), max(high, slope)


def _value(laws: Sequence[_Law], theta: float) -> float:
    return sum(law.count * law.tilted(theta)[0] for law in laws)


def _epsilon(losses: np.ndarray, probabilities: np.ndarray, *, log_scale: float, theta: float, delta: float) -> float:
    """The epsilon with ``sum over l > eps of (1 - e^(eps - l)) p(l) = delta``, where p is the tilt taken back."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(probabilities, 0.0)) + log_scale - theta * losses
    # Between two grid points both sums stand still, so that delta(eps) = above - e^eps below is solved exactly.
    above = np.logaddexp.accumulate(logs[::-1])[::-1]
    below = np.logaddexp.accumulate((logs - losses)[::-1])[::-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        at_grid = above[1:] + np.log(-np.expm1(np.minimum(losses[:-1] + below[1:] - above[1:], 0.0)))
    enough = np.flatnonzero(at_grid > math.log(delta))
    index = int(enough[-1]) + 1 if len(enough) else 0
    excess = above[index] - math.log(delta)
    if excess <= 0:
        return float(losses[index])
    return float(math.log(delta) + excess + math.log(-math.expm1(-excess)) - below[index])


def _mixture_tail(cut: np.ndarray, rate: float, sigma: float, centre: float) -> np.ndarray:
    """``P[x > cut]`` of ``(1 - q) N(0, s^2) + q N(centre, s^2)``."""
    return (1 - rate) * special.ndtr(-cut / sigma) + rate * special.ndtr((centre - cut) / sigma)


def _times_exp(exponents: np.ndarray, values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.exp(np.minimum(exponents + np.log(values), 700.0))


def _log_odds_against(rate: float) -> float:
    return math.log1p(-rate) - math.log(rate) if rate < 1 else -math.inf


def _asinh_scaled(x: np.ndarray, log_factor: float) -> np.ndarray:
    """``asinh(e^log_factor sinh(x))`` without overflow."""
    size = np.abs(x)
    with np.errstate(divide="ignore"):
        log_argument = log_factor + size + np.log(-np.expm1(-2 * size)) - math.log(2)
    grown = np.logaddexp(0.5 * np.logaddexp(0.0, 2 * log_argument), log_argument)
    return np.sign(x) * grown
