"""Clipping functions: how one example's gradient norm becomes its factor, and what that bounds.

| rule | factor c(n) | sup c(n) n | at n = 0 | for n to infinity |
|---|---|---|---|---|
| abadi | min(1, R / n) | R | 1 | c n = R |
| automatic | R / (n + gamma) | R, not attained | R / gamma | c n -> R |
| normalized | R / n, fading to 0 from n = 2e-6 to 1e-6 | R | 0, by decree | c n = R |
| psac | R / (n + r / (n + r)) | R, not attained | R | c n -> R |
| global | 1 where n <= R, fading to 0 at n = 9/8 R | R | 1 | 0: such an example is never learned |
| quantile | abadi with R that follows a quantile of the norms | R of the step | 1 | c n = R |
| none | 1 | infinite | 1 | - |

Every rule but none fades to 0 from n = 1e15 (of bounds below 1e-3, 1e18 R) to a hundred times that, and gives 0 to a
norm that is not finite. Adding or removing one example moves the sum by at most sup c n; replacing one, by at most
twice that, attained by opposite gradients.

No rule jumps. In other company the library's own arithmetic rounds a norm otherwise, so that all examples that are
alike would change sides of a jump at once.

Shape legend: B = examples of a microbatch.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from discreet.core.style import Groups, Style
from discreet.errors import ConfigError

ROUNDING_MARGIN = 1.0 - 2.0**-15
"""Factors are shrunk by this, so that float32 rounding of the weighted sum cannot pass the bound. Uses that oppose each
other are large where they meet other examples in one sum; hostile batches moved it by 1.2e-5 of the bound at most."""

BELOW = ".below"
"""Name of the count in a clipped sum under the quantile rule; no parameter's name begins with a dot."""

_SMALLEST, _SMALLEST_SHARE = 1e-9, 1e-12
"""No group is bounded below this: norms are taken to about so much, and some squares of smaller numbers are lost."""
_NO_DIRECTION = 1e-6
"""A norm below this has rounding in its direction and in itself: the normalised rule gives such an example nothing."""
_LARGEST_BOUND = 1e12
_FAR, _FADED, _TIMES = 1e15, 100, 1e3
"""From 1e15, or 1e18 times a smaller bound, to a hundred times that what a norm gets fades, before squares are infinite
in float32 and not in float64, and before factors below 1e-30 are dropped."""
FADING = 1 / 8
"""Width, over the bound, of what stands for a jump at it."""
STEEPNESS_BELOW = 1 + 2 / FADING
"""`Clipping.steepness` of a count, over the half that an example counts at most."""


class ClippingKind(enum.Enum):
    """The clipping functions. Each maps a norm n and a bound R to a factor c with c * n <= R."""

    ABADI = "abadi"
    AUTOMATIC = "automatic"
    NORMALIZED = "normalized"
    PSAC = "psac"
    GLOBAL = "global"
    QUANTILE = "quantile"
    NONE = "none"


_SOFTENED = {ClippingKind.AUTOMATIC: "gamma", ClippingKind.PSAC: "r"}
"""Rules with a second number, and what it is called in their record."""


@dataclass(frozen=True)
class Following:
    """How the bound of the quantile rule moves: ``R <- R exp(-rate (released share below R - quantile))``.

    (Andrew et al., Eq. 1, arXiv:1905.03871.)

    Attributes:
        quantile: share of the examples that should be below R, in (0, 1).
        rate: largest change of log R in one step, > 0.
        count_share: k > 0. The count is one more coordinate of the sum: an example moves it by 1/2, which counts as
            ``k R / 2``. So the gradient's noise grows by ``sqrt(1 + k^2 / 4)``, half a percent at 0.2, and the count's
            noise is ``sigma sqrt(1 + k^2 / 4) / k`` examples.
    """

    quantile: float
    rate: float = 0.2
    count_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ConfigError(f"quantile {self.quantile}: must be above 0 and below 1; 0.9 keeps probabilities honest.")
        for name, value, usual in (("rate", self.rate, 0.2), ("count share", self.count_share, 0.2)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} {value}: must be a finite number above 0; the usual value is {usual}.")


