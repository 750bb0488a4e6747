"""Clipping functions: how one example's gradient norm becomes its factor, and what that bounds.

Shape legend: B = examples of a microbatch.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from discreet.core.style import Style
from discreet.errors import ConfigError

ROUNDING_MARGIN = 1.0 - 2.0**-15
"""Factors are shrunk by this, so that float32 rounding of the weighted sum cannot pass the bound. Uses that oppose each
other are large where they meet other examples in one sum; hostile batches moved it by 1.2e-5 of the bound at most."""


_SMALLEST = 1e-9


class ClippingKind(enum.Enum):
    """The clipping functions. Each maps a norm n and a bound R to a factor c with c * n <= R."""

    ABADI = "abadi"
    AUTOMATIC = "automatic"
    NONE = "none"


@dataclass(frozen=True)
class Clipping:
    """How each example's contribution to a sum is bounded, over all parameters or group by group (`Style`).

    - ``Clipping.abadi(R)``: ``min(1, R / n)`` (Abadi et al., arXiv:1607.00133).
    - ``Clipping.automatic(gamma)``: ``R / (n + gamma)`` with R = 1 (AUTO-S, arXiv:2206.07136). Nothing to tune: R only
      rescales the learning rate.
    - ``Clipping.none()``: factor 1 and infinite sensitivity. Such a sum can only be released without a guarantee.

    **Guarantees.** For every norm, ``factor(n) * n <= clip_bound``; a non-finite norm gets factor 0, so an example that
    produced NaN or infinity contributes exactly nothing.
    """

    kind: ClippingKind
    clip_bound: float
    gamma: float = 0.0
    style: Style = field(default_factory=Style.flat)

    def __post_init__(self) -> None:
        if not self.clip_bound > 0 or math.isnan(self.clip_bound):
            raise ConfigError(f"clip bound {self.clip_bound}: must be above 0; pass e.g. Clipping.abadi(1.0).")
        if math.isinf(self.clip_bound) and self.kind is not ClippingKind.NONE:
            raise ConfigError("clip bound inf: bounds nothing; use Clipping.none() for training without a guarantee.")
        if self.kind is ClippingKind.AUTOMATIC and not (0 < self.gamma < math.inf):
            raise ConfigError(f"gamma {self.gamma}: must be a finite number above 0; the usual value is 0.01.")

    @classmethod
    def abadi(cls, clip_bound: float, *, style: Style | None = None) -> Clipping:
        """Scale down to norm ``clip_bound`` when above it; leave alone when below."""
        _need_reach("clip bound", clip_bound)
        return cls(kind=ClippingKind.ABADI, clip_bound=float(clip_bound), style=style or Style.flat())

    @classmethod
    def automatic(cls, gamma: float = 0.01, *, style: Style | None = None) -> Clipping:
        """Normalise every gradient, softly at zero: ``g / (|g| + gamma)``."""
        _need_reach("gamma", gamma)
        return cls(kind=ClippingKind.AUTOMATIC, clip_bound=1.0, gamma=float(gamma), style=style or Style.flat())

    @classmethod
    def none(cls) -> Clipping:
        """No bound. For ``epsilon = inf`` only; `release` refuses to add noise to such a sum."""
        return cls(kind=ClippingKind.NONE, clip_bound=math.inf)

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of the clipped sum, over all groups, when one example is added or removed."""
        return self.clip_bound

    def share(self, groups: int) -> Clipping:
        """The rule for one of so many groups: bound ``R / sqrt(groups)``, so that all together stay within R."""
        return self if groups == 1 else replace(self, clip_bound=self.clip_bound / math.sqrt(groups))

    def factor(self, norm_B: Tensor) -> Tensor:
        """Factors for the given norms.

        Args:
            norm_B: per-example gradient norms, shape (B,), at least float32; may hold NaN or infinity.

        Returns:
            Factors, shape (B,), in ``[0, R / gamma]``; 0 where the norm is not finite.
        """
        if self.kind is ClippingKind.ABADI:
            factor_B = (self.clip_bound * ROUNDING_MARGIN / norm_B).clamp(max=1.0)
        elif self.kind is ClippingKind.AUTOMATIC:
            factor_B = self.clip_bound * ROUNDING_MARGIN / (norm_B + self.gamma)
        else:
            factor_B = torch.ones_like(norm_B)
        # A subnormal factor has lost its last bits, and may have been rounded up: nothing is within the bound.
        counts = torch.isfinite(norm_B) & (factor_B >= torch.finfo(factor_B.dtype).tiny)
        return torch.where(counts, factor_B, torch.zeros_like(factor_B))

    def describe(self) -> dict[str, str | float]:
        """The public record of this rule, as it stands in ``plan.json``."""
        record: dict[str, str | float] = {"kind": self.kind.value, "style": self.style.describe()}
        if self.kind is not ClippingKind.NONE:
            record["clip_bound"] = self.clip_bound
        if self.kind is ClippingKind.AUTOMATIC:
            record["gamma"] = self.gamma
        return record


def _need_reach(name: str, value: float) -> None:
    """Norms are taken to 1e-12 where squares vanish: a rule that tells smaller ones apart would be fooled by them."""
    if 0 < value < _SMALLEST:
        raise ConfigError(f"{name} {value}: must be at least {_SMALLEST:g}; scale the loss up instead.")


@dataclass(frozen=True)
class ClippedSum:
    """A sum over examples in which each example's share is bounded. Not yet private: see `discreet.core.noise.release`.

    Attributes:
        tensors: name -> sum, float32 or float64; float64 when it was added up from several.
        sensitivity: largest L2 change, over all tensors together, when one example is added or removed.
    """

    tensors: Mapping[str, Tensor]
    sensitivity: float

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
        if self.tensors.keys() != other.tensors.keys() or self.sensitivity != other.sensitivity:
            raise ConfigError("cannot add clipped sums of other tensors or bounds; use one model and one Clipping.")
