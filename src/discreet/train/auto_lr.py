"""The learning rate: set by probes inside the budget, by a number, or by a torch scheduler.

The best rate of DP-SGD grows linearly with epsilon, but that of sign-like methods, DP-Adam among them, is nearly
independent of it (arXiv:2603.03226): Adam divides by the size of what it sees, and under DP that is mostly the noise.
So a movement per update is known beforehand to a factor of a few, for every budget. A few private probes before the
first update, and a few more when an eighth is made, find the rest (`discreet.train.tolerance`,
`discreet.train.rate_search`), and the optimizer's response to noise turns the movement into its rate
(`discreet.train.response`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from discreet.errors import ConfigError
from discreet.train.rate_search import RateSearch
from discreet.train.response import is_scale_free, response
from discreet.train.tolerance import PRIOR, Asked, Question, Verdict

AUTO = "auto"


@dataclass(frozen=True)
class AutoLR:
    """A learning rate that sets itself. Nothing needs to be given; the optimizer's own rate is ignored, not its ratios.

    Attributes:
        lr_scale: multiplies the rate that was found: the one knob.
        scheduler: a torch scheduler over the same optimizer, stepped once per update, whose rate over its initial rate
            multiplies ours. None: decay to zero, as `decay`.
        prior: where the search begins; a movement of weights, not a rate. For experiments: the result does not depend
            on it over four orders of magnitude (docs/lab-notes.md).
    """

    lr_scale: float = 1.0
    scheduler: LRScheduler | None = None
    prior: float = PRIOR

    def __post_init__(self) -> None:
        for name, value in (("lr_scale", self.lr_scale), ("prior", self.prior)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name}={value}: must be a finite number above 0; leave it out for the default.")


LearningRate = float | str | LRScheduler | AutoLR | None
"""A peak rate with linear decay; "auto" or `AutoLR`; a torch scheduler, stepped once per update; None: the
optimizer's own."""


@dataclass(frozen=True)
class GradientNoise:
    """Public numbers on the noise in released gradients and probes.

    Attributes:
        multiplier: sigma. batch_size: the expected batch. sensitivity: of the clipped sum; infinite without clipping.
        even: whether every parameter has noise of one size; groups with noise weights of their own have not.
    """

    multiplier: float
    batch_size: int
    sensitivity: float
    even: bool = True

    @property
    def share(self) -> float:
        """Standard deviation of the released mean of a number in [-1, 1]."""
        return self.multiplier / self.batch_size

    @property
    def std(self) -> float:
        """Standard deviation in each entry of the released gradient; 0 where there is none."""
        return self.share * self.sensitivity if self.multiplier else 0.0


@dataclass(frozen=True)
class LinearDecay:
    """``peak * (1 - step / steps)``, a function of public numbers only."""

    peak: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.peak < float("inf"):
            raise ConfigError(f"learning_rate={self.peak}: must be a finite number above 0; the usual value is 0.01.")

    def at(self, step: int) -> float:
        """Rate of update ``step``, counted from 0."""
        return self.peak * (1.0 - step / self.steps)


def decay(step: int, steps: int) -> float:
    """``sqrt(1 - step / steps)``: what an automatic rate is multiplied by at this update.

    Where updates are mostly noise, what is learned grows like the sum of the rates, and the noise in the weights like
    the root of the sum of their squares. At equal sums a constant rate has the least noise, a linear decay 15 % more,
    this one 6 %; and it still ends where the last updates do little harm (docs/lab-notes.md).
    """
    return math.sqrt(1.0 - step / steps)


@dataclass(frozen=True)
class _Left:
    """How an update left the optimizer and its scheduler.

    Attributes:
        rates: of all groups. steps: that the scheduler has counted; None when there is none, or it does not count.
    """

    rates: list[float]
    steps: int | None