@dataclass(frozen=True)
class Division:
    """A rule, shared out over the groups of one model's parameters.

    Attributes:
        rules: group -> the rule that clips it.
        noise_weights: name -> noise of this tensor, relative to that of a tensor that is not listed.
        sensitivity: largest L2 change of all tensors, each over its noise weight, for one example added or removed.
    """

    rules: Mapping[tuple[str, ...], Clipping]
    noise_weights: Mapping[str, float]
    sensitivity: float

    @property
    def groups(self) -> Groups:
        """The groups, in the order of their first member."""
        return tuple(self.rules)


@dataclass(frozen=True)
class Clipping:
    """How each example's contribution to a sum is bounded, over all parameters or group by group (`Style`).

    - ``Clipping.abadi(R)``: ``min(1, R / n)`` (Abadi et al., arXiv:1607.00133).
    - ``Clipping.automatic(gamma)``: ``R / (n + gamma)`` with R = 1, which only rescales the rate (AUTO-S,
      arXiv:2206.07136).
    - ``Clipping.normalized()``: ``1 / n`` (AUTO-V, the same paper), fading to 0 from norms of 2e-6 to 1e-6.
    - ``Clipping.psac(r)``: ``1 / (n + r / (n + r))`` (arXiv:2212.00328): small gradients are not blown up.
    - ``Clipping.global_(R)``: 1 up to R and 0 beyond 9/8 R (the final form of arXiv:2106.07830, which jumps at R).
      Experimental: whatever is beyond is never learned; safe only with R above nearly all norms.
    - ``Clipping.quantile(q)``: abadi, with R following the q-quantile of the norms privately (arXiv:1905.03871).
    - ``Clipping.none()``: factor 1 and infinite sensitivity. Such a sum can only be released without a guarantee.

    **Guarantees.** For every norm, ``factor(n) * n <= clip_bound``, no steeper than `steepness` says; a norm that is
    not finite gets factor 0, so an example that produced NaN or infinity contributes exactly nothing.
    """

    kind: ClippingKind
    clip_bound: float
    gamma: float = 0.0
    style: Style = field(default_factory=Style.flat)
    following: Following | None = None

    def __post_init__(self) -> None:
        if not self.clip_bound > 0 or math.isnan(self.clip_bound):
            raise ConfigError(f"clip bound {self.clip_bound}: must be above 0; pass e.g. Clipping.abadi(1.0).")
        if math.isinf(self.clip_bound) and self.kind is not ClippingKind.NONE:
            raise ConfigError("clip bound inf: bounds nothing; use Clipping.none() for training without a guarantee.")
        if max(self.clip_bound, self.gamma) > _LARGEST_BOUND and self.kind is not ClippingKind.NONE:
            number = f"{max(self.clip_bound, self.gamma):g}"
            raise ConfigError(f"clipping at {number}: must be at most {_LARGEST_BOUND:g}; scale the loss down instead.")
        if self.kind in _SOFTENED and not (0 < self.gamma < math.inf):
            name = _SOFTENED[self.kind]
            raise ConfigError(f"{name} {self.gamma}: must be a finite number above 0; the usual value is 0.01 to 0.1.")
        least = self.clip_bound * self.style.least_share
        if min(least, self.gamma if self.kind in _SOFTENED else math.inf) < _SMALLEST_SHARE * (1 - 1e-9):
            raise ConfigError(
                f"clip bound {self.clip_bound} in groups, the least of them at {least:.3g}: each must be at least "
                f"{_SMALLEST_SHARE:g}, below which norms are not told from zero; choose other proportions."
            )
        if (self.kind is ClippingKind.QUANTILE) != (self.following is not None):
            raise ConfigError(f"clipping {self.kind.value}: the quantile rule, and no other, follows the norms.")

    @classmethod
    def abadi(cls, clip_bound: float, *, style: Style | None = None) -> Clipping:
        """Scale down to norm ``clip_bound`` when above it; leave alone when below."""
        return cls(ClippingKind.ABADI, _reach("clip bound", clip_bound), style=style or Style.flat())

    @classmethod
    def automatic(cls, gamma: float = 0.01, *, style: Style | None = None) -> Clipping:
        """Normalise every gradient, softly at zero: ``g / (|g| + gamma)``."""
        return cls(ClippingKind.AUTOMATIC, 1.0, gamma=_reach("gamma", gamma), style=style or Style.flat())

    @classmethod
    def normalized(cls, *, style: Style | None = None) -> Clipping:
        """Normalise every gradient: ``g / |g|``, and 0 where there is no direction to speak of."""
        return cls(ClippingKind.NORMALIZED, 1.0, style=style or Style.flat())

    @classmethod
    def psac(cls, r: float = 0.1, *, style: Style | None = None) -> Clipping:
        """Normalise large gradients and leave small ones small: ``g / (|g| + r / (|g| + r))``."""
        return cls(ClippingKind.PSAC, 1.0, gamma=_reach("r", r), style=style or Style.flat())

    @classmethod
    def global_(cls, clip_bound: float, *, style: Style | None = None) -> Clipping:
        """Experimental: leave alone up to norm ``clip_bound``, and drop whatever is longer."""
        return cls(ClippingKind.GLOBAL, _reach("clip bound", clip_bound), style=style or Style.flat())

    @classmethod
    def quantile(
        cls,
        quantile: float = 0.9,
        *,
        clip_bound: float = 1.0,
        rate: float = 0.2,
        count_share: float = 0.2,
        style: Style | None = None,
    ) -> Clipping:
        """Abadi, from ``clip_bound`` on, with a bound that follows a quantile of the norms.

        The count of norms below the bound is released together with the gradient, as one Gaussian query on one batch:
        sigma of the plan is that of both together, ``sigma^-2 = sigma_gradient^-2 + (2 sigma_count)^-2``.
        """
        following = Following(float(quantile), rate=float(rate), count_share=float(count_share))
        bound = _reach("clip bound", clip_bound)
        return cls(ClippingKind.QUANTILE, bound, style=style or Style.flat(), following=following)

    @classmethod
    def none(cls) -> Clipping:
        """No bound. For ``epsilon = inf`` only; `release` refuses to add noise to such a sum."""
        return cls(kind=ClippingKind.NONE, clip_bound=math.inf)

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of the clipped gradient when one example is added or removed; twice that for replace-one.

        Over all groups together. What a release needs is `Division.sensitivity`, which knows of counts and of noise
        weights.
        """
        return self.clip_bound

    @property
    def largest_factor(self) -> float:
        """No factor is above it, whatever the norm."""
        if self.kind is ClippingKind.NORMALIZED:
            return self.clip_bound / _NO_DIRECTION
        return max(1.0, self.clip_bound / self.gamma) if self.kind in _SOFTENED else 1.0

    @property
    def steepness(self) -> float:
        """Largest ``|d(c n)| / R`` per relative change of n; 1.02 covers where norms fade."""
        steep = {ClippingKind.GLOBAL: 1 + 1 / FADING, ClippingKind.NORMALIZED: 2.0, ClippingKind.NONE: 0.0}
        return steep.get(self.kind, 1.02)

    def margin(self, examples: int) -> float:
        """Shrinks shares by what one example may move the float32 rounding of all others, and of a sum over them.

        One spacing for each example, as steeply as its share follows its norm, and 256 for opposed uses that meet
        others in a sum: hostile batches moved 4e-5 R. What a count moves by besides, the gradient makes room for. Of as
        many examples as there may be in a microbatch: one more, where memory runs out, must not move all others.
        """
        rounded = (256 + examples) * torch.finfo(torch.float32).eps
        half = 0.0 if self.following is None else self.following.count_share / 2
        room = 1.0 + half**2 - (half * (1.0 + STEEPNESS_BELOW * rounded)) ** 2
        return math.sqrt(max(room, 0.0)) / (1.0 + self.steepness * rounded)

    def divide(self, names: Iterable[str]) -> Division:
        """Share the rule out over the groups of these parameter names.

        Group r is clipped to R_r with ``sum R_r^2 = R^2`` and gets noise ``sigma g_r S``, ``S^2 = sum (R_r / g_r)^2``:
        a public scaling of each group makes this one Gaussian query of sensitivity S and noise multiplier sigma.
        """
        known = _divided(self, tuple(names))
        return Division(dict(known.rules), dict(known.noise_weights), known.sensitivity)

    def factor(self, norm_B: Tensor) -> Tensor:
        """Factors for the given norms.

        Args:
            norm_B: per-example gradient norms, shape (B,), at least float32; may hold NaN or infinity.

        Returns:
            Factors, shape (B,), finite and at least 0; 0 where the norm is not finite.
        """
        bound = self.clip_bound * ROUNDING_MARGIN
        if self.kind in (ClippingKind.ABADI, ClippingKind.QUANTILE):
            factor_B = (bound / norm_B).clamp(max=1.0)
        elif self.kind is ClippingKind.AUTOMATIC:
            factor_B = bound / (norm_B + self.gamma)
        elif self.kind is ClippingKind.NORMALIZED:
            factor_B = bound / norm_B.clamp(min=_NO_DIRECTION) * (norm_B / _NO_DIRECTION - 1).clamp(0.0, 1.0)
        elif self.kind is ClippingKind.PSAC:
            factor_B = bound / (norm_B + self.gamma / (norm_B + self.gamma))
        elif self.kind is ClippingKind.GLOBAL:
            factor_B = (bound / norm_B).clamp(max=1.0) * (1 - (norm_B / bound - 1) / FADING).clamp(0.0, 1.0)
        else:
            factor_B = torch.ones_like(norm_B)
        if self.kind is not ClippingKind.NONE:
            factor_B = factor_B * self._reached(norm_B)
        # A subnormal factor has lost its last bits, and may have been rounded up: nothing is within the bound.
        counts = torch.isfinite(norm_B) & (factor_B >= torch.finfo(factor_B.dtype).tiny)
        return torch.where(counts, factor_B, 0.0)

    def below(self, norm_B: Tensor) -> Tensor:
        """How many of these norms are within the bound, less one half each: () float64. Bad norms count as nothing.

        One near the bound counts in part, from 15/16 to 17/16 of it.
        """
        norm_B = norm_B.to(torch.float64)
        inside_B = ((1 - norm_B / self.clip_bound) / FADING).clamp(-0.5, 0.5) * self._reached(norm_B)
        return torch.where(torch.isfinite(norm_B), inside_B, 0.0).sum()

    def _reached(self, norm_B: Tensor) -> Tensor:
        """1, fading to 0 where norms may be infinite when they are taken in another way, or factors vanish."""
        far = _FAR * min(1.0, _TIMES * self.clip_bound)
        return ((_FADED * far - norm_B) / ((_FADED - 1) * far)).clamp(0.0, 1.0)

    def followed(self, below: float) -> Clipping:
        """The rule of the next step.

        Args:
            below: the released count of `below` over the expected batch: in [-1/2, 1/2] but for its noise.
        """
        assert self.following is not None
        share = min(max(below + 0.5, 0.0), 1.0)
        bound = self.clip_bound * math.exp(-self.following.rate * (share - self.following.quantile))
        smallest = max(_SMALLEST, _SMALLEST_SHARE / self.style.least_share)
        return replace(self, clip_bound=min(max(bound, smallest), _LARGEST_BOUND))

    def describe(self) -> dict[str, str | float]:
        """The public record of this rule, as it stands in ``plan.json``."""
        record: dict[str, str | float] = {"kind": self.kind.value, "style": self.style.describe()}
        if self.kind is not ClippingKind.NONE:
            record["clip_bound"] = self.clip_bound
        if self.kind in _SOFTENED:
            record[_SOFTENED[self.kind]] = self.gamma
        if self.following is not None:
            record |= {"quantile": self.following.quantile, "rate": self.following.rate}
            record["count_share"] = self.following.count_share
        return record


@functools.lru_cache(maxsize=64)
def _divided(rule: Clipping, names: tuple[str, ...]) -> Division:
    groups = rule.style.split(names)
    bounds, weights = rule.style.proportions(groups)
    length = math.hypot(*bounds)
    rules = {
        group: rule
        if len(groups) == 1
        else replace(rule, clip_bound=rule.clip_bound * bound / length, style=Style.flat())
        for group, bound in zip(groups, bounds, strict=True)
    }
    if rule.kind is ClippingKind.NONE:
        return Division(rules, {}, math.inf)
    pairs = list(zip(groups, weights, strict=True))
    # Equal weights leave R as it is, to the last bit; hypot would round.
    equal = set(weights) == {1.0}
    reach = rule.clip_bound if equal else math.hypot(*(rules[group].clip_bound / g for group, g in pairs))
    noise_weights = {name: weight for group, weight in pairs if weight != 1.0 for name in group}
    if rule.following is None:
        return Division(rules, noise_weights, reach)
    share = rule.following.count_share
    # The count moves by 1/2, over its noise weight: k S / 2.
    return Division(rules, {**noise_weights, BELOW: 1.0 / (share * reach)}, reach * math.hypot(1.0, share / 2))


def _reach(name: str, value: float) -> float:
    """Norms are taken to 1e-12 where squares vanish: a rule that tells smaller ones apart would be fooled by them."""
    if 0 < value < _SMALLEST:
        raise ConfigError(f"{name} {value}: must be at least {_SMALLEST:g}; scale the loss up instead.")
    return float(value)


@dataclass(frozen=True)
class ClippedSum:
    """A sum over examples in which each example's share is bounded. Not yet private: see `discreet.core.noise.release`.

    Attributes:
        tensors: name -> sum, float32 or float64; float64 when it was added up from several.
        sensitivity: largest L2 change, over all tensors together, when one example is added or removed; each tensor
            taken over its noise weight.
        noise_weights: name -> noise of this tensor relative to the others', public and above 0; 1 where not listed.
    """

    tensors: Mapping[str, Tensor]
    sensitivity: float
    noise_weights: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """The sum over two disjoint sets of examples under the same bound (microbatches of one logical batch).

        In float64: a float32 sum is rounded at its own size, and how depends on every example. Without one of 65,536
        that point the same way it moved by 0.4 % more than the bound.
        """
        self._need_like(other)
        summed = {name: value.to(torch.float64) + other.tensors[name] for name, value in self.tensors.items()}
        return replace(self, tensors=summed)

    def __iadd__(self, other: ClippedSum) -> ClippedSum:
        """The same, in this sum's own memory where that is float64 already."""
        if any(value.dtype is not torch.float64 for value in self.tensors.values()):
            return self + other
        self._need_like(other)
        for name, value in self.tensors.items():
            value.add_(other.tensors[name])
        return self

    def _need_like(self, other: ClippedSum) -> None:
        same = self.sensitivity == other.sensitivity and self.noise_weights == other.noise_weights
        if self.tensors.keys() != other.tensors.keys() or not same:
            raise ConfigError("cannot add clipped sums of other tensors or bounds; use one model and one Clipping.")
