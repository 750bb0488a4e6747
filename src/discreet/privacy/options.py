"""What the planner answers: plans side by side, one of them recommended, each number with its reason. Records only.

Symbols: N examples; B expected batch; S steps; sigma noise multiplier; nu = sigma / B; r noise over that of full
batches; mu GDP parameter; d trainable numbers of the model.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from discreet.privacy.compute import Bound, Machine
from discreet.privacy.plan import Plan


class Kind(enum.Enum):
    """What a plan is for.

    CHEAP, KNEE and MAXIMAL pay 50, 5 and 2 % more noise than full batches would. SMALL and LARGE are the first and the
    last of them where the passes over the data are fixed, and nothing is cheaper than anything else. BALANCED uses up a
    bound that rules the knee out. GIVEN is what the user asked for.
    """

    CHEAP = "cheap"
    SMALL = "small batch"
    BALANCED = "balanced"
    KNEE = "knee"
    MAXIMAL = "maximal"
    LARGE = "large batch"
    GIVEN = "given"


class Mode(enum.Enum):
    """What was bounded."""

    FREE = "free"
    BOUNDED = "bounded compute"
    EPOCHS = "fixed epochs"


@dataclass(frozen=True)
class Option:
    """One plan, and what it means.

    Attributes:
        kind: what it is for.
        plan: the record that training takes.
        overhead: r, its noise per step over that of full batches with as many steps, both certified by the accountant.
        knee_share: B over the knee batch for its steps. wall_share: B over the batch at which r = 2.
        epochs: passes over the data, S B / N.
        signal: upper bound on the length of a clipped mean gradient over that of the noise, ``1 / (nu sqrt(d))``; None
            without the number of parameters. The true signal is a fact about the data, and not known here.
        seconds, microbatch, peak_bytes: expected on the machine; None where nothing was measured.
        cost: money; None without a price.
        cumulative: noise summed over all steps at a learning rate of 1 / S, in clip bounds: ``nu / sqrt(S)``, which is
            ``r E / (mu B)`` at a rate of 1 for E epochs.
        fits: whether it keeps the bound.
        reasons: number -> why it is what it is.
    """

    kind: Kind
    plan: Plan
    overhead: float
    knee_share: float
    wall_share: float
    epochs: float
    signal: float | None
    seconds: float | None
    microbatch: int | None
    peak_bytes: float | None
    cost: float | None
    cumulative: float
    fits: bool
    reasons: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """JSON values; `Plan.to_json` under "plan"."""
        return {
            "kind": self.kind.value,
            "plan": self.plan.to_json(),
            "sample_rate": self.plan.sample_rate,
            "noise_over_full_batch": self.overhead,
            "batch_over_knee": self.knee_share,
            "batch_over_wall": self.wall_share,
            "epochs": self.epochs,
            "signal_to_noise_at_most": self.signal,
            "seconds": self.seconds,
            "microbatch": self.microbatch,
            "peak_bytes": self.peak_bytes,
            "cost": self.cost,
            "cumulative_noise": self.cumulative,
            "fits": self.fits,
            "reasons": dict(self.reasons),
        }


@dataclass(frozen=True)
class WhatIf:
    """What a change would do, by the closed form: the factor on the noise, or the new epsilon."""

    change: str
    effect: str
    factor: float


@dataclass(frozen=True)
class Proposal:
    """The plans side by side.

    Attributes:
        options: from the cheapest to the dearest.
        recommended: one of them.
        mode: what was bounded. bound: the bound, also where it is the default one.
        mu: GDP parameter that epsilon and delta leave for training.
        machine: what times are for; None when nothing was measured or told.
        what_if: what changes would do to the recommended plan.
        warnings: what to know before relying on it.
    """

    options: tuple[Option, ...]
    recommended: Option
    mode: Mode
    bound: Bound
    mu: float
    machine: Machine | None
    what_if: tuple[WhatIf, ...]
    warnings: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        """The recommended plan: hand it to `make_private(plan=...)`, or save it for `discreet train --plan`."""
        return self.recommended.plan

    def to_json(self) -> dict[str, object]:
        """Everything, as JSON values."""
        return {
            "recommended": self.recommended.kind.value,
            "mode": self.mode.value,
            "bound": self.bound.said,
            "mu": self.mu,
            "options": [option.to_json() for option in self.options],
            "what_if": [{"change": item.change, "effect": item.effect, "factor": item.factor} for item in self.what_if],
            "warnings": list(self.warnings),
            "machine": self.machine.place if self.machine is not None else None,
            "examples_per_second": self.machine.throughput if self.machine is not None else None,
        }