class RateControl:
    """Sets the learning rate of every parameter group before each update, keeping the ratios between groups.

    Args:
        optimizer: whose rates are set.
        learning_rate: see `LearningRate`.
        steps: S.
        noise: of the run; without it "auto" has no unit to set a rate in.

    Raises:
        ConfigError: "auto" where nothing says in which unit the optimizer's rate is, a scheduler of another optimizer,
            or a scheduler that would write the rate beside "auto".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        learning_rate: LearningRate,
        *,
        steps: int,
        noise: GradientNoise | None = None,
    ) -> None:
        self._optimizer = optimizer
        self.scheduler: LRScheduler | None = None
        self.search: RateSearch | None = None
        self._decay: LinearDecay | None = None
        self._auto: AutoLR | None = None
        self._steps = steps
        if isinstance(learning_rate, LRScheduler):
            self.scheduler = _checked(learning_rate, optimizer)
        elif isinstance(learning_rate, AutoLR) or learning_rate == AUTO:
            self._begin_search(learning_rate if isinstance(learning_rate, AutoLR) else AutoLR(), noise)
        elif isinstance(learning_rate, str):
            raise ConfigError(f'learning_rate="{learning_rate}": must be "auto", a number, a torch scheduler or None.')
        elif learning_rate is not None:
            self._decay = LinearDecay(float(learning_rate), steps)
        # With a scheduler, the ratios are those from which it started.
        self._bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        first = self._bases[0]
        self.ratios = [base / first if first else 1.0 for base in self._bases]
        self._scheduled = self._rates()
        self._written = self._state()

    def describe(self) -> str:
        """What rules the rate, for the record of what a run depends on."""
        ruler = "" if self.scheduler is None else type(self.scheduler).__qualname__
        if self._auto is not None:
            scale, prior = self._auto.lr_scale, self._auto.prior
            return f"auto lr_scale={scale!r} prior={prior!r} groups={self.ratios!r} scheduler={ruler}"
        return ruler or repr(self._decay)

    @property
    def verdict(self) -> Verdict | None:
        """Where an automatic rate comes from; None when the rate was given."""
        return None if self.search is None else self.search.verdict()

    def question(self, done: int) -> Question | None:
        """What the rate asks of the next update in place of a gradient; None when nothing is due, or it was given.

        Args:
            done: updates made, probes among them.
        """
        return None if self.search is None else self.search.question(done)

    def observe(self, question: Question, released: Sequence[float]) -> dict[str, float]:
        """Take in what a probe released, and say it in numbers for the log."""
        assert self.search is not None
        if question.asked is Asked.LEVEL:
            self.search.observe_level(released)
            level = self.search.level
            return {} if level is None else {"loss_level": level}
        answer = self.search.observe_rise(question, released[0])
        return {
            "probe_displacement": answer.displacement,
            "probe_rise": answer.rise,
            "probe_noise": answer.noise,
            "probe_rate": self._peak(),
        }

    def refuse_others(self) -> None:
        """Two who write the rate: one of them is ignored, and nobody would know which. Asked before a release.

        Raises:
            ConfigError: the rate, or the scheduler that was passed, is not as it was left here.
        """
        found, left = self._state(), self._written
        if found == left or (self._auto is None and self._decay is None and self.scheduler is None):
            return
        if self.scheduler is not None and found.steps != left.steps:
            raise ConfigError(
                f"{type(self.scheduler).__name__}.step() was called in the loop: a scheduler passed as learning_rate "
                "is stepped here, once per update; drop the call."
            )
        if len(found.rates) != len(left.rates):
            raise ConfigError(
                f"{len(found.rates)} groups of parameters, and {len(left.rates)} when their rates were set: make them "
                "before make_private, or set learning_rate=None."
            )
        ruler = "a number" if self._decay is not None else "a scheduler" if self._auto is None else '"auto"'
        raise ConfigError(
            f"lr={found.rates[0]} although learning_rate, {ruler}, set {left.rates[0]}: a scheduler or the loop also "
            "writes lr; pass the scheduler alone as learning_rate, or as AutoLR(scheduler=...), or set "
            "learning_rate=None."
        )

    def before_update(self, step: int) -> float:
        """Set the rates for this update; returns the first group's."""
        if self._auto is not None:
            if self.scheduler is None:
                factors = [decay(step, self._steps)] * len(self.ratios)
            else:
                factors = [rate / base for rate, base in zip(self._scheduled, self._bases, strict=True)]
            peak = self._peak()
            self._write([peak * ratio * factor for ratio, factor in zip(self.ratios, factors, strict=True)])
        elif self._decay is not None:
            rate = self._decay.at(step)
            self._write([rate * ratio for ratio in self.ratios])
        return float(self._optimizer.param_groups[0]["lr"])

    def after_update(self) -> None:
        """Step the torch scheduler, if there is one, on the rates that it knows."""
        if self.scheduler is None:
            return
        if self._auto is not None:
            ours = self._rates()
            self._write(self._scheduled)
            self.scheduler.step()
            self._scheduled = self._rates()
            self._write(ours)
        else:
            self.scheduler.step()
            self._written = self._state()

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must keep beyond the scheduler; None when the rate was given."""
        if self.search is None:
            return None
        return {**self.search.state(), "scheduled": self._scheduled}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take in the `state` of a checkpoint, after the optimizer has its own back.

        Raises:
            ConfigError: it is of another kind of rate, or of another version's search.
        """
        if (state is None) != (self.search is None):
            raise ConfigError('the checkpoint is of another learning rate: "auto" there or here; pass the same again.')
        if state is not None and self.search is not None:
            try:
                self.search.restore(state)
                self._scheduled = list(state["scheduled"])
            except (KeyError, TypeError):
                raise ConfigError(
                    f'learning_rate="auto": the checkpoint\'s search has fields {", ".join(sorted(state))}, and this '
                    "version does not read them; resume with the version that wrote it, or start a new run."
                ) from None
        self._written = self._state()

    def _begin_search(self, auto: AutoLR, noise: GradientNoise | None) -> None:
        name = type(self._optimizer).__name__
        if noise is None:
            raise ConfigError('learning_rate="auto" outside a private run: nothing is probed there; pass a number.')
        if auto.scheduler is not None:
            self.scheduler = _checked(auto.scheduler, self._optimizer)
        elif any("initial_lr" in group for group in self._optimizer.param_groups):
            raise ConfigError(
                f'learning_rate="auto" with {name}: a scheduler was made for it, which also writes lr; pass it as '
                "AutoLR(scheduler=...), or alone as learning_rate."
            )
        known = 0 < noise.std < math.inf and noise.even
        if not known and not is_scale_free(self._optimizer, noise_std=_UNIT):
            sizes = "no noise: no" if noise.even else "noise of several sizes (a temperature has its own): no one"
            raise ConfigError(
                f'learning_rate="auto" with {name} and {sizes} known size of gradients gives its rate a unit, '
                "so none follows; pass a number, or use Adam."
            )
        self._auto = auto
        self._response = response(self._optimizer, noise_std=noise.std if known else _UNIT)
        self.search = RateSearch(noise=noise.share, updates=self._steps, prior=auto.prior)

    def _peak(self) -> float:
        """The first group's rate at the first update, as far as it is known."""
        assert self._auto is not None
        assert self.search is not None
        return self._auto.lr_scale * self.search.verdict().movement / self._response

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def _state(self) -> _Left:
        known = {} if self.scheduler is None else self.scheduler.state_dict()
        return _Left(rates=self._rates(), steps=known.get("last_epoch"))

    def _write(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._written = self._state()


_UNIT = 1e-3
"""Size of rehearsed gradients where the run's noise gives none."""


def _checked(scheduler: LRScheduler, optimizer: torch.optim.Optimizer) -> LRScheduler:
    if scheduler.optimizer is not optimizer:
        raise ConfigError("the scheduler belongs to another optimizer; make it from the optimizer passed here.")
    if needs_arguments(type(scheduler).step):
        raise ConfigError(
            f"{type(scheduler).__name__}: its step needs a metric, and none of the private data is released; use a "
            "scheduler that depends on the step alone."
        )
    return scheduler


def needs_arguments(method: Callable[..., object]) -> bool:
    """Whether a method, as its class defines it, cannot be called without arguments."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return any(p.default is inspect.Parameter.empty and p.kind not in kinds for p in parameters)
